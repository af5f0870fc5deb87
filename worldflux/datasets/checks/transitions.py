"""How usual a step from one observation to the next is, measured by the errors of a one-step prediction."""

from __future__ import annotations

import numpy as np

from worldflux.datasets.checks.regression import features, principal, standardised, waves_for
from worldflux.datasets.checks.sample import Sample

_MOST_FITTED = 10_000
_MOST_COLUMNS = 24
_AT_ONCE = 8_192
_PENALTY = 1e-4
_LARGEST = 1e3
_DROPPED = 0.1


class StepScores:
    """Scores of steps from the errors of each column, in units of the error that a tenth of all steps exceed.

    A score is the root mean square over the columns, but for the fifth of them with the largest errors: contacts and
    angles that start again at zero concern a few columns, and a reset all of them.

    Attributes:
        steps: Places of the sample whose step and next observation are known. `[P]`
        inner: Their scores. `[P]`

    Args:
        sample: The sample.
    """

    def __init__(self, sample: Sample) -> None:
        self.obs = principal(standardised(sample.obs), _MOST_COLUMNS)
        self._actions = principal(standardised(sample.actions), _MOST_COLUMNS)
        follows = np.append(sample.run[1:] == sample.run[:-1], False)
        self.steps = np.flatnonzero(follows & sample.is_step)
        fitted = self.steps[:: 1 + len(self.steps) // _MOST_FITTED]
        self._waves = waves_for(len(fitted))
        self._fit(fitted[self._is_usual(fitted)])
        errors = self._errors(self.steps, self.steps + 1)
        self._scale = np.maximum(np.quantile(errors, 0.9, axis=0), 1e-4)
        self.inner = _score(errors / self._scale)
        moves = np.abs(self.obs[self.steps + 1] - self.obs[self.steps])
        self._moved = np.maximum(np.quantile(moves, 0.9, axis=0), 1e-4)

    def after(self, step: np.ndarray, following: np.ndarray) -> np.ndarray:
        """Scores of going from a step to any observation, both places of the sample. `[K]`"""
        return _score(self._errors(step, following) / self._scale)

    def apart(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Distances of observations, in units of the move that a tenth of all steps exceed. `[K]`"""
        return _score(np.abs(self.obs[one] - self.obs[other]) / self._moved)

    def _is_usual(self, at: np.ndarray) -> np.ndarray:
        """Nine tenths of the steps, without those that a linear fit predicts worst, of which many may be resets.

        A better fit would foresee resets, because tasks end in certain states.
        """
        inputs = np.concatenate([np.ones((len(at), 1), np.float32), self.obs[at], self._actions[at]], axis=1)
        change = self.obs[at + 1] - self.obs[at]
        weights = np.linalg.lstsq(inputs, np.clip(change, -4, 4), rcond=None)[0]
        errors = np.abs(change - inputs @ weights)
        score = _score(errors / np.maximum(np.quantile(errors, 1 - _DROPPED, axis=0), 1e-4))
        return score <= np.quantile(score, 1 - _DROPPED)

    def _fit(self, at: np.ndarray) -> None:
        inputs = self._inputs(at)
        system = inputs.T @ inputs + _PENALTY * len(inputs) * np.eye(inputs.shape[1], dtype=np.float32)
        change = inputs.T @ (self.obs[at + 1] - self.obs[at])
        self._weights = np.linalg.solve(system.astype(np.float64), change).astype(np.float32)

    def _inputs(self, at: np.ndarray) -> np.ndarray:
        inputs = [self.obs[at], self._actions[at]] if self._actions.shape[1] else [self.obs[at]]
        return features(inputs, self._waves)

    def _errors(self, step: np.ndarray, following: np.ndarray) -> np.ndarray:
        errors = np.empty((len(step), self.obs.shape[1]), np.float32)
        for start in range(0, len(step), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            predicted = self.obs[step[part]] + self._inputs(step[part]) @ self._weights
            errors[part] = np.abs(self.obs[following[part]] - predicted)
        return errors


def _score(errors: np.ndarray) -> np.ndarray:
    width = errors.shape[1]
    kept = max(1, width - max(1, width // 5)) if width > 1 else 1
    smallest = np.minimum(np.partition(errors, kept - 1, axis=1)[:, :kept], _LARGEST)
    return np.sqrt((smallest**2).mean(1))
