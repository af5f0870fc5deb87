"""Callbacks of a `Trainer` that change it while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.training import MemoryProvider, NoisyRegression

from worldflux.errors import ConfigurationError
from worldflux.training import (
    Callback,
    CheckpointCallback,
    EarlyStoppingCallback,
    ReplayBuffer,
    Trainer,
    TrainingConfig,
)

CONFIG = TrainingConfig(
    total_steps=10, batch_size=2, sequence_length=3, learning_rate=1e-2, log_interval=2, eval_interval=2, device="cpu"
)


class At(Callback):
    """Calls `act(trainer)` once, after a gradient step."""

    def __init__(self, step: int, act: Callable[[Trainer], Any]) -> None:
        self.step, self.act, self.steps = step, act, list[int]()

    def on_train_begin(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_step_end(self, step: int, losses: Any) -> None:
        self.steps.append(step)
        if step == self.step and self.steps.count(step) == 1:
            self.act(self.trainer)


def new_trainer(*callbacks: Callback, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    return Trainer(NoisyRegression(), replace(CONFIG, **settings), callbacks)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([value.flatten() for value in trainer.model.state_dict().values()])


def buffer() -> ReplayBuffer:
    made, rng = ReplayBuffer(200, (3,), 2, extras={"count": ((1,), np.float32)}, seed=0), np.random.default_rng(0)
    for _ in range(4):
        made.add_episode(rng.normal(size=(21, 3)), rng.uniform(-1, 1, (20, 2)), rng.normal(size=20))
    return made


@pytest.mark.parametrize("data", [MemoryProvider, buffer], ids=["a provider", "a buffer, on another thread"])
def test_a_checkpoint_that_is_loaded_while_training_goes_on_as_it_did_the_first_time(data: Any, tmp_path: Path) -> None:
    plain = new_trainer()
    plain.train(data())
    back = At(7, lambda trainer: trainer.load_checkpoint(tmp_path / "step-00000004"))

    trainer = new_trainer(At(4, lambda trainer: trainer.save_checkpoint(tmp_path / "step-00000004")), back)
    trainer.train(data())

    assert back.steps == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9, 10] and trainer.finished
    assert torch.equal(weights(trainer), weights(plain))


def test_training_can_go_back_to_before_it_broke(tmp_path: Path) -> None:
    class Rescue(Callback):
        rescued = 0

        def on_train_begin(self, trainer: Trainer) -> None:
            self.trainer = trainer

        def on_step_end(self, step: int, losses: Any) -> None:
            if not np.isfinite(losses["loss"]):
                self.rescued += 1
                self.trainer.model.poison_at = None
                self.trainer.load_checkpoint(tmp_path / "step-00000004")

    rescue = Rescue()
    trainer = new_trainer(rescue, CheckpointCallback(tmp_path, 4), log_interval=10)
    trainer.model.poison_at = 7
    trainer.train(MemoryProvider())
    assert rescue.rescued == 1 and trainer.step_count == 10 and bool(weights(trainer).isfinite().all())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000008", "step-00000010"]


def test_a_callback_may_save_and_take_a_further_step(tmp_path: Path) -> None:
    def act(trainer: Trainer) -> None:
        trainer.save_checkpoint(tmp_path / "saved")
        trainer.step(MemoryProvider(seed=3).sample(2, 3))

    trainer = new_trainer(At(3, act))
    trainer.train(MemoryProvider())
    assert trainer.step_count == 10
    again = new_trainer()
    again.load_checkpoint(tmp_path / "saved")
    assert again.step_count == 3


def test_train_inside_train_says_what_to_do() -> None:
    trainer = new_trainer(At(3, lambda trainer: trainer.train(MemoryProvider())))
    with pytest.raises(
        ConfigurationError, match=r"A callback has called train\(\) of the trainer that is training\. Let"
    ):
        trainer.train(MemoryProvider())
    trainer.train(MemoryProvider())
    assert trainer.finished and trainer.step_count == 10


@pytest.mark.parametrize("kind", [At, CheckpointCallback, EarlyStoppingCallback])
def test_a_callback_that_is_added_while_training_begins_there(kind: Any, tmp_path: Path) -> None:
    late = {
        At: lambda: At(99, lambda trainer: None),
        CheckpointCallback: lambda: CheckpointCallback(tmp_path, 4),
        EarlyStoppingCallback: lambda: EarlyStoppingCallback(patience=2, min_delta=1e9),
    }[kind]()
    behind = At(99, lambda trainer: None)
    trainer = new_trainer(At(3, lambda trainer: trainer.add_callback(late)), behind)
    trainer.train(MemoryProvider())
    assert behind.steps == list(range(1, trainer.step_count + 1))  # nobody is left out or called twice
    if kind is At:
        assert late.steps == list(range(4, 11))
    elif kind is CheckpointCallback:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000008", "step-00000010"]
    else:
        assert trainer.step_count in (5, 6, 7)


def test_evaluation_follows_the_data_that_a_callback_sets() -> None:
    seen = []

    class Evaluations(Callback):
        def on_eval_end(self, step: int, metrics: Any) -> None:
            seen.append(step)

    trainer = new_trainer(At(5, lambda trainer: setattr(trainer, "eval_data", MemoryProvider(seed=2))), Evaluations())
    trainer.train(MemoryProvider())
    assert seen == [6, 8, 10]
    wrong = new_trainer(At(5, lambda trainer: setattr(trainer, "eval_data", 0.5)))
    with pytest.raises(ConfigurationError, match="float has no method sample"):
        wrong.train(MemoryProvider())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, r"learning_rate cannot be changed: the trainer was made with it\. Make another one"),
        ({"grad_clip": 1.0, "warmup_steps": 9}, r"warmup_steps|grad_clip"),
        ({"compile": True}, "compile cannot be changed"),
        ({"batch_size": 9, "total_steps": 12}, r"total_steps, batch_size cannot be changed while train runs\. Let"),
    ],
)
def test_settings_that_are_used_already_say_what_to_do(changes: dict[str, Any], message: str) -> None:
    def exchange(trainer: Trainer) -> None:
        with pytest.raises(ConfigurationError, match=message):
            trainer.config = replace(trainer.config, **changes)

    trainer = new_trainer(At(4, exchange))
    before = trainer.config
    trainer.train(MemoryProvider())
    assert trainer.config is before


def test_settings_that_are_read_later_can_be_set() -> None:
    seen: list[int] = []

    class Evaluations(Callback):
        def on_eval_end(self, step: int, metrics: Any) -> None:
            seen.append(step)

    rarely = At(4, lambda trainer: setattr(trainer, "config", replace(trainer.config, eval_interval=5)))
    trainer = new_trainer(rarely, Evaluations())
    trainer.eval_data = MemoryProvider(seed=2)
    trainer.train(MemoryProvider())
    assert seen == [2, 4, 5, 10]
    trainer.config = replace(trainer.config, total_steps=13, batch_size=5)
    data = MemoryProvider()
    trainer.train(data)
    assert trainer.step_count == 13 and data.sampled[0].shape == (5, 3)


def test_rates_of_the_optimisers_can_be_set() -> None:
    def freeze(trainer: Trainer) -> None:
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0

    after: list[torch.Tensor] = []
    trainer = new_trainer(At(4, freeze), At(4, lambda trainer: after.append(trainer.model.body[0].weight.clone())))
    trainer.train(MemoryProvider())
    assert trainer.config.learning_rate == 1e-2 and torch.equal(trainer.model.body[0].weight, after[0])
