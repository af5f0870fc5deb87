"""The callbacks that come with worldflux."""

from __future__ import annotations

import builtins
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.trackers import FakeWandb
from helpers.training import MemoryProvider, NoisyRegression

from worldflux import create_world_model
from worldflux.diagnostics.health import Health
from worldflux.errors import ConfigurationError, MissingDependencyError, TrainingError, install_hint
from worldflux.models.health import HealthMetric, Threshold
from worldflux.training import (
    Callback,
    CheckpointCallback,
    EarlyStoppingCallback,
    LoggingCallback,
    ProgressCallback,
    Trainer,
    TrainingConfig,
)
from worldflux.training.callbacks import Losses

FAST = TrainingConfig(total_steps=10, batch_size=2, sequence_length=3, learning_rate=1e-3, log_interval=2, device="cpu")


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`LoggingCallback` writes TensorBoard logs to the working directory."""
    monkeypatch.chdir(tmp_path)


def trained(*callbacks: Callback, steps: int | None = None, **settings) -> Trainer:
    eval_data = settings.pop("eval_data", None)
    torch.manual_seed(0)
    trainer = Trainer(NoisyRegression(), replace(FAST, **settings), callbacks, eval_data=eval_data)
    trainer.train(MemoryProvider(), steps)
    return trainer


def checkpoints(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def drive(callback: Callback, losses: list[float], log_interval: int = 1) -> int:
    """Feeds losses one by one; the step at which the callback stopped, or 0."""
    trainer = SimpleNamespace(config=replace(FAST, log_interval=log_interval), step_count=0, eval_data=None)
    callback.on_train_begin(trainer)  # type: ignore[arg-type]
    for step, loss in enumerate(losses, start=1):
        if callback.on_step_end(step, Losses({"loss": torch.tensor(loss)})) is False:
            return step
    return 0


def test_losses_are_fetched_once_and_only_when_read(monkeypatch):
    fetched = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: fetched.append(1) or original(self))
    losses = Losses({"loss": torch.tensor(1.5), "kl": torch.tensor(0.25)})
    assert "kl" in losses and list(losses) == ["loss", "kl"] and not fetched
    assert dict(losses) == {"loss": 1.5, "kl": 0.25} and losses["loss"] == 1.5
    assert fetched == [1]


# Progress


def test_progress_shows_a_bar_that_ends_at_the_last_step(capsys):
    trained(ProgressCallback())
    assert "10/10" in capsys.readouterr().err


def test_progress_prints_lines_where_tqdm_is_missing(monkeypatch, capsys):
    original = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name.startswith("tqdm"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    trained(ProgressCallback(), log_interval=5)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 5/10", "step 10/10"]


# Logging


def test_logging_writes_every_loss_at_its_interval_and_every_evaluation(caplog):
    with caplog.at_level(logging.INFO, logger="worldflux.training"):
        trained(LoggingCallback(log_interval=4), eval_interval=5, eval_data=MemoryProvider(seed=1))
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split("  ")[0] for line in lines] == ["step 4", "step 5", "step 8", "step 10"]
    assert all(f"  {name} " in lines[0] for name in ("fit", "noise", "loss", "grad_norm", "steps_per_second"))
    assert "  eval/fit " in lines[1] and "  eval/loss " in lines[1]


def test_wandb_gets_the_same_numbers_and_a_run_opened_here_is_closed(monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trained(LoggingCallback(log_interval=5, use_wandb=True))
    (run,) = wandb.runs
    assert (run.project, run.config["seed"], run.ended) == ("worldflux", 42, 0)
    assert [(row["global_step"], set(row) >= {"loss", "fit"}) for row in run.rows] == [(5, True), (10, True)]


def test_wandb_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingDependencyError, match=re.escape(install_hint("wandb"))):
        LoggingCallback(use_wandb=True)


# Checkpoints


def test_checkpoints_come_at_their_interval_and_at_the_end(tmp_path):
    trained(CheckpointCallback(tmp_path, save_interval=4))
    assert checkpoints(tmp_path) == ["step-00000004", "step-00000008", "step-00000010"]


def test_without_an_interval_of_its_own_the_configuration_rules(tmp_path):
    trained(CheckpointCallback(tmp_path / "a"), save_interval=5)
    trained(CheckpointCallback(tmp_path / "b", save_interval=10_000), save_interval=5)
    assert checkpoints(tmp_path / "a") == ["step-00000005", "step-00000010"]
    assert checkpoints(tmp_path / "b") == ["step-00000010"]


def test_only_the_newest_checkpoints_are_kept_and_nothing_else_is_touched(tmp_path):
    (tmp_path / "notes").mkdir()
    trained(CheckpointCallback(tmp_path, save_interval=1, max_checkpoints=2), steps=6)
    assert checkpoints(tmp_path) == ["notes", "step-00000005", "step-00000006"]
    # A shorter run that replaces it keeps its own, although their numbers are lower.
    trained(CheckpointCallback(tmp_path, save_interval=1, max_checkpoints=2, overwrite=True), steps=3)
    assert checkpoints(tmp_path) == ["notes", "step-00000002", "step-00000003"]


def test_a_diverged_model_does_not_replace_a_good_checkpoint(tmp_path):
    model = NoisyRegression()
    model.poison_at = 5
    config = replace(FAST, log_interval=100)
    with pytest.raises(TrainingError, match="noise is not finite at gradient step 5"):
        Trainer(model, config, [CheckpointCallback(tmp_path, save_interval=3)]).train(MemoryProvider())
    assert checkpoints(tmp_path) == ["step-00000003"]


@pytest.mark.parametrize(
    "build,message",
    [
        (lambda: CheckpointCallback("x", save_interval=0), "save_interval is 0"),
        (lambda: CheckpointCallback("x", max_checkpoints=0), "max_checkpoints is 0"),
        (lambda: LoggingCallback(log_interval=0), "log_interval is 0"),
        (lambda: EarlyStoppingCallback(patience=0), "patience is 0"),
        (lambda: EarlyStoppingCallback(min_delta=-1.0), "min_delta is -1.0"),
    ],
)
def test_a_number_that_cannot_work_is_refused(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()


# Early stopping


def test_early_stopping_waits_for_its_patience_since_the_last_improvement():
    assert drive(EarlyStoppingCallback(patience=3, min_delta=0.0), [5.0, 4.0, 4.0, 4.0, 4.0, 4.0]) == 5
    assert drive(EarlyStoppingCallback(patience=3), [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]) == 0


def test_early_stopping_counts_only_improvements_of_at_least_min_delta():
    falling = [5.0 - 0.01 * i for i in range(10)]
    assert drive(EarlyStoppingCallback(patience=4, min_delta=0.1), falling) == 5
    assert drive(EarlyStoppingCallback(patience=4, min_delta=0.001), falling) == 0


def test_early_stopping_compares_means_over_the_log_interval():
    # Each pair has a mean of 3, 2, 1; single steps rise every other time.
    noisy = [1.0, 5.0, 0.0, 4.0, -1.0, 3.0]
    assert drive(EarlyStoppingCallback(patience=3, min_delta=0.5), noisy, log_interval=2) == 0
    flat = [1.0, 5.0, 1.0, 5.0, 1.0, 5.0]
    assert drive(EarlyStoppingCallback(patience=4, min_delta=0.5), flat, log_interval=2) == 6


def test_early_stopping_can_watch_the_evaluation():
    callback = EarlyStoppingCallback("eval/loss", patience=2, min_delta=1e9)
    trainer = trained(callback, eval_interval=1, eval_data=MemoryProvider(seed=1))
    assert trainer.step_count == 3 and callback.best_step == 1


def test_callbacks_of_one_type_continue_from_their_own_states(tmp_path):
    def watching() -> list[EarlyStoppingCallback]:
        return [EarlyStoppingCallback("loss", patience=100), EarlyStoppingCallback("fit", patience=100)]

    first, second = watching(), watching()
    trained(*first, steps=4).save_checkpoint(tmp_path / "saved")
    resumed = Trainer(NoisyRegression(), FAST, second)
    resumed.load_checkpoint(tmp_path / "saved")
    resumed.train(MemoryProvider(), 0)
    assert [callback.best for callback in second] == [callback.best for callback in first]
    assert first[0].best != first[1].best


def test_early_stopping_names_the_losses_there_are():
    with pytest.raises(ConfigurationError, match=r"'lost', .*did you mean 'loss'.* There are: fit, noise, loss"):
        trained(EarlyStoppingCallback("lost"))
    with pytest.raises(ConfigurationError, match="the trainer has no eval_data"):
        trained(EarlyStoppingCallback("eval/loss"))


def test_the_log_has_the_models_health_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    limit = Threshold(0.5, "above", "Do something.")

    class Patient(NoisyRegression):
        values = iter([0.1, 0.7, 0.8, 0.2, 0.9])

    trainer = Trainer(Patient(), FAST, [LoggingCallback(log_interval=2)])
    trainer.health = lambda: Health((HealthMetric("fever", next(Patient.values), limit),))  # type: ignore[method-assign]
    with caplog.at_level(logging.INFO, "worldflux.training"):
        trainer.train(MemoryProvider())
    logged = re.findall(r"health/fever (\S+)", caplog.text)
    assert logged == ["0.1", "0.7", "0.8", "0.2", "0.9"]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "step 4  fever 0.7 (bad above 0.5): Do something.",
        "step 10  fever 0.9 (bad above 0.5): Do something.",
    ]


def test_health_needs_a_step_and_leaves_training_as_it_was() -> None:
    model = create_world_model("dreamerv3:tiny", obs_shape=(3,), action_dim=2)
    trainer = Trainer(model, TrainingConfig(device="cpu"))
    with pytest.raises(TrainingError, match="no gradient step"):
        trainer.health()
    trainer.step(MemoryProvider().sample(4, 6))
    before = torch.get_rng_state()
    first, second = trainer.health(), trainer.health()
    assert first.metrics() == second.metrics() and "kl_at_free_nats" in first.metrics()
    assert torch.equal(torch.get_rng_state(), before) and model.training
