"""Tests a benchmark in less than a minute: run, stop, resume and report. Its scores have no meaning."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import report
import torch
from protocols import Protocol
from run_files import RunSettings
from stable_baselines3.common.callbacks import BaseCallback
from suite_run import run

from worldflux.errors import ConfigurationError

_AGENT_STEPS = 200
_MODEL: dict[str, dict[str, Any]] = {
    "dreamerv3": {"train_ratio": 8, "batch_size": 4, "seq_len": 8, "learning_starts": 60},
    "tdmpc2": {
        "train_ratio": 16,
        "batch_size": 16,
        "learning_starts": 60,
        "planner_kwargs": {"num_samples": 32, "num_elites": 8},
    },
}
_ACTION_REPEAT = 20
"""Action repeat in DeepMind Control, so that an episode has 50 steps of the agent."""
_MAX_FRAMES = 200
"""Frames per episode in Atari, so that it has 50 steps of the agent, too."""


def smoke(protocols: Sequence[Protocol], out: Path) -> int:
    """Runs each protocol with the tiny preset of its family.

    Returns:
        0 if every run was resumed after a stop, finished with scores, and is in the report; otherwise 1.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigurationError(f"{out} is not empty. Use another --out, or none, for a smoke test.")
    torch.set_num_threads(1)
    started = time.perf_counter()
    problems = [problem for protocol in protocols for problem in _problems(protocol, out / protocol.name)]
    for problem in problems:
        print(f"smoke: {problem}", file=sys.stderr)
    print(f"smoke: {'failed' if problems else 'passed'} after {time.perf_counter() - started:.0f} seconds")
    return int(bool(problems))


def _problems(protocol: Protocol, out: Path) -> list[str]:
    """Problems found in the runs of a protocol."""
    task = "cartpole-balance" if "cartpole-balance" in protocol.tasks else protocol.tasks[0]
    repeat, short = _ACTION_REPEAT, {"action_repeat": _ACTION_REPEAT, "fast_rendering": True}
    if protocol.environment != "dmc/":
        repeat, short = protocol.action_repeat, {"max_num_frames_per_episode": _MAX_FRAMES}
    settings = RunSettings(
        protocol=protocol.name,
        model=f"{protocol.family}:tiny",
        task=task,
        seed=0,
        steps=_AGENT_STEPS * repeat,
        envs=1,
        action_repeat=repeat,
        options={
            **protocol.options,
            **short,
        },
        eval_every=_AGENT_STEPS * repeat // 2 if protocol.eval_every else 0,
        eval_episodes=1 if protocol.eval_every else 0,
        agent=_MODEL[protocol.family],
    )
    try:
        run(out, settings, device="cpu", callbacks=[_StopAt(_AGENT_STEPS // 2 - 1)])
        return [f"{protocol.name}: the first run was not stopped"]
    except KeyboardInterrupt:
        pass
    records = [run(out, replace(settings, seed=seed), device="cpu") for seed in (0, 1)]
    problems = []
    assert records[0] is not None
    if [part["from_step"] for part in records[0].parts] != [0, settings.steps // 2]:
        problems.append(f"{protocol.name}: the first run was not resumed where it was stopped: {records[0].parts}")
    for record in records:
        assert record is not None and record.result is not None
        if record.result["step"] != settings.steps or record.result["gradient_steps"] == 0:
            problems.append(f"{protocol.name}: seed {record.settings.seed} ended with {record.result}")
    report.write([out], out / "report.md", out / "report.png")
    text = (out / "report.md").read_text(encoding="utf-8")
    if f"| {task} | {settings.steps:,} | 2 |" not in text:
        problems.append(f"{protocol.name}: {task} is missing in {out / 'report.md'}")
    return problems


class _StopAt(BaseCallback):
    """Simulates Ctrl-C in the middle of a run, which takes effect at the next step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step:
            signal.raise_signal(signal.SIGINT)
        return True
