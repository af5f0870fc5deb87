"""The tasks of DeepMind Control keep their meaning as Gymnasium environments, and those of the benchmark run."""

from __future__ import annotations

import copy
import functools
import hashlib
import pickle
import re
import subprocess
import sys
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from worldflux.envs.suites import DMC_BENCHMARK, DMC_TASKS, rendering
from worldflux.envs.suites.dmc import DMCEnv
from worldflux.errors import ConfigurationError, MissingDependencyError, ShapeMismatchError, install_hint

SMALL_PIXELS: dict[str, Any] = {"pixels": True, "size": (24, 32), "fast_rendering": True}


@pytest.fixture(scope="module")
def _drawing() -> None:
    """Fails where nothing can draw, with the names of the system packages to install."""
    DMCEnv("pendulum-swingup").close()
    rendering.check_backend()


def random_actions(env: gym.Env[Any, Any], steps: int, seed: int = 0) -> np.ndarray:
    space = env.action_space
    assert isinstance(space, gym.spaces.Box)
    rng = np.random.default_rng(seed)
    return rng.uniform(space.low, space.high, (steps, *space.shape)).astype(np.float32)


def episode(env: gym.Env[Any, Any], steps: int, seed: int | None = 0) -> tuple[np.ndarray, list[float]]:
    """Observations `[steps + 1, ...]` and rewards of the beginning of an episode with random actions."""
    observations, rewards = [env.reset(seed=seed)[0]], []
    for action in random_actions(env, steps):
        obs, reward, *_ = env.step(action)
        observations.append(obs)
        rewards.append(float(reward))
    return np.stack(observations), rewards


def load_original(name: str, seed: int) -> Any:
    """The task as dm_control makes it."""
    DMCEnv(name).close()  # a backend was chosen before dm_control is imported
    from dm_control import suite

    return suite.load(*DMC_TASKS[name], task_kwargs={"random": seed})


def flat(entries: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.ravel(entry) for entry in entries.values()]).astype(np.float32)


@pytest.mark.parametrize("name", DMC_BENCHMARK)
def test_every_task_of_the_benchmark_runs_on_its_state(name: str) -> None:
    env = DMCEnv(name)
    assert isinstance(env, DMCEnv) and env.max_episode_steps == 500

    observations, rewards = episode(env, 200)

    assert observations.dtype == np.float32 and np.isfinite(observations).all()
    assert all(env.observation_space.contains(obs) for obs in observations)
    assert observations.std(axis=0).max() > 0, "nothing moved"
    assert all(0 <= reward <= 2 for reward in rewards), "a reward in [0, 1] for each of two control steps"
    env.close()


@pytest.mark.usefixtures("_drawing")
@pytest.mark.parametrize("name", DMC_BENCHMARK)
def test_every_task_of_the_benchmark_runs_on_pixels(name: str) -> None:
    env = DMCEnv(name, pixels=True, fast_rendering=True)

    observations, _ = episode(env, 40)

    assert observations.shape == (41, 64, 64, 3) and observations.dtype == np.uint8
    assert env.observation_space.contains(observations[-1])
    assert observations.std() > 5, "the pictures show nothing"
    # What the camera sees has moved; the tasks whose camera moves along change everywhere.
    assert np.any(observations[0] != observations[-1])
    env.close()


@pytest.mark.parametrize(("action_repeat", "steps"), [(1, 1000), (2, 500), (3, 334)])
def test_an_episode_is_truncated_at_the_tasks_time_limit(action_repeat: int, steps: int) -> None:
    env = DMCEnv("pendulum-swingup", action_repeat=action_repeat)
    assert isinstance(env, DMCEnv) and env.max_episode_steps == steps
    env.reset(seed=0)

    ends = [env.step(action)[2:4] for action in random_actions(env, steps)]

    assert ends == [(False, False)] * (steps - 1) + [(False, True)]
    assert env.physics.time() == pytest.approx(20.0)
    with pytest.raises(ConfigurationError, match=r"step\(\) was called before the first reset\(\) or after the end"):
        env.step(np.zeros(1))
    env.reset()
    assert env.step(np.zeros(1))[2:4] == (False, False)


