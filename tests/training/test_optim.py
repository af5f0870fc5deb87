"""The optimisers against reference arrays, closed forms and their own saved state."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from worldflux.errors import ConfigurationError
from worldflux.models.base import OptimizerSpec
from worldflux.training.optim import Adam, LaProp, build_optimizer, clip_by_global_norm, warmup_rate

GOLDEN = Path(__file__).parent.parent / "golden" / "dreamerv3_proprio.npz"
SPEC = OptimizerSpec(kind="laprop", learning_rate=1e-2, eps=1e-20, agc=0.3)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return {name[len("opt/") :]: arrays[name] for name in arrays.files if name.startswith("opt/")}


def parameters(golden: dict[str, np.ndarray]) -> dict[str, torch.nn.Parameter]:
    return {name: torch.nn.Parameter(torch.tensor(golden[f"p0/{name}"])) for name in ("w", "b")}


def set_gradients(params: dict[str, torch.nn.Parameter], golden: dict[str, np.ndarray], i: int) -> None:
    for name, p in params.items():
        p.grad = torch.tensor(golden[f"g{i}/{name}"])


def assert_close(actual: torch.Tensor, expected: np.ndarray) -> None:
    largest = float(np.abs(expected).max())
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("setting,lr,warmup", [("official", 4e-5, 1000), ("fast", 1e-2, 2), ("nowarm", 1e-2, 0)])
def test_laprop_updates_equal_the_reference(golden, setting, lr, warmup):
    params = parameters(golden)
    optimizer = LaProp(params.values(), lr=lr, warmup_steps=warmup)
    for i in range(3):
        before = {name: p.detach().double().clone() for name, p in params.items()}
        set_gradients(params, golden, i)
        optimizer.step()
        for name, p in params.items():
            assert_close(p, golden[f"{setting}/p{i}/{name}"])
            # An update of 1e-8 on a weight of 1 is below what the float32 weight can show.
            resolution = 2e-7 * float(before[name].abs().max())
            update = (p.detach().double() - before[name]).numpy()
            np.testing.assert_allclose(update, golden[f"{setting}/u{i}/{name}"], rtol=1e-4, atol=resolution + 1e-12)


@pytest.mark.parametrize("i", range(3))
def test_adaptive_clipping_equals_the_reference(golden, i):
    """With b1 = 0 and b2 = 0 nothing is averaged: `nu` is the square of the clipped gradient."""
    params = parameters(golden)
    optimizer = LaProp(params.values(), lr=0.0, betas=(0.0, 0.0))
    set_gradients(params, golden, i)
    optimizer.step()
    for name, p in params.items():
        assert_close(optimizer.state[p]["nu"].sqrt() * p.grad.sign(), golden[f"agc{i}/{name}"])


def test_warmup_equals_the_reference_schedule(golden):
    rates = [warmup_rate(4e-5, int(step) + 1, 1000) for step in golden["sched_step"]]
    np.testing.assert_allclose(rates, golden["sched_lr"], rtol=1e-4)


def test_warmup_starts_at_zero_and_reaches_the_full_rate_one_update_after_its_length():
    assert [warmup_rate(0.8, k, 4) for k in range(1, 7)] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8])
    assert warmup_rate(0.8, 1, 0) == 0.8


def test_laprop_moves_by_the_rate_whatever_the_size_of_the_first_gradient():
    for size in (1e-6, 1.0, 1e6):
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        p.grad = torch.tensor([size, -size])
        LaProp([p], lr=0.1, agc=None).step()
        torch.testing.assert_close(p.detach(), torch.tensor([0.9, -1.9]))


def test_laprop_leaves_gradients_as_they_were():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 50.0)
    LaProp([p]).step()
    assert p.grad.tolist() == [50.0, 50.0, 50.0]


def test_weight_decay_is_decoupled_from_the_gradient():
    for build in (LaProp, Adam):
        p = torch.nn.Parameter(torch.tensor([2.0]))
        p.grad = torch.zeros(1)
        build([p], lr=0.1, weight_decay=0.5).step()
        assert p.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5))


def test_a_parameter_without_gradient_is_skipped_and_begins_with_its_first_one():
    early, late, alone = (torch.nn.Parameter(torch.tensor([1.0])) for _ in range(3))
    together = LaProp([early, late], lr=0.1, agc=None)
    for _ in range(5):
        early.grad = torch.ones(1)
        together.step()
    assert late.item() == 1.0 and late not in together.state
    before = early.item()
    early.grad, late.grad = None, torch.tensor([3.0])
    together.step()
    alone.grad = torch.tensor([3.0])
    LaProp([alone], lr=0.1, agc=None).step()
    assert late.item() == alone.item() and early.item() == before


@pytest.mark.parametrize("kind", ["laprop", "adam"])
def test_counting_on_the_device_changes_nothing(kind):
    """What is captured in a CUDA graph: counts, rates, warm-up and bias corrections are tensors."""
    spec = OptimizerSpec(kind=kind, learning_rate=0.1, warmup_steps=3, weight_decay=0.1)
    results = []
    for capturable in (False, True):
        early, late = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
        optimizer = build_optimizer(spec, [early, late])
        optimizer.make_capturable(capturable)
        for step, gradient in enumerate(torch.randn(8, 4, generator=torch.Generator().manual_seed(0))):
            early.grad, late.grad = gradient, gradient if step > 2 else None
            rate = 0.1 / (1 + step)  # as a schedule sets it
            optimizer.param_groups[0]["lr"] = torch.tensor(rate) if capturable else rate
            optimizer.step()
        results.append((early, late))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["laprop", "adam"])
def test_a_restored_optimizer_continues_with_the_same_bits(kind):
    spec = OptimizerSpec(kind=kind, learning_rate=1e-2, warmup_steps=3, agc=0.3 if kind == "laprop" else None)
    gradients = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

    def run(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer, rows: range) -> None:
        for i in rows:
            p.grad = gradients[i].clone()
            optimizer.step()

    whole = torch.nn.Parameter(torch.ones(4))
    run(whole, build_optimizer(spec, [whole]), range(6))

    half = torch.nn.Parameter(torch.ones(4))
    first = build_optimizer(spec, [half])
    run(half, first, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = build_optimizer(spec, [half])
    second.load_state_dict(torch.load(file, weights_only=True))
    run(half, second, range(3, 6))
    assert torch.equal(half, whole)


def test_adam_with_warmup_equals_torch_adam_fed_with_the_same_rates():
    ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    adam = Adam([ours], lr=0.1, warmup_steps=2)
    reference = torch.optim.Adam([theirs], lr=0.1)
    for k, gradient in enumerate(torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, 4.0], [2.0, 2.0, -1.0], [1.0, 0.0, 1.0]])):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        reference.param_groups[0]["lr"] = 0.1 * min(1.0, k / 2)
        adam.step()
        reference.step()
        assert adam.param_groups[0]["lr"] == 0.1
    torch.testing.assert_close(ours, theirs)


def test_clipping_scales_all_gradients_by_one_factor():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_by_global_norm([a, b], 2.5).item() == pytest.approx(5.0)
    torch.testing.assert_close(a.grad, torch.tensor([1.5, 0.0]))
    torch.testing.assert_close(b.grad, torch.tensor([2.0]))


@pytest.mark.parametrize("max_norm", [None, 0.0, math.inf, 100.0])
def test_clipping_only_measures_when_it_is_off_or_not_reached(max_norm):
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert clip_by_global_norm([p], max_norm).item() == pytest.approx(5.0)
    assert p.grad.tolist() == [3.0, 4.0]


def test_build_optimizer_hands_every_number_of_the_specification_on():
    spec = replace(SPEC, betas=(0.5, 0.6), eps=1e-3, agc=0.7, warmup_steps=5, weight_decay=0.25)
    group = build_optimizer(spec, [torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    expected = dict(lr=1e-2, betas=(0.5, 0.6), eps=1e-3, agc=0.7, warmup_steps=5, weight_decay=0.25)
    assert {name: group[name] for name in expected} == expected


@pytest.mark.parametrize(
    "change,message",
    [
        ({"kind": "lapprop"}, "Unknown optimiser 'lapprop'; did you mean 'laprop'"),
        ({"kind": "adam"}, "agc is 0.3 with kind 'adam'"),
        ({"agc": -1.0}, "agc is -1.0, expected a ratio above 0"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        ({"learning_rate": math.nan}, "learning rate is nan"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(change, message):
    with pytest.raises(ConfigurationError, match=message):
        build_optimizer(replace(SPEC, **change), [torch.nn.Parameter(torch.ones(1))])


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ConfigurationError, match="no parameter that requires a gradient"):
        build_optimizer(SPEC, [])
