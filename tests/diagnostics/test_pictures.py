"""Plots of predictions that were made by hand: what is drawn where, and the numbers behind it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from worldflux.diagnostics.calibration import (
    check_finite,
    continue_calibration,
    overall_ratio,
    reward_calibration,
    summary,
)
from worldflux.diagnostics.open_loop import OpenLoop
from worldflux.diagnostics.plots import figures
from worldflux.diagnostics.plots.frames import as_animated_png, film, longest_windows, tiles, visible
from worldflux.diagnostics.plots.horizon import draw_errors
from worldflux.errors import MissingDependencyError, TrainingError, install_hint
from worldflux.models.base import State
from worldflux.training import Batch

CONTEXT, HORIZON = 3, 4
LENGTH = CONTEXT + HORIZON


def predictions(
    obs: Any,
    pictured: dict[str, Tensor],
    *,
    rewards: Tensor | None = None,
    earned: Tensor | None = None,
    continues: Tensor | None = None,
    terminations: Tensor | None = None,
    is_first: Tensor | None = None,
    rows: Tensor | None = None,
    one_hots: frozenset[str] = frozenset(),
) -> OpenLoop:
    """Windows `[B, 7, ...]` whose first three rows are context, and predictions of a model."""
    first = obs if isinstance(obs, Tensor) else next(iter(obs.values()))
    B = len(first)
    none = torch.zeros(B, LENGTH, dtype=torch.bool)
    starts = none if is_first is None else is_first
    within = starts[:, CONTEXT:].cumsum(1) == 0
    real = Batch(
        obs=obs,
        actions=torch.zeros(B, LENGTH, 1),
        rewards=torch.zeros(B, LENGTH) if earned is None else earned,
        terminations=none if terminations is None else terminations,
        truncations=none,
        is_first=starts,
        obs_mask=~none,
        row_ids=rows,
    )
    return OpenLoop(
        context=CONTEXT,
        real=real,
        obs=pictured,
        one_hots=one_hots,
        states=State({"latent": torch.zeros(1, B, HORIZON, 2)}),
        observed=State({"latent": torch.ones(B, LENGTH, 2)}),
        rewards=torch.zeros(1, B, HORIZON) if rewards is None else rewards,
        continues=torch.ones(1, B, HORIZON) if continues is None else continues,
        steps=within,
        arrived=within,
    )


def vectors(windows: int = 2, **given: Any) -> OpenLoop:
    """The first entry counts the rows, the second is 5. The model predicts half of both."""
    count = torch.arange(float(LENGTH)).expand(windows, -1)
    obs = torch.stack([count, torch.full_like(count, 5.0)], -1)
    return predictions(obs, {"obs": obs[None] / 2}, **given)


def images(windows: int = 1, channels: int = 3, side: int = 40, **given: Any) -> OpenLoop:
    """Row t has brightness 10 (t + 1) on the left and is black on the right. The model predicts black everywhere."""
    real = torch.zeros(windows, LENGTH, channels, side, side, dtype=torch.uint8)
    real[..., : side // 2] = (10 * torch.arange(1, LENGTH + 1, dtype=torch.uint8))[:, None, None, None]
    return predictions(real, {"obs": torch.zeros(1, *real.shape)}, **given)


def after(step: int) -> Tensor:
    """An episode that ends after this many steps, and another window whose episode goes on. `[2, 7]`"""
    starts = torch.zeros(2, LENGTH, dtype=torch.bool)
    starts[0, CONTEXT + step] = True
    return starts


# --- calibration


def test_rewards_are_compared_in_groups_of_equal_predictions() -> None:
    rewards = torch.tensor([[[0.0, 0, 0, 0], [1, 1, 1, 1]]])
    earned = torch.zeros(2, LENGTH)
    earned[:, CONTEXT - 1 : -1] = torch.tensor([[0.0, 0, 1, 1], [1, 1, 1, 3]])
    found = reward_calibration(vectors(rewards=rewards, earned=earned))
    assert found.counts.tolist() == [4, 4]
    assert found.predicted.tolist() == [0, 1]
    assert found.actual.tolist() == [0.5, 1.5]
    # Deviations of the two groups: the roots of 1/3 and of 1; of four values, half of that.
    np.testing.assert_allclose(found.high - found.actual, 1.96 * np.array([np.sqrt(1 / 3), 1.0]) / 2)
    np.testing.assert_allclose(found.actual - found.low, found.high - found.actual)


def test_groups_of_rewards_are_equally_large() -> None:
    rewards = torch.arange(400.0).reshape(1, 100, HORIZON)
    found = reward_calibration(vectors(100, rewards=rewards))
    assert found.counts.tolist() == [40] * 10
    np.testing.assert_allclose(found.predicted, 19.5 + 40 * np.arange(10))


def test_continuation_is_compared_in_ranges_of_its_probability() -> None:
    continues = torch.tensor([[[0.95, 0.95, 1.0, 1.0], [0.25, 0.25, 0.25, 0.25]]])
    ends = torch.zeros(2, LENGTH, dtype=torch.bool)
    ends[1, CONTEXT - 1 : -2] = True
    found = continue_calibration(vectors(continues=continues, terminations=ends))
    assert found.counts.tolist() == [0, 0, 4, 0, 0, 0, 0, 0, 0, 4]
    np.testing.assert_allclose(found.predicted[[2, 9]], [0.25, 0.975])
    assert found.actual[[2, 9]].tolist() == [0.25, 1.0]
    # Wilson's interval of four out of four, and its mirror image of none out of four shifted by one in four.
    np.testing.assert_allclose([found.low[9], found.high[9]], [4 / (4 + 1.96**2), 1.0])
    np.testing.assert_allclose([found.low[2], found.high[2]], [0.0456, 0.6994], atol=1e-4)
    assert np.isnan(found.actual[0])


def test_steps_behind_the_end_of_the_episode_do_not_count() -> None:
    rewards = torch.tensor([[[1.0, 1, 9, 9], [2, 2, 2, 2]]])
    found = vectors(rewards=rewards, is_first=after(2))
    assert reward_calibration(found).counts.sum() == continue_calibration(found).counts.sum() == 6
    assert reward_calibration(found).predicted.max() == 2
    nothing = vectors(1, is_first=torch.eye(LENGTH, dtype=torch.bool)[CONTEXT][None])
    assert reward_calibration(nothing).counts.sum() == 0
    assert set(figures(nothing, nothing.errors())) == {"imagination", "errors", "rewards", "continues"}


def test_the_numbers_are_those_of_open_loop_and_fit_into_json() -> None:
    found = vectors(is_first=after(2), rewards=torch.full((1, 2, HORIZON), 2.0))
    errors = found.errors()
    numbers = json.loads(json.dumps(summary(found, errors), allow_nan=False))
    assert numbers["errors"].keys() == errors.keys()
    for name, error in errors.items():
        for part, horizon in (("model", error.model), ("unchanged", error.unchanged)):
            np.testing.assert_array_equal(numbers["errors"][name][part]["mean"], horizon.mean)
            np.testing.assert_array_equal(numbers["errors"][name][part]["quantile_0.9"], horizon.quantile(0.9))
            assert numbers["errors"][name][part]["count"] == [2, 2, 1, 1]
    model, unchanged = (each.values[each.counts].sum() for each in (errors["obs"].model, errors["obs"].unchanged))
    assert numbers["errors"]["obs"]["overall_ratio"] == model / unchanged == overall_ratio(errors["obs"])
    # No reward did change, so that there is no ratio.
    assert numbers["errors"]["reward"]["overall_ratio"] is None
    assert numbers["rewards"]["steps"] == numbers["continues"]["steps"] == 6
    assert (numbers["rewards"]["predicted"], numbers["rewards"]["earned"]) == (2, 0)
    assert numbers["continues"]["terminations"] == 0


@pytest.mark.parametrize("name", ["observations", "rewards", "continues"])
def test_predictions_that_are_not_finite_are_named(name: str) -> None:
    found = vectors()
    check_finite(found)
    broken = {"observations": found.obs["obs"], "rewards": found.rewards, "continues": found.continues}[name]
    broken[0, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match=f"The {name} that the model predicts are not finite"):
        check_finite(found)


# --- frames


def test_rows_of_other_episodes_are_not_visible() -> None:
    starts = after(2)
    starts[1, 1] = True
    assert visible(vectors(is_first=starts)).tolist() == [[True] * 5 + [False] * 2, [False] + [True] * 6]


def test_the_windows_that_show_most_are_chosen_and_none_twice() -> None:
    starts = torch.zeros(4, LENGTH, dtype=torch.bool)
    starts[0, 4], starts[2, 6] = True, True
    rows = torch.tensor([[10], [20], [30], [20]]) + torch.arange(LENGTH)
    assert longest_windows(vectors(4, is_first=starts, rows=rows), 4) == [1, 2, 0]
    assert longest_windows(vectors(4, is_first=starts), 2) == [1, 3]


def test_tiles_hold_the_recorded_and_the_predicted_pixels_and_the_largest_error_of_a_channel() -> None:
    found = images()
    found.obs["obs"][0, 0, 4, :, 2, 3] = torch.tensor([1.0, 0.5, 0.0])
    true, predicted, error = tiles(found, "obs", 0)
    assert true.shape == (LENGTH, 40, 40, 3)
    assert true[:, 0, 0].tolist() == [[10 * (t + 1)] * 3 for t in range(LENGTH)]
    assert not true[:, 0, 20].any()
    assert predicted[4, 2, 3].tolist() == [255, 128, 0]
    assert error[4, 2, 3].tolist() == [255 - 50] * 3
    assert error[:, 0, 0].tolist() == [[10 * (t + 1)] * 3 for t in range(LENGTH)]


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (3, [0, 1, 2]), (4, [3, 3, 3]), (9, [6, 7, 8])])
def test_of_stacked_pictures_the_newest_is_shown(channels: int, shown: list[int]) -> None:
    found = images(channels=channels)
    found.real.obs[:] = torch.arange(channels, dtype=torch.uint8)[:, None, None]  # type: ignore[index]
    assert tiles(found, "obs", 0)[0, 0, 0, 0].tolist() == shown


def test_a_film_shows_truth_prediction_and_error_at_their_places() -> None:
    frames = film(images(2, is_first=after(2)), "obs", [1, 0])
    assert frames.shape == (LENGTH, 30 + 3 * (120 + 6) + 22, 84 + 2 * (120 + 6) + 6, 3)
    true, predicted, error = (frames[:, 30 + 126 * row :][:, :120, 84:204] for row in range(3))
    for t in range(LENGTH):
        bright = 10 * (t + 1)
        assert (true[t, :, :60] == bright).all() and not true[t, :, 60:].any()
        assert not predicted[t].any()
        assert (error[t, :, :60] == bright).all() and not error[t, :, 60:].any()
    # The second window's episode ends two steps ahead, and then there is nothing to compare.
    other = frames[:, 30 + 252 : 30 + 252 + 120, 84 + 126 : 84 + 246]
    assert (other[4, :, :60] == 50).all()
    assert (other[5:] == 70).all()


def test_a_film_marks_what_the_model_has_not_seen() -> None:
    frames = film(images(), "obs", [0])
    top, left = 30 + 126, 84
    edges = frames[:, top - 1, left : left + 120]
    assert (edges[:CONTEXT] == 24).all()
    assert (edges[CONTEXT:] == (255, 170, 60)).all()
    bar = frames[:, -10, left:-6]
    imagined = (bar == (255, 170, 60)).all(-1).mean(1)
    assert imagined[:CONTEXT].tolist() == [0, 0, 0]
    np.testing.assert_allclose(imagined[CONTEXT:], np.arange(1, 5) / LENGTH, atol=0.02)
    header = frames[:, :30]
    assert not (header[CONTEXT - 1] == header[CONTEXT]).all()


@pytest.mark.parametrize(("side", "shown"), [(8, 128), (64, 128), (84, 84), (200, 200), (512, 256)])
def test_pictures_are_enlarged_by_whole_numbers_and_reduced_to_fit(side: int, shown: int) -> None:
    assert film(images(side=side), "obs", [0]).shape[1] == 30 + 3 * (shown + 6) + 22


def test_animations_hold_every_pixel() -> None:
    frames = film(images(), "obs", [0])
    data = as_animated_png(frames, fps=10)
    assert data is not None
    _, animation = cv2.imdecodeanimation(np.frombuffer(data, np.uint8))
    np.testing.assert_array_equal(np.stack([frame[..., 2::-1] for frame in animation.frames]), frames)
    assert list(animation.durations) == [100] * LENGTH


def test_an_opencv_that_makes_no_animations_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2, "imencodeanimation")
    assert as_animated_png(np.zeros((2, 4, 4, 3), np.uint8)) is None


# --- figures


def lines(axes: Any) -> dict[str, np.ndarray]:
    return {str(line.get_label()): line.get_ydata() for line in axes.get_lines()}


def text_of(figure: Any) -> str:
    titles = [axes.get_title() for axes in figure.axes]
    return "\n".join([figure.get_suptitle(), *titles])


def test_time_series_show_what_was_recorded_and_predicted_until_the_episode_ends() -> None:
    rewards = torch.tensor([[[3.0, 3, 3, 3], [4, 4, 4, 4]]])
    earned = torch.arange(float(LENGTH)).expand(2, -1)
    found = vectors(rewards=rewards, earned=earned, is_first=after(2))
    figure = figures(found, found.errors(), title="of a test")["imagination"]
    grid = np.array(figure.axes).reshape(3, 2)  # two entries and the reward; the longer window first
    assert lines(grid[0, 0])["recorded"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(lines(grid[0, 1])["recorded"], [0, 1, 2, 3, 4, np.nan, np.nan])
    np.testing.assert_array_equal(lines(grid[1, 1])["predicted"], [2.5, 2.5, 2.5, 2.5, 2.5, np.nan, np.nan])
    # The reward with which an observation came; it is predicted from the end of the context on.
    np.testing.assert_array_equal(lines(grid[2, 0])["recorded"], [np.nan, 0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(lines(grid[2, 0])["predicted"], [np.nan] * 3 + [4.0] * 4)
    assert grid[0, 0].get_lines()[0].get_xdata().tolist() == [-2, -1, 0, 1, 2, 3, 4]
    assert [axes.get_ylabel() for axes in grid[:, 0]] == ["obs[0]", "obs[1]", "reward"]
    assert [axes.get_title() for axes in grid[0]] == ["window 1", "window 2: ends after 2"]
    assert figure.get_suptitle().startswith("of a test\n")


def test_a_termination_is_named_and_its_probability_drawn() -> None:
    ends = torch.zeros(1, LENGTH, dtype=torch.bool)
    ends[0, CONTEXT + 1] = True
    starts = torch.eye(LENGTH, dtype=torch.bool)[CONTEXT + 3][None]
    found = vectors(1, terminations=ends, is_first=starts, continues=torch.tensor([[[0.9, 0.8, 0.1, 0.5]]]))
    figure = figures(found, found.errors())["imagination"]
    assert figure.axes[0].get_title() == "window 1: terminates after 3"
    shown = lines(figure.axes[-1])
    np.testing.assert_array_equal(shown["recorded"], [np.nan, 1, 1, 1, 1, 0, np.nan])
    np.testing.assert_allclose(shown["predicted"], [np.nan] * 3 + [0.9, 0.8, 0.1, np.nan], rtol=1e-6)
    assert figure.axes[-1].get_ylim() == (-0.05, 1.05)


def test_wild_predictions_leave_the_truth_readable() -> None:
    found = vectors()
    found.obs["obs"][..., 0] = 1000.0
    axes = figures(found, found.errors())["imagination"].axes[0]
    assert axes.get_ylim()[1] < 20


def test_of_many_entries_the_first_that_differ_are_drawn() -> None:
    obs = torch.zeros(1, LENGTH, 20)
    obs[..., 3:] = torch.arange(float(LENGTH))[:, None]
    found = predictions(obs, {"obs": obs[None]})
    names = [axes.get_ylabel() for axes in figures(found, found.errors())["imagination"].axes]
    assert names == ["obs[3]\n(8 of 20 drawn)", *(f"obs[{entry}]" for entry in range(4, 11)), "reward"]


def test_several_futures_are_a_mean_with_a_band() -> None:
    found = vectors(1, rewards=torch.zeros(3, 1, HORIZON), continues=torch.ones(3, 1, HORIZON))
    futures = torch.stack([found.obs["obs"][0] + shift for shift in (0.0, 1.0, 5.0)])
    found.obs["obs"] = futures
    axes = figures(found, found.errors())["imagination"].axes[0]
    np.testing.assert_allclose(lines(axes)["predicted"], np.arange(LENGTH) / 2 + 2)
    assert [band.get_label() for band in axes.collections] == ["80% of 3 futures"]


def test_the_strip_shows_the_rows_that_its_labels_name() -> None:
    found = images(2, is_first=after(2))
    figure = figures(found, found.errors())["imagination-strip"]
    first, second = figure.axes
    assert [label.get_text() for label in first.get_xticklabels()] == ["-2", "0", "+1", "+2", "+3", "+4"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["true", "predicted", "error"]
    for axes, over in ((first, []), (second, [4, 5])):
        sheet = np.asarray(axes.get_images()[0].get_array())
        for column, row in enumerate((0, 2, 3, 4, 5, 6)):
            x, true, predicted, error = (int(p) for p in (axes.get_xticks()[column], *axes.get_yticks()))
            bright = 10 * (row + 1)
            # Left of the middle of a tile the truth is bright, right of it black.
            expected = [190] * 4 if column in over else [bright, 0, 0, bright]
            shown = [sheet[true, x - 1], sheet[true, x + 1], sheet[predicted, x - 1], sheet[error, x - 1]]
            assert [pixel.tolist() for pixel in shown] == [[value] * 3 for value in expected]


def test_errors_are_drawn_beside_those_of_nothing_changes() -> None:
    found = vectors(is_first=after(2))
    errors = found.errors()
    figure = draw_errors(found, errors)
    shown = dict(zip(errors, figure.axes, strict=False))
    assert shown["obs"].get_title().startswith(f"obs: {overall_ratio(errors['obs']):.2f} of the error of")
    assert shown["obs"].get_title().endswith("2 windows, 1 of them to the end")
    np.testing.assert_array_equal(lines(shown["obs"])["model: mean"], errors["obs"].model.mean)
    np.testing.assert_array_equal(lines(shown["obs"])["nothing changes: mean"], errors["obs"].unchanged.mean)
    assert lines(shown["obs"])["model: mean"].shape == (HORIZON,)
    assert shown["obs"].get_ylabel() == "error (standard deviations)"
    assert shown["reward"].get_ylabel() == "error (reward units: the reward is constant)"


def test_every_cell_of_the_rewards_can_be_seen() -> None:
    earned = torch.zeros(1, LENGTH)
    earned[0, -2] = 1.0
    found = vectors(1, earned=earned)
    cells = figures(found, found.errors())["rewards"].axes[0].collections[0]
    assert sorted(cells.get_array().tolist()) == [1, 3]
    assert (cells.get_cmap()(cells.norm(cells.get_array()))[:, :3] < 0.9).all()


def test_a_model_without_a_decoder_shows_its_values() -> None:
    seen = torch.arange(float(LENGTH))[None]
    without = predictions(torch.zeros(1, LENGTH, 2), {})
    found = replace(without, values=seen[None, :, CONTEXT:] + 2, observed_values=seen)
    error = found.errors()["value"]
    # Off by 2, and the deviation of 0 to 6 is 2; nothing changes after the context, whose last value is 2.
    np.testing.assert_allclose(error.model.values, [[1.0] * HORIZON])
    np.testing.assert_allclose(error.unchanged.values, [[0.5, 1.0, 1.5, 2.0]])
    made = figures(found, found.errors())
    value = made["imagination"].axes[0]
    assert [axes.get_ylabel() for axes in made["imagination"].axes] == ["value", "reward"]
    recorded, predicted = (line.get_ydata() for line in value.get_lines())
    assert recorded.tolist() == [*range(LENGTH)] and predicted[CONTEXT:].tolist() == [5, 6, 7, 8]
    assert np.isnan(predicted[:CONTEXT]).all()
    assert "its rewards, continuation, values and states are compared" in " ".join(text_of(made["errors"]).split())
    with pytest.raises(TrainingError, match="The values that the model predicts are not finite"):
        check_finite(replace(found, values=torch.full((1, 1, HORIZON), torch.nan)))


def test_pictures_say_what_cannot_be_known() -> None:
    obs = torch.zeros(1, LENGTH, 2)
    found = predictions(obs, {})
    made = figures(found, found.errors())
    assert set(made) == {"imagination", "errors", "rewards", "continues"}
    assert [axes.get_ylabel() for axes in made["imagination"].axes] == ["reward"]
    assert "The model has no decoder" in text_of(made["imagination"])
    remark = "The model has no decoder and draws no observations: its rewards, continuation and states are compared"
    assert remark in " ".join(text_of(made["errors"]).split())
    assert "4 steps, 0 terminations: predictions of them cannot be judged" in text_of(made["continues"])
    assert "the model is certain that the episode continues" in text_of(made["continues"])
    assert "every one of 4 steps earned 0" in text_of(made["rewards"])


def test_dictionaries_have_both_kinds_of_pictures_and_images_their_names() -> None:
    picture = torch.zeros(1, LENGTH, 3, 8, 8, dtype=torch.uint8)
    obs = {"left": picture, "right/eye": picture, "kind": torch.zeros(1, LENGTH, 2)}
    pictured = {key: value[None].float() for key, value in obs.items()}
    found = predictions(obs, pictured, one_hots=frozenset({"kind"}))
    made = figures(found, found.errors())
    assert set(made) == {
        "imagination",
        "imagination-strip-left",
        "imagination-strip-right-eye",
        "errors",
        "rewards",
        "continues",
    }
    units = {axes.get_title().split("\n")[0]: axes.get_ylabel() for axes in made["errors"].axes}
    assert units["obs/left"] == "RMS error (pixel range 0 to 1)"
    assert units["obs/kind"] == "RMS error (probability)"
    assert made["imagination"].axes[0].get_ylim() == (-0.05, 1.05)


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=re.escape(install_hint("plot"))):
        figures(vectors(), vectors().errors())
