"""`worldflux doctor`: reports what works on this machine, and how to install the rest."""

from __future__ import annotations

import json
import sys
from typing import Any

import gymnasium as gym
import pytest
import torch
from helpers.small_models import PRESETS
from helpers.tape import SpoiledCapturer, TapeCapturer, stale

from worldflux import WorldModel, create_world_model
from worldflux.agents import acting
from worldflux.cli import device_check, diagnosis
from worldflux.cli.main import main
from worldflux.errors import install_hint
from worldflux.models.dreamerv3.rssm import RSSM, Observed
from worldflux.nn.definitions import by_definition

ENV = "helpers.envs:Corridor"
RETURNS_NAN = f"{__name__}:NotANumber"


class NotANumber(gym.Env[Any, Any]):
    """An environment that violates its contract."""

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Discrete(2)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return 0, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return 0, float("nan"), False, True, {}


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick programs in place of rendering a frame with each backend, which succeed, fail and crash."""
    programs = {
        "egl": "pass",
        "osmesa": "raise OSError('no such library')",
        "glfw": "import signal; os.kill(os.getpid(), signal.SIGSEGV)",
    }
    monkeypatch.setattr(diagnosis, "_FRAME", f"import os; exec({programs}[os.environ['MUJOCO_GL']])")
    monkeypatch.setattr(diagnosis, "choose_backend", lambda: "egl")
    monkeypatch.delenv("MUJOCO_GL", raising=False)


def report(capsys: pytest.CaptureFixture[str], *args: str, status: int = 0) -> dict[str, Any]:
    assert main(["doctor", *args, "--json"]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_versions_and_device_are_this_machines(capsys: pytest.CaptureFixture[str], frames: None) -> None:
    found = report(capsys)
    assert found["versions"]["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert found["versions"]["torch"] == torch.__version__
    assert {"worldflux", "gymnasium", "stable-baselines3", "mujoco", "ale-py", "rl_zoo3"} <= set(found["versions"])
    assert found["device"]["threads of torch"] == torch.get_num_threads()
    assert found["device"]["works"].startswith("works on ")
    assert found["environment"] is None
    assert found["works"] is True


def test_a_backend_that_fails_or_crashes_does_not_take_the_doctor_down(
    capsys: pytest.CaptureFixture[str], frames: None
) -> None:
    found = report(capsys)["rendering"]
    assert found["egl"] == "works"
    assert found["osmesa"] == ("does not work (OSError: no such library); it needs: apt-get install libosmesa6")
    assert found["glfw"] == "does not work (signal 11); it needs: a display (DISPLAY is not set)"
    assert found["worldflux uses"] == "egl"


def test_a_backend_that_hangs_is_ended(
    capsys: pytest.CaptureFixture[str], frames: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "_FRAME", "import time; time.sleep(60)")
    monkeypatch.setattr(diagnosis, "_SECONDS", 0.5)
    assert report(capsys)["rendering"]["osmesa"] == "no frame after 0.5 seconds"


def test_the_frame_is_really_drawn() -> None:
    """Uses the backend of this machine, if there is one."""
    from worldflux.envs.suites.rendering import choose_backend

    backend = choose_backend()
    if backend not in diagnosis.BACKENDS:
        pytest.skip("nothing draws on this machine")
    assert diagnosis.rendering()[backend] == "works"


def test_an_environment_is_checked(capsys: pytest.CaptureFixture[str], frames: None) -> None:
    good = report(capsys, ENV)
    assert good["works"] and good["environment"]["works"]
    assert ["ok", "rewards are finite numbers"] in good["environment"]["checks"]
    bad = report(capsys, RETURNS_NAN, status=1)
    assert not bad["works"]
    assert [status for status, text in bad["environment"]["checks"] if "reward of step 0 is nan" in text] == ["failed"]
    unknown = report(capsys, "CartPole-v9", status=1)["environment"]
    assert unknown["checks"][0][0] == "failed" and "CartPole-v9" in unknown["checks"][0][1]


def test_a_device_that_was_asked_for_has_to_work(capsys: pytest.CaptureFixture[str], frames: None) -> None:
    number = torch.cuda.device_count()
    found = report(capsys, "--device", f"cuda:{number}", status=1)
    assert found["device"]["works"] is None
    assert f"torch sees {number} CUDA devices" in found["device"]["problem"]
    assert report(capsys, "--device", "cpu")["device"]["works"] == "works on cpu"


def test_what_is_missing_comes_with_the_command_that_installs_it(
    capsys: pytest.CaptureFixture[str], frames: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = {"ale-py": "atari", "dm-control": "dmc", "tensorboard": "extra", "tyro": None, "mujoco": "dmc"}
    known = diagnosis.installed_version
    monkeypatch.setattr(diagnosis, "installed_version", lambda name: None if name in gone else known(name))
    found = report(capsys)
    for name, extra in gone.items():
        assert found["missing"][name] == (install_hint(extra) if extra else f"pip install {name}")
    assert "torch" not in found["missing"]
    assert found["rendering"] == {}  # without MuJoCo


def test_the_page_for_people_has_the_same_lines(capsys: pytest.CaptureFixture[str], frames: None) -> None:
    assert main(["doctor", ENV, "--device", "cuda:99"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"  torch              {torch.__version__}" in lines
    assert "  egl                works" in lines
    assert "  ok                 rewards are finite numbers" in lines
    assert any(line.startswith("  --device cuda:99   does not work: device is 'cuda:99'") for line in lines)
    for title in ("versions", "device", "not installed", ENV):
        assert title in lines


ROWS = [
    f"{model}:tiny, {obs}, {work}"
    for model in ("dreamerv3", "tdmpc2")
    for obs in ("vectors", "pixels")
    for work in ("step", "action")
]


@pytest.fixture
def vectors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check, "_OBSERVATIONS", {"vectors": (12,)})
    monkeypatch.setattr(device_check, "_TIMED", 0.0)


@pytest.fixture
def small(vectors_only: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller models, for what takes many times as long as without it."""

    def make(name: str, **others: Any) -> WorldModel:
        return create_world_model(name, **PRESETS[name], **others)

    monkeypatch.setattr(device_check, "create_world_model", make)


