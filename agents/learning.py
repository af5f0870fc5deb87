"""Learning: an agent takes the gradient steps that it owes, on windows from its replay buffer."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors.torch
import torch
from stable_baselines3.common.logger import HumanOutputFormat, Logger
from stable_baselines3.common.utils import safe_mean
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from worldflux.accel import ranks
from worldflux.agents.pace import Pace
from worldflux.errors import ConfigurationError
from worldflux.models.base import OnlineDefaults
from worldflux.models.weights import read_weights
from worldflux.reading import read_json
from worldflux.replay.batch import Batch, Observation
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.provider import MixedReplay, sample_from
from worldflux.replay.sampler import WindowSampler
from worldflux.training.trainer import Trainer
from worldflux.validation import SINGLE_KEY, TASK_KEY, finite_number

if TYPE_CHECKING:
    from worldflux.agents.agent import WorldFluxAgent

_RECORDED_FILE = "recorded.json"
"""File of a checkpoint about the recorded data that a run learns from."""
_RECORDED_EXTRAS_FILE = "recorded.safetensors"
"""File of a checkpoint with the extras of these data."""
_BURST = 10
"""Gradient steps in a row that are a burst."""
_FEW_AHEAD = 16
"""Gradient steps by which acting may always run ahead of learning."""
CHECK_INTERVAL = 100
"""Gradient steps between checks that all losses were finite, and of the health. A check waits for the device."""


class Learner:
    """Takes the gradient steps that environment steps ask for, once there is enough to learn from.

    Attributes:
        n_updates: Gradient steps taken.
        updates_asked: Gradient steps that the schedule has asked for so far, those included that were taken.
        collected: Transitions that the replay buffer has received.
        last_losses: Losses of the last gradient step, as tensors on the device.
        mean_losses: Means of the losses since the last dump of the log.
        burst: How many of many gradient steps in a row are done, and their number; None at other times.
        recorded: Recorded data to learn from besides what is collected, or None.
        offline_share: Share of the windows in a batch that come from the recorded data.

    Args:
        trainer: Takes the gradient steps, on batches of its configuration.
        schedule: Says how many gradient steps are due.
        family: Says how learning begins, and whether new windows are drawn first.
        learning_starts: Transitions to collect before the first gradient step.
        window: Rows in a sampled window: the trained ones, and the one whose stored state they start from.
    """

    def __init__(
        self, trainer: Trainer, schedule: UpdateSchedule, family: OnlineDefaults, *, learning_starts: int, window: int
    ) -> None:
        self.trainer = trainer
        self.schedule = schedule
        self.family = family
        self.learning_starts = learning_starts
        self.window = window
        # Each is changed by one thread where acting and learning have one each: the second by the one that acts.
        self.n_updates = 0
        self.updates_asked = 0
        self.collected = 0
        self.last_losses: Mapping[str, Tensor] = {}
        self.mean_losses = MeanLosses()
        self.burst: tuple[int, int] | None = None
        self.recorded: WindowSampler | None = None
        self.offline_share = 0.0
        self._mixed: MixedReplay | None = None
        self._started = False
        self._examined_at = 0  # number of gradient steps at the last look at the health
        self._problems: set[str] = set()  # problems that were reported already

    @property
    def updates_owed(self) -> int:
        """Gradient steps that the schedule has asked for and that were not taken yet."""
        return self.updates_asked - self.n_updates

    @property
    def is_due(self) -> bool:
        """Whether a gradient step is owed and can be taken."""
        return self._started and self.updates_owed > 0

    @property
    def acts_at_random(self) -> bool:
        """Whether the random start of the family goes on: until the first gradient steps it owes are taken."""
        untrained = self.n_updates == 0 and (self.updates_owed > 0 or not self._started)
        return self.family.random_start and untrained and self.recorded is None

    @property
    def steps_to_wait(self) -> int:
        """Environment steps until `learning_starts`."""
        return 0 if self._started else max(self.learning_starts - self.collected, 0)

    def updates_until(self, env_steps: float) -> float:
        """Gradient steps to take during so many further environment steps, those included that are owed."""
        schedule = self.schedule
        if self._started:
            return self.updates_owed + env_steps / schedule.env_steps_per_update
        if self.steps_to_wait > env_steps or not schedule.train_ratio:
            return 0
        return schedule.first_updates + (env_steps - self.steps_to_wait) / schedule.env_steps_per_update

    def describe_schedule(self) -> str:
        """How often it trains, in words."""
        schedule, config = self.schedule, self.trainer.config
        every = schedule.env_steps_per_update
        if every == float("inf"):
            return "collecting without training (train_ratio 0)"
        rhythm = "one gradient step per environment step"
        if every > 1:
            rhythm = f"one gradient step every {every:g} environment steps"
        elif every < 1:
            rhythm = f"{round(1 / every, 2):g} gradient steps per environment step"
        rhythm += f" (train_ratio {schedule.train_ratio:g}, batches of {config.batch_size} x {config.sequence_length})"
        if self.recorded is not None:
            rhythm += f", with {self.offline_share:.0%} of the windows from recorded data"
        if self.n_updates or self._started:
            return rhythm
        if self.family.random_start and self.recorded is None:
            return f"{rhythm}, and {schedule.first_updates:,} at once after {self.learning_starts:,} random steps"
        return f"{rhythm}, from step {self.learning_starts:,} on"

    def learn_from(self, recorded: WindowSampler | None, share: float) -> None:
        """Changes the recorded data to learn from, which fit the model, and their share of the windows."""
        self.recorded, self.offline_share, self._mixed = recorded, share, None

    def write_recorded(self, directory: Path) -> None:
        """Writes which recorded data a run learns from, where their sampler stands, and the extras of their rows."""
        if self.recorded is not None:
            sampler = self.recorded.rng_state()
            state = {"data": self.recorded.digest(), "share": self.offline_share, "sampler": sampler}
            (directory / _RECORDED_FILE).write_text(json.dumps(state), encoding="utf-8")
            if extras := self.recorded.extras_state():
                safetensors.torch.save_file(extras, directory / _RECORDED_EXTRAS_FILE)

    def resume_recorded(self, directory: Path, share: float | None, *, exactly: bool) -> None:
        """Continues with the recorded data of a run, which the agent has been given again.

        Args:
            directory: Where `write_recorded` wrote.
            share: Another share than before, or None.
            exactly: Whether the random numbers and the extras are continued, too.

        Raises:
            ConfigurationError: If the data are missing, or are others.
        """
        path = directory / _RECORDED_FILE
        if not path.exists():
            return
        saved = read_json(path, name=_RECORDED_FILE)
        if self.recorded is None:
            raise ConfigurationError(
                "The run learns from recorded data, too, which its checkpoints do not contain. Pass them: "
                "WorldFluxAgent.load(path, env, resume=True, buffer=ReplayBuffer.load(file))."
            )
        if self.recorded.digest() != saved["data"]:
            raise ConfigurationError("buffer has other data than the run has learned from. Pass the same data.")
        self.learn_from(self.recorded, finite_number("share", saved["share"]) if share is None else share)
        if exactly:
            self.recorded.set_rng_state(saved["sampler"])
            if (directory / _RECORDED_EXTRAS_FILE).exists():
                extras = read_weights(directory / _RECORDED_EXTRAS_FILE, allow_nonfinite=True)
                self.recorded.load_extras_state(extras)

    def _source(self, buffer: ReplayBuffer) -> ReplayBuffer | MixedReplay:
        """Where windows are drawn from: the buffer, or both it and the recorded data."""
        if self.recorded is None:
            return buffer
        if self._mixed is None or self._mixed.collected is not buffer:
            self._mixed = MixedReplay(self.recorded, buffer, self.offline_share)
        return self._mixed

    def set_train_ratio(self, ratio: float) -> None:
        """Changes the ratio from now on; with 0 nothing is owed any more."""
        self.schedule.set_train_ratio(ratio)
        if not ratio:
            self.updates_asked = self.n_updates

    def owe(self, env_steps: int, buffer: ReplayBuffer) -> None:
        """Adds the gradient steps that new environment steps ask for, if training has started."""
        if self._can_train(buffer):
            self.updates_asked += self.schedule.updates_due(env_steps)

    def train(
        self, buffer: ReplayBuffer, normalize: VecNormalize | None, pace: Pace, go_on: Callable[[], bool]
    ) -> None:
        """Takes the gradient steps that are owed; an interruption leaves the rest of them for the next call.

        Args:
            buffer: Where windows are drawn from.
            normalize: Normalises observations.
            pace: Measures the gradient steps.
            go_on: Called before each gradient step; False leaves it and the others for the next call.
        """
        owed = self.updates_owed
        while self.is_due:
            self.show_burst(owed)
            if not go_on():
                break
            self.take_step(buffer, normalize, pace)
        self.burst = None

    def show_burst(self, owed: int) -> None:
        """Sets `burst`, where `owed` gradient steps were owed when the first of them was begun."""
        self.burst = (owed - self.updates_owed, owed) if owed >= _BURST else None

    def take_step(self, buffer: ReplayBuffer, normalize: VecNormalize | None, pace: Pace) -> None:
        """Takes one gradient step; arguments as for `train`."""
        began = time.perf_counter()
        self.last_losses = self.trainer.step(self.sample(buffer, normalize), self._source(buffer))
        self.mean_losses.add(self.last_losses)
        self.n_updates += 1
        if self.n_updates % CHECK_INTERVAL == 0:
            self.trainer.check_finite()
        if pace.gradient_step.count < 1 and self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)  # the first times are those of the device
        pace.add_gradient_step(time.perf_counter() - began)

    def sample(self, buffer: ReplayBuffer, normalize: VecNormalize | None) -> Batch:
        """Windows from the buffer and the recorded data, normalised as the policy sees observations now."""
        batch_size, fresh = ranks.share_of("batch_size", self.trainer.config.batch_size), self.family.fresh_windows
        source = self._source(buffer)
        if normalize is None or not normalize.norm_obs:
            return sample_from(source, batch_size, self.window, self.trainer.device, fresh=fresh)
        batch = sample_from(source, batch_size, self.window, fresh=fresh)
        return replace(batch, obs=normalized(batch.obs, normalize))

    def health(self) -> tuple[dict[str, float], list[str]]:
        """Health metrics by name and new problems; both empty until `CHECK_INTERVAL` steps after the last ones."""
        if self.n_updates - self._examined_at < CHECK_INTERVAL:
            return {}, []
        self._examined_at = self.n_updates
        health = self.trainer.health()
        new = [str(problem) for problem in health.problems if problem.name not in self._problems]
        self._problems = {problem.name for problem in health.problems}
        return health.metrics(), new

    def counters(self) -> dict[str, int]:
        """The counts that go on after loading, by their names in an agent's file."""
        return {"_n_updates": self.n_updates, "_updates_owed": self.updates_owed}

    def load_counters(self, counters: Mapping[str, int], *, most_owed: int) -> None:
        """Continues the counts that `counters` gave.

        Args:
            counters: The counts.
            most_owed: Bound of the gradient steps that are owed: no file can ask for more than the schedule could.
        """
        self.n_updates = self._examined_at = counters["_n_updates"]
        owed = min(counters["_updates_owed"], most_owed) if self.schedule.train_ratio else 0
        self.updates_asked = self.n_updates + owed

    def take_new_buffer(self, buffer: ReplayBuffer) -> None:
        """Starts again with another buffer, which may hold transitions already."""
        self.collected, self._started = buffer.num_transitions, False

    def resume(self, buffer: ReplayBuffer, collected: int) -> None:
        """Continues with the buffer of a checkpoint, which had received `collected` transitions."""
        self.collected = collected
        self._can_train(buffer)

    def _can_train(self, buffer: ReplayBuffer) -> bool:
        """Whether training can start, because enough was collected; once it can, it always can.

        What the buffer still holds would be the wrong measure: very short episodes fill its rows with few transitions.
        """
        if not self._started:
            windows = buffer.num_windows(self.window)
            if self.recorded is not None:
                windows += self.recorded.num_windows(self.window)
            is_ready = (
                self.collected >= self.learning_starts and windows * ranks.size() >= self.trainer.config.batch_size
            )
            self._started = not ranks.largest(int(not is_ready))[0]  # when all ranks are ready
        return self._started


