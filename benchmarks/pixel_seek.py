"""A small task with image observations."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class PixelSeek(gym.Env[np.ndarray, int]):
    """A task in which a blue bar at the bottom has to be moved below a yellow bar at the top and kept there.

    The observation is an image. The reward of a step is 1 if the blue bar moves closer to the yellow one or stays below
    it, and -1 otherwise. The time limit is 20 steps. The best return is 20; random actions score about -5.5.
    """

    SIZE, CELLS, LIMIT, BEST = 64, 5, 20, 20.0

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0, 255, (self.SIZE, self.SIZE, 3), np.uint8)
        self.action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.cell, self.target = (int(x) for x in self.np_random.integers(self.CELLS, size=2))
        self.t = 0
        return self._picture(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        before = abs(self.target - self.cell)
        self.cell, self.t = int(np.clip(self.cell + int(action) - 1, 0, self.CELLS - 1)), self.t + 1
        after = abs(self.target - self.cell)
        return self._picture(), 1.0 if after < before or after == 0 else -1.0, False, self.t == self.LIMIT, {}

    def _picture(self) -> np.ndarray:
        picture = np.zeros((self.SIZE, self.SIZE, 3), np.uint8)
        width = self.SIZE // self.CELLS
        picture[4:30, self.target * width + 1 : (self.target + 1) * width + 1] = (255, 200, 40)
        picture[34:60, self.cell * width + 1 : (self.cell + 1) * width + 1] = (60, 160, 255)
        return picture