def test_the_forms_of_a_device_are_compared_and_timed(
    capsys: pytest.CaptureFixture[str], frames: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_check, "_TIMED", 0.0)
    assert main(["doctor", "--check-device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    title = lines.index("one gradient step and one action on cpu, milliseconds")
    assert lines[title + 1].split() == ["plain", "fast"]
    for name, line in zip(ROWS, lines[title + 2 :], strict=False):
        assert line.startswith(f"  {name}") and line.endswith("same results")
        assert all(float(number) > 0 for number in line.removeprefix(f"  {name}").split()[:2])
    assert report(capsys)["check"] is None  # only when asked for


def test_a_fast_form_that_computes_something_else_is_found(
    capsys: pytest.CaptureFixture[str], frames: None, vectors_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain implementation is changed, as if the fast one were wrong: one function in each family."""
    plainly, mish = RSSM.observe, torch.nn.functional.mish

    def other(self: RSSM, *args: Any, **options: Any) -> Observed:
        found = plainly(self, *args, **options)
        return found if self.takes_fast_form() else found._replace(deter=1.1 * found.deter)

    monkeypatch.setattr(RSSM, "observe", other)
    monkeypatch.setattr(torch.nn.functional, "mish", lambda x: 1.1 * mish(x))
    found = report(capsys, "--check-device", "cpu", status=1)
    assert found["works"] is False and found["check"]["works"] is False
    problems = {f"{row['model']} {row['computes']}": row["problems"] for row in found["check"]["rows"]}
    for problem in (*problems["dreamerv3:tiny step"], *problems["tdmpc2:tiny step"], *problems["tdmpc2:tiny action"]):
        assert problem.startswith("fast: ") and "differs by" in problem
    assert {name: len(found) for name, found in problems.items()} == {
        "dreamerv3:tiny step": 1,
        "dreamerv3:tiny action": 0,  # acting was not changed
        "tdmpc2:tiny step": 1,
        "tdmpc2:tiny action": 1,
    }


def test_what_differs_is_said_at_the_end_of_the_table(
    capsys: pytest.CaptureFixture[str], frames: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        device_check.Row("tdmpc2:tiny", "pixels", "step", {"plain": 9.25, "fast": 4.0, "captured": 1.5}, ["fast: w"]),
        device_check.Row("tdmpc2:tiny", "pixels", "action", {"plain": 3.0, "fast": 2.0}),
    ]
    monkeypatch.setattr(device_check, "_FAMILIES", {"tdmpc2:tiny": (2, 4)})
    monkeypatch.setattr(device_check, "_OBSERVATIONS", {"pixels": (3, 64, 64)})
    monkeypatch.setattr(device_check, "_checked", lambda *args: rows)
    assert main(["doctor", "--check-device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert f"{'plain':>46}{'fast':>10}{'captured':>10}" in out
    assert f"  {'tdmpc2:tiny, pixels, step':<34}      9.25      4.00      1.50   differs" in out
    assert f"  {'tdmpc2:tiny, pixels, action':<34}      3.00      2.00         -   same results" in out
    assert "  failed             tdmpc2:tiny, pixels, step: fast: w" in out
    assert f"with this: worldflux 0.1.0, torch {torch.__version__}" in out


@pytest.mark.parametrize("spoiled", [False, True])
def test_recordings_are_compared_where_a_device_has_them(
    spoiled: bool,
    capsys: pytest.CaptureFixture[str],
    frames: None,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uses tapes in place of CUDA graphs."""

    def recorder(device: torch.device) -> TapeCapturer:
        return SpoiledCapturer(device, stale("obs")) if spoiled else TapeCapturer(device)

    monkeypatch.setattr(device_check, "records", lambda device: True)
    monkeypatch.setattr(device_check, "compiles", lambda setting, device: False)
    monkeypatch.setattr(device_check, "CudaGraphCapturer", recorder)
    monkeypatch.setattr(acting, "CudaGraphCapturer", TapeCapturer)
    with by_definition():  # tapes see the operations of torch alone, and others round differently
        found = report(capsys, "--check-device", "cpu", status=int(spoiled))["check"]
    for row in found["rows"]:
        assert list(row["milliseconds"]) == ["plain", "fast", "captured"]
        wrong = [text for text in row["problems"] if text.startswith("captured: The gradient step of")]
        assert len(wrong) == len(row["problems"]) == int(spoiled and row["computes"] == "step")


def test_a_device_that_is_not_there_cannot_be_checked(capsys: pytest.CaptureFixture[str], frames: None) -> None:
    for device in ("cuda:99", "meta"):
        assert main(["doctor", "--check-device", device]) == 2
        assert "torch sees" in capsys.readouterr().err
