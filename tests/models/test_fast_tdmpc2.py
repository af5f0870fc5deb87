"""TD-MPC2's fast implementations equal their plain definitions and never wait for the device."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from worldflux import create_world_model
from worldflux.config import PlannerConfig
from worldflux.models.base import LossOutput
from worldflux.models.mppi import search_step
from worldflux.models.planning import Planner
from worldflux.models.tdmpc2.world_model import TDMPC2, CompiledFunctions
from worldflux.nn.definitions import by_definition
from worldflux.nn.fast.dropout import dropout_factors
from worldflux.nn.mish import Ensemble, NormedLinear, linear
from worldflux.training import Batch, Trainer, TrainingConfig

SMALL = dict(latent_dim=32, hidden_dim=24, mlp_dim=24, enc_dim=16, num_q_networks=3, num_bins=21, dropout=0.02)
SEARCH = dict(num_samples=48, num_elites=8, num_pi_trajs=6, iterations=3)


def small_model(**fields) -> TDMPC2:
    """Creates a small model with random output layers, because new ones give 0 for every input."""
    torch.manual_seed(0)
    settings = {"obs_shape": (5,), "action_dim": 2, **SMALL, **fields}
    model = create_world_model("tdmpc2:tiny", **settings)
    assert isinstance(model, TDMPC2)
    for head in (model.reward_head, model.critics, model.target_critics):
        torch.nn.init.normal_(head.layers[-1].weight, std=0.2)
    return model


def small_batch(model: TDMPC2, seed: int = 1, windows: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    N, T = windows, model.config.horizon + 1
    extras = {}
    if model.tasks is not None:
        tasks = torch.randint(model.config.num_tasks, (N, 1), generator=generator)
        extras = {"task": tasks.expand(N, T)}
    obs, actions = torch.randn(N, T, 5, generator=generator), torch.rand(N, T, 2, generator=generator) * 2 - 1
    return Batch(
        obs=obs,
        actions=F.one_hot(actions.argmax(-1), 2).float() if model.config.action_classes else actions,
        rewards=torch.randn(N, T, generator=generator),
        terminations=torch.rand(N, T, generator=generator) < 0.1,
        is_first=torch.rand(N, T, generator=generator) < 0.1,
        extras=extras,
    )


@contextmanager
def without_native_code() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLDFLUX_NATIVE", "0")
        yield


SLOWER = {"definition": by_definition, "no native code": without_native_code}


KINDS = {
    "state": {},
    "tasks": dict(num_tasks=2, task_dim=4, task_action_dims=(1, 2), task_episode_lengths=(100, 200)),
    "episodic": dict(episodic=True),
    "discrete": dict(action_type="discrete"),
}


def ten_updates(**fields) -> tuple[list[dict[str, Tensor]], TDMPC2]:
    model = small_model(**fields)
    trainer = Trainer(model, TrainingConfig(device="cpu", grad_clip=20.0, seed=3))
    torch.manual_seed(5)
    losses = [dict(trainer.step(small_batch(model, seed))) for seed in range(10)]
    return losses, model


@pytest.mark.parametrize("slower", SLOWER)
@pytest.mark.parametrize("kind", KINDS)
def test_ten_updates_are_the_plain_ones(kind, slower):
    found, model = ten_updates(**KINDS[kind])
    with SLOWER[slower]():
        plain, expected = ten_updates(**KINDS[kind])

    for ours, theirs in zip(found, plain, strict=True):
        assert list(ours) == list(theirs)
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5, msg=name)
    moved = small_model(**KINDS[kind])
    for (name, p), q, start in zip(model.named_parameters(), expected.parameters(), moved.parameters(), strict=True):
        # A step of Adam has the size of its rate, 3e-4, whatever the size of the gradient.
        torch.testing.assert_close(p, q, rtol=0.0, atol=2e-5, msg=name)
        assert name.startswith("tasks") or not torch.equal(p, start), name


@pytest.mark.parametrize("slower", SLOWER)
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_plans_are_the_plain_ones(kind, deterministic, slower):
    model = small_model(**KINDS[kind]).eval()
    if kind == "episodic":
        model.termination_seen.fill_(1.0)
    planner = Planner(model, PlannerConfig.from_model(model.config, **SEARCH))
    task = torch.tensor([0, 1, 0]) if model.tasks is not None else 0
    state = model.encode(torch.randn(3, 5, generator=torch.Generator().manual_seed(2)), task=task)
    is_first = torch.tensor([True, False, False])

    def plans() -> list[Tensor]:
        torch.manual_seed(4)
        plan, found = planner.start(3), []
        for _ in range(3):
            actions, plan = planner.plan(state, plan, is_first=is_first, deterministic=deterministic)
            found += [actions, plan]
        return found

    found = plans()
    with SLOWER[slower]():
        expected = plans()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-4)


# Layers


def gradients(layer: torch.nn.Module, inputs: list[Tensor], **options) -> tuple[Tensor, list[Tensor]]:
    output = layer(*inputs, **options)
    weights = torch.linspace(0.5, 1.5, output.numel()).view_as(output)
    wanted = [x for x in (*layer.parameters(), *inputs) if x.requires_grad]
    found = torch.autograd.grad((output.float() * weights).sum(), wanted, allow_unused=True)
    return output, [torch.zeros(()) if g is None else g for g in found]


def layers() -> dict[str, tuple[torch.nn.Module, list[Tensor], dict]]:
    """Returns a layer, its inputs, of which the second needs no gradient, and further arguments."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    torch.manual_seed(0)
    one, many = NormedLinear(7, 16), Ensemble(3, 7, [16, 16], 4)
    for p in (*one.parameters(), *many.parameters()):
        torch.nn.init.normal_(p, std=0.7)
    factors = (torch.rand(3, 6, 16, generator=generator) > 0.3) / 0.7
    return {
        "one": (one, [random(2, 3, 5).requires_grad_(), random(2, 3, 2)], {}),
        "ensemble": (many, [random(6, 5).requires_grad_(), random(6, 2)], {"dropout": factors}),
        "members": (many, [random(6, 5).requires_grad_(), random(6, 2)], {"members": torch.tensor([2, 0])}),
        "frozen": (many, [random(6, 5).requires_grad_(), random(6, 2)], {"frozen": True}),
        "part": (many, [random(6, 5), random(6, 2).requires_grad_()], {"frozen": True}),
    }


