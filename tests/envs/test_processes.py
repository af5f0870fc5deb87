"""Processes of environments that cannot start or that end: scripts without a main guard, kills, errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control import CartPoleEnv
from stable_baselines3.common.vec_env import SubprocVecEnv

from worldflux import WorkerError, WorldFluxAgent
from worldflux.envs import make_vec_env

UNGUARDED = """
from worldflux.envs import make_vec_env

envs = make_vec_env("CartPole-v1", 2, processes=True)
envs.close()
"""
GUARDED = """
import gymnasium as gym
from worldflux.envs import make_vec_env


def main():
    gym.register("Mine-v0", "gymnasium.envs.classic_control:CartPoleEnv")
    make_vec_env("Mine-v0", 2, processes=True).close()


if __name__ == "__main__":
    main()
"""


def output_of(script: str, path: Path) -> str:
    """What a script prints as it fails."""
    path.write_text(script)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    return done.stderr


def test_a_script_without_a_main_guard_is_shown_the_lines_to_add_by_both_processes(tmp_path: Path) -> None:
    printed = output_of(UNGUARDED, tmp_path / "script.py")
    assert "ConfigurationError: Environments cannot be started while a new process is starting." in printed
    final = printed[printed.rindex("worldflux.errors.WorkerError: ") :]
    assert "The most common reason is that the script has no main guard" in final
    assert final.endswith('\n\n    if __name__ == "__main__":\n        main()\n\n')


def test_a_script_with_the_lines_that_were_shown_works_unless_it_registers_the_id_there(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    final = output_of(GUARDED, path).split("worldflux.errors.WorkerError: ")[-1]
    assert final.startswith("The process of environment 0 could not make it. ConfigurationError: Unknown environment")
    assert "Register the id above that line" in final
    path.write_text(
        GUARDED.replace("    gym.register", "gym.register")
        .replace("def main():\n", "", 1)
        .replace("    make_vec", "def main():\n    make_vec")
    )
    subprocess.run([sys.executable, str(path)], check=True, timeout=120)


class Ends(CartPoleEnv):
    """Ends its process at the fifth step, or raises an error there."""

    def __init__(self, kill: bool) -> None:
        super().__init__()
        self.kill, self.count = kill, 0

    def step(self, action: Any) -> Any:
        self.count += 1
        if self.count == 5:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("out of order")
        return super().step(action)


KILLED = r"process of environment 1 was ended by SIGKILL\. The system does that when memory runs out"
RAISED = r"process of environment 1 ended with exit code 1\. If the environment raised an error, its traceback"


def of_sb3(makers: list[Callable[[], Any]]) -> Any:
    return SubprocVecEnv(makers, start_method="fork")


def of_gymnasium(makers: list[Callable[[], Any]]) -> Any:
    return gym.vector.AsyncVectorEnv(makers, context="fork")


@pytest.mark.parametrize(
    ("make", "kill", "error", "message"),
    [
        (of_sb3, True, WorkerError, KILLED),
        (of_sb3, False, WorkerError, RAISED),
        (of_gymnasium, True, WorkerError, KILLED),
        (of_gymnasium, False, ValueError, "out of order"),  # Gymnasium passes it on
    ],
)
def test_an_agent_says_which_process_ended_and_why(
    make: Callable[..., Any], kill: bool, error: type[Exception], message: str
) -> None:
    venv = make([CartPoleEnv, lambda: Ends(kill)])
    agent = WorldFluxAgent("dreamerv3:tiny", venv, train_ratio=0)
    with pytest.raises(error, match=message):
        agent.learn(40)
    assert agent.num_timesteps == 8
    if make is of_sb3:
        with pytest.raises(WorkerError, match="environment 1"):
            agent.learn(40)
        venv.close()
        assert not any(process.is_alive() for process in venv.processes)
    else:
        venv.close(terminate=True)


def test_what_a_process_raised_while_it_made_its_environment_is_in_the_message() -> None:
    def refuses() -> CartPoleEnv:
        raise ValueError("no licence")

    with pytest.raises(WorkerError, match=r"process of environment 0 could not make it\. ValueError: no licence"):
        make_vec_env(refuses, 2, processes=True)


def test_nothing_is_left_of_the_place_where_processes_write_their_causes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    envs = make_vec_env("CartPole-v1", 1, processes=True)
    assert envs.reset().shape == (1, 4) and np.isfinite(envs.reset()).all()
    envs.close()
    del envs
    assert not [*tmp_path.glob("worldflux-*")]
