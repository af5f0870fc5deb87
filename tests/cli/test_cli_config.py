"""`--config` and `--seeds`: a run is started again from its settings, or several times with different seeds."""

from __future__ import annotations

import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from worldflux.cli.commands.train import TrainSettings
from worldflux.cli.config_file import read_settings, write_settings
from worldflux.cli.main import main
from worldflux.cli.options import model_fields
from worldflux.cli.run_callbacks import Progress
from worldflux.cli.runs import RunConfig, find_runs, read_evaluations
from worldflux.training import ReplayBuffer

CORRIDOR = "helpers.envs:Corridor"
MODEL = ["--set", "units=8", "--set", "hidden_dim=8", "--set", "deter_dim=16", "--batch-size", "2", "--seq-len", "4"]
TINY = [*MODEL, "--learning-starts", "16", "--buffer-size", "500", "--train-ratio", "4"]
SHORT = ["--steps", "40", "--eval-interval", "20", "--eval-episodes", "2"]
FILE = """
model: dreamerv3:tiny
env: helpers.envs:Corridor
steps: 4e1
eval-interval: 20
eval_episodes: 2
batch_size: 2
seq_len: 4
learning_starts: 16
buffer_size: 5_00
train_ratio: 4
learning_rate: 3e-4
compile: false
set:
  units: 8
  hidden_dim: 8
  deter_dim: 16
  entropy_scale: 1e-3
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def settings(run: str | Path) -> dict[str, Any]:
    return RunConfig.read(Path(run)).settings


def scores(run: str | Path) -> list[float]:
    return [row.score for row in read_evaluations(Path(run) / "evaluations.csv")]


def test_the_file_of_a_run_starts_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--n-envs", "2", "--set", 'loss_scales={"reward": 2.0}', "--set", "use_symlog=false"]
    assert main(["train", "dreamerv3:tiny", CORRIDOR, *TINY, *SHORT, *args]) == 0
    (first,) = find_runs(Path("runs"))
    text = (first / "config.yaml").read_text()
    assert text.startswith("# To start the same run again, in a new directory: worldflux train --config config.yaml\n")
    assert yaml.safe_load(text) == {
        "format": 1,
        "model": "dreamerv3:tiny",
        "env": CORRIDOR,
        "steps": 40,
        "n_envs": 2,
        "seed": settings(first)["seed"],
        "batch_size": 2,
        "seq_len": 4,
        "buffer_size": 500,
        "learning_starts": 16,
        "train_ratio": 4.0,
        "set": {"units": 8, "hidden_dim": 8, "deter_dim": 16, "loss_scales": {"reward": 2.0}, "use_symlog": False},
        "eval_interval": 20,
        "eval_episodes": 2,
    }
    assert main(["train", "--config", str(first / "config.yaml")]) == 0
    first, second = find_runs(Path("runs"))
    config, again = RunConfig.read(first), RunConfig.read(second)
    texts = [set(given.settings.pop("set")) for given in (config, again)]
    assert again.settings == config.settings and [text.replace(" ", "") for text in sorted(texts[0])] == [
        text.replace(" ", "") for text in sorted(texts[1])
    ]
    assert scores(first) == scores(second) and len(scores(first)) == 2
    assert yaml.safe_load((second / "config.yaml").read_text()) == yaml.safe_load(text)


VALUES = [
    '"123"',
    '"1e5"',
    "1e5",
    "-1E-3",
    '"true"',
    "true",
    '"NaN"',
    "nan",
    "null",
    "~",
    "yes",
    '"0x10"',
    "1:30",
    '[1e3, "2e3"]',
    '{"a": "1e5"}',
    '""',
    "",
    "a=b",
    "2026-01-01",
    "1_000",
    "12345678901234567890123",
    "# c",
    "*a",
    "!t",
    "- x",
]


@pytest.mark.parametrize("value", VALUES)
def test_any_value_is_read_as_it_was_given(value: str, tmp_path: Path) -> None:
    given = TrainSettings(env_kwargs=(f"key={value}",), set=(f"field={value}",), learning_rate=1e-5)
    write_settings(tmp_path, "train", "env", "1e5", "2026", given)
    found = read_settings(tmp_path / "config.yaml", "env", TrainSettings(), [])
    assert (found.model, found.task, found.options.learning_rate) == ("1e5", "2026", 1e-5)
    assert repr(found.options.arguments(of_id=True)) == repr(given.arguments(of_id=True))
    assert repr(model_fields(found.options.set)) == repr(model_fields(given.set))


def test_options_win_over_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(FILE + "pixels: false\nprocesses: true\nseed: 5\n")
    options = ["--steps=20", "--batch-size", "3", "--set", "units=4", "--no-processes", "--run", "run", "--seed", "0"]
    assert main(["train", "--config=mine.yaml", *options]) == 0
    assert f"worldflux: importing {CORRIDOR}, as mine.yaml says\n" in capsys.readouterr().err
    found = settings("run")
    assert (found["steps"], found["batch_size"], found["processes"], found["seed"]) == (20, 3, False, 0)
    assert (found["learning_rate"], found["buffer_size"], found["compile"]) == (3e-4, 500, "false")
    assert found["set"] == ["hidden_dim=8", "deter_dim=16", "entropy_scale=0.001", "units=4"]
    assert main(["train", "--config", "run/config.yaml", "dreamerv3:size12m", "CartPole-v9"]) == 2  # MODEL and ENV, too


def test_a_run_on_data_is_started_again_from_its_file() -> None:
    buffer = ReplayBuffer(100, (2,), 2)
    for _ in range(4):
        buffer.add_episode(np.zeros((9, 2)), np.eye(2)[np.arange(8) % 2], np.zeros(8), np.arange(8) == 7)
    buffer.save("data.npz")
    args = ["dreamerv3:tiny", "data.npz", *MODEL, "--steps", "4", "--eval-interval", "2", "--seed", "7"]
    assert main(["train-offline", *args, "--run", "first"]) == 0
    assert yaml.safe_load(Path("first/config.yaml").read_text())["data"] == str(Path("data.npz").resolve())
    assert main(["train-offline", "--config", "first/config.yaml", "--run", "second"]) == 0
    assert settings("first") == settings("second")
    logs = [Path(f"{run}/logs/progress.csv").read_text().splitlines()[1].split(",") for run in ("first", "second")]
    assert [cell for cell in logs[0] if "." in cell] == [cell for cell in logs[1] if "." in cell]


NESTED = "[" * 5000
MISTAKES = {
    "steps: ten": "mine.yaml: steps is 'ten', expected a whole number.",
    "steps: 1.5": "mine.yaml: steps is 1.5, expected a whole number.",
    "steps: true": "mine.yaml: steps is True, expected a whole number.",
    "steps: [1]": "mine.yaml: steps is [1], expected a whole number.",
    "train_ratio: fast": "mine.yaml: train_ratio is 'fast', expected a number.",
    "pixels: 1": "mine.yaml: pixels is 1, expected true or false.",
    "device: 0": "mine.yaml: device is 0, expected text.",
    "model: [a]": "mine.yaml: model is ['a'], expected text.",
    "planner: best": "mine.yaml: planner is 'best', expected one of auto, mppi, cem, none.",
    "set: units": "mine.yaml: set is 'units', expected a mapping of names to values.",
    "set: {units: 2026-01-01}": "mine.yaml: set has datetime.date(2026, 1, 1), expected numbers, text or lists.",
    "seeds: 3": "mine.yaml: seeds is 3, expected a list, such as [0, 1, 2].",
    "step: 3": "mine.yaml has an unknown name 'step'; did you mean 'steps'?",
    "data: a.npz": "mine.yaml has an unknown name 'data'",
    "run: 1\nsettings: {}": "mine.yaml is the config.json of a run. --config takes the config.yaml beside it.",
    "format: 2": "mine.yaml was written by another version of worldflux.",
    "": "mine.yaml is empty, expected names and values, such as 'model: dreamerv3:tiny'.",
    "- a\n- b": "mine.yaml holds a list, expected names and values",
    "steps": "mine.yaml holds a str, expected names and values",
    "steps: 3\nsteps: 4": "mine.yaml is not valid YAML: 'steps' is there twice.",
    "batch_size: 3\nbatch-size: 4": "mine.yaml has 'batch-size' twice, once with underscores.",
    "steps: 1e400": "mine.yaml: steps is inf, expected a whole number.",
    "steps: {": "mine.yaml is not valid YAML: while parsing a flow node",
    "a: &a [x, x]\nset: {b: *a}": "mine.yaml is not valid YAML: aliases (*name) are not allowed.",
    "set: !!python/object/apply:os.system [touch ran]": "is not valid YAML: could not determine a constructor",
    f"set: {NESTED}": "mine.yaml cannot be read: it is nested too deeply.",
    f"set: {{a: '{'x' * 2**20}'}}": "mine.yaml cannot be read: it has more than 1 MB.",
    "set: \x00": "mine.yaml is not valid YAML: unacceptable character",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_a_file_is_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(text)
    assert main(["train", "--config", "mine.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and len(err) < 400
    assert MISTAKES[text] in err
    assert [path.name for path in Path().iterdir()] == ["mine.yaml"]


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    Path("bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    for path, message in (
        ("none.yaml", "There is no file 'none.yaml'. --config takes the config.yaml of a run"),
        ("folder", "folder cannot be read: it is a directory, a pipe or a device, expected a file. Did you mean"),
        ("bytes.yaml", "bytes.yaml is not valid YAML: 'utf-8' codec can't decode"),
    ):
        assert main(["train", "--config", path]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--config"])
    assert main(["train", "--config", "none.yaml", "--resume", "run"]) == 2


SEEDS = ["train", "dreamerv3:tiny", CORRIDOR, *TINY, *SHORT]


def test_several_seeds_are_several_runs_and_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SEEDS, "--seeds", "4", "1_0", "--run", "both"]) == 0
    out, err = capsys.readouterr()
    last = [scores(f"both/seed-{seed}")[-1] for seed in (4, 10)]
    assert [settings(f"both/seed-{seed}")["seed"] for seed in (4, 10)] == [4, 10]
    first, second, summary, *rows = out.splitlines()
    assert first.startswith("both/seed-4: 40 steps") and second.startswith("both/seed-10: 40 steps")
    assert summary == f"last evaluation of 2 seeds: mean {np.mean(last):.6g}, std {np.std(last, ddof=1):.4g}"
    assert [row.split() for row in rows] == [
        ["seed", "4", f"{last[0]:g}", "both/seed-4"],
        ["seed", "10", f"{last[1]:g}", "both/seed-10"],
    ]
    assert err.endswith("worldflux: next: worldflux plot both, worldflux report both\n") and err.count("next:") == 1
    assert main(["train", "--config", "both/seed-4/config.yaml", "--seeds", "10", "--steps", "20"]) == 0
    (run,) = find_runs(Path("runs"))
    assert (settings(run)["seed"], settings(run)["steps"]) == (10, 20)
    assert scores(run) == scores("both/seed-10")[:1]


def test_seeds_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(FILE.replace("4e1", "20") + "seeds: [1, 2]\n")
    assert main(["train", "--config", "mine.yaml"]) == 0
    assert [settings(run)["seed"] for run in find_runs(Path("runs"))] == [1, 2]
    assert main(["train", "--config", "mine.yaml", "--seed", "7", "--run", "run"]) == 0
    assert settings("run")["seed"] == 7


def test_ctrl_c_stops_all_seeds(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    shown = Progress._on_step

    def on_step(self: Progress) -> bool:
        if self.num_timesteps == 30 and self.model.seed == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return shown(self)

    monkeypatch.setattr(Progress, "_on_step", on_step)
    assert main([*SEEDS, "--seeds", "0", "1", "2", "3", "--run", "my runs"]) == 130
    err = capfd.readouterr().err
    assert "Resume with: worldflux train --resume 'my runs/seed-1'\n" in err
    line = next(line for line in err.splitlines() if "not started" in line)
    assert line.startswith("worldflux: not started: seeds 2 3. Start with: worldflux train dreamerv3:tiny ")
    assert sorted(path.name for path in Path("my runs").iterdir()) == ["seed-0", "seed-1"]
    monkeypatch.setattr(Progress, "_on_step", shown)
    command = shlex.split(line.partition("Start with: worldflux ")[2])
    assert main(command) == 0
    assert settings("my runs/seed-2") == {**settings("my runs/seed-0"), "seed": 2}
    assert main(["train", "--resume", "my runs/seed-1"]) == 0


def test_ctrl_c_while_a_run_is_being_made_leaves_its_seed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("worldflux.cli.commands.train.make_environments", interrupted)
    assert main([*SEEDS, "--seeds", "5", "6"]) == 130
    err = capsys.readouterr().err
    assert "worldflux: not started: seeds 5 6. Start with: " in err and err.endswith("--seeds 5 6\n")


def test_an_error_in_a_run_says_which_seeds_are_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def on_step(self: Progress) -> bool:
        raise ZeroDivisionError("in the environment")

    monkeypatch.setattr(Progress, "_on_step", on_step)
    with pytest.raises(ZeroDivisionError):
        main([*SEEDS, "--seeds", "0", "1"])
    assert "not started: seed 1. Start with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "1", "--seeds", "1", "2"], "--seed and --seeds are both given. Leave one of them out."),
        (["--seeds", "1", "2", "1"], "--seeds has 1 more than once"),
        (["--seeds", "1", "-1"], "seeds is -1, expected a whole number from 0"),
        (["--seeds", "1", "--resume", "run"], "--resume takes the MODEL, ENV and all other settings from the run"),
        (["--seeds", "1", "2", "--run", "used"], "used/seed-2 exists and is not an empty directory"),
        (["--seeds", "1", "2", "--batch-size", "0"], "batch_size is 0"),
    ],
)
def test_seeds_that_cannot_be_run(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("used/seed-2").mkdir(parents=True)
    Path("used/seed-2/mine").touch()
    assert main([*SEEDS, *options]) == 2
    err = capsys.readouterr().err
    assert message in err and "not started" not in err
    assert not Path("runs").exists() and not Path("used/seed-1").exists()


def test_seeds_need_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*SEEDS, "--seeds"])
    assert "expected at least one seed, such as --seeds 0 1 2" in re.sub(r"[\s│]+", " ", capsys.readouterr().err)


def test_words_behind_seeds_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--seeds", "0", "1", "dreamerv3:tiny", CORRIDOR])
    said = re.sub(r"[\s│]+", " ", capsys.readouterr().err)
    assert "'dreamerv3:tiny' is not a whole number" in said and "Write MODEL and ENV before them" in said
