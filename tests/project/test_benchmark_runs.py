"""Runs of a benchmark: what they write, how they go on, and what they refuse."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import kill, start, wait_for
from protocols import ATARI, DMC, PROTOCOLS
from run_files import RunRecord, RunSettings, check_settings, held, run_directory
from score_files import read_scores
from stable_baselines3.common.callbacks import BaseCallback
from suite_run import run
from suite_runner import find_protocol, find_tasks, main, make_settings, overrides

from worldflux.envs.suites import atari_name, dmc_name
from worldflux.errors import CheckpointError, ConfigurationError, TrainingError

pytest.importorskip("dm_control")

REPEAT = 50
"""So that an episode has 20 steps of the agent."""
DREAMER = RunSettings(
    protocol="dreamerv3_dmc_proprio",
    model="dreamerv3:tiny",
    task="cartpole-balance",
    seed=3,
    steps=100 * REPEAT,
    envs=1,
    action_repeat=REPEAT,
    options={"action_repeat": REPEAT},
    eval_every=0,
    eval_episodes=0,
    agent={"train_ratio": 1, "batch_size": 2, "seq_len": 4, "learning_starts": 10},
    model_fields={
        "deter_dim": 32,
        "hidden_dim": 8,
        "stoch_discrete": 4,
        "stoch_classes": 4,
        "units": 8,
        "imagination_horizon": 3,
    },
)
TDMPC2 = replace(
    DREAMER,
    protocol="tdmpc2_dmc_proprio",
    model="tdmpc2:tiny",
    eval_every=30 * REPEAT,
    eval_episodes=2,
    agent={"train_ratio": 4, "batch_size": 4, "learning_starts": 20, "planner": None},
    model_fields={"latent_dim": 16, "hidden_dim": 16, "mlp_dim": 16, "enc_dim": 16, "num_q_networks": 2},
)


class At(BaseCallback):
    """Sends a signal to its own process at a step, or waits for one from outside."""

    def __init__(self, step: int, number: int | None = None) -> None:
        super().__init__()
        self.step, self.number = step, number

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step:
            if self.number is None:
                time.sleep(600)
            else:
                signal.raise_signal(self.number)
        return True


def go(out: Path, settings: RunSettings, **arguments: Any) -> RunRecord | None:
    return run(out, settings, device="cpu", checkpoint_every=30 * REPEAT, **arguments)


def hang_at(out: Path, settings: RunSettings, step: int) -> None:
    """For a process of its own."""
    torch.set_num_threads(1)
    go(out, settings, callbacks=[At(step)])


def steps_of(out: Path, settings: RunSettings) -> list[int]:
    path = run_directory(out, settings.task, settings.seed) / "scores.csv"
    return [row.step // REPEAT for row in read_scores(path)]


def test_training_episodes_are_written_by_the_steps_of_the_simulator(tmp_path: Path) -> None:
    record = go(tmp_path, DREAMER)
    assert record is not None and record.result is not None
    assert record.result["step"] == 5000 and record.result["gradient_steps"] > 5
    rows = read_scores(tmp_path / "cartpole-balance.csv")
    assert rows == read_scores(tmp_path / "cartpole-balance" / "seed-3" / "scores.csv")
    assert [row.step for row in rows] == [1000, 2000, 3000, 4000, 5000]
    assert {row.seed for row in rows} == {3} and all(0 < row.score < 1000 for row in rows)
    assert not (tmp_path / "cartpole-balance" / "seed-3" / "checkpoints").exists()


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = go(tmp_path, replace(DREAMER, steps=20 * REPEAT))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cartpole-balance" / "seed-3").rglob("*.*")}
    assert go(tmp_path, replace(DREAMER, steps=20 * REPEAT)) == first
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_a_killed_run_goes_on_from_its_checkpoint_and_repeats_no_score(tmp_path: Path) -> None:
    scores = run_directory(tmp_path, DREAMER.task, DREAMER.seed) / "scores.csv"
    process = start(hang_at, tmp_path, DREAMER, 85)
    wait_for(lambda: scores.exists() and scores.read_text().count("\n") == 5, process, timeout=240)
    time.sleep(0.2)
    kill(process)
    assert steps_of(tmp_path, DREAMER) == [20, 40, 60, 80]  # readable in the middle of a run
    record = RunRecord.read(scores.parent)
    assert record is not None and record.result is None

    record = go(tmp_path, DREAMER)
    assert record is not None and record.result is not None and record.result["step"] == 100 * REPEAT
    # The checkpoint is of step 60; the episode of step 80 was lost, and others began at 60.
    assert [part["from_step"] // REPEAT for part in record.parts] == [0, 60]
    assert steps_of(tmp_path, DREAMER) == [20, 40, 60, 80, 100]


def test_without_a_checkpoint_a_run_begins_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, DREAMER, callbacks=[At(25, signal.SIGINT)])
    shutil.rmtree(run_directory(tmp_path, DREAMER.task, DREAMER.seed) / "checkpoints")  # as if killed before the first
    record = go(tmp_path, DREAMER)
    assert record is not None and [part["from_step"] for part in record.parts] == [0, 0]
    assert steps_of(tmp_path, DREAMER) == [20, 40, 60, 80, 100]


def test_ctrl_c_saves_the_step_and_the_run_goes_on_there(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, DREAMER, callbacks=[At(50, signal.SIGINT)])
    record = go(tmp_path, DREAMER)
    assert record is not None and [part["from_step"] // REPEAT for part in record.parts] == [0, 50]
    assert steps_of(tmp_path, DREAMER) == [20, 40, 70, 90]  # the episode in flight was cut


def test_evaluations_stand_at_the_start_the_interval_and_the_end(tmp_path: Path) -> None:
    go(tmp_path, TDMPC2)
    assert steps_of(tmp_path, TDMPC2) == [0, 30, 60, 90, 100]


def test_evaluations_go_on_after_a_stop_without_the_first_one_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, TDMPC2, callbacks=[At(70, signal.SIGINT)])
    before = read_scores(tmp_path / "cartpole-balance.csv")
    go(tmp_path, TDMPC2)
    assert steps_of(tmp_path, TDMPC2) == [0, 30, 60, 90, 100]
    assert read_scores(tmp_path / "cartpole-balance.csv")[:3] == before


def test_many_environments_with_few_episodes_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go(tmp_path, replace(DREAMER, envs=4))
    assert "5000 steps in 4 environments are 1 whole episodes in each" in capsys.readouterr().err
    assert steps_of(tmp_path, DREAMER) == [80, 80, 80, 80]
    go(tmp_path, replace(DREAMER, seed=4))
    assert "whole episodes" not in capsys.readouterr().err


def test_two_processes_do_not_work_on_one_run(tmp_path: Path) -> None:
    directory = run_directory(tmp_path, DREAMER.task, DREAMER.seed)
    directory.mkdir(parents=True)
    with held(directory) as ours:
        assert ours
        assert go(tmp_path, DREAMER) is None
    with held(directory) as ours:
        assert ours


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"steps": 7}, "steps 5000; now it is steps 7"),
        ({"agent": {**DREAMER.agent, "train_ratio": 2}}, "'train_ratio': 1"),
        ({"model": "dreamerv3:size12m"}, "model 'dreamerv3:tiny'; now it is model 'dreamerv3:size12m'"),
        ({"task": "walker-walk", "model": "dreamerv3:size12m"}, "model 'dreamerv3:tiny'"),
    ],
)
def test_other_settings_in_the_same_directory_are_refused(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    directory = run_directory(tmp_path, DREAMER.task, DREAMER.seed)
    directory.mkdir(parents=True)
    RunRecord(DREAMER, {}, []).write(directory)
    check_settings(tmp_path, [DREAMER])
    check_settings(tmp_path, [replace(DREAMER, seed=8), replace(DREAMER, task="walker-walk", seed=8)])
    with pytest.raises(ConfigurationError, match="another --out") as raised:
        check_settings(tmp_path, [replace(DREAMER, **changed)])
    assert named in str(raised.value)


@pytest.mark.parametrize("text", ["", "{}", '{"benchmark_run": 9}', '{"benchmark_run": 1, "settings": {"x": 1}}'])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        RunRecord.read(tmp_path)


def options(**changed: Any) -> argparse.Namespace:
    names = ("steps", "envs", "eval_every", "eval_episodes", "checkpoint_every", "dtype", "compile")
    return argparse.Namespace(**{**dict.fromkeys(names), "model": "dreamerv3:size12m", "set": [], **changed})


def test_the_published_protocol_holds_where_nothing_else_is_said() -> None:
    dreamer, tdmpc2 = DMC["proprio"]
    settings = make_settings(options(), dreamer, "walker-walk", 0, dmc_name)
    assert (settings.steps, settings.envs, settings.options) == (500_000, 16, {"action_repeat": 1})
    assert (settings.agent, settings.model_fields, settings.eval_every) == ({}, {}, 0)
    settings = make_settings(options(model="tdmpc2:5m"), tdmpc2, "walker-walk", 0, dmc_name)
    assert (settings.steps, settings.eval_every, settings.eval_episodes) == (4_000_000, 100_000, 10)
    assert settings.agent_steps == 2_000_000


def test_what_is_set_goes_to_the_agent_or_to_the_model_for_all_tasks_or_for_one() -> None:
    given = ["train_ratio=64", "units=32", "walker_walk:train_ratio=16", 'planner_kwargs={"num_samples": 8}']
    agent, fields = overrides(given, "dreamerv3:tiny", "walker-walk", dmc_name)
    assert agent == {"train_ratio": 16, "planner_kwargs": {"num_samples": 8}} and fields == {"units": 32}
    agent, fields = overrides(given, "dreamerv3:tiny", "cup-catch", dmc_name)
    assert agent["train_ratio"] == 64
    settings = make_settings(options(dtype="bfloat16", compile="false"), DMC["proprio"][0], "cup-catch", 0, dmc_name)
    assert (settings.model_fields, settings.agent) == ({"dtype": "bfloat16"}, {"compile": False})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["train_ration=64"], "unknown setting 'train_ration'; did you mean 'train_ratio'"),
        (["train_ratio"], "expected NAME=VALUE"),
        (["units=1", "units=2"], "given twice"),
        (["seed=4"], "unknown setting 'seed'"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        overrides(given, "dreamerv3:tiny", "walker-walk", dmc_name)


def test_models_and_tasks_outside_of_a_suite_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'dreamerv3:size12m'"):
        find_protocol("dreamerv3:size13m", DMC["proprio"], "proprio")
    with pytest.raises(ConfigurationError, match="published nothing for atari100k"):
        find_protocol("tdmpc2:5m", ATARI["atari100k"], "atari100k")
    with pytest.raises(ConfigurationError, match="did you mean 'walker-walk'"):
        find_tasks(["walker-wlk"], DMC["proprio"][0], dmc_name)
    assert find_tasks(["ball_in_cup_catch", "cup-catch"], DMC["proprio"][0], dmc_name) == ["cup-catch"]
    assert len(find_tasks(None, ATARI["atari100k"][0], atari_name)) == 26


def test_evaluation_options_are_refused_where_training_episodes_count() -> None:
    with pytest.raises(ConfigurationError, match="has no evaluations"):
        make_settings(options(eval_every=10), DMC["proprio"][0], "cup-catch", 0, dmc_name)


def test_the_command_writes_everything_and_fails_below_an_accepted_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    given = [
        "--model",
        "tdmpc2:tiny",
        "--tasks",
        "cartpole_balance",
        "--seeds",
        "0",
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    given += ["--steps", "40", "--eval-every", "20", "--eval-episodes", "1", "--set", "learning_starts=1000"]
    given += [f"{name}={value}" for name, value in TDMPC2.model_fields.items()] + ["planner=null"]
    assert main("dmc", DMC, dmc_name, "", given) == 0  # nothing was published for so few steps
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[0])["step"] == 40
    assert any(line.startswith("| cartpole-balance | 40 | 1 |") for line in lines)
    assert {path.name for path in out.iterdir()} == {
        "cartpole-balance",
        "cartpole-balance.csv",
        "report.md",
        "report.png",
    }
    assert main("dmc", DMC, dmc_name, "", [*given, "--accept", "cartpole-balance=999.5"]) == 1
    assert main("dmc", DMC, dmc_name, "", [*given, "--accept", "cartpole-balance=1"]) == 0
    assert main("dmc", DMC, dmc_name, "", [*given, "--steps", "60"]) == 2
    assert "steps 40; now it is steps 60" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("script", "suite"), [("dmc", "proprio"), ("dmc", "vision"), ("atari", "atari100k")])
def test_the_smoke_run_passes(script: str, suite: str) -> None:
    path = Path(sys.modules["suite_runner"].__file__ or "").with_name(f"{script}.py")
    command = [sys.executable, str(path), "--smoke", "--suite", suite]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "smoke: passed" in done.stdout


def test_a_run_that_diverges_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def diverge(out: Path, settings: RunSettings, **arguments: Any) -> RunRecord:
        begun.append(settings.seed)
        directory = run_directory(out, settings.task, settings.seed)
        directory.mkdir(parents=True)
        RunRecord(settings, {"worldflux": "0", "torch": "2"}, []).write(directory)
        raise TrainingError("the loss is nan")

    monkeypatch.setattr("suite_runner.run", diverge)
    given = ["--model", "dreamerv3:tiny", "--tasks", "cup-catch", "--seeds", "0", "1", "--out", str(tmp_path)]
    assert main("dmc", DMC, dmc_name, "", given) == 1
    assert begun == [0, 1]


def test_protocols_of_all_suites_know_their_tasks() -> None:
    for protocol in PROTOCOLS.values():
        for task in protocol.tasks:
            low, high = protocol.anchors(task)
            assert low < high
    assert PROTOCOLS["dreamerv3_atari57"].anchors("pong") == (-20.7, 14.6)
