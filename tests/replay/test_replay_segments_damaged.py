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
from worldflux.replay import checkpoint
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.checkpoint import ReplaySegments
from worldflux.replay.npz import NpzFile, write_npz


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


def rewritten(folder, **changes):
    """Changes entries of `replay.json`, by their keys joined with a slash, and gives it a digest that fits."""
    state = json.loads((folder / "replay.json").read_text())
    for keys, value in changes.items():
        *path, last = (int(key) if key.isdigit() else key for key in keys.split("/"))
        place = state
        for key in path:
            place = place[key]
        place[last] = value
    del state["digest"]
    state["digest"] = checkpoint._digest(state)
    (folder / "replay.json").write_text(json.dumps(state))


def edit(folder, file, entry, **changes):
    """Changes arrays of a segment, and all that `replay.json` says of the file; None removes one."""
    with NpzFile(folder / file) as archive:
        arrays = {name: archive.read(name).copy() for name in archive.names}
    arrays |= {name: change(arrays[name]) for name, change in changes.items()}
    (folder / file).unlink()
    write_npz(folder / file, {name: array for name, array in arrays.items() if array is not None})
    with NpzFile(folder / file) as archive:
        said = {"bytes": (folder / file).stat().st_size, "checksum": archive.checksum}
    rewritten(folder, **{f"{entry}/{key}": value for key, value in said.items()})


def flip(file):
    """Changes the last byte of the last array."""
    data = bytearray(file.read_bytes())
    data[data.index(b"PK\x01\x02") - 1] ^= 1
    file.unlink()
    file.write_bytes(data)


def replaced(folder, old, new):
    text = (folder / "replay.json").read_text()
    assert old in text
    (folder / "replay.json").write_text(text.replace(old, new, 1))


SECOND = "rows-000001.npz"
BY_HAND = "its digest does not match its content. The file is damaged or was edited"


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
        # replay.json: what is no JSON, and what was changed in it.
        (lambda d: (d / "replay.json").write_text("{"), "cannot be read: .*The file is damaged"),
        (lambda d: (d / "replay.json").write_bytes(b"\xff\xfe"), "cannot be read: .*The file is damaged"),
        (lambda d: (d / "replay.json").write_text("[" * 100_000), "cannot be read: .*The file is damaged"),
        (lambda d: (d / "replay.json").write_text("[]"), "it has no format"),
        (lambda d: (d / "replay.json").write_text("{}"), "it has no format"),
        (lambda d: rewritten(d, format=1), "has format 1, this version of worldflux reads 2. Load it with the version"),
        (lambda d: replaced(d, '"digest": "', '"digest": "0'), BY_HAND),
        (lambda d: replaced(d, '"begin": [0, 0]', '"begin": [0, 1]'), BY_HAND),
        (lambda d: replaced(d, '"final_obs": true', '"final_obs": false'), BY_HAND),
        (lambda d: replaced(d, '"sampler": {', '"more": 1, "sampler": {'), BY_HAND),
        # Files that somebody changed on purpose, with a digest that fits.
        (lambda d: rewritten(d, buffer=[]), "replay.json cannot be loaded .*damaged"),
        (lambda d: rewritten(d, begin={}), "it has {} where numbers of rows are expected"),
        (lambda d: rewritten(d, begin=[]), r"it has \[\] where numbers"),
        (lambda d: rewritten(d, begin=[0, -1]), r"it has \[0, -1\] where numbers"),
        (lambda d: rewritten(d, begin=[0, 0.5]), r"it has \[0, 0.5\] where numbers"),
        (lambda d: rewritten(d, end=[0, 2**48]), r"it has \[0, 281474976710656\] where numbers"),
        (lambda d: rewritten(d, end=[0, 10**30]), "where numbers of rows are expected"),
        (lambda d: rewritten(d, fresh=["x", 1]), "where numbers of rows are expected"),
        (lambda d: rewritten(d, begin=[0], end=[1], fresh=[1]), "rows of 1 streams, expected at least 2"),
        (lambda d: rewritten(d, begin=[0] * 99, end=[0] * 99, fresh=[0] * 99), "rows of 99 streams, expected at least"),
        (lambda d: rewritten(d, end=[0, 0, 0]), "rows of 2 streams"),
        (lambda d: rewritten(d, begin=[99, 99]), r"rows \[99, 99\] to \[19, 19\] are more than the streams"),
        (lambda d: rewritten(d, end=[9999, 9999]), "are more than the streams of this buffer hold"),
        (lambda d: rewritten(d, sampler="x"), "sampler is no state of a random stream"),
        (lambda d: rewritten(d, **{"sampler/bit_generator": 7}), "sampler is no state of a random stream"),
        (lambda d: rewritten(d, segments={"a": 1}), "replay.json cannot be loaded"),
        (lambda d: rewritten(d, **{"segments/1": 7}), "replay.json cannot be loaded"),
        (lambda d: rewritten(d, **{"segments/1/file": 7}), "replay.json cannot be loaded"),
        (lambda d: rewritten(d, **{"segments/1/file": "../a/rows-000001.npz"}), "a segment is called '../a/rows-00000"),
        (lambda d: rewritten(d, **{"segments/1/file": "in-flight.npz"}), "a segment is called 'in-flight.npz'"),
        (lambda d: rewritten(d, **{"last_rows/file": SECOND}), f"a segment is called '{SECOND}', which none is"),
        (lambda d: rewritten(d, **{"segments/0/end": [0, 2**40]}), "rows-000000.npz cannot have rows"),
        (
            lambda d: rewritten(d, **{"segments/1/first": [19, 9]}),
            rf"{SECOND} cannot have rows \[19, 9\] to \[18, 18\]",
        ),
        (lambda d: rewritten(d, **{"segments/1/first": [9]}), f"{SECOND} cannot have rows"),
        (lambda d: rewritten(d, **{"segments/1/checksum": 1}), f"{SECOND} is not the file that was saved"),
        (lambda d: edit(d, SECOND, "segments/1", rewards=lambda a: None), f"{SECOND}: array 'rewards' cannot be read"),
        (
            lambda d: edit(d, SECOND, "segments/1", actions=lambda a: a[:, :1]),
            r"'actions' is float32 \(18, 1\), expected .*\(18, 2\)",
        ),
        (
            lambda d: edit(d, SECOND, "segments/1", actions=lambda a: a.astype(float)),
            "'actions' is float64 .*, expected float32",
        ),
        (
            lambda d: edit(d, "in-flight.npz", "last_rows", **{"final_obs/speed": lambda a: a[:1]}),
            r"array 'final_obs/speed' is float32 \(1, 1\), expected float32 \(2, 1\)",
        ),
    ],
)
def test_a_damaged_or_changed_file_is_named_and_the_buffer_stays_empty(tmp_path, damage, message):
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
    assert content(loaded) == whole
