"""`worldflux imagine`: errors, pictures and films of what a model predicts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from helpers.agents import TINY, make_agent
from helpers.envs import CountingEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from worldflux.agents import WorldFluxAgent
from worldflux.cli.main import main
from worldflux.cli.runs import RunConfig, saved_agent
from worldflux.diagnostics import plots
from worldflux.training import ReplayBuffer, open_loop


def imagining(obs: str = "vector", **settings: Any) -> WorldFluxAgent:
    """An agent in episodes of 9 and 30 steps."""
    return make_agent(CountingEnv(lengths=(9, 30), obs=obs), **{"train_ratio": 2, "learning_starts": 20, **settings})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of an agent that observes vectors; its zip and its replay data lie beside it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "step-00000120"
    agent = imagining()
    agent.learn(120)
    agent.save_checkpoint(path)
    agent.save(path.parent / "agent.zip")
    agent.save_replay_buffer(path.parent / "data.npz")
    return path


def numbers(output: Path) -> dict[str, Any]:
    return json.loads((output / "imagination.json").read_text())


def frames_of(path: Path) -> int:
    video, count = cv2.VideoCapture(str(path)), 0
    while video.read()[0]:
        count += 1
    return count


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws nothing, which takes longer than everything else and is tested with other data."""
    monkeypatch.setattr(plots, "figures", lambda *given, **options: {})


SMALL = ["--context", "3", "--horizon", "6", "--windows", "8", "--shown", "2"]


