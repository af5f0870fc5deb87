"""Whole MLPs of linear layers, LayerNorm, Mish and SimNorm as one native call, forward and backward (`mlp.c`).

`worldflux.nn.mish` contains the definition and chooses this implementation. Plain torch makes about ten calls per
layer, which dominate in a small model; in a large model the activations pass through memory ten times. Here a layer is
one matrix product with torch's own BLAS and one pass over its result.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from worldflux.accel import native
from worldflux.nn.fast.kernels import native_code_applies

logger = logging.getLogger("worldflux.nn")

PLAIN, MISH, SIMNORM = 0, 1, 2


class Layer(NamedTuple):
    """Parameters of one layer. In an ensemble, every parameter has a leading axis for the members."""

    weight: Tensor
    """Weight of the linear layer. `[out, in]`"""
    bias: Tensor
    """Bias of the linear layer. `[out]`"""
    scale: Tensor | None
    """Scale of the LayerNorm; None for a plain linear layer. `[out]`"""
    shift: Tensor | None
    """Shift of the LayerNorm; None for a plain linear layer. `[out]`"""
    kind: int
    """Kind of layer: `PLAIN`, `MISH` or `SIMNORM`."""
    group: int = 0
    """Size of SimNorm's groups."""


class _Library(NamedTuple):
    forward: Any
    backward: Any
    rollout: Any
    sgemm: int


def applies(parts: Sequence[Tensor]) -> bool:
    """Whether the native code takes these inputs."""
    return native_code_applies(parts) and _library() is not None


def mlp(
    layers: Sequence[Layer],
    parts: Sequence[Tensor],
    *,
    members: int = 0,
    chosen: Tensor | None = None,
    dropout: Tensor | None = None,
    frozen: bool = False,
) -> Tensor | None:
    """Computes the output of a sequence of layers.

    Args:
        layers: Layers from the first to the last.
        parts: Inputs to concatenate on the last axis. Without members each is `[..., p]`, and inputs that repeat for
            many rows (`[N, 1, p]` beside `[N, S, q]`) are multiplied once. With members each is `[N, p]`.
        members: Number of members M, for which the parameters and the output have a leading axis. With 0 there is no
            such axis.
        chosen: Indices of the members to evaluate, on the CPU; None evaluates all. `[m]`
        dropout: Factors on the output of the first linear layer, before its norm. `[m, N, out]`
        frozen: Whether to treat the parameters as constants.

    Returns:
        The output `[..., out]`, with members `[m, N, out]`, or None if it cannot be computed natively.
    """
    parameters = _parameters(layers)
    if parameters is None or sum(x.shape[-1] for x in parts) != layers[0].weight.shape[-1]:
        return None  # native code would read beside the weights, where torch raises an error
    shapes = [x.shape[:-1] for x in parts]
    lead = max(shapes, key=prod) if len(shapes) > 1 else shapes[0]
    rows = prod(lead)
    flat, repeats = [], []
    for x, shape in zip(parts, shapes, strict=True):
        repeat = 1 if shape == lead else _repeat(shape, lead)
        if repeat == 0:
            x, repeat = x.expand(*lead, x.shape[-1]), 1
        flat.append(_rows(x))
        repeats.append(repeat)
    count = members if chosen is None else len(chosen)
    call = _Call(layers, flat, repeats, rows, count, chosen, dropout)
    if torch.is_grad_enabled():
        trained = () if frozen else tuple(parameters)
        if any(x.requires_grad for x in (*trained, *flat)):
            if max(repeats) > 1:
                return None
            result: Tensor = _MLP.apply(call, trained, *trained, *flat)
            return result if members else result.view(*lead, -1)
    out = call.forward(None)
    return out if members else out.view(*lead, -1)


