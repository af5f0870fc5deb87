"""Measures how fast `worldflux.datasets.load` reads each format, and the memory that it takes beside the buffer.

    python benchmarks/importing.py                          # a million vectors, then 100,000 images: 4 GB of disk
    python benchmarks/importing.py --kind vector --rows 100000 --formats d4rl minari

Each format is written to a temporary directory and read in a process of its own: episodes of 500 steps with
observations of 24 numbers, or images of 64 x 64 pixels in three colours, and 6 numbers of action. The columns are

    rows/s     steps per second of processor time
    copies     that time, in units of copying the same rows once within memory with NumPy
    memory     the largest amount of memory that the process took while reading, as a share of the buffer's size; files
               that are mapped into memory do not count, and neither does what was in memory before

The table is printed; the exit status is 1 if the memory is above `--most`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

EPISODE, ACTIONS = 500, 6
ROWS = {"vector": 1_000_000, "image": 100_000}
Source = Callable[[Path, str, int], Any]


def episode(kind: str, extra: int = 0) -> dict[str, np.ndarray]:
    """Arrays of one episode, with `extra` further rows. `[EPISODE + extra, ...]`"""
    rng, count = np.random.default_rng(0), EPISODE + extra
    if kind == "vector":
        obs: np.ndarray = rng.standard_normal((count, 24), dtype=np.float32)
    else:  # pictures that can be compressed, as those of simulators
        coarse = rng.integers(256, size=(count, 8, 8, 3), dtype=np.uint8)
        obs = coarse.repeat(8, axis=1).repeat(8, axis=2)
    return {
        "obs": obs,
        "actions": rng.uniform(-1, 1, (count, ACTIONS)).astype(np.float32),
        "rewards": rng.standard_normal(count, dtype=np.float32),
    }


def flat(kind: str, rows: int, extra: int = 0) -> dict[str, np.ndarray]:
    """Arrays of all episodes, with flags of their last rows."""
    one, count = episode(kind, extra), rows // EPISODE
    arrays = {name: np.tile(array, (count, *[1] * (array.ndim - 1))) for name, array in one.items()}
    return {**arrays, "ends": np.tile(np.arange(EPISODE + extra) == EPISODE + extra - 1, count)}


def d4rl(directory: Path, kind: str, rows: int) -> Path:
    """An HDF5 file of D4RL."""
    import h5py

    arrays = flat(kind, rows)
    with h5py.File(directory / "data.hdf5", "w") as file:
        for name, key in (
            ("observations", "obs"),
            ("actions", "actions"),
            ("rewards", "rewards"),
            ("timeouts", "ends"),
        ):
            file[name] = arrays[key]
        file["terminals"] = np.zeros(len(arrays["ends"]), np.bool_)
    return directory / "data.hdf5"


def ogbench(directory: Path, kind: str, rows: int) -> Path:
    """An `.npz` of OGBench; it is compressed."""
    arrays = flat(kind, rows, 1)
    path = directory / "data.npz"
    np.savez_compressed(path, observations=arrays["obs"], actions=arrays["actions"], terminals=arrays["ends"])
    return path


def minari(directory: Path, kind: str, rows: int) -> Path:
    """A data set of Minari, with raw images."""
    import os

    os.environ["MINARI_DATASETS_PATH"] = str(directory)
    import minari
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    one, last = episode(kind, 1), np.arange(EPISODE) == EPISODE - 1
    obs_space = spaces.Box(-9, 9, (24,)) if kind == "vector" else spaces.Box(0, 255, one["obs"].shape[1:], np.uint8)

    buffer = EpisodeBuffer(
        observations=one["obs"],
        actions=one["actions"][:-1],
        rewards=list(one["rewards"][:-1]),
        terminations=list(last & False),
        truncations=list(last),
        infos={},
    )
    warnings.simplefilter("ignore", UserWarning)  # about an author and the like

    minari.create_dataset_from_buffers(
        "test/speed-v0",
        [buffer] * (rows // EPISODE),
        observation_space=obs_space,
        action_space=spaces.Box(-1, 1, (ACTIONS,)),
        jpeg_encoding=False,
    )
    return directory / "test/speed-v0"


def robomimic(directory: Path, kind: str, rows: int) -> Path:
    """Demonstrations of robomimic."""
    import h5py

    one = episode(kind, 1)
    with h5py.File(directory / "data.hdf5", "w") as file:
        for number in range(rows // EPISODE):
            demo = file.create_group(f"data/demo_{number}")
            demo["obs/state"], demo["next_obs/state"] = one["obs"][:-1], one["obs"][1:]
            demo["actions"], demo["rewards"] = one["actions"][:-1], one["rewards"][:-1]
            demo["dones"] = np.arange(EPISODE) == EPISODE - 1
    return directory / "data.hdf5"


def dreamerv3(directory: Path, kind: str, rows: int) -> Path:
    """Chunks of 1,024 rows of DreamerV3; they are compressed."""
    one, total = episode(kind, 1), rows + rows // EPISODE
    for number, start in enumerate(range(0, total, 1024)):
        at = np.arange(start, min(start + 1024, total)) % (EPISODE + 1)
        np.savez_compressed(
            directory / f"{number:09d}-{number}-{number + 1}-{len(at)}.npz",
            state=one["obs"][at],
            action=one["actions"][at],
            reward=one["rewards"][at],
            is_first=at == 0,
            is_last=at == EPISODE,
            is_terminal=np.zeros(len(at), np.bool_),
        )
    return directory


def dreamerv3_torch(directory: Path, kind: str, rows: int) -> Path:
    """Episodes of dreamerv3-torch; they are compressed."""
    one = episode(kind, 1)
    flags = {"is_first": np.arange(EPISODE + 1) == 0, "is_terminal": np.zeros(EPISODE + 1, np.bool_)}
    for number in range(rows // EPISODE):
        arrays = {"state": one["obs"], "action": one["actions"], "reward": one["rewards"], **flags}
        np.savez_compressed(directory / f"{number:06d}-{EPISODE + 1}.npz", **arrays)
    return directory


def tdmpc2(directory: Path, kind: str, rows: int) -> Path:
    """A file of TD-MPC2."""
    import torch

    arrays, shape = flat(kind, rows, 1), (rows // EPISODE, EPISODE + 1)
    named = {"obs": "obs", "action": "actions", "reward": "rewards"}
    content = {
        name: torch.from_numpy(arrays[key]).reshape(*shape, *arrays[key].shape[1:]) for name, key in named.items()
    }
    torch.save(content, directory / "data.pt")
    return directory / "data.pt"


def lerobot(directory: Path, kind: str, rows: int) -> Path:
    """A data set of LeRobot, version 3; images are PNG in the tables."""
    import json

    import cv2
    import pyarrow as pa
    import pyarrow.parquet as pq

    one = episode(kind)
    images = [{"bytes": cv2.imencode(".png", image)[1].tobytes()} for image in one["obs"]] if kind == "image" else None
    features = {"observation.state": {"dtype": "float32" if images is None else "image"}}
    for folder in ("meta", "data/chunk-000"):
        (directory / folder).mkdir(parents=True)
    (directory / "meta/info.json").write_text(json.dumps({"features": features, "fps": 10}))
    for file, start in enumerate(range(0, rows // EPISODE, 50)):
        numbers = np.arange(start, min(start + 50, rows // EPISODE))
        state = pa.FixedSizeListArray.from_arrays(pa.array(np.tile(one["obs"].reshape(-1), len(numbers))), 24)
        table = pa.table(
            {
                "observation.state": state if images is None else pa.array(images * len(numbers)),
                "action": pa.FixedSizeListArray.from_arrays(
                    pa.array(np.tile(one["actions"].reshape(-1), len(numbers))), ACTIONS
                ),
                "next.reward": pa.array(np.tile(one["rewards"], len(numbers))),
                "episode_index": pa.array(np.repeat(numbers, EPISODE)),
            }
        )
        pq.write_table(table, directory / f"data/chunk-000/file-{file:03d}.parquet")
    return directory


def sb3(directory: Path, kind: str, rows: int) -> Any:
    """A replay buffer of SB3, filled by hand."""
    from gymnasium import spaces
    from stable_baselines3.common.buffers import ReplayBuffer

    arrays = flat(kind, rows)
    shape = arrays["obs"].shape[1:]
    space = spaces.Box(-9, 9, shape) if kind == "vector" else spaces.Box(0, 255, shape, np.uint8)
    buffer = ReplayBuffer(rows, space, spaces.Box(-1, 1, (ACTIONS,)))
    for place, name in ((buffer.observations, "obs"), (buffer.next_observations, "obs"), (buffer.actions, "actions")):
        place[:, 0] = arrays[name]
    buffer.rewards[:, 0], buffer.dones[:, 0], buffer.timeouts[:, 0] = arrays["rewards"], arrays["ends"], arrays["ends"]
    buffer.full = True
    return buffer


def in_memory(directory: Path, kind: str, rows: int) -> dict[str, np.ndarray]:
    """Flat arrays in memory."""
    arrays = flat(kind, rows)
    return {**{name: arrays[name] for name in ("obs", "actions", "rewards")}, "truncations": arrays["ends"]}


def npz(directory: Path, kind: str, rows: int) -> Path:
    """Flat arrays in an `.npz` file that is not compressed."""
    np.savez(directory / "data.npz", **in_memory(directory, kind, rows))
    return directory / "data.npz"


FORMATS: dict[str, tuple[str, Source]] = {
    "arrays in memory": ("arrays", in_memory),
    "arrays, .npz": ("arrays", npz),
    "d4rl": ("d4rl", d4rl),
    "ogbench": ("ogbench", ogbench),
    "minari": ("minari", minari),
    "robomimic": ("robomimic", robomimic),
    "lerobot": ("lerobot", lerobot),
    "dreamerv3": ("dreamerv3", dreamerv3),
    "dreamerv3-torch": ("dreamerv3-torch", dreamerv3_torch),
    "tdmpc2": ("tdmpc2", tdmpc2),
    "sb3": ("sb3", sb3),
}
WITHOUT_FILE = (in_memory, sb3)


def own_memory() -> int:
    """Bytes of memory that the process holds, without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


