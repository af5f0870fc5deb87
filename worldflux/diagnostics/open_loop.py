"""Open-loop prediction: a model sees the beginning of recorded windows and predicts the rest from the actions alone.

batch = held_out.sample(256, seq_len=5 + 15)
errors = open_loop(model, batch, context=5).errors()
errors["reward"].model.mean        # [15], for each step ahead
errors["reward"].unchanged.mean    # [15], error of predicting that nothing changes
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worldflux.errors import ShapeMismatchError
from worldflux.models.base import State, Trajectory, WorldModel
from worldflux.models.evaluation import evaluating, observed_states
from worldflux.models.final_rows import with_final_rows
from worldflux.replay.batch import Batch, by_key
from worldflux.validation import whole_number


@dataclass(frozen=True)
class HorizonError:
    """Errors of N windows for each step ahead."""

    values: np.ndarray
    """The errors; NaN only if the prediction was NaN. `[N, H]`"""
    counts: np.ndarray
    """Whether the window has this step. Where it is False, the value is meaningless. `[N, H]` bool"""

    @property
    def count(self) -> np.ndarray:
        """Number of windows that have this step. `[H]`"""
        return self.counts.sum(0)

    @property
    def mean(self) -> np.ndarray:
        """Mean over the windows; NaN if no window has this step. `[H]`"""
        with np.errstate(invalid="ignore"):
            return np.where(self.counts, self.values, 0.0).sum(0) / self.count

    @property
    def standard_error(self) -> np.ndarray:
        """Standard error of the mean, assuming independent windows: too small if they overlap. `[H]`"""
        deviation = np.where(self.counts, self.values - self.mean, 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.sqrt(np.square(deviation).sum(0) / (self.count - 1) / self.count)

    def quantile(self, share: float) -> np.ndarray:
        """Quantile over the windows, for a share from 0 to 1; NaN if no window has this step. `[H]`"""
        columns = zip(self.values.T, self.counts.T, strict=True)
        return np.array([np.quantile(value[counts], share) if counts.any() else np.nan for value, counts in columns])


@dataclass(frozen=True)
class PredictionError:
    """The error of a model, and that of the simplest prediction, which it has to beat."""

    model: HorizonError
    """Error of the model's prediction."""
    unchanged: HorizonError
    """Error of predicting that everything stays as it was at the end of the context."""

    @property
    def ratio(self) -> np.ndarray:
        """The model's mean error as a share of the other's, over the windows that count for both. `[H]`

        Below 1, the model has learned something. If nothing changed, the ratio is infinite, or NaN if the model
        predicted that.
        """
        both = self.model.counts & self.unchanged.counts
        with np.errstate(invalid="ignore", divide="ignore"):
            return HorizonError(self.model.values, both).mean / HorizonError(self.unchanged.values, both).mean


