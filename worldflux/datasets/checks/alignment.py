"""Whether actions and rewards stand in the rows where they belong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from worldflux.datasets.checks.findings import Findings
from worldflux.datasets.checks.regression import (
    Comparison,
    clusters,
    compare,
    features,
    folds,
    held_out_errors,
    principal,
    standardised,
    typical_mean,
    waves_for,
)
from worldflux.datasets.checks.sample import Sample
from worldflux.datasets.checks.sources import Source

_MOST_FITTED = 12_000
_LEAST_FITTED = 150
_MOST_COLUMNS = 32
"""Columns of an observation, and of an action, that fits use: principal components where there are more."""
_LEAST_EXPLAINED = 0.1
_CLEAREST = 10
_LEAST_EPISODES = 5
_RATIOS = ((0.9, 0.8), (0.5, 0.6), (0.0, 0.5))
"""Share of the unexplained variance that may be left in another row for it to be the better one, by the least share of
the variance that is explained there."""
_MARKOV_RATIO = 0.6
_MARKOV_GAP = 0.15
"""An observation has no velocities if the one before leaves at most this share of the error, and so much less."""
_LEAST_FREEDOM = 0.2
"""Share of the actions' variance that an observation must leave open for the next action to count as a cause."""
_LEAST_UNEXPLAINED = 5e-4
"""Share of the variance from which it matters that a row leaves it unexplained."""


