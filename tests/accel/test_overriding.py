"""Overridden methods, hooks and replaced layers are always called; no fast path bypasses them."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.small_models import SIZES
from torch import Tensor, nn

from worldflux import WorldFluxAgent, create_world_model
from worldflux.accel.overriding import _say
from worldflux.config import PlannerConfig
from worldflux.envs import RecordEpisodes
from worldflux.errors import ConfigurationError, TrainingError
from worldflux.models.dreamerv3.rssm import RSSM
from worldflux.models.dreamerv3.world_model import DreamerV3
from worldflux.models.planning import Planner
from worldflux.models.tdmpc2.world_model import TDMPC2
from worldflux.nn.layers import Linear
from worldflux.training import Batch, BatchRequest, ReplayBuffer, Trainer, TrainingConfig, train

STEPS = dict(total_steps=3, batch_size=2, sequence_length=6, device="cpu")
AGENT = dict(batch_size=2, seq_len=6, train_ratio=6, learning_starts=40, buffer_size=1000, device="cpu")


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Returns a function that returns the log messages about fast paths that are not taken."""
    _say.cache_clear()
    with caplog.at_level(logging.INFO, logger="worldflux"):
        yield lambda: [record.message for record in caplog.records if "is not used" in record.message]


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    sizes = SIZES[family]
    return create_world_model(f"{family}:tiny", obs_shape=(3,), action_dim=1, **sizes)


def filled(buffer: ReplayBuffer) -> Any:
    rng = np.random.default_rng(0)
    for _ in range(4):
        buffer.add_episode(rng.normal(size=(31, 3)), rng.uniform(-1, 1, (30, 1)), rng.normal(size=30))
    return buffer


class Numbers(ReplayBuffer):
    calls = 0

    def sample(self, *args: Any, **kwargs: Any) -> Batch:
        self.calls += 1
        return super().sample(*args, **kwargs)


class Documented(ReplayBuffer):
    calls = 0

    def sample(self, batch_size: Any, seq_len: Any = None, device: Any = "cpu") -> Batch:  # type: ignore[override]
        self.calls += 1
        return super().sample(batch_size, seq_len, device)


class Requested(ReplayBuffer):
    calls = 0

    def sample(self, request: BatchRequest) -> Batch:  # type: ignore[override]
        self.calls += 1
        return super().sample(request)


class Assigned(ReplayBuffer):
    calls = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

        def sample(*args: Any, **kwargs: Any) -> Batch:
            self.calls += 1
            return ReplayBuffer.sample(self, *args, **kwargs)

        self.sample = sample  # type: ignore[method-assign]


BUFFERS = [Numbers, Documented, Requested, Assigned]


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
@pytest.mark.parametrize("kind", BUFFERS)
def test_a_buffers_own_sample_gives_every_batch_of_training_and_evaluation(kind: Any, family: str, told: Any) -> None:
    buffer, held_out = filled(kind(1000, (3,), 1)), filled(kind(1000, (3,), 1))
    train(model_of(family), buffer, **STEPS, eval_data=held_out, eval_interval=3)
    assert buffer.calls == 3 and held_out.calls == 8
    assert told() == [
        f"Sampling on another thread is not used: {kind.__name__} has its own sample, which is called instead"
    ]


def test_a_sample_that_was_patched_into_the_class_is_called() -> None:
    buffer = filled(ReplayBuffer(1000, (3,), 1))
    original = ReplayBuffer.sample
    with mock.patch.object(ReplayBuffer, "sample", autospec=True, side_effect=original) as sample:
        train(model_of("tdmpc2"), buffer, **STEPS)
    assert sample.call_count == 3


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
@pytest.mark.parametrize("kind", BUFFERS)
def test_an_agent_learns_from_its_buffers_own_sample(kind: Any, family: str) -> None:
    agent = WorldFluxAgent(model_of(family), "Pendulum-v1", **AGENT, planner=None)
    spec = agent.replay_buffer.extras
    agent.replay_buffer = buffer = kind(1000, (3,), 1, extras=spec)
    agent.learn(60)
    assert buffer.calls == agent._n_updates > 3


