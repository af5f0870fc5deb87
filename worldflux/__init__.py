"""worldflux: world models for everyone who can use Stable-Baselines3.

    from worldflux import WorldFluxAgent

    agent = WorldFluxAgent("dreamerv3:size12m", "CartPole-v1").learn()

Names are imported when they are first used, so that `import worldflux` does not load torch.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from worldflux.errors import (
    BufferError,
    CheckpointError,
    ConfigurationError,
    HubError,
    MissingDependencyError,
    ShapeMismatchError,
    TrainingError,
    WorkerError,
    WorldFluxError,
)
from worldflux.lazy import lazy_exports

if TYPE_CHECKING:
    from worldflux.agents.agent import WorldFluxAgent
    from worldflux.config import DreamerV3Config, DynamicsType, LatentType, TDMPC2Config, WorldModelConfig
    from worldflux.factory import create_world_model, list_models, register_model
    from worldflux.models.base import State, WorldModel
    from worldflux.models.objective import PlannedTrajectory, RewardPlus

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parent.parent
if not (_checkout / "worldflux" / "envs").exists() and (_checkout / "envs" / "make.py").exists():
    # In the checkout itself, `envs` and `agents` lie beside this package. Python started there finds it before the
    # package that pip has installed.
    __path__.append(str(_checkout))

__all__ = [
    "BufferError",
    "CheckpointError",
    "ConfigurationError",
    "DreamerV3Config",
    "DynamicsType",
    "HubError",
    "LatentType",
    "MissingDependencyError",
    "PlannedTrajectory",
    "RewardPlus",
    "ShapeMismatchError",
    "State",
    "TDMPC2Config",
    "TrainingError",
    "WorkerError",
    "WorldFluxAgent",
    "WorldFluxError",
    "WorldModel",
    "WorldModelConfig",
    "__version__",
    "create_world_model",
    "list_models",
    "register_model",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "worldflux.agents.agent": ["WorldFluxAgent"],
        "worldflux.config": ["DreamerV3Config", "DynamicsType", "LatentType", "TDMPC2Config", "WorldModelConfig"],
        "worldflux.factory": ["create_world_model", "list_models", "register_model"],
        "worldflux.models.base": ["State", "WorldModel"],
        "worldflux.models.objective": ["PlannedTrajectory", "RewardPlus"],
    },
)

if "gymnasium" in sys.modules:
    # gymnasium.make then knows the suites' ids at once. Otherwise they are registered when worldflux.envs is imported.
    importlib.import_module("worldflux.envs")
