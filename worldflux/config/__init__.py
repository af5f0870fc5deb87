"""Configurations of world models: sizes, inputs and hyperparameters, which are checked when they are created."""

from worldflux.config.base import DynamicsType, LatentType, WorldModelConfig
from worldflux.config.dreamerv3 import DREAMERV3_SIZES, DreamerV3Config
from worldflux.config.planner import PlannerConfig
from worldflux.config.tdmpc2 import TDMPC2_SIZES, TDMPC2Config
from worldflux.validation import ObsShape

__all__ = [
    "DREAMERV3_SIZES",
    "DreamerV3Config",
    "DynamicsType",
    "LatentType",
    "ObsShape",
    "PlannerConfig",
    "TDMPC2_SIZES",
    "TDMPC2Config",
    "WorldModelConfig",
]
