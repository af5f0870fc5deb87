"""DreamerV3's fast implementations compared with their plain definitions."""

from __future__ import annotations

import copy
import functools
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from worldflux import create_world_model
from worldflux.models.dreamerv3.world_model import DreamerV3
from worldflux.nn.conv import UpConv
from worldflux.nn.layers import MLP, stacked_mlps
from worldflux.training import Batch, Trainer, TrainingConfig

SMALL = dict(
    deter_dim=64,
    hidden_dim=24,
    stoch_discrete=6,
    stoch_classes=5,
    units=16,
    blocks=4,
    bins=31,
    imagination_horizon=4,
)
VECTOR, IMAGE = (7,), (3, 48, 48)


def build(obs_shape: tuple[int, ...], **overrides: object) -> DreamerV3:
    torch.manual_seed(0)
    sizes = {**SMALL, "cnn_depth": 4, "bspace": 4} if len(obs_shape) == 3 else SMALL
    model = create_world_model("dreamerv3:tiny", obs_shape=obs_shape, action_dim=3, **{**sizes, **overrides})
    assert isinstance(model, DreamerV3)
    for head in (model.reward_head.out, model.critic.out, model.slow_critic.out):  # they start at zero
        torch.nn.init.normal_(head.weight, std=0.1)
    return model


def batch_for(model: DreamerV3, seed: int, B: int = 3, T: int = 6) -> Batch:
    random = torch.Generator().manual_seed(seed)
    shape = model.config.obs_shapes["obs"]
    obs = torch.rand(B, T + 1, *shape, generator=random)
    draw = lambda *shape: torch.rand(*shape, generator=random)  # noqa: E731
    return Batch(
        obs=(obs * 255).to(torch.uint8) if len(shape) == 3 else obs,
        actions=3 * draw(B, T + 1, 3) - 1.5,
        rewards=draw(B, T + 1),
        terminations=draw(B, T + 1) < 0.1,
        is_first=draw(B, T + 1) < 0.2,
        extras={
            name: (draw(B, T + 1, *shape) * 3).to(torch.from_numpy(dtype.type([0])).dtype)
            for name, (shape, dtype) in model.replay_extras().items()
        },
    )


def updates(model: DreamerV3, fast: bool, steps: int) -> tuple[list[dict[str, Tensor]], DreamerV3]:
    model.rssm.fast = fast
    trainer = Trainer(model, TrainingConfig(device="cpu", grad_clip=0.0, learning_rate=1e-3))
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        batch = batch_for(model, step)
        losses.append(trainer.step(replace(batch, actions=batch.actions.clamp(-1, 1))))
    return losses, model


@pytest.mark.parametrize("obs_shape", [VECTOR, IMAGE])
def test_ten_updates_equal_those_of_the_plain_path(obs_shape):
    model = build(obs_shape)
    plain_losses, plain = updates(copy.deepcopy(model), fast=False, steps=10)
    fast_losses, fast = updates(copy.deepcopy(model), fast=True, steps=10)
    assert plain_losses[0]["loss"] != plain_losses[9]["loss"]
    for ours, theirs in zip(fast_losses, plain_losses, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(dict(fast.named_parameters()), dict(plain.named_parameters()), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("with_context", [True, False])
def test_every_gradient_of_one_step_equals_autograds(with_context):
    model = build(VECTOR)
    data = batch_for(model, 0)
    if not with_context:
        data = Batch(data.obs, data.actions, data.rewards, data.terminations, is_first=data.is_first)
    gradients = []
    for fast in (False, True):
        model.rssm.fast = fast
        torch.manual_seed(0)
        loss = model.loss(data).loss
        gradients.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    assert all(g.abs().max() > 0 for g in gradients[0])
    for plain, ours in zip(*gradients, strict=True):
        assert (ours - plain).norm() <= 1e-4 * plain.norm()


def test_a_loss_can_be_differentiated_twice_over():
    model = build(VECTOR)
    torch.manual_seed(0)
    loss = model.loss(batch_for(model, 0)).loss
    weight = model.rssm.gates.weight
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight)
    assert torch.equal(first, second)


@given(kernel=st.integers(1, 8), height=st.integers(1, 5), width=st.integers(1, 5), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_up_convolution_equals_doubling_and_convolving(kernel, height, width, seed):
    torch.manual_seed(seed)
    conv = UpConv(3, 2, kernel).double()
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    doubled = F.interpolate(x, scale_factor=2, mode="nearest")
    before = (kernel - 1) // 2
    padded = F.pad(doubled, (before, kernel - 1 - before) * 2)
    expected, found = F.conv2d(padded, conv.weight, conv.bias), conv(x)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    inputs = [x, conv.weight, conv.bias]
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs, weights), torch.autograd.grad(expected, inputs, weights)
    )


@pytest.mark.parametrize("layers", [(1, 3), (2, 0)])
def test_stacked_mlps_equal_each_by_itself(layers):
    torch.manual_seed(0)
    mlps = [MLP(9, units, count) for units, count in zip((4, 6), layers, strict=True)]
    x = torch.randn(5, 2, 9)
    for found, mlp in zip(stacked_mlps(mlps, x), mlps, strict=True):
        torch.testing.assert_close(found, mlp(x))


NO_COMPILER = shutil.which("c++") is None and shutil.which("g++") is None
INDUCTOR = [pytest.mark.slow, pytest.mark.skipif(NO_COMPILER, reason="inductor needs a C++ compiler")]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=INDUCTOR)])
def test_compiled_cells_compute_the_same_and_stay_out_of_copies(backend, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    plain, compiled = build(VECTOR), build(VECTOR)
    compiled.compile_functions()
    names = set(plain.state_dict())
    plain_losses, plain = updates(plain, fast=True, steps=3)
    compiled_losses, compiled = updates(compiled, fast=True, steps=3)
    for ours, theirs in zip(compiled_losses, plain_losses, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(dict(compiled.named_parameters()), dict(plain.named_parameters()), rtol=1e-3, atol=2e-4)
    assert set(compiled.state_dict()) == names
    assert pickle.loads(pickle.dumps(compiled)).rssm.functions == plain.rssm.functions  # not the compiled ones
