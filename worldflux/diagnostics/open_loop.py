"""Open-loop prediction: what a model expects of recorded actions after seeing how they began, and how far it is off.

batch = held_out.sample(256, seq_len=5 + 15)
errors = open_loop(model, batch, context=5).errors()
errors["reward"].model.mean        # [15], for each step ahead
errors["reward"].unchanged.mean    # of whoever expects that nothing changes
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worldflux.errors import ShapeMismatchError
from worldflux.models.base import State, Trajectory, WorldModel
from worldflux.models.evaluation import evaluating
from worldflux.models.final_rows import with_final_rows
from worldflux.replay.batch import Batch, Observation
from worldflux.validation import whole_number


@dataclass(frozen=True)
class HorizonError:
    """An error for each step ahead, of N windows."""

    values: np.ndarray
    """NaN only where a prediction was. `[N, H]`"""
    counts: np.ndarray
    """False where the window has no such step, so that its value says nothing. `[N, H]` bool"""

    @property
    def count(self) -> np.ndarray:
        """Windows that count. `[H]`"""
        return self.counts.sum(0)

    @property
    def mean(self) -> np.ndarray:
        """Mean over the windows; NaN where none counts. `[H]`"""
        with np.errstate(invalid="ignore"):
            return np.where(self.counts, self.values, 0.0).sum(0) / self.count

    @property
    def standard_error(self) -> np.ndarray:
        """Of the mean, as if windows had nothing to do with each other: too small where they overlap. `[H]`"""
        deviation = np.where(self.counts, self.values - self.mean, 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.sqrt(np.square(deviation).sum(0) / (self.count - 1) / self.count)

    def quantile(self, share: float) -> np.ndarray:
        """What the errors of a share of the windows, 0 to 1, do not exceed; NaN where none counts. `[H]`"""
        columns = zip(self.values.T, self.counts.T, strict=True)
        return np.array([np.quantile(value[counts], share) if counts.any() else np.nan for value, counts in columns])


@dataclass(frozen=True)
class PredictionError:
    """How far a model is off, beside the least that it has to beat."""

    model: HorizonError
    unchanged: HorizonError
    """Of the prediction that everything stays as it was at the end of the context."""

    @property
    def ratio(self) -> np.ndarray:
        """Mean of the model's error as a share of the other's, over the windows that count for both. `[H]`

        Below 1 the model knows something. Where nothing did change it is infinite, or NaN if the model says so, too.
        """
        both = self.model.counts & self.unchanged.counts
        with np.errstate(invalid="ignore", divide="ignore"):
            return HorizonError(self.model.values, both).mean / HorizonError(self.unchanged.values, both).mean


@dataclass(frozen=True)
class OpenLoop:
    """What was recorded in B windows, and what a model expected of their last H rows, in S futures.

    The model saw the first `context` rows of a window, and of the others only what was done:

        row        0 ... context-1     context ... context+H-1
        obs        seen                predicted, 1 to H steps ahead
        actions    known               known
    """

    context: int
    """Rows of each window that the model saw."""
    real: Batch
    """The windows as they were recorded, with a row for each final observation. `[B, context+H, ...]`"""
    obs: dict[str, Tensor]
    """Observations as the model pictures them: those of the context as it saw them, then its predictions. Vectors are
    in the recorded units, images floats in [0, 1]. One that is no dictionary has the key "obs". Empty if the model
    pictures nothing. `[S, B, context+H, ...]`"""
    one_hots: frozenset[str]
    """Which of them are one-hots; their predictions are probabilities."""
    states: State
    """Predicted states. `[S, B, H, ...]`"""
    observed: State
    """States of the same model where it sees every row. `[B, context+H, ...]`"""
    rewards: Tensor
    """What the model expects each action to earn. `[S, B, H]`"""
    continues: Tensor
    """Probability that the episode goes on after each action. `[S, B, H]`"""
    steps: Tensor
    """The step lies within the episode that the context ends in. `[B, H]` bool"""
    arrived: Tensor
    """The same, and the observation after it was recorded. `[B, H]` bool"""

    @property
    def earned(self) -> Tensor:
        """What each of the actions did earn. `[B, H]`"""
        return self.real.rewards[:, self.context - 1 : -1].float()

    @property
    def went_on(self) -> Tensor:
        """1 where the episode did go on after the action, 0 where it terminated. `[B, H]`"""
        return 1.0 - self.real.terminations[:, self.context - 1 : -1].float()

    def errors(self) -> dict[str, PredictionError]:
        """How far the mean of the futures is from what was recorded, for each window and step ahead.

        - `"obs"`, or `"obs/<key>"` of a dictionary: root of the mean squared error over its entries. Those of vectors
          are in standard deviations of the recorded rows; of images they are pixels in [0, 1], of one-hots
          probabilities.
        - `"state/<name>"`, for each tensor of the state that holds numbers: distance to the state of the same model
          where it saw the observation, as a share of the root of those states' total variance.
        - `"reward"`: distance in standard deviations of the recorded rewards.
        - `"continue"`: distance of the probability from `went_on`.

        Where there is a scale, always expecting the mean of the data is off by about 1. What is the same in all
        recorded rows is not scaled. "Nothing changes" expects the last observation and state of the context, the reward
        that came with them (windows whose context ends on the first row of an episode have none, and do not count
        there), and that the episode goes on.
        """
        found: dict[str, PredictionError] = {}
        recorded = _by_key(self.real.obs)
        for key, predicted in self.obs.items():
            real = _flat(recorded[key], 2)
            if recorded[key].dtype == torch.uint8:
                scale, real = real.new_ones(()), real / 255.0
            else:
                scale = real.new_ones(()) if key in self.one_hots else _scale(_variances(real[self._seen]))
            error = self._against_real(_flat(predicted[:, :, self.context :].mean(0), 2), real, scale)
            found[f"obs/{key}" if isinstance(self.real.obs, dict) else "obs"] = error
        for name, predicted in self.states.items():
            if predicted.is_floating_point():
                real = _flat(self.observed[name], 2)
                # The error is a mean over the entries, so the variance is, too.
                scale = _scale(_variances(real[self._seen]).mean())
                found[f"state/{name}"] = self._against_real(_flat(predicted.mean(0), 2), real, scale)
        return found | {"reward": self._reward_error(), "continue": self._continue_error()}

    @property
    def _seen(self) -> Tensor:
        mask = self.real.obs_mask
        return torch.ones_like(self.real.terminations) if mask is None else mask

    def _against_real(self, predicted: Tensor, real: Tensor, scale: Tensor) -> PredictionError:
        """Of predictions `[B, H, D]` and of the context's last row, given all rows `[B, T, D]`."""
        ahead, last = real[:, self.context :], real[:, self.context - 1 : self.context]

        def distance(expected: Tensor) -> HorizonError:
            return _error(((expected - ahead) / scale).square().mean(-1).sqrt(), self.arrived)

        return PredictionError(distance(predicted), distance(last))

    def _reward_error(self) -> PredictionError:
        earned = self.earned
        scale = _scale(_variances(earned[self.steps].unsqueeze(-1)))
        assert self.real.is_first is not None
        known = ~self.real.is_first[:, self.context - 1 : self.context] & (self.context > 1)
        last = self.real.rewards[:, max(self.context - 2, 0)].float().unsqueeze(1)
        return PredictionError(
            _error((self.rewards.mean(0) - earned).abs() / scale, self.steps),
            _error((last - earned).abs() / scale, self.steps & known),
        )

    def _continue_error(self) -> PredictionError:
        went_on = self.went_on
        return PredictionError(
            _error((self.continues.mean(0) - went_on).abs(), self.steps), _error(1.0 - went_on, self.steps)
        )


