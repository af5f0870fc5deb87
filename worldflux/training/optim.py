"""Optimisers: LaProp with adaptive gradient clipping, Adam, and the warm-up that both share.

Every update runs over whole lists of tensors (`torch._foreach_*`): a world model has about a hundred small tensors, and
one kernel call for each of them and each operation would cost more than the arithmetic.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from worldflux.errors import ConfigurationError, nearest
from worldflux.models.base import OptimizerSpec, ParameterGroup, parameter_groups
from worldflux.nn.fast.laprop import laprop

AGC_MIN_NORM = 1e-3
"""Norm that adaptive clipping takes a smaller tensor to have, so that a tensor that starts at zero can leave it."""


def warmup_rate(lr: float, update: int, warmup_steps: int) -> float:
    """Learning rate of one update: a line from zero, then constant.

        lr * min(1, (update - 1) / warmup_steps)

    The first update has rate 0: it only fills the moment estimates.

    Args:
        lr: Rate after the warm-up.
        update: Number of the update, from 1.
        warmup_steps: Updates until the full rate, which update `warmup_steps + 1` is the first to have. 0: none.
    """
    return lr if warmup_steps == 0 else lr * min(1.0, (update - 1) / warmup_steps)


class LaProp(torch.optim.Optimizer):
    """LaProp with adaptive gradient clipping (AGC), as DreamerV3 uses it.

    Update k of a tensor p with gradient g:

        g  = g / max(1, |g| / (agc * max(1e-3, |p|)))          norms over the whole tensor
        nu = b2 * nu + (1 - b2) * g^2
        mu = b1 * mu + (1 - b1) * g / (sqrt(nu / (1 - b2^k)) + eps)
        p  = p - lr * mu / (1 - b1^k)

    Against Adam, the momentum comes after the scaling: a single large gradient moves p by no more than a few rates.
    Gradients are read and not changed. Tensors without a gradient are left alone and don't count the update.

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

    updated: Sequence[Alike] = ()  # of the class, because torch's copies of optimisers leave out what it does not know

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
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            agc=agc,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            rate_scale=1.0,
            updates=0,
        )
        super().__init__(params, defaults)

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
        updated: list[Alike] = []
        for group in self.param_groups:
            group["updates"] += 1
            lr = _rate(group)
            # The bias corrections count a tensor's own updates, and tensors with one count are updated together.
            same_age: defaultdict[int, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["mu"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    state["nu"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["step"] += 1
                same_age[state["step"]].append(p)
            for k, params in same_age.items():
                self._update(params, k, lr, group)
            updated.append(list(same_age.values()))
        self.updated = updated
        return loss

    def _update(self, params: list[Tensor], k: int, lr: float, group: dict[str, Any]) -> None:
        """One update of tensors that are at their `k`-th."""
        mu = [self.state[p]["mu"] for p in params]
        nu = [self.state[p]["nu"] for p in params]
        beta1, beta2 = group["betas"]
        # g / (sqrt(nu / c) + eps) = sqrt(c) * g / (sqrt(nu) + sqrt(c) * eps): one pass over the tensors less.
        root = math.sqrt(1 - beta2**k)
        done = laprop(
            params,
            [p.grad for p in params],  # type: ignore[misc]
            mu,
            nu,
            agc=group["agc"],
            least_norm=AGC_MIN_NORM,
            betas=group["betas"],
            eps=root * group["eps"],
            share=(1 - beta1) * root,
            keep=1 - lr * group["weight_decay"],
            rate=-lr / (1 - beta1**k),
        )
        if done:
            return

        grads = _clipped(params, group["agc"])
        torch._foreach_mul_(nu, beta2)
        torch._foreach_addcmul_(nu, grads, grads, value=1 - beta2)
        scale = torch._foreach_sqrt(nu)
        torch._foreach_add_(scale, root * group["eps"])
        torch._foreach_mul_(mu, beta1)
        torch._foreach_addcdiv_(mu, grads, scale, value=(1 - beta1) * root)

        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, mu, alpha=-lr / (1 - beta1**k))

    def make_capturable(self, capturable: bool = True) -> None:
        """Nothing to do: the counts stay on the host."""

    def are_alike(self, parameters: Sequence[Alike]) -> bool:
        """Whether the parameters in each list have been updated equally often."""
        return all(len({self.state[p]["step"] for p in params}) == 1 for alike in parameters for params in alike)

    def count(self, parameters: Sequence[Alike]) -> list[float]:
        """Counts an update; of each list `root * eps`, `(1 - b1) * root`, `1 - lr * decay` and `-lr / (1 - b1^k)`.

        `root` is `sqrt(1 - b2^k)`, as in `step`.
        """
        numbers: list[float] = []
        for group, alike in zip(self.param_groups, parameters, strict=True):
            group["updates"] += 1
            lr, (beta1, beta2) = _rate(group), group["betas"]
            keep = 1 - lr * group["weight_decay"]
            for params in alike:
                k = int(self.state[params[0]]["step"]) + 1
                for p in params:
                    self.state[p]["step"] = k
                root = math.sqrt(1 - beta2**k)
                numbers += [root * group["eps"], (1 - beta1) * root, keep, -lr / (1 - beta1**k)]
        return numbers

    @torch.no_grad()
    def update(self, numbers: Tensor, parameters: Sequence[Alike]) -> None:
        """Carries the update out, in the same way as `step`."""
        rows = iter(numbers.unflatten(0, (-1, 4)).unbind())
        for group, alike in zip(self.param_groups, parameters, strict=True):
            for params in alike:
                self._update_with(params, next(rows), group)

    def _update_with(self, params: list[Tensor], row: Tensor, group: dict[str, Any]) -> None:
        """One update of tensors with the four numbers that `count` gave for them."""
        eps, share, keep, rate = row.unbind()
        grads = _clipped(params, group["agc"])
        mu = [self.state[p]["mu"] for p in params]
        nu = [self.state[p]["nu"] for p in params]
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(nu, beta2)
        torch._foreach_addcmul_(nu, grads, grads, value=1 - beta2)
        scale = torch._foreach_sqrt(nu)
        torch._foreach_add_(scale, eps, alpha=1)  # without alpha, torch reads the tensor as a number, and waits
        part: Any = torch._foreach_div(grads, scale)
        torch._foreach_mul_(part, share)
        torch._foreach_mul_(mu, beta1)
        torch._foreach_add_(mu, part)
        if group["weight_decay"]:
            torch._foreach_mul_(params, keep)
        change: Any = torch._foreach_mul(mu, rate)
        torch._foreach_add_(params, change)


class Adam(torch.optim.AdamW):
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

    updated: Sequence[Alike] = ()

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
        for group in self.param_groups:
            group.setdefault("warmup_steps", warmup_steps)
            group.setdefault("rate_scale", 1.0)
            group.setdefault("updates", 0)
        self.make_capturable(False)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: Recomputes the loss, if given.

        Returns:
            What `closure` returned.
        """
        rates = []
        for group in self.param_groups:
            group["updates"] += 1
            rates.append(_rate(group))
        result = self._step_at(rates, closure)
        self.updated = [[[p for p in group["params"] if p.grad is not None]] for group in self.param_groups]
        return result

    def make_capturable(self, capturable: bool = True) -> None:
        """Goes over to torch's fused kernel, which counts on the device, or back: one launch for a group's tensors."""
        # torch warns of updates that are not recorded; the first ones never are.
        self._warned_capturable_if_run_uncaptured = True
        for group in self.param_groups:
            # On a CPU one pass over each tensor in place of ten; elsewhere only recorded steps gain by it.
            fused = capturable or all(p.dtype == torch.float32 and p.is_cpu for p in group["params"])
            group.update(fused=fused, foreach=not fused, capturable=capturable)
        self._place_counts()

    def are_alike(self, parameters: Sequence[Alike]) -> bool:
        """True: each parameter's updates are counted on the device."""
        return True

    def count(self, parameters: Sequence[Alike]) -> list[float]:
        """Counts an update; of each group its rate. The bias corrections are worked out on the device."""
        for group in self.param_groups:
            group["updates"] += 1
        return [_rate(group) for group in self.param_groups]

    def update(self, numbers: Tensor, parameters: Sequence[Alike]) -> None:
        """Carries the update out, on every parameter that has a gradient."""
        self._step_at(list(numbers.unbind()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a saved state, also from one of an optimiser that counts elsewhere."""
        forms = [{name: group[name] for name in ("fused", "foreach", "capturable")} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, form in zip(self.param_groups, forms, strict=True):
            group.update(form)
        self._place_counts()

    def _place_counts(self) -> None:
        """Puts the counts of the parameters' updates where the kernels want them."""
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.state:
                    device = p.device if group["fused"] else torch.device("cpu")
                    step = torch.as_tensor(self.state[p]["step"], dtype=torch.float32)
                    self.state[p]["step"] = step.to(device)

    def _step_at(self, rates: Sequence[float | Tensor], closure: Callable[[], Any] | None = None) -> Any:
        """Torch's update, with a rate for each group."""
        full_rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        try:
            return super().step(closure)
        finally:
            # group["lr"] is the common rate after the warm-up to everybody else: schedules set it, checkpoints keep it.
            for group, full_rate in zip(self.param_groups, full_rates, strict=True):
                group["lr"] = full_rate


def build_optimizer(spec: OptimizerSpec, parameters: Iterable[nn.Parameter | ParameterGroup]) -> torch.optim.Optimizer:
    """The optimiser that a model's specification asks for.

    Clipping by the norm of all gradients together (`spec.grad_clip`) is no part of it, see `clip_by_global_norm`.

    Args:
        spec: Kind and numbers.
        parameters: What it updates; groups of them may have rates of their own.

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
    """Norm of all gradients together, which are scaled down to `max_norm` where it is larger.

    Nothing is read by the host. A norm that is not finite makes every gradient NaN instead of hiding it.

    Args:
        parameters: Those without a gradient are skipped.
        max_norm: Largest norm allowed. None, 0 and infinity only measure.

    Returns:
        The norm before clipping, a scalar.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if grads and max_norm and math.isfinite(max_norm):
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _rate(group: dict[str, Any]) -> float:
    """Rate of a group's present update."""
    return group["rate_scale"] * warmup_rate(group["lr"], group["updates"], group["warmup_steps"])


def _clipped(params: list[Tensor], agc: float | None) -> Any:
    """The gradients after adaptive clipping; those of the parameters are left as they are."""
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
    """Ranges that every optimiser here has."""
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


Alike = list[list[Tensor]]
"""Parameters of a group, in lists of those that have been updated equally often."""


@runtime_checkable
class CapturableOptimizer(Protocol):
    """An optimiser whose update can be recorded, in two halves: the host counts it, the device carries it out.

    The two together do what `step` does, up to rounding.
    """

    param_groups: list[dict[str, Any]]
    state: dict[Any, Any]
    updated: Sequence[Alike]
    """What the last `step` updated, by group."""

    def make_capturable(self, capturable: bool = True) -> None:
        """Prepares for this kind of updates, or takes that back; `step` works in both cases."""

    def are_alike(self, parameters: Sequence[Alike]) -> bool:
        """Whether the parameters in each list have been updated equally often, so that they can be counted together."""
        ...

    def count(self, parameters: Sequence[Alike]) -> list[float]:
        """Counts an update of these parameters, by group; they are alike.

        Returns:
            The numbers that this update needs.
        """
        ...

    def update(self, numbers: Tensor, parameters: Sequence[Alike]) -> None:
        """Carries the update out.

        Args:
            numbers: What `count` returned, on the device of the parameters. `[n]`
            parameters: As given to `count`.
        """
