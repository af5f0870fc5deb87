"""The recurrent state-space model: a block-diagonal GRU with categorical latents.

Source: DreamerV3, arXiv:2301.04104, and its reference implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux.accel.overriding import overridden, steps_back
from worldflux.models.dreamerv3.fast.cell import CoreWeights, PosteriorWeights, PriorWeights
from worldflux.models.dreamerv3.fast.imagine import ImaginationWeights, hidden_layers, imagine_step, layers_of
from worldflux.models.dreamerv3.fast.native_scan import NativeScan
from worldflux.models.dreamerv3.fast.scan import Scan, observe_step, observe_step_backward
from worldflux.nn.definitions import fast_forms
from worldflux.nn.distributions import OneHot
from worldflux.nn.fast.kernels import kernels
from worldflux.nn.layers import MLP, BlockLinear, Linear, NormSiLU, are_plain
from worldflux.nn.precision import products


class Observed(NamedTuple):
    """Posterior states along replayed windows."""

    deter: Tensor
    """`[B, T, D]`"""
    stoch: Tensor
    """Samples with straight-through gradients. `[B, T, S, C]`"""
    logits: Tensor
    """Posterior logits. `[B, T, S, C]`"""


class Cells(NamedTuple):
    """The functions that training's loops call at each step."""

    observe: Callable[..., Any] = observe_step
    observe_backward: Callable[..., Any] = observe_step_backward
    imagine: Callable[..., Any] = imagine_step
    policy: Callable[..., Any] = hidden_layers

    def compiled(self) -> Cells:
        """The same, compiled: a step becomes its products and a few kernels between them."""
        return Cells(*(torch.compile(function, dynamic=False) for function in Cells()))


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
        self.cells = Cells()
        self.fast = True
        """False: the plain computations that the fast ones are tested against."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cells": Cells()}  # compiled functions stay in their process

    def takes_fast_form(self, *heads: nn.Module, forwards: Sequence[Callable[..., Any]] = ()) -> bool:
        """Whether the fast forms may stand for the functions below: they are wanted, and nothing was replaced.

        Args:
            *heads: Further modules whose weights the fast form reads.
            forwards: Of these.
        """
        if not self.fast or not fast_forms():
            return False
        changed = overridden(self, *_STEPS)
        if not are_plain([*self.children(), *heads], *forwards):
            changed.append("layers or hooks")
        return not steps_back("The fast recurrence of DreamerV3", self, changed)

    def takes_kernels(self, *states: Tensor) -> bool:
        """Whether the fast form for these states is the one in C, and not the one that the cells compute."""
        return self.cells == Cells() and kernels(*states, self.gates.weight, elements=states[0].numel()) is not None

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
        if not self.takes_fast_form():
            return self._observe_plainly(deter, stoch, prev_actions, embed, keep, obs_mask, noise, draws)
        layer: Any = self.posterior_in.linears[0]
        embed_part = F.linear(embed, layer.weight[:, self.deter_dim :], layer.bias)  # [B, T, hidden]
        start = (self.unimix, deter, stoch, keep.transpose(0, 1))
        parts = (self.action_part(prev_actions).transpose(0, 1), embed_part.float().transpose(0, 1))
        drawn = (noise, None if draws is None else draws.transpose(0, 1))
        weights: tuple[Tensor, ...] = (*self.core_weights(), *self.posterior_weights())
        if obs_mask is None and self.takes_kernels(deter, stoch):
            results = NativeScan.apply(*start, *parts, *drawn, *weights)
        else:
            seen = None
            if obs_mask is not None:
                seen = obs_mask.to(deter.dtype).unsqueeze(-1).transpose(0, 1)
                weights = (*weights, *self.prior_weights())
            cells = (self.cells.observe, self.cells.observe_backward)
            results = Scan.apply(*cells, *start, *parts, seen, *drawn, *weights)
        return Observed(*(result.transpose(0, 1) for result in results))

    def _observe_plainly(
        self,
        deter: Tensor,
        stoch: Tensor,
        prev_actions: Tensor,
        embed: Tensor,
        keep: Tensor,
        obs_mask: Tensor | None,
        noise: Tensor | None,
        draws: Tensor | None,
    ) -> Observed:
        """What `observe` computes, step by step with the functions above."""
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

    # The weights as the cell's functions take them

    def core_weights(self) -> CoreWeights:
        """Weights of the recurrence, matrices in autocast's precision; gradients flow through.

        The hidden layer of block k sees `[deter_k, x0, x1, x2]`: only `deter_k` differs between blocks, so the kernel
        is a block-diagonal one for `deter` and a dense one for the rest; of that, `x2` depends on the action alone.
        """
        kind = self._precision()
        (deter_in,), (stoch_in,) = layers_of(self.deter_in, kind), layers_of(self.stoch_in, kind)
        return CoreWeights(
            deter_kernel=deter_in.kernel,
            deter_bias=deter_in.bias,
            deter_scale=deter_in.scale,
            stoch_kernel=stoch_in.kernel,
            stoch_bias=stoch_in.bias,
            stoch_scale=stoch_in.scale,
            recurrent=self.hidden.weight[:, : self.deter_dim // self.blocks].to(kind),
            dense=self._dense_kernel()[: 2 * len(deter_in.kernel)].to(kind),
            hidden_scale=self.hidden_norm.scale,
            gates=self.gates.weight.to(kind),
            gates_bias=self.gates.bias,
        )

    def posterior_weights(self) -> PosteriorWeights:
        """Weights of the posterior, as `core_weights` gives those of the recurrence."""
        kind = self._precision()
        (layer,) = layers_of(self.posterior_in, kind)
        return PosteriorWeights(
            kernel=layer.kernel[:, : self.deter_dim],
            scale=layer.scale,
            out_kernel=self.posterior_out.weight.to(kind),
            out_bias=self.posterior_out.bias.to(kind),
        )

    def prior_weights(self) -> PriorWeights:
        """Weights of the prior, as `core_weights` gives those of the recurrence."""
        kind = self._precision()
        layers = layers_of(self.prior_in, kind)
        hidden = [weight for layer in layers for weight in layer]
        return PriorWeights._make([*hidden, self.prior_out.weight.to(kind), self.prior_out.bias.to(kind)])

    def imagination_weights(self, actor: MLP) -> ImaginationWeights:
        """Weights of the prior's side, and of the policy's hidden layers, as `core_weights` gives those of the core."""
        kind = self._precision()
        return ImaginationWeights(
            core=self.core_weights(),
            action_in=layers_of(self.action_in, kind)[0],
            dense=self._dense_kernel().to(kind),
            hidden_bias=self.hidden.bias.to(kind),
            prior_in=layers_of(self.prior_in, kind),
            prior_kernel=self.prior_out.weight.to(kind),
            prior_bias=self.prior_out.bias.to(kind),
            actor=layers_of(actor, kind),
        )

    def action_part(self, actions: Tensor) -> Tensor:
        """What actions add to the hidden layer, its bias included; all that does not wait for the recurrence.

        Args:
            actions: `[..., A]`; magnitudes above 1 are brought back to 1.

        Returns:
            `[..., D]`, float32.
        """
        hidden = self.action_in(bounded(actions))
        return (hidden @ self._dense_kernel()[2 * hidden.shape[-1] :]).float() + self.hidden.bias

    def _dense_kernel(self) -> Tensor:
        """The hidden layer's kernel for what all blocks see. `[3 * hidden, D]`"""
        return self.hidden.weight[:, self.deter_dim // self.blocks :].transpose(0, 1).flatten(1)

    def _precision(self) -> torch.dtype:
        """What matrices are multiplied in here."""
        return products(self.gates.weight.device)


_STEPS = (RSSM.core, RSSM.prior, RSSM.posterior, RSSM.dist)
"""What the fast forms compute without calling it."""


def bounded(actions: Tensor) -> Tensor:
    """Actions with magnitudes above 1 brought back to 1, without a gradient through the magnitude."""
    return actions / actions.abs().clamp(min=1.0).detach()


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