def test_parts_of_a_buffer_that_overrides_sample_are_rejected() -> None:
    with pytest.raises(ConfigurationError, match=r"Numbers has its own sample\(\), which the parts .* pass evaluation"):
        train(model_of("tdmpc2"), filled(Numbers(1000, (3,), 1)), **STEPS, eval_data=0.3)


class Adding(ReplayBuffer):
    seen = 0

    def add(self, obs: Any, actions: Any, rewards: Any, *args: Any, **kwargs: Any) -> None:
        self.seen += 1
        super().add(obs, actions, np.clip(rewards, -1, 1), *args, **kwargs)


def test_recorders_store_through_a_buffers_own_add(told: Any) -> None:
    buffer = Adding(1000, (3,), 1)
    env = RecordEpisodes(gym.make("Pendulum-v1"), buffer)
    env.reset(seed=0)
    for _ in range(30):
        env.step(env.action_space.sample())
    assert buffer.seen == 30 and float(buffer.sample(8, 10).rewards.min()) >= -1.0
    assert "Storing several steps at a time is not used: Adding has its own add" in told()[0]
    agent = WorldFluxAgent(model_of("tdmpc2"), "Pendulum-v1", **AGENT, planner=None)
    agent.replay_buffer = Adding(1000, (3,), 1)
    agent.learn(30)
    assert agent.replay_buffer.seen == 30


def frozen(model: Any) -> Any:
    """Returns a model with a constant loss, which training must not change."""
    plain = type(model).loss

    class Frozen(type(model)):  # type: ignore[misc]
        calls = 0

        def loss(self, batch: Batch) -> Any:
            type(self).calls += 1
            return 0.0 * plain(self, batch).loss

    model.__class__ = Frozen
    return model


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_training_uses_an_overridden_loss(family: str) -> None:
    model = frozen(model_of(family))
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    train(model, filled(ReplayBuffer(1000, (3,), 1)), **STEPS, grad_clip=0.0)
    assert type(model).calls == 3
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters() if name in before)
    agent = WorldFluxAgent(frozen(model_of(family)), "Pendulum-v1", **AGENT, planner=None).learn(60)
    assert type(agent.model).calls == agent._n_updates > 3


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_training_uses_a_loss_assigned_to_the_model(family: str, told: Any) -> None:
    model, calls = model_of(family), []

    def loss(self: Any, batch: Batch) -> Any:
        calls.append(batch)
        return type(self).loss(self, batch)

    model.loss = types.MethodType(loss, model)
    train(model, filled(ReplayBuffer(1000, (3,), 1)), **STEPS)
    assert len(calls) == 3
    assert ("TD-MPC2's gradient step in phases" in str(told())) is (family == "tdmpc2")


def test_tdmpc2_with_an_overridden_loss_keeps_all_learning_rates_and_updates_its_scale() -> None:
    model = model_of("tdmpc2")
    model.loss = types.MethodType(lambda self, batch: TDMPC2.loss(self, batch), model)
    trainer = Trainer(model, TrainingConfig(**STEPS))
    (optimizer,) = trainer.optimizers
    assert [(g["rate_scale"], g["eps"]) for g in optimizer.param_groups] == [(0.3, 1e-8), (1.0, 1e-8), (1.0, 1e-5)]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    model.value_scale.fill_(5.0)
    trainer.train(filled(ReplayBuffer(1000, (3,), 1)))
    assert float(model.value_scale) < 5.0


def test_a_loss_replaced_after_creating_the_trainer_is_rejected() -> None:
    model = model_of("tdmpc2")
    trainer = Trainer(model, TrainingConfig(**STEPS))
    model.loss = types.MethodType(lambda self, batch: TDMPC2.loss(self, batch), model)
    with pytest.raises(TrainingError, match="loss was replaced after its trainer was created"):
        trainer.train(filled(ReplayBuffer(1000, (3,), 1)))


@pytest.mark.parametrize("name", ["model_loss", "model_parts", "policy_loss", "policy_values"])
def test_parts_of_tdmpc2s_step_can_be_replaced(name: str) -> None:
    model, plain, calls = model_of("tdmpc2"), getattr(TDMPC2, name), []

    def replaced(self: Any, *args: Any) -> Any:
        calls.append(name)
        return plain(self, *args)

    setattr(model, name, types.MethodType(replaced, model))
    train(model, filled(ReplayBuffer(1000, (3,), 1)), **STEPS)
    assert calls == [name] * 3


