"""`worldflux reproduce`: runs a run again from what it wrote, and compares the scores."""

from __future__ import annotations

import hashlib
import shlex
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import IO, TYPE_CHECKING, Annotated, Any

import tyro

from worldflux.cli import runs
from worldflux.cli.commands.train import TrainSettings, train
from worldflux.cli.commands.train_offline import OfflineSettings, train_offline
from worldflux.cli.environments import find_environment, is_own_code
from worldflux.cli.options import Directory, Number, OptionalDeviceName, from_json, places_in, words_in
from worldflux.cli.provenance import circumstances, differences, installed_version
from worldflux.cli.runs import RunConfig
from worldflux.errors import ConfigurationError
from worldflux.files import checked_path

if TYPE_CHECKING:
    from worldflux.cli.curves import Run

_FREE = ("steps", "device")
"""Settings that the reproduced run may have differently."""


@dataclass(frozen=True)
class Comparison:
    """The scores of a run and of its reproduction."""

    name: str
    """Which scores are compared."""
    rows: Sequence[tuple[int, float, float]]
    """Step, score of the run and score of the reproduction, for the steps at which both have a score."""

    @property
    def largest(self) -> float:
        """Largest difference between the scores."""
        return max((abs(before - after) for _, before, after in self.rows), default=0.0)

    @property
    def is_identical(self) -> bool:
        """Whether all scores are equal. Two NaNs are equal."""
        return all(before == after or (before != before and after != after) for _, before, after in self.rows)


def reproduce(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    *,
    output: Directory = None,
    steps: Number = None,
    device: OptionalDeviceName = None,
) -> int:
    """Run a run again with what it wrote, and compare the scores.

    Args:
        run: Directory of a run, or of several runs, which are reproduced one after the other.
        output: Directory of the new run. Default: that of the run with -reproduced behind its name.
        steps: Reproduce only this many steps of each run. Default: all of them.
        device: Device to train on. Default: the setting of the run.

    Returns:
        1 if scores differ although the code, the versions and the machine are the same, the run is one of a CPU, and
        no agent was resumed or trained with --asynchronous; 130 after Ctrl-C and 143 after SIGTERM; otherwise 0.
    """
    from worldflux.cli.commands.plot import no_run
    from worldflux.cli.curves import Run

    directory = checked_path("RUN", run)
    target = checked_path("--output", output or Path(f"{directory}-reproduced"), directory=True)
    found = {place: target / place.relative_to(directory) for place in runs.find_runs(directory)}
    if not found:
        raise ConfigurationError(no_run(run))
    if target.is_relative_to(directory) or directory.is_relative_to(target):
        raise ConfigurationError(f"{target} and {directory} overlap. Choose another --output.")
    # All of them are checked before the first one trains for hours.
    configs = {place: RunConfig.read(place) for place in found}
    settings = {place: _settings(place, config, steps, device) for place, config in configs.items()}
    for place, config in configs.items():
        _check_task(place, config)
        _check_target(found[place], config, settings[place])
    compared, unexplained = [], False
    for place, again in found.items():
        config = configs[place]
        now = circumstances(config.task, settings[place].device)
        changes = _changes(config, now)
        known = "worldflux" in {**config.commits, **now["commits"]}
        _tell_changes(place, config, changes, is_code_known=known)
        status = _train(config, settings[place], again)
        if status:
            print(
                f"worldflux: continue with: worldflux reproduce {_words(run, output, steps, device)}", file=sys.stderr
            )
            return status
        written = RunConfig.read(again)
        comparisons = _compare(Run(place, config), Run(again, written))
        compared += comparisons
        then, here = (each.machine.get("threads") for each in (config, written))
        if then != here:
            changes["threads"] = (then, here)
            print(f"worldflux: torch used {then} threads then, and {here} now", file=sys.stderr)
        on_cpu = all(each.machine.get("device") == "cpu" for each in (config, written))
        # Environments cannot be continued in the middle of an episode.
        parts = [*config.resumed, *written.resumed]
        stopped = config.kind == "train" and any(part.get("step") for part in parts)
        beside = getattr(settings[place], "asynchronous", False)
        stopped_or_beside = _RESUMED if stopped else _BESIDE if beside else None
        reason = stopped_or_beside or (_CHANGED if changes or not on_cpu else None if known else _UNKNOWN_CODE)
        unexplained |= _tell(place, again, comparisons, reason)
    if len(found) > 1:
        _tell_mean(compared)
    return 1 if unexplained else 0


