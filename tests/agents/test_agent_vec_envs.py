"""WorldFluxAgent over several environments: training while other processes step, vector environments, frames."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from helpers.agents import make_agent, rows_compared, weights
from helpers.envs import CountingEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecMonitor

import worldflux.agents.agent as agent_module
from worldflux.agents.collecting import frames_per_vec_step, steps_in_subprocesses
from worldflux.envs import make_env, make_vec_env


def counting(env_id: int) -> Callable[[], gym.Env[Any, Any]]:
    return lambda: Monitor(CountingEnv(lengths=(4, 3), ends=("terminate", "truncate"), env_id=env_id))


class LoggedVecEnv(DummyVecEnv):
    """Writes down when a step is asked for and when it is fetched."""

    def __init__(self, env_fns: Any, log: list[str]) -> None:
        self.log = log
        super().__init__(env_fns)

    def step_async(self, actions: Any) -> None:
        self.log.append("ask")
        super().step_async(actions)

    def step_wait(self) -> Any:
        self.log.append("fetch")
        return super().step_wait()


def logged_run(monkeypatch: pytest.MonkeyPatch, elsewhere: bool, steps: int) -> tuple[Any, list[str]]:
    """An agent that owes a gradient step after every step of its two environments from the tenth step on."""
    log: list[str] = []
    monkeypatch.setattr(agent_module, "steps_in_subprocesses", lambda venv: elsewhere)
    agent = make_agent(LoggedVecEnv([counting(0), counting(1)], log))
    step = agent.trainer.step
    monkeypatch.setattr(agent.trainer, "step", lambda *args: (log.append("train"), step(*args))[1])
    return agent.learn(steps), log


def test_the_agent_trains_while_other_processes_step(monkeypatch: pytest.MonkeyPatch) -> None:
    _, log = logged_run(monkeypatch, True, 24)
    first = log.index("train")
    # What the last step owes is paid before learn returns.
    assert log[first - 1 : first + 6] == ["ask", "train", "fetch", "ask", "train", "fetch", "ask"]
    assert log[-2:] == ["fetch", "train"]


def test_in_one_process_the_agent_trains_on_a_step_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    _, log = logged_run(monkeypatch, False, 24)
    first = log.index("train")
    assert log[first - 2 : first + 4] == ["ask", "fetch", "train", "ask", "fetch", "train"]


def test_both_ways_owe_the_same_number_of_gradient_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere, _ = logged_run(monkeypatch, True, 40)
    here, _ = logged_run(monkeypatch, False, 40)
    assert elsewhere._n_updates == here._n_updates == 15  # a window of seven rows is there after six steps of twenty


def test_a_step_that_was_asked_for_is_fetched_when_training_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(agent_module, "steps_in_subprocesses", lambda venv: True)
    agent = make_agent(LoggedVecEnv([counting(0), counting(1)], log))

    def fails(*args: Any) -> None:
        raise KeyboardInterrupt

    step = agent.trainer.step
    monkeypatch.setattr(agent.trainer, "step", fails)
    with pytest.raises(KeyboardInterrupt):
        agent.learn(40)
    assert log.count("ask") == log.count("fetch") > 0
    monkeypatch.setattr(agent.trainer, "step", step)
    agent.learn(20)
    assert rows_compared(agent) > 50


def test_rows_from_processes_belong_together_and_two_runs_give_the_same_bits() -> None:
    runs = []
    for _ in range(2):
        envs = SubprocVecEnv([counting(0), counting(1)], start_method="forkserver")
        try:
            agent = make_agent(envs).learn(60)
        finally:
            envs.close()
        assert rows_compared(agent) > 50
        runs.append(weights(agent))
    np.testing.assert_array_equal(runs[0].numpy(), runs[1].numpy())


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_vector_environments_of_gymnasium_are_learned_in(mode: str) -> None:
    envs = gym.vector.SyncVectorEnv([counting(0), counting(1)], autoreset_mode=mode)
    agent = make_agent(envs).learn(80)
    assert agent.replay_buffer is not None and agent.replay_buffer.num_episodes > 10
    assert rows_compared(agent) > 50
    # An episode of CountingEnv earns 100 * e * T + T * (T + 1) / 2.
    returns = {info["r"] - 100 * info["l"] * round(info["r"] / info["l"] / 100) for info in agent.ep_info_buffer}
    assert returns == {10.0, 6.0}
    mean, _ = evaluate_policy(agent, agent.get_env(), n_eval_episodes=4, warn=False)
    assert np.isfinite(mean)


def test_frames_are_logged_where_actions_are_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    agent = make_agent(make_vec_env("CartPole-v1", 2, action_repeat=3), verbose=1)
    agent.learn(30, log_interval=1)
    printed = capsys.readouterr().out
    frames, steps = (
        [int(number) for number in re.findall(rf"{name} +\| (\d+)", printed)]
        for name in ("total_frames", "total_timesteps")
    )
    assert frames and frames == [3 * step for step in steps]


def test_what_the_loop_asks_of_a_vec_env_is_seen_through_wrappers() -> None:
    plain: VecEnv = DummyVecEnv([CountingEnv])
    assert not steps_in_subprocesses(VecMonitor(plain)) and frames_per_vec_step(plain) == 1
    repeated = DummyVecEnv([lambda: make_env("CartPole-v1", action_repeat=4)])
    assert frames_per_vec_step(VecMonitor(repeated)) == 4
