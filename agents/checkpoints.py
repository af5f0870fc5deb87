"""Checkpoints of an agent: everything that its run goes on from, replay data included.

A checkpoint is one directory:

| entry | content |
| --- | --- |
| `agent.json`, `config.json`, `model.safetensors`, `optimizer.pt`, `trainer.json` | what the zip of `save` holds |
| `run.json` | the log's memory, and the statistics of a `VecNormalize` |
| `replay/` | the replay buffer, in segments that checkpoints share (`worldflux.training.replay_segments`) |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

from worldflux.agents.numbers import count, finite_number
from worldflux.errors import CheckpointError, ConfigurationError, ShapeMismatchError
from worldflux.reading import read_json

RUN_FILE = "run.json"
_EPISODE_INFO = ("r", "l", "t")
"""What SB3's `Monitor` says of an episode: its return, its length, and when it ended."""


@dataclass(frozen=True)
class RunState:
    """What a run remembers besides its agent and its replay data."""

    collected: int
    """Transitions that the replay buffer has received."""
    episode_infos: list[dict[str, float]]
    """SB3's `ep_info_buffer`: return, length and time of the last episodes."""
    episode_successes: list[float]
    """SB3's `ep_success_buffer`."""
    normalization: dict[str, Any] | None
    """Statistics of the `VecNormalize` around the environments, if there is one."""

    def write(self, directory: Path) -> None:
        """Writes `run.json`."""
        (directory / RUN_FILE).write_text(json.dumps(vars(self)), encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> RunState:
        """What `write` wrote.

        Raises:
            CheckpointError: If the file is missing or damaged.
        """
        path = directory / RUN_FILE
        try:
            data = read_json(path, finite=False)  # statistics of a VecNormalize may be anything
            infos = data["episode_infos"]
            infos = [
                {name: finite_number(name, info[name]) for name in _EPISODE_INFO if name in info} for info in infos
            ]
            return cls(
                collected=count("collected", data["collected"], 0),
                episode_infos=[{**info, "l": int(info["l"])} for info in infos],
                episode_successes=[finite_number("episode_successes", value) for value in data["episode_successes"]],
                normalization=None if data["normalization"] is None else dict(data["normalization"]),
            )
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{directory} has no {RUN_FILE}, so there is no run to resume. Pass a directory that "
                "WorldFluxAgent.save_checkpoint wrote; a zip of save() holds no replay data."
            ) from error
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}.") from error


def episode_info(info: Mapping[str, Any]) -> dict[str, float]:
    """What is remembered of an episode, as JSON can hold it; `VecMonitor` and others give NumPy's numbers."""
    return {name: float(info[name]) for name in _EPISODE_INFO if name in info}


def normalization_state(normalize: VecNormalize | None) -> dict[str, Any] | None:
    """The running statistics of a `VecNormalize`, as JSON can hold them."""
    if normalize is None:
        return None
    obs = normalize.obs_rms if normalize.norm_obs else {}
    return {
        "obs": {key: _moments(rms) for key, rms in (obs if isinstance(obs, dict) else {"": obs}).items()},
        "returns": _moments(normalize.ret_rms),
    }


def restore_normalization(normalize: VecNormalize | None, state: Mapping[str, Any] | None) -> None:
    """Continues the statistics that `normalization_state` gave.

    Raises:
        ConfigurationError: If only one of the two runs has a `VecNormalize`.
        CheckpointError: If the statistics are of other observations.
    """
    if (normalize is None) != (state is None):
        was, now = ("had a", "has none") if normalize is None else ("had no", "has one")
        raise ConfigurationError(
            f"The run {was} VecNormalize around its environments, and env {now}. Wrap env as it was."
        )
    if normalize is None or state is None:
        return
    obs = normalize.obs_rms if normalize.norm_obs else {}
    try:
        for key, rms in (obs if isinstance(obs, dict) else {"": obs}).items():
            _restore_moments(rms, state["obs"][key])
        _restore_moments(normalize.ret_rms, state["returns"])
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"The statistics of VecNormalize in the checkpoint do not fit env: {error}.") from error


def _moments(rms: RunningMeanStd) -> dict[str, Any]:
    return {"mean": np.asarray(rms.mean).tolist(), "var": np.asarray(rms.var).tolist(), "count": float(rms.count)}


def _restore_moments(rms: RunningMeanStd, state: Mapping[str, Any]) -> None:
    mean, var = np.asarray(state["mean"], np.float64), np.asarray(state["var"], np.float64)
    if mean.shape != np.shape(rms.mean) or var.shape != np.shape(rms.var):
        raise ShapeMismatchError(f"a mean has shape {mean.shape}, expected {np.shape(rms.mean)}")
    count = finite_number("count", state["count"])
    if not np.isfinite(mean).all() or not (np.isfinite(var) & (var >= 0)).all() or count < 0:
        raise ConfigurationError("a mean, a variance or a count is none")
    rms.mean, rms.var, rms.count = mean, var, count
