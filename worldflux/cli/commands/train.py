"""`worldflux train`: trains an agent in an environment, in a directory from which the run can be resumed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from worldflux.cli import runs
from worldflux.cli.environments import is_own_code, lasting_name, make_environments
from worldflux.cli.life_cycle import Work, start_or_resume
from worldflux.cli.options import (
    Compile,
    Count,
    DeviceName,
    Directory,
    EnvNames,
    EnvOptions,
    Fields,
    File,
    Flag,
    ModelName,
    Name,
    Number,
    Precision,
    Real,
    Seeds,
    Trackers,
    compile_setting,
    counted,
    fields_and_dtype,
    joined_tasks,
    title_of,
)
from worldflux.errors import ConfigurationError

if TYPE_CHECKING:
    from stable_baselines3.common.logger import KVWriter
    from stable_baselines3.common.vec_env import VecEnv


_LEAST_EVAL_INTERVAL = 100
"""Smallest number of environment steps between evaluations if none is given; a run that is shorter has one."""


@dataclass(frozen=True)
class TrainSettings(EnvOptions):
    """The options of `worldflux train`. None stands for the default of the model's family."""

    steps: Number = None
    """Environment steps of the whole run, summed over all environments. Default: 100000."""
    n_envs: Count = 1
    """Number of environments that are stepped together, of each task."""
    processes: Flag = False
    """Run each environment in its own process; the agent trains while they step."""
    asynchronous: Flag = False
    """Train on a thread of its own beside the environments, for slow ones. Such a run cannot be repeated exactly."""
    seed: Number = None
    """Seed for all random number generators. If omitted, a random seed is drawn and stored in config.json."""
    device: DeviceName = "auto"
    """Device to train on: cpu, cuda, cuda:1; auto uses the GPU if there is one."""
    learning_rate: Real = None
    """Learning rate of the optimizer. Default: the model's."""
    train_ratio: Real = None
    """Replayed time steps per environment step. Larger values learn more from each step, and take longer. Default: the
    model's."""
    batch_size: Number = None
    """Number of windows in a batch. Default: the model's."""
    seq_len: Number = None
    """Number of time steps in each window. Default: the model's."""
    buffer_size: Number = None
    """Number of environment steps kept in the replay buffer. Default: the model's."""
    learning_starts: Number = None
    """Environment steps before the first gradient step. Default: the model's."""
    offline_data: Name = None
    """Recorded data to learn from, too: a file, a directory, or the id of a Minari data set (see worldflux data)."""
    offline_share: Real = None
    """Share of the windows in each batch that come from --offline-data. Default: 0.5."""
    planner: Literal["auto", "mppi", "cem", "none"] = "auto"
    """How actions are chosen: mppi and cem plan them, none takes the policy's, auto does what the paper does."""
    dtype: Precision = "auto"
    """Numbers in which the model multiplies matrices. auto: float32, or what the model was saved with."""
    compile: Compile = "auto"
    """Compile the model with torch.compile, which needs a C++ compiler on a CPU. auto: only on a GPU."""
    set: Fields = ()
    """Set a field of the model's configuration, such as --set hidden_dim=64. May be repeated."""
    checkpoint_interval: Count = 10_000
    """Environment steps between checkpoints. A checkpoint is also saved at the end, and on Ctrl-C and SIGTERM."""
    eval_interval: Number = None
    """Environment steps between evaluations; 0 disables them. Default: a twentieth of the steps, at least 100."""
    eval_episodes: Count = 5
    """Number of episodes in each evaluation."""
    track: Trackers = ()
    """Also log to Weights & Biases or MLflow. May be given for both."""
    track_project: Name = None
    """Project of W&B, experiment of MLflow. Default: WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME, otherwise worldflux."""
    render: Flag = False
    """Show the first environment in a window while the agent trains."""

    def resolved(self) -> TrainSettings:
        """The same settings with numbers in place of defaults that depend on other settings, and with a seed.

        Raises:
            ConfigurationError: If a number is out of its range.
        """
        import secrets

        from worldflux.validation import whole_number

        steps = whole_number("steps", 100_000 if self.steps is None else self.steps, 1)
        data = self.offline_data
        if data is None and self.offline_share is not None:
            raise ConfigurationError("--offline-share is the share of --offline-data, which is missing.")
        interval = self.eval_interval
        if interval is None:
            interval = max(steps // 20, min(steps, _LEAST_EVAL_INTERVAL))
        return replace(
            self,
            steps=steps,
            # A run is resumed from any working directory.
            offline_data=str(Path(data).absolute()) if data is not None and Path(data).exists() else data,
            n_envs=whole_number("n_envs", self.n_envs, 1),
            seed=secrets.randbelow(2**31) if self.seed is None else whole_number("seed", self.seed, 0),
            checkpoint_interval=whole_number("checkpoint_interval", self.checkpoint_interval, 1),
            eval_interval=whole_number("eval_interval", interval, 0),
            eval_episodes=whole_number("eval_episodes", self.eval_episodes, 1),
        )

    def agent_settings(self) -> dict[str, Any]:
        """Arguments of `WorldFluxAgent`."""
        names = ("learning_rate", "train_ratio", "batch_size", "seq_len", "buffer_size", "learning_starts")
        return {
            **{name: getattr(self, name) for name in names},
            "planner": None if self.planner == "none" else self.planner,
            "model_kwargs": fields_and_dtype(self.set, self.dtype),
            "compile": compile_setting(self.compile),
            "device": self.device,
            "seed": self.seed,
        }

    def recorded_data(self) -> dict[str, Any]:
        """The arguments of `WorldFluxAgent` for the recorded data to learn from; with several ranks, a part for each.

        Raises:
            ConfigurationError: If there are no such data.
        """
        if self.offline_data is None:
            return {}
        from worldflux.datasets import detect, load

        try:
            options: dict[str, Any] = {"sharded": True} if detect(self.offline_data) == "worldflux" else {}
            buffer = load(self.offline_data, **options)
        except FileNotFoundError as error:
            raise ConfigurationError(f"--offline-data {self.offline_data}: {error}") from error
        return {"buffer": buffer, "offline_share": 0.5 if self.offline_share is None else self.offline_share}


_DEFAULTS = TrainSettings()


def train(
    model: ModelName = None,
    env: EnvNames = (),
    *,
    run: Directory = None,
    seeds: Seeds = (),
    config: File = None,
    resume: Directory = None,
    settings: Annotated[TrainSettings, tyro.conf.arg(name="")] = _DEFAULTS,
) -> int:
    """Train an agent in an environment, or resume a run that was stopped.

    Args:
        model: A preset (see worldflux models), or a directory written by save_pretrained. Left out with --resume.
        env: An id (CartPole-v1, dmc/walker-walk, atari/pong), or your class: module:Class or path.py:Class. Several are
            tasks that TD-MPC2 learns together; NAME=ENV names one.
        run: Directory of the new run. Default: runs/<env>/<model>/<number>. With --seeds, of all new runs.
        seeds: Several seeds, each for a run of its own, one after the other. Write MODEL and ENV before them.
        config: A YAML file with settings, such as the config.yaml of a run. Other options win over it.
        resume: Directory of a run to resume with its own settings. Only --steps, --device and --render can be changed.
        settings: All other options.

    Returns:
        0, or 130 after Ctrl-C and 143 after SIGTERM.
    """
    task = joined_tasks(env)
    if config is not None and task is not None and is_own_code(task):
        print(f"worldflux: importing {task}, as {config} says", file=sys.stderr)
    return start_or_resume(AgentTraining, model, task, settings, run=run, seeds=seeds, config=config, resume=resume)


class AgentTraining(Work):
    """Trains an agent in an environment."""

    command, argument, example = "train", "ENV", "dreamerv3:tiny CartPole-v1"
    settings_type, result = TrainSettings, runs.AGENT_FILE
    next_commands = ("eval {run}", "plot {run}", "report {run}")
    next_for_several, next_for_parent = ("plot {run}",), ("plot {run}", "report {run}")
    score_name = "last evaluation"

    def __init__(self, model: str, task: str, settings: TrainSettings, run: Path | None, resources: ExitStack) -> None:
        from worldflux.agents import WorldFluxAgent
        from worldflux.agents.collecting import frames_per_vec_step

        self.title, self.task = title_of(task), lasting_name(task)
        self._settings, self._resources = settings, resources
        if run is not None and is_own_code(task):
            print(f"worldflux: importing {task}, which {runs.CONFIG_FILE} names", file=sys.stderr)
        # First, because an environment that cannot be made would end the processes below with a traceback.
        self._eval_envs = self._make_envs(replace(settings, n_envs=1, processes=False, render=False))
        envs = self._make_envs(settings)
        self.frames_per_step = frames_per_vec_step(envs)
        recorded = settings.recorded_data()
        if run is None or runs.newest_step(run) is None:
            self._agent = WorldFluxAgent(model, envs, **settings.agent_settings(), **recorded)
        else:
            place = run / runs.CHECKPOINTS
            try:
                self._agent = WorldFluxAgent.load(place, envs, device=settings.device, resume=True, **recorded)
            except ValueError as error:  # raised by SB3 if the spaces differ
                raise ConfigurationError(f"{runs.shown(run)} cannot be resumed in {task}: {error}") from error
        self.model = self._agent.model

    def describe(self) -> str:
        """Names the seed; the agent says the rest."""
        return f"seed {self._settings.seed}"

    def train(self, directory: Path, outputs: Sequence[KVWriter]) -> str:
        """Trains, evaluates and saves checkpoints."""
        from stable_baselines3.common.logger import Logger

        from worldflux.accel import ranks
        from worldflux.agents import AgentCheckpointCallback
        from worldflux.cli.run_callbacks import Evaluations, Progress, run_logger

        settings, agent = self._settings, self._agent
        assert settings.steps is not None and settings.seed is not None, settings
        progress = Progress(settings.steps)
        callbacks: list[Any] = [progress] if ranks.is_first() else []
        evaluations = None
        if settings.eval_interval and ranks.is_first():
            evaluations = Evaluations(
                self._eval_envs,
                directory,
                interval=settings.eval_interval,
                episodes=settings.eval_episodes,
                seed=settings.seed,
                say=progress.say,
            )
            callbacks.append(evaluations)
        # Checkpoints come after the evaluation, so that every saved step has been evaluated.
        callbacks.append(AgentCheckpointCallback(directory / runs.CHECKPOINTS, settings.checkpoint_interval))
        logger = run_logger(directory / runs.LOGS, outputs) if ranks.is_first() else Logger(None, [])
        self._resources.callback(logger.close)
        agent.set_logger(logger)
        left = max(settings.steps - agent.num_timesteps, 0)
        agent.learn(left, callbacks, reset_num_timesteps=False, asynchronous=settings.asynchronous)
        agent.dump_logs()  # the episodes since the last dump
        if evaluations is not None and evaluations.rows:
            self.score = evaluations.rows[-1].score
        best = evaluations.best if evaluations is not None else None
        scored = "" if best is None else f", best evaluation {best.score:g} at step {best.step}"
        untrained = "" if agent.trainer.step_count else "; the agent is untrained (0 gradient steps)"
        return f"{counted(agent.num_timesteps, 'step')}{scored}{untrained}"

    def save(self, path: Path) -> None:
        """Saves the agent."""
        self._agent.save(path)

    def _make_envs(self, settings: TrainSettings) -> VecEnv:
        envs = make_environments(
            self.task,
            settings,
            settings.n_envs,
            seed=settings.seed,
            processes=settings.processes,
            render=settings.render,
        )
        self._resources.callback(envs.close)
        return envs