class MeanLosses:
    """Means of the losses since they were last read, kept on the device until then."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Adds the losses of one gradient step, without waiting for the device."""
        values = torch.stack([value.detach().float() for value in losses.values()])
        if self._names != tuple(losses):
            self._names, self._sum, self._count = tuple(losses), None, 0
        self._sum = values if self._sum is None else self._sum.add_(values)
        self._count += 1

    def take(self) -> dict[str, float]:
        """Returns the means, which are empty if nothing was trained, and starts again. Waits for the device."""
        if self._sum is None:
            return {}
        means = (self._sum / self._count).tolist()
        self._sum, self._count = None, 0
        return dict(zip(self._names, means, strict=True))


def normalized(obs: Observation, normalize: VecNormalize) -> Observation:
    """Observations in the library's form `[B, T, ...]`, normalised as `VecNormalize` does it."""
    if not isinstance(obs, dict):
        return normalized({SINGLE_KEY: obs}, normalize)[SINGLE_KEY]  # type: ignore[index]
    statistics = normalize.obs_rms if isinstance(normalize.obs_rms, dict) else {SINGLE_KEY: normalize.obs_rms}
    scaled = dict(obs)
    for key, rms in statistics.items():
        mean = torch.as_tensor(rms.mean.reshape(-1), dtype=torch.float32)
        std = torch.as_tensor(np.sqrt(rms.var + normalize.epsilon).reshape(-1), dtype=torch.float32)
        scaled[key] = ((obs[key] - mean) / std).clamp(-normalize.clip_obs, normalize.clip_obs)
    return scaled


