"""One run of a benchmark: a model learns a task with a seed, and goes on after a kill."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.wrappers import FrameStackObservation
from protocols import PROTOCOLS, Protocol
from run_files import (
    AGENT_FILE,
    CHECKPOINTS,
    LOGS,
    SCORES_FILE,
    RunRecord,
    RunSettings,
    held,
    merge,
    run_directory,
)
from score_files import Score, append_scores, read_scores, write_scores
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from worldflux import WorldFluxAgent
from worldflux.agents import AgentCheckpointCallback
from worldflux.agents.collecting import frames_per_vec_step, max_vec_episode_steps
from worldflux.cli.run_callbacks import EVALUATION_SEED, Progress, run_logger
from worldflux.cli.runs import now, versions
from worldflux.envs import make_env, make_vec_env
from worldflux.training.checkpoint import newest_checkpoint

CHECKPOINTS_IN_A_RUN = 20
MOST_STEPS_BETWEEN_CHECKPOINTS = 50_000
"""Of the agent."""
_FEW_EPISODES = 5
_DEFAULT_BUFFER_SIZE = 1_000_000
"""Of both families."""
_LEAST_BUFFER_SIZE = 20_000
"""Holds more than any family waits for before it learns."""
MERGE_SECONDS = 20
"""Between two writings of a task's file of all seeds."""


def make_task(protocol: Protocol, settings: RunSettings) -> gym.Env[Any, Any]:
    """The environment of a task."""
    env = make_env(protocol.environment + settings.task, **settings.options)
    return env if protocol.frame_stack == 1 else FrameStackObservation(env, protocol.frame_stack)


class Scores(BaseCallback):
    """Writes scores as they come, and from time to time the task's file of all seeds.

    Args:
        directory: Of the run.
        record: Its last part is kept up to date.
        frames: Steps of the simulator in one of the agent's.
    """

    def __init__(self, directory: Path, record: RunRecord, frames: int) -> None:
        super().__init__()
        self.directory, self.record, self.frames = directory, record, frames
        self.path = directory / SCORES_FILE
        self.last: int | None = None
        """Step of the last score."""
        self._began = self._merged = time.monotonic()

    @property
    def step(self) -> int:
        """Of the simulator, over all environments."""
        return self.num_timesteps * self.frames

    def _on_training_start(self) -> None:
        # What a kill has left behind its last checkpoint is done again.
        rows = [row for row in read_scores(self.path, in_progress=True) if row.step <= self.step]
        write_scores(self.path, rows)
        self.last = rows[-1].step if rows else None
        self._began = time.monotonic()

    def add(self, scores: Sequence[float]) -> None:
        """Adds lines for this step."""
        if not scores:
            return
        append_scores(self.path, [Score(self.step, score, self.record.settings.seed) for score in scores])
        self.last = self.step
        if time.monotonic() - self._merged > MERGE_SECONDS:
            self.note()
            self._merged = time.monotonic()

    def note(self) -> None:
        """Writes how far the run is, and the file of all seeds."""
        self.record.parts[-1].update(to_step=self.step, seconds=round(time.monotonic() - self._began, 1))
        self.record.write(self.directory)
        merge(self.directory.parent)

    def _on_training_end(self) -> None:
        self.note()


class TrainingScores(Scores):
    """Returns of the training episodes."""

    def _on_step(self) -> bool:
        self.add([float(info["episode"]["r"]) for info in self.locals["infos"] if "episode" in info])
        return True


class EvaluationScores(Scores):
    """Mean returns of evaluations with deterministic actions: before the first step, at an interval, and at the end.

    All episodes of an evaluation are played at once, in an environment each, and begin alike in every evaluation.
    """

    model: WorldFluxAgent

    def __init__(self, directory: Path, record: RunRecord, frames: int, envs: VecEnv) -> None:
        super().__init__(directory, record, frames)
        self.envs = envs

    def _on_training_start(self) -> None:
        super()._on_training_start()
        if self.last is None:
            self._evaluate()

    def _on_step(self) -> bool:
        every, settings = self.record.settings.eval_every, self.record.settings
        due = self.last is None or self.step // every > self.last // every or self.step >= settings.steps
        if due and not self.model.stopping:
            self._evaluate()
        return True

    def _evaluate(self) -> None:
        settings = self.record.settings
        self.envs.seed(settings.seed + EVALUATION_SEED)
        try:
            scores, _ = evaluate_policy(
                self.model,
                self.envs,
                settings.eval_episodes,
                deterministic=True,
                callback=self._go_on,
                return_episode_rewards=True,
            )
        except _StoppedError:
            return
        self.add([float(np.mean(scores))])

    def _go_on(self, *args: Any) -> None:
        if self.model.stopping:  # whoever waits for the end of the step shall not wait for ten episodes
            raise _StoppedError


class _StoppedError(Exception):
    """Ends an evaluation."""