@torch.no_grad()
def open_loop(model: WorldModel, batch: Batch, context: int, *, samples: int | None = None, seed: int = 0) -> OpenLoop:
    """Lets a model see the beginning of recorded windows, and predict the rest from the recorded actions alone.

    The state starts anew at a window's first row and wherever an episode starts in the context; what lies behind the
    end of the episode that the context ends in is predicted, but does not count. The model, its mode and torch's random
    streams are as before.

    Args:
        model: Of any family.
        batch: Windows of T rows, such as `buffer.sample` gives. `[B, T, ...]`
        context: Rows that the model sees, less than T. The other H are predicted.
        samples: Futures that are drawn for each window. None: one, of the likeliest latents.
        seed: Of the drawn futures. The same seed, model and batch give the same numbers.

    Raises:
        ConfigurationError: If `context` or `samples` is not a whole number from 1, or `seed` is not one from 0.
        ShapeMismatchError: If the windows are too short, or not of the model's observations and actions.
    """
    context = whole_number("context", context, 1)
    samples = None if samples is None else whole_number("samples", samples, 1)
    seed = whole_number("seed", seed, 0)
    if batch.seq_len <= context:
        raise ShapeMismatchError(
            f"The batch has {batch.seq_len} rows in each window, expected more than context ({context}). "
            "Sample windows of context + horizon rows."
        )
    batch = batch.to(model.device)
    if batch.is_first is None:
        batch = with_final_rows(batch)
    with evaluating(model, model.device, seed):
        observed = _observe(model, batch)
        futures = _imagine(model, batch, observed[context - 1], context, samples)
        obs = _pictures(model, observed[:context], futures.states)

    B, S = batch.batch_size, samples or 1
    assert batch.is_first is not None
    within = batch.is_first[:, context:].cumsum(1) == 0
    if batch.obs_mask is None:
        arrived = within
    else:
        # Nothing can be said of what follows an observation that was not recorded.
        within = within & batch.obs_mask[:, context - 1 : context]
        arrived = within & batch.obs_mask[:, context:]
    return OpenLoop(
        context=context,
        real=batch,
        obs=obs,
        one_hots=frozenset(model.config.obs_classes),
        states=State({name: _windows_first(value, S) for name, value in futures.states.items()}),
        observed=State({name: value.transpose(0, 1) for name, value in observed.items()}),
        rewards=_windows_first(futures.rewards.float(), S),
        continues=_windows_first(futures.continues.float(), S),
        steps=within.expand(B, -1),
        arrived=arrived,
    )


