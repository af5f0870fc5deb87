"""Environments are made from their names, with the options that adapt them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from helpers.envs import CountingEnv
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

from worldflux.envs import ActionRepeat, ResizeImages, make_env, make_vec_env
from worldflux.envs.make import as_env
from worldflux.envs.suites import (
    ATARI_57,
    ATARI_100K,
    DMC_BENCHMARK,
    DMC_DREAMERV3_PROPRIO,
    DMC_DREAMERV3_VISION,
    DMC_TASKS,
    DMC_TDMPC2,
)
from worldflux.envs.suites.registration import suite_id, suite_names
from worldflux.envs.wrappers import frames_per_step, max_episode_steps
from worldflux.errors import ConfigurationError, MissingDependencyError


class Painted(gym.Env[Any, Any]):
    """Renders one colour, which depends on the number of the step; its observation is that number."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = spaces.Box(0, 100, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None, height: int = 60, width: int = 90) -> None:
        self.render_mode, self._shape = render_mode, (height, width, 3)
        self._step = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self._step = 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        self._step += 1
        return self._obs(), float(self._step), self._step >= 7, False, {}

    def render(self) -> np.ndarray:
        return np.full(self._shape, 10 * self._step, np.uint8)

    def _obs(self) -> np.ndarray:
        return np.array([self._step], np.float32)


class Pictures(gym.Env[Any, Any]):
    """Shows the observation that it was made with in every step."""

    action_space = spaces.Discrete(2)

    def __init__(self, obs: Any, space: spaces.Space[Any]) -> None:
        self._obs, self.observation_space = obs, space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self._obs, {}

    def step(self, action: Any) -> Any:
        return self._obs, 0.0, False, False, {}


@pytest.fixture(scope="module", autouse=True)
def painted_id() -> Any:
    gym.register("WorldFluxTests/Painted-v0", entry_point=Painted, max_episode_steps=6)
    yield
    del gym.registry["WorldFluxTests/Painted-v0"]


def image_space(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


def halves(height: int, width: int) -> np.ndarray:
    """An image `[H, W, 3]` whose left half is 20 and whose right half is 200."""
    image = np.full((height, width, 3), 20, np.uint8)
    image[:, width // 2 :] = 200
    return image


# --- names


def test_tables_have_the_numbers_that_the_benchmarks_have() -> None:
    sizes = [len(set(DMC_TASKS.values())), len(set(DMC_BENCHMARK)), len(set(DMC_TDMPC2)), len(set(ATARI_57.values()))]
    assert sizes == [51, 28, 28, 57]
    assert [len(set(DMC_DREAMERV3_PROPRIO)), len(set(DMC_DREAMERV3_VISION)), len(set(ATARI_100K))] == [18, 20, 26]
    assert {*DMC_BENCHMARK, *DMC_TDMPC2, *DMC_DREAMERV3_VISION} <= set(DMC_TASKS)
    assert set(ATARI_100K) <= set(ATARI_57)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dmc/walker-walk", "worldflux/dmc-walker-walk-v0"),
        ("dmc/walker_walk", "worldflux/dmc-walker-walk-v0"),
        ("dmc/ball_in_cup-catch", "worldflux/dmc-cup-catch-v0"),
        ("dmc/point_mass_easy", "worldflux/dmc-pointmass-easy-v0"),
        ("dmc/swimmer-swimmer15", "worldflux/dmc-swimmer-15-v0"),
        ("dmc/stacker_stack_4", "worldflux/dmc-stacker-4-v0"),
        ("dmc/lqr-lqr_6_2", "worldflux/dmc-lqr-6-2-v0"),
        ("dmc/humanoid_CMU-run", "worldflux/dmc-humanoid-cmu-run-v0"),
        ("atari/ms_pacman", "worldflux/atari-ms-pacman-v0"),
        ("atari100k/pong", "worldflux/atari100k-pong-v0"),
        ("atari100k/zaxxon", None),
        ("CartPole-v1", None),
    ],
)
def test_names_in_any_spelling_mean_one_id(name: str, expected: str | None) -> None:
    assert suite_id(name) == expected


