"""Training and acting on torch's `meta` device, which has no memory.

Reading a value is an error, and so is an operation that mixes tensors of two devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import small_models
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worldflux import State, WorldModel, create_world_model
from worldflux.agents.acting import Actor
from worldflux.config import PlannerConfig
from worldflux.envs.spaces import ActionCodec, ObservationCodec
from worldflux.models.planning import Planner
from worldflux.training import Batch, Trainer, TrainingConfig
from worldflux.training.optim import LaProp

B, T, A = 2, 4, 2
CAMERA = (3, 48, 48)
OBS: dict[str, Any] = {"vector": (4,), "pixels": CAMERA, "both": {"camera": CAMERA, "joints": (4,)}}
SIZES = {
    "dreamerv3": dict(small_models.DREAMERV3, cnn_depth=2),
    "tdmpc2": dict(small_models.TDMPC2, num_channels=2, dropout=0.1),
}
SEARCH = PlannerConfig(horizon=2, num_samples=3, num_elites=2, num_pi_trajs=1, iterations=2)
SEARCHES = (SEARCH, replace(SEARCH, num_samples=4))
"""The second one evaluates all four sequences of discrete actions."""
TASKS = dict(num_tasks=2, task_dim=4, task_action_dims=(1, 2), task_episode_lengths=(100, 200))
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dreamerv3": ("dreamerv3", "both", {}),
    "dreamerv3 discrete": ("dreamerv3", "vector", {"action_type": "discrete"}),
    "dreamerv3 without a decoder": ("dreamerv3", "pixels", {"representation": "redundancy"}),
    "dreamerv3 plainly": ("dreamerv3", "vector", {}),
    "tdmpc2": ("tdmpc2", "both", {}),
    "tdmpc2 that ends and decodes": ("tdmpc2", "both", {"episodic": True, "use_decoder": True}),
    "tdmpc2 discrete": ("tdmpc2", "vector", {"action_type": "discrete"}),
    "tdmpc2 of many discrete tasks": ("tdmpc2", "vector", {**TASKS, "action_type": "discrete"}),
    "tdmpc2 of many tasks that end": ("tdmpc2", "pixels", {**TASKS, "episodic": True}),
}
META = torch.device("meta")
aten = torch.ops.aten


class OneDevice(TorchDispatchMode):
    """Checks the devices of each operation, because some operations mix `meta` with others but not CUDA."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim() > 0]
        places = {x.device.type for x in tensors}
        assert len(places) < 2 or func.overloadpacket in (aten._to_copy, aten.copy_), f"{func} mixes {places}"
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def one_device() -> Iterator[None]:
    with OneDevice():
        yield


def new(case: str) -> WorldModel:
    family, obs, changes = CASES[case]
    shapes = OBS[obs]
    model = create_world_model(
        f"{family}:tiny", obs_shape=shapes, action_dim=A, device=META, **SIZES[family], **changes
    )
    if "plainly" in case:
        model.rssm.fast = False  # type: ignore[union-attr]
    return model


def noise(model: WorldModel, *leading: int) -> Any:
    """Returns an observation."""
    found = {
        key: torch.zeros(*leading, *shape, dtype=torch.uint8 if len(shape) == 3 else torch.float32, device=META)
        for key, shape in model.config.obs_shapes.items()
    }
    return found if isinstance(model.config.obs_shape, dict) else found["obs"]


def batch_for(model: WorldModel, *, full: bool) -> Batch:
    """Returns a batch with all optional fields, or without any."""
    flags = torch.zeros(B, T, dtype=torch.bool, device=META)
    extras = {
        name: torch.zeros(B, T, *shape, dtype=torch.from_numpy(np.zeros(0, dtype)).dtype, device=META)
        for name, (shape, dtype) in model.replay_extras().items()
        if full or name == "task"
    }
    optional = dict(truncations=flags, is_first=flags, obs_mask=~flags) if full else {}
    return Batch(
        obs=noise(model, B, T),
        actions=torch.zeros(B, T, A, device=META),
        rewards=torch.zeros(B, T, device=META),
        terminations=flags,
        extras=extras,
        **optional,
    )


