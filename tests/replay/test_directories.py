"""Directories of files as one buffer, and files that are read in place."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import resource
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.replay import assert_same_batch, documented, with_table

from worldflux.errors import BufferError, ConfigurationError
from worldflux.replay import backends
from worldflux.replay.backends import FileRows, RecordedFiles
from worldflux.replay.npz import NpzFile
from worldflux.replay.provider import batches_from
from worldflux.replay.ring import FIRST
from worldflux.training import ReplayBuffer, create_random_buffer

SHAPES: dict[str, Any] = {
    "vectors": (3,),
    "images": (3, 4, 4),
    "both": {"camera": (3, 4, 4), "speed": (2,)},
}
ACTION_DIM = 2


def observed(rng: np.random.Generator, shape: Any, count: int) -> Any:
    if isinstance(shape, dict):
        return {key: observed(rng, part, count) for key, part in shape.items()}
    if len(shape) == 3:
        return rng.integers(256, size=(count, *shape), dtype=np.uint8)
    return rng.normal(size=(count, *shape)).astype(np.float32)


def add_episodes(buffer: ReplayBuffer, rng: np.random.Generator, count: int) -> None:
    """Adds episodes that terminate or not, and of which the observation after the last step is known or not."""
    for number in range(count):
        length = int(rng.integers(1, 20))
        buffer.add_episode(
            observed(rng, buffer.obs_shape, length + number % 2),
            rng.uniform(-1, 1, (length, ACTION_DIM)),
            rng.normal(size=length),
            np.arange(length) == length - (number % 3 == 0),
        )


def directory(path: Path, kind: str, files: int = 4, episodes: int = 3) -> tuple[Path, ReplayBuffer]:
    """A directory of files, and a buffer with the same episodes."""
    path.mkdir()
    rng = np.random.default_rng(0)
    whole = ReplayBuffer(10_000, SHAPES[kind], ACTION_DIM, action_type="continuous")
    for number in range(files):
        part = ReplayBuffer(1000, SHAPES[kind], ACTION_DIM, n_envs=1 + number % 2)
        add_episodes(part, rng, episodes)
        part.save(path / f"{number:02}.npz")
        whole.add_episodes_of(part)
    return path, whole


def assert_same(buffers: list[ReplayBuffer], lengths: tuple[int, ...] = (1, 5, 40)) -> None:
    for length in lengths:
        for buffer in buffers:
            buffer.seed(length)
        batches = [buffer.sample(50, length) for buffer in buffers]
        for batch in batches[1:]:
            assert torch.equal(batch.row_ids, batches[0].row_ids)
            assert_same_batch(batch, batches[0])


@pytest.mark.parametrize("kind", SHAPES)
def test_a_directory_is_like_one_file_with_the_same_episodes(kind: str, tmp_path: Path) -> None:
    data, whole = directory(tmp_path / "data", kind)
    whole.save(tmp_path / "whole.npz")
    (tmp_path / "data" / "notes.txt").write_text("no data")
    (tmp_path / "data" / ".03.npz.writing.npz").write_text("somebody is writing")
    (tmp_path / "data" / "older.npz").mkdir()
    buffers = [
        ReplayBuffer.load(tmp_path / "whole.npz"),
        ReplayBuffer.load(str(data)),
        ReplayBuffer.load(data, storage=tmp_path / "unpacked"),
        ReplayBuffer.load(data, storage="in_place"),
        ReplayBuffer.load(tmp_path / "whole.npz", storage="in_place"),
    ]
    assert_same([whole, *buffers])
    assert len({buffer.digest() for buffer in (whole, *buffers)}) == 1
    assert {(buffer.num_transitions, buffer.num_episodes) for buffer in buffers} == {(len(whole), 12)}
    assert buffers[3].storage == "in_place" and buffers[3].obs_shape == whole.obs_shape
    shared = [ReplayBuffer.load(data, n_envs=3, storage=place) for place in (None, "in_place")]
    assert [len(buffer) for buffer in shared] == [len(whole)] * 2 and shared[0].n_envs == 3
    assert_same(shared)


def test_nothing_is_lost_of_a_directory_of_very_short_episodes(tmp_path: Path) -> None:
    count, each = np.arange(80_000, dtype=np.float32), np.ones(80_000)
    arrays = documented(actions=each[:, None] / 2, rewards=each, dones=each, capacity=np.array(80_000))
    for name, sign in (("a", 1), ("b", -1)):
        np.savez(tmp_path / f"{name}.npz", **arrays | {"obs": sign * np.stack([count, count], 1)})
    for path, times, place in ((tmp_path, 2, None), (tmp_path, 2, "in_place"), (tmp_path / "a.npz", 1, "in_place")):
        buffer = ReplayBuffer.load(path, storage=place, seed=0)
        assert len(buffer) == buffer.num_episodes == times * 80_000
        assert buffer.num_windows(1) == times * 160_000  # after each step is an observation that nobody knows
        rows = buffer.stored()[0]
        (obs,) = rows.obs.values()
        assert obs[rows.stored_at()[[0, 1, 2, -2]]].tolist() == [[0, 0], [0, 0], [1, 1], [79_999 * (3 - 2 * times)] * 2]


def moving(n_envs: int, steps: int, capacity: int) -> ReplayBuffer:
    """A buffer with episodes in flight, of which some have lost their oldest rows."""
    rng, buffer = np.random.default_rng(steps), ReplayBuffer(capacity, (3,), ACTION_DIM, n_envs=n_envs)
    for _ in range(steps):
        ends = rng.random((2, n_envs)) < 0.05
        obs, final = rng.normal(size=(2, n_envs, 3))
        buffer.add(obs, rng.uniform(-1, 1, (n_envs, 2)), rng.normal(size=n_envs), *ends, final_obs=final)
    return buffer


@pytest.mark.parametrize(("n_envs", "steps", "capacity"), [(1, 50, 100), (3, 40, 200), (3, 300, 60)])
def test_a_file_in_place_has_the_rows_of_the_buffer_that_was_saved(
    n_envs: int, steps: int, capacity: int, tmp_path: Path
) -> None:
    buffer = moving(n_envs, steps, capacity)
    assert buffer.stored()[0].in_flight.any()
    buffer.save(tmp_path / "a.npz")
    assert_same([ReplayBuffer.load(tmp_path / "a.npz", storage=place) for place in (None, "in_place")], (1, 5, 15))
    # Beside another file, each episode in flight ends with its last step, and another one begins.
    moving(1, 9, 20).save(tmp_path / "b.npz")
    both = [ReplayBuffer.load(tmp_path, storage=place) for place in (None, "in_place")]
    assert_same(both)
    rows = both[1].stored()[0]
    assert np.count_nonzero(rows.flags & FIRST) == both[1].num_episodes
    assert not rows.in_flight.any() and both[1].num_episodes == sum(
        len(buffer.stored()[0].episodes_at()[0])
        for buffer in (ReplayBuffer.load(tmp_path / "a.npz"), ReplayBuffer.load(tmp_path / "b.npz"))
    )


def test_a_buffer_in_place_does_what_every_buffer_does(tmp_path: Path) -> None:
    data, whole = directory(tmp_path / "data", "both")
    extras = {"mark": ((2,), np.float32)}
    memory, place = (ReplayBuffer.load(data, storage=where, extras=extras, seed=3) for where in (None, "in_place"))
    for buffer in (memory, place):
        batch = buffer.sample(20, 5)
        buffer.update_extras(batch.row_ids, {"mark": torch.arange(200.0).reshape(20, 5, 2)})
    assert_same([memory, place])
    parts = [buffer.split(0.4, seed=1, seq_len=3) for buffer in (memory, place)]
    for one, other in zip(*parts, strict=True):
        assert one.digest() == other.digest() and one.num_transitions == other.num_transitions
        assert_same_batch(one.sample(30, 7), other.sample(30, 7))
    for buffer in (memory, place):
        buffer.save(tmp_path / f"{buffer.storage}.npz")
    assert (tmp_path / "memory.npz").read_bytes() == (tmp_path / "in_place.npz").read_bytes()
    place.seed(5)
    batch = place.sample(9, 4)
    for copied in (copy.deepcopy(place), pickle.loads(pickle.dumps(place))):
        copied.seed(5)
        assert_same_batch(copied.sample(9, 4), batch)
    for buffer in (memory, place):
        buffer.seed(8)
    with batches_from(place, 8, 6, torch.device("cpu")) as ahead:
        for _ in range(3):
            assert_same_batch(ahead.next(), memory.sample(8, 6))
    place.declare_actions("continuous")
    assert place.num_windows(4) == whole.num_windows(4)
    with pytest.raises(BufferError, match="and the model has action_type='discrete'"):
        place.check_actions((2,))


def test_nothing_is_added_to_a_buffer_in_place(tmp_path: Path) -> None:
    data, _ = directory(tmp_path / "data", "vectors")
    buffer = ReplayBuffer.load(data, storage="in_place")
    before = buffer.digest()
    row = np.zeros((1, 3)), np.zeros((1, 2)), [0], [False], [False]
    for change in (
        lambda: buffer.add(*row),
        lambda: buffer.add_episode(np.zeros((3, 3)), np.zeros((2, 2)), np.zeros(2)),
        lambda: buffer.add_episodes_of(buffer),
        lambda: buffer.grow(10_000),
        lambda: buffer.add_streams(1),
    ):
        with pytest.raises(BufferError, match=r"storage='in_place'.*nothing can be added.*with storage='<directory>'"):
            change()
    assert buffer.digest() == before and buffer.capacity >= len(buffer)
    with pytest.raises(ConfigurationError, match=r"capacity is 5.*Leave it out"):
        ReplayBuffer.load(data, storage="in_place", capacity=5)
    with pytest.raises(ConfigurationError, match=r"for data that are in files already: ReplayBuffer\.load"):
        ReplayBuffer(10, (3,), 2, storage="in_place")
    with pytest.raises(ConfigurationError, match="in files already"):
        backends.lasting_place("buffer_storage", "in_place")
    for place in (None, tmp_path / "rows"):
        loaded = ReplayBuffer.load(data, storage=place)
        loaded.add(*row)
        assert loaded.sample(1, 1).obs.shape == (1, 1, 3)


# Reading


def test_observations_are_read_only_when_they_are_sampled(tmp_path: Path) -> None:
    rows, shape = 2000, (3, 64, 64)
    create_random_buffer(rows, shape, 2, rows // 100, 100, seed=0).save(tmp_path / "a.npz")
    with mock.patch.object(RecordedFiles, "read", side_effect=AssertionError):
        tracemalloc.start()
        buffer = ReplayBuffer.load(tmp_path, storage="in_place", seed=0)
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    (obs,) = buffer.stored()[0].obs.values()
    assert taken < 2 * 2**20 < rows * 12288 < obs.nbytes


def test_a_window_within_an_episode_is_read_in_one_piece_and_in_the_order_of_the_file(tmp_path: Path) -> None:
    create_random_buffer(1000, (3, 4, 4), 2, 5, 100, seed=0).save(tmp_path / "a.npz")
    create_random_buffer(1000, (3, 4, 4), 2, 5, 100, seed=1).save(tmp_path / "b.npz")
    buffer = ReplayBuffer.load(tmp_path, storage="in_place", seed=0)
    with mock.patch.object(RecordedFiles, "read", autospec=True, side_effect=RecordedFiles.read) as read:
        batch = buffer.sample(100, 20)
    (parts,) = (call.args[1] for call in read.call_args_list)
    crossing = int(batch.is_first[:, 1:].any(1).sum())
    ends_within = int((batch.terminations | batch.truncations)[:, :-1].any(1).sum())
    assert 0 < crossing <= ends_within < 40
    assert len(parts) == 100 + ends_within + crossing  # the observation after the last step is elsewhere in the file
    places = [(number, position) for number, position, _ in parts]
    assert places == sorted(places) and {number for number, _ in places} == {0, 1}
    assert sum(len(target) for _, _, target in parts) == 100 * 20 * 48


def test_any_number_of_files_is_read_with_few_of_them_open(tmp_path: Path) -> None:
    data, whole = directory(tmp_path / "data", "images", files=20, episodes=1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    largest = max(int(name) for name in os.listdir("/dev/fd"))
    with mock.patch.object(backends, "_MOST_OPEN", 3), contextlib.ExitStack() as others:
        while others.enter_context(open(os.devnull)).fileno() <= largest:  # other tests may have left gaps
            pass
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(int(name) for name in os.listdir("/dev/fd")) + 8, limits[1]))
        try:
            assert_same([whole, ReplayBuffer.load(data), ReplayBuffer.load(data, storage="in_place")])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_other_files_that_a_program_keeps_open_leave_fewer_for_reading(tmp_path: Path) -> None:
    data, whole = directory(tmp_path / "data", "images", files=20, episodes=1)
    buffer = ReplayBuffer.load(data, storage="in_place")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    largest = max(int(name) for name in os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (largest + 8, limits[1]))
    try:
        assert_same([whole, buffer])
        with contextlib.ExitStack() as others:
            with contextlib.suppress(OSError):
                while True:
                    others.enter_context(open(os.devnull))
            with pytest.raises(BufferError, match="Too many open files"):
                copy.deepcopy(buffer).sample(1, 1)  # which has no file to close
            assert_same([whole, buffer])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_reading_works_without_what_only_some_systems_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, whole = directory(tmp_path / "data", "both")
    for name in ("posix_fadvise", "preadv"):
        monkeypatch.delattr(os, name, raising=False)
    assert_same([whole, ReplayBuffer.load(data, storage="in_place")])


# Files that do not fit together, and damage


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"obs": np.zeros((5, 3)), "obs_shape": np.array([3])},
            r"shapes of observations are \(2,\) in.* and \(3,\) in",
        ),
        ({"obs": np.zeros((5, 2), np.uint8)}, "dtypes of observations are .*float32.* and .*uint8"),
        ({"actions": np.zeros((5, 2)), "action_dim": np.array(2)}, "widths of actions are 1 in the first and 2 in"),
        ({"obs": None, "obs_shape": None, "obs/x": np.zeros((5, 2)), "obs_shape/x": np.array([2])}, "shapes of"),
        ({"actions": np.ones((5, 1)), "action_classes": np.array([1])}, "kinds of actions are .* and .*action_type"),
    ],
)
def test_files_that_are_no_parts_of_one_recording_are_both_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", **documented())
    np.savez(tmp_path / "b.npz", **with_table())
    np.savez(tmp_path / "odd.npz", **documented(**changes))
    for place in (None, "in_place"):
        with pytest.raises(BufferError, match=message) as refused:
            ReplayBuffer.load(tmp_path, storage=place)
        assert f"{tmp_path / 'a.npz'} and odd.npz are no parts of one recording" in str(refused.value)


def test_observations_beyond_all_measure_are_refused_even_if_there_are_none(tmp_path: Path) -> None:
    row = documented(obs=np.zeros((0, 3), np.float32), obs_shape=np.array([2**62]))
    np.savez(tmp_path / "a.npz", **{name: x if np.size(x) < 5 else x[:0] for name, x in row.items()})
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    claimed = b"(0, %d), }" % (2**62)
    members["obs.npy"] = members["obs.npy"].replace(b"(0, 3), }".ljust(len(claimed)), claimed)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    for storage in (None, "in_place"):
        with pytest.raises(BufferError, match=r"obs_shape is \(4611686018427387904,\), expected at most"):
            ReplayBuffer.load(tmp_path, storage=storage)


def test_directories_without_a_recording_are_called_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(BufferError, match=r"has no \.npz files, expected those that ReplayBuffer\.save"):
        ReplayBuffer.load(tmp_path)
    (tmp_path / "replay").mkdir()
    (tmp_path / "replay" / "replay.json").write_text("{}")
    for place in (tmp_path, tmp_path / "replay"):
        with pytest.raises(BufferError, match=r"is a checkpoint\. WorldFluxAgent\.load"):
            ReplayBuffer.load(place)
    for number in range(3):
        np.savez(tmp_path / f"{number}.npz", **documented())
    os.truncate(tmp_path / "1.npz", 500)
    (tmp_path / "replay" / "replay.json").unlink()
    for storage in (None, "in_place"):
        with pytest.raises(BufferError, match=r"1\.npz is not a readable \.npz file \(damaged or cut short\)"):
            ReplayBuffer.load(tmp_path, storage=storage)
    np.savez(tmp_path / "1.npz", **documented(rewards=np.zeros(4)))
    with pytest.raises(BufferError, match=r"1\.npz: rewards has shape \(4,\), expected \(5,\)"):
        ReplayBuffer.load(tmp_path)


def test_a_directory_larger_than_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    data, _ = directory(tmp_path / "data", "images")
    with mock.patch.object(backends, "free_memory", lambda: 5000):
        with pytest.raises(BufferError, match=r"has 5\.0 kB of free memory.*Or leave.*storage='in_place'\."):
            ReplayBuffer.load(data)
        assert ReplayBuffer.load(data, storage="in_place").sample(3, 3).obs.shape == (3, 3, 3, 4, 4)


@pytest.mark.parametrize(
    ("changes", "save"),
    [
        ({}, np.savez_compressed),
        ({"obs": np.zeros((5, 2))}, np.savez),
        ({"obs": np.zeros((5, 2), ">f4")}, np.savez),
        ({"obs": np.asfortranarray(np.arange(10, dtype=np.float32).reshape(5, 2))}, np.savez),
        ({"obs": np.zeros((5, 1, 2, 2), np.float32), "obs_shape": np.array([1, 2, 2])}, np.savez),
        ({"obs": np.zeros((5, 2), bool)}, np.savez),
    ],
)
def test_what_cannot_be_read_in_place_is_refused_with_what_to_do(
    changes: dict[str, Any], save: Any, tmp_path: Path
) -> None:
    fits = {name: array for name, array in documented(**changes).items() if not name.startswith("obs")}
    shape = np.shape(documented(**changes)["obs"])[1:]
    dtype = np.uint8 if len(shape) == 3 else np.float32
    np.savez(tmp_path / "a.npz", obs=np.zeros((5, *shape), dtype), obs_shape=np.array(shape), **fits)
    save(tmp_path / "b.npz", **documented(**changes))
    with pytest.raises(BufferError, match=r"b\.npz: obs can only be read in place if it is an uncompressed") as refused:
        ReplayBuffer.load(tmp_path, storage="in_place")
    assert "ReplayBuffer.load('b.npz').save('b.npz')" in str(refused.value)
    unpacked = ReplayBuffer.load(tmp_path, storage=tmp_path / "rows")
    ReplayBuffer.load(tmp_path / "b.npz").save(tmp_path / "b.npz")
    assert_same([unpacked, ReplayBuffer.load(tmp_path, storage="in_place")], (1, 5))


def claiming(path: Path, real: int, claimed: int, compressed: int, *, last: bool) -> None:
    """Writes a file whose array `obs` has `real` rows of a byte, and a table of contents that claims others."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }" % claimed
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + header.ljust(117) + b"\n"
    members = {"other": bytes(5000), "obs.npy": start + b"\x07" * real}
    with zipfile.ZipFile(path, "w") as archive:
        for name in members if last else reversed(members):
            archive.writestr(name, members[name])
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"obs.npy"))  # in the table of contents
    struct.pack_into("<II", data, entry + 20, 128 + compressed, 128 + claimed)
    path.write_bytes(data)


