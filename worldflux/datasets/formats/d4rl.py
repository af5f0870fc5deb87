"""Flat arrays of D4RL (HDF5 or `.npz`) and OGBench (`.npz`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worldflux.datasets.columns import Column, Hdf5Columns, NpzColumns, is_hdf5, open_hdf5
from worldflux.datasets.flat import Alignment, flat_recording
from worldflux.datasets.recording import Recording
from worldflux.errors import BufferError
from worldflux.replay.npz import NpzFile
from worldflux.validation import SINGLE_KEY

NO_REWARDS = "it has no rewards, which are stored as zeros."


def open_source(source: Any, *, time_limit: int | None = None) -> Recording:
    """Opens a file of D4RL: a row for each step, which has its own reward.

    The last observations of episodes are known where the file has `next_observations`, otherwise not: the next row is
    another episode's first.

    Args:
        source: Path of an HDF5 or `.npz` file.
        time_limit: Number of steps after which an episode was cut, for files without `timeouts`.
    """
    path = Path(source)
    arrays, close = _arrays(path)
    names = {
        f"obs/{SINGLE_KEY}": "observations",
        f"next_obs/{SINGLE_KEY}": "next_observations",
        "actions": "actions",
        "rewards": "rewards",
        "terminations": "terminals",
        "truncations": "timeouts",
    }
    _require(path, arrays, ("observations", "actions", "rewards", "terminals"))
    found = {role: arrays[name] for role, name in names.items() if name in arrays}
    notes = []
    if "truncations" not in found and time_limit is None:
        notes.append(
            "it has no 'timeouts': where a time limit cut an episode, it runs on into the next one. Pass time_limit if "
            "there was one."
        )
    how = Alignment(time_limit=time_limit)
    return flat_recording(path.name, found, False, how, notes=notes, close=close)


def open_ogbench(source: Any) -> Recording:
    """Opens a file of OGBench: the last row of each path, marked in `terminals`, holds its last observation only.

    A path's end is no termination, and there are no rewards.

    Args:
        source: Path of an `.npz` file.
    """
    path = Path(source)
    arrays, close = _arrays(path)
    _require(path, arrays, ("observations", "actions", "terminals"))
    found = {f"obs/{SINGLE_KEY}": arrays["observations"], "actions": arrays["actions"], "is_last": arrays["terminals"]}
    notes = [NO_REWARDS]
    if "rewards" in arrays:
        found["rewards"], notes = arrays["rewards"], []
    return flat_recording(path.name, found, False, Alignment(final_row=True), notes=notes, close=close)


def _arrays(path: Path) -> tuple[Mapping[str, Column], Any]:
    """The arrays of a file, and what closes it."""
    if is_hdf5(path):
        file = open_hdf5(path)
        return Hdf5Columns(file), file.close
    archive = NpzFile(path)
    return NpzColumns(archive), archive.close


def _require(path: Path, arrays: Mapping[str, Column], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in arrays]
    if missing:
        raise BufferError(
            f"{path.name} has no array {', '.join(map(repr, missing))} (found: {', '.join(sorted(arrays)) or 'none'}). "
            "Pass format='arrays' and keys to say what its arrays are."
        )
