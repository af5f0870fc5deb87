"""Replay data of DreamerV3: chunks of the reference implementation, and episodes of dreamerv3-torch and V-D4RL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.datasets.columns import Column, Hdf5Columns, NpzColumns, in_order, open_hdf5
from worldflux.datasets.detection import CHUNK_NAME
from worldflux.datasets.flat import Alignment, Renamed, recording_of_episodes
from worldflux.datasets.recording import (
    Block,
    ObsChoice,
    Recording,
    Rows,
    chosen_obs,
    obs_space_like,
    rows_at_once,
    spans,
    steps_of_rows,
)
from worldflux.errors import BufferError, ShapeMismatchError
from worldflux.replay.npz import NpzFile
from worldflux.replay.spec import checked

_NO_OBS = {
    "reward", "discount", "is_first", "is_last", "is_terminal", "reset", "stepid", "consec", "seed", "step_type",
    "action_extra", "logprob",
}  # fmt: skip
"""Arrays beside the observations and actions. Those with a slash in their names are latents and logs."""
_BOOL = np.dtype(np.bool_)
_LAST_STEP = 2
"""`step_type` of an episode's last row in dm_env."""


def open_chunks(source: Any, *, obs: ObsChoice = None, action: str = "action") -> Recording:
    """Opens a directory of replay chunks of DreamerV3's reference implementation.

    Chunks are linked by their names, `time-id-successor-length.npz`; an episode may run across several. The reward and
    the flags of a row came with its observation, and the row's action was chosen then.

    Args:
        source: Path of the directory.
        obs: Names of the observations that are read; None: all of them.
        action: Name of the actions.
    """
    directory = Path(source)
    chains = _chains(directory)
    with NpzFile(chains[0][0]) as file:
        names = file.names
        wanted, is_dict = chosen_obs(directory.name, _observations(names, action), obs)
        used = [*wanted.values(), action, "reward", "is_first", "is_last", "is_terminal"]
        file.require(used)
        like = {key: file.open(name) for key, name in wanted.items()}
        actions = file.open(action)
    steps = episodes = 0
    for chain in chains:
        first = np.concatenate([_read(path, ["is_first"])["is_first"] != 0 for path in chain])
        begins = int(np.count_nonzero(first)) + (not first[0])
        steps, episodes = steps + len(first) - begins, episodes + begins

    def rows(chain: list[Path]) -> Iterator[Rows]:
        for path in chain:
            arrays = _read(path, used)
            flags = [
                checked(f"{path.name}: {name}", arrays[name], (len(arrays[name]),), _BOOL)
                for name in ("is_terminal", "is_first", "is_last")
            ]
            found = {key: arrays[name] for key, name in wanted.items()}
            whole = Rows(found, arrays[action], arrays["reward"], *flags)
            for part in spans(len(whole), rows_at_once(found.values())):
                yield whole.at(part)

    def blocks() -> Iterator[Block]:
        for chain in chains:
            yield from steps_of_rows(rows(chain), "arrives")

    return Recording(
        directory.name,
        obs_space_like(like, is_dict),
        tuple(actions.shape[1:]),
        actions.dtype,
        steps,
        episodes,
        blocks,
    )


def _chains(directory: Path) -> list[list[Path]]:
    """The chunks of each stream in their order; the streams by the time of their first chunk."""
    files = [path for path in sorted(directory.glob("*.npz")) if CHUNK_NAME.fullmatch(path.name)]
    if not files:
        raise BufferError(
            f"{directory} has no chunks of DreamerV3 (time-id-successor-length.npz). Pass the directory 'replay' of "
            "its run."
        )
    by_id = {path.stem.split("-")[1]: path for path in files}
    successors = {path.stem.split("-")[2] for path in files}
    chains: list[list[Path]] = []
    for path in files:
        if path.stem.split("-")[1] not in successors:
            chains.append([])
            following: Path | None = path
            while following is not None and following not in chains[-1][-1:]:
                chains[-1].append(following)
                following = by_id.get(following.stem.split("-")[2])
    if sum(map(len, chains)) != len(files):
        raise BufferError(f"{directory}: the chunks' names do not link them into streams, each of them once.")
    return chains


