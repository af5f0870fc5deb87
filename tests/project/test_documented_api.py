"""The documented training API: its names and signatures, its examples with small sizes, and user-defined parts.

Parameters may be added to a documented function, but only by keyword and with a default, so that code written against
the documentation keeps working.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import worldflux
import worldflux.training
from worldflux import create_world_model
from worldflux.config import DreamerV3Config, TDMPC2Config, WorldModelConfig
from worldflux.errors import ConfigurationError, MissingDependencyError, ShapeMismatchError, TrainingError, install_hint
from worldflux.models.base import LossOutput
from worldflux.training import (
    Batch,
    BatchRequest,
    Callback,
    CheckpointCallback,
    EarlyStoppingCallback,
    LoggingCallback,
    ProgressCallback,
    ReplayBuffer,
    Trainer,
    TrainingConfig,
    create_random_buffer,
    train,
)

# Names and signatures

GIVEN = inspect.Parameter.empty
"""In place of a default: the argument is required."""
TRAINING: dict[str, Any] = dict(
    total_steps=100_000, batch_size=16, sequence_length=50, learning_rate=3e-4, weight_decay=0.0, grad_clip=100.0,
    warmup_steps=0, log_interval=100, eval_interval=1000, save_interval=10000, device="auto", seed=42,
)  # fmt: skip
SIGNATURES: list[tuple[Any, dict[str, Any]]] = [
    (train, dict(model=GIVEN, buffer=GIVEN) | {name: TRAINING[name] for name in [*TRAINING][:4]}),
    (TrainingConfig, TRAINING),
    (Trainer, dict(model=GIVEN, config=None, callbacks=())),
    (Trainer.train, dict(self=GIVEN, buffer=GIVEN, num_steps=None)),
    (Trainer.add_callback, dict(self=GIVEN, callback=GIVEN)),
    (ReplayBuffer, dict(capacity=GIVEN, obs_shape=GIVEN, action_dim=GIVEN)),
    (ReplayBuffer.add_episode, dict(self=GIVEN, obs=GIVEN, actions=GIVEN, rewards=GIVEN, dones=None)),
    (ReplayBuffer.sample, dict(self=GIVEN, batch_size=GIVEN, seq_len=None, device="cpu")),
    (ReplayBuffer.save, dict(self=GIVEN, path=GIVEN)),
    (ReplayBuffer.load, dict(path=GIVEN)),
    (BatchRequest, dict(batch_size=GIVEN, seq_len=None, device="cpu")),
    (ProgressCallback, {}),
    (LoggingCallback, dict(log_interval=100, use_wandb=False)),
    (CheckpointCallback, dict(output_dir=GIVEN, save_interval=10_000, max_checkpoints=5)),
    (EarlyStoppingCallback, dict(monitor="loss", patience=5000, min_delta=1e-4)),
    (Callback.on_step_end, dict(self=GIVEN, step=GIVEN, losses=GIVEN)),
    (
        create_random_buffer,
        dict(capacity=10_000, obs_shape=(3, 64, 64), action_dim=6, num_episodes=100, episode_length=100, seed=None),
    ),
    (worldflux.WorldModel.save_pretrained, dict(self=GIVEN, directory=GIVEN)),
    (create_world_model, dict(spec_or_path=GIVEN)),
]


@pytest.mark.parametrize(("function", "documented"), SIGNATURES, ids=[item.__qualname__ for item, _ in SIGNATURES])
def test_a_signature_is_the_documented_one_and_additions_are_by_keyword(
    function: Any, documented: dict[str, Any]
) -> None:
    parameters = inspect.signature(function).parameters
    by_position = {item.name: item.default for item in parameters.values() if item.kind is item.POSITIONAL_OR_KEYWORD}
    if function is TrainingConfig:  # a dataclass, whose later fields come behind
        by_position = dict([*by_position.items()][: len(documented)])
    assert by_position == documented and [*by_position] == [*documented]
    added = [item for name, item in parameters.items() if name not in documented]
    assert all(item.default is not GIVEN or item.kind is item.VAR_KEYWORD for item in added)


def test_a_batch_starts_with_its_documented_fields_and_needs_no_others() -> None:
    parameters = [*inspect.signature(Batch).parameters.values()]
    assert [item.name for item in parameters[:4]] == ["obs", "actions", "rewards", "terminations"]
    assert all(item.default is not GIVEN for item in parameters[4:])


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("worldflux", "create_world_model list_models register_model WorldModel State WorldFluxAgent WorldModelConfig"),
        ("worldflux", "DreamerV3Config TDMPC2Config LatentType DynamicsType WorldFluxError ConfigurationError"),
        ("worldflux", "ShapeMismatchError BufferError CheckpointError TrainingError MissingDependencyError"),
        ("worldflux.training", "train Trainer TrainingConfig ReplayBuffer Batch BatchRequest create_random_buffer"),
        ("worldflux.training", "Callback ProgressCallback LoggingCallback CheckpointCallback EarlyStoppingCallback"),
        ("worldflux.envs", "make_env make_vec_env collect check_env RecordEpisodes ResizeImages ActionRepeat"),
        ("worldflux.training.callbacks", "Callback ProgressCallback LoggingCallback CheckpointCallback"),
        ("worldflux.training.data", "create_random_buffer ReplayBuffer BatchProvider BatchRequestProvider"),
    ],
)
def test_names_are_where_the_documentation_imports_them_from(module: str, names: str) -> None:
    imported = importlib.import_module(module)
    for name in names.split():
        assert getattr(imported, name) is not None
        if hasattr(imported, "__all__"):
            assert name in imported.__all__ and name in dir(imported)
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
        imported.nothing  # noqa: B018


FAMILIES: dict[str, dict[str, Any]] = {
    "dreamerv3:size12m": dict(
        deter_dim=16, hidden_dim=8, units=8, stoch_discrete=2, stoch_classes=4, bins=15, imagination_horizon=2
    ),
    "tdmpc2:5m": dict(latent_dim=16, hidden_dim=16, mlp_dim=16, enc_dim=16, num_q_networks=2, num_bins=15),
}
"""Documented presets, with sizes that train in milliseconds."""

family = pytest.mark.parametrize("preset", FAMILIES)


@pytest.fixture
def trajectories(tmp_path: Path) -> Path:
    """An `.npz` with only the documented keys, as a user's script writes it."""
    rng, count = np.random.default_rng(0), 120
    np.savez(
        tmp_path / "trajectories.npz",
        obs=rng.normal(size=(count, 4)).astype(np.float32),
        actions=rng.uniform(-1, 1, (count, 2)).astype(np.float32),
        rewards=rng.normal(size=count).astype(np.float32),
        dones=np.arange(count) % 30 == 29,
        obs_shape=np.array((4,)),
        action_dim=2,
        capacity=1000,
    )
    return tmp_path / "trajectories.npz"


