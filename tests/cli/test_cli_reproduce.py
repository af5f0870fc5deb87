"""`worldflux reproduce`: a run is run again, and its scores are compared."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from worldflux.cli.main import main
from worldflux.cli.runs import RunConfig, find_runs, read_evaluations, write_evaluations
from worldflux.training import ReplayBuffer

CORRIDOR = "helpers.envs:Corridor"
MODEL = ["--set", "units=8", "--set", "hidden_dim=8", "--set", "deter_dim=16", "--batch-size", "2", "--seq-len", "4"]
TINY = [*MODEL, "--learning-starts", "16", "--buffer-size", "500", "--train-ratio", "4"]
SHORT = ["--steps", "40", "--eval-interval", "20", "--eval-episodes", "2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of a run."""
    directory = tmp_path_factory.mktemp("finished")
    for seed in ("3", "4"):
        where = ["--seed", seed, "--run", str(directory / seed)]
        assert main(["train", "dreamerv3:tiny", CORRIDOR, *TINY, *SHORT, *where]) == 0
    return directory


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of one of them in the working directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "3", "my run")
    return Path("my run")


def change(run: Path, **fields: Any) -> RunConfig:
    config = replace(RunConfig.read(run), **fields)
    config.write(run)
    return config


def test_the_same_code_gives_the_same_scores_and_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "my run"]) == 0
    out, err = capsys.readouterr()
    assert "worldflux: my run: the code, the versions and the machine are the same\n" in err
    scores = [row.score for row in read_evaluations(run / "evaluations.csv")]
    lines = out.splitlines()[1:]  # behind that of worldflux train
    assert lines[0] == "my run and my run-reproduced"
    assert [line.split() for line in lines[2:4]] == [
        [str(step), f"{score:.6g}", f"{score:.6g}", "identical"] for step, score in zip((20, 40), scores, strict=True)
    ]
    assert lines[-1] == "  identical at all steps, and so are the weights at the end"
    first, second = RunConfig.read(run), RunConfig.read(Path("my run-reproduced"))
    assert (second.settings, second.model, second.task) == (first.settings, first.model, first.task)
    # Once more, it only compares.
    assert main(["reproduce", "my run"]) == 0
    out, err = capsys.readouterr()
    assert "has finished its 40 steps" in out and out.endswith(lines[-1] + "\n") and "step 20" not in err


def test_other_scores_of_an_asynchronous_run_are_no_failure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(run, settings={**RunConfig.read(run).settings, "asynchronous": True})
    rows = read_evaluations(run / "evaluations.csv")
    write_evaluations(run / "evaluations.csv", [rows[0], replace(rows[1], score=rows[1].score + 50)])
    assert main(["reproduce", "my run"]) == 0
    assert "which may come from --asynchronous" in capsys.readouterr().out