@pytest.mark.parametrize("name", ["hopper-hop", "reacher-easy", "walker-run"])
def test_a_step_is_a_loop_over_dm_controls_own_steps(name: str) -> None:
    env, original = DMCEnv(name, action_repeat=4), load_original(name, seed=7)

    obs, _ = env.reset(seed=7)
    np.testing.assert_array_equal(obs, flat(original.reset().observation))
    for action in random_actions(env, 50):
        obs, reward, terminated, truncated, info = env.step(action)
        expected = 0.0
        for _ in range(4):
            time_step = original.step(action.astype(np.float64))
            expected += time_step.reward
        assert reward == expected and type(reward) is float
        np.testing.assert_array_equal(obs, flat(time_step.observation))
        assert (terminated, truncated, info) == (False, False, {})


def test_the_last_observation_is_the_one_at_the_end_where_the_repetition_stops() -> None:
    env, original = DMCEnv("cartpole-balance", action_repeat=400), load_original("cartpole-balance", seed=0)
    env.reset(seed=0)
    original.reset()
    action = np.array([0.3], np.float32)

    steps = [env.step(action) for _ in range(3)]  # 400, 400 and the 200 that are left
    rewards = []
    time_step = original.step(action.astype(np.float64))
    while not time_step.last():
        rewards.append(time_step.reward)
        time_step = original.step(action.astype(np.float64))
    rewards.append(time_step.reward)

    assert len(rewards) == 1000
    assert [step[1] for step in steps] == pytest.approx(
        [sum(rewards[:400]), sum(rewards[400:800]), sum(rewards[800:])], rel=1e-12
    )
    np.testing.assert_array_equal(steps[-1][0], flat(time_step.observation))
    assert [step[3] for step in steps] == [False, False, True]


def test_a_discount_of_zero_is_a_termination_and_ends_the_repetition() -> None:
    env = DMCEnv("lqr-2-1", action_repeat=5)
    assert isinstance(env, DMCEnv) and env.max_episode_steps is None
    env.reset(seed=0)
    assert env.step(np.zeros(1))[2:4] == (False, False)
    with env.physics.reset_context():
        env.physics.data.qpos[:] = 0.0  # the task is done where nothing is displaced and nothing moves

    obs, reward, terminated, truncated, _ = env.step(np.zeros(1))

    assert (terminated, truncated) == (True, False)
    assert env.physics.time() == pytest.approx(0.03), "one control step, not five"
    np.testing.assert_array_equal(obs, np.zeros(4, np.float32))
    assert reward == pytest.approx(1.0)
    with pytest.raises(ConfigurationError, match="after the end of an episode"):
        env.step(np.zeros(1))


def test_a_diverging_simulation_truncates_the_episode_with_the_last_observation_before() -> None:
    env = DMCEnv("walker-walk", action_repeat=2)
    env.reset(seed=0)
    before = env.step(np.zeros(6))[0]
    physics = env.unwrapped.physics  # type: ignore[attr-defined]
    physics.data.qvel[:] = np.nan

    with pytest.warns(UserWarning, match="The simulation of 'walker-walk' diverged"):
        obs, reward, terminated, truncated, info = env.step(np.zeros(6))

    np.testing.assert_array_equal(obs, before)
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert info["physics_error"].startswith("Physics state is invalid")
    with pytest.raises(ConfigurationError, match="after the end of an episode"):
        env.step(np.zeros(6))
    assert np.isfinite(env.reset()[0]).all() and env.step(np.zeros(6))[2:4] == (False, False)


def test_the_observation_is_the_tasks_entries_in_its_order_with_scalars_as_one_number() -> None:
    env = DMCEnv("walker-walk")
    assert isinstance(env, DMCEnv)

    obs, _ = env.reset(seed=0)

    entries = env.task.get_observation(env.physics)
    assert list(entries) == ["orientations", "height", "velocity"] and np.ndim(entries["height"]) == 0
    np.testing.assert_array_equal(obs, flat(entries))
    assert obs.shape == (24,) and obs[14] == np.float32(entries["height"])
    assert env.observation_space == gym.spaces.Box(-np.inf, np.inf, (24,), np.float32)


