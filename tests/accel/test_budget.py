"""What the machine has left, and what is refused before it fails."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from worldflux.accel import memory as budget
from worldflux.accel.memory import free_device_memory, free_disk, free_memory, human
from worldflux.errors import BufferError, ConfigurationError
from worldflux.replay import backends as storage
from worldflux.replay.backends import Storage
from worldflux.replay.buffer import ReplayBuffer
from worldflux.training import create_random_buffer

GB = 10**9


def machine(root, files):
    for path, text in {"proc/meminfo": "MemTotal: 32000000 kB\nMemAvailable:   8000000 kB\n", **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_free_memory_is_what_the_machine_has_available(tmp_path):
    assert free_memory(machine(tmp_path, {})) == 8_000_000 * 1024


def test_a_container_of_version_2_counts_with_its_parents_and_without_cached_files(tmp_path):
    top = "sys/fs/cgroup"
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job/task\n",
            f"{top}/job/task/memory.max": "max\n",
            f"{top}/job/task/memory.current": "100\n",
            f"{top}/job/memory.max": f"{4 * GB}\n",
            f"{top}/job/memory.current": f"{3 * GB}\n",
            f"{top}/job/memory.stat": f"anon {2 * GB}\ninactive_file {GB // 2}\nactive_file {GB // 4}\nshmem {GB}\n",
        },
    )
    assert free_memory(root) == GB + GB // 2 + GB // 4
    (root / top / "job/memory.max").write_text(f"{GB}\n")  # lowered below what is used
    assert free_memory(root) == 0
    (root / "proc/self/cgroup").write_text("0::/\n")  # as a container sees itself
    machine(root, {f"{top}/memory.max": f"{2 * GB}", f"{top}/memory.current": f"{GB}"})
    assert free_memory(root) == GB


def test_a_container_of_version_1_counts_also_where_its_path_is_the_one_outside(tmp_path):
    top = "sys/fs/cgroup/memory"
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n",
            f"{top}/memory.limit_in_bytes": f"{6 * GB}\n",
            f"{top}/memory.usage_in_bytes": f"{5 * GB}\n",
            f"{top}/memory.stat": f"cache 7\ntotal_inactive_file {GB}\ntotal_active_file 0\n",
        },
    )
    assert free_memory(root) == 2 * GB
    machine(
        root,
        {f"{top}/docker/abc/memory.limit_in_bytes": f"{GB}", f"{top}/docker/abc/memory.usage_in_bytes": f"{GB // 4}"},
    )
    assert free_memory(root) == GB - GB // 4
    (root / top / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # none
    (root / top / "docker/abc/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert free_memory(root) == 8_000_000 * 1024


def test_without_proc_all_memory_counts_and_without_sysconf_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(budget.os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert free_memory(tmp_path) == 4_096_000
    monkeypatch.delattr(budget.os, "sysconf")
    assert free_memory(tmp_path) is None


def test_free_disk_is_that_of_the_file_system_even_before_the_directory_is_made(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(budget.shutil, "disk_usage", lambda path: asked.append(path) or SimpleNamespace(free=7))
    assert free_disk(tmp_path / "not" / "yet") == 7 and asked == [tmp_path]
    monkeypatch.chdir(tmp_path)
    assert free_disk(Path("not/yet")) == 7 and asked[1].absolute() == tmp_path


def test_a_cuda_device_has_what_is_free_there_and_what_torch_holds_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GB)
    assert free_device_memory(torch.device("cuda", 0)) == 7 * GB
    assert free_device_memory(torch.device("mps")) is None
    monkeypatch.setattr(budget, "free_memory", lambda: 5)
    assert free_device_memory(torch.device("cpu")) == 5


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (13_147_000_000, "13.1 GB"), (999_960, "1.0 MB")],
)
def test_bytes_are_said_with_their_unit(count, text):
    assert human(count) == text


def memory_of(monkeypatch, free):
    monkeypatch.setattr(storage, "free_memory", lambda: free)


def test_a_buffer_that_will_not_fit_is_refused_with_both_numbers_and_what_would_fit(monkeypatch):
    buffer = ReplayBuffer(1_000_000, (3, 64, 64), 6)  # made in any case: it may never be filled
    memory_of(monkeypatch, 7_900_000_000)
    message = (
        "A replay buffer of 1,000,000 transitions takes 13.1 GB, and this machine has 7.9 GB of free memory. "
        "Use a smaller capacity (600,000 would fit), or storage='<directory>' to keep it on disk."
    )
    with pytest.raises(BufferError) as refused:
        buffer.check_budget()
    assert str(refused.value) == message
    ReplayBuffer(600_000, (3, 64, 64), 6).check_budget()
    buffer.check_budget(500_000)
    buffer.check_budget(steps=np.int64(590_000))
    with pytest.raises(BufferError, match=r"Storing 700,000 more transitions in the replay buffer takes 9\.2 GB, and"):
        buffer.check_budget(700_000)
    with pytest.raises(ConfigurationError, match="steps is -1"):
        buffer.check_budget(-1)
    memory_of(monkeypatch, None)  # the system does not tell
    buffer.check_budget()


def test_memory_that_is_taken_already_is_not_counted_again(monkeypatch):
    buffer = ReplayBuffer(100_000, (1000,), 1)
    rows = buffer.stored()[0].ring
    for _ in range(4):
        buffer.add_episode(np.zeros((10_001, 1000)), np.zeros((10_000, 1)), np.zeros(10_000))
    row_bytes = buffer.nbytes // rows
    rest = (rows - 40_004) * row_bytes
    memory_of(monkeypatch, rest)
    buffer.check_budget()
    memory_of(monkeypatch, rest - 1)
    with pytest.raises(
        BufferError, match=r"which holds 40,000 transitions, up to 100,000 takes 265\.6 MB, and .*99,000"
    ):
        buffer.check_budget()
    memory_of(monkeypatch, 0)
    for _ in range(7):
        buffer.add_episode(np.zeros((10_001, 1000)), np.zeros((10_000, 1)), np.zeros(10_000))
    buffer.check_budget()  # full: new rows take the place of old ones
    buffer.check_budget(10**9)


def test_growing_needs_memory_for_a_copy_and_counts_from_there(monkeypatch):
    buffer = ReplayBuffer(100, (1000,), 1)
    for _ in range(3):
        buffer.add_episode(np.zeros((51, 1000)), np.zeros((50, 1)), np.zeros(50))
    assert buffer.num_transitions == 100
    memory_of(monkeypatch, 100_000)
    with pytest.raises(BufferError, match=r"100 transitions, which changing its size needs, takes .* kB, and"):
        buffer.grow(1000)
    assert buffer.capacity == 100
    memory_of(monkeypatch, GB)
    buffer.grow(1000)
    rows = buffer.stored()[0]
    left = buffer.nbytes - 102 * (buffer.nbytes // rows.ring)  # 102 of 153 rows were moved, the rest is new
    memory_of(monkeypatch, left)
    buffer.check_budget()
    memory_of(monkeypatch, left - 1)
    with pytest.raises(BufferError, match="up to 1,000"):
        buffer.check_budget()


def test_loading_and_random_buffers_are_checked_before_they_are_filled(tmp_path, monkeypatch):
    create_random_buffer(10_000, (1000,), 2, 2, 100, seed=0).save(tmp_path / "buffer.npz")
    memory_of(monkeypatch, 850_000)
    with pytest.raises(BufferError, match=r"Storing 200 more transitions .* takes 85\d\.\d kB"):
        ReplayBuffer.load(tmp_path / "buffer.npz")
    with pytest.raises(BufferError, match=r"Storing 200 more transitions"):
        create_random_buffer(10_000, (1000,), 2, 2, 100, seed=0)
    assert ReplayBuffer.load(tmp_path / "buffer.npz", capacity=100).num_transitions == 100
    assert ReplayBuffer.load(tmp_path / "buffer.npz", storage=tmp_path / "rows").num_transitions == 200


def test_on_disk_and_on_devices_all_was_reserved_at_the_start(tmp_path, monkeypatch):
    buffers = [ReplayBuffer(1000, (3,), 1, storage=place) for place in (tmp_path, "cpu")]
    memory_of(monkeypatch, 0)
    for buffer in buffers:
        buffer.check_budget()
        buffer.check_budget(10**9)


@pytest.mark.parametrize("shape", [(3,), (24,), (3, 64, 64), (1, 84, 84)])
@pytest.mark.parametrize("n_envs", [1, 16])
@pytest.mark.parametrize("capacity", [100_000, 1_000_000, 10_000_000])
def test_a_large_buffer_takes_at_most_a_tenth_more_than_its_raw_data(monkeypatch, shape, n_envs, capacity):
    monkeypatch.setattr(Storage, "zeros", lambda self, shape, dtype: np.zeros((0, *shape[1:]), dtype))
    raw = capacity * (math.prod(shape) * (1 if len(shape) == 3 else 4) + 6 * 4 + 4 + 2)  # with two flags
    assert raw < ReplayBuffer(capacity, shape, 6, n_envs=n_envs).nbytes <= 1.1 * raw
