"""The command line of `dmc.py` and `atari.py`, which executes runs one after the other and reports on them."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import report
import torch
from protocols import Protocol
from report_data import Acceptance
from run_files import RunRecord, RunSettings, check_settings, run_directory
from suite_run import run
from suite_smoke import smoke

from worldflux.agents.settings import AgentSettings
from worldflux.errors import ConfigurationError, TrainingError, WorldFluxError, nearest
from worldflux.factory import find_preset

Suites = Mapping[str, tuple[Protocol, ...]]

_NOT_SET = ("seed", "verbose", "tensorboard_log", "stats_window_size")
"""Settings of the agent that the benchmark sets itself, or that have no effect in it."""


def main(name: str, suites: Suites, task_name: Callable[[str], str], description: str, argv: Sequence[str]) -> int:
    """Entry point of the command line.

    Args:
        name: Name of the benchmark, such as "dmc".
        suites: Protocols of the benchmark, keyed by suite.
        task_name: Function that converts other spellings of a task's name to that in worldflux.
        description: Description for `--help`.
        argv: Command-line arguments without the command itself.

    Returns:
        0 on success; 1 if a task ended below its accepted score or a run diverged; 2 for invalid input; 130 after
        Ctrl-C.
    """
    parser = _parser(suites, description)
    options = parser.parse_args(argv)
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if options.smoke:
            with _directory(options.out) as out:
                return smoke(_smoke_protocols(options, suites), out)
        if options.model is None or options.out is None:
            parser.error("--model and --out are required, for example: --model dreamerv3:size12m --out results/dmc")
        return _run_all(options, suites, task_name)
    except WorldFluxError as error:
        print(f"benchmarks/{name}.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"benchmarks/{name}.py: stopped; run the same command again to resume", file=sys.stderr)
        return 130


def _parser(suites: Suites, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    first = next(iter(suites))
    add("--model", help="a preset, such as dreamerv3:size12m (worldflux models lists them)")
    add("--suite", choices=list(suites), default=first, help=f"default: {first}")
    add("--tasks", nargs="+", metavar="TASK", help="default: all tasks that were published for the algorithm")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    add("--out", type=Path, metavar="DIR", help="directory for the runs; existing ones are resumed")
    add("--steps", type=int, help="steps of the simulator, including repeated ones; default: the published budget")
    add("--envs", type=int, help="number of parallel environments; default: as published")
    add("--processes", action="store_true", help="run each environment in its own process")
    add("--device", default="auto", help="default: the GPU if there is one")
    add("--dtype", help="precision of the model, such as bfloat16; default: that of the preset")
    add("--compile", choices=["auto", "true", "false"], help="setting of the agent; default: that of the agent")
    add("--threads", type=int, help="number of CPU threads of PyTorch")
    add(
        "--set",
        nargs="+",
        default=[],
        action="extend",
        metavar="[TASK:]NAME=VALUE",
        help="settings of the agent or fields of the model's configuration, for all tasks or for one task",
    )
    add("--eval-every", type=int, help="steps of the simulator between evaluations")
    add("--eval-episodes", type=int, help="episodes per evaluation")
    add("--checkpoint-every", type=int, help="steps of the simulator between checkpoints")
    add(
        "--accept",
        nargs="+",
        default=[],
        metavar="SHARE | TASK=SCORE",
        help="lowest accepted score: a share of the published score minus its noise (default: 0.8), or a number",
    )
    add("--smoke", action="store_true", help="run everything once with a tiny model, in less than a minute")
    return parser


def _run_all(options: argparse.Namespace, suites: Suites, task_name: Callable[[str], str]) -> int:
    protocol = find_protocol(options.model, suites[options.suite], options.suite)
    tasks = find_tasks(options.tasks, protocol, task_name)
    accept = Acceptance.parse(options.accept, task_name)
    wanted = [make_settings(options, protocol, task, seed, task_name) for task in tasks for seed in options.seeds]
    check_settings(options.out, wanted)
    diverged = False
    for settings in wanted:
        directory = run_directory(options.out, settings.task, settings.seed)
        print(f"{directory}", file=sys.stderr, flush=True)
        try:
            record = run(
                options.out,
                settings,
                device=options.device,
                processes=options.processes,
                checkpoint_every=options.checkpoint_every,
            )
        except TrainingError as error:  # does not affect the other runs
            print(f"{directory} has failed: {error}", file=sys.stderr, flush=True)
            diverged = True
            continue
        if record is None:
            print(f"{directory} is skipped: another process is working on it", file=sys.stderr, flush=True)
        else:
            print(json.dumps(_summary(record)), flush=True)
    below = report.write(
        [options.out], options.out / "report.md", options.out / "report.png", accept=accept, only=set(tasks)
    )
    return int(diverged) or below


def find_protocol(model: str, of_suite: Sequence[Protocol], suite: str) -> Protocol:
    """The protocol of a preset's family for a suite.

    Raises:
        ConfigurationError: If there is no such preset, or no protocol for its family.
    """
    found = find_preset(model)
    if found is None:
        from worldflux.factory import list_models

        raise ConfigurationError(f"Unknown model '{model}'{nearest(model, list_models())} worldflux models lists all.")
    family = found[1].config_class.model_type
    for protocol in of_suite:
        if protocol.family == family:
            return protocol
    raise ConfigurationError(
        f"{model} is a model of {family}, whose authors have published nothing for {suite}. There are protocols for: "
        f"{', '.join(protocol.family for protocol in of_suite)}."
    )


def find_tasks(given: Sequence[str] | None, protocol: Protocol, task_name: Callable[[str], str]) -> list[str]:
    """The names of the given tasks in worldflux, by default all tasks of the protocol.

    Raises:
        ConfigurationError: If a task is not in the suite.
    """
    tasks = list(dict.fromkeys(task_name(name) for name in given)) if given else list(protocol.tasks)
    for name in tasks:
        if name not in protocol.tasks:
            raise ConfigurationError(
                f"Unknown task '{name}'{nearest(name, protocol.tasks)} Published tasks: {', '.join(protocol.tasks)}."
            )
    return tasks


def make_settings(
    options: argparse.Namespace, protocol: Protocol, task: str, seed: int, task_name: Callable[[str], str]
) -> RunSettings:
    """The settings of one run.

    Raises:
        ConfigurationError: If an option is invalid.
    """
    agent, model_fields = overrides(options.set, options.model, task, task_name)
    if options.dtype is not None:
        model_fields["dtype"] = options.dtype
    if options.compile is not None:
        agent["compile"] = {"true": True, "false": False}.get(options.compile, options.compile)
    evaluates = protocol.score == "evaluation"
    if not evaluates and (options.eval_every or options.eval_episodes):
        raise ConfigurationError(f"{protocol.title} has no evaluations: its scores are returns of training episodes.")
    for name in ("steps", "envs", "eval_every", "eval_episodes", "checkpoint_every"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigurationError(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected 1 or more.")
    return RunSettings(
        protocol=protocol.name,
        model=options.model,
        task=task,
        seed=seed,
        steps=options.steps or protocol.steps,
        envs=options.envs or protocol.envs,
        action_repeat=protocol.action_repeat,
        options=dict(protocol.options),
        eval_every=options.eval_every or protocol.eval_every,
        eval_episodes=options.eval_episodes or protocol.eval_episodes,
        agent=agent,
        model_fields=model_fields,
    )


def overrides(
    given: Sequence[str], model: str, task: str, task_name: Callable[[str], str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the agent and fields of the model's configuration that `--set` specifies for a task.

    Values are parsed as JSON if possible, and are text otherwise. Values for one task take precedence over those for
    all tasks.

    Raises:
        ConfigurationError: If an argument is invalid or has an unknown name.
    """
    found = find_preset(model)
    assert found is not None, model
    of_agent = [item.name for item in fields(AgentSettings) if item.name not in _NOT_SET]
    of_model = [item.name for item in fields(found[1].config_class)]
    general: dict[str, Any] = {}
    particular: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        of, colon, rest = name.rpartition(":")
        if not equals or not rest:
            raise ConfigurationError(f"--set {text} is invalid, expected NAME=VALUE or TASK:NAME=VALUE.")
        if rest not in (*of_agent, *of_model):
            raise ConfigurationError(f"--set {text}: unknown setting '{rest}'{nearest(rest, [*of_agent, *of_model])}")
        if colon and task_name(of) != task:
            continue
        place = particular if colon else general
        if rest in place:
            raise ConfigurationError(f"--set {name} was given twice.")
        try:
            place[rest] = json.loads(value)
        except ValueError:
            place[rest] = {"True": True, "False": False, "None": None}.get(value, value)
    together = general | particular
    return (
        {name: value for name, value in together.items() if name in of_agent},
        {name: value for name, value in together.items() if name not in of_agent},
    )


def _smoke_protocols(options: argparse.Namespace, suites: Suites) -> list[Protocol]:
    """The protocols of the model's family, or of all families."""
    of_suite = suites[options.suite]
    return list(of_suite) if options.model is None else [find_protocol(options.model, of_suite, options.suite)]


@contextmanager
def _directory(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
    else:
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory)


def _summary(record: RunRecord) -> dict[str, Any]:
    """The summary of a finished run."""
    assert record.result is not None
    return {
        "task": record.settings.task,
        "seed": record.settings.seed,
        "step": record.result["step"],
        "gradient_steps": record.result["gradient_steps"],
        "seconds": round(record.seconds),
        "starts": len(record.parts),
    }
