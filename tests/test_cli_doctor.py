"""`worldflux doctor`: what works on this machine, and the command for what does not."""

from __future__ import annotations

import json
import sys
from typing import Any

import gymnasium as gym
import pytest
import torch

from worldflux.cli import diagnosis
from worldflux.cli.main import main

ENV = "envs_for_tests:Corridor"
RETURNS_NAN = f"{__name__}:NotANumber"


class NotANumber(gym.Env[Any, Any]):
    """Keeps no contract."""

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Discrete(2)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return 0, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return 0, float("nan"), False, True, {}


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Programs that stand for drawing a frame with each backend; they are quick and fail in every way."""
    programs = {
        "egl": "import os; assert os.environ['MUJOCO_GL'] == 'egl'",
        "osmesa": "raise OSError('no such library')",
        "glfw": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    }
    start = diagnosis._start

    def started(backend: str) -> Any:
        monkeypatch.setattr(diagnosis, "_FRAME", programs[backend])
        return start(backend)

    monkeypatch.setattr(diagnosis, "_start", started)
    monkeypatch.setattr(diagnosis, "choose_backend", lambda: "egl")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    return programs


def report(capsys: pytest.CaptureFixture[str], *args: str, status: int = 0) -> dict[str, Any]:
    assert main(["doctor", *args, "--json"]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_versions_and_device_are_this_machines(capsys: pytest.CaptureFixture[str], frames: dict[str, str]) -> None:
    found = report(capsys)
    assert found["versions"]["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert found["versions"]["torch"] == torch.__version__
    assert {"worldflux", "gymnasium", "stable-baselines3", "mujoco", "ale-py", "rl_zoo3"} <= set(found["versions"])
    assert found["device"]["threads of torch"] == torch.get_num_threads()
    assert found["device"]["works"].startswith("works on ")
    assert found["environment"] is None
    assert found["works"] is True


def test_a_backend_that_fails_or_crashes_does_not_take_the_doctor_down(
    capsys: pytest.CaptureFixture[str], frames: dict[str, str]
) -> None:
    found = report(capsys)["rendering"]
    assert found["egl"] == "works"
    assert found["osmesa"] == ("does not work (OSError: no such library); what it needs: apt-get install libosmesa6")
    assert found["glfw"] == "does not work (signal 11); what it needs: a display (DISPLAY is not set)"
    assert found["worldflux takes"] == "egl"


def test_a_backend_that_hangs_is_ended(
    capsys: pytest.CaptureFixture[str], frames: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames["osmesa"] = "import time; time.sleep(60)"
    monkeypatch.setattr(diagnosis, "_SECONDS", 0.5)
    assert report(capsys)["rendering"]["osmesa"] == "no frame after 0.5 seconds"


def test_the_frame_is_really_drawn() -> None:
    """With whatever draws here; where nothing does, there is nothing to compare with."""
    from worldflux.envs.rendering import choose_backend

    backend = choose_backend()
    if backend not in diagnosis.BACKENDS:
        pytest.skip("nothing draws on this machine")
    assert diagnosis._answer(backend, diagnosis._start(backend)) == "works"


def test_an_environment_is_checked(capsys: pytest.CaptureFixture[str], frames: dict[str, str]) -> None:
    good = report(capsys, ENV)
    assert good["works"] and good["environment"]["works"]
    assert ["ok", "rewards are finite numbers"] in good["environment"]["checks"]
    bad = report(capsys, RETURNS_NAN, status=1)
    assert not bad["works"]
    assert [status for status, text in bad["environment"]["checks"] if "reward of step 0 is nan" in text] == ["failed"]
    unknown = report(capsys, "CartPole-v9", status=1)["environment"]
    assert unknown["checks"][0][0] == "failed" and "CartPole-v9" in unknown["checks"][0][1]


def test_a_device_that_was_asked_for_has_to_work(capsys: pytest.CaptureFixture[str], frames: dict[str, str]) -> None:
    number = torch.cuda.device_count()
    found = report(capsys, "--device", f"cuda:{number}", status=1)
    assert found["device"]["works"] is None
    assert f"torch sees {number} CUDA devices here" in found["device"]["problem"]
    assert report(capsys, "--device", "cpu")["device"]["works"] == "works on cpu"


def test_what_is_missing_comes_with_the_command_that_installs_it(
    capsys: pytest.CaptureFixture[str], frames: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = {"ale-py": "atari", "dm-control": "dmc", "tensorboard": "extra", "tyro": None, "mujoco": "dmc"}
    known = diagnosis.installed_version
    monkeypatch.setattr(diagnosis, "installed_version", lambda name: None if name in gone else known(name))
    found = report(capsys)
    for name, extra in gone.items():
        assert found["missing"][name] == (f'pip install "worldflux[{extra}]"' if extra else f"pip install {name}")
    assert "torch" not in found["missing"]
    assert found["rendering"] == {}  # without MuJoCo


def test_the_page_for_people_has_the_same_lines(capsys: pytest.CaptureFixture[str], frames: dict[str, str]) -> None:
    assert main(["doctor", ENV, "--device", "cuda:99"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"  torch              {torch.__version__}" in lines
    assert "  egl                works" in lines
    assert "  ok                 rewards are finite numbers" in lines
    assert any(line.startswith("  --device cuda:99   does not work: device is 'cuda:99'") for line in lines)
    for title in ("versions", "device", "not installed", ENV):
        assert title in lines
