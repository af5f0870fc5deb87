"""`--track`: a run is logged to Weights & Biases and MLflow, also when it is stopped and resumed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.trackers import FakeMlflow, FakeWandb

from worldflux.cli.main import main
from worldflux.cli.run_callbacks import Progress
from worldflux.cli.runs import RunConfig, read_evaluations
from worldflux.training import ReplayBuffer

CORRIDOR = "helpers.envs:Corridor"
MODEL = ["--set", "units=8", "--set", "hidden_dim=8", "--set", "deter_dim=16", "--batch-size", "2", "--seq-len", "4"]
TINY = [*MODEL, "--learning-starts", "16", "--buffer-size", "500", "--train-ratio", "4", "--seed", "3"]
SHORT = ["--steps", "40", "--eval-interval", "20", "--eval-episodes", "2", "--run", "group/run"]
BOTH = ["--track", "wandb", "--track", "mlflow"]


@pytest.fixture(autouse=True)
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[FakeWandb, FakeMlflow]:
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    made = FakeWandb(), FakeMlflow()
    for name, module in zip(("wandb", "mlflow"), made, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    return made


def train(*args: str) -> int:
    return main(["train", "dreamerv3:tiny", CORRIDOR, *TINY, *SHORT, *args])


def logged(run: str = "group/run") -> list[dict[str, float]]:
    lines = (Path(run) / "logs" / "progress.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_settings_scores_and_losses_arrive(
    tools: tuple[FakeWandb, FakeMlflow], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*BOTH) == 0
    wandb, mlflow = tools
    (run,), (other,) = wandb.runs, mlflow.runs.values()
    assert (run.project, run.name, run.ended) == ("worldflux", "group/run", 0)
    assert (other.experiment, other.name, other.status) == ("worldflux", "group/run", "FINISHED")
    assert run.axes == {"global_step": None, "*": "global_step"}
    config = RunConfig.read(Path("group/run"))
    for shown in (run.config, other.params):
        assert (shown["model"], shown["task"], shown["steps"], shown["seed"]) == ("dreamerv3:tiny", CORRIDOR, 40, 3)
        assert shown["versions.torch"] == config.versions["torch"] and shown["command"] == config.command
    scores = [(row.step, row.score) for row in read_evaluations(Path("group/run/evaluations.csv"))]
    name = "eval/mean_reward"
    assert [(row["global_step"], row[name]) for row in run.rows if name in row] == scores
    assert [(step, row[name]) for step, row in other.rows if name in row] == scores
    losses = [row["train/loss"] for row in logged() if "train/loss" in row]
    assert losses
    assert np.allclose([row["train/loss"] for row in run.rows if "train/loss" in row], losses)
    assert np.allclose([row["train/loss"] for _, row in other.rows if "train/loss" in row], losses)
    err = capsys.readouterr().err
    assert "logging to Weights & Biases, run w0\n" in err and "logging to MLflow, run m0\n" in err


def test_a_resumed_run_continues_the_tracked_one(
    tools: tuple[FakeWandb, FakeMlflow], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Progress._on_step

    def on_step(self: Progress) -> bool:
        if self.num_timesteps == 30:
            os.kill(os.getpid(), signal.SIGINT)
        return shown(self)

    with monkeypatch.context() as patched:
        patched.setattr(Progress, "_on_step", on_step)
        assert train(*BOTH) == 130
    wandb, mlflow = tools
    assert wandb.runs[0].ended == 1 and mlflow.runs["m0"].status == "KILLED"
    assert json.loads(Path("group/run/tracking.json").read_text()) == {"tracking": 1, "wandb": "w0", "mlflow": "m0"}
    assert main(["train", "--resume", "group/run"]) == 0
    first, second = wandb.runs
    assert (second.id, second.given["resume"], second.ended) == ("w0", "allow", 0)
    assert list(mlflow.runs) == ["m0"] and mlflow.runs["m0"].status == "FINISHED"
    steps = [[row["global_step"] for row in run.rows if "eval/mean_reward" in row] for run in (first, second)]
    assert steps == [[20], [40]]
    Path("group/run/tracking.json").write_text('{"tracking": 2}')
    assert main(["train", "--resume", "group/run", "--steps", "50"]) == 2


def test_an_error_is_told_to_the_tool(tools: tuple[FakeWandb, FakeMlflow], monkeypatch: pytest.MonkeyPatch) -> None:
    def on_step(self: Progress) -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr(Progress, "_on_step", on_step)
    with pytest.raises(ZeroDivisionError):
        train(*BOTH)
    assert tools[0].runs[0].ended == 1 and tools[1].runs["m0"].status == "FAILED"


def test_names_come_from_the_option_or_the_environment(
    tools: tuple[FakeWandb, FakeMlflow], monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = ReplayBuffer(100, (2,), 2)
    for _ in range(4):
        buffer.add_episode(np.zeros((9, 2)), np.eye(2)[np.arange(8) % 2], np.zeros(8), np.arange(8) == 7)
    buffer.save("data.npz")
    args = ["train-offline", "dreamerv3:tiny", "data.npz", *MODEL, "--steps", "4", "--log-interval", "2", *BOTH]
    assert main([*args, "--eval-interval", "2", "--track-project", "mine", "--seeds", "1", "2"]) == 0
    wandb, mlflow = tools
    assert [(run.project, run.name, run.ended) for run in wandb.runs] == [
        ("mine", f"data/dreamerv3-tiny/{number}", 0) for number in (1, 2)
    ]
    assert [run.experiment for run in mlflow.runs.values()] == ["mine", "mine"]
    assert [row["global_step"] for row in wandb.runs[0].rows if "train/loss" in row] == [2, 4]
    assert [step for step, row in mlflow.runs["m1"].rows if "eval/loss" in row] == [2, 4]
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_NAME", "called")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    mlflow.experiment = "theirs"
    assert main(args) == 0
    assert (wandb.runs[-1].project, wandb.runs[-1].name) == ("theirs", "called")
    assert mlflow.runs["m2"].experiment == "theirs"


def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        assert train("--track", name) == 2
        err = capsys.readouterr().err
        assert f"needs {name}. Install it with: pip install" in err and f"[{name}]" in err
    assert not Path("group").exists()


def test_a_tool_that_fails_stops_no_training(
    tools: tuple[FakeWandb, FakeMlflow],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(**given: object) -> None:
        raise RuntimeError("api_key not configured\nand more")

    def refuse_to_end(status: str) -> None:
        raise ConnectionError("no network")

    def unreachable(values: object, step: int) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(tools[1], "log_metrics", unreachable)
    assert train("--track", "mlflow") == 0
    (warning,) = [message for message in caplog.messages if "MLflow" in message]
    assert warning.startswith("MLflow cannot log step ") and "no network. Training continues." in warning
    monkeypatch.setattr(tools[1], "end_run", refuse_to_end)
    caplog.clear()
    assert train("--track", "mlflow", "--run", "second") == 0
    assert "MLflow cannot close run m1: no network" in caplog.messages
    assert Path("second/agent.zip").is_file()
    monkeypatch.setattr(tools[0], "init", refuse)
    assert train("--track", "wandb", "--run", "other") == 2
    message = "Weights & Biases cannot start a run: api_key not configured Log in with: wandb login."
    assert message in capsys.readouterr().err
