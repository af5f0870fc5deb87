"""Which format a source has, from its content."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from worldflux.datasets.columns import hdf5_names, is_hdf5, open_hdf5
from worldflux.errors import BufferError, ConfigurationError, a_type
from worldflux.reading import only_our_errors, open_regular
from worldflux.replay.npz import NpzFile

_MINARI_ID = re.compile(r"([\w-]+/)*[\w-]+-v\d+")
_WORLDFLUX = {"obs_shape", "action_dim", "capacity"}
_MOST_NAMES = 1000
"""Arrays of an HDF5 file that are looked at."""
CHUNK_NAME = re.compile(r"[^-]+-[^-]+-[^-]+-\d+\.npz")
"""Name of a chunk of DreamerV3: time, id, the successor's id, and number of rows."""


def detect(source: Any) -> str:
    """The format of a source.

    Args:
        source: As for `load`.

    Returns:
        One of `FORMATS`.

    Raises:
        FileNotFoundError: If there is no such file.
        ConfigurationError: If the format cannot be told, with what was found.
        BufferError: If the source is damaged.
    """
    if isinstance(source, Mapping) or (isinstance(source, Sequence) and not isinstance(source, str | bytes)):
        return "arrays"
    if not isinstance(source, str | Path):
        return _of_object(source)
    path = Path(source)
    with only_our_errors(path.name or source, BufferError):
        return _of_path(path)


def _of_path(path: Path) -> str:
    if path.is_dir():
        return _of_directory(path)
    if not path.exists():
        if _MINARI_ID.fullmatch(str(path)):
            return "minari"
        raise FileNotFoundError(f"There is no file '{path.name}' (looked for {path.absolute()}).")
    if is_hdf5(path):
        with open_hdf5(path) as file:
            return _of_names(path, list(islice(hdf5_names(file), _MOST_NAMES)))
    with open_regular(path) as opened:
        start = opened.read(4)
    if start == b"PK\x03\x04" and path.suffix in (".pt", ".pth"):
        return "tdmpc2"
    with NpzFile(path) as archive:
        return _of_names(path, archive.names)


def _of_object(source: Any) -> str:
    if hasattr(source, "observations") and hasattr(source, "n_envs"):
        return "sb3"
    if hasattr(source, "storage") and hasattr(source, "iterate_episodes"):
        return "minari"
    raise ConfigurationError(
        f"The source is {a_type(source)}, expected a path, a replay buffer of SB3, a dict of arrays, or a list of such "
        "dicts."
    )


def _of_directory(path: Path) -> str:
    if any((path / inside / "metadata.json").is_file() for inside in ("", "data")):
        return "minari"
    if (path / "meta" / "info.json").is_file():
        return "lerobot"
    names = sorted(one.name for one in path.iterdir() if one.is_file())
    files = [name for name in names if name.endswith((".npz", ".hdf5", ".h5", ".pt"))]
    if not files:
        shown = ", ".join(names[:10]) or "nothing"
        raise ConfigurationError(
            f"{path} has no files of a data set (found: {shown}). Pass the directory that holds them, or one file."
        )
    if CHUNK_NAME.fullmatch(files[0]):
        return "dreamerv3"
    if files[0].endswith(".npz"):
        with NpzFile(path / files[0]) as archive:
            found = set(archive.names)
        if found >= _WORLDFLUX:
            return "worldflux"
        if {"action", "reward"} <= found and found & {"is_first", "discount"}:
            return "dreamerv3-torch"
        raise _unknown(path / files[0], sorted(found))
    return "tdmpc2" if files[0].endswith(".pt") else detect(path / files[0])


def _of_names(path: Path, names: Sequence[str]) -> str:
    found = {name.partition("/")[0] for name in names}
    if found >= _WORLDFLUX:
        return "worldflux"
    if any(name.startswith("data/demo") for name in names):
        return "robomimic"
    if found >= {"observation", "step_type", "discount"}:
        return "dreamerv3-torch"
    if found >= {"observations", "actions", "terminals"} and ("rewards" in found or "timeouts" not in found):
        return "d4rl" if "rewards" in found else "ogbench"  # of which the last row of an episode holds no step
    raise _unknown(path, names)


def _unknown(path: Path, names: Sequence[str]) -> ConfigurationError:
    shown = ", ".join(sorted(names)[:20]) + (", ..." if len(names) > 20 else "")
    return ConfigurationError(
        f"{path.name} has the arrays {shown or '(none)'}, which are those of no known format. Pass the format, or say "
        "what the arrays are: format='arrays', keys={'obs': ..., 'actions': ..., 'rewards': ...}."
    )
