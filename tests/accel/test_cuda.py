"""Tests that need a GPU: gradient steps and actions as CUDA graphs, and copies for which the host does not wait."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import small_models
from helpers.training import NoisyRegression
from torch import Tensor, nn

from worldflux import WorldModel, create_world_model
from worldflux.accel.cuda_graphs import WARM_UP_CALLS, CudaGraphCapturer
from worldflux.accel.transfers import to_device, to_host
from worldflux.agents import WorldFluxAgent
from worldflux.agents import acting as acting_module
from worldflux.agents.acting import Actor, Memory
from worldflux.cli.device_check import check_device
from worldflux.config import PlannerConfig
from worldflux.envs.spaces import ActionCodec, ObservationCodec
from worldflux.errors import TrainingError
from worldflux.models.base import LossOutput
from worldflux.models.planning import Planner
from worldflux.training import Batch, ReplayBuffer, Trainer, TrainingConfig, create_random_buffer
from worldflux.training import trainer as trainer_module
from worldflux.training.captured_step import CapturedStep
from worldflux.training.optim import Adam

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = "cuda"
PLAIN_STEPS = WARM_UP_CALLS
CONFIG = TrainingConfig(
    learning_rate=1e-3, warmup_steps=3, grad_clip=1.0, batch_size=4, sequence_length=7, device=DEVICE
)
SIZES = {
    "dreamerv3:tiny": dict(small_models.DREAMERV3, cnn_depth=4),
    "tdmpc2:tiny": dict(small_models.TDMPC2, num_channels=4, dropout=0.1),
}
IMAGE = (3, 64, 64)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dreamerv3": ("dreamerv3:tiny", {}),
    "dreamerv3 pixels": ("dreamerv3:tiny", {"obs_shape": IMAGE}),
    "dreamerv3 pixels without a decoder": ("dreamerv3:tiny", {"obs_shape": IMAGE, "representation": "redundancy"}),
    "dreamerv3 discrete": ("dreamerv3:tiny", {"action_type": "discrete"}),
    "tdmpc2": ("tdmpc2:tiny", {}),
    "tdmpc2 pixels": ("tdmpc2:tiny", {"obs_shape": IMAGE}),
    "tdmpc2 discrete": ("tdmpc2:tiny", {"action_type": "discrete"}),
    "tdmpc2 that ends": ("tdmpc2:tiny", {"episodic": True, "use_decoder": True}),
}


def new(family: str, **changes: Any) -> WorldModel:
    torch.manual_seed(0)
    preset, own = FAMILIES[family]
    return create_world_model(preset, **{"obs_shape": (4,), "action_dim": 2, **SIZES[preset], **own, **changes})


def data(model: nn.Module, storage: str | None = None) -> ReplayBuffer:
    """Returns a batch of noise for a model, with entries for its replay extras."""
    config, extras = model.config, model.replay_extras()  # type: ignore[operator]
    random = create_random_buffer(300, config.obs_shape, config.action_dim, 12, 20, seed=0)
    buffer = ReplayBuffer(300, config.obs_shape, config.action_dim, extras=extras, seed=0, storage=storage)
    batch = random.sample(12, 20)
    assert isinstance(batch.obs, Tensor)
    for row in range(12):
        actions = batch.actions[row].numpy()
        if config.action_type == "discrete":
            actions = np.eye(config.action_dim, dtype=np.float32)[np.abs(actions).argmax(-1)]
        obs = batch.obs[row].numpy()
        buffer.add_episode(np.concatenate([obs, obs[-1:]]), actions, batch.rewards[row].numpy())
    return buffer


def batches(model: nn.Module, count: int) -> list[Batch]:
    buffer = data(model)
    return [buffer.sample(4, 7) for _ in range(count)]


def made(model: nn.Module, config: TrainingConfig = CONFIG, *, compiled: bool = False) -> Trainer:
    """Returns a trainer, whose steps are recorded as `config` says, with a compiled model if `compiled` is set."""
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(trainer_module, "compiles", lambda setting, device: False)
        return Trainer(model, config)


def pair(model: nn.Module, config: TrainingConfig = CONFIG) -> tuple[Trainer, Trainer]:
    """Returns a plain trainer and one whose steps are recorded, with equal models."""
    other = copy.deepcopy(model)
    return made(model, replace(config, compile=False)), made(other, replace(config, compile=True))


def recorded(trainer: Trainer) -> int:
    assert isinstance(trainer._take_step, CapturedStep)
    return trainer._take_step._captures.count


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in trainer.model.state_dict().items()}


def run(trainer: Trainer, given: list[Batch], seed: int = 1) -> list[dict[str, Tensor]]:
    torch.manual_seed(seed)
    seen = []
    for step, batch in enumerate(given):
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 - step / 50)  # a schedule, on top of the warm-up
        seen.append(dict(trainer.step(batch)))
    return seen


def assert_same(one: Any, other: Any, rtol: float = 5e-3, atol: float = 2e-4) -> None:
    """Checks equality up to different rounding of kernels; one update changes most weights by 1e-3."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name].float(), other[name].float(), rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Gradient steps


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_replayed_updates_equal_ten_plain_ones(family: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "worldflux.training"):
        plain, played = pair(new(family))
        given = batches(plain.model, 10)
        expected, found = run(plain, given), run(played, given)
    assert caplog.messages == []
    assert recorded(played) == 1
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)
    assert_same(state(plain), state(played))


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2", "dreamerv3 pixels"])
def test_bfloat16_steps_are_replayed(family: str) -> None:
    plain, played = pair(new(family, dtype="bfloat16"))
    given = batches(plain.model, 10)
    expected, found = run(plain, given), run(played, given)
    assert recorded(played) == 1
    assert all(p.dtype == torch.float32 for p in played.model.parameters())
    # The first steps are the same computation; later ones diverge by the rounding of bfloat16.
    for one, other in zip(expected[:3], found[:3], strict=True):
        assert_same(one, other, rtol=5e-2, atol=5e-2)
    assert all(bool(torch.isfinite(value)) for losses in found for value in losses.values())


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_a_compiled_model_is_recorded_and_learns(family: str) -> None:
    trainer = made(new(family), replace(CONFIG, compile="auto", warmup_steps=0), compiled=True)
    batch = batches(trainer.model, 1)[0]
    losses = [float(trainer.step(batch)["loss"]) for _ in range(60)]
    trainer.check_finite()
    assert recorded(trainer) == 1
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_the_host_does_not_wait_in_a_recorded_step(family: str) -> None:
    trainer = pair(new(family))[1]
    given = batches(trainer.model, PLAIN_STEPS + 4)
    run(trainer, given[: PLAIN_STEPS + 1])
    assert recorded(trainer) == 1
    with waiting_is_an_error():
        for batch in given[PLAIN_STEPS + 1 :]:
            trainer.step(batch)
    trainer.check_finite()


