"""Files of others: what they are is said, what they call things is known, and pictures are taken as they come."""

from __future__ import annotations

import gzip
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldflux import create_world_model
from worldflux.errors import BufferError
from worldflux.training import ReplayBuffer, train

PICTURES = np.random.default_rng(0).integers(0, 256, (30, 3, 64, 64)).astype(np.uint8)


def write(path: Path, **arrays: Any) -> Path:
    """The recipe of the documentation, with some arrays of one's own."""
    obs = arrays.pop("obs", np.zeros((30, 4), np.float32))
    named = dict(
        obs=obs,
        actions=np.zeros((30, 2), np.float32),
        rewards=np.zeros(30, np.float32),
        dones=np.zeros(30, np.float32),
        obs_shape=np.array(obs.shape[1:], dtype=np.int64),
        action_dim=np.array(2, dtype=np.int64),
        capacity=np.array(30, dtype=np.int64),
    )
    np.savez(path / "buffer.npz", **{k: v for k, v in {**named, **arrays}.items() if v is not None})
    return path / "buffer.npz"


FORMATS = {
    "HDF5": (
        b"\x89HDF\r\n\x1a\n" + bytes(100),
        "but an HDF5 file. Read its episodes with h5py",
    ),
    "Parquet": (b"PAR1" + bytes(100), "but a Parquet file.*pandas"),
    "pickle": (pickle.dumps({"observations": [1]}), "but a pickle.*never read here"),
    "old pickle": (pickle.dumps({"observations": [1]}, protocol=2), "but a pickle"),
    "Arrow": (b"ARROW1\0\0" + bytes(100), "but an Arrow file"),
    "gzip": (gzip.compress(b"x"), "compressed with gzip"),
    "SQLite": (b"SQLite format 3\0" + bytes(100), "but an SQLite database"),
    "empty": (b"", "but an empty one"),
    "cut": (b"PK\x03\x04" + bytes(100), "damaged or cut short"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_of_another_format_is_called_what_it_is(kind: str, tmp_path: Path) -> None:
    content, message = FORMATS[kind]
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(BufferError, match=message):
        ReplayBuffer.load(tmp_path / "data.npz")


def test_a_single_array_and_a_directory_are_called_what_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "obs.npy", np.zeros(3))
    with pytest.raises(BufferError, match=r"but a \.npy file with a single array"):
        ReplayBuffer.load(tmp_path / "obs.npy")
    with pytest.raises(BufferError, match=r"but a directory"):
        ReplayBuffer.load(tmp_path)


# Names


@pytest.mark.parametrize("name", ["truncations", "timeouts"])
def test_time_limits_are_read_under_both_names(name: str, tmp_path: Path) -> None:
    cut = np.arange(30) % 10 == 9
    buffer = ReplayBuffer.load(write(tmp_path, **{name: cut}))
    batch = buffer.sample(1, 33)
    assert buffer.num_episodes == 3
    assert int(batch.truncations.sum()) == 3 and not batch.terminations.any()


def test_both_names_of_time_limits_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(BufferError, match="truncations and timeouts, which mean the same"):
        ReplayBuffer.load(write(tmp_path, truncations=np.zeros(30), timeouts=np.zeros(30)))


def test_arrays_that_nobody_reads_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "worldflux.training"):
        ReplayBuffer.load(write(tmp_path))
        assert not caplog.messages
        ReplayBuffer.load(write(tmp_path, next_obs=np.zeros((30, 4)), terminals=np.zeros(30), truncated=np.zeros(30)))
    (line,) = caplog.messages
    for part in ("next_obs", "terminals (did you mean dones?)", "truncated (did you mean truncations?)"):
        assert part in line


def test_a_missing_array_that_is_there_under_another_name_is_told(tmp_path: Path) -> None:
    with pytest.raises(BufferError, match="Rename 'terminals' to 'dones'"):
        ReplayBuffer.load(write(tmp_path, dones=None, terminals=np.zeros(30)))


# The end


def test_a_last_step_without_a_flag_is_truncated_in_episodes_and_files_alike(tmp_path: Path) -> None:
    stored = ReplayBuffer(100, (4,), 2)
    stored.add_episode(np.zeros((30, 4)), np.zeros((30, 2)), np.zeros(30))
    for buffer in (stored, ReplayBuffer.load(write(tmp_path))):
        batch = buffer.sample(1, 31)
        assert batch.truncations.sum() == 1 and batch.truncations[0, 29] and not batch.terminations.any()


# Pictures

FLOATS = {
    "0 to 255": PICTURES.astype(np.float32),
    "0 to 1": (PICTURES / 255).astype(np.float32),
    "0 to 1 in double precision": PICTURES / 255,
    "0 to 1 in half precision": (PICTURES / 255).astype(np.float16),
}


@pytest.mark.parametrize("kind", FLOATS)
def test_pictures_as_floats_are_told_apart_and_taken(kind: str, tmp_path: Path) -> None:
    buffer = ReplayBuffer.load(write(tmp_path, obs=FLOATS[kind]))
    assert buffer.obs_dtype == np.uint8
    assert np.array_equal(buffer.stored()[0].obs["obs"][:30], PICTURES)