def small(preset: str) -> worldflux.WorldModel:
    return create_world_model(preset, obs_shape=(4,), action_dim=2, **FAMILIES[preset])


def predictions(model: Any) -> list[Tensor]:
    """A model's predictions for three steps."""
    torch.manual_seed(0)
    model = model.cpu()
    with torch.no_grad():
        state = model.encode(torch.linspace(-1, 1, 12).reshape(3, 4), deterministic=True)
        trajectory = model.rollout(state, torch.linspace(-1, 1, 18).reshape(3, 3, 2), deterministic=True)
        return [*trajectory.states.values(), trajectory.rewards, model.value(state)]


# The examples


@family
def test_the_complete_documented_example_runs(
    preset: str, trajectories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "worldflux.training")

    from worldflux import create_world_model
    from worldflux.training import ReplayBuffer, Trainer, TrainingConfig
    from worldflux.training.callbacks import (
        CheckpointCallback,
        EarlyStoppingCallback,
        LoggingCallback,
        ProgressCallback,
    )

    # Create model
    model = create_world_model(preset, obs_shape=(4,), action_dim=2, device="cpu", **FAMILIES[preset])

    # Load data
    buffer = ReplayBuffer.load("trajectories.npz")

    # Configure
    config = TrainingConfig(
        total_steps=8,
        batch_size=4,
        sequence_length=10,
        learning_rate=3e-4,
        log_interval=2,
    )

    # Setup trainer
    trainer = Trainer(model, config)
    trainer.add_callback(ProgressCallback())
    trainer.add_callback(LoggingCallback(log_interval=2, use_wandb=False))
    trainer.add_callback(CheckpointCallback(output_dir="./checkpoints", save_interval=4, max_checkpoints=1))
    trainer.add_callback(EarlyStoppingCallback(monitor="loss", patience=5000, min_delta=1e-4))

    # Train
    trained_model = trainer.train(buffer)

    # Save final
    trained_model.save_pretrained("./final_model")
    loaded = create_world_model("./final_model")

    assert trained_model is model and trainer.step_count == 8
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-00000008"]
    logged = [record for record in caplog.records if record.levelname == "INFO"]  # the health may warn
    assert [record.getMessage().split()[1] for record in logged] == ["2", "4", "6", "8"]
    for mine, its in zip(predictions(trained_model), predictions(loaded), strict=True):
        assert torch.equal(mine, its)