class Peak:
    """The largest amount of own memory while the context lasts."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = own_memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, own_memory())

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def read(name: str, path: str, kind: str, rows: int) -> None:
    """Reads a source and prints its row of the table."""
    import logging

    logging.disable(logging.WARNING)
    from worldflux.datasets import load

    format, make = FORMATS[name]
    source = make(Path(path), kind, rows) if make in WITHOUT_FILE else path
    with tempfile.TemporaryDirectory() as directory:  # what is imported at the first use does not count
        load(make(Path(directory), kind, 2 * EPISODE), format=format)
    before = own_memory()
    with Peak() as peak:
        started = time.process_time()
        buffer = load(source, format=format, progress=False)
        seconds = time.process_time() - started
    assert len(buffer) == rows, (len(buffer), rows)
    stored, _ = buffer.stored()
    size = stored.bytes_taken
    arrays = [*stored.obs.values(), stored.actions, stored.rewards]
    targets = [np.empty_like(array) for array in arrays]
    started = time.process_time()
    for target, array in zip(targets, arrays, strict=True):
        np.copyto(target, array)
    copy = time.process_time() - started
    memory = (peak.bytes - before) / size
    print(f"{name:18} {kind:7} {rows / seconds:>11,.0f} {seconds / copy:>8.1f} {memory:>8.2f}")


def main() -> int:
    """Writes and reads each format; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=ROWS, nargs="*", default=list(ROWS))
    parser.add_argument("--rows", type=int)
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--most", type=float, default=1.2, help="largest share of memory (default: 1.2)")
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        read(*given.read, given.kind[0], given.rows)
        return 0
    print(f"{'format':18} {'kind':7} {'rows/s':>11} {'copies':>8} {'memory':>8}", flush=True)
    worst = 0.0
    for kind in given.kind:
        rows = given.rows or ROWS[kind]
        for name in given.formats:
            make = FORMATS[name][1]
            with tempfile.TemporaryDirectory() as directory:
                path = directory if make in WITHOUT_FILE else str(make(Path(directory), kind, rows))
                command = [sys.executable, __file__, "--kind", kind, "--rows", str(rows), "--read", name, path]
                line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(line, end="", flush=True)
            worst = max(worst, float(line.split()[-1]))
    return int(worst > given.most)


if __name__ == "__main__":
    sys.exit(main())