def test_actions_have_the_tasks_own_bounds_and_are_clipped_to_them() -> None:
    env = DMCEnv("quadruped-walk", action_repeat=1)
    assert isinstance(env, DMCEnv) and isinstance(env.action_space, gym.spaces.Box)
    np.testing.assert_array_equal(env.action_space.high, np.tile(np.array([1, 1.1, 0.8], np.float32), 4))
    env.reset(seed=0)

    env.step(np.full(12, 50.0))

    np.testing.assert_array_equal(env.physics.control(), np.tile([1, 1.1, 0.8], 4))
    env.step(env.action_space.low)
    assert np.all(env.physics.control() >= env.physics.model.actuator_ctrlrange[:, 0])


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros(5), r"The action has shape \(5,\), expected \(6,\)"),
        (np.zeros((1, 6)), r"The action has shape \(1, 6\), expected \(6,\)"),
        ([0, 0, np.nan, 0, 0, 0], "expected finite numbers"),
        (np.full(6, np.inf), "expected finite numbers"),
        ("left", r"The action is 'left', expected numbers of shape \(6,\)"),
    ],
)
def test_an_action_that_does_not_fit_says_what_was_expected(action: Any, message: str) -> None:
    env = DMCEnv("walker-walk")
    env.reset(seed=0)

    with pytest.raises(ShapeMismatchError, match=message):
        env.step(action)
    assert env.unwrapped.physics.time() == 0.0  # type: ignore[attr-defined]


# fish and humanoid draw random rotations, finger-turn and reacher random targets, quadruped-escape a terrain.
@pytest.mark.parametrize("name", ["fish-swim", "humanoid-walk", "finger-turn-hard", "reacher-hard", "quadruped-escape"])
def test_a_seed_fixes_this_episode_and_the_following_ones(name: str) -> None:
    env, twin = DMCEnv(name), DMCEnv(name)
    episode(twin, 3, seed=5)  # what came before does not matter

    first, second = episode(env, 10, seed=1), episode(env, 10, seed=None)
    again, again_second = episode(twin, 10, seed=1), episode(twin, 10, seed=None)
    other = episode(env, 10, seed=2)

    for one, same in ((first, again), (second, again_second)):
        np.testing.assert_array_equal(one[0], same[0])
        assert one[1] == same[1]
    assert np.any(first[0][0] != second[0][0]) and np.any(first[0][0] != other[0][0])


def test_a_seed_draws_the_system_of_lqr_too() -> None:
    env, twin = DMCEnv("lqr-6-2"), DMCEnv("lqr-6-2")
    first, again = episode(env, 10, seed=1), episode(twin, 10, seed=1)

    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(episode(env, 10, seed=None)[0], episode(twin, 10, seed=None)[0])
    original = load_original("lqr-6-2", seed=1)
    np.testing.assert_array_equal(first[0][0], flat(original.reset().observation))
    env.reset(seed=1)
    np.testing.assert_array_equal(env.physics.model.jnt_stiffness, original.physics.model.jnt_stiffness)
    pictures = DMCEnv("lqr-2-1", pixels=True, fast_rendering=True)
    assert np.any(pictures.reset(seed=1)[0] != pictures.reset(seed=2)[0])
    pictures.close()


def test_a_seed_means_the_same_in_another_process() -> None:
    code = (
        "import hashlib, numpy as np; from worldflux.envs.suites.dmc import DMCEnv\n"
        "env = DMCEnv('fish-swim'); obs = [env.reset(seed=2**40 + 3)[0]]\n"
        "obs += [env.step(np.full(5, 0.5))[0] for _ in range(5)]\n"
        "print(hashlib.sha256(np.stack(obs).tobytes()).hexdigest())"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)

    env = DMCEnv("fish-swim")
    obs = [env.reset(seed=2**40 + 3)[0]]
    obs += [env.step(np.full(5, 0.5))[0] for _ in range(5)]

    assert elsewhere.stdout.strip() == hashlib.sha256(np.stack(obs).tobytes()).hexdigest()
    assert np.any(obs[0] != env.reset(seed=3)[0]), "the upper bits of a large seed count"


def test_without_a_seed_two_environments_differ() -> None:
    assert np.any(DMCEnv("reacher-easy").reset()[0] != DMCEnv("reacher-easy").reset()[0])


@pytest.mark.usefixtures("_drawing")
@pytest.mark.filterwarnings("ignore:.*Box observation space m", "ignore:.*Not able to test alternative render modes")
@pytest.mark.parametrize("options", [{}, SMALL_PIXELS], ids=["state", "pixels"])
def test_gymnasiums_checker_accepts_it(options: dict[str, Any]) -> None:
    env = DMCEnv("walker-walk", render_mode="rgb_array", render_size=16, **options)

    check_env(env, skip_render_check=False, skip_close_check=False)


