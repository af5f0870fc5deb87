"""Batches on their way: while one trains, the next is sampled and copied to the device."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch

from worldflux.overriding import overridden, steps_back
from worldflux.training.batch import Batch
from worldflux.training.data import BatchProvider, BatchRequestProvider, sample_from
from worldflux.training.replay import ReplayBuffer
from worldflux.training.sampling import WindowSampler
from worldflux.training.transfers import to_device

SAMPLES = (ReplayBuffer.sample, WindowSampler.sample)
"""What prefetching stands for."""


@runtime_checkable
class Resumable(Protocol):
    """A provider whose random stream can be started and continued, such as `ReplayBuffer`."""

    def seed(self, seed: int) -> None:
        """Starts the stream."""

    def rng_state(self) -> dict[str, Any]:
        """Where it stands, ready for JSON."""

    def set_rng_state(self, state: dict[str, Any]) -> None:
        """Continues it from there."""


class Batches:
    """Batches of one form from a provider, one after another.

    Args:
        provider: In either form.
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
        """Has the next batch sampled anew, after the provider's random stream was moved."""

    def rng_state(self) -> dict[str, Any] | None:
        """Where the provider's random stream stands before the next batch; None if it cannot be told."""
        return self.provider.rng_state() if isinstance(self.provider, Resumable) else None

    def close(self) -> None:
        """Ends it; the provider's random stream is where `rng_state` says."""


class PrefetchedBatches(Batches):
    """The same batches, each sampled on another thread while the one before is used.

    The order of things does not depend on how fast the thread is: a batch holds what the provider held when the one
    before was taken, and the `extras` of the moment when it is taken itself.

    Args:
        provider: As for `Batches`.
        batch_size: Likewise.
        seq_len: Likewise.
        device: Likewise. To CUDA, batches are copied from pinned memory on a stream of their own.
    """

    provider: WindowSampler

    def __init__(self, provider: WindowSampler, batch_size: int, seq_len: int, device: torch.device) -> None:
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
        assert batch.rows is not None
        extras = self.provider.extras_of(batch.rows)
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
        """Gives up the batch that is being sampled, as if it had not been begun."""
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

    A user's own provider is always asked on the calling thread, and so is a buffer with a `sample` of its own. What
    lies on a device is gathered there at once.
    """
    if isinstance(provider, WindowSampler) and provider.device.type == "cpu":
        if not steps_back("Sampling on another thread", provider, overridden(provider, *SAMPLES)):
            return PrefetchedBatches(provider, batch_size, seq_len, device)
    return Batches(provider, batch_size, seq_len, device)
