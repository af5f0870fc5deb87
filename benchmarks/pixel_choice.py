"""A small task that has to be learned from pixels."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class PixelChoice(gym.Env[np.ndarray, int]):
    """A blue bar stands between two walls, one of them yellow: it has to be walked to the yellow one.

    Only the picture is seen. Every step costs 0.05; the yellow wall earns 1 and the other one -1, and both end the
    episode; after 20 steps time is up. The best return is 0.8 (four steps); going to a side at random earns -0.2, and
    random steps earn less.
    """

    SIZE, CELLS, LIMIT, COST, BEST = 64, 9, 20, 0.05, 0.8

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0, 255, (self.SIZE, self.SIZE, 3), np.uint8)
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.cell, self.t = self.CELLS // 2, 0
        self.goal = int(self.np_random.choice([0, self.CELLS - 1]))
        return self._picture(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.cell, self.t = self.cell + (1 if action == 1 else -1), self.t + 1
        arrived = self.cell in (0, self.CELLS - 1)
        reward = -self.COST
        if arrived:
            reward += 1.0 if self.cell == self.goal else -1.0
        return self._picture(), reward, arrived, self.t == self.LIMIT and not arrived, {}

    def _picture(self) -> np.ndarray:
        picture = np.zeros((self.SIZE, self.SIZE, 3), np.uint8)
        width = self.SIZE // self.CELLS
        for cell in (0, self.CELLS - 1):
            colour = (255, 200, 40) if cell == self.goal else (90, 90, 90)
            picture[:, cell * width + 1 : (cell + 1) * width + 1] = colour
        picture[12:52, self.cell * width + 1 : (self.cell + 1) * width + 1] = (60, 160, 255)
        return picture
