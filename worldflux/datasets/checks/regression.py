"""Ridge regression on simple nonlinear features, with held-out episodes, and the comparison of two of its fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_FOLDS = 5
_PENALTIES = (1e-5, 1e-3, 1e-2, 1e-1)
"""Ridge penalties, as shares of the number of rows; the one with the smallest held-out error is taken."""
_WAVES = (24, 96)
"""Random Fourier features of each input, at least and at most."""
_ROWS_PER_WAVE = 32
_MOST_PRODUCTS = 600
_LEAST_CLUSTERS = 12
_COMPARED = 0.98
"""Errors count up to this quantile."""
_CLUSTER_ROWS = 40
"""Rows of the pieces that long episodes are cut into where there are too few episodes to compare."""


def standardised(array: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and standard deviation 1, clipped at 8; constant ones are left out. `[N, D']` float32"""
    wide = array.astype(np.float64)
    mean, scale = wide.mean(0), wide.std(0)
    varies = scale > 1e-6 * (1e-3 + np.abs(mean))
    return np.clip((wide[:, varies] - mean[varies]) / scale[varies], -8, 8).astype(np.float32)


def principal(array: np.ndarray, most: int) -> np.ndarray:
    """The principal components of standardised columns where there are more than `most`. `[N, <= most]`"""
    if array.shape[1] <= most:
        return array
    _, vectors = np.linalg.eigh(array.T @ array)
    return standardised(array @ vectors[:, -most:])


def waves_for(rows: int) -> int:
    """Number of random features that so many rows can tell apart, for `features`."""
    return int(np.clip(rows // _ROWS_PER_WAVE, *_WAVES))


def features(inputs: Sequence[np.ndarray], waves: int) -> np.ndarray:
    """Linear, squared, multiplied and random Fourier features. The last input is an action, if there are several.

    Args:
        inputs: Standardised columns. `[N, D]` each
        waves: Number of random features of each input, and half of those of all inputs together. Inputs of the same
            shapes get the same ones.

    Returns:
        `[N, F]` float32, with a column of ones.
    """
    rng = np.random.default_rng(0)
    joint = np.concatenate(inputs, axis=1)
    count, width = joint.shape
    columns = [np.ones((count, 1), np.float32), joint, joint**2]
    if len(inputs) > 1 and width > 1:
        action, others = inputs[-1], np.concatenate(inputs[:-1], axis=1)
        pairs = np.array([(i, j) for i in range(others.shape[1]) for j in range(action.shape[1])], int).reshape(-1, 2)
        if len(pairs) > _MOST_PRODUCTS:
            pairs = pairs[rng.choice(len(pairs), _MOST_PRODUCTS, replace=False)]
        columns.append(others[:, pairs[:, 0]] * action[:, pairs[:, 1]])
    for part, number in [(part, waves) for part in inputs] + [(joint, 2 * waves)] * (len(inputs) > 1):
        if part.shape[1]:
            # Long, middle and short waves.
            scale = np.array([0.4, 1.2, 3.0])[np.arange(number) % 3] / np.sqrt(part.shape[1])
            frequencies = (rng.normal(size=(part.shape[1], number)) * scale).astype(np.float32)
            phases = rng.uniform(0, 2 * np.pi, number).astype(np.float32)
            columns.append(np.cos(part @ frequencies + phases))
    return np.concatenate(columns, axis=1)


def held_out_errors(inputs: np.ndarray, targets: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Squared errors of predictions by fits to the other folds, summed over the targets. `[N]`

    Args:
        inputs: `[N, F]`
        targets: `[N, K]`
        fold: The fold of each row. `[N]`
    """
    grams, products = {}, {}
    for number in np.unique(fold):
        rows = fold == number
        grams[number] = (inputs[rows].T @ inputs[rows]).astype(np.float64)
        products[number] = (inputs[rows].T @ targets[rows]).astype(np.float64)
    gram, product = sum(grams.values()), sum(products.values())
    best, least = np.empty(0), np.inf
    low, high = targets.min(0), targets.max(0)
    unit = np.eye(inputs.shape[1])
    unit[0, 0] = 1e-3  # the mean is hardly shrunk
    for penalty in _PENALTIES:
        errors = np.empty(len(inputs))
        for number in grams:
            rows = fold == number
            system = gram - grams[number] + (penalty * len(inputs)) * unit
            weights = np.linalg.solve(system, product - products[number])
            predicted = np.clip(inputs[rows] @ weights, low, high)  # fits are wild where they extrapolate
            errors[rows] = ((predicted - targets[rows]) ** 2).sum(1)
        if (typical := typical_mean(errors)) < least:
            best, least = errors, typical
    return best


def typical_mean(errors: np.ndarray, like: np.ndarray | None = None) -> float:
    """The mean of errors without the largest ones, where fits extrapolate; those of `like` say which are too large."""
    return float(np.minimum(errors, np.quantile(errors if like is None else like, _COMPARED)).mean())


def folds(cluster: np.ndarray, seed: int = 0) -> np.ndarray:
    """Shares whole clusters out among the folds. `[N]`"""
    numbers, where = np.unique(cluster, return_inverse=True)
    return np.random.default_rng(seed).permutation(len(numbers))[where] % _FOLDS


def clusters(episode: np.ndarray) -> np.ndarray:
    """Groups of rows that are compared with each other: episodes, or pieces of them if there are few. `[N]`"""
    _, first, number = np.unique(episode, return_index=True, return_inverse=True)
    if len(first) >= _LEAST_CLUSTERS:
        return number
    order = np.argsort(number, kind="stable")
    step = np.empty(len(number), np.int64)
    counts = np.bincount(number)
    step[order] = np.arange(len(number)) - np.repeat(np.cumsum(counts) - counts, counts)
    return number * (len(number) // _CLUSTER_ROWS + 1) + step // _CLUSTER_ROWS


@dataclass(frozen=True)
class Comparison:
    """How much better one fit is than another on held-out rows.

    Attributes:
        ratio: Squared error of the one over that of the other, over all rows.
        typical: The same as the geometric mean over clusters, which a few clusters do not decide.
        t: Mean logarithm of that ratio over its standard error, positive if the one is better.
        share: Share of the clusters in which it is better.
        clusters: Number of clusters.
    """

    ratio: float
    typical: float
    t: float
    share: float
    clusters: int

    def is_clear(self, ratio: float) -> bool:
        """Whether the error is at most `ratio` of the other's, and not by chance."""
        chance = 0.5 + 1.5 / np.sqrt(max(1, self.clusters))
        enough = self.clusters >= 6 and self.t > 4 and self.share > min(0.9, chance)
        return bool(enough and max(self.ratio, self.typical) <= ratio)


def compare(errors: np.ndarray, others: np.ndarray, cluster: np.ndarray) -> Comparison:
    """Compares errors `[N]` of one fit with those of another on the same rows."""
    # A few rows, where fits extrapolate, are not to decide.
    most = np.quantile(others, _COMPARED)
    errors, others = np.minimum(errors, most), np.minimum(others, most)
    _, where = np.unique(cluster, return_inverse=True)
    tiny = 1e-9 + 1e-6 * others.mean()
    sums = [np.bincount(where, array) / np.bincount(where) + tiny for array in (errors, others)]
    gains = np.log(sums[1] / sums[0])
    spread = gains.std(ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else np.inf
    return Comparison(
        float(errors.sum() / max(others.sum(), 1e-12)),
        float(np.exp(-gains.mean())),
        float(gains.mean() / max(spread, 1e-6)),
        float((gains > 0).mean()),
        len(gains),
    )
