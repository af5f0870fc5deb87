"""Native code: compilation, cache, use in training and acting, and overridden or hooked layers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_models import value_of_sequences
from torch import Tensor, nn

from worldflux import WorldFluxAgent, create_world_model
from worldflux.accel import native
from worldflux.models.tdmpc2.world_model import TDMPC2
from worldflux.nn.definitions import by_definition
from worldflux.nn.distributions import TwoHot
from worldflux.nn.fast import mlp as fast
from worldflux.nn.mish import Ensemble, MishMLP, NormedLinear, mish
from worldflux.nn.transforms import simnorm, symlog_bins

HAS_COMPILER = any(shutil.which(name) for name in ("gcc", "cc", "clang"))
needs_a_compiler = pytest.mark.skipif(not HAS_COMPILER or native.sgemm() is None, reason="no C compiler or no BLAS")
SOURCE = "double answer(void) { return 42.0; }\n"
SMALL = dict(latent_dim=16, hidden_dim=16, mlp_dim=16, enc_dim=16, num_q_networks=2, num_bins=11)


@pytest.fixture
def native_calls(monkeypatch) -> list[int]:
    """Returns a list to which every native computation of an MLP appends its number of layers."""
    calls: list[int] = []
    inner = fast.mlp

    def counted(layers, *args, **kwargs):
        result = inner(layers, *args, **kwargs)
        if result is not None:
            calls.append(len(layers))
        return result

    monkeypatch.setattr(fast, "mlp", counted)
    return calls


# Compiling


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("WORLDFLUX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "answer.c"
    path.write_text(SOURCE)
    return path


def answer(library) -> float:
    library.answer.restype = ctypes.c_double
    return library.answer()


@needs_a_compiler
def test_a_library_is_compiled_once_and_then_taken_from_the_cache(source, tmp_path, monkeypatch):
    assert answer(native.load.__wrapped__(source)) == 42.0
    (built,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("compiled again"))

    assert answer(native.load.__wrapped__(source)) == 42.0
    assert built.suffix == ".so"


@needs_a_compiler
def test_a_changed_source_is_compiled_anew(source, tmp_path):
    native.load.__wrapped__(source)
    source.write_text(SOURCE.replace("42", "43"))

    assert answer(native.load.__wrapped__(source)) == 43.0
    assert len(list((tmp_path / "cache").iterdir())) == 2


@needs_a_compiler
def test_a_cache_that_cannot_be_written_is_not_used(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WORLDFLUX_CACHE", str(tmp_path / "file" / "below"))

    assert answer(native.load.__wrapped__(source)) == 42.0


@needs_a_compiler
def test_a_library_is_compiled_without_a_home_directory(source, monkeypatch):
    monkeypatch.delenv("WORLDFLUX_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)

    assert answer(native.load.__wrapped__(source)) == 42.0


@needs_a_compiler
@pytest.mark.parametrize("size", [0, 3000])
def test_a_truncated_library_is_compiled_again(size, source, tmp_path):
    native.load.__wrapped__(source)
    (built,) = (tmp_path / "cache").iterdir()
    content = built.read_bytes()
    built.unlink()  # the loaded library keeps its file
    built.write_bytes(content[:size])

    script = (
        "from pathlib import Path\n"
        "from worldflux.accel import native\n"
        f"assert native.load(Path({str(source)!r})).answer is not None\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True
    )  # it may be killed by a signal

    assert done.returncode == 0, done.stderr
    assert [path.read_bytes() for path in (tmp_path / "cache").iterdir()] == [content]


@pytest.mark.parametrize("why", ["no compiler", "switched off", "damaged source"])
def test_no_library_is_loaded_if_nothing_can_be_compiled(why, source, tmp_path, monkeypatch):
    if why == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
    elif why == "switched off":
        monkeypatch.setenv("WORLDFLUX_NATIVE", "0")
    else:
        source.write_text("this is not C\n")

    assert native.load.__wrapped__(source) is None
    cache = tmp_path / "cache"
    assert not cache.exists() or not list(cache.iterdir())


# Use in training and acting


@needs_a_compiler
def test_learning_and_acting_use_native_code(native_calls):
    agent = WorldFluxAgent(
        "tdmpc2:tiny", "Pendulum-v1", learning_starts=20, batch_size=4, seed=0, device="cpu", model_kwargs=SMALL
    )
    agent.learn(22)
    updates = len(native_calls)
    agent.predict(np.zeros(3, np.float32), deterministic=True)

    assert agent.trainer.step_count > 0
    # Three layers each in the dynamics, the reward, the values and the policy; one each in the encoder.
    assert native_calls.count(3) > 10 * agent.trainer.step_count
    assert len(native_calls) > updates


# Results


def random_net(kind: str) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    nets = {
        "plain end": (MishMLP(7, [24, 24], 5), {}),
        "simnorm": (MishMLP(7, [24], 32, partial(simnorm, dim=8)), {}),
        "groups of four": (MishMLP(7, [24], 32, partial(simnorm, dim=4)), {}),
        "one layer": (NormedLinear(7, 24), {}),
        "ensemble": (Ensemble(3, 7, [24, 24], 5), {"dropout": (torch.rand(3, 6, 24) > 0.3) / 0.7}),
        "members": (Ensemble(3, 7, [24, 24], 5), {"members": torch.tensor([2, 0])}),
        "frozen": (Ensemble(3, 7, [24, 24], 5), {"members": torch.tensor([1, 2]), "frozen": True}),
    }
    net, options = nets[kind]
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    return net, options


def output_and_gradients(net: nn.Module, parts: list[Tensor], options: dict) -> list[Tensor]:
    output = net(*parts, **options)
    weights = torch.linspace(0.5, 1.5, output.numel()).view_as(output)
    wanted = [x for x in (*net.parameters(), *parts) if x.requires_grad]
    grads = torch.autograd.grad((output * weights).sum(), wanted, allow_unused=True)
    return [output, *(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True))]


KINDS = ("plain end", "simnorm", "groups of four", "one layer", "ensemble", "members", "frozen")


@needs_a_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ["between others", "one for all", "columns"])
def test_outputs_and_gradients_are_those_of_the_definition(kind, rows, native_calls):
    net, options = random_net(kind)
    first = {
        "between others": torch.randn(6, 9)[:, 2:7],
        "one for all": torch.randn(1, 5).expand(6, 5),
        "columns": torch.randn(5, 6).t(),
    }
    parts = [first[rows].requires_grad_(), torch.randn(6, 2)]
    ours = output_and_gradients(net, parts, options)
    with torch.no_grad():
        torch.testing.assert_close(net(*parts, **options), ours[0], rtol=0.0, atol=0.0)
    assert len(native_calls) == 2
    with by_definition():
        defined = output_and_gradients(net, parts, options)
    for mine, expected in zip(ours, defined, strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-5, atol=2e-5)
    assert len(native_calls) == 2


@needs_a_compiler
@pytest.mark.parametrize(
    "shapes", [((3, 1, 5), (3, 4, 2)), ((1, 1, 5), (2, 4, 2)), ((3, 4, 5), (3, 1, 2)), ((4, 5), (3, 4, 2))]
)
def test_inputs_that_repeat_for_many_rows_are_broadcast(shapes, native_calls):
    net, _ = random_net("simnorm")
    parts = [torch.randn(*shape) for shape in shapes]
    with torch.no_grad():
        ours = net(*parts)
        assert len(native_calls) == 1
        lead = torch.broadcast_shapes(*(shape[:-1] for shape in shapes))
        joined = torch.cat([x.expand(*lead, -1) for x in parts], -1)
        with by_definition():
            torch.testing.assert_close(ours, net(joined))


@needs_a_compiler
def test_extreme_numbers_give_the_results_of_the_definition():
    layer = NormedLinear(1, 4)
    nn.init.ones_(layer.weight)
    layer.bias.data = torch.tensor([-3.0, 0.0, 1.0, 5.0])
    layer.norm.weight.data = torch.tensor([1e4, 100.0, 1e-30, 30.0])
    x = torch.tensor([[0.0], [0.5], [float("nan")], [-2.0]])
    ours = layer(x)
    with by_definition():
        torch.testing.assert_close(ours, layer(x), rtol=1e-4, atol=1e-6, equal_nan=True)
    assert ours[2].isnan().all() and not ours[[0, 1, 3]].isnan().any()


@needs_a_compiler
def test_several_threads_give_the_same_bits_in_every_run():
    net = MishMLP(30, [256, 256], 128, partial(simnorm, dim=8))
    x = torch.randn(600, 30, requires_grad=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first, second = (output_and_gradients(net, [x], {}) for _ in range(2))
        torch.set_num_threads(1)
        alone = output_and_gradients(net, [x], {})
    finally:
        torch.set_num_threads(before)

    for a, b, c in zip(first, second, alone, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)


@needs_a_compiler
def test_parameters_that_change_before_the_backward_pass_are_an_error():
    net, _ = random_net("plain end")
    loss = net(torch.randn(3, 7)).sum()
    with torch.no_grad():
        net.layers[1].weight.add_(1.0)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Plans


def tiny_model(kind: type[TDMPC2] = TDMPC2) -> TDMPC2:
    torch.manual_seed(0)
    config = create_world_model("tdmpc2:tiny", obs_shape=(3,), action_dim=2, **SMALL).config
    model = kind(config).eval()
    for head in (model.reward_head, model.critics):
        nn.init.normal_(head.layers[-1].weight, std=0.2)
    return model


def valued(model: TDMPC2) -> Tensor:
    state = model.encode(torch.linspace(-1, 1, 6).view(2, 3))
    actions = torch.linspace(-1, 1, 3 * 2 * 4 * 2).view(3, 2, 4, 2)
    with torch.no_grad():
        return value_of_sequences(model, state, actions)


@needs_a_compiler
def test_sequences_are_rolled_out_natively_and_valued_as_by_the_definition(monkeypatch):
    model, calls = tiny_model(), []
    inner = fast.rollout
    monkeypatch.setattr(fast, "rollout", lambda *args: (calls.append(1), inner(*args))[1])
    ours = valued(model)
    assert calls == [1]
    with by_definition():
        torch.testing.assert_close(ours, valued(model), rtol=1e-4, atol=1e-5)
    assert calls == [1] and float(ours.std()) > 0.01


class Frozen(TDMPC2):
    """User's model whose dynamics ignore the actions."""

    def _next(self, latent: Tensor, action: Tensor, task: Tensor | None) -> Tensor:
        return latent.expand(*action.shape[:-1], -1)


