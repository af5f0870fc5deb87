"""The parts of an agent: a model with its trainer, actor and replay buffer, built for an environment."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from torch import Tensor

from worldflux.accel import ranks
from worldflux.accel.compilation import captures
from worldflux.accel.device import resolve_device
from worldflux.agents.acting import Actor
from worldflux.agents.asynchronous import LearnerThread, Paused
from worldflux.agents.building import build_model, build_planner, checked_model_kwargs, set_objective, shown_model
from worldflux.agents.collecting import Collector, env_of, stands_for
from worldflux.agents.habits import PolicyMethods, refuse_policy, refuse_unknown
from worldflux.agents.learning import Learner, UpdateSchedule
from worldflux.agents.progress import Report
from worldflux.agents.settings import SETTINGS, AgentSettings, Rate, RateSchedule
from worldflux.envs.spaces import ActionCodec, ObservationCodec
from worldflux.envs.vector import seed_envs
from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError
from worldflux.factory import find_preset
from worldflux.models.base import WorldModel
from worldflux.models.objective import Objective
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.sampler import WindowSampler
from worldflux.training.checkpoint import part_of_rank
from worldflux.training.config import TrainingConfig
from worldflux.training.trainer import Trainer
from worldflux.validation import TASK_KEY, finite_number

_CHANGEABLE = ("learning_rate", "train_ratio", "tensorboard_log", "verbose")
"""Settings that can be set after the agent was built."""


class AgentBase(BaseAlgorithm):
    """Base class of `WorldFluxAgent` that builds its parts and keeps them consistent.

    `SavedAgent` adds the files, and `WorldFluxAgent` the training loop.
    """

    # Read by callbacks while a gradient step may be under way on another thread.
    policy: Paused[WorldModel] = Paused()  # type: ignore[assignment]
    trainer: Paused[Trainer] = Paused()
    actor: Paused[Actor] = Paused()
    _beside: LearnerThread | None = None
    """The learner that runs beside the actor during `learn(asynchronous=True)`."""
    learning_rate: Rate
    train_ratio: float
    batch_size: int
    seq_len: int
    buffer_size: int
    buffer_storage: str | None
    learning_starts: int
    replay_context: bool
    planner: str | None
    planner_kwargs: Mapping[str, Any] | None
    stats_window_size: int
    compile: bool | Literal["auto"]

    def __init__(
        self,
        model: str | Path | WorldModel,
        env: GymEnv | str | Mapping[str, GymEnv | str] | None,
        *,
        learning_rate: Rate | None = None,
        train_ratio: float | None = None,
        batch_size: int | None = None,
        seq_len: int | None = None,
        buffer_size: int | None = None,
        buffer_storage: str | Path | torch.device | None = None,
        learning_starts: int | None = None,
        replay_context: bool = True,
        planner: str | None = "auto",
        planner_kwargs: Mapping[str, Any] | None = None,
        objective: Objective | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | Path | None = None,
        verbose: int = 0,
        device: torch.device | str = "auto",
        seed: int | None = None,
        buffer: WindowSampler | None = None,
        offline_share: float = 0.5,
        compile: bool | Literal["auto"] = "auto",
        _init_setup_model: bool = True,
        **others: Any,
    ) -> None:
        refuse_unknown(others)
        refuse_policy(model)
        given = {name: value for name, value in locals().items() if name in SETTINGS}
        if env is None and _init_setup_model:
            raise ConfigurationError(
                "env is None, expected a name, a Gymnasium environment or a VecEnv. "
                "WorldFluxAgent.load gives an agent that acts without one."
            )
        settings = AgentSettings(**given).with_lasting_paths()
        if buffer is not None and settings.learning_starts is None:
            settings = replace(settings, learning_starts=0)
        ranks.join()
        if isinstance(env, str) and find_preset(env) is not None:
            raise ConfigurationError(
                f"env is {env!r}, which is a model. The model comes first: WorldFluxAgent({env!r}, {model!r})."
            )
        made: Any = None if env is None else env_of(env, model)
        if made is not None:
            _check_env_of_ranks(made)
            # These raise errors that name the supported spaces, unlike the assertions of SB3's constructor below.
            ObservationCodec(made.observation_space)
            ActionCodec(made.action_space)
        super().__init__(
            policy=WorldModel,  # type: ignore[arg-type]
            env=made,
            learning_rate=settings.learning_rate,  # type: ignore[arg-type]
            stats_window_size=settings.stats_window_size,
            tensorboard_log=settings.tensorboard_log,
            verbose=settings.verbose,
            device=resolve_device(device, must_compute=True),
            support_multi_env=True,
            seed=settings.seed,
        )
        vars(self).update(vars(settings))
        self._replay_buffer: ReplayBuffer | None = None
        self._model_source = model
        self._model_kwargs = checked_model_kwargs(model_kwargs, settings)
        self._collector: Collector | None = None  # while the episodes in flight are known
        self._report = Report(self)  # type: ignore[arg-type]
        self._random_started = False
        if _init_setup_model:
            self._setup_model()
            self.objective = objective
            self.learn_from(buffer, offline_share)

    def _setup_model(self) -> None:
        """Builds the model, the trainer, the actor and the buffer."""
        self.set_random_seed(self.seed)
        self.obs_codec = ObservationCodec(self.observation_space)
        self.action_codec = ActionCodec(self.action_space)
        self.policy = build_model(
            self._model_source,
            self._model_kwargs,
            self.obs_codec,
            self.action_codec,
            env=self.env,
            device=self.device,
        )
        family = self.model.online_defaults()
        vars(self).update(vars(self._settings.with_defaults(self.model, self._envs_of_all)))
        ranks.share_of("batch_size", self.batch_size)
        if self.seq_len < family.min_seq_len:
            raise ConfigurationError(
                f"seq_len is {self.seq_len}, expected at least {family.min_seq_len} for this model's losses."
            )
        self._setup_lr_schedule()
        # Each gradient step takes its rate from the schedule, which may begin at 0; this one only has to be valid.
        spec, rate = self.model.optimizer_spec, self.learning_rate
        self.trainer = Trainer(
            self.model,
            TrainingConfig(
                batch_size=self.batch_size,
                sequence_length=self.seq_len,
                learning_rate=rate if isinstance(rate, float) and rate > 0 else spec.learning_rate,
                weight_decay=spec.weight_decay,
                grad_clip=spec.grad_clip or 0.0,
                warmup_steps=spec.warmup_steps,
                device=str(self.device),
                seed=self.seed or 0,
                compile=self.compile,
            ),
        )
        planner = build_planner(self.model, self.planner, self.planner_kwargs)
        captured = captures(self.compile, self.device, self.model)
        self.actor = Actor(self.model, self.obs_codec, self.action_codec, planner, captured=captured)
        replayed = self.batch_size * self.seq_len
        made_up = int(self.learning_starts * self.train_ratio / replayed) if family.random_start else 1
        self.schedule = UpdateSchedule(self.train_ratio, replayed, max(made_up, 1))
        self._learner = Learner(
            self.trainer, self.schedule, family, learning_starts=self.learning_starts, window=self._window
        )
        PolicyMethods(self).attach()  # type: ignore[arg-type]
        if self.env is not None:
            self.replay_buffer = self._make_buffer()

    @property
    def last_losses(self) -> Mapping[str, Tensor]:
        """Losses of the last gradient step, as tensors on the device; empty before the first."""
        return self._learner.last_losses

    @property
    def burst(self) -> tuple[int, int] | None:
        """While `learn` takes many gradient steps in a row: how many of them are done, and their number.

        TD-MPC2 does so at the end of its random start. Otherwise None.
        """
        return self._learner.burst

    @property
    def policy_lag(self) -> int | None:
        """Gradient steps that were owed when the last actions of `learn(asynchronous=True)` were chosen without them.

        Otherwise None.
        """
        return None if self._beside is None else self._beside.lag

    @property
    def acting_model(self) -> WorldModel:
        """The model that chooses the actions: `model`, or a copy of it during `learn(asynchronous=True)`."""
        return self.model if self._beside is None else self._beside.acting.actor.model

    @property
    def objective(self) -> Objective | None:
        """Function that the planner maximises in place of the learned reward; None plans for the reward."""
        return None if self.actor.planner is None else self.actor.planner.objective

    @objective.setter
    def objective(self, objective: Objective | None) -> None:
        set_objective(self.actor.planner, objective)

    def learn_from(self, buffer: WindowSampler | None, offline_share: float = 0.5) -> None:
        """Learns from recorded data besides what is collected, from the next gradient step on.

        Each batch has windows of both, in a fixed share. While too little is collected for a window, all are recorded.
        The data are not copied, and checkpoints do not contain them: pass them again to `load(..., resume=True)`.

        Args:
            buffer: The data, such as `ReplayBuffer.load(path)` or a part of it; None learns from collected data alone.
                If it lacks what the model stores beside each row (`model.replay_extras()`), that is added to it.
            offline_share: Share of the windows in each batch, from 0 to 1. It is rounded to whole windows, at least one
                of each kind unless it is 0 or 1.

        Raises:
            ConfigurationError: If the share is out of its range, or `buffer` is no replay data.
            ShapeMismatchError: If the observations or actions have other shapes than those of the environment.
            BufferError: If the actions are of another kind, or the data are too short for a window.
        """
        self.pause_learner()
        share = finite_number("offline_share", offline_share)
        if not 0 <= share <= 1:
            raise ConfigurationError(f"offline_share is {share}, expected a share from 0 to 1.")
        if buffer is not None:
            if not isinstance(buffer, WindowSampler):
                raise ConfigurationError(
                    f"buffer is {buffer!r}, expected recorded data: ReplayBuffer.load(path), or "
                    "worldflux.datasets.load(path) for other formats."
                )
            self._check_data(buffer, "The recorded data")
            if isinstance(buffer, ReplayBuffer):
                buffer.add_extras(self.stored_extras())
            if not buffer.num_windows(self._window):
                raise BufferError(
                    f"No stream of the recorded data has the {self._window} rows of a window. Pass more data, or a "
                    "smaller seq_len."
                )
            if self.seed is not None:
                buffer.seed(ranks.seed_of_rank(self.seed))
        self._learner.learn_from(buffer, share)

    def pause_learner(self) -> None:
        """Waits for the present gradient step of `learn(asynchronous=True)`; the next one begins when `learn` goes on.

        Reading `model`, `trainer` or `actor` does so, and whatever uses them, such as `predict` and `save`. Callbacks
        that have kept one of these from before call this method first. Otherwise it does nothing.
        """
        if self._beside is not None and self._beside.owner == threading.get_ident():
            self._beside.pause()

    def __getstate__(self) -> dict[str, Any]:
        self.pause_learner()
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        PolicyMethods(self).attach()  # type: ignore[arg-type]

    def __repr__(self) -> str:
        """The model, the spaces, the settings that matter most, and the steps taken."""
        if "trainer" not in vars(self):
            return f"{type(self).__name__}(not set up)"
        planner = "" if self.planner is None else f", planner={self.planner!r}"
        names = getattr(self.model.config, "task_names", ())
        return (
            f"{type(self).__name__}({shown_model(self.model)}, obs_shape={self.model.config.obs_shape}, "
            f"action_space={self.action_space}, {f'tasks={names}, ' if names else ''}"
            f"n_envs={self.n_envs}, device={str(self.device)!r}, "
            f"train_ratio={self.train_ratio:g}, batches of {self.batch_size} x {self.seq_len}{planner}, "
            f"num_timesteps={self.num_timesteps}, n_updates={self._n_updates})"
        )

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = RateSchedule(self.learning_rate)

    @property
    def model(self) -> WorldModel:
        """The world model."""
        return self.policy

    @property
    def _envs_of_all(self) -> int:
        """The number of environments of all ranks."""
        return self.n_envs * ranks.size()

    # --- settings

    @property
    def _settings(self) -> AgentSettings:
        """The settings in use."""
        return AgentSettings(**{name: getattr(self, name) for name in SETTINGS})

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; a setting of an agent that is built takes effect, or cannot be changed any more.

        Raises:
            ConfigurationError: If a value cannot be used, or what depends on it was built already.
        """
        if name in SETTINGS and "trainer" in vars(self):
            self._change_setting(name, value)
        elif name == "policy" and "trainer" in vars(self) and value is not self.policy:
            raise ConfigurationError(
                "The agent's model cannot be exchanged: its optimisers and its replay data are made for it. Take over "
                "weights with set_parameters, or make an agent of the other model: WorldFluxAgent(model, env)."
            )
        else:
            super().__setattr__(name, value)

    def _change_setting(self, name: str, value: Any) -> None:
        settings = replace(self._settings, **{name: value}).with_defaults(self.model, self._envs_of_all)
        value = getattr(settings, name)
        if name not in _CHANGEABLE and value != getattr(self, name):
            how = "Call set_random_seed" if name == "seed" else "Save it, and load it with another one: WorldFluxAgent."
            how += "" if name == "seed" else f"load(path, env, {name}=...)"
            raise ConfigurationError(
                f"{name} is {getattr(self, name)!r} and cannot become {value!r}: the agent was built with it. {how}."
            )
        if name == "train_ratio":
            if value:
                self._check_size_of_buffer(value)
            self._learner.set_train_ratio(value)
        super().__setattr__(name, value)
        if name == "learning_rate":
            self._setup_lr_schedule()

    # --- the replay buffer

    @property
    def _window(self) -> int:
        """Rows in a sampled window: the trained ones, and the one whose stored state they start from."""
        return self.seq_len + bool(self.stored_extras().keys() - {TASK_KEY})

    def stored_extras(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shapes and dtypes of what is stored beside each row."""
        extras = self.model.replay_extras()
        return {name: entry for name, entry in extras.items() if self.replay_context or name == TASK_KEY}

    def _check_size_of_buffer(self, train_ratio: float) -> None:
        n_envs = self._envs_of_all
        least = max(self.learning_starts, n_envs * self._window + self.batch_size)
        if train_ratio and self.buffer_size < least:
            raise ConfigurationError(
                f"buffer_size is {self.buffer_size}, expected at least {least}: "
                f"learning_starts ({self.learning_starts}) transitions, "
                f"and {self.batch_size} windows of {self._window} rows from {n_envs} environments."
            )

    def _make_buffer(self, of_ranks: int | None = None) -> ReplayBuffer:
        """A buffer for this rank's share of `buffer_size`, or for that of one of another number of ranks."""
        self._check_size_of_buffer(self.train_ratio)
        storage: Any = self.buffer_storage
        if isinstance(storage, str) and ranks.rank():  # a directory holds one buffer
            storage = str(part_of_rank(Path(storage), ranks.rank()))
        return ReplayBuffer(
            -(-self.buffer_size // (of_ranks or ranks.size())),
            self.obs_codec.obs_shape,
            self.action_codec.action_dim,
            obs_dtype=self.obs_codec.obs_dtype,
            n_envs=self.n_envs,
            extras=self.stored_extras(),
            seed=None if self.seed is None else ranks.seed_of_rank(self.seed),
            storage=storage if of_ranks is None else None,
            action_type=self.action_codec.action_type,
            action_classes=self.action_codec.action_classes,
        )

    @property
    def replay_buffer(self) -> ReplayBuffer | None:
        """Replay buffer of the collected steps; None until there is an environment."""
        return self._replay_buffer

    @replay_buffer.setter
    def replay_buffer(self, buffer: ReplayBuffer) -> None:
        if buffer is self._replay_buffer:
            return
        self._check_buffer(buffer, "The buffer")
        self.pause_learner()  # a gradient step that was due with the present one might find the other one empty
        self._leave_episodes()
        self._replay_buffer = buffer
        self._learner.take_new_buffer(buffer)

    def _check_buffer(self, buffer: ReplayBuffer, name: str) -> None:
        """Raises unless this agent can record into a buffer and learn from it."""
        if not isinstance(buffer, ReplayBuffer):
            raise ConfigurationError(f"replay_buffer is {buffer!r}, expected a ReplayBuffer of worldflux.training.")
        self._check_data(buffer, name)
        extras = self.stored_extras()
        if buffer.n_envs != self.n_envs or {name: buffer.extras.get(name) for name in extras} != extras:
            states = ", extras=agent.model.replay_extras()" if extras else ""
            raise ConfigurationError(
                f"{name} is for {buffer.n_envs} environments and has {sorted(buffer.extras) or 'nothing'} beside its "
                f"rows, expected {self.n_envs} and {sorted(extras) or 'nothing'} for this agent. Make it with "
                f"ReplayBuffer(..., n_envs={self.n_envs}{states})."
            )

    def _check_data(self, buffer: WindowSampler, name: str) -> None:
        """Raises unless data have the observations and actions of this agent."""
        expected = (self.obs_codec.obs_shape, self.action_codec.action_dim)
        if (buffer.obs_shape, buffer.action_dim) != expected:
            raise ShapeMismatchError(
                f"{name} holds observations {buffer.obs_shape} and {buffer.action_dim} action numbers, "
                f"expected {expected[0]} and {expected[1]} for this agent."
            )
        buffer.check_actions(self.action_codec.action_classes)
        if self.actor.has_tasks:
            config: Any = self.model.config
            buffer.check_tasks(config.num_tasks, config.task_action_dims)

    # --- the environment

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seeds Python, NumPy, torch, the environments, their action space and the sampler; None does nothing."""
        if seed is None:
            return
        seed = ranks.seed_of_rank(seed)
        set_random_seed(seed, using_cuda=self.device.type == "cuda")
        self.action_space.seed(seed)
        if self.env is not None:
            seed_envs(self.env, seed)
        if self.replay_buffer is not None:
            self.replay_buffer.seed(seed)
        if "_learner" in vars(self) and self._learner.recorded is not None:
            self._learner.recorded.seed(seed)

    def set_env(self, env: GymEnv | str | Mapping[str, GymEnv | str], force_reset: bool = True) -> None:
        """Continues in another environment of the same spaces and the same number of copies, as SB3 checks.

        A callback may call it, too, as a curriculum does: the episodes in flight end there as truncated, and the next
        step of `learn` is the first one in the other environment, after a reset.

        Args:
            env: As for the constructor.
            force_reset: False leaves an environment that is already set as it is, so that
                `learn(..., reset_num_timesteps=False)` goes on with the episodes in flight. Another one is always
                reset.
        """
        if not force_reset and self.env is not None and stands_for(self.env, env):
            return
        made: Any = env_of(env, like=self)
        _check_env_of_ranks(made)
        super().set_env(made, force_reset)
        self._leave_episodes()
        if self.replay_buffer is None:
            self.replay_buffer = self._make_buffer()

    def _leave_episodes(self) -> None:
        """Closes the episodes in flight; the next `learn` starts new ones."""
        if self._collector is not None:
            self._collector.close()
        self._collector, self._last_obs = None, None

    # --- counters that SB3's constructor sets, and that are kept elsewhere here

    @property
    def _n_updates(self) -> int:
        """SB3's name of the number of gradient steps."""
        return self._learner.n_updates

    @_n_updates.setter
    def _n_updates(self, count: int) -> None:
        assert count == 0, "the learner counts"


def _check_env_of_ranks(env: Any) -> None:
    """Raises a `ConfigurationError` if an environment keeps statistics that would differ between the ranks."""
    if ranks.size() > 1 and isinstance(env, VecEnv) and unwrap_vec_normalize(env) is not None:
        raise ConfigurationError(
            "VecNormalize keeps statistics of its own environments, which would differ between the ranks of a "
            "training. Leave it out: both families transform observations and rewards themselves."
        )
