"""The life cycle of a run, whatever it trains: it starts or is resumed, then finishes or is stopped early."""

from __future__ import annotations

import os
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from worldflux.cli import runs
from worldflux.cli.config_file import write_settings
from worldflux.cli.options import as_arguments, changed, counted, from_json, option, words_in
from worldflux.cli.provenance import circumstances
from worldflux.cli.runs import RunConfig
from worldflux.cli.tracked import RunTracking
from worldflux.errors import ConfigurationError, WorldFluxError
from worldflux.files import checked_path
from worldflux.locks import using
from worldflux.validation import whole_number

if TYPE_CHECKING:
    from stable_baselines3.common.logger import KVWriter

    from worldflux.models.base import WorldModel

CHANGEABLE = ("steps", "device", "render")
"""Settings that may be changed when a run is resumed."""


class Work(ABC):
    """What a run does. Creating it builds and checks everything that the training needs; nothing is written yet.

    Args:
        model: MODEL of the command line.
        task: Environment or data file of the run; several are in the form of `joined_tasks`.
        settings: Options of the command, with numbers in place of defaults that depend on other options.
        run: Directory of the run that is resumed; None for a new run.
        resources: What has to be closed at the end of the run is registered here.
    """

    command: ClassVar[str]
    """Name of the command."""
    argument: ClassVar[str]
    """Name of the command line argument for the task: ENV or DATA."""
    example: ClassVar[str]
    """Arguments of an example command."""
    settings_type: ClassVar[type[Any]]
    """Dataclass of the command's options."""
    next_commands: ClassVar[tuple[str, ...]]
    """Commands for a finished run, without `worldflux`, in which `{run}` stands for its directory."""
    next_for_several: ClassVar[tuple[str, ...]] = ()
    """Commands for several finished runs, in which `{run}` stands for all of their directories."""
    next_for_parent: ClassVar[tuple[str, ...]] = ()
    """Commands for several finished runs, in which `{run}` stands for a directory with these runs and no others."""
    score_name: ClassVar[str]
    """Name of the score in the summary of several seeds."""
    result: ClassVar[str]
    """Name of the entry in the run's directory that is written when the run has finished."""

    title: str
    """Name of the task in the path of a new run."""
    task: str
    """The task, named so that it can be found from every working directory."""
    model: WorldModel
    """The model that is trained."""
    frames_per_step: int = 1
    """Frames of the environment in each step."""
    score: float | None = None
    """Score of the last evaluation, once there is one."""

    @abstractmethod
    def __init__(self, model: str, task: str, settings: Any, run: Path | None, resources: ExitStack) -> None: ...

    @abstractmethod
    def describe(self) -> str:
        """The line that is printed when the training begins."""

    @abstractmethod
    def train(self, directory: Path, outputs: Sequence[KVWriter]) -> str:
        """Trains until the run has all of its steps.

        Args:
            directory: Directory of the run.
            outputs: What the log is written to besides its files.

        Returns:
            One line about the result.
        """

    @abstractmethod
    def save(self, path: Path) -> None:
        """Saves the result of the finished run."""


def start_or_resume(
    work: type[Work],
    model: str | None,
    task: str | None,
    given: Any,
    *,
    run: Path | None,
    seeds: tuple[int, ...],
    config: Path | None,
    resume: Path | None,
) -> int:
    """Starts one or several new runs, or resumes one.

    Args:
        work: What the run does.
        model: MODEL of the command line; None to resume a run.
        task: Task of the command line; None to resume a run.
        given: Options of the command line.
        run: Directory of the new run; None for the next free one.
        seeds: Seeds of several runs, one after the other; empty for a single run.
        config: File that the other arguments were read from.
        resume: Directory of the run that is resumed; None for a new run.

    Returns:
        The exit status: 0, 130 after Ctrl-C, 143 after SIGTERM.
    """
    from worldflux.accel import ranks

    ranks.join()
    if not ranks.is_first():  # rank 0 prints the same
        sys.stdout = open(os.devnull, "w")
    if resume is not None:
        if config is not None or seeds or not (model is task is run is None):
            raise ConfigurationError(
                f"--resume takes the MODEL, {work.argument} and all other settings from the run. Leave MODEL, "
                f"{work.argument}, --run, --seeds and --config out."
            )
        return _resume(work, checked_path("--resume", resume), given)
    if model is None or task is None:
        raise ConfigurationError(
            f"MODEL and {work.argument} are missing. Example: worldflux {work.command} {work.example}. "
            f"To resume a run that was stopped: worldflux {work.command} --resume DIR"
        )
    # Paths are resolved before an environment can change the working directory.
    root = checked_path("the directory of runs", runs.ROOT)
    run = None if run is None else checked_path("--run", run)
    if seeds:
        return _start_several(work, model, task, given, run, root, seeds)
    begun = ranks.on_first(partial(runs.begun_before_restart, run, root))
    if begun is not None:
        return _resume(work, Path(begun), work.settings_type())
    if ranks.is_first():
        runs.check_free(run)
    return _start(work, model, task, given, run, root).status


