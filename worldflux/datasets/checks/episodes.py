"""Whether episodes end where they should, and for the reason that is stored."""

from __future__ import annotations

import math

import numpy as np

from worldflux.datasets.checks.findings import Findings
from worldflux.datasets.checks.sample import Sample
from worldflux.datasets.checks.sources import Source
from worldflux.datasets.checks.transitions import StepScores

_LEAST_STEPS = 100
_LEAST_FIRST = 5
"""First rows from which it is known where episodes begin."""
_MOST_PAIRS = 4_000
_CHANCE = 1e-4
_SMOOTH = 1.5
"""Score up to which a step is an ordinary one."""
_SAME = 0.1
"""Distance up to which the last observation of an episode and the first of the next are the same."""
_LEAST_JUMP = 2.0
_LEAST_GAP = 2.0
_FAR = 3.0
"""Distance from which two observations are not those of two successive rows."""
_LEAST_LENGTH = 10
_MARGIN = 0.5
"""Share of the range of first observations by which another may lie outside of it."""
_MOST_OUTSIDE = 0.02
"""Share of the columns in which another may lie outside nevertheless."""
_SHARES = (0.02, 0.05, 0.1, 0.2)
"""Shares of all observations around a value, to be compared with the share of first observations there."""
_ALIKE = 0.9
"""Share of the columns with such a value in which a first observation is there."""


def check_time_limits(source: Source, findings: Findings) -> None:
    """Finds time limits that are stored as terminations: they end many episodes at the same, largest length."""
    whole = source.is_whole & source.has_ended
    if not whole.any():
        return
    last = np.cumsum(source.lengths) - 1
    lengths, terminated = source.lengths[whole], source.terminated[last[whole]]
    longest = int(lengths.max())
    at_limit = lengths == longest
    count = int(at_limit.sum())
    if longest < _LEAST_LENGTH or count < 3 or not terminated[at_limit].all():
        return
    others = lengths[~at_limit]
    near = int((others >= 0.9 * longest).sum())
    if count < 3 + 2 * near:
        return  # the longest of many lengths
    rows = last[whole][at_limit]
    if len(others):
        what = f"{count} of {len(lengths)} episodes end at exactly {longest} steps, none is longer, and all {count}"
    else:
        what = f"All {count} episodes have exactly {longest} steps, and all"
    findings.add(
        "time-limit-as-termination",
        f"{what} are stored as terminations (dones). That looks like a time limit, beyond which further rewards can be "
        "expected: a model would learn that nothing follows. Store them as truncations (timeouts), unless the task "
        "itself ends there.",
        rows=rows,
    )


def check_ends(source: Source, sample: Sample, findings: Findings) -> None:
    """Finds ends inside a trajectory that goes on, and jumps to another one without an end."""
    follows = np.append(sample.run[1:] == sample.run[:-1], False)
    if np.count_nonzero(follows & sample.is_step) < _LEAST_STEPS or np.ptp(sample.obs, axis=0).max(initial=0) == 0:
        return
    scores = StepScores(sample)
    if not scores.obs.shape[1]:
        return
    first = np.flatnonzero(np.append(True, sample.episode[1:] != sample.episode[:-1]))
    starts = first[source.is_whole[sample.episode[first]] & _is_first_row(source, sample, first)]
    joined = first[1:][np.diff(sample.row)[first[1:] - 1] == 1]
    joined = joined[source.streams[sample.episode[joined]] == source.streams[sample.episode[joined - 1]]]
    joined = np.intersect1d(joined, starts)
    false = _check_smooth_ends(sample, scores, joined, findings)
    _check_jumps(sample, scores, np.setdiff1d(starts, false), np.setdiff1d(joined, false), findings)


def _is_first_row(source: Source, sample: Sample, places: np.ndarray) -> np.ndarray:
    episodes = sample.episode[places]
    return (np.cumsum(source.lengths) - source.lengths)[episodes] == sample.row[places]


def _check_smooth_ends(sample: Sample, scores: StepScores, joined: np.ndarray, findings: Findings) -> np.ndarray:
    """Compares each episode's end with the beginning of the next, and with those of all others.

    Returns:
        Places of first rows that are none, because the episode before goes on there. `[K]`
    """
    false = [np.zeros(0, np.int64)]
    rng = np.random.default_rng(0)
    ends = joined - 1
    for seen in (False, True):
        chosen = sample.is_step[ends] != seen
        end, start = ends[chosen], joined[chosen]
        if len(end) < 3:
            continue
        distance, limit = (scores.apart, _SAME) if seen else (scores.after, _SMOOTH)
        is_smooth = distance(end, start) <= limit
        one, other = rng.integers(len(end), size=(2, _MOST_PAIRS))
        one, other = one[one != other], other[one != other]
        by_chance = (np.count_nonzero(distance(end[one], start[other]) <= limit) + 1) / (len(one) + 1)
        count = int(is_smooth.sum())
        if count < 3 or count < 0.03 * len(end) or _tail(count, len(end), by_chance) > _CHANCE:
            continue
        rows = sample.row[end[is_smooth]]
        false.append(start[is_smooth])
        how = "with the last observation of the one before" if seen else "where a step from the last row leads"
        findings.add(
            "end-inside-trajectory",
            f"{count} of {len(end)} ends of episodes lie inside a trajectory that goes on: the next episode begins "
            f"{how} (other episodes would in {by_chance:.1%} of cases). Mark ends only where the environment was "
            "reset.",
            rows=rows,
        )
    return np.concatenate(false)


