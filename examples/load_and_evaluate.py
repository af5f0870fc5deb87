"""Loads a saved agent, evaluates it on ten episodes with stable-baselines3, and plays one episode in a loop.

    python examples/load_and_evaluate.py cartpole.zip CartPole-v1

The agent itself needs no environment, neither to be loaded nor to act: `agent.predict` takes any observation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from worldflux import WorldFluxAgent
from worldflux.envs import make_env


def main(
    agent: Annotated[Path, tyro.conf.Positional],
    env: Annotated[str, tyro.conf.Positional],
    episodes: int = 10,
    seed: int = 0,
) -> list[float]:
    """Evaluates a saved agent.

    Args:
        agent: File written by `agent.save`, or a directory of checkpoints.
        env: Name of its environment, as in `make_env`.
        episodes: Number of episodes.
        seed: Seed of the environment.

    Returns:
        The return of each episode.
    """
    loaded = WorldFluxAgent.load(agent)
    test_env = Monitor(make_env(env))

    test_env.reset(seed=seed)
    returns, lengths = evaluate_policy(loaded, test_env, n_eval_episodes=episodes, return_episode_rewards=True)
    assert isinstance(returns, list) and isinstance(lengths, list)
    print(f"mean return of {episodes} episodes: {sum(returns) / episodes:.1f} (worst {min(returns):.1f})")

    total, steps = play(loaded, test_env)
    print(f"return of one more episode: {total:.1f} in {steps} steps")
    return returns


def play(agent: WorldFluxAgent, env: Any) -> tuple[float, int]:
    """Plays one episode and returns its return and length.

    Args:
        agent: The agent that acts.
        env: A Gymnasium environment.
    """
    obs, _ = env.reset()
    memory, over, total, steps = None, False, 0.0, 0
    while not over:
        # Pass the recurrent state to the next call; it is None at the start of an episode.
        action, memory = agent.predict(obs, memory, deterministic=True)
        obs, reward, terminated, truncated, _ = env.step(action)
        total, steps, over = total + float(reward), steps + 1, terminated or truncated
    return total, steps


if __name__ == "__main__":
    tyro.cli(main)
