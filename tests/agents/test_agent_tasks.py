"""Agents that learn several tasks in environments: acting, storing, logging, files, evaluation and further tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from helpers.agents import weights
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from worldflux import WorldFluxAgent, create_world_model
from worldflux.agents import AgentCheckpointCallback, TaskEvalCallback, evaluate_tasks
from worldflux.envs import TaskVecEnv, collect
from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError
from worldflux.training import ReplayBuffer

SMALL = dict(latent_dim=16, hidden_dim=16, mlp_dim=16, enc_dim=16, num_q_networks=2, num_bins=15, task_dim=4)
SMALL |= dict(num_samples=16, num_elites=4, num_pi_trajs=2, iterations=2)


class Aim(gym.Env[Any, Any]):
    """Rewards a first action near the aim, within [-2, 2]; the observation begins with the number that was given.

    Args:
        number: First number of each observation.
        aim: The best first action.
        width: Length of an observation.
        action_dim: Number of action dimensions.
        length: Steps of an episode.
        tasks: Tasks that resets name in turn; none by default.
    """

    def __init__(
        self,
        number: float,
        aim: float = 0.0,
        width: int = 3,
        action_dim: int = 1,
        length: int = 6,
        tasks: tuple[Any, ...] = (),
    ) -> None:
        self.observation_space = spaces.Box(-10, 10, (width,), np.float32)
        self.action_space = spaces.Box(-2, 2, (action_dim,), np.float32)
        self.number, self.aim, self.length, self.tasks = number, aim, length, tasks
        self.t = self.episode = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.episode, self.options = 0, self.episode + 1, options
        return self._obs(), {"task": self._task()} if self.tasks else {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self.t += 1
        return self._obs(), -abs(float(np.ravel(action)[0]) - self.aim), False, self.t >= self.length, {}

    def _task(self) -> Any:
        return self.tasks[(self.episode - 1) % len(self.tasks)]

    def _obs(self) -> np.ndarray:
        obs = np.full(self.observation_space.shape, self.t / 10, np.float32)
        obs[0] = self._task() if self.tasks and not isinstance(self._task(), str) else self.number
        return obs


def two() -> dict[str, Any]:
    return {"a": Aim(0), "b": Aim(1, width=4, action_dim=2, length=4)}


def agent_of(env: Any, model: Any = "tdmpc2:tiny", **settings: Any) -> WorldFluxAgent:
    given = dict(learning_starts=24, batch_size=8, seed=0, device="cpu", planner=None)
    if isinstance(model, str):
        given["model_kwargs"] = SMALL | settings.pop("model_kwargs", {})
    return WorldFluxAgent(model, env, **{**given, **settings})


def model_of(names: tuple[str, ...] = ("a", "b"), width: int = 3, action_dim: int = 1, **fields: Any) -> Any:
    named = dict(obs_shape=(width,), action_dim=action_dim, num_tasks=len(names), task_names=names, episodic=True)
    return create_world_model("tdmpc2:tiny", **{**SMALL, **named, **fields})


def assert_stored(buffer: ReplayBuffer, numbers: tuple[int, ...] = (0, 1)) -> None:
    """Checks that each row is of the task that its observation shows, also the last of an episode."""
    batch = buffer.sample(256, 3)
    seen = torch.ones(256, 3, dtype=torch.bool) if batch.obs_mask is None else batch.obs_mask
    assert torch.equal(batch.extras["task"][seen], batch.obs[..., 0][seen].long())
    assert set(batch.extras["task"].unique().tolist()) == set(numbers)


class Kept(KVWriter):
    """Keeps the names and values that were logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        self.rows.append(dict(key_values))

    def close(self) -> None: ...


# Environments by the names of their tasks


