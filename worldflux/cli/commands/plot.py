"""`worldflux plot`: draws learning curves of runs, and the published scores of the papers."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from worldflux.cli import runs
from worldflux.cli.options import OF_IDS, Flag, counted
from worldflux.errors import ConfigurationError
from worldflux.files import checked_path, path_beside, writing

if TYPE_CHECKING:
    from worldflux.cli.curves import Curve, Run

_FREE = (
    "seed",
    "device",
    "processes",
    "compile",
    "checkpoint_interval",
    "steps",
    "eval_interval",
    "eval_episodes",
    "render",
    "track",
    "track_project",
)
"""Settings in which runs of one curve may differ, because learning does not depend on them."""
_OF_THE_TASK = (*OF_IDS, "env_kwargs")

_Directories = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(name="dirs", metavar="DIR ...", help_behavior_hint="")
]


def plot(
    directories: _Directories,
    *,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("learning_curves.png"),
    x: Literal["steps", "time"] = "steps",
    score: Literal["auto", "evaluation", "training"] = "auto",
    no_reference: Flag = False,
) -> int:
    """Draw learning curves of runs, with mean and interval over seeds.

    Args:
        directories: Directories of runs, or directories that contain runs, such as runs/.
        output: Image to write: .png, .pdf or .svg.
        x: Environment steps, or hours of training.
        score: Scores of evaluations, or of training episodes (sampled actions). auto: evaluations, if all have some.
        no_reference: Leave out the scores that the model's authors have published for the same task.

    Returns:
        0
    """
    if not directories:
        raise ConfigurationError("DIR is missing. Example: worldflux plot runs/CartPole-v1")
    checked_path("--output", output)
    if output.suffix.lower() not in (".png", ".pdf", ".svg") or not output.absolute().parent.is_dir():
        raise ConfigurationError(f"{output} cannot be written, expected a .png, .pdf or .svg in an existing directory.")
    from worldflux.cli.curves import draw

    found = _read(directories)
    kind = score if score != "auto" else "evaluation" if all(run.evaluation for run in found) else "training"
    with_scores = [run for run in found if run.scores(kind)]
    for run in found:
        if run not in with_scores:
            print(f"worldflux: {run.directory} has no {kind} scores yet", file=sys.stderr)
    if not with_scores:
        raise ConfigurationError(f"There are no {kind} scores yet in {counted(len(found), 'run')}. Nothing is drawn.")
    tasks = grouped(with_scores)
    with writing(output, ConfigurationError), path_beside(output) as beside:
        draw(tasks, x=x, kind=kind, reference=x == "steps" and not no_reference).savefig(beside, dpi=150)
        beside.replace(output)
    for task, curves in tasks.items():
        for curve in curves:
            last = [run.scores(kind)[-1][2] for run in curve.runs]
            shown = ", ".join(f"{score:.4g}" for score in last)
            plural = "" if len(last) == 1 else "s"
            print(f"{task}  {curve.label}: {len(last)} run{plural}, last {kind} score{plural} {shown}")
    print(output)
    return 0


def _read(directories: tuple[Path, ...]) -> list[Run]:
    """Reads all runs of agents in the directories."""
    from worldflux.cli.curves import read_run

    found: dict[tuple[Path, str], Run] = {}
    without: list[Path] = []
    for directory in directories:
        inside = list(runs.find_runs(directory))
        if not inside:
            raise ConfigurationError(no_run(directory))
        for entry in inside:
            run = read_run(entry)
            if run.config.kind != "train":
                without.append(entry)
            else:
                found |= {(entry.resolve(), part.part): part for part in run.parts()}
    if not found:
        raise ConfigurationError(
            f"There is no run of worldflux train among these directories: {without[0]} was trained without an "
            f"environment and has losses in place of scores. tensorboard --logdir {without[0] / runs.LOGS} shows them."
        )
    for entry in without:
        print(f"worldflux: {entry} was trained without an environment and has no scores", file=sys.stderr)
    return list(found.values())


def no_run(path: Path) -> str:
    """The error message for a path that is not the directory of a run."""
    run = runs.run_of(path)
    whole = "a directory that worldflux train has written" if run is None else f"the directory of the run: {run}"
    return f"There is no run in {path}. Pass {whole}."


def grouped(found: list[Run]) -> dict[str, list[Curve]]:
    """The runs by task, and within a task by all settings that affect learning. Labels name those that differ."""
    from worldflux.cli.curves import Curve

    by_task: dict[str, list[Run]] = defaultdict(list)
    for run in found:
        by_task[run.task].append(run)
    grouped = {}
    for task, of_task in by_task.items():
        curves: dict[tuple[str, ...], list[Run]] = defaultdict(list)
        for run in of_task:
            curves[_key(run)].append(run)
        heads = [members[0] for members in curves.values()]
        grouped[task] = [Curve(_label(members[0], heads), members) for members in curves.values()]
    return grouped


def _key(run: Run) -> tuple[str, ...]:
    settings = {name: value for name, value in run.config.settings.items() if name not in _FREE}
    return (run.config.model, repr(sorted(settings.items())))


def _label(run: Run, others: list[Run]) -> str:
    """The model, and the settings in which its runs differ from those of other curves."""
    same = [other for other in others if other.config.model == run.config.model]
    names = sorted({name for other in same for name in other.config.settings} - {*_FREE, *_OF_THE_TASK})
    parts = []
    for name in names:
        value = run.config.settings.get(name)
        if any(other.config.settings.get(name) != value for other in same):
            shown = " ".join(value or ()) if name == "set" else value
            parts.append(f"{name} {'default' if shown in (None, '') else shown}")
    return ", ".join([run.config.model, *parts])
