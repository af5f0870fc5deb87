"""`GymnasiumVecEnv` drives Gymnasium's vector environments as an SB3 `VecEnv`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import ClipReward, DictInfoToList
from helpers.envs import CountingEnv, DiceEnv
from stable_baselines3 import A2C
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from worldflux.envs.recording.wrappers import VecRecordEpisodes, VectorRecordEpisodes
from worldflux.envs.vector import ENDED, RESET_STEP, GymnasiumVecEnv, autoreset_mode
from worldflux.errors import BufferError, ConfigurationError
from worldflux.replay.buffer import ReplayBuffer

MODES = ("NextStep", "SameStep", "Disabled")
ENDINGS = dict(lengths=(2, 1, 3), ends=("terminate", "truncate", "both"))
ACTION = np.full((2, 1), 2.5, np.float32)


class TalkativeEnv(CountingEnv):
    """Has infos, renders pictures, and takes options."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.render_mode = "rgb_array"
        self.speed = 1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, _ = super().reset(seed=seed)
        return obs, {"seed": -1 if seed is None else seed, "level": (options or {}).get("level", 0)}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, _ = super().step(action)
        info: dict[str, Any] = {"t": self.t, "where": {"x": 2 * self.t}, "name": f"step {self.t}"}
        return obs, reward, terminated, truncated, {**info, "odd": True} if self.t % 2 else info

    def render(self) -> Any:
        return np.full((4, 4, 3), self.t, np.uint8)

    def plus(self, number: int) -> int:
        return self.env_id + number


def talkative(env_id: int, **options: Any) -> Callable[[], gym.Env[Any, Any]]:
    return lambda: TalkativeEnv(env_id=env_id, **{**ENDINGS, **options})


def sync(mode: str = "NextStep", **options: Any) -> GymnasiumVecEnv:
    return GymnasiumVecEnv(SyncVectorEnv([talkative(0, **options), talkative(1, **options)], autoreset_mode=mode))


@pytest.fixture(scope="module")
def workers() -> Iterator[GymnasiumVecEnv]:
    venv = GymnasiumVecEnv(AsyncVectorEnv([talkative(0), talkative(1)], context="fork"))
    yield venv
    venv.close()


def visited(obs: Any) -> list[Any]:
    """The episode and the step in the observation of each environment."""
    return np.asarray(obs)[:, 1:3].astype(int).tolist()


@pytest.mark.parametrize("mode", ["SameStep", "Disabled"])
def test_where_environments_reset_at_once_it_is_what_sb3_does_itself(mode: str) -> None:
    ours, theirs = sync(mode), DummyVecEnv([talkative(0), talkative(1)])
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    for _ in range(14):
        step, expected = ours.step(ACTION), theirs.step(ACTION)
        for mine, its in zip(step[:3], expected[:3], strict=True):
            np.testing.assert_array_equal(mine, its)
            assert mine.dtype == its.dtype
        for info, wanted in zip(step[3], expected[3], strict=True):
            if "terminal_observation" in wanted:
                np.testing.assert_array_equal(info.pop("terminal_observation"), wanted.pop("terminal_observation"))
                episode = info.pop("episode")
                assert (episode["l"], episode["r"]) == (wanted["t"], sum_of_rewards(wanted["t"], step[0][0][1] - 1))
            else:
                del wanted["TimeLimit.truncated"]
            assert info == wanted
        assert ours.reset_infos == theirs.reset_infos


def sum_of_rewards(length: int, episode: float) -> float:
    return sum(100 * episode + t + 1 for t in range(length))


def test_where_environments_reset_on_the_next_step_an_end_is_reported_with_the_observation_after_it() -> None:
    venv = sync()
    assert visited(venv.reset())[0] == [0, 0]
    seen, infos_seen = [], []
    for _ in range(10):
        obs, rewards, dones, infos = venv.step(ACTION)
        seen.append((*visited(obs)[0], float(rewards[0]), bool(dones[0])))
        infos_seen.append(infos[0])
    # Episodes of 2, 1 and 3 steps; the step that reports an end earns nothing and shows the next episode.
    assert seen == [
        (0, 1, 1.0, False), (0, 2, 2.0, False), (1, 0, 0.0, True),
        (1, 1, 101.0, False), (2, 0, 0.0, True),
        (2, 1, 201.0, False), (2, 2, 202.0, False), (2, 3, 203.0, False), (3, 0, 0.0, True),
        (3, 1, 301.0, False),
    ]  # fmt: skip
    ends = {i: info for i, info in enumerate(infos_seen) if "terminal_observation" in info}
    assert sorted(ends) == [2, 4, 8] == [i for i, info in enumerate(infos_seen) if RESET_STEP in info]
    assert [info["terminal_observation"][1:3].tolist() for info in ends.values()] == [[0, 2], [1, 1], [2, 3]]
    # The third ends by both at once: then the end counts.
    assert [info["TimeLimit.truncated"] for info in ends.values()] == [False, True, False]
    assert [(info["episode"]["l"], info["episode"]["r"]) for info in ends.values()] == [
        (2, 3.0),
        (1, 101.0),
        (3, 606.0),
    ]
    assert [info.get(ENDED) for info in infos_seen[:5]] == [None, "terminated", None, "truncated", None]
    assert infos_seen[2]["name"] == "step 2"  # what the last step said
    assert venv.reset_infos[0] == {"seed": -1, "level": 0}