@pytest.mark.usefixtures("_drawing")
def test_a_copy_is_made_from_the_same_arguments() -> None:
    env = DMCEnv("cartpole-swingup", camera=1, action_repeat=3, **SMALL_PIXELS)
    frames, rewards = episode(env, 4)

    for clone in (pickle.loads(pickle.dumps(env)), cloudpickle.loads(cloudpickle.dumps(env)), copy.deepcopy(env)):
        clone_frames, clone_rewards = episode(clone, 4)
        np.testing.assert_array_equal(clone_frames, frames)
        assert clone_rewards == rewards
        clone.close()
    np.testing.assert_array_equal(episode(env, 4)[0], frames)


@pytest.mark.usefixtures("_drawing")
def test_pixels_are_what_dm_control_draws_and_stay_as_they_were() -> None:
    env, original = DMCEnv("quadruped-walk", pixels=True, size=(20, 28)), load_original("quadruped-walk", seed=0)
    original.reset()

    obs, _ = env.reset(seed=0)

    expected = original.physics.render(20, 28, camera_id=2)
    np.testing.assert_array_equal(obs, expected)
    later = env.step(np.ones(12))[0]
    assert np.any(later != obs)
    np.testing.assert_array_equal(obs, expected)
    original.physics.free()
    env.close()


@pytest.mark.usefixtures("_drawing")
def test_the_camera_is_a_number_or_a_name() -> None:
    pictures = {}
    for camera in (None, "side", 1, "back", -1):
        env = DMCEnv("walker-walk", camera=camera, **SMALL_PIXELS)
        pictures[camera] = env.reset(seed=0)[0]
        env.close()

    np.testing.assert_array_equal(pictures[None], pictures["side"], "camera 0")
    np.testing.assert_array_equal(pictures[1], pictures["back"])
    assert np.any(pictures[None] != pictures[1]) and np.any(pictures[None] != pictures[-1])


@pytest.mark.usefixtures("_drawing")
def test_fast_rendering_shows_the_same_scene_in_another_light() -> None:
    env = DMCEnv("walker-walk", pixels=True)
    fast = DMCEnv("walker-walk", pixels=True, fast_rendering=True)

    picture, fast_picture = env.reset(seed=0)[0].astype(float), fast.reset(seed=0)[0].astype(float)

    assert np.corrcoef(picture.ravel(), fast_picture.ravel())[0, 1] > 0.9
    assert np.abs(picture - fast_picture).mean() > 1, "which is why it is not for results"


@pytest.mark.usefixtures("_drawing")
def test_render_gives_a_large_picture_of_the_state_also_where_observations_are_small() -> None:
    env = DMCEnv("cartpole-balance", render_mode="rgb_array", **SMALL_PIXELS)
    large = DMCEnv("cartpole-balance", render_mode="rgb_array", render_size=(700, 900), fast_rendering=True)
    env.reset(seed=0)
    large.reset(seed=0)

    picture, huge = env.render(), large.render()

    assert isinstance(picture, np.ndarray) and picture.shape == (480, 480, 3) and picture.dtype == np.uint8
    assert isinstance(huge, np.ndarray) and huge.shape == (700, 900, 3), "larger than the model's own frame buffer"
    assert huge.std() > 5
    assert env.step(np.zeros(1))[0].shape == (24, 32, 3)
    assert env.metadata["render_fps"] == 50, "0.01 seconds, twice"


def test_render_without_a_mode_warns_and_gives_none() -> None:
    env = DMCEnv("pendulum-swingup")
    env.reset()

    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        assert env.render() is None


@pytest.mark.usefixtures("_drawing")
def test_the_terrain_of_quadruped_escape_is_drawn_anew_in_every_episode() -> None:
    env = DMCEnv("quadruped-escape", **SMALL_PIXELS)

    first, other, again = (env.reset(seed=seed)[0] for seed in (1, 2, 1))

    assert np.any(first != other)
    np.testing.assert_array_equal(first, again)


