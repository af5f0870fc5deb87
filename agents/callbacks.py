"""Callbacks of stable-baselines3 for runs of a `WorldFluxAgent`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from worldflux.accel import ranks
from worldflux.agents.agent import WorldFluxAgent
from worldflux.agents.collecting import env_of, policy_for
from worldflux.agents.settings import SETTINGS
from worldflux.envs.tasks import TaskVecEnv
from worldflux.errors import ConfigurationError, TrainingError
from worldflux.tracking import Tracker, find_tracker
from worldflux.training.saving import CheckpointDirectory
from worldflux.validation import whole_number


class AgentCheckpointCallback(BaseCallback):
    """Saves checkpoints `output_dir/step-00010000` of a run, from which it can be resumed.

        agent.learn(1_000_000, AgentCheckpointCallback("runs/pong"))
        ...                                                             # killed; later, in a new process:
        agent = WorldFluxAgent.load("runs/pong", "atari/pong", resume=True)
        agent.learn(1_000_000 - agent.num_timesteps, AgentCheckpointCallback("runs/pong"), reset_num_timesteps=False)

    Another one is saved when `learn` ends between two intervals, also by Ctrl-C, SIGTERM, or an error in the
    environment or another callback. Nothing is saved once a loss is not finite, so the newest checkpoint is a good one.

    A directory belongs to one run. While that run goes on, no other can begin there; where another run has saved
    checkpoints, `learn` ends at once with a `ConfigurationError` that says what to do.

    Args:
        output_dir: Directory of the checkpoints; made if it does not exist.
        save_interval: Environment steps between checkpoints, over all environments.
        max_checkpoints: Number of checkpoints of this run to keep; the ones written longest ago are removed.
        verbose: 1 prints the path of each checkpoint.
        overwrite: Begin a new run where another one has saved checkpoints; they are removed once this run has saved one
            of its own.

    Raises:
        ConfigurationError: If a number is below 1, `output_dir` cannot be a directory, or the callback is given to
            another algorithm of SB3.
    """

    model: WorldFluxAgent

    def __init__(
        self,
        output_dir: str | Path,
        save_interval: int = 10_000,
        max_checkpoints: int = 2,
        verbose: int = 0,
        *,
        overwrite: bool = False,
    ) -> None:
        super().__init__(verbose)
        self.directory = CheckpointDirectory(output_dir, max_checkpoints, overwrite)
        self.save_interval = whole_number("save_interval", save_interval, 1)
        self._saved_at: tuple[int, int] | None = None
        """Environment step and gradient steps of the last checkpoint, or of the beginning; None between two runs."""

    @property
    def output_dir(self) -> Path:
        """Directory of the checkpoints."""
        return self.directory.path

    @property
    def max_checkpoints(self) -> int:
        """Number of checkpoints of the run that are kept."""
        return self.directory.max_checkpoints

    def _init_callback(self) -> None:
        if not isinstance(self.model, WorldFluxAgent):
            raise ConfigurationError(
                f"AgentCheckpointCallback saves a WorldFluxAgent, got {type(self.model).__name__}. "
                "Use stable-baselines3's CheckpointCallback for its own algorithms."
            )

    def _on_training_start(self) -> None:
        # Not in `_on_training_end`, which SB3 does not call if another callback fails, or if one contains this one.
        self.model.at_end_of_learn(self._end)
        self.directory.hold()
        resuming = f"load its agent with WorldFluxAgent.load({str(self.output_dir)!r}, env, resume=True)"
        self.directory.check_owner(self.model.trainer.run, resuming)
        self._saved_at = (self.num_timesteps, self.model.trainer.step_count)

    def _on_step(self) -> bool:
        if self._saved_at is None:  # the callback was added in the middle of `learn`
            self._on_training_start()
        assert self._saved_at is not None
        due = self.num_timesteps // self.save_interval > self._saved_at[0] // self.save_interval
        if due or self.model.stopping:
            self._save()
        return True

    def _end(self) -> None:
        """Saves the last step, whatever has ended `learn`."""
        self.num_timesteps, error = self.model.num_timesteps, sys.exc_info()[1]
        begun = self._saved_at is not None
        # A signal may have come in the middle of many gradient steps after a step that was saved.
        now = (self.num_timesteps, self.model.trainer.step_count)
        new = now != self._saved_at if self.model.stopping else self._saved_at is None or now[0] != self._saved_at[0]
        if (self.model.stopping or self.model.trainer.in_step) and isinstance(error, KeyboardInterrupt):
            begun = False  # a second Ctrl-C may have come in the middle of anything
        if error is not None and ranks.size() > 1 and not self.model.stopping:
            begun = False  # an error of one rank, of which the others know nothing
        try:
            if begun and new:
                self._save()
        except TrainingError:
            if error is None:
                raise
            # The error that ended the training says why; the newest checkpoint is a good one.
        finally:
            self._saved_at = None
            self.directory.release()

    def _save(self) -> None:
        self.model.trainer.check_good()
        path = self.directory.save(self.num_timesteps, self.model.trainer.run, self.model.save_checkpoint)
        self._saved_at = (self.num_timesteps, self.model.trainer.step_count)
        if self.verbose and ranks.is_first():
            print(f"saved {path}")


def evaluate_tasks(
    agent: WorldFluxAgent,
    envs: Mapping[str, GymEnv | str] | TaskVecEnv,
    n_eval_episodes: int = 10,
    *,
    deterministic: bool = True,
) -> dict[str, tuple[float, float]]:
    """Evaluates an agent in each of several tasks with SB3's `evaluate_policy`.

    An agent that learns behind `VecNormalize` sees observations that are normalised in the same way.

    Args:
        agent: An agent whose model has these tasks.
        envs: An environment for each name of a task, as for `WorldFluxAgent`.
        n_eval_episodes: Number of episodes in each task.
        deterministic: Whether to take the most likely actions.

    Returns:
        Mean and standard deviation of the returns in each task.

    Raises:
        ConfigurationError: If the model has no such task, or an environment does not fit.
    """
    venv = env_of(envs, like=agent)
    if not isinstance(venv, TaskVecEnv):
        raise ConfigurationError(f"envs is {envs!r}, expected an environment for each name of a task.")
    scores, normalize = {}, agent.get_vec_normalize_env()
    for name, part in venv.parts().items():
        env = part if normalize is None else _normalized(part, normalize)
        returns: Any = evaluate_policy(
            policy_for(agent, part), env, n_eval_episodes, deterministic=deterministic, return_episode_rewards=True
        )[0]
        scores[name] = float(np.mean(returns)), float(np.std(returns))
    return scores


def _normalized(env: VecEnv, like: VecNormalize) -> VecNormalize:
    """Environments whose observations are normalised as those of others, with their statistics of the moment."""
    made = copy(like)  # without its environments
    made.set_venv(env)
    made.training = made.norm_reward = False
    return made


class TaskEvalCallback(BaseCallback):
    """Evaluates an agent in each of its tasks at an interval, in environments of their own.

        agent = WorldFluxAgent("tdmpc2:5m", {"walk": "dmc/walker-walk", "run": "dmc/walker-run"})
        agent.learn(200_000, TaskEvalCallback({"walk": "dmc/walker-walk", "run": "dmc/walker-run"}, 10_000))

    It logs `eval/mean_reward/<task>`, and the mean over the tasks as `eval/mean_reward`.

    Attributes:
        last_scores: Mean and standard deviation of the returns in each task of the last evaluation.

    Args:
        eval_envs: An environment for each name of a task, as for `WorldFluxAgent`.
        eval_freq: Environment steps between two evaluations, over all environments.
        n_eval_episodes: Number of episodes in each task.
        deterministic: Whether to take the most likely actions.
        verbose: 1 prints the scores.

    Raises:
        ConfigurationError: If a number is below 1, or the agent has no such task.
    """

    model: WorldFluxAgent

    def __init__(
        self,
        eval_envs: Mapping[str, GymEnv | str] | TaskVecEnv,
        eval_freq: int = 10_000,
        n_eval_episodes: int = 5,
        *,
        deterministic: bool = True,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.eval_envs = eval_envs
        self.eval_freq = whole_number("eval_freq", eval_freq, 1)
        self.n_eval_episodes = whole_number("n_eval_episodes", n_eval_episodes, 1)
        self.deterministic = deterministic
        self.last_scores: dict[str, tuple[float, float]] = {}
        self._evaluated_at = 0

    def _init_callback(self) -> None:
        if not isinstance(self.model, WorldFluxAgent):
            raise ConfigurationError(f"TaskEvalCallback evaluates a WorldFluxAgent, got {type(self.model).__name__}.")
        self.eval_envs = env_of(self.eval_envs, like=self.model)  # now rather than after the first steps
        self._evaluated_at = self.model.num_timesteps

    def _on_step(self) -> bool:
        if self.num_timesteps // self.eval_freq > self._evaluated_at // self.eval_freq:
            self._evaluated_at = self.num_timesteps
            self.last_scores = evaluate_tasks(
                self.model, self.eval_envs, self.n_eval_episodes, deterministic=self.deterministic
            )
            for name, (mean, _) in self.last_scores.items():
                self.logger.record(f"eval/mean_reward/{name}", mean)
            self.logger.record("eval/mean_reward", float(np.mean([mean for mean, _ in self.last_scores.values()])))
            if self.verbose:
                shown = ", ".join(f"{name} {mean:.1f} ± {std:.1f}" for name, (mean, std) in self.last_scores.items())
                print(f"evaluation at step {self.num_timesteps}: {shown}")
        return True


class TrackerOutput(KVWriter):
    """Passes what SB3's `Logger` writes to an experiment tracker.

    Args:
        tracker: A tracker that was started.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Logs the numbers among the values, except those that exclude this tracker by its name."""
        numbers = {
            name: float(value)
            for name, value in key_values.items()
            if isinstance(value, int | float | np.number) and self.tracker.package not in (key_excluded.get(name) or ())
        }
        self.tracker.log(numbers, step)

    def close(self) -> None:
        """Does nothing, because the tracker is finished by whoever started it."""


class TrackingCallback(BaseCallback):
    """Logs a run of an agent to Weights & Biases or MLflow: its settings, and all that it logs.

        agent.learn(100_000, TrackingCallback("wandb", project="walker"))

    If a run of the tool is open in this process (`wandb.init`, `mlflow.start_run`), that run is used and stays open.
    Otherwise a run is opened when `learn` begins and closed when it ends; the next call of `learn` continues it.

    Attributes:
        run_id: Id of the run; None before `learn`, unless one was given.

    Args:
        tracker: `"wandb"` or `"mlflow"`.
        project: Project of W&B, or experiment of MLflow. None takes it from the environment variables of the tool, or
            else "worldflux".
        name: Name of the run; None leaves it to the tool.
        tags: Tags of the run.
        config: Settings to show with the run, in addition to those of the agent and its model.
        run_id: Id of an earlier run to continue.

    Raises:
        ConfigurationError: If there is no such tracker, or it cannot start a run.
        MissingDependencyError: If its package is not installed.
    """

    model: WorldFluxAgent

    def __init__(
        self,
        tracker: str,
        *,
        project: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self._tracker = find_tracker(tracker)(project=project, name=name, tags=tags, run_id=run_id)
        self._config = dict(config or {})
        self._output = TrackerOutput(self._tracker)

    @property
    def run_id(self) -> str | None:
        """Id of the run; None before `learn`, unless one was given."""
        return self._tracker.run_id

    def _init_callback(self) -> None:
        if not isinstance(self.model, WorldFluxAgent):
            raise ConfigurationError(
                f"TrackingCallback logs a WorldFluxAgent, got {type(self.model).__name__}. "
                "Use wandb.integration.sb3 for the algorithms of stable-baselines3."
            )

    def _on_training_start(self) -> None:
        agent = self.model
        settings = {name: getattr(agent, name) for name in SETTINGS}
        self._tracker.start({**settings, "model": agent.model.config.to_dict(), **self._config})
        agent.at_end_of_learn(self._end)
        self.logger.output_formats.append(self._output)

    def _on_step(self) -> bool:
        return True

    def _end(self) -> None:
        """Logs the last episodes and closes the run, whatever has ended `learn`."""
        error = sys.exc_info()[1]
        try:
            if error is None:
                self.model.dump_logs()
        finally:
            self.logger.output_formats.remove(self._output)
            stopped = isinstance(error, KeyboardInterrupt | SystemExit) or self.model.stopping
            self._tracker.finish("stopped" if stopped else "finished" if error is None else "failed")