def assert_there(found: Any, name: str = "") -> None:
    """Checks that all tensors in dictionaries, states, tuples and data classes are on the device."""
    tensors: list[Tensor] = []

    def collect(x: Any) -> None:
        if isinstance(x, Tensor):
            tensors.append(x)
        elif isinstance(x, State | dict):
            [collect(x[key]) for key in x]
        elif isinstance(x, list | tuple):
            [collect(part) for part in x]
        elif hasattr(x, "__dict__"):
            [collect(part) for part in vars(x).values()]

    collect(found)
    assert tensors
    assert {x.device.type for x in tensors} == {"meta"}, name


@pytest.mark.parametrize(
    ("case", "full"), [*((case, True) for case in CASES), ("dreamerv3 discrete", False), ("tdmpc2 discrete", False)]
)
def test_two_gradient_steps(case: str, full: bool) -> None:
    model = new(case)
    config = TrainingConfig(device="meta", grad_clip=1.0, warmup_steps=2, weight_decay=0.1, compile=False)
    trainer = Trainer(model, config)
    batch = batch_for(model, full=full)
    for capturable in (False, True):  # states of optimisers are made in the first step
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LaProp):  # Adam's fused kernel of torch does not know this device
                optimizer.make_capturable(capturable)
        losses = trainer.step(batch)
        assert_there(dict(losses))
        assert_there([p.grad for p in model.parameters() if p.grad is not None])
    assert_there(model.state_dict())
    for optimizer in trainer.optimizers:
        assert_there(
            [x for entry in optimizer.state.values() for x in entry.values() if isinstance(x, Tensor) and x.dim()]
        )
    assert_there(model.loss(batch))


@pytest.mark.parametrize("case", CASES)
def test_states_and_predictions(case: str) -> None:
    model = new(case).eval()
    task = {"task": torch.zeros(B, dtype=torch.long, device=META)} if "tasks" in case else {}
    obs, action = noise(model, B), torch.zeros(B, A, device=META)
    is_first = torch.zeros(B, dtype=torch.bool, device=META)
    with torch.no_grad():
        state = model.update(model.initial_state(B, **task), action, obs, is_first=is_first)
        found = {
            "encode": model.encode(obs, **task),
            "update": state,
            "transition": model.transition(state, action),
            "decode": model.decode(state) or state,
            "rollout": model.rollout(state, torch.zeros(3, B, A, device=META)),
            "policy": model.policy(state),
            "value": model.value(state),
        }
        for name in ("imagine", "q_values"):
            if hasattr(model, name):
                found[name] = getattr(model, name)(state, 2 if name == "imagine" else action)
        for search in SEARCHES:
            planner = Planner(model, search)
            found["plan"] = planner.plan(state, planner.start(B), is_first=is_first)
        extras = model.extras_from_state(state)
    for name, value in found.items():
        assert_there(value, name)
    assert set(extras) == set(model.replay_extras())
    assert all(value.device.type == "meta" for value in extras.values())


@pytest.mark.parametrize("plans", [True, False], ids=["plans", "policy"])
@pytest.mark.parametrize("case", [case for case in CASES if "tasks" not in case])
def test_acting(case: str, plans: bool) -> None:
    """Acts like an agent between two environment steps, with observations from the host."""
    model = new(case)
    planner = None
    if plans:
        planner = Planner(model, SEARCH)
    boxes = {
        key: spaces.Box(0, 255, shape, np.uint8) if len(shape) == 3 else spaces.Box(-1, 1, shape, np.float32)
        for key, shape in model.config.obs_shapes.items()
    }
    is_dict = isinstance(model.config.obs_shape, dict)
    codec = ObservationCodec(spaces.Dict(boxes) if is_dict else boxes["obs"])
    discrete = model.config.action_type == "discrete"
    actor = Actor(model, codec, ActionCodec(spaces.Discrete(A) if discrete else spaces.Box(-1, 1, (A,))), planner)
    arrays = {
        key: np.zeros((B, *shape), space.dtype)
        for (key, space), shape in zip(boxes.items(), model.config.obs_shapes.values(), strict=True)
    }
    starts = np.array([True, False])
    acting = actor.start(B)
    for deterministic in (False, True):
        acting = actor.observe(acting, arrays if is_dict else arrays["obs"], starts, deterministic=deterministic)
        acting = actor.act(acting, starts, deterministic=deterministic)
        assert_there([acting.state, acting.actions, acting.plan])
    assert acting.actions.shape == (B, A)
