"""Learning from stored experience: replay buffer, batches, the trainer and its callbacks.

Names are imported when they are first used, so that `import worldflux.training` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worldflux.lazy import lazy_exports

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
    from worldflux.training.offline import train
    from worldflux.training.trainer import Trainer

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

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "worldflux.diagnostics.health": ["Health", "check_health"],
        "worldflux.diagnostics.open_loop": ["OpenLoop", "open_loop"],
        "worldflux.replay.batch": ["Batch", "BatchRequest"],
        "worldflux.replay.buffer": ["ReplayBuffer"],
        "worldflux.training.callbacks": [
            "Callback",
            "CheckpointCallback",
            "EarlyStoppingCallback",
            "LoggingCallback",
            "ProgressCallback",
        ],
        "worldflux.training.config": ["TrainingConfig"],
        "worldflux.training.data": ["create_random_buffer"],
        "worldflux.training.offline": ["train"],
        "worldflux.training.trainer": ["Trainer"],
    },
)