def test_its_numbers_are_the_errors_of_open_loop(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = checkpoint.parent / "data.npz"
    assert main(["imagine", str(checkpoint), str(data), *SMALL, "--seed", "5", "-o", str(tmp_path)]) == 0
    batch = ReplayBuffer.load(data, seed=5).sample(8, 9)
    errors = open_loop(WorldFluxAgent.load(checkpoint).model, batch, context=3, seed=5).errors()
    found = numbers(tmp_path)
    assert found["data"] == "episodes of data.npz" and found["agent"] == str(checkpoint)
    assert (found["context"], found["horizon"], found["windows"], found["futures"]) == (3, 6, 8, 1)
    assert found["errors"].keys() == errors.keys()
    for name, error in errors.items():
        expected = [value if math.isfinite(value) else None for value in error.model.mean]
        assert found["errors"][name]["model"]["mean"] == expected
    lines = capsys.readouterr().out.splitlines()
    names = ["continues.png", "errors.png", "imagination.json", "imagination.png", "rewards.png"]
    assert lines[:5] == [str(tmp_path / name) for name in names]
    ratio = found["errors"]["obs"]["overall_ratio"]
    assert lines[5].startswith("obs: error ") and lines[5].endswith(f"{ratio:.3g} of the error of 'nothing changes'")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == names
    for name in names:
        if name.endswith(".png"):
            assert cv2.imread(str(tmp_path / name)).min() < 128  # something is drawn on white


def test_a_checkpoint_and_the_directory_of_its_run_bring_their_replay_data(
    checkpoint: Path, tmp_path: Path, no_pictures: None
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    RunConfig("train", "dreamerv3:tiny", "CartPole-v1", {}).write(run)
    newest = run / "checkpoints" / checkpoint.name
    newest.symlink_to(checkpoint)
    found = [saved_agent(path, newest=True).path for path in (checkpoint, checkpoint.parent, run)]
    assert found == [checkpoint, checkpoint, newest]
    assert main(["imagine", str(run), *SMALL, "-o", str(tmp_path / "out")]) == 0
    assert numbers(tmp_path / "out")["data"] == f"replay data of {checkpoint.name}"
    # The episodes of 9 steps do not reach six steps behind every context, those of 30 do.
    counts = numbers(tmp_path / "out")["errors"]["obs"]["model"]["count"]
    assert counts[0] > counts[-1] > 0


def test_an_agent_of_a_run_acts_in_the_environment_of_the_run(tmp_path: Path, no_pictures: None) -> None:
    agent = make_agent()
    agent.save(tmp_path / "best_agent.zip")
    RunConfig("train", "dreamerv3:tiny", "CartPole-v1", {"action_repeat": 2}).write(tmp_path)
    output = tmp_path / "out"
    assert main(["imagine", str(tmp_path / "best_agent.zip"), *SMALL, "--episodes", "3", "-o", str(output)]) == 0
    assert numbers(output)["data"] == "3 new episodes in CartPole-v1"
    # Two steps of CartPole in one of the agent's.
    assert numbers(output)["rewards"]["earned"] > 1.5


def test_images_become_a_video_and_a_strip(tmp_path: Path) -> None:
    agent = imagining("image", train_ratio=0, buffer_size=100)
    agent.learn(60)
    agent.save_checkpoint(tmp_path / "agent")
    output = tmp_path / "out"
    assert main(["imagine", str(tmp_path / "agent"), *SMALL, "-o", str(output)]) == 0
    assert frames_of(output / "imagination.mp4") == 9
    video = cv2.VideoCapture(str(output / "imagination.mp4"))
    assert video.get(cv2.CAP_PROP_FPS) == 10
    size = video.get(cv2.CAP_PROP_FRAME_WIDTH), video.get(cv2.CAP_PROP_FRAME_HEIGHT)
    assert size == (84 + 2 * (96 + 6) + 6, 30 + 3 * (96 + 6) + 22)  # of pictures that are enlarged from 48 to 96
    assert (output / "imagination-strip.png").is_file()
    assert numbers(output)["windows"] == 8


def test_images_are_not_drawn_without_a_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent = imagining("image", buffer_size=100, model_kwargs={**TINY, "representation": "redundancy"})
    agent.learn(60)
    agent.save_checkpoint(tmp_path / "agent")
    output = tmp_path / "out"
    assert main(["imagine", str(tmp_path / "agent"), *SMALL, "-o", str(output)]) == 0
    names = {"continues.png", "errors.png", "imagination.json", "imagination.png", "rewards.png"}
    assert {entry.name for entry in output.iterdir()} == names
    said = capsys.readouterr().out
    assert "The model has no decoder and draws no observations: its rewards, continuation, values" in said
    for name in ("reward", "continue", "value", "state/deter"):
        assert f"{name}: error" in said
    assert math.isfinite(numbers(output)["errors"]["value"]["model"]["mean"][0])


def test_new_episodes_of_the_agent_can_be_recorded(
    tmp_path: Path, no_pictures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = WorldFluxAgent("tdmpc2:tiny", "Pendulum-v1", planner=None, device="cpu", seed=0, buffer_size=2000)
    agent.save(tmp_path / "agent.zip")
    arguments = ["imagine", str(tmp_path / "agent"), "--env", "Pendulum-v1", "--episodes", "2", *SMALL]
    assert main([*arguments, "--samples", "3", "-o", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert "The model has no decoder and draws no observations: its rewards, continuation, values" in said
    assert "state/latent: error" in said and "value: error" in said
    found = numbers(tmp_path / "a")
    assert found["data"] == "2 new episodes in Pendulum-v1"
    assert found["futures"] == 3 and "obs" not in found["errors"]
    assert main([*arguments, "--samples", "3", "-o", str(tmp_path / "b")]) == 0
    assert numbers(tmp_path / "b")["errors"] == found["errors"]


def test_what_cannot_be_drawn_is_refused_in_a_sentence(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    archive, data = str(checkpoint.parent / "agent.zip"), str(checkpoint.parent / "data.npz")
    refused = {
        ("nothing",): "There is no 'nothing'. AGENT is a zip of WorldFluxAgent.save",
        ("empty",): "empty contains neither a checkpoint of an agent nor a model",
        (archive,): "holds no replay data. Add recorded episodes",
        (archive, "nothing.npz"): "There is no file 'nothing.npz'",
        (archive, data, "--env", "CartPole-v1"): "Leave one of them out",
        (archive, "--env", "CartPole-v1"): "The agent has actions",
        (archive, "--env", "Pendulum-v1"): "The agent has observations (4,), and Pendulum-v1 has (3,)",
        (archive, data, "--size", "32"): "--size: options of an environment need --env",
        (archive, data, "--horizon", "0"): "horizon is 0, expected a whole number from 1",
        (archive, data, "--horizon", "500"): "no window fits",
        (archive, data, "-o", "file"): "--output is 'file', which is a file, expected a directory",
    }
    for arguments, message in refused.items():
        assert main(["imagine", *arguments]) == 2
        assert message in capsys.readouterr().err
    ReplayBuffer(50, (2,), 1, seed=0).save("other.npz")
    assert main(["imagine", archive, "other.npz"]) == 2
    assert "The episodes of other.npz have observations (2,) and 1 action dimensions" in capsys.readouterr().err
    assert not list((tmp_path / "imagination").iterdir())


def test_replay_data_that_were_normalised_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = VecNormalize(DummyVecEnv([lambda: CountingEnv(lengths=(20,))]))
    agent = make_agent(env, train_ratio=0)
    agent.learn(40)
    agent.save_checkpoint(tmp_path / "agent")
    assert main(["imagine", str(tmp_path / "agent"), "-o", str(tmp_path / "out")]) == 2
    assert "trained with a VecNormalize" in capsys.readouterr().err