@pytest.mark.parametrize("mode", MODES)
def test_an_episode_that_the_environment_reports_itself_is_reported_once(mode: str) -> None:
    makers = [lambda: Monitor(CountingEnv(lengths=(2,)))] * 2
    venv = GymnasiumVecEnv(SyncVectorEnv(makers, autoreset_mode=mode))
    venv.reset()
    episodes = [info["episode"] for _ in range(12) for info in venv.step(ACTION)[3] if "episode" in info]
    assert {int(episode["l"]) for episode in episodes} == {2} and len({float(e["r"]) for e in episodes}) > 2
    assert len(episodes) == {"NextStep": 8, "SameStep": 12, "Disabled": 12}[mode]


def test_seeds_and_options_reach_the_environments_at_the_next_reset_and_no_other() -> None:
    venv = sync()
    assert venv.seed(7) == [7, 8]
    venv.set_options({"level": 3})
    venv.reset()
    assert venv.reset_infos == [{"seed": 7, "level": 3}, {"seed": 8, "level": 3}]
    venv.reset()
    assert venv.reset_infos == [{"seed": -1, "level": 0}] * 2
    venv.set_options([{"level": 1}, {"level": 2}])
    with pytest.raises(ConfigurationError, match="options differ between environments"):
        venv.reset()


def test_one_seed_gives_the_same_episodes_as_in_sb3s_own_environments() -> None:
    ours = GymnasiumVecEnv(SyncVectorEnv([DiceEnv] * 2, autoreset_mode="SameStep"))
    theirs = DummyVecEnv([DiceEnv] * 2)
    for venv in (ours, theirs):
        venv.seed(3)
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    for _ in range(30):
        np.testing.assert_array_equal(ours.step(np.zeros(2, int))[0], theirs.step(np.zeros(2, int))[0])


def test_single_environments_can_be_reached() -> None:
    venv = sync()
    venv.reset()
    venv.step(ACTION)
    assert venv.get_attr("env_id") == [0, 1] and venv.get_attr("env_id", indices=1) == [1]
    assert venv.has_attr("speed") and not venv.has_attr("size")
    venv.set_attr("speed", [1, 2], indices=[1])
    assert venv.get_attr("speed") == [1, [1, 2]]
    assert venv.env_method("plus", 10) == [10, 11] and venv.env_method("plus", number=3, indices=[1]) == [4]
    assert venv.env_is_wrapped(gym.wrappers.TimeLimit) == [False, False]
    assert venv.env_is_wrapped(Monitor, indices=0) == [True]
    assert [int(image[0, 0, 0]) for image in venv.get_images() if image is not None] == [1, 1]
    assert venv.render("rgb_array").shape == (8, 4, 3)  # type: ignore[union-attr]


def test_environments_in_processes_can_be_reached_as_far_as_gymnasium_offers_it(workers: GymnasiumVecEnv) -> None:
    workers.reset()
    assert workers.get_attr("env_id") == [0, 1] and workers.get_attr("env_id", indices=[1]) == [1]
    assert workers.has_attr("speed") and not workers.has_attr("size")
    workers.set_attr("speed", 4, indices=[1])
    assert workers.get_attr("speed") == [1, 4]
    assert workers.env_method("plus", 10) == [10, 11]
    with pytest.raises(
        ConfigurationError, match=r"cannot call 'plus' of environments \[1\]: it calls methods of all 2"
    ):
        workers.env_method("plus", 10, indices=[1])
    with pytest.raises(ConfigurationError, match="none of reset, step, close"):
        workers.env_method("reset")
    with pytest.raises(AttributeError, match="'minus'"):
        workers.env_method("minus")
    assert len(workers.get_images()) == 2
    workers.step(ACTION)  # nobody died of a question


def test_a_step_in_processes_is_made_while_nobody_waits_and_a_reset_gives_it_up(workers: GymnasiumVecEnv) -> None:
    workers.reset()
    workers.step_async(ACTION)
    assert workers.vector_env._state.value == "step"  # type: ignore[attr-defined]
    obs, rewards, _, _ = workers.step_wait()
    assert rewards.dtype == np.float32 and visited(obs)[0][1] == 1
    workers.step_async(ACTION)
    assert visited(workers.reset())[0][1] == 0