def _settings(place: Path, config: RunConfig, steps: int | None, device: str | None) -> Any:
    """The settings of a run, with the steps and the device that the user has chosen. Nothing is shown or tracked."""
    from worldflux.validation import whole_number

    cls: type[Any] = TrainSettings if config.kind == "train" else OfflineSettings
    settings = from_json(cls, config.settings, place / runs.CONFIG_FILE)
    if steps is not None and whole_number("steps", steps, 1) > (settings.steps or steps):
        raise ConfigurationError(f"--steps is {steps}, but {runs.shown(place)} has {settings.steps}. Choose fewer.")
    settings = replace(settings, steps=steps or settings.steps, device=device or settings.device, track=())
    return replace(settings, render=False) if isinstance(settings, TrainSettings) else settings


def _check_task(place: Path, config: RunConfig) -> None:
    """Raises a `ConfigurationError` if the data or the code of the environment are missing."""
    if config.kind != "train":
        for file in places_in(config.task):
            if not Path(file).exists():
                raise ConfigurationError(
                    f"The data of {runs.shown(place)} are gone: there is no file '{file}'. Put it back to reproduce "
                    "the run."
                )
    elif is_own_code(config.task):
        print(f"worldflux: importing {config.task}, which {runs.CONFIG_FILE} names", file=sys.stderr)
        try:
            for env in places_in(config.task):
                find_environment(env)
        except ConfigurationError as error:
            raise ConfigurationError(f"The environment of {runs.shown(place)} cannot be found. {error}") from error


def _check_target(again: Path, config: RunConfig, settings: Any) -> None:
    """Raises a `ConfigurationError` if the directory is taken, unless it is an earlier part of this reproduction."""
    if not runs.is_run(again):
        runs.check_free(again)
        return
    other = RunConfig.read(again)
    theirs = from_json(type(settings), other.settings, again / runs.CONFIG_FILE)
    same = {name: getattr(settings, name) for name in _FREE}
    if (other.kind, other.model, other.task) != (config.kind, config.model, config.task) or (
        replace(theirs, **same) != settings
    ):
        raise ConfigurationError(f"{runs.shown(again)} has a run with other settings. Choose another --output.")


