"""Loading a saved agent, or a saved model that acts like one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldflux.cli import runs
from worldflux.cli.commands.train import TrainSettings
from worldflux.cli.options import OF_IDS, EnvOptions, from_json, task_name, tasks_in
from worldflux.cli.runs import RunConfig, Saved
from worldflux.errors import ConfigurationError, ShapeMismatchError, nearest
from worldflux.hub.addresses import is_address
from worldflux.hub.client import RECORD_FILE, model_path

if TYPE_CHECKING:
    from worldflux.agents import WorldFluxAgent
    from worldflux.agents.acting import TaskPolicy
    from worldflux.config import WorldModelConfig


def chosen_tasks(name: str, task: str | None) -> dict[str | None, str]:
    """The environment of each task to act in, by the task's name; None where it has none.

    Args:
        name: ENV of the command line, or the environments of a run.
        task: `--task` of the command line, which chooses one of several, or names that of a single one.

    Raises:
        ConfigurationError: If there is no such task.
    """
    tasks = tasks_in(name)
    if not tasks:
        return {task: name}
    if task is not None and task not in tasks:
        raise ConfigurationError(
            f"--task {task}: there is no such task{nearest(task, tasks)} It is one of {', '.join(tasks)}."
        )
    return {one: place for one, place in tasks.items() if task in (None, one)}


def one_task(name: str, task: str | None, purpose: str) -> tuple[str | None, str]:
    """The only task of `chosen_tasks`, and its environment.

    Raises:
        ConfigurationError: If there are several; `purpose` says for what one is needed.
    """
    chosen = chosen_tasks(name, task)
    if len(chosen) > 1:
        names = ", ".join(map(str, chosen))
        raise ConfigurationError(f"{purpose} one task at a time. Choose one of {names} with --task NAME.")
    return next(iter(chosen.items()))


def load_player(saved: Saved, env: Any, name: str, task: str | None = None) -> WorldFluxAgent | TaskPolicy:
    """Loads the agent, or creates one that acts with the saved model, with the threads for it.

    Args:
        saved: Result of `saved_agent`.
        env: Environment to act in, a Gymnasium environment or a `VecEnv`.
        name: Name of the environment in error messages.
        task: Task of the environment, for an agent that has several. None: the one that the environment is named after.

    Raises:
        ConfigurationError: If the agent has several tasks, and not this one.
        ShapeMismatchError: If it was trained for other spaces.
        CheckpointError: If it cannot be read.
    """
    from worldflux.accel.device import choose_threads
    from worldflux.agents import WorldFluxAgent
    from worldflux.config import WorldModelConfig

    agent = WorldFluxAgent.load(saved.path) if saved.is_agent else None
    config = WorldModelConfig.load(saved.path) if agent is None else agent.model.config
    task = _task_of(config, name, task)
    try:
        if agent is None:
            given: Any = env if task is None else {task: env}
            agent = WorldFluxAgent(saved.path, given, train_ratio=0, buffer_size=getattr(env, "num_envs", 1))
        if task is not None:
            choose_threads(agent.model)
            number = int(task) if task.isdecimal() and not getattr(config, "task_names", ()) else task
            return agent.for_task(number, env)
    except ShapeMismatchError as error:
        found = str(error).partition(". ")[0].removesuffix(".")
        raise ShapeMismatchError(
            f"{saved.path} was not trained for {name}. {found}. Pass an environment like the one its data come from."
        ) from error
    if saved.is_agent:
        check_spaces(agent, env, name)
    choose_threads(agent.model)
    return agent


def _task_of(config: WorldModelConfig, name: str, task: str | None) -> str | None:
    """The task of an environment, for a model whose tasks have names; None if there is only one without a name."""
    names: tuple[str, ...] = getattr(config, "task_names", ())
    if task is not None or (not names and getattr(config, "num_tasks", 1) == 1):
        return task
    if (own := task_name(name)) in names:
        return own
    if len(names) == 1:
        return names[0]
    known = ", ".join(names or map(str, range(getattr(config, "num_tasks", 1))))
    raise ConfigurationError(f"The agent has the tasks {known}. Say which of them {name} is, with --task NAME.")


def check_spaces(agent: WorldFluxAgent, env: Any, name: str) -> None:
    """Raises a `ShapeMismatchError` if the agent was trained for other spaces."""
    from worldflux.envs.spaces import ObservationCodec

    expected, found = agent.obs_codec, ObservationCodec(env.observation_space)
    if (expected.obs_shape, expected.obs_classes) != (found.obs_shape, found.obs_classes):
        raise ShapeMismatchError(
            f"The agent has observations {expected.obs_shape}, and {name} has {found.obs_shape}. "
            "Pass the environment that it was trained in, with the same --pixels and --size."
        )
    if agent.action_space != env.action_space:
        raise ShapeMismatchError(
            f"The agent has actions {agent.action_space}, and {name} has {env.action_space}. Pass the environment that "
            "it was trained in."
        )


def chosen_environment(command: str, agent: Path, env: str | None, options: EnvOptions) -> tuple[str, EnvOptions]:
    """The environment to play in, and its options.

    Args:
        command: Command that plays, as it is called with AGENT.
        agent: AGENT of the command line.
        env: ENV of the command line; None for that of the agent's run.
        options: Options of the command line.

    Raises:
        ConfigurationError: If ENV has to be given, or has not been given with its options.
    """
    if env is not None:
        return env, options
    found = environment_of(agent, f"Add ENV: {command} ENV")
    if options != EnvOptions():
        raise ConfigurationError(f"{options.shown()}: options of an environment need ENV. Add it, or leave them out.")
    return found


def environment_of(path: Path, remedy: str) -> tuple[str, EnvOptions]:
    """The environment of the run that a saved agent or model belongs to, and its options.

    Args:
        path: Path that the user has given, or the address of an agent on the Hugging Face Hub.
        remedy: End of the error message, which says what to do.

    Raises:
        ConfigurationError: If it does not belong to a run, or the run has no environment.
    """
    directory = model_path("AGENT", path) if is_address(path) else path
    if (directory / RECORD_FILE).is_file():
        return _recorded(directory, remedy)
    run = runs.run_of(path)
    if run is None:
        raise ConfigurationError(f"{path} does not belong to a run, so its environment is unknown. {remedy}")
    config = RunConfig.read(run)
    if config.kind != "train":
        raise ConfigurationError(f"{path} was trained without an environment. {remedy}")
    return config.task, from_json(TrainSettings, config.settings, run / runs.CONFIG_FILE)


def _recorded(directory: Path, remedy: str) -> tuple[str, EnvOptions]:
    """The environment of an agent that was pushed to the Hugging Face Hub, whoever has pushed it."""
    from worldflux.hub.cards import recorded_environment

    found = recorded_environment(directory)
    if found is None:
        raise ConfigurationError(
            f"The repository names no installed environment, or one with further wrappers. {remedy}"
        )
    env, options = found
    of_ids = {name: options.pop(name) for name in OF_IDS if name in options}
    if not all(isinstance(value, bool | int | float) for value in (*of_ids.values(), *options.values())):
        raise ConfigurationError(f"The repository has options for {env} that are no numbers: {options}. {remedy}")
    return env, EnvOptions(**of_ids, env_kwargs=tuple(f"{key}={json.dumps(value)}" for key, value in options.items()))