def test_what_was_returned_is_not_changed_by_the_next_step() -> None:
    venv = GymnasiumVecEnv(SyncVectorEnv([talkative(0), talkative(1)], copy=False))
    first = venv.reset()
    second = venv.step(ACTION)[0]
    venv.step(ACTION)
    assert visited(first)[0] == [0, 0] and visited(second)[0] == [0, 1]


@pytest.mark.parametrize("mode", MODES)
def test_sb3_learns_and_evaluates_in_it(mode: str) -> None:
    makers: list[Any] = [lambda: gym.make("CartPole-v1", max_episode_steps=20)] * 2
    venv = GymnasiumVecEnv(SyncVectorEnv(makers, autoreset_mode=mode))
    model = A2C("MlpPolicy", venv, seed=0, device="cpu").learn(200)
    assert all(0 < info["l"] == info["r"] <= 20 for info in model.ep_info_buffer)  # type: ignore[union-attr]
    returns, lengths = evaluate_policy(model, venv, 6, return_episode_rewards=True)
    assert returns == lengths and len(lengths) == 6  # type: ignore[arg-type]


def test_under_a_frame_stack_last_observations_are_the_stacked_ones() -> None:
    buffer = ReplayBuffer(100, (8,), 1, n_envs=2, seed=0)
    venv = VecRecordEpisodes(VecFrameStack(sync(lengths=(3,), ends=("terminate",)), 2), buffer)
    venv.reset()
    for _ in range(8):
        venv.step(ACTION)
    batch = buffer.sample(60, 8)
    final = batch.obs[..., 6] == 3  # newest frame: the third step
    assert final.any() and batch.obs[final][:, 2].eq(2).all()
    assert not batch.rewards[final].any() and batch.terminations.sum() > 60


class SmallVectorEnv(VectorEnv[Any, Any, Any]):
    """A vector environment with as few attributes as possible."""

    def __init__(self, **metadata: Any) -> None:
        self.metadata = metadata
        self.num_envs, self.frames = 2, 4
        self.single_observation_space = self.single_action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = spaces.Box(-1, 1, (2, 1), np.float32)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return np.zeros((2, 1), np.float32), {}

    def step(self, actions: Any) -> Any:
        return np.zeros((2, 1), np.float32), np.ones(2), np.array([True, False]), np.zeros(2, bool), {"fps": 60}


def test_a_vector_environment_without_single_ones_is_driven_too() -> None:
    venv = GymnasiumVecEnv(ClipReward(SmallVectorEnv(autoreset_mode="NextStep"), 0.0, 0.5))
    venv.reset()
    _, rewards, dones, infos = venv.step(ACTION[:, :1])
    assert rewards.tolist() == [0.5, 0.5] and dones.tolist() == [False, False] and infos[1] == {"fps": 60}
    assert venv.get_attr("frames") == [4, 4] and not venv.has_attr("speed")
    for call in (lambda: venv.env_method("plus"), lambda: venv.set_attr("speed", 1)):
        with pytest.raises(ConfigurationError, match=r"SmallVectorEnv offers no way to .* in its single environments"):
            call()
    assert venv.render_mode is None


def test_a_vector_environment_that_cannot_be_followed_says_why() -> None:
    with pytest.raises(ConfigurationError, match=r"SmallVectorEnv has metadata\['autoreset_mode'\] None, expected"):
        GymnasiumVecEnv(SmallVectorEnv())
    with pytest.raises(BufferError, match="Environment 0 ended an episode without a 'final_obs'"):
        GymnasiumVecEnv(SmallVectorEnv(autoreset_mode="SameStep")).step(ACTION)
    partial = SmallVectorEnv(autoreset_mode="NextStep")
    partial.batch_size = 1  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match="steps 1 of its 2 environments at a time"):
        autoreset_mode(partial)
    with pytest.raises(ConfigurationError, match="envs is a CountingEnv, expected a Gymnasium vector environment"):
        GymnasiumVecEnv(CountingEnv())  # type: ignore[arg-type]
    # Gymnasium resets such environments twice after reset() was called at an episode's end.
    envs = AsyncVectorEnv([talkative(0)], shared_memory=False, context="fork")
    try:
        with pytest.raises(ConfigurationError, match="Use shared_memory=True or autoreset_mode='SameStep'"):
            GymnasiumVecEnv(envs)
    finally:
        envs.close()


def test_infos_as_a_list_say_which_wrapper_to_leave_out() -> None:
    envs = DictInfoToList(SyncVectorEnv([talkative(0), talkative(1)], autoreset_mode="SameStep"))
    with pytest.raises(ConfigurationError, match="DictInfoToList"):
        GymnasiumVecEnv(envs)
    with pytest.raises(ConfigurationError, match="DictInfoToList"):
        VectorRecordEpisodes(envs, ReplayBuffer(10, (4,), 1, n_envs=2))
