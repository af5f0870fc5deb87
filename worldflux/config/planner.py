"""PlannerConfig: how a planner searches."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from worldflux.config.base import WorldModelConfig
from worldflux.errors import ConfigurationError, nearest
from worldflux.validation import finite_number, whole_number

_MOST_STEPS = 2**22
"""Largest number of steps of all candidates in all iterations of a plan, 450 times that of the paper. Their random
numbers are drawn at once."""
OPTIONAL = ("temperature", "discount")
"""Fields that may be None."""
_LARGE_ACTION_DIM = 20  # number of action dimensions from which the paper uses two more iterations


@dataclass(frozen=True)
class PlannerConfig:
    """Configuration of sampling-based planning in latent space. The defaults follow TD-MPC2, arXiv:2310.16828.

    There are two methods: MPPI with elites, and with `temperature=None` the plain cross-entropy method (CEM). An agent
    chooses between them by `planner="mppi"` or `planner="cem"`. All other fields have the same effect in both.
    """

    horizon: int = 3
    """Number of latent steps per candidate. A longer horizon looks further ahead but compounds the model's error."""
    num_samples: int = 512
    """Number of candidates per iteration. The cost grows linearly."""
    num_elites: int = 64
    """Number of candidates to which the next distribution is fitted; at most `num_samples`. Fewer converge faster, but
    may converge too early."""
    num_pi_trajs: int = 24
    """Number of candidates that follow the policy, the same in every iteration; less than `num_samples`."""
    iterations: int = 6
    """Number of times the distribution is fitted. The cost grows linearly."""
    temperature: float | None = 0.5
    """Factor on the values in the elites' weights, `softmax(temperature * value)`. A larger factor favours the best
    candidate, but may converge before the search has come close to the optimum. It depends on the scale of the rewards.
    None gives all elites the same weight, so that only the order of the values matters (CEM)."""
    min_std: float = 0.05
    """Smallest standard deviation of the candidates' actions, and of the noise on the action that is carried out.
    Discrete actions have `uniform_share` instead."""
    max_std: float = 2.0
    """Largest standard deviation, with which every plan starts."""
    uniform_share: float = 0.05
    """Share of the uniform distribution in the probabilities of discrete actions, and probability of carrying out a
    random one unless planning is deterministic. A larger share explores more."""
    momentum: float = 0.0
    """Weight of the old mean in the new one, in [0, 1). A larger weight changes the mean more slowly, and keeps a
    search with few elites from jumping; the standard deviation is not affected. The paper uses 0."""
    discount: float | None = None
    """Discount per step, in (0, 1]. None uses the model's own."""

    def __post_init__(self) -> None:
        for name in ("horizon", "num_samples", "num_elites", "iterations", "num_pi_trajs"):
            self._set(name, whole_number(name, getattr(self, name), int(name != "num_pi_trajs")))
        for name in ("temperature", "min_std", "max_std", "uniform_share", "momentum", "discount"):
            value = getattr(self, name)
            if value is not None or name not in OPTIONAL:
                self._set(name, finite_number(name, value))
        most = self.num_samples
        self._check("num_elites", self.num_elites <= most, f"at most num_samples ({most})")
        self._check("num_pi_trajs", self.num_pi_trajs < most, f"below num_samples ({most})")
        steps = self.iterations * self.num_samples * self.horizon
        if steps > _MOST_STEPS:
            raise ConfigurationError(
                f"iterations * num_samples * horizon is {self.iterations} * {self.num_samples} * {self.horizon}, "
                f"expected at most {_MOST_STEPS:,} steps of candidates in a plan."
            )
        self._check(
            "temperature", self.temperature is None or self.temperature > 0.0, "a number above 0, or None for CEM"
        )
        self._check("max_std", self.max_std > 0.0, "a number above 0")
        self._check("min_std", 0.0 <= self.min_std <= self.max_std, f"0 to max_std ({self.max_std})")
        self._check("uniform_share", 0.0 <= self.uniform_share <= 1.0, "a share from 0 to 1")
        self._check("momentum", 0.0 <= self.momentum < 1.0, "at least 0 and below 1")
        self._check("discount", self.discount is None or 0.0 < self.discount <= 1.0, "above 0 and at most 1, or None")

    def _set(self, name: str, value: float) -> None:
        object.__setattr__(self, name, value)

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise ConfigurationError(f"{name} is {getattr(self, name)!r}, expected {expected}.")

    @classmethod
    def from_model(cls, config: WorldModelConfig, **overrides: Any) -> PlannerConfig:
        """Creates a configuration from the fields that it has in common with a model's configuration.

        With 20 action dimensions or more there are two more `iterations`, as in the paper. If `num_samples` is
        overridden, or the model's configuration has no `num_pi_trajs`, at most half of the samples follow the policy.
        The discount remains that of the model.

        Args:
            config: Configuration of the model.
            **overrides: Fields to set to the given values.

        Raises:
            ConfigurationError: If there is no such field, or a value is out of its range.
        """
        known = [item.name for item in fields(cls)]
        for name in overrides.keys() - set(known):
            raise ConfigurationError(f"Unknown field '{name}' of PlannerConfig{nearest(name, known)}")
        names = set(known) - {"discount"}
        values = {name: getattr(config, name) for name in names if hasattr(config, name)}
        if config.action_dim >= _LARGE_ACTION_DIM:
            values["iterations"] = values.get("iterations", cls.iterations) + 2
        chosen_together = "num_pi_trajs" in values and "num_samples" not in overrides
        values |= overrides
        if "num_pi_trajs" not in overrides and not chosen_together:
            samples = whole_number("num_samples", values.get("num_samples", cls.num_samples), 1)
            values["num_pi_trajs"] = min(values.get("num_pi_trajs", cls.num_pi_trajs), samples // 2)
        return cls(**values)
