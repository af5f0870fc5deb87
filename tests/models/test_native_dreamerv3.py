"""The kernels in C compared with the torch code that defines them, and behaviour without the kernels."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fast import SMALL, episodes, times_entered
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from worldflux import create_world_model
from worldflux.accel import native
from worldflux.models.dreamerv3.world_model import DreamerV3
from worldflux.nn.distributions import TwoHot
from worldflux.nn.fast import kernels
from worldflux.nn.layers import MLP, stacked_mlps
from worldflux.nn.transforms import symexp_bins
from worldflux.training import Trainer, TrainingConfig
from worldflux.training.optim import LaProp

SWITCH = "WORLDFLUX_NATIVE"
needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None or kernels.library() is None, reason="needs a C compiler and torch's BLAS"
)
ACTIONS: dict[str, dict[str, Any]] = {
    "continuous": {},
    "discrete": {"action_type": "discrete"},
    "multi_discrete": {"action_type": "multi_discrete", "action_dim": 5, "action_classes": (3, 2)},
}


def build(**overrides: Any) -> DreamerV3:
    torch.manual_seed(0)
    sizes = {"obs_shape": (3,), "action_dim": 2, **SMALL, **overrides}
    model = create_world_model("dreamerv3:tiny", **sizes)
    assert isinstance(model, DreamerV3)
    for head in (model.reward_head.out, model.critic.out, model.slow_critic.out):  # they start at zero
        torch.nn.init.normal_(head.weight, std=0.1)
    return model


def both(monkeypatch: pytest.MonkeyPatch, function: Callable[[], Any]) -> tuple[Any, Any]:
    """Returns the results of a function without and with the kernels."""
    found = []
    for switch in ("0", "1"):
        monkeypatch.setenv(SWITCH, switch)
        torch.manual_seed(0)
        found.append(function())
    return found[0], found[1]


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 9), (300, 9), (7, 5, 9)])
def test_mlps_and_their_gradients_equal_those_of_torch(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    stack = [MLP(9, units, layers) for units, layers in ((6, 3), (17, 1))]
    for parameter in (p for mlp in stack for p in mlp.parameters()):
        torch.nn.init.normal_(parameter)
    x = torch.randn(shape, requires_grad=True)
    parameters = [x, *(p for mlp in stack for p in mlp.parameters())]

    def run() -> list[Tensor]:
        with torch.no_grad():
            results = [*stacked_mlps(stack, x), stack[0](x)]
        outputs = [*stacked_mlps(stack, x), stack[1](x)]
        weights = [torch.randn_like(output) for output in outputs]
        return [*results, *outputs, *torch.autograd.grad(outputs, parameters, weights)]

    plain, ours = both(monkeypatch, run)
    for theirs, mine in zip(plain, ours, strict=True):
        assert theirs.abs().max() > 0 and (mine - theirs).norm() <= 1e-5 * theirs.norm()


@needs_compiler
@pytest.mark.parametrize("kind", ACTIONS)
def test_losses_and_every_gradient_equal_those_of_torch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(**ACTIONS[kind])
    batch = episodes(finals=True, model=model, classes=model.config.action_classes).sample(5, 9)
    trained = [p for p in model.parameters() if p.requires_grad]

    def run() -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        output = model.loss(batch)
        return output.terms, torch.autograd.grad(output.loss, trained)

    (plain_terms, plain), (terms, ours) = both(monkeypatch, run)
    torch.testing.assert_close(terms, plain_terms, rtol=2e-4, atol=2e-5)
    for theirs, mine in zip(plain, ours, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm()


@needs_compiler
@pytest.mark.parametrize("kind", ACTIONS)
def test_ten_updates_equal_those_of_torch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build(**ACTIONS[kind])

    def run() -> dict[str, Tensor]:
        model = copy.deepcopy(made)
        config = TrainingConfig(
            total_steps=10, batch_size=4, sequence_length=12, learning_rate=1e-3, device="cpu", grad_clip=0.0
        )
        data = episodes(finals=True, model=model, classes=model.config.action_classes)
        return dict(Trainer(model, config).train(data).named_parameters())

    plain, ours = both(monkeypatch, run)
    assert not torch.equal(ours["actor.mlp.linears.0.weight"], made.actor.mlp.linears[0].weight)
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=2e-4)


@needs_compiler
def test_training_on_a_cpu_runs_the_windows_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(build(), TrainingConfig(total_steps=3, batch_size=4, sequence_length=6, device="cpu"))
    assert times_entered(lambda: trainer.train(episodes(finals=True)), "NativeScan") == 3
    monkeypatch.setenv(SWITCH, "0")
    assert times_entered(lambda: trainer.train(episodes(finals=True), 2), "NativeScan") == 0


@needs_compiler
def test_two_hot_means_equal_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    logits = torch.randn(6, 4, 255)
    logits[0, 0] = 0.0
    logits[1, 1, 3] = torch.nan
    logits[2, 2, 250] += 5.0

    def run() -> list[Tensor]:
        values = TwoHot(logits, symexp_bins(255))
        return [values.probs, values.mean, values.t().mean]

    plain, ours = both(monkeypatch, run)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert ours[1][0, 0] == 0.0 and ours[1].isnan().sum() == 1


@needs_compiler
@pytest.mark.parametrize("agc", [0.3, None])
def test_laprop_equals_its_form_in_torch(agc: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3,), (64, 99), (1,), (5, 4, 2))]
        parameters[2].data.zero_()
        optimizer = LaProp(parameters, lr=1e-2, agc=agc, warmup_steps=3, weight_decay=0.1)
        for step in range(10):
            for i, parameter in enumerate(parameters):  # the third parameter has had fewer updates than the others
                parameter.grad = None if i == 2 and step % 2 else torch.randn_like(parameter) * 10.0 ** (step % 4 - 2)
            optimizer.step()
        state = [optimizer.state[p][name] for p in parameters for name in ("mu", "nu")]
        return [*(p.detach() for p in parameters), *state]

    plain, ours = both(monkeypatch, run)
    for theirs, mine in zip(plain, ours, strict=True):
        assert theirs.abs().max() > 0 and (mine - theirs).norm() <= 2e-5 * theirs.norm()


@needs_compiler
def test_a_gradient_that_is_not_finite_makes_its_tensor_nan() -> None:
    bad, good = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    bad.grad, good.grad = torch.tensor([1.0, torch.nan, 1.0]), torch.ones(3)
    LaProp([bad, good], agc=0.3).step()
    assert bad.isnan().all() and good.isfinite().all()


@needs_compiler
def test_the_kernels_are_not_used_in_other_precisions_or_dispatch_modes() -> None:
    x = torch.zeros(2)
    assert kernels.kernels(x) is not None
    assert kernels.kernels(x.double()) is None and kernels.kernels(x.to("meta")) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernels.kernels(x) is None
    with FlopCounterMode(display=False):
        assert kernels.kernels(x) is None


def test_without_a_compiler_torch_computes_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    kernels.library.cache_clear()
    try:
        assert kernels.library() is None
        trainer = Trainer(build(), TrainingConfig(total_steps=2, batch_size=4, sequence_length=6, device="cpu"))
        assert times_entered(lambda: trainer.train(episodes(finals=True)), "Scan") == 2
    finally:
        kernels.library.cache_clear()
