"""`worldflux train-offline`: a model is trained on a file, stopped and resumed."""

from __future__ import annotations

import csv
import os
import shlex
import signal
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from worldflux import create_world_model
from worldflux.cli.main import main
from worldflux.cli.run_callbacks import OfflineLog
from worldflux.cli.runs import RunConfig, find_runs
from worldflux.training import ReplayBuffer
from worldflux.training.checkpoint import checkpoints_in

MODEL = ["--set", "units=8", "--set", "hidden_dim=8", "--set", "deter_dim=16", "--set", "action_type=discrete"]
TINY = [*MODEL, "--batch-size", "2", "--seq-len", "4", "--steps", "12", "--log-interval", "4", "--eval-interval", "6"]


@pytest.fixture(autouse=True)
def _with_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Creates a directory with `data.npz`: ten episodes of eight steps."""
    monkeypatch.chdir(tmp_path)
    rng, buffer = np.random.default_rng(0), ReplayBuffer(200, (3,), 2)
    for _ in range(10):
        obs, ends = rng.normal(size=(9, 3)).astype(np.float32), np.arange(8) == 7
        actions = np.eye(2, dtype=np.float32)[rng.integers(2, size=8)]
        buffer.add_episode(obs, actions, rng.normal(size=8).astype(np.float32), ends)
    buffer.save("data.npz")


def weights(directory: str | Path) -> dict[str, torch.Tensor]:
    return create_world_model(str(directory)).state_dict()


def log(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_model_is_trained_and_saved(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-offline", "dreamerv3:tiny", "data.npz", *TINY]) == 0
    run = Path("runs/data/dreamerv3-tiny/1")
    out, err = capsys.readouterr()
    rows = log(run / "logs" / "progress.csv")
    losses = {int(row["time/total_timesteps"]): float(row["train/loss"]) for row in rows if row["train/loss"]}
    kept = {int(row["time/total_timesteps"]): float(row["eval/loss"]) for row in rows if row["eval/loss"]}
    assert (list(losses), list(kept)) == ([4, 8, 12], [6, 12])
    assert out == f"{run}: 12 gradient steps, loss {kept[12]:.4g} on the held-out steps.\n"
    assert f"step 12/12  loss {losses[12]:.4g}, {kept[12]:.4g} on the held-out steps" in err
    assert err.count("\n") == 1 + 12 + 1  # no redrawn bar
    config = create_world_model(str(run / "model")).config
    assert (config.obs_shape, config.action_dim, config.action_type) == ((3,), 2, "discrete")
    assert [path.name for path in checkpoints_in(run / "checkpoints")] == ["step-00000012"]


def test_config_json_starts_the_same_run_again() -> None:
    assert main(["train-offline", "dreamerv3:tiny", "data.npz", *TINY, "--seed", "5", "--eval-share", "0"]) == 0
    (first,) = find_runs(Path("runs"))
    assert main(shlex.split(RunConfig.read(first).command)[1:]) == 0
    first, second = find_runs(Path("runs"))
    before, after = weights(first / "model"), weights(second / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (
        log(first / "logs" / "progress.csv")[0]["train/loss"] == log(second / "logs" / "progress.csv")[0]["train/loss"]
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_resumed_run_ends_like_one_that_was_never_stopped(
    number: signal.Signals, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train-offline", "dreamerv3:tiny", "data.npz", *TINY, "--run"]
    assert main([*args, "whole"]) == 0
    logged = OfflineLog.on_step_end

    def on_step_end(self: OfflineLog, step: int, losses: Mapping[str, float]) -> None:
        if step == 5:
            os.kill(os.getpid(), number)
        logged(self, step, losses)

    with monkeypatch.context() as patched:
        patched.setattr(OfflineLog, "on_step_end", on_step_end)
        assert main([*args, "run"]) == status
    assert not Path("run/model").exists()
    before = Path("run/logs/progress.csv").read_bytes()
    again = "saved at step 5. Resume with: worldflux train-offline --resume run\n"
    assert capsys.readouterr().err.endswith(again)
    assert main(["train-offline", "--resume", "run"]) == 0
    assert "resuming at step 5 of 12" in capsys.readouterr().err
    assert Path("run/logs/progress.csv").read_bytes() == before
    assert [row["time/total_timesteps"] for row in log(Path("run/logs/progress-2.csv"))] == ["6", "8", "12", "12"]
    whole, resumed = weights("whole/model"), weights("run/model")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "MODEL and DATA are missing"),
        (
            ["dreamerv3:tiny", "nothing.npz"],
            "There is no file 'nothing.npz'. To record one: worldflux collect ENV",
        ),
        (["dreamerv3:tini", "data.npz"], "did you mean 'dreamerv3:tiny'?"),
        (["dreamerv3:tiny", "data.npz", "--steps", "0"], "total_steps is 0"),
        (["dreamerv3:tiny", "data.npz", "--eval-share", "2"], "eval_data is 2.0"),
        (["dreamerv3:tiny", "data.npz", "--set", "unit=8"], "did you mean 'units'?"),
        (["dreamerv3:tiny", "data.npz", "--resume", "run"], "--resume takes the MODEL, DATA and all other settings"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_no_directory(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train-offline", *args]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert [path.name for path in Path().iterdir()] == ["data.npz"]


def test_data_that_have_gone_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    RunConfig("train-offline", "dreamerv3:tiny", "gone.npz", {"steps": 3}).write(Path())
    assert main(["train-offline", "--resume", "."]) == 2
    assert "There is no file 'gone.npz'" in capsys.readouterr().err


def test_a_directory_of_files_can_stay_on_the_disk(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recordings").mkdir()
    for number in range(2):
        part = ReplayBuffer(100, (3,), 2)
        part.add_episodes_of(ReplayBuffer.load("data.npz"), first=5 * number)
        part.save(f"recordings/{number}.npz")
    trained = []
    for storage in ("memory", "in_place"):
        assert main(["train-offline", "dreamerv3:tiny", "recordings", *TINY, "--storage", storage]) == 0
        assert "120 steps of data" in capsys.readouterr().err
        run = max(find_runs(Path("runs")))
        assert run.parent.parent.name == "recordings" and RunConfig.read(run).settings["storage"] == storage
        trained.append(weights(run / "model"))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert main(["imagine", str(run), "--context", "2", "--horizon", "3", "--windows", "4"]) == 0
    assert '"data": "episodes of recordings"' in Path("imagination/imagination.json").read_text()
