"""The two Atari protocols agree, frame by frame, with the emulator stepped by hand."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence

from worldflux.envs.suites import ATARI_57, ATARI_100K, ale_id
from worldflux.envs.suites.atari import PROTOCOLS, AtariFrames, make_atari, register_ale
from worldflux.errors import ConfigurationError, MissingDependencyError, install_hint

pytest.importorskip("ale_py")

GAMES = ("pong", "ms-pacman", "breakout", "space-invaders", "montezuma-revenge", "up-n-down", "private-eye")


def emulator(game: str, *, grey: bool = False, sticky: float = 0.0, full: bool = False) -> gym.Env[Any, Any]:
    """A game without any preprocessing, in which a step is a frame."""
    register_ale()
    return gym.make(
        ale_id(game),
        frameskip=1,
        obs_type="grayscale" if grey else "rgb",
        repeat_action_probability=sticky,
        full_action_space=full,
    )


def pooled(frames: list[np.ndarray], side: int) -> np.ndarray:
    image = cv2.resize(np.maximum(frames[-1], frames[-2]), (side, side), interpolation=cv2.INTER_AREA)
    return image if image.ndim == 3 else image[..., None]


def play(env: gym.Env[Any, Any], steps: int, *, seed: int = 0) -> list[Any]:
    """Observations, rewards and flags for the same random actions, over as many episodes as it takes."""
    actions = np.random.default_rng(7)
    trace: list[Any] = [env.reset(seed=seed)[0]]
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(int(actions.integers(env.action_space.n)))  # type: ignore[attr-defined]
        trace.append((obs, reward, terminated, truncated))
        if terminated or truncated:
            trace.append(env.reset()[0])
    return trace


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("game", GAMES)
def test_games_play_200_decisions(game: str, protocol: str) -> None:
    env = make_atari(game, protocol=protocol)
    space = env.observation_space
    assert space == gym.spaces.Box(0, 255, (96, 96, 1) if protocol == "standard" else (64, 64, 3), np.uint8)
    env.action_space.seed(0)
    obs, info = env.reset(seed=0)
    frames, rewards = info["episode_frame_number"], 0.0
    for _ in range(200):
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert space.contains(obs)
        assert reward == int(reward)  # points, not clipped and not scaled
        frames += 4
        assert info["episode_frame_number"] == frames or terminated
        rewards += abs(reward)
        if terminated or truncated:
            frames = env.reset()[1]["episode_frame_number"]
    assert obs.std() > 0
    if game in ("ms-pacman", "space-invaders", "breakout"):
        assert rewards > 0


def test_ale_has_every_game_of_the_suites() -> None:
    register_ale()
    assert set(ATARI_100K) <= set(ATARI_57)
    assert all(ale_id(game) in gym.registry for game in ATARI_57)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_gymnasium_has_nothing_to_complain_about(protocol: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*different from the unwrapped version.*")
        check_env(make_atari("pong", protocol=protocol), skip_render_check=True)


@pytest.mark.parametrize("grey", [False, True])
def test_an_observation_is_the_maximum_of_the_last_two_of_four_frames(grey: bool) -> None:
    # The invaders' shots flicker: each is drawn on every other frame only.
    env = make_atari("space-invaders", protocol="100k", noop_max=0, grayscale_obs=grey)
    raw = emulator("space-invaders", grey=grey)
    obs, _ = env.reset(seed=1)
    first, _ = raw.reset(seed=1)
    np.testing.assert_array_equal(obs, pooled([first, first], 64))
    pooling_mattered = 0
    for t in range(60):
        obs, reward, *_ = env.step(t % 6)
        steps = [raw.step(t % 6) for _ in range(4)]
        frames = [step[0] for step in steps]
        np.testing.assert_array_equal(obs, pooled(frames, 64))
        assert reward == sum(step[1] for step in steps)
        pooling_mattered += not np.array_equal(frames[-1], frames[-2])
    assert pooling_mattered > 10


def test_the_final_observation_shows_the_frames_on_which_the_game_ended() -> None:
    env, raw = make_atari("breakout", protocol="100k", noop_max=0), emulator("breakout")
    lengths = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        obs, _ = env.reset(seed=0)
        raw.reset(seed=0)
        over = False
        while not over:
            action, before, frames = int(rng.integers(4)), obs, []
            obs, _, over, truncated, info = env.step(action)
            for _ in range(4):
                frame, _, ended, _, raw_info = raw.step(action)
                frames.append(frame)
                if ended:
                    break
        assert not truncated
        assert info["lives"] == 0
        assert info["episode_frame_number"] == raw_info["episode_frame_number"]
        # On the first frame of a decision there is nothing to pool with.
        np.testing.assert_array_equal(obs, pooled(frames if len(frames) > 1 else frames * 2, 64))
        assert not np.array_equal(obs, before)
        lengths.append(len(frames))
    assert max(lengths) > 1


@pytest.mark.parametrize("limit", [100, 101, 102, 103])
def test_the_limit_of_frames_truncates_with_the_frames_it_was_reached_on(limit: int) -> None:
    env, raw = make_atari("pong", protocol="100k", noop_max=0, max_num_frames_per_episode=limit), emulator("pong")
    env.reset(seed=0)
    raw.reset(seed=0)
    frames = [raw.step(2)[0] for _ in range(limit)]
    for decision in range(1, 27):
        obs, _, terminated, truncated, info = env.step(2)
        if truncated:
            break
        assert env.max_episode_steps is not None
        assert decision < env.max_episode_steps
    assert decision == env.max_episode_steps == -(-limit // 4)
    assert not terminated
    assert info["episode_frame_number"] == limit
    # On the first frame of a decision there is nothing to pool with.
    np.testing.assert_array_equal(obs, pooled(frames if limit % 4 != 1 else frames[-1:] * 2, 64))


def test_a_game_that_ends_on_the_last_frame_allowed_is_terminated_as_well() -> None:
    env = make_atari("breakout", protocol="100k", noop_max=0)
    whole = play_to_the_end(env)
    limited = make_atari(
        "breakout", protocol="100k", noop_max=0, max_num_frames_per_episode=whole["episode_frame_number"]
    )
    assert (whole["terminated"], whole["truncated"]) == (True, False)
    ended = play_to_the_end(limited)
    assert (ended["terminated"], ended["truncated"]) == (True, True)


def play_to_the_end(env: AtariFrames) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    env.reset(seed=3)
    terminated = truncated = False
    while not (terminated or truncated):
        _, _, terminated, truncated, info = env.step(int(rng.integers(4)))
    return {**info, "terminated": terminated, "truncated": truncated}


def test_episodes_last_half_an_hour_at_most_in_both_protocols() -> None:
    for protocol in PROTOCOLS:
        env = make_atari("pong", protocol=protocol)
        assert env.action_repeat == 4
        assert env.max_episode_steps == 27_000
    assert make_atari("pong", frame_skip=3, max_num_frames_per_episode=100).max_episode_steps == 34
    assert make_atari("pong", max_num_frames_per_episode=0).max_episode_steps is None


def test_episodes_begin_with_up_to_30_no_ops() -> None:
    env, raw = make_atari("pong", protocol="100k"), emulator("pong")
    counts = set()
    for seed in range(12):
        obs, info = env.reset(seed=seed)
        noops = info["episode_frame_number"]
        counts.add(noops)
        frame, _ = raw.reset(seed=seed)
        for _ in range(noops):
            frame = raw.step(0)[0]
        np.testing.assert_array_equal(obs, pooled([frame, frame], 64))
    assert 1 <= min(counts) < max(counts) <= 30
    assert len(counts) > 5
    assert make_atari("pong", noop_max=0).reset(seed=0)[1]["episode_frame_number"] == 0


def test_only_sticky_actions_make_equal_actions_from_an_equal_start_differ() -> None:
    for sticky, equal in ((None, True), (0.25, False)):
        env = make_atari("pong", protocol="100k", noop_max=0, repeat_action_probability=sticky)
        first, second = play(env, 60, seed=1), play(env, 60, seed=2)
        assert data_equivalence(first, second, exact=True) is equal


def test_an_action_that_always_sticks_is_never_heard() -> None:
    def observations(sticky: float, action: int) -> list[np.ndarray]:
        env = make_atari("pong", protocol="100k", noop_max=0, repeat_action_probability=sticky)
        env.reset(seed=0)
        return [env.step(action)[0] for _ in range(60)]

    idle = observations(0.0, 0)
    assert data_equivalence(observations(1.0, 2), idle, exact=True)
    assert not data_equivalence(observations(0.0, 2), idle, exact=True)


def test_the_protocols_set_what_their_table_says() -> None:
    standard, few = make_atari("pong"), make_atari("pong", protocol="100k")
    assert standard.unwrapped.ale.getFloat("repeat_action_probability") == 0.25  # type: ignore[attr-defined]
    assert few.unwrapped.ale.getFloat("repeat_action_probability") == 0.0  # type: ignore[attr-defined]
    assert standard.action_space == gym.spaces.Discrete(18)
    assert few.action_space == gym.spaces.Discrete(6)
    assert make_atari("breakout", protocol="100k").action_space == gym.spaces.Discrete(4)
    assert make_atari("pong", full_action_space=False).action_space == gym.spaces.Discrete(6)


def test_options_go_before_the_protocol() -> None:
    env = make_atari("pong", protocol="100k", grayscale_obs=True, screen_size=(80, 48), frame_skip=2)
    assert env.reset(seed=0)[0].shape == (48, 80, 1)
    assert env.action_repeat == 2
    colour = make_atari("pong", grayscale_obs=False)
    assert colour.observation_space.shape == (96, 96, 3)


def test_a_lost_life_ends_the_episode_only_on_request() -> None:
    def until_a_life_is_lost(env: AtariFrames) -> tuple[bool, int]:
        _, info = env.reset(seed=0)
        assert info["lives"] == 5
        while True:
            _, _, terminated, truncated, info = env.step(1)  # fire, and do not move
            assert not truncated
            if terminated or info["lives"] < 5:
                return terminated, info["lives"]

    assert until_a_life_is_lost(make_atari("breakout", protocol="100k")) == (False, 4)
    assert until_a_life_is_lost(make_atari("breakout", protocol="100k", terminal_on_life_loss=True)) == (True, 4)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_seed_decides_everything_in_any_instance(protocol: str) -> None:
    env, other = (make_atari("breakout", protocol=protocol) for _ in range(2))
    first = play(env, 250, seed=5)
    assert data_equivalence(first, play(other, 250, seed=5), exact=True)
    assert data_equivalence(first, play(env, 250, seed=5), exact=True)
    assert not data_equivalence(first, play(env, 250, seed=6), exact=True)
    assert sum(isinstance(item, np.ndarray) for item in first) > 1  # a second, unseeded episode was compared, too


def test_observations_are_not_written_to_later() -> None:
    env = make_atari("pong")
    kept = [env.reset(seed=0)[0]] + [env.step(2)[0] for _ in range(20)]
    copies = [obs.copy() for obs in kept]
    play(env, 50)
    assert data_equivalence(kept, copies, exact=True)


def test_an_environment_is_made_again_from_its_spec() -> None:
    env = make_atari("pong", protocol="100k", noop_max=5)
    assert env.spec is not None
    again = env.spec.make()
    assert data_equivalence(play(env, 30), play(again, 30), exact=True)


def test_rendering_shows_the_whole_screen() -> None:
    env = make_atari("pong", render_mode="rgb_array")
    env.reset(seed=0)
    picture = env.render()
    assert isinstance(picture, np.ndarray)
    assert picture.shape == (210, 160, 3)


def test_names_are_taken_in_either_spelling() -> None:
    assert make_atari("Ms_Pacman").unwrapped.spec.id == "ALE/MsPacman-v5"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"game": "ms-packman"}, "Unknown Atari game 'ms-packman'; did you mean 'ms-pacman'"),
        ({"protocol": "200k"}, "The Atari protocol is '200k', expected one of standard, 100k"),
        ({"repeat_action_probability": 25}, "repeat_action_probability is 25, expected a probability"),
        ({"screen_size": 0}, "screen_size"),
        ({"frame_skip": 0}, "frame_skip"),
        ({"noop_max": -1}, "noop_max"),
    ],
)
def test_what_cannot_be_made_is_a_configuration_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_atari(**{"game": "pong", **options})


def test_without_ale_py_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(MissingDependencyError, match=re.escape(install_hint("atari"))):
        make_atari("pong")


def test_ale_prints_nothing() -> None:
    code = "from worldflux.envs.suites.atari import make_atari; make_atari('pong').reset(seed=0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
