"""The command line with several tasks: training, evaluating, recording, predicting and plotting each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from worldflux import WorldFluxAgent, create_world_model
from worldflux.cli.commands.imagine import check_rows, model_and_data
from worldflux.cli.commands.train import TrainSettings
from worldflux.cli.config_file import read_settings
from worldflux.cli.curves import read_run
from worldflux.cli.main import main
from worldflux.cli.options import EnvOptions, joined_tasks, tasks_in, title_of, words_in
from worldflux.cli.runs import RunConfig, read_evaluations, saved_agent
from worldflux.errors import ConfigurationError
from worldflux.training import ReplayBuffer

ENVS = """
import gymnasium, numpy
from gymnasium.spaces import Box

class Left(gymnasium.Env):
    aim, width, action_dim, length = -1.5, 3, 1, 6
    def __init__(self):
        self.observation_space = Box(-10, 10, (self.width,), numpy.float32)
        self.action_space = Box(-2, 2, (self.action_dim,), numpy.float32)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return numpy.zeros(self.width, numpy.float32), {}
    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        obs = numpy.full(self.width, self.t / 10, numpy.float32)
        return obs, -abs(float(action[0]) - self.aim), False, self.t >= self.length, {}

class Wide(Left):
    aim, width, action_dim, length = 1.5, 4, 2, 4
"""
FIELDS = dict(latent_dim=16, hidden_dim=16, mlp_dim=16, enc_dim=16, num_q_networks=2, num_bins=15, task_dim=4)
SMALL = [word for name, value in FIELDS.items() for word in ("--set", f"{name}={value}")] + ["--device", "cpu"]
TASKS = ["left=envs.py:Left", "wide=envs.py:Wide"]
SHORT = ["--steps", "48", "--learning-starts", "24", "--batch-size", "4", "--eval-interval", "24", "--planner", "none"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the environments, an agent that has learned them, and a file of each."""
    place = tmp_path_factory.mktemp("tasks")
    (place / "envs.py").write_text(ENVS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["train", "tdmpc2:tiny", *TASKS, *SMALL, *SHORT, "--eval-episodes", "2", "--seed", "0"]) == 0
        for task, env in zip(("left", "wide"), ("envs.py:Left", "envs.py:Wide"), strict=True):
            given = ["--policy", str(RUN), "--task", task, "--episodes", "12", "--seed", "0"]
            assert main(["collect", env, "-o", f"{task}.npz", *given]) == 0
    return place


RUN = Path("runs/left_wide/tdmpc2-tiny/1")


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    assert main(list(args)) == 2
    return capsys.readouterr().err


def tasks_shown(source: Path, data: str | None = None, env: str | None = None, task: str | None = None) -> set[int]:
    """The tasks of what `worldflux imagine` shows the model."""
    found = saved_agent(source, newest=True)
    model, _, rows, described = model_and_data(found, data, env, EnvOptions(), episodes=4, seed=0, task=task)
    check_rows(model, rows, described)
    return set(rows.sample(64, 4).extras["task"].flatten().tolist())


def test_tasks_are_given_by_their_names_or_named_after_their_places() -> None:
    text = joined_tasks(["dmc/walker-walk", "run=dmc/walker-run", "my data/old one.npz", "a.py:MyEnv"])
    assert text is not None
    named = {"walker-walk": "dmc/walker-walk", "run": "dmc/walker-run", "old-one": "my data/old one.npz"}
    assert tasks_in(text) == {**named, "MyEnv": "a.py:MyEnv"}
    assert tasks_in(joined_tasks(["a=x", "b=it's here.npz"]) or "") == {"a": "x", "b": "it's here.npz"}
    assert joined_tasks(["my data.npz"]) == "my data.npz" and tasks_in("my data.npz") == tasks_in("it's.npz") == {}
    assert joined_tasks(["./a=b.npz"]) == "./a=b.npz" and tasks_in("runs/lr=3/a.npz") == {}
    assert joined_tasks(["a=x b=y"]) == "a=x b=y" and words_in("a=x b=y") == ["a=x", "b=y"]
    assert title_of("a=x b=y") == "a_b" and title_of("x") == "x"
    assert title_of(joined_tasks([f"task-{n}=x" for n in range(80)]) or "") == "80-tasks"
    with pytest.raises(ConfigurationError, match=r"Two tasks have the name 'walk'\. Give each its own: walk-2=b/walk"):
        joined_tasks(["a/walk", "b/walk"])
    with pytest.raises(ConfigurationError, match="'a=' is not understood, expected NAME=PLACE"):
        joined_tasks(["a="])


