"""Loads a saved agent and acts: ten episodes as stable-baselines3 counts them, then one by hand.

    python examples/load_and_evaluate.py cartpole.zip CartPole-v1

No environment is needed to load, and none to act: `agent.predict` takes an observation from wherever it comes.
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
        agent: What `agent.save` wrote, or a directory of checkpoints.
        env: Its environment, by a name as in `make_env`.
        episodes: How many.
        seed: Of the environment.

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
    print(f"and of one by hand: {total:.1f} in {steps} steps")
    return returns


def play(agent: WorldFluxAgent, env: Any) -> tuple[float, int]:
    """Return and length of one episode.

    Args:
        agent: Acts.
        env: Of Gymnasium.
    """
    obs, _ = env.reset()
    memory, over, total, steps = None, False, 0.0, 0
    while not over:
        # What the model remembers of the episode goes in and comes out; None where an episode begins.
        action, memory = agent.predict(obs, memory, deterministic=True)
        obs, reward, terminated, truncated, _ = env.step(action)
        total, steps, over = total + float(reward), steps + 1, terminated or truncated
    return total, steps


if __name__ == "__main__":
    tyro.cli(main)
