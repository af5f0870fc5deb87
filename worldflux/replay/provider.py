"""Providers of batches, and sampling ahead: while one batch trains, the next is sampled and copied to the device."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldflux.accel.overriding import overridden, steps_back
from worldflux.accel.transfers import to_device
from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError, nearest
from worldflux.replay.actions import Classes
from worldflux.replay.batch import Batch, BatchRequest, by_key, joined
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.sampler import DEFAULT_SEQ_LEN, WindowSampler
from worldflux.replay.spec import MOST_TASKS
from worldflux.validation import SINGLE_KEY, TASK_KEY, ObsShape


class BatchProvider(Protocol):
    """Anything that gives batches, such as `ReplayBuffer`."""

    def sample(self, batch_size: int, seq_len: int | None = None, device: str | torch.device = "cpu") -> Batch:
        """A batch of `batch_size` windows of `seq_len` rows on `device`. `[B, T, ...]`."""
        ...


class BatchRequestProvider(Protocol):
    """A provider whose `sample` takes one argument; its signature tells which of the two forms it has.

    Name the argument `request` or annotate it; options with defaults may follow it.
    """

    def sample(self, request: BatchRequest) -> Batch:
        """The requested batch. `[B, T, ...]`."""
        ...


def sample_from(
    provider: BatchProvider | BatchRequestProvider,
    batch_size: int,
    seq_len: int | None = None,
    device: str | torch.device = "cpu",
    **options: Any,
) -> Batch:
    """A batch from a provider of either form.

    Args:
        provider: A provider whose `sample` takes a `BatchRequest`, or the three arguments below.
        batch_size: Number of windows, `B`.
        seq_len: Number of rows of each window, `T`; None leaves it to the provider.
        device: Device of the batch, which is moved there if the provider did not do so.
        **options: Further arguments, for providers whose `sample` takes them.

    Raises:
        ConfigurationError: If the provider has no `sample`, or one of another form, or that returns no `Batch`.
    """
    sample = getattr(provider, "sample", None)
    if not callable(sample):
        raise ConfigurationError(
            f"{type(provider).__name__} has no method sample(batch_size, seq_len, device) or sample(request)."
        )
    numbers = {"batch_size": batch_size, "seq_len": seq_len, "device": device}
    if options and _accepts(sample, batch_size, seq_len, device, **options):
        batch = sample(batch_size, seq_len, device, **options)
    elif _takes_request(sample):
        batch = sample(BatchRequest(batch_size, seq_len, device))
    elif _accepts(sample, **numbers):
        batch = sample(**numbers)
    elif _accepts(sample, batch_size, seq_len, device):
        batch = sample(batch_size, seq_len, device)
    else:
        raise ConfigurationError(
            f"{type(provider).__name__}.sample{inspect.signature(sample)} is of neither form: expected "
            "sample(batch_size, seq_len=None, device='cpu') or sample(request)."
        )
    if not isinstance(batch, Batch):
        raise ConfigurationError(f"{type(provider).__name__}.sample returned {type(batch).__name__}, expected a Batch.")
    return batch.to(device)


def _takes_request(function: Callable[..., Any]) -> bool:
    """Whether the signature is of the form with one argument, whatever options with defaults follow it.

    Its first parameter says so by its annotation or by the name `request`; otherwise by being the only one that must
    be given, where nothing suggests that it is the number of windows.
    """
    signature = _signature(function)
    if signature is None or not signature.parameters or not _accepts(function, BatchRequest(1)):
        return False
    parameters = signature.parameters
    name, first = next(iter(parameters.items()))
    if name == "request" or "BatchRequest" in str(first.annotation):
        return True
    of_numbers = first.annotation in (int, "int") or parameters.keys() & {"batch_size", "seq_len", "device"}
    return first.default is first.empty and first.kind is not first.VAR_POSITIONAL and not of_numbers


def _accepts(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether the signature takes these arguments; nothing is called, so that a provider's own TypeError is seen."""
    signature = _signature(function)
    try:
        return signature is None or signature.bind(*args, **kwargs) is not None
    except TypeError:
        return False


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """None where it cannot be read, as of some compiled functions, which are then asked in the first form."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


SAMPLES = (ReplayBuffer.sample, WindowSampler.sample)
"""The methods that prefetching replaces; whoever overrides one is sampled from on the calling thread."""


@runtime_checkable
class Resumable(Protocol):
    """A provider whose random stream can be started and continued, such as `ReplayBuffer`."""

    def seed(self, seed: int) -> None:
        """Starts the stream."""

    def rng_state(self) -> dict[str, Any]:
        """Where it stands, ready for JSON."""

    def set_rng_state(self, state: dict[str, Any]) -> None:
        """Continues it from there."""


class MixedReplay:
    """Windows of recorded data and of collected ones in one batch, the recorded ones first.

    While nothing fits into a window in the collected data, all windows are of the recorded data.

    Args:
        recorded: Data that were recorded before, such as a buffer that was loaded from a file.
        collected: Data that grow while they are learned from.
        share: Share of the windows that come from the recorded data, from 0 to 1. It is rounded to whole windows, of
            which both sides get at least one if the share is neither 0 nor 1.

    Raises:
        ConfigurationError: If the recorded data do not have beside their rows what the collected ones have.
    """

    def __init__(self, recorded: WindowSampler, collected: ReplayBuffer, share: float) -> None:
        if any(recorded.extras.get(name) != entry for name, entry in collected.extras.items()):
            raise ConfigurationError(
                f"The recorded data have {sorted(recorded.extras) or 'nothing'} beside their rows, expected "
                f"{sorted(collected.extras)}. Call add_extras(model.replay_extras()) of their buffer."
            )
        self.recorded, self.collected, self.share = recorded, collected, share

    def recorded_windows(self, batch_size: int, seq_len: int) -> int:
        """Number of windows of a batch that come from the recorded data."""
        if not self.collected.num_windows(seq_len):
            return batch_size
        if self.share in (0, 1) or batch_size == 1:
            return round(self.share * batch_size)
        return min(max(round(self.share * batch_size), 1), batch_size - 1)

    def sample(
        self, batch_size: int, seq_len: int | None = None, device: str | torch.device = "cpu", *, fresh: bool = False
    ) -> Batch:
        """Draws a batch; arguments and errors are those of `ReplayBuffer.sample`. `[B, T, ...]`"""
        seq_len = DEFAULT_SEQ_LEN if seq_len is None else seq_len
        count = self.recorded_windows(batch_size, seq_len)
        parts = []
        if count:
            recorded = sample_from(self.recorded, count, seq_len, device)
            assert recorded.row_ids is not None
            extras = {name: recorded.extras[name] for name in self.collected.extras}
            # Their ids become negative, so that both kinds can be told apart.
            parts.append(replace(recorded, extras=extras, row_ids=~recorded.row_ids))
        if count < batch_size:
            parts.append(sample_from(self.collected, batch_size - count, seq_len, device, fresh=fresh))
        return joined(parts)

    def update_extras(self, rows: Any, values: Mapping[str, Any]) -> None:
        """Stores values that a model computed with the rows of a batch, where they came from; see `WindowSampler`."""
        rows = torch.as_tensor(rows)
        is_recorded = rows[:, 0] < 0
        for source, of_source, ids in ((self.recorded, is_recorded, ~rows), (self.collected, ~is_recorded, rows)):
            if of_source.any():
                chosen = {name: value[of_source.to(value.device)] for name, value in values.items()}
                source.update_extras(ids[of_source], chosen)


class TaskReplay:
    """The data of several tasks as one provider, whose batches say which task each row is of.

    The windows of a batch are drawn from the tasks in proportion to their transitions. Vectors and actions are padded
    with zeros to the width of the model's, as an agent pads those of environments.

    Attributes:
        data: The data of each task, by its name.
        tasks: Number of each task, by its name.

    Args:
        data: The data of each task, by its name: buffers, or parts of them.
        tasks: Number of each task that the model has, by its name.
        obs_shape: Shape of the model's observations.
        action_dim: Width of the model's actions.

    Raises:
        ConfigurationError: If there are no data, or they are of other tasks.
        ShapeMismatchError: If observations or actions do not fit into those of the model.
    """

    def __init__(
        self, data: Mapping[str, WindowSampler], tasks: Mapping[str, int], obs_shape: ObsShape, action_dim: int
    ) -> None:
        if not data or not all(isinstance(source, WindowSampler) for source in data.values()):
            raise ConfigurationError(f"The data are {data!r}, expected a ReplayBuffer for each name of a task.")
        for name in data:
            if name not in tasks:
                raise ConfigurationError(
                    f"There are data of the task {name!r}{nearest(str(name), tasks)} The tasks of the model are: "
                    f"{', '.join(tasks) or 'none that have names'}. task_names=(...) names those of a new model."
                )
        self.data, self.tasks = dict(data), {name: tasks[name] for name in data}
        self._obs_shape, self._action_dim = obs_shape, action_dim
        for name, source in data.items():
            if not _fits(source.obs_shape, obs_shape) or source.action_dim > action_dim:
                raise ShapeMismatchError(
                    f"The data of the task {name!r} have observations {source.obs_shape} and {source.action_dim} "
                    f"action numbers, expected {obs_shape} and {action_dim} as the model, or shorter vectors. Images "
                    "of all tasks have the same size."
                )
        self._rng = np.random.default_rng()

    def __repr__(self) -> str:
        return f"TaskReplay({', '.join(f'{name}: {source!r}' for name, source in self.data.items())})"

    @property
    def num_transitions(self) -> int:
        """Transitions of all tasks."""
        return sum(source.num_transitions for source in self.data.values())

    def __len__(self) -> int:
        return self.num_transitions

    @property
    def device(self) -> torch.device:
        """Device on which the rows are gathered."""
        return next(iter(self.data.values())).device

    def parts(self) -> dict[str, TaskReplay]:
        """The data of each task as a provider of its own, by the task's name."""
        return {name: self._with({name: source}) for name, source in self.data.items()}

    def split(self, fraction: float, *, seed: int = 0, seq_len: int = 1) -> tuple[TaskReplay, TaskReplay]:
        """Two parts, to train on and to evaluate on, of the episodes of each task; see `ReplayBuffer.split`."""
        halves = {
            name: _splittable(name, source).split(fraction, seed=seed, seq_len=seq_len)
            for name, source in self.data.items()
        }
        left, held_out = ({name: half[side] for name, half in halves.items()} for side in (0, 1))
        return self._with(left), self._with(held_out)

    def sample(self, batch_size: int, seq_len: int | None = None, device: str | torch.device = "cpu") -> Batch:
        """Draws a batch; arguments and errors are those of `ReplayBuffer.sample`. `[B, T, ...]`"""
        batch = self._drawn(batch_size, seq_len, sample_from)
        return replace(batch, extras=self.extras_of(batch.row_ids)).to(device)

    def sample_ahead(self, batch_size: int, seq_len: int | None = None) -> Batch:
        """Draws a batch without its tasks, which `extras_of` tells."""
        return self._drawn(batch_size, seq_len, lambda source, count, rows: source.sample_ahead(count, rows))

    def _drawn(self, batch_size: int, seq_len: int | None, draw: Callable[[Any, int, int], Batch]) -> Batch:
        seq_len = DEFAULT_SEQ_LEN if seq_len is None else seq_len
        for name, source in self.data.items():
            if not source.num_windows(seq_len):
                raise BufferError(f"The data of the task {name!r} have no window of {seq_len} rows. Pass more of them.")
        sizes = np.array([source.num_transitions for source in self.data.values()], np.float64)
        counts = self._rng.multinomial(batch_size, sizes / sizes.sum())
        shares = zip(self.data.values(), counts.tolist(), self.tasks.values(), strict=True)
        return joined([self._padded(draw(source, count, seq_len), task) for source, count, task in shares if count])

    def extras_of(self, rows: Any) -> dict[str, Tensor]:
        """The task of each row of `Batch.row_ids`. `[B, T]`"""
        return {TASK_KEY: torch.as_tensor(rows) % MOST_TASKS}

    def _padded(self, batch: Batch, task: int) -> Batch:
        """A batch of one task in the model's form; the task is the remainder of the rows' ids."""
        assert batch.row_ids is not None
        shapes = self._obs_shape if isinstance(self._obs_shape, dict) else {SINGLE_KEY: self._obs_shape}
        obs = dict(by_key(batch.obs))
        for key, value in obs.items():
            if value.dim() == 3:
                obs[key] = _widened(value, shapes[key][0])
        return replace(
            batch,
            obs=obs if isinstance(batch.obs, dict) else obs[SINGLE_KEY],
            actions=_widened(batch.actions, self._action_dim),
            extras={},
            row_ids=batch.row_ids * MOST_TASKS + task,
        )

    def _with(self, data: Mapping[str, WindowSampler]) -> TaskReplay:
        return TaskReplay(data, self.tasks, self._obs_shape, self._action_dim)

    def check_actions(self, classes: Classes) -> None:
        """Checks that all stored actions are of a model's kind, as `WindowSampler.check_actions`."""
        for source in self.data.values():
            source.check_actions(classes)

    def digest(self) -> str:
        """A short text that differs for different data or tasks."""
        parts = [(name, self.tasks[name], source.digest()) for name, source in self.data.items()]
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def seed(self, seed: int | None) -> None:
        """Restarts the random numbers, also those of the data; None draws a seed."""
        self._rng = np.random.default_rng(seed)
        for number, source in enumerate(self.data.values()):
            source.seed(None if seed is None else seed + number)

    def rng_state(self) -> dict[str, Any]:
        """State of all random numbers, ready for JSON."""
        sources = {name: source.rng_state() for name, source in self.data.items()}
        return {"tasks": dict(self._rng.bit_generator.state), "data": sources}

    def set_rng_state(self, state: Mapping[str, Any]) -> None:
        """Restores a state that `rng_state` returned."""
        self._rng.bit_generator.state = dict(state["tasks"])
        for name, source in self.data.items():
            source.set_rng_state(state["data"][name])


