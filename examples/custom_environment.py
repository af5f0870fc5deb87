"""A custom environment in which a heater keeps a room warm.

The script checks the environment, trains an agent in it, and compares the agent with random actions. `Room` meets all
requirements of worldflux; copy it and change what you need.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from worldflux import WorldFluxAgent
from worldflux.envs import check_env

ENV = "Room-v0"
STEPS = 96
"""Steps of an episode: a day in quarters of an hour."""


class Room(gym.Env[np.ndarray, np.ndarray]):
    """A room in which a heater is controlled to reach the wanted temperature.

    - Observation `[3]`: the temperatures inside and outside and the wanted temperature, in degrees.
    - Action `[1]`: power of the heater, 0 to 2 kW.
    - Reward: minus the difference from the wanted temperature; -50 when the pipes freeze.
    - Termination: when the pipes freeze. The time limit is not part of the environment; see `gym.register` below.

    Args:
        render_mode: With "rgb_array", `render` returns images, for example for videos.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}  # noqa: RUF012  # as Gymnasium has it

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        # Observations need no scaling, because models scale them. The bounds of actions must be finite.
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = gym.spaces.Box(0.0, 2.0, (1,), np.float32)
        self._room = self._outside = self._wanted = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts a new day."""
        super().reset(seed=seed)  # seeds self.np_random, the source of all randomness
        self._outside = self.np_random.uniform(-10.0, 10.0)
        self._wanted = self.np_random.uniform(18.0, 22.0)
        self._room = self.np_random.uniform(10.0, 25.0)
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Heats for a quarter of an hour."""
        draught = self.np_random.normal(0.0, 0.1)
        self._room += 0.05 * (self._outside - self._room) + float(action[0]) + draught
        frozen = self._room < 0.0
        reward = -50.0 if frozen else -abs(self._room - self._wanted)
        # Only a terminal state is a termination. The second flag is for truncations, which the time limit sets.
        return self._obs(), reward, frozen, False, {}

    def render(self) -> np.ndarray:
        """An image `[96, 64, 3]` of a column as high as the room is warm, and a line at the wanted temperature."""
        picture = np.full((96, 64, 3), 255, np.uint8)
        picture[96 - self._height(self._room) :, 16:48] = (220, 90, 60)
        line = 96 - self._height(self._wanted)
        picture[line - 1 : line + 1] = (30, 30, 30)
        return picture

    def _obs(self) -> np.ndarray:
        return np.array([self._room, self._outside, self._wanted], np.float32)  # a new array each time

    @staticmethod
    def _height(degrees: float) -> int:
        return int(np.clip(3.0 * degrees, 2.0, 94.0))


gym.register(ENV, Room, max_episode_steps=STEPS)


def random_return(episodes: int, seed: int) -> float:
    """Mean return of uniformly random actions, which any agent should outperform."""
    env = gym.make(ENV)
    env.action_space.seed(seed)
    total = 0.0
    for episode in range(episodes):
        env.reset(seed=seed + episode)
        over = False
        while not over:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total, over = total + float(reward), terminated or truncated
    return total / episodes


def main(
    steps: int = 4_000,
    train_ratio: float = 64,
    learning_starts: int = 500,
    episodes: int = 10,
    seed: int = 0,
    out: Path = Path("room.zip"),
) -> tuple[float, float]:
    """Checks the environment, trains an agent, and compares it with random actions.

    Args:
        steps: Environment steps.
        train_ratio: Replayed steps per environment step.
        learning_starts: Environment steps before the first gradient step.
        episodes: Number of evaluation episodes.
        seed: Seed of the training; the evaluation uses a different one.
        out: File in which the agent is saved.

    Returns:
        Mean returns of the agent and of random actions.
    """
    torch.set_num_threads(1)  # layers this small benefit little from a second core
    check_env(ENV)  # raises an error that lists all problems

    agent = WorldFluxAgent(
        "dreamerv3:tiny",
        ENV,
        train_ratio=train_ratio,
        learning_starts=learning_starts,
        seed=seed,
        verbose=1,
    )
    agent.learn(steps)
    agent.save(out)

    env = Monitor(gym.make(ENV))
    env.reset(seed=10_000 + seed)
    learned, spread = evaluate_policy(agent, env, n_eval_episodes=episodes)
    assert isinstance(learned, float)
    chance = random_return(episodes, seed=10_000 + seed)
    print(f"mean return of {episodes} episodes: {learned:.0f} ± {spread:.0f}; of random actions: {chance:.0f}")
    return learned, chance


if __name__ == "__main__":
    tyro.cli(main)