class UpdateSchedule:
    """Keeps replayed time steps and environment steps at a fixed ratio.

    Counting starts with the first call, when training starts, and that call returns `first_updates`. After it, every
    environment step adds `train_ratio / replayed_per_update` of a gradient step; whole ones are handed out and the
    remainder is kept, so that the ratio holds over any number of steps and of environments.

    Args:
        train_ratio: Replayed time steps per environment step. Larger learns more from each step and takes longer.
        replayed_per_update: Time steps in one batch, `batch_size * seq_len`.
        first_updates: Gradient steps that the first call returns; more than one make up for the steps before it.

    Source: the training loops of DreamerV3, arXiv:2301.04104, and TD-MPC2, arXiv:2310.16828.
    """

    def __init__(self, train_ratio: float, replayed_per_update: int, first_updates: int = 1) -> None:
        if not train_ratio >= 0 or train_ratio == float("inf"):
            raise ConfigurationError(f"train_ratio is {train_ratio}, expected a number of 0 or more.")
        self.train_ratio = train_ratio
        self.replayed_per_update = replayed_per_update
        self.first_updates = first_updates
        self._env_steps: int | None = None
        self._handed_out = 0

    def __repr__(self) -> str:
        """The settings, and the environment steps since training has started."""
        counted = "" if self._env_steps is None else f", env_steps={self._env_steps}"
        return (
            f"UpdateSchedule(train_ratio={self.train_ratio:g}, replayed_per_update={self.replayed_per_update}, "
            f"first_updates={self.first_updates}{counted})"
        )

    @property
    def env_steps_per_update(self) -> float:
        """The k of "one gradient step every k environment steps"; infinite for a ratio of 0."""
        return self.replayed_per_update / self.train_ratio if self.train_ratio else float("inf")

    def updates_due(self, new_env_steps: int) -> int:
        """Gradient steps to take now.

        Args:
            new_env_steps: Environment steps, over all environments, since the last call.
        """
        if self.train_ratio == 0:
            return 0
        if self._env_steps is None:
            self._env_steps = 0
            return self.first_updates
        self._env_steps += new_env_steps
        # Totals rather than a running remainder: rounding cannot add up over millions of steps.
        total = int(self._env_steps * self.train_ratio / self.replayed_per_update)
        due, self._handed_out = total - self._handed_out, total
        return due

    def set_train_ratio(self, train_ratio: float) -> None:
        """Changes the ratio from now on; nothing is owed for the past."""
        self.train_ratio = train_ratio
        self.load_state_dict(self.state_dict())

    def most_owed(self, n_envs: int) -> int:
        """Gradient steps that can be owed at one time.

        These are the first ones, those of two steps of `n_envs` each, and those by which acting may run ahead.
        """
        of_two_steps = int(2 * n_envs * self.train_ratio / self.replayed_per_update) + 1
        return self.first_updates + of_two_steps + self.most_ahead(n_envs)

    def most_ahead(self, n_envs: int) -> int:
        """Gradient steps by which acting may run ahead of learning at most: those of four steps of `n_envs` each."""
        return max(int(4 * n_envs * self.train_ratio / self.replayed_per_update), _FEW_AHEAD)

    def state_dict(self) -> dict[str, int | None]:
        """The environment steps that were counted, for a checkpoint."""
        return {"env_steps": self._env_steps}

    def load_state_dict(self, state: Mapping[str, int | None]) -> None:
        """Continues a count that `state_dict` described; where the ratio differs, nothing is owed for the past."""
        self._env_steps = state["env_steps"]
        self._handed_out = int((self._env_steps or 0) * self.train_ratio / self.replayed_per_update)


