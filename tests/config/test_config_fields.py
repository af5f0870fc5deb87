"""No dead options: changing any field of the models' and the planner's configurations makes a difference."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.field_cases import Case, check_field, check_no_entry_is_left_over, every_field, same

from worldflux import ShapeMismatchError, WorldFluxAgent, create_world_model
from worldflux.config import DreamerV3Config, PlannerConfig, TDMPC2Config, WorldModelConfig
from worldflux.models.dreamerv3.world_model import DreamerV3
from worldflux.models.planning import Planner
from worldflux.models.tdmpc2.world_model import TDMPC2
from worldflux.training import Batch, Trainer, TrainingConfig

COMMON: dict[type, dict[str, Any]] = {
    DreamerV3Config: dict(
        obs_shape=(4,), action_dim=2, deter_dim=16, hidden_dim=8, units=8, stoch_discrete=2, stoch_classes=4, blocks=4,
        bins=15, cnn_depth=4, bspace=4, imagination_horizon=3,
    ),
    TDMPC2Config: dict(
        obs_shape=(4,), action_dim=2, latent_dim=16, hidden_dim=16, mlp_dim=16, enc_dim=16, num_q_networks=2,
        num_bins=15, num_channels=2, num_samples=16, num_elites=4, num_pi_trajs=2, iterations=2, horizon=2,
    ),
    PlannerConfig: dict(horizon=2, num_samples=16, num_elites=4, num_pi_trajs=2, iterations=2),
}  # fmt: skip
IMAGE = dict(obs_shape=(1, 48, 48))
TWO_TASKS = dict(num_tasks=2)


# Observations


def make(config: WorldModelConfig) -> Any:
    """The model. Configurations with the same shapes give the same weights."""
    torch.manual_seed(0)
    model = (DreamerV3 if isinstance(config, DreamerV3Config) else TDMPC2)(config)
    with torch.no_grad():
        for weight in model.parameters():  # layers that start at zero would hide what lies before them
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def batch_for(config: WorldModelConfig) -> Batch:
    """Two windows of eight rows; an episode ends in one of them."""
    rng = torch.Generator().manual_seed(0)
    B, T = 2, 8
    obs = {
        key: torch.randint(256, (B, T, *shape), generator=rng, dtype=torch.uint8)
        if len(shape) == 3
        else torch.randint(2, (B, T, *shape), generator=rng).float()
        for key, shape in config.obs_shapes.items()
    }
    is_first, terminations = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    terminations[0, 3], is_first[0, 5], is_first[1, 0] = True, True, True
    return Batch(
        obs=obs if isinstance(config.obs_shape, dict) else obs["obs"],
        actions=torch.rand(B, T, config.action_dim, generator=rng) * 2 - 1,
        rewards=3 * torch.randn(B, T, generator=rng),
        terminations=terminations,
        is_first=is_first,
        extras={"task": torch.tensor([[0] * T, [1] * T])} if getattr(config, "num_tasks", 1) > 1 else {},
    )


def shapes(config: WorldModelConfig) -> Any:
    return {name: tuple(tensor.shape) for name, tensor in make(config).state_dict().items()}


def names(config: TDMPC2Config) -> Any:
    """The names that tasks have once another one is added."""
    return make(config).with_task("further").config.task_names


def loss(config: WorldModelConfig) -> Any:
    model = make(config)
    torch.manual_seed(1)
    output = model.loss(batch_for(config))
    return output.loss.detach(), output.updates


def gradients(config: WorldModelConfig) -> Any:
    model = make(config)
    torch.manual_seed(1)
    model.loss(batch_for(config)).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def trained(config: WorldModelConfig) -> Any:
    model = make(config)
    torch.manual_seed(1)
    trainer = Trainer(model, TrainingConfig(learning_rate=1e-2, device="cpu"))
    for _ in range(2):
        trainer.step(batch_for(config))
    return model.state_dict()


def actions(config: WorldModelConfig) -> Any:
    model, obs = make(config).eval(), batch_for(config).obs
    state = model.encode(obs[:, 0], deterministic=True)
    torch.manual_seed(1)
    with torch.no_grad():
        return [model.policy(state) for _ in range(4)]


def plan(config: WorldModelConfig) -> Any:
    return planned(make(config).eval(), PlannerConfig.from_model(config))


def planned(model: Any, config: PlannerConfig) -> Any:
    state = model.encode(batch_for(model.config).obs[:, 0], deterministic=True)
    planner = Planner(model, config)
    return planner.plan(state, planner.start(2), deterministic=True)


def file(config: WorldModelConfig) -> Any:
    return json.dumps(config.to_dict())


def place(config: WorldModelConfig) -> Any:
    name = {DreamerV3Config: "dreamerv3:tiny", TDMPC2Config: "tdmpc2:tiny"}[type(config)]
    model = create_world_model(name, **{**config.to_dict(), "model_name": "x"})
    return {str(weight.device) for weight in model.parameters()}


class Still(gym.Env[Any, Any]):
    """An environment with 4 observed numbers and 2 actions, in which nothing happens."""

    def __init__(self, one_hot: bool = False) -> None:
        box = gym.spaces.Box(-1, 1, (4,), np.float32)
        self.observation_space = gym.spaces.Discrete(4) if one_hot else box
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)


def agent_of(config: WorldModelConfig, env: Any) -> WorldFluxAgent:
    return WorldFluxAgent(
        make(config), env, batch_size=2, seq_len=4, buffer_size=50, learning_starts=10, device="cpu", seed=0
    )


def trained_by_an_agent(config: WorldModelConfig) -> Any:
    agent = agent_of(config, Still())
    torch.manual_seed(1)
    for _ in range(3):
        agent.trainer.step(batch_for(config))
    return agent.model.state_dict()


def training_of_an_agent(config: WorldModelConfig) -> Any:
    agent = WorldFluxAgent(make(config), Still(), device="cpu")
    return agent.train_ratio, agent.seq_len


def fits_one_hot_observations(config: WorldModelConfig) -> bool:
    try:
        agent_of(config, Still(one_hot=True))
    except ShapeMismatchError as error:
        assert "obs_classes" in str(error)
        return False
    return True


# Entries

BY_ALL = {
    "model_type": Case("another", None),
    "model_name": Case("another", file),
    "obs_shape": Case((5,), shapes),
    "action_dim": Case(3, shapes),
    "latent_type": Case("gaussian", None),
    "dynamics_type": Case("transformer", None),
    "hidden_dim": Case(24, shapes),
    "learning_rate": Case(0.1, trained_by_an_agent),
    "grad_clip": Case(1e-3, trained_by_an_agent),
    "device": Case("meta", place),
    "dtype": Case("bfloat16", loss),
}
DREAMERV3 = {
    **BY_ALL,
    "action_type": Case("discrete", actions),
    "action_classes": Case((3, 1), actions, dict(action_type="multi_discrete", action_dim=4, action_classes=(2, 2))),
    "obs_classes": Case({"obs": (4,)}, loss),
    "latent_dim": Case(99, None),
    "deter_dim": Case(32, shapes),
    "stoch_dim": Case(99, None),
    "warmup_steps": Case(0, trained_by_an_agent),
    "train_ratio": Case(32.0, training_of_an_agent),
    "seq_len": Case(16, training_of_an_agent),
    "stoch_discrete": Case(3, shapes),
    "stoch_classes": Case(5, shapes),
    "blocks": Case(2, shapes),
    "unimix": Case(0.2, loss),
    "representation": Case("redundancy", shapes),
    "encoder_type": Case("cnn", None),
    "decoder_type": Case("cnn", None),
    "units": Case(12, shapes),
    "encoder_layers": Case(2, shapes),
    "decoder_layers": Case(2, shapes),
    "reward_layers": Case(2, shapes),
    "continue_layers": Case(2, shapes),
    "actor_layers": Case(2, shapes),
    "critic_layers": Case(2, shapes),
    "cnn_depth": Case(6, shapes, IMAGE),
    "cnn_kernels": Case((3, 5, 5, 5), shapes, IMAGE),
    "bspace": Case(2, shapes, IMAGE),
    "use_symlog": Case(False, loss),
    "bins": Case(17, shapes),
    "kl_free": Case(0.0, loss),
    "kl_balance": Case(0.5, gradients, dict(kl_free=0.0)),
    "loss_scales": Case({"actor": 2.0}, gradients),
    "imagination_horizon": Case(2, loss),
    "imag_last": Case(2, loss),
    "discount_horizon": Case(10.0, loss),
    "lambda_": Case(0.5, loss),
    "entropy_scale": Case(0.1, gradients),
    "return_norm_rate": Case(0.5, trained),
    "return_norm_limit": Case(1e12, loss),
    "slow_critic_rate": Case(0.5, trained),
}
EPISODIC = dict(episodic=True)
TDMPC2_CASES = {
    **BY_ALL,
    "action_type": Case("discrete", shapes),
    "action_classes": Case((3, 1), actions, dict(action_type="multi_discrete", action_dim=4, action_classes=(2, 2))),
    "obs_classes": Case({"obs": (4,)}, fits_one_hot_observations),
    "latent_dim": Case(24, shapes),
    "deter_dim": Case(99, None),
    "stoch_dim": Case(99, None),
    "simnorm_dim": Case(4, loss),
    "num_hidden_layers": Case(1, shapes),
    "mlp_dim": Case(24, shapes),
    "enc_dim": Case(24, shapes),
    "num_enc_layers": Case(3, shapes),
    "num_channels": Case(3, shapes, IMAGE),
    "num_q_networks": Case(3, shapes),
    "dropout": Case(0.5, loss),
    "num_bins": Case(17, shapes),
    "vmin": Case(-5.0, None),
    "vmax": Case(5.0, loss, along=dict(vmin=-5.0)),
    "log_std_min": Case(-2.0, actions),
    "log_std_max": Case(1.0, actions),
    "use_decoder": Case(True, shapes),
    "num_tasks": Case(2, shapes),
    "task_names": Case(("walk", "run"), names, TWO_TASKS),
    "task_dim": Case(5, shapes, TWO_TASKS),
    "task_action_dims": Case((2, 1), loss, TWO_TASKS),
    "task_episode_lengths": Case((500, 20), loss, TWO_TASKS),
    "episodic": Case(True, shapes),
    "episode_length": Case(100, loss),
    "discount_denom": Case(1.0, loss),
    "discount_min": Case(0.992, loss),
    "discount_max": Case(0.97, loss),
    "horizon": Case(3, loss),
    "rho": Case(0.9, loss),
    "consistency_coef": Case(1.0, loss),
    "reward_coef": Case(1.0, loss),
    "value_coef": Case(1.0, loss),
    "termination_coef": Case(3.0, loss, EPISODIC),
    "entropy_coef": Case(0.1, loss),
    "encoder_lr_scale": Case(1.0, trained),
    "tau": Case(0.5, trained),
    "num_samples": Case(24, plan),
    "num_elites": Case(6, plan),
    "num_pi_trajs": Case(5, plan),
    "iterations": Case(3, plan),
    "temperature": Case(5.0, plan),
    "momentum": Case(0.5, plan),
    "min_std": Case(1.5, plan),
    "max_std": Case(0.5, plan),
    "uniform_share": Case(0.5, plan, dict(action_type="discrete", num_samples=3, num_elites=2)),
}


@cache
def model_to_plan_with() -> Any:
    return make(TDMPC2Config(**COMMON[TDMPC2Config])).eval()


def plan_of(config: PlannerConfig) -> Any:
    return planned(model_to_plan_with(), config)


def plan_of_discrete_actions(config: PlannerConfig) -> Any:
    return planned(make(TDMPC2Config(**{**COMMON[TDMPC2Config], "action_type": "discrete"})).eval(), config)


PLANNER = {
    "horizon": Case(3, plan_of),
    "num_samples": Case(24, plan_of),
    "num_elites": Case(6, plan_of),
    "num_pi_trajs": Case(5, plan_of),
    "iterations": Case(3, plan_of),
    "temperature": Case(5.0, plan_of),
    "min_std": Case(1.5, plan_of),
    "max_std": Case(0.5, plan_of),
    "uniform_share": Case(0.5, plan_of_discrete_actions),
    "momentum": Case(0.5, plan_of),
    "discount": Case(0.2, plan_of),
}
TABLES: dict[type, dict[str, Case]] = {DreamerV3Config: DREAMERV3, TDMPC2Config: TDMPC2_CASES, PlannerConfig: PLANNER}
NAMES = {DreamerV3Config: "DREAMERV3", TDMPC2Config: "TDMPC2_CASES", PlannerConfig: "PLANNER"}


@every_field(TABLES)
def test_every_field_makes_a_difference(cls: Any, name: str) -> None:
    check_field(cls, name, TABLES[cls], COMMON[cls], file="tests/config/test_config_fields.py", where=NAMES[cls])


def test_no_entry_is_left_over() -> None:
    check_no_entry_is_left_over(TABLES)


@pytest.mark.parametrize("cls", [DreamerV3Config, TDMPC2Config])
@pytest.mark.parametrize("see", [shapes, loss, gradients, trained, actions, trained_by_an_agent, place])
def test_without_a_change_an_observation_is_the_same(cls: Any, see: Any) -> None:
    """Otherwise a difference would prove nothing."""
    first, again = (see(cls(**COMMON[cls])) for _ in range(2))
    assert same(first, again)


def test_a_plan_without_a_change_is_the_same() -> None:
    config = PlannerConfig(**COMMON[PlannerConfig])
    assert same(plan_of(config), plan_of(config))
    assert {item.name for item in fields(PlannerConfig)} - {"discount"} <= {item.name for item in fields(TDMPC2Config)}
