"""Every kind of saved file with every command that takes one: it works, or one line says why not and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers.sb3_families import FAMILIES

from worldflux import WorldFluxAgent, create_world_model
from worldflux.cli.main import main
from worldflux.diagnostics import plots
from worldflux.errors import ConfigurationError
from worldflux.training import ReplayBuffer

ENV, OTHER = f"{__name__}:Aim", f"{__name__}:Other"


class Aim(gym.Env[Any, Any]):
    """An environment with episodes of nine steps."""

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self._obs(), float(action[0]), False, self.t == 9, {}

    def _obs(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, self.observation_space.shape).astype(np.float32)


class Other(Aim):
    """An environment with observations of three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)


def fields(family: str) -> list[str]:
    chosen = {name: value for name, value in FAMILIES[family]["model_kwargs"].items() if name != "warmup_steps"}
    return [word for item in chosen.items() for word in ("--set", "{}={}".format(*item))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one of everything that can be saved, and with invalid files."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("saved")
    data, small = str(root / "data.npz"), fields("dreamerv3")
    assert main(["collect", ENV, "--episodes", "6", "-o", data, "--seed", "0"]) == 0
    train = ["--steps", "30", "--eval-interval", "15", "--eval-episodes", "1", "--buffer-size", "3000"]
    train += ["--train-ratio", "0", "--learning-starts", "16"]
    assert main(["train", "dreamerv3:tiny", ENV, *train, *small, "--run", str(root / "run")]) == 0
    offline = [
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--seq-len",
        "6",
        "--eval-share",
        "0",
        "--run",
        str(root / "offline"),
    ]
    assert main(["train-offline", "dreamerv3:tiny", data, *offline, *small]) == 0
    for family, settings in FAMILIES.items():
        model = create_world_model(f"{family}:tiny", obs_shape=(2,), action_dim=1, **settings["model_kwargs"])
        model.save_pretrained(root / family)
    (root / "text.txt").write_text("nothing")
    (root / "damaged.zip").write_bytes((root / "run" / "agent.zip").read_bytes()[:200])
    (root / "empty").mkdir()
    return root


AGENTS = ["run", "run/agent.zip", "run/agent", "run/checkpoints", "run/checkpoints/step-00000030"]
MODELS = ["offline", "offline/model", "offline/checkpoints", "offline/checkpoints/step-00000002", "dreamerv3", "tdmpc2"]
NOTHING = {
    "missing": "There is no",
    "missing.zip": "There is no",
    "text.txt": "text.txt was not written by WorldFluxAgent.save",
    "dreamerv3/model.safetensors": "model.safetensors was not written by WorldFluxAgent.save",
    "data.npz": "Pass a file that WorldFluxAgent.save wrote",
    "damaged.zip": "damaged.zip",
    "empty": "empty contains neither a checkpoint of an agent nor a model",
}


def said(args: list[str], capsys: pytest.CaptureFixture[str], code: int) -> str:
    capsys.readouterr()
    assert main(args) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    if code:
        assert out == "" and err.count("\n") == 1 and err.startswith("worldflux: ")
    return out + err


SMALL = ["--context", "2", "--horizon", "3", "--windows", "4", "--shown", "1"]


@pytest.mark.parametrize("name", AGENTS + MODELS)
def test_eval_plays_with_whatever_acts(name: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["eval", str(saved / name), ENV, "--episodes", "2", "--json"]
    found = json.loads(said(args, capsys, 0).splitlines()[0])
    assert found["lengths"] == [9, 9]
    assert json.loads(said(args, capsys, 0).splitlines()[0])["scores"] == found["scores"]
    error = said(["eval", str(saved / name), OTHER], capsys, 2)
    assert "(2,)" in error and "(3,)" in error and "Pass " in error
    if name in AGENTS:
        assert ENV in said(["eval", str(saved / name), "--episodes", "1"], capsys, 0)
    else:
        assert "Add ENV: worldflux eval" in said(["eval", str(saved / name)], capsys, 2)


@pytest.mark.parametrize(
    "name", ["run", "run/agent.zip", "run/checkpoints/step-00000030", "offline", "offline/model", "dreamerv3", "tdmpc2"]
)
def test_imagine_shows_whatever_predicts(
    name: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = str(saved / name), ["-o", str(tmp_path)]
    # Drawing takes longer than everything else; test_cli_imagine.py looks at the pictures.
    monkeypatch.setattr(plots, "figures", lambda *given, **options: {})
    if name in ("run", "tdmpc2"):
        said(["imagine", path, str(saved / "data.npz"), *SMALL, *out], capsys, 0)
        assert json.loads((tmp_path / "imagination.json").read_text())["data"] == "episodes of data.npz"
        said(["imagine", path, "--env", ENV, "--episodes", "3", *SMALL, *out], capsys, 0)
        assert json.loads((tmp_path / "imagination.json").read_text())["data"] == f"3 new episodes in {ENV}"
    assert "(3,)" in said(["imagine", path, "--env", OTHER, *SMALL, *out], capsys, 2)
    if name in FAMILIES:
        assert "holds no replay data. Add recorded episodes" in said(["imagine", path, *SMALL, *out], capsys, 2)
        return
    said(["imagine", path, *SMALL, *out], capsys, 0)
    shown = json.loads((tmp_path / "imagination.json").read_text())["data"]
    expected = (
        "episodes of data.npz" if name in MODELS else "new episodes" if "agent" in name else "replay data of step"
    )
    assert expected in shown


@pytest.mark.parametrize("name", AGENTS + MODELS)
def test_collect_records_whatever_acts(
    name: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--policy", str(saved / name), "--n-envs", "2", "--seed", "0", "-o", str(tmp_path / "new.npz")]
    said(["collect", ENV, "--episodes", "3", *args], capsys, 0)
    assert ReplayBuffer.load(tmp_path / "new.npz").num_episodes == 3
    assert "(3,)" in said(["collect", OTHER, "--episodes", "3", "--overwrite", *args], capsys, 2)


@pytest.mark.parametrize("name", NOTHING)
def test_what_is_nothing_saved_is_said_in_a_line(
    name: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = str(saved / name), str(tmp_path / "new.npz")
    for args in (
        ["eval", path, ENV],
        ["imagine", path, str(saved / "data.npz"), "-o", str(tmp_path)],
        ["imagine", path, "--env", ENV, "-o", str(tmp_path)],
        ["collect", ENV, "--policy", path, "--steps", "9", "-o", out],
    ):
        assert NOTHING[name] in said(args, capsys, 2)
    said(["plot", path], capsys, 2)


def test_plot_draws_runs_and_says_what_else_is_none(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = ["-o", str(tmp_path / "curves.png")]
    assert "1 run," in said(["plot", str(saved / "run"), *out], capsys, 0)
    assert "offline was trained without an environment and has no scores" in said(["plot", str(saved), *out], capsys, 0)
    error = said(["plot", str(saved / "offline"), *out], capsys, 2)
    assert f"has losses in place of scores. tensorboard --logdir {saved / 'offline' / 'logs'}" in error
    for name in (*AGENTS[1:2], *AGENTS[3:], *MODELS[1:4]):
        error = said(["plot", str(saved / name), *out], capsys, 2)
        assert f"Pass the directory of the run: {saved / name.partition('/')[0]}" in error
    for name in FAMILIES:
        assert f"There is no run in {saved / name}. Pass a directory" in said(
            ["plot", str(saved / name), *out], capsys, 2
        )


def test_an_agent_is_loaded_from_the_directory_of_a_run(saved: Path, tmp_path: Path) -> None:
    run = saved / "run"
    best = WorldFluxAgent.load(run)
    assert best.num_timesteps == WorldFluxAgent.load(run / "best_agent.zip").num_timesteps in (15, 30)
    resumed = WorldFluxAgent.load(str(run), Aim(), resume=True)
    assert (resumed.num_timesteps, resumed.replay_buffer.num_transitions) == (30, 30)  # type: ignore[union-attr]

    copied = Path(shutil.copytree(run, tmp_path / "run"))
    (copied / "best_agent.zip").unlink()
    assert WorldFluxAgent.load(copied).num_timesteps == 30
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(ConfigurationError, match="has no agent yet"):
        WorldFluxAgent.load(copied)
    with pytest.raises(ConfigurationError, match="train-offline, which trains a model and no agent"):
        WorldFluxAgent.load(saved / "offline")