@pytest.mark.parametrize("case", list(layers()))
def test_a_layer_and_its_gradients_are_the_plain_ones(case):
    layer, inputs, options = layers()[case]
    with without_native_code():  # tests/accel/test_native.py compares that
        output, grads = gradients(layer, inputs, **options)
        with torch.no_grad():
            torch.testing.assert_close(layer(*inputs, **options), output, rtol=1e-6, atol=1e-6)
    with by_definition():
        expected, expected_grads = gradients(layer, inputs, **options)

    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", list(layers()))
def test_under_autocast_a_layer_multiplies_in_bfloat16(case):
    layer, inputs, options = layers()[case]
    exact, exact_grads = gradients(layer, inputs, **options)
    with torch.autocast("cpu", torch.bfloat16):
        output, grads = gradients(layer, inputs, **options)
        with torch.no_grad():
            assert torch.equal(layer(*inputs, **options), output)

    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.1)
    for ours, theirs in zip(grads, exact_grads, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.05 * float(theirs.abs().max() + 1))


def test_inputs_that_repeat_for_many_rows_are_broadcast():
    generator = torch.Generator().manual_seed(0)
    state, action = torch.randn(3, 1, 4, generator=generator), torch.randn(3, 6, 2, generator=generator)
    weight, bias = torch.randn(5, 6, generator=generator), torch.randn(5, generator=generator)

    joined = torch.cat([state.expand(3, 6, 4), action], -1)

    expected = torch.nn.functional.linear(joined, weight, bias)
    torch.testing.assert_close(linear((state, action), weight, bias), expected)


@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_dropout_is_uniform_over_positions(rate):
    torch.manual_seed(0)
    zeros = sum((dropout_factors((40, 50), rate, torch.device("cpu")) == 0).float() for _ in range(1000))

    assert isinstance(zeros, Tensor)
    counts = zeros.flatten()  # of 1000 draws each
    deviation = (1000 * rate * (1 - rate)) ** 0.5
    assert float((counts - 1000 * rate).abs().max()) < 5.5 * deviation
    assert float(counts.mean()) == pytest.approx(1000 * rate, abs=5 * deviation / 2000**0.5)
    assert float(counts.std()) == pytest.approx(deviation, rel=0.1)
    factors = dropout_factors((40, 50), rate, torch.device("cpu"))
    torch.testing.assert_close(factors.unique(), torch.tensor([0.0, 1 / (1 - rate)]))


def test_dropout_of_rate_zero_keeps_everything():
    assert torch.equal(dropout_factors((3, 4), 0.0, torch.device("cpu")), torch.ones(3, 4))


# Nothing waits for the device


