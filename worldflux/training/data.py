"""Where batches come from: the two forms of provider, and a buffer of random data to try things with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from worldflux.errors import ConfigurationError
from worldflux.training.arrays import ObsShape
from worldflux.training.batch import Batch, BatchRequest
from worldflux.training.config import whole_number
from worldflux.training.replay import ReplayBuffer
from worldflux.training.storage import StoragePlace


class BatchProvider(Protocol):
    """Anything that gives batches, such as `ReplayBuffer`."""

    def sample(self, batch_size: int, seq_len: int | None = None, device: str | torch.device = "cpu") -> Batch:
        """A batch of `batch_size` windows of `seq_len` rows on `device`. `[B, T, ...]`."""
        ...


class BatchRequestProvider(Protocol):
    """The same with one argument; the signature of its `sample` tells which of the two a provider is.

    Name the argument `request` or annotate it; options with defaults may follow it.
    """

    def sample(self, request: BatchRequest) -> Batch:
        """The batch that was asked for. `[B, T, ...]`."""
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
        provider: Its `sample` takes a `BatchRequest`, or the three numbers below.
        batch_size: Windows, `B`.
        seq_len: Rows of each, `T`; None leaves it to the provider.
        device: Where the batch is wanted; it is moved there if the provider did not.
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
    """Whether the signature takes these arguments; nothing is called, so a provider's own TypeError stays visible."""
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


def create_random_buffer(
    capacity: int = 10_000,
    obs_shape: ObsShape = (3, 64, 64),
    action_dim: int = 6,
    num_episodes: int = 100,
    episode_length: int = 100,
    seed: int | None = None,
    *,
    storage: StoragePlace = None,
) -> ReplayBuffer:
    """A buffer of noise, for tests and for trying out a model's plumbing.

    Args:
        capacity: Transitions to keep; the oldest episodes are dropped beyond it.
        obs_shape: Of one observation; bytes for images, standard normal numbers else.
        action_dim: Width of the action vectors, uniform in [-1, 1].
        num_episodes: Episodes to make, each ended by a termination.
        episode_length: Transitions of each.
        seed: Of the data and of the buffer's sampler; None draws one.
        storage: Where the rows lie, as for `ReplayBuffer`.

    Raises:
        ConfigurationError: If a number is not whole or less than 1.
        BufferError: If the machine has no room for it.
    """
    for name, value in (("num_episodes", num_episodes), ("episode_length", episode_length)):
        whole_number(name, value, 1)
    buffer = ReplayBuffer(capacity, obs_shape, action_dim, seed=seed, storage=storage)
    buffer.check_budget(min(buffer.capacity, num_episodes * episode_length))
    rng = np.random.default_rng(seed)

    def random_obs(shape: tuple[int, ...]) -> np.ndarray:
        full = (episode_length + 1, *shape)
        if len(shape) == 3:
            return rng.integers(256, size=full, dtype=np.uint8)
        return rng.standard_normal(full, np.float32)

    shapes = buffer.obs_shape
    for _ in range(num_episodes):
        buffer.add_episode(
            {key: random_obs(shape) for key, shape in shapes.items()}
            if isinstance(shapes, dict)
            else random_obs(shapes),
            rng.uniform(-1, 1, (episode_length, action_dim)),
            rng.standard_normal(episode_length),
            np.arange(episode_length) == episode_length - 1,
        )
    return buffer
