"""Reports: published curves at the runs' own steps, and what is said of both."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report
from protocols import DMC, PROTOCOLS
from published_curves import PublishedCurves, published
from report_data import Acceptance, aggregate, read_experiments
from run_files import RunRecord, RunSettings, run_directory
from score_files import Score, write_scores
from suite_statistics import iqm, mean

from worldflux.envs.suites import dmc_name
from worldflux.errors import CheckpointError, ConfigurationError

Rows = list[tuple[int, float]]


def make_run(
    out: Path,
    task: str,
    seed: int,
    rows: Rows,
    *,
    protocol: str = "tdmpc2_dmc_proprio",
    end: int | None = None,
    finished: bool = True,
) -> Path:
    """Files as a run leaves them."""
    repeat = PROTOCOLS[protocol].action_repeat
    settings = RunSettings(
        protocol, f"{PROTOCOLS[protocol].family}:tiny", task, seed, rows[-1][0], 1, repeat, {}, 100_000, 10
    )
    part = {"started": "now", "commit": "abc", "machine": "CPU", "from_step": 0, "to_step": 1, "seconds": 7200.0}
    result: dict[str, Any] = {"step": end or rows[-1][0], "gradient_steps": 5, "scores": len(rows), "ended": "now"}
    directory = run_directory(out, task, seed)
    directory.mkdir(parents=True)
    RunRecord(settings, {"worldflux": "0", "torch": "2"}, [part], result if finished else None).write(directory)
    write_scores(directory / "scores.csv", [Score(step, score, seed) for step, score in rows])
    return directory


def row_of(text: str, task: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {task} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("family", ["dreamerv3", "tdmpc2"])
def test_published_runs_give_the_packaged_numbers(family: str) -> None:
    """Both were extracted from the authors' files, by programs of their own."""
    table = json.loads(resources.files("worldflux").joinpath(f"reference/{family}.json").read_text(encoding="utf-8"))
    compared = 0
    for name, rows in table["tasks"].items():
        suite, _, task = name.removesuffix(" pixels").partition("/")
        kind = "atari100k" if suite == "atari100k" else "dmc_vision" if name.endswith(" pixels") else "dmc_proprio"
        curves = published(f"{family}_{kind}", task)
        assert curves is not None
        for frames, mean_score, low, high, runs in rows:
            found = curves.at(frames)
            assert found is not None and len(found) == runs, (name, frames)
            assert (found.mean(), found.min(), found.max()) == pytest.approx((mean_score, low, high), abs=0.11)
            compared += 1
    assert compared > 200


def test_every_task_of_every_suite_has_published_curves_up_to_its_budget() -> None:
    for protocol in PROTOCOLS.values():
        for task in protocol.tasks:
            curves = published(protocol.name, task)
            assert curves is not None and curves.at(curves.steps[-1]) is not None
            if not task.startswith(("dog-", "humanoid-")):
                assert curves.steps[-1] == protocol.steps or task == "cartpole-swingup-sparse", (protocol.name, task)


def test_published_scores_are_of_the_same_step_or_none() -> None:
    evaluations = PublishedCurves(np.array([0.0, 1000, 2000]), np.array([[1.0, 5, 9], [3, np.nan, 11]]), 0, "")
    assert evaluations.at(2000).tolist() == [9, 11]
    assert evaluations.at(1004).tolist() == [5]  # a step of several environments; one run has no number there
    assert evaluations.at(1100) is None and evaluations.at(500) is None and evaluations.at(2100) is None
    assert evaluations.at(0).tolist() == [1, 3]


def test_published_means_over_windows_that_overlap_are_interpolated() -> None:
    windows = PublishedCurves(np.array([1000.0, 2000, 5000]), np.array([[1.0, 5, 9]]), 2500, "")
    assert windows.at(1500).tolist() == [3]
    assert windows.at(3000) is None  # further apart than the window
    assert windows.at(900) is None  # before the first


