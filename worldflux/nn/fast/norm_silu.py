"""Several MLPs on one input as one autograd node; `worldflux.nn.layers.MLP` is the definition.

Rows pass through all layers in portions that stay in a core's cache, and the norm and SiLU take one pass, both forward
and backward.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from worldflux.nn.fast.kernels import addresses, kernels, library

PORTION = 256
"""Number of rows that pass through all layers together, as in `kernels.c`."""


class _Mlp(ctypes.Structure):
    """Counterpart of the struct `Mlp` of `kernels.c`."""

    _fields_ = [
        *[(name, ctypes.c_int) for name in ("layers", "units", "kept")],
        *[(name, ctypes.c_void_p) for name in ("weights", "normed", "inverse", "hidden", "out", "grad", "d_weights")],
    ]


def mlps(x: Tensor, weights: Sequence[Sequence[Tensor]]) -> list[Tensor] | None:
    """Applies several MLPs to one input.

    Args:
        x: Input that all MLPs share. `[..., in]`
        weights: For each MLP, the kernel, bias and scale of every layer; there is at least one layer.

    Returns:
        The output `[..., units]` of each MLP, or None if the kernels cannot be used.
    """
    flat = [weight for each in weights for weight in each]
    if not all(weights) or not all(weight.is_contiguous() for weight in flat):
        return None
    if any(each[0].shape[-1] != x.shape[-1] for each in weights):
        return None  # the kernels would read beside the weights, where torch raises an error
    elements = x[..., 0].numel() * max(len(each[1]) for each in weights)
    if kernels(x, *flat, elements=elements) is None:
        return None
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    counts = tuple(len(each) for each in weights)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *flat)):
        results = _Mlps.apply(rows, counts, *flat)
    else:
        results = [memory[-1] for memory in _forward(rows, weights, min(PORTION, len(rows)))]
    return [result.view(*x.shape[:-1], result.shape[-1]) for result in results]


def _forward(rows: Tensor, weights: Sequence[Sequence[Tensor]], kept: int) -> list[tuple[Tensor, ...]]:
    """Returns the normalised rows, the norms' factors, the hidden layers and the output of each MLP."""
    structures = (_Mlp * len(weights))()
    memories: list[tuple[Tensor, ...]] = []
    alive: list[Any] = []
    kernel = _stacked([each[0] for each in weights])
    working = rows.new_empty(PORTION * len(kernel))
    for structure, each in zip(structures, weights, strict=True):
        layers, units = len(each) // 3, len(each[1])
        memory = (
            rows.new_empty(layers, kept, units),
            rows.new_empty(layers, kept),
            rows.new_empty(layers - 1, kept, units),
            rows.new_empty(len(rows), units),
        )
        alive.append(addresses(each))
        structure.layers, structure.units, structure.kept = layers, units, kept
        structure.weights = ctypes.addressof(alive[-1])
        structure.normed, structure.inverse, structure.hidden, structure.out = (x.data_ptr() for x in memory)
        memories.append(memory)
    given, first, memory_at = (ctypes.c_void_p(x.data_ptr()) for x in (rows, kernel, working))
    library().mlps(*rows.shape, given, len(kernel), first, len(weights), structures, memory_at)
    return memories


class _Mlps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: tuple[int, ...], *flat: Tensor) -> tuple[Tensor, ...]:
        memories = _forward(rows, _cut(flat, counts), len(rows))
        ctx.counts = counts
        ctx.save_for_backward(rows, *flat, *(x for memory in memories for x in memory[:-1]))
        return tuple(memory[-1] for memory in memories)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, *saved = ctx.saved_tensors
        flat, kept = saved[: sum(ctx.counts)], saved[sum(ctx.counts) :]
        structures = (_Mlp * len(grads))()
        alive: list[Any] = []
        found: list[Tensor] = []
        firsts = [each[0] for each in _cut(flat, ctx.counts)]
        kernel = _stacked(firsts)
        d_kernel = torch.empty_like(kernel)
        d_firsts = iter(d_kernel.split([len(first) for first in firsts]))
        for i, (structure, grad, each) in enumerate(zip(structures, grads, _cut(flat, ctx.counts), strict=True)):
            made = [next(d_firsts), *(torch.empty_like(weight) for weight in each[1:])]
            grad = grad.contiguous()
            alive += [addresses(each), addresses(made), grad]
            structure.layers, structure.units, structure.kept = len(each) // 3, len(each[1]), len(rows)
            structure.weights, structure.d_weights = ctypes.addressof(alive[-3]), ctypes.addressof(alive[-2])
            structure.normed, structure.inverse, structure.hidden = (x.data_ptr() for x in kept[3 * i : 3 * i + 3])
            structure.grad = grad.data_ptr()
            found += made
        d_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        memory = rows.new_empty(PORTION * (len(kernel) + 2 * max(grad.shape[1] for grad in grads)))
        library().mlps_backward(
            *rows.shape,
            ctypes.c_void_p(rows.data_ptr()),
            None if d_rows is None else ctypes.c_void_p(d_rows.data_ptr()),
            len(kernel),
            ctypes.c_void_p(kernel.data_ptr()),
            ctypes.c_void_p(d_kernel.data_ptr()),
            len(grads),
            structures,
            ctypes.c_void_p(memory.data_ptr()),
        )
        return d_rows, None, *found


def _stacked(kernels: Sequence[Tensor]) -> Tensor:
    """Concatenates kernels that share an input. `[total, in]`"""
    return kernels[0] if len(kernels) == 1 else torch.cat(list(kernels))


def _cut(flat: Sequence[Tensor], counts: Sequence[int]) -> list[Sequence[Tensor]]:
    """Splits a flat list of weights into those of each MLP."""
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [flat[end - count : end] for end, count in zip(ends, counts, strict=True)]
