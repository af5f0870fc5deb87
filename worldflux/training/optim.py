"""Optimisers: LaProp with adaptive gradient clipping, Adam, and the warm-up that both share.

Updates run over whole lists of tensors (`torch._foreach_*`): a world model has about a hundred small tensors, and a
kernel call for each of them and each operation would cost more than the arithmetic.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from inspect import unwrap
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from worldflux.errors import ConfigurationError, nearest
from worldflux.models.base import OptimizerSpec, ParameterGroup, parameter_groups
from worldflux.nn.fast.laprop import laprop

_load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)  # see _Capturable
_adamw_step = unwrap(torch.optim.AdamW.step)

AGC_MIN_NORM = 1e-3
"""Least norm that adaptive clipping takes a tensor to have, so that one that starts at zero can leave it."""


def warmup_rate(lr: float, update: int, warmup_steps: int) -> float:
    """Learning rate of one update: a line from zero, then constant.

        lr * min(1, (update - 1) / warmup_steps)

    The first update has rate 0: it only fills the moment estimates.

    Args:
        lr: Rate after the warm-up.
        update: Number of the update, from 1.
        warmup_steps: Number of updates before the first one at the full rate. 0: no warm-up.
    """
    return lr if warmup_steps == 0 else lr * min(1.0, (update - 1) / warmup_steps)


class _Capturable(torch.optim.Optimizer):
    """Base of the optimisers here, which keep counting where they do when they load a state."""

    # torch excludes these methods from compilation at their first call, and imports its compiler in order to do so,
    # which would be more than a second of every start. Nothing compiles them here.
    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)

    def make_capturable(self, capturable: bool = True) -> None:
        """Prepares `step` for being captured in a CUDA graph, or takes that back; see `_place_counts`."""
        for group in self.param_groups:
            group["capturable"] = capturable
        _place_counts(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved state, also from one of an optimiser that counts on another device."""
        capturable = self.param_groups[0]["capturable"]
        _load_state_dict(self, state_dict)
        self.make_capturable(capturable)


