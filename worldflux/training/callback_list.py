"""The callbacks of a trainer: their order, their states, and the directories in which they save checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from worldflux.accel import ranks
from worldflux.errors import ConfigurationError
from worldflux.reading import only_our_errors
from worldflux.training.callbacks import Callback, CheckpointCallback, Losses
from worldflux.training.saving import CheckpointDirectory, call_all

if TYPE_CHECKING:
    from worldflux.training.trainer import Trainer


class CallbackList:
    """Callbacks in the order in which they are called.

    Each `CheckpointCallback` comes after all others, because it saves their states. While a callback is called, others
    may be added.
    """

    def __init__(self) -> None:
        self._callbacks: list[Callback] = []

    def __iter__(self) -> Iterator[Callback]:
        """Iterates over the callbacks of this rank that are there now."""
        return iter([one for one in self._callbacks if ranks.is_first() or not one.first_rank_only])

    def check(self, callback: Any) -> None:
        """Raises a `ConfigurationError` if the object is not a callback."""
        if not isinstance(callback, Callback):
            raise ConfigurationError(
                f"A callback derives from worldflux.training.Callback, got {type(callback).__name__}. "
                "Pass an instance, not a class."
            )

    def add(self, callback: Callback) -> None:
        """Adds a callback at its place."""
        # A new list: this may be called by a callback, while somebody iterates over the old one.
        self._callbacks = sorted([*self._callbacks, callback], key=lambda one: isinstance(one, CheckpointCallback))

    @property
    def directories(self) -> list[CheckpointDirectory]:
        """The directories in which checkpoints are saved."""
        return [callback.directory for callback in self._callbacks if isinstance(callback, CheckpointCallback)]

    def release_directories(self) -> None:
        """Lets other runs use the directories."""
        for directory in self.directories:
            directory.release()

    def on_eval_end(self, step: int, metrics: dict[str, float]) -> None:
        """Calls this method of each callback."""
        for callback in self:
            callback.on_eval_end(step, metrics)

    def on_step_end(self, step: int, losses: Losses) -> bool:
        """Calls this method of each callback; False if one of them stops the training."""
        return all([callback.on_step_end(step, losses) is not False for callback in self])

    def on_train_end(self, trainer: Trainer) -> None:
        """Calls this method of each callback, whatever another one raises."""
        call_all(partial(callback.on_train_end, trainer) for callback in self)

    def states(self) -> list[dict[str, Any]]:
        """What the callbacks remember, with their types, for a checkpoint."""
        states = [{"type": type(callback).__name__, "state": callback.state_dict()} for callback in self]
        return [entry for entry in states if entry["state"]]

    def load_states(self, saved: list[dict[str, Any]]) -> None:
        """Gives saved states back to the callbacks of the same types, in their order."""
        left = list(saved)
        for callback in self:
            mine = next((entry for entry in left if entry["type"] == type(callback).__name__), None)
            if mine is not None:
                left.remove(mine)
                with only_our_errors(f"What {mine['type']} remembered in the checkpoint"):
                    callback.load_state_dict(mine["state"])
