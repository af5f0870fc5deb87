"""Recurrent state-space model: a block-diagonal GRU with categorical latents.

Source: DreamerV3, arXiv:2301.04104, and its reference implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from worldflux.models.dreamerv3.fast import recurrence as fast
from worldflux.nn.distributions import OneHot
from worldflux.nn.layers import MLP, BlockLinear, Linear, NormSiLU
from worldflux.nn.transforms import bounded


class Observed(NamedTuple):
    """Posterior states along replayed windows."""

    deter: Tensor
    """Deterministic parts of the states. `[B, T, D]`"""
    stoch: Tensor
    """Samples of the latents with straight-through gradients. `[B, T, S, C]`"""
    logits: Tensor
    """Posterior logits. `[B, T, S, C]`"""


class RSSM(nn.Module):
    """Sequence model whose states consist of `deter` `[B, D]` and one-hot `stoch` `[B, S, C]`.

    Args:
        deter_dim: Width D of the deterministic part; divisible by `blocks`.
        hidden_dim: Width of all hidden layers.
        groups: Number of categorical latents S.
        classes: Number of classes C of each latent.
        blocks: Number of blocks of the GRU.
        unimix: Weight of the uniform distribution in the latents' probabilities.
        action_dim: Number of action dimensions A.
        embed_dim: Width E of the encoder's output.
    """

    def __init__(
        self,
        *,
        deter_dim: int,
        hidden_dim: int,
        groups: int,
        classes: int,
        blocks: int,
        unimix: float,
        action_dim: int,
        embed_dim: int,
    ) -> None:
        super().__init__()
        self.deter_dim, self.groups, self.classes, self.blocks, self.unimix = deter_dim, groups, classes, blocks, unimix
        stoch_dim = groups * classes
        self.deter_in = MLP(deter_dim, hidden_dim, 1)
        self.stoch_in = MLP(stoch_dim, hidden_dim, 1)
        self.action_in = MLP(action_dim, hidden_dim, 1)
        self.hidden = BlockLinear(deter_dim + 3 * blocks * hidden_dim, deter_dim, blocks)
        self.hidden_norm = NormSiLU(deter_dim)
        self.gates = BlockLinear(deter_dim, 3 * deter_dim, blocks)
        self.posterior_in = MLP(deter_dim + embed_dim, hidden_dim, 1)
        self.posterior_out = Linear(hidden_dim, stoch_dim)
        self.prior_in = MLP(deter_dim, hidden_dim, 2)
        self.prior_out = Linear(hidden_dim, stoch_dim)
        self.functions = fast.CompiledFunctions()
        self.fast = True
        """Whether the fast implementations may be used. False always uses the plain computations of this class."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "functions": fast.CompiledFunctions()}  # compiled functions stay in their process

    def takes_fast_form(self, *heads: nn.Module, forwards: Sequence[Callable[..., Any]] = ()) -> bool:
        """Returns whether the implementations in `fast/` may replace the methods below.

        They must be enabled, and nothing that they bypass may be overridden or hooked.

        Args:
            *heads: Further modules whose weights the fast implementation reads.
            forwards: The `forward` methods that these modules must have.
        """
        return fast.applies(self, _STEPS, heads, forwards)

    def initial(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Returns the zero state. `[B, D]`, `[B, S, C]`"""
        weight = self.hidden_norm.scale
        return weight.new_zeros(batch_size, self.deter_dim), weight.new_zeros(batch_size, self.groups, self.classes)

    def dist(self, logits: Tensor) -> OneHot:
        """Returns the distribution of the latents for prior or posterior logits `[..., S, C]`."""
        return OneHot(logits, self.unimix)

    # One step

    def core(self, deter: Tensor, stoch: Tensor, actions: Tensor) -> Tensor:
        """Computes one step of the recurrence.

        Args:
            deter: Deterministic part of the state. `[B, D]`
            stoch: Stochastic part of the state. `[B, S, C]`
            actions: Actions; magnitudes above 1 are rescaled to 1. `[B, A]`

        Returns:
            The next `deter`. `[B, D]`
        """
        shared = torch.cat(
            [self.deter_in(deter), self.stoch_in(stoch.flatten(1)), self.action_in(bounded(actions))], -1
        )
        pieces = deter.unflatten(-1, (self.blocks, -1))
        pieces = torch.cat([pieces, shared.unsqueeze(1).expand(-1, self.blocks, -1)], -1)  # input of each block
        gates = self.gates(self.hidden_norm(self.hidden(pieces.flatten(1))))
        # The outputs of each block are the reset gate, the candidate and the update gate, in this order.
        reset, candidate, update = gates.unflatten(-1, (self.blocks, 3, -1)).unbind(-2)  # [B, g, D/g] each
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        # The bias of -1 favours keeping the old state initially.
        update = torch.sigmoid(update - 1.0)
        return torch.lerp(deter, candidate.flatten(1), update.flatten(1))

    def prior(self, deter: Tensor) -> Tensor:
        """Computes the logits of the latents without an observation. `[..., D]` → `[..., S, C]`"""
        return self.prior_out(self.prior_in(deter)).unflatten(-1, (self.groups, self.classes))

    def posterior(self, deter: Tensor, embed: Tensor) -> Tensor:
        """Computes the logits of the latents given an embedding. `[..., D]`, `[..., E]` → `[..., S, C]`"""
        hidden = self.posterior_in(torch.cat([deter, embed], -1))
        return self.posterior_out(hidden).unflatten(-1, (self.groups, self.classes))

    # Sequences

    def observe(
        self,
        deter: Tensor,
        stoch: Tensor,
        prev_actions: Tensor,
        embed: Tensor,
        is_first: Tensor,
        *,
        obs_mask: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> Observed:
        """Computes posterior states along replayed windows, with gradients through the whole sequence.

        The fast implementation computes everything that does not depend on the recurrent state for all steps at once.

        Args:
            deter: Deterministic part of the state before the first step. `[B, D]`
            stoch: Stochastic part of the state before the first step. `[B, S, C]`
            prev_actions: Action that led to each step. `[B, T, A]`
            embed: Output of the encoder. `[B, T, E]`
            is_first: True where the state and the previous action are first set to zero. `[B, T]`
            obs_mask: False where there is no observation and the prior replaces the posterior. `[B, T]`
            draws: Classes to use instead of sampling. `[B, T, S]`
        """
        keep = 1.0 - is_first.to(deter.dtype).unsqueeze(-1)  # [B, T, 1]
        prev_actions = prev_actions * keep
        noise = None
        if draws is None:
            noise = torch.rand(keep.shape[1], *stoch.shape[:2], device=stoch.device)
        if self.takes_fast_form():
            return Observed(*fast.observe(self, deter, stoch, prev_actions, embed, keep, obs_mask, noise, draws))
        deters, stochs, logits = [], [], []
        for t in range(keep.shape[1]):
            deter = self.core(deter * keep[:, t], stoch * keep[:, t].unsqueeze(-1), prev_actions[:, t])
            logit = self.posterior(deter, embed[:, t])
            if obs_mask is not None:
                logit = torch.where(obs_mask[:, t, None, None], logit, self.prior(deter))
            dist = self.dist(logit)
            if draws is None:
                assert noise is not None
                stoch = dist.sample(noise[t])
            else:
                stoch = dist.straight_through(draws[:, t])
            deters.append(deter)
            stochs.append(stoch)
            logits.append(logit)
        return Observed(torch.stack(deters, 1), torch.stack(stochs, 1), torch.stack(logits, 1))


_STEPS = (RSSM.core, RSSM.prior, RSSM.posterior, RSSM.dist)
"""Methods that the fast implementations replace without calling them."""


def kl_losses(posterior: OneHot, prior: OneHot, free_nats: float) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the two losses of the KL divergence with free nats, which have equal values but different gradients.

    Args:
        posterior: Posterior over `[..., S, C]`.
        prior: Prior over `[..., S, C]`.
        free_nats: Divergence below which the losses are constant and have no gradient.

    Returns:
        Dynamics loss `max(free, KL(sg(post) || prior))`, representation loss `max(free, KL(post || sg(prior)))`, and
        the divergence itself without gradient, `[...]` each.
    """
    dynamics = posterior.detach().kl(prior)
    representation = posterior.kl(prior.detach())
    return dynamics.clamp(min=free_nats), representation.clamp(min=free_nats), dynamics.detach()
