"""Callbacks that change their own run: its environments, replay data, weights and rates."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.agents import weights
from helpers.envs import CountingEnv
from helpers.sb3_families import AnySpaces, both, make
from stable_baselines3.common.callbacks import BaseCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from worldflux.agents import AgentCheckpointCallback, WorldFluxAgent
from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError
from worldflux.training import ReplayBuffer

HOOKS = ["init", "training_start", "rollout_start", "step", "rollout_end", "training_end"]
AT = 7  # steps, in the middle of an episode


class Once(BaseCallback):
    """Calls `act(agent)` at one of SB3's hooks; at those of steps, when `AT` steps were made."""

    def __init__(self, hook: str, act: Callable[[WorldFluxAgent], Any]) -> None:
        super().__init__()
        self.act, self.called, self.result = act, 0, None
        self.first = AT if hook in ("rollout_start", "step", "rollout_end") else 0
        setattr(self, "_init_callback" if hook == "init" else f"_on_{hook}", self._call)

    def _call(self) -> bool:
        if not self.called and self.num_timesteps >= self.first:
            self.called += 1
            self.result = self.act(self.model)  # type: ignore[arg-type]
        return True

    def _on_step(self) -> bool:
        return True


def counting(env_id: int, n_envs: int = 1) -> DummyVecEnv:
    return DummyVecEnv([lambda: Monitor(CountingEnv(lengths=(5, 9), env_id=env_id)) for _ in range(n_envs)])