def test_every_task_of_dm_control_is_found_by_its_own_name() -> None:
    for domain, task in DMC_TASKS.values():
        found = suite_id(f"dmc/{domain}-{task}")
        assert found is not None and DMC_TASKS[found.removeprefix("worldflux/dmc-").removesuffix("-v0")] == (
            domain,
            task,
        )


def test_every_name_is_registered_with_gymnasium() -> None:
    ids = {suite_id(name) for name in suite_names()}
    assert len(ids) == 51 + 57 + 26
    assert ids <= set(gym.registry)


def test_importing_the_package_registers_and_loads_neither_torch_nor_a_simulator() -> None:
    code = (
        "import sys, gymnasium, worldflux.envs; assert 'worldflux/dmc-walker-walk-v0' in gymnasium.registry; "
        "print([m for m in ('torch', 'stable_baselines3', 'mujoco', 'dm_control', 'ale_py') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_worldflux_alone_registers_where_gymnasium_is_loaded() -> None:
    code = "import gymnasium, worldflux; print('worldflux/atari-pong-v0' in gymnasium.registry)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CartPol-v1", r"Unknown environment 'CartPol-v1'; did you mean 'CartPole-v[01]'"),
        ("dmc/walker-wlk", "did you mean 'dmc/walker-walk'"),
        ("atari100k/zaxon", "Unknown environment 'atari100k/zaxon'"),
        ("worldflux/dmc-walker-wak-v0", "did you mean 'worldflux/dmc-walker-walk-v0'"),
        ("Pendulum-v0", "'Pendulum-v0' cannot be made: .*use `Pendulum-v1` instead"),
        ("bad id!!", r"'bad id!!' cannot be made: Malformed .* gymnasium\.pprint_registry\(\) shows all"),
        ("", "'' cannot be made: Malformed environment ID"),
        (5, "name is 5, expected an id such as 'CartPole-v1'"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*out of date")
def test_names_that_cannot_be_made_say_what_to_do(name: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_env(name)


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingDependencyError, match="'Humanoid-v3' needs a package that is not installed"):
        make_env("Humanoid-v3")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingDependencyError, match="opencv-python"):
        make_env("WorldFluxTests/Painted-v0", pixels=True)


# --- options


def test_pixels_are_what_the_environment_renders_in_the_size_that_was_asked_for() -> None:
    env = make_env("WorldFluxTests/Painted-v0", pixels=True, size=(48, 64))
    assert env.observation_space == image_space(48, 64, 3)
    obs, _ = env.reset(seed=0)
    np.testing.assert_array_equal(obs, np.zeros((48, 64, 3), np.uint8))
    obs, *_ = env.step(0)
    np.testing.assert_array_equal(obs, np.full((48, 64, 3), 10, np.uint8))
    assert make_env("WorldFluxTests/Painted-v0", pixels=True).observation_space.shape == (64, 64, 3)


def test_repeated_actions_sum_their_rewards_and_stop_where_the_episode_ends() -> None:
    env = make_env("WorldFluxTests/Painted-v0", action_repeat=4)
    env.reset(seed=0)
    obs, reward, terminated, truncated, _ = env.step(0)
    assert (obs.item(), reward, terminated, truncated) == (4.0, 1 + 2 + 3 + 4, False, False)
    obs, reward, terminated, truncated, _ = env.step(0)  # the time limit of 6 counts steps before they are repeated
    assert (obs.item(), reward, terminated, truncated) == (6.0, 5 + 6, False, True)


def test_repeats_of_repeats_count_all_their_frames() -> None:
    env = make_env("WorldFluxTests/Painted-v0", action_repeat=3)
    assert frames_per_step(env) == 3
    assert frames_per_step(ActionRepeat(env, 2)) == 6
    assert frames_per_step(make_env("CartPole-v1")) == 1


