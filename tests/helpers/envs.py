"""Environments whose observations, rewards and flags identify the step they belong to, and others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

IMAGE_SHAPE = (48, 48, 3)


class CountingEnv(gym.Env[Any, Any]):
    """Shows the numbers of its episode and step.

    The vector observation is `[env_id, episode, step, last action]`; the reward of the action taken at step t of
    episode e is `100 * e + t + 1`; so every number of a replayed row can be checked against the others.

    Args:
        lengths: Steps of the episodes, in turn.
        ends: How the episodes end, in turn: "terminate", "truncate" or "both" on the same step.
        obs: "vector", "image" (HWC) or "dict" (an image, a vector and a Discrete).
        action_space: By default `Box(0, 10, (1,))`.
        env_id: First number of the observation.
        raise_at: Step over all episodes at which `step` raises KeyboardInterrupt.
    """

    def __init__(
        self,
        lengths: Sequence[int] = (5,),
        ends: Sequence[str] = ("terminate",),
        obs: str = "vector",
        action_space: spaces.Space[Any] | None = None,
        env_id: int = 0,
        raise_at: int | None = None,
    ) -> None:
        self.lengths, self.ends, self.obs_kind = lengths, ends, obs
        self.env_id, self.raise_at = env_id, raise_at
        self.episode, self.t, self.last_action, self.total = -1, 0, 0.0, 0
        vector = spaces.Box(-np.inf, np.inf, (4,), np.float64)
        image = spaces.Box(0, 255, IMAGE_SHAPE, np.uint8)
        parts = {"image": image, "vector": vector, "kind": spaces.Discrete(3, start=1)}
        self.observation_space = {"vector": vector, "image": image, "dict": spaces.Dict(parts)}[obs]
        self.action_space = action_space or spaces.Box(0.0, 10.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.t, self.last_action = self.episode + 1, 0, 0.0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        if self.total == self.raise_at:
            self.raise_at = None
            raise KeyboardInterrupt
        self.total += 1
        reward = 100.0 * self.episode + self.t + 1
        self.t, self.last_action = self.t + 1, float(np.asarray(action).reshape(-1)[0])
        over = self.t >= self.lengths[self.episode % len(self.lengths)]
        end = self.ends[self.episode % len(self.ends)]
        return self._obs(), reward, over and end != "truncate", over and end != "terminate", {}

    def _obs(self) -> Any:
        vector = np.array([self.env_id, self.episode, self.t, self.last_action])
        image = np.zeros(IMAGE_SHAPE, np.uint8)
        image[..., 0], image[..., 1], image[..., 2] = self.t % 256, self.episode % 256, self.env_id
        whole = {"image": image, "vector": vector, "kind": np.int64(1 + self.t % 3)}
        return {"vector": vector, "image": image, "dict": whole}[self.obs_kind]


def assert_rows_belong_together(obs: np.ndarray, actions: np.ndarray, rewards: np.ndarray, is_first: np.ndarray) -> int:
    """Checks windows of `CountingEnv` with its own action space; returns the number of compared pairs of rows.

    Args:
        obs: Vector observations. `[B, T, 4]`
        actions: Library form. `[B, T, 1]`
        rewards: `[B, T]`
        is_first: `[B, T]`
    """
    # Undoing VecNormalize costs the last digits of an episode's last observation.
    whole = np.rint(obs)
    np.testing.assert_array_equal(obs[..., :3], whole[..., :3])
    env_id, episode, step, last_action = whole[..., 0], whole[..., 1], whole[..., 2], obs[..., 3]
    executed = 5.0 + 5.0 * np.clip(actions[..., 0], -1.0, 1.0)
    follows = ~is_first[:, 1:]
    assert np.all(env_id[:, 1:] == env_id[:, :-1])
    assert np.all(step[is_first] == 0)
    assert np.all(step[:, 1:][follows] == step[:, :-1][follows] + 1)
    assert np.all(episode[:, 1:][follows] == episode[:, :-1][follows])
    np.testing.assert_allclose(last_action[:, 1:][follows], executed[:, :-1][follows], atol=1e-3)
    # A row that the next one follows in the same episode holds a step; the others may be final rows, which hold none.
    np.testing.assert_array_equal(rewards[:, :-1][follows], (100 * episode + step + 1)[:, :-1][follows])
    return int(follows.sum())


class Corridor(gym.Env[int, int]):
    """Six cells in a row; going right from the leftmost one, the last is reached in five steps.

    Every step costs 0.1, the last cell earns 1 and ends the episode; after 20 steps time is up. The best return is 0.5,
    random actions earn about -1.2.
    """

    CELLS, LIMIT, BEST = 6, 20, 0.5

    def __init__(self) -> None:
        self.observation_space = spaces.Discrete(self.CELLS)
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.cell, self.t = 0, 0
        return self.cell, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.cell, self.t = max(0, self.cell + (1 if action == 1 else -1)), self.t + 1
        arrived = self.cell == self.CELLS - 1
        return self.cell, -0.1 + float(arrived), arrived, self.t == self.LIMIT and not arrived, {}


class DiceEnv(gym.Env[Any, Any]):
    """Draws everything from one random stream, which goes on from one episode to the next.

    An episode has 1 to 6 steps and ends by a termination, a truncation or both at once. The observation is
    `[a random number, the step, the last action]`, or a dictionary of that and an image; the reward is random.

    Args:
        obs: "vector" or "dict".
    """

    def __init__(self, obs: str = "vector") -> None:
        self.obs_kind = obs
        vector = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        parts = {"vector": vector, "image": spaces.Box(0, 255, (12, 10, 3), np.uint8)}
        self.observation_space = vector if obs == "vector" else spaces.Dict(parts)
        self.action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.length, self.end = 0, int(self.np_random.integers(1, 7)), int(self.np_random.integers(3))
        return self._obs(0), {"length": self.length}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        over = self.t == self.length
        reward = float(self.np_random.normal()) + float(action)
        return self._obs(int(action)), reward, over and self.end != 0, over and self.end != 1, {"step": self.t}

    def _obs(self, action: int) -> Any:
        vector = np.array([self.np_random.random(), self.t, action], np.float32)
        if self.obs_kind == "vector":
            return vector
        return {"vector": vector, "image": self.np_random.integers(0, 256, (12, 10, 3), dtype=np.uint8)}


class Aim(gym.Env[Any, Any]):
    """Shows a number, and pays more the nearer the action comes to it, for five steps.

    The best return is 5; random actions earn about 1.7.
    """

    BEST = 5.0

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._show(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = 1.0 - abs(float(action[0] - self.shown[0]))
        self.t += 1
        return self._show(), reward, False, self.t == 5, {}

    def _show(self) -> np.ndarray:
        self.shown = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.shown


class Samples(gym.Env[Any, Any]):
    """Observes samples of any space; every episode is truncated after `length` steps."""

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any] | None = None, length: int = 4
    ) -> None:
        self.observation_space, self.action_space = observation_space, action_space or spaces.Discrete(2)
        self.length = length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.t += 1
        return self.observe(), self.earn(), False, self.t >= self.length, {}

    def observe(self) -> Any:
        """The observation at step `t`."""
        return self.observation_space.sample()

    def earn(self) -> Any:
        """The reward of the step to `t`."""
        return 0.0


class Gives(Samples):
    """Computes observations and rewards from the step, whether they fit the space or not."""

    def __init__(
        self,
        space: spaces.Space[Any],
        obs: Callable[[int], Any],
        reward: Callable[[int], Any] = float,
        length: int = 6,
        **attributes: Any,
    ) -> None:
        super().__init__(space, length=length)
        self.obs, self.reward = obs, reward
        vars(self).update(attributes)

    def observe(self) -> Any:
        return self.obs(self.t)

    def earn(self) -> Any:
        return self.reward(self.t)