def test_planning_uses_overridden_dynamics():
    model = tiny_model(Frozen)
    state = model.encode(torch.zeros(2, 3))
    with torch.no_grad():
        partial = model.partial_return(state, torch.ones(3, 2, 4, 2), discount=None, deterministic=True)

    assert torch.equal(partial.state["latent"], state["latent"].unsqueeze(1).expand(2, 4, -1))


@pytest.mark.parametrize("part", ["dynamics", "reward_head"])
def test_hooks_of_the_networks_are_called_while_planning(part):
    model, seen = tiny_model(), []
    getattr(model, part).register_forward_hook(lambda *args: seen.append(1))

    valued(model)

    assert len(seen) >= 2


@needs_a_compiler
@pytest.mark.parametrize("default", ["device", "dtype"])
def test_defaults_for_new_tensors_change_nothing(default, native_calls):
    net, _ = random_net("plain end")
    parts = [torch.randn(6, 5).requires_grad_(), torch.randn(6, 2)]
    expected = output_and_gradients(net, parts, {})
    model = tiny_model()
    state, actions = model.encode(torch.zeros(2, 3)), torch.zeros(3, 2, 4, 2)
    weights = torch.linspace(0.5, 1.5, expected[0].numel()).view_as(expected[0])
    try:
        if default == "device":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.float64)
        output = net(*parts)
        grads = torch.autograd.grad((output * weights).sum(), [*net.parameters(), parts[0]])
        with torch.no_grad():
            partial = model.partial_return(state, actions, discount=0.9, deterministic=True)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)

    assert torch.equal(output, expected[0]) and len(native_calls) >= 2
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(grads, expected[1:], strict=True))
    assert partial.earned.dtype == torch.float32 and partial.earned.device.type == "cpu"


