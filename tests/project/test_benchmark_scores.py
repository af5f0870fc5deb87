"""Files of scores, and the numbers that are made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from score_files import HEADER, Score, append_scores, read_scores, write_scores
from suite_statistics import iqm, mean, stratified_interval, t_interval, windowed

from worldflux.errors import CheckpointError

stats = pytest.importorskip("scipy.stats")  # dm-control brings it

ROWS = [Score(1000, 12.5, 0), Score(2000, -3.25, 0), Score(1000, 0.0, 7)]


def test_scores_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    write_scores(path, ROWS[:1])
    append_scores(path, ROWS[1:])
    assert path.read_text() == f"{HEADER}\n1000,12.5,0\n2000,-3.25,0\n1000,0,7\n"
    assert read_scores(path) == ROWS


def test_a_line_that_is_being_written_is_left_out_of_an_unfinished_run_only(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(f"{HEADER}\n1000,12.5,0\n2000,99")
    assert read_scores(path, in_progress=True) == ROWS[:1]
    with pytest.raises(CheckpointError, match="its last line is incomplete"):
        read_scores(path)


def test_a_file_that_is_not_there_yet_has_no_rows(tmp_path: Path) -> None:
    assert read_scores(tmp_path / "scores.csv", in_progress=True) == []
    with pytest.raises(CheckpointError, match="is missing"):
        read_scores(tmp_path / "scores.csv")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "is empty"),
        ("step,reward,seed\n", "line 1 is 'step,reward,seed'"),
        (f"{HEADER}\n1000,12.5\n", "line 2 is '1000,12.5'"),
        (f"{HEADER}\n1000,12.5,0\n2000,nan,0\n", "line 3 is '2000,nan,0'"),
        (f"{HEADER}\n1000,inf,0\n", "line 2"),
        (f"{HEADER}\n1e3,12.5,0\n", "line 2"),
        (f"{HEADER}\n-5,12.5,0\n", "line 2"),
        (f"{HEADER}\n2000,12.5,0\n1000,12.5,0\n", "line 3 is '1000,12.5,0'"),
        (f"{HEADER}\n1000,12.5,0\n\n", "line 3 is ''"),
    ],
)
def test_damaged_files_are_refused_with_the_line(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"scores\.csv") as raised:
        read_scores(path)
    assert named in str(raised.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_bytes(b"step,score,seed\n\xff\xfe\n")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_scores(path)


def test_the_interquartile_mean_leaves_out_the_outer_quarters() -> None:
    assert iqm([100.0, 1.0, 2.0, -50.0]) == 1.5  # 1 and 2
    assert iqm([4.0, 1.0, 7.0]) == 4.0  # a quarter of three is none
    assert iqm(np.array([[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 70.0]])) == 3.5  # 2, 3, 4, 5


@pytest.mark.parametrize("count", [1, 5, 26, 130])
def test_the_interquartile_mean_is_that_of_scipy(count: int) -> None:
    values = np.random.default_rng(count).standard_normal(count)
    assert iqm(values) == pytest.approx(stats.trim_mean(values, 0.25), rel=1e-12)


def test_the_interval_of_a_mean_is_students() -> None:
    # Mean 2, standard deviation 1, t of two degrees of freedom 4.303.
    low, high = t_interval([1.0, 2.0, 3.0]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert t_interval([1.0]) is None


@pytest.mark.parametrize("count", [2, 3, 10, 31])
def test_the_table_of_quantiles_is_that_of_scipy(count: int) -> None:
    values = [0.0] * (count - 1) + [1.0]
    low, high = t_interval(values) or (0.0, 0.0)
    half = float(stats.t.ppf(0.975, count - 1)) * np.std(values, ddof=1) / count**0.5
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3)


def test_resamples_stay_within_each_task() -> None:
    # Seeds of one task agree, so that only the choice among tasks could change the mean: it is no choice.
    assert stratified_interval([np.array([0.0, 0.0]), np.array([1.0, 1.0])], mean) == (0.5, 0.5)
    low, high = stratified_interval([np.array([0.0, 1.0]), np.array([10.0, 10.0])], mean) or (0.0, 0.0)
    assert (low, high) == (5.0, 5.5)


def test_the_bootstrap_interval_has_the_width_of_the_normal_one_where_that_holds() -> None:
    rng = np.random.default_rng(0)
    tasks = [rng.standard_normal(100) for _ in range(4)]
    low, high = stratified_interval(tasks, mean) or (0.0, 0.0)
    error = float(np.sqrt(np.mean([np.var(scores) for scores in tasks]) / 400))
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert low < mean(np.concatenate(tasks)) < high


def test_one_seed_for_each_task_has_no_interval() -> None:
    assert stratified_interval([np.array([0.0]), np.array([1.0])], mean) is None


def test_scores_are_averaged_in_the_window_that_ends_at_a_step() -> None:
    steps, scores = np.array([100.0, 200.0, 300.0, 400.0]), np.array([1.0, 2.0, 4.0, 8.0])
    assert windowed(steps, scores, 400, window=200) == 6.0  # (200, 400]: 200 itself is outside
    assert windowed(steps, scores, 399, window=200) == 3.0  # (199, 399]
    assert windowed(steps, scores, 350, window=0) == 4.0  # the last evaluation
    assert windowed(steps, scores, 900, window=100) == 8.0  # an empty window: the last one before
    assert windowed(steps, scores, 50, window=200) is None
