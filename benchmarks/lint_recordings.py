"""The good recordings of `benchmarks/lint.py`: tasks with policies of several kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from pixel_seek import PixelSeek

from worldflux.envs import collect, make_env
from worldflux.replay.buffer import ReplayBuffer


class Behaviour:
    """A policy with SB3's `predict`: a controller or nothing, plus noise that may be smooth over time.

    Args:
        space: The actions.
        seed: Seed of the noise.
        control: The action for an observation; None: noise alone.
        noise: Size of the noise relative to the bounds; for discrete actions the share of random ones.
        smooth: Correlation of the noise from step to step; for discrete actions the chance that a random one is kept.
    """

    def __init__(
        self,
        space: spaces.Space[Any],
        seed: int,
        control: Callable[[np.ndarray], Any] | None = None,
        noise: float = 1.0,
        smooth: float = 0.0,
    ) -> None:
        self._space, self._control, self._noise, self._smooth = space, control, noise, smooth
        self._rng = np.random.default_rng(seed)
        self._last: Any = None

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, None]:
        """Returns the actions for the observations of all environments."""
        rows = zip(observation, episode_start, strict=True)
        return np.stack([self._act(obs, bool(start)) for obs, start in rows]), None

    def _act(self, obs: np.ndarray, start: bool) -> Any:
        if isinstance(self._space, spaces.Discrete):
            if self._control is not None and self._rng.random() >= self._noise:
                return self._control(obs)
            if start or self._last is None or self._rng.random() >= self._smooth:
                self._last = int(self._rng.integers(self._space.n))
            return self._last
        assert isinstance(self._space, spaces.Box)
        fresh = self._rng.normal(size=self._space.shape)
        self._last = fresh if start or self._last is None else (
            self._smooth * self._last + np.sqrt(1 - self._smooth**2) * fresh
        )  # fmt: skip
        wanted = self._noise * 0.7 * self._last * self._space.high
        wanted = wanted if self._control is None else wanted + self._control(obs)
        return np.clip(wanted, self._space.low, self._space.high).astype(np.float32)


def balance(obs: np.ndarray) -> int:
    """Keeps the pole of CartPole upright."""
    return int(obs[2] + 0.3 * obs[3] + 0.05 * obs[0] + 0.1 * obs[1] > 0)


def swing_up(obs: np.ndarray) -> np.ndarray:
    """Swings the pendulum up, and holds it."""
    cosine, sine, velocity = obs
    angle = np.arctan2(sine, cosine)
    missing = 5.0 - (velocity**2 / 6.0 + 5.0 * cosine)
    if abs(angle) < 0.4:
        return np.array([np.clip(-10 * angle - 2 * velocity, -2, 2)])
    return np.array([2 * np.sign(velocity) * np.clip(missing, -1, 1)])


def rock(obs: np.ndarray) -> np.ndarray:
    """Drives the car where it rolls already."""
    return np.array([0.9 * np.sign(obs[1])])


def pump(obs: np.ndarray) -> int:
    """Pushes the acrobot's lower arm where it moves already."""
    return 2 if obs[5] > 0 else 0