@needs_a_compiler
def test_a_blas_that_gives_wrong_results_is_not_used(caplog):
    library = fast._library()
    assert library is not None
    nothing = ctypes.CFUNCTYPE(None)(lambda: None)

    assert fast._is_right(library)
    assert not fast._is_right(library._replace(sgemm=ctypes.cast(nothing, ctypes.c_void_p).value))
    assert "gives wrong results" in caplog.text


# Overridden and hooked layers


class Doubled(NormedLinear):
    """User's layer."""

    def forward(self, *parts: Tensor) -> Tensor:
        return 2.0 * super().forward(*parts)


def replaced_layer(net: MishMLP, seen: list) -> None:
    layer = Doubled(24, 24)
    layer.load_state_dict(net.layers[1].state_dict())
    net.layers[1] = layer
    layer.register_forward_hook(lambda *args: seen.append(1))


def instance_forward(net: MishMLP, seen: list) -> None:
    inner = net.layers[1].forward
    net.layers[1].forward = lambda *parts: (seen.append(1), inner(*parts))[1]  # type: ignore[method-assign]


def other_activation(net: MishMLP, seen: list) -> None:
    net.layers[1].activation = lambda x: (seen.append(1), mish(x))[1]


class OtherNorm(nn.LayerNorm):
    """User's norm."""

    seen: list

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        return super().forward(x)


