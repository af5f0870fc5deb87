"""The replay data of checkpoints against buffers that were never saved, what it costs, and trouble on the way."""

import copy
import errno
import os
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.buffers import (
    assert_same_batches,
    content,
    filled,
    make,
    names,
    observed,
    read,
    save,
    segment_names,
    state_of,
    step,
    two_segments,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from worldflux.errors import ShapeMismatchError
from worldflux.replay import checkpoint as segment_files
from worldflux.replay import ring as row_store
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.checkpoint import ReplaySegments

# --- exactness

operations = st.lists(
    st.one_of(
        st.tuples(st.just("steps"), st.integers(1, 12), st.sampled_from([0.05, 0.3, 0.9]), st.sampled_from([1.0, 0.6])),
        st.tuples(st.just("episode"), st.integers(1, 40)),
        st.tuples(st.just("close"), st.booleans()),
        st.tuples(st.just("grow"), st.integers(0, 5)),
        st.tuples(st.just("sample"), st.booleans()),
        st.tuples(
            st.just("save"), st.booleans(), st.sampled_from(["link", "link", "link", "refuse", "deleted", "fail"])
        ),
        st.tuples(st.just("save"), st.booleans(), st.just("link")),
        st.tuples(st.just("read")),
    ),
    min_size=8,
    max_size=25,
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    capacity=st.integers(3, 30),
    n_envs=st.integers(1, 3),
    spare=st.sampled_from([1, 2, 50]),
    todo=operations,
    seed=st.integers(0, 99),
)
def test_a_buffer_that_was_saved_and_read_at_any_time_is_one_that_never_was(
    tmp_path_factory, capacity, n_envs, spare, todo, seed
):
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("checkpoints")
    with (
        mock.patch.object(row_store, "spare_rows", lambda transitions, n_envs: min(transitions, spare)),
        mock.patch.object(segment_files, "JOINED", 3),
        mock.patch.object(segment_files, "SEGMENT_ROWS", 9),
    ):
        buffer, plain = make(capacity, n_envs, seed), make(capacity, n_envs, seed)
        log, saved, count = ReplaySegments(buffer), None, 0
        for number, (name, *args) in enumerate([*todo, ("save", True, "link"), ("read",)]):
            if name == "steps":
                steps, end_rate, active_rate = args
                for _ in range(steps):
                    counts = 1000.0 * np.arange(n_envs) + count
                    count += 1
                    ends, active = rng.random((2, n_envs)) < end_rate / 2, rng.random(n_envs) < active_rate
                    for each in (buffer, plain):
                        step(each, counts, *ends, active=active)
            elif name == "episode" and not plain.stored()[0].in_flight.all():
                obs = observed(np.arange(args[0] + 1) + count)
                ends = np.append(rng.random(args[0] - 1) < 0.1, True)
                for each in (buffer, plain):
                    each.add_episode(obs, np.ones((args[0], 2)), np.arange(args[0]), truncations=ends)
            elif name == "close":
                final_obs = observed(np.full(n_envs, count)) if args[0] else None
                for each in (buffer, plain):
                    each.end_episodes(number % n_envs if number % 2 else None, final_obs=final_obs)
            elif name == "grow":
                capacity += args[0]
                for each in (buffer, plain):
                    each.grow(capacity)
            elif name == "sample" and plain.num_windows(3):
                for each in (buffer, plain):
                    each.sample(4, 3, fresh=args[0])
            elif name == "save":
                known, trouble = args
                final_obs = observed(np.full(n_envs, count)) if known else None
                path = folder / f"{number}"
                if trouble == "deleted" and saved is not None:
                    shutil.rmtree(saved[0])
                    saved = None
                if trouble == "fail":
                    with mock.patch.object(segment_files, "write_atomically", side_effect=OSError("full")):
                        with pytest.raises(OSError, match="full"):
                            save(log, path, final_obs=final_obs)
                    assert not path.exists()
                    continue
                link = mock.Mock(side_effect=OSError("no links here")) if trouble == "refuse" else os.link
                with mock.patch.object(os, "link", link):
                    save(log, path, final_obs=final_obs)
                assert content(buffer) == content(plain)
                if saved is not None and number % 2:  # each checkpoint stands on its own
                    shutil.rmtree(saved[0])
                saved = path, final_obs, copy.deepcopy(plain)
            elif name == "read" and saved is not None:
                path, final_obs, plain = saved[0], saved[1], copy.deepcopy(saved[2])
                capacity = plain.capacity
                buffer = make(capacity, n_envs, seed + 1)
                log = ReplaySegments.read(path, buffer)
                plain.end_episodes(final_obs=final_obs)
                assert content(buffer) == content(plain)
    if plain.num_windows(3):
        assert_same_batches(buffer, plain)


@pytest.mark.parametrize("known", [True, False])
def test_episodes_in_flight_end_as_truncated_with_the_observation_that_was_handed_over(tmp_path, known):
    buffer = make()
    step(buffer, [3, 1003])
    step(buffer, [4, 1004], terminations=[False, True])
    save(ReplaySegments(buffer), tmp_path / "a", final_obs=observed([5, 77]) if known else None)
    assert names(tmp_path / "a") == ["in-flight.npz", "replay.json", "rows-000000.npz"]
    loaded, _ = read(tmp_path / "a")
    store, _ = loaded.stored()
    assert not store.in_flight.any() and store.end.tolist() == [3, 3] and loaded.num_episodes == 2
    first, second = (store.at(stream, np.arange(3)) for stream in range(2))
    assert store.obs["speed"][first, 0].tolist() == [3, 4, 5 if known else 0]
    unseen = 0 if known else row_store.UNSEEN
    assert store.flags[first].tolist() == [row_store.FIRST, row_store.TRUNCATED, row_store.FINAL | unseen]
    assert store.flags[second].tolist() == [row_store.FIRST, row_store.TERMINATED, row_store.FINAL]
    assert store.obs["speed"][second, 0].tolist() == [1003, 1004, 1005]


def test_extras_are_those_of_the_time_when_their_segment_was_written(tmp_path):
    buffer = make()
    log = ReplaySegments(buffer)
    for t in range(3):
        step(buffer, t)
    save(log, tmp_path / "a")
    batch = buffer.sample(50, 2)
    computed = torch.tensor([9.0, float("nan")])  # what a model computed is stored as it is
    buffer.update_extras(batch.row_ids, {"mark": computed.expand(*batch.row_ids.shape, 2)})
    for t in range(3, 5):
        step(buffer, t)
    save(log, tmp_path / "b")
    loaded, _ = read(tmp_path / "b")
    store, _ = loaded.stored()
    # Row 2 was the last one of an episode in flight, and is in a segment only now.
    assert store.extras["mark"][store.at(0, np.arange(5)), 0].tolist() == [0, 1, 9, 3, 4]


@pytest.mark.parametrize("shape, dtype", [((3,), np.float32), ((3, 8, 8), np.uint8), ((2, 2), np.uint8)])
def test_observations_that_are_one_array_come_back(tmp_path, shape, dtype):
    def empty():
        return ReplayBuffer(20, shape, 1, obs_dtype=dtype, seed=0)

    buffer, rng = empty(), np.random.default_rng(0)
    for t in range(30):
        obs, after = rng.integers(0, 256, (2, 1, *shape)).astype(dtype)
        buffer.add(obs, [[t]], [t], [t % 9 == 8], [False], final_obs=after)
    save(ReplaySegments(buffer), tmp_path / "a", final_obs=after)
    loaded = empty()
    ReplaySegments.read(tmp_path / "a", loaded)
    buffer.end_episodes(final_obs=after)
    assert content(loaded) == content(buffer)


def assert_read(buffer, path, **arguments):
    """The checkpoint gives what the buffer holds once its episodes in flight have ended."""
    loaded, _ = read(path, **arguments)
    buffer.end_episodes()
    assert content(loaded) == content(buffer)


# --- what a checkpoint costs


def test_a_checkpoint_writes_only_the_rows_since_the_last_one_and_links_the_others(tmp_path):
    buffer = make(4000)
    log = ReplaySegments(buffer)
    for t in range(1000):
        step(buffer, t)
    save(log, tmp_path / "a")
    for t in range(1000, 1010):
        step(buffer, t)
    save(log, tmp_path / "b")
    assert segment_names(tmp_path / "b") == ["rows-000000.npz", "rows-000001.npz"]
    old, new = ((tmp_path / name / "replay" / "rows-000000.npz").stat() for name in "ab")
    assert old.st_ino == new.st_ino and old.st_nlink == 2
    written = [file.stat() for file in (tmp_path / "b" / "replay").iterdir() if file.stat().st_nlink == 1]
    assert len(written) == 3 and sum(stat.st_size for stat in written) < 8000 < 40_000 < old.st_size
    assert state_of(tmp_path / "b")["segments"][1]["first"] == [999, 999]

    with mock.patch.object(segment_files, "JOINED", 2):
        save(log, tmp_path / "c")  # nothing is new, so that nothing is joined either
    assert segment_names(tmp_path / "c") == segment_names(tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    assert (tmp_path / "c" / "replay" / "rows-000000.npz").stat().st_nlink == 1
    assert_read(buffer, tmp_path / "c", capacity=4000)


def test_segments_of_rows_that_were_dropped_are_not_in_the_next_checkpoint(tmp_path):
    buffer = make(40)
    log = ReplaySegments(buffer)
    for number in range(6):
        for t in range(8):
            step(buffer, 8 * number + t)
        save(log, tmp_path / str(number))
    assert segment_names(tmp_path / "2") == [f"rows-00000{i}.npz" for i in (0, 1, 2)]
    # The newest 20 rows of each stream are 28 to 47, and the last one is of an episode in flight.
    assert segment_names(tmp_path / "5") == [f"rows-00000{i}.npz" for i in (3, 4, 5)]
    assert buffer.stored()[0].begin.tolist() == [28, 28]
    assert_read(buffer, tmp_path / "5")


def test_small_segments_are_joined_so_that_there_are_never_many(tmp_path, monkeypatch):
    monkeypatch.setattr(segment_files, "JOINED", 4)
    monkeypatch.setattr(segment_files, "SMALL_BYTES", 3000)
    buffer = make(4000)
    log = ReplaySegments(buffer)
    written, seen = 0, set()
    for number in range(1, 65):
        step(buffer, number, truncations=True)
        save(log, tmp_path / str(number))
        segments = state_of(tmp_path / str(number))["segments"]
        assert sum(segment["bytes"] < 3000 for segment in segments) < 4
        for segment in segments:
            if segment["file"] not in seen:
                written += sum(segment["end"]) - sum(segment["first"])
                seen.add(segment["file"])
    assert len(segment_names(tmp_path / "64")) < 20 and 4 * 64 < written < 4 * 64 * 5
    assert content(read(tmp_path / "64", capacity=4000)[0]) == content(buffer)


def test_rows_that_were_dropped_are_not_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(segment_files, "JOINED", 3)
    buffer = make(40)
    log = ReplaySegments(buffer)
    for number in range(3):
        for t in range(8):
            step(buffer, 8 * number + t)
        save(log, tmp_path / str(number))
    (joined,) = state_of(tmp_path / "2")["segments"]
    assert (joined["first"], joined["end"]) == ([4, 4], [23, 23])

    for t in range(25):  # the first stream drops all of it, the second one none
        step(buffer, t, active=[True, False])
    monkeypatch.setattr(os, "link", mock.Mock(side_effect=OSError(errno.EXDEV, "Invalid cross-device link")))
    save(log, tmp_path / "3")
    old, new = state_of(tmp_path / "3")["segments"]
    assert (old["first"], old["end"]) == ([23, 4], [23, 23])
    assert (new["first"], new["end"]) == ([29, 23], [48, 23])
    assert_read(buffer, tmp_path / "3")


def test_after_reading_new_segments_get_new_names(tmp_path):
    two_segments(tmp_path)
    loaded, log = read(tmp_path / "a")
    step(loaded, 1)
    save(log, tmp_path / "b")
    assert segment_names(tmp_path / "b") == ["rows-000000.npz", "rows-000001.npz", "rows-000002.npz"]
    assert (tmp_path / "b" / "replay" / "rows-000001.npz").stat().st_nlink == 2
    assert content(read(tmp_path / "b")[0])["end"] == [22, 22]  # each reading ended the episodes in flight


def test_large_segments_are_split_and_never_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(segment_files, "JOINED", 2)
    monkeypatch.setattr(segment_files, "SEGMENT_ROWS", 100)
    monkeypatch.setattr(segment_files, "SMALL_BYTES", 3000)
    buffer = make(2000)
    log = ReplaySegments(buffer)
    for t in range(301):
        step(buffer, t)
    save(log, tmp_path / "a")
    assert [segment["end"] for segment in state_of(tmp_path / "a")["segments"]] == [[50 * i] * 2 for i in range(1, 7)]
    for name in "bcde":  # only the small ones are joined
        step(buffer, 0)
        save(log, tmp_path / name)
        assert segment_names(tmp_path / name)[:6] == segment_names(tmp_path / "a")
        assert len(segment_names(tmp_path / name)) == 7
    assert_read(buffer, tmp_path / "e", capacity=2000)


# --- trouble on the way


def test_a_write_that_fails_leaves_the_segments_and_the_old_checkpoint_as_they_were(tmp_path):
    buffer = filled()
    log = ReplaySegments(buffer)
    save(log, tmp_path / "a")
    before = segment_names(tmp_path / "a")
    for t in range(5):
        step(buffer, t)
    with mock.patch.object(segment_files, "write_npz", side_effect=OSError(28, "No space left on device")):
        with pytest.raises(OSError, match="No space left"):
            save(log, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    read(tmp_path / "a")
    save(log, tmp_path / "b")
    assert segment_names(tmp_path / "b")[0] == before[0]
    assert_read(buffer, tmp_path / "b")


def test_a_file_that_somebody_put_in_the_place_of_a_segment_is_not_linked(tmp_path):
    buffer, other = filled(), filled()
    log = ReplaySegments(buffer)
    save(log, tmp_path / "a")
    step(other, 5)
    save(ReplaySegments(other), tmp_path / "a")  # another run that saves to the same place
    save(log, tmp_path / "b")
    assert segment_names(tmp_path / "b") == ["rows-000001.npz"] and segment_names(tmp_path / "a") == ["rows-000000.npz"]
    assert_read(buffer, tmp_path / "b")


def test_a_checkpoint_may_be_saved_over_the_last_one(tmp_path):
    buffer = filled(capacity=400)
    log = ReplaySegments(buffer)
    for _ in range(3):
        save(log, tmp_path / "a")
        step(buffer, 1)
    assert segment_names(tmp_path / "a") == ["rows-000000.npz", "rows-000001.npz", "rows-000002.npz"]
    assert (tmp_path / "a" / "replay" / "rows-000000.npz").stat().st_nlink == 1


def test_observations_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    log = ReplaySegments(filled())
    with pytest.raises(ShapeMismatchError, match="final_obs is one array, expected a dict"):
        log.write(tmp_path, final_obs=np.zeros((2, 1)))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_on_the_disk_with_all_its_folders_before_it_gets_its_name(tmp_path, disk):
    calls, path = disk.recorded(), tmp_path / "a"
    save(ReplaySegments(filled()), path)
    files = [path, *path.rglob("*")]
    before = calls[: calls.index(("rename", path.stat().st_ino))]
    assert len(files) == 5 and {("fsync", file.stat().st_ino) for file in files} <= set(before)