def test_other_scores_with_the_same_code_are_a_failure(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_evaluations(run / "evaluations.csv")
    write_evaluations(run / "evaluations.csv", [rows[0], replace(rows[1], score=rows[1].score + 0.25)])
    assert main(["reproduce", "my run"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].endswith(" identical") and lines[-2].endswith(" differs by 0.25")
    assert lines[-1] == (
        "  the largest difference is 0.25; the weights at the end are identical, although the code, the versions and "
        "the machine are the same"
    )
    # Under other circumstances, or after a stop, the same difference is no failure.
    config = RunConfig.read(run)
    part = {"started": "", "versions": config.versions, "commits": config.commits, "machine": config.machine}
    change(run, resumed=[{**part, "step": 0}])
    assert main(["reproduce", "my run"]) == 1
    change(run, resumed=[{**part, "step": 20}])
    capsys.readouterr()
    assert main(["reproduce", "my run"]) == 0
    out = capsys.readouterr().out
    assert out.endswith(", which may come from a stop: a resumed run begins new episodes\n")
    change(
        run, resumed=[], versions={**config.versions, "torch": "1.0"}, commits={**config.commits, "worldflux": "abc"}
    )
    assert main(["reproduce", "my run"]) == 0
    out, err = capsys.readouterr()
    assert "which may come from what has changed" in out.splitlines()[-1]
    table = [line.split() for line in err.splitlines()]
    assert ["then", "now"] in table and ["torch", "1.0", config.versions["torch"]] in table
    assert ["commit", "of", "worldflux", "abc"] in [words[:4] for words in table]


def test_a_small_model_gets_one_thread_for_its_run_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads: list[int] = [6]
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    assert main(["reproduce", "my run", "--steps", "20"]) == 0
    assert threads == [6, 1, 6]
    assert RunConfig.read(Path("my run-reproduced")).machine["threads"] == "1"
    assert "threads" not in capsys.readouterr().err
    config = RunConfig.read(run)
    change(run, machine={**config.machine, "threads": "4"})
    assert main(["reproduce", "my run", "--steps", "20", "--output", "other"]) == 0
    assert "worldflux: torch used 4 threads then, and 1 now\n" in capsys.readouterr().err


def test_unknown_commits_are_no_difference(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("worldflux.cli.provenance.commit_of", lambda file: None)  # as after pip install .
    monkeypatch.setattr("worldflux.cli.provenance._installed_commit", lambda: None)
    change(run, commits={})
    assert main(["reproduce", "my run", "--steps", "20"]) == 0
    err = capsys.readouterr().err
    assert "worldflux: my run: the commit of worldflux is not known" in err and "may differ" not in err
    assert "worldflux: my run: the versions and the machine are the same\n" in err
    # Nobody knows whether the code has changed, so that other scores are no failure.
    rows = read_evaluations(run / "evaluations.csv")
    write_evaluations(run / "evaluations.csv", [replace(row, score=row.score + 0.25) for row in rows])
    assert main(["reproduce", "my run", "--steps", "20"]) == 0
    assert capsys.readouterr().out.endswith(", which may come from the code, whose commit is not known\n")


def test_only_the_beginning_is_reproduced(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "my run", "--steps", "25", "--output", "short"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-2:-1]] == ["20"]
    assert lines[-1] == "  identical at all steps"  # the weights are those of another step
    assert RunConfig.read(Path("short")).settings["steps"] == 25


def test_all_seeds_are_reproduced_and_the_resumed_one_without_a_stop(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "seeds")
    config = RunConfig.read(Path("seeds/4"))
    now = {"versions": config.versions, "commits": config.commits, "machine": config.machine}
    change(Path("seeds/4"), resumed=[{"started": "", "step": 30, **now}])
    assert main(["reproduce", "seeds", "--steps", "20"]) == 0
    out, err = capsys.readouterr()
    assert [str(path) for path in find_runs(Path("seeds-reproduced"))] == ["seeds-reproduced/3", "seeds-reproduced/4"]
    first = [read_evaluations(Path("seeds", seed, "evaluations.csv"))[0].score for seed in ("3", "4")]
    mean = np.mean(first)
    assert out.splitlines()[-1] == f"mean of the last scores of 2 runs: {mean:.6g} then, {mean:.6g} now"
    assert "worldflux: seeds/4 was resumed at step 30; it is reproduced without a stop\n" in err


def test_a_run_without_evaluations_is_compared_by_its_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng, buffer = np.random.default_rng(0), ReplayBuffer(200, (3,), 2)
    for _ in range(10):
        obs, actions = rng.normal(size=(9, 3)).astype(np.float32), np.eye(2, dtype=np.float32)[rng.integers(2, size=8)]
        buffer.add_episode(obs, actions, rng.normal(size=8).astype(np.float32), np.arange(8) == 7)
    buffer.save("data.npz")
    args = [*MODEL, "--set", "action_type=discrete", "--steps", "8", "--log-interval", "4", "--eval-share", "0"]
    assert main(["train-offline", "dreamerv3:tiny", "data.npz", *args, "--run", "run"]) == 0
    assert main(["reproduce", "run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:-1]] == ["4", "8"] and lines[-4].endswith("training loss")
    assert lines[-1] == "  identical at all steps, and so are the weights at the end"
    Path("data.npz").unlink()
    assert main(["reproduce", "run", "--output", "again"]) == 2
    assert "The data of run are gone: there is no file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "There is no run in nowhere."),
        (["my run", "--steps", "41"], "--steps is 41, but my run has 40. Choose fewer."),
        (["my run", "--steps", "0"], "steps is 0"),
        (["my run", "--output", "my run/again"], "overlap. Choose another --output."),
        (["my run", "--output", "taken"], "taken exists and is not an empty directory."),
        (["my run", "--output", "other"], "other has a run with other settings. Choose another --output."),
    ],
)
def test_what_cannot_be_reproduced_is_said(
    args: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken").mkdir()
    Path("taken/file").touch()
    Path("other").mkdir()
    config = RunConfig.read(run)
    replace(config, settings={**config.settings, "seed": 9}).write(Path("other"))
    assert main(["reproduce", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err.splitlines()[-1]
    assert not Path("my run-reproduced").exists()


@pytest.mark.parametrize("task", ["no_such_module:Env", "/gone/my_env.py:Env"])
def test_a_missing_environment_is_named(task: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**content, "task": task}))
    assert main(["reproduce", "my run"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("worldflux: The environment of my run cannot be found. There is no ")
    assert task.rpartition(":")[0] in err


def test_an_interrupted_reproduction_is_continued(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "my run", "--steps", "20"]) == 0
    capsys.readouterr()
    assert main(["reproduce", "my run"]) == 0  # of which the first half is there
    out, err = capsys.readouterr()
    assert "resuming at step 20 of 40" in err
    assert out.endswith("  identical at all steps, and so are the weights at the end\n")
