"""Measures how fast windows are sampled from files in place, compared with reading the files from end to end.

    python benchmarks/disk.py                                  # 5 GB of images in 16 files, removed afterwards
    python benchmarks/disk.py --gigabytes 2 --directory /mnt/disk

The files hold episodes of 500 transitions with 3x64x64 images, as `ReplayBuffer.save` writes them. In alternating turns
of a process of its own, with as many bytes in each turn:

    sequential   the files are read in pieces of 4 MB, as `dd bs=4M` does
    16x50        batches of 16 windows of 50 rows are sampled from a buffer with storage="in_place"; 256x4 accordingly
    mapped       the same windows of 16x50 are copied from the files with `numpy.memmap`
    memory       the same batches of 16x50 are sampled from a buffer in memory that holds the first file

For cold turns, the files are dropped from the system's cache before each turn (`posix_fadvise`, Linux); for warm ones
they have been read before, which needs as much free memory as there are files. Values are medians of MB of observations
per second of wall-clock time. The process reports its peak resident memory after a turn of each batch size in place;
the cache does not count. In a container with less memory than the files, warm turns show what is left of the cache:

    mkdir /sys/fs/cgroup/memory/small && echo 2G > /sys/fs/cgroup/memory/small/memory.limit_in_bytes
    sh -c 'echo $$ > /sys/fs/cgroup/memory/small/cgroup.procs; exec python benchmarks/disk.py'

The results are written to `benchmarks/results/disk.csv`.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from worldflux.accel.memory import human
from worldflux.training import ReplayBuffer

RESULTS = Path(__file__).parent / "results" / "disk.csv"
SHAPE, EPISODE, ROW = (3, 64, 64), 500, 3 * 64 * 64
PIECE = 4 * 2**20


def write_files(directory: Path, gigabytes: float, files: int) -> int:
    """Writes the files and returns their number of transitions."""
    rng, episodes = np.random.default_rng(0), max(1, round(gigabytes * 1e9 / files / EPISODE / ROW))
    for number in range(files):
        buffer = ReplayBuffer(episodes * EPISODE, SHAPE, 6)
        for _ in range(episodes):
            obs = rng.integers(256, size=(EPISODE + 1, *SHAPE), dtype=np.uint8)
            buffer.add_episode(obs, rng.uniform(-1, 1, (EPISODE, 6)), rng.random(EPISODE))
        buffer.save(directory / f"{number:03}.npz")
    return episodes * EPISODE * files


def drop(paths: list[Path]) -> None:
    """Removes files from the system's cache."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sequential(paths: list[Path]) -> Callable[[int], None]:
    """Reads the given number of bytes, in one file after another."""
    target = bytearray(PIECE)
    number = 0

    def read(size: int) -> None:
        nonlocal number
        while size > 0:
            with paths[number % len(paths)].open("rb", buffering=0) as file:
                while size > 0 and (count := file.readinto(target)):
                    size -= count
            number += 1

    return read


def sampled(buffer: ReplayBuffer, windows: int, length: int) -> Callable[[int], None]:
    """Samples the given number of bytes of observations."""

    def read(size: int) -> None:
        for _ in range(max(1, size // (windows * length * ROW))):
            buffer.sample(windows, length)

    return read


def mapped(paths: list[Path], windows: int, length: int) -> Callable[[int], None]:
    """Copies as many windows from mapped files. A few bytes of header at their beginning do not matter."""
    maps = [np.memmap(path, np.uint8, "r") for path in paths]
    rng = np.random.default_rng(0)

    def read(size: int) -> None:
        for _ in range(max(1, size // (windows * length * ROW))):
            batch = np.empty((windows, length * ROW), np.uint8)
            for window in batch:
                chosen = maps[rng.integers(len(maps))]
                start = rng.integers(len(chosen) - len(window))
                window[:] = chosen[start : start + len(window)]

    return read


def main() -> int:
    """Writes the files, measures, and prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of all files")
    parser.add_argument("--files", type=int, default=16, help="number of files")
    parser.add_argument("--directory", type=Path, default=None, help="where to write them; default: the system's own")
    parser.add_argument("--turns", type=int, default=5, help="turns of each kind")
    parser.add_argument("--megabytes", type=float, default=500.0, help="observations in each turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        directory, size = Path(place), int(options.megabytes * 1e6)
        if (process := os.fork()) == 0:  # so that the writing does not count in the peak memory
            write_files(directory, options.gigabytes, options.files)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
            return 1
        paths = sorted(directory.iterdir())
        drop(paths)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        started = time.perf_counter()
        buffer = ReplayBuffer.load(directory, storage="in_place", seed=0)
        loaded = time.perf_counter() - started
        kinds = {
            "sequential": sequential(paths),
            "16x50": sampled(buffer, 16, 50),
            "256x4": sampled(buffer, 256, 4),
        }
        for kind in ("16x50", "256x4"):
            kinds[kind](size)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before anything is mapped or loaded
        found: dict[tuple[str, str], list[float]] = {}
        for state in ("cold", "warm"):
            if state == "warm":
                sequential(paths)(sum(path.stat().st_size for path in paths))
                kinds["memory"] = sampled(ReplayBuffer.load(paths[0], seed=0), 16, 50)
            kinds["mapped"] = mapped(paths, 16, 50)
            for _ in range(options.turns):
                for kind, read in kinds.items():
                    if state == "cold":
                        kinds["mapped"] = mapped(paths, 16, 50)  # mapped pages cannot be dropped
                        drop(paths)
                    part = size // 10 if kind == "mapped" and state == "cold" else size
                    started = time.perf_counter()
                    read(part)
                    found.setdefault((state, kind), []).append(part / 1e6 / (time.perf_counter() - started))
    rows = {key: statistics.median(values) for key, values in found.items()}
    print(f"{buffer.num_transitions:,} transitions, {human(buffer.num_transitions * ROW)}, {options.files} files")
    print(
        f"loaded in place in {loaded:.2f} s; peak memory {human(peak)}, {human(peak - before)} more than before loading"
    )
    for (state, kind), speed in rows.items():
        share = speed / rows[state, "sequential"]
        print(f"{state:5} {kind:10} {speed:7.0f} MB/s  {speed * 1e6 / ROW:9,.0f} rows/s  {share:5.2f} of sequential")
    with RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["state", "kind", "mb_per_second"])
        writer.writerows([*key, round(speed)] for key, speed in rows.items())
    return 0


if __name__ == "__main__":
    sys.exit(main())