def test_noise_is_drawn_anew_and_follows_the_seed() -> None:
    trainer = pair(new("dreamerv3"))[1]
    batch = batches(trainer.model, 1)[0]
    run(trainer, [batch] * (PLAIN_STEPS + 2))
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append([float(trainer.step(batch)["kl"]) for _ in range(3)])
    assert recorded(trainer) == 1
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0] != pytest.approx(found[2], rel=1e-5)
    assert len({round(value, 7) for value in found[0]}) > 1


def test_evaluating_between_steps_changes_nothing() -> None:
    plain, played = pair(new("tdmpc2"))
    given = batches(plain.model, 10)
    for trainer in (plain, played):
        run(trainer, given[:7])
        trainer.evaluate(data(trainer.model), 2)
        for batch in given[7:]:
            trainer.step(batch)
    assert_same(state(plain), state(played))


def test_a_loss_that_is_not_finite_is_found_at_its_step() -> None:
    trainer = pair(new("tdmpc2"))[1]
    given = batches(trainer.model, PLAIN_STEPS + 4)
    run(trainer, given[: PLAIN_STEPS + 2])
    trainer.check_finite()
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(torch.nan)
    trainer.step(given[-1])
    trainer.step(given[-1])
    with pytest.raises(TrainingError, match=f"not finite at gradient step {PLAIN_STEPS + 3}"):
        trainer.check_finite()


