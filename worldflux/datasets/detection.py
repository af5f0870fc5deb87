"""Which format a source has, from its content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from worldflux.datasets.columns import hdf5_arrays, is_hdf5, open_hdf5
from worldflux.errors import ConfigurationError
from worldflux.replay.npz import NpzFile

_WORLDFLUX = {"obs_shape", "action_dim", "capacity"}


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
    if isinstance(source, Mapping) or (isinstance(source, Sequence) and not isinstance(source, str)):
        return "arrays"
    if not isinstance(source, str | Path):
        raise ConfigurationError(
            f"The source is a {type(source).__name__}, expected a path, a replay buffer of SB3, or arrays in a dict."
        )
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"There is no file '{path.name}' (looked for {path.absolute()}).")
    if is_hdf5(path):
        with open_hdf5(path) as file:
            return _by_names(path, list(hdf5_arrays(file)))
    with NpzFile(path) as archive:
        return _by_names(path, archive.names)


def _by_names(path: Path, names: Sequence[str]) -> str:
    found = {name.partition("/")[0] for name in names}
    if found >= _WORLDFLUX:
        return "worldflux"
    raise _unknown(path, names)


def _unknown(path: Path, names: Sequence[str]) -> ConfigurationError:
    shown = ", ".join(sorted(names)[:20]) + (", ..." if len(names) > 20 else "")
    return ConfigurationError(
        f"{path.name} has the arrays {shown or '(none)'}, which are those of no known format. Pass the format, or say "
        "what the arrays are: format='arrays', keys={'obs': ..., 'actions': ..., 'rewards': ...}."
    )
