"""Environments: making them, translating their spaces, recording their episodes.

Importing this package only registers the suites' ids with Gymnasium. Exported names are imported when they are first
used, so that a worker process which only steps an environment never loads torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from worldflux.envs.suites.registration import register_suites
from worldflux.lazy import lazy_exports

if TYPE_CHECKING:
    from worldflux.envs.checking import check_env
    from worldflux.envs.checking.report import CheckReport, EnvironmentCheckError
    from worldflux.envs.collection import collect
    from worldflux.envs.imagined import ImaginedEnv, ImaginedVecEnv
    from worldflux.envs.make import make_env, make_vec_env
    from worldflux.envs.recording.wrappers import RecordEpisodes, VecRecordEpisodes, VectorRecordEpisodes
    from worldflux.envs.spaces import ActionCodec, ObservationCodec
    from worldflux.envs.tasks import TaskVecEnv
    from worldflux.envs.vector import GymnasiumVecEnv
    from worldflux.envs.wrappers import ActionRepeat, ResizeImages

__all__ = [
    "ActionCodec",
    "ActionRepeat",
    "CheckReport",
    "EnvironmentCheckError",
    "GymnasiumVecEnv",
    "ImaginedEnv",
    "ImaginedVecEnv",
    "ObservationCodec",
    "RecordEpisodes",
    "ResizeImages",
    "TaskVecEnv",
    "VecRecordEpisodes",
    "VectorRecordEpisodes",
    "check_env",
    "collect",
    "make_env",
    "make_vec_env",
]

register_suites()

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "worldflux.envs.checking": ["check_env"],
        "worldflux.envs.checking.report": ["CheckReport", "EnvironmentCheckError"],
        "worldflux.envs.collection": ["collect"],
        "worldflux.envs.imagined": ["ImaginedEnv", "ImaginedVecEnv"],
        "worldflux.envs.make": ["make_env", "make_vec_env"],
        "worldflux.envs.recording.wrappers": ["RecordEpisodes", "VecRecordEpisodes", "VectorRecordEpisodes"],
        "worldflux.envs.spaces": ["ActionCodec", "ObservationCodec"],
        "worldflux.envs.tasks": ["TaskVecEnv"],
        "worldflux.envs.vector": ["GymnasiumVecEnv"],
        "worldflux.envs.wrappers": ["ActionRepeat", "ResizeImages"],
    },
)