def stored(buffer: ReplayBuffer, stream: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The observations, rewards and flags of a stream's rows, in order. `[R, 4]`, `[R]`, `[R]`"""
    rows = buffer.stored()[0]
    at = rows.at(stream, np.arange(int(rows.begin[stream]), int(rows.end[stream])))
    return rows.obs["obs"][at], rows.rewards[at], rows.flags[at]


# --- environments


@pytest.mark.parametrize(("family", "n_envs"), [("dreamerv3", 1), ("tdmpc2", 2)])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_callback_may_set_another_environment_at_any_time(family: str, hook: str, n_envs: int) -> None:
    agent = make(family, counting(0, n_envs))
    after, change = counting(1, n_envs), None

    change = Once(hook, lambda agent: agent.set_env(after))
    agent.learn(24, change)

    assert change.called == 1 and agent.get_env() is after and agent.num_timesteps == 24
    assert agent.replay_buffer.num_transitions == 24
    switched = {"init": 0, "training_start": 0, "training_end": 24}.get(hook, -(-AT // n_envs) * n_envs)
    for stream in range(n_envs):
        obs, rewards, _ = stored(agent.replay_buffer, stream)
        # Rows of a step have its reward; those of an episode's last observation have none.
        of_old = int(np.count_nonzero(rewards[obs[:, 0] == 0]))
        assert of_old == switched // n_envs and int(np.count_nonzero(rewards)) == 24 // n_envs
        assert np.all(np.diff(obs[:, 0]) >= 0)
        if 0 < switched < 24:
            last, first = obs[obs[:, 0] == 0][-1], obs[obs[:, 0] == 1][0]
            # The episode in flight ends with the observation after its last step, and a reset begins the next one.
            steps = switched // n_envs
            assert last[1:3].tolist() == ([1, steps - 5] if steps > 5 else [0, steps])
            assert first[1:3].tolist() == [0, 0]
    agent.learn(4, reset_num_timesteps=False)
    assert agent.num_timesteps == 28


def test_an_episode_that_a_callback_breaks_off_is_truncated_not_terminated() -> None:
    agent = make("dreamerv3", counting(0))
    agent.learn(12, Once("step", lambda agent: agent.set_env(counting(1))))
    batch = agent.replay_buffer.sample(64, 4)
    ended = batch.terminations
    assert bool(ended.any()) and not bool(ended[(batch.obs[..., 1] == 1) & (batch.obs[..., 0] == 0)].any())
    assert agent.replay_buffer.num_episodes == 3  # one of the old environment, one broken off, one of the new


@both
def test_a_curriculum_goes_through_many_environments(family: str) -> None:
    class Curriculum(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps % 6 == 0:
                self.model.set_env(CountingEnv(env_id=self.num_timesteps // 6))
            return True

    agent = make(family, CountingEnv(env_id=0)).learn(30, Curriculum())
    obs, rewards, _ = stored(agent.replay_buffer)
    assert obs[rewards > 0, 0].tolist() == [env_id for env_id in range(5) for _ in range(6)]
    assert agent._n_updates > 0


@both
def test_another_normalisation_is_that_of_the_new_environment(family: str) -> None:
    agent = make(family, VecNormalize(counting(0)))
    after = VecNormalize(counting(1))
    agent.learn(20, Once("step", lambda agent: agent.set_env(after)))
    assert agent.get_vec_normalize_env() is after and after.obs_rms.mean[0] == pytest.approx(1.0, abs=0.01)


@both
@pytest.mark.parametrize(
    ("env", "kind", "message"),
    [
        (lambda: counting(1, 2), AssertionError, r"different from the number of environments in the model: \(2 != 1\)"),
        (lambda: AnySpaces(), ValueError, "Observation spaces do not match"),
        (lambda: "Nowhere-v0", ConfigurationError, "Nowhere-v0"),
    ],
)
def test_an_environment_that_does_not_fit_leaves_the_run_as_it_was(
    family: str, env: Any, kind: Any, message: str
) -> None:
    def attempt(agent: WorldFluxAgent) -> None:
        with pytest.raises(kind, match=message):
            agent.set_env(env())

    agent = make(family, counting(0))
    agent.learn(12, Once("step", attempt))
    obs, rewards, _ = stored(agent.replay_buffer)
    assert obs[rewards > 0, 2].tolist() == [0, 1, 2, 3, 4, *range(7)]  # no episode was broken off


# --- replay data


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(("family", "way"), [("dreamerv3", "loaded"), ("tdmpc2", "assigned")])
def test_a_callback_may_exchange_the_replay_buffer_at_any_time(
    family: str, way: str, hook: str, tmp_path: Path
) -> None:
    other = make(family, counting(3)).learn(11)
    other.save_replay_buffer(tmp_path / "other.npz")
    agent = make(family, counting(0))

    def exchange(agent: WorldFluxAgent) -> None:
        if way == "loaded":
            agent.load_replay_buffer(tmp_path / "other.npz")
        else:
            agent.replay_buffer = other.replay_buffer

    agent.learn(20, Once(hook, exchange))

    before = {"init": 0, "training_start": 0, "training_end": 20}.get(hook, AT)
    streams = [stored(agent.replay_buffer, stream) for stream in range(agent.replay_buffer.num_streams)]
    assert [env_id for obs, rewards, _ in streams for env_id in obs[rewards > 0, 0]] == [3] * 11 + [0] * (20 - before)
    assert (agent.replay_buffer is other.replay_buffer) == (way == "assigned")
    agent.learn(5, reset_num_timesteps=False)
    assert agent.replay_buffer.num_transitions == 36 - before and agent._n_updates > 0


@both
def test_between_two_calls_of_learn_steps_go_into_the_buffer_that_is_set(family: str) -> None:
    agent = make(family, counting(0)).learn(12)
    first, spec = agent.replay_buffer, agent.replay_buffer.extras
    agent.replay_buffer = second = ReplayBuffer(100, (4,), 1, extras=spec, action_type="continuous")
    for reset in (True, False):
        agent.learn(9, reset_num_timesteps=reset)
    assert first.num_transitions == 12 and second.num_transitions == 18


@pytest.mark.parametrize(
    ("buffer", "kind", "message"),
    [
        (None, ConfigurationError, "replay_buffer is None, expected a ReplayBuffer"),
        (ReplayBuffer(100, (5,), 1), ShapeMismatchError, r"observations \(5,\) and 1 action numbers, expected \(4,\)"),
        (ReplayBuffer(100, (4,), 2), ShapeMismatchError, r"\(4,\) and 2 action numbers, expected \(4,\) and 1"),
        (
            ReplayBuffer(100, (4,), 1),
            ConfigurationError,
            r"for 1 environments and has nothing beside its rows, expected 1 and \['deter', 'stoch'\] for this agent\. "
            r"Make it with ReplayBuffer\(\.\.\., n_envs=1, extras=agent\.model\.replay_extras\(\)\)",
        ),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused_with_what_would(buffer: Any, kind: Any, message: str) -> None:
    agent = make("dreamerv3", counting(0)).learn(5)
    before = agent.replay_buffer
    with pytest.raises(kind, match=message):
        agent.replay_buffer = buffer
    assert agent.replay_buffer is before


def test_a_buffer_of_another_number_of_environments_or_kind_of_actions_is_refused() -> None:
    agent = make("tdmpc2", counting(0, 2))
    with pytest.raises(ConfigurationError, match=r"for 1 environments .* expected 2 .* ReplayBuffer\(\.\.\., n_envs=2"):
        agent.replay_buffer = ReplayBuffer(100, (4,), 1)
    discrete = ReplayBuffer(100, (4,), 1, n_envs=2, action_type="discrete", action_classes=(1,))
    discrete.add_episode(np.zeros((3, 4)), np.ones((2, 1)), np.zeros(2))
    with pytest.raises(BufferError, match="discrete"):
        agent.replay_buffer = discrete


# --- weights, rates, files, acting


@both
def test_a_callback_may_set_parameters(family: str) -> None:
    agent, other = make(family, train_ratio=0), make(family, seed=5)
    assert not torch.equal(weights(agent), weights(other))
    agent.learn(20, Once("step", lambda agent: agent.set_parameters(other.get_parameters())))
    assert torch.equal(weights(agent), weights(other))


@both
def test_a_rate_that_a_callback_sets_is_the_one_that_is_learned_with(family: str, tmp_path: Path) -> None:
    agent = make(family)
    change = Once("step", lambda agent: setattr(agent, "learning_rate", 0.0))
    frozen = Once("rollout_end", weights)  # after the change, before the first gradient step
    agent.learn(30, [change, frozen])
    trained = {id(p) for phase in agent.model.phases() for p in phase.trained}
    first = make(family).model.state_dict()
    assert agent._n_updates > 2 and agent.lr_schedule(0.5) == 0.0 and frozen.called == 1
    assert all(torch.equal(p, first[name]) for name, p in agent.model.named_parameters() if id(p) in trained)
    agent.save(tmp_path / "agent")
    assert WorldFluxAgent.load(tmp_path / "agent").learning_rate == 0.0
    agent.learning_rate = lambda remaining: 1e-3 * remaining
    agent.learn(4, reset_num_timesteps=False)
    assert agent.lr_schedule(0.5) == 5e-4


@both
def test_a_ratio_that_a_callback_sets_counts_from_there(family: str) -> None:
    agent = make(family, train_ratio=0)
    assert agent.learn(20)._n_updates == 0
    agent.learn(10, Once("training_start", lambda agent: setattr(agent, "train_ratio", 4.0)), reset_num_timesteps=False)
    started = agent._n_updates
    per_step = 4.0 / (agent.batch_size * agent.seq_len)
    assert started >= 1
    agent.train_ratio = 8.0
    agent.learn(10, reset_num_timesteps=False)
    assert agent._n_updates - started == pytest.approx(10 * 2 * per_step, abs=1)
    agent.learn(10, Once("training_start", lambda agent: setattr(agent, "train_ratio", 0)), reset_num_timesteps=False)
    assert agent._n_updates - started == pytest.approx(10 * 2 * per_step, abs=1)


FIXED = {
    "batch_size": 3, "seq_len": 9, "buffer_size": 77, "buffer_storage": "x", "learning_starts": 3, "planner": "mppi",
    "replay_context": False, "planner_kwargs": {"horizon": 2}, "stats_window_size": 3, "compile": False,
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_a_setting_that_the_agent_was_built_with_says_how_to_change_it(name: str) -> None:
    agent = make("dreamerv3")
    before = getattr(agent, name)
    with pytest.raises(ConfigurationError, match=rf"{name} is .* and cannot become .*load\(path, env, {name}=\.\.\.\)"):
        setattr(agent, name, FIXED[name])
    setattr(agent, name, before)
    assert getattr(agent, name) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", 3, r"seed is 0 and cannot become 3: .* Call set_random_seed"),
        ("train_ratio", -1, "train_ratio is -1.0, expected a number of 0 or more"),
        ("learning_rate", "fast", "learning_rate is 'fast'"),
        ("policy", None, "The agent's model cannot be exchanged"),
    ],
)
def test_what_cannot_be_set_is_refused_where_it_is_set(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        setattr(make("tdmpc2"), name, value)


def test_learning_begins_later_only_where_the_buffer_has_room_for_it() -> None:
    agent = make("dreamerv3", train_ratio=0, buffer_size=20, learning_starts=50)
    with pytest.raises(ConfigurationError, match="buffer_size is 20, expected at least 50"):
        agent.train_ratio = 1
    assert agent.train_ratio == 0


@cache
def weights_after_20_steps(family: str) -> torch.Tensor:
    return weights(make(family).learn(20))


@both
@pytest.mark.parametrize("hook", HOOKS)
def test_a_callback_may_save_and_act_at_any_time(family: str, hook: str, tmp_path: Path) -> None:
    def use(agent: WorldFluxAgent) -> None:
        agent.save(tmp_path / "agent")
        agent.save_replay_buffer(tmp_path / "buffer.npz")
        if hook != "training_end":
            agent.save_checkpoint(tmp_path / "checkpoint")
        agent.predict(np.zeros((2, 3), np.float32), deterministic=True)

    agent, used = make(family), Once(hook, use)
    agent.learn(20, used)
    assert used.called == 1 and torch.equal(weights(agent), weights_after_20_steps(family))
    assert WorldFluxAgent.load(tmp_path / "agent").num_timesteps <= 20


@both
@pytest.mark.parametrize("hook", HOOKS[:-1])
def test_a_callback_may_evaluate_in_the_training_environment_at_any_time(family: str, hook: str) -> None:
    agent = make(family)
    evaluated = Once(hook, lambda agent: evaluate_policy(agent, agent.get_env(), n_eval_episodes=1))
    agent.learn(20, evaluated)
    assert evaluated.result[0] == 5.0 and agent.replay_buffer.num_transitions == agent.num_timesteps == 20


@pytest.mark.parametrize("hook", HOOKS)
def test_learn_inside_learn_says_what_to_do(hook: str) -> None:
    agent = make("tdmpc2")
    with pytest.raises(
        ConfigurationError, match=r"A callback has called learn\(\) of the agent that is learning\. Let"
    ):
        agent.learn(20, Once(hook, lambda agent: agent.learn(5)))
    assert agent.learn(5).num_timesteps == 5  # and it is as usable as after any error


@both
def test_another_agent_may_learn_inside_a_callback(family: str) -> None:
    rival = make(family)
    agent = make(family).learn(12, Once("step", lambda agent: rival.learn(9)))
    assert (agent.num_timesteps, rival.num_timesteps) == (12, 9)


def test_changes_go_together_with_other_callbacks(tmp_path: Path) -> None:
    changes = [
        Once("step", lambda agent: agent.set_env(counting(1))),
        AgentCheckpointCallback(tmp_path, 5),
        StopTrainingOnMaxEpisodes(4),
    ]
    agent = make("dreamerv3", counting(0)).learn(40, changes)
    loaded = WorldFluxAgent.load(tmp_path, counting(1), resume=True)
    assert loaded.num_timesteps == agent.num_timesteps
    assert stored(loaded.replay_buffer)[0][:, 0].tolist() == stored(agent.replay_buffer)[0][:, 0].tolist()