def _read(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Arrays of one chunk, which have one row for each of its steps."""
    with NpzFile(path) as file:
        file.require(names)
        arrays = {name: file.read(name) for name in names}
    lengths = {name: array.shape[:1] for name, array in arrays.items()}
    if set(lengths.values()) != {(int(path.stem.split("-")[3]),)}:
        raise ShapeMismatchError(f"{path.name} has arrays of {lengths} rows, expected the number in its name for each.")
    return arrays


def _observations(names: list[str], action: str) -> list[str]:
    return [name for name in names if name not in (action, *_NO_OBS) and "/" not in name and "log_" not in name]


def open_episodes(source: Any, *, obs: ObsChoice = None, action: str = "action") -> Recording:
    """Opens episodes of dreamerv3-torch or V-D4RL: a directory with one `.npz` each, or V-D4RL's HDF5 files.

    Everything in a row came together: the action led to the row, and the reward was earned by it. The first row's
    action and reward mean nothing. Where `is_terminal` is missing, an episode terminated if its last discount is 0.

    Args:
        source: Path of the directory, or of one file.
        obs: Names of the observations that are read; None: all of them.
        action: Name of the actions.
    """
    path = Path(source)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    hdf5 = sorted((one for one in files if one.suffix in (".hdf5", ".h5")), key=lambda one: in_order(one.name))
    if hdf5:
        return _open_hdf5(path, hdf5, obs, action)
    episodes = [one for one in files if one.suffix == ".npz"]
    if not episodes:
        raise BufferError(f"{path} has no .npz files of episodes.")
    with NpzFile(episodes[0]) as file:
        wanted, is_dict = chosen_obs(path.name, _observations(file.names, action), obs)

    def columns() -> Iterator[Mapping[str, Column]]:
        for one in episodes:
            with NpzFile(one) as file:
                file.require([*wanted.values(), action, "reward"])
                arrays = NpzColumns(file)
                yield _roles(one.name, arrays, wanted, action, arrays[action].shape[0])

    return recording_of_episodes(path.name, columns, is_dict, Alignment("led_to"))


def _roles(
    name: str, arrays: Mapping[str, Column], wanted: Mapping[str, str], action: str, count: int
) -> Mapping[str, Column]:
    """The arrays of an episode by what they are."""
    terminal = np.zeros(count, np.bool_)
    if "is_terminal" in arrays:
        terminal = np.asarray(arrays["is_terminal"][:]).reshape(-1)
    elif "discount" in arrays:
        terminal[-1] = np.asarray(arrays["discount"][:]).reshape(-1)[-1] == 0
    else:
        raise BufferError(
            f"{name} has neither is_terminal nor discount, which tell whether the episode terminated. Read it with "
            "format='arrays', align='led_to'."
        )
    names = {f"obs/{key}": one for key, one in wanted.items()} | {"actions": action, "rewards": "reward"}
    return Renamed(arrays, names, {"terminations": terminal})


def _open_hdf5(path: Path, files: list[Path], obs: ObsChoice, action: str) -> Recording:
    """The episodes of V-D4RL's HDF5 files, one file after another, told apart by `step_type`."""
    opened = [open_hdf5(one) for one in files]
    arrays = [dict(Hdf5Columns(file)) for file in opened]
    wanted, is_dict = chosen_obs(path.name, _observations(list(arrays[0]), action), obs)

    def episodes() -> Iterator[Mapping[str, Column]]:
        for one, found in zip(files, arrays, strict=True):
            missing = {*wanted.values(), action, "reward", "discount", "step_type"} - found.keys()
            if missing:
                raise BufferError(f"{one.name} has no array '{min(missing)}' (found: {', '.join(sorted(found))}).")
            last = np.asarray(found["step_type"][:]).reshape(-1) == _LAST_STEP
            terminal = last & (np.asarray(found["discount"][:]).reshape(-1) == 0)
            roles = {f"obs/{key}": found[name] for key, name in wanted.items()}
            yield {
                **roles,
                "actions": found[action],
                "rewards": found["reward"],
                "terminations": terminal,
                "is_last": last,
            }

    def close() -> None:
        for file in opened:
            file.close()

    return recording_of_episodes(path.name, episodes, is_dict, Alignment("led_to"), close=close)
