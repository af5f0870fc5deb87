"""The comparison of each CUDA graph with the plain computation, made when it is replayed for the first time.

A CUDA graph repeats kernels on memory. A wrong one (it reads an input that is not written any more, draws the same
noise each time, leaves a tensor as it was) runs as fast as a right one, and nothing else would reveal it.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
Outputs = dict[str, Tensor]

_TYPICAL = 0.1
"""Lower bound of the average magnitude of results, because relative differences mean nothing around 0."""
_ROUNDINGS = 2.0
"""Tolerance of values that are changed in place, in units in the last place, however small the change is."""
_RANDOM = "the state of the random numbers"


class Precision(NamedTuple):
    """Tolerances of the comparison.

    Both computations run the same kernels, so that most results are equal to the last bit. Where kernels differ, sums
    are rounded differently, by 6e-8 in float32 and 4e-3 in bfloat16. A random draw close to the boundary between two
    classes may then give the other class, after which the rollouts differ. Steps of both families with another order of
    summation (5th step, `tiny`, windows of 16) differed by up to 2e-5 in float32, and by up to 0.24 in bfloat16, where
    some draws differ. A step on another batch differed by 0.9 or more, a step with other noise by 0.07 (TD-MPC2) and
    1.5 (DreamerV3), and a tensor that is not updated differs by 1.
    """

    tolerance: float
    """Largest distance, as a fraction of the size of the plain computation's result or change."""
    rounding: float
    """Fraction of a layer's largest gradient below which gradients count as rounding. Some gradients are zero
    mathematically, such as that of a bias that adds the same number to all inputs of a softmax; that of TD-MPC2's
    encoder was 1/90,000 of its layer's."""


FULL, REDUCED = Precision(0.005, 1e-4), Precision(0.4, 1e-3)
"""Precision of float32, and of bfloat16 or TF32."""


class Changes:
    """Side effects of a computation, so that they can be undone. This base class describes one without side effects."""

    def tensors(self) -> Tensors:
        """Returns the tensors that are changed in place, by name."""
        return {}

    def noise(self, rounding: float) -> Tensors:
        """Returns by name whether a tensor only contains rounding and is not compared; see `Precision.rounding`."""
        return {}

    def host(self) -> Any:
        """Returns what the host keeps besides the values of tensors: counts, settings, and references to tensors."""

    def set_host(self, host: Any) -> None:
        """Restores what `host` returned."""


@dataclass(frozen=True)
class Work:
    """One call of a computation, in two forms that must give the same results."""

    function: Callable[[Tensors], Outputs]
    """Function to capture. It takes inputs on the device and is the same for all calls with the same signature."""
    inputs: Callable[[], Tensors]
    """Function that returns the inputs of this call, on any device. It is called once, right before they are used."""
    plain: Callable[[], Outputs]
    """The same computation without a CUDA graph and without preparations for one."""
    changes: Changes = field(default_factory=Changes)
    """Side effects of the computation."""
    named: Callable[[Tensors], Tensors] = dict
    """Function that converts results to the form in which they are compared and reported."""


@dataclass(frozen=True)
class Difference:
    """The largest difference between two computations."""

    name: str
    """Name of the tensor that differs."""
    share: float
    """Distance as a share of the size of what the plain form returned or changed there."""
    tolerance: float
    """Largest share allowed."""


def precision_of(model: nn.Module, device: torch.device) -> Precision:
    """Returns the precision of a model's products and convolutions on a device."""
    dtype = getattr(getattr(model, "config", None), "dtype", "float32")
    full = dtype == "float32" and torch.get_float32_matmul_precision() == "highest"
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:  # the default, for convolutions alone
        full = full and not any(isinstance(module, nn.Conv2d) for module in model.modules())
    return FULL if full else REDUCED


