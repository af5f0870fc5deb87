"""Environments: making them, translating their spaces, recording their episodes.

Importing this package registers the suites' ids with Gymnasium and nothing else: what is exported is imported when it
is first used, so that a worker process which only steps an environment never loads torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from worldflux.envs.suites.registration import register_suites

if TYPE_CHECKING:
    from worldflux.envs.checking import check_env
    from worldflux.envs.checking.report import CheckReport, EnvironmentCheckError
    from worldflux.envs.collection import collect
    from worldflux.envs.make import make_env, make_vec_env
    from worldflux.envs.recording.wrappers import RecordEpisodes, VecRecordEpisodes, VectorRecordEpisodes
    from worldflux.envs.spaces import ActionCodec, ObservationCodec
    from worldflux.envs.vector import GymnasiumVecEnv
    from worldflux.envs.wrappers import ActionRepeat, ResizeImages

_HOMES = {
    "ActionCodec": "worldflux.envs.spaces",
    "ActionRepeat": "worldflux.envs.wrappers",
    "CheckReport": "worldflux.envs.checking.report",
    "EnvironmentCheckError": "worldflux.envs.checking.report",
    "GymnasiumVecEnv": "worldflux.envs.vector",
    "ObservationCodec": "worldflux.envs.spaces",
    "RecordEpisodes": "worldflux.envs.recording.wrappers",
    "ResizeImages": "worldflux.envs.wrappers",
    "VecRecordEpisodes": "worldflux.envs.recording.wrappers",
    "VectorRecordEpisodes": "worldflux.envs.recording.wrappers",
    "check_env": "worldflux.envs.checking",
    "collect": "worldflux.envs.collection",
    "make_env": "worldflux.envs.make",
    "make_vec_env": "worldflux.envs.make",
}

__all__ = [
    "ActionCodec",
    "ActionRepeat",
    "CheckReport",
    "EnvironmentCheckError",
    "GymnasiumVecEnv",
    "ObservationCodec",
    "RecordEpisodes",
    "ResizeImages",
    "VecRecordEpisodes",
    "VectorRecordEpisodes",
    "check_env",
    "collect",
    "make_env",
    "make_vec_env",
]

register_suites()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'worldflux.envs' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
