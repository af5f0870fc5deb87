"""Trainers and actors whose steps are captured and replayed by a tape in place of a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from helpers import small_models
from helpers.small_models import PRESETS
from helpers.tape import TapeCapturer
from worldflux import WorldModel, create_world_model
from worldflux.accel.cuda_graphs import WARM_UP_CALLS
from worldflux.agents import acting as acting_module
from worldflux.agents.acting import Actor, Memory
from worldflux.config import PlannerConfig
from worldflux.envs.spaces import ActionCodec, ObservationCodec
from worldflux.models.planning import Planner
from worldflux.training import Batch, Trainer, TrainingConfig, create_random_buffer
from worldflux.training.captured_step import CapturedStep

PLAIN_STEPS = WARM_UP_CALLS


CONFIG = TrainingConfig(learning_rate=1e-3, warmup_steps=3, grad_clip=1.0, device="cpu")


TDMPC2 = dict(small_models.TDMPC2, dropout=0.1)


IMAGE = (3, 48, 48)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "dreamerv3": lambda: create_world_model("dreamerv3:tiny", obs_shape=(4,), action_dim=2, **small_models.DREAMERV3),
    "tdmpc2": lambda: create_world_model("tdmpc2:tiny", obs_shape=(4,), action_dim=2, **TDMPC2),
    "tdmpc2 discrete": lambda: create_world_model(
        "tdmpc2:tiny", obs_shape=(4,), action_dim=2, action_type="discrete", **TDMPC2
    ),
    "tdmpc2 that ends": lambda: create_world_model(
        "tdmpc2:tiny", obs_shape=(4,), action_dim=2, **{**TDMPC2, "episodic": True, "use_decoder": True}
    ),
    "dreamerv3 pixels": lambda: create_world_model(
        "dreamerv3:tiny", obs_shape=IMAGE, action_dim=2, cnn_depth=2, **small_models.DREAMERV3
    ),
    "dreamerv3 without a decoder": lambda: create_world_model(
        "dreamerv3:tiny", obs_shape=(4,), action_dim=2, representation="redundancy", **small_models.DREAMERV3
    ),
    "tdmpc2 pixels": lambda: create_world_model("tdmpc2:tiny", obs_shape=IMAGE, action_dim=2, num_channels=2, **TDMPC2),
}


def new(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family]()


def batches(count: int, length: int = 6, obs_shape: tuple[int, ...] = (4,), *, discrete: bool = False) -> list[Batch]:
    buffer = create_random_buffer(200, obs_shape, 2, num_episodes=10, episode_length=17, seed=0)
    found = [buffer.sample(3, length) for _ in range(count)]
    if not discrete:
        return found
    return [replace(batch, actions=F.one_hot(batch.actions.argmax(-1), 2).float()) for batch in found]


def recorded(trainer: Trainer) -> int:
    assert isinstance(trainer._take_step, CapturedStep)
    return trainer._take_step._captures.count


def set_rate(trainer: Trainer, rate: float) -> None:
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def run(trainer: Trainer, given: list[Batch], seed: int = 1) -> list[dict[str, Tensor]]:
    torch.manual_seed(seed)
    return [dict(trainer.step(batch)) for batch in given]


OBS = {
    "vector": spaces.Box(-1, 1, (4,), np.float32),
    "both": spaces.Dict({"camera": spaces.Box(0, 255, (3, 48, 48), np.uint8), "joints": spaces.Box(-1, 1, (4,))}),
}


def actors(preset: str, obs: str, plans: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Actor, Actor]:
    """An actor that acts plainly and one that plays tapes back, with equal models.

    Args:
        preset: Preset of the model, followed by " discrete" for discrete actions.
        obs: Kind of observations.
        plans: Whether a planner chooses the actions.
        monkeypatch: Replaces the capturer.
    """
    torch.manual_seed(0)
    preset, _, kind = preset.partition(" ")
    sizes = {**PRESETS[preset], **({"cnn_depth": 2} if obs == "both" else {})}
    codec = ObservationCodec(OBS[obs])
    sizes["action_type"] = kind or "continuous"
    model = create_world_model(preset, obs_shape=codec.obs_shape, action_dim=2, **sizes)
    for p in model.parameters():  # heads that begin at zero would make every plan alike
        torch.nn.init.normal_(p, std=0.3)
    monkeypatch.setattr(acting_module, "CudaGraphCapturer", TapeCapturer)
    made: list[Actor] = []
    space = spaces.Discrete(2) if kind else spaces.Box(-1, 1, (2,))
    for captured in (False, True):
        own: WorldModel = copy.deepcopy(model)
        planner = None
        if plans:
            search = PlannerConfig(horizon=2, num_samples=16, num_elites=4, num_pi_trajs=2, iterations=2)
            planner = Planner(own, search)
        made.append(Actor(own, codec, ActionCodec(space), planner, captured=captured))
    return made[0], made[1]


def observations(actor: Actor, rows: int, count: int) -> list[Any]:
    space = actor.obs_codec.space
    space.seed(0)
    found = [[space.sample() for _ in range(rows)] for _ in range(count)]
    if isinstance(space, spaces.Dict):
        return [{key: np.stack([one[key] for one in each]) for key in space.spaces} for each in found]
    return [np.stack(each) for each in found]


def acted(actor: Actor, rows: int, deterministic: bool, count: int = 3 + 2 * WARM_UP_CALLS) -> list[Memory]:
    torch.manual_seed(1)
    acting, seen = actor.start(rows), []
    for step, obs in enumerate(observations(actor, rows, count)):
        starts = np.array([(step + row) % 4 == 0 for row in range(rows)])
        acting = actor.observe(acting, obs, starts, deterministic=deterministic)
        acting = actor.act(acting, starts, deterministic=deterministic)
        seen.append(acting)
    return seen
