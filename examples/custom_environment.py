"""An environment of your own: keep a room warm. Checks it, learns it, and compares the agent with random actions.

Everything that worldflux asks of an environment stands in `Room`. Copy it, and change what you need.
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
"""In an episode: a day in quarters of an hour."""


class Room(gym.Env[np.ndarray, np.ndarray]):
    """A heater is turned up and down, so that a room has the wanted temperature.

    - Observation: temperatures of the room, outside, and the wanted one, in degrees. `[3]`
    - Action: power of the heater, 0 to 2 kW. `[1]`
    - Reward: minus the difference from the wanted temperature; -50 once the pipes have frozen.
    - The episode terminates when they freeze. Its time limit is not the environment's business: `gym.register` below.

    Args:
        render_mode: "rgb_array" lets `render` give pictures, for videos.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}  # noqa: RUF012  # as Gymnasium has it

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        # Units as they come: models bring them to a useful scale themselves. Bounds of actions have to be finite.
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = gym.spaces.Box(0.0, 2.0, (1,), np.float32)
        self._room = self._outside = self._wanted = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins a day."""
        super().reset(seed=seed)  # seeds self.np_random, where all chance comes from
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
        # Only what ends the world is a termination. The second flag, a truncation, is the time limit's.
        return self._obs(), reward, frozen, False, {}

    def render(self) -> np.ndarray:
        """The room as a column that grows with its temperature, and a line at the wanted one. `[96, 64, 3]`"""
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
    """Mean return of uniformly random actions: what every agent has to beat."""
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
    """Checks the environment, learns it, and compares the agent with random actions.

    Args:
        steps: Environment steps.
        train_ratio: Replayed steps for each of them.
        learning_starts: Environment steps before the first gradient step.
        episodes: Of the evaluation.
        seed: Of the training; the evaluation has one of its own.
        out: Where the agent goes.

    Returns:
        Mean returns of the agent, and of random actions.
    """
    torch.set_num_threads(1)  # layers this small gain little from a second core
    check_env(ENV)  # raises with all that is wrong

    agent = WorldFluxAgent(
        "dreamerv3:tiny",
        ENV,
        train_ratio=train_ratio,
        seq_len=16,
        learning_rate=1e-3,
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
