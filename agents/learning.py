"""Learning: an agent takes the gradient steps that it owes, on windows from its replay buffer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from worldflux.agents.losses import MeanLosses
from worldflux.agents.normalization import normalized
from worldflux.agents.schedule import UpdateSchedule
from worldflux.models.base import OnlineDefaults
from worldflux.training.batch import Batch
from worldflux.training.data import sample_from
from worldflux.training.replay import ReplayBuffer
from worldflux.training.trainer import Trainer

CHECK_INTERVAL = 100
"""Gradient steps between looks at whether all losses were finite, and at the health. A look waits for the device."""


class Learner:
    """Takes the gradient steps that environment steps ask for, once there is enough to learn from.

    Attributes:
        n_updates: Gradient steps taken.
        updates_owed: Gradient steps that the schedule handed out and nobody has taken yet.
        collected: Transitions that the replay buffer has received.
        last_losses: Of the last gradient step, as tensors on the device.
        mean_losses: Of those since the last dump of the log.

    Args:
        trainer: Takes them, on batches of its configuration.
        schedule: Says how many are due.
        family: Says how learning begins, and which windows are drawn first.
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
        self.n_updates = 0
        self.updates_owed = 0
        self.collected = 0
        self.last_losses: Mapping[str, Tensor] = {}
        self.mean_losses = MeanLosses()
        self._started = False
        self._examined_at = 0  # gradient steps
        self._problems: set[str] = set()  # which have been told

    @property
    def acts_at_random(self) -> bool:
        """Whether the random start of the family goes on: until the first gradient steps it owes are taken."""
        untrained = self.n_updates == 0 and (self.updates_owed > 0 or not self._started)
        return self.family.random_start and untrained

    def describe_schedule(self) -> str:
        """How often it trains, as a sentence."""
        schedule, config = self.schedule, self.trainer.config
        every = schedule.env_steps_per_update
        if every == float("inf"):
            return "train_ratio is 0: collecting without training"
        rhythm = f"one gradient step every {every:g} environment steps"
        if every < 1:
            rhythm = f"{1 / every:g} gradient steps every environment step"
        rhythm += f" (train_ratio {schedule.train_ratio:g}, batches of {config.batch_size} x {config.sequence_length})"
        if self.family.random_start and self.n_updates == 0:
            rhythm += f", and {schedule.first_updates} at once after {self.learning_starts} random steps"
        return rhythm

    def set_train_ratio(self, ratio: float) -> None:
        """Learns so much from each environment step from now on; with 0 nothing is owed any more."""
        self.schedule.set_train_ratio(ratio)
        if not ratio:
            self.updates_owed = 0

    def owe(self, env_steps: int, buffer: ReplayBuffer) -> None:
        """Adds the gradient steps that new environment steps ask for, if training has started."""
        if self._can_train(buffer):
            self.updates_owed += self.schedule.updates_due(env_steps)

    def train(self, buffer: ReplayBuffer, normalize: VecNormalize | None) -> None:
        """Takes the gradient steps that are owed; an interruption leaves the rest of them for the next call."""
        while self.updates_owed and self._started:
            self.last_losses = self.trainer.step(self.sample(buffer, normalize), buffer)
            self.mean_losses.add(self.last_losses)
            self.updates_owed -= 1
            self.n_updates += 1
            if self.n_updates % CHECK_INTERVAL == 0:
                self.trainer.check_finite()

    def sample(self, buffer: ReplayBuffer, normalize: VecNormalize | None) -> Batch:
        """Windows from the buffer, normalised as the policy sees observations now."""
        batch_size, fresh = self.trainer.config.batch_size, self.family.fresh_windows
        if normalize is None or not normalize.norm_obs:
            return sample_from(buffer, batch_size, self.window, self.trainer.device, fresh=fresh)
        batch = sample_from(buffer, batch_size, self.window, fresh=fresh)
        return replace(batch, obs=normalized(batch.obs, normalize))

    def health(self) -> tuple[dict[str, float], list[str]]:
        """The model's vitals by name, and what has gone wrong since the last call; nothing where little has changed."""
        if self.n_updates - self._examined_at < CHECK_INTERVAL:
            return {}, []
        self._examined_at = self.n_updates
        health = self.trainer.health()
        new = [str(problem) for problem in health.problems if problem.name not in self._problems]
        self._problems = {problem.name for problem in health.problems}
        return health.metrics(), new

    def counters(self) -> dict[str, int]:
        """What goes on counting after loading, by the names in an agent's file."""
        return {"_n_updates": self.n_updates, "_updates_owed": self.updates_owed}

    def load_counters(self, counters: Mapping[str, int], *, most_owed: int) -> None:
        """Continues from what `counters` gave.

        Args:
            counters: Where nothing is to be trained any more, nothing is owed.
            most_owed: More than the present schedule can owe is none of this run.
        """
        self.n_updates = self._examined_at = counters["_n_updates"]
        self.updates_owed = min(counters["_updates_owed"], most_owed) if self.schedule.train_ratio else 0

    def take_new_buffer(self, buffer: ReplayBuffer) -> None:
        """Counts anew from what another buffer holds already."""
        self.collected, self._started = buffer.num_transitions, False

    def resume(self, buffer: ReplayBuffer, collected: int) -> None:
        """Goes on with the buffer of a checkpoint, which had received so many transitions."""
        self.collected = collected
        self._can_train(buffer)

    def _can_train(self, buffer: ReplayBuffer) -> bool:
        """Whether the buffer has received what training starts with; once it has, that stays so.

        What it still holds would be the wrong measure: very short episodes can fill its rows with fewer transitions.
        """
        if not self._started:
            self._started = (
                self.collected >= self.learning_starts
                and buffer.num_windows(self.window) >= self.trainer.config.batch_size
            )
        return self._started
