"""Callbacks of stable-baselines3 for runs of a `WorldFluxAgent`."""

from __future__ import annotations

import sys
from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback

from worldflux.agents.agent import WorldFluxAgent
from worldflux.errors import ConfigurationError, TrainingError
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
        self._saved_at: int | None = None

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
        self._saved_at = self.num_timesteps

    def _on_step(self) -> bool:
        if self._saved_at is None:  # the callback was added in the middle of `learn`
            self._on_training_start()
        assert self._saved_at is not None
        due = self.num_timesteps // self.save_interval > self._saved_at // self.save_interval
        if due or self.model.stopping:
            self._save()
        return True

    def _end(self) -> None:
        """Saves the last step, whatever has ended `learn`."""
        self.num_timesteps, error = self.model.num_timesteps, sys.exc_info()[1]
        begun = self._saved_at is not None
        if (self.model.stopping or self.model.trainer.in_step) and isinstance(error, KeyboardInterrupt):
            begun = False  # a second Ctrl-C may have come in the middle of anything
        try:
            if begun and self.num_timesteps != self._saved_at:
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
        self._saved_at = self.num_timesteps
        if self.verbose:
            print(f"saved {path}")