def _changes(config: RunConfig, now: Mapping[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """What differs between then and now, for the run and for each time that it was resumed.

    The number of threads is left out, which depends on the model.
    """
    parts = [{"versions": config.versions, "commits": config.commits, "machine": config.machine}, *config.resumed]
    # Packages of the environment, which has not been made yet.
    missing = {name for part in parts for name in part["versions"] if name not in now["versions"]}
    installed = {name: version for name in missing if (version := installed_version(name)) is not None}
    now = {**now, "versions": {**now["versions"], **installed}}
    found: dict[str, tuple[str | None, str | None]] = {}
    for part in parts:
        found = {**differences(part, now), **found}
    found.pop("threads", None)
    return found


def _tell_changes(
    place: Path, config: RunConfig, changes: Mapping[str, tuple[str | None, str | None]], *, is_code_known: bool
) -> None:
    """Prints what differs, as a warning.

    Args:
        place: Directory of the run.
        config: Settings of the run.
        changes: What differs between then and now.
        is_code_known: Whether the commit of worldflux was known then, or is known now.
    """
    shown = runs.shown(place)
    if config.resumed:
        steps = ", ".join(str(part.get("step")) for part in config.resumed)
        print(f"worldflux: {shown} was resumed at step {steps}; it is reproduced without a stop", file=sys.stderr)
    if not is_code_known:
        print(f"worldflux: {shown}: {_NO_COMMIT}", file=sys.stderr)
    if not changes:
        what = "the code, the versions" if is_code_known else "the versions"
        print(f"worldflux: {shown}: {what} and the machine are the same", file=sys.stderr)
        return
    print(f"worldflux: {shown} was made with other code or on another machine; scores may differ", file=sys.stderr)
    rows = [("", "then", "now")]
    rows += [(name, before or "not known", after or "not known") for name, (before, after) in changes.items()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, before, after in rows:
        print(f"  {name:<{widths[0]}}  {before:<{widths[1]}}  {after}", file=sys.stderr)


def _train(config: RunConfig, settings: Any, again: Path) -> int:
    """Trains the run again, or resumes an earlier attempt. Returns the exit status."""
    command: Any = train if config.kind == "train" else train_offline
    if runs.is_run(again):
        defaults = type(settings)()
        chosen = replace(defaults, **{name: getattr(settings, name) for name in _FREE})
        return int(command(resume=again, settings=chosen))
    return int(command(config.model, tuple(words_in(config.task)), run=again, settings=settings))


def _compare(*both: Run) -> list[Comparison]:
    """Compares the evaluations of two runs, or what was logged while training if there are none."""
    names = ("score of the evaluations", "held-out loss", "mean return of the training episodes", "training loss")
    for name, (before, after) in zip(names, zip(*map(_scores, both), strict=True), strict=True):
        steps = sorted(before.keys() & after.keys())
        if steps:
            return [Comparison(name, [(step, before[step], after[step]) for step in steps])]
    return []


def _scores(run: Run) -> list[dict[int, float]]:
    """The scores of a run by their steps, from the most to the least meaningful."""
    from worldflux.cli.curves import STEP

    found = [{int(step): score for step, _, score in run.evaluation}]
    for key in ("eval/loss", "rollout/ep_rew_mean", "train/loss"):
        found.append({int(row[STEP]): row[key] for row in run.log if key in row})
    return found


def _tell(place: Path, again: Path, comparisons: Sequence[Comparison], reason: str | None) -> bool:
    """Prints the comparison.

    Args:
        place: Directory of the run.
        again: Directory of its reproduction.
        comparisons: Their scores.
        reason: Why scores may differ; None if they should not.

    Returns:
        Whether scores differ although they should not.
    """
    print(f"{runs.shown(place)} and {runs.shown(again)}")
    if not comparisons:
        print("  nothing to compare: they have no scores at the same steps")
        return False
    for comparison in comparisons:
        print(f"  {'step':>9}  {'then':>12}  {'now':>12}  {comparison.name}")
        for step, before, after in comparison.rows:
            same = "identical" if before == after else f"differs by {abs(before - after):.4g}"
            print(f"  {step:>9}  {before:>12.6g}  {after:>12.6g}  {same}")
    weights = _same_weights(place, again)
    if all(comparison.is_identical for comparison in comparisons) and weights is not False:
        print(f"  identical at all steps{'' if weights is None else ', and so are the weights at the end'}")
        return False
    largest = max(comparison.largest for comparison in comparisons)
    compared = "" if weights is None else f"; the weights at the end {'are identical' if weights else 'differ'}"
    print(f"  the largest difference is {largest:.4g}{compared}, {reason or _UNEXPLAINED}")
    return reason is None


def _same_weights(place: Path, again: Path) -> bool | None:
    """Whether both runs ended with the same weights; None if one has not ended, or they have different lengths."""
    if runs.newest_step(place) != runs.newest_step(again):
        return None
    both = [_weights(place), _weights(again)]
    return None if None in both else both[0] == both[1]


def _weights(run: Path) -> bytes | None:
    """A digest of the weights at the end of a run; None if it has not ended."""
    name = "model.safetensors"
    agent, model = run / runs.AGENT_FILE, run / runs.MODEL_DIRECTORY / name
    try:
        if agent.is_file():
            with zipfile.ZipFile(agent) as archive, archive.open(name) as file:
                return _digest(file)
        with model.open("rb") as file:
            return _digest(file)
    except (OSError, KeyError, zipfile.BadZipFile):
        return None


def _digest(file: IO[bytes]) -> bytes:
    digest = hashlib.sha256()
    while part := file.read(1 << 20):
        digest.update(part)
    return digest.digest()


_NO_COMMIT = (
    "the commit of worldflux is not known, because it was not installed from a repository, so that the code cannot be "
    "compared"
)
_UNEXPLAINED = "although the code, the versions and the machine are the same"
_CHANGED = "which may come from what has changed, or from a GPU, whose results vary"
_UNKNOWN_CODE = "which may come from the code, whose commit is not known"
_RESUMED = "which may come from a stop: a resumed run begins new episodes"
_BESIDE = "which may come from --asynchronous: the speed of the machine decides on the weights that choose an action"


def _tell_mean(compared: Sequence[Comparison]) -> None:
    """Prints the mean of the last scores over the seeds."""
    last = [comparison.rows[-1] for comparison in compared]
    if last:
        before, after = fmean(row[1] for row in last), fmean(row[2] for row in last)
        print(f"mean of the last scores of {len(last)} runs: {before:.6g} then, {after:.6g} now")


def _words(run: Path, output: Path | None, steps: int | None, device: str | None) -> str:
    """The arguments of the command, quoted for a shell."""
    given = {"--output": output, "--steps": steps, "--device": device}
    return shlex.join([str(run), *(str(word) for pair in given.items() if pair[1] is not None for word in pair)])