def other_norm(net: MishMLP, seen: list) -> None:
    net.layers[1].norm = OtherNorm(24)
    net.layers[1].norm.seen = seen


CHANGES = {
    "a layer's hook": lambda net, seen: net.layers[1].register_forward_hook(lambda *args: seen.append(1)),
    "a layer's earlier hook": lambda net, seen: net.layers[1].register_forward_pre_hook(lambda *args: seen.append(1)),
    "a norm's hook": lambda net, seen: net.layers[1].norm.register_forward_hook(lambda *args: seen.append(1)),
    "a layer of its own": replaced_layer,
    "a forward of its own": instance_forward,
    "an activation of its own": other_activation,
    "a norm of its own": other_norm,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers_are_computed_as_written(change):
    net, _ = random_net("plain end")
    assert isinstance(net, MishMLP)
    seen: list[int] = []
    CHANGES[change](net, seen)

    net(torch.randn(6, 7))

    assert seen == [1]


def test_invalid_group_sizes_are_an_error_as_in_the_definition():
    net = MishMLP(7, [24], 30, partial(simnorm, dim=8))

    with pytest.raises(RuntimeError, match="30"):
        net(torch.zeros(2, 7))


def test_hooks_on_all_modules_are_called():
    net, _ = random_net("plain end")
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(type(module)))
    try:
        net(torch.randn(6, 7))
    finally:
        handle.remove()

    assert seen.count(NormedLinear) == 2


def test_dispatch_modes_see_the_matrix_products():
    from torch.utils.flop_counter import FlopCounterMode

    net, _ = random_net("plain end")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.randn(6, 7))

    assert counter.get_total_flops() == 2 * 6 * (7 * 24 + 24 * 24 + 24 * 5)


def test_a_traced_network_contains_its_operations():
    net, _ = random_net("plain end")
    x = torch.randn(6, 7)
    with torch.no_grad():
        traced = torch.jit.trace(net, (torch.zeros(6, 7),))

        torch.testing.assert_close(traced(x), net(x))


def test_a_traced_two_hot_mean_contains_its_operations():
    bins = symlog_bins(5, 2.0)
    with torch.no_grad():
        traced = torch.jit.trace(lambda logits: TwoHot(logits, bins).mean, (torch.zeros(6, 5),))
        x = torch.randn(6, 5)

        torch.testing.assert_close(traced(x), TwoHot(x, bins).mean)
