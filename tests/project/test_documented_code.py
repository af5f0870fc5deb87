"""The code blocks of README and documentation run as they are pasted, with fewer steps and smaller models.

Only numbers and presets are replaced, by `SMALLER`; otherwise the code stays as the pages show it. The blocks of a page
run in their order and in one folder, so a file that one of them loads has to come from a block or command above it.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from helpers.pages import DOCS, ROOT, blocks, example
from stable_baselines3.common.callbacks import BaseCallback

from worldflux import factory
from worldflux.cli.main import main
from worldflux.envs import collect, make_env, make_vec_env

SMALLER = (
    (r"\blearn\([\d_]+", "learn(40"),
    (r"\btotal_steps=[\d_]+", "total_steps=3"),
    (r"\b(steps|save_interval|interval|eval_freq)=[\d_]+", r"\1=30"),
    (r"\b(episodes|n_eval_episodes)=\d+", r"\1=2"),
    (r"--steps \d+", "--steps 300"),
    (r"dreamerv3:size\d+m", "dreamerv3:tiny"),
    (r"tdmpc2:5m", "tdmpc2:tiny"),
    (r"(make_vec_env\(.+?), 8\b", r"\1, 2"),
    (r"= \"runs/pong\", 400_000", '= "runs/pong", 40'),
)
"""Patterns and what replaces them."""

NOT_RUN = {"git", "cd", "make", "pip"}
"""Commands that install or build; `test_docs.py` checks that their targets exist."""


def smaller(code: str) -> str:
    for pattern, replacement in SMALLER:
        code = re.sub(pattern, replacement, code)
    return code


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(factory, "_families", dict(factory._families))
    before = set(gym.registry)
    yield
    for name in set(gym.registry) - before:
        if not name.startswith(("ALE/", "worldflux/")):  # which are registered once and for all when first needed
            del gym.registry[name]


def run_shell(block: str) -> None:
    """Runs the lines of a shell block that call `worldflux`."""
    for line in smaller(block).splitlines():
        for command in shlex.split(line, comments=True) and line.split("#")[0].split("&&"):
            program, *arguments = shlex.split(command)
            if program == "worldflux":
                assert main(arguments) == 0, line
            else:
                assert program in NOT_RUN, line


def test_the_readme_runs_from_the_first_block_to_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^```(python|bash)\n(.*?)^```", text, re.M | re.S)
    assert [language for language, _ in found].count("python") >= 3
    for language, block in found:
        if language == "bash":
            run_shell(block)
        elif "processes=True" in block:  # new processes import the script again
            (tmp_path / "script.py").write_text(smaller(block))
            done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, timeout=200)
            assert done.returncode == 0, done.stderr
        else:
            exec(compile(smaller(block), "README.md", "exec"), {"__name__": "__main__"})
    made = {"cartpole.zip", "cartpole.gif", "runs", "report.html", "pendulum.npz"}
    assert made | {"pendulum-model"} <= {path.name for path in tmp_path.iterdir()}


class MyEnv(gym.Env[Any, Any]):
    """The environment of a reader."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), 0.5, False, self.count == 50, {}


def files_of(page: str) -> dict[str, Any]:
    """The names that the blocks of a page take for granted; files that they load are written."""
    if page == "custom_environment":
        return {"MyEnv": MyEnv}
    if page == "custom_model":
        example("custom_model", again=True)  # the page includes it
    if page == "resume":
        collect(make_env("dmc/walker-walk"), steps=120).save("walker.npz")
    if page == "differences_from_sb3":
        return {"BaseCallback": BaseCallback, "make_vec_env": make_vec_env}
    return {}


PAGES = (
    "index",
    "quickstart",
    "callbacks",
    "troubleshooting",
    "custom_environment",
    "custom_model",
    "dmc",
    "atari",
    "resume",
    "pictures",
    "choosing",
    "differences_from_sb3",
)
"""The pages whose Python blocks run here. The others show fragments, which `test_docs.py` checks name by name."""


@pytest.mark.parametrize("page", PAGES)
def test_the_python_blocks_of_a_page_run_one_after_the_other(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"__name__": "not main", **files_of(page)}
    found = blocks(DOCS / f"{page}.md", "python")
    assert found
    for block in found:
        # New processes would look for this environment in a script.
        code = smaller(block).replace(", processes=True)", ")") if page == "custom_environment" else smaller(block)
        exec(compile(code, f"docs/{page}.md", "exec"), names)
