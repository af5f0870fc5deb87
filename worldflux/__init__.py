"""worldflux: world models for everyone who can use Stable-Baselines3.

    from worldflux import WorldFluxAgent

    agent = WorldFluxAgent("dreamerv3:size12m", "CartPole-v1").learn()

Names are imported when they are first used, so that `import worldflux` loads no torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldflux.agents.agent import WorldFluxAgent
    from worldflux.config import DreamerV3Config, DynamicsType, LatentType, TDMPC2Config, WorldModelConfig
    from worldflux.errors import (
        BufferError,
        CheckpointError,
        ConfigurationError,
        MissingDependencyError,
        ShapeMismatchError,
        TrainingError,
        WorldFluxError,
    )
    from worldflux.factory import create_world_model, list_models, register_model
    from worldflux.models.base import State, WorldModel

__version__ = "0.1.0"

_HOMES = {
    "WorldFluxAgent": "worldflux.agents.agent",
    "DreamerV3Config": "worldflux.config",
    "DynamicsType": "worldflux.config",
    "LatentType": "worldflux.config",
    "TDMPC2Config": "worldflux.config",
    "WorldModelConfig": "worldflux.config",
    "BufferError": "worldflux.errors",
    "CheckpointError": "worldflux.errors",
    "ConfigurationError": "worldflux.errors",
    "MissingDependencyError": "worldflux.errors",
    "ShapeMismatchError": "worldflux.errors",
    "TrainingError": "worldflux.errors",
    "WorldFluxError": "worldflux.errors",
    "create_world_model": "worldflux.factory",
    "list_models": "worldflux.factory",
    "register_model": "worldflux.factory",
    "State": "worldflux.models.base",
    "WorldModel": "worldflux.models.base",
}

__all__ = [
    "BufferError",
    "CheckpointError",
    "ConfigurationError",
    "DreamerV3Config",
    "DynamicsType",
    "LatentType",
    "MissingDependencyError",
    "ShapeMismatchError",
    "State",
    "TDMPC2Config",
    "TrainingError",
    "WorldFluxAgent",
    "WorldFluxError",
    "WorldModel",
    "WorldModelConfig",
    "__version__",
    "create_world_model",
    "list_models",
    "register_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'worldflux' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


if "gymnasium" in sys.modules:
    # gymnasium.make then knows the suites' ids at once; otherwise importing worldflux.envs tells it.
    importlib.import_module("worldflux.envs")