def run(
    out: Path,
    settings: RunSettings,
    *,
    device: str = "auto",
    processes: bool = False,
    checkpoint_every: int | None = None,
    callbacks: Sequence[BaseCallback] = (),
) -> RunRecord | None:
    """Begins a run, or goes on with one that was stopped.

    Args:
        out: Directory of the benchmark.
        settings: Of the run; `check_settings` has compared them with those of what is there.
        device: Where the model is.
        processes: Step each environment in a process of its own.
        checkpoint_every: Steps of the simulator. Default: a twentieth of the run, at most 50,000 of the agent's steps.
        callbacks: More of them.

    Returns:
        What is known of the finished run; None where another process is working on it.

    Raises:
        CheckpointError: If what is there is damaged.
    """
    directory = run_directory(out, settings.task, settings.seed)
    directory.mkdir(parents=True, exist_ok=True)
    with held(directory) as is_ours:
        if not is_ours:
            return None
        record = RunRecord.read(directory) or RunRecord(settings, _versions(), [])
        if record.result is None:
            _learn(directory, record, device, processes, checkpoint_every, callbacks)
        shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)  # also those of a run that was killed right here
        merge(directory.parent)
        return record


def _learn(
    directory: Path,
    record: RunRecord,
    device: str,
    processes: bool,
    checkpoint_every: int | None,
    callbacks: Sequence[BaseCallback],
) -> None:
    """The rest of a run; afterwards its record has a result."""
    settings = record.settings
    with _environments(settings, processes) as (envs, eval_envs):
        frames = frames_per_vec_step(envs)
        assert frames == settings.action_repeat, f"{frames} steps of the simulator, not {settings.action_repeat}"
        _warn_of_few_episodes(settings, max_vec_episode_steps(envs))
        agent = _agent(directory, settings, envs, device)
        record.parts.append(
            {
                "started": now(),
                "commit": _commit(),
                "machine": _machine(agent.device),
                "from_step": agent.num_timesteps * frames,
                "to_step": agent.num_timesteps * frames,
                "seconds": 0.0,
            }
        )
        record.write(directory)
        scores = (
            TrainingScores(directory, record, frames)
            if eval_envs is None
            else EvaluationScores(directory, record, frames, eval_envs)
        )
        every = max(1, min(settings.agent_steps // CHECKPOINTS_IN_A_RUN, MOST_STEPS_BETWEEN_CHECKPOINTS))
        if checkpoint_every is not None:
            every = max(1, checkpoint_every // frames)
        # Checkpoints last: what they hold is in the scores already.
        saving = AgentCheckpointCallback(directory / CHECKPOINTS, every, max_checkpoints=1)
        agent.set_logger(run_logger(directory / LOGS))
        try:
            todo = max(settings.agent_steps - agent.num_timesteps, 0)
            agent.learn(todo, [Progress(settings.agent_steps), scores, *callbacks, saving], reset_num_timesteps=False)
            agent.dump_logs()
        finally:
            agent.logger.close()
    agent.save(directory / AGENT_FILE)
    rows = read_scores(directory / SCORES_FILE)
    record.result = {
        "step": agent.num_timesteps * frames,
        "gradient_steps": agent.trainer.step_count,
        "scores": len(rows),
        "ended": now(),
    }
    record.write(directory)


def _warn_of_few_episodes(settings: RunSettings, episode_steps: int | None) -> None:
    """Scores of training episodes come late where many environments share few steps."""
    if settings.eval_every or episode_steps is None:
        return
    episodes = settings.agent_steps // settings.envs // episode_steps
    if episodes < _FEW_EPISODES and settings.envs > 1:
        print(
            f"{settings.steps} steps in {settings.envs} environments are {episodes} whole episodes in each: the "
            "last score is of an early policy. Fewer --envs give more of them.",
            file=sys.stderr,
        )


def _agent(directory: Path, settings: RunSettings, envs: VecEnv, device: str) -> WorldFluxAgent:
    """A new agent, or the one of the newest checkpoint."""
    if newest_checkpoint(directory / CHECKPOINTS) is not None:
        return WorldFluxAgent.load(directory / CHECKPOINTS, envs, device=device, resume=True)
    chosen = settings.agent
    if settings.agent_steps < _DEFAULT_BUFFER_SIZE:  # more than is ever stored would only ask for more memory
        chosen = {"buffer_size": max(settings.agent_steps + settings.envs, _LEAST_BUFFER_SIZE), **chosen}
    return WorldFluxAgent(
        settings.model, envs, device=device, seed=settings.seed, model_kwargs=settings.model_fields, **chosen
    )


@contextmanager
def _environments(settings: RunSettings, processes: bool) -> Iterator[tuple[VecEnv, VecEnv | None]]:
    """Those to learn in, and those to evaluate in where evaluations count."""
    protocol = PROTOCOLS[settings.protocol]
    make = partial(make_task, protocol, settings)
    made = [make_vec_env(make, settings.envs, seed=settings.seed, processes=processes)]
    try:
        if protocol.score == "evaluation":
            made.append(make_vec_env(make, settings.eval_episodes, processes=processes))
        yield made[0], (made[1] if len(made) > 1 else None)
    finally:
        for envs in made:
            envs.close()


def _versions() -> dict[str, str]:
    return {**versions(), "platform": platform.platform()}


def _machine(device: torch.device) -> str:
    """The device, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = next((line for line in _cpu_lines() if line.startswith("model name")), platform.processor() or "CPU")
    return f"{model.rpartition(':')[2].strip()}, {torch.get_num_threads()} threads"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _commit() -> str:
    """Of this checkout; with a sign where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
