"""How many gradient steps are due after so many environment steps."""

from __future__ import annotations

from collections.abc import Mapping

from worldflux.errors import ConfigurationError


class UpdateSchedule:
    """Keeps replayed time steps and environment steps at a fixed ratio.

    Counting starts with the first call, that is when training starts, and that call owes `first_updates`. After
    it, every environment step owes `train_ratio / replayed_per_update` of one; whole ones are handed out and the
    remainder is kept, so that the ratio holds over any stretch, whatever the number of environments.

    Args:
        train_ratio: Replayed time steps per environment step. Larger learns more from each step and takes longer.
        replayed_per_update: Time steps in one batch, `batch_size * seq_len`.
        first_updates: Gradient steps that the first call owes; more than one make up for the time before it.

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
        """Keeps another ratio from now on; nothing is owed for the past."""
        self.train_ratio = train_ratio
        self.load_state_dict(self.state_dict())

    def most_owed(self, n_envs: int) -> int:
        """Gradient steps that can be owed at one time: the first ones, and those of two steps of `n_envs` each."""
        return self.first_updates + int(2 * n_envs * self.train_ratio / self.replayed_per_update) + 1

    def state_dict(self) -> dict[str, int | None]:
        """Where the count stands, for a checkpoint."""
        return {"env_steps": self._env_steps, "handed_out": self._handed_out}

    def load_state_dict(self, state: Mapping[str, int | None]) -> None:
        """Continue a count that `state_dict` described.

        The handed-out total is counted anew where the ratio has changed since: nothing is owed for the past.
        """
        self._env_steps = state["env_steps"]
        self._handed_out = int((self._env_steps or 0) * self.train_ratio / self.replayed_per_update)