@dataclass(frozen=True)
class _Outcome:
    """How a run has ended."""

    status: int
    """Exit status."""
    directory: Path
    """Directory of the run, as it is printed."""
    score: float | None
    """Score of the last evaluation; None if there was none."""


def _start(
    work: type[Work],
    model: str,
    task: str,
    given: Any,
    run: Path | None,
    root: Path,
    *,
    alone: bool = True,
    begun: Callable[[], object] = lambda: None,
) -> _Outcome:
    """Starts a new run.

    Args:
        work: What the run does.
        model: MODEL of the command line.
        task: Task of the command line.
        given: Options of the command line.
        run: Directory of the run; None for the next free one.
        root: Parent of the runs that choose their directory.
        alone: Whether to name the commands that follow.
        begun: Called once the directory says how the run is resumed.
    """
    from worldflux.accel import ranks

    settings = given.resolved()
    if settings.track_project is not None and not settings.track:
        raise ConfigurationError("--track-project is the project of --track, which is missing.")
    settings = replace(settings, seed=ranks.on_first(lambda: settings.seed))  # which may have been drawn
    tracking = RunTracking(settings.track if ranks.is_first() else (), settings.track_project)
    with ExitStack() as resources:
        made = _make(work, model, task, settings, None, resources)

        def begin() -> str:
            """Makes the directory of the run."""
            directory = runs.make_directory(run, made.title, model, root)
            resources.enter_context(using(directory))
            runs.check_free(directory)
            runs.note_launch(directory)
            _write_settings(
                made,
                directory,
                RunConfig(
                    kind=work.command,
                    model=model,
                    task=made.task,
                    settings=asdict(settings),
                    frames_per_step=made.frames_per_step,
                    command=f"worldflux {work.command} {shlex.join([model, *words_in(task)])} {as_arguments(settings)}",
                    started=runs.now(),
                    **circumstances(made.task, settings.device),
                ),
                settings,
            )
            return str(directory)

        directory = Path(ranks.on_first(begin))
        begun()
        status = _train(made, directory, tracking, alone=alone)
        return _Outcome(status, runs.shown(directory), made.score)


def _start_several(
    work: type[Work], model: str, task: str, given: Any, run: Path | None, root: Path, seeds: tuple[int, ...]
) -> int:
    """Starts a run for each seed, one after the other, and prints a summary of their scores."""
    if given.seed != work.settings_type().seed:
        raise ConfigurationError("--seed and --seeds are both given. Leave one of them out.")
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise ConfigurationError(f"--seeds has {seed} more than once, and two such runs would be the same.")
        whole_number("seeds", seed, 0, below=2**32)
    places = {seed: None if run is None else run / f"seed-{seed}" for seed in seeds}
    for place in places.values():
        runs.check_free(place)
    done: dict[int, _Outcome] = {}
    for number, (seed, place) in enumerate(places.items()):
        _say(f"seed {seed}, run {number + 1} of {len(seeds)}")
        left = list(seeds[number:])
        try:
            outcome = _start(
                work, model, task, replace(given, seed=seed), place, root, alone=False, begun=partial(left.pop, 0)
            )
        except BaseException as error:
            if done or not isinstance(error, WorldFluxError):  # otherwise nothing has begun
                _tell_left(work, model, task, given, run, left)
            raise
        if outcome.status:
            _tell_left(work, model, task, given, run, left)
            return outcome.status
        done[seed] = outcome
    _summarize(work, done)
    return 0


def _tell_left(work: type[Work], model: str, task: str, given: Any, run: Path | None, left: Sequence[int]) -> None:
    """Says how the runs of the remaining seeds are started."""
    if not left:
        return
    seeds = " ".join(map(str, left))
    where = [] if run is None else ["--run", str(runs.shown(run))]
    words = [work.command, shlex.join([model, *words_in(task), *where]), as_arguments(given), "--seeds", seeds]
    again = " ".join(word for word in words if word)
    plural = "" if len(left) == 1 else "s"
    _say(f"not started: seed{plural} {seeds}. Start with: worldflux {again}")


def _summarize(work: type[Work], done: dict[int, _Outcome]) -> None:
    """Prints the last score of each seed and their mean."""
    from statistics import fmean, stdev

    scores = [outcome.score for outcome in done.values() if outcome.score is not None]
    if len(scores) == len(done) and len(done) > 1:
        print(f"{work.score_name} of {len(done)} seeds: mean {fmean(scores):.6g}, std {stdev(scores):.4g}")
    for seed, outcome in done.items():
        score = "no evaluation" if outcome.score is None else f"{outcome.score:<10.6g}"
        print(f"  seed {seed:<6} {score} {outcome.directory}")
    _tell_next(work, [outcome.directory for outcome in done.values()])


