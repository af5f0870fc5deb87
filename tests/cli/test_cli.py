"""The `worldflux` command, as a user calls it."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from worldflux.cli.environments import find_environment
from worldflux.cli.main import COMMANDS, main
from worldflux.cli.run_callbacks import ProgressLines
from worldflux.errors import ConfigurationError
from worldflux.training import ReplayBuffer

OWN_ENV = '''
import gymnasium as gym
import numpy as np
import neighbour


class Coin(gym.Env):
    """Guess the coin; right guesses earn 1."""

    reward = neighbour.REWARD

    def __init__(self):
        self.observation_space = gym.spaces.Discrete(2)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.coin, self.t = int(self.np_random.integers(2)), 0
        return self.coin, {}

    def step(self, action):
        reward, self.t = float(action == self.coin) * self.reward, self.t + 1
        self.coin = int(self.np_random.integers(2))
        return self.coin, reward, False, self.t >= 10, {}


class Broken(Coin):
    reward = float("nan")


NUMBER = 3
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with a user's environment, which imports a file beside it."""
    (tmp_path / "coin_env.py").write_text(OWN_ENV, encoding="utf-8")
    (tmp_path / "neighbour.py").write_text("REWARD = 1.0\n", encoding="utf-8")
    (tmp_path / "typo_env.py").write_text("import numpi\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    # Only these modules are removed. Removing others would leave them half-imported for later tests.
    for name in ("coin_env", "neighbour", "typo_env"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["plot", "--help"], ["eval", "--help"]])
def test_help_comes_at_once_without_loading_anything_heavy(args: list[str]) -> None:
    code = (
        "import sys, time\nfrom worldflux.cli.main import main\n"
        f"try:\n    main({args})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'gymnasium', 'stable_baselines3', 'cv2', 'rich', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))\nprint(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, loaded, seconds = done.stdout.splitlines()
    assert done.stdout.startswith("usage: worldflux")
    assert loaded == "[]"
    assert float(seconds) < 0.6  # of the processor, where nothing else runs 0.2; torch alone takes more than 1


OPTIONS = {
    "train": ("[MODEL] [ENV ...]", "--resume DIR", "--seed INT", "--set FIELD=VALUE", "--eval-interval INT"),
    "eval": ("AGENT [ENV ...]", "--episodes INT", "--video FILE", "--json", "--pixels"),
    "imagine": (
        "AGENT",
        "[DATA ...]",
        "--env ENV",
        "--horizon INT",
        "--windows INT",
        "--seed INT",
        "--output",
        "--pixels",
    ),
    "plot": ("DIR ...", "--output FILE", "--x {steps,time}", "--no-reference"),
    "collect": ("ENV", "--output", "--seed INT", "--policy POLICY"),
    "train-offline": ("[MODEL] [DATA ...]", "--resume DIR", "--eval-share FLOAT", "--set FIELD=VALUE"),
    "report": ("RUN", "--output FILE", "--no-film", "--no-imagination", "--no-reference", "--episodes INT"),
    "reproduce": ("RUN", "--output DIR", "--steps INT", "--device DEVICE"),
    "push": ("AGENT REPO [ENV]", "--episodes INT", "--seed INT", "--video", "--private", "--preview DIR", "--pixels"),
    "data push": ("SOURCE REPO", "--env NAME", "--about TEXT", "--private", "--branch NAME", "--message NAME"),
    "data convert": ("SOURCE", "--output", "--format FORMAT", "--option NAME=VALUE", "--action-low FLOAT ..."),
    "data lint": ("SOURCE", "--format FORMAT", "--option NAME=VALUE", "--action-low FLOAT ...", "--json"),
    "models": ("--json",),
    "envs": ("[PATTERN]", "--all-versions", "--json"),
    "check-env": ("ENV", "--steps INT", "--seed INT", "--render"),
    "doctor": ("[ENV]", "--device DEVICE", "--check-device DEVICE", "--json"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_command_and_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    top = capsys.readouterr().out
    assert command in top
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert f"usage: worldflux {command} " in text
    for option in OPTIONS[command]:
        assert option in text
    assert "None" not in text and "default: False" not in text and "default: True" not in text  # say nothing
    assert max(map(len, text.splitlines()[1:])) <= 80
    purpose = text.splitlines()[2]
    assert " ".join(purpose.split()[:4]) in " ".join(top.split())


def test_help_of_a_command_builds_no_parser_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*, option: object) -> int:  # tyro cannot make an option of an object
        """Does nothing."""
        raise AssertionError

    monkeypatch.setitem(COMMANDS, "models", broken)
    with pytest.raises(SystemExit, match="0"):
        main(["eval", "--help"])


def test_unknown_commands_and_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["colect", "CartPole-v1"]) == 2
    message = "There is no command 'colect'; did you mean 'collect'? worldflux --help lists all commands."
    assert capsys.readouterr() == ("", f"worldflux: {message}\n")
    for args in (["check-env", "CartPole-v1", "--step", "3"], ["check-env"], ["--verbose"]):
        with pytest.raises(SystemExit, match="2"):
            main(args)
    assert "--steps" in capsys.readouterr().err  # the nearest option


def test_help_is_also_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    for args, shown in ((["help"], "usage: worldflux [-h]"), (["help", "eval"], "usage: worldflux eval ")):
        with pytest.raises(SystemExit, match="0"):
            main(args)
        out, err = capsys.readouterr()
        assert out.startswith(shown) and err == ""


@pytest.mark.parametrize(
    ("args", "advice"),
    [
        (["train", "dreamerv3:tinny", "CartPole-v1"], "worldflux models shows all, and there is no directory"),
        (["train", "dreamerv3:tiny", "CartPool-v1"], "worldflux envs shows all; import the package"),
    ],
)
def test_unknown_names_name_the_command_that_lists_all(
    args: list[str], advice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*args, "--run", str(tmp_path / "run")]) == 2
    assert advice in capsys.readouterr().err