def test_a_row_compares_with_the_published_score_at_its_own_last_step(tmp_path: Path) -> None:
    for seed, last in enumerate((700.0, 800.0, 900.0)):
        make_run(tmp_path, "walker-stand", seed, [(0, 10.0), (100_000, 500.0 + seed), (200_000, last)])
    assert report.write([tmp_path], tmp_path / "report.md", None) == 0
    curves = published("tdmpc2_dmc_proprio", "walker-stand")
    assert curves is not None
    theirs = curves.at(200_000)
    assert theirs is not None and f"{theirs.mean():.1f}" == "977.7"
    text = (tmp_path / "report.md").read_text()
    cells = row_of(text, "walker-stand")
    assert cells[:4] == ["walker-stand", "200,000", "3", "800.0"]
    assert cells[4] == "551.6 to 1,048"  # 800 ± 4.303 * 100 / sqrt(3)
    assert cells[5:8] == ["977.7", "965.5, 987.4 (3)", "0.82"]
    least = 0.8 * (theirs.mean() - theirs.std(ddof=1))
    assert cells[8:] == [f"{least:.1f} ✓", "2"]
    assert "github.com/nicklashansen/tdmpc2" in text
    assert "| IQM | 0.800 | 0.700 to 0.900 | 0.978 |" in text


def test_between_the_published_steps_of_evaluations_nothing_is_compared(tmp_path: Path) -> None:
    make_run(tmp_path, "walker-stand", 0, [(0, 10.0), (60_000, 500.0)])
    assert report.write([tmp_path], tmp_path / "report.md", None) == 0
    text = (tmp_path / "report.md").read_text()
    assert row_of(text, "walker-stand")[1:9] == ["60,000", "1", "500.0", *"–––––"]
    assert "nothing to compare" in text


def test_training_episodes_are_averaged_as_the_published_ones_are(tmp_path: Path) -> None:
    rows = [(step, float(step)) for step in range(1000, 30_001, 1000)]
    make_run(tmp_path, "walker-stand", 0, rows, protocol="dreamerv3_dmc_proprio", end=30_000)
    task = read_experiments([tmp_path])[0].tasks[0]
    assert task.step == 30_000
    assert task.scores.tolist() == [np.mean(range(6000, 30_001, 1000))]  # (5000, 30000]
    curves = published("dreamerv3_dmc_proprio", "walker-stand")
    assert curves is not None and task.published is not None
    assert task.published.tolist() == curves.runs[:, curves.steps == 30_000][:, 0].tolist()


def test_seeds_are_compared_at_the_step_that_all_have_reached(tmp_path: Path) -> None:
    make_run(tmp_path, "walker-stand", 0, [(0, 1.0), (100_000, 50.0), (200_000, 60.0)], finished=False)
    make_run(tmp_path, "walker-stand", 1, [(0, 1.0), (100_000, 70.0)], finished=False)
    task = read_experiments([tmp_path])[0].tasks[0]
    assert (task.step, task.scores.tolist(), task.finished) == (100_000, [50.0, 70.0], False)
    assert report.write([tmp_path], tmp_path / "report.md", None) == 0  # an unfinished run fails nothing
    assert row_of((tmp_path / "report.md").read_text(), "walker-stand")[2] == "2, unfinished"


def test_unfinished_seeds_wait_beside_finished_ones(tmp_path: Path) -> None:
    make_run(tmp_path, "walker-stand", 0, [(0, 1.0), (200_000, 60.0)])
    make_run(tmp_path, "walker-stand", 1, [(0, 1.0)], finished=False)
    task = read_experiments([tmp_path])[0].tasks[0]
    assert (task.step, task.scores.tolist(), len(task.waiting)) == (200_000, [60.0], 1)


def test_a_run_without_scores_yet_stands_in_the_report(tmp_path: Path) -> None:
    directory = make_run(tmp_path, "cup-catch", 0, [(1000, 1.0)], protocol="dreamerv3_dmc_proprio", finished=False)
    (directory / "scores.csv").unlink()
    assert report.write([tmp_path], tmp_path / "report.md", tmp_path / "report.png") == 0
    assert row_of((tmp_path / "report.md").read_text(), "cup-catch")[1:5] == ["0", "0, unfinished", "–", "–"]


def test_a_finished_task_below_its_accepted_score_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "walker-stand", 0, [(0, 1.0), (200_000, 700.0)])
    output = tmp_path / "report.md"
    assert report.write([tmp_path], output, None) == 1
    assert "walker-stand is below its accepted score at step 200,000" in capsys.readouterr().err
    assert row_of(output.read_text(), "walker-stand")[8].endswith("✗")
    assert report.write([tmp_path], output, None, accept=Acceptance(share=0.5)) == 0
    assert report.write([tmp_path], output, None, only={"cup-catch"}) == 0
    assert report.main([str(tmp_path), "--output", str(output), "--accept", "walker_stand=690"]) == 0
    assert report.main([str(tmp_path), "--output", str(output), "--accept", "0.5", "walker_stand=710"]) == 1