def rollout(
    dynamics: Sequence[Layer], head: Sequence[Layer], state: Tensor, actions: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Predicts an open-loop rollout of S sequences of actions from each state, without gradient.

    Args:
        dynamics: Layers that map a state and an action to the next state.
        head: Layers that are evaluated on each state and the action taken there.
        state: States to start from. `[N, L]`
        actions: Sequences of H actions. `[H, N, S, A]`

    Returns:
        The states after every action `[H, N, S, L]` and the outputs of the head `[H, N, S, K]`, or None if they cannot
        be computed natively.
    """
    if _parameters(dynamics) is None or _parameters(head) is None:
        return None
    width = state.shape[-1] + actions.shape[-1]
    if not dynamics[0].weight.shape[-1] == head[0].weight.shape[-1] == width:
        return None
    library = _library()
    assert library is not None
    H, N, S, A = actions.shape
    state, actions = state.contiguous(), actions.contiguous()
    states = state.new_empty(H, N, S, dynamics[-1].bias.shape[-1])
    heads = state.new_empty(H, N, S, head[-1].bias.shape[-1])
    widest = max(layer.bias.shape[-1] for layer in (*dynamics, *head))
    work = state.new_empty(3 * max(H - 1, 1) * N * S * widest)
    library.rollout(
        library.sgemm,
        _packed(dynamics),
        len(dynamics),
        _packed(head),
        len(head),
        state.data_ptr(),
        actions.data_ptr(),
        *(H, N, S, A),
        work.data_ptr(),
        states.data_ptr(),
        heads.data_ptr(),
        torch.get_num_threads(),
    )
    return states, heads


def _parameters(layers: Sequence[Layer]) -> list[Tensor] | None:
    """Returns all parameters of the layers, or None if the native code cannot read one of them."""
    found = [p for layer in layers for p in layer[:4] if p is not None]
    for p in found:
        if p.dtype is not torch.float32 or not p.is_contiguous() or not p.is_cpu:
            return None
    return found


def _packed(layers: Sequence[Layer]) -> Any:
    """Returns an array of the structs `Layer` of `mlp.c`."""
    numbers: list[int] = []
    for weight, bias, scale, shift, kind, group in layers:
        width, inputs = weight.shape[-2:]
        norm = (0, 0) if scale is None or shift is None else (scale.data_ptr(), shift.data_ptr())
        numbers += (weight.data_ptr(), bias.data_ptr(), *norm, inputs, width, kind, group)
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _repeat(shape: torch.Size, lead: torch.Size) -> int:
    """Returns for how many consecutive rows each row of an input repeats, or 0 if they are not consecutive."""
    if len(shape) != len(lead):
        return 0
    kept = len(shape)
    while kept and shape[kept - 1] == 1:
        kept -= 1
    return prod(lead[kept:]) if shape[:kept] == lead[:kept] else 0


def _rows(x: Tensor) -> Tensor:
    """Returns an input as a matrix whose rows are contiguous in memory."""
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    rows, width = flat.shape
    if (width == 1 or flat.stride(1) == 1) and (rows == 1 or flat.stride(0) >= width):
        return flat
    return flat.contiguous()


class _Call:
    """Arguments of the native functions for one evaluation."""

    def __init__(
        self,
        layers: Sequence[Layer],
        parts: Sequence[Tensor],
        repeats: Sequence[int],
        rows: int,
        members: int,
        chosen: Tensor | None,
        dropout: Tensor | None,
    ) -> None:
        library = _library()
        assert library is not None
        self.library = library
        self.layers = layers
        self.parts = parts
        self.repeats = repeats
        self.rows = rows
        self.members = members  # 0 for a single network without an axis for members
        self.chosen = chosen
        self.dropout = None if dropout is None else dropout.contiguous()
        self.out = layers[-1].bias.shape[-1]

    def _arguments(self) -> tuple[Any, ...]:
        """Returns the leading arguments of both functions. This object keeps the memory they point to alive."""
        parts: list[int] = []
        for part, repeat in zip(self.parts, self.repeats, strict=True):
            width = part.shape[-1]
            parts += (part.data_ptr(), width, max(part.stride(0), width), repeat)
        return (
            self.library.sgemm,
            _packed(self.layers),
            len(self.layers),
            (ctypes.c_int64 * len(parts))(*parts),
            len(self.parts),
            None if self.chosen is None else self.chosen.data_ptr(),
            max(self.members, 1),
            self.rows,
            None if self.dropout is None else self.dropout.data_ptr(),
        )

    def sizes(self) -> tuple[int, int]:
        """Returns the number of floats of working memory and of memory saved for the backward pass."""
        widest = kept = 0
        for layer in self.layers:
            width = layer.bias.shape[-1]
            widest = max(widest, width)
            if layer.kind != PLAIN:
                kept += 2 * (width + 1)
        return 3 * self.rows * widest, max(self.members, 1) * self.rows * kept

    def forward(self, saved: Tensor | None) -> Tensor:
        """Computes the output `[N, out]`, with members `[m, N, out]`."""
        like = self.parts[0]
        out = like.new_empty((self.members, self.rows, self.out) if self.members else (self.rows, self.out))
        work = like.new_empty(self.sizes()[0])
        kept = None if saved is None else saved.data_ptr()
        self.library.forward(*self._arguments(), work.data_ptr(), kept, out.data_ptr(), torch.get_num_threads())
        return out

    def backward(
        self, saved: Tensor, grad: Tensor, d_layers: Sequence[Tensor | None] | None, d_parts: Sequence[Tensor | None]
    ) -> None:
        """Adds the gradients of the parameters to `d_layers`, and writes those of the inputs to `d_parts`."""
        work = saved.new_empty(self.sizes()[0])
        to_layers = None
        if d_layers is not None:
            to_layers = (ctypes.c_void_p * len(d_layers))(*(None if d is None else d.data_ptr() for d in d_layers))
        to_parts = (ctypes.c_void_p * len(d_parts))(*(None if d is None else d.data_ptr() for d in d_parts))
        self.library.backward(
            *self._arguments(),
            saved.data_ptr(),
            grad.data_ptr(),
            to_layers,
            to_parts,
            work.data_ptr(),
            torch.get_num_threads(),
        )


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, trained: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        saved = call.parts[0].new_empty(call.sizes()[1])
        out = call.forward(saved)
        ctx.call, ctx.count = call, len(trained)
        # Frozen parameters are saved too, so that torch detects if they are changed before the backward pass.
        parameters = [p for layer in call.layers for p in layer[:4] if p is not None]
        ctx.save_for_backward(saved, *parameters, *tensors[len(trained) :])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call, count = ctx.call, ctx.count
        saved, *_ = ctx.saved_tensors
        to_parts = ctx.needs_input_grad[2 + count :]
        d_layers: list[Tensor | None] | None = None
        d_parameters: list[Tensor | None] = [None] * count
        if any(ctx.needs_input_grad[2 : 2 + count]):
            # All gradients share one piece of memory, which is cleared in one pass.
            shapes = [None if p is None else p.shape for layer in call.layers for p in layer[:4]]
            sizes = [0 if shape is None else prod(shape) for shape in shapes]
            pieces = grad.new_zeros(sum(sizes)).split(sizes)
            d_layers = [
                None if shape is None else piece.view(shape) for shape, piece in zip(shapes, pieces, strict=True)
            ]
            d_parameters = [d for d in d_layers if d is not None]
        d_parts = [
            part.new_empty(call.rows, part.shape[-1]) if needed else None
            for part, needed in zip(call.parts, to_parts, strict=True)
        ]
        call.backward(saved, grad.contiguous(), d_layers, d_parts)
        wanted = zip(d_parameters, ctx.needs_input_grad[2:], strict=False)
        return (None, None, *(d if needed else None for d, needed in wanted), *d_parts)


@cache
def _library() -> _Library | None:
    product = native.sgemm()
    library = None if product is None else native.load(Path(__file__).with_name("mlp.c"))
    if library is None or product is None:
        return None
    pointer: Any = ctypes.c_void_p
    number: Any = ctypes.c_int64
    common = [pointer, pointer, number, pointer, number, pointer, number, number, pointer]
    library.mlp_forward.argtypes = [*common, pointer, pointer, pointer, ctypes.c_int]
    library.mlp_backward.argtypes = [*common, pointer, pointer, pointer, pointer, pointer, ctypes.c_int]
    library.mlp_rollout.argtypes = [pointer, *[pointer, number] * 2, pointer, pointer, *[number] * 4]
    library.mlp_rollout.argtypes += [pointer, pointer, pointer, ctypes.c_int]
    library.mlp_forward.restype = library.mlp_backward.restype = library.mlp_rollout.restype = None
    found = _Library(library.mlp_forward, library.mlp_backward, library.mlp_rollout, product)
    return found if _is_right(found) else None


@torch.no_grad()
def _is_right(library: _Library) -> bool:
    """Checks a small network against torch, which detects a BLAS with a different calling convention."""
    line = partial(torch.linspace, dtype=torch.float32, device="cpu")
    x, weight = line(-2, 2, 15).view(3, 5), line(-1, 2, 20).view(4, 5)
    bias, scale, shift = line(1, -1, 4), line(0.5, 1.5, 4), line(0, 1, 4)
    expected = F.mish(F.layer_norm(F.linear(x, weight, bias), (4,), scale, shift))
    layer, part = _packed([Layer(weight, bias, scale, shift, MISH)]), (ctypes.c_int64 * 4)(x.data_ptr(), 5, 5, 1)
    out, work = x.new_empty(3, 4), x.new_empty(36)
    library.forward(
        library.sgemm,
        layer,
        1,
        part,
        1,
        None,
        1,
        3,
        None,
        work.data_ptr(),
        None,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if torch.allclose(out, expected, rtol=1e-4, atol=1e-5):
        return True
    logger.warning("the native code for MLPs gives wrong results on this machine and is not used; please report this")
    return False
