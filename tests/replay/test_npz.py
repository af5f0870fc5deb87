"""Buffers in files: whatever a buffer holds comes back, and files that others wrote are taken as they are meant."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.replay import assert_same_batch, documented, seen
from hypothesis import given, settings
from hypothesis import strategies as st

from worldflux import create_world_model
from worldflux.errors import BufferError
from worldflux.files import write_atomically
from worldflux.replay import npz
from worldflux.replay.npz import write_npz
from worldflux.training import ReplayBuffer, train

fuzzed = settings(deadline=None, derandomize=True)

OBS: dict[str, tuple[Any, Any]] = {
    "vector": ((2,), None),
    "image": ((1, 4, 4), None),
    "floats as image": ((1, 4, 4), np.float32),
    "bytes as vector": ((3,), np.uint8),
    "dictionary": ({"camera": (1, 4, 4), "speed/left": (1,), "größe": (2, 2)}, None),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def saved(place: Path, buffer: ReplayBuffer, name: str = "a.npz") -> bytes:
    (place / name).unlink(missing_ok=True)  # some file systems wait for the disk where a file is replaced
    buffer.save(place / name)
    return (place / name).read_bytes()


def load(path: Path, arrays: dict[str, Any], save: Any = np.savez, **named: Any) -> ReplayBuffer:
    (path / "mine.npz").unlink(missing_ok=True)
    save(path / "mine.npz", **arrays)
    return ReplayBuffer.load(path / "mine.npz", seed=0, **named)


# Whatever a buffer holds


def random_obs(shape: Any, lead: tuple[int, ...], rng: np.random.Generator) -> Any:
    if isinstance(shape, dict):
        return {key: random_obs(part, lead, rng) for key, part in shape.items()}
    return rng.integers(0, 256, (*lead, *shape)).astype(np.uint8 if len(shape) == 3 else np.float32)


STEPS = st.tuples(st.just("step"), st.integers(0, 3), st.integers(0, 2**32 - 1))
EPISODES = st.tuples(st.just("episode"), st.integers(1, 6), st.integers(0, 2**32 - 1))
CUTS = st.tuples(st.just("end"), st.integers(0, 2), st.integers(0, 2**32 - 1))
LIVES = st.lists(st.one_of(STEPS, STEPS, EPISODES, CUTS), max_size=25)


def live(buffer: ReplayBuffer, life: list[tuple[str, int, int]], dtype: Any) -> None:
    """Puts in what was drawn: steps with and without ends, whole episodes, episodes cut from outside."""
    n, shape = buffer.n_envs, buffer.obs_shape
    for kind, size, seed in life:
        rng = np.random.default_rng(seed)

        def obs(*lead: int, rng: np.random.Generator = rng) -> Any:
            given = random_obs(shape, lead, rng)
            return given if dtype is None else given.astype(dtype)

        if kind == "step":
            flags = rng.random((2, n)) < 0.1 * size
            active = None if size < 2 else rng.random(n) < 0.7
            actions, rewards = rng.uniform(-1, 1, (n, 2)), rng.normal(size=n)
            buffer.add(obs(n), actions, rewards, *flags, final_obs=obs(n), active=active)
        elif kind == "episode":
            actions, rewards, ends = rng.uniform(-1, 1, (size, 2)), rng.normal(size=size), rng.random((2, size)) < 0.2
            given = obs(size + int(rng.integers(2)))
            try:
                buffer.add_episode(given, actions, rewards, terminations=ends[0], truncations=ends[1])
            except BufferError as error:
                assert "in flight" in str(error)
        else:
            env = int(rng.integers(n)) if size else None
            buffer.end_episodes(env, final_obs=obs(n) if rng.random() < 0.5 else None)


@settings(fuzzed, max_examples=120)
@given(
    kind=st.sampled_from([*OBS]),
    n_envs=st.integers(1, 3),
    capacity=st.integers(3, 30),
    life=LIVES,
    later=st.lists(st.one_of(STEPS, EPISODES), max_size=4),
    chunk=st.sampled_from([50, 2**24]),
)
def test_any_buffer_comes_back_from_its_file(
    place: Path, kind: str, n_envs: int, capacity: int, life: Any, later: Any, chunk: int
) -> None:
    shape, dtype = OBS[kind]
    buffer = ReplayBuffer(capacity, shape, 2, obs_dtype=dtype, n_envs=n_envs, seed=0)
    live(buffer, life, dtype)
    with mock.patch.object(npz, "CHUNK_BYTES", chunk):
        data = saved(place, buffer)
        loaded = ReplayBuffer.load(place / "a.npz", seed=0)
    for name in ("capacity", "obs_shape", "action_dim", "n_envs", "num_transitions", "num_episodes"):
        assert getattr(loaded, name) == getattr(buffer, name), name
    if buffer.num_transitions:
        assert loaded.obs_dtype == buffer.obs_dtype
    seq_len = 1
    while buffer.num_windows(seq_len):
        assert loaded.num_windows(seq_len) == buffer.num_windows(seq_len)
        assert_same_batch(buffer.sample(40, seq_len), loaded.sample(40, seq_len))
        seq_len += 3
    assert saved(place, loaded, "b.npz") == data
    # Episodes in flight go on, and what comes later drops the same old rows.
    live(buffer, later, dtype)
    live(loaded, later, dtype)
    assert saved(place, loaded, "b.npz") == saved(place, buffer)


def test_others_read_the_documented_arrays_with_numpy_alone(tmp_path: Path) -> None:
    buffer = ReplayBuffer(10, {"x": (1,)}, 1)
    buffer.add_episode({"x": np.arange(4.0)[:, None]}, np.zeros((3, 1)), [1, 2, 3], [0, 0, 1])
    buffer.add_episode({"x": np.arange(3.0)[:, None]}, np.ones((2, 1)), [4, 5], [0, 0])
    buffer.save(tmp_path / "buffer")  # exactly this path, without a suffix
    assert os.listdir(tmp_path) == ["buffer"]
    with np.load(tmp_path / "buffer", allow_pickle=False) as file:
        found = {name: (file[name].dtype.name, file[name].tolist()) for name in file.files}
    assert found == {
        "obs/x": ("float32", [[0], [1], [2], [0], [1]]),
        "final_obs/x": ("float32", [[3], [2]]),
        "obs_shape/x": ("int64", [1]),
        "actions": ("float32", [[0], [0], [0], [1], [1]]),
        "rewards": ("float32", [1, 2, 3, 4, 5]),
        "dones": ("bool", [False, False, True, False, False]),
        "action_dim": ("int64", 1),
        "capacity": ("int64", 10),
        "truncations": ("bool", [False, False, False, False, True]),
        "episode_lengths": ("int64", [3, 2]),
        "episode_streams": ("int64", [0, 0]),
        "episode_starts": ("bool", [True, True]),
        "episode_ends": ("bool", [True, True]),
        "final_obs_mask": ("bool", [True, True]),
        "n_envs": ("int64", 1),
    }


# Whatever others wrote


@settings(fuzzed, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 5), max_size=6),
    is_done=st.booleans(),
    spare=st.integers(0, 9),
    kind=st.sampled_from(["vector", "image"]),
    seed=st.integers(0, 2**32 - 1),
    save=st.sampled_from([np.savez, np.savez_compressed]),
)
def test_a_file_of_the_documented_keys_gives_exactly_its_rows(
    place: Path, lengths: Any, is_done: bool, spare: int, kind: str, seed: int, save: Any
) -> None:
    rng, shape, count = np.random.default_rng(seed), OBS[kind][0], sum(lengths)
    dones = np.zeros(count, bool)
    dones[np.cumsum(lengths, dtype=int) - 1] = True
    dones[count - 1 : count] = is_done  # what the file's end cuts off is truncated
    arrays = dict(
        obs=random_obs(shape, (count,), rng),
        actions=rng.uniform(-1, 1, (count, 2)).astype(np.float32),
        rewards=rng.normal(size=count).astype(np.float32),
        dones=dones,
        obs_shape=np.array(shape),
        action_dim=2,
        capacity=max(1, count + spare),
    )
    buffer = load(place, arrays, save)
    assert (len(buffer), buffer.num_episodes, buffer.obs_shape) == (count, len(lengths), shape)
    if not count:
        return
    batch = buffer.sample(1, count + len(lengths))  # the only window: everything
    last = np.cumsum(np.array(lengths) + 1) - 1  # the rows of the observations that are not there
    steps = np.delete(np.arange(count + len(lengths)), last)
    for name, given_name in (("obs", "obs"), ("actions", "actions"), ("rewards", "rewards"), ("terminations", "dones")):
        assert np.array_equal(getattr(batch, name)[0, steps].numpy(), arrays[given_name]), name
    assert np.flatnonzero(~batch.obs_mask[0].numpy()).tolist() == last.tolist()
    assert np.flatnonzero(batch.is_first[0].numpy()).tolist() == [0, *(last[:-1] + 1)]
    cut = np.flatnonzero(batch.truncations[0].numpy()).tolist()
    assert cut == ([] if is_done else [steps[-1]])


def test_column_major_and_big_endian_arrays_are_read_like_others(tmp_path: Path) -> None:
    one = load(tmp_path, documented()).sample(1, 7)
    obs, rewards = np.asfortranarray(documented()["obs"]), documented()["rewards"].astype(">f8")
    with mock.patch.object(npz, "CHUNK_BYTES", 20):
        other = load(tmp_path, documented(obs=obs, rewards=rewards)).sample(1, 7)
    assert torch.equal(one.obs, other.obs) and torch.equal(one.rewards, other.rewards)


def test_a_smaller_capacity_keeps_the_newest_transitions(tmp_path: Path) -> None:
    buffer = load(tmp_path, documented(), capacity=3)
    assert buffer.capacity == 3
    assert buffer.sample(1, 5).obs[0, :, 0].tolist() == [2, 0, 1000, 1001, 0]


def test_episodes_are_shared_out_among_another_number_of_streams(tmp_path: Path) -> None:
    buffer = ReplayBuffer(24, (1,), 1, n_envs=2)
    for t in range(16):
        obs, ends = np.array([[t], [100.0 + t]]), np.full(2, t % 5 == 4)
        buffer.add(obs, np.zeros((2, 1)), np.zeros(2), ends, np.zeros(2), final_obs=obs + 1)
    buffer.save(tmp_path / "a.npz")  # of each stream the newest 12 steps: 4 to 15
    loaded = ReplayBuffer.load(tmp_path / "a.npz", n_envs=3, capacity=60)
    assert (len(loaded), loaded.n_envs) == (24, 3)
    assert loaded.num_episodes == 8  # six had ended, two were in flight and are closed
    batch = loaded.sample(1000, 2)
    count, is_seen = batch.obs[..., 0], seen(batch)
    assert torch.all((count[:, 1] == count[:, 0] + 1) | batch.is_first[:, 1] | ~is_seen[:, 1])
    assert set(count[is_seen].tolist()) == {100.0 * env + t for env in range(2) for t in range(4, 16)}
    assert torch.unique(batch.row_ids[batch.is_first] % 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["truncations", "timeouts"])
def test_time_limits_are_read_under_both_names(name: str, tmp_path: Path) -> None:
    arrays = documented(dones=np.zeros(5), **{name: np.array([0, 1, 0, 0, 1])})
    batch = load(tmp_path, arrays).sample(1, 7)
    assert batch.truncations[0].nonzero().flatten().tolist() == [1, 5] and not batch.terminations.any()


def test_arrays_that_nobody_reads_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "worldflux.training"):
        load(tmp_path, documented())
        assert not caplog.messages
        load(tmp_path, documented(next_obs=np.zeros((5, 4)), terminals=np.zeros(5), truncated=np.zeros(5)))
    (line,) = caplog.messages
    for part in ("next_obs", "terminals (did you mean dones?)", "truncated (did you mean truncations?)"):
        assert part in line


# Images

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16)).astype(np.uint8)
SHARES = IMAGES / 255
BLACK_AND_WHITE = np.where(IMAGES > 127, 255, 0).astype(np.uint8)


def of_images(path: Path, images: Any) -> ReplayBuffer:
    return load(path, documented(obs=images, obs_shape=np.array(images.shape[1:])))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (IMAGES, IMAGES),
        (IMAGES.astype(np.int64), IMAGES),
        (IMAGES.astype(np.float32), IMAGES),
        (SHARES.astype(np.float32), IMAGES),
        (SHARES, IMAGES),
        (SHARES.astype(np.float16), IMAGES),
        (BLACK_AND_WHITE > 0, BLACK_AND_WHITE),
        ((BLACK_AND_WHITE > 0).astype(np.float32), BLACK_AND_WHITE),
    ],
    ids=["bytes", "integers", "0 to 255", "0 to 1", "double", "half", "flags", "0 and 1"],
)
def test_images_become_bytes_whatever_the_file_has(given: Any, expected: Any, tmp_path: Path) -> None:
    batch = of_images(tmp_path, given).sample(1, 7)
    assert batch.obs.dtype == torch.uint8 and np.array_equal(batch.obs[seen(batch)], expected)


def test_images_of_flags_are_bright_in_files_with_all_arrays_too(tmp_path: Path) -> None:
    buffer = ReplayBuffer(20, (3, 16, 16), 1)
    buffer.add_episode(BLACK_AND_WHITE, np.zeros((4, 1)), np.zeros(4))
    buffer.save(tmp_path / "bytes.npz")
    with np.load(tmp_path / "bytes.npz") as file:
        arrays = dict(file)
    loaded = load(tmp_path, arrays | {name: arrays[name] > 0 for name in ("obs", "final_obs")})
    assert np.array_equal(loaded.sample(1, 5).obs[0], BLACK_AND_WHITE)


def test_floats_that_were_stored_as_floats_stay_floats(tmp_path: Path) -> None:
    buffer = ReplayBuffer(100, (3, 8, 8), 2, obs_dtype=np.float32)
    buffer.add_episode(np.full((31, 3, 8, 8), 0.25), np.zeros((30, 2)), np.zeros(30))
    buffer.save(tmp_path / "floats.npz")
    loaded = ReplayBuffer.load(tmp_path / "floats.npz")
    assert loaded.obs_dtype == np.float32 and loaded.sample(1, 31).obs.unique().tolist() == [0.25]


@pytest.mark.parametrize("family", ["dreamerv3:tiny", "tdmpc2:tiny"])
def test_the_documented_recipe_trains_on_images(family: str, tmp_path: Path) -> None:
    buffer = of_images(tmp_path, np.zeros((5, 3, 64, 64), np.float32))
    model = create_world_model(family, obs_shape=(3, 64, 64), action_dim=1)
    train(model, buffer, total_steps=1, batch_size=2, sequence_length=5, device="cpu")


def episode(path: Path, images: Any) -> ReplayBuffer:
    buffer = ReplayBuffer(100, images.shape[1:], 1)
    buffer.add_episode(images, np.zeros((5, 1)), np.zeros(5))
    return buffer


# Images that are no bytes: what is given, the doors that refuse it, and the line in the message.
OTHERS: dict[str, tuple[Any, list[Any], str]] = {
    "floats from 0 to 1": (SHARES, [episode], "(obs * 255).round()"),
    "floats from 0 to 255": (IMAGES.astype(np.float32), [episode], "obs.round()"),
    "floats between bytes": (IMAGES * 0.999, [episode, of_images], "obs.round()"),
    "floats from -1 to 1": (SHARES * 2 - 1, [episode, of_images], "np.interp(obs, (-1, 1), (0, 255)).round()"),
    "half precision": ((SHARES * 2 - 1).astype(np.float16), [episode, of_images], "np.interp(obs, (-1, 1), (0, 255))"),
    "floats from 0 to 2": (SHARES * 2, [episode, of_images], "np.interp(obs, (0, 2), (0, 255)).round()"),
    "floats from -0.5 to 0.5": (SHARES - 0.5, [episode, of_images], "np.interp(obs, (-1, 1), (0, 255))"),
    "normalised floats": (SHARES * 5 - 2.125, [episode, of_images], "np.interp(obs, (-2.125, 2.875), (0, 255))"),
    "floats up to 25500": (IMAGES * np.float32(100), [episode, of_images], "np.interp(obs, (0, 25500), (0, 255))"),
    "integers to 299": ((SHARES * 299).round().astype(int), [episode, of_images], "np.interp(obs, (0, 299), (0, 255))"),
    "16 bits": ((SHARES * 65535).astype(np.uint16), [episode, of_images], "np.interp(obs, (0, 65535), (0, 255))"),
    "signed bytes": ((IMAGES - 128.0).astype(np.int8), [episode, of_images], "np.interp(obs, (-128, 127), (0, 255))"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_images_are_refused_with_the_line_that_makes_bytes_of_them(kind: str, tmp_path: Path) -> None:
    images, doors, line = OTHERS[kind]
    for door in doors:
        with pytest.raises(BufferError) as refused:
            door(tmp_path, images)
        message = str(refused.value)
        assert line in message and message.startswith("mine.npz: obs" if door is of_images else "obs")
        begin = message.index(line)
        end = message.index(".astype(np.uint8)", begin) + len(".astype(np.uint8)")
        converted = eval(message[begin:end], {"np": np, "obs": images})
        batch = door(tmp_path, converted).sample(1, 7 if door is of_images else 6)
        assert np.array_equal(batch.obs[seen(batch)], converted)
        # Numbers from -0.5 to 0.5 are taken for those from -1 to 1.
        shown = converted * 2.0 - 127.5 if kind == "floats from -0.5 to 0.5" else converted
        assert np.abs(shown - IMAGES).max() <= 1


@pytest.mark.parametrize("keys", [{"obs": 30}, {"obs/camera": 30, "obs/speed": 2}])
def test_an_image_without_channels_is_a_vector_with_a_hint(
    keys: dict[str, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arrays = documented(obs=None, obs_shape=None)
    for key, side in keys.items():
        arrays[key] = np.zeros((5, side, side), np.float32)
        arrays[key.replace("obs", "obs_shape")] = np.array([side, side])
    buffer = load(tmp_path, arrays)
    (line,) = caplog.messages
    assert "(30, 30), which is taken as a vector of 900 numbers. An image has its channels first: (1, 30, 30)" in line
    caplog.clear()
    ReplayBuffer(10, buffer.obs_shape, 2)
    assert caplog.messages == [line]


# Writing


@pytest.mark.parametrize("keys", [("a", "a\0b"), ("a\n",), ("\ud800",)])
def test_a_key_that_no_archive_can_hold_is_refused_when_saving(tmp_path: Path, keys: Any) -> None:
    buffer = ReplayBuffer(5, {key: (1,) for key in keys}, 1)
    with pytest.raises(BufferError, match=r"cannot be saved under the name 'obs/.*Use printable characters"):
        buffer.save(tmp_path / "keys.npz")
    assert not os.listdir(tmp_path)


def test_a_directory_is_no_place_for_a_buffer(tmp_path: Path) -> None:
    with pytest.raises(BufferError, match="is a directory, expected the path of a file"):
        ReplayBuffer(5, (1,), 1).save(tmp_path)
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_a_buffer_error_and_the_old_file_stays(tmp_path: Path) -> None:
    buffer = ReplayBuffer(5, (1,), 1)
    before = saved(tmp_path, buffer)
    buffer.add_episode(np.zeros((2, 1)), np.zeros((1, 1)), [1.0], [True])
    with (
        mock.patch("worldflux.replay.export.write_npz", side_effect=OSError(28, "No space left on device")),
        pytest.raises(BufferError, match=r"a\.npz could not be written: .*No space left.*before is unchanged"),
    ):
        buffer.save(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == before and os.listdir(tmp_path) == ["a.npz"]


def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a.npz"  # the directory is made
    write_npz(path, {"x": np.arange(3)})

    def chunks() -> Iterator[np.ndarray]:
        yield np.zeros(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_npz(path, {"y": npz.ArrayChunks((9,), np.dtype(float), chunks())})
    assert os.listdir(tmp_path / "runs") == ["a.npz"]
    with np.load(path) as file:
        assert file["x"].tolist() == [0, 1, 2]


def test_a_saved_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        ReplayBuffer(5, (1,), 1).save(tmp_path / "a.npz")
        write_atomically(tmp_path / "a.json", b"{}")
    finally:
        os.umask(umask)
    assert [os.stat(tmp_path / name).st_mode & 0o777 for name in ("a.npz", "a.json")] == [0o640, 0o640]
