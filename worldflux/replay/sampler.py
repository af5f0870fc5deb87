"""Windows of stored rows, drawn uniformly and gathered into batches, for a replay buffer and its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from worldflux.accel.device import resolve_device
from worldflux.accel.transfers import to_device
from worldflux.errors import BufferError
from worldflux.locks import ThreadLock
from worldflux.replay.actions import Classes, check_fits
from worldflux.replay.backends import DeviceArray, FileRows, RowArray
from worldflux.replay.batch import Batch, BatchRequest
from worldflux.replay.ring import FINAL, FIRST, TERMINATED, TRUNCATED, UNKNOWN_TASK, UNSEEN, RingStorage
from worldflux.replay.spec import TransitionSpec, as_numpy, check_tasks
from worldflux.validation import SINGLE_KEY, TASK_KEY, ObsShape, whole_number

DEFAULT_SEQ_LEN = 50

_FLAGS = np.array([TERMINATED, TRUNCATED, FIRST, UNSEEN])[:, None, None]


class Drawn(NamedTuple):
    """Windows of rows. The rows of a window come from one stream and are consecutive, unless `rows` lists them."""

    stream: np.ndarray
    """Stream of each window. `[B]`"""
    first: np.ndarray
    """First row of each window. `[B]`"""
    rows: np.ndarray | None = None
    """All rows; None if they are consecutive in every window. `[B, T]`"""


class Runs:
    """Runs of rows from which windows are drawn.

    A window may continue from one run to the next of the same stream, as if there were no rows between them.

    Args:
        begin: First row of each run; the runs of one stream are in order. `[K]`
        end: Row after the last one of each run. `[K]`
        stream: Stream of each run, ascending. If None, run k is all of stream k. `[K]`
    """

    def __init__(self, begin: np.ndarray, end: np.ndarray, stream: np.ndarray | None = None) -> None:
        # The position of a row is its number when the rows of all runs are counted consecutively.
        rows = end - begin
        self._stream, self._until = stream, rows.cumsum()
        self._row_of_position = end - self._until
        self._end, self._rows = self._until, rows  # of each stream that has runs, in positions
        if stream is not None:
            self._end = self._until[np.append(stream[1:] != stream[:-1], True)]
            self._rows = np.diff(self._end, prepend=0)
        self._counted: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}

    @property
    def longest(self) -> int:
        """Number of rows of the longest stream."""
        return int(self._rows.max())

    def num_windows(self, seq_len: int) -> int:
        """Number of different windows of `seq_len` rows."""
        return self._windows(seq_len)[0]

    def draw(self, rng: np.random.Generator, count: int, seq_len: int) -> Drawn:
        """Draws `count` windows uniformly and with replacement."""
        total, until, position_of_window = self._windows(seq_len)
        window = rng.integers(total, size=count)
        stream = until.searchsorted(window, side="right")
        position = window + position_of_window[stream]
        if self._stream is None:
            return Drawn(stream, position + self._row_of_position[stream])
        run = self._until.searchsorted(position, side="right")
        drawn = Drawn(self._stream[run], position + self._row_of_position[run])
        if not np.count_nonzero(position + seq_len > self._until[run]):
            return drawn
        positions = position[:, None] + np.arange(seq_len)  # [B, T]
        return drawn._replace(rows=positions + self._row_of_position[self._until.searchsorted(positions, side="right")])

    def _windows(self, seq_len: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Counts the windows.

        Returns:
            The number of windows, its cumulative sum over the streams, and the offset of each stream, which is added to
            the number of a window to obtain its first position.
        """
        if seq_len not in self._counted:
            windows = np.maximum(self._rows - (seq_len - 1), 0)
            until = windows.cumsum()
            self._counted[seq_len] = int(until[-1]), until, self._end - self._rows - (until - windows)
        return self._counted[seq_len]