@dataclass(frozen=True)
class OpenLoop:
    """B recorded windows, and a model's predictions of their last H rows, in S futures.

    The model saw the first `context` rows of each window, and only the actions of the others:

        row        0 ... context-1     context ... context+H-1
        obs        seen                predicted, 1 to H steps ahead
        actions    known               known
    """

    context: int
    """Number of rows of each window that the model saw."""
    real: Batch
    """The recorded windows, with a row for each final observation. `[B, context+H, ...]`"""
    obs: dict[str, Tensor]
    """Decoded observations: reconstructions of the context, then predictions. Vectors are in the recorded units, images
    are floats in [0, 1]. An observation that is not a dictionary has the key "obs". Empty if the model has no decoder.
    `[S, B, context+H, ...]`"""
    one_hots: frozenset[str]
    """Keys of observations that are one-hots; their predictions are probabilities."""
    states: State
    """Predicted states. `[S, B, H, ...]`"""
    observed: State
    """States of the same model when it sees every row. `[B, context+H, ...]`"""
    rewards: Tensor
    """Predicted reward of each action. `[S, B, H]`"""
    continues: Tensor
    """Predicted probability that the episode goes on after each action. `[S, B, H]`"""
    steps: Tensor
    """Whether the step lies in the episode that the context ends in. `[B, H]` bool"""
    arrived: Tensor
    """Whether, in addition, the observation after the step was recorded. `[B, H]` bool"""
    values: Tensor | None = None
    """Values of the predicted states; None if the model has a decoder, or no values. `[S, B, H]`"""
    observed_values: Tensor | None = None
    """Values of the states in `observed`; None where `values` is. `[B, context+H]`"""

    @property
    def earned(self) -> Tensor:
        """Recorded reward of each action. `[B, H]`"""
        return self.real.rewards[:, self.context - 1 : -1].float()

    @property
    def went_on(self) -> Tensor:
        """1 if the episode went on after the action, 0 if it terminated. `[B, H]`"""
        return 1.0 - self.real.terminations[:, self.context - 1 : -1].float()

    def errors(self) -> dict[str, PredictionError]:
        """Distance between the mean of the futures and the recorded rows, for each window and step ahead.

        - `"obs"`, or `"obs/<key>"` for a dictionary: root mean squared error over the entries. Entries of vectors are
          measured in standard deviations of the recorded rows, pixels in [0, 1], one-hots as probabilities.
        - `"state/<name>"`, for each floating-point tensor of the state: distance to the state of the same model when it
          sees the observation, as a share of the root of those states' total variance.
        - `"reward"`: distance in standard deviations of the recorded rewards.
        - `"continue"`: distance of the probability from `went_on`.
        - `"value"`, without a decoder: distance to the value of the same model's state when it sees the observation, in
          standard deviations of these values.

        On these scales, predicting the mean of the data has an error of about 1. Values that are the same in all
        recorded rows are not scaled. "Nothing changes" predicts the last observation and state of the context, the
        reward that came with them, and that the episode goes on. Windows whose context ends on the first row of an
        episode have no such reward, and do not count there.
        """
        found: dict[str, PredictionError] = {}
        recorded = by_key(self.real.obs)
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
        found |= {"reward": self._reward_error(), "continue": self._continue_error()}
        if self.values is not None and self.observed_values is not None:
            real = self.observed_values.unsqueeze(-1)
            scale = _scale(_variances(real[self._seen]))
            found["value"] = self._against_real(self.values.mean(0).unsqueeze(-1), real, scale)
        return found

    @property
    def _seen(self) -> Tensor:
        mask = self.real.obs_mask
        return torch.ones_like(self.real.terminations) if mask is None else mask

    def _against_real(self, predicted: Tensor, real: Tensor, scale: Tensor) -> PredictionError:
        """Error of predictions `[B, H, D]`, and of the context's last row, given all rows `[B, T, D]`."""
        ahead, last = real[:, self.context :], real[:, self.context - 1 : self.context]

        def distance(expected: Tensor) -> HorizonError:
            return horizon_error(((expected - ahead) / scale).square().mean(-1).sqrt(), self.arrived)

        return PredictionError(distance(predicted), distance(last))

    def _reward_error(self) -> PredictionError:
        earned = self.earned
        scale = _scale(_variances(earned[self.steps].unsqueeze(-1)))
        assert self.real.is_first is not None
        known = ~self.real.is_first[:, self.context - 1 : self.context] & (self.context > 1)
        last = self.real.rewards[:, max(self.context - 2, 0)].float().unsqueeze(1)
        return PredictionError(
            horizon_error((self.rewards.mean(0) - earned).abs() / scale, self.steps),
            horizon_error((last - earned).abs() / scale, self.steps & known),
        )

    def _continue_error(self) -> PredictionError:
        went_on = self.went_on
        return PredictionError(
            horizon_error((self.continues.mean(0) - went_on).abs(), self.steps),
            horizon_error(1.0 - went_on, self.steps),
        )


