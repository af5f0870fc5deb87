"""`worldflux collect`: records a policy in an environment, in a file to train from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from worldflux.cli.environments import EnvName, find_environment
from worldflux.cli.options import Count, Flag, Number, check_writable, counted
from worldflux.cli.players import load_player
from worldflux.cli.runs import Saved, saved_agent
from worldflux.errors import ConfigurationError
from worldflux.files import checked_path

RANDOM = "random"


def collect(
    env: EnvName,
    *,
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")],
    steps: Number = None,
    episodes: Number = None,
    policy: Annotated[str, tyro.conf.arg(metavar="POLICY")] = RANDOM,
    n_envs: Count = 1,
    seed: Number = None,
    overwrite: Flag = False,
) -> int:
    """Record a policy's episodes in a file for worldflux train-offline.

    Args:
        env: An id (CartPole-v1, dmc/walker-walk, atari/pong), or your class: module:Class or path.py:Class.
        output: The .npz file to write.
        steps: Number of environment steps to record, summed over all environments.
        episodes: Number of complete episodes to record, instead of --steps.
        policy: "random", a zip of WorldFluxAgent.save, or the directory of a run or of a model.
        n_envs: Number of environments that are stepped together.
        seed: Seed of the environments and of random actions. If omitted, it is random.
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
        raise ConfigurationError(f"There is no directory '{output.parent}' for {output.name}. Create it first.")
    check_writable("--output", output, output.absolute().parent)
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
    print(f"{output}: {counted(buffer.num_transitions, 'step')} of {counted(buffer.num_episodes, 'episode')}.")
    return 0


def _policy(given: str) -> Saved:
    path = Path(given)
    if not path.exists() and not path.with_name(f"{path.name}.zip").is_file():
        raise ConfigurationError(
            f"There is no file '{given}'. --policy is 'random', a file of WorldFluxAgent.save, or the directory of a "
            "run or of a model."
        )
    return saved_agent(path)
