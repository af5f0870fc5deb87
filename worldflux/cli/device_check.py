"""`worldflux doctor --check-device`: compares and times the implementations of training and acting on a device."""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from worldflux.accel.compilation import compiles
from worldflux.accel.cuda_graphs import CudaGraphCapturer
from worldflux.accel.guard import Changes, Work, circumstances, compared, precision_of
from worldflux.agents.acting import Actor
from worldflux.agents.building import build_planner
from worldflux.envs.spaces import ActionCodec, ObservationCodec, space_like
from worldflux.factory import create_world_model
from worldflux.models.base import WorldModel
from worldflux.nn.definitions import by_definition
from worldflux.training import Batch, ReplayBuffer, Trainer, TrainingConfig
from worldflux.training.captured_step import CapturedStep, StepChanges
from worldflux.training.config import resolve_device
from worldflux.training.gradient_step import GradientStep, phases_of

_FAMILIES: dict[str, tuple[int, int]] = {"dreamerv3:tiny": (2, 8), "tdmpc2:tiny": (16, 4)}
"""Number of windows in a batch and of rows in a window, by model."""
_OBSERVATIONS: dict[str, tuple[int, ...]] = {"vectors": (12,), "pixels": (3, 64, 64)}
_ACTIONS = 2
_SEARCH = dict(num_samples=64, num_elites=8, num_pi_trajs=8)
_ROWS = 2
"""Number of environments that act together."""
_STEPS_BEFORE = 5
"""Gradient steps before anything is compared. Heads are initialised with zeros, which would hide differences."""
_CALLS_BEFORE = 6
"""Number of calls after which a CUDA graph has been captured and is replayed."""
_TIMED = 0.4
"""Seconds of timing for each number."""
_BUDGET = 35.0
"""Seconds after which nothing more is compiled."""


@dataclass
class Row:
    """One computation of one model."""

    model: str
    """Name of the model."""
    observations: str
    """Kind of observations, "vectors" or "pixels"."""
    computes: str
    """"step" for a gradient step, or "action"."""
    milliseconds: dict[str, float] = field(default_factory=dict)
    """Time by implementation: "plain" (the model's own code), "fast" (hand-written functions), "captured" (a CUDA
    graph) and "compiled" (a CUDA graph of compiled functions)."""
    problems: list[str] = field(default_factory=list)
    """Descriptions of different results, and of failures to capture."""


def check_device(name: str) -> dict[str, Any]:
    """Compares and times all implementations on a device.

    Args:
        name: Value of `--check-device`.

    Returns:
        A dictionary with `device`, `circumstances` (versions), `rows`, and whether everything `works`.

    Raises:
        ConfigurationError: If there is no such device.
    """
    device, started = resolve_device(name, must_compute=True), time.monotonic()
    rows: list[Row] = []
    for model in _FAMILIES:
        for observations in _OBSERVATIONS:
            rows += _checked(model, observations, device, lambda: time.monotonic() - started < _BUDGET)
    return {
        "device": str(device),
        "circumstances": circumstances(device),
        "rows": [vars(row) for row in rows],
        "works": not any(row.problems for row in rows),
    }


def records(device: torch.device) -> bool:
    """Whether CUDA graphs are captured on a device."""
    return device.type == "cuda"


def _checked(name: str, observations: str, device: torch.device, may_compile: Callable[[], bool]) -> list[Row]:
    """The rows for one model and one kind of observations."""
    torch.manual_seed(0)
    shape = _OBSERVATIONS[observations]
    model = create_world_model(name, obs_shape=shape, action_dim=_ACTIONS, device=device)
    spec = model.optimizer_spec
    config = TrainingConfig(
        device=str(device), learning_rate=spec.learning_rate, grad_clip=spec.grad_clip or 0.0, compile=False
    )
    buffer, (windows, length) = _experience(model, shape), _FAMILIES[name]
    trainer = Trainer(model, config)
    for _ in range(_STEPS_BEFORE):
        trainer.step(buffer.sample(windows, length, device))

    def sample() -> Batch:
        return buffer.sample(windows, length, device)

    def look() -> np.ndarray:
        obs = buffer.sample(_ROWS, 1).obs
        assert isinstance(obs, torch.Tensor)
        return obs[:, 0].numpy()

    step, action = Row(name, observations, "step"), Row(name, observations, "action")
    take_step = GradientStep(model, phases_of(model), trainer.optimizers, config.grad_clip)
    act = _acting(model, captured=False)

    def timed(form: str, take_step: Callable[[Batch], Any], act: Callable[[np.ndarray], Any]) -> None:
        step.milliseconds[form] = _milliseconds(lambda: take_step(sample()), device)
        action.milliseconds[form] = _milliseconds(lambda: act(look()), device)

    step.problems += _difference(lambda batch: _results(take_step(batch)), sample, StepChanges(take_step), model)
    action.problems += _difference(act, look, Changes(), model)
    with by_definition():
        timed("plain", take_step, act)
    timed("fast", take_step, act)
    for form in ("captured", "compiled") if records(device) else ():
        if form == "compiled" and not (may_compile() and compiles("auto", device)):
            continue
        other = copy.deepcopy(trainer)
        assert isinstance(other.model, WorldModel)
        if form == "compiled":
            other.model.compile_functions()
        inner = GradientStep(other.model, phases_of(other.model), other.optimizers, config.grad_clip)
        recorded_step, recorded_act = (
            CapturedStep(inner, device, CudaGraphCapturer(device)),
            _acting(other.model, captured=True),
        )
        with _warnings() as of_step:
            for _ in range(_CALLS_BEFORE):
                recorded_step(sample())
        with _warnings() as of_action:
            for _ in range(_CALLS_BEFORE):
                recorded_act(look())
        step.problems += [f"{form}: {text}" for text in of_step]
        action.problems += [f"{form}: {text}" for text in of_action]
        timed(form, recorded_step, recorded_act)
    return [step, action]


