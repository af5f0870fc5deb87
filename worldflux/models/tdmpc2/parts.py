"""One computation of TD-MPC2's losses: the random draws that go into it, and everything that comes out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ModelDraws:
    """Random draws of the model's loss; given, they make it reproduce a recorded one. N windows of H steps."""

    noise: Tensor
    """Of the policy's actions in the value targets. `[N, H, A]`"""
    members: Tensor
    """Target networks of which the lower value is taken. `[2]`"""
    dropout: Tensor | None = None
    """Factors for the first hidden layer of every value network. `[Q, N * H, mlp_dim]`"""
    shift: Tensor | None = None
    """Moves of the images, see `encoder.shifted`. `[N, H+1, 2]`"""


@dataclass(frozen=True)
class PolicyDraws:
    """Random draws of the policy's loss."""

    noise: Tensor
    """`[N, H+1, A]`"""
    members: Tensor
    """Value networks of which the mean is taken. `[2]`"""
    dropout: Tensor | None = None
    """Factors for the first hidden layer of those networks. `[2, N * (H+1), mlp_dim]`"""


@dataclass(frozen=True)
class ModelParts:
    """What the model's loss is made of, before the losses are added up. N windows of H steps."""

    losses: dict[str, Tensor]
    """Means over what counts, scalars."""
    latents: Tensor
    """Encoding of each start and the predicted latents after it. `[N, H+1, L]`"""
    next_latents: Tensor
    """Encodings of the observations after each step, without gradient. `[N, H, L]`"""
    targets: Tensor
    """Of the values. `[N, H]`"""
    reward_logits: Tensor
    """`[N, H, K]`"""
    value_logits: Tensor
    """`[Q, N, H, K]`"""
    termination_logits: Tensor | None
    """`[N, H]`"""
    termination_seen: Tensor | None
    """1 if a termination was learned from, in this batch or before. `[]`"""
