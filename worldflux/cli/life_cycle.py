"""The life cycle of a run, whatever it trains: it starts or is resumed, then finishes or is stopped early."""

from __future__ import annotations

import shlex
import sys
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

from worldflux.cli import runs
from worldflux.cli.options import as_arguments, changed, from_json
from worldflux.cli.runs import RunConfig
from worldflux.errors import ConfigurationError
from worldflux.files import checked_path
from worldflux.locks import using

CHANGEABLE = ("steps", "device")
"""Settings that may be changed when a run is resumed."""


class Work(ABC):
    """What a run does. Creating it builds and checks everything that the training needs; nothing is written yet.

    Args:
        model: MODEL of the command line.
        task: Environment or data file of the run.
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
    result: ClassVar[str]
    """Name of the entry in the run's directory that is written when the run has finished."""

    title: str
    """Name of the task in the path of a new run."""
    task: str
    """The task, named so that it can be found from every working directory."""
    frames_per_step: int = 1
    """Frames of the environment in each step."""

    @abstractmethod
    def __init__(self, model: str, task: str, settings: Any, run: Path | None, resources: ExitStack) -> None: ...

    @abstractmethod
    def describe(self) -> str:
        """The line that is printed when the training begins."""

    @abstractmethod
    def train(self, directory: Path) -> str:
        """Trains until the run has all of its steps.

        Args:
            directory: Directory of the run.

        Returns:
            One line about the result.
        """

    @abstractmethod
    def save(self, path: Path) -> None:
        """Saves the result of the finished run."""


def start_or_resume(
    work: type[Work], model: str | None, task: str | None, run: Path | None, resume: Path | None, given: Any
) -> int:
    """Starts a new run, or resumes one.

    Args:
        work: What the run does.
        model: MODEL of the command line; None to resume a run.
        task: Task of the command line; None to resume a run.
        run: Directory of the new run; None for the next free one.
        resume: Directory of the run that is resumed; None for a new run.
        given: Options of the command line.

    Returns:
        The exit status: 0, 130 after Ctrl-C, 143 after SIGTERM.
    """
    if resume is not None:
        if not (model is task is run is None):
            raise ConfigurationError(
                f"--resume takes the MODEL, {work.argument} and directory from the run. Leave them out."
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
    runs.check_free(run)
    settings = given.resolved()
    with ExitStack() as resources:
        made = work(model, task, settings, None, resources)
        directory = runs.make_directory(run, made.title, model, root)
        resources.enter_context(using(directory))
        runs.check_free(directory)
        RunConfig(
            kind=work.command,
            model=model,
            task=made.task,
            settings=asdict(settings),
            frames_per_step=made.frames_per_step,
            command=f"worldflux {work.command} {shlex.join([model, task])} {as_arguments(settings)}",
            versions=runs.versions(),
            started=runs.now(),
        ).write(directory)
        return _train(made, directory)


def _resume(work: type[Work], directory: Path, given: Any) -> int:
    config, shown = RunConfig.read(directory), runs.shown(directory)
    if config.kind != work.command:
        raise ConfigurationError(f"{shown} is a run of worldflux {config.kind}, which has its own --resume.")
    settings = from_json(work.settings_type, config.settings, directory / runs.CONFIG_FILE)
    settings = replace(settings, **_changes(given, directory)).resolved()
    done = runs.newest_step(directory)
    if done is not None and done >= settings.steps and runs.has_result(directory, work.result):
        print(
            f"{shown} has finished its {done} steps. To continue it with more steps: "
            f"worldflux {work.command} --resume {shown} --steps {2 * done}"
        )
        return 0
    with ExitStack() as resources:
        # Before anything is loaded: another process that trains this run replaces its checkpoints.
        resources.enter_context(using(directory))
        made = work(config.model, config.task, settings, directory, resources)
        replace(config, settings=asdict(settings)).write(directory)
        if done is None:
            print(f"worldflux: {shown} has no checkpoint yet, so it starts from the beginning", file=sys.stderr)
        else:
            print(f"worldflux: resuming at step {done} of {settings.steps}", file=sys.stderr)
            if settings.steps < config.settings.get("steps", 0):
                end = f"at step {max(done, settings.steps)} instead of {config.settings['steps']}"
                print(f"worldflux: --steps {settings.steps} makes the run shorter: it ends {end}", file=sys.stderr)
        return _train(made, directory)


def _changes(given: Any, directory: Path) -> dict[str, Any]:
    """The options given to a run that is resumed.

    Raises:
        ConfigurationError: If one of them cannot be changed any more.
    """
    changes = changed(given)
    fixed = [f"--{name.replace('_', '-')}" for name in changes if name not in CHANGEABLE]
    if fixed:
        raise ConfigurationError(
            f"{', '.join(fixed)}: a resumed run keeps the settings of {runs.shown(directory / runs.CONFIG_FILE)}; only "
            "--steps and --device can be changed. Start a new run for other settings."
        )
    return changes


def _train(work: Work, directory: Path) -> int:
    """Trains and saves the result. If the training ends early, says how the run is resumed."""
    shown = runs.shown(directory)
    print(f"worldflux: {shown}, {work.describe()}", file=sys.stderr)
    try:
        result = work.train(directory)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        step = runs.newest_step(directory)
        if stopped or step is not None:
            state = "nothing has been saved yet" if step is None else f"saved at step {step}"
            again = f"worldflux {work.command} --resume {shlex.quote(str(shown))}"
            print(f"worldflux: stopped; {state}. Resume with: {again}", file=sys.stderr)
        if not stopped:
            raise
        return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 130
    work.save(directory / work.result)
    print(f"{shown}: {result}.")
    again = [f"worldflux {text.format(run=shlex.quote(str(shown)))}" for text in work.next_commands]
    print(f"worldflux: next: {', '.join(again)}", file=sys.stderr)
    return 0
