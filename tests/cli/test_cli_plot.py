"""`worldflux plot`: runs of a curve, their mean and interval, and published scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from worldflux.cli.commands.plot import grouped
from worldflux.cli.curves import Run, mean_and_interval, published, read_run
from worldflux.cli.main import main
from worldflux.cli.run_callbacks import run_logger
from worldflux.cli.runs import Evaluation, RunConfig, write_evaluations
from worldflux.envs.suites import ATARI_100K, DMC_DREAMERV3_PROPRIO, DMC_DREAMERV3_VISION, DMC_TASKS, DMC_TDMPC2
from worldflux.errors import install_hint


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of the last plots: `plots` by label, `bars` of published scores, and `bands`."""
    seen: dict[str, Any] = {"plots": {}, "bars": {}, "bands": []}
    plot, errorbar, fill = Axes.plot, Axes.errorbar, Axes.fill_between

    def spied_plot(self: Axes, *args: Any, **options: Any) -> Any:
        if options.get("label"):
            seen["plots"][" ".join(options["label"].split())] = args
        return plot(self, *args, **options)

    def spied_bar(self: Axes, x: Any, y: Any, yerr: Any = None, **options: Any) -> Any:
        seen["bars"][options["label"]] = (x, y, yerr)
        return errorbar(self, x, y, yerr, **options)

    def spied_fill(self: Axes, *args: Any, **options: Any) -> Any:
        seen["bands"].append(args)
        return fill(self, *args, **options)

    monkeypatch.setattr(Axes, "plot", spied_plot)
    monkeypatch.setattr(Axes, "errorbar", spied_bar)
    monkeypatch.setattr(Axes, "fill_between", spied_fill)
    return seen


def run(
    name: str,
    scores: dict[int, float],
    *,
    task: str = "CartPole-v1",
    model: str = "dreamerv3:tiny",
    seed: int = 0,
    frames: int = 1,
    **settings: Any,
) -> Path:
    directory = Path("runs", name)
    directory.mkdir(parents=True)
    RunConfig("train", model, task, {"seed": seed, **settings}, frames).write(directory)
    if scores:
        rows = [Evaluation(step, score, 0.0, 1.0, 1, step / 10, seed) for step, score in scores.items()]
        write_evaluations(directory / "evaluations.csv", rows)
    return directory


def log(directory: Path, name: str, rows: list[tuple[int, int, float]]) -> None:
    """Writes a part of the log: steps, seconds and mean returns."""
    (directory / "logs").mkdir(exist_ok=True)
    lines = ["rollout/ep_rew_mean,time/time_elapsed,time/total_timesteps"]
    lines += [f",,{step}" for step, _, _ in rows[:1]]  # of an evaluation
    lines += [f"{score},{seconds},{step}" for step, seconds, score in rows]
    (directory / "logs" / name).write_text("\n".join(lines) + "\n")


def test_mean_and_interval_are_those_of_the_runs() -> None:
    x = np.array([0.0, 10.0, 20.0])
    curves = [(x, np.array([0.0, 2.0, 4.0])), (x[:2], np.array([4.0, 6.0])), (x[1:], np.array([1.0, 1.0]))]
    grid, mean, interval = mean_and_interval(curves)
    np.testing.assert_array_equal(grid, [10.0])  # where all three are
    np.testing.assert_allclose(mean, [3.0])
    # Of the 27 equally likely draws of three from {1, 2, 6}, the lowest mean is 1 and the highest 6, each 1/27 likely.
    np.testing.assert_allclose(interval, [[1.0], [6.0]])


def test_values_between_evaluations_are_interpolated() -> None:
    grid, mean, _ = mean_and_interval(
        [(np.array([0.0, 20.0]), np.array([0.0, 20.0])), (np.array([0.0, 10.0, 20.0]), np.array([0.0, 0.0, 0.0]))]
    )
    np.testing.assert_array_equal(grid, [0, 10, 20])
    np.testing.assert_allclose(mean, [0, 5, 10])


def test_one_run_has_no_interval_and_disjoint_ones_no_mean() -> None:
    x, y = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    grid, mean, interval = mean_and_interval([(x, y)])
    np.testing.assert_array_equal((grid, mean), (x, y))
    assert np.isnan(interval).all() and interval.shape == (2, 2)
    grid, mean, interval = mean_and_interval([(x, y), (x + 5, y)])
    assert (len(grid), len(mean), interval.shape) == (0, 0, (2, 0))