@pytest.mark.parametrize("family", ["dreamerv3:tiny", "tdmpc2:tiny"])
def test_the_documented_recipe_trains_on_pictures(family: str, tmp_path: Path) -> None:
    buffer = ReplayBuffer.load(write(tmp_path, obs=np.zeros((30, 3, 64, 64), np.uint8).astype(np.float32)))
    model = create_world_model(family, obs_shape=(3, 64, 64), action_dim=2)
    train(model, buffer, total_steps=1, batch_size=2, sequence_length=5, device="cpu")


def episode(path: Path, pictures: Any) -> ReplayBuffer:
    buffer = ReplayBuffer(100, pictures.shape[1:], 2)
    buffer.add_episode(pictures, np.zeros((30, 2)), np.zeros(30))
    return buffer


def documented(path: Path, pictures: Any) -> ReplayBuffer:
    return ReplayBuffer.load(write(path, obs=pictures))


SHARES = PICTURES / 255
"""Of the pictures' range."""

# Pictures that are no bytes: what is given, the doors that refuse it, and the line in the message.
OTHERS: dict[str, tuple[Any, list[Any], str]] = {
    "floats from 0 to 1": (SHARES, [episode], "(obs * 255).round()"),
    "floats from 0 to 255": (PICTURES.astype(np.float32), [episode], "obs.round()"),
    "floats between bytes": (PICTURES * 0.999, [episode, documented], "obs.round()"),
    "floats from -1 to 1": (SHARES * 2 - 1, [episode, documented], "np.interp(obs, (-1, 1), (0, 255)).round()"),
    "half precision": ((SHARES * 2 - 1).astype(np.float16), [episode, documented], "np.interp(obs, (-1, 1), (0, 255))"),
    "floats from 0 to 2": (SHARES * 2, [episode, documented], "np.interp(obs, (0, 2), (0, 255)).round()"),
    "floats from -0.5 to 0.5": (SHARES - 0.5, [episode, documented], "np.interp(obs, (-1, 1), (0, 255))"),
    "normalised floats": (SHARES * 5 - 2.125, [episode, documented], "np.interp(obs, (-2.125, 2.875), (0, 255))"),
    "floats up to 25500": (PICTURES * np.float32(100), [episode, documented], "np.interp(obs, (0, 25500), (0, 255))"),
    "integers up to 299": (
        (SHARES * 299).round().astype(int),
        [episode, documented],
        "np.interp(obs, (0, 299), (0, 255))",
    ),
    "16 bits": ((SHARES * 65535).astype(np.uint16), [episode, documented], "np.interp(obs, (0, 65535), (0, 255))"),
    "signed bytes": (
        (PICTURES - 128.0).astype(np.int8),
        [episode, documented],
        "np.interp(obs, (-128, 127), (0, 255))",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_pictures_are_refused_with_the_line_that_makes_bytes_of_them(kind: str, tmp_path: Path) -> None:
    pictures, doors, line = OTHERS[kind]
    for door in doors:
        with pytest.raises(BufferError) as refused:
            door(tmp_path, pictures)
        message = str(refused.value)
        assert line in message
        if door is documented:
            assert message.startswith("buffer.npz: obs")
        begin = message.index(line)
        end = message.index(".astype(np.uint8)", begin) + len(".astype(np.uint8)")
        converted = eval(message[begin:end], {"np": np, "obs": pictures})
        assert np.array_equal(door(tmp_path, converted).stored()[0].obs["obs"][:30], converted)
        seen = (
            converted * 2.0 - 127.5 if kind == "floats from -0.5 to 0.5" else converted
        )  # taken for those from -1 to 1
        assert np.abs(seen - PICTURES).max() <= 1


@pytest.mark.parametrize("keys", [{"obs": 30}, {"obs/camera": 30, "obs/speed": 2}])
def test_a_picture_without_channels_is_a_vector_with_a_hint(
    keys: dict[str, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with np.load(write(tmp_path)) as file:
        arrays = {name: file[name] for name in file.files if name not in ("obs", "obs_shape")}
    for key, side in keys.items():
        arrays[key] = np.zeros((30, side, side), np.float32)
        arrays[key.replace("obs", "obs_shape")] = np.array([side, side])
    path = tmp_path / "tables.npz"
    np.savez(path, **arrays)

    buffer = ReplayBuffer.load(path)

    (line,) = caplog.messages
    assert (
        "is (30, 30), which is taken as a vector of 900 numbers. An image has its channels first: (1, 30, 30)" in line
    )
    caplog.clear()
    ReplayBuffer(10, buffer.obs_shape, 2)
    assert caplog.messages == [line]


def test_floats_that_were_stored_as_floats_stay_floats(tmp_path: Path) -> None:
    buffer = ReplayBuffer(100, (3, 8, 8), 2, obs_dtype=np.float32)
    buffer.add_episode(np.full((31, 3, 8, 8), 0.25), np.zeros((30, 2)), np.zeros(30))
    buffer.save(tmp_path / "floats.npz")
    loaded = ReplayBuffer.load(tmp_path / "floats.npz")
    assert loaded.obs_dtype == np.float32 and float(loaded.stored()[0].obs["obs"][0].max()) == 0.25