def _tell_next(work: Work | type[Work], directories: list[Path]) -> None:
    """Names the commands for finished runs."""
    parent = directories[0].parent
    if len(directories) == 1:
        texts = work.next_commands
    elif set(runs.find_runs(parent)) == set(directories):
        texts, directories = work.next_for_parent, [parent]
    else:
        texts = work.next_for_several
    shown = shlex.join(map(str, directories))
    if texts:
        commands = ", ".join(f"worldflux {text.format(run=shown)}" for text in texts)
        _say(f"next: {commands}")


def _make(work: type[Work], model: str, task: str, settings: Any, run: Path | None, resources: ExitStack) -> Work:
    """Creates what a run does, and lets torch use the threads for it until the end of the run."""
    import torch

    from worldflux.accel.device import choose_threads

    made = work(model, task, settings, run, resources)
    resources.callback(torch.set_num_threads, torch.get_num_threads())
    choose_threads(made.model)
    return made


def _write_settings(work: Work, directory: Path, config: RunConfig, settings: Any) -> None:
    """Writes the settings of a run for `--config` and for `--resume`."""
    write_settings(directory, work.command, work.argument.lower(), config.model, config.task, settings)
    config.write(directory)


def _resume(work: type[Work], directory: Path, given: Any) -> int:
    from worldflux.accel import ranks

    config, shown = RunConfig.read(directory), runs.shown(directory)
    if config.kind != work.command:
        raise ConfigurationError(f"{shown} is a run of worldflux {config.kind}, which has its own --resume.")
    settings = from_json(work.settings_type, config.settings, directory / runs.CONFIG_FILE)
    settings = replace(settings, **_changes(given, directory)).resolved()
    done = runs.newest_step(directory)
    if done is not None and done >= settings.steps and runs.has_result(directory, work.result):
        print(
            f"{shown} has finished its {counted(done, 'step')}. To continue it with more steps: "
            f"worldflux {work.command} --resume {shown} --steps {2 * done}"
        )
        return 0
    tracking = RunTracking(settings.track if ranks.is_first() else (), settings.track_project)
    with ExitStack() as resources:
        # Before anything is loaded: another process that trains this run replaces its checkpoints.
        ranks.on_first(partial(resources.enter_context, using(directory)))
        made = _make(work, config.model, config.task, settings, directory, resources)
        if ranks.is_first():
            part = {"started": runs.now(), "step": done or 0, **circumstances(made.task, settings.device)}
            resumed = replace(config, settings=asdict(settings), resumed=[*config.resumed, part])
            _write_settings(made, directory, resumed, settings)
        if done is None:
            _say(f"{shown} has no checkpoint yet, so it starts from the beginning")
        else:
            _say(f"resuming at step {done} of {settings.steps}")
            if settings.steps < config.settings.get("steps", 0):
                end = f"at step {max(done, settings.steps)} instead of {config.settings['steps']}"
                _say(f"--steps {settings.steps} makes the run shorter: it ends {end}")
        return _train(made, directory, tracking)


def _changes(given: Any, directory: Path) -> dict[str, Any]:
    """The options given to a run that is resumed.

    Raises:
        ConfigurationError: If one of them cannot be changed any more.
    """
    changes = changed(given)
    fixed = [option(name) for name in changes if name not in CHANGEABLE]
    if fixed:
        raise ConfigurationError(
            f"{', '.join(fixed)}: a resumed run keeps the settings of {runs.shown(directory / runs.CONFIG_FILE)}; only "
            "--steps and --device can be changed. Start a new run for other settings."
        )
    return {**changes, **({"render": given.render} if hasattr(given, "render") else {})}


def _train(work: Work, directory: Path, tracking: RunTracking, *, alone: bool = True) -> int:
    """Trains and saves the result. If the training ends early, says how the run is resumed.

    Args:
        work: What the run does.
        directory: Directory of the run.
        tracking: Experiment trackers of the run.
        alone: Whether to name the commands that follow; several runs name them at their end.
    """
    from worldflux.accel import ranks

    shown = runs.shown(directory)
    _say(f"{shown}, {work.describe()}" + (f", {ranks.size()} ranks" if ranks.size() > 1 else ""))
    try:
        result = work.train(directory, tracking.start(directory))
        if ranks.is_first():
            work.save(directory / work.result)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        tracking.finish("stopped" if stopped else "failed")
        step = runs.newest_step(directory)
        if stopped or step is not None:
            state = "nothing has been saved yet" if step is None else f"saved at step {step}"
            again = f"worldflux {work.command} --resume {shlex.quote(str(shown))}"
            _say(f"stopped; {state}. Resume with: {again}")
        if not stopped:
            raise
        return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 130
    tracking.finish("finished")
    print(f"{shown}: {result}.")
    if alone:
        _tell_next(work, [shown])
    return 0


def _say(text: str) -> None:
    from worldflux.accel import ranks  # here, because it loads torch

    ranks.say(text)