class WindowSampler:
    """A provider of batches of windows for `Trainer`.

    Attributes:
        lock: Held while rows are added, drawn or given new extras, so that one thread may add rows while another one
            learns from them.

    Args:
        form: Shapes and dtypes of a row.
        seed: Seed of the sampler; None draws one.

    Raises:
        ConfigurationError: If the seed is not a whole number from 0.
    """

    _hint = "Add more steps, or sample shorter windows."

    def __init__(self, form: TransitionSpec, seed: int | None) -> None:
        self._form = form
        self.lock = ThreadLock()
        self.seed(seed)

    @property
    def _rows(self) -> RingStorage:
        """Storage that currently holds the rows."""
        raise NotImplementedError

    def _runs(self, rows: RingStorage) -> Runs:
        """Runs of rows from which windows are drawn."""
        raise NotImplementedError

    @property
    def num_transitions(self) -> int:
        """Number of transitions, those of episodes in flight included."""
        raise NotImplementedError

    def num_windows(self, seq_len: int) -> int:
        """Number of different windows of `seq_len` rows."""
        seq_len = whole_number("seq_len", seq_len, 1, error=BufferError)
        return self._runs(self._rows).num_windows(seq_len)

    @property
    def device(self) -> torch.device:
        """Device on which rows are gathered: that of the storage, or the CPU for memory and disk."""
        rewards = self._rows.rewards
        return rewards.tensor.device if isinstance(rewards, DeviceArray) else torch.device("cpu")

    @property
    def obs_shape(self) -> ObsShape:
        """Shape of one observation, or a dict of them."""
        return self._form.obs_shape

    @property
    def obs_dtype(self) -> np.dtype | dict[str, np.dtype]:
        """Dtype in which observations are stored, or a dict of them."""
        return self._form.obs_dtype

    @property
    def action_dim(self) -> int:
        """Width of an action vector."""
        return self._form.action_dim

    @property
    def extras(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of what is stored beside each row, by name."""
        return dict(self._form.extras)

    def check_actions(self, classes: Classes) -> None:
        """Checks that all stored actions are of a model's kind.

        Args:
            classes: Sizes of the model's one-hots; none for continuous actions.

        Raises:
            BufferError: If they are not.
        """
        rows = self._rows
        at = rows.stored_at()
        steps = at[(rows.flags[at] & FINAL) == 0]
        check_fits("The replay buffer", np.asarray(rows.actions[steps]), self._form.action_classes, classes)

    @property
    def num_tasks(self) -> int:
        """One more than the highest number of a task in the column `task`; 0 if the data do not name any."""
        tasks = self._tasks()
        return 0 if tasks is None else int(tasks.max(initial=UNKNOWN_TASK)) + 1

    def _tasks(self) -> np.ndarray | None:
        """The task of every stored row; None without the column. `[N]`"""
        rows = self._rows
        return np.asarray(rows.extras[TASK_KEY][rows.stored_at()]) if TASK_KEY in rows.extras else None

    def check_tasks(self, count: int, action_dims: Sequence[int] = ()) -> None:
        """Checks that every stored row is of one of a model's tasks.

        Args:
            count: Number of the model's tasks.
            action_dims: Number of action dimensions that each task uses; empty for all of them.

        Raises:
            BufferError: If rows are of other tasks or have other actions, or the data do not say of which they are.
        """
        tasks = self._tasks()
        if tasks is None or (tasks == UNKNOWN_TASK).any():
            raise BufferError(
                f"The model has {count} tasks (num_tasks), and the data do not say which task a row is of. "
                "Pass the data of each task by its name, train(model, {'walk': buffer, ...}), or store the tasks: "
                "ReplayBuffer(..., extras=model.replay_extras()).add_episode(..., extras={'task': numbers}); "
                "save and load keep them."
            )
        check_tasks("The column 'task' of the replay buffer", tasks, count)
        if action_dims:
            self.check_used("its task", np.asarray(action_dims)[tasks])

    def check_used(self, task: str, dims: int | np.ndarray) -> None:
        """Checks that actions are zero beyond the dimensions that a task uses.

        Args:
            task: Names the task in the error message.
            dims: Number of these dimensions, of all rows or of each stored row. `[N]`

        Raises:
            BufferError: If they are not.
        """
        if np.min(dims, initial=self.action_dim) >= self.action_dim:
            return
        rows = self._rows
        at = rows.stored_at()
        dims = np.broadcast_to(dims, at.shape)
        beyond = np.asarray(rows.actions[at]) * (np.arange(self.action_dim) >= dims[:, None])
        wrong = (beyond != 0).any(1) & ((rows.flags[at] & FINAL) == 0)
        if wrong.any():
            action, used = np.asarray(rows.actions[at[wrong][:1]])[0].tolist(), dims[wrong][0]
            raise BufferError(
                f"An action in the data is {action}, and the model uses the first {used} of these numbers for {task} "
                "(task_action_dims). Create the model with as many as the data have, or add a task: "
                "model.with_task(name, like=...)."
            )

    def digest(self) -> str:
        """Returns a short text that differs for different data; extras are not included."""
        return self._rows.digest()

    def sample(
        self, batch_size: int | BatchRequest, seq_len: int | None = None, device: str | torch.device = "cpu"
    ) -> Batch:
        """Draws a batch of windows; arguments and errors are those of `ReplayBuffer.sample`."""
        with self.lock:
            return self._sample(batch_size, seq_len, device)

    def sample_ahead(
        self, batch_size: int | BatchRequest, seq_len: int | None = None, device: str | torch.device = "cpu"
    ) -> Batch:
        """Draws a batch without its extras, before they are up to date; `extras_of` returns them later.

        It can run in a thread of its own while another one calls `update_extras` or `extras_of`, but adds no rows.
        """
        return self._sample(batch_size, seq_len, device, with_extras=False)

    def extras_of(self, rows: Any) -> dict[str, Tensor]:
        """Returns the extras that are currently stored with rows, and zeros for rows that have been overwritten.

        Args:
            rows: `Batch.row_ids`. `[B, T]`

        Returns:
            The extras on `device`. `{name: [B, T, ...]}`
        """
        store = self._rows
        at, stored = self._found(store, as_numpy("rows", rows))
        windows = _Windows.at(np.where(stored, at, 0))
        extras = {name: windows.copy(array) for name, array in store.extras.items()}
        if not stored.all():
            for values in extras.values():
                mask = to_device(torch.from_numpy(~stored), values.device)
                values.masked_fill_(mask.reshape(*mask.shape, *[1] * (values.dim() - mask.dim())), 0)
        return extras

    def update_extras(self, rows: Any, values: Mapping[str, Any]) -> None:
        """Stores values that a model computed with the rows of a batch, except for rows overwritten since then.

        If windows overlap, the values of the last one are kept. Tensors on the storage's own device do not leave it.

        Args:
            rows: `Batch.row_ids` or a part of it. `[B, T]`
            values: New values, cast to the stored dtype. `{name: [B, T, ...]}`

        Raises:
            ShapeMismatchError: If a shape is not as above.
            BufferError: If the buffer has no such extras.
        """
        ids = as_numpy("rows", rows)
        with self.lock:
            self._update_extras(self._rows, ids, values)

    def _update_extras(self, store: RingStorage, ids: np.ndarray, values: Mapping[str, Any]) -> None:
        at, stored = self._found(store, ids)
        kept = np.flatnonzero(stored)
        for name, value in values.items():
            array = store.extras.get(name)
            if isinstance(array, DeviceArray) and isinstance(value, Tensor):
                self._form.check_extra(name, tuple(value.shape), ids.shape)
                flat = value.flatten(0, ids.ndim - 1)
                array[at[stored]] = (
                    flat if len(kept) == len(flat) else flat[to_device(torch.from_numpy(kept), flat.device)]
                )
            else:
                checked = self._form.checked_extra(name, value, ids.shape)
                store.extras[name][at[stored]] = checked[stored]

    def extras_state(self) -> dict[str, Tensor]:
        """Returns the extras of all rows, for a checkpoint. `{name: [N, ...]}`"""
        store = self._rows
        return {name: torch.from_numpy(array[store.stored_at()]) for name, array in store.extras.items()}

    def load_extras_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores the extras that `extras_state` returned, for the same rows.

        Raises:
            BufferError: If the shapes differ from those of the stored extras.
        """
        store = self._rows
        at = store.stored_at()
        expected = {name: (len(at), *array.shape[1:]) for name, array in store.extras.items()}
        found = {name: tuple(values.shape) for name, values in state.items()}
        if found != expected:
            raise BufferError(
                f"These extras have shapes {found}, expected {expected} for the rows that are stored here."
            )
        for name, values in state.items():
            store.extras[name][at] = as_numpy(name, values)

    def seed(self, seed: int | None) -> None:
        """Restarts the sampler's random numbers; None draws a seed.

        Raises:
            ConfigurationError: If it is not a whole number from 0.
        """
        self._rng = np.random.default_rng(None if seed is None else whole_number("seed", seed, 0))

    def rng_state(self) -> dict[str, Any]:
        """State of the sampler's random numbers, ready for JSON."""
        return dict(self._rng.bit_generator.state)

    def set_rng_state(self, state: Mapping[str, Any]) -> None:
        """Restores a state of the random numbers that `rng_state` returned.

        Raises:
            BufferError: If it is anything else. The sampler is then unchanged.
        """
        rng = np.random.default_rng()
        try:
            rng.bit_generator.state = dict(state)
        except (LookupError, OverflowError, TypeError, ValueError) as error:
            raise BufferError(f"This is no state that ReplayBuffer.rng_state returned: {error}") from error
        self._rng = rng

    def _sample(
        self,
        batch_size: int | BatchRequest,
        seq_len: int | None,
        device: str | torch.device,
        *,
        first: Callable[[int, int], Drawn] | None = None,
        with_extras: bool = True,
    ) -> Batch:
        """`sample`, beginning with up to `B` windows of `T` consecutive rows that `first(B, T)` returns."""
        if isinstance(batch_size, BatchRequest):
            request = batch_size
            batch_size, seq_len, device = request.batch_size, request.seq_len, request.device
        batch_size = whole_number("batch_size", batch_size, 1, error=BufferError)
        seq_len = whole_number("seq_len", DEFAULT_SEQ_LEN if seq_len is None else seq_len, 1, error=BufferError)
        device = resolve_device(device)
        store = self._rows
        runs = self._runs(store)
        if not runs.num_windows(seq_len):
            raise BufferError(
                f"The longest stream has {runs.longest} rows, but seq_len is {seq_len}: no window fits. {self._hint}"
            )
        if first is None:
            drawn = runs.draw(self._rng, batch_size, seq_len)
        else:
            given = first(batch_size, seq_len)
            rest = runs.draw(self._rng, batch_size - len(given.stream), seq_len)
            drawn = Drawn(np.append(given.stream, rest.stream), np.append(given.first, rest.first))
        batch = self._gather(store, drawn, seq_len, with_extras)
        return batch if device.type == "cpu" and batch.rewards.device.type == "cpu" else batch.to(device)

    def _gather(self, store: RingStorage, drawn: Drawn, seq_len: int, with_extras: bool) -> Batch:
        """The batch of these windows, on the device of the storage."""
        windows = _Windows.of_rows(store, drawn, seq_len)
        obs = {key: windows.copy(array) for key, array in store.obs.items()}
        for key, shape in self._form.shapes.items():
            if len(shape) != 3 and obs[key].dtype == torch.uint8:  # only images stay bytes
                obs[key] = obs[key].float()
        rewards = windows.copy(store.rewards)
        flags = ((windows.copy_numpy(store.flags) ^ UNSEEN) & _FLAGS) != 0
        # Without a mask, a model does not have to compute predictions for unseen observations.
        kept = flags[:-1] if flags[-1].all() else flags
        terminations, truncations, is_first, *masks = to_device(torch.from_numpy(kept), rewards.device).unbind()
        n = len(store.base)
        if drawn.rows is None:
            ids = (drawn.first * n + drawn.stream)[:, None] + np.arange(0, seq_len * n, n)
        else:
            ids = drawn.rows * n + drawn.stream[:, None]
        return Batch(
            obs=obs if self._form.is_dict else obs[SINGLE_KEY],
            actions=windows.copy(store.actions),
            rewards=rewards,
            terminations=terminations,
            truncations=truncations,
            is_first=is_first,
            obs_mask=masks[0] if masks else None,
            extras={name: windows.copy(array) for name, array in store.extras.items()} if with_extras else {},
            row_ids=torch.from_numpy(ids),
        )

    def _found(self, store: RingStorage, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index in the arrays of the rows of `Batch.row_ids`, and whether they are still stored. `[B, T]` each."""
        row, stream = np.divmod(ids, len(store.base))
        return store.at(stream, row), (row >= store.begin[stream]) & (row < store.end[stream])


class _Windows:
    """Copies windows of rows out of arrays.

    Args:
        begin: Index of the first row of each window. `[B]`
        length: Rows of each, `T`.
        at: Index of each row, if some windows are not in one piece: those that run over the end of a ring, or over
            rows that are left out. `[B, T]`
    """

    def __init__(self, begin: np.ndarray, length: int, at: np.ndarray | None = None) -> None:
        self._begin, self._length, self._at = begin, length, at
        if at is not None:
            self._broken = np.flatnonzero(at[:, -1] - begin != length - 1)
            self._begin = begin.copy()
            self._begin[self._broken] = 0

    @classmethod
    def at(cls, at: np.ndarray) -> _Windows:
        """The windows of the rows at these indices. `[B, T]`"""
        return cls(at[:, 0], at.shape[1], at)

    @classmethod
    def of_rows(cls, store: RingStorage, drawn: Drawn, length: int) -> _Windows:
        """The windows that were drawn."""
        in_ring = drawn.first % store.ring
        if drawn.rows is None and not np.count_nonzero(in_ring > store.ring - length):
            return cls(store.base[drawn.stream] + in_ring, length)
        rows = drawn.first[:, None] + np.arange(length) if drawn.rows is None else drawn.rows
        return cls.at(store.at(drawn.stream[:, None], rows))

    def copy(self, array: RowArray) -> Tensor:
        """The windows `[B, T, ...]` of an array `[N, ...]`, on the same device."""
        if not isinstance(array, DeviceArray):
            return torch.from_numpy(self.copy_numpy(array))
        at = self._indices()
        index = to_device(torch.from_numpy(at), array.tensor.device)
        return array.tensor.index_select(0, index.flatten()).unflatten(0, at.shape)

    def _indices(self) -> np.ndarray:
        return self._begin[:, None] + np.arange(self._length) if self._at is None else self._at

    def copy_numpy(self, array: Any) -> np.ndarray:
        """The windows `[B, T, ...]` of an array `[N, ...]`."""
        if isinstance(array, FileRows):
            return array[self._indices()]
        # A window is copied as one piece of memory: item i of this view is all T rows from row i on.
        row_bytes = array.strides[0]
        pieces = np.ndarray(
            (len(array) - self._length + 1,), f"V{self._length * row_bytes}", array, strides=(row_bytes,)
        )
        windows = pieces[self._begin].view(array.dtype).reshape(-1, self._length, *array.shape[1:])
        if self._at is not None:
            windows[self._broken] = array[self._at[self._broken]]
        return windows
