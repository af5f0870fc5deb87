"""Random draws and results of one computation of TD-MPC2's losses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ModelDraws:
    """Random draws of the model's loss for N windows of H steps. Passed to it, they reproduce a recorded result."""

    noise: Tensor
    """Noise of the policy's actions in the value targets. `[N, H, A]`"""
    members: Tensor
    """Indices of the target networks whose minimum is the target. `[2]`"""
    dropout: Tensor | None = None
    """Dropout factors in the first hidden layer of every value network. `[Q, N * H, mlp_dim]`"""
    shift: Tensor | None = None
    """Shifts of the images, see `encoder.shifted`. `[N, H+1, 2]`"""


@dataclass(frozen=True)
class PolicyDraws:
    """Random draws of the policy's loss."""

    noise: Tensor
    """Noise of the policy's actions. `[N, H+1, A]`"""
    members: Tensor
    """Indices of the value networks whose mean is maximised. `[2]`"""
    dropout: Tensor | None = None
    """Dropout factors in the first hidden layer of those networks. `[2, N * (H+1), mlp_dim]`"""


@dataclass(frozen=True)
class ModelParts:
    """Individual losses of the model for N windows of H steps, and the quantities from which they were computed."""

    losses: dict[str, Tensor]
    """Scalar losses, averaged over the steps that count."""
    latents: Tensor
    """Encoding of each first observation, and the predicted latents after it. `[N, H+1, L]`"""
    next_latents: Tensor
    """Encodings of the observations after each step, without gradient. `[N, H, L]`"""
    targets: Tensor
    """Targets of the values. `[N, H]`"""
    reward_logits: Tensor
    """Two-hot logits of the rewards. `[N, H, K]`"""
    value_logits: Tensor
    """Two-hot logits of the values. `[Q, N, H, K]`"""
    termination_logits: Tensor | None
    """Logits of the termination head; None without one. `[N, H]`"""
    termination_seen: Tensor | None
    """1 if this or an earlier batch contained a termination, else 0; None without a termination head. `[]`"""