def write_log(agent: WorldFluxAgent) -> None:
    """Writes an agent's log since the last dump, under SB3's names."""
    assert agent.ep_info_buffer is not None and agent.ep_success_buffer is not None
    agent.trainer.check_finite()
    elapsed = max((time.time_ns() - agent.start_time) / 1e9, sys.float_info.epsilon)
    record = agent.logger.record
    if agent.ep_info_buffer:
        record("rollout/ep_rew_mean", safe_mean([info["r"] for info in agent.ep_info_buffer]))
        record("rollout/ep_len_mean", safe_mean([info["l"] for info in agent.ep_info_buffer]))
        for task, name in enumerate(getattr(agent.model.config, "task_names", ())):
            if returns := [info["r"] for info in agent.ep_info_buffer if info.get(TASK_KEY) == task]:
                record(f"rollout/ep_rew_mean/{name}", safe_mean(returns))
    if agent.ep_success_buffer:
        record("rollout/success_rate", safe_mean(agent.ep_success_buffer))
    record("time/episodes", agent._episode_num, exclude="tensorboard")
    record("time/fps", int((agent.num_timesteps - agent._num_timesteps_at_start) / elapsed))
    record("time/time_elapsed", int(elapsed), exclude="tensorboard")
    record("time/total_timesteps", agent.num_timesteps, exclude="tensorboard")
    if agent._frames_per_step > 1:
        record("time/total_frames", agent.num_timesteps * agent._frames_per_step, exclude="tensorboard")
    record("train/n_updates", agent._n_updates, exclude="tensorboard")
    record("train/learning_rate", agent.lr_schedule(agent._current_progress_remaining))
    for name, mean in agent._learner.mean_losses.take().items():
        record(f"train/{name}", mean)
    if agent._beside is not None:
        for name, value in agent._beside.metrics().items():
            record(name, value)
    health_metrics, problems = agent._learner.health()
    for name, value in health_metrics.items():
        record(f"health/{name}", value)
    for problem in problems:
        agent.logger.warn(problem)
    dump_log(agent.logger, agent.num_timesteps)


_INDENT = 3
"""Columns that SB3's tables put before a name."""


def dump_log(logger: Logger, step: int) -> None:
    """Writes what was recorded, in tables that are wide enough for all names.

    SB3's tables cut names that are longer than their `max_length`, and raise where two of them become the same.
    Names of losses contain those of the observations, which begin alike in many environments.
    """
    longest = max(map(len, logger.name_to_value), default=0) + _INDENT
    for output in logger.output_formats:
        if isinstance(output, HumanOutputFormat):
            output.max_length = max(output.max_length, longest)
    logger.dump(step)
