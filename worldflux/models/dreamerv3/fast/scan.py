"""The recurrence along replayed windows as one autograd node, with its gradient written out.

It computes what `RSSM.observe` computes step by step with `core` and `posterior`. With autograd, each of 64 steps would
add some fifty nodes, and a product for the gradient of every matrix. Here a step keeps only what its gradient needs,
and the gradient of each matrix is one product over all steps, after the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from worldflux.models.dreamerv3.fast.cell import (
    CoreGrads,
    CoreSaved,
    CoreWeights,
    PosteriorGrads,
    PosteriorSaved,
    PosteriorWeights,
    PriorGrads,
    PriorSaved,
    PriorWeights,
    core,
    core_backward,
    latents_backward,
    posterior,
    posterior_backward,
    prior,
    prior_backward,
)
from worldflux.nn.distributions import inverse_cdf, softmax
from worldflux.nn.layers import blocked
from worldflux.nn.precision import autocast


def observe_step(
    core_weights: CoreWeights,
    posterior_weights: PosteriorWeights,
    prior_weights: PriorWeights | None,
    deter: Tensor,
    stoch: Tensor,
    keep: Tensor,
    action_part: Tensor,
    embed_part: Tensor,
    seen: Tensor | None,
    noise: Tensor | None,
    classes: Tensor | None,
    unimix: float,
) -> tuple[Tensor, Tensor, Tensor, CoreSaved, PosteriorSaved, PriorSaved | None]:
    """One step of a window: the next state, its latents `[N, S, C]` and their logits, and what the gradient needs.

    Args:
        core_weights: Parameters of the recurrence.
        posterior_weights: Parameters of the posterior.
        prior_weights: Parameters of the prior; needed only with `seen`.
        deter: `[N, D]`
        stoch: `[N, S, C]`
        keep: 0 where an episode starts, otherwise 1. `[N, 1]`
        action_part: `[N, D]`
        embed_part: `[N, h]`
        seen: 1, or 0 where the prior takes the posterior's place; None if everything was observed. `[N, 1]`
        noise: Uniform numbers with which the latents are drawn. `[N, S]`
        classes: Latents to use instead of drawing them. `[N, S]`
        unimix: Share of the uniform distribution.
    """
    deter, core_saved = core(core_weights, deter * keep, stoch.flatten(1) * keep, action_part)
    shape = stoch.shape[1], stoch.shape[2]
    logits, saved = posterior(posterior_weights, deter, embed_part, shape)
    prior_saved = None
    if seen is not None:
        assert prior_weights is not None
        expected, prior_saved = prior(prior_weights, deter, shape, seen)
        logits = torch.where(seen.unsqueeze(-1) > 0, logits, expected)
        saved = saved._replace(probs=softmax(logits))
    if classes is None:
        classes = inverse_cdf((1.0 - unimix) * saved.probs + unimix / stoch.shape[2], noise)
    stoch = torch.zeros_like(logits).scatter_(-1, classes.unsqueeze(-1), 1.0)
    return deter, stoch, logits, core_saved, saved, prior_saved


def observe_step_backward(
    core_weights: CoreWeights,
    posterior_weights: PosteriorWeights,
    prior_weights: PriorWeights | None,
    core_saved: CoreSaved,
    saved: PosteriorSaved,
    prior_saved: PriorSaved | None,
    keep: Tensor,
    grad_deter: Tensor,
    grad_stoch: Tensor,
    grad_logits: Tensor,
    unimix: float,
) -> tuple[Tensor, Tensor, CoreGrads, PosteriorGrads, PriorGrads | None]:
    """Gradients with respect to the state before the step, `[N, D]` and `[N, S, C]`, and to the layers' outputs.

    The latents pass their gradient straight through to the probabilities that they were drawn from.
    """
    grad = latents_backward(saved.probs, grad_logits, (1.0 - unimix) * grad_stoch)
    prior_grads = None
    if prior_saved is not None:
        assert prior_weights is not None and prior_saved.seen is not None
        through, prior_grads = prior_backward(prior_weights, prior_saved, grad * (1.0 - prior_saved.seen))
        grad_deter, grad = grad_deter + through, grad * prior_saved.seen
    through, posterior_grads = posterior_backward(posterior_weights, saved, grad)
    before, stoch, core_grads = core_backward(core_weights, core_saved, grad_deter + through)
    return before * keep, (stoch * keep).view_as(grad_stoch), core_grads, posterior_grads, prior_grads


class Scan(torch.autograd.Function):
    """`observe_step` along the windows.

    Inputs: `observe_step` and `observe_step_backward` (or compiled ones), the unimix, the state before the first step
    `[N, D]` and `[N, S, C]`, then `[T, N, ...]` each `keep`, `action_part`, `embed_part`, `seen` (or None), `noise`,
    `classes` (one of the last two is None), and the fields of `CoreWeights`, of `PosteriorWeights`, and, with `seen`,
    of `PriorWeights`.

    Outputs: states `[T, N, D]`, latents and their logits `[T, N, S, C]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        step: Callable[..., Any],
        step_backward: Callable[..., Any],
        unimix: float,
        deter: Tensor,
        stoch: Tensor,
        keep: Tensor,
        action_part: Tensor,
        embed_part: Tensor,
        seen: Tensor | None,
        noise: Tensor | None,
        classes: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the windows from their first step to the last."""
        first = len(CoreWeights._fields)
        second = first + len(PosteriorWeights._fields)
        ctx.weights = (
            CoreWeights(*weights[:first]),
            PosteriorWeights(*weights[first:second]),
            None if seen is None else PriorWeights(*weights[second:]),
        )
        ctx.step_backward, ctx.unimix, ctx.keep = step_backward, unimix, keep
        results = []
        with autocast(deter.device, None):
            for t in range(len(keep)):
                result = step(
                    *ctx.weights,
                    deter,
                    stoch,
                    keep[t],
                    action_part[t],
                    embed_part[t],
                    None if seen is None else seen[t],
                    None if noise is None else noise[t],
                    None if classes is None else classes[t],
                    unimix,
                )
                deter, stoch = result[:2]
                results.append(result)
        deters, stochs, logits, ctx.core_saved, ctx.saved, ctx.prior_saved = zip(*results, strict=True)
        return torch.stack(deters), torch.stack(stochs), torch.stack(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_deter: Tensor, grad_stoch: Tensor, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
        """Goes backwards through the steps, then computes the weights' gradients over all steps at once."""
        before_deter, before_stoch = torch.zeros_like(grad_deter[0]), torch.zeros_like(grad_stoch[0])
        grads = []
        for t in reversed(range(len(ctx.keep))):
            before_deter, before_stoch, *of_layers = ctx.step_backward(
                *ctx.weights,
                ctx.core_saved[t],
                ctx.saved[t],
                ctx.prior_saved[t],
                ctx.keep[t],
                grad_deter[t] + before_deter,
                grad_stoch[t] + before_stoch,
                grad_logits[t],
                ctx.unimix,
            )
            grads.append(of_layers)
        core_grads, posterior_grads, prior_grads = zip(*reversed(grads), strict=True)
        of_weights = [
            *_core_weight_grads(ctx.core_saved, core_grads, ctx.weights[0]),
            *_posterior_weight_grads(ctx.saved, posterior_grads, ctx.weights[1]),
        ]
        if ctx.weights[2] is not None:
            of_weights += _prior_weight_grads(ctx.prior_saved, prior_grads, ctx.weights[2])
        action_part = torch.stack([grads.hidden for grads in core_grads])
        embed_part = torch.stack([grads.hidden for grads in posterior_grads])
        nones = None, None, None
        return *nones, before_deter, before_stoch, None, action_part, embed_part, *nones, *of_weights


def _core_weight_grads(saved: Sequence[CoreSaved], grads: Sequence[CoreGrads], weights: CoreWeights) -> CoreWeights:
    """Gradients of the weights of the recurrence, from all steps."""
    kind, blocks = weights.dense.dtype, len(weights.recurrent)
    deter, inputs, hidden = (_rows(saved, name).to(kind) for name in ("deter", "inputs", "hidden"))
    grad_deter, grad_stoch, grad_hidden = (_rows(grads, name) for name in ("deter", "stoch", "hidden"))
    grad_gates = torch.cat([g.gates for g in grads], 1)  # [g, T * N, 3 * w]
    return CoreWeights(
        deter_kernel=grad_deter.to(kind).t() @ deter,
        deter_bias=grad_deter.sum(0).to(kind),
        deter_scale=_rows(grads, "deter_scales").sum(0),
        stoch_kernel=grad_stoch.to(kind).t() @ _rows(saved, "stoch").to(kind),
        stoch_bias=grad_stoch.sum(0).to(kind),
        stoch_scale=_rows(grads, "stoch_scales").sum(0),
        recurrent=torch.bmm(blocked(deter, blocks).transpose(1, 2), blocked(grad_hidden.to(kind), blocks)),
        dense=inputs.t() @ grad_hidden.to(kind),
        hidden_scale=_rows(grads, "hidden_scales").sum(0),
        gates=torch.bmm(blocked(hidden, blocks).transpose(1, 2), grad_gates.to(kind)),
        gates_bias=grad_gates.sum(1).flatten(),
    )


def _posterior_weight_grads(
    saved: Sequence[PosteriorSaved], grads: Sequence[PosteriorGrads], weights: PosteriorWeights
) -> PosteriorWeights:
    """Gradients of the weights of the posterior, from all steps."""
    kind = weights.kernel.dtype
    logits, hidden = _rows(grads, "logits"), _rows(grads, "hidden")
    return PosteriorWeights(
        kernel=hidden.to(kind).t() @ _rows(saved, "deter").to(kind),
        scale=_rows(grads, "hidden_scales").sum(0),
        out_kernel=logits.to(kind).t() @ _rows(saved, "hidden").to(kind),
        out_bias=logits.sum(0).to(kind),
    )


def _prior_weight_grads(
    saved: Sequence[PriorSaved], grads: Sequence[PriorGrads], weights: PriorWeights
) -> PriorWeights:
    """Gradients of the weights of the prior, from the rows in which nothing was observed."""
    kind = weights.kernel.dtype
    logits, inner, hidden = (_rows(grads, name) for name in ("logits", "inner", "hidden"))
    return PriorWeights(
        kernel=hidden.to(kind).t() @ _rows(saved, "deter").to(kind),
        bias=hidden.sum(0).to(kind),
        scale=_rows(grads, "hidden_scales").sum(0),
        inner_kernel=inner.to(kind).t() @ _rows(saved, "hidden").to(kind),
        inner_bias=inner.sum(0).to(kind),
        inner_scale=_rows(grads, "inner_scales").sum(0),
        out_kernel=logits.to(kind).t() @ _rows(saved, "inner_hidden").to(kind),
        out_bias=logits.sum(0).to(kind),
    )


def _rows(steps: Sequence[NamedTuple], name: str) -> Tensor:
    """One field of all steps, `[T * N, ...]`."""
    return torch.cat([getattr(step, name) for step in steps])
