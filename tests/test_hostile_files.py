"""Files that somebody else may have made to hurt: each is refused by an error of ours, and at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from envs_for_tests import CountingEnv
from gymnasium import spaces

from worldflux import WorldFluxAgent, create_world_model
from worldflux.cli.evaluations import read_evaluations
from worldflux.cli.runs import RunConfig
from worldflux.config import WorldModelConfig
from worldflux.errors import CheckpointError, ConfigurationError
from worldflux.reading import MOST_JSON_BYTES, open_regular, read_json
from worldflux.training import TrainingConfig

MODEL = dict(latent_dim=16, hidden_dim=16, mlp_dim=16, enc_dim=16, num_q_networks=2)
SETTINGS: dict[str, Any] = dict(
    batch_size=4,
    train_ratio=6,
    buffer_size=200,
    learning_starts=20,
    device="cpu",
    seed=0,
    planner_kwargs=dict(num_samples=16, num_elites=4, num_pi_trajs=4, iterations=2),
    model_kwargs=MODEL,
)


def make_env() -> CountingEnv:
    return CountingEnv(action_space=spaces.Box(-1, 1, (1,), np.float32))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each file, all of them good."""
    root = tmp_path_factory.mktemp("good")
    agent = WorldFluxAgent("tdmpc2:tiny", make_env(), **SETTINGS).learn(30)
    assert agent._n_updates > 0
    agent.save_checkpoint(root / "checkpoint")
    agent.save(root / "agent.zip")
    agent.model.save_pretrained(root / "model")
    TrainingConfig().save(root / "training.json")
    (root / "run").mkdir()
    RunConfig("train", "tdmpc2:tiny", "Pendulum-v1", {}).write(root / "run")
    return root


@pytest.fixture
def place(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(good, tmp_path / "place")


def resume(place: Path) -> WorldFluxAgent:
    return WorldFluxAgent.load(place / "checkpoint", make_env(), device="cpu", resume=True)


READERS: dict[str, Callable[[Path], Any]] = {
    "checkpoint/agent.json": resume,
    "checkpoint/run.json": resume,
    "checkpoint/trainer.json": resume,
    "checkpoint/replay/replay.json": resume,
    "checkpoint/config.json": resume,
    "model/config.json": lambda place: create_world_model(place / "model"),
    "training.json": lambda place: TrainingConfig.load(place / "training.json"),
    "run/config.json": lambda place: RunConfig.read(place / "run"),
}
"""What reads each JSON file."""


def replaced(path: Path, content: bytes | None) -> None:
    """Puts other content, or a pipe that nobody writes to, in a file's place; others may share the old one."""
    path.unlink()
    os.mkfifo(path) if content is None else path.write_bytes(content)


# JSON

TEXTS: dict[str, tuple[bytes | None, str]] = {
    "brackets": (b"[" * 100_000, "lie in each other more than 64 times"),
    "objects in objects": (b'{"a":' * 65 + b"1" + b"}" * 65, "lie in each other more than 64 times"),
    "many digits": (b'{"a": ' + b"9" * 5_000 + b"}", "digits"),
    "some digits": (b'{"a": ' + b"9" * 400 + b"}", "a number has 400 digits, expected at most 308"),
    "an infinite number": (b'{"a": 1e999}', "a number is inf"),
    "NaN": (b'{"a": [NaN]}', "a number is nan"),
    "twice": (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
    "no text": (b"\xff\xfe\x00\xd8", "it is not a text file, expected JSON"),
    "cut short": (b'{"a": ', "Expecting value"),
    "a pipe": (None, "a directory, a pipe or a device, expected a file"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_json_beyond_all_bounds_is_refused(kind: str, tmp_path: Path) -> None:
    content, message = TEXTS[kind]
    path = tmp_path / "file.json"
    path.touch()
    replaced(path, content)
    with pytest.raises(CheckpointError, match=rf"file\.json cannot be read: .*{message}"):
        read_json(path)


def test_json_within_the_bounds_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for value in ({"a": [1, 2.5, None, True, "b"]}, 2**1023 - 1, -(2**128), [], "", 0):
        path.write_text(json.dumps(value))
        assert read_json(path) == value
    path.write_text("[" * 64 + "]" * 64)
    read_json(path)
    path.write_text('{"a": Infinity}')
    assert read_json(path, finite=False) == {"a": float("inf")}


def test_a_large_json_file_is_not_even_read(tmp_path: Path) -> None:
    with (tmp_path / "file.json").open("wb") as file:
        file.truncate(MOST_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="it has more than 32 MB"):
        read_json(tmp_path / "file.json")


def test_what_is_no_json_is_told_apart_where_that_is_documented(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text("{")
    with pytest.raises(json.JSONDecodeError, match=r"file\.json cannot be read: Expecting .*line 1 column 2") as raised:
        WorldModelConfig.load(tmp_path / "file.json")
    assert isinstance(raised.value, ConfigurationError)


@pytest.mark.parametrize("kind", ["brackets", "many digits", "twice", "a pipe"])
@pytest.mark.parametrize("name", READERS)
def test_every_reader_of_json_refuses_it(name: str, kind: str, place: Path) -> None:
    replaced(place / name, TEXTS[kind][0])
    # What marks a directory as a checkpoint is looked for, and a pipe is no file.
    missing = (FileNotFoundError,) if (name, kind) == ("checkpoint/agent.json", "a pipe") else ()
    with pytest.raises((CheckpointError, ConfigurationError, *missing)):
        READERS[name](place)


@pytest.mark.parametrize("content", [b"step,score\n\0\n", b"step,score\n" + b"9" * 200_000, b"\xff\xfe"])
def test_a_learning_curve_that_csv_cannot_read_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "evaluations.csv").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a file of evaluations"):
        read_evaluations(tmp_path / "evaluations.csv")


@pytest.mark.parametrize("path", ["/dev/zero", ".", "pipe"])
def test_only_regular_files_are_opened(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(OSError, match="a directory, a pipe or a device, expected a file"):
        open_regular(path)
