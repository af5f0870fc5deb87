"""Whatever a buffer holds comes back from its file, and bad data leaves a buffer bit by bit as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.replay import seen
from hypothesis import given, settings
from hypothesis import strategies as st

from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError
from worldflux.training import ReplayBuffer

fuzzed = settings(deadline=None, derandomize=True)

OBS: dict[str, tuple[Any, Any]] = {
    "vector": ((2,), None),
    "image": ((1, 4, 4), None),
    "floats as image": ((1, 4, 4), np.float32),
    "bytes as vector": ((3,), np.uint8),
    "dictionary": ({"camera": (1, 4, 4), "speed/left": (1,), "größe": (2, 2)}, None),
}


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    with mock.patch("os.fsync"):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("roundtrips")


def saved(place: Path, buffer: ReplayBuffer, name: str = "a.npz") -> bytes:
    (place / name).unlink(missing_ok=True)  # some file systems wait for the disk where a file is replaced
    buffer.save(place / name)
    return (place / name).read_bytes()


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
)
def test_any_buffer_comes_back_from_its_file(
    place: Path, kind: str, n_envs: int, capacity: int, life: Any, later: Any
) -> None:
    shape, dtype = OBS[kind]
    buffer = ReplayBuffer(capacity, shape, 2, obs_dtype=dtype, n_envs=n_envs, seed=0)
    live(buffer, life, dtype)
    data = saved(place, buffer)
    loaded = ReplayBuffer.load(place / "a.npz", seed=0)
    for name in ("capacity", "obs_shape", "action_dim", "n_envs", "num_transitions", "num_episodes"):
        assert getattr(loaded, name) == getattr(buffer, name), name
    if buffer.num_transitions:
        assert loaded.obs_dtype == buffer.obs_dtype
    seq_len = 1
    while buffer.num_windows(seq_len):
        assert loaded.num_windows(seq_len) == buffer.num_windows(seq_len)
        assert_same(buffer.sample(40, seq_len), loaded.sample(40, seq_len))
        seq_len += 3
    assert saved(place, loaded, "b.npz") == data
    # Episodes in flight go on, and what comes later drops the same old rows.
    live(buffer, later, dtype)
    live(loaded, later, dtype)
    assert saved(place, loaded, "b.npz") == saved(place, buffer)
    assert_documented(place / "a.npz", buffer)


def assert_same(batch: Any, other: Any) -> None:
    for name in ("actions", "rewards", "terminations", "truncations", "is_first"):
        assert torch.equal(getattr(batch, name), getattr(other, name)), name
    assert torch.equal(seen(batch), seen(other))
    assert isinstance(batch.obs, dict) == isinstance(other.obs, dict)
    for mine, its in zip(
        *([x.obs.values() if isinstance(x.obs, dict) else [x.obs] for x in (batch, other)]), strict=True
    ):
        assert torch.equal(mine, its) and mine.dtype == its.dtype


def assert_documented(path: Path, buffer: ReplayBuffer) -> None:
    """The documented keys are there for everybody who has NumPy, in the documented shapes."""
    count = buffer.num_transitions
    shapes = buffer.obs_shape if isinstance(buffer.obs_shape, dict) else {"": buffer.obs_shape}
    with np.load(path, allow_pickle=False) as file:
        for key, shape in shapes.items():
            name = f"/{key}" if key else ""
            assert file[f"obs{name}"].shape == (count, *shape)
            assert file[f"obs_shape{name}"].tolist() == list(shape)
        assert file["actions"].shape == (count, buffer.action_dim) and file["actions"].dtype == np.float32
        assert file["rewards"].shape == (count,) and file["rewards"].dtype == np.float32
        assert file["dones"].shape == (count,) and file["dones"].dtype == np.bool_
        assert (int(file["action_dim"]), int(file["capacity"])) == (buffer.action_dim, buffer.capacity)
        assert file["episode_lengths"].sum() == count


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
    (place / "c.npz").unlink(missing_ok=True)
    save(place / "c.npz", **arrays)
    buffer = ReplayBuffer.load(place / "c.npz", seed=0)
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


@pytest.mark.parametrize("keys", [("a", "a\0b"), ("a\n",), ("\ud800",)])
def test_a_key_that_no_archive_can_hold_is_refused_when_saving(place: Path, keys: Any) -> None:
    buffer = ReplayBuffer(5, {key: (1,) for key in keys}, 1)
    with pytest.raises(BufferError, match=r"cannot be saved under the name 'obs/.*Use printable characters"):
        buffer.save(place / "keys.npz")
    assert not (place / "keys.npz").exists()


def test_a_full_disk_is_a_buffer_error_and_the_old_file_stays(tmp_path: Path) -> None:
    buffer = ReplayBuffer(5, (1,), 1)
    buffer.save(tmp_path / "a.npz")
    before = (tmp_path / "a.npz").read_bytes()
    buffer.add_episode(np.zeros((2, 1)), np.zeros((1, 1)), [1.0], [True])
    with (
        mock.patch("worldflux.replay.npz._write_array", side_effect=OSError(28, "No space left on device")),
        pytest.raises(BufferError, match=r"a\.npz could not be written: .*No space left.*before is unchanged"),
    ):
        buffer.save(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npz"]
    with pytest.raises(ConfigurationError, match=r"a\.npz' is a file"):
        buffer.save(tmp_path / "a.npz" / "b.npz")


# Bad data


def good() -> dict[str, Any]:
    return dict(
        obs=np.arange(8.0).reshape(4, 2), actions=np.ones((3, 2)), rewards=np.ones(3), dones=np.array([0, 0, 1])
    )


BAD_VALUES = st.sampled_from(
    [
        None, "text", [], {}, 3.0, [[1.0], [2.0, 3.0]], np.nan, np.inf, -np.inf, 1e300, 2, -1, 0.5, 1j, "object",
        "longer", "shorter", "wider", "deeper", "flat", "dictionary",
    ]
)  # fmt: skip


def spoiled(array: np.ndarray, how: Any, where: int) -> Any:
    """`array` made wrong; a number is put in one of its places."""
    if isinstance(how, (int, float, complex)) and how != 3.0:
        changed = array.astype(complex if isinstance(how, complex) else float)
        changed.reshape(-1)[where % changed.size] = how
        return changed
    spoils: dict[str, Any] = {
        "object": lambda: np.array([None] * len(array), object),
        "longer": lambda: np.concatenate([array, array, array]),
        "shorter": lambda: array[:-2],
        "wider": lambda: np.stack([array, array], -1),
        "deeper": lambda: array[None],
        "flat": lambda: array.sum(),
        "dictionary": lambda: {"obs": array},
    }
    return spoils[how]() if isinstance(how, str) and how in spoils else how


@settings(fuzzed, max_examples=250)
@given(
    name=st.sampled_from(["obs", "actions", "rewards", "dones", "truncations", "terminations"]),
    how=BAD_VALUES,
    where=st.integers(0, 7),
)
def test_bad_data_leaves_a_buffer_bit_by_bit_as_it_was(place: Path, name: str, how: Any, where: int) -> None:
    buffer = ReplayBuffer(6, (2,), 2, seed=0)
    buffer.add_episode(**good())
    buffer.add_episode(**good())  # full
    before = saved(place, buffer), buffer.rng_state()
    arguments = good()
    arguments[name] = spoiled(arguments.get(name, arguments["dones"]), how, where)
    try:
        buffer.add_episode(**arguments)
    except (BufferError, ShapeMismatchError) as error:
        assert name in str(error) or "rows" in str(error) or "pass one of them" in str(error)
        assert (saved(place, buffer), buffer.rng_state()) == before
    else:  # these are good data
        flags = name not in ("obs", "actions", "rewards")
        assert how is None if flags else how in (2, -1, 0.5)
        assert len(buffer) == 6 and np.isfinite(buffer.sample(50, 2).rewards.numpy()).all()