# What invalidates a recording


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_a_checkpoint_is_continued(family: str, tmp_path: Path) -> None:
    trainer = pair(new(family))[1]
    given = batches(trainer.model, 8)
    run(trainer, given)
    trainer.save_checkpoint(tmp_path / "checkpoint")
    expected = [dict(trainer.step(batch)) for batch in given]
    other = pair(new(family))[1]
    for again in (trainer, other):  # one with CUDA graphs, one without
        again.load_checkpoint(tmp_path / "checkpoint")
        for optimizer in again.optimizers:  # the rate of the schedule, which is not part of a checkpoint
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 - 7 / 50)
        for one, losses in zip(expected, [dict(again.step(batch)) for batch in given], strict=True):
            assert_same(one, losses)
        assert again.step_count == 16 and recorded(again) == 1
    assert_same(state(trainer), state(other))


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_checkpoints_go_between_cuda_and_cpu(family: str, tmp_path: Path) -> None:
    trainer = pair(new(family))[1]
    given = batches(trainer.model, 6)
    run(trainer, given)
    trainer.save_checkpoint(tmp_path / "cuda")
    cpu = Trainer(new(family), replace(CONFIG, device="cpu"))
    cpu.load_checkpoint(tmp_path / "cuda")
    assert_same(state(trainer), state(cpu))
    run(cpu, given)
    cpu.save_checkpoint(tmp_path / "cpu")
    trainer.load_checkpoint(tmp_path / "cpu")
    run(trainer, given)
    assert trainer.step_count == 18 and recorded(trainer) == 1
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, Adam):
            assert {entry["step"].device.type for entry in optimizer.state.values()} == {"cuda"}
            assert {float(entry["step"]) for entry in optimizer.state.values()} == {18.0}


def test_frozen_parameters_and_new_settings_are_recorded_anew() -> None:
    plain, played = pair(new("dreamerv3"))
    given = batches(plain.model, 6)
    for trainer in (plain, played):
        run(trainer, given)
        encoder = trainer.model.encoder
        assert isinstance(encoder, nn.Module)
        encoder.requires_grad_(False)
        before = [p.detach().clone() for p in encoder.parameters()]
        run(trainer, given)
        assert all(map(torch.equal, before, encoder.parameters()))
        encoder.requires_grad_(True)
        trainer.optimizers[0].param_groups[0]["betas"] = (0.5, 0.9)
        run(trainer, given)
    assert recorded(played) == 1
    assert_same(state(plain), state(played), rtol=1e-2)


def test_weights_loaded_in_place_are_trained_on_from() -> None:
    plain, played = pair(new("tdmpc2"))
    given, other = batches(plain.model, 8), new("tdmpc2").state_dict()
    for trainer in (plain, played):
        run(trainer, given)
        trainer.model.load_state_dict(other)
        run(trainer, given[:3])
    assert recorded(played) == 1
    assert_same(state(plain), state(played))


# What cannot be recorded


