"""One step of the recurrent state-space model as plain functions of tensors, and their gradients.

Training unrolls the cell in two places: along replayed windows (`scan.py`) and in imagination (`imagine.py`). Both use
the functions here, which take the weights in the precision of the products and keep everything else in float32. What
they compute is defined by `RSSM.core`, `RSSM.posterior` and `RSSM.prior`.

Notation: N rows, D width of the deterministic state in g blocks of w, h hidden width, S rows of C classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from worldflux.nn.distributions import softmax
from worldflux.nn.layers import blocked, inverse_rms, joined, norm_silu_backward


class CoreWeights(NamedTuple):
    """Parameters of the recurrence; matrices in the precision of the products."""

    deter_kernel: Tensor
    """`[h, D]`"""
    deter_bias: Tensor
    deter_scale: Tensor
    """Scale of the norm in float32, like all scales. `[h]`"""
    stoch_kernel: Tensor
    """`[h, S * C]`"""
    stoch_bias: Tensor
    stoch_scale: Tensor
    recurrent: Tensor
    """Block-diagonal part of the hidden layer, for the state itself. `[g, w, w]`"""
    dense: Tensor
    """Dense part, for the layers of the state and the latents, `[2 * h, D]`; in imagination also for that of the
    action, `[3 * h, D]`."""
    hidden_scale: Tensor
    """`[D]`"""
    gates: Tensor
    """`[g, w, 3 * w]`"""
    gates_bias: Tensor
    """`[3 * D]`"""


class PosteriorWeights(NamedTuple):
    """Parameters of the latents given the state and the observation."""

    kernel: Tensor
    """Part of the first kernel for the state. `[h, D]`"""
    scale: Tensor
    """`[h]`"""
    out_kernel: Tensor
    """`[S * C, h]`"""
    out_bias: Tensor


class PriorWeights(NamedTuple):
    """Parameters of the latents given the state alone: in imagination, and where nothing was observed."""

    kernel: Tensor
    """`[h, D]`"""
    bias: Tensor
    scale: Tensor
    """`[h]`"""
    inner_kernel: Tensor
    """`[h, h]`"""
    inner_bias: Tensor
    inner_scale: Tensor
    out_kernel: Tensor
    """`[S * C, h]`"""
    out_bias: Tensor


class CoreSaved(NamedTuple):
    """Values that the gradient of a step needs."""

    deter: Tensor
    """State before the step. `[N, D]`"""
    stoch: Tensor
    """`[N, S * C]`"""
    deter_normed: Tensor
    deter_inverse: Tensor
    stoch_normed: Tensor
    stoch_inverse: Tensor
    hidden_normed: Tensor
    hidden_inverse: Tensor
    inputs: Tensor
    """Inputs of the dense part. `[N, 2 * h]`"""
    hidden: Tensor
    """Input of the gates. `[N, D]`"""
    reset: Tensor
    """`[g, N, w]`, like the following."""
    candidate_in: Tensor
    candidate: Tensor
    update: Tensor


class CoreGrads(NamedTuple):
    """Gradients with respect to the outputs of a step's layers, from which those of the weights are computed."""

    deter: Tensor
    """`[N, h]`"""
    deter_scales: Tensor
    """Contribution of each row to the gradient of the norm's scale, like all fields with this ending. `[N, h]`"""
    stoch: Tensor
    stoch_scales: Tensor
    hidden: Tensor
    """`[N, D]`; also the gradient of the action's part."""
    hidden_scales: Tensor
    gates: Tensor
    """`[g, N, 3 * w]`"""


class PosteriorGrads(NamedTuple):
    """Gradients with respect to the outputs of the posterior's layers."""

    logits: Tensor
    """`[N, S * C]`"""
    hidden: Tensor
    """`[N, h]`; also the gradient of the embedding's part."""
    hidden_scales: Tensor


class PosteriorSaved(NamedTuple):
    """Values that the gradient of the posterior needs."""

    deter: Tensor
    normed: Tensor
    inverse: Tensor
    hidden: Tensor
    probs: Tensor
    """Softmax of the logits, without unimix. `[N, S, C]`"""


class PriorGrads(NamedTuple):
    """Gradients with respect to the outputs of the prior's layers."""

    logits: Tensor
    """`[N, S * C]`"""
    hidden: Tensor
    """`[N, h]`"""
    hidden_scales: Tensor
    inner: Tensor
    """`[N, h]`"""
    inner_scales: Tensor


