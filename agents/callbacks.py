"""Callbacks of stable-baselines3 for runs of a `WorldFluxAgent`."""

from __future__ import annotations

import sys
from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback

from worldflux.agents.agent import WorldFluxAgent
from worldflux.errors import ConfigurationError, TrainingError
from worldflux.training.checkpoint import checkpoint_name, keep_newest
from worldflux.training.config import whole_number


class AgentCheckpointCallback(BaseCallback):
    """Saves checkpoints `output_dir/step-00010000` of a run, from which it can be resumed.

        agent.learn(1_000_000, AgentCheckpointCallback("runs/pong"))
        ...                                                             # killed; later, in a new process:
        agent = WorldFluxAgent.load("runs/pong", "atari/pong", resume=True)
        agent.learn(1_000_000 - agent.num_timesteps, AgentCheckpointCallback("runs/pong"), reset_num_timesteps=False)

    One more is saved when `learn` ends between two intervals, also by Ctrl-C, SIGTERM or an error in the environment.
    Nothing is saved once a loss is not finite: the newest checkpoint is a good one.

    Args:
        output_dir: Made if it does not exist.
        save_interval: Environment steps between checkpoints, over all environments.
        max_checkpoints: How many to keep in `output_dir`; the ones written longest ago are removed.
        verbose: 1 prints the path of each.

    Raises:
        ConfigurationError: If a number is below 1, or it is given to another algorithm of SB3.
    """

    model: WorldFluxAgent

    def __init__(
        self, output_dir: str | Path, save_interval: int = 10_000, max_checkpoints: int = 2, verbose: int = 0
    ) -> None:
        super().__init__(verbose)
        self.output_dir = Path(output_dir)
        self.save_interval = whole_number("save_interval", save_interval, 1)
        self.max_checkpoints = whole_number("max_checkpoints", max_checkpoints, 1)
        self._saved_at = 0

    def _init_callback(self) -> None:
        if not isinstance(self.model, WorldFluxAgent):
            raise ConfigurationError(
                f"AgentCheckpointCallback saves a WorldFluxAgent, got {type(self.model).__name__}. "
                "Use stable-baselines3's CheckpointCallback for its own algorithms."
            )

    def _on_training_start(self) -> None:
        self._saved_at = self.num_timesteps

    def _on_step(self) -> bool:
        due = self.num_timesteps // self.save_interval > self._saved_at // self.save_interval
        if due or self.model.stopping:
            self._save()
        return True

    def _on_training_end(self) -> None:
        if self.num_timesteps == self._saved_at:
            return
        if self.model.stopping and isinstance(sys.exc_info()[1], KeyboardInterrupt):
            return  # the second Ctrl-C, which may have come in the middle of anything
        try:
            self._save()
        except TrainingError:  # which `learn` raises itself
            return

    def _save(self) -> None:
        path = self.output_dir / checkpoint_name(self.num_timesteps)
        self.model.save_checkpoint(path)
        keep_newest(self.output_dir, self.max_checkpoints)
        self._saved_at = self.num_timesteps
        if self.verbose:
            print(f"saved {path}")
