"""Replay chunks of DreamerV3, and episodes of dreamerv3-torch and V-D4RL, written as their own code writes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.data_sets import acted, assert_holds, earned, observed, stored

from worldflux.datasets import detect, load
from worldflux.errors import BufferError, ConfigurationError, WorldFluxError

EPISODES = {1: (3, "terminated"), 2: (1, "truncated"), 3: (4, "terminated"), 4: (2, "truncated")}
HELD = [(number, length, end, True) for number, (length, end) in EPISODES.items()]


def transitions(number: int, action: Any = None) -> Iterator[dict[str, Any]]:
    """What the driver of DreamerV3 adds to its replay: an observation, what came with it, and the next action."""
    length, end = EPISODES[number]
    for t in range(length + 1):
        last = t == length
        yield {
            "state": observed(number, t + 1)[-1],
            "image": picture(number, t),
            "reward": np.float32(0 if t == 0 else earned(number, t)[-1]),
            "is_first": np.bool_(t == 0),
            "is_last": np.bool_(last),
            "is_terminal": np.bool_(last and end == "terminated"),
            "action": (1 - last) * (acted(number, t + 1)[-1] if action is None else action(t)),
            "reset": np.bool_(last),
            "dyn/deter": np.full(4, 0.5, np.float32),
            "stepid": np.zeros(20, np.uint8),
        }


def picture(number: int, t: int) -> np.ndarray:
    """A picture HWC whose channels say where it belongs."""
    return np.broadcast_to(np.array([number, t, 7], np.uint8), (16, 24, 3))


def write_chunks(directory: Path, size: int, streams: list[list[dict[str, Any]]]) -> Path:
    """Chunks of at most `size` rows, whose names link them: `time-id-successor-length.npz`."""
    directory.mkdir(exist_ok=True)
    for number, rows in enumerate(streams):
        parts = [rows[at : at + size] for at in range(0, len(rows), size)]
        for index, part in enumerate(parts):
            own, successor = f"{'ab'[number]}{index}x", f"{'ab'[number]}{index + 1}x"
            name = f"2024010{index}T12000{number}F123-{own}-{successor}-{len(part)}.npz"
            arrays = {key: np.stack([row[key] for row in part]) for key in part[0]}
            np.savez_compressed(directory / name, **arrays)
    return directory


def two_streams(action: Any = None) -> list[list[dict[str, Any]]]:
    return [[*transitions(1, action), *transitions(2, action)], [*transitions(3, action), *transitions(4, action)]]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_chunks_are_linked_and_rewards_go_to_the_action_that_earned_them(size: int, tmp_path: Path) -> None:
    path = write_chunks(tmp_path / "replay", size, two_streams())
    assert detect(path) == "dreamerv3"
    assert_holds(load(path, obs="state"), HELD)


def test_all_observations_are_read_and_latents_are_not(tmp_path: Path) -> None:
    buffer = load(write_chunks(tmp_path, 4, two_streams()))
    assert buffer.obs_shape == {"state": (2,), "image": (3, 16, 24)}
    episode = stored(buffer)[2]
    np.testing.assert_array_equal(episode.obs["image"][:, :, 5, 5], [[3, t, 7] for t in range(4)])
    np.testing.assert_array_equal(episode.final["image"][:, 5, 5], [3, 4, 7])


def test_abandoned_episodes_and_the_streams_end_are_truncated(tmp_path: Path) -> None:
    rows = [*transitions(3)][:3] + [*transitions(4)][:2]
    buffer = load(write_chunks(tmp_path, 2, [rows]), obs="state")
    assert_holds(buffer, [(3, 2, "truncated", True), (4, 1, "truncated", True)])


def test_a_missing_chunk_cuts_the_episode_that_ran_through_it(tmp_path: Path) -> None:
    write_chunks(tmp_path, 2, [[*transitions(3)]])
    next(tmp_path.glob("*-a1x-a2x-*")).unlink()
    found = stored(load(tmp_path, obs="state"))
    assert [(len(one.actions), one.end) for one in found] == [(1, "truncated")]


def test_whole_numbers_of_actions_become_one_hots(tmp_path: Path) -> None:
    path = write_chunks(tmp_path, 3, two_streams(lambda t: np.int32(t % 3)))
    with pytest.raises(ConfigurationError, match="action_classes"):
        load(path)
    buffer = load(path, action_classes=(3,), obs="state")
    np.testing.assert_array_equal(stored(buffer)[0].actions, np.eye(3))


def test_chunks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = write_chunks(tmp_path, 3, two_streams())
    name = next(path.glob("*-a1x-a2x-*"))
    name.rename(path / name.name.replace("-3.npz", "-2.npz"))
    with pytest.raises(WorldFluxError, match="expected the number in its name"):
        load(path)
    circle = write_chunks(tmp_path / "circle", 100, two_streams()[:1])
    only = next(circle.iterdir())
    only.rename(circle / only.name.replace("a1x", "a0x"))
    with pytest.raises(BufferError, match="do not link"):
        load(circle)
    whole = only.with_name("2024-a-b-6.npz")
    next(circle.iterdir()).rename(whole)
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(BufferError, match="damaged or cut short"):
        load(circle, format="dreamerv3")
    with pytest.raises(BufferError, match="no chunks of DreamerV3"):
        load(empty(tmp_path), format="dreamerv3")


def empty(directory: Path) -> Path:
    (directory / "empty").mkdir()
    return directory / "empty"


def episode_arrays(number: int, *, flags: bool = True) -> dict[str, np.ndarray]:
    """What `save_episodes` of dreamerv3-torch writes: T + 1 rows, the first without an action and a reward."""
    length, end = EPISODES[number]
    rows = np.arange(length + 1)
    arrays = {
        "image": np.stack([picture(number, t) for t in rows]),
        "state": observed(number, length + 1),
        "action": np.concatenate([np.zeros((1, 1), np.float32), acted(number, length)]),
        "reward": np.append(np.float32(0), earned(number, length)),
        "discount": 1.0 - ((rows == length) & (end == "terminated")),
        "logprob": np.zeros(length + 1),
    }
    if flags:
        arrays |= {"is_first": rows == 0, "is_last": rows == length, "is_terminal": arrays["discount"] == 0}
    return arrays


@pytest.mark.parametrize("flags", [True, False])
def test_episodes_of_dreamerv3_torch_pair_each_row_with_the_action_before_it(flags: bool, tmp_path: Path) -> None:
    for number, (length, _) in EPISODES.items():
        np.savez_compressed(tmp_path / f"2024{number}-id-{length + 1}.npz", **episode_arrays(number, flags=flags))
    assert detect(tmp_path) == "dreamerv3-torch"
    assert_holds(load(tmp_path, obs="state"), HELD)
    episode = stored(load(tmp_path))[2]
    np.testing.assert_array_equal(episode.obs["image"][:, :, 5, 5], [[3, t, 7] for t in range(4)])


def test_an_episode_that_cannot_tell_how_it_ended_is_refused(tmp_path: Path) -> None:
    arrays = episode_arrays(1)
    for name in ("is_terminal", "discount"):
        del arrays[name]
    np.savez(tmp_path / "one.npz", **arrays)
    with pytest.raises(BufferError, match=r"neither is_terminal nor discount.*align='led_to'"):
        load(tmp_path)


def test_hdf5_files_of_v_d4rl_hold_blocks_of_rows(tmp_path: Path) -> None:
    for name, numbers in (("shard_2.hdf5", (1, 2)), ("shard_10.hdf5", (3, 4))):
        parts = [episode_arrays(number) for number in numbers]
        kinds = [np.where(part["is_first"], 0, np.where(part["is_last"], 2, 1)) for part in parts]
        with h5py.File(tmp_path / name, "w") as file:
            file["observation"] = np.moveaxis(np.concatenate([part["image"] for part in parts]), -1, 1)
            for key in ("action", "reward", "discount"):
                file[key] = np.concatenate([part[key] for part in parts])
            file["step_type"] = np.concatenate(kinds)
    for source, held in ((tmp_path, HELD), (tmp_path / "shard_10.hdf5", HELD[2:])):
        assert detect(source) == "dreamerv3-torch"
        buffer = load(source)
        assert buffer.obs_shape == (3, 16, 24)
        found = stored(buffer)
        assert [(len(one.actions), one.end, one.final is not None) for one in found] == [one[1:] for one in held]
        for (number, length, *_), one in zip(held, found, strict=True):
            np.testing.assert_array_equal(one.obs[:, :, 3, 3], [[number, t, 7] for t in range(length)])
            np.testing.assert_array_equal(one.final[:, 3, 3], [number, length, 7])
            np.testing.assert_array_equal(one.actions, acted(number, length))
            np.testing.assert_array_equal(one.rewards, earned(number, length))