def _fits(shape: ObsShape, whole: ObsShape) -> bool:
    """Whether observations are those of a model, or become so if vectors are padded."""
    if isinstance(shape, dict) and isinstance(whole, dict):
        return shape.keys() == whole.keys() and all(_fits(shape[key], whole[key]) for key in whole)
    if isinstance(shape, dict) or isinstance(whole, dict):
        return False
    return shape == whole or (len(shape) == len(whole) == 1 and shape[0] <= whole[0])


def _widened(x: Tensor, width: int) -> Tensor:
    """A tensor with zeros behind each vector. `[B, T, K]` → `[B, T, width]`"""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _splittable(name: str, source: WindowSampler) -> ReplayBuffer:
    if not isinstance(source, ReplayBuffer):
        raise ConfigurationError(f"The data of the task {name!r} are a part of a buffer. Pass data to evaluate on.")
    return source


class Batches:
    """Batches of one size from a provider, one after another.

    Args:
        provider: A provider of either form.
        batch_size: Windows, `B`.
        seq_len: Rows of each, `T`.
        device: Where they are wanted.
    """

    def __init__(
        self, provider: BatchProvider | BatchRequestProvider, batch_size: int, seq_len: int, device: torch.device
    ) -> None:
        self.provider = provider
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.device = device

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def next(self) -> Batch:
        """The next batch, on the device. `[B, T, ...]`"""
        return sample_from(self.provider, self.batch_size, self.seq_len, self.device)

    def settle(self) -> None:
        """Waits until nobody reads the provider, so that others may change it."""

    def forget(self) -> None:
        """Drops what was sampled ahead, after the provider's random stream was moved."""

    def rng_state(self) -> dict[str, Any] | None:
        """Where the provider's random stream stands before the next batch; None if it cannot be told."""
        return self.provider.rng_state() if isinstance(self.provider, Resumable) else None

    def close(self) -> None:
        """Stops; the provider's random stream is left where `rng_state` says."""