@torch.no_grad()
def open_loop(model: WorldModel, batch: Batch, context: int, *, samples: int | None = None, seed: int = 0) -> OpenLoop:
    """Shows a model the beginning of recorded windows, and lets it predict the rest from the recorded actions alone.

    The state is reset at the first row of a window and wherever an episode starts in the context. Rows after the end of
    the episode that the context ends in are predicted, but do not count. The model, its mode and torch's random state
    stay as they are.

    Args:
        model: A model of any family.
        batch: Windows of T rows, as from `buffer.sample`. `[B, T, ...]`
        context: Number of rows that the model sees, less than T. The other H rows are predicted.
        samples: Number of futures that are sampled for each window. None: one future of the most likely latents.
        seed: Seed of the sampled futures. The same seed, model and batch give the same numbers.

    Raises:
        ConfigurationError: If `context` or `samples` is not a whole number from 1, or `seed` is not one from 0.
        ShapeMismatchError: If the windows are too short, or do not have the model's observations and actions.
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
        observed = observed_states(model, batch)
        futures = _imagine(model, batch, observed[context - 1], context, samples)
        obs = _decode_all(model, observed[:context], futures.states)
        # Where there are no observations to look at, values show what the model expects.
        has_values = not obs and type(model).value is not WorldModel.value
        values = [_values(model, states) for states in (futures.states, observed)] if has_values else None

    B, S = batch.batch_size, samples or 1
    assert batch.is_first is not None
    within = batch.is_first[:, context:].cumsum(1) == 0
    if batch.obs_mask is None:
        arrived = within
    else:
        # Steps after an observation that was not recorded cannot be judged.
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
        values=None if values is None else _windows_first(values[0], S),
        observed_values=None if values is None else values[1].t(),
    )


def _imagine(model: WorldModel, batch: Batch, start: State, context: int, samples: int | None) -> Trajectory:
    """Futures after the context, sample by sample. `[H, S * B, ...]`"""
    rows = torch.arange(batch.batch_size, device=batch.rewards.device).repeat(samples or 1)
    actions = batch.actions[:, context - 1 : -1].float().transpose(0, 1)  # [H, B, A]
    return model.rollout(start[rows], actions[:, rows], deterministic=samples is None)


def _decode_all(model: WorldModel, seen: State, imagined: State) -> dict[str, Tensor]:
    """Observations of states `[context, B, ...]` and `[H, S * B, ...]`. `[S, B, context+H, ...]` for each key."""
    before, after = _decoded(model, seen), _decoded(model, imagined)
    decoded = {}
    for key, ahead in after.items():
        B = len(before[key])
        ahead = ahead.unflatten(0, (-1, B))
        decoded[key] = torch.cat([before[key].expand(len(ahead), *before[key].shape), ahead], 2)
    return decoded


def _decoded(model: WorldModel, states: State) -> dict[str, Tensor]:
    """Observations of states `[T, N, ...]`, `[N, T, ...]` for each key; empty if the model has no decoder."""
    rows: list[dict[str, Tensor]] = []
    for t in range(len(next(iter(states.values())))):  # one by one: a decoder of images needs much memory
        found = model.decode(states[t])
        if "obs" not in found:
            return {}
        rows.append(by_key(found["obs"]))
    return {key: torch.stack([row[key].float() for row in rows], 1) for key in rows[0]}


def _values(model: WorldModel, states: State) -> Tensor:
    """Values of states `[T, N, ...]`. `[T, N]`"""
    return torch.stack([model.value(states[t]).float() for t in range(len(next(iter(states.values()))))])


def _windows_first(value: Tensor, samples: int) -> Tensor:
    """`[H, S * B, ...]` → `[S, B, H, ...]`"""
    return value.unflatten(1, (samples, -1)).movedim(0, 2)


def _flat(value: Tensor, leading: int) -> Tensor:
    """Flattens all axes after the leading ones. `[..., D]` float32"""
    return value.float().reshape(*value.shape[:leading], -1)


def _variances(rows: Tensor) -> Tensor:
    """Variance of each column. `[R, D]` → `[D]`"""
    return rows.var(0, correction=0) if len(rows) else rows.new_zeros(rows.shape[1])


def _scale(variance: Tensor) -> Tensor:
    """Standard deviation, or 1 where the variance is 0."""
    return torch.where(variance > 0, variance.sqrt(), 1.0)


def horizon_error(values: Tensor, counts: Tensor) -> HorizonError:
    """Errors of tensors `[N, H]`."""
    return HorizonError(values.double().cpu().numpy(), counts.cpu().numpy())
