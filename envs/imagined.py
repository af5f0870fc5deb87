"""A learned world as an environment, in which algorithms of stable-baselines3 train without the real one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn
from torch import Tensor

from worldflux.envs.spaces import ActionCodec, ObservationCodec, space_like
from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError, TrainingError, a_type
from worldflux.models.base import State, WorldModel
from worldflux.models.evaluation import evaluating, observed_states
from worldflux.models.final_rows import with_final_rows
from worldflux.models.mppi import PlanningModel
from worldflux.replay.batch import Observation, by_key
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.views import newest_rows
from worldflux.validation import SINGLE_KEY, whole_number

_WINDOWS = 16
"""Smallest number of windows whose rows become starts together."""


class ImaginedVecEnv(VecEnv):
    """Steps a world model from replayed states, as a vectorised environment of stable-baselines3.

        agent = WorldFluxAgent("dreamerv3:tiny", "CartPole-v1").learn(5_000)
        env = ImaginedVecEnv(
            agent.model,
            agent.replay_buffer,
            n_envs=16,
            horizon=50,
            observation_space=agent.observation_space,
            action_space=agent.action_space,
        )
        policy = PPO("MlpPolicy", VecMonitor(env)).learn(100_000)

    Each episode begins at a row of the buffer: the model sees the rows before it, and `reset` returns the recorded
    observation. From there on, observations, rewards and terminations are the model's predictions, with latents and
    terminations that are sampled. After `horizon` steps the episode is truncated, because errors accumulate, and SB3's
    algorithms bootstrap with the value of its last observation.

    The model may go on learning, and the buffer may grow: each step uses the weights of the moment. Neither the
    model's mode nor the global random streams and those of the buffer change, and equal seeds give equal episodes.

    Args:
        model: A model of any family that decodes observations: DreamerV3 with `representation="reconstruction"`, or
            TD-MPC2 with `use_decoder=True`.
        buffer: Experience that episodes begin in, such as what the model was trained on.
        n_envs: Number of episodes that are imagined together; one call of the model steps all of them.
        horizon: Steps after which an episode is truncated.
        observation_space: Space of the observations, such as that of the real environment, so that a policy can act in
            both. None gives observations as the buffer holds them.
        action_space: Space of the actions. None takes continuous actions in [-1, 1], or the numbers of discrete ones.
        context: Number of rows that the model sees before an episode begins. Rows of an earlier episode do not count.
        seed: Seed of the episodes. `seed()`, which SB3's algorithms call with their own seed, replaces it.

    Raises:
        ConfigurationError: If the model has no decoder, a space does not fit it, or an argument is not valid.
        ShapeMismatchError: If the buffer has other observations or actions than the model.
        BufferError: If the buffer holds no windows of twice `context` rows, or rows of other tasks than the model's.
        TrainingError: If the model predicts NaN.
    """

    def __init__(
        self,
        model: WorldModel,
        buffer: ReplayBuffer,
        n_envs: int = 16,
        horizon: int = 50,
        *,
        observation_space: spaces.Space[Any] | None = None,
        action_space: spaces.Space[Any] | None = None,
        context: int = 5,
        seed: int = 0,
    ) -> None:
        for name, given, kind in (("model", model, WorldModel), ("buffer", buffer, ReplayBuffer)):
            if not isinstance(given, kind):
                raise ConfigurationError(
                    f"{name} is {a_type(given)}, expected a {kind.__name__}. An agent has both, as "
                    "agent.model and agent.replay_buffer; ReplayBuffer.load reads a file."
                )
        self.model, self.buffer = model, buffer
        self.horizon = whole_number("horizon", horizon, 1)
        self.context = whole_number("context", context, 1)
        n_envs = whole_number("n_envs", n_envs, 1)
        self._observations, self._action_codec = _codecs(model, observation_space, action_space)
        _check_data(model, buffer)
        self.render_mode = None
        self._order: NDArray[np.int64] = np.zeros(0, np.int64)
        self._set_seed(whole_number("seed", seed, 0))
        with self._imagining():
            example = model.decode(model.initial_state(1))
        if "obs" not in example:
            raise ConfigurationError(
                f"This {model.config.model_type} model decodes no observations, which an environment has to give. "
                "Train a model with a decoder: TD-MPC2 has one with use_decoder=True, and DreamerV3 with "
                'representation="reconstruction".'
            )
        super().__init__(n_envs, self._observations.space, self._action_codec.space)
        self._state: State | None = None
        self._steps = np.zeros(n_envs, np.int64)
        self._actions: NDArray[np.float32] | None = None
        self._choose_starts()

    # --- moving

    def reset(self) -> VecEnvObs:
        """Begins all episodes at other rows of the buffer."""
        if self._seeds[0] is not None:
            self._set_seed(self._seeds[0])
            self._reset_seeds()
        self._state, rows = self._take_starts(self.num_envs)
        self._steps[:] = 0
        return self._observations.decode(rows)

    def step_async(self, actions: NDArray[Any]) -> None:
        """Takes the actions of the next step, `[n_envs, *action_space.shape]`."""
        self._actions = self._action_codec.from_env(actions)
        if len(self._actions) != self.num_envs:
            raise ShapeMismatchError(
                f"There are {len(self._actions)} actions, expected one for each of {self.num_envs}."
            )
        if not np.isfinite(self._actions).all():
            raise TrainingError(f"The actions are not finite: {actions}. The policy that chose them may have diverged.")

    def step_wait(self) -> VecEnvStepReturn:
        """Predicts the results of the actions, and begins the next episode where one ended."""
        if self._state is None or self._actions is None:
            raise ConfigurationError("The environment has no episode to step. Call reset first, then step.")
        with self._imagining():
            action = torch.from_numpy(self._actions).to(self.model.device)
            if isinstance(self.model, PlanningModel) and (mask := self.model.action_mask(self._state)) is not None:
                action = action * mask  # as the environment of a task takes those that it has
            ahead = self.model.rollout(self._state, action[None])
            state = ahead.states[0]
            found = self._checked(self.model.decode(state)["obs"], ahead.rewards)
            terminated = (torch.rand(self.num_envs) >= ahead.continues[0].float().cpu()).numpy()
        self._actions = None
        rewards = ahead.rewards[0].float().cpu().numpy()
        self._steps += 1
        truncated = (self._steps >= self.horizon) & ~terminated
        dones = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if dones.any():
            last = self._observations.decode(found)
            ended = np.flatnonzero(dones)
            for i in ended.tolist():
                infos[i] = {"terminal_observation": _row(last, i), "TimeLimit.truncated": bool(truncated[i])}
            state = self._restart(state, found, ended)
        self._state = state
        return self._observations.decode(found), rewards, dones, infos

    def _restart(self, state: State, rows: dict[str, NDArray[Any]], ended: NDArray[np.int64]) -> State:
        """Replaces the rows of ended episodes, in the returned state and in the arrays of observations."""
        starts, first = self._take_starts(len(ended))
        for key, values in first.items():
            rows[key][ended] = values
        self._steps[ended] = 0
        at = torch.from_numpy(ended).to(self.model.device)
        return State({name: value.index_copy(0, at, starts[name].to(value.dtype)) for name, value in state.items()})

    # --- beginnings

    def _take_starts(self, count: int) -> tuple[State, dict[str, NDArray[Any]]]:
        """States in which episodes begin, and their recorded observations `[count, ...]` in the library's form."""
        states: list[State] = []
        rows: list[dict[str, NDArray[Any]]] = []
        while count:
            if not len(self._order):
                self._choose_starts()
            taken, self._order = self._order[:count], self._order[count:]
            count -= len(taken)
            states.append(self._starts[torch.from_numpy(taken).to(self.model.device)])
            rows.append({key: values[taken] for key, values in self._recorded.items()})
        return State.cat(states), {key: np.concatenate([part[key] for part in rows]) for key in rows[0]}

    def _choose_starts(self) -> None:
        """Draws windows of the buffer, and keeps the model's states at their rows in random order."""
        windows, length = max(_WINDOWS, self.num_envs), 2 * self.context
        with self.buffer.lock:
            rows = newest_rows(self.buffer, self.buffer.capacity, int(self._rng.integers(2**31)))
            if not rows.num_windows(length):
                raise BufferError(
                    f"No stream of the buffer has {length} rows, twice the context of {self.context}. Pass more data, "
                    "or a smaller context."
                )
            while True:
                batch = rows.sample(windows, length).to(self.model.device)
                if batch.is_first is None:
                    batch = with_final_rows(batch)
                assert batch.is_first is not None
                # No action was taken at the last row of an episode, which comes before a first one.
                usable = ~batch.is_first[:, self.context :]
                if batch.obs_mask is not None:
                    usable &= batch.obs_mask[:, self.context - 1 : -1]
                if usable.any():
                    break
        with self._imagining():
            states = observed_states(self.model, batch)[self.context - 1 : -1]
        at = usable.transpose(0, 1)
        self._starts = State({name: value[at] for name, value in states.items()})
        self._recorded = {
            key: value[:, self.context - 1 : -1].transpose(0, 1)[at].cpu().numpy()
            for key, value in by_key(batch.obs).items()
        }
        self._order = self._rng.permutation(int(at.sum()))

    # --- random numbers and values

    def _set_seed(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._order = np.zeros(0, np.int64)

    def _imagining(self) -> AbstractContextManager[None]:
        """Evaluates the model, with the next numbers of the environment's own random stream."""
        return evaluating(self.model, self.model.device, int(self._rng.integers(2**31)))

    def _checked(self, obs: Observation, rewards: Tensor) -> dict[str, NDArray[Any]]:
        """The decoded observation in the library's form, by key. Images become bytes."""
        found = {}
        for key, value in by_key(obs).items():
            value = value.float()
            if not (torch.isfinite(value).all() and torch.isfinite(rewards).all()):
                raise TrainingError(
                    "The model predicts NaN or infinite values, so that its world cannot be stepped. Look at its "
                    "losses, and load weights from before they diverged."
                )
            is_image = len(self.model.config.obs_shapes[key]) == 3
            found[key] = (value.mul(255).round().byte() if is_image else value).cpu().numpy()
        return found

    # --- the rest of SB3's interface

    def close(self) -> None:
        """Does nothing: there are no processes and windows."""

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Returns an attribute of this object, once for each environment."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Raises an error: the environments are one, and share their attributes."""
        raise ConfigurationError(
            f"{attr_name!r} cannot be set for single environments of an ImaginedVecEnv, which share one model. Set it "
            "on the object itself."
        )

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Raises an error: there are no environments behind the model."""
        raise ConfigurationError(
            f"{method_name!r} cannot be called: an ImaginedVecEnv has a model, and no environments with methods."
        )

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Returns False for each environment."""
        return [False for _ in self._get_indices(indices)]


class ImaginedEnv(gym.Env[Any, Any]):
    """Steps a world model from replayed states, as a Gymnasium environment.

    It is one environment of an `ImaginedVecEnv` and takes the same arguments, except for `n_envs`. Several of them in
    one `ImaginedVecEnv` are much faster.
    """

    def __init__(self, model: WorldModel, buffer: ReplayBuffer, horizon: int = 50, **arguments: Any) -> None:
        self._envs = ImaginedVecEnv(model, buffer, 1, horizon, **arguments)
        self.observation_space, self.action_space = self._envs.observation_space, self._envs.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begins an episode at another row of the buffer."""
        super().reset(seed=seed)
        if seed is not None:
            self._envs.seed(seed)
        return _row(self._envs.reset(), 0), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Predicts the results of an action."""
        obs, rewards, dones, infos = self._envs.step(np.asarray(action)[None])
        info = infos[0]
        last = info.pop("terminal_observation", None)
        truncated = bool(info.pop("TimeLimit.truncated", False))
        return (
            _row(obs, 0) if last is None else last,
            float(rewards[0]),
            bool(dones[0]) and not truncated,
            truncated,
            info,
        )


def _codecs(
    model: WorldModel, observation_space: spaces.Space[Any] | None, action_space: spaces.Space[Any] | None
) -> tuple[ObservationCodec, ActionCodec]:
    """Codecs of the given spaces, or of those that a model's configuration describes."""
    config = model.config
    if observation_space is None:
        parts = {key: _space(shape, config.obs_classes.get(key, ())) for key, shape in config.obs_shapes.items()}
        observation_space = spaces.Dict(parts) if isinstance(config.obs_shape, dict) else parts[SINGLE_KEY]
    if action_space is None:
        action_space = (
            spaces.Box(-1.0, 1.0, (config.action_dim,))
            if config.action_type == "continuous"
            else _choices(config.action_classes, config.action_type == "discrete")
        )
    observations, actions = ObservationCodec(observation_space), ActionCodec(action_space)
    if observations.obs_shape != config.obs_shape:
        raise ConfigurationError(
            f"observation_space gives observations of shape {observations.obs_shape}, and the model was built for "
            f"{config.obs_shape}. Pass the space of the environment that the model learned from."
        )
    given, own = ((x.action_type, x.action_dim, x.action_classes) for x in (actions, config))
    if given != own:
        raise ConfigurationError(
            f"action_space has {_shown(*given)}, and the model was built for {_shown(*own)}. Pass the space of the "
            "environment that the model learned from."
        )
    if config.obs_classes and observations.obs_classes != config.obs_classes:
        raise ConfigurationError(
            f"observation_space has the classes {observations.obs_classes}, and the model was built for "
            f"{config.obs_classes}. Pass the space of the environment that the model learned from."
        )
    return observations, actions


def _shown(kind: str, dim: int, classes: tuple[int, ...]) -> str:
    return f"{kind} actions of {dim} numbers" + (f" with the classes {classes}" if classes else "")


def _check_data(model: WorldModel, buffer: ReplayBuffer) -> None:
    """Raises an error unless a buffer has the observations, actions and tasks of a model."""
    config: Any = model.config
    expected = (config.obs_shape, config.action_dim)
    if (buffer.obs_shape, buffer.action_dim) != expected:
        raise ShapeMismatchError(
            f"The buffer holds observations {buffer.obs_shape} and {buffer.action_dim} action numbers, expected "
            f"{expected[0]} and {expected[1]} for this model. Pass the data that it learned from."
        )
    buffer.check_actions(config.action_classes)
    if getattr(config, "num_tasks", 1) > 1:
        buffer.check_tasks(config.num_tasks, config.task_action_dims)


def _space(shape: Sequence[int], classes: tuple[int, ...]) -> spaces.Space[Any]:
    if classes:
        return _choices(classes, len(classes) == 1)
    return space_like(shape, np.uint8 if len(shape) == 3 else np.float32)


def _choices(classes: Iterable[int], single: bool) -> spaces.Space[Any]:
    return spaces.Discrete(next(iter(classes))) if single else spaces.MultiDiscrete(list(classes))


def _row(obs: Any, index: int) -> Any:
    return {key: value[index] for key, value in obs.items()} if isinstance(obs, dict) else obs[index]