def follow(obs: np.ndarray) -> int:
    """Moves the lower bar of the picture below the upper one."""
    picture = obs.transpose(1, 2, 0) if obs.shape[0] == 3 else obs
    return int(np.sign(np.argmax(picture[10, :, 0]) // 12 - np.argmax(picture[50, :, 2]) // 12)) + 1


def hold(obs: np.ndarray) -> np.ndarray:
    """Moves the cart of cartpole-swingup below its pole."""
    return np.array([np.tanh(2 * obs[2] - 0.3 * obs[0] - 0.5 * obs[4])])


@dataclass(frozen=True)
class Case:
    """A task with a policy.

    Attributes:
        task: Name of the task.
        policy: Name of the policy.
        settings: Arguments of `Behaviour`; None: uniformly random actions.
        sizes: Numbers of episodes to record.
        limit: Another time limit than the task's.
        group: "own" for the tasks that the checks were developed on, "other" for the rest.
    """

    task: str
    policy: str
    settings: dict[str, Any] | None
    sizes: tuple[int, ...] = (20, 100)
    limit: int | None = None
    group: str = "own"

    def make(self) -> gym.Env[Any, Any]:
        """Makes the environment."""
        if self.limit is not None:
            return gym.make(self.task, max_episode_steps=self.limit)
        if self.task == "PixelSeek":
            return PixelSeek()
        if self.task.endswith(" pixels"):
            return TimeLimit(make_env(self.task.removesuffix(" pixels"), pixels=True), 100)
        return make_env(self.task)


SMOOTH = {"smooth": 0.9}
OTHER_TASKS = (
    "acrobot-swingup", "ball_in_cup-catch", "cartpole-balance", "cartpole-two_poles", "finger-spin",
    "finger-turn_hard", "fish-swim", "hopper-hop", "manipulator-bring_ball", "manipulator-insert_peg",
    "pendulum-swingup", "point_mass-easy", "quadruped-walk", "reacher-hard", "stacker-stack_2", "stacker-stack_4",
    "swimmer-swimmer6", "walker-run",
)  # fmt: skip
CASES = (
    Case("CartPole-v1", "random", {}),
    Case("CartPole-v1", "controller, 10% random", {"control": balance, "noise": 0.1}),
    Case("CartPole-v1", "controller, 60% random", {"control": balance, "noise": 0.6}),
    Case("CartPole-v1", "controller", {"control": balance, "noise": 0.0}, (20,)),
    Case("Pendulum-v1", "random", None),
    Case("Pendulum-v1", "smooth", SMOOTH),
    Case("Pendulum-v1", "very smooth", {"smooth": 0.98}, (20,)),
    Case("Pendulum-v1", "controller", {"control": swing_up, "noise": 0.0}),
    Case("MountainCarContinuous-v0", "random", None, (20,)),
    Case("MountainCarContinuous-v0", "controller with noise", {"control": rock, "noise": 0.4, "smooth": 0.5}),
    Case("MountainCar-v0", "sticky random", {"smooth": 0.8}, (20,)),
    Case("Acrobot-v1", "random", {}, (20,)),
    Case("Acrobot-v1", "controller, 20% random", {"control": pump, "noise": 0.2}),
    Case("Pendulum-v1", "smooth, without ends", SMOOTH, (1,), 8_000),
    Case("MountainCar-v0", "sticky random, without ends", {"smooth": 0.8}, (1,), 8_000),
    Case("dmc/walker-stand", "random", None, (20,)),
    Case("dmc/walker-stand", "smooth", SMOOTH, (20,)),
    Case("dmc/cartpole-swingup", "smooth", SMOOTH, (20,)),
    Case("dmc/cartpole-swingup", "controller with noise", {"control": hold, "noise": 0.3}, (20,)),
    Case("dmc/cheetah-run", "random", None, (20,)),
    Case("dmc/cheetah-run", "smooth", SMOOTH, (20,)),
    Case("PixelSeek", "random", {}),
    Case("PixelSeek", "controller, 30% random", {"control": follow, "noise": 0.3}),
    Case("dmc/cartpole-swingup pixels", "smooth", SMOOTH, (20,)),
    *(
        Case(f"dmc/{task}", name, settings, (20,), group="other")
        for task in OTHER_TASKS
        for name, settings in (("random", None), ("smooth", SMOOTH))
    ),
    Case("ALE/Pong-v5", "random", {}, (5,), group="other"),
)


def recorded(case: Case, episodes: int, seed: int, cache: Path | None) -> ReplayBuffer:
    """The case's good data."""
    path = None
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        path = cache / (f"{case.task}-{case.policy}-{episodes}-{seed}.npz".replace("/", "-").replace(" ", "_"))
        if path.exists():
            return ReplayBuffer.load(path)
    env = case.make()
    policy = None if case.settings is None else Behaviour(env.action_space, seed + 1000, **case.settings)
    buffer = collect(env, policy, episodes=episodes, seed=seed)
    env.close()
    if path is not None:
        buffer.save(path)
    return buffer