class Waiting(NoisyRegression):
    """Model that reads a value in its loss."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()

    def loss(self, batch: Batch) -> LossOutput:
        assert isinstance(batch.obs, Tensor)
        error = self.body(torch.cat([batch.obs, batch.actions], -1)).squeeze(-1) - batch.rewards
        error = error + 0.1 * torch.randn_like(error)
        loss = error.square().mean()
        return LossOutput(loss, {"fit": torch.full_like(loss.detach(), loss.item())})


def regression_batches(count: int) -> list[Batch]:
    buffer = create_random_buffer(300, (3,), 2, 12, 20, seed=0)
    return [buffer.sample(4, 7) for _ in range(count)]


def test_a_model_that_waits_is_trained_plainly(caplog: pytest.LogCaptureFixture) -> None:
    plain, played = pair(Waiting())
    given = regression_batches(10)
    with caplog.at_level(logging.WARNING, "worldflux.training"):
        expected, found = run(plain, given), run(played, given)
    assert len(caplog.messages) == 1 and "it waits for the device at" in caplog.messages[0]
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)
    assert_same(state(plain), state(played))


def test_a_capture_that_fails_leaves_everything_usable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    warm_up = CudaGraphCapturer.warm_up
    plain, played = pair(Waiting())
    given = regression_batches(10)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "worldflux.training"):
        patch.setattr(CudaGraphCapturer, "warm_up", lambda self, function: (warm_up(self, function)[0], None))
        expected, found = run(plain, given), run(played, given)
    assert len(caplog.messages) == 1 and "cannot be captured in a CUDA graph" in caplog.messages[0]
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)
    # Streams, random numbers, memory and further captures work as before.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.manual_seed(3)
    first = torch.rand(8, device=DEVICE)
    torch.manual_seed(3)
    assert torch.equal(first, torch.rand(8, device=DEVICE)) and not torch.equal(first, torch.rand(8, device=DEVICE))
    taken = torch.empty(2**26, dtype=torch.uint8, device=DEVICE)
    before = torch.cuda.memory_allocated()
    del taken
    assert torch.cuda.memory_allocated() <= before - 2**26
    plain, played = pair(new("dreamerv3"))
    given = batches(plain.model, 10)
    expected, found = run(plain, given), run(played, given)
    assert recorded(played) == 1
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)


# Recordings that are wrong


class StaleCapturer(CudaGraphCapturer):
    """Captures graphs that read their inputs from memory that is no longer written."""

    def capture(self, function: Callable[[], Any]) -> Any:
        found = super().capture(function)
        captured = function.__self__  # type: ignore[attr-defined]
        captured.old, captured._inputs = captured._inputs, {name: x.clone() for name, x in captured._inputs.items()}
        return found


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2", "dreamerv3 pixels"])
def test_a_wrongly_recorded_step_is_discarded(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer_module, "CudaGraphCapturer", StaleCapturer)
    plain, played = pair(new(family))
    given = batches(plain.model, 10)
    with caplog.at_level(logging.WARNING, "worldflux.training"):
        expected, found = run(plain, given), run(played, given)
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)
    assert_same(state(plain), state(played))
    assert recorded(played) == 0
    (message,) = caplog.messages
    assert "does not match the plain computation" in message and torch.cuda.get_device_name() in message
    for optimizer in played.optimizers:
        if isinstance(optimizer, Adam):
            assert not any(group["fused"] for group in optimizer.param_groups)
            assert {float(entry["step"]) for entry in optimizer.state.values()} == {10.0}


def test_wrongly_recorded_actions_are_discarded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(acting_module, "CudaGraphCapturer", StaleCapturer)
    plain, played = actors("dreamerv3:tiny", spaces.Box(-1, 1, (4,), np.float32), False)
    for one, other in zip(acted(plain, 3, False), acted(played, 3, False), strict=True):
        torch.testing.assert_close(one.actions, other.actions, rtol=1e-3, atol=1e-4)
    assert played._captures is not None and played._captures.count == 0
    assert len(caplog.messages) == 1 and "Acting of DreamerV3, replayed" in caplog.messages[0]


def test_all_implementations_agree_on_this_device() -> None:
    found = check_device(DEVICE)
    assert found["works"], [row["problems"] for row in found["rows"]]
    assert all({"plain", "fast", "captured"} <= set(row["milliseconds"]) for row in found["rows"])


# Data: prefetching, write-back, storage on the device


@pytest.mark.parametrize("storage", [None, DEVICE])
@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_training_from_a_buffer_is_the_same_with_replayed_steps(family: str, storage: str | None) -> None:
    trainers = pair(new(family), replace(CONFIG, total_steps=12))
    stored = []
    for trainer in trainers:
        buffer = data(trainer.model, storage)
        trainer.train(buffer)
        trainer.check_finite()
        stored.append(buffer.extras_state())
    assert recorded(trainers[1]) == 1
    assert_same(state(trainers[0]), state(trainers[1]))
    if family == "dreamerv3":
        assert bool((stored[1]["deter"] != 0).any()) and bool((stored[1]["stoch"] != 0).any())
        drawn = [one["stoch"] for one in stored]
        assert (drawn[0] == drawn[1]).float().mean() > 0.98


def test_the_host_does_not_wait_for_copies() -> None:
    buffer, there = data(new("dreamerv3")), data(new("dreamerv3"), DEVICE)
    for one in (buffer, there):
        one.sample(4, 7, DEVICE)
    with waiting_is_an_error():
        batch = buffer.sample(4, 7, DEVICE)
        own = there.sample(4, 7, DEVICE)
        assert own.row_ids is not None
        there.update_extras(own.row_ids, {name: value + 1 for name, value in own.extras.items()})
        there.extras_of(own.row_ids)
        assert to_device(torch.ones(3), torch.device(DEVICE)).is_cuda
    assert all(x.is_cuda for x in [*batch.tensors(), *own.tensors()])
    assert batch.row_ids is not None and not batch.row_ids.is_cuda
    expected = {name: value.cpu() + 1 for name, value in own.extras.items()}
    rows, index = np.unique(own.row_ids.numpy(), return_index=True)
    for name, value in there.extras_of(own.row_ids).items():
        assert torch.equal(value.cpu().flatten(0, 1)[index], expected[name].flatten(0, 1)[index]), (name, rows)


def test_copies_to_the_host_and_back_are_exact() -> None:
    tensors = {
        "a": torch.arange(6, device=DEVICE).reshape(2, 3),
        "b": torch.ones(2, dtype=torch.bfloat16, device=DEVICE),
        "c": torch.arange(3),
    }
    found = to_host(tensors)
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and found["b"].tolist() == [1.0, 1.0]
    assert found["b"].dtype == np.float32 and found["c"].tolist() == [0, 1, 2]


# Acting


def actors(preset: str, obs: spaces.Space[Any], plans: bool) -> tuple[Actor, Actor]:
    """Returns an actor without and one with recordings, with equal models."""
    torch.manual_seed(0)
    codec = ObservationCodec(obs)
    model = create_world_model(preset, obs_shape=codec.obs_shape, action_dim=2, **SIZES[preset])
    for p in model.parameters():  # with heads that start at zero all plans would be equal
        nn.init.normal_(p, std=0.3)
    found = []
    for captured in (False, True):
        own = copy.deepcopy(model).to(DEVICE)
        planner = None
        if plans:
            search = PlannerConfig(horizon=2, num_samples=64, num_elites=8, num_pi_trajs=4, iterations=3)
            planner = Planner(own, search)
        found.append(Actor(own, codec, ActionCodec(spaces.Box(-1, 1, (2,))), planner, captured=captured))
    return found[0], found[1]


def acted(actor: Actor, rows: int, deterministic: bool, count: int = 10) -> list[Memory]:
    torch.manual_seed(1)
    space = actor.obs_codec.space
    space.seed(0)
    acting, seen = actor.start(rows), []
    for step in range(count):
        obs, _ = actor.obs_codec.encode_any(np.stack([space.sample() for _ in range(rows)]))
        starts = np.array([(step + row) % 4 == 0 for row in range(rows)])
        acting = actor.observe(acting, obs, starts, deterministic=deterministic)
        acting = actor.act(acting, starts, deterministic=deterministic)
        seen.append(acting)
    return seen


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("preset", "obs", "plans"),
    [
        ("dreamerv3:tiny", spaces.Box(-1, 1, (4,), np.float32), False),
        ("dreamerv3:tiny", spaces.Box(0, 255, IMAGE, np.uint8), False),
        ("tdmpc2:tiny", spaces.Box(-1, 1, (4,), np.float32), True),
        ("tdmpc2:tiny", spaces.Box(-1, 1, (4,), np.float32), False),
    ],
    ids=["dreamerv3", "dreamerv3 pixels", "tdmpc2 plans", "tdmpc2"],
)
def test_replayed_actions_equal_plain_ones(
    preset: str, obs: spaces.Space[Any], plans: bool, deterministic: bool
) -> None:
    plain, played = actors(preset, obs, plans)
    for rows in (3, 1):
        for one, other in zip(acted(plain, rows, deterministic), acted(played, rows, deterministic), strict=True):
            torch.testing.assert_close(dict(one.state), dict(other.state), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(one.actions, other.actions, rtol=1e-3, atol=1e-4)
    assert played._captures is not None and played._captures.count == 4


def test_acting_sees_the_weights_of_the_step_before_it() -> None:
    trainer = pair(new("dreamerv3"))[1]
    codec = ObservationCodec(spaces.Box(-1, 1, (4,), np.float32))
    model = trainer.model
    assert isinstance(model, WorldModel)
    plain, played = (Actor(model, codec, ActionCodec(spaces.Box(-1, 1, (2,))), captured=flag) for flag in (False, True))
    for batch in batches(model, 12):
        trainer.step(batch)
        one, other = acted(plain, 2, True, count=1)[0], acted(played, 2, True, count=1)[0]
        torch.testing.assert_close(one.actions, other.actions, rtol=1e-4, atol=1e-5)
    assert recorded(trainer) == 1 and played._captures is not None and played._captures.count == 2


# Whole agents


class Dice(gym.Env[Any, Any]):
    """Environment with random observations and rewards, and episodes of eight steps."""

    observation_space = spaces.Box(-1, 1, (4,), np.float32)

    def __init__(self, discrete: bool) -> None:
        self.action_space = spaces.Discrete(3) if discrete else spaces.Box(-1, 1, (2,), np.float32)  # type: ignore[assignment]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._throw(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self._throw(), float(np.sum(action)), False, self.t == 8, {}

    def _throw(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 4).astype(np.float32)


SEARCH = dict(num_samples=64, num_elites=8, num_pi_trajs=4, iterations=3)
AGENTS: dict[str, Callable[..., WorldFluxAgent]] = {
    "dreamerv3": lambda **settings: WorldFluxAgent(
        "dreamerv3:tiny", Dice(discrete=True), model_kwargs=SIZES["dreamerv3:tiny"], batch_size=2, seq_len=6,
        train_ratio=12, buffer_size=500, learning_starts=20, device=DEVICE, seed=0, **settings,
    ),
    "tdmpc2": lambda **settings: WorldFluxAgent(
        "tdmpc2:tiny", Dice(discrete=False), model_kwargs=SIZES["tdmpc2:tiny"], batch_size=4, learning_starts=20,
        train_ratio=16, buffer_size=500, planner_kwargs=SEARCH, device=DEVICE, seed=0, **settings,
    ),
}  # fmt: skip


@pytest.mark.parametrize("storage", [None, DEVICE])
@pytest.mark.parametrize("family", AGENTS)
def test_an_agent_learns_end_to_end(family: str, storage: str | None, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "compiles", lambda setting, device: False)
        agent = AGENTS[family](buffer_storage=storage)
        before = {name: value.clone() for name, value in agent.model.state_dict().items()}
        agent.learn(60)
        assert agent._n_updates >= 30 and agent.trainer.step_count == agent._n_updates
        assert recorded(agent.trainer) == 1
        assert agent.actor._captures is not None and agent.actor._captures.count == 2
        after = agent.model.state_dict()
        assert all(bool(torch.isfinite(value.float()).all()) for value in after.values())
        assert any(not torch.equal(before[name], value) for name, value in after.items())
        agent.save(tmp_path / "agent.zip")
        loaded = WorldFluxAgent.load(tmp_path / "agent.zip", agent.env, device=DEVICE)
        obs = np.zeros((3, 4), np.float32)
        one, _ = agent.predict(obs, deterministic=True)
        other, _ = loaded.predict(obs, deterministic=True)
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
        loaded.learn(20, reset_num_timesteps=False)
        assert loaded._n_updates > agent._n_updates


def test_an_agent_is_compiled_and_recorded_by_default() -> None:
    agent = AGENTS["tdmpc2"]()
    agent.learn(40)
    agent.trainer.check_finite()
    assert agent.compile == "auto" and recorded(agent.trainer) == 1


def test_gradient_steps_are_queued_before_the_environment_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "compiles", lambda setting, device: False)
    agent = AGENTS["tdmpc2"]()
    order: list[str] = []
    act, step, env_step = agent.actor.act, agent.trainer.step, Dice.step
    monkeypatch.setattr(agent.actor, "act", lambda *args, **kwargs: (order.append("a"), act(*args, **kwargs))[1])
    monkeypatch.setattr(agent.trainer, "step", lambda *args: (order.append("t"), step(*args))[1])
    monkeypatch.setattr(Dice, "step", lambda self, action: (order.append("e"), env_step(self, action))[1])
    agent.learn(40)
    learning = "".join(order).lstrip("e").lstrip("t")  # after the random start and its gradient steps
    assert learning.count("a") >= 10 and "ae" not in learning and "ta" not in learning.rstrip("t")
