"""The names of the checks that `check_env` makes, and the report of their results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from worldflux.errors import WorldFluxError

SPACES = "spaces are supported"
MODELS = "models accept the shapes"
SAVED = "spaces can be saved and loaded"
RESET = "reset returns an observation of the space"
OBSERVATIONS = "steps return observations of the space"
REWARDS = "rewards are finite numbers"
FLAGS = "terminated and truncated are booleans"
LAST = "episodes end with their own last observation"
KEPT = "returned arrays are not changed later"
STORED = "the replay buffer holds what was observed"
SEEDS = "the same seed gives the same episode"
INSTANCES = "two instances with the same seed agree"
ACTIONS = "every action of the space is accepted"
RENDERING = "render returns images"
GYMNASIUM = "Gymnasium's checker"
SB3 = "Stable-Baselines3's checker"

ORDER = (
    *(SPACES, MODELS, SAVED, RESET, OBSERVATIONS, REWARDS, FLAGS, LAST, KEPT, STORED),
    *(SEEDS, INSTANCES, ACTIONS, RENDERING, GYMNASIUM, SB3),
)
"""The order of the checks in a report."""


class EnvironmentCheckError(WorldFluxError, AssertionError):
    """Raised when an environment breaks its contract; the message lists every check that failed.

    Attributes:
        report: The report, with the checks that passed, too.
    """

    def __init__(self, report: CheckReport) -> None:
        failed = [check for check in report.checks if not check.passed]
        lines = [f"\n- {check.name}: {check.detail}" for check in failed]
        super().__init__(f"{report.name} failed {len(failed)} of {len(report.checks)} checks." + "".join(lines))
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.report,)


@dataclass(frozen=True)
class Check:
    """One check of an environment."""

    name: str
    """The requirement."""
    passed: bool
    """Whether it is met."""
    detail: str = ""
    """The finding; for a failed check, also what to do."""


@dataclass(frozen=True)
class CheckReport:
    """The results of `check_env`."""

    name: str
    """The name of the environment."""
    checks: tuple[Check, ...]
    """Every check that was made, in order."""
    advice: tuple[str, ...]
    """Recommendations that are not requirements."""

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        return "\n".join([self.name, *(f"  {status:<7} {text}" for status, text in self.lines())])

    def lines(self) -> Iterator[tuple[str, str]]:
        """A status ("ok", "failed" or "advice") and a text for each check and each advice."""
        for check in self.checks:
            yield "ok" if check.passed else "failed", f"{check.name}{': ' if check.detail else ''}{check.detail}"
        for text in self.advice:
            yield "advice", text