@dataclass(frozen=True)
class Windows:
    """Steps with the neighbours that all candidates need, standardised.

    Attributes:
        at: Places of the steps in the sample. `[N]`
        obs: Observations of the whole sample. `[M, D]`
        actions: `[M, A]`
        cluster: Group of each step for the comparison. `[N]`
        fold: Fold of each step. `[N]`
    """

    at: np.ndarray
    obs: np.ndarray
    actions: np.ndarray
    cluster: np.ndarray
    fold: np.ndarray

    def errors(self, inputs: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
        """Held-out errors of predicting standardised targets `[N, K]`, as shares of their variance. `[N]`"""
        found = held_out_errors(features(inputs, waves_for(len(self.at))), targets, self.fold)
        return found / targets.shape[1]


def windows(sample: Sample, before: int, after: int, steps_after: int) -> Windows | None:
    """Steps with so many rows of their episode before and after them, of which `steps_after` are steps as well."""
    count = len(sample.run)
    inner = np.arange(before, count - after)
    good = sample.run[inner - before] == sample.run[inner + after]
    good &= sample.is_step[inner] & sample.is_step[inner + steps_after]
    at = inner[good]
    if len(at) > _MOST_FITTED:  # whole stretches, so that neighbours have the same cluster
        stretch = 100
        starts = np.linspace(0, len(at) - stretch, _MOST_FITTED // stretch).astype(np.int64)
        at = at[np.unique(starts[:, None] + np.arange(stretch))]
    if len(at) < _LEAST_FITTED:
        return None
    episode = sample.episode[at]
    cluster = clusters(episode)
    fold = folds(episode if len(np.unique(episode)) >= _LEAST_EPISODES else cluster)
    obs, actions = standardised(sample.obs), standardised(sample.actions)
    if not obs.shape[1]:
        return None
    return Windows(at, principal(obs, _MOST_COLUMNS), principal(actions, _MOST_COLUMNS), cluster, fold)


def check_rewards(source: Source, sample: Sample, findings: Findings) -> None:
    """Finds rewards that belong to the row before or after the one in which they are stored."""
    filler = _first_rewards(source)
    fits = None
    found = windows(sample, 1, 2, 1)
    if found is not None:
        target = _clipped(sample.rewards[found.at])[:, None]
        if target.std() > 1e-6:
            target = (target - target.mean()) / target.std()
            fits = {shift: _reward_errors(found, found.at + shift, target) for shift in (0, -1, 1)}
    late = None if fits is None else _better(fits, -1, found)
    if late is not None or filler is not None:
        rows, why = filler if filler is not None else ((), "")
        if late is not None and fits is not None and found is not None:
            rows, why = _clearest(sample, found, fits, -1), _sentence("reward", fits, late, -1) + (" " + why).rstrip()
        findings.add(
            "reward-late",
            f"Rewards seem to stand one row too late. {why} They probably arrived together with the observation in "
            'whose row they are. Read the data with align="arrives", or move the rewards of each episode up by a row.',
            rows=rows,
        )
        return
    early = None if fits is None else _better(fits, 1, found)
    if early is not None and fits is not None and found is not None:
        findings.add(
            "reward-early",
            f"Rewards seem to stand one row too early. {_sentence('reward', fits, early, 1)} If the data were read "
            'with align="arrives", read them with align="own"; otherwise move the rewards of each episode down by a '
            "row.",
            rows=_clearest(sample, found, fits, 1),
        )


def check_actions(sample: Sample, findings: Findings) -> int:
    """Finds actions that led to the observation of their row instead of being taken there, and the reverse.

    Returns:
        By how many rows the actions have to be moved to stand where they belong: -1, 0 or 1.
    """
    found = windows(sample, 2, 2, 1)
    if found is None or not found.actions.shape[1]:
        return 0
    fits = _fit_actions(found)
    if (late := fits.better(-1, found)) is not None:
        findings.add(
            "action-led-to",
            f"Actions seem to have led to the observation of their row, not to have been taken there. {late} "
            'Read the data with align="led_to", which moves rewards as well, or move the actions of each episode up.'
            + " The same is seen where a policy reacts a step late."
            * (not fits.show_effects(-1)),
            rows=_clearest(sample, found, fits.backward, -1),
            severity="warning" if fits.show_effects(-1) else "note",
        )
        return -1 if fits.show_effects(-1) else 0
    if (early := fits.better(1, found)) is not None:
        findings.add(
            "action-early",
            f'Actions seem to stand one row too early. {early} If the data were read with align="led_to", read them '
            'with align="own" or "arrives". The same is seen where an action takes effect a step late.',
            rows=_clearest(sample, found, fits.backward, 1),
            severity="warning" if fits.is_markov else "note",
        )
        return 1 if fits.is_markov else 0
    return 0


@dataclass(frozen=True)
class ActionFits:
    """Held-out errors of fits with the actions as they are stored (0), and one row earlier (-1) or later (1).

    Attributes:
        backward: Errors of predicting an action from the observations around a step. `[N]` each
        forward: Errors of predicting the change of the observation from an action. `[N]` each
        without: Errors of predicting the change without an action. `[N]`
        policy: Share of the actions' variance that the observation of their row does not explain.
        is_markov: Whether the observation tells what previous observations would.
    """

    backward: dict[int, np.ndarray]
    forward: dict[int, np.ndarray]
    without: np.ndarray
    policy: float
    is_markov: bool

    def better(self, shift: int, found: Windows) -> str | None:
        """A sentence with the numbers if a shift by a row is clearly better; None if not.

        What is concluded from one kind of fit must not be denied by the other kind.
        """
        backward, forward = _better(self.backward, shift, found), self._forward_better(shift, found)
        total, own, other = self._gains(shift)
        if backward is not None and own < max(1.5 * other, 0.01 * total):
            return _sentence("action", self.backward, backward, shift)
        if forward is None or typical_mean(self.backward[shift]) > 1.05 * typical_mean(self.backward[0]):
            return None
        where = "after" if shift < 0 else "before"
        return (
            f"The action of the row {where} explains {other / total:.1%} of what the observation alone leaves open of "
            f"its change, the row's own action {max(own, 0) / total:.1%} (fits to other episodes; better in "
            f"{forward.share:.0%} of {forward.clusters} parts of the data)."
        )

    def show_effects(self, shift: int) -> bool:
        """Whether actions that are shifted by a row explain the change of the observation better than stored ones.

        If not, all that is known is which observation the policy looks at, and it may have reacted late.
        """
        total, own, other = self._gains(shift)
        return other > 1.1 * own + 0.01 * total

    def _gains(self, shift: int) -> tuple[float, float, float]:
        """The error without an action, and by how much the row's own action and that of another row lessen it."""
        total = typical_mean(self.without)
        own, other = (total - typical_mean(self.forward[number], self.without) for number in (0, shift))
        return total, own, other

    def _forward_better(self, shift: int, found: Windows) -> Comparison | None:
        total, own, other = self._gains(shift)
        # Where the observation determines the action, the next action tells about the next observation.
        if (shift < 0 and self.policy < _LEAST_FREEDOM) or other < 1.15 * own + 0.01 * total:
            return None
        comparison = compare(self.forward[shift], self.forward[0], found.cluster)
        return comparison if comparison.t > 5 and comparison.share > 0.75 and comparison.clusters > 5 else None


def _fit_actions(found: Windows) -> ActionFits:
    at, acts = found.at, found.actions
    before, change = _change(found.obs, at), _change(found.obs, at + 1)
    change = change / np.maximum(change.std(0), 1e-6)
    around = np.concatenate([acts[at + shift] for shift in (-1, 0, 1)], axis=1)
    short = found.errors([found.obs[at], around], change).mean()
    long = found.errors([found.obs[at], before, around], change).mean()
    is_markov = bool(long > _MARKOV_RATIO * short or short - long < _MARKOV_GAP)
    state = [found.obs[at]] if is_markov else [found.obs[at], before]
    return ActionFits(
        {shift: found.errors(_window(found, at + shift, is_markov), acts[at]) for shift in (0, -1, 1)},
        {shift: found.errors([*state, acts[at - shift]], change) for shift in (0, -1, 1)},
        found.errors(state, change),
        float(found.errors([found.obs[at]], acts[at]).mean()),
        is_markov,
    )


def _window(found: Windows, at: np.ndarray, is_markov: bool) -> list[np.ndarray]:
    """The state that steps begin in, and the change that follows. `[N, D]` each"""
    if is_markov:
        return [found.obs[at], _change(found.obs, at + 1)]
    return [found.obs[at - 1], _change(found.obs, at), _change(found.obs, at + 1)]


def _reward_errors(found: Windows, at: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Held-out errors of predicting rewards from the transitions at `at`. `[N]`"""
    return found.errors([found.obs[at], found.obs[at + 1], found.actions[at]], target)


def _change(obs: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The changes that led to observations, each column in units of its standard deviation. `[N, D]`"""
    change = obs[at] - obs[at - 1]
    return np.clip((change - change.mean(0)) / np.maximum(change.std(0), 1e-6), -8, 8)


def _better(fits: dict[int, np.ndarray], shift: int, found: Windows | None) -> Comparison | None:
    """The comparison of a shifted fit with the stored one, if it is clearly better; None if not."""
    error = fits[shift].mean()
    if found is None or 1 - error < _LEAST_EXPLAINED or error > fits[-shift].mean():
        return None
    if fits[0].mean() < _LEAST_UNEXPLAINED:
        return None
    comparison = compare(fits[shift], fits[0], found.cluster)
    # Where much stays unexplained, fits differ by what they cannot express.
    most = next(ratio for least, ratio in _RATIOS if 1 - error >= least)
    return comparison if comparison.is_clear(most) else None


def _sentence(what: str, fits: dict[int, np.ndarray], comparison: Comparison, shift: int) -> str:
    where = "before" if shift < 0 else "after"
    own, other = (max(0.0, 1 - fits[number].mean()) for number in (0, shift))
    return (
        f"What happened one row {where} explains {other:.1%} of the {what}s' variance, their own row {own:.1%} "
        f"(fits to other episodes; better in {comparison.share:.0%} of {comparison.clusters} parts of the data)."
    )


def _clearest(sample: Sample, found: Windows, fits: dict[int, np.ndarray], shift: int) -> np.ndarray:
    """The rows that tell most clearly. `[<= 10]`"""
    return np.sort(sample.row[found.at[np.argsort(fits[shift] - fits[0])[:_CLEAREST]]])


def _clipped(rewards: np.ndarray) -> np.ndarray:
    """Rewards without rare large ones, which would decide alone; sparse rewards as they are."""
    low, high = np.quantile(rewards, (0.02, 0.98))
    return np.clip(rewards, low - (high - low), high + (high - low)) if high > low else rewards


def _first_rewards(source: Source) -> tuple[np.ndarray, str] | None:
    """The first rows of episodes, if their rewards are not like any others; None if not."""
    first = (np.cumsum(source.lengths) - source.lengths)[source.is_whole & (source.lengths > 3)]
    if len(first) < _LEAST_EPISODES:
        return None
    rewards = source.rewards
    if not (rewards[first] == 0).all():
        return None
    others = np.ones(len(rewards), np.bool_)
    others[first] = False
    near = np.concatenate([rewards[first + 1], rewards[first + 2]])
    if (near == 0).mean() > 0.1 or (rewards[others] == 0).mean() > 0.1:
        return None
    share = (rewards[others] == 0).mean()
    return first, (
        f"The rewards of all {len(first)} first rows are 0, and only {share:.1%} of the others: they hold no step's "
        "reward."
    )
