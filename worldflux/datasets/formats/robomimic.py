"""Demonstrations of robomimic: an HDF5 file with a group for each episode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.datasets.columns import Column, Hdf5Columns, hdf5_entry, hdf5_group, in_order, open_hdf5
from worldflux.datasets.flat import Alignment, Renamed, recording_of_episodes
from worldflux.datasets.formats.d4rl import NO_REWARDS
from worldflux.datasets.recording import ObsChoice, Recording, chosen_obs
from worldflux.errors import BufferError


def open_source(source: Any, *, obs: ObsChoice = None, ends: str = "termination") -> Recording:
    """Opens a file with the groups `data/demo_i`.

    Args:
        source: Path of the file.
        obs: Names of the observations that are read, such as "robot0_eef_pos"; None: all of them.
        ends: What a `done` in an episode's last row means: "termination", or "truncation" for demonstrations that were
            merely stopped there.
    """
    path = Path(source)
    file = open_hdf5(path)
    demos = hdf5_entry(file, "data") or {}
    named = (name for name in demos if name.startswith("demo"))
    ordered = sorted((name for name in named if hdf5_group(demos, name) is not None), key=in_order)
    if not ordered:
        raise BufferError(f"{path.name} has no groups data/demo_0 and so on, as robomimic writes them.")
    first = dict(Hdf5Columns(hdf5_group(demos, ordered[0])))
    available = [name.removeprefix("obs/") for name in first if name.startswith("obs/")]
    folder = "obs/" if available else ""
    available = available or [name for name in first if name == "states"]
    wanted, is_dict = chosen_obs(path.name, available, obs)
    roles = {f"obs/{key}": f"{folder}{name}" for key, name in wanted.items()}
    has_next = all(f"next_obs/{name}" in first for name in wanted.values())
    if has_next and folder:
        roles |= {f"next_obs/{key}": f"next_obs/{name}" for key, name in wanted.items()}
    roles |= {"actions": "actions"} | ({"rewards": "rewards"} if "rewards" in first else {})
    inside: dict[str, int] = {}  # dones before the last row of an episode

    def episodes() -> Iterator[Mapping[str, Column]]:
        for name in ordered:
            arrays = Hdf5Columns(hdf5_group(demos, name))
            more: dict[str, Column] = {}
            if "dones" in first:
                dones = np.asarray(arrays["dones"][:])
                inside[name] = int(np.count_nonzero(dones[:-1]))
                if ends == "termination":
                    more["terminations"] = np.append(np.zeros(max(len(dones) - 1, 0)), dones[-1:])
            yield Renamed(arrays, roles, more)

    notes = [] if "rewards" in first else [NO_REWARDS]
    if "dones" not in first:
        notes.append("it has no 'dones': all episodes count as truncated.")
    elif ends == "termination":
        notes.append(
            "a done in the last row of an episode counts as a termination. Pass ends='truncation' if demonstrations "
            "were merely stopped there."
        )
    recording = recording_of_episodes(path.name, episodes, is_dict, Alignment(), notes=notes, close=file.close)
    if any(inside.values()):
        notes.append(
            f"{sum(inside.values())} rows that are not the last of their episode are marked as done, which is ignored."
        )
    return recording
