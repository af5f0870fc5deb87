"""`worldflux train`: the directory of a run, and resuming it."""

from __future__ import annotations

import json
import os
import shlex
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from worldflux import WorldFluxAgent
from worldflux.cli.main import main
from worldflux.cli.options import model_fields
from worldflux.cli.run_callbacks import Evaluations, Progress
from worldflux.cli.runs import FORMAT, Evaluation, RunConfig, find_runs, read_evaluations, run_of, write_evaluations
from worldflux.errors import CheckpointError, ConfigurationError
from worldflux.locks import using
from worldflux.training.checkpoint import checkpoints_in

CORRIDOR = "helpers.envs:Corridor"
MODEL = ["--set", "units=8", "--set", "hidden_dim=8", "--set", "deter_dim=16", "--batch-size", "2", "--seq-len", "4"]
TINY = [*MODEL, "--learning-starts", "16", "--buffer-size", "500", "--train-ratio", "4"]
SHORT = ["--steps", "60", "--eval-interval", "20", "--eval-episodes", "2", "--seed", "3"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(*args: str) -> int:
    return main(["train", "dreamerv3:tiny", CORRIDOR, *TINY, *args])


def stop_at(step: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends the signal at this step. A gradient step follows in the next one."""
    shown = Progress._on_step

    def on_step(self: Progress) -> bool:
        if self.num_timesteps == step:
            os.kill(os.getpid(), number)
        return shown(self)

    monkeypatch.setattr(Progress, "_on_step", on_step)


def test_a_run_has_a_directory_with_all_that_it_left(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*SHORT, "--checkpoint-interval", "30") == 0
    run = Path("runs/helpers.envs-Corridor/dreamerv3-tiny/1")
    out, err = capsys.readouterr()
    rows = read_evaluations(run / "evaluations.csv")
    assert [(row.step, row.episodes, row.seed) for row in rows] == [(20, 2, 3), (40, 2, 3), (60, 2, 3)]
    best = max(row.score for row in rows)
    at = next(row.step for row in rows if row.score == best)
    assert out == f"{run}: 60 steps, best evaluation {best:g} at step {at}.\n"
    assert [path.name for path in checkpoints_in(run / "checkpoints")] == ["step-00000030", "step-00000060"]
    assert WorldFluxAgent.load(run / "agent.zip").num_timesteps == 60
    assert WorldFluxAgent.load(run / "best_agent.zip").num_timesteps == at
    header = (run / "logs" / "progress.csv").read_text().splitlines()[0].split(",")
    assert {"eval/mean_reward", "rollout/ep_rew_mean", "time/total_timesteps", "train/loss"} <= set(header)
    logged = [json.loads(line) for line in (run / "logs" / "progress.json").read_text().splitlines()]
    assert [row["eval/mean_reward"] for row in logged if "eval/mean_reward" in row] == [row.score for row in rows]
    assert err.count("\n") == 2 + 20 + 3 + 1  # where, what, twentieths, evaluations, what comes next: no redrawn bar
    assert err.endswith(f"worldflux: next: worldflux eval {run}, worldflux plot {run}, worldflux report {run}\n")
    assert f"{run}, seed 3\n" in err and "one gradient step every 2 environment steps" in err


def test_config_json_starts_the_same_run_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--steps", "40", "--eval-interval", "20", "--n-envs", "2") == 0
    (first,) = find_runs(Path("runs"))
    config = RunConfig.read(first)
    assert config.settings["seed"] is not None  # drawn, and remembered
    assert (config.model, config.task, config.kind, config.frames_per_step) == ("dreamerv3:tiny", CORRIDOR, "train", 1)
    assert {"worldflux", "torch", "python"} <= set(config.versions)
    assert main(shlex.split(config.command)[1:]) == 0
    first, second = find_runs(Path("runs"))
    assert (first.name, second.name) == ("1", "2")
    assert RunConfig.read(second).settings == config.settings
    scores = [[row.score for row in read_evaluations(run / "evaluations.csv")] for run in (first, second)]
    assert scores[0] == scores[1]
    assert len(scores[0]) == 2
    capsys.readouterr()


def test_a_run_learns_from_recorded_data_too_also_when_it_is_resumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["collect", CORRIDOR, "-o", "data.npz", "--steps", "60", "--seed", "0"]) == 0
    recorded = ["--offline-data", "data.npz", "--offline-share", "0.75"]
    assert train(*SHORT, "--run", "whole", *recorded) == 0
    assert "with 75% of the windows from recorded data" in capsys.readouterr().err
    with monkeypatch.context() as patches:
        stop_at(30, signal.SIGINT, patches)
        assert train(*SHORT, "--run", "run", *recorded) == 130
    assert RunConfig.read(Path("run")).settings["offline_data"] == str(Path("data.npz").absolute())
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert main(["train", "--resume", "../run"]) == 0
    assert "with 75% of the windows from recorded data" in capsys.readouterr().err
    steps = [WorldFluxAgent.load(f"../{run}/agent.zip").trainer.step_count for run in ("run", "whole")]
    assert steps[0] == steps[1] > 0
    Path("../data.npz").unlink()
    assert main(["train", "--resume", "../run", "--steps", "70"]) == 2
    assert "data.npz" in capsys.readouterr().err
    assert train("--offline-share", "0.5") == 2
    assert train("--steps", "20", "--track-project", "mine") == 2
    told = capsys.readouterr().err
    assert "--offline-share is the share of --offline-data, which is missing" in told
    assert "--track-project is the project of --track, which is missing" in told


def test_an_asynchronous_run_stays_one_when_it_is_resumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patches:
        stop_at(30, signal.SIGINT, patches)
        assert train(*SHORT, "--asynchronous", "--run", "run") == 130
    assert RunConfig.read(Path("run")).settings["asynchronous"] is True
    assert "asynchronous: true\n" in Path("run/config.yaml").read_text()
    assert "learning while the environments step" in capsys.readouterr().err
    assert main(["train", "--resume", "run"]) == 0
    assert "learning while the environments step" in capsys.readouterr().err
    agent = WorldFluxAgent.load("run/agent.zip")
    assert train(*SHORT, "--run", "in turn") == 0
    assert (agent.num_timesteps, agent.trainer.step_count) == (
        60,
        WorldFluxAgent.load("in turn/agent.zip").trainer.step_count,
    )


@pytest.mark.parametrize("model", ["dreamerv3:tiny", "tdmpc2:tiny"])
def test_evaluations_change_nothing_in_the_training(model: str) -> None:
    env = "helpers.envs:Aim" if model.startswith("tdmpc2") else CORRIDOR
    fields = ["--set", "mlp_dim=16", "--set", "num_samples=16", "--set", "num_elites=4", *TINY[6:]]
    args = ["train", model, env, *(fields if model.startswith("tdmpc2") else TINY), "--steps", "40", "--seed", "3"]
    for name, options in (("without", ["--eval-interval", "0"]), ("with", ["--eval-interval", "7"])):
        assert main([*args, *options, "--eval-episodes", "1", "--run", name]) == 0
    without, evaluated = (WorldFluxAgent.load(f"{name}/agent.zip") for name in ("without", "with"))
    assert without.trainer.step_count == evaluated.trainer.step_count > 0
    before, after = without.model.state_dict(), evaluated.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_options_reach_the_agent_and_the_environment() -> None:
    args = ["train", "tdmpc2:tiny", "Pendulum-v1", "--steps", "6", "--eval-interval", "0", "--run", "here", "--planner"]
    options = ["none", "--action-repeat", "4", "--learning-rate", "1e-4", "--set", "mlp_dim=16", "--n-envs", "2"]
    assert main([*args, *options, "--device", "cpu"]) == 0
    agent = WorldFluxAgent.load("here/agent.zip")
    assert (agent.planner, agent.learning_rate, agent.model.config.mlp_dim, agent.n_envs) == (None, 1e-4, 16, 2)
    assert RunConfig.read(Path("here")).frames_per_step == 4
    assert not Path("here/evaluations.csv").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_is_saved_and_goes_on(
    number: signal.Signals, status: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stop_at(33, number, monkeypatch)
    assert train(*SHORT, "--run", "my run") == status
    out, err = capfd.readouterr()
    assert out == ""
    assert err.endswith("stopped; saved at step 34. Resume with: worldflux train --resume 'my run'\n")
    run = Path("my run")
    before = (run / "logs" / "progress.csv").read_bytes()
    config = RunConfig.read(run)
    assert not (run / "agent.zip").exists()

    assert main(["train", "--resume", "my run"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("my run: 60 steps, best evaluation ")
    assert f"worldflux: importing {CORRIDOR}, which config.json names\n" in err
    assert "resuming at step 34 of 60" in err
    assert [row.step for row in read_evaluations(run / "evaluations.csv")] == [20, 40, 60]
    assert (run / "logs" / "progress.csv").read_bytes() == before
    assert "time/total_timesteps" in (run / "logs" / "progress-2.csv").read_text()
    resumed = RunConfig.read(run)
    assert replace(resumed, resumed=[]) == config
    assert [(part["step"], part["versions"]) for part in resumed.resumed] == [(34, config.versions)]
    agent = WorldFluxAgent.load(run / "agent.zip")
    assert (agent.num_timesteps, agent.seed) == (60, 3)


def test_a_finished_run_says_so_and_takes_more_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*SHORT, "--run", "run") == 0
    before = Path("run/agent.zip").read_bytes()
    capsys.readouterr()
    for steps in ([], ["--steps", "40"]):
        assert main(["train", "--resume", "run", *steps]) == 0
        assert capsys.readouterr() == (
            "run has finished its 60 steps. To continue it with more steps: worldflux train --resume run --steps 120\n",
            "",
        )
    assert Path("run/agent.zip").read_bytes() == before
    assert main(["train", "--resume", "run", "--steps", "80"]) == 0
    assert capsys.readouterr().out.startswith("run: 80 steps")
    assert RunConfig.read(Path("run")).settings["steps"] == 80
    assert [row.step for row in read_evaluations(Path("run/evaluations.csv"))] == [20, 40, 60, 80]


def test_a_run_that_is_made_shorter_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        stop_at(33, signal.SIGINT, patched)
        assert train(*SHORT, "--run", "run") == 130
    assert main(["train", "--resume", "run", "--steps", "20"]) == 0
    out, err = capsys.readouterr()
    assert "worldflux: --steps 20 makes the run shorter: it ends at step 34 instead of 60\n" in err
    assert out.startswith("run: 34 steps")


def test_a_tiny_run_is_evaluated_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--steps", "12", "--eval-episodes", "1", "--run", "run") == 0
    assert [(row.step, row.episodes) for row in read_evaluations(Path("run/evaluations.csv"))] == [(12, 1)]
    assert " over 1 episode, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        ("16", "2 gradient steps per environment step"),
        ("8", "one gradient step per environment step"),
        ("0", "collecting without training (train_ratio 0)"),
    ],
)
def test_the_rate_of_gradient_steps_is_told_in_words(ratio: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--steps", "2", "--eval-interval", "0", "--train-ratio", ratio) == 0
    assert f"; {text}" in capsys.readouterr().err


def test_a_run_that_another_process_trains_is_not_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*SHORT, "--run", "run") == 0
    with using(Path("run")):
        # As if that process removed the checkpoint while it is read.
        (checkpoints_in(Path("run/checkpoints"))[-1] / "config.json").unlink()
        assert main(["train", "--resume", "run", "--steps", "80"]) == 2
    assert "run is in use" in capsys.readouterr().err


def test_what_a_kill_left_behind_the_checkpoint_is_done_again() -> None:
    assert train(*SHORT, "--run", "run") == 0
    rows = read_evaluations(Path("run/evaluations.csv"))
    unlikely = Evaluation(step=80, score=99.0, std=0.0, length=1.0, episodes=2, seconds=1e6, seed=3)
    write_evaluations(Path("run/evaluations.csv"), [*rows, unlikely])
    assert main(["train", "--resume", "run", "--steps", "80"]) == 0
    again = read_evaluations(Path("run/evaluations.csv"))
    assert again[:3] == rows
    assert again[3].step == 80
    assert again[3].score < 99
    assert 0 < again[3].seconds - rows[-1].seconds < 600


def test_a_result_of_fewer_steps_that_a_kill_left_is_written_again() -> None:
    assert train(*SHORT, "--run", "run") == 0
    result = Path("run/agent.zip")
    finished, old = result.stat(), result.read_bytes()
    assert main(["train", "--resume", "run", "--steps", "80"]) == 0
    new = WorldFluxAgent.load(result)
    result.write_bytes(old)  # as if the process had been killed after the last checkpoint
    os.utime(result, ns=(finished.st_atime_ns, finished.st_mtime_ns))
    assert main(["train", "--resume", "run"]) == 0
    again = WorldFluxAgent.load(result)
    assert again.num_timesteps == new.num_timesteps == 80
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), new.model.parameters(), strict=True))


def test_a_run_without_a_checkpoint_begins_anew(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*SHORT, "--run", "run") == 0
    for checkpoint in checkpoints_in(Path("run/checkpoints")):
        checkpoint.rename(checkpoint.with_name("gone"))
    Path("run/agent.zip").unlink()
    scores = [row.score for row in read_evaluations(Path("run/evaluations.csv"))]
    assert main(["train", "--resume", "run"]) == 0
    assert "run has no checkpoint yet, so it starts from the beginning" in capsys.readouterr().err
    assert [row.score for row in read_evaluations(Path("run/evaluations.csv"))] == scores


def test_the_best_agent_survives_worse_evaluations_and_resuming(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([1.0, 5.0, 3.0, 4.0])

    def evaluated(*args: Any, **options: Any) -> tuple[list[float], list[int]]:
        return [next(scores)] * 2, [7, 7]

    monkeypatch.setattr("worldflux.cli.run_callbacks.evaluate_policy", evaluated)
    assert train(*SHORT, "--run", "run") == 0
    assert main(["train", "--resume", "run", "--steps", "80"]) == 0
    assert [row.score for row in read_evaluations(Path("run/evaluations.csv"))] == [1, 5, 3, 4]
    assert WorldFluxAgent.load("run/best_agent.zip").num_timesteps == 40


def test_a_signal_ends_an_evaluation_which_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, asked = Evaluations._go_on, []

    def stopped(self: Evaluations, *args: Any) -> None:
        asked.append(self.num_timesteps)
        if len(asked) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        go_on(self, *args)

    monkeypatch.setattr(Evaluations, "_go_on", stopped)
    assert train(*SHORT, "--run", "run") == 130
    assert asked == [20] * 5
    assert read_evaluations(Path("run/evaluations.csv")) == []
    assert main(["train", "--resume", "run"]) == 0
    assert [row.step for row in read_evaluations(Path("run/evaluations.csv"))] == [20, 40, 60]


def test_an_error_in_the_environment_says_where_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from helpers.envs import Corridor

    stepped = Corridor.step

    def step(self: Corridor, action: int) -> Any:
        if getattr(self, "total", 0) == 30:
            raise ZeroDivisionError("in the environment")
        self.total = getattr(self, "total", 0) + 1  # type: ignore[attr-defined]
        return stepped(self, action)

    monkeypatch.setattr(Corridor, "step", step)
    with pytest.raises(ZeroDivisionError, match="in the environment"):
        train("--steps", "60", "--eval-interval", "0", "--run", "run")
    assert "saved at step 30. Resume with: worldflux train --resume run\n" in capsys.readouterr().err


def test_a_file_of_ones_own_is_found_again_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(__file__).parent.parent.joinpath("helpers", "envs.py").read_text(encoding="utf-8")
    (tmp_path / "my_env.py").write_text(source, encoding="utf-8")
    args = ["my_env.py:Corridor", *TINY, "--steps", "20", "--eval-interval", "0", "--run", "run"]
    assert main(["train", "dreamerv3:tiny", *args]) == 0
    assert RunConfig.read(Path("run")).task == f"{tmp_path / 'my_env.py'}:Corridor"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--resume", "../run", "--steps", "30"]) == 0
    assert WorldFluxAgent.load("../run/agent.zip").num_timesteps == 30


def test_a_directory_with_something_in_it_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("full").mkdir()
    Path("full/precious").write_text("mine")
    assert train(*SHORT, "--run", "full") == 2
    assert "full exists and is not an empty directory" in capsys.readouterr().err
    RunConfig("train", "m", "e", {}).write(Path("full"))
    assert train(*SHORT, "--run", "full") == 2
    assert "full already contains a run. Resume it (--resume full)" in capsys.readouterr().err
    assert sorted(path.name for path in Path("full").iterdir()) == ["config.json", "precious"]


def test_a_checkpoint_belongs_to_its_run() -> None:
    run = Path("run")
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    (run / "checkpoints" / "step-00000010" / "config.json").write_text('{"model_type": "dreamerv3"}')
    RunConfig("train", "m", "e", {}).write(run)
    for path in (run, run / "agent.zip", run / "checkpoints", run / "checkpoints" / "step-00000010"):
        assert run_of(path) == run.absolute()
    assert run_of(Path("agent.zip")) is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "MODEL and ENV are missing"),
        (["dreamerv3:tiny"], "MODEL and ENV are missing"),
        (["dreamerv3:tini", CORRIDOR], "Unknown model 'dreamerv3:tini'; did you mean 'dreamerv3:tiny'?"),
        (["dreamerv3:tiny", "CartPole-v9"], "CartPole-v9"),
        (["dreamerv3:tiny", CORRIDOR, "--set", "units"], "--set units is not understood, expected FIELD=VALUE"),
        (["dreamerv3:tiny", CORRIDOR, "--set", "unit=8"], "Unknown field 'unit'; did you mean 'units'?"),
        (["dreamerv3:tiny", CORRIDOR, "--steps", "0"], "steps is 0, expected a whole number from 1"),
        (["dreamerv3:tiny", CORRIDOR, "--eval-interval", "-1"], "eval_interval is -1"),
        (["dreamerv3:tiny", CORRIDOR, "--eval-episodes", "0"], "eval_episodes is 0"),
        (["dreamerv3:tiny", CORRIDOR, "--checkpoint-interval", "0"], "checkpoint_interval is 0"),
        (["dreamerv3:tiny", CORRIDOR, "--n-envs", "0"], "n_envs is 0"),
        (["dreamerv3:tiny", CORRIDOR, "--pixels"], "--pixels: helpers.envs:Corridor is your own code"),
        (["dreamerv3:tiny", CORRIDOR, "--batch-size", "0"], "batch_size is 0"),
        (["dreamerv3:tiny", CORRIDOR, "--device", "tpu"], "device is 'tpu'"),
        (["--resume", "nowhere"], "There is no 'nowhere'. Pass a directory that worldflux train has written."),
        (["--resume", "."], ". is not the directory of a run"),
        (["dreamerv3:tiny", CORRIDOR, "--resume", "."], "--resume takes the MODEL, ENV and all other settings"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_no_directory(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert list(Path().iterdir()) == []


def test_a_run_goes_on_with_its_own_settings(capsys: pytest.CaptureFixture[str]) -> None:
    RunConfig("train", "dreamerv3:tiny", CORRIDOR, {"seed": 1, "steps": 10}).write(Path())
    assert main(["train", "--resume", ".", "--n-envs", "2", "--train-ratio", "3"]) == 2
    assert "--n-envs, --train-ratio: a resumed run keeps the settings of config.json" in capsys.readouterr().err
    RunConfig("train-offline", "dreamerv3:tiny", "a.npz", {}).write(Path())
    assert main(["train", "--resume", "."]) == 2
    assert ". is a run of worldflux train-offline, which has its own --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"step": 10}}, "unknown setting 'step'; did you mean 'steps'?"),
        ({"settings": {"steps": "ten"}}, "steps is 'ten'"),
        ({"settings": {"n_envs": True}}, "n_envs is True"),
        ({"settings": {"planner": "best"}}, "planner is 'best'"),
        ({"settings": {"set": [3]}}, "set is (3,)"),
        ({"settings": []}, "settings is []"),
        ({"model": None}, "model is None"),
        ({"run": FORMAT + 1}, "written by another version"),
    ],
)
def test_a_damaged_config_is_refused(change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    RunConfig("train", "dreamerv3:tiny", CORRIDOR, {"seed": 1}).write(Path())
    data = json.loads(Path("config.json").read_text())
    Path("config.json").write_text(json.dumps({**data, **change}))
    assert main(["train", "--resume", "."]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_learning_curve_is_refused() -> None:
    Path("evaluations.csv").write_text("step,score\n3,high\n")
    with pytest.raises(CheckpointError, match=r"evaluations.csv is not a file of evaluations"):
        read_evaluations(Path("evaluations.csv"))


def test_values_of_fields_are_numbers_lists_words_and_truths() -> None:
    given = ["units=8", "entropy_scale=3e-3", "use_symlog=False", 'loss_scales={"reward": 2.0}', "dtype=bfloat16"]
    expected = {"units": 8, "entropy_scale": 3e-3, "use_symlog": False, "loss_scales": {"reward": 2.0}}
    assert model_fields(given) == {**expected, "dtype": "bfloat16"}
    as_errors_show_them = [
        "task_names=('walk', 'run')",
        "temperature=.1",
        "loss_scales={'reward': 2.0}",
        "obs_shape=(3,)",
    ]
    assert list(model_fields(as_errors_show_them).values()) == [["walk", "run"], 0.1, {"reward": 2.0}, [3]]
    with pytest.raises(ConfigurationError, match="--set units was given twice"):
        model_fields(["units=8", "units=9"])


def test_runs_are_found_in_the_order_of_their_numbers() -> None:
    for number in ("10", "9", "2", "special"):
        (Path("runs/env/model") / number).mkdir(parents=True)
        RunConfig("train", "m", "e", {}).write(Path("runs/env/model") / number)
    assert [path.name for path in find_runs(Path())] == ["2", "9", "10", "special"]
    assert np.all([run_of(path) == path.absolute() for path in find_runs(Path("runs"))])
