"""Batches of windows of experience, from which models learn, and requests for them.

This module imports nothing but torch, so that models can name `Batch` without importing the rest of `replay`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from worldflux.errors import BufferError, ShapeMismatchError, a_type

Observation = Tensor | dict[str, Tensor]
"""One tensor, or a dict of tensors where the environment's observation is a dictionary."""


def by_key(obs: Observation) -> dict[str, Tensor]:
    """An observation by its keys. One that is not a dictionary has the key "obs"."""
    return obs if isinstance(obs, dict) else {"obs": obs}


_FLAGS = ("terminations", "truncations", "is_first", "obs_mask")


@dataclass(frozen=True, repr=False)
class Batch:
    """Windows of consecutive rows, batch first.

    How a row's observation, action and reward belong together is drawn in `ReplayBuffer`. The first four fields are
    all that a user's own provider needs to give. Flags may come in any dtype and are bool here.

    Raises:
        ShapeMismatchError: If a field is no tensor, or the fields do not agree on `[B, T]`.
        BufferError: If a flag is neither 0 nor 1; on a GPU this is not checked.
    """

    obs: Observation
    """float32, or uint8 images `[B, T, C, H, W]`. `[B, T, ...]`"""
    actions: Tensor
    """Actions taken at `obs`: continuous ones in [-1, 1], discrete ones one-hot (several: concatenated).
    `[B, T, A]` float32"""
    rewards: Tensor
    """Rewards of `actions`. `[B, T]` float32"""
    terminations: Tensor
    """Whether the step ended the episode for good: beyond it the future is worth 0. `[B, T]` bool"""
    truncations: Tensor | None = None
    """Whether the step was cut from outside (a time limit): the next observation is bootstrapped. `[B, T]` bool"""
    is_first: Tensor | None = None
    """Whether the row starts an episode: recurrent state and previous action are reset. If it is given, the last
    observation of an episode has a row of its own; otherwise the row after the last step of an episode is the first of
    the next one. `[B, T]` bool"""
    obs_mask: Tensor | None = None
    """False where no observation was recorded (`obs` is zero there); None if all were recorded. `[B, T]` bool"""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Values that the model stored with each row, by name. `[B, T, ...]`"""
    row_ids: Tensor | None = None
    """The rows' ids for `ReplayBuffer.update_extras`; stays on the CPU. `[B, T]` int64"""

    def __post_init__(self) -> None:
        for name, key, given in self._parts():
            if not isinstance(given, Tensor):
                raise ShapeMismatchError(
                    f"{_part(name, key)} is {a_type(given)}, expected a torch tensor. Convert it with torch.as_tensor."
                )
        if self.rewards.dim() != 2:
            raise ShapeMismatchError(f"rewards have shape {tuple(self.rewards.shape)}, expected [B, T].")
        if self.actions.dim() != 3:
            raise ShapeMismatchError(
                f"actions have shape {tuple(self.actions.shape)}, expected [B, T, A]. "
                "Discrete actions are passed one-hot."
            )
        lead = self.rewards.shape
        for name, key, tensor in self._parts():
            if tensor.shape[:2] != lead:
                raise ShapeMismatchError(
                    f"{_part(name, key)} has shape {tuple(tensor.shape)}, expected [B, T] = {list(lead)} "
                    "to lead it, as in rewards."
                )
        for name in _FLAGS:
            flag = getattr(self, name)
            if flag is None:
                continue
            if flag.dim() != 2:
                raise ShapeMismatchError(f"{name} has shape {tuple(flag.shape)}, expected [B, T].")
            if flag.dtype != torch.bool:
                # Elsewhere the host would have to wait for the device.
                if flag.device.type == "cpu" and not bool(((flag == 0) | (flag == 1)).all()):
                    raise BufferError(f"The batch's {name} has values other than 0 and 1, expected flags.")
                object.__setattr__(self, name, flag.bool())

    def __repr__(self) -> str:
        """The shape of each tensor."""
        shapes = ", ".join(f"{name}: {list(tensor.shape)}" for name, tensor in self.named_tensors().items())
        return f"Batch({shapes}, device={str(self.rewards.device)!r})"

    @property
    def batch_size(self) -> int:
        """B, the number of windows."""
        return self.rewards.shape[0]

    @property
    def seq_len(self) -> int:
        """T, the rows of each window."""
        return self.rewards.shape[1]

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> Batch:
        """The same batch on `device`; `row_ids` stay on the CPU, where the buffer reads them.

        Copies to CUDA are only queued: the host does not wait for the device.

        Args:
            device: The device.
            non_blocking: As in `torch.Tensor.to`, for copies from CUDA.
        """
        if torch.device(device).type == "cuda":
            # From memory that is not pinned, the host would wait for all that is queued before the copy.
            on_way = self._with_each(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())
            return on_way._with_each(lambda tensor: tensor.to(device, non_blocking=True))
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory, which a CUDA device copies by itself; `row_ids` stay as they are."""
        return self._with_each(Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """All tensors except `row_ids`."""
        return list(self.named_tensors().values())

    def named_tensors(self) -> dict[str, Tensor]:
        """The same tensors by name: that of their field, or `"<field>/<key>"` if the field is a dictionary."""
        parts = ((name if key is None else f"{name}/{key}", x) for name, key, x in self._parts() if name != "row_ids")
        return dict(parts)

    def with_tensors(self, tensors: Mapping[str, Tensor], row_ids: Tensor | None = None) -> Batch:
        """A batch with the same fields and other tensors, given by the names of `named_tensors`."""
        changed: dict[str, Any] = {"extras": {}, "row_ids": row_ids}
        for name, key, _ in self._parts():
            if name != "row_ids":
                if key is None:
                    changed[name] = tensors[name]
                else:
                    changed.setdefault(name, {})[key] = tensors[f"{name}/{key}"]
        return Batch(**changed)

    def _parts(self) -> Iterator[tuple[str, str | None, Tensor]]:
        """Each tensor with the name of its field, and its key if the field is a dictionary."""
        for name, value in self.__dict__.items():
            if isinstance(value, dict):
                yield from ((name, key, tensor) for key, tensor in value.items())
            elif value is not None:
                yield name, None, value

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return self.with_tensors({name: change(tensor) for name, tensor in self.named_tensors().items()}, self.row_ids)


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch with the windows of several, in their order.

    Args:
        batches: At least one, with the same fields and the same length of windows; a mask of observations may be
            missing in some of them.
    """
    if len(batches) == 1:
        return batches[0]
    if any(batch.obs_mask is not None for batch in batches):
        batches = [
            batch if batch.obs_mask is not None else replace(batch, obs_mask=torch.ones_like(batch.terminations))
            for batch in batches
        ]
    parts = [batch.named_tensors() for batch in batches]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    ids = [batch.row_ids for batch in batches if batch.row_ids is not None]
    return batches[0].with_tensors(tensors, torch.cat(ids) if len(ids) == len(batches) else None)


def _part(name: str, key: str | None) -> str:
    return name if key is None else f"{name}[{key!r}]"


@dataclass(frozen=True)
class BatchRequest:
    """Description of the batch to sample, for providers of the form `sample(request) -> Batch`."""

    batch_size: int
    """Number of windows, `B`."""
    seq_len: int | None = None
    """Number of rows of each window, `T`; None leaves it to the provider."""
    device: str | torch.device = "cpu"
    """Device of the batch."""
