"""Learning from stored experience: replay buffer, batches, the trainer and its callbacks.

Names are imported when they are first used, so that `import worldflux.training` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldflux.diagnostics.health import Health, check_health
    from worldflux.diagnostics.open_loop import OpenLoop, open_loop
    from worldflux.replay.batch import Batch, BatchRequest
    from worldflux.replay.buffer import ReplayBuffer
    from worldflux.training.callbacks import (
        Callback,
        CheckpointCallback,
        EarlyStoppingCallback,
        LoggingCallback,
        ProgressCallback,
    )
    from worldflux.training.config import TrainingConfig
    from worldflux.training.data import create_random_buffer
    from worldflux.training.trainer import Trainer, train

_MODULE_OF = {
    "Batch": "worldflux.replay.batch",
    "BatchRequest": "worldflux.replay.batch",
    "Callback": "worldflux.training.callbacks",
    "CheckpointCallback": "worldflux.training.callbacks",
    "EarlyStoppingCallback": "worldflux.training.callbacks",
    "Health": "worldflux.diagnostics.health",
    "LoggingCallback": "worldflux.training.callbacks",
    "OpenLoop": "worldflux.diagnostics.open_loop",
    "ProgressCallback": "worldflux.training.callbacks",
    "ReplayBuffer": "worldflux.replay.buffer",
    "Trainer": "worldflux.training.trainer",
    "TrainingConfig": "worldflux.training.config",
    "check_health": "worldflux.diagnostics.health",
    "create_random_buffer": "worldflux.training.data",
    "open_loop": "worldflux.diagnostics.open_loop",
    "train": "worldflux.training.trainer",
}

__all__ = [
    "Batch",
    "BatchRequest",
    "Callback",
    "CheckpointCallback",
    "EarlyStoppingCallback",
    "Health",
    "LoggingCallback",
    "OpenLoop",
    "ProgressCallback",
    "ReplayBuffer",
    "Trainer",
    "TrainingConfig",
    "check_health",
    "create_random_buffer",
    "open_loop",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