class PriorSaved(NamedTuple):
    """Values that the gradient of the prior needs."""

    seen: Tensor | None
    """1 where the posterior's latents were taken, 0 where the prior's were; None in imagination. `[N, 1]`"""
    deter: Tensor
    normed: Tensor
    inverse: Tensor
    hidden: Tensor
    inner_normed: Tensor
    inner_inverse: Tensor
    inner_hidden: Tensor


def linear(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """A linear layer with the product in the kernel's precision; `[N, in]` → float32 `[N, out]`."""
    return F.linear(x.to(kernel.dtype), kernel, bias).float()


def normalise_(x: Tensor) -> tuple[Tensor, Tensor]:
    """RMS norm without its scale in place of `x`, and the factor that it multiplied with. `[N, h]`, `[N, 1]`"""
    inverse = inverse_rms(x)
    return x.mul_(inverse), inverse


def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent, on a CPU written with a sigmoid: torch's own kernel takes six times as long."""
    return torch.sigmoid(x + x) * 2.0 - 1.0 if x.device.type == "cpu" else torch.tanh(x)


def core(
    w: CoreWeights, deter: Tensor, stoch: Tensor, added: Tensor, action: Tensor | None = None
) -> tuple[Tensor, CoreSaved]:
    """The next deterministic state.

    Args:
        w: Weights.
        deter: `[N, D]`
        stoch: `[N, S * C]`
        added: Vector added to the hidden layer: the bias, and the contribution of the action unless `action` is given.
            `[N, D]` or `[D]`
        action: Output of the action's layer, normalised and scaled but before SiLU: the last input of the dense part.
            `[N, h]`
    """
    blocks, kind = len(w.recurrent), w.recurrent.dtype
    deter_normed, deter_inverse = normalise_(linear(deter, w.deter_kernel, w.deter_bias))
    stoch_normed, stoch_inverse = normalise_(linear(stoch, w.stoch_kernel, w.stoch_bias))
    parts = [deter_normed * w.deter_scale, stoch_normed * w.stoch_scale]
    inputs = F.silu(torch.cat(parts if action is None else [*parts, action], -1), inplace=True)
    hidden = torch.mm(inputs.to(kind), w.dense).float().add_(added)
    blocked(hidden, blocks).add_(torch.bmm(blocked(deter, blocks).to(kind), w.recurrent))
    hidden_normed, hidden_inverse = normalise_(hidden)
    hidden = F.silu(hidden_normed * w.hidden_scale, inplace=True)
    gates = torch.bmm(blocked(hidden, blocks).to(kind), w.gates).float().add_(w.gates_bias.view(blocks, 1, -1))
    reset, candidate_in, update = gates.chunk(3, -1)  # [g, N, w] each
    reset.sigmoid_()
    candidate = tanh(reset * candidate_in)
    update.sub_(1.0).sigmoid_()  # the bias of -1 makes the cell remember at first
    new = joined(torch.lerp(blocked(deter, blocks), candidate, update))
    saved = CoreSaved(
        deter=deter,
        stoch=stoch,
        deter_normed=deter_normed,
        deter_inverse=deter_inverse,
        stoch_normed=stoch_normed,
        stoch_inverse=stoch_inverse,
        inputs=inputs,
        hidden_normed=hidden_normed,
        hidden_inverse=hidden_inverse,
        hidden=hidden,
        reset=reset,
        candidate_in=candidate_in,
        candidate=candidate,
        update=update,
    )
    return new, saved


def core_backward(w: CoreWeights, saved: CoreSaved, grad: Tensor) -> tuple[Tensor, Tensor, CoreGrads]:
    """Gradients of one step with respect to the state `[N, D]`, the latents `[N, S * C]` and the layers' outputs."""
    blocks, kind = len(w.recurrent), w.recurrent.dtype
    grad_new = blocked(grad, blocks)
    grad_candidate = grad_new * saved.update
    grad_update = grad_new * (saved.candidate - blocked(saved.deter, blocks))
    grad_activation = torch.ops.aten.tanh_backward(grad_candidate, saved.candidate)
    gates = torch.cat(
        [
            torch.ops.aten.sigmoid_backward(grad_activation * saved.candidate_in, saved.reset),
            grad_activation * saved.reset,
            torch.ops.aten.sigmoid_backward(grad_update, saved.update),
        ],
        -1,
    )  # [g, N, 3 * w]
    grad_hidden = joined(torch.bmm(gates.to(kind), w.gates.transpose(1, 2))).float()
    hidden, hidden_scales = norm_silu_backward(grad_hidden, saved.hidden_normed, saved.hidden_inverse, w.hidden_scale)
    recurrent = torch.bmm(blocked(hidden, blocks).to(kind), w.recurrent.transpose(1, 2)).float()
    from_deter, from_stoch = torch.mm(hidden.to(kind), w.dense.t()).float().chunk(2, -1)
    deter, deter_scales = norm_silu_backward(from_deter, saved.deter_normed, saved.deter_inverse, w.deter_scale)
    stoch, stoch_scales = norm_silu_backward(from_stoch, saved.stoch_normed, saved.stoch_inverse, w.stoch_scale)
    grad_deter = joined(grad_new - grad_candidate + recurrent) + torch.mm(deter.to(kind), w.deter_kernel).float()
    grad_stoch = torch.mm(stoch.to(kind), w.stoch_kernel).float()
    return grad_deter, grad_stoch, CoreGrads(deter, deter_scales, stoch, stoch_scales, hidden, hidden_scales, gates)


def posterior(
    w: PosteriorWeights, deter: Tensor, embed_part: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, PosteriorSaved]:
    """Logits of the latents given what was seen.

    Args:
        w: Weights.
        deter: `[N, D]`
        embed_part: Contribution of the embedding to the first layer, including the bias. `[N, h]`
        shape: S and C.

    Returns:
        `[N, S, C]`
    """
    normed, inverse = normalise_(torch.mm(deter.to(w.kernel.dtype), w.kernel.t()).float().add_(embed_part))
    hidden = F.silu(normed * w.scale, inplace=True)
    logits = linear(hidden, w.out_kernel, w.out_bias).unflatten(-1, shape)
    return logits, PosteriorSaved(deter, normed, inverse, hidden, softmax(logits))


def prior(
    w: PriorWeights, deter: Tensor, shape: tuple[int, int], seen: Tensor | None = None
) -> tuple[Tensor, PriorSaved]:
    """Logits of the latents expected without an observation, `[N, S, C]`.

    Args:
        w: Weights.
        deter: `[N, D]`
        shape: S and C.
        seen: Kept for the gradient. `[N, 1]`
    """
    normed, inverse = normalise_(linear(deter, w.kernel, w.bias))
    hidden = F.silu(normed * w.scale, inplace=True)
    inner_normed, inner_inverse = normalise_(linear(hidden, w.inner_kernel, w.inner_bias))
    inner_hidden = F.silu(inner_normed * w.inner_scale, inplace=True)
    logits = linear(inner_hidden, w.out_kernel, w.out_bias).unflatten(-1, shape)
    return logits, PriorSaved(seen, deter, normed, inverse, hidden, inner_normed, inner_inverse, inner_hidden)


def latents_backward(probs: Tensor, grad_logits: Tensor, grad_probs: Tensor) -> Tensor:
    """Gradient with respect to the logits, from those of the logits themselves and of their softmax `[N, S, C]`.

    Returns:
        `[N, S * C]`
    """
    weighted = grad_probs * probs
    return (grad_logits + weighted - probs * weighted.sum(-1, keepdim=True)).flatten(1)


def posterior_backward(w: PosteriorWeights, saved: PosteriorSaved, logits: Tensor) -> tuple[Tensor, PosteriorGrads]:
    """Gradients of the state `[N, D]` and of the layers' outputs, from that of the logits `[N, S * C]`."""
    kind = w.kernel.dtype
    grad_hidden = torch.mm(logits.to(kind), w.out_kernel).float()
    hidden, scales = norm_silu_backward(grad_hidden, saved.normed, saved.inverse, w.scale)
    return torch.mm(hidden.to(kind), w.kernel).float(), PosteriorGrads(logits, hidden, scales)


def prior_backward(w: PriorWeights, saved: PriorSaved, logits: Tensor) -> tuple[Tensor, PriorGrads]:
    """Gradients of the state `[N, D]` and of the prior's layers' outputs, from that of the logits `[N, S * C]`."""
    kind = w.kernel.dtype
    grad_inner = torch.mm(logits.to(kind), w.out_kernel).float()
    inner, inner_scales = norm_silu_backward(grad_inner, saved.inner_normed, saved.inner_inverse, w.inner_scale)
    grad_hidden = torch.mm(inner.to(kind), w.inner_kernel).float()
    hidden, scales = norm_silu_backward(grad_hidden, saved.normed, saved.inverse, w.scale)
    deter = torch.mm(hidden.to(kind), w.kernel).float()
    return deter, PriorGrads(logits, hidden, scales, inner, inner_scales)
