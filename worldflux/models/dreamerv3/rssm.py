"""The recurrent state-space model: a block-diagonal GRU with categorical latents.

Source: DreamerV3, arXiv:2301.04104, and its reference implementation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux.nn.distributions import OneHot
from worldflux.nn.layers import MLP, BlockLinear, Linear, NormSiLU, block_matmul


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
        return self._step(deter, stoch.flatten(1), *self._prepare_actions(actions))

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
        steps = prev_actions.shape[1]
        keep = 1.0 - is_first.to(deter.dtype).unsqueeze(-1)  # [B, T, 1]
        action_part, recurrent, stoch_and_deter = self._prepare_actions(prev_actions * keep)
        # The posterior's first layer, split into what the embedding and what the state contributes.
        layer = self.posterior_in.linears[0]
        assert isinstance(layer, Linear)
        embed_part = F.linear(embed, layer.weight[:, self.deter_dim :], layer.bias)  # [B, T, hidden]
        deter_weight = layer.weight[:, : self.deter_dim].t()
        if draws is None:
            noise = torch.rand(steps, *stoch.shape[:2], device=stoch.device)
        flat = stoch.flatten(1)
        deters, stochs, logits = [], [], []
        for t in range(steps):
            deter = self._step(deter * keep[:, t], flat * keep[:, t], action_part[:, t], recurrent, stoch_and_deter)
            hidden = self.posterior_in.norms[0](torch.addmm(embed_part[:, t], deter, deter_weight))
            logit = self.posterior_out(hidden).unflatten(-1, (self.groups, self.classes))
            if obs_mask is not None:
                logit = torch.where(obs_mask[:, t, None, None], logit, self.prior(deter))
            dist = self.dist(logit)
            sample = dist.sample(noise[t]) if draws is None else dist.straight_through(draws[:, t])
            flat = sample.flatten(1)
            deters.append(deter)
            stochs.append(sample)
            logits.append(logit)
        return Observed(torch.stack(deters, 1), torch.stack(stochs, 1), torch.stack(logits, 1))

    def _prepare_actions(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the actions contribute to the core's hidden layer, and that layer's kernel in two pieces.

        The hidden layer of block k sees `[deter_k, x0, x1, x2]`: only `deter_k` differs between blocks, so the kernel
        is a block-diagonal one for `deter` and a dense one for the rest; of that, `x2` depends on the action alone.

        Returns:
            Contribution of the actions with the bias `[..., D]`, kernel for `deter` `[g, D/g, D/g]`, and kernel for
            `[x0, x1]` `[2 * hidden, D]`.
        """
        actions = actions / actions.abs().clamp(min=1.0).detach()
        width = self.deter_dim // self.blocks
        kernel = self.hidden.weight
        dense = kernel[:, width:].transpose(0, 1).flatten(1)  # [3 * hidden, D]
        split = 2 * dense.shape[0] // 3
        contribution = self.action_in(actions) @ dense[split:] + self.hidden.bias
        return contribution, kernel[:, :width], dense[:split]

    def _step(self, deter: Tensor, flat: Tensor, action_part: Tensor, recurrent: Tensor, dense: Tensor) -> Tensor:
        """The core with its time-independent parts prepared; `flat` is `[B, S * C]`."""
        inputs = torch.cat([self.deter_in(deter), self.stoch_in(flat)], -1)
        hidden = block_matmul(deter, recurrent) + torch.addmm(action_part, inputs, dense)
        gates = self.gates(self.hidden_norm(hidden))
        # Within each block the outputs are reset, candidate and update, one after the other.
        reset, candidate, update = gates.unflatten(-1, (self.blocks, 3, -1)).unbind(-2)  # [B, g, D/g] each
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        # The bias of -1 makes the cell remember at first.
        update = torch.sigmoid(update - 1.0)
        return torch.lerp(deter, candidate.flatten(1), update.flatten(1))


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
