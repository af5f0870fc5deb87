"""The replay data of checkpoints against buffers that were never saved, and every way in which it can be broken.

Like in `test_replay.py`, each observation says where it belongs: `1000 * episode + t`.
"""

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldflux.errors import CheckpointError, ConfigurationError, ShapeMismatchError, WorldFluxError
from worldflux.files import atomic_directory
from worldflux.training import rows as row_store
from worldflux.training import segments as segment_files
from worldflux.training.npz import NpzFile, write_npz
from worldflux.training.replay import ReplayBuffer
from worldflux.training.replay_segments import ReplaySegments

EXTRAS = {"mark": ((2,), np.float16)}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """It would take most of the time, and no power fails here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def make(capacity=40, n_envs=2, seed=0):
    shapes = {"camera": (1, 2, 2), "speed": (1,)}
    return ReplayBuffer(capacity, shapes, 2, n_envs=n_envs, extras=EXTRAS, seed=seed)


def observed(count):
    """`[n_envs]` counts as observations."""
    count = np.asarray(count, np.float64)
    camera = np.broadcast_to(count[:, None, None, None] % 251, (len(count), 1, 2, 2)).astype(np.uint8)
    return {"camera": camera, "speed": count[:, None]}


def step(buffer, count, terminations=0, truncations=0, active=None):
    """Every environment observes `count`, and after the step one more."""
    count = np.broadcast_to(np.asarray(count, np.float64), (buffer.n_envs,))
    ends = [np.broadcast_to(flags, count.shape) for flags in (terminations, truncations)]
    extras = {"mark": np.stack([count, -count], 1)}
    actions, final_obs = np.stack([count, count + 0.25], 1), observed(count + 1)
    buffer.add(observed(count), actions, count + 0.5, *ends, final_obs=final_obs, extras=extras, active=active)


def filled(steps=30, **arguments):
    """Two streams, wrapped around, with terminated and truncated episodes, one closed from outside, both in flight."""
    buffer = make(**arguments)
    for t in range(steps):
        step(buffer, 1000 * np.arange(buffer.n_envs) + t, terminations=t % 7 == 3, truncations=t % 7 == 6)
        if t == 12:
            buffer.end_episodes(0)
    return buffer


def save(log, path, **arguments):
    with atomic_directory(path) as directory:
        log.write(directory, **arguments)
    log.moved_to(path)


def read(path, **arguments):
    buffer = make(**arguments)
    return buffer, ReplaySegments.read(path, buffer)


def names(path):
    return sorted(file.name for file in (path / "replay").iterdir())


def segment_names(path):
    return [segment["file"] for segment in state_of(path)["segments"]]


def state_of(path):
    return json.loads((path / "replay" / "replay.json").read_text())


def content(buffer):
    """Everything that a buffer is: counters, sampler, and each row of each array."""
    store, fresh = buffer.stored()
    found = {name: getattr(store, name).tolist() for name in ("begin", "end", "transitions", "episodes", "in_flight")}
    found |= {"fresh": fresh.tolist(), "sampler": buffer.rng_state(), "capacity": buffer.capacity}
    columns = {**store.obs, "actions": store.actions, "rewards": store.rewards, "flags": store.flags, **store.extras}
    for stream in range(buffer.n_envs):
        at = store.at(stream, np.arange(store.begin[stream], store.end[stream]))
        found |= {f"{name} of {stream}": column[at].tolist() for name, column in columns.items()}
    return found


def assert_same_batches(buffer, other):
    for fresh in (False, True):
        one, two = (each.sample(20, 3, fresh=fresh) for each in (buffer, other))
        for name in ("actions", "rewards", "terminations", "truncations", "is_first", "obs_mask", "rows"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name
        assert all(torch.equal(one.obs[key], two.obs[key]) for key in one.obs)
        assert torch.equal(one.extras["mark"], two.extras["mark"])


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
                    with mock.patch("worldflux.training.replay_segments.write_state", side_effect=OSError("full")):
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


def test_what_is_drawn_after_reading_is_what_the_original_buffer_gives(tmp_path):
    buffer = filled()
    buffer.sample(7, 3, fresh=True)
    save(ReplaySegments(buffer), tmp_path / "a", final_obs=observed([30, 1030]))
    after = [read(tmp_path / "a")[0] for _ in range(2)]
    buffer.end_episodes(final_obs=observed([30, 1030]))
    assert buffer.num_episodes == after[0].num_episodes > 2 and len(after[0]) == 40
    for each in after:
        buffer.set_rng_state(state_of(tmp_path / "a")["sampler"])
        buffer.stored()[1][:] = state_of(tmp_path / "a")["fresh"]
        assert_same_batches(each, buffer)


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


def test_the_marked_last_row_is_in_the_checkpoint_that_follows(tmp_path):
    buffer = make()
    step(buffer, [3, 1003])
    save(ReplaySegments(buffer), tmp_path / "a")
    loaded, log = read(tmp_path / "a")
    step(loaded, [8, 1008])
    save(log, tmp_path / "b")
    again, _ = read(tmp_path / "b")
    loaded.end_episodes()
    assert content(again) == content(loaded)


def test_extras_are_those_of_the_time_when_their_segment_was_written(tmp_path):
    buffer = make()
    log = ReplaySegments(buffer)
    for t in range(3):
        step(buffer, t)
    save(log, tmp_path / "a")
    batch = buffer.sample(50, 2)
    computed = torch.tensor([9.0, float("nan")])  # what a model computed is stored as it is
    buffer.update_extras(batch.rows, {"mark": computed.expand(*batch.rows.shape, 2)})
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
    loaded, _ = read(tmp_path / "c", capacity=4000)
    buffer.end_episodes()
    assert content(loaded) == content(buffer)


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
    loaded, _ = read(tmp_path / "5")
    buffer.end_episodes()
    assert content(loaded) == content(buffer)


def test_segments_are_joined_so_that_their_number_grows_with_the_logarithm_of_the_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(segment_files, "JOINED", 4)
    buffer = make(4000)
    log = ReplaySegments(buffer)
    written, seen = 0, set()
    for number in range(1, 65):
        step(buffer, number, truncations=True)
        save(log, tmp_path / str(number))
        assert len(segment_names(tmp_path / str(number))) <= 3 * 3 + 1
        for segment in state_of(tmp_path / str(number))["segments"]:
            if segment["file"] not in seen:
                written += sum(segment["end"]) - sum(segment["first"])
                seen.add(segment["file"])
    assert [segment["level"] for segment in state_of(tmp_path / "63")["segments"]] == [2] * 3 + [1] * 3 + [0] * 3
    assert [segment["level"] for segment in state_of(tmp_path / "64")["segments"]] == [3]
    # In rows of four for each save: 48 stayed alone at first, 12 times 4 and 3 times 16 were joined, and 64 in the end.
    assert written == 4 * (48 + 12 * 4 + 3 * 16 + 64)
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
    loaded, _ = read(tmp_path / "3")
    buffer.end_episodes()
    assert content(loaded) == content(buffer)


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
    for name, levels in [("b", [0]), ("c", [1]), ("d", [1, 0]), ("e", [2])]:  # only the small ones are joined
        step(buffer, 0)
        save(log, tmp_path / name)
        assert segment_names(tmp_path / name)[:6] == segment_names(tmp_path / "a")
        assert [segment["level"] for segment in state_of(tmp_path / name)["segments"][6:]] == levels
    loaded, _ = read(tmp_path / "e", capacity=2000)
    buffer.end_episodes()
    assert content(loaded) == content(buffer)


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
    loaded, _ = read(tmp_path / "b")
    buffer.end_episodes()
    assert content(loaded) == content(buffer)


def test_a_disk_that_is_full_is_an_os_error_and_later_there_is_room_again(tmp_path):
    code = """
        import resource, sys
        sys.path.insert(0, "tests")
        from test_replay_segments import *
        buffer = make(4000)
        log = ReplaySegments(buffer)
        for t in range(100):
            step(buffer, t)
        save(log, Path("a"))
        for t in range(100, 1000):
            step(buffer, t)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        try:
            save(log, Path("b"))
        except OSError as error:
            print(type(error).__name__, error.errno, sorted(path.name for path in Path().iterdir()))
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        old, _ = read(Path("a"), capacity=4000)
        save(log, Path("b"))
        new, _ = read(Path("b"), capacity=4000)
        print(old.stored()[0].end.tolist(), new.stored()[0].end.tolist(), segment_names(Path("b"))[0])
    """
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout == f"OSError {errno.EFBIG} ['a']\n[101, 101] [1001, 1001] rows-000000.npz\n"


def test_without_hard_links_a_checkpoint_has_all_rows_in_files_of_its_own(tmp_path, monkeypatch):
    buffer = filled()
    log = ReplaySegments(buffer)
    save(log, tmp_path / "a")
    step(buffer, 7)
    monkeypatch.setattr(os, "link", mock.Mock(side_effect=OSError(errno.EPERM, "Operation not permitted")))
    save(log, tmp_path / "b")
    assert all(file.stat().st_nlink == 1 for file in (tmp_path / "b" / "replay").iterdir())
    shutil.rmtree(tmp_path / "a")
    loaded, _ = read(tmp_path / "b")
    buffer.end_episodes()
    assert content(loaded) == content(buffer)


def test_a_file_that_somebody_put_in_the_place_of_a_segment_is_not_linked(tmp_path):
    buffer, other = filled(), filled()
    log = ReplaySegments(buffer)
    save(log, tmp_path / "a")
    step(other, 5)
    save(ReplaySegments(other), tmp_path / "a")  # another run that saves to the same place
    save(log, tmp_path / "b")
    assert segment_names(tmp_path / "b") == ["rows-000001.npz"] and segment_names(tmp_path / "a") == ["rows-000000.npz"]
    loaded, _ = read(tmp_path / "b")
    buffer.end_episodes()
    assert content(loaded) == content(buffer)


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


def test_a_checkpoint_is_on_the_disk_with_all_its_folders_before_it_gets_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    path = tmp_path / "a"
    rename = os.rename

    def renamed(source, target):
        files = [source, *source.rglob("*")]
        assert len(files) == 5 and {file.stat().st_ino for file in files} <= set(synced)
        rename(source, target)

    monkeypatch.setattr(os, "rename", renamed)
    save(ReplaySegments(filled()), path)
    assert path.is_dir()


# --- what is not read


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"capacity": 50}, r"buffer with capacity 40, and this one has capacity 50\. A run continues exactly only"),
        ({"n_envs": 3}, "buffer with n_envs 2, and this one has n_envs 3"),
        ({"action_dim": 4}, "buffer with action_dim 2, and this one has action_dim 4"),
        ({"obs_shape": (3,)}, r"obs_shape \{'camera': \[1, 2, 2\], 'speed': \[1\]\}, obs_dtype .* has obs_shape \[3\]"),
        ({"obs_dtype": np.float32}, r"obs_dtype \{'camera': 'uint8', .* this one has obs_dtype \{'camera': 'float32'"),
        ({"extras": None}, r"buffer with extras \{'mark': \[\[2\], 'float16'\]\}, and this one has extras \{\}"),
    ],
)
def test_another_buffer_is_refused_with_both_of_what_differs(tmp_path, changes, message):
    save(ReplaySegments(filled()), tmp_path / "a")
    own = dict(capacity=40, obs_shape={"camera": (1, 2, 2), "speed": (1,)}, action_dim=2, n_envs=2, extras=EXTRAS)
    with pytest.raises(ConfigurationError, match=message):
        ReplaySegments.read(tmp_path / "a", ReplayBuffer(**{**own, **changes}))


def test_a_buffer_with_rows_is_not_read_into(tmp_path):
    save(ReplaySegments(filled()), tmp_path / "a")
    with pytest.raises(
        ConfigurationError, match=r"ReplayBuffer\(40 of 40 .*is not empty\. Read a checkpoint into a new"
    ):
        ReplaySegments.read(tmp_path / "a", filled())


def two_segments(path):
    buffer = make()
    log = ReplaySegments(buffer)
    for name, steps in (("before", 9), ("a", 8)):
        for t in range(steps):
            step(buffer, t, terminations=t == 4)
        save(log, path / name, final_obs=observed([1, 1]))
    return path / "a" / "replay"


def edit(folder, file, **changes):
    """Rewrites arrays of a segment and all that `replay.json` says of the file; None removes one."""
    with NpzFile(folder / file) as archive:
        arrays = {name: archive.read(name).copy() for name in archive.names}
    for name, change in changes.items():
        arrays[name] = change(arrays[name])
    (folder / file).unlink()
    write_npz(folder / file, {name: array for name, array in arrays.items() if array is not None})
    state = json.loads((folder / "replay.json").read_text())
    with NpzFile(folder / file) as archive:
        said = {"bytes": (folder / file).stat().st_size, "checksum": archive.checksum}
    for entry in [*state["segments"], state["last_rows"]]:
        if entry["file"] == file:
            entry.update(said)
    (folder / "replay.json").write_text(json.dumps(state))


def at(index, value):
    def change(array):
        array[index] = value
        return array

    return change


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    file.write_bytes(data)


SECOND = "rows-000001.npz"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: (d / SECOND).unlink(), f"has no {SECOND}, which replay.json lists. The checkpoint is incomplete"),
        (lambda d: (d / "in-flight.npz").unlink(), "has no in-flight.npz, which replay.json lists"),
        (lambda d: (d / "replay.json").unlink(), "has no replay.json. Pass a checkpoint that was saved with replay"),
        (lambda d: shutil.rmtree(d), "has no replay.json"),
        (lambda d: os.truncate(d / SECOND, 500), f"{SECOND} has 500 bytes, expected .*cut short"),
        (lambda d: flip(d / SECOND), f"{SECOND}: array '.*' cannot be read: Bad CRC-32.*The file is damaged"),
        (lambda d: flip(d / "in-flight.npz"), "in-flight.npz: array '.*' cannot be read: Bad CRC-32"),
        (lambda d: shutil.copy(d / "rows-000000.npz", d / SECOND), f"{SECOND} is not the file that was saved"),
        (lambda d: edit(d, SECOND, rewards=lambda a: None), f"{SECOND} has no array 'rewards'. The file is damaged"),
        (lambda d: edit(d, SECOND, rewards=at(3, np.nan)), f"{SECOND}: array 'rewards' has values that are not finite"),
        (lambda d: edit(d, SECOND, **{"obs/speed": at(3, np.inf)}), "array 'obs/speed' has values that are not finite"),
        (
            lambda d: edit(d, SECOND, actions=lambda a: a[:, :1]),
            r"'actions' is float32 \(18, 1\), expected .*\(18, 2\)",
        ),
        (lambda d: edit(d, SECOND, actions=lambda a: a.astype(float)), "'actions' is float64 .*, expected float32"),
        (lambda d: edit(d, SECOND, first=lambda a: a + 1), rf"{SECOND}: array 'first' is not \[9, 9\]"),
        (lambda d: edit(d, SECOND, flags=at(3, 64)), "replay.json: the rows of stream 0 .* a flag that does not exist"),
        (lambda d: edit(d, SECOND, flags=at(12, 2)), "stream 1 .* does not follow on the end of an episode"),
        (
            lambda d: edit(d, SECOND, flags=at(12, 4)),
            "stream 1 .* an episode does not begin where the one before it ends",
        ),
        (
            lambda d: edit(d, SECOND, flags=at(12, 16)),
            "stream 1 .* a step and an observation after the last step at once",
        ),
        (lambda d: edit(d, SECOND, flags=at(12, 8)), "stream 1 .* does not follow on the end of an episode"),
        (lambda d: edit(d, "in-flight.npz", flags=at(0, 1)), "stream 0 .* does not follow on the end of an episode"),
        (
            lambda d: edit(d, "in-flight.npz", **{"final_obs/speed": lambda a: a[:1]}),
            r"array 'final_obs/speed' is float32 \(1, 1\), expected float32 \(2, 1\)",
        ),
    ],
)
def test_a_damaged_file_is_named_and_the_buffer_stays_empty(tmp_path, damage, message):
    folder = two_segments(tmp_path)
    damage(folder)
    buffer = make(seed=3)
    before = content(buffer)
    with pytest.raises(CheckpointError, match=message) as caught:
        ReplaySegments.read(tmp_path / "a", buffer)
    assert str(folder) in str(caught.value)
    assert content(buffer) == before
    step(buffer, 1)  # and it can be used
    step(buffer, 2)
    assert buffer.sample(4, 2).rewards[:, 0].tolist() == [1.5] * 4


FIRST, TERMINATED, TRUNCATED = row_store.FIRST, row_store.TERMINATED, row_store.TRUNCATED
FINAL, UNSEEN = row_store.FINAL, row_store.UNSEEN


@pytest.mark.parametrize(
    "flags, in_flight, fault",
    [
        ([], False, None),
        ([FIRST, 0, TERMINATED, FINAL, FIRST | TRUNCATED, FINAL | UNSEEN], False, None),
        ([0, TRUNCATED, FINAL, FIRST, 0], True, None),
        ([FIRST, 64], True, "flag that does not exist"),
        ([FINAL, FIRST], True, "at once"),
        ([FIRST, UNSEEN], True, "at once"),
        ([FIRST | TERMINATED, FINAL | TERMINATED, FINAL | FIRST], False, "at once"),
        ([FIRST, 0], False, "does not follow"),
        ([FIRST, TRUNCATED], True, "does not follow"),
        ([FIRST, TRUNCATED, FINAL], True, "does not follow"),
        ([FIRST, TRUNCATED, 0], True, "does not follow"),
        ([FIRST, 0, FINAL], False, "does not follow"),
        ([FIRST, TRUNCATED, FINAL, 0], True, "does not begin"),
        ([FIRST, FIRST], True, "does not begin"),
    ],
)
def test_flags_that_no_buffer_has_are_told_from_those_that_it_has(flags, in_flight, fault):
    found = segment_files.fault_in_flags(np.array(flags, np.uint8), in_flight)
    assert found is None if fault is None else fault in str(found)


def put(value, *keys):
    def change(folder):
        state = json.loads((folder / "replay.json").read_text())
        place = state
        for key in keys[:-1]:
            place = place[key]
        if value is None:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value
        (folder / "replay.json").write_text(json.dumps(state))

    return change


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: (d / "replay.json").write_text("{"), "cannot be read: .*The file is damaged"),
        (lambda d: (d / "replay.json").write_bytes(b"\xff\xfe"), "cannot be read: .*The file is damaged"),
        (lambda d: (d / "replay.json").write_text("[" * 100_000), "cannot be read: .*The file is damaged"),
        (lambda d: (d / "replay.json").write_text("[]"), "it is no object"),
        (put(2, "format"), "has format 2, this version reads 1. Load it with a newer worldflux"),
        (put(None, "format"), "it has no format"),
        (put([], "buffer"), r"buffer is \[\], expected capacity, n_envs"),
        (put(None, "buffer", "extras"), "buffer is .*, expected capacity, n_envs"),
        (put(None, "begin"), "it has no begin"),
        (put([0], "begin"), "begin is no list of 2 numbers"),
        (put([0, -1], "begin"), "begin is -1, expected a whole number from 0"),
        (put([0, 0.5], "begin"), "begin is 0.5, expected a whole number from 0"),
        (put([0, 10**30], "end"), "end is 1000000000000000000000000000000, more than can be"),
        (put([0, 18], "begin"), "stream 1 has 17 transitions and 2 ended episodes, but its rows have 1 and 0"),
        (put([99, 99], "begin"), r"rows \[99, 99\] to \[19, 19\] are not what streams of this buffer hold"),
        (put([9999, 9999], "end"), "are not what streams of this buffer hold"),
        (put([20, 18], "end"), r"the segments end at rows \[18, 18\], expected \[19, 17\]"),
        (put([1, 15], "transitions"), "stream 0 has 1 transitions and 2 ended episodes, but its rows have 17 and 2"),
        (put([17, 21], "transitions"), "are not what streams of this buffer hold"),
        (put([2, 3], "episodes"), "stream 1 has 17 transitions and 3 ended episodes, but its rows have 17 and 2"),
        (put([0, 2], "in_flight"), r"in_flight is \[0, 2\], expected numbers of streams"),
        (put("all", "in_flight"), "in_flight is 'all', expected numbers of streams"),
        (put([0], "in_flight"), r"the segments end at rows \[18, 18\], expected \[18, 19\]"),
        (put(["x", 1], "fresh"), "fresh is 'x', expected a whole number from 0"),
        (put("x", "sampler"), "sampler is 'x', expected a state"),
        (put({}, "sampler"), "sampler is no state of a random stream"),
        (put(7, "sampler", "bit_generator"), "sampler is no state of a random stream"),
        (put("yes", "final_obs"), "final_obs is 'yes', expected true or false"),
        (put({}, "segments"), "segments is {}, expected a list"),
        (put([], "segments"), r"the segments end at rows \[0, 0\], expected \[18, 18\]"),
        (put(7, "segments", 1), "a segment is described as 7"),
        (put("rows-000000.npz", "segments", 1, "file"), "two segments have the same name"),
        (
            put("../a/rows-000001.npz", "segments", 1, "file"),
            "a segment is called '../a/rows-000001.npz', which none is",
        ),
        (put("in-flight.npz", "segments", 1, "file"), "a segment is called 'in-flight.npz', which none is"),
        (put("rows-000001.npz", "last_rows", "file"), "a segment is called 'rows-000001.npz', which none is"),
        (put(None, "segments", 0), "rows-000001.npz does not go on where the segments before it end"),
        (put([8, 9], "segments", 1, "first"), "rows-000001.npz does not go on where the segments before it end"),
        (put([0, 9999], "segments", 0, "end"), r"rows-000000.npz cannot have rows \[0, 0\] to \[0, 9999\]"),
        (put([19, 9], "segments", 1, "first"), r"rows-000001.npz cannot have rows \[19, 9\] to \[18, 18\]"),
        (put("x", "segments", 1, "level"), "level of rows-000001.npz is 'x', expected a whole number"),
        (put(1, "segments", 1, "checksum"), "rows-000001.npz is not the file that was saved: its checksum differs"),
        (put([17, 17], "last_rows", "first"), "last_rows are not those of the episodes in flight"),
    ],
)
def test_an_edited_description_is_refused_and_the_buffer_stays_empty(tmp_path, damage, message):
    folder = two_segments(tmp_path)
    damage(folder)
    buffer = make(seed=3)
    before = content(buffer)
    with pytest.raises(CheckpointError, match=message) as caught:
        ReplaySegments.read(tmp_path / "a", buffer)
    assert str(folder) in str(caught.value)
    assert content(buffer) == before


@settings(max_examples=60, deadline=None, derandomize=True)
@given(file=st.integers(0, 3), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_an_error_of_ours_or_changes_nothing(tmp_path_factory, file, place, bit):
    path = tmp_path_factory.mktemp("flipped")
    folder = two_segments(path)
    whole = content(read(path / "a")[0])
    target = sorted(folder.iterdir())[file]
    data = bytearray(target.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    target.unlink()
    target.write_bytes(data)
    try:
        loaded, _ = read(path / "a")
    except WorldFluxError:
        return
    now = content(loaded)
    if target.name == "replay.json":  # it has no checksum: digits of these two may have become others
        del whole["sampler"], whole["fresh"], now["sampler"], now["fresh"]
    assert now == whole
