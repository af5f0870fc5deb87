"""Where a buffer's rows lie: in memory, in files that nobody else sees, on a device."""

import errno
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.replay import assert_same_batch

from worldflux.errors import BufferError, ConfigurationError
from worldflux.replay import backends as storage
from worldflux.replay.backends import DeviceArray, DeviceStorage, DiskStorage, Storage, storage_at
from worldflux.replay.buffer import ReplayBuffer
from worldflux.training import create_random_buffer


def places(tmp_path):
    return ["memory", tmp_path / "rows", "cpu"]


def a_buffer(place, **changes):
    arguments = dict(capacity=50, obs_shape=(3,), action_dim=2, extras={"mark": ((2,), np.float16)}, seed=0)
    return ReplayBuffer(**{**arguments, **changes}, storage=place)


def filled(place, **changes):
    buffer = a_buffer(place, **changes)
    rng = np.random.default_rng(0)
    for _ in range(5):
        buffer.add_episode(rng.random((13, 3)), rng.random((12, 2)), rng.random(12))
    return buffer


def assert_same_batches(buffers, seq_len=5):
    batches = [buffer.sample(40, seq_len) for buffer in buffers]
    for batch in batches[1:]:
        assert torch.equal(batch.row_ids, batches[0].row_ids)
        assert_same_batch(batch, batches[0])
    return batches


@pytest.mark.parametrize(
    ("place", "kind", "means"),
    [
        (None, Storage, "memory"),
        ("memory", Storage, "memory"),
        ("cpu", DeviceStorage, torch.device("cpu")),
        (torch.device("cpu"), DeviceStorage, torch.device("cpu")),
        ("rows/of/mine", DiskStorage, Path("rows/of/mine")),
        (Path("cpu"), DiskStorage, Path("cpu")),
        ("./cuda", DiskStorage, Path("cuda")),
        ("cuda_rows", DiskStorage, Path("cuda_rows")),
    ],
)
def test_a_storage_is_memory_or_a_device_or_else_a_directory(tmp_path, monkeypatch, place, kind, means):
    monkeypatch.chdir(tmp_path)
    found = storage_at(place)
    place_of_it = tmp_path / means if isinstance(means, Path) else means
    assert type(found) is kind and found.place == place_of_it
    assert a_buffer(place).storage == place_of_it
    assert (tmp_path / means).is_dir() == (kind is DiskStorage) if isinstance(means, Path) else not os.listdir()


def test_a_storage_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"file', which is a file, expected a directory"):
        a_buffer(tmp_path / "file")
    with pytest.raises(ConfigurationError, match=r"below', and '.*file' is a file, expected a directory"):
        a_buffer(tmp_path / "file" / "below")
    for wrong in ("", 3, ["cuda"]):
        with pytest.raises(ConfigurationError, match="expected 'memory', the path of a directory, or a device"):
            a_buffer(wrong)
    for missing in ("cuda:99", torch.device("cuda", 99)):
        with pytest.raises(ConfigurationError, match="device is 'cuda:99', but torch sees"):
            a_buffer(missing)
    with pytest.raises(ConfigurationError, match=r"dtype uint16 cannot be stored on 'cpu'\. Use a signed"):
        a_buffer("cpu", extras={"mark": ((), np.uint16)})


def test_all_storages_give_the_same_batches_and_the_same_file(tmp_path):
    buffers = [filled(place) for place in places(tmp_path)]
    batches = assert_same_batches(buffers)
    rows = batches[0].row_ids
    for number, buffer in enumerate(buffers):
        values = torch.arange(rows.numel() * 2).reshape(*rows.shape, 2) % 2000
        buffer.update_extras(rows, {"mark": values if number else values.numpy()})
        buffer.grow(70)
    batches = assert_same_batches(buffers)
    assert batches[0].extras["mark"].any()
    written = []
    for number, buffer in enumerate(buffers):
        buffer.save(tmp_path / f"{number}.npz")
        written.append((tmp_path / f"{number}.npz").read_bytes())
    assert written[0] == written[1] == written[2]
    loaded = [
        ReplayBuffer.load(tmp_path / "0.npz", extras=buffers[0].extras, seed=1, storage=place)
        for place in places(tmp_path)
    ]
    assert [buffer.storage for buffer in loaded] == ["memory", tmp_path / "rows", torch.device("cpu")]
    assert_same_batches(loaded)


def test_bytes_and_dictionaries_lie_in_every_storage(tmp_path):
    shapes = {"camera": (3, 8, 8), "speed": (2,)}
    batches = []
    for place in places(tmp_path):
        buffer = create_random_buffer(60, shapes, 2, 4, 20, seed=0, storage=place)
        batches.append(buffer.sample(30, 7))
        assert batches[-1].obs["camera"].dtype == torch.uint8
        store = buffer.stored()[0]
        arrays = [*store.obs.values(), store.actions, store.rewards, store.flags]
        assert buffer.nbytes == sum(array.nbytes for array in arrays) == 120 * (192 + 8 + 8 + 4 + 1)
    for batch in batches[1:]:
        assert all(torch.equal(batch.obs[key], batches[0].obs[key]) for key in shapes)