def counted(function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(function.__name__)
        return function(self, *args, **kwargs)

    return call


@pytest.mark.parametrize("name", ["core", "prior", "posterior", "dist"])
@pytest.mark.parametrize("way", ["subclass", "instance", "class"])
def test_the_recurrence_can_be_replaced_in_training_and_imagination(name: str, way: str, told: Any) -> None:
    calls: list[str] = []
    model, own = model_of("dreamerv3"), counted(getattr(RSSM, name), calls)
    if way == "subclass":
        model.rssm.__class__ = type("Mine", (RSSM,), {name: own})
    elif way == "instance":
        setattr(model.rssm, name, types.MethodType(own, model.rssm))
    with mock.patch.object(RSSM, name, own if way == "class" else getattr(RSSM, name)):
        train(model, filled(ReplayBuffer(1000, (3,), 1)), **STEPS)
    once_in_all = {"prior": 1, "dist": 2}.get(name, 0)  # for the divergence, once for all rows
    imagined = 0 if name == "posterior" else 3
    observed = 0 if name == "prior" else 6
    assert len(calls) >= 3 * (observed + imagined + once_in_all)
    assert [line for line in told() if "The fast recurrence of DreamerV3 is not used" in line and name in line]


def shifted(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output + torch.linspace(-1.0, 1.0, output.shape[-1])


HOOKED = ["deter_in", "stoch_in.linears.0", "action_in", "hidden", "hidden_norm", "gates", "posterior_in", "prior_out"]


@pytest.mark.parametrize("path", HOOKED)
def test_a_hook_in_the_recurrence_has_its_effect(path: str) -> None:
    batch = filled(ReplayBuffer(1000, (3,), 1, seed=0)).sample(2, 6)

    def loss(*, hooked: bool, fast: bool = True) -> float:
        model = model_of("dreamerv3")
        model.rssm.fast = fast
        if hooked:
            model.rssm.get_submodule(path).register_forward_hook(shifted)
        torch.manual_seed(1)
        return float(model.loss(batch).loss.detach())

    assert loss(hooked=True) == pytest.approx(loss(hooked=True, fast=False), rel=1e-6)
    assert loss(hooked=True) != pytest.approx(loss(hooked=False), rel=1e-6)


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"])
def test_hooks_of_every_kind_in_the_recurrence_are_called(kind: str) -> None:
    model, calls = model_of("dreamerv3"), []
    layer = model.rssm.prior_in.linears[0]
    getattr(layer, f"register_{kind}")(lambda *_: calls.append(kind))
    train(model, filled(ReplayBuffer(1000, (3,), 1)), **STEPS)
    assert len(calls) >= STEPS["total_steps"]


class Low(nn.Module):
    """Layer with a low-rank addition, as in LoRA."""

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.base, self.calls = base, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.base(x)


def test_a_layer_in_the_recurrence_can_be_exchanged() -> None:
    model = model_of("dreamerv3")
    model.rssm.prior_in.linears[0] = low = Low(model.rssm.prior_in.linears[0])
    train(model, filled(ReplayBuffer(1000, (3,), 1)), **STEPS)
    assert low.calls >= 3 * (1 + 3)


@pytest.mark.parametrize("name", ["critic", "actor", "reward_head", "continue_head", "slow_critic"])
@pytest.mark.parametrize("way", ["subclass", "hook"])
def test_a_head_can_be_replaced(name: str, way: str) -> None:
    model, calls = model_of("dreamerv3"), list[str]()
    head = getattr(model, name)
    if way == "subclass":
        head.__class__ = type("Mine", (type(head),), {"forward": counted(type(head).forward, calls)})
    else:
        head.mlp.register_forward_hook(lambda *_: calls.append("hook"))
    train(model, filled(ReplayBuffer(1000, (3,), 1)), **STEPS)
    expected = {"critic": 2, "actor": 4 + 1, "reward_head": 2, "continue_head": 2, "slow_critic": 1}
    assert len(calls) == 3 * expected[name]


@pytest.mark.parametrize("name", ["rollout", "policy", "value"])
@pytest.mark.parametrize("way", ["subclass", "instance"])
def test_tdmpc2_plans_with_its_overridden_methods(name: str, way: str, told: Any) -> None:
    model, calls = model_of("tdmpc2").eval(), list[str]()
    planner = Planner(model, PlannerConfig(num_samples=8, num_elites=4, num_pi_trajs=2, iterations=2))
    own = counted(getattr(TDMPC2, name), calls)
    if way == "subclass":
        model.__class__ = type("Mine", (TDMPC2,), {name: own})
    else:
        setattr(model, name, types.MethodType(own, model))
    state = model.encode(torch.zeros(2, 3))
    planner.plan(state, planner.start(2))
    # For the policy's rollouts (3 steps with 2 transitions), and for each set of candidates.
    assert len(calls) == {"rollout": 2 + 1 + 2, "policy": 3, "value": 2}[name]
    kind = type(model).__name__
    assert f"The planning interface of {kind} is not used: {kind} has its own {name}" in told()[0]


def test_planning_methods_of_a_subclass_are_called() -> None:
    calls: list[str] = []

    class Mine(TDMPC2):
        value = counted(TDMPC2.value, [])  # type: ignore[assignment]
        estimated_return = counted(TDMPC2.estimated_return, calls)  # type: ignore[assignment]

    model = model_of("tdmpc2").eval()
    model.__class__ = Mine
    planner = Planner(model, PlannerConfig(num_samples=8, num_elites=4, num_pi_trajs=2, iterations=2))
    planner.plan(model.encode(torch.zeros(2, 3)), planner.start(2))
    assert calls == ["estimated_return"] * 2


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_a_hook_on_any_module_is_called_in_each_gradient_step(family: str) -> None:
    trainer, buffer, silent = (
        Trainer(model_of(family), TrainingConfig(**STEPS)),
        filled(ReplayBuffer(1000, (3,), 1)),
        [],
    )
    for name, module in trainer.model.named_modules():
        if type(module).forward in (nn.Module.forward, nn.ModuleList.forward):  # a container of other modules
            continue
        calls: list[int] = []
        handle = module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.step(buffer.sample(2, 6))
        handle.remove()
        silent += [] if calls else [name]
    assert silent == []


def test_a_hook_on_a_critics_norm_has_its_effect() -> None:
    batch = filled(ReplayBuffer(1000, (3,), 1, seed=0)).sample(2, 6)

    def loss(*, hooked: bool) -> float:
        model = model_of("tdmpc2")
        torch.nn.init.normal_(model.critics.layers[-1].weight)
        if hooked:
            model.critics.layers[0].norm.register_forward_hook(lambda *_: torch.zeros_like(_[-1]))
        torch.manual_seed(1)
        return float(model.loss(batch).loss.detach())

    assert loss(hooked=True) != pytest.approx(loss(hooked=False), rel=1e-3)


class Noisy(WorldFluxAgent):
    asked = 0

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> Any:
        self.asked += 1
        actions, state = super().predict(observation, state, episode_start, deterministic)
        return np.full_like(actions, 1.5), state


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_an_agents_own_predict_chooses_the_actions_that_it_learns_from(family: str) -> None:
    agent = Noisy(model_of(family), "Pendulum-v1", **{**AGENT, "learning_starts": 0}, planner=None)
    agent.learn(60)
    assert agent.asked >= 50  # TD-MPC2 starts with random actions
    stored = agent.replay_buffer.sample(16, 6).actions
    newest = agent.replay_buffer.stored()[0].actions[50:59]
    assert stored.shape == (16, 6, 1) and np.all(newest == np.float32(0.75))


def test_nothing_is_logged_if_nothing_is_overridden(told: Any) -> None:
    for family in ("dreamerv3", "tdmpc2"):
        train(model_of(family), filled(ReplayBuffer(1000, (3,), 1)), **STEPS)
        WorldFluxAgent(model_of(family), "Pendulum-v1", **AGENT).learn(50)
    assert told() == []
    assert not DreamerV3.__dict__.get("phases")  # whose step is its loss