def _observe(model: WorldModel, batch: Batch) -> State:
    """States of a model that sees every row. `[T, B, ...]`"""
    assert batch.is_first is not None
    states: list[State] = []
    state = model.initial_state(batch.batch_size)
    for t in range(batch.seq_len):
        if "task" in state and "task" in batch.extras:  # of a model of several tasks
            state = State({**state, "task": batch.extras["task"][:, t].long()})
        state = model.update(
            state,
            batch.actions[:, max(t - 1, 0)].float(),
            {k: v[:, t] for k, v in batch.obs.items()} if isinstance(batch.obs, dict) else batch.obs[:, t],
            is_first=batch.is_first[:, t] if t else torch.ones_like(batch.is_first[:, 0]),
            deterministic=True,
        )
        states.append(state)
    return State.stack(states)


def _imagine(model: WorldModel, batch: Batch, start: State, context: int, samples: int | None) -> Trajectory:
    """Futures after the context, those of a draw side by side. `[H, S * B, ...]`"""
    rows = torch.arange(batch.batch_size, device=batch.rewards.device).repeat(samples or 1)
    actions = batch.actions[:, context - 1 : -1].float().transpose(0, 1)  # [H, B, A]
    return model.rollout(start[rows], actions[:, rows], deterministic=samples is None)


def _pictures(model: WorldModel, seen: State, imagined: State) -> dict[str, Tensor]:
    """What states `[context, B, ...]` and `[H, S * B, ...]` look like. `[S, B, context+H, ...]` for each key."""
    before, after = _decoded(model, seen), _decoded(model, imagined)
    pictures = {}
    for key, ahead in after.items():
        B = len(before[key])
        ahead = ahead.unflatten(0, (-1, B))
        pictures[key] = torch.cat([before[key].expand(len(ahead), *before[key].shape), ahead], 2)
    return pictures


def _decoded(model: WorldModel, states: State) -> dict[str, Tensor]:
    """Observations of states `[T, N, ...]`, `[N, T, ...]` for each key; none of a model that pictures nothing."""
    rows: list[dict[str, Tensor]] = []
    for t in range(len(next(iter(states.values())))):  # one by one: a decoder of images needs much memory
        found = model.decode(states[t])
        if "obs" not in found:
            return {}
        rows.append(_by_key(found["obs"]))
    return {key: torch.stack([row[key].float() for row in rows], 1) for key in rows[0]}


def _windows_first(value: Tensor, samples: int) -> Tensor:
    """`[H, S * B, ...]` → `[S, B, H, ...]`"""
    return value.unflatten(1, (samples, -1)).movedim(0, 2)


def _by_key(obs: Observation) -> dict[str, Tensor]:
    return obs if isinstance(obs, dict) else {"obs": obs}


def _flat(value: Tensor, leading: int) -> Tensor:
    """All axes behind the leading ones as one. `[..., D]` float32"""
    return value.float().reshape(*value.shape[:leading], -1)


def _variances(rows: Tensor) -> Tensor:
    """Of each column. `[R, D]` → `[D]`"""
    return rows.var(0, correction=0) if len(rows) else rows.new_zeros(rows.shape[1])


def _scale(variance: Tensor) -> Tensor:
    """Standard deviations, and 1 where there is no variance to scale by."""
    return torch.where(variance > 0, variance.sqrt(), 1.0)


def _error(values: Tensor, counts: Tensor) -> HorizonError:
    return HorizonError(values.double().cpu().numpy(), counts.cpu().numpy())