def test_a_time_limit_is_found_wherever_it_is_and_shrinks_with_repeats() -> None:
    limited = gym.wrappers.TimeLimit(CountingEnv(), 30)  # CountingEnv has no specification
    assert max_episode_steps(limited) == 30 and max_episode_steps(ActionRepeat(limited, 4)) == 8
    assert max_episode_steps(make_env("CartPole-v1")) == 500
    assert max_episode_steps(make_env("dmc/walker-walk", action_repeat=4)) == 250
    assert max_episode_steps(CountingEnv()) is None and max_episode_steps(ActionRepeat(CountingEnv(), 2)) is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("CartPole-v1", {"action_repeat": 0}, "expected a whole number from 1"),
        ("CartPole-v1", {"action_repeat": 2.0}, "expected a whole number from 1"),
        ("CartPole-v1", {"action_repeat": True}, "expected a whole number from 1"),
        ("CartPole-v1", {"size": 64}, "has no image"),
        ("CartPole-v1", {"gravity_of_mars": 3.7}, "gravity_of_mars"),
        ("WorldFluxTests/Painted-v0", {"pixels": True, "render_mode": "human"}, "render_mode is 'human'"),
    ],
)
def test_options_that_cannot_be_used_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_env(name, **options)


@pytest.mark.parametrize("size", [0, -1, 1.5, (64,), (64, "64"), True, None])
def test_sizes_that_are_none_are_refused(size: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected a number of pixels"):
        ResizeImages(Pictures(halves(8, 8), image_space(8, 8, 3)), size)


# --- resizing


@pytest.mark.parametrize("layout", ["HWC", "CHW", "HW", "HW1"])
def test_images_of_every_layout_are_averaged_over_areas(layout: str) -> None:
    image = halves(40, 60)
    given = {"HWC": image, "CHW": image.transpose(2, 0, 1), "HW": image[..., 0], "HW1": image[..., :1]}[layout]
    expected = halves(20, 30)
    wanted = {"HWC": expected, "CHW": expected.transpose(2, 0, 1), "HW": expected[..., 0], "HW1": expected[..., :1]}
    env = ResizeImages(Pictures(given, image_space(*given.shape)), (20, 30))
    obs, _ = env.reset()
    np.testing.assert_array_equal(obs, wanted[layout])
    assert env.observation_space.contains(obs)


def test_every_pixel_has_its_share_in_a_smaller_image() -> None:
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 200
    obs, _ = ResizeImages(Pictures(stripes, image_space(32, 32, 3)), 16).reset()
    np.testing.assert_array_equal(obs, np.full((16, 16, 3), 100, np.uint8))


def test_in_a_dictionary_only_images_are_resized() -> None:
    space = spaces.Dict({"camera": image_space(40, 60, 3), "speed": spaces.Box(0, 1, (2,)), "mode": spaces.Discrete(3)})
    given = {"camera": halves(40, 60), "speed": np.array([0.5, 0.1], np.float32), "mode": np.int64(2)}
    env = ResizeImages(Pictures(given, space), 16)
    obs, _ = env.reset()
    assert env.observation_space.contains(obs)
    assert obs["camera"].shape == (16, 16, 3) and obs["camera"][3, 2, 1] == 20 and obs["camera"][3, 12, 1] == 200
    assert obs["speed"] is given["speed"] and obs["mode"] == 2
    assert given["camera"].shape == (40, 60, 3)


# --- several


def test_copies_are_seeded_one_after_another_and_report_their_episodes() -> None:
    envs = make_vec_env("CartPole-v1", 3, seed=7)
    assert isinstance(envs, DummyVecEnv)
    single = make_env("CartPole-v1")
    obs = envs.reset()
    for copy in range(3):
        np.testing.assert_array_equal(obs[copy], single.reset(seed=7 + copy)[0])
    infos: list[dict[str, Any]] = []
    while not any("episode" in info for info in infos):
        _, _, _, infos = envs.step(np.ones(3, int))
    assert next(info["episode"]["l"] for info in infos if "episode" in info) > 1


def test_a_function_that_makes_an_environment_serves_too() -> None:
    envs = make_vec_env(lambda: CountingEnv(lengths=(2,)), 2)
    envs.reset()
    envs.step([envs.action_space.sample()] * 2)
    _, _, dones, infos = envs.step([envs.action_space.sample()] * 2)
    assert dones.tolist() == [True, True] and infos[1]["episode"]["l"] == 2


def test_ctrl_c_reaches_this_process_and_not_the_environments_processes() -> None:
    code = (
        "import os, signal, numpy as np; from worldflux.envs import make_vec_env\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job inherits that it is ignored
        "    envs = make_vec_env('CartPole-v1', 2, processes=True); envs.reset()\n"
        "    try:\n"
        "        os.killpg(0, signal.SIGINT); signal.pause()\n"
        "    except KeyboardInterrupt:\n"
        "        print(envs.step(np.array([0, 1]))[0].shape)\n"
        "    envs.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, start_new_session=True
    )
    assert (done.returncode, done.stdout) == (0, "(2, 4)\n"), done.stderr


@pytest.mark.parametrize(
    "space", [spaces.Dict(a=spaces.Dict(b=spaces.Discrete(2))), spaces.Text(3), spaces.Sequence(spaces.Discrete(2))]
)
def test_observations_that_cannot_be_batched_say_what_is_supported(space: Any) -> None:
    class Odd(CountingEnv):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = space

    with pytest.raises(ConfigurationError, match=r"which is not supported\. Supported observations are Box"):
        make_vec_env(Odd)


@pytest.mark.parametrize(
    ("env", "options", "message"),
    [
        ("CartPole-v1", {"n_envs": 0}, "n_envs is 0, expected a whole number from 1"),
        ("CartPole-v1", {"n_envs": 1.0}, "n_envs is 1.0, expected a whole number from 1"),
        ("CartPole-v1", {"n_envs": True}, "n_envs is True, expected a whole number from 1"),
        ("CartPole-v1", {"seed": -1}, "seed is -1, expected a whole number from 0"),
        ("CartPole-v1", {"seed": 1.5}, "seed is 1.5, expected a whole number from 0"),
        (CountingEnv, {"size": 64}, r"\['size'\] apply to environments given by name"),
    ],
)
def test_arguments_of_several_that_cannot_be_used_are_named(env: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_vec_env(env, **options)


def test_numbers_of_numpy_are_taken() -> None:
    assert make_vec_env("CartPole-v1", np.int64(2), seed=np.int64(3)).num_envs == 2


def test_processes_are_not_forked_and_step_as_one_process_does() -> None:
    envs = make_vec_env("CartPole-v1", 2, seed=3, processes=True)
    try:
        assert isinstance(envs, SubprocVecEnv)
        assert {type(process).__name__ for process in envs.processes} <= {"ForkServerProcess", "SpawnProcess"}
        alike = make_vec_env("CartPole-v1", 2, seed=3)
        np.testing.assert_array_equal(envs.reset(), alike.reset())
        for _ in range(3):
            stepped, expected = envs.step(np.array([0, 1])), alike.step(np.array([0, 1]))
            np.testing.assert_array_equal(stepped[0], expected[0])
            np.testing.assert_array_equal(stepped[1], expected[1])
    finally:
        envs.close()


# --- what is meant by an environment


def test_an_environment_is_taken_as_it_is_and_a_name_is_made() -> None:
    env = CountingEnv()
    assert as_env(env) is env
    assert as_env("CartPole-v1").unwrapped.spec.id == "CartPole-v1"


class Bare(gym.Env[Any, Any]):
    """An environment without a constructor."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)


def test_an_environment_without_a_constructor_is_made_from_its_name() -> None:
    gym.register("WorldFluxTests/Bare-v0", Bare)
    assert isinstance(as_env("WorldFluxTests/Bare-v0").unwrapped, Bare)
    with pytest.raises(ConfigurationError, match=r"'WorldFluxTests/Bare-v0' does not take one of these options"):
        make_env("WorldFluxTests/Bare-v0", render_mode="rgb_array")


def test_a_vector_environment_of_gymnasium_becomes_a_vec_env() -> None:
    envs = as_env(gym.make_vec("CartPole-v1", 3, vectorization_mode="sync"))
    assert envs.num_envs == 3 and envs.reset().shape == (3, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (CountingEnv, "Pass an instance: CountingEnv"),
        ([CountingEnv()], "make_vec_env of worldflux.envs makes one"),
        (None, "expected a name"),
    ],
)
def test_what_is_no_environment_is_refused_with_advice(given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        as_env(given)
