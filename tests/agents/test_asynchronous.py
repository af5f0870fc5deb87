"""`learn(asynchronous=True)`: gradient steps on a thread of their own, beside the steps of the environments."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.agents import counting_envs, make_agent, make_planner, rows_compared, weights
from helpers.envs import CountingEnv
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback, EvalCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import update_learning_rate
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch.nn.utils import vector_to_parameters

from worldflux import WorldFluxAgent
from worldflux.accel import ranks
from worldflux.agents import learning
from worldflux.agents.callbacks import AgentCheckpointCallback
from worldflux.errors import ConfigurationError, TrainingError

BOTH = pytest.mark.parametrize("make", [make_agent, make_planner], ids=["dreamerv3", "tdmpc2"])
WAIT = 30.0
"""Seconds after which a test gives up to wait for the other thread."""


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "learner"]


class Looking(CountingEnv):
    """Calls `look` in every step."""

    look: Callable[[], None] | None = None

    def step(self, action: Any) -> Any:
        if self.look is not None:
            self.look()
        return super().step(action)


def looking(make: Callable[..., WorldFluxAgent], **settings: Any) -> tuple[WorldFluxAgent, Looking]:
    """An agent, and its environment whose steps can be looked into."""
    env = Looking(lengths=(9,))
    return make(Monitor(env), **settings), env


def around_gradient_steps(
    agent: WorldFluxAgent,
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Has functions called before and after each gradient step of the agent, on the thread that takes it."""
    step = agent.trainer.step

    def wrapped(*args: Any) -> Any:
        before()
        losses = step(*args)
        after()
        return losses

    agent.trainer.step = wrapped  # type: ignore[method-assign]


def digest(model: torch.nn.Module) -> int:
    return hash(b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values()))


# --- counts


