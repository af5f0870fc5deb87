"""Buffers in files under fire: damaged bytes, made-up arrays, hostile archives.

The rule: a file loads, or it is a `BufferError`; it never runs code, and it takes no memory that it does not fill.
"""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.replay import documented, with_table
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from worldflux.errors import BufferError
from worldflux.training import ReplayBuffer

fuzzed = settings(deadline=None, derandomize=True)


def bytes_of(arrays: dict[str, Any], save: Any = np.savez) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def members_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def npy(header: str, data: bytes = b"") -> bytes:
    """An `.npy` member with a header of one's own."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + data


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fuzz") / "own" / "place"
    place.mkdir(parents=True)
    return place


def load(place: Path, data: bytes) -> ReplayBuffer:
    (place / "a.npz").unlink(missing_ok=True)  # some file systems wait for the disk where a file is replaced
    (place / "a.npz").write_bytes(data)
    return ReplayBuffer.load(place / "a.npz")


def saved(place: Path, buffer: ReplayBuffer) -> bytes:
    """Everything that a buffer holds; equal buffers give equal bytes."""
    (place / "saved.npz").unlink(missing_ok=True)
    buffer.save(place / "saved.npz")
    return (place / "saved.npz").read_bytes()


# Damaged bytes

WHOLE = {
    "saved by numpy": bytes_of(documented()),
    "compressed": bytes_of(documented(), np.savez_compressed),
    "with a table of episodes": bytes_of(with_table()),
}
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "drop", "insert"]), st.floats(0, 1), st.integers(1, 255), st.booleans()
    ),
    min_size=1,
    max_size=3,
)


def damaged(whole: bytes, edits: list[tuple[str, float, int, bool]]) -> bytes:
    data = bytearray(whole)
    for kind, where, value, near_end in edits:
        # Half of the damage hits the table of contents, where zip keeps sizes and offsets.
        table = max(0, data.rfind(b"PK\x01\x02") - 400) if near_end else 0
        at = table + int(where * max(0, len(data) - 1 - table))
        if not data:
            break
        if kind == "flip":
            data[at] ^= value
        elif kind == "set":
            data[at : at + 4] = bytes([value] * len(data[at : at + 4]))
        elif kind == "cut":
            del data[at:]
        elif kind == "drop":
            del data[at : at + value]
        else:
            data[at:at] = bytes([value] * (1 + value % 9))
    return bytes(data)


@pytest.mark.parametrize("kind", WHOLE)
@settings(fuzzed, max_examples=250)
@given(edits=EDITS)
@example(edits=[("cut", 0.5, 1, False)])
@example(edits=[("set", 0.1015625, 2, True)])  # a name so long that it swallows the entries behind it
def test_a_damaged_file_is_refused_or_gives_what_was_saved(place: Path, kind: str, edits: Any) -> None:
    data = damaged(WHOLE[kind], edits)
    try:
        buffer = load(place, data)
    except BufferError:
        return
    assert saved(place, buffer) == saved(place, load(place, WHOLE[kind]))


def test_every_single_byte_matters_or_changes_nothing(place: Path) -> None:
    whole, outcomes = bytes_of(documented()), {"refused": 0, "the same": 0}
    expected = saved(place, load(place, whole))
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= (1, 0xFF, 4)[at % 3]
        try:
            buffer = load(place, bytes(data))
        except BufferError:
            outcomes["refused"] += 1
        else:
            outcomes["the same"] += 1
            assert saved(place, buffer) == expected, at
    assert min(outcomes.values()) > 100


def test_a_header_that_asks_for_less_or_more_than_there_is_is_refused(place: Path) -> None:
    """Half as many bytes for each number would be read as other numbers, and the checksum never reached."""
    members = members_of(bytes_of(documented()))
    members["obs.npy"] = members["obs.npy"][:-4]
    with pytest.raises(BufferError, match=r"array 'obs' of shape \(5, 2\) needs 40 bytes, the file has 36"):
        load(place, zipped(members))
    members = members_of(bytes_of(documented()))
    members["rewards.npy"] = members["rewards.npy"].replace(b"<f4", b"<f2")
    with pytest.raises(BufferError, match=r"array 'rewards' of shape \(5,\) needs 10 bytes, the file has 20"):
        load(place, zipped(members))


def test_the_checksum_of_an_array_without_rows_is_compared_too(place: Path) -> None:
    empty = {name: documented()[name][:0] for name in ("obs", "actions", "rewards", "dones")}
    data = bytearray(bytes_of(documented(**empty)))
    assert len(load(place, bytes(data))) == 0
    data[data.index(b"(0,), }") + 7] = ord("\t")  # another kind of space in a header
    with pytest.raises(BufferError, match="cannot be read: Bad CRC-32"):
        load(place, bytes(data))


# Made-up arrays

NAMES = (*with_table(), "obs/a", "obs/b", "obs_shape/a", "final_obs/a", "other")
ARRAYS = npst.arrays(
    dtype=st.one_of(npst.scalar_dtypes(), st.sampled_from([np.dtype("<i8"), np.dtype("?")])),
    shape=npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
)


ANYTHING = st.one_of(st.none(), st.just(np.array([None] * 5)), ARRAYS)


@settings(fuzzed, max_examples=200)
@given(
    base=st.sampled_from([documented, with_table]),
    changes=st.dictionaries(st.sampled_from(NAMES), ANYTHING, min_size=1, max_size=3),
    save=st.sampled_from([np.savez, np.savez_compressed]),
)
def test_any_arrays_at_all_load_or_are_a_buffer_error(place: Path, base: Any, changes: Any, save: Any) -> None:
    try:
        buffer = load(place, bytes_of(base(**changes), save))
    except BufferError as error:
        assert "a.npz" in str(error) or "memory" in str(error)
        return
    assert saved(place, load(place, saved(place, buffer))) == saved(place, buffer)


FLAGGED: list[str] = []


def flag(text: str) -> str:
    FLAGGED.append(text)
    return text


class Flagging:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self) -> Any:
        return flag, ("unpickled",)


@pytest.mark.parametrize("name", [*with_table()])
def test_an_array_of_objects_is_never_unpickled(place: Path, name: str) -> None:
    hostile = bytes_of(with_table(**{name: np.array([Flagging()], object)}))
    with pytest.raises(BufferError, match=f"a.npz: array '{name}' has dtype object, expected numbers. Objects are nev"):
        load(place, hostile)
    assert not FLAGGED
    with np.load(io.BytesIO(hostile), allow_pickle=True) as file:
        file[name]
    assert FLAGGED == ["unpickled"]  # numpy would have run it
    FLAGGED.clear()


TABLE = "a table of episodes"
WRONG: dict[str, tuple[Any, str]] = {
    "missing": (
        documented(dones=None),
        r"a.npz has no array 'dones' \(found: action_dim, actions, capacity, obs, obs_",
    ),
    "missing obs": (documented(obs=None), "no array 'obs'"),
    "missing two": (documented(actions=None, capacity=None), "no array 'actions', 'capacity'"),
    "another name": (documented(dones=None, terminals=np.zeros(5)), "Rename 'terminals' to 'dones'"),
    "both names": (documented(truncations=np.zeros(5), timeouts=np.zeros(5)), "truncations and timeouts, which mean"),
    "wrong shape": (documented(obs=np.zeros((5, 3))), r"obs has shape \(5, 3\), but there are 5 actions and obs_shape"),
    "fewer obs": (documented(obs=np.zeros((4, 2))), r"obs has shape \(4, 2\), but there are 5 actions"),
    "wrong obs_shape": (documented(obs_shape=np.array([3])), r"obs has shape \(5, 2\).*obs_shape is \(3,\)"),
    "wide actions": (documented(actions=np.zeros((5, 2))), r"actions have shape \(5, 2\).*action_dim 1"),
    "flat actions": (documented(actions=np.zeros(5)), r"actions have shape \(5,\), expected \[N, action_dim\]"),
    "lengths": (documented(dones=np.zeros(4)), r"dones has shape \(4,\), expected \(5,\)"),
    "truncations": (documented(truncations=np.zeros(3)), r"truncations has shape \(3,\)"),
    "NaN": (documented(obs=np.full((5, 2), np.nan)), r"a.npz: obs has nan at index \(0, 0\), expected finite numbers"),
    "infinity": (documented(obs=np.full((5, 2), np.inf)), "a.npz: obs has inf"),
    "a reward": (documented(rewards=np.array([0, 0, np.nan, 0, 0])), r"rewards has nan at index \(2,\)"),
    "flags": (documented(dones=np.array([0, 0, 3, 0, 1])), "dones has values other than 0 and 1"),
    "a number": (documented(obs=np.zeros(5), obs_shape=np.zeros(0, int)), r"obs_shape is \(\), .* of a number is \(1,"),
    "channel-last": (
        documented(obs=np.zeros((5, 64, 64, 3), np.uint8), obs_shape=np.array([64, 64, 3])),
        r"a.npz: obs_shape \(64, 64, 3\) looks like a channel-last image",
    ),
    "no action": (documented(action_dim=np.array(0)), "action_dim is 0, expected a whole number of at least 1"),
    "two widths": (documented(action_dim=np.array([1, 2])), r"action_dim is \[1 2\], expected a whole number"),
    "huge action_dim": (documented(action_dim=np.array(2**61)), r"actions have shape \(5, 1\), expected .* 230584300"),
    "small capacity": (documented(capacity=np.array(4)), "capacity is 4, but has 5 transitions. Pass capacity="),
    "huge capacity": (documented(capacity=np.array(2**61)), r"\bmemory\b"),
    "negative capacity": (documented(capacity=np.array(-5)), "capacity is -5, expected a whole number of at least 1"),
    "float capacity": (documented(capacity=np.array(20.0)), "capacity is 20.0, expected a whole number"),
    "many numbers": (documented(capacity=np.zeros(99, int)), r"capacity has shape \(99,\), expected at most 64"),
    "text": (documented(rewards=np.array(["x"] * 5)), "dtype <U1"),
    "complex": (documented(rewards=np.zeros(5, complex)), "array 'rewards' has dtype complex128, expected numbers"),
    "dates": (documented(rewards=np.zeros(5, "M8[s]")), r"array 'rewards' has dtype datetime64\[s\], expected numbers"),
    "structured": (documented(rewards=np.zeros(5, "f4,f4")), "array 'rewards' has dtype .*, expected numbers"),
    "too large": (documented(rewards=np.full(5, 1e300)), r"rewards has inf at index \(0,\)"),
    "bytes": (documented(obs=np.full((5, 1, 8, 8), 256), obs_shape=np.array([1, 8, 8])), "from 256 to 256, expected 0"),
    f"half of {TABLE}": (documented(episode_lengths=np.array([3, 2])), "no array 'episode_streams'"),
    f"{TABLE}: streams": (
        with_table(n_envs=np.array(2**21), capacity=np.array(2**22)),
        r"n_envs is 2097152, expected at most capacity \(4194304\) and 1048576",
    ),
    f"{TABLE}: n_envs": (with_table(n_envs=np.array(21)), "n_envs is 21, expected at most capacity"),
    f"{TABLE}: a number": (
        with_table(**{name: np.array(1) for name in ("episode_lengths", "episode_streams", "episode_ends")}),
        r"episode_lengths has shape \(\), expected one number for each",
    ),
    f"{TABLE}: too many": (
        with_table(episode_lengths=np.ones(9, int)),
        r"episode_lengths has shape \(9,\), expected one number for each of 0 to 5 episodes",
    ),
    f"{TABLE}: short": (
        with_table(episode_lengths=np.array([3, 1])),
        "episode_lengths add up to 4, expected .* the 5 transitions",
    ),
    f"{TABLE}: negative": (
        with_table(episode_lengths=np.array([6, -1])),
        "episode_lengths add up to 5, expected numbers from 1",
    ),
    f"{TABLE}: ends": (with_table(episode_lengths=np.array([2, 3])), "do not lie at the ends"),
    f"{TABLE}: floats": (
        with_table(episode_lengths=np.array([3.0, 2.0])),
        "episode_lengths has dtype float64, expected whole numbers",
    ),
    f"{TABLE}: stream": (with_table(episode_streams=np.array([0, 1])), r"outside of 0 to n_envs - 1 \(0\)"),
    f"{TABLE}: in flight": (with_table(episode_ends=np.array([0, 1])), "do not lie at the ends"),
    f"{TABLE}: starts": (with_table(episode_starts=np.array([1, 0])), "another one follows it"),
    f"{TABLE}: mask": (
        with_table(episode_ends=np.array([1, 0]), dones=np.array([0, 0, 1, 0, 0])),
        "final_obs_mask is set",
    ),
    f"{TABLE}: final_obs": (with_table(final_obs=np.zeros((3, 2))), "final_obs has shape"),
    f"{TABLE}: NaN": (with_table(final_obs=np.full((2, 2), np.nan)), "a.npz: final_obs has nan"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_named(place: Path, kind: str) -> None:
    arrays, message = WRONG[kind]
    with pytest.raises(BufferError, match=message):
        load(place, bytes_of(arrays))


FORMATS = {
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "but an HDF5 file. worldflux.datasets.load reads"),
    "Parquet": (b"PAR1" + bytes(100), "but a Parquet file.*pandas"),
    "pickle": (pickle.dumps({"observations": [1]}), "but a pickle.*never read here"),
    "old pickle": (pickle.dumps({"observations": [1]}, protocol=2), "but a pickle"),
    "Arrow": (b"ARROW1\0\0" + bytes(100), "but an Arrow file"),
    "gzip": (gzip.compress(b"x"), "compressed with gzip"),
    "SQLite": (b"SQLite format 3\0" + bytes(100), "but an SQLite database"),
    "empty": (b"", "but an empty one"),
    "one array": (b"\x93NUMPY" + bytes(100), r"but a \.npy file with a single array"),
    "text": (b"not a zip", "but a text file"),
    "CSV": (b"obs,\taction\r\n0.1,2", "but a text file.*pandas"),
    "xz": (b"\xfd7zXZ\x00", "compressed with xz"),
    "Zstandard": (b"\x28\xb5\x2f\xfd", "compressed with Zstandard"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS.*git lfs pull"),
    "torch": (zipped({"archive/data.pkl": b""}), "but a pickle"),
    "other bytes": (bytes(20), "damaged or cut short"),
    "cut": (b"PK\x03\x04" + bytes(100), "damaged or cut short"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_of_another_format_is_called_what_it_is(kind: str, place: Path) -> None:
    content, message = FORMATS[kind]
    with pytest.raises(BufferError, match=message):
        load(place, content)


def test_no_file_and_a_directory_are_called_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no file 'none\.npz'"):
        ReplayBuffer.load(tmp_path / "none.npz")
    with pytest.raises(BufferError, match=r"has no \.npz files, expected those that"):
        ReplayBuffer.load(tmp_path)


# Hostile archives

HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 2), }"
HOSTILE: dict[str, tuple[dict[str, bytes], int, str]] = {
    "a claim of terabytes": ({"obs.npy": npy(HUGE)}, zipfile.ZIP_STORED, "needs 8000000000000 bytes, the file has 0"),
    "rows beyond all measure": (
        {"actions.npy": npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': (0, {2**61})}}")}
        | members_of(bytes_of({"action_dim": np.array(2**61)})),
        zipfile.ZIP_STORED,
        r"actions.* cannot be read|obs has shape \(5, 2\), but there are 0 actions",
    ),
    "an expanding array": (
        members_of(bytes_of({"rewards": np.zeros(4_000_000)})),
        zipfile.ZIP_DEFLATED,
        r"rewards has shape \(4000000,\), expected \(5,\)",
    ),
    "unlimited compression": ({}, zipfile.ZIP_LZMA, "is compressed in a way that NumPy does not use"),
    "no header": ({"obs.npy": b"\x93NUMPY"}, zipfile.ZIP_STORED, "array 'obs' cannot be read"),
    "code for a header": ({"obs.npy": npy("__import__('os')")}, zipfile.ZIP_STORED, "array 'obs' cannot be read"),
    "a negative shape": (
        {"obs.npy": npy(HUGE.replace("1000", "-1000"))},
        zipfile.ZIP_STORED,
        "shape is|cannot be",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_refused_at_no_cost(place: Path, kind: str) -> None:
    members, compression, message = HOSTILE[kind]
    data = zipped({**members_of(bytes_of(documented())), **members}, compression)
    tracemalloc.start()
    try:
        with pytest.raises(BufferError, match=message):
            load(place, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3e6


def test_a_table_of_contents_that_lies_about_a_size_is_refused_before_reading(place: Path) -> None:
    data = bytearray(bytes_of(documented(rewards=np.zeros(5, "<f4"))))
    entry = data.index(b"rewards.npy", data.index(b"PK\x01\x02")) - 46
    header = len(members_of(bytes(data))["rewards.npy"]) - 20
    claimed = 2**31
    members = members_of(bytes(data))
    lying = npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({claimed // 4},), }}".ljust(header - 11))
    assert len(lying) == header
    at = data.index(members["rewards.npy"])
    data[at : at + header] = lying
    struct.pack_into("<II", data, entry + 20, header + claimed, header + claimed)
    with pytest.raises(BufferError, match=r"rewards.* needs 2147483648 bytes, the file has \d{4}\."):
        load(place, bytes(data))


def test_two_arrays_of_one_name_are_refused(place: Path) -> None:
    file = io.BytesIO(bytes_of(documented()))
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("rewards.npy", archive.read("rewards.npy"))
    with pytest.raises(BufferError, match=r"a.npz has several arrays 'rewards', expected one of each name"):
        load(place, file.getvalue())


def test_names_that_point_elsewhere_are_only_names(place: Path) -> None:
    members = members_of(bytes_of(documented()))
    evil = {**members, "../../evil.npy": members["obs.npy"], "/etc/evil.npy": members["obs.npy"], "notes.txt": b"hello"}
    assert saved(place, load(place, zipped(evil))) == saved(place, load(place, bytes_of(documented())))
    found = {path for path in place.parent.parent.rglob("*") if path.is_file()}
    assert found == {place / "a.npz", place / "saved.npz"}
    del evil["obs.npy"]
    with pytest.raises(BufferError, match="no array 'obs'"):
        load(place, zipped(evil))
