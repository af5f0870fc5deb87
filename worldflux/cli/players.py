"""What the commands do with a saved agent, or with a saved model in the place of one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldflux.cli import runs
from worldflux.cli.commands.train import TrainSettings
from worldflux.cli.options import EnvOptions, from_json
from worldflux.cli.runs import RunConfig, Saved
from worldflux.errors import ConfigurationError, ShapeMismatchError

if TYPE_CHECKING:
    from worldflux.agents import WorldFluxAgent


def load_player(saved: Saved, env: Any, name: str) -> WorldFluxAgent:
    """The agent, or one that acts with the model.

    Args:
        saved: From `saved_agent`.
        env: Where it shall act: a Gymnasium environment or a `VecEnv`.
        name: Of the environment, for messages.

    Raises:
        ShapeMismatchError: If it was made for another environment.
        CheckpointError: If it cannot be read.
    """
    from worldflux.agents import WorldFluxAgent

    if saved.is_agent:
        agent = WorldFluxAgent.load(saved.path)
        check_spaces(agent, env, name)
        return agent
    try:
        return WorldFluxAgent(saved.path, env, train_ratio=0, buffer_size=getattr(env, "num_envs", 1))
    except ShapeMismatchError as error:
        found = str(error).partition(". ")[0]
        raise ShapeMismatchError(
            f"{saved.path} was not trained for {name}. {found}. Pass an environment like the one that its data are of."
        ) from error


def check_spaces(agent: WorldFluxAgent, env: Any, name: str) -> None:
    """Raises a `ShapeMismatchError` unless the agent was trained for such an environment."""
    from worldflux.envs.spaces import ObservationCodec

    expected, found = agent.obs_codec, ObservationCodec(env.observation_space)
    if (expected.obs_shape, expected.obs_classes) != (found.obs_shape, found.obs_classes):
        raise ShapeMismatchError(
            f"The agent observes {expected.obs_shape}, and {name} shows {found.obs_shape}. "
            "Pass the environment that it was trained in, with the same --pixels and --size."
        )
    if agent.action_space != env.action_space:
        raise ShapeMismatchError(
            f"The agent acts in {agent.action_space}, and {name} has {env.action_space}. Pass the environment that it "
            "was trained in."
        )


def environment_of(path: Path, remedy: str) -> tuple[str, EnvOptions]:
    """The environment of the run that something saved belongs to, and how it is made there.

    Args:
        path: As the user gave it.
        remedy: What to do where there is none; the end of the message.

    Raises:
        ConfigurationError: If it belongs to no run, or to one without an environment.
    """
    run = runs.run_of(path)
    if run is None:
        raise ConfigurationError(f"{path} is of no run that says where to act. {remedy}")
    config = RunConfig.read(run)
    if config.kind != "train":
        raise ConfigurationError(f"{path} was trained without an environment. {remedy}")
    return config.task, from_json(TrainSettings, config.settings, run / runs.CONFIG_FILE)
