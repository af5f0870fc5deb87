"""`worldflux collect`: an environment and a policy become a file to train from."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import tyro

from worldflux.cli.environments import EnvName, find_environment
from worldflux.cli.options import Number
from worldflux.cli.players import load_player
from worldflux.cli.runs import Saved, saved_agent
from worldflux.errors import ConfigurationError
from worldflux.files import checked_path

RANDOM = "random"


def collect(
    env: EnvName,
    *,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])],
    steps: Number = None,
    episodes: Number = None,
    policy: str = RANDOM,
    n_envs: int = 1,
    seed: Number = None,
    overwrite: bool = False,
) -> int:
    """Record a policy's episodes in a file that `worldflux.training.train` learns from.

    Args:
        env: An id (CartPole-v1, dmc/walker-walk, atari/pong), or where your class is: module:Class or path.py:Class.
        output: File to write, an .npz.
        steps: Environment steps to record, over all environments.
        episodes: Whole episodes to record, instead of steps.
        policy: "random", or what acts: a zip of WorldFluxAgent.save, the directory of a run or of a model.
        n_envs: Environments that are stepped together.
        seed: Of the environments and of random actions. Without one, chance decides.
        overwrite: Replace the file if it exists.

    Returns:
        0
    """
    target = checked_path("--output", output)  # before the environment may change the working directory
    if output.is_dir():
        raise ConfigurationError(f"{output} is a directory, expected a file. Add a name: {output / 'data.npz'}.")
    if output.exists() and not overwrite:
        raise ConfigurationError(f"{output} exists. Pass --overwrite to replace it, or choose another --output.")
    if not output.absolute().parent.is_dir():
        raise ConfigurationError(f"There is no directory '{output.parent}' for {output.name}. Make it first.")
    _check_writable(output)
    saved = None if policy == RANDOM else _policy(policy)
    found = find_environment(env)

    from worldflux.envs.collection import collect as collect_steps
    from worldflux.envs.make import make_vec_env

    envs = make_vec_env(found, n_envs, seed=seed)
    try:
        acting = None if saved is None else load_player(saved, envs, env)
        buffer = collect_steps(envs, acting, steps=steps, episodes=episodes, seed=seed, progress=sys.stderr.isatty())
    finally:
        envs.close()
    buffer.save(target)
    print(f"{output}: {buffer.num_transitions} steps of {buffer.num_episodes} episodes.")
    return 0


def _policy(given: str) -> Saved:
    path = Path(given)
    if not path.exists() and not path.with_name(f"{path.name}.zip").is_file():
        raise ConfigurationError(
            f"There is no file '{given}'. --policy is 'random', a file of WorldFluxAgent.save, or the directory of a "
            "run or of a model."
        )
    return saved_agent(path)


def _check_writable(output: Path) -> None:
    """Tries it out, because the permissions of a directory do not say all."""
    try:
        with tempfile.TemporaryFile(dir=output.absolute().parent):
            pass
    except OSError as error:
        raise ConfigurationError(f"{output} cannot be written: {error.strerror}. Choose another --output.") from error
