"""Every way in which the replay data of a checkpoint can be broken, or be that of another buffer."""

import json
import os
import shutil

import numpy as np
import pytest
from helpers.buffers import EXTRAS, content, filled, make, read, save, step, two_segments
from hypothesis import given, settings
from hypothesis import strategies as st

from worldflux.errors import CheckpointError, ConfigurationError, WorldFluxError
from worldflux.replay import ring as row_store
from worldflux.replay import segments as segment_files
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.checkpoint import ReplaySegments
from worldflux.replay.npz import NpzFile, write_npz


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """It would take most of the time, and no power fails here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


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
