"""The content of a report: facts, tables, and the sections with pictures."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from worldflux.cli import runs
from worldflux.cli.commands.train import TrainSettings
from worldflux.cli.commands.train_offline import OfflineSettings
from worldflux.cli.curves import SECONDS, STEP, Curve, Run
from worldflux.cli.options import places_in
from worldflux.cli.report import pictures
from worldflux.cli.report.page import Page, Section, Table
from worldflux.cli.report.pictures import best_run, labelled, unit_of
from worldflux.cli.runs import Evaluation, read_evaluations
from worldflux.errors import WorldFluxError
from worldflux.locks import LOCK_FILE, DirectoryLock

_FAMILIES = {"dreamer": "DreamerV3", "tdmpc2": "TD-MPC2"}


@dataclass(frozen=True)
class Options:
    """What a report contains."""

    film: bool = True
    """Film the agents."""
    imagination: bool = True
    """Compare the model's predictions with recorded episodes."""
    reference: bool = True
    """Draw published scores."""
    episodes: int = 1
    """Number of episodes in each film."""
    seed: int = 0
    """Seed of the films and of the windows."""


def build_page(directory: Path, task: str, curve: Curve, options: Options) -> Page:
    """Builds the report of runs that differ only in their seeds. Parts that cannot be made are named in it.

    Args:
        directory: Directory that the user has given.
        task: Name of the task.
        curve: The runs.
        options: What the report contains.
    """
    found = labelled(curve.runs)
    first = curve.runs[0]
    trained = first.config.kind == "train"
    sections = []

    def add(title: str, make: Callable[[Section], None]) -> None:
        section = Section(title)
        _try(section, make)
        sections.append(section)
        for text in section.missing:
            print(f"worldflux: {title}: not shown: {text}", file=sys.stderr)

    if trained:
        add("Learning curve", lambda s: pictures.learning_curve(s, curve, task, reference=options.reference))
        if options.film:
            add("Film", lambda s: _add_films(s, found, options))
    if options.imagination:
        best = best_run(found)
        add("Imagined and real", lambda s: pictures.imagination(s, found[best], best, seed=options.seed))
    add("Losses", lambda s: pictures.losses(s, curve.runs))
    if trained:
        add("Health", lambda s: pictures.health(s, curve.runs))
    add("Evaluations", lambda s: _add_evaluations(s, found))
    add("Settings", lambda s: s.tables.append(_settings(found)))
    add("Code and machine", lambda s: s.tables.append(_circumstances(found)))
    sections.append(_commands(directory, found))
    try:
        facts = _facts(found)
    except WorldFluxError:  # the sections name the file that is damaged
        facts = []
    model = first.config.model
    family = next((title for name, title in _FAMILIES.items() if model.lower().startswith(name)), None)
    what = model if family is None else f"{family} ({model})"
    places = [_short(place) if trained else Path(place).name for place in places_in(first.config.task)]
    where = ("" if trained else "data of ") + ", ".join(places)
    how = task.removeprefix(first.config.task).strip()
    where += f" ({how})" if how else ""
    return Page(
        title=f"{what} {'in' if trained else 'on'} {where}",
        subtitle=_subtitle(curve.runs),
        facts=facts,
        sections=sections,
        footer=f"Made {runs.now()} by worldflux report from {runs.shown(directory)}, a run of worldflux "
        f"{first.config.versions.get('worldflux', '?')}.",
    )


def _try(section: Section, make: Callable[[Section], None]) -> None:
    """Makes a part of the page. If that fails, the reason takes its place."""
    try:
        make(section)
    except Exception as error:  # code of environments may raise anything
        text = " ".join(str(error).split())
        section.missing.append(text if isinstance(error, WorldFluxError) else f"{type(error).__name__}: {text}")


def _add_films(section: Section, found: Mapping[str, Run], options: Options) -> None:
    """Adds a film for each run."""
    films = [(label, part) for label, run in found.items() for part in run.parts()]
    for label, run in films:

        def add(section: Section, label: str = label, run: Run = run) -> None:
            share = 1 / len(films)
            film = pictures.film(run, label, episodes=options.episodes, seed=options.seed, share=share)
            section.pictures.append(film)

        _try(section, add)


def _short(task: str) -> str:
    """The environment without the directories of a file: `/home/ann/coins.py:Coin` becomes `coins.py:Coin`."""
    before, colon, after = task.partition(".py:")
    return f"{Path(before).name}{colon}{after}" if colon else task