def test_runs_of_one_curve_differ_in_seeds_only(capsys: pytest.CaptureFixture[str], drawn: dict[str, Any]) -> None:
    for seed in (0, 1):
        run(f"a{seed}", {10: 1.0, 20: 3.0 + seed}, seed=seed, steps=20 + seed, device=["cpu", "auto"][seed])
        run(f"b{seed}", {10: 1.0, 20: 9.0}, seed=seed, train_ratio=64.0, set=["units=8"])
    run("c", {10: 1.0}, model="tdmpc2:tiny")
    assert main(["plot", "runs", "-o", "curves.svg"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "curves.svg"
    assert lines == [
        "CartPole-v1  dreamerv3:tiny, set default, train_ratio default: 2 runs, last evaluation scores 3, 4",
        "CartPole-v1  dreamerv3:tiny, set units=8, train_ratio 64.0: 2 runs, last evaluation scores 9, 9",
        "CartPole-v1  tdmpc2:tiny: 1 run, last evaluation score 1",
    ]
    x, y = drawn["plots"]["dreamerv3:tiny, set default, train_ratio default (2 seeds)"]
    np.testing.assert_allclose((x, y), ([10, 20], [1.0, 3.5]))
    np.testing.assert_allclose(drawn["bands"][0], ([10, 20], [1, 3], [1, 4]))
    assert "tdmpc2:tiny (seed 0)" in drawn["plots"]
    assert Path("curves.svg").read_text().startswith("<?xml")


def test_pixels_and_action_repeat_make_another_task() -> None:
    names = ("plain", "pixels", "repeat")
    for name, settings in zip(names, ({}, {"pixels": True}, {"action_repeat": 4, "size": 32}), strict=True):
        run(name, {1: 1.0}, task="dmc/cup-catch", **settings)
    found = [read_run(Path("runs", name)) for name in names]
    tasks = grouped([each for each in found if each is not None])
    assert list(tasks) == ["dmc/cup-catch", "dmc/cup-catch pixels", "dmc/cup-catch size 32 action repeat 4"]


def test_hours_are_on_the_axis_on_request(drawn: dict[str, Any]) -> None:
    run("a", {3600: 1.0, 7200: 2.0})
    assert main(["plot", "runs/a", "--x", "time"]) == 0
    np.testing.assert_allclose(drawn["plots"]["dreamerv3:tiny (seed 0)"], ([0.1, 0.2], [1, 2]))
    assert Path("learning_curves.png").read_bytes()[1:4] == b"PNG"


def test_training_episodes_are_read_from_all_parts_of_the_log(drawn: dict[str, Any]) -> None:
    directory = run("a", {})
    log(directory, "progress.csv", [(10, 1, 1.0), (20, 2, 2.0), (30, 3, 3.0)])
    log(directory, "progress-2.csv", [])
    log(directory, "progress-3.csv", [(21, 1, 2.5), (40, 4, 4.0)])  # step 30 was lost, and made again
    log(directory, "progress-10.csv", [(50, 1, 5.0)])
    found = Run(directory, RunConfig.read(directory)).training
    assert found == [(10, 1, 1), (20, 2, 2), (21, 3, 2.5), (40, 6, 4), (50, 7, 5)]
    assert main(["plot", "runs"]) == 0  # there are no evaluations
    np.testing.assert_array_equal(drawn["plots"]["dreamerv3:tiny (seed 0)"][1], [1, 2, 2.5, 4, 5])


def test_published_scores_stand_beside_runs_of_their_task(drawn: dict[str, Any]) -> None:
    for seed in (0, 1):
        run(f"d{seed}", {50_000: 400.0, 100_000: 500.0}, task="dmc/walker-walk", seed=seed, frames=2)
    run("t", {50_000: 400.0}, task="dmc/walker-walk", model="tdmpc2:5m", frames=2)
    assert main(["plot", "runs"]) == 0
    labels = ["DreamerV3, published training episodes (5 runs)", "TD-MPC2, published evaluations (3 runs)"]
    assert list(drawn["bars"]) == labels
    steps, mean, (below, above) = drawn["bars"][labels[0]]
    np.testing.assert_array_equal(steps, [50_000, 125_000])  # 100k and 250k frames, two in a step; 500k lie beyond
    found = published("dreamerv3:size12m", "dmc/walker-walk")
    assert found is not None
    np.testing.assert_array_equal(mean, found.mean[:2])
    np.testing.assert_allclose((mean - below, mean + above), (found.low[:2], found.high[:2]))
    drawn["bars"].clear()
    run("short", {10_000: 400.0}, task="dmc/walker-run", model="tdmpc2:5m", frames=2)  # a fifth of 50k: still drawn
    run("dot", {9_999: 400.0}, task="dmc/walker-stand", model="tdmpc2:5m", frames=2)
    assert main(["plot", "runs/short", "runs/dot"]) == 0
    assert [len(bars[0]) for bars in drawn["bars"].values()] == [1]
    assert "TD-MPC2's published scores begin at 50000 steps" in drawn["plots"]
    drawn["bars"].clear()
    assert main(["plot", "runs", "--no-reference"]) == 0
    assert main(["plot", "runs", "--x", "time"]) == 0
    assert drawn["bars"] == {}


def test_published_scores_are_complete_and_name_their_sources() -> None:
    for task in DMC_DREAMERV3_PROPRIO:
        assert published("dreamerv3:tiny", f"dmc/{task}") is not None
    for task in DMC_DREAMERV3_VISION:
        assert published("dreamerv3", f"dmc/{task} pixels") is not None
    for game in ATARI_100K:
        assert published("dreamerv3:size200m", f"atari100k/{game}") is not None
    for task in DMC_TDMPC2:
        assert published("tdmpc2:5m", f"dmc/{task}") is not None
    assert published("tdmpc2:5m", "CartPole-v1") is None
    assert published("mine", "dmc/walker-walk") is None
    folder = Path(sys.modules["worldflux"].__file__ or "").parent / "reference"
    for path in folder.glob("*.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        assert "github.com" in data["source"] and data["license"].startswith("MIT")
        for task, rows in data["tasks"].items():
            name = task.removesuffix(" pixels").removeprefix("dmc/").removeprefix("atari100k/")
            assert name in DMC_TASKS or name in ATARI_100K
            frames, mean, low, high, runs = np.array(rows).T
            assert np.all(np.diff(frames) > 0) and np.all(low <= mean) and np.all(mean <= high) and np.all(runs >= 2)


def test_known_numbers_of_the_published_scores() -> None:
    found = published("dreamerv3", "dmc/acrobot-swingup"), published("dreamerv3", "dmc/acrobot-swingup pixels")
    found += (published("tdmpc2", "dmc/acrobot-swingup"), published("dreamerv3", "atari100k/alien"))
    first = [(each.frames[0], each.mean[0], each.low[0], each.high[0]) for each in found if each is not None]
    assert first == [
        (100_000, 57.6, 31.7, 81.5),
        (100_000, 35.8, 18.7, 61.5),
        (100_000, 179.1, 112.1, 275.1),
        (100_000, 258.1, 197.2, 342.9),
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["empty"], "There is no run in empty. Pass a directory that worldflux train has written."),
        (["runs/none"], "There are no training scores yet in 1 run. Nothing is drawn."),
        (["runs/some", "--score", "training"], "There are no training scores yet in 1 run. Nothing is drawn."),
        (["runs/offline"], "There is no run of worldflux train among these directories"),
        (["runs/some", "-o", "curves.txt"], "curves.txt cannot be written, expected a .png, .pdf or .svg"),
        (["runs/some", "-o", "nowhere/curves.png"], "nowhere/curves.png cannot be written"),
    ],
)
def test_what_cannot_be_drawn_is_said(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("some", {10: 1.0})
    run("none", {})
    Path("runs/offline").mkdir()
    RunConfig("train-offline", "dreamerv3:tiny", "a.npz", {}).write(Path("runs/offline"))
    assert main(["plot", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]


def test_links_that_lead_back_are_followed_once(capsys: pytest.CaptureFixture[str]) -> None:
    run("some", {10: 1.0})
    for name in ("a", "b"):
        Path("runs", name).symlink_to(".")
    assert main(["plot", "runs"]) == 0
    assert capsys.readouterr().out.startswith("CartPole-v1  dreamerv3:tiny: 1 run, last evaluation score 1\n")


def test_a_log_is_written_over_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "progress.json").symlink_to(tmp_path / "mine")
    (tmp_path / "logs" / "progress-2.csv").write_text("of before")
    logger = run_logger(tmp_path / "logs")
    logger.record("a", 1)
    logger.dump()
    logger.close()
    assert (tmp_path / "mine").read_text() == "precious"
    assert (tmp_path / "logs" / "progress-2.csv").read_text() == "of before"
    assert (tmp_path / "logs" / "progress-3.csv").read_text() == "a\n1\n"


def test_runs_without_scores_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    run("some", {10: 1.0})
    run("none", {})
    assert main(["plot", "runs", "--score", "evaluation"]) == 0
    out, err = capsys.readouterr()
    assert err == "worldflux: runs/none has no evaluation scores yet\n"
    assert out.startswith("CartPole-v1  dreamerv3:tiny: 1 run, last evaluation score 1\n")


def test_a_missing_matplotlib_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run("some", {10: 1.0})
    assert main(["plot", "runs"]) == 2
    hint = install_hint("plot")
    assert f"Learning curves need matplotlib. Install it with: {hint}." in capsys.readouterr().err