class LaProp(_Capturable):
    """LaProp with adaptive gradient clipping (AGC), as DreamerV3 uses it.

    Update k of a tensor p with gradient g:

        g  = g / max(1, |g| / (agc * max(1e-3, |p|)))          norms over the whole tensor
        nu = b2 * nu + (1 - b2) * g^2
        mu = b1 * mu + (1 - b1) * g / (sqrt(nu / (1 - b2^k)) + eps)
        p  = p - lr * mu / (1 - b1^k)

    Against Adam, the momentum comes after the scaling: a single large gradient moves p by no more than a few rates.
    Gradients are read and not changed. Tensors without a gradient are left alone; k counts the updates of a tensor's
    group from the first one in which the tensor has a gradient.

    Args:
        params: Parameters, or groups of them with settings of their own; `rate_scale` is a factor on the rate.
        lr: Step size after the warm-up.
        betas: Decay of `mu` and of `nu`.
        eps: Added to the root of `nu`; so small that only an exact zero meets it.
        agc: Largest norm of a gradient as a share of the norm of its tensor. None turns clipping off.
        warmup_steps: Updates over which the rate rises from zero, see `warmup_rate`.
        weight_decay: Share of p, times the rate, that each update takes away (decoupled).

    Raises:
        ConfigurationError: If a setting is out of range.

    Sources: LaProp, arXiv:2002.04839; AGC, arXiv:2102.06171; defaults of DreamerV3, arXiv:2301.04104.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 4e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
        *,
        agc: float | None = 0.3,
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
    ) -> None:
        _check_settings(lr, betas, eps, warmup_steps, weight_decay)
        if agc is not None and not agc > 0:
            raise ConfigurationError(f"agc is {agc}, expected a ratio above 0, or None to turn clipping off.")
        defaults = dict(lr=lr, betas=betas, eps=eps, agc=agc, weight_decay=weight_decay)
        super().__init__(params, defaults)
        _add_warmup(self, warmup_steps)
        self.make_capturable(False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: Recomputes the loss, if given.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate = _next_rate(group)
            updates = group["updates"] if group["capturable"] else int(group["updates"])
            # Bias correction depends on a tensor's own updates; tensors that began together are updated together.
            together: defaultdict[int, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["start"] = int(updates) - 1
                    state["mu"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    state["nu"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                together[state["start"]].append(p)
            for start, params in together.items():
                self._update(params, updates - start, rate, group)
        return loss

    def _update(self, params: list[Tensor], k: int | Tensor, rate: float | Tensor, group: dict[str, Any]) -> None:
        """One update of tensors that are at their `k`-th."""
        mu = [self.state[p]["mu"] for p in params]
        nu = [self.state[p]["nu"] for p in params]
        beta1, beta2 = group["betas"]
        # g / (sqrt(nu / c) + eps) = sqrt(c) * g / (sqrt(nu) + sqrt(c) * eps): one pass over the tensors less.
        square = _one_minus_power(beta2, k)
        root = square.sqrt() if isinstance(square, Tensor) else math.sqrt(square)
        eps, share = root * group["eps"], (1 - beta1) * root
        keep, change = 1 - rate * group["weight_decay"], -rate / _one_minus_power(beta1, k)
        if not group["capturable"] and laprop(
            params,
            [p.grad for p in params],  # type: ignore[misc]
            mu,
            nu,
            agc=group["agc"],
            least_norm=AGC_MIN_NORM,
            betas=group["betas"],
            eps=eps,
            share=share,
            keep=keep,
            rate=change,
        ):
            return

        grads = _clipped(params, group["agc"])
        torch._foreach_mul_(nu, beta2)
        torch._foreach_addcmul_(nu, grads, grads, value=1 - beta2)
        scale: Any = torch._foreach_sqrt(nu)
        torch._foreach_mul_(mu, beta1)
        if not group["capturable"]:
            torch._foreach_add_(scale, eps)
            torch._foreach_addcdiv_(mu, grads, scale, value=share)
            if group["weight_decay"]:
                torch._foreach_mul_(params, keep)
            torch._foreach_add_(params, mu, alpha=change)
            return
        # The same with scalars on the device, which these functions take as factors only.
        torch._foreach_mul_(scale, 1 / share)
        torch._foreach_add_(scale, group["eps"] / (1 - beta1))
        torch._foreach_addcdiv_(mu, grads, scale)
        if group["weight_decay"]:
            torch._foreach_mul_(params, keep)
        torch._foreach_add_(params, torch._foreach_mul(mu, change))


class Adam(_Capturable, torch.optim.AdamW):
    """torch's AdamW with the warm-up of `warmup_rate`; without weight decay it is Adam.

    Args:
        params: Parameters, or groups of them with settings of their own; `rate_scale` is a factor on the rate.
        lr: Step size after the warm-up.
        betas: Decay of the momentum and of the squared gradients.
        eps: Added to the root of the squared gradients.
        warmup_steps: Updates over which the rate rises from zero.
        weight_decay: Share of a parameter, times the rate, that each update takes away (decoupled).

    Raises:
        ConfigurationError: If a setting is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
    ) -> None:
        _check_settings(lr, betas, eps, warmup_steps, weight_decay)
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=True)
        _add_warmup(self, warmup_steps)
        self.make_capturable(False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: Recomputes the loss, if given.

        Returns:
            What `closure` returned.
        """
        full_rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = _next_rate(group)
        try:
            return _adamw_step(self, closure)
        finally:
            # group["lr"] is the common rate after the warm-up to everybody else: schedules set it, checkpoints keep it.
            for group, full_rate in zip(self.param_groups, full_rates, strict=True):
                group["lr"] = full_rate

    def make_capturable(self, capturable: bool = True) -> None:
        """Changes to torch's fused kernel, which counts on the device, or back; see `_place_counts`."""
        # torch warns of updates outside of a graph; the first ones always are.
        self._warned_capturable_if_run_uncaptured = True
        for group in self.param_groups:
            # On a CPU one pass over each tensor in place of ten; elsewhere only captured steps gain by it.
            fused = capturable or all(p.dtype == torch.float32 and p.is_cpu for p in group["params"])
            group.update(fused=fused, foreach=not fused)
            for state in (self.state[p] for p in group["params"] if p in self.state):
                device = state["exp_avg"].device if fused else torch.device("cpu")
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(device)
        super().make_capturable(capturable)


def build_optimizer(spec: OptimizerSpec, parameters: Iterable[nn.Parameter | ParameterGroup]) -> torch.optim.Optimizer:
    """The optimiser that a model's specification asks for.

    It does not clip by the norm of all gradients together (`spec.grad_clip`); see `clip_by_global_norm`.

    Args:
        spec: Kind and numbers of the optimiser.
        parameters: Parameters to update; groups of them may have learning rates of their own.

    Raises:
        ConfigurationError: If the kind is unknown, a number is out of range, or there is nothing to update.
    """
    groups = [
        {
            "params": group.parameters,
            "rate_scale": group.rate_scale,
            "eps": spec.eps if group.eps is None else group.eps,
        }
        for group in parameter_groups(parameters)
        if group.parameters
    ]
    if not groups:
        raise ConfigurationError("The model has no parameter that requires a gradient. Unfreeze what is to learn.")
    shared: dict[str, Any] = dict(
        lr=spec.learning_rate,
        betas=tuple(spec.betas),
        eps=spec.eps,
        warmup_steps=spec.warmup_steps,
        weight_decay=spec.weight_decay,
    )
    if spec.kind == "laprop":
        return LaProp(groups, agc=spec.agc, **shared)
    if spec.kind != "adam":
        raise ConfigurationError(f"Unknown optimiser '{spec.kind}'{nearest(spec.kind, ('laprop', 'adam'))}")
    if spec.agc is not None:
        raise ConfigurationError(f"agc is {spec.agc} with kind 'adam'; adaptive clipping belongs to kind 'laprop'.")
    return Adam(groups, **shared)


@torch.no_grad()
def clip_by_global_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scales gradients down so that their common norm is at most `max_norm`, and returns the norm.

    Nothing is read by the host. A norm that is not finite makes every gradient NaN instead of hiding it.

    Args:
        parameters: Parameters; those without a gradient are skipped.
        max_norm: Largest norm allowed. With None, 0 or infinity the norm is only measured.

    Returns:
        The norm before clipping, a scalar.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if grads and max_norm and math.isfinite(max_norm):
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _add_warmup(optimizer: torch.optim.Optimizer, warmup_steps: int) -> None:
    """Adds what the warm-up needs to each group: its length, a factor on the rate, and a count of updates."""
    for group in optimizer.param_groups:
        group.setdefault("warmup_steps", warmup_steps)
        group.setdefault("rate_scale", 1.0)
        group.setdefault("updates", torch.zeros((), dtype=torch.int64))


def _place_counts(optimizer: torch.optim.Optimizer) -> None:
    """Puts each group's count of updates on the CPU, or, if the group is capturable, on the device of its parameters.

    A CUDA graph repeats kernels. So a captured update counts on the device, and works out there what depends on the
    count: the warm-up and the bias corrections. Its learning rate may be a scalar on the device, too.
    """
    for group in optimizer.param_groups:
        device = group["params"][0].device if group["capturable"] else torch.device("cpu")
        group["updates"] = torch.as_tensor(group["updates"], dtype=torch.int64).to(device)


def _next_rate(group: dict[str, Any]) -> float | Tensor:
    """Counts an update of a group; its rate, which is a scalar on the device if the group is capturable."""
    group["updates"].add_(1)
    updates, warmup_steps = group["updates"], group["warmup_steps"]
    if not group["capturable"]:
        return group["rate_scale"] * warmup_rate(group["lr"], int(updates), warmup_steps)
    warm = ((updates - 1) / warmup_steps).clamp(max=1.0) if warmup_steps else 1.0
    return group["rate_scale"] * group["lr"] * warm


def _one_minus_power(base: float, k: int | Tensor) -> Any:
    """`1 - base^k`; on a device in a way that is exact in float32, too."""
    if not isinstance(k, Tensor):
        return 1 - base**k
    return -torch.expm1(k * math.log(base)) if base > 0 else torch.ones((), device=k.device)


def _clipped(params: list[Tensor], agc: float | None) -> Any:
    """The gradients after adaptive clipping, which leaves the parameters' own gradients as they are."""
    grads: Any = [p.grad for p in params]
    if agc is None:
        return grads
    allowed = torch._foreach_norm(params)
    torch._foreach_clamp_min_(allowed, AGC_MIN_NORM)
    torch._foreach_mul_(allowed, agc)
    excess = torch._foreach_norm(grads)
    torch._foreach_div_(excess, allowed)
    torch._foreach_clamp_min_(excess, 1.0)
    return torch._foreach_div(grads, excess)


def _check_settings(lr: float, betas: tuple[float, float], eps: float, warmup_steps: int, weight_decay: float) -> None:
    """Checks the settings that all optimisers here share."""
    if not (lr >= 0 and math.isfinite(lr)):
        raise ConfigurationError(f"The learning rate is {lr}, expected a finite number from 0.")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigurationError(f"betas are {betas}, expected two numbers, each at least 0 and below 1.")
    if not eps > 0:
        raise ConfigurationError(f"eps is {eps}, expected a number above 0.")
    if warmup_steps < 0:
        raise ConfigurationError(f"warmup_steps is {warmup_steps}, expected 0 (none) or more.")
    if not weight_decay >= 0:
        raise ConfigurationError(f"weight_decay is {weight_decay}, expected 0 (none) or more.")


@runtime_checkable
class CapturableOptimizer(Protocol):
    """An optimiser whose `step` can be captured in a CUDA graph, with `group["lr"]` as a scalar on the device."""

    param_groups: list[dict[str, Any]]
    state: dict[Any, Any]

    def make_capturable(self, capturable: bool = True) -> None:
        """Prepares for that, or takes it back; `step` works in both cases."""