def test_a_run_evaluates_each_task_and_is_resumed_and_reproduced(capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig.read(RUN)
    assert list(tasks_in(config.task)) == ["left", "wide"] and " left=envs.py:Left wide=envs.py:Wide " in config.command
    assert yaml.safe_load((RUN / "config.yaml").read_text())["env"] == tasks_in(config.task)
    rows = read_evaluations(RUN / "evaluations.csv")
    assert [row.step for row in rows] == [24, 48] and {row.episodes for row in rows} == {4}
    for row in rows:
        assert set(row.tasks) == {"left", "wide"} and row.score == pytest.approx(
            np.mean(list(row.tasks.values())), abs=2e-4
        )
    parts = read_run(RUN).parts()
    assert [part.task for part in parts] == ["left, one of 2 tasks", "wide, one of 2 tasks"]
    assert [score for _, _, score in parts[1].evaluation] == [row.tasks["wide"] for row in rows]
    assert all(part.training for part in parts)
    assert main(["reproduce", str(RUN), "--steps", "24"]) == 0
    assert read_evaluations(Path(f"{RUN}-reproduced/evaluations.csv"))[0].tasks == rows[0].tasks
    assert main(["train", "--resume", f"{RUN}-reproduced", "--steps", "30"]) == 0
    assert WorldFluxAgent.load(f"{RUN}-reproduced/agent.zip", device="cpu").num_timesteps == 30
    given = read_settings(RUN / "config.yaml", "env", TrainSettings(), [])
    assert given.task == config.task and words_in(config.task)[0].endswith("envs.py:Left")


def test_each_task_or_one_of_them_is_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    def played(*args: str) -> dict[str, dict[str, float]]:
        capsys.readouterr()
        assert main(["eval", str(RUN / "agent.zip"), *args, "--episodes", "2", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        return found if isinstance(found, dict) else {}

    # After its last evaluation, the agent has made one more gradient step.
    both, last = played(), read_evaluations(RUN / "evaluations.csv")[-1]
    scores = {name: found["mean"] for name, found in both["tasks"].items()}  # type: ignore[index]
    assert scores == pytest.approx(last.tasks, abs=0.02) and both["mean"] == pytest.approx(last.score, abs=0.02)
    for args in (["--task", "wide"], ["wide=envs.py:Wide"], ["envs.py:Wide", "--task", "wide"]):
        assert played(*args)["mean"] == scores["wide"]
    assert main(["eval", str(RUN), "--episodes", "1"]) == 0
    assert "mean score of 2 tasks: " in capsys.readouterr().out


def test_recorded_data_of_several_tasks_train_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert ReplayBuffer.load("wide.npz").obs_shape == (4,) and ReplayBuffer.load("left.npz").action_dim == 1
    short = [*SMALL, "--steps", "4", "--batch-size", "4", "--seq-len", "4", "--eval-interval", "2"]
    files = ["left=left.npz", "wide.npz"]
    assert main(["train-offline", "tdmpc2:tiny", *files, "--run", "offline", *short]) == 0
    config = create_world_model("offline/model").config
    assert (config.task_names, config.task_action_dims, config.obs_shape) == (("left", "wide"), (1, 2), (4,))  # type: ignore[attr-defined]
    log = Path("offline/logs/progress.csv").read_text().splitlines()[0]
    assert "eval/loss/left" in log and "eval/loss/wide" in log
    assert main(["train-offline", "--resume", "offline", "--steps", "6"]) == 0
    assert main(["eval", "offline", *TASKS, "--episodes", "1"]) == 0
    for data, task, tasks in ((None, None, {0, 1}), ("wide.npz", "wide", {1}), ("wide=wide.npz", None, {1})):
        assert tasks_shown(Path("offline"), data, None, task) == tasks
    # One file with a column: the rows of the agent.
    rows = model_and_data(saved_agent(RUN, newest=True), None, None, EnvOptions(), episodes=1, seed=0)[2]
    assert isinstance(rows, ReplayBuffer)
    rows.save("column.npz")
    assert main(["train-offline", "tdmpc2:tiny", "column.npz", "--run", "column", *short, "--eval-share", "0"]) == 0
    assert create_world_model("column/model").config.task_names == ("0", "1")  # type: ignore[attr-defined]
    assert "are of the tasks 0, 1, and dreamerv3 learns one" in (
        error_of(capsys, "train-offline", "dreamerv3:tiny", "column.npz", "--steps", "4")
    )


def test_predictions_are_compared_with_the_data_of_each_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert tasks_shown(RUN) == tasks_shown(RUN / "best_agent.zip") == {0, 1}
    assert tasks_shown(RUN, "left.npz", None, "left") == {0} and tasks_shown(RUN, None, "envs.py:Wide", "wide") == {1}
    assert "do not say of which they are: --task NAME" in error_of(capsys, "imagine", str(RUN), "left.npz")
    assert "replay data of step-" in error_of(capsys, "imagine", str(RUN), "--task", "left")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "dreamerv3:tiny", *TASKS], "tasks left, wide, and dreamerv3 learns one. Choose TD-MPC2"),
        (["train", "tdmpc2:tiny", TASKS[0], "left=envs.py:Wide"], "Two tasks have the name 'left'"),
        (["train", "tdmpc2:tiny", TASKS[0], "CartPole-v1"], "'CartPole-v1' has the action space Discrete(2)"),
        (["train-offline", "tdmpc2:tiny", "left.npz", "a=none.npz"], "There is no file 'none.npz'"),
        (["train-offline", "dreamerv3:tiny", "left.npz", "wide.npz"], "left, wide, and dreamerv3 learns one"),
        (["eval", str(RUN), "--task", "wdie"], "no such task; did you mean 'wide'? It is one of left, wide."),
        (["eval", str(RUN), "envs.py:Wide"], "tasks left, wide. Say which of them envs.py:Wide is, with --task NAME"),
        (["eval", str(RUN), "envs.py:Left", "--task", "wide"], "expected continuous ones of width 2"),
        (["collect", "CartPole-v1", "--task", "a", "--steps", "9", "-o", "a.npz"], "task a is one of a --policy"),
        (["collect", " ".join(TASKS), "--steps", "9", "-o", "a.npz"], "records one task at a time. Choose one of"),
    ],
)
def test_what_does_not_fit_is_an_error(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of(capsys, *args)