def test_an_array_is_never_read_beyond_its_file_or_its_entry(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"

    def place() -> int | None:
        with NpzFile(path) as file:
            return file.place_of(file.open("obs"))

    for last in (True, False):
        claiming(path, 10, 10, 10, last=last)
        start = place()
        assert start is not None and path.read_bytes()[start - 1 : start + 11] == b"\n" + b"\x07" * 10 + b"P"
        claiming(path, 10, 3000, 10, last=last)
        with pytest.raises(BufferError, match=r"obs' of 3000 bytes begins at byte \d+ of \d+\. The file is damaged"):
            place()
    claiming(path, 10, 3000, 3000, last=True)
    with pytest.raises(BufferError, match=r"begins at byte|Overlapped entries"):
        place()


def test_files_that_change_while_they_are_in_use_are_noticed(tmp_path: Path) -> None:
    data, _ = directory(tmp_path / "data", "vectors")
    for name in os.listdir(data):
        place = ReplayBuffer.load(data, storage="in_place", seed=0)
        saved = (data / name).read_bytes()
        (data / name).write_bytes(saved + b" ")
        with pytest.raises(BufferError, match=rf"{name} has changed since it was loaded\. Load the data again"):
            place.sample(200, 5)
        (data / name).unlink()
        with pytest.raises(BufferError, match=rf"{name} cannot be read any more"):
            place.sample(200, 5)
        (data / name).write_bytes(saved)
    place = ReplayBuffer.load(data, storage="in_place", seed=0)
    place.sample(200, 5)
    os.truncate(data / "02.npz", 700)
    with pytest.raises(BufferError, match=r"02\.npz cannot be read: .*it ends too early"):
        place.sample(200, 5)


def test_a_number_that_is_not_finite_is_found_when_it_is_sampled(tmp_path: Path) -> None:
    obs = np.zeros((5, 2), np.float32)
    obs[4, 1] = np.nan
    np.savez(tmp_path / "a.npz", **documented())
    np.savez(tmp_path / "b.npz", **documented(obs=obs))
    place = ReplayBuffer.load(tmp_path, storage="in_place", seed=0)
    with pytest.raises(BufferError, match=r"b\.npz has an observation that is not finite, 1 steps after the beginning"):
        place.sample(50, 3)
    with pytest.raises(BufferError, match=r"b\.npz: obs has nan at index \(4, 1\)"):
        ReplayBuffer.load(tmp_path)


def test_rows_in_files_are_not_written(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **documented())
    (rows,) = ReplayBuffer.load(tmp_path, storage="in_place").stored()[0].obs.values()
    assert isinstance(rows, FileRows) and rows[np.zeros((2, 0), int)].shape == (2, 0, 2)
    with pytest.raises(BufferError, match="nothing can be added"):
        rows[np.array([0])] = 1
