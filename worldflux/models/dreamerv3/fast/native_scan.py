"""The recurrence along replayed windows in C, as one autograd node.

`worldflux.models.dreamerv3.fast.scan` is the same in torch, for all devices and for windows with missing observations.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from worldflux.models.dreamerv3.fast.cell import CoreWeights, PosteriorWeights
from worldflux.models.dreamerv3.fast.native_model import Model
from worldflux.nn.fast.kernels import addresses, library

_POINTER = ctypes.c_void_p
_GIVEN = ("keep", "action_part", "embed_part", "uniform", "classes", "deter", "stoch", "logits", "probs")
_KEPT = (
    "deter_x", "stoch_x", "deter_normed", "stoch_normed", "inputs", "hidden_normed", "hidden", "gates", "candidate",
    "posterior_normed", "posterior_hidden", "inverse",
)  # fmt: skip
_GRADIENTS = (
    "d_deter", "d_stoch", "d_logits", "d_action", "d_embed", "d_deter_in", "d_stoch_in", "d_gates", "before"
)  # fmt: skip


class _Window(ctypes.Structure):
    """`Window` of `kernels.c`."""

    _fields_ = [
        *[(name, ctypes.c_int) for name in ("T", "N", "ld_posterior")],
        *[(name, _POINTER) for name in ("stoch_kernel", "posterior_kernel", "posterior_scale")],
        ("latents", _POINTER * 2),
        *[(name, _POINTER) for name in (*_GIVEN, *_KEPT, *_GRADIENTS)],
        ("d_weights", _POINTER * 15),
    ]

    def point(self, **tensors: Tensor | None) -> None:
        """Sets fields to the addresses of contiguous tensors."""
        for name, tensor in tensors.items():
            setattr(self, name, None if tensor is None else tensor.data_ptr())


class NativeScan(torch.autograd.Function):
    """Computes the same as `worldflux.models.dreamerv3.fast.scan.Scan`.

    Inputs: the unimix, the state before the first step `[N, D]` and `[N, S, C]`, then `[T, N, ...]` each `keep`,
    `action_part`, `embed_part`, `uniform`, `classes` (one of the last two is None), and the fields of `CoreWeights` and
    `PosteriorWeights`.

    Outputs: states `[T, N, D]`, latents and their logits `[T, N, S, C]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        unimix: float,
        deter: Tensor,
        stoch: Tensor,
        keep: Tensor,
        action_part: Tensor,
        embed_part: Tensor,
        uniform: Tensor | None,
        classes: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the windows from their first step to the last."""
        T, N, D = action_part.shape
        h, latents = embed_part.shape[-1], stoch[0].numel()
        new = action_part.new_empty
        deters, stochs, logits = new(T + 1, N, D), new(T + 1, *stoch.shape), new(T, *stoch.shape)
        deters[0], stochs[0] = deter, stoch
        widths = (D, latents, h, h, 2 * h, D, D, 3 * D, D, h, h, 4)
        kept = [new(T, N, width) for width in widths]
        given = (
            *(x.contiguous() for x in (keep, action_part, embed_part)),
            uniform,
            None if classes is None else classes.contiguous(),
            deters,
            stochs,
            logits,
            torch.empty_like(logits),
        )
        ctx.unimix = unimix
        model, window = _described(unimix, weights, given, kept)
        library().observe(ctypes.byref(model), ctypes.byref(window))
        ctx.save_for_backward(*weights, *given[:3], *given[5:], *kept)
        return deters[1:], stochs[1:], logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Goes backwards through the steps, then computes the weights' gradients over all steps at once."""
        saved = ctx.saved_tensors
        weights, given, kept = saved[:15], saved[15:22], saved[22:]
        model, window = _described(ctx.unimix, weights, (*given[:3], None, None, *given[3:]), kept)
        d_deter, d_stoch, d_logits = (
            grads[0].clone(memory_format=torch.contiguous_format),
            *(grad.contiguous() for grad in grads[1:]),
        )
        d_logits = d_logits.clone()
        action_part, embed_part, gates = given[1], given[2], kept[7]
        d_action, d_embed, d_gates = (torch.empty_like(x) for x in (action_part, embed_part, gates))
        d_deter_in, d_stoch_in = torch.empty_like(embed_part), torch.empty_like(embed_part)
        before = d_action.new_empty(d_deter[0].numel() + d_stoch[0].numel())
        d_weights = [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]
        window.point(
            d_deter=d_deter, d_stoch=d_stoch, d_logits=d_logits, d_action=d_action, d_embed=d_embed,
            d_deter_in=d_deter_in, d_stoch_in=d_stoch_in, d_gates=d_gates, before=before,
        )  # fmt: skip
        window.d_weights = addresses(d_weights)
        library().observe_backward(ctypes.byref(model), ctypes.byref(window))
        before_deter, before_stoch = before.split([d_deter[0].numel(), d_stoch[0].numel()])
        return (
            None,
            before_deter.view_as(d_deter[0]),
            before_stoch.view_as(d_stoch[0]),
            None,
            d_action,
            d_embed,
            None,
            None,
            *d_weights,
        )


def _described(
    unimix: float, weights: tuple[Tensor, ...], given: tuple[Tensor | None, ...], kept: Any
) -> tuple[Model, _Window]:
    """The structures; the tensors have to stay alive."""
    core, posterior = CoreWeights(*weights[:11]), PosteriorWeights(*weights[11:])
    stochs = given[6]
    assert stochs is not None
    steps, rows, groups, classes = stochs.shape
    model = Model.of(core, groups, classes, unimix)
    window = _Window(T=steps - 1, N=rows, ld_posterior=posterior.kernel.stride(0))
    window.point(stoch_kernel=core.stoch_kernel, posterior_kernel=posterior.kernel, posterior_scale=posterior.scale)
    window.latents = addresses(posterior[2:])
    window.point(**dict(zip((*_GIVEN, *_KEPT), (*given, *kept), strict=True)))
    return model, window
