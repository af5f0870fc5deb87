"""`examples/offline_training.py`, with settings that take seconds."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from worldflux import create_world_model
from worldflux.envs import collect
from worldflux.training import ReplayBuffer

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "offline_training.py"
TINY = (
    "--episodes 2 --test-episodes 1 --looks 0 2 --windows 4 --context 2 --horizon 6 --batch-size 2 --sequence-length 9"
)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("offline_training", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["offline_training"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> Callable[[Path, str], dict[str, Any]]:
    """Runs the example, and gives what it reports; everything it writes is in the directory."""

    def report(out: Path, options: str) -> dict[str, Any]:
        example.main(["--out", str(out), *options.split()])
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    return report


def test_both_families_learn_from_the_file_and_their_errors_are_drawn(
    run: Callable[[Path, str], dict[str, Any]], tmp_path: Path
) -> None:
    report = run(tmp_path, TINY)
    assert ReplayBuffer.load(tmp_path / "train.npz").num_transitions == 400
    assert ReplayBuffer.load(tmp_path / "test.npz").num_episodes == 1
    assert report["env"] == "Pendulum-v1" and report["gradient_steps"] == 2
    for family, quantities in (
        ("dreamerv3", ["obs", "reward"]),
        ("tdmpc2", ["obs", "reward", "state/latent"]),
    ):
        assert create_world_model(str(tmp_path / family)).config.model_type == family
        with (tmp_path / f"{family}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        found = [(row["step"], row["quantity"], row["ahead"]) for row in rows]
        assert sorted(found) == sorted((s, q, str(a)) for s in ("0", "2") for q in quantities for a in range(1, 7))
        for row in rows:
            assert float(row["ratio"]) == pytest.approx(float(row["error"]) / float(row["unchanged"]), rel=0.01)
        last = {(row["quantity"], row["ahead"]): float(row["ratio"]) for row in rows if row["step"] == "2"}
        assert list(report[family]) == quantities
        for quantity, ratios in report[family].items():
            assert ratios == {ahead: pytest.approx(last[quantity, ahead], abs=1e-3) for ahead in ("1", "5")}
    assert (tmp_path / "prediction.png").read_bytes().startswith(b"\x89PNG")


def test_a_family_that_fails_ends_the_run_with_its_name(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(command: list[str]) -> SimpleNamespace:
        return SimpleNamespace(wait=lambda: command[-1] == "tdmpc2")

    monkeypatch.setattr(subprocess, "Popen", started)
    with pytest.raises(SystemExit, match="Training tdmpc2 failed; see the error above"):
        example.main(["--out", str(tmp_path), *TINY.split()])


def test_the_controller_swings_the_pendulum_up_and_every_third_episode_is_left_to_chance(example: ModuleType) -> None:
    buffer = collect("Pendulum-v1", example.MixedPolicy(0), episodes=6, seed=0)
    batch = buffer.sample(1, 6 * 201)
    returns = np.array([part.sum() for part in np.split(batch.rewards[0].numpy(), 6)])
    assert (returns[[0, 3]] > -450).all()
    assert (returns[[2, 5]] < -600).all()
    assert returns[[0, 1, 3, 4]].mean() > returns[[2, 5]].mean() + 400


@pytest.mark.slow
def test_predictions_of_both_families_beat_that_nothing_changes(
    run: Callable[[Path, str], dict[str, Any]], tmp_path: Path
) -> None:
    report = run(tmp_path, "--episodes 20 --test-episodes 6 --looks 0 400 --windows 128")
    for family in ("dreamerv3", "tdmpc2"):
        assert report[family]["obs"]["5"] < 0.7
        assert report[family]["obs"]["15"] < 0.8
        assert report[family]["reward"]["15"] < 0.9
