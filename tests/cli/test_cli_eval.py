"""`worldflux eval`: scores and videos of saved agents; `worldflux models`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch

from worldflux import WorldFluxAgent, list_models
from worldflux.cli.main import main
from worldflux.cli.runs import RunConfig
from worldflux.cli.video import VideoFile
from worldflux.errors import ConfigurationError, MissingDependencyError

ENV = f"{__name__}:Lamp"
FIELDS = {"units": 8, "hidden_dim": 8, "deter_dim": 16}


class Lamp(gym.Env[Any, Any]):
    """Becomes brighter with every step. The reward is the number of the step, and episodes have four or five steps."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, size: tuple[int, int] = (31, 48)) -> None:
        self.render_mode, self.size = render_mode, size
        self.observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.length = 0, 4 + int(self.np_random.integers(2))
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return np.zeros(2, np.float32), float(self.t), False, self.t == self.length, {}

    def render(self) -> Any:
        red = np.zeros((*self.size, 3), np.uint8)
        red[..., 0] = 50 * self.t
        return red


class Dark(Lamp):
    """A lamp that cannot be filmed."""

    def __init__(self) -> None:
        super().__init__()


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("agents") / "agent.zip"
    WorldFluxAgent("dreamerv3:tiny", Lamp(), model_kwargs=FIELDS, buffer_size=2_000, seed=0).save(path)
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def result(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert main(["eval", *map(str, args), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_small_model_acts_with_one_thread(
    agent: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    result(capsys, agent, ENV, "--episodes", 1)
    assert chosen == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    result(capsys, agent, ENV, "--episodes", 1)
    assert chosen == [1]


def frames(path: str) -> list[np.ndarray]:
    """Frames of a video, BGR."""
    video, found = cv2.VideoCapture(path), []
    while (read := video.read())[0]:
        found.append(read[1])
    return found


def test_scores_are_those_of_the_episodes(agent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, agent, ENV, "--episodes", 6)
    lengths = np.array(found["lengths"])
    assert set(lengths) == {4, 5}
    assert found["scores"] == [10.0 if length == 4 else 15.0 for length in lengths]
    assert math.isclose(found["mean"], np.mean(found["scores"]))
    assert math.isclose(found["std"], np.std(found["scores"]))
    assert (found["min"], found["max"], found["episodes"]) == (10, 15, 6)
    assert (found["env"], found["agent"], found["seed"], found["deterministic"]) == (ENV, str(agent), 0, True)
    assert result(capsys, agent, ENV, "--episodes", 6)["lengths"] == found["lengths"]
    seeds = {tuple(result(capsys, agent, ENV, "--episodes", 6, "--seed", seed)["lengths"]) for seed in range(4)}
    assert len(seeds) > 1


def test_the_table_shows_the_same_numbers(agent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, agent, ENV, "--episodes", 3)
    assert main(["eval", str(agent), ENV, "--episodes", "3"]) == 0
    head, score, length = capsys.readouterr().out.splitlines()
    assert head == f"{agent} in {ENV}: 3 episodes, most likely actions, seed 0"
    assert score.split()[:3] == ["score", "mean", f"{found['mean']:.6g}"]
    assert length.split()[-4:] == ["min", str(min(found["lengths"])), "max", str(max(found["lengths"]))]


def test_stochastic_actions_are_sampled(agent: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    asked: list[bool] = []
    predict = WorldFluxAgent.predict

    def spied(self: WorldFluxAgent, *args: Any, deterministic: bool) -> Any:
        asked.append(deterministic)
        return predict(self, *args, deterministic=deterministic)

    monkeypatch.setattr(WorldFluxAgent, "predict", spied)
    assert result(capsys, agent, ENV, "--episodes", 1, "--stochastic")["deterministic"] is False
    assert set(asked) == {False}
    result(capsys, agent, ENV, "--episodes", 1)
    assert asked[-1] is True


def test_a_video_shows_whole_episodes_in_their_colours(agent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, agent, ENV, "--episodes", 3, "--video", "lamp.mp4", "--video-episodes", 2)
    shown = frames("lamp.mp4")
    expected = [50 * t for length in found["lengths"][:2] for t in range(length + 1)]
    assert len(shown) == len(expected)
    for frame, red in zip(shown, expected, strict=True):
        assert frame.shape == (32, 48, 3)  # one more row, because the codec wants an even number
        blue, green, reds = frame.reshape(-1, 3).mean(axis=0)
        assert abs(reds - red) < 12 and max(blue, green) < 12
    assert cv2.VideoCapture("lamp.mp4").get(cv2.CAP_PROP_FPS) == 10
    assert [path.name for path in Path().iterdir()] == ["lamp.mp4"]  # nothing beside it
    assert found["video"] == "lamp.mp4"


def test_a_gif_has_the_pictures_as_they_are(agent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, agent, ENV, "--episodes", 1, "--video", "lamp.gif")
    read, animation = cv2.imreadanimation("lamp.gif")
    assert read
    reds = [frame[..., 2].mean() for frame in animation.frames]
    np.testing.assert_allclose(reds, [50 * t for t in range(found["lengths"][0] + 1)], atol=12)
    assert animation.frames[0].shape[:2] == (31, 48)
    assert set(animation.durations) == {100}


def test_a_gif_has_the_colors_of_its_pictures(tmp_path: Path) -> None:
    picture = np.full((60, 90, 3), 255, np.uint8)
    picture[20:40, 10:50] = (202, 152, 101)  # the pole of CartPole, on white
    picture[40:50, 5:60] = 0
    picture[30:34, 60:64] = (129, 132, 203)
    with VideoFile(tmp_path / "film.gif", fps=25) as film:
        for t in range(4):
            film.add(np.roll(picture, 5 * t, axis=1))
    _, animation = cv2.imreadanimation(str(tmp_path / "film.gif"))
    for t, frame in enumerate(animation.frames):
        np.testing.assert_allclose(frame[..., 2::-1], np.roll(picture, 5 * t, axis=1), atol=6)


def test_a_fast_gif_takes_every_second_picture(tmp_path: Path) -> None:
    with VideoFile(tmp_path / "fast.gif", fps=50) as film:
        for t in range(6):
            film.add(np.full((8, 8, 3), 40 * t, np.uint8))
    _, animation = cv2.imreadanimation(str(tmp_path / "fast.gif"))
    np.testing.assert_allclose([frame[..., :3].mean() for frame in animation.frames], [0, 80, 160], atol=3)
    assert set(animation.durations) == {40}


def test_an_unfinished_video_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ConfigurationError, match=r"A frame has shape \(4, 4, 3\), and the ones before \(8, 8, 3\)"):
        with VideoFile(path, fps=10) as film:
            film.add(np.zeros((8, 8, 3), np.uint8))
            film.add(np.zeros((4, 4, 3), np.uint8))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_gif_needs_a_newer_opencv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2, "imwriteanimation")
    with pytest.raises(MissingDependencyError, match=r"GIFs need OpenCV 4.11: pip install -U opencv-python"):
        VideoFile(tmp_path / "film.gif", fps=10)


def test_a_run_knows_its_agents_and_its_environment(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", "20", "--eval-interval", "10", "--eval-episodes", "1", "--learning-starts", "16"]
    fields = [word for name, value in FIELDS.items() for word in ("--set", f"{name}={value}")]
    args = ["dreamerv3:tiny", "Pendulum-v1", "--action-repeat", "50", "--buffer-size", "3000", "--train-ratio", "0"]
    assert main(["train", *args, *options, *fields, "--run", "run"]) == 0
    capsys.readouterr()
    for given, read in [
        (["run"], "run/best_agent.zip"),
        (["run", "--newest"], "run/checkpoints/step-00000020"),
        (["run/agent.zip"], "run/agent.zip"),
        (["run/checkpoints"], "run/checkpoints/step-00000020"),
        (["run/checkpoints/step-00000020"], "run/checkpoints/step-00000020"),
    ]:
        found = result(capsys, *given, "--episodes", 1)
        assert (found["agent"], found["env"], found["lengths"]) == (read, "Pendulum-v1", [4])  # 200 / 50
    assert result(capsys, "run", "Pendulum-v1", "--episodes", 1)["lengths"] == [200]
    assert main(["eval", "run", "--pixels"]) == 2
    assert "--pixels: options of an environment need ENV" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "There is no 'nowhere'. AGENT is a zip"),
        (["AGENT"], "does not belong to a run, so its environment is unknown. Add ENV"),
        (["AGENT", "CartPole-v1"], "The agent has observations (2,), and CartPole-v1 has (4,)"),
        (["AGENT", ENV, "--episodes", "0"], "episodes is 0"),
        (["AGENT", ENV, "--seed", "-1"], "seed is -1"),
        (["AGENT", ENV, "--size", "8"], "--size: "),
        (["AGENT", ENV, "--video", "film.avi"], "film.avi ends in '.avi', expected .mp4 or .gif"),
        (["AGENT", ENV, "--video", "nowhere/film.mp4"], "'nowhere' is not"),
        (["AGENT", f"{__name__}:Dark", "--video", "film.mp4"], "cannot be filmed: its render_mode is None"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    args: list[str], message: str, agent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *(str(agent) if arg == "AGENT" else arg for arg in args)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert list(Path().iterdir()) == []


def test_other_actions_are_refused(agent: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    made = Lamp.__init__

    def with_three(self: Lamp, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        self.action_space = gym.spaces.Discrete(3)

    monkeypatch.setattr(Lamp, "__init__", with_three)
    assert main(["eval", str(agent), ENV]) == 2
    assert "The agent has actions Discrete(2), and" in capsys.readouterr().err


def test_a_run_that_has_saved_nothing_yet_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    RunConfig("train-offline", "m", "a.npz", {}).write(Path())
    assert main(["eval", "."]) == 2
    assert ". has no model yet. Wait for the first checkpoint" in capsys.readouterr().err
    RunConfig("train", "m", "CartPole-v1", {}).write(Path())
    assert main(["eval", "."]) == 2
    assert ". has no agent yet." in capsys.readouterr().err


def test_models_shows_every_preset_with_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    known = list_models(verbose=True)
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.split()[:1] and line.split()[0] in known}
    assert list(rows) == list(known)
    assert rows["dreamerv3:size12m"][0] == f"{known['dreamerv3:size12m']['params']:,}"
    assert " ".join(rows["tdmpc2:5m"][1:]) == "tdmpc, tdmpc2"
    assert main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == known
