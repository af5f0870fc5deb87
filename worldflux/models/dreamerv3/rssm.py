"""The recurrent state-space model: a block-diagonal GRU with categorical latents.

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
    """`[B, T, D]`"""
    stoch: Tensor
    """Samples with straight-through gradients. `[B, T, S, C]`"""
    logits: Tensor
    """Posterior logits. `[B, T, S, C]`"""


class RSSM(nn.Module):
    """Sequence model over `deter` `[B, D]` and one-hot `stoch` `[B, S, C]`.

    Args:
        deter_dim: D, divisible by `blocks`.
        hidden_dim: Width of all hidden layers.
        groups: S, categorical rows.
        classes: C, classes of each row.
        blocks: Blocks of the GRU.
        unimix: Share of the uniform distribution in the latents' probabilities.
        action_dim: A
        embed_dim: E, width of the encoder's output.
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
        """False: the plain computations that the fast ones are tested against."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "functions": fast.CompiledFunctions()}  # compiled functions stay in their process

    def takes_fast_form(self, *heads: nn.Module, forwards: Sequence[Callable[..., Any]] = ()) -> bool:
        """Whether the forms in `fast/` may stand for the functions below: they are wanted, and nothing was replaced.

        Args:
            *heads: Further modules whose weights the fast form reads.
            forwards: The `forward` that each of them must have for that.
        """
        return fast.applies(self, _STEPS, heads, forwards)

    def initial(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """The zero state. `[B, D]`, `[B, S, C]`"""
        weight = self.hidden_norm.scale
        return weight.new_zeros(batch_size, self.deter_dim), weight.new_zeros(batch_size, self.groups, self.classes)

    def dist(self, logits: Tensor) -> OneHot:
        """The latent distribution of prior or posterior logits `[..., S, C]`."""
        return OneHot(logits, self.unimix)

    # One step

    def core(self, deter: Tensor, stoch: Tensor, actions: Tensor) -> Tensor:
        """One step of the recurrence.

        Args:
            deter: `[B, D]`
            stoch: `[B, S, C]`
            actions: `[B, A]`; magnitudes above 1 are brought back to 1.

        Returns:
            The next `deter`. `[B, D]`
        """
        shared = torch.cat(
            [self.deter_in(deter), self.stoch_in(stoch.flatten(1)), self.action_in(bounded(actions))], -1
        )
        pieces = deter.unflatten(-1, (self.blocks, -1))
        pieces = torch.cat([pieces, shared.unsqueeze(1).expand(-1, self.blocks, -1)], -1)  # each block sees all of it
        gates = self.gates(self.hidden_norm(self.hidden(pieces.flatten(1))))
        # Within each block the outputs are reset, candidate and update, one after the other.
        reset, candidate, update = gates.unflatten(-1, (self.blocks, 3, -1)).unbind(-2)  # [B, g, D/g] each
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        # The bias of -1 makes the cell remember at first.
        update = torch.sigmoid(update - 1.0)
        return torch.lerp(deter, candidate.flatten(1), update.flatten(1))

    def prior(self, deter: Tensor) -> Tensor:
        """Logits of the latents expected without an observation. `[..., D]` → `[..., S, C]`"""
        return self.prior_out(self.prior_in(deter)).unflatten(-1, (self.groups, self.classes))

    def posterior(self, deter: Tensor, embed: Tensor) -> Tensor:
        """Logits of the latents given what was seen. `[..., D]`, `[..., E]` → `[..., S, C]`"""
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
        """Posterior states along replayed windows; gradients flow through the whole sequence.

        Everything that does not depend on the recurrent state is computed for all time steps at once.

        Args:
            deter: State before the first step. `[B, D]`
            stoch: State before the first step. `[B, S, C]`
            prev_actions: Action that led to each step. `[B, T, A]`
            embed: Encoder output. `[B, T, E]`
            is_first: Where true, the state and the previous action are zeroed first. `[B, T]`
            obs_mask: Where false nothing was seen, and the prior takes the posterior's place. `[B, T]`
            draws: Classes to use in place of sampling. `[B, T, S]`
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
"""What the fast forms compute without calling it."""


def kl_losses(posterior: OneHot, prior: OneHot, free_nats: float) -> tuple[Tensor, Tensor, Tensor]:
    """The two sides of the KL divergence with free nats; equal in value, different in gradient.

    Args:
        posterior: `[..., S, C]`
        prior: `[..., S, C]`
        free_nats: Below this the loss is constant and has no gradient.

    Returns:
        Dynamics loss `max(free, KL(sg(post) || prior))`, representation loss `max(free, KL(post || sg(prior)))`, and
        the divergence itself without gradient. `[...]` each
    """
    dynamics = posterior.detach().kl(prior)
    representation = posterior.kl(prior.detach())
    return dynamics.clamp(min=free_nats), representation.clamp(min=free_nats), dynamics.detach()
