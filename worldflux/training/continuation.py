"""The data of a run, and the random streams and checkpoint from which it continues."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from worldflux.accel.randomness import seed_everything, set_random_state
from worldflux.errors import CheckpointError, ConfigurationError
from worldflux.replay.provider import Batches, Resumable
from worldflux.replay.sampler import WindowSampler


@runtime_checkable
class Digestible(Protocol):
    """Data with a digest, by which different data are distinguished."""

    def digest(self) -> str:
        """Returns a short text that differs for different data."""


def checked_share(value: float) -> float:
    """Returns a share of a buffer as a float.

    Raises:
        ConfigurationError: If it is not a number between 0 and 1.
    """
    if isinstance(value, bool) or not 0 < value < 1:
        raise ConfigurationError(f"eval_data is {value!r}, expected a buffer, or a share between 0 and 1 to hold out.")
    return float(value)


def held_out(buffer: Any, share: float, *, seed: int, seq_len: int) -> tuple[Any, Any]:
    """Splits a buffer into a training part and a part that is held out for evaluation.

    Returns:
        The training part and the held-out part.
    """
    split = getattr(buffer, "split", None)
    if not callable(split):
        raise ConfigurationError(
            f"eval_data is {share}, and {type(buffer).__name__} has no split(fraction, seed, seq_len) as ReplayBuffer "
            "has. Pass a provider of its own as eval_data."
        )
    part, rest = split(share, seed=seed, seq_len=seq_len)
    return part, rest


class Continuation:
    """The source of a trainer's batches, and the checkpoint that it continues from.

    Attributes:
        source: Source of the last batch; None before the first one.
        digest: The digest of the data that `Trainer.train` was given, if it has one.
        restored: Content of `trainer.json` of the checkpoint that was loaded last; None after the next step.

    Args:
        device: Device on which the model is trained.
    """

    def __init__(self, device: torch.device) -> None:
        self.source: Any = None
        self.digest: str | None = None
        self.restored: dict[str, Any] | None = None
        self._device = device
        self._extras: dict[str, Tensor] = {}

    def load(self, progress: dict[str, Any], extras: dict[str, Tensor]) -> None:
        """Restores the random streams of a checkpoint."""
        set_random_state(progress["random"], self._device)
        self.restored, self._extras = progress, extras

    def check_data(self, data: Any, *, resume: bool) -> None:
        """Raises a `CheckpointError` if a resumed run would continue with other data than the checkpoint."""
        self.digest = data.digest() if isinstance(data, Digestible) else None
        trained_on = self.restored.get("data") if self.restored is not None else None
        if resume and trained_on is not None and trained_on != self.digest:
            raise CheckpointError(
                "The buffer holds other data than the checkpoint was trained on, so the run cannot be continued "
                "exactly. Pass the same data, or call load_checkpoint(directory) and train(buffer) without resume to "
                "continue with the new data."
            )

    def start(self, source: Any, *, seed: int | None) -> None:
        """Continues the random streams of a checkpoint in a source of batches, or starts those of a new run.

        Args:
            source: Source of the batches.
            seed: Seed of a new run; None leaves the streams as they are.
        """
        self.source = source
        if self.restored is not None:
            # Again, because random numbers may have been drawn since the checkpoint was loaded (to build a buffer).
            set_random_state(self.restored["random"], self._device)
            if self.restored["sampler"] is not None and isinstance(source, Resumable):
                source.set_rng_state(self.restored["sampler"])
            if self._extras and isinstance(source, WindowSampler):
                source.load_extras_state(self._extras)
        elif seed is not None:
            seed_everything(seed)
            if callable(getattr(source, "seed", None)):
                source.seed(seed)

    def saved(
        self, batches: Batches | None, callbacks: list[dict[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The entries of a checkpoint for the sampler, the data and the callbacks, and the extras of the data's rows.

        Args:
            batches: Iterator of batches while `Trainer.train` runs, otherwise None.
            callbacks: The states of the callbacks.
        """
        if batches is not None:
            sampler = batches.rng_state()
        else:
            sampler = self.source.rng_state() if isinstance(self.source, Resumable) else None
        entries = {"sampler": sampler, "data": self.digest, "callbacks": callbacks}
        if self.restored is not None and batches is None:  # no step has been taken since the checkpoint was loaded
            return {name: self.restored.get(name, value) for name, value in entries.items()}, self._extras
        # Only the extras of data that `train` was given; an agent saves those of its own buffer.
        stored = self.digest is not None and isinstance(self.source, WindowSampler)
        return entries, self.source.extras_state() if stored else {}