def _check_jumps(
    sample: Sample, scores: StepScores, starts: np.ndarray, joined: np.ndarray, findings: Findings
) -> None:
    """Finds steps within an episode that are as unusual as a reset."""
    inner = scores.inner
    least = max(_LEAST_JUMP, 3 * float(np.quantile(inner, 0.95)))
    if len(starts) >= _LEAST_FIRST:
        if len(joined):
            resets = scores.after(_last_steps(sample, joined), joined)
            least = max(least, 0.5 * float(np.quantile(resets, 0.2)))
        jumps = scores.steps[(inner >= least) & _stands_out(inner)]
        # Where an episode has only begun, observations are near those that it began with, anyhow.
        jumps = jumps[~np.isin(jumps[:, None] - np.arange(_LEAST_LENGTH), starts).any(1)]
        jumps = jumps[_is_near(scores.obs[jumps + 1], scores.obs[starts])]
        jumps = jumps[_is_among(sample.obs[jumps + 1], sample.obs[starts])]
        where = "to observations like those that episodes begin with"
    else:
        moved = scores.apart(scores.steps, scores.steps + 1)
        is_jump = (inner >= 2 * least) & (moved >= _FAR) | (inner >= _gap(inner, least)) & (moved >= _LEAST_JUMP)
        jumps = scores.steps[is_jump & _stands_out(moved)]
        jumps = jumps[_are_alike(sample.obs, jumps + 1, starts)]
        jumps = jumps if len(jumps) >= 2 else jumps[:0]
        where = "to observations that are alike and do not follow from the ones before"
    if len(jumps):
        size = float(np.median(inner[np.searchsorted(scores.steps, jumps)]))
        findings.add(
            "jump-without-end",
            f"{len(jumps)} step{'s' * (len(jumps) > 1)} inside episodes jump{'s' * (len(jumps) == 1)} {where}: the "
            f"error of a one-step prediction is {size:.0f} times as large there as the largest of nine tenths of all "
            "steps. An end is probably missing: mark these rows as truncated, or as terminated if the task ended.",
            rows=sample.row[jumps],
        )


def _stands_out(values: np.ndarray) -> np.ndarray:
    """Whether a value is twice as large as the ones before and after, as at a reset, and not in a fast motion."""
    return values >= 2 * np.maximum(np.append(0, values[:-1]), np.append(values[1:], 0))


def _last_steps(sample: Sample, starts: np.ndarray) -> np.ndarray:
    """The places of the last steps of the episodes before these first rows."""
    return starts - 1 - ~sample.is_step[starts - 1]


def _is_near(obs: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Whether observations are as near to first observations as these are to each other. `[K]`"""
    if not len(obs):
        return np.zeros(0, np.bool_)
    starts = starts[:: 1 + len(starts) // 500]
    among = _distances(starts, starts) + np.diag(np.full(len(starts), np.inf))
    return _distances(obs, starts).min(1) <= 1.2 * float(np.quantile(among.min(1), 0.95)) + 1e-6


def _is_among(obs: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Whether observations lie in the box that first observations fill, in nearly all columns. `[K]`"""
    low, high = starts.min(0), starts.max(0)
    margin = _MARGIN * (high - low) + 1e-6
    return ((obs < low - margin) | (obs > high + margin)).mean(1) <= _MOST_OUTSIDE


def _are_alike(obs: np.ndarray, places: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Whether observations are as alike as those that episodes begin with, in columns where others differ. `[K]`

    Tasks begin at certain places or without motion; a collision ends anywhere. A column tells this if far more of
    the places than of all observations are around their median.

    Args:
        obs: All observations. `[M, D]`
        places: Those that may begin an episode. `[K]`
        starts: Those that do, which have to be like the others. `[S]`
    """
    if not len(places):
        return np.zeros(0, np.bool_)
    both = obs[np.concatenate([places, starts])]
    middle = np.median(both, axis=0)
    apart = np.abs(both - middle)
    others = np.abs(obs[:: 1 + len(obs) // _MOST_PAIRS] - middle)
    told, columns = np.zeros(len(both), np.int64), 0
    for column in range(obs.shape[1]):
        widths = np.quantile(others[:, column], _SHARES)
        chances = [float((others[:, column] <= width).mean()) for width in widths]
        counts = [int((apart[: len(places), column] <= width).sum()) for width in widths]
        tails = [_tail(count, len(places), chance) for count, chance in zip(counts, chances, strict=True)]
        best = int(np.argmin(tails))
        if tails[best] < _CHANCE / obs.shape[1]:
            told += apart[:, column] <= 2 * widths[best] + 1e-6
            columns += 1
    alike = told >= max(1, _ALIKE * columns)
    return alike[: len(places)] & alike[len(places) :].all()


def _distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    squares = (one**2).sum(1)[:, None] + (other**2).sum(1) - 2 * one @ other.T
    return np.sqrt(np.maximum(squares, 0))


def _gap(inner: np.ndarray, least: float) -> float:
    """The score behind the widest gap among the largest scores; infinite if there is none."""
    largest = np.sort(inner)[-max(2, len(inner) // 10) :]
    ratios = largest[1:] / np.maximum(largest[:-1], least / 2)
    widest = int(np.argmax(ratios))
    if ratios[widest] < _LEAST_GAP or largest[widest + 1] < 2 * least:
        return math.inf
    return float(largest[widest + 1])


def _tail(count: int, total: int, chance: float) -> float:
    """The chance that at least `count` of `total` independent events happen."""
    if chance >= 1:
        return 1.0
    terms = [
        math.lgamma(total + 1)
        - math.lgamma(k + 1)
        - math.lgamma(total - k + 1)
        + k * math.log(chance)
        + (total - k) * math.log1p(-chance)
        for k in range(count, total + 1)
    ]
    return min(1.0, sum(math.exp(term) for term in terms))