class PrefetchedBatches(Batches):
    """The same batches, each sampled on another thread while the one before is used.

    The order of things does not depend on how fast the thread is: a batch holds what the provider held when the one
    before was taken, and the `extras` of the moment when it is taken itself.

    Args:
        provider: The buffer, or a part of one, or those of several tasks.
        batch_size: Windows, `B`.
        seq_len: Rows of each, `T`.
        device: Where they are wanted. To CUDA, batches are copied from pinned memory on a stream of their own.
    """

    provider: WindowSampler | TaskReplay

    def __init__(
        self, provider: WindowSampler | TaskReplay, batch_size: int, seq_len: int, device: torch.device
    ) -> None:
        super().__init__(provider, batch_size, seq_len, device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: Future[Any] | None = None
        self._state_before: dict[str, Any] = {}

    def next(self) -> Batch:
        """The next batch, on the device; the one after it is begun. `[B, T, ...]`"""
        if self._coming is None:
            self._begin()
        assert self._coming is not None
        coming, self._coming = self._coming, None
        batch, copied = coming.result()
        if copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(copied)
            for tensor in batch.tensors():
                tensor.record_stream(current)
        self._begin()
        assert batch.row_ids is not None
        extras = self.provider.extras_of(batch.row_ids)
        return replace(batch, extras={name: to_device(value, self.device) for name, value in extras.items()})

    def settle(self) -> None:
        """Waits for the batch that is being sampled."""
        if self._coming is not None:
            self._coming.exception()

    def rng_state(self) -> dict[str, Any]:
        """Where the provider's random stream stood before the batch that is being sampled."""
        return self._state_before if self._coming is not None else self.provider.rng_state()

    def forget(self) -> None:
        """Gives up the batch that is being sampled, as if it had not been begun."""
        self.settle()
        if self._coming is not None:
            self.provider.set_rng_state(self._state_before)
            self._coming = None

    def close(self) -> None:
        """Gives up the batch that is being sampled, and ends the thread."""
        self.forget()
        self._thread.shutdown()

    def _begin(self) -> None:
        self._state_before = self.provider.rng_state()
        self._coming = self._thread.submit(self._fetch)

    def _fetch(self) -> tuple[Batch, torch.cuda.Event | None]:
        batch = self.provider.sample_ahead(self.batch_size, self.seq_len)
        if self._stream is None:
            return batch, None
        with torch.cuda.stream(self._stream):
            batch = batch.pin_memory().to(self.device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return batch, copied


def batches_from(
    provider: BatchProvider | BatchRequestProvider, batch_size: int, seq_len: int, device: torch.device
) -> Batches:
    """Batches from a provider, prefetched from a replay buffer that lies in memory or on disk.

    A user's own provider is always asked on the calling thread, and so is a buffer with a `sample` of its own. Rows
    that are stored on a device are gathered there at once.
    """
    if isinstance(provider, WindowSampler | TaskReplay) and provider.device.type == "cpu":
        sources = provider.data.values() if isinstance(provider, TaskReplay) else [provider]
        if not any(
            steps_back("Sampling on another thread", source, overridden(source, *SAMPLES)) for source in sources
        ):
            return PrefetchedBatches(provider, batch_size, seq_len, device)
    return Batches(provider, batch_size, seq_len, device)
