"""Demonstrations of robomimic: an HDF5 file with a group for each episode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.datasets.columns import Column, hdf5_arrays, in_order, open_hdf5
from worldflux.datasets.flat import Alignment, recording_of_episodes
from worldflux.datasets.formats.d4rl import NO_REWARDS
from worldflux.datasets.recording import ObsChoice, Recording, chosen_obs
from worldflux.errors import BufferError
from worldflux.validation import check_choice


def open_source(source: Any, *, obs: ObsChoice = None, ends: str = "termination") -> Recording:
    """Opens a file with the groups `data/demo_i`.

    Args:
        source: Path of the file.
        obs: Names of the observations that are read, such as "robot0_eef_pos"; None: all of them.
        ends: What a `done` in an episode's last row means: "termination", or "truncation" for demonstrations that were
            merely stopped there.
    """
    check_choice("ends", ends, ("termination", "truncation"))
    path = Path(source)
    file = open_hdf5(path)
    demos: dict[str, dict[str, Any]] = {}
    for path_in, array in (hdf5_arrays(file["data"]) if "data" in file else {}).items():
        demo, _, inner = path_in.partition("/")
        demos.setdefault(demo, {})[inner] = array
    ordered = [demos[name] for name in sorted(demos, key=in_order) if name.startswith("demo")]
    if not ordered:
        raise BufferError(f"{path.name} has no groups data/demo_0 and so on, as robomimic writes them.")
    first = ordered[0]
    available = [name.removeprefix("obs/") for name in first if name.startswith("obs/")]
    folder = "obs/" if available else ""
    available = available or [name for name in first if name == "states"]
    wanted, is_dict = chosen_obs(path.name, available, obs)
    inside = 0  # dones before the last row
    roles = {f"obs/{key}": f"{folder}{name}" for key, name in wanted.items()}
    has_next = all(f"next_obs/{name}" in first for name in wanted.values())
    if has_next and folder:
        roles |= {f"next_obs/{key}": f"next_obs/{name}" for key, name in wanted.items()}
    roles |= {"actions": "actions"} | ({"rewards": "rewards"} if "rewards" in first else {})
    for number, arrays in enumerate(ordered):
        for name in roles.values():
            if name not in arrays:
                raise BufferError(f"{path.name}: the demonstration {number} has no array '{name}'.")
        if "dones" in arrays:
            inside += int(np.count_nonzero(arrays["dones"][:-1]))

    def episodes() -> Iterator[Mapping[str, Column]]:
        for demo in ordered:
            found = {role: demo[name] for role, name in roles.items()}
            if "dones" in demo and ends == "termination":
                found["terminations"] = np.append(np.zeros(len(demo["dones"]) - 1), demo["dones"][-1:])
            yield found

    notes = [] if "rewards" in first else [NO_REWARDS]
    if "dones" not in first:
        notes.append("it has no 'dones': all episodes count as truncated.")
    elif ends == "termination":
        notes.append(
            "a done in the last row of an episode counts as a termination. Pass ends='truncation' if demonstrations "
            "were merely stopped there."
        )
    if inside:
        notes.append(f"{inside} rows that are not the last of their episode are marked as done, which is ignored.")
    return recording_of_episodes(path.name, episodes, is_dict, Alignment(), notes=notes, close=file.close)
