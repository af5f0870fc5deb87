"""Names that the other modules import from rl_zoo3."""

from __future__ import annotations

from worldflux.errors import MissingDependencyError, install_hint

try:
    from rl_zoo3 import exp_manager
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
    from rl_zoo3.utils import ALGOS, SimpleLinearSchedule
except ImportError as error:
    raise MissingDependencyError(
        f"worldflux.agents.zoo needs rl_zoo3 ({error}). Install it with: {install_hint('zoo')}."
    ) from error

__all__ = ["ALGOS", "HYPERPARAMS_CONVERTER", "HYPERPARAMS_SAMPLER", "SimpleLinearSchedule", "exp_manager"]