def test_of_several_values_for_one_row_of_a_device_the_last_stays():
    array = DeviceArray(torch.zeros(5, 2), np.dtype(np.float32))

    class Strict(torch.Tensor):
        def __setitem__(self, at, values):
            assert not values.dim() or len(at.unique()) == at.numel()  # a device would write them in any order
            super().__setitem__(at, values)

    array.tensor = array.tensor.as_subclass(Strict)
    at = np.array([[3, 1], [3, 0]])
    array[at] = np.arange(8).reshape(2, 2, 2)
    assert array[np.array([0, 1, 2, 3])].tolist() == [[6, 7], [2, 3], [0, 0], [4, 5]]
    array[np.array([4, 4, 0])] = torch.tensor([[1.0, 1], [2, 2], [3, 3]], dtype=torch.float64)
    assert array[np.array([[0], [4]])].tolist() == [[[3, 3]], [[2, 2]]]
    array[np.array([0, 0])] = 9
    assert array[np.array([0])].tolist() == [[9, 9]] and (array.shape, array.nbytes) == ((5, 2), 40)


@pytest.mark.skipif(os.name != "posix", reason="files without a name are POSIX's")
def test_files_of_a_disk_buffer_have_no_name_and_their_space_returns_with_it(tmp_path):
    buffers = [filled(tmp_path, capacity=100_000) for _ in range(2)]  # they share the directory
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert mapped.read_text().count(str(tmp_path)) == 8
    assert not list(tmp_path.iterdir())
    assert_same_batches(buffers)
    del buffers
    gc.collect()
    assert not mapped.exists() or str(tmp_path) not in mapped.read_text()


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
def test_a_killed_process_leaves_no_files(tmp_path):
    code = (
        "import os, sys; from worldflux.training import create_random_buffer\n"
        "buffer = create_random_buffer(1000, (3,), 2, 5, 20, storage=sys.argv[1])\n"
        "print(len(buffer), flush=True); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "rows")], capture_output=True, text=True)
    assert (killed.returncode, killed.stdout) == (-9, "100\n")
    assert list(tmp_path.iterdir()) == [tmp_path / "rows"] and not list((tmp_path / "rows").iterdir())


def test_a_full_disk_is_an_error_when_the_buffer_is_made_and_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(
        BufferError, match=r"of 1,000,000,000,000 transitions takes .* TB, and '.*' has .* of free disk"
    ):
        a_buffer(tmp_path, capacity=10**12)

    def full(file, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "posix_fallocate", full, raising=False)
    with pytest.raises(BufferError, match=r"cannot have \d+ bytes in '.*': .*No space left"):
        a_buffer(tmp_path)
    assert not list(tmp_path.iterdir())
    buffer = filled("memory")
    buffer.stored()[0].storage = DiskStorage(tmp_path)
    before = buffer.sample(3, 3, "cpu").obs.shape
    with pytest.raises(BufferError, match="No space left"):
        buffer.grow(100)
    assert buffer.capacity == 50 and buffer.sample(3, 3).obs.shape == before


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_reserves_nothing_still_stores(tmp_path, monkeypatch, error):
    def cannot(file, offset, size):
        raise OSError(error, "not supported")

    monkeypatch.setattr(storage.os, "posix_fallocate", cannot, raising=False)
    assert_same_batches([filled(tmp_path), filled("memory")])
    monkeypatch.delattr(storage.os, "posix_fallocate")
    assert_same_batches([filled(tmp_path), filled("memory")])


def test_a_device_without_room_says_both_numbers_before_it_is_asked(monkeypatch):
    monkeypatch.setattr(storage, "free_device_memory", lambda device: 2_000_000)
    message = (
        r"A replay buffer of 100,000 transitions takes 3\.1 MB, and 'cpu' has 2\.0 MB of free memory\. "
        r"Use a smaller capacity \(64,000 would fit\), or storage='memory'\."
    )
    with pytest.raises(BufferError, match=message):
        a_buffer("cpu", capacity=100_000)
    assert filled("cpu", capacity=60_000).num_transitions == 60
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    with pytest.raises(BufferError, match=r"cannot have \d+ bytes on 'cpu': CUDA"):
        a_buffer("cpu")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_batches_are_sampled_ahead_while_another_thread_writes_extras_back(tmp_path, number):
    buffer = filled(places(tmp_path)[number])
    plain = filled("memory")
    ahead, stop = [], threading.Event()

    def sample_ahead():
        while not stop.is_set():
            ahead.append(buffer.sample_ahead(4, 5))

    thread = threading.Thread(target=sample_ahead)
    thread.start()
    marks = []
    while len(ahead) < 20:
        rows = torch.arange(20, 60).reshape(8, 5)
        marks.append(len(marks) + 1.0)
        buffer.update_extras(rows, {"mark": torch.full((8, 5, 2), marks[-1] % 1000)})
        assert buffer.extras_of(rows)["mark"].unique().tolist() == [marks[-1] % 1000]
    stop.set()
    thread.join()
    for batch in ahead:
        expected = plain.sample(4, 5)
        assert (
            batch.extras == {} and torch.equal(batch.row_ids, expected.row_ids) and torch.equal(batch.obs, expected.obs)
        )


def test_extras_of_rows_that_were_overwritten_are_zero(tmp_path):
    for place in places(tmp_path):
        buffer = filled(place, capacity=24)
        batch = buffer.sample(30, 4)
        buffer.update_extras(batch.row_ids, {"mark": torch.ones(30, 4, 2)})
        assert torch.equal(buffer.extras_of(batch.row_ids)["mark"], torch.ones(30, 4, 2, dtype=torch.float16))
        buffer.add_episode(np.zeros((13, 3)), np.zeros((12, 2)), np.zeros(12))
        oldest = buffer.num_windows(1)
        gone = batch.row_ids < int(buffer.sample(40 * oldest, 1).row_ids.min())
        marks = buffer.extras_of(batch.row_ids)["mark"]
        assert gone.any() and not gone.all()
        assert not marks[gone].any() and marks[~gone].all()
