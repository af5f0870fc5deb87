"""Learning from stored experience: replay buffer, batches, the trainer and its callbacks.

Names are imported when they are first used, so that `import worldflux.training` stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldflux.training.batch import Batch, BatchRequest
    from worldflux.training.callbacks import (
        Callback,
        CheckpointCallback,
        EarlyStoppingCallback,
        LoggingCallback,
        ProgressCallback,
    )
    from worldflux.training.config import TrainingConfig
    from worldflux.training.data import create_random_buffer
    from worldflux.training.health import Health, check_health
    from worldflux.training.prediction import OpenLoop, open_loop
    from worldflux.training.replay import ReplayBuffer
    from worldflux.training.trainer import Trainer, train

_MODULE_OF = {
    "Batch": "batch",
    "BatchRequest": "batch",
    "Callback": "callbacks",
    "CheckpointCallback": "callbacks",
    "EarlyStoppingCallback": "callbacks",
    "Health": "health",
    "LoggingCallback": "callbacks",
    "OpenLoop": "prediction",
    "ProgressCallback": "callbacks",
    "ReplayBuffer": "replay",
    "Trainer": "trainer",
    "TrainingConfig": "config",
    "check_health": "health",
    "create_random_buffer": "data",
    "open_loop": "prediction",
    "train": "trainer",
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
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