def _experience(model: WorldModel, shape: tuple[int, ...]) -> ReplayBuffer:
    """A replay buffer of random episodes, like that of an agent."""
    buffer, rng = ReplayBuffer(400, shape, _ACTIONS, extras=model.replay_extras(), seed=0), np.random.default_rng(0)
    for length in (30, 17, 41, 25, 33, 29):
        size = (length + 1, *shape)
        obs = rng.integers(256, size=size, dtype=np.uint8) if len(shape) == 3 else rng.standard_normal(size, np.float32)
        ends = np.arange(length) == length - 1
        buffer.add_episode(obs, rng.uniform(-1, 1, (length, _ACTIONS)), rng.standard_normal(length), terminations=ends)
    return buffer


def _acting(model: WorldModel, *, captured: bool) -> Callable[[np.ndarray], dict[str, torch.Tensor]]:
    """A function that observes and chooses actions, as an agent does between two steps of its environments."""
    (shape,) = model.config.obs_shapes.values()
    space = space_like(shape, np.uint8 if len(shape) == 3 else np.float32)
    kind = model.online_defaults().planner
    planner = build_planner(model, kind, None if kind is None else _SEARCH)
    codec = ActionCodec(spaces.Box(-1, 1, (_ACTIONS,)))
    actor = Actor(model, ObservationCodec(space), codec, planner, captured=captured)
    starts, before = np.zeros(_ROWS, bool), actor.start(_ROWS)

    def act(obs: np.ndarray) -> dict[str, torch.Tensor]:
        acting = actor.act(actor.observe(before, obs, starts, deterministic=False), starts, deterministic=False)
        return {**acting.state, "actions": acting.actions}

    return act


def _results(updated: Any) -> dict[str, torch.Tensor]:
    extras = [{f"{name} to store": x for name, x in phase.items()} for phase in updated.extras]
    return {**updated.losses, **{name: x for phase in extras for name, x in phase.items()}}


def _difference(
    compute: Callable[[Any], dict[str, torch.Tensor]], sample: Callable[[], Any], changes: Changes, model: WorldModel
) -> list[str]:
    """Describes where the fast implementation differs from the plain one; empty if the results are the same.

    A random draw can fall to the other side of a threshold in one of some hundred batches, which is no fault. Two
    batches have to differ.
    """
    problems = []
    for _ in range(2):
        given = sample()

        def plain(given: Any = given) -> dict[str, torch.Tensor]:
            with by_definition():
                return compute(given)

        work = Work(function=lambda inputs: {}, inputs=dict, plain=plain, changes=changes)
        precision = precision_of(model, model.device)
        _, found = compared(work, lambda given=given: compute(given), model.device, precision)  # type: ignore[misc]
        if found is None:
            return []
        problems.append(f"fast: {found.name} differs by {found.share:.2g} of its size, more than {found.tolerance:.2g}")
    return problems[-1:]


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collects the warnings of the training inside the block."""
    found: list[str] = []
    log, handler = logging.getLogger("worldflux.training"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    propagates, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.propagate = propagates


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call: the median of several calls, after one that is not counted."""
    times: list[float] = []
    started = time.monotonic()
    while len(times) < 2 or time.monotonic() - started < _TIMED:
        before = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - before)
    return 1000.0 * statistics.median(times[1:])