def _subtitle(found: Sequence[Run]) -> str:
    """State and times of the runs."""
    states = list(dict.fromkeys(_state(run) for run in found))
    started = min(run.config.started for run in found)
    return f"Started {started.rpartition(' ')[0] or started}; {'; '.join(states)}."


def _state(run: Run) -> str:
    """Whether a run has finished, is in progress, or was stopped."""
    settings, step = run.config.settings, runs.newest_step(run.directory)
    result = runs.AGENT_FILE if run.config.kind == "train" else runs.MODEL_DIRECTORY
    if step is not None and step >= (settings.get("steps") or 0) and runs.has_result(run.directory, result):
        return "finished"
    if (run.directory / LOCK_FILE).exists():
        lock = DirectoryLock(run.directory)
        try:
            if not lock.take():
                return "still in progress"
            lock.release()
        except OSError:
            pass
    return "stopped before its first checkpoint" if step is None else f"stopped at step {step:,}"


def _facts(found: Mapping[str, Run]) -> list[tuple[str, str, str]]:
    """The numbers at the top of the page."""
    facts = []
    several = len(found) > 1
    evaluations = {label: read_evaluations(run.directory / runs.EVALUATIONS_FILE) for label, run in found.items()}
    rows = [(row, label) for label, each in evaluations.items() for row in each]
    if rows:
        last = [each[-1].score for each in evaluations.values() if each]
        if several:
            spread = f", std {stdev(last):.3g}" if len(last) > 1 else ""
            facts.append(("Last score", _number(fmean(last)), f"mean of {len(last)} seeds{spread}"))
        else:
            facts.append(
                ("Last score", _number(last[0]), f"± {rows[-1][0].std:.3g} over {rows[-1][0].episodes} episodes")
            )
        best, label = max(rows, key=lambda pair: pair[0].score)
        facts.append(("Best score", _number(best.score), f"step {best.step:,}{f', {label}' if several else ''}"))
    else:
        held_out = [row["eval/loss"] for run in found.values() for row in run.log[-1:] if "eval/loss" in row]
        if held_out:
            facts.append(
                ("Held-out loss", _number(fmean(held_out)), f"mean of {len(held_out)} seeds" if several else "")
            )
    done = [
        max([int(row[STEP]) for row in run.log] + [row.step for row in evaluations[label]], default=0)
        for label, run in found.items()
    ]
    wanted = next(iter(found.values())).config.settings.get("steps") or 0
    unit = unit_of(next(iter(found.values())))
    steps = f"{min(done):,}" if min(done) == max(done) else f"{min(done):,} to {max(done):,}"
    facts.append(("Steps", steps, f"of {wanted:,} {unit}{' each' if several else ''}"))
    seconds = []
    for label, run in found.items():
        logged = [row.get(SECONDS, 0.0) for row in run.log]
        seconds.append(max(logged + [row.seconds for row in evaluations[label]], default=0.0))
    facts.append(("Training time", _duration(sum(seconds)), "all seeds" if several else ""))
    seeds = [str(run.seed) for run in found.values()]
    facts.append(("Seeds" if several else "Seed", ", ".join(seeds), ""))
    machines = [run.config.machine for run in found.values()]
    devices = [machine.get("device", "not known").partition(", ") for machine in machines]
    names = [name or machine.get("cpu", "") for (_, _, name), machine in zip(devices, machines, strict=True)]
    facts.append(("Device", _joined(place for place, _, _ in devices), _joined(name for name in names if name)))
    return facts


def _add_evaluations(section: Section, found: Mapping[str, Run]) -> None:
    """Adds the tables of all evaluations."""
    if next(iter(found.values())).config.kind != "train":
        _add_held_out(section, found)
        return
    rows = {label: read_evaluations(run.directory / runs.EVALUATIONS_FILE) for label, run in found.items()}
    rows = {label: each for label, each in rows.items() if each}
    if not rows:
        section.missing.append("There are no evaluations yet, or --eval-interval 0 has disabled them.")
    elif len(found) == 1:
        section.tables.append(_evaluation_table(next(iter(rows.values()))))
    else:
        section.tables.append(_score_table(rows))
        section.missing += [f"There are no evaluations of {label} yet." for label in found if label not in rows]


def _evaluation_table(rows: Sequence[Evaluation]) -> Table:
    best = max(range(len(rows)), key=lambda number: rows[number].score)
    head = ("Step", "Score", "Std", "Episode length", "Episodes", "Training time")
    cells = [
        (
            f"{row.step:,}",
            _number(row.score),
            f"{row.std:.3g}",
            _number(row.length),
            f"{row.episodes}",
            _duration(row.seconds),
        )
        for row in rows
    ]
    return Table("All evaluations; the best one is marked", head, cells, frozenset([best]))


