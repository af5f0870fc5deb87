"""Tells rl_zoo3 of the two algorithms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worldflux.agents.zoo.algorithms import TDMPC2, DreamerV3
from worldflux.agents.zoo.search import convert, sample_dreamerv3, sample_tdmpc2
from worldflux.errors import MissingDependencyError

try:
    from rl_zoo3 import exp_manager
    from rl_zoo3.exp_manager import ExperimentManager
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
    from rl_zoo3.utils import ALGOS
except ImportError as error:
    raise MissingDependencyError(
        f'worldflux.agents.zoo needs rl_zoo3 ({error}). Install it with: pip install "worldflux[zoo]".'
    ) from error

HYPERPARAMS = Path(__file__).parent / "hyperparams"
"""Holds `dreamerv3.yml` and `tdmpc2.yml`, in rl_zoo3's format."""

ALGORITHMS = {"dreamerv3": DreamerV3, "tdmpc2": TDMPC2}

_THEIRS = Path(exp_manager.__file__).parent / "hyperparams"
_read_hyperparameters = ExperimentManager.read_hyperparameters


def register() -> None:
    """Makes `--algo dreamerv3` and `--algo tdmpc2` known to rl_zoo3 in this process; twice is as good as once."""
    ALGOS.update(ALGORITHMS)
    HYPERPARAMS_SAMPLER.update(dreamerv3=sample_dreamerv3, tdmpc2=sample_tdmpc2)
    HYPERPARAMS_CONVERTER.update(dreamerv3=convert, tdmpc2=convert)  # type: ignore[arg-type]
    ExperimentManager.read_hyperparameters = _read_ours  # type: ignore[method-assign, assignment]


def _read_ours(manager: ExperimentManager) -> tuple[dict[str, Any], dict[str, Any]]:
    """rl_zoo3's own reading, which without `--conf-file` looks only into a folder of its own package."""
    if manager.algo in ALGORITHMS and Path(manager.config) == _THEIRS / f"{manager.algo}.yml":
        manager.config = str(HYPERPARAMS / f"{manager.algo}.yml")
    return _read_hyperparameters(manager)