def test_no_arguments_show_how_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: worldflux COMMAND")
    examples = [line.split() for line in err.splitlines() if line.startswith("  worldflux ")]
    assert [words[1] for words in examples] == ["train", "eval"]


def test_the_versions_and_python_m(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    import worldflux

    expected = f"worldflux {worldflux.__version__} (torch {torch.__version__}, Python {platform.python_version()})\n"
    assert main(["--version"]) == main(["-V"]) == 0
    assert capsys.readouterr().out == 2 * expected
    done = subprocess.run([sys.executable, "-m", "worldflux", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == expected


def test_closed_streams_are_no_error(own: Path) -> None:
    for status, closed in ((0, ">&- 2>&-"), (2, "2>&-")):  # the second one meets the first one's file
        command = f"{sys.executable} -m worldflux collect coin_env.py:Coin --steps 5 -o data.npz {closed}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (status, "", "")
    assert ReplayBuffer.load(own / "data.npz").num_transitions == 5


def test_ctrl_c_during_the_imports_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    from worldflux import __main__ as entry

    with monkeypatch.context() as patched:
        patched.delitem(sys.modules, "worldflux.cli.main")
        patched.setattr("builtins.__import__", interrupted)
        assert entry.main() == 130


def test_counts_may_be_written_as_people_write_them(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps, expected in (("2e1", 20), ("1_0", 10), ("15", 15)):
        assert main(["collect", "coin_env.py:Coin", "-o", "data.npz", "--overwrite", "--steps", steps]) == 0
        assert ReplayBuffer.load(own / "data.npz").num_transitions == expected
    for steps in ("1.5", "many", "inf", "nan"):
        with pytest.raises(SystemExit, match="2"):
            main(["collect", "coin_env.py:Coin", "-o", "other.npz", "--steps", steps])
        assert f"'{steps}' is not a whole number, such as" in capsys.readouterr().err


def test_check_env_prints_each_check_and_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-env", "CartPole-v1", "--steps", "50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "CartPole-v1"
    assert "  ok      the same seed gives the same episode: over 50 steps" in lines
    assert len(lines) == 16


def test_check_env_prints_the_same_without_rich(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["check-env", "Pendulum-v1", "--steps", "20"])
    coloured = capsys.readouterr().out
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    main(["check-env", "Pendulum-v1", "--steps", "20"])
    assert capsys.readouterr().out == coloured


def test_check_env_reads_a_class_from_a_file_or_a_module(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-env", "coin_env:Coin"]) == 0
    assert main(["check-env", str(own / "coin_env.py") + ":Coin"]) == 0
    assert capsys.readouterr().out.splitlines().count("Coin") == 2


def test_a_failed_check_is_shown_among_the_others_and_in_the_exit_status(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-env", "coin_env.py:Broken"]) == 1
    out = capsys.readouterr().out
    assert "  failed  rewards are finite numbers: The reward of step 0 is nan" in out
    assert "  ok      terminated and truncated are booleans" in out


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("CartPole-v9", "CartPole-v"),
        ("dmc/walker-wolk", "Unknown environment 'dmc/walker-wolk'; did you mean 'dmc/walker-walk'?"),
        ("coin_env.py:Con", "coin_env.py has no class or function 'Con'; did you mean 'Coin'?"),
        ("coin_env:NUMBER", "coin_env has no class or function 'NUMBER'"),
        ("coin_env.py", "'coin_env.py' is a file, expected a class in it as well: coin_env.py:MyEnv."),
        ("coin_env.py:", "expected a class in it as well: coin_env.py:MyEnv."),
        ("nowhere.py:Coin", "There is no file 'nowhere.py'"),
        ("no.where:Coin", "There is no module 'no.where'"),
        ("typo_env:Coin", "Module 'typo_env' cannot be imported: No module named 'numpi'"),
        ("typo_env.py:Coin", "typo_env.py cannot be imported: ModuleNotFoundError: No module named 'numpi'"),
    ],
)
def test_what_is_not_there_is_one_line_and_exit_status_2(
    own: Path, env: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-env", env]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("worldflux: ")
    assert message in err
    assert err.count("\n") == 1


def test_gymnasium_takes_a_module_and_an_id_in_its_own_form() -> None:
    assert find_environment("package.envs:MyEnv-v0") == "package.envs:MyEnv-v0"
    assert find_environment("ALE/Pong-v5") == "ALE/Pong-v5"
    with pytest.raises(ConfigurationError, match="There is no file"):
        find_environment(r"C:\envs\mine.py:MyEnv")


def test_ctrl_c_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("worldflux.envs.checking.check_env", interrupted)
    assert main(["check-env", "CartPole-v1"]) == 130


def test_collect_writes_whole_episodes_of_random_actions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pendulum.npz"
    assert main(["collect", "Pendulum-v1", "--output", str(path), "--episodes", "2", "--seed", "3"]) == 0
    buffer = ReplayBuffer.load(path)
    assert (buffer.num_transitions, buffer.num_episodes, buffer.obs_shape, buffer.action_dim) == (400, 2, (3,), 1)
    assert capsys.readouterr().out == f"{path}: 400 steps of 2 episodes.\n"


def test_collect_repeats_with_a_seed(tmp_path: Path) -> None:
    contents = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        path = str(tmp_path / f"{name}.npz")
        assert main(["collect", "CartPole-v1", "-o", path, "--steps", "100", "--n-envs", "2", "--seed", seed]) == 0
        with np.load(path) as arrays:
            contents.append(arrays["obs"].tobytes())
            assert len(arrays["rewards"]) == 100
    assert contents[0] == contents[1] != contents[2]


def test_collect_takes_a_persons_own_environment(own: Path) -> None:
    assert main(["collect", "coin_env.py:Coin", "-o", "coin.npz", "--episodes", "3"]) == 0
    assert ReplayBuffer.load(own / "coin.npz").num_transitions == 30


def test_collect_acts_with_a_saved_agent(tmp_path: Path) -> None:
    from worldflux import WorldFluxAgent

    env = gym.make("CartPole-v1")
    WorldFluxAgent("dreamerv3:tiny", env, seed=0, buffer_size=2_000).save(tmp_path / "agent.zip")
    path = str(tmp_path / "data.npz")
    args = ["collect", "CartPole-v1", "-o", path, "--steps", "30", "--seed", "0"]
    assert main([*args, "--policy", str(tmp_path / "agent.zip")]) == 0
    by_agent = ReplayBuffer.load(path).num_transitions
    assert by_agent >= 30


def test_collect_shows_its_progress(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", "coin_env.py:Coin", "-o", "coin.npz", "--episodes", "3", "--n-envs", "2"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines] == [["episode", "2/3"], ["episode", "3/3"]]
    assert main(["collect", "CartPole-v1", "-o", "a.npz", "--steps", "200", "--pixels", "--size", "16"]) == 0
    assert capsys.readouterr().err.count(" steps/s\n") == 20
    assert ReplayBuffer.load("a.npz").obs_shape == (3, 16, 16)


@pytest.mark.parametrize(("step", "rate"), [(25, "2.5"), (27_800, "2,780")])
def test_rates_are_written_out(step: int, rate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("worldflux.cli.run_callbacks.time.monotonic", lambda: now[0])
    lines = ProgressLines(50_000, 0)
    now[0] = 10.0
    assert lines.line(step, "") == f"step {step}/50000  {rate} steps/s"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_collect_keeps_what_it_has_when_it_is_stopped(
    number: signal.Signals, status: int, own: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_due(self: ProgressLines, step: int) -> bool:
        if step == 14:
            os.kill(os.getpid(), number)
        return False

    monkeypatch.setattr(ProgressLines, "is_due", is_due)
    assert main(["collect", "coin_env.py:Coin", "-o", "coin.npz", "--steps", "100"]) == status
    out, err = capfd.readouterr()
    assert out == "coin.npz: 14 steps of 2 episodes.\n"
    assert err.endswith("worldflux: stopped early; the last episode of each environment is cut short\n")
    buffer = ReplayBuffer.load(own / "coin.npz")
    assert (buffer.num_transitions, buffer.num_episodes) == (14, 2)


def test_collect_replaces_a_file_only_on_request(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "data.npz").write_bytes(b"precious")
    args = ["collect", "coin_env.py:Coin", "-o", "data.npz", "--steps", "20"]
    assert main(args) == 2
    assert "data.npz exists. Pass --overwrite to replace it" in capsys.readouterr().err
    assert (own / "data.npz").read_bytes() == b"precious"
    assert main([*args, "--overwrite"]) == 0
    assert ReplayBuffer.load(own / "data.npz").num_transitions == 20


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-o", "data.npz"], "Give either --steps or --episodes"),
        (["-o", "data.npz", "--steps", "10", "--episodes", "2"], "Give either --steps or --episodes"),
        (["-o", "data.npz", "--steps", "0"], "steps is 0, expected a whole number from 1"),
        (["-o", "data.txt", "--steps", "10"], "data.txt ends in '.txt', expected .npz: data.npz."),
        (["-o", "data", "--steps", "10"], "data has no ending, expected .npz: data.npz."),
        (["-o", "nowhere/data.npz", "--steps", "10"], "There is no directory 'nowhere' for data.npz"),
        (["-o", "data.npz", "--steps", "10", "--policy", "rando"], "There is no file 'rando'. --policy is 'random'"),
        (["-o", "data.npz", "--steps", "10", "--n-envs", "0"], "n_envs is 0"),
    ],
)
def test_collect_says_what_it_cannot_do_before_it_begins(
    own: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["collect", "coin_env.py:Coin", *args]) == 2
    assert message in capsys.readouterr().err
    assert not (own / "data.npz").exists()


def test_collect_says_that_it_cannot_write_there_before_it_begins(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own / "folder").mkdir()
    assert main(["collect", "coin_env.py:Nothing", "--steps", "9", "-o", "folder", "--overwrite"]) == 2
    assert "folder is a directory" in capsys.readouterr().err
    if Path("/proc/self").exists():
        assert main(["collect", "coin_env.py:Coin", "--steps", "9", "-o", "/proc/data.npz"]) == 2
        assert "/proc/data.npz cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check-env", "collect"])
def test_a_negative_seed_is_one_line(command: str, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", "5", "--output", "data.npz"] if command == "collect" else []
    assert main([command, "coin_env.py:Coin", "--seed", "-1", *options]) == 2
    assert capsys.readouterr().err == "worldflux: seed is -1, expected a whole number from 0.\n"


PIPED = {
    "models": "models",
    "help": "--help",
    "help of a command": "train --help",
    "check-env": "check-env CartPole-v1 --steps 20",
    "an error": "plot no-such-directory",
}


@pytest.mark.parametrize(
    ("command", "buffered"),
    [
        ("models", True),
        ("check-env", False),
        ("help", True),
        ("help", False),
        ("help of a command", False),
        ("an error", True),
    ],
)
def test_a_reader_that_goes_away_is_no_traceback(command: str, buffered: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {} if buffered else {"PYTHONUNBUFFERED": "1"}
    code = "import sys; from worldflux.cli.main import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", code, *PIPED[command].split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # before anything is written
        said = process.stderr.read()
    assert "Traceback" not in said and "BrokenPipe" not in said
    assert process.returncode == {"an error": 2, "check-env": 1}.get(command, 141)  # rich ends with 1
