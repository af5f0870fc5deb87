"""Environments: making them, translating their spaces, recording their episodes."""

from worldflux.envs.make import make_env, make_vec_env
from worldflux.envs.record import RecordEpisodes, VecRecordEpisodes
from worldflux.envs.spaces import ActionCodec, ObservationCodec

__all__ = [
    "ActionCodec",
    "ObservationCodec",
    "RecordEpisodes",
    "VecRecordEpisodes",
    "make_env",
    "make_vec_env",
]
