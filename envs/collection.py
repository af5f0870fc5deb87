"""`collect` fills a replay buffer with what a policy does in an environment."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from worldflux.envs.make import as_env, check_batches, make_env
from worldflux.envs.recording.recorder import VecEpisodeRecorder
from worldflux.envs.spaces import ActionCodec, Array, ObservationCodec
from worldflux.envs.vector import row_of, seed_envs
from worldflux.errors import ConfigurationError, MissingDependencyError, install_hint
from worldflux.replay.buffer import ReplayBuffer
from worldflux.validation import whole_number

_FIRST_STEPS = 1000
"""The number of steps of each environment that a buffer has room for before it grows."""


@runtime_checkable
class Predictor(Protocol):
    """The interface that SB3's algorithms and `WorldFluxAgent` have in common."""

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Returns the actions, and the state to pass with the next observation."""


Policy = Predictor | Callable[[Any], Any]


def collect(
    env: str | gym.Env[Any, Any] | VecEnv | VectorEnv[Any, Any, Any],
    policy: Policy | None = None,
    *,
    steps: int | None = None,
    episodes: int | None = None,
    capacity: int | None = None,
    seed: int | None = None,
    deterministic: bool = False,
    progress: bool = False,
    callback: Callable[[int], bool | None] | None = None,
) -> ReplayBuffer:
    """Collects the steps of a policy in an environment into a replay buffer.

        >>> collect("CartPole-v1", episodes=10, seed=0).save("cartpole.npz")

    Each environment has a stream of its own in the buffer. The episodes are shared out evenly among several
    environments beforehand, as in SB3's `evaluate_policy`, because the first to end would be the short ones. An
    environment that has made its share waits for the others, and what it does meanwhile is not stored.

    Args:
        env: An environment's name as in `make_env`, a Gymnasium environment, an SB3 `VecEnv` or a Gymnasium vector
            environment. It is reset first; one that was given stays open, somewhere in an episode.
        policy: An object with SB3's `predict`, or a function that gives the action for an observation; for a `VecEnv`
            or a vector environment, the actions for all observations. None acts at random.
        steps: The least number of transitions; several environments may overshoot it by fewer than there are. Episodes
            that are in flight then are closed as truncated, with their last observation.
        episodes: The exact number of complete episodes. Give this or `steps`.
        capacity: The capacity of the buffer, whose oldest transitions make room for newer ones; None keeps all.
        seed: The seed of the environments, the random actions and the buffer's sampler.
        deterministic: Whether `predict` is asked for deterministic actions.
        progress: Whether to show a progress bar, with tqdm.
        callback: Called after each step with the number of transitions collected so far, or of complete episodes if
            `episodes` is given. If it returns False, collecting stops, and the episodes in flight are closed as
            truncated.

    Returns:
        The buffer.

    Raises:
        ConfigurationError: If an argument cannot be used.
        MissingDependencyError: If a package is needed that is not installed.
        BufferError: If the environment gives what cannot be stored, or the memory does not suffice.
    """
    if (steps is None) == (episodes is None):
        raise ConfigurationError(f"steps is {steps} and episodes is {episodes}, expected a number for one of them.")
    goal = whole_number("steps", steps, 1) if episodes is None else whole_number("episodes", episodes, 1)
    if capacity is not None:
        capacity = whole_number("capacity", capacity, 1)
    if seed is not None:
        seed = whole_number("seed", seed, 0)
    if policy is not None and not (isinstance(policy, Predictor) or callable(policy)):
        raise ConfigurationError(f"policy is {policy!r}, expected an object with predict(), a function or None.")
    bar = _bar(goal, "steps" if episodes is None else "episodes") if progress else None
    venv = _as_vec_env(env)
    try:
        if seed is not None:
            seed_envs(venv, seed)
        single = not isinstance(env, VecEnv | VectorEnv)
        act = _actor(venv, policy, seed, deterministic, single)
        return _collect(venv, act, steps, episodes, capacity, seed, bar, callback)
    finally:
        if bar is not None:
            bar.close()
        if isinstance(env, str):
            venv.close()


def _collect(
    venv: VecEnv,
    act: Callable[[Any, Array], Any],
    steps: int | None,
    episodes: int | None,
    capacity: int | None,
    seed: int | None,
    bar: Any,
    callback: Callable[[int], bool | None] | None,
) -> ReplayBuffer:
    n_envs = venv.num_envs
    obs_codec, action_codec = ObservationCodec(venv.observation_space), ActionCodec(venv.action_space)
    buffer = ReplayBuffer(
        capacity or n_envs * (-(-steps // n_envs) if steps is not None else _FIRST_STEPS),
        obs_codec.obs_shape,
        action_codec.action_dim,
        obs_dtype=obs_codec.obs_dtype,
        n_envs=n_envs,
        seed=seed,
    )
    if steps is not None or capacity is not None:
        buffer.check_budget(steps)
    recorder = VecEpisodeRecorder(buffer, venv)
    left = None
    if episodes is not None:
        # As in SB3's evaluate_policy, the last environments make one more where the episodes cannot be shared evenly.
        left = [(episodes + env) // n_envs for env in range(n_envs)]
    resting = [] if left is None else [env for env in range(n_envs) if not left[env]]
    obs, starts = venv.reset(), np.ones(n_envs, dtype=bool)
    recorder.begin(obs)
    room = 0
    while recorder.steps < steps if steps is not None else len(resting) < n_envs:
        if capacity is None and room < 1:
            if buffer.room < 1:
                buffer.grow(2 * buffer.capacity)
            room = buffer.room
        room -= 1
        before = recorder.steps
        actions = act(obs, starts)
        checked = recorder.checked_actions(actions)
        obs, rewards, starts, infos = venv.step(actions)
        ended = recorder.add_vec_step(checked, obs, rewards, starts, infos, skipped=resting)
        if left is not None and ended:
            for env in ended:
                left[env] -= 1
            resting = [env for env in range(n_envs) if not left[env]]
        if bar is not None:
            bar.update(recorder.steps - before if left is None else len(ended))
        if callback is not None:
            done = recorder.steps if left is None or episodes is None else episodes - sum(left)
            if callback(done) is False:
                break
    recorder.close()
    return buffer


def _as_vec_env(env: Any) -> VecEnv:
    made = as_env(make_env(env) if isinstance(env, str) else env)
    if not isinstance(made, VecEnv):
        check_batches(made)
    return made if isinstance(made, VecEnv) else DummyVecEnv([lambda: made])


def _actor(
    venv: VecEnv, policy: Policy | None, seed: int | None, deterministic: bool, single: bool
) -> Callable[[Any, Array], Array]:
    """A function from observations `[n_envs, ...]` and starts of episodes `[n_envs]` to actions `[n_envs, ...]`."""
    space = copy.deepcopy(venv.action_space)
    if policy is None:
        if seed is not None:
            space.seed(seed)
        return lambda obs, starts: np.stack([space.sample() for _ in range(venv.num_envs)])
    state: Any = None

    def act(obs: Any, starts: Array) -> Array:
        nonlocal state
        if isinstance(policy, Predictor):
            actions, state = policy.predict(obs, state=state, episode_start=starts, deterministic=deterministic)
        else:
            actions = [policy(row_of(obs, 0))] if single else policy(obs)
        array = np.asarray(actions)
        # Functions tend to return Python numbers, and environments expect the dtype of their space.
        fits = isinstance(space, gym.spaces.Box) or array.dtype.kind in "iub"
        return array.astype(space.dtype, copy=False) if fits else array

    return act


def _bar(goal: int, unit: str) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise MissingDependencyError(
            f"The progress bar needs tqdm. Install it with: {install_hint('extra')}."
        ) from error
    return tqdm(total=goal, unit=f" {unit}")
