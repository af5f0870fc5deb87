"""Data sets of TD-MPC2: `.pt` files with a TensorDict, whose tensors are read without unpickling it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.datasets.columns import in_order
from worldflux.datasets.flat import Alignment, flat_recording
from worldflux.datasets.recording import Block, Recording, spans
from worldflux.errors import BufferError, ConfigurationError, WorldFluxError
from worldflux.pickles.reader import Described
from worldflux.pickles.torch_files import TorchFile
from worldflux.reading import open_regular
from worldflux.validation import SINGLE_KEY

_AT_ONCE = 2**16
"""Rows that are searched for padding at once."""


class _TensorDict(Described):
    """A TensorDict in a pickle: its attributes, among them the dictionary of its tensors."""

    def __init__(self, state: Any = None) -> None:
        self.set_state(state)

    def set_state(self, state: Any) -> None:
        self.content = state.get("_tensordict") if type(state) is dict else None


_BUILDERS: dict[tuple[str, str], Any] = {
    ("tensordict._td", "TensorDict"): _TensorDict,
    ("tensordict.tensordict", "TensorDict"): _TensorDict,
    ("tensordict._reductions", "_make_td"): lambda kind, state: _TensorDict(state),
    ("tensordict.utils", "_StringOnlyDict"): dict,
    ("__builtin__", "set"): lambda *members: None,
    ("builtins", "set"): lambda *members: None,
}


class _ChosenRows:
    """Some rows, and the first numbers in each, of arrays `[E, T, ...]` that were flattened to `[E * T, ...]`."""

    def __init__(self, array: np.ndarray, rows: np.ndarray, width: int | None = None) -> None:
        self._array, self._rows, self._width = array, rows, width
        inner = array.shape[1:] if width is None else (width,)
        self.shape, self.dtype = (len(rows), *inner), array.dtype

    def __getitem__(self, part: slice) -> np.ndarray:
        found = self._array[self._rows[part]]
        return found if self._width is None else found[:, : self._width]


def open_source(source: Any, *, task: int | None = None, keep_padding: bool = False) -> Recording:
    """Opens a file of TD-MPC2's data sets, or a directory of them: episodes of one length, which are truncated.

    An action led to its row and earned the row's reward; those of the first row are NaN.

    Args:
        source: Path of a `.pt` file, or of a directory.
        task: Number of the task that is read, where there are several.
        keep_padding: Whether to keep the zeros that make observations and actions of all tasks equally wide. By
            default, the last columns that are zero in all rows are left out of data sets that name tasks.
    """
    path = Path(source)
    files = sorted(path.glob("*.pt"), key=lambda one: in_order(one.name)) if path.is_dir() else [path]
    if not files:
        raise BufferError(f"{path} has no .pt files.")
    found = [_File(one) for one in files]
    tasks = sorted({number for one in found for number in one.tasks.tolist()})
    if task is None and len(tasks) > 1:
        raise ConfigurationError(
            f"{path.name} has {len(tasks)} tasks ({', '.join(map(str, tasks[:40]))}), whose observations differ. Pass "
            "the number of one: task=..."
        )
    if task is not None and task not in tasks:
        raise ConfigurationError(
            f"{path.name} has no task {task!r}, expected {', '.join(map(str, tasks)) or 'none: it names no tasks'}."
        )
    rows = [one.rows(task) for one in found]
    widths: dict[str, int | None] = {"obs": None, "action": None}
    notes: list[str] = []
    if tasks and not keep_padding:
        for name in widths:
            if found[0].arrays[name].ndim == 2:
                full = found[0].arrays[name].shape[1]
                widths[name] = max(_width(one.arrays[name], at) for one, at in zip(found, rows, strict=True))
                if widths[name] != full:
                    notes.append(
                        f"{name} has {full} numbers, of which the last {full - (widths[name] or 0)} are zero in all "
                        "rows and are left out as padding. Pass keep_padding=True to keep them."
                    )
    parts = [one.recording(at, widths) for one, at in zip(found, rows, strict=True) if len(at)]
    if not any("terminated" in one.arrays for one in found):
        notes.append("its episodes have one length and count as truncated.")

    def blocks() -> Iterator[Block]:
        for part in parts:
            yield from part.blocks()

    first = parts[0]
    return Recording(
        path.name,
        first.obs_space,
        first.action_shape,
        first.action_dtype,
        sum(part.steps for part in parts),
        sum(part.episodes for part in parts),
        blocks,
        notes=notes,
    )


class _File:
    """One file, mapped into memory.

    Attributes:
        name: Its name.
        length: Rows of each episode, T.
        arrays: Its arrays by name. `[E * T, ...]` each
        tasks: The task of each episode; empty where the file names none. `[E]`
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        open_regular(path).close()
        try:
            with TorchFile(path, builders=_BUILDERS) as file:
                content = file.read()
                content = content.content if type(content) is _TensorDict else content
                if type(content) is not dict:
                    raise ValueError("it holds neither a TensorDict nor a dict of tensors")
                tensors = file.tensors(content, mapped=True)
        except (WorldFluxError, FileNotFoundError):
            raise
        except Exception as error:  # what a damaged archive or pickle raises is not a closed list
            raise BufferError(
                f"{path.name} is not a data set of TD-MPC2 that can be read: {error}. If you trust it, load it "
                "yourself and pass its arrays: format='arrays', align='led_to'."
            ) from error
        missing = {"obs", "action", "reward"} - tensors.keys()
        if missing:
            raise BufferError(
                f"{path.name} has no tensor '{min(missing)}' (found: {', '.join(sorted(tensors)) or 'none'})."
            )
        lead = tensors["reward"].shape[:2]
        if len(lead) != 2 or any(one.shape[:2] != lead for one in tensors.values()) or lead[1] < 2:
            shapes = {name: tuple(one.shape) for name, one in tensors.items()}
            raise BufferError(f"{path.name} has tensors of {shapes}, expected [episodes, rows, ...] for each.")
        episodes, self.length = int(lead[0]), int(lead[1])
        rows = episodes * self.length
        self.arrays = {name: one.reshape(rows, *one.shape[2:]).numpy() for name, one in tensors.items()}
        named = "task" in self.arrays
        self.tasks = self.arrays["task"].reshape(episodes, -1)[:, 0] if named else np.zeros(0, np.int64)
        self._episodes = episodes

    def rows(self, task: int | None) -> np.ndarray:
        """Numbers of the rows of a task, or of all. `[N]`"""
        chosen = np.arange(self._episodes) if task is None else np.flatnonzero(self.tasks == task)
        return (chosen[:, None] * self.length + np.arange(self.length)).reshape(-1)

    def recording(self, rows: np.ndarray, widths: dict[str, int | None]) -> Recording:
        """A recording of some rows."""
        columns: dict[str, Any] = {
            f"obs/{SINGLE_KEY}": _ChosenRows(self.arrays["obs"], rows, widths["obs"]),
            "actions": _ChosenRows(self.arrays["action"], rows, widths["action"]),
            "rewards": _ChosenRows(self.arrays["reward"], rows),
            "is_last": np.arange(len(rows)) % self.length == self.length - 1,
        }
        if "terminated" in self.arrays:
            terminated = np.nan_to_num(self.arrays["terminated"][rows].reshape(-1))
            columns["terminations"] = (terminated != 0) & columns["is_last"]
        return flat_recording(self.name, columns, False, Alignment("led_to"))


def _width(array: np.ndarray, rows: np.ndarray) -> int:
    """Number of columns up to the last one with a number other than zero; at least one."""
    used = np.zeros(array.shape[1], np.bool_)
    for part in spans(len(rows), _AT_ONCE):
        found = array[rows[part]]
        used |= ((found != 0) & ~np.isnan(found)).any(0)
    return max(1, int(np.flatnonzero(used)[-1]) + 1) if used.any() else 1
