"""The fast forms of `RSSM.observe` and of `roll_out`, chosen here and nowhere else.

There are two of each: C for CPUs (`native_scan`, `native_imagine`), and functions of tensors for all devices, which can
be compiled (`scan`, `imagine`). Both compute what `RSSM.core`, `prior`, `posterior` and `dist` define, and are not used
if one of these methods or a layer was replaced or hooked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux.accel.overriding import overridden, steps_back
from worldflux.models.dreamerv3.fast import native_imagine, weights
from worldflux.models.dreamerv3.fast.imagine import hidden_layers, imagine_step
from worldflux.models.dreamerv3.fast.native_scan import NativeScan
from worldflux.models.dreamerv3.fast.scan import Scan, observe_step, observe_step_backward
from worldflux.nn.definitions import fast_forms
from worldflux.nn.fast.kernels import kernels
from worldflux.nn.layers import are_plain
from worldflux.nn.precision import autocast
from worldflux.nn.transforms import bounded

if TYPE_CHECKING:
    from worldflux.models.dreamerv3.heads import Actor
    from worldflux.models.dreamerv3.parts import Draws
    from worldflux.models.dreamerv3.rssm import RSSM


class CompiledFunctions(NamedTuple):
    """The functions that training's loops call at each step."""

    observe: Callable[..., Any] = observe_step
    observe_backward: Callable[..., Any] = observe_step_backward
    imagine: Callable[..., Any] = imagine_step
    policy: Callable[..., Any] = hidden_layers

    def compiled(self) -> CompiledFunctions:
        """The same functions, compiled: a step becomes its products and a few kernels between them."""
        return CompiledFunctions(*(torch.compile(function, dynamic=False) for function in CompiledFunctions()))


def applies(
    rssm: RSSM, steps: Sequence[Callable[..., Any]], heads: Iterable[nn.Module], forwards: Sequence[Callable[..., Any]]
) -> bool:
    """Whether the fast forms may be used for a model; if not, the log says once what was replaced.

    Args:
        rssm: The model.
        steps: Methods of the model that the fast forms do not call.
        heads: Further modules whose weights are read.
        forwards: The `forward` methods that these must have.
    """
    if not rssm.fast or not fast_forms():
        return False
    changed = overridden(rssm, *steps)
    if not are_plain([*rssm.children(), *heads], *forwards):
        changed.append("layers or hooks")
    return not steps_back("The fast recurrence of DreamerV3", rssm, changed)


def observe(
    rssm: RSSM,
    deter: Tensor,
    stoch: Tensor,
    prev_actions: Tensor,
    embed: Tensor,
    keep: Tensor,
    obs_mask: Tensor | None,
    noise: Tensor | None,
    draws: Tensor | None,
) -> tuple[Tensor, ...]:
    """The posterior states that `RSSM.observe` defines, in the order of `Observed`.

    Args:
        rssm: The model.
        deter: State before the first step. `[B, D]`
        stoch: State before the first step. `[B, S, C]`
        prev_actions: Previous actions, zero where an episode begins. `[B, T, A]`
        embed: `[B, T, E]`
        keep: 0 where an episode begins, otherwise 1. `[B, T, 1]`
        obs_mask: False where nothing was observed. `[B, T]`
        noise: Uniform numbers with which the latents are drawn. `[T, B, S]`
        draws: Classes to use instead of drawing them. `[B, T, S]`
    """
    layer: Any = rssm.posterior_in.linears[0]
    embed_part = F.linear(embed, layer.weight[:, rssm.deter_dim :], layer.bias)  # [B, T, hidden]
    start = (rssm.unimix, deter, stoch, keep.transpose(0, 1))
    parts = (weights.action_part(rssm, prev_actions).transpose(0, 1), embed_part.float().transpose(0, 1))
    drawn = (noise, None if draws is None else draws.transpose(0, 1))
    given: tuple[Tensor, ...] = (*weights.of_core(rssm), *weights.of_posterior(rssm))
    if obs_mask is None and _takes_kernels(rssm, deter, stoch):
        results = NativeScan.apply(*start, *parts, *drawn, *given)
    else:
        seen = None
        if obs_mask is not None:
            seen = obs_mask.to(deter.dtype).unsqueeze(-1).transpose(0, 1)
            given = (*given, *weights.of_prior(rssm))
        functions = (rssm.functions.observe, rssm.functions.observe_backward)
        results = Scan.apply(*functions, *start, *parts, seen, *drawn, *given)
    return tuple(result.transpose(0, 1) for result in results)


def roll_out(
    rssm: RSSM, actor: Actor, deter: Tensor, stoch: Tensor, horizon: int, draws: Draws | None
) -> tuple[Tensor, Tensor]:
    """The features `[N, H+1, F]` and actions `[N, H+1, A]` that `rollout.roll_out` defines."""
    given, width = weights.of_imagination(rssm, actor.mlp), deter.shape[1]
    if draws is None and given.actor and _takes_kernels(rssm, deter, stoch):
        feats, taken = native_imagine.imagine(given, actor, deter, stoch, horizon, rssm.unimix)
        return feats.transpose(0, 1), taken.transpose(0, 1)
    # Each state is written to where the heads will read it.
    feats = deter.new_empty(horizon + 1, len(deter), width + stoch[0].numel())
    actions: list[Tensor] = []
    for h, feat in enumerate(feats):
        if h > 0:
            noise = torch.rand(stoch.shape[:2], device=stoch.device) if draws is None else None
            classes = None if draws is None else draws.imagined_stoch[:, h]
            action = bounded(actions[-1])
            with autocast(deter.device, None):
                deter, stoch = rssm.functions.imagine(given, deter, stoch, action, noise, classes, rssm.unimix)
        feat[:, :width], feat[:, width:] = deter, stoch.flatten(1)
        if draws is None:
            actions.append(actor.output(rssm.functions.policy(given.actor, feat)).sample())
        else:
            actions.append(draws.imagined_actions[:, h])
    return feats.transpose(0, 1), torch.stack(actions, 1)


def _takes_kernels(rssm: RSSM, *states: Tensor) -> bool:
    """Whether these states are computed in C; compiled functions take precedence."""
    return (
        rssm.functions == CompiledFunctions()
        and kernels(*states, rssm.gates.weight, elements=states[0].numel()) is not None
    )