def compared(
    work: Work, other: Callable[[], Outputs], device: torch.device, precision: Precision
) -> tuple[Outputs, Difference | None]:
    """Runs both computations from the same state and random numbers, and compares them.

    The host waits once, for the comparison. Meanwhile there is a copy of all tensors that are changed.

    Args:
        work: Computation whose plain form is the reference.
        other: Computation to check.
        device: Device of both computations.
        precision: Tolerances of the comparison.

    Returns:
        If both agree, the results of the other form, whose changes stay, and None. Otherwise the results of the plain
        form, whose changes stay, and the largest difference.
    """
    changes = work.changes
    random, host, tensors = RandomState(device), changes.host(), changes.tensors()
    kept = {name: x.detach().clone() for name, x in tensors.items()}
    expected = {name: x.detach().clone() for name, x in work.plain().items()}
    plain_random, plain_host, plain_tensors = RandomState(device), changes.host(), changes.tensors()
    noise = {name: x for name, x in changes.noise(precision.rounding).items() if name in tensors}
    # Back to the state before; from here on `kept` holds what the plain form left.
    sizes = {name: _distance(kept[name], plain_tensors[name].to(x.device)) for name, x in tensors.items()}
    _exchange(tensors, plain_tensors, kept)
    changes.set_host(host)
    random.restore()

    found = other()
    shares = {name: _share(_beyond_rounding(kept[name], x), sizes[name]) for name, x in tensors.items()}
    shares |= {name: torch.where(noise[name], 0.0, shares[name]) for name in noise}
    results = work.named(found)
    shares |= {name: _share(_distance(x, results[name]), _size(x)) for name, x in work.named(expected).items()}
    difference = _largest(shares, precision.tolerance)
    if difference is None and plain_random != RandomState(device):
        difference = Difference(_RANDOM, 1.0, 0.0)
    if difference is None:
        return found, None
    changes.set_host(plain_host)
    with torch.no_grad():
        for name, x in kept.items():
            plain_tensors[name].copy_(x)
    plain_random.restore()
    return expected, difference


def report(what: str, difference: Difference, device: torch.device) -> str:
    """Returns the log line about a difference, with everything that helps to find its cause."""
    found = f"{difference.name} differs by {difference.share:.2g} of its size, more than {difference.tolerance:.2g}"
    if difference.name == _RANDOM:
        found = f"{difference.name} differs"
    return (
        f"{what}, replayed as a CUDA graph, does not match the plain computation: {found}. It runs without CUDA graphs "
        "from now on, which is correct but slower. Please report this to the developers of worldflux, with the model's "
        f"configuration and these versions: {circumstances(device)}."
    )


def circumstances(device: torch.device) -> str:
    """Returns versions and device in one line."""
    try:
        version = metadata.version("worldflux")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        version = "unknown"
    parts = [f"worldflux {version}", f"torch {torch.__version__}"]
    if device.type == "cuda":
        parts += [f"CUDA {torch.version.cuda}", torch.cuda.get_device_name(device)]
    return ", ".join([*parts, f"Python {platform.python_version()}", platform.platform()])


class RandomState:
    """The states that torch's random generators have now, on the host and on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states = [torch.get_rng_state()]
        if device.type == "cuda":
            self._states.append(torch.cuda.get_rng_state(device))

    def restore(self) -> None:
        """Restores the states."""
        torch.set_rng_state(self._states[0])
        if len(self._states) > 1:
            torch.cuda.set_rng_state(self._states[1], self._device)

    def __eq__(self, other: object) -> bool:
        """Returns whether both would give the same random numbers."""
        return isinstance(other, RandomState) and all(map(torch.equal, self._states, other._states))

    __hash__ = None  # type: ignore[assignment]


@torch.no_grad()
def _exchange(tensors: Tensors, others: Tensors, kept: dict[str, Tensor]) -> None:
    """Writes the kept values into tensors, and keeps those of `others`, which may be the same tensors."""
    for name, x in tensors.items():
        value = others[name].detach().to(x.device, copy=True)
        x.copy_(kept[name])
        kept[name] = value


def _largest(shares: Tensors, tolerance: float) -> Difference | None:
    """Returns the largest share if it is too large; NaN is too large."""
    if not shares:
        return None
    names, values = list(shares), torch.stack([*shares.values()]).tolist()
    too_large = [(value, name) for name, value in zip(names, values, strict=True) if not value <= tolerance]
    if not too_large:
        return None
    share, name = max(too_large, key=lambda pair: (math.isnan(pair[0]), pair[0]))
    return Difference(name, share, tolerance)


def _share(distance: Tensor, size: Tensor) -> Tensor:
    return torch.where(distance == 0.0, 0.0, distance / size)


@torch.no_grad()
def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Root of the sum of squared differences; for whole numbers, root of how many differ. NaN equals NaN."""
    same = (one == other) | ((one != one) & (other != other))
    apart = one.float() - other.float() if one.is_floating_point() else torch.ones((), device=one.device)
    return torch.linalg.vector_norm(torch.where(same, 0.0, apart))


@torch.no_grad()
def _beyond_rounding(one: Tensor, other: Tensor) -> Tensor:
    """The distance beyond what the precision of the values themselves accounts for."""
    if not one.is_floating_point():
        return _distance(one, other)
    rounding = _ROUNDINGS * torch.finfo(one.dtype).eps * torch.linalg.vector_norm(one.float())
    return (_distance(one, other) - rounding).clamp(min=0.0)


@torch.no_grad()
def _size(x: Tensor) -> Tensor:
    """The size with which distances of results are compared."""
    typical = torch.full((), x.numel() ** 0.5, device=x.device)
    return _TYPICAL * typical + torch.linalg.vector_norm(x.float()) if x.is_floating_point() else typical