@family
def test_the_one_line_example_trains_and_saves(
    preset: str, trajectories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = small(preset)
    before = [weight.clone() for weight in model.parameters()]
    buffer = ReplayBuffer.load("trajectories.npz")
    trained_model = train(model, buffer, total_steps=3, batch_size=4, sequence_length=8, learning_rate=1e-3)
    trained_model.save_pretrained("./my_model")
    assert trained_model is model
    assert any(not torch.equal(old, new) for old, new in zip(before, trained_model.parameters(), strict=True))
    loaded = create_world_model("./my_model")
    for mine, its in zip(predictions(trained_model), predictions(loaded), strict=True):
        assert torch.equal(mine, its)


def test_collecting_by_hand_saving_and_loading(tmp_path: Path) -> None:
    buffer = ReplayBuffer(100, (4,), 2)
    rng = np.random.default_rng(0)
    for length, last in ((20, 0), (30, 1)):  # T observations, and T+1
        obs, actions = rng.normal(size=(length + last, 4)), rng.uniform(-1, 1, (length, 2))
        rewards, dones = rng.normal(size=length), np.arange(length) == length - 1
        buffer.add_episode(obs, actions, rewards, dones)
        buffer.add_episode(obs=obs, actions=actions, rewards=rewards, dones=dones)
    assert (buffer.num_episodes, buffer.num_transitions, len(buffer)) == (4, 100, 100)
    buffer.save(tmp_path / "buffer.npz")
    loaded = ReplayBuffer.load(tmp_path / "buffer.npz")
    assert (loaded.num_episodes, loaded.num_transitions, len(loaded)) == (4, 100, 100)
    for batch in (loaded.sample(16, 12, "cpu"), loaded.sample(batch_size=16, seq_len=12, device="cpu")):
        assert batch.obs.shape == (16, 12, 4) and batch.obs.dtype == torch.float32
        assert batch.actions.shape == (16, 12, 2)
        assert batch.rewards.shape == batch.terminations.shape == (16, 12)
    request = BatchRequest(3, 7, "cpu")
    assert loaded.sample(request).rewards.shape == (3, 7)
    assert loaded.sample(2).rewards.shape == (2, 50)
    # Unseen are only the observations after the last steps of the two episodes that came without.
    everything = loaded.sample(1, 104)
    assert everything.obs_mask.logical_not().sum() == 2 and everything.terminations.sum() == 4


def test_a_random_buffer_is_decided_by_its_seed() -> None:
    named = dict(capacity=1000, obs_shape=(4,), action_dim=2, num_episodes=5, episode_length=20, seed=42)
    buffer, again = create_random_buffer(**named), create_random_buffer(1000, (4,), 2, 5, 20, 42)
    assert (buffer.capacity, buffer.num_episodes, len(buffer)) == (1000, 5, 100)
    one, other = buffer.sample(8, 10), again.sample(8, 10)
    assert torch.equal(one.obs, other.obs) and torch.equal(one.actions, other.actions)
    assert not torch.equal(create_random_buffer(**{**named, "seed": 1}).sample(8, 10).obs, one.obs)


# Providers


def random_batch(rng: torch.Generator, batch_size: int, seq_len: int) -> Batch:
    """A batch with only the four documented fields."""
    return Batch(
        obs=torch.randn(batch_size, seq_len, 4, generator=rng),
        actions=torch.rand(batch_size, seq_len, 2, generator=rng) * 2 - 1,
        rewards=torch.randn(batch_size, seq_len, generator=rng),
        terminations=torch.rand(batch_size, seq_len, generator=rng) < 0.1,
    )


class ByNumbers:
    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.rng = torch.Generator().manual_seed(0)

    def sample(self, batch_size: int, seq_len: int | None = None, device: str = "cpu") -> Batch:
        self.asked.append((batch_size, seq_len, str(device)))
        return random_batch(self.rng, batch_size, seq_len or 50)


class ByRequest(ByNumbers):
    def sample(self, request: BatchRequest) -> Batch:  # type: ignore[override]
        assert isinstance(request, BatchRequest)
        return super().sample(request.batch_size, request.seq_len, str(request.device))


@family
@pytest.mark.parametrize("kind", [ByNumbers, ByRequest])
def test_a_provider_of_four_fields_trains_both_families(preset: str, kind: type[ByNumbers]) -> None:
    provider, losses = kind(), LossRecorder()
    trainer = Trainer(small(preset), TrainingConfig(total_steps=3, batch_size=4, sequence_length=8, device="cpu"))
    trainer.add_callback(losses)
    trainer.train(provider)
    assert provider.asked == [(4, 8, "cpu")] * 3
    assert [step for step, _ in losses.seen] == [1, 2, 3]
    assert all(np.isfinite(list(terms.values())).all() for _, terms in losses.seen)


@family
@pytest.mark.parametrize("field", ["obs", "actions", "rewards"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_never_learned_from_unseen(preset: str, field: str, value: float) -> None:
    class Spoiled(ByNumbers):
        def sample(self, batch_size: int, seq_len: int | None = None, device: str = "cpu") -> Batch:
            batch = super().sample(batch_size, seq_len, device)
            getattr(batch, field)[0, 2] = value
            batch.terminations[:] = False
            return batch

    with pytest.raises(TrainingError, match="not finite at gradient step 1"):
        train(small(preset), Spoiled(), total_steps=2, batch_size=4, sequence_length=8, device="cpu")


def test_a_provider_of_arrays_is_told_to_give_tensors() -> None:
    class Arrays(ByNumbers):
        def sample(self, batch_size: int, seq_len: int | None = None, device: str = "cpu") -> Batch:
            batch = super().sample(batch_size, seq_len, device)
            return Batch(batch.obs, batch.actions, batch.rewards.numpy(), batch.terminations)

    with pytest.raises(ShapeMismatchError, match=r"rewards is an ndarray, expected a torch tensor.*torch\.as_tensor"):
        train(Linear(), Arrays(), total_steps=2, device="cpu")


def test_a_provider_whose_signature_cannot_be_read_is_asked_by_numbers() -> None:
    class Compiled:
        __signature__ = "unreadable"

        def __call__(self, batch_size: int, seq_len: int, device: str) -> Batch:
            return random_batch(torch.Generator().manual_seed(0), batch_size, seq_len)

    class Provider:
        sample = Compiled()

    with pytest.raises(TypeError):
        inspect.signature(Provider.sample)
    trainer = Trainer(Linear(), TrainingConfig(total_steps=2, device="cpu"))
    trainer.train(Provider())
    assert trainer.step_count == 2


# User-defined models and callbacks


class Linear(nn.Module):
    """A user's own module; `form` is how its loss comes back."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.form = nn.Linear(4, 1), form

    def loss(self, batch: Batch) -> Any:
        assert isinstance(batch.obs, Tensor)
        loss = (self.body(batch.obs).squeeze(-1) - batch.rewards).square().mean()
        if self.form == "tensor":
            return loss
        return {"loss": loss, "error": loss.detach()} if self.form == "dict" else LossOutput(loss, {"error": loss})


class LossRecorder(Callback):
    """A callback as in the documentation, with only `on_step_end(step, losses)`."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []

    def on_step_end(self, step, losses):
        self.seen.append((step, dict(losses)))


@pytest.mark.parametrize("form", ["tensor", "dict", "LossOutput"])
def test_any_module_with_a_loss_trains_and_its_terms_reach_the_callbacks(form: str) -> None:
    recorder, buffer = LossRecorder(), create_random_buffer(200, (4,), 2, 4, 50, seed=0)
    trainer = Trainer(
        Linear(form), TrainingConfig(total_steps=30, sequence_length=10, learning_rate=0.05, device="cpu")
    )
    trainer.add_callback(recorder)
    trained = trainer.train(buffer)
    assert [step for step, _ in recorder.seen] == [*range(1, 31)]
    first, last = recorder.seen[0][1], recorder.seen[-1][1]
    assert last["loss"] < first["loss"]
    assert first.keys() == {"loss", "grad_norm"} | ({"error"} if form != "tensor" else set())
    assert isinstance(trained, Linear) and not trained.training


def test_a_callback_that_returns_false_stops_the_training() -> None:
    class Stop(Callback):
        def on_step_end(self, step, losses):
            return losses["loss"] < 0 or step < 4

    trainer = Trainer(Linear(), TrainingConfig(total_steps=30, sequence_length=10, device="cpu"))
    trainer.add_callback(Stop())
    trainer.train(create_random_buffer(200, (4,), 2, 4, 50, seed=0))
    assert trainer.step_count == 4


# Configurations


def test_the_base_configuration_takes_the_documented_values() -> None:
    config = WorldModelConfig(obs_shape=(84, 84, 3), action_dim=4)
    assert (config.obs_shape, config.action_dim) == ((84, 84, 3), 4)
    assert WorldModelConfig.from_dict(config.to_dict()) == config
    assert WorldModelConfig(dtype="float16").dtype == "float16"
    assert WorldModelConfig(obs_shape=(4, 5, 84, 84)).obs_shape == (4, 5, 84, 84)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("dreamer", "dreamerv3"), ("DreamerV3", "dreamerv3"), ("tdmpc", "tdmpc2"), ("tdmpc3", "tdmpc2")],
)
def test_a_family_that_is_not_known_is_never_read_as_the_base(given: str, meant: str) -> None:
    data = {"model_type": given, "obs_shape": [4], "action_dim": 2}
    with pytest.raises(ConfigurationError, match=f"Unknown model_type '{given}'; did you mean '{meant}'"):
        WorldModelConfig.from_dict(data)


@pytest.mark.parametrize("family", [DreamerV3Config, TDMPC2Config])
def test_a_configuration_becomes_a_model(family: Any, tmp_path: Path) -> None:
    config = family.from_size("tiny", obs_shape=(39,), action_dim=6, learning_rate=1e-3)
    model = create_world_model(config)
    assert model.config == config
    other = create_world_model(config, obs_shape=(3,), action_dim=1, grad_clip=2.0)
    assert (other.config.obs_shape, other.config.action_dim, other.config.grad_clip) == ((3,), 1, 2.0)
    assert other.config.learning_rate == 1e-3 and config.obs_shape == (39,)
    with pytest.raises(ConfigurationError, match="Unknown field 'grad_clp'; did you mean 'grad_clip'"):
        create_world_model(config, grad_clp=2.0)
    config.save(tmp_path / "config.json")
    assert create_world_model(WorldModelConfig.load(tmp_path / "config.json")).config == config


def test_what_follows_from_a_replaced_field_of_a_configuration_is_derived_anew() -> None:
    planned = create_world_model(TDMPC2Config.from_size("tiny", obs_shape=(3,), action_dim=1), latent_dim=32)
    assert (planned.config.latent_dim, planned.config.deter_dim) == (32, 32)
    dreamed = create_world_model(
        DreamerV3Config.from_size("tiny", obs_shape=(3,), action_dim=1), obs_shape=(3, 64, 64), deter_dim=64
    )
    assert dreamed.config.latent_dim == 64 + dreamed.config.stoch_dim
    assert (dreamed.config.encoder_type, dreamed.config.decoder_type) == ("cnn", "cnn")


def test_a_configuration_of_no_family_becomes_no_model() -> None:
    with pytest.raises(ConfigurationError, match=r"A WorldModelConfig belongs to no family.*TDMPC2Config"):
        create_world_model(WorldModelConfig(obs_shape=(4,)))


@pytest.mark.parametrize("shape", [(84, 84), {"camera": (84, 84), "speed": (2,)}])
def test_a_picture_without_channels_is_taken_as_a_vector_with_a_hint(
    shape: Any, caplog: pytest.LogCaptureFixture
) -> None:
    TDMPC2Config(obs_shape=shape, action_dim=2)
    (line,) = caplog.messages
    assert "(84, 84), which is taken as a vector of 7,056 numbers" in line and "(1, 84, 84)" in line
    caplog.clear()
    for fine in ((4,), (2, 3), (3, 64, 64), {"a": (5, 20)}):
        DreamerV3Config(obs_shape=fine, action_dim=2)
    assert not caplog.messages


@pytest.mark.parametrize("shape", [(4,), (3, 64, 64)])
@family
def test_half_precision_trains_and_acts(preset: str, shape: Any) -> None:
    torch.manual_seed(0)
    sizes = {**FAMILIES[preset], **({"cnn_depth": 2, "bspace": 4} if preset.startswith("dreamerv3") else {})}
    model = create_world_model(preset, obs_shape=shape, action_dim=2, dtype="float16", **sizes)
    buffer = create_random_buffer(200, shape, 2, num_episodes=4, episode_length=20, seed=0)
    train(model, buffer, total_steps=2, batch_size=2, sequence_length=6, device="cpu")
    obs = torch.zeros(2, *shape, dtype=torch.uint8 if len(shape) == 3 else torch.float32)
    with torch.no_grad():
        assert bool(torch.isfinite(model.policy(model.encode(obs))).all())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# TensorBoard


def test_logging_writes_tensorboard(trajectories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    buffer = ReplayBuffer.load(trajectories)
    named = dict(total_steps=4, batch_size=2, sequence_length=8, device="cpu")
    for _ in range(2):
        train(small("tdmpc2:5m"), buffer, **named, callbacks=[LoggingCallback(log_interval=2)], eval_data=buffer)
    assert sorted(entry.name for entry in (tmp_path / "runs").iterdir()) == ["tdmpc2_1", "tdmpc2_2"]
    events = EventAccumulator(str(tmp_path / "runs" / "tdmpc2_1")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4]
    logs = LoggingCallback(log_interval=2)
    logs.tensorboard_log = tmp_path / "mine"
    train(small("tdmpc2:5m"), buffer, **named, callbacks=[logs])
    assert len([*(tmp_path / "mine").rglob("events.*")]) == 1


def test_tensorboard_that_is_not_installed_is_named_with_its_extra(
    trajectories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    buffer, named = ReplayBuffer.load(trajectories), dict(total_steps=1, batch_size=2, sequence_length=8, device="cpu")
    with pytest.raises(MissingDependencyError, match=re.escape(install_hint("extra"))):
        train(small("tdmpc2:5m"), buffer, **named, callbacks=[LoggingCallback()])
    logs = LoggingCallback()
    logs.tensorboard_log = None
    train(small("tdmpc2:5m"), buffer, **named, callbacks=[logs])