class NoWaiting(TorchDispatchMode):
    """Fails if the host would have to wait for a device, or if the host creates the content of a tensor."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "lift_fresh")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0].strip("_")
        assert name not in {wait.strip("_") for wait in self.WAITS}, f"{func} waits for the device"
        # The size of the result of boolean indexing depends on the values of the mask.
        if name in ("index", "index_put", "index_put_impl"):
            assert not any(x is not None and x.dtype == torch.bool for x in args[1]), f"{func} with a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_an_update_waits_for_the_device(kind):
    model = small_model(**KINDS[kind])
    batch = small_batch(model)

    with NoWaiting():
        outputs = []
        for phase in model.phases():
            outputs.append(phase.loss(batch, outputs))
            outputs[-1].loss.backward()
        model.after_step(outputs)

    assert all(p.grad is not None for p in model.actor.parameters())


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_a_plan_waits_for_the_device(kind, deterministic):
    model = small_model(**KINDS[kind]).eval()
    planner = Planner(model, PlannerConfig.from_model(model.config, **SEARCH))
    state, plan = model.encode(torch.zeros(2, 5)), planner.start(2)
    planner.plan(state, plan, deterministic=deterministic)  # creates the fixed noise on the host once

    with NoWaiting():
        actions, _ = planner.plan(state, plan, is_first=torch.ones(2).bool(), deterministic=deterministic)

    assert actions.shape == (2, 2)


def test_the_check_for_waiting_detects_waiting():
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        bool(torch.ones(()) > 0)
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        torch.tensor([1.0, 2.0])
    with NoWaiting(), pytest.raises(AssertionError, match="with a mask"):
        torch.ones(3)[torch.ones(3).bool()]


# Compiled


def compiled_without_a_compiler() -> CompiledFunctions:
    """Traces each function completely but runs it eagerly, which takes seconds instead of minutes and needs no C++."""
    return CompiledFunctions(*(torch.compile(cell, fullgraph=True, backend="eager") for cell in CompiledFunctions()))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def updates_with_given_draws(model: TDMPC2, count: int) -> list[LossOutput]:
    """Returns the outputs of updates with given random draws, because a compiler may draw in another order."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    outputs = []
    for seed in range(count):
        torch.manual_seed(seed)
        batch, draws, policy_draws = small_batch(model, seed), model.model_draws(8, 3), model.policy_draws(8, 4)
        optimizer.zero_grad()
        outputs.append(model._functions.model_loss(model, batch, draws))
        outputs[-1].loss.backward()
        outputs.append(model.policy_loss(outputs[-1], policy_draws))
        outputs[-1].loss.backward()
        optimizer.step()
        model.after_step(outputs[-2:])
    return outputs


def assert_alike(ours: list[LossOutput], theirs: list[LossOutput], **tolerance: float) -> None:
    for output, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(output.loss, expected.loss, **tolerance)
        torch.testing.assert_close(output.terms, expected.terms, **tolerance)
        torch.testing.assert_close(output.updates, expected.updates, **tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_are_traced_as_a_whole_and_equal_the_plain_ones(dtype, fresh_compiler):
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == "float32" else dict(rtol=0.02, atol=0.02)
    fields = dict(KINDS["tasks"] | KINDS["episodic"], dtype=dtype)
    plain, traced = small_model(**fields), small_model(**fields)
    traced._functions = compiled_without_a_compiler()

    assert_alike(updates_with_given_draws(traced, 3), updates_with_given_draws(plain, 3), **tolerance)
    if dtype == "float32":
        for (name, p), q in zip(traced.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0.0, atol=2e-5, msg=name)


def test_plans_are_traced_as_a_whole_and_equal_the_plain_ones(fresh_compiler):
    fields = KINDS["tasks"] | KINDS["episodic"]
    plain, traced = small_model(**fields).eval(), small_model(**fields).eval()
    traced._functions = compiled_without_a_compiler()
    found = []
    for model in (plain, traced):
        planner = Planner(model, PlannerConfig.from_model(model.config, **SEARCH))
        state = model.encode(torch.zeros(2, 5), task=torch.tensor([0, 1]))
        found.append(planner.plan(state, planner.start(2), deterministic=True))
        planner.plan(state, planner.start(2))

    torch.testing.assert_close(found[1], found[0], rtol=0.0, atol=1e-4)


def test_a_compiled_model_is_stored_and_copied_as_a_plain_one(tmp_path):
    model = small_model()
    names = list(model.state_dict())
    model.compile_functions()  # nothing is compiled before the first call
    model.compile_functions()

    assert model._functions != CompiledFunctions() and model.search_step is model._functions.search_step
    assert list(model.state_dict()) == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._functions == CompiledFunctions() and other.search_step is search_step
        assert torch.equal(other.reward_head.layers[-1].weight, model.reward_head.layers[-1].weight)
    model.save_pretrained(tmp_path)
    assert TDMPC2.from_pretrained(tmp_path)._functions == CompiledFunctions()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled_updates_and_plans_are_the_plain_ones(fresh_compiler):
    plain, compiled = small_model(), small_model()
    compiled.compile_functions()

    assert_alike(updates_with_given_draws(compiled, 3), updates_with_given_draws(plain, 3), rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(compiled.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=0.0, atol=2e-5, msg=name)

    found = []
    for model in (plain.eval(), compiled.eval()):
        planner = Planner(model, PlannerConfig.from_model(model.config, **SEARCH))
        found.append(planner.plan(model.encode(torch.zeros(2, 5)), planner.start(2), deterministic=True))
    torch.testing.assert_close(found[1], found[0], rtol=0.0, atol=1e-3)