@BOTH
def test_without_any_lag_it_gives_the_bits_of_acting_and_learning_in_turn(
    make: Callable[..., WorldFluxAgent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "CHECK_INTERVAL", 1)
    in_turn, beside = make(), make()
    # The environments go on as soon as a gradient step is counted, when its weights are not yet those that act.
    monkeypatch.setattr(beside.trainer, "check_finite", lambda: time.sleep(0.003))

    def wait(*_: Any) -> None:
        while beside._learner.updates_owed:
            time.sleep(0.0002)

    in_turn.learn(50)
    beside.learn(50, wait, asynchronous=True, max_policy_lag=0)
    assert beside._n_updates > 10 and torch.equal(weights(in_turn), weights(beside))
    assert beside.policy_lag is None and beside.acting_model is beside.model


@pytest.mark.parametrize(("ratio", "n_envs"), [(3, 1), (14, 1), (10, 3)])
def test_as_many_gradient_steps_are_taken_as_in_turn(ratio: float, n_envs: int) -> None:
    runs = []
    for asynchronous in (False, True):
        agent = make_agent(counting_envs(n_envs, lengths=(9,)), train_ratio=ratio)
        agent.learn(21, asynchronous=asynchronous).learn(15, reset_num_timesteps=False, asynchronous=asynchronous)
        runs.append((agent.num_timesteps, agent._n_updates, agent.trainer.step_count, agent._learner.updates_owed))
        assert rows_compared(agent) > 50
    assert runs[0] == runs[1] and runs[1][1] > 5


@BOTH
def test_the_first_gradient_steps_of_a_random_start_are_not_run_ahead_of(make: Callable[..., WorldFluxAgent]) -> None:
    """With TD-MPC2, more of them are owed at once than acting may lack."""
    agent, env = looking(make, train_ratio=24)
    seen: list[tuple[int, int]] = []
    env.look = lambda: seen.append((agent._n_updates, agent.policy_lag or 0))
    agent.learn(40, asynchronous=True, max_policy_lag=2)
    assert max(lag for _, lag in seen) <= 2
    first = next(updates for updates, _ in seen if updates)
    assert first >= (agent.schedule.first_updates - 2 if make is make_planner else 1)


# --- at the same time


def test_the_environments_step_while_a_gradient_step_is_taken_up_to_the_bound() -> None:
    agent, env = looking(make_agent, train_ratio=12)  # a gradient step for every step
    lags: list[int] = []
    enough, blocked = threading.Event(), threading.Event()

    def look() -> None:
        lags.append(agent.policy_lag or 0)
        if lags[-1]:
            assert blocked.wait(WAIT)  # until the gradient step has begun
        if lags[-1] == 3:
            enough.set()

    def block() -> None:
        if not enough.is_set():
            blocked.set()
            assert enough.wait(WAIT), "the environment made no step during a gradient step"

    env.look = look
    around_gradient_steps(agent, before=block)
    agent.learn(40, asynchronous=True, max_policy_lag=3)
    assert [lag for lag in lags if lag][:3] == [1, 2, 3] and max(lags) == 3
    assert agent._n_updates == make_agent("CartPole-v1", train_ratio=12).learn(40)._n_updates


def test_gradient_steps_are_taken_while_a_step_of_the_environment_takes_long() -> None:
    agent, env = looking(make_agent, train_ratio=24)  # two gradient steps for every step
    learned = threading.Event()
    waits: list[bool] = []

    def look() -> None:
        if agent._learner.updates_owed:
            learned.clear()
            waits.append(agent._learner.updates_owed == 0 or learned.wait(WAIT))

    env.look = look
    around_gradient_steps(agent, after=learned.set)
    agent.learn(30, asynchronous=True, max_policy_lag=16)
    assert all(waits), "no gradient step was taken during a step of the environment"


def test_a_callback_that_does_not_look_at_the_model_does_not_stop_the_learner() -> None:
    agent, _ = looking(make_agent, train_ratio=12)
    began, waits = threading.Event(), []
    around_gradient_steps(agent, before=began.set)

    def callback(*_: Any) -> None:
        if agent._n_updates < 5 and agent._learner.updates_owed:
            waits.append(began.wait(WAIT))
            began.clear()

    agent.learn(30, callback, asynchronous=True)
    assert waits and all(waits)


# --- weights


@BOTH
def test_acting_weights_are_those_after_whole_gradient_steps(make: Callable[..., WorldFluxAgent]) -> None:
    agent, env = looking(make, train_ratio=8 * make()._learner.trainer.config.batch_size)
    whole, acted = {digest(agent.model)}, []
    around_gradient_steps(agent, after=lambda: whole.add(digest(agent._learner.trainer.model)))
    env.look = lambda: acted.append(digest(agent.acting_model))
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        agent.learn(60, asynchronous=True)
    finally:
        sys.setswitchinterval(before)
    assert set(acted) <= whole and len(set(acted)) > 10


class Looks(BaseCallback):
    """Looks at the model twice in every third step, with time for a gradient step in between."""

    model: WorldFluxAgent

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.seen = path, []  # type: ignore[var-annotated]

    def _on_step(self) -> bool:
        if self.n_calls % 3:
            return True
        model = self.model.model
        first, updates = digest(model), self.model._n_updates
        threading.Event().wait(0.005)
        self.model.save(self.path)
        saved = WorldFluxAgent.load(self.path, device="cpu")
        assert digest(model) == first == digest(saved.model)
        assert updates == self.model._n_updates == saved._n_updates == saved.trainer.step_count
        assert saved._learner.updates_owed == self.model._learner.updates_owed
        self.seen.append(first)
        return True


@BOTH
def test_callbacks_see_and_save_the_model_between_two_gradient_steps(
    make: Callable[..., WorldFluxAgent], tmp_path: Path
) -> None:
    agent, _ = looking(make, train_ratio=12)
    whole, looks = {digest(agent.model)}, Looks(tmp_path / "agent.zip")
    around_gradient_steps(agent, after=lambda: whole.add(digest(agent._learner.trainer.model)))
    agent.learn(30, looks, asynchronous=True)
    assert set(looks.seen) <= whole and len(set(looks.seen)) > 3


def test_a_callback_may_evaluate_copy_and_change_the_agent() -> None:
    agent, _ = looking(make_agent)
    copies: list[WorldFluxAgent] = []
    acted: list[bool] = []

    def change(local: dict[str, Any], _: Any) -> None:
        if agent.num_timesteps == 15:
            copies.append(copy.deepcopy(agent))
        elif agent.num_timesteps == 20:
            agent.set_parameters({"policy": {name: x * 0 + 0.125 for name, x in agent.model.state_dict().items()}})
            agent.train_ratio = 0
        elif agent.num_timesteps == 21:
            acted.append(all((p == 0.125).all() for p in agent.acting_model.parameters()))
            agent.set_env(CountingEnv(lengths=(4,)))
            agent.train_ratio = 6
        elif agent.num_timesteps == 30:
            agent.replay_buffer = agent._make_buffer()
            agent.learning_rate = 1e-5

    evaluate = EvalCallback(DummyVecEnv([lambda: Monitor(CountingEnv())]), n_eval_episodes=1, eval_freq=7, verbose=0)
    agent.learn(60, [ConvertCallback(change), evaluate], asynchronous=True)
    assert acted == [True] and agent._n_updates > 15 and rows_compared(agent) > 50
    assert agent.trainer.optimizers[0].param_groups[0]["lr"] == 1e-5
    assert copies[0].policy_lag is None
    copies[0].learn(20, reset_num_timesteps=False)
    copies[0].learn(20, reset_num_timesteps=False, asynchronous=True)
    assert copies[0].num_timesteps == 55 and copies[0]._learner.updates_owed == 0


def test_weights_that_a_callback_replaces_by_other_tensors_act_as_well() -> None:
    agent, _ = looking(make_agent)
    acted: list[bool] = []

    def replace(*_: Any) -> None:
        if agent.num_timesteps == 20:
            parameters = list(agent.model.parameters())
            vector_to_parameters(torch.zeros(sum(map(torch.numel, parameters))), parameters)
            agent.train_ratio = 0
        elif agent.num_timesteps == 21:
            acted.append(all((p == 0).all() for p in agent.acting_model.parameters()))

    agent.learn(22, replace, asynchronous=True)
    assert acted == [True] and agent._n_updates > 2


def test_a_buffer_that_a_callback_sets_waits_for_the_gradient_step_on_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent, _ = looking(make_agent, replay_context=False)
    due, replaced = threading.Event(), threading.Event()

    def wait(*args: Any) -> None:
        due.set()
        replaced.wait(0.1)  # as long as it is not waited for
        update_learning_rate(*args)

    def replace(*_: Any) -> None:
        if agent.num_timesteps == 25:
            due.clear()
            assert due.wait(WAIT)
            agent.replay_buffer = agent._make_buffer()
            replaced.set()

    monkeypatch.setattr("worldflux.agents.asynchronous.update_learning_rate", wait)
    agent.learn(60, replace, asynchronous=True)
    assert agent._learner.updates_owed == 0 and rows_compared(agent) > 50


def test_an_environment_may_ask_the_agent_for_the_actions_of_a_rival() -> None:
    agent, env = looking(make_agent)
    env.look = lambda: agent.predict(np.zeros(4))
    agent.learn(40, asynchronous=True)
    assert agent._n_updates == make_agent("CartPole-v1").learn(40)._n_updates


# --- ends


class Broken(Exception):
    """Raised by the tests."""


def break_here(when: bool) -> None:
    if when:
        raise Broken("on purpose")


def test_an_error_of_the_learner_is_raised_as_itself_and_learning_goes_on_afterwards() -> None:
    agent, _ = looking(make_agent)
    step = agent.trainer.step
    around_gradient_steps(agent, before=lambda: break_here(agent._learner.n_updates == 5))
    with pytest.raises(Broken) as raised:
        agent.learn(500, asynchronous=True)
    assert "break_here" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert agent._n_updates == 5 and agent.num_timesteps < 100
    agent.trainer.step = step  # type: ignore[method-assign]
    agent.learn(20, reset_num_timesteps=False, asynchronous=True)
    assert agent._n_updates > 5 and agent._learner.updates_owed == 0


def test_a_loss_that_is_not_finite_is_named() -> None:
    agent, _ = looking(make_agent, learning_rate=1e30)
    with pytest.raises(TrainingError, match="not finite"):
        agent.learn(400, asynchronous=True)


@pytest.mark.parametrize("where", ["environment", "callback"])
def test_an_error_elsewhere_ends_the_thread_of_the_learner(where: str) -> None:
    agent, env = looking(make_agent)
    look = lambda: break_here(agent.num_timesteps == 30)  # noqa: E731
    env.look = look if where == "environment" else None
    with pytest.raises(Broken):
        agent.learn(500, (lambda *_: look()) if where == "callback" else None, asynchronous=True)
    env.look = None
    agent.learn(20, reset_num_timesteps=False, asynchronous=True)
    assert agent.num_timesteps == 50 and agent._learner.updates_owed == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_what_is_saved_goes_on_with_exact_counts(number: int, tmp_path: Path) -> None:
    agent, env = looking(make_agent, train_ratio=12)

    def interrupt() -> None:
        if agent.num_timesteps == 25:
            os.kill(os.getpid(), number)

    env.look = interrupt
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        agent.learn(100, AgentCheckpointCallback(tmp_path, 1000), asynchronous=True, max_policy_lag=7)
    assert agent.num_timesteps == 26
    resumed = WorldFluxAgent.load(tmp_path, Monitor(CountingEnv(lengths=(9,))), device="cpu", resume=True)
    assert (resumed.num_timesteps, resumed._n_updates) == (26, resumed.trainer.step_count)
    assert resumed._n_updates + resumed._learner.updates_owed == agent._learner.updates_asked
    resumed.learn(14, reset_num_timesteps=False, asynchronous=True)
    whole, _ = looking(make_agent, train_ratio=12)
    whole.learn(40)
    assert (resumed.num_timesteps, resumed._n_updates) == (40, whole._n_updates)


def test_a_signal_while_acting_waits_for_learning_ends_it() -> None:
    agent, _ = looking(make_planner, train_ratio=64)

    def interrupt() -> None:
        if agent._learner.n_updates == 7:
            os.kill(os.getpid(), signal.SIGINT)

    around_gradient_steps(agent, before=interrupt)
    with pytest.raises(KeyboardInterrupt):
        agent.learn(100, asynchronous=True)
    assert agent.num_timesteps == 20 and 8 <= agent._n_updates < agent._learner.updates_asked


@BOTH
def test_checkpoints_in_the_middle_hold_exact_counts(make: Callable[..., WorldFluxAgent], tmp_path: Path) -> None:
    agent, _ = looking(make, train_ratio=12)
    agent.learn(40, AgentCheckpointCallback(tmp_path, 15), asynchronous=True, max_policy_lag=16)
    resumed = WorldFluxAgent.load(tmp_path / "step-00000030", CountingEnv(lengths=(9,)), device="cpu", resume=True)
    assert resumed.trainer.step_count == resumed._n_updates
    resumed.learn(10, reset_num_timesteps=False, asynchronous=True)
    assert (resumed.num_timesteps, resumed._n_updates) == (40, agent._n_updates)


# --- what is said and refused


def test_it_is_announced_and_logged(capfd: pytest.CaptureFixture[str]) -> None:
    agent, _ = looking(make_agent)
    logged: dict[str, float] = {}

    class Keeps(BaseCallback):
        def _on_training_start(self) -> None:
            dump = self.logger.dump
            self.logger.dump = lambda step=0: (logged.update(self.logger.name_to_value), dump(step))[1]  # type: ignore[method-assign, assignment]

        def _on_step(self) -> bool:
            return True

    agent.learn(60, Keeps(), asynchronous=True, max_policy_lag=5, progress_bar=True, log_interval=2)
    assert "at most 5 gradient steps behind" in capfd.readouterr().err
    assert 0 <= logged["time/learner_idle"] <= 1 and 0 <= logged["time/actor_idle"] <= 1
    assert 0 <= logged["time/policy_lag"] <= 5


class OwnPredict(WorldFluxAgent):
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        return super().predict(*args, **kwargs)


def normalised() -> VecNormalize:
    return VecNormalize(counting_envs(1))


@pytest.mark.parametrize(
    ("agent", "arguments", "message"),
    [
        (make_agent, {"max_policy_lag": 3}, "max_policy_lag is 3, which bounds"),
        (make_agent, {"asynchronous": 1}, "asynchronous is 1, expected True or False"),
        (make_agent, {"asynchronous": True, "max_policy_lag": -1}, "max_policy_lag is -1, expected a whole number"),
        (make_agent, {"asynchronous": True, "max_policy_lag": 5000}, "max_policy_lag is 5000, expected at most 16"),
        (lambda: make_agent(normalised()), {"asynchronous": True}, "while VecNormalize changes"),
        (lambda: OwnPredict("dreamerv3:tiny", CountingEnv()), {"asynchronous": True}, "OwnPredict overrides predict"),
    ],
)
def test_what_cannot_be_asynchronous_says_why(agent: Any, arguments: dict[str, Any], message: str) -> None:
    made = agent()
    with pytest.raises(ConfigurationError, match=message):
        made.learn(10, **arguments)
    assert made.num_timesteps == 0
    made.learn(10)


def test_an_environment_set_by_a_callback_is_looked_at_as_well() -> None:
    agent, _ = looking(make_agent)
    with pytest.raises(ConfigurationError, match="while VecNormalize changes"):
        agent.learn(40, lambda *_: agent.set_env(normalised()), asynchronous=True)


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent()
    monkeypatch.setattr(ranks, "size", lambda: 2)
    with pytest.raises(ConfigurationError, match="is for a single process"):
        agent.learn(10, asynchronous=True)