def test_a_task_seen_as_numbers_makes_no_opengl_context() -> None:
    env = DMCEnv("quadruped-escape", render_mode="rgb_array")  # the one that asks for a context of its own
    env.reset(seed=0)
    env.step(np.zeros(12))

    assert env.unwrapped.physics._contexts is None  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_drawing")
def test_closing_frees_the_context_and_may_be_repeated() -> None:
    env = DMCEnv("pendulum-swingup", **SMALL_PIXELS)
    assert isinstance(env, DMCEnv)
    env.reset()
    physics = env.physics
    assert physics._contexts is not None
    context = physics.contexts.gl

    env.close()
    env.close()

    assert physics._contexts is None and context.terminated
    for use in (env.reset, lambda: env.step(np.zeros(1)), lambda: env.physics):
        with pytest.raises(ConfigurationError, match="'pendulum-swingup' was closed"):
            use()


@pytest.mark.usefixtures("_drawing")
@pytest.mark.parametrize("kind", ["AsyncVectorEnv", "SubprocVecEnv"])
def test_spawned_workers_draw_the_frames_of_a_single_environment(kind: str) -> None:
    make = functools.partial(DMCEnv, "cartpole-swingup", **SMALL_PIXELS)
    single = make()
    expected, rewards = episode(single, 4, seed=11)
    actions = [np.stack([action, action]) for action in random_actions(single, 4)]

    if kind == "AsyncVectorEnv":
        workers: Any = gym.vector.AsyncVectorEnv([make, make], context="spawn")
    else:
        workers = SubprocVecEnv([make, make], start_method="spawn")
        workers.seed(11)
    try:
        frames = [workers.reset(seed=11)[0] if kind == "AsyncVectorEnv" else workers.reset()]
        steps = [workers.step(action) for action in actions]
    finally:
        workers.close()

    drawn = np.stack([*frames, *(step[0] for step in steps)])
    np.testing.assert_array_equal(drawn[:, 0], expected)
    assert np.any(drawn[:, 1] != expected), "the second worker has its own seed"
    np.testing.assert_allclose([step[1][0] for step in steps], rewards, rtol=1e-6)


def test_fields_that_the_installed_mujoco_lacks_are_dropped_before_a_task_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    DMCEnv("pendulum-swingup").close()
    from dm_control import suite
    from dm_control.mujoco.wrapper.mjbindings import sizes

    monkeypatch.setitem(sizes.array_sizes["mjmodel"], "no_such_field", ("nbody",))
    monkeypatch.setitem(sizes.array_sizes["mjdata"], "nor_this_one", ("nv", 3))
    with pytest.raises(AttributeError, match="no_such_field"):
        suite.load("pendulum", "swingup")

    env = DMCEnv("pendulum-swingup")

    env.reset(seed=0)
    assert "no_such_field" not in sizes.array_sizes["mjmodel"] and "nor_this_one" not in sizes.array_sizes["mjdata"]
    assert {"qpos0", "geom_rgba"} <= set(sizes.array_sizes["mjmodel"]), "what is there stays"


def test_without_dm_control_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dm_control", None)

    with pytest.raises(MissingDependencyError, match="'dm_control'.*" + re.escape(install_hint("dmc"))):
        DMCEnv("walker-walk")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("walker-wlak", {}, "Unknown task 'walker-wlak' of DeepMind Control; did you mean 'walker-walk'"),
        ("walker-walk", {"action_repeat": 0}, "action_repeat is 0, expected a whole number from 1"),
        ("walker-walk", {"action_repeat": 2.0}, "action_repeat is 2.0, expected a whole number"),
        ("walker-walk", {"size": (64, 64, 3)}, r"size is \(64, 64, 3\), expected a number of pixels such as"),
        ("walker-walk", {"size": 0}, "size is 0, expected a number of pixels"),
        ("walker-walk", {"render_size": 1.5}, "render_size is 1.5, expected a number of pixels"),
        ("walker-walk", {"camera": 7}, r"camera is 7, expected 0 to 1 or one of \['side', 'back'\], or -1"),
        ("walker-walk", {"camera": "top"}, r"camera is 'top', expected 0 to 1"),
        (
            "walker-walk",
            {"render_mode": "human"},
            "render_mode is 'human', expected 'rgb_array' or None. .*HumanRendering",
        ),
    ],
)
def test_an_argument_that_cannot_be_used_says_what_was_expected(name: str, options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DMCEnv(name, **options)
