"""Creates a table and a plot of benchmark runs, with the published curves at the same steps.

    python benchmarks/report.py results/dmc results/dmc-tdmpc2 --output report.md --plot report.png

Runs may be unfinished. docs/benchmarks.md explains the columns. The exit code is 1 if a finished task is below its
accepted score.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from published_curves import source
from report_data import STATISTICS, Acceptance, Experiment, Task, aggregate, read_experiments
from run_files import settings_in_words
from suite_statistics import t_interval

from worldflux.envs.suites import ATARI_57, atari_name, dmc_name
from worldflux.errors import MissingDependencyError, WorldFluxError
from worldflux.files import write_atomically

_HEAD = (
    "| task | step | seeds | score | 95 % | published | lowest, highest (runs) | ratio | accepted from | hours |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)
_NONE = "–"


def write(
    directories: Sequence[Path],
    output: Path,
    plot: Path | None,
    *,
    accept: Acceptance | None = None,
    only: Collection[str] | None = None,
) -> int:
    """Writes and prints a report.

    Args:
        directories: Directories that contain runs.
        output: Markdown file.
        plot: File for the plot, or None for no plot.
        accept: Rule for accepted scores.
        only: Tasks whose scores determine the result. All by default.

    Returns:
        1 if a finished task is below its accepted score, else 0.

    Raises:
        WorldFluxError: If there are no runs, or a file is damaged.
    """
    accept = accept or Acceptance()
    experiments = read_experiments(directories)
    text = "\n".join(["# Benchmark report", "", *(line for each in experiments for line in _section(each, accept))])
    drawn = False
    if plot is not None:
        try:
            from report_plot import draw

            draw(experiments, plot)
            drawn = True
        except MissingDependencyError as error:
            print(f"report: no plot: {error}", file=sys.stderr)
    if drawn and plot is not None and plot.parent == output.parent:
        text += f"\n![Learning curves]({plot.name})\n"
    write_atomically(output, text.encode())
    print(text)
    failed = [
        task
        for each in experiments
        for task in each.tasks
        if (only is None or task.name in only) and task.finished and _failed(task, accept)
    ]
    for task in failed:
        print(f"{task.name} is below its accepted score at step {task.step:,.0f}.", file=sys.stderr)
    return int(bool(failed))


def _failed(task: Task, accept: Acceptance) -> bool:
    least = accept.least(task)
    return least is not None and (not len(task.scores) or float(task.scores.mean()) < least)


def _section(experiment: Experiment, accept: Acceptance) -> list[str]:
    """The section of one benchmark."""
    protocol, record = experiment.protocol, experiment.settings
    settings = record.settings
    what = "evaluations with deterministic actions"
    if protocol.score == "training":
        what = f"training episodes with sampled actions in the last {protocol.window:,} steps"
    commits = sorted({part["commit"] for task in experiment.tasks for run in task.runs for part in run.record.parts})
    machines = sorted({part["machine"] for task in experiment.tasks for run in task.runs for part in run.record.parts})
    lines = [
        f"## {settings.model}, {protocol.title}",
        "",
        f"`{experiment.directory}`. Score: mean return of {what}. "
        f"Steps are those of the simulator, {settings.action_repeat} per action. "
        f"{settings.envs} environment{'s' if settings.envs > 1 else ''} in parallel "
        f"(published: {protocol.envs}). worldflux {record.versions['worldflux']}, commit {', '.join(commits)}, torch "
        f"{record.versions['torch']}, on {'; '.join(machines)}.",
        "",
        *_overrides(experiment),
        "",
        *_HEAD,
        *(_row(task, accept) for task in experiment.tasks),
        "",
        *_aggregates(experiment),
        f"Published: {source(protocol.name)}.",
        "",
    ]
    return lines


def _overrides(experiment: Experiment) -> list[str]:
    """The settings of the tasks, which may differ."""
    by_words: dict[str, list[str]] = {}
    for task in experiment.tasks:
        settings = task.runs[0].record.settings
        words = settings_in_words({**settings.agent, **settings.model_fields})
        by_words.setdefault(words, []).append(task.name)
    if len(by_words) == 1:
        return [f"Settings: {next(iter(by_words))}."]
    return [f"Settings of {', '.join(tasks)}: {words}.  " for words, tasks in by_words.items()]


def _row(task: Task, accept: Acceptance) -> str:
    """The table row of one task."""
    theirs, least = task.published, accept.least(task)
    interval = t_interval(task.scores.tolist())
    mean = float(task.scores.mean()) if len(task.scores) else None
    seeds = str(len(task.scores)) if task.finished else f"{len(task.scores)}, unfinished"
    if task.waiting:
        seeds += f" (and {len(task.waiting)} unfinished)"
    ratio = None
    if theirs is not None and mean is not None:
        low = task.protocol.anchors(task.name)[0]
        ratio = (mean - low) / (float(theirs.mean()) - low) if theirs.mean() - low > 1e-6 else None
    hours = sum(run.record.seconds for run in task.runs) / 3600 / len(task.runs)
    verdict = _NONE if least is None else _number(least)
    if least is not None and task.finished:
        verdict += " ✗" if _failed(task, accept) else " ✓"
    cells = [
        task.name,
        f"{task.step:,.0f}",
        seeds,
        _NONE if mean is None else _number(mean),
        _NONE if interval is None else f"{_number(interval[0])} to {_number(interval[1])}",
        _NONE if theirs is None else _number(float(theirs.mean())),
        _NONE if theirs is None else f"{_number(theirs.min())}, {_number(theirs.max())} ({len(theirs)})",
        _NONE if ratio is None else f"{ratio:.2f}",
        verdict,
        f"{hours:.2g}",
    ]
    return f"| {' | '.join(cells)} |"


def _aggregates(experiment: Experiment) -> list[str]:
    """The aggregates over the tasks that have published scores."""
    tasks = [task for task in experiment.tasks if len(task.scores) and task.published is not None]
    if not tasks:
        return ["No score was published for these steps, so there is nothing to compare.", ""]
    human = experiment.protocol.environment != "dmc/"
    scale = "0 is the score of random actions, 1 a human's" if human else "return / 1000"
    lines = [
        f"All {len(tasks)} tasks above that have a published score, normalised ({scale}):",
        "",
        "| | worldflux | 95 % | published | 95 % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, statistic in STATISTICS.items():
        found = aggregate(tasks, statistic)
        spans = [
            _NONE if span is None else f"{span[0]:.3f} to {span[1]:.3f}"
            for span in (found.interval, found.published_interval)
        ]
        lines.append(f"| {name} | {found.ours:.3f} | {spans[0]} | {found.published:.3f} | {spans[1]} |")
    return [*lines, ""]


def _number(value: float) -> str:
    return f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def _any_task_name(name: str) -> str:
    """The name of a task of either suite in worldflux."""
    return atari_name(name) if atari_name(name) in ATARI_57 else dmc_name(name)


def main(argv: Sequence[str]) -> int:
    """Entry point of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="--out of dmc.py or atari.py")
    parser.add_argument("--output", type=Path, default=Path("report.md"), help="default: report.md")
    parser.add_argument("--plot", type=Path, help="file for the plot: .png, .pdf or .svg")
    parser.add_argument("--accept", nargs="+", default=[], metavar="SHARE | TASK=SCORE", help="as in dmc.py")
    options = parser.parse_args(argv)
    try:
        accept = Acceptance.parse(options.accept, _any_task_name)
        return write(options.directories, options.output, options.plot, accept=accept)
    except WorldFluxError as error:
        print(f"benchmarks/report.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