def _score_table(rows: Mapping[str, Sequence[Evaluation]]) -> Table:
    """Scores at each step, with a column for each run."""
    by_step: dict[int, dict[str, Evaluation]] = {}
    for label, each in rows.items():
        for row in each:
            by_step.setdefault(row.step, {})[label] = row
    cells = []
    for step, at in sorted(by_step.items()):
        scores = [row.score for row in at.values()]
        shown = [f"{_number(at[label].score)} ± {at[label].std:.3g}" if label in at else "" for label in rows]
        spread = f" ± {stdev(scores):.3g}" if len(scores) > 1 else ""
        mean = f"{_number(fmean(scores))}{spread}" if len(scores) == len(rows) else ""
        cells.append((f"{step:,}", *shown, mean))
    title = "All evaluations: score ± standard deviation over the episodes; in the last column over the seeds"
    return Table(title, ("Step", *rows, "Mean"), cells)


def _add_held_out(section: Section, found: Mapping[str, Run]) -> None:
    """Adds the losses on held-out steps."""
    for label, run in found.items():
        rows = [row for row in run.log if "eval/loss" in row]
        names = sorted({name for row in rows for name in row if name.startswith("eval/")} - {"eval/loss"})
        if not rows:
            section.missing.append(f"There are no evaluations of {label} yet, or --eval-share 0 has disabled them.")
            continue
        names = ["eval/loss", *names]
        cells = [
            [f"{int(row[STEP]):,}", *(f"{row[name]:.4g}" if name in row else "" for name in names)] for row in rows
        ]
        title = f"Losses on held-out steps{f', {label}' if len(found) > 1 else ''}"
        section.tables.append(Table(title, ["Step", *(name.removeprefix("eval/") for name in names)], cells))


def _settings(found: Mapping[str, Run]) -> Table:
    """All settings; those that differ from the defaults are marked."""
    configs = [run.config for run in found.values()]
    cls: Any = TrainSettings if configs[0].kind == "train" else OfflineSettings
    defaults = {item.name: item.default for item in fields(cls)}
    rows = [("model", configs[0].model), ("environment" if cls is TrainSettings else "data", configs[0].task)]
    marked = {0, 1}
    for name, default in defaults.items():
        values = [config.settings.get(name) for config in configs]
        given = [tuple(value) if isinstance(value, list) else value for value in values]
        if any(value != default for value in given):
            marked.add(len(rows))
        rows.append((name, _joined(_value(value) for value in given)))
    return Table(
        "Settings; those that differ from the defaults are marked", ("Setting", "Value"), rows, frozenset(marked)
    )


def _value(value: object) -> str:
    """A setting in words."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "default", True: "yes", False: "no"}[value]
    return str(value)


def _circumstances(found: Mapping[str, Run]) -> Table:
    """Versions, commits and machine of the runs."""
    collected: dict[str, list[str]] = {}
    for run in found.values():
        config = run.config
        rows = {**config.versions, **{f"commit of {name}": commit for name, commit in config.commits.items()}}
        rows |= {**config.machine, "started": config.started}
        if "commit of worldflux" not in rows:
            rows["commit of worldflux"] = "not known"
        for name, value in rows.items():
            collected.setdefault(name, []).append(value)
        for part in config.resumed:
            text = f"step {part.get('step')}, {part.get('started')}, torch {part.get('versions', {}).get('torch', '?')}"
            collected.setdefault("resumed", []).append(text)
    rows_of_table = [(name, _joined(values)) for name, values in collected.items()]
    return Table("What the run was made with", ("Name", "Value"), rows_of_table)


def _commands(directory: Path, found: Mapping[str, Run]) -> Section:
    """The commands that made the runs, and those for more."""
    section, place = Section("Commands"), shlex.quote(str(runs.shown(directory)))
    for label, run in found.items():
        which = f", {label}" if len(found) > 1 else ""
        section.commands.append((f"This command starts the same run again{which}:", run.config.command.strip()))
    section.commands.append(
        (
            "This one also compares the scores, and says what differs in the code and the machine:",
            f"worldflux reproduce {place}",
        )
    )
    return section


def _joined(values: Any) -> str:
    """The different texts, in their order."""
    return "; ".join(dict.fromkeys(values))


def _number(value: float) -> str:
    """A number with four digits, or all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
