"""Options that reach the environment, the agent and the model: --env-kwargs, --render, --dtype, --compile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest

from worldflux import WorldFluxAgent, create_world_model
from worldflux.cli.main import main
from worldflux.cli.runs import RunConfig
from worldflux.training import ReplayBuffer

ENV = f"{__name__}:Lane"
MODEL = ["--set", "units=8", "--set", "hidden_dim=8", "--set", "deter_dim=16", "--batch-size", "2", "--seq-len", "4"]
TINY = [*MODEL, "--learning-starts", "16", "--buffer-size", "500", "--train-ratio", "4", "--seed", "3"]
SHORT = ["--steps", "20", "--eval-interval", "20", "--eval-episodes", "1", "--run", "run"]
GOAL = ["--env-kwargs", "length=7", "--env-kwargs", "goal=[1, 2]", "--env-kwargs", "name=a b"]
SIZE = ["--env-kwargs", "size=9"]


class Lane(gym.Env[Any, Any]):
    """Episodes of a given length, which remember how they were made and how often they were drawn."""

    metadata: dict[str, Any] = {"render_modes": ["human"], "render_fps": 100}  # noqa: RUF012
    made: ClassVar[list[Lane]] = []

    def __init__(
        self, length: int = 5, goal: Any = None, name: str = "", render_mode: str | None = None, size: int = 0
    ) -> None:
        self.size = size
        if length < 1:
            raise ValueError(f"a lane of length {length}\nleads nowhere")
        self.length, self.goal, self.name, self.render_mode, self.drawn = length, goal, name, render_mode, 0
        self.observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(2)
        self.made.append(self)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        self.drawn += self.render_mode == "human"
        return np.zeros(2, np.float32), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        self.drawn += self.render_mode == "human"
        return np.full(2, self.t / 100, np.float32), 1.0, self.t >= self.length, False, {}

    def render(self) -> None:
        pass


class Maze(Lane):
    """A constructor without defaults."""

    def __init__(self, rows: int, *, columns: int) -> None:
        super().__init__(rows * columns)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Lane, "made", [])


def train(*args: str) -> int:
    return main(["train", "dreamerv3:tiny", ENV, *TINY, *SHORT, *args])


def test_arguments_of_an_environment_stay_with_its_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*GOAL) == 0
    assert {(env.length, str(env.goal), env.name) for env in Lane.made} == {(7, "[1, 2]", "a b")}
    config = RunConfig.read(Path("run"))
    assert config.settings["env_kwargs"] == ["length=7", "goal=[1, 2]", "name=a b"]
    assert "--env-kwargs 'goal=[1, 2]'" in config.command
    capsys.readouterr()
    Lane.made.clear()
    assert main(["train", "--resume", "run", "--steps", "24"]) == 0
    capsys.readouterr()
    assert main(["eval", "run", "--episodes", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lengths"] == [7, 7]
    assert main(["imagine", "run/agent.zip", "--episodes", "3", "--horizon", "2", "--context", "2"]) == 0
    assert {env.length for env in Lane.made} == {7}
    assert main(["eval", "run", ENV, "--episodes", "1", "--json", "--env-kwargs", "length=3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["lengths"] == [3]


def test_other_commands_pass_arguments_as_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", ENV, "-o", "data.npz", "--episodes", "2", "--env-kwargs", "length=3", *SIZE]) == 0
    assert {env.size for env in Lane.made} == {9}  # an option of ids, and an argument of this class
    assert ReplayBuffer.load("data.npz").num_transitions == 6
    assert main(["check-env", ENV, "--steps", "20", "--env-kwargs", "length=4"]) == 0
    assert {env.length for env in Lane.made} == {3, 4}
    assert capsys.readouterr().out.splitlines()[1] == ENV
    bounded = ["CartPole-v1", "--env-kwargs", "max_episode_steps=4"]
    assert main(["collect", *bounded, "-o", "pole.npz", "--episodes", "2"]) == 0
    assert ReplayBuffer.load("pole.npz").num_transitions == 8


MISTAKES = [
    (["--env-kwargs", "length=0"], "cannot be made with --env-kwargs length=0: ValueError: a lane of length 0 leads"),
    (["--env-kwargs", "lenght=3"], "cannot be made with --env-kwargs lenght=3: TypeError: "),
    (["--env-kwargs", "length"], "--env-kwargs length is not understood, expected KEY=VALUE, such as g=1.6."),
    (["--env-kwargs", "length=1", "--env-kwargs", "length=2"], "--env-kwargs length was given twice."),
    (["--env-kwargs", "render_mode=human"], "--render shows the environment"),
    (["--env-kwargs", "action_repeat=2"], "unexpected keyword argument 'action_repeat'"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
@pytest.mark.parametrize("command", ["train", "collect", "check-env"])
def test_mistakes_in_arguments_are_one_line(
    command: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = {"train": ["train", "dreamerv3:tiny", ENV], "collect": ["collect", ENV, "-o", "a.npz", "--steps", "5"]}
    assert main([*args.get(command, ["check-env", ENV]), *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert list(Path().iterdir()) == []


def test_arguments_that_a_constructor_needs_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    maze = ENV.replace("Lane", "Maze")
    assert main(["check-env", maze, "--env-kwargs", "rows=2"]) == 2
    needed = "needs arguments that are missing. Give them with --env-kwargs columns=VALUE."
    assert capsys.readouterr().err == f"worldflux: {maze} {needed}\n"
    assert main(["check-env", maze, "--steps", "20", "--env-kwargs", "rows=2", "--env-kwargs", "columns=2"]) == 0


def test_an_argument_that_an_id_does_not_take_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", "tdmpc2:tiny", "Pendulum-v1", "--env-kwargs", "x=1", "--env-kwargs", "g=9"]
    for more in ([], ["--processes"]):
        assert main([*args, *more]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "unexpected keyword argument 'x'" in err
    assert main([*args[:3], "--env-kwargs", "action_repeat=2"]) == 2
    assert "--env-kwargs action_repeat: this argument has its own option, --action-repeat" in capsys.readouterr().err


def test_a_window_shows_the_first_environment_of_the_training() -> None:
    assert train("--render", "--n-envs", "2") == 0
    evaluated, first, second = Lane.made
    assert (evaluated.render_mode, first.render_mode, second.render_mode) == (None, "human", None)
    assert first.drawn >= 10 and second.drawn == 0
    assert RunConfig.read(Path("run")).settings["render"] is True
    Lane.made.clear()
    # A resumed run may be on a machine without a display.
    for options, expected in ((["24"], None), (["28", "--render"], "human")):
        assert main(["train", "--resume", "run", "--steps", *options]) == 0
        assert Lane.made[-2].render_mode == expected


def test_what_cannot_be_shown_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert train("--render", "--processes") == 2
    assert "--render shows an environment of this process. Leave out --processes." in capsys.readouterr().err

    def reset(self: Lane, **options: Any) -> Any:
        raise RuntimeError("No available video device")

    assert train() == 0
    monkeypatch.setattr(Lane, "reset", reset)
    capsys.readouterr()
    for command in (["train", "dreamerv3:tiny", ENV, "--run", "other"], ["eval", "run"]):
        assert main([*command, "--render"]) == 2
        assert f"{ENV} cannot be shown in a window: No available video device. Leave out" in capsys.readouterr().err
    assert main(["train", "dreamerv3:tiny", "helpers.envs:Corridor", "--render"]) == 2
    assert "cannot be shown: its render_mode is None, expected 'human'" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["run"]


def test_eval_shows_the_episodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    Lane.made.clear()
    assert main(["eval", "run", "--episodes", "1", "--render"]) == 0
    (env,) = Lane.made
    assert (env.render_mode, env.drawn) == ("human", 1 + 6)
    assert main(["eval", "run", "--render", "--video", "a.gif"]) == 2
    assert "--render and --video cannot be combined" in capsys.readouterr().err


@pytest.mark.parametrize(("env", "pixels"), [("CartPole-v1", False), ("CartPole-v1", True)])
def test_environments_given_by_their_id_open_a_window(env: str, pixels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import pygame

    from worldflux.cli.environments import make_environments
    from worldflux.cli.options import EnvOptions

    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    envs = make_environments(env, EnvOptions(pixels=pixels), 1, seed=0, render=True)
    window = pygame.display.get_surface()
    assert window is not None and len(np.unique(pygame.surfarray.array3d(window))) > 2
    assert envs.observation_space.shape == ((64, 64, 3) if pixels else (4,))
    envs.close()


def needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worldflux.accel.compilation._missing", lambda device: "a C++ compiler")


def trains_offline(*options: str) -> int:
    buffer = ReplayBuffer(100, (2,), 2)
    for _ in range(3):
        buffer.add_episode(np.zeros((9, 2)), np.eye(2)[np.arange(8) % 2], np.zeros(8), np.arange(8) == 7)
    buffer.save("data.npz")
    return main(["train-offline", "dreamerv3:tiny", "data.npz", *MODEL, "--steps", "2", "--run", "run", *options])


@pytest.mark.parametrize(("start", "model"), [(train, "agent.zip"), (trains_offline, "model")])
def test_the_dtype_is_that_of_the_model(
    start: Callable[..., int], model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--dtype", "bfloat16", "--set", "dtype=float16") == 2
    assert "--set dtype and --dtype bfloat16 are both given" in capsys.readouterr().err
    assert start("--dtype", "bfloat16") == 0
    path = f"run/{model}"
    made = WorldFluxAgent.load(path).model if model == "agent.zip" else create_world_model(path)
    assert made.config.dtype == "bfloat16"
    assert RunConfig.read(Path("run")).settings["dtype"] == "bfloat16"


@pytest.mark.parametrize("start", [train, trains_offline])
def test_compile_reaches_what_trains(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_a_compiler(monkeypatch)
    assert start("--compile", "true") == 2
    assert "compile is True, but torch.compile needs a C++ compiler" in capsys.readouterr().err
    assert start("--compile", "false") == 0
    assert RunConfig.read(Path("run")).settings["compile"] == "false"
    if start is train:
        assert WorldFluxAgent.load("run/agent.zip").compile is False
