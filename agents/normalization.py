"""Observations as a policy under SB3's `VecNormalize` sees them."""

from __future__ import annotations

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecNormalize

from worldflux.envs.spaces import SINGLE_KEY
from worldflux.training.batch import Observation


def normalized(obs: Observation, normalize: VecNormalize) -> Observation:
    """`VecNormalize`'s own normalisation, of observations in the library's form `[B, T, ...]`."""
    if not isinstance(obs, dict):
        return normalized({SINGLE_KEY: obs}, normalize)[SINGLE_KEY]  # type: ignore[index]
    statistics = normalize.obs_rms if isinstance(normalize.obs_rms, dict) else {SINGLE_KEY: normalize.obs_rms}
    scaled = dict(obs)
    for key, rms in statistics.items():
        mean = torch.as_tensor(rms.mean.reshape(-1), dtype=torch.float32)
        std = torch.as_tensor(np.sqrt(rms.var + normalize.epsilon).reshape(-1), dtype=torch.float32)
        scaled[key] = ((obs[key] - mean) / std).clamp(-normalize.clip_obs, normalize.clip_obs)
    return scaled
