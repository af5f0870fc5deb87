"""One run of a benchmark, which trains a model on a task with a seed and can be resumed."""

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
from worldflux.cli.provenance import versions
from worldflux.cli.run_callbacks import EVALUATION_SEED, Progress, run_logger
from worldflux.cli.runs import now
from worldflux.envs import make_env, make_vec_env
from worldflux.errors import StoppedError
from worldflux.training.checkpoint import newest_checkpoint

CHECKPOINTS_IN_A_RUN = 20
MOST_STEPS_BETWEEN_CHECKPOINTS = 50_000
"""Steps of the agent."""
_FEW_EPISODES = 5
_DEFAULT_BUFFER_SIZE = 1_000_000
"""Default of both model families."""
_LEAST_BUFFER_SIZE = 20_000
"""More than either model family waits for before training starts."""
MERGE_SECONDS = 20
"""Seconds between updates of the score file of all seeds of a task."""


def make_task(protocol: Protocol, settings: RunSettings) -> gym.Env[Any, Any]:
    """The environment of a task."""
    env = make_env(protocol.environment + settings.task, **settings.options)
    return env if protocol.frame_stack == 1 else FrameStackObservation(env, protocol.frame_stack)


class Scores(BaseCallback):
    """Writes scores as they are obtained, and regularly the score file of all seeds of the task.

    Args:
        directory: Directory of the run.
        record: Record of the run, whose last part is updated.
        frames: Steps of the simulator per step of the agent.
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
        """Steps of the simulator, over all environments."""
        return self.num_timesteps * self.frames

    def _on_training_start(self) -> None:
        # Scores after the last checkpoint of an interrupted run are computed again.
        rows = [row for row in read_scores(self.path, in_progress=True) if row.step <= self.step]
        write_scores(self.path, rows)
        self.last = rows[-1].step if rows else None
        self._began = time.monotonic()

    def add(self, scores: Sequence[float]) -> None:
        """Adds scores for the current step."""
        if not scores:
            return
        append_scores(self.path, [Score(self.step, score, self.record.settings.seed) for score in scores])
        self.last = self.step
        if time.monotonic() - self._merged > MERGE_SECONDS:
            self.note()
            self._merged = time.monotonic()

    def note(self) -> None:
        """Writes the progress of the run and the score file of all seeds."""
        self.record.parts[-1].update(to_step=self.step, seconds=round(time.monotonic() - self._began, 1))
        self.record.write(self.directory)
        merge(self.directory.parent)

    def _on_training_end(self) -> None:
        self.note()


class TrainingScores(Scores):
    """Scores that are the returns of training episodes."""

    def _on_step(self) -> bool:
        self.add([float(info["episode"]["r"]) for info in self.locals["infos"] if "episode" in info])
        return True


class EvaluationScores(Scores):
    """Scores that are mean returns of evaluations with deterministic actions.

    Evaluations take place before the first step, at regular intervals, and at the end. All episodes of an evaluation
    are played in parallel, one per environment, and have the same initial states in every evaluation.
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
        except StoppedError:
            return
        self.add([float(np.mean(scores))])

    def _go_on(self, *args: Any) -> None:
        if self.model.stopping:  # stopping must not wait for ten episodes
            raise StoppedError("The run was asked to stop, so that its evaluation ends.")


def run(
    out: Path,
    settings: RunSettings,
    *,
    device: str = "auto",
    processes: bool = False,
    checkpoint_every: int | None = None,
    callbacks: Sequence[BaseCallback] = (),
) -> RunRecord | None:
    """Starts a run, or resumes one that was stopped.

    Args:
        out: Directory of the benchmark.
        settings: Settings of the run, which `check_settings` has compared with those of existing runs.
        device: Device of the model.
        processes: Step each environment in a separate process.
        checkpoint_every: Steps of the simulator between checkpoints. By default a twentieth of the run, but at most
            50,000 steps of the agent.
        callbacks: Additional callbacks.

    Returns:
        The record of the finished run, or None if another process is working on it.

    Raises:
        CheckpointError: If existing files are damaged.
    """
    directory = run_directory(out, settings.task, settings.seed)
    directory.mkdir(parents=True, exist_ok=True)
    with held(directory) as is_ours:
        if not is_ours:
            return None
        record = RunRecord.read(directory) or RunRecord(settings, _versions(), [])
        if record.result is None:
            _learn(directory, record, device, processes, checkpoint_every, callbacks)
        shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)  # also if a previous process was killed here
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
    """Trains for the remaining steps of a run, and adds the result to its record."""
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
        # Checkpoints are last, so that the scores up to a checkpoint have already been written.
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
    """Warns if the steps per environment are too few for several training episodes."""
    if settings.eval_every or episode_steps is None:
        return
    episodes = settings.agent_steps // settings.envs // episode_steps
    if episodes < _FEW_EPISODES and settings.envs > 1:
        print(
            f"{settings.steps} steps in {settings.envs} environments are {episodes} whole episodes in each, so that "
            "the last score belongs to an early policy. Use fewer --envs for more episodes.",
            file=sys.stderr,
        )


def _agent(directory: Path, settings: RunSettings, envs: VecEnv, device: str) -> WorldFluxAgent:
    """A new agent, or the agent of the newest checkpoint."""
    if newest_checkpoint(directory / CHECKPOINTS) is not None:
        return WorldFluxAgent.load(directory / CHECKPOINTS, envs, device=device, resume=True)
    chosen = settings.agent
    if settings.agent_steps < _DEFAULT_BUFFER_SIZE:  # a larger buffer would only reserve memory
        chosen = {"buffer_size": max(settings.agent_steps + settings.envs, _LEAST_BUFFER_SIZE), **chosen}
    return WorldFluxAgent(
        settings.model, envs, device=device, seed=settings.seed, model_kwargs=settings.model_fields, **chosen
    )


@contextmanager
def _environments(settings: RunSettings, processes: bool) -> Iterator[tuple[VecEnv, VecEnv | None]]:
    """The training environments, and the evaluation environments if evaluations are scored."""
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
    """The name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = next((line for line in _cpu_lines() if line.startswith("model name")), platform.processor() or "CPU")
    return f"{model.rpartition(':')[2].strip()}, {torch.get_num_threads()} threads"


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _commit() -> str:
    """The commit of this checkout, marked if files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
