"""Registers the two algorithms with rl_zoo3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from worldflux.agents.zoo.algorithms import TDMPC2, DreamerV3
from worldflux.agents.zoo.search import convert, sample_dreamerv3, sample_tdmpc2
from worldflux.agents.zoo.upstream import ALGOS, HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER, exp_manager

HYPERPARAMS = Path(__file__).parent / "hyperparams"
"""Folder of `dreamerv3.yml` and `tdmpc2.yml`, in rl_zoo3's format."""

ALGORITHMS = {"dreamerv3": DreamerV3, "tdmpc2": TDMPC2}

_THEIRS = Path(exp_manager.__file__).parent / "hyperparams"

_Reader = Callable[[Any], tuple[dict[str, Any], dict[str, Any]]]


def register() -> None:
    """Makes `--algo dreamerv3` and `--algo tdmpc2` known to rl_zoo3 in this process."""
    ALGOS.update(ALGORITHMS)
    HYPERPARAMS_SAMPLER.update(dreamerv3=sample_dreamerv3, tdmpc2=sample_tdmpc2)
    HYPERPARAMS_CONVERTER.update(dreamerv3=convert, tdmpc2=convert)
    # The class is missing while exp_manager is being imported and imports a custom_envs module that imports this one.
    # That happens in rl_zoo3.record_video, which reads no hyperparameters; rl_zoo3.train imports custom_envs first.
    manager: Any = getattr(exp_manager, "ExperimentManager", None)
    if manager is not None:
        manager.read_hyperparameters = _looking_here(manager.read_hyperparameters)


def _looking_here(read: _Reader) -> _Reader:
    """rl_zoo3's method, extended to our files: without `--conf-file` it only looks in a folder of its own package."""

    def read_hyperparameters(self: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.algo in ALGORITHMS and Path(self.config) == _THEIRS / f"{self.algo}.yml":
            self.config = str(HYPERPARAMS / f"{self.algo}.yml")
        return read(self)

    return read_hyperparameters