def test_what_is_accepted_is_understood_or_refused() -> None:
    assert Acceptance.parse([], dmc_name) == Acceptance(0.8, {})
    assert Acceptance.parse(["0.5", "walker_walk=300"], dmc_name) == Acceptance(0.5, {"walker-walk": 300.0})
    for text in ("most", "walker-walk=", "=3", "nan"):
        with pytest.raises(ConfigurationError, match="--accept"):
            Acceptance.parse([text], dmc_name)


def test_shares_of_games_count_from_the_score_of_random_actions(tmp_path: Path) -> None:
    make_run(tmp_path, "pong", 0, [(400_000, -13.0)], protocol="dreamerv3_atari100k")
    task = read_experiments([tmp_path])[0].tasks[0]
    theirs = task.published
    assert theirs is not None and theirs.mean() == pytest.approx(-4.2, abs=0.1)
    expected = -20.7 + 0.8 * (theirs.mean() - theirs.std(ddof=1) + 20.7)
    assert Acceptance().least(task) == pytest.approx(expected)
    assert task.normalised(task.scores).tolist() == pytest.approx([(-13 + 20.7) / (14.6 + 20.7)])
    report.write([tmp_path], tmp_path / "report.md", None)
    assert row_of((tmp_path / "report.md").read_text(), "pong")[7] == f"{7.7 / (theirs.mean() + 20.7):.2f}"


def test_a_suite_is_summed_up_over_tasks_and_seeds_beside_the_published_runs(tmp_path: Path) -> None:
    for task, scores in {
        "walker-stand": (900.0, 1000.0),
        "cup-catch": (100.0, 200.0),
        "fish-swim": (0.0, 300.0),
    }.items():
        for seed, score in enumerate(scores):
            make_run(tmp_path, task, seed, [(0, 0.0), (300_000, score)])
    make_run(tmp_path, "cheetah-run", 0, [(0, 0.0), (333_000, 999.0)])  # nothing to compare at that step
    tasks = [task for task in read_experiments([tmp_path])[0].tasks if task.published is not None]
    found = aggregate(tasks, iqm)
    assert found.ours == pytest.approx(np.mean([0.1, 0.2, 0.3, 0.9]))
    theirs = np.sort(np.concatenate([published("tdmpc2_dmc_proprio", task.name).at(300_000) for task in tasks]))
    assert found.published == pytest.approx(theirs[2:7].mean() / 1000)
    assert found.interval is not None and found.interval[0] < found.ours < found.interval[1]
    assert aggregate(tasks, mean).ours == pytest.approx(2500 / 6000)
    report.write([tmp_path], tmp_path / "report.md", None)
    text = (tmp_path / "report.md").read_text()
    assert "All 3 tasks above" in text and f"| IQM | {found.ours:.3f} |" in text


def test_several_directories_make_several_sections_and_one_picture(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "walker-stand", 0, [(0, 1.0), (200_000, 970.0)])
    make_run(tmp_path / "b", "walker-stand", 0, [(0, 1.0)], finished=False)
    rows = [(1000 * k, float(k)) for k in range(1, 41)]
    make_run(tmp_path / "b" / "more", "walker-walk", 0, rows, protocol="dreamerv3_dmc_proprio")
    output, plot = tmp_path / "report.md", tmp_path / "curves.png"
    assert report.main([str(tmp_path), "--output", str(output), "--plot", str(plot), "--accept", "0"]) == 0
    text = output.read_text()
    assert text.count("\n## ") == 3 and "![Learning curves](curves.png)" in text
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_damaged_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make_run(tmp_path, "walker-stand", 0, [(0, 1.0), (200_000, 970.0)])
    path = directory / "scores.csv"
    whole = path.read_text()
    path.write_text(whole.replace("970", "9x0"))
    assert report.main([str(tmp_path), "--output", str(tmp_path / "report.md")]) == 2
    assert "line 3 is '200000,9x0,0'" in capsys.readouterr().err
    path.write_text("".join(whole.splitlines(keepends=True)[:2]))  # a line is gone
    with pytest.raises(CheckpointError, match="has 1 scores, but the finished run had 2"):
        read_experiments([tmp_path])
    path.write_text(whole.replace(",0\n", ",4\n"))
    with pytest.raises(CheckpointError, match="other seeds than 0"):
        read_experiments([tmp_path])


def test_a_directory_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="There is no run in"):
        read_experiments([tmp_path])


def test_suites_are_those_of_the_command_lines() -> None:
    assert {protocol.family for protocol in DMC["proprio"]} == {"dreamerv3", "tdmpc2"}