def test_environments_of_several_tasks_are_padded_and_name_their_tasks() -> None:
    venv = TaskVecEnv({"a": Aim(0), "b": DummyVecEnv([lambda: Aim(1, width=4, action_dim=2, length=2)] * 2)})
    assert (venv.num_envs, venv.names, venv.tasks, venv.action_dims) == (3, ("a", "b"), ["a", "b", "b"], (1, 2))
    assert (venv.observation_space.shape, venv.action_space) == ((4,), spaces.Box(-1.0, 1.0, (2,)))
    assert venv.reset()[0].tolist() == [0, 0, 0, 0]
    assert [info["task"] for info in venv.reset_infos] == ["a", "b", "b"]
    venv.step(np.zeros((3, 2)))
    obs, rewards, dones, infos = venv.step(np.array([[0.5, 1.0], [-1.0, 1.0], [0.25, 0.0]], np.float32))
    assert rewards.tolist() == [-1.0, -2.0, -0.5] and dones.tolist() == [False, True, True]
    np.testing.assert_allclose(obs, [[0, 0.2, 0.2, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
    assert [info["task"] for info in infos] == ["a", "b", "b"]
    np.testing.assert_allclose(infos[1]["terminal_observation"], [1, 0.2, 0.2, 0.2])
    assert venv.get_attr("number", indices=[0, 2]) == [0, 1]
    venv.set_attr("aim", 7.0, indices=1)
    assert venv.get_attr("aim") == [0.0, 7.0, 0.0]
    assert venv.get_attr("aim", indices=[1, 0]) == [7.0, 0.0] and venv.get_attr("number", indices=-1) == [1]
    venv.seed(5)
    venv.set_options([{"at": 0}, {"at": 1}, {"at": 2}])
    venv.reset()
    assert venv.get_attr("np_random_seed") == [5, 6, 7]
    assert venv.get_attr("options") == [{"at": 0}, {"at": 1}, {"at": 2}]
    assert venv.has_attr("aim") and not venv.has_attr("action_repeat")
    assert venv.env_method("_task", indices=[]) == []
    stored = collect(venv, lambda obs: np.ones((3, 2)), steps=12).sample(64, 2)
    of_b = stored.obs[..., 0] == 1
    assert not stored.actions[~of_b][:, 1].any() and stored.actions[of_b].any(0).all(), "as they were executed"


@pytest.mark.parametrize(
    ("envs", "message"),
    [
        ({"a": Aim(0), "b": gym.make("CartPole-v1")}, "'b' has the action space Discrete"),
        ({"a": Aim(0), "b": VecNormalize(DummyVecEnv([lambda: Aim(1)]))}, r"'b' are in a VecNormalize.*together"),
        (
            {"a": SyncVectorEnv([lambda: Aim(0)], autoreset_mode=AutoresetMode.NEXT_STEP)},
            "vector environment of the task 'a' resets on the next step.*autoreset_mode='SameStep'",
        ),
        ({}, "expected a name for each environment"),
        ({"": Aim(0)}, "expected a name for each environment"),
    ],
)
def test_environments_that_cannot_be_joined_are_refused(envs: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        agent_of(envs)


def test_images_of_different_sizes_are_refused() -> None:
    def of_side(side: int) -> gym.Env[Any, Any]:
        env = Aim(0)
        env.observation_space = spaces.Box(0, 255, (side, side, 3), np.uint8)
        return env

    with pytest.raises(ConfigurationError, match=r"Only vectors are padded: images.*ResizeImages"):
        TaskVecEnv({"a": of_side(48), "b": of_side(64)})
    assert TaskVecEnv({"a": of_side(48), "b": of_side(48)}).observation_space.shape == (48, 48, 3)


# Learning


def test_an_agent_learns_the_tasks_of_its_environments_and_logs_each() -> None:
    envs = two()
    agent, log = agent_of({"a": envs["a"], "b": gym.wrappers.TimeLimit(envs["b"], 50)}), Kept()
    config = agent.model.config
    assert config.task_episode_lengths == (500, 50), "of which the discounts are made"
    assert (config.num_tasks, config.task_names, config.task_action_dims) == (2, ("a", "b"), (1, 2))
    before = agent.model.tasks.weight.detach().clone()
    agent.set_logger(Logger(None, [log]))
    agent.learn(80, TaskEvalCallback(two(), 40, 2), log_interval=2)
    assert_stored(agent.replay_buffer)
    batch = agent.replay_buffer.sample(256, 2)
    assert not batch.actions[batch.extras["task"] == 0][:, 1].any()  # also of random actions
    assert batch.actions[batch.extras["task"] == 1][:, 1].any()
    assert (agent.model.tasks.weight - before).abs().amax(1).gt(1e-5).all()
    logged = {name for row in log.rows for name in row}
    assert {"rollout/ep_rew_mean", "rollout/ep_rew_mean/a", "rollout/ep_rew_mean/b"} <= logged
    assert {"eval/mean_reward", "eval/mean_reward/a", "eval/mean_reward/b"} <= logged
    last = next(row for row in reversed(log.rows) if "rollout/ep_rew_mean/b" in row)
    of_b = [info["r"] for info in agent.ep_info_buffer if info["task"] == 1]
    assert last["rollout/ep_rew_mean/b"] == pytest.approx(np.mean(of_b), abs=2.0)
    assert last["rollout/ep_rew_mean/b"] != last["rollout/ep_rew_mean/a"]


def test_an_environment_of_a_task_may_run_in_its_own_process() -> None:
    agent = agent_of({"a": Aim(0), "b": SubprocVecEnv([lambda: Aim(1)], start_method="fork")})
    try:
        assert_stored(agent.learn(30).replay_buffer)
    finally:
        agent.env.close()


def test_random_actions_are_of_the_classes_that_a_task_has() -> None:
    env = Aim(0, tasks=("a", "b"))
    env.action_space = spaces.Discrete(4)
    discrete = dict(action_type="discrete", action_classes=(4,), task_action_dims=(2, 4))
    buffer = agent_of(env, model_of(action_dim=4, **discrete), learning_starts=91).learn(90).replay_buffer
    batch = buffer.sample(64, 3)
    of_a, of_b = (batch.actions[batch.extras["task"] == task].amax(0) for task in (0, 1))
    assert of_a.tolist() == [1, 1, 0, 0] and of_b.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["single", "subprocess", "vector"])
def test_environments_may_name_another_task_at_each_reset(kind: str) -> None:
    def make() -> gym.Env[Any, Any]:
        return Aim(0, length=4, tasks=(0, 1))

    envs: dict[str, Any] = {
        "single": make,
        "subprocess": lambda: SubprocVecEnv([make, make], start_method="fork"),
        "vector": lambda: SyncVectorEnv([make, make], autoreset_mode=AutoresetMode.NEXT_STEP),
    }
    agent = agent_of(envs[kind](), model_of())
    try:
        agent.learn(60)
        assert_stored(agent.replay_buffer)
    finally:
        agent.env.close()


@pytest.mark.slow
def test_opposite_aims_that_only_the_task_tells_apart_are_learned_and_then_a_further_one() -> None:
    def aims(**named: float) -> dict[str, Any]:
        return {name: Aim(0, aim=aim) for name, aim in named.items()}

    settings: dict[str, Any] = dict(batch_size=32, learning_rate=1e-3, seed=1)
    agent = agent_of(aims(left=-1.5, right=1.5), learning_starts=100, **settings)
    agent.learn(1000, log_interval=None)
    scores = evaluate_tasks(agent, aims(left=-1.5, right=1.5), 2)
    assert min(mean for mean, _ in scores.values()) > -3.0  # random actions: -9.4
    further = agent_of(aims(middle=0.5), agent.model.with_task("middle"), learning_starts=60, **settings)
    further.learn(300, log_interval=None)
    assert evaluate_tasks(further, aims(middle=0.5), 2)["middle"][0] > -1.5  # random actions: -6.4


def test_tasks_may_run_in_processes() -> None:
    forked: dict[str, Any] = dict(vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"})
    own = SubprocVecEnv([lambda: Aim(0)] * 2, start_method="fork")
    agent = agent_of({"a": own, "b": make_vec_env(lambda: Aim(1, width=4), 1, **forked)})
    try:
        agent.learn(48)
        assert_stored(agent.replay_buffer)
        assert set(evaluate_tasks(agent, agent.env, 1)) == {"a", "b"}  # type: ignore[arg-type]
        assert not agent.env.has_attr("action_repeat") and agent.env.get_attr("number") == [0, 0, 1]
    finally:
        agent.env.close()


def test_learning_beside_acting_stores_the_tasks() -> None:
    agent = agent_of(two()).learn(60, asynchronous=True)
    assert_stored(agent.replay_buffer)
    assert agent.trainer.step_count > 10


def test_tasks_are_stored_without_the_context_of_other_models() -> None:
    agent = agent_of(two(), replay_context=False).learn(40)
    assert_stored(agent.replay_buffer)
    assert agent._window == agent.seq_len


def test_an_environment_that_names_no_task_or_one_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"environment 0 does not say which one it is.*info\['task'\]"):
        agent_of(Aim(0), model_of()).learn(10)
    with pytest.raises(ConfigurationError, match="Unknown task 'c'"):
        agent_of(Aim(0, tasks=("c",)), model_of()).learn(10)
    with pytest.raises(ConfigurationError, match="task is 2, expected 0 to 1"):
        agent_of(Aim(0, tasks=(2,)), model_of()).learn(10)
    with pytest.raises(ConfigurationError, match="Unknown task 'c'"):
        agent_of({"c": Aim(0)}, model_of())
    with pytest.raises(ConfigurationError, match=r"tasks a, b, and dreamerv3 learns one.*TD-MPC2"):
        WorldFluxAgent("dreamerv3:tiny", two(), device="cpu")
    single = create_world_model("tdmpc2:tiny", obs_shape=(4,), action_dim=2, **SMALL)
    with pytest.raises(ConfigurationError, match="tasks a, b, and the model has one"):
        agent_of(two(), single)
    with pytest.raises(ShapeMismatchError, match="observations of up to 4 numbers, and the model was made for 3"):
        agent_of(two(), model_of(action_dim=2))
    agent = agent_of(two())
    for wide in (lambda envs: agent.set_env(envs), lambda envs: evaluate_tasks(agent, envs, 1)):
        with pytest.raises(ShapeMismatchError, match="task 'a' have 2 action dimensions, and the model uses 1"):
            wide({"a": Aim(0, action_dim=2), "b": Aim(1)})
        with pytest.raises(ConfigurationError, match="Unknown task 'c'"):
            wide({"a": Aim(0), "c": Aim(1)})


def test_a_single_environment_with_a_name_is_learned_as_without() -> None:
    named, plain = agent_of({"a": Aim(0)}), agent_of(Aim(0))
    assert (named.model.config.num_tasks, named.model.config.task_names) == (1, ("a",))
    torch.testing.assert_close(weights(named.learn(40)), weights(plain.learn(40)), rtol=0, atol=0)
    assert named.predict(np.zeros(3, np.float32), task="a")[0].shape == (1,)
    with pytest.raises(ConfigurationError, match="Unknown task 'b'"):
        named.set_env({"b": Aim(0)})


# Acting


def test_predict_takes_a_task_and_its_state_remembers_it() -> None:
    agent = agent_of(two(), planner="auto")
    with torch.no_grad():
        agent.model.tasks.weight.normal_()
    obs = np.ones(4, np.float32)
    act = {task: agent.predict(obs, deterministic=True, task=task) for task in ("a", "b", 0, 1)}
    assert np.array_equal(act["a"][0], act[0][0]) and np.array_equal(act["b"][0], act[1][0])
    assert not np.array_equal(act["a"][0], act["b"][0]) and act["a"][0][1] == 0.0
    assert np.array_equal(agent.predict(obs, deterministic=True, task=np.array("b"))[0], act["b"][0])
    both, state = agent.predict(np.stack([obs, obs]), deterministic=True, task=["b", "a"])
    np.testing.assert_allclose(both, [act["b"][0], act["a"][0]], rtol=1e-5)
    later, _ = agent.predict(np.stack([obs, obs]), state, np.array([True, True]), deterministic=True)
    np.testing.assert_allclose(later, both, rtol=1e-5)
    bound = agent.for_task("b")
    assert np.array_equal(bound.predict(obs, deterministic=True)[0], act["b"][0]) and bound.num_timesteps == 0
    assert np.array_equal(agent.policy.predict(obs, deterministic=True, task="b")[0], act["b"][0])
    with pytest.raises(ConfigurationError, match=r"has the tasks a, b. Say which one it is: predict\(obs, task"):
        agent.predict(obs)
    with pytest.raises(ConfigurationError, match="Unknown task 'c'"):
        agent.predict(obs, task="c")
    with pytest.raises(ShapeMismatchError, match="There are 3 tasks, expected one, or one for each of 2 rows"):
        agent.predict(np.stack([obs, obs]), task=["a", "b", "a"])
    wrong = list(state)
    wrong[sorted(agent.actor.start(1).state).index("task")] = np.array([0, 7])
    with pytest.raises(ConfigurationError, match="task is 7, expected 0 to 1"):
        agent.predict(np.stack([obs, obs]), tuple(wrong))
    with pytest.raises(ConfigurationError, match="dreamerv3 has one task"):
        WorldFluxAgent("dreamerv3:tiny", Aim(0), device="cpu").predict(obs[:3], task="a")


def test_each_task_is_evaluated_by_itself() -> None:
    agent = agent_of(two())
    scores = evaluate_tasks(agent, two(), 2)
    single = TaskVecEnv({"b": Aim(1, width=4, action_dim=2, length=4)})
    assert scores["b"] == pytest.approx(evaluate_policy(agent.for_task("b"), single, 2), abs=1e-4)
    own = Aim(0)  # observations [3] instead of [4], and actions [1] in [-2, 2] instead of [2] in [-1, 1]
    narrow = agent.for_task("a", own)
    assert evaluate_policy(narrow, own, 2, warn=False) == pytest.approx(scores["a"], abs=1e-4)
    obs = np.ones((2, 3), np.float32)
    padded, _ = agent.predict(np.pad(obs, ((0, 0), (0, 1))), deterministic=True, task="a")
    np.testing.assert_allclose(narrow.predict(obs, deterministic=True)[0], 2 * padded[:, :1])
    assert narrow.predict(obs[0])[0].shape == (1,)
    assert collect(own, narrow, steps=10).obs_shape == (3,)
    with pytest.raises(ShapeMismatchError, match=r"Box.*\(1,\).*expected continuous ones of width 2 in task 'b'"):
        agent.for_task("b", own)
    with pytest.raises(ShapeMismatchError, match=r"observations \(5,\), expected \(4,\) as the agent, or shorter"):
        agent.for_task("a", Aim(0, width=5))
    with pytest.raises(ConfigurationError, match="Unknown task 'c'"):
        agent.for_task("c", own)
    with pytest.raises(ConfigurationError, match="expected an environment for each name of a task"):
        evaluate_tasks(agent, Aim(0))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Unknown task 'c'"):
        agent.learn(10, TaskEvalCallback({"c": Aim(0)}, 5))


def test_tasks_behind_vec_normalize_are_evaluated_as_they_are_learned() -> None:
    agent = agent_of(VecNormalize(TaskVecEnv(two())))
    agent.env.obs_rms.mean[:] = 100.0
    seen, predict = [], agent.predict
    agent.predict = lambda obs, *args, **kwargs: (seen.append(obs), predict(obs, *args, **kwargs))[1]
    evaluate_tasks(agent, two(), 1)
    assert np.array(seen).max() == -10.0 and agent.env.training and agent.env.obs_rms.mean[0] == 100.0


# Files


def test_an_agent_of_several_tasks_is_saved_and_its_run_resumed(tmp_path: Path) -> None:
    agent = agent_of(two()).learn(60, AgentCheckpointCallback(tmp_path / "run", 40))
    agent.save(tmp_path / "agent")
    again = WorldFluxAgent.load(tmp_path / "agent", two(), device="cpu")
    obs = np.ones(4, np.float32)
    for task in ("a", "b"):
        expected = agent.predict(obs, deterministic=True, task=task)[0]
        assert np.array_equal(again.predict(obs, deterministic=True, task=task)[0], expected)

    def resumed() -> WorldFluxAgent:
        found = WorldFluxAgent.load(tmp_path / "run", two(), device="cpu", resume=True)
        assert {info["task"] for info in found.ep_info_buffer} == {0, 1}
        return found.learn(20, reset_num_timesteps=False)

    first, second = resumed(), resumed()
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)
    assert_stored(first.replay_buffer)
    agent.save_replay_buffer(tmp_path / "rows.npz")
    again.load_replay_buffer(tmp_path / "rows.npz")
    assert_stored(again.replay_buffer)


def test_recorded_data_say_their_tasks(tmp_path: Path) -> None:
    recorded = agent_of(two()).learn(40).replay_buffer
    recorded.save(tmp_path / "rows.npz")
    agent = agent_of(two(), buffer=ReplayBuffer.load(tmp_path / "rows.npz"), learning_starts=4)
    agent.learn(20)
    assert agent.trainer.step_count > 5
    plain = ReplayBuffer(100, (4,), 2)
    plain.add_episode(np.zeros((11, 4)), np.zeros((10, 2)), np.zeros(10))
    with pytest.raises(BufferError, match="the data do not say which task a row is of"):
        agent.learn_from(plain)


# Further tasks


def test_a_model_goes_on_with_a_further_task_in_a_narrower_environment() -> None:
    model = agent_of(two()).learn(40).model
    grown = model.with_task("c", like="a")
    agent = agent_of({"c": Aim(2)}, grown)
    assert agent.observation_space.shape == (4,) and agent.action_space.shape == (2,)
    agent.learn(60)
    assert_stored(agent.replay_buffer, (2,))
    torch.testing.assert_close(grown.tasks.weight[:2], model.tasks.weight, rtol=0, atol=0)
    assert not torch.equal(grown.tasks.weight[2], model.tasks.weight[0])
    agent.set_env({"a": Aim(0)})
    agent.learn(10, reset_num_timesteps=False)
    assert_stored(agent.replay_buffer, (0, 2))
