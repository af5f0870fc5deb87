"""The documented training API to the letter: names, parameters, their order and their defaults.

Parameters may be added, but only by keyword and with a default, so that whatever was written against the documentation
goes on working.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields
from typing import Any

import pytest

import worldflux
from worldflux import create_world_model
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

GIVEN = inspect.Parameter.empty
"""Instead of a default: the argument has to be given."""
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


def test_the_fields_of_training_config_have_their_documented_defaults_in_their_order() -> None:
    assert [item.name for item in fields(TrainingConfig)][: len(TRAINING)] == [*TRAINING]
    assert {name: getattr(TrainingConfig(), name) for name in TRAINING} == TRAINING
    given = (1, 2, 3, 0.1, 0.2, 0.3, 4, 5, 6, 7, "cpu", 8)
    assert tuple(getattr(TrainingConfig(*given), name) for name in TRAINING) == given


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("worldflux", "create_world_model list_models register_model WorldModel State WorldFluxAgent WorldModelConfig"),
        ("worldflux", "DreamerV3Config TDMPC2Config LatentType DynamicsType WorldFluxError ConfigurationError"),
        ("worldflux", "ShapeMismatchError BufferError CheckpointError TrainingError MissingDependencyError"),
        ("worldflux.training", "train Trainer TrainingConfig ReplayBuffer Batch BatchRequest create_random_buffer"),
        ("worldflux.training", "Callback ProgressCallback LoggingCallback CheckpointCallback EarlyStoppingCallback"),
        ("worldflux.training.callbacks", "Callback ProgressCallback LoggingCallback CheckpointCallback"),
        ("worldflux.training.data", "create_random_buffer ReplayBuffer BatchProvider BatchRequestProvider"),
    ],
)
def test_names_are_where_the_documentation_imports_them_from(module: str, names: str) -> None:
    imported = importlib.import_module(module)
    for name in names.split():
        assert getattr(imported, name) is not None
        if module in ("worldflux", "worldflux.training"):
            assert name in imported.__all__ and name in dir(imported)
