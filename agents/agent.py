"""WorldFluxAgent: a world model that acts, collects, learns, and keeps the interface of stable-baselines3 (SB3)."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import safe_mean, set_random_seed, update_learning_rate
from torch import Tensor

from worldflux.accel.compilation import captures
from worldflux.accel.device import resolve_device
from worldflux.accel.overriding import overridden, steps_back
from worldflux.agents.acting import Actor, Memory
from worldflux.agents.building import build_model, build_planner, checked_model_kwargs
from worldflux.agents.collecting import Collector, frames_per_vec_step, stands_for, steps_in_subprocesses
from worldflux.agents.learning import Learner, UpdateSchedule, dump_log
from worldflux.agents.saving import SavedAgent
from worldflux.agents.settings import AgentSettings, Rate, RateSchedule
from worldflux.envs.make import as_env
from worldflux.envs.spaces import ActionCodec, ObservationCodec
from worldflux.envs.vector import seed_envs
from worldflux.errors import ConfigurationError
from worldflux.files import writing
from worldflux.models.base import WorldModel
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.checkpoint import ReplaySegments
from worldflux.training.callbacks import Callback, CheckpointCallback
from worldflux.training.config import TrainingConfig
from worldflux.training.saving import call_all
from worldflux.training.signals import StopRequest, stopping_on_signals
from worldflux.training.trainer import Trainer
from worldflux.validation import whole_number

logger = logging.getLogger("worldflux")

SelfAgent = TypeVar("SelfAgent", bound="WorldFluxAgent")


class WorldFluxAgent(SavedAgent):
    """Learns a world model of an environment while acting in it.

        >>> agent = WorldFluxAgent("dreamerv3:size12m", "CartPole-v1").learn(10_000)
        >>> action, state = agent.predict(obs)                          # first observation of an episode
        >>> action, state = agent.predict(next_obs, state)              # and the ones after it

    Settings that are None take the numbers of the model's family (`WorldModel.online_defaults`, `optimizer_spec`);
    afterwards the attributes of the same names hold the numbers in use. Of these, `learning_rate`, `train_ratio`,
    `tensorboard_log` and `verbose` can be set at any time; the agent is built with the others.

    Attributes:
        model: The world model; `policy` is another name of it, which SB3 uses.
        replay_buffer: What was collected; None until there is an environment. It can be set to another one, also by a
            callback: the episodes in flight end as truncated, and training begins when that one holds enough.
        trainer: Owns the gradient steps.
        schedule: Says how many of them are due.
        last_losses: Of the last gradient step, as tensors on the device.

    Args:
        model: A preset (`list_models()` shows them), a directory written by `save_pretrained`, or a `WorldModel`. A
            preset's name wins over a directory that is called the same, as in `create_world_model`.
        env: A name as in `make_env`, a Gymnasium environment, an SB3 `VecEnv`, or a Gymnasium vector environment.
        learning_rate: Step size of the optimiser after its warm-up; or, as for every algorithm of SB3, a function that
            gives it for the share of the steps that remain, from 1 when `learn` begins to 0 at its end.
        train_ratio: Replayed time steps per environment step, over all environments. Larger learns more from each
            step and takes longer. 0 only collects.
        batch_size: Windows in a gradient step.
        seq_len: Trained time steps in each window.
        buffer_size: Transitions kept, over all environments.
        buffer_storage: Where, as for `ReplayBuffer`: a directory for more than fits into memory, or a device. None:
            in memory.
        learning_starts: Environment steps before the first gradient step. None: for DreamerV3 until the buffer has as
            many windows as a batch has time steps, which is after `(batch_size + n_envs) * seq_len` steps; for TD-MPC2
            five episodes and at least 1,000 steps. TD-MPC2 acts at random during these, and makes up for their
            gradient steps when they are over.
        replay_context: Start each window from the recurrent state that was stored beside its first row. Costs
            memory in the buffer (`replay_buffer.nbytes`); False starts every window from nothing.
        planner: "mppi" plans each action in the latent space of the model, None acts with its policy, and "auto" does
            what the family's paper does: TD-MPC2 plans, DreamerV3 does not. Planning needs continuous actions.
        planner_kwargs: Fields of `PlannerConfig` to override, such as `{"num_samples": 128}`.
        model_kwargs: Fields of the preset's configuration to override.
        stats_window_size: Episodes over which `rollout/` logs average.
        tensorboard_log: Directory for TensorBoard; None writes none.
        verbose: 0 is silent, 1 prints what is logged.
        device: "auto" takes CUDA if there is a device.
        seed: Of Python, NumPy, torch, the environments and the sampler.
        compile: On CUDA, play gradient steps and actions back from recordings of their kernels and compile the model's
            hot functions; on a CPU, compile these alone, which needs a C++ compiler. "auto": on CUDA only.

    Raises:
        ConfigurationError: If a name, a setting or a space cannot be used.
        ShapeMismatchError: If a given model was built for other observations or actions.
    """

    policy: WorldModel  # type: ignore[assignment]
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
        env: GymEnv | str | None,
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
        model_kwargs: Mapping[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | Path | None = None,
        verbose: int = 0,
        device: torch.device | str = "auto",
        seed: int | None = None,
        compile: bool | Literal["auto"] = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if env is None and _init_setup_model:
            raise ConfigurationError(
                "env is None, expected a name, a Gymnasium environment or a VecEnv. "
                "WorldFluxAgent.load gives an agent that acts without one."
            )
        settings = AgentSettings(
            learning_rate=learning_rate,
            train_ratio=train_ratio,
            batch_size=batch_size,
            seq_len=seq_len,
            buffer_size=buffer_size,
            buffer_storage=buffer_storage,  # type: ignore[arg-type]
            learning_starts=learning_starts,
            replay_context=replay_context,
            planner=planner,
            planner_kwargs=planner_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,  # type: ignore[arg-type]
            verbose=verbose,
            seed=seed,
            compile=compile,
        ).with_lasting_paths()
        made: Any = None if env is None else as_env(env)
        if made is not None:
            # Before SB3's own assertions: these name what is supported.
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
        self._take_over(settings)
        self._replay_buffer: ReplayBuffer | None = None
        self._model_source = model
        self._model_kwargs = checked_model_kwargs(model_kwargs, learning_rate, settings.planner_kwargs)
        self._collector: Collector | None = None  # while the episodes in flight are known
        self._segments: ReplaySegments | None = None  # of the replay buffer, once a checkpoint holds some of it
        self._stop = StopRequest()
        self._learning: int | None = None  # this agent's id while it learns, which a copy of it does not
        self._endings: list[Callable[[], None]] = []  # what else belongs to the end of `learn`
        self._random_started = False
        self._steps_in_subprocesses = False
        self._continues_from: int | None = None  # the step of the checkpoint, until `learn` is called after it
        self._frames_per_step = 1
        if _init_setup_model:
            self._setup_model()

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; a setting of an agent that is built takes effect, or cannot be changed any more.

        Raises:
            ConfigurationError: If a value cannot be used, or what depends on it was built already.
        """
        if name in _SETTINGS and "trainer" in vars(self):
            self._change_setting(name, value)
        elif name == "policy" and "trainer" in vars(self) and value is not self.policy:
            raise ConfigurationError(
                "The agent's model cannot be exchanged: its optimisers and its replay data are made for it. Take over "
                "weights with set_parameters, or make an agent of the other model: WorldFluxAgent(model, env)."
            )
        else:
            super().__setattr__(name, value)

    @property
    def model(self) -> WorldModel:
        """The world model."""
        return self.policy

    @property
    def last_losses(self) -> Mapping[str, Tensor]:
        """Of the last gradient step, as tensors on the device; empty before the first."""
        return self._learner.last_losses

    @property
    def stopping(self) -> bool:
        """Whether Ctrl-C or SIGTERM has come: this step of `learn` is its last."""
        return bool(self._stop)

    def at_end_of_learn(self, function: Callable[[], None]) -> None:
        """Has a function called when `learn` ends, whatever ends it and whatever other callbacks do then."""
        self._endings.append(function)

    @property
    def _n_updates(self) -> int:
        """SB3's name of the number of gradient steps."""
        return self._learner.n_updates

    @_n_updates.setter
    def _n_updates(self, count: int) -> None:
        assert count == 0, "the learner counts"  # SB3's constructor says 0, before there is one

    # --- setting up

    def _setup_model(self) -> None:
        """Builds the model, the trainer and the buffer."""
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
        self._take_over(self._settings().with_defaults(self.model, self.n_envs))
        if self.seq_len < family.min_seq_len:
            raise ConfigurationError(
                f"seq_len is {self.seq_len}, expected at least {family.min_seq_len} for this model's losses."
            )
        self._setup_lr_schedule()
        # Before each step `_train` sets the schedule's rate, which may be 0 at first.
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
        recorded = captures(self.compile, self.device, self.model)
        self.actor = Actor(self.model, self.obs_codec, self.action_codec, planner, captured=recorded)
        replayed = self.batch_size * self.seq_len
        made_up = int(self.learning_starts * self.train_ratio / replayed) if family.random_start else 1
        self.schedule = UpdateSchedule(self.train_ratio, replayed, max(made_up, 1))
        self._learner = Learner(
            self.trainer, self.schedule, family, learning_starts=self.learning_starts, window=self._window
        )
        if self.env is not None:
            self.replay_buffer = self._make_buffer()

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = RateSchedule(self.learning_rate)

    def _take_over(self, settings: AgentSettings) -> None:
        for name, value in vars(settings).items():
            setattr(self, name, value)

    def _change_setting(self, name: str, value: Any) -> None:
        settings = replace(self._settings(), **{name: value}).with_defaults(self.model, self.n_envs)
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

    def _settings(self) -> AgentSettings:
        return AgentSettings(**{item.name: getattr(self, item.name) for item in fields(AgentSettings)})

    @property
    def _window(self) -> int:
        """Rows in a sampled window: the trained ones, and the one whose stored state they start from."""
        return self.seq_len + bool(self._extras_spec())

    def _extras_spec(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        return self.model.replay_extras() if self.replay_context else {}

    def _check_size_of_buffer(self, train_ratio: float) -> None:
        least = max(self.learning_starts, self.n_envs * self._window + self.batch_size)
        if train_ratio and self.buffer_size < least:
            raise ConfigurationError(
                f"buffer_size is {self.buffer_size}, expected at least {least}: "
                f"learning_starts ({self.learning_starts}) transitions, "
                f"and {self.batch_size} windows of {self._window} rows from {self.n_envs} environments."
            )

    def _make_buffer(self) -> ReplayBuffer:
        self._check_size_of_buffer(self.train_ratio)
        return ReplayBuffer(
            self.buffer_size,
            self.obs_codec.obs_shape,
            self.action_codec.action_dim,
            obs_dtype=self.obs_codec.obs_dtype,
            n_envs=self.n_envs,
            extras=self._extras_spec(),
            seed=self.seed,
            storage=self.buffer_storage,
            action_type=self.action_codec.action_type,
            action_classes=self.action_codec.action_classes,
        )

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seeds Python, NumPy, torch, the environments, their action space and the sampler; None does nothing."""
        if seed is None:
            return
        set_random_seed(seed, using_cuda=self.device.type == "cuda")
        self.action_space.seed(seed)
        if self.env is not None:
            seed_envs(self.env, seed)
        if self.replay_buffer is not None:
            self.replay_buffer.seed(seed)

    def set_env(self, env: GymEnv | str, force_reset: bool = True) -> None:
        """Continues in another environment of the same spaces and the same number of copies, as SB3 checks.

        A callback may call it, too, as a curriculum does: the episodes in flight end there as truncated, and the next
        step of `learn` is the first one in the other environment, after a reset.

        Args:
            env: As for the constructor.
            force_reset: False leaves the environment that is set already as it is, so that
                `learn(..., reset_num_timesteps=False)` goes on with the episodes in flight. Another one is always
                reset.
        """
        if not force_reset and self.env is not None and stands_for(self.env, env):
            return
        made: Any = as_env(env)
        super().set_env(made, force_reset)
        self._leave_episodes()
        if self.replay_buffer is None:
            self.replay_buffer = self._make_buffer()

    def _begin_episodes(self, collector: Collector) -> None:
        """The environments were just reset, to `_last_obs`."""
        collector.begin(self._last_obs)
        self._last_episode_starts = np.ones(self.n_envs, dtype=bool)

    def _get_collector(self) -> Collector:
        """Made before the environments are reset: it sees what they give from the first observation on."""
        if self._collector is None:
            assert self.replay_buffer is not None and self.env is not None
            own_predict = steps_back("Acting without `predict`", self, overridden(self, _PREDICT))
            self._collector = Collector(
                self.env,
                self.replay_buffer,
                self.actor,
                replay_context=self.replay_context,
                predict=self.predict if own_predict else None,
            )
            # A GPU computes while this process steps the environments, too.
            self._steps_in_subprocesses = steps_in_subprocesses(self.env) or self.device.type == "cuda"
            self._frames_per_step = frames_per_vec_step(self.env)
        return self._collector

    def _leave_episodes(self) -> None:
        """Closes the episodes in flight; the next `learn` starts new ones."""
        if self._collector is not None:
            self._collector.close()
        self._collector, self._last_obs = None, None

    # --- learning

    def learn(
        self: SelfAgent,
        total_timesteps: int = 100_000,
        callback: MaybeCallback = None,
        log_interval: int | None = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfAgent:
        """Acts in the environments and trains on what was collected, by turns.

        Where environments step in processes of their own (`SubprocVecEnv`, Gymnasium's `AsyncVectorEnv`), or the agent
        is on CUDA, it trains while they do: what a step owes is paid during the next one, whose actions were chosen
        before.

        Ctrl-C and SIGTERM end it when the step is done and callbacks, such as `AgentCheckpointCallback`, have seen it;
        then `KeyboardInterrupt` is raised, or `SystemExit(143)`. The agent stays usable after these and after an error
        in the environment: what was learned and collected remains, and the next call starts new episodes.

        Args:
            total_timesteps: Environment steps, over all environments; with several of them it may overshoot by
                fewer than there are.
            callback: As for every algorithm of SB3. It is called after each step was stored, before the training that
                this step owes; returning False stops. It may change the run: set another environment, replay buffer or
                parameters, `learning_rate` or `train_ratio`, save, or act with this agent. It cannot call `learn`.
            log_interval: Episodes between two dumps of the log; None leaves them to a callback.
            tb_log_name: Name of the run for TensorBoard; None takes the model's family.
            reset_num_timesteps: False continues the count of steps, and the episodes in flight. If somebody else has
                reset or stepped the environments since then, as an evaluation in them does, these are closed as
                truncated and new ones begin; so they are when that happens in a callback.
            progress_bar: Show one.

        Returns:
            This agent.

        Raises:
            ConfigurationError: If there is no environment, a number is out of its range, a callback is one of a
                `Trainer`, or a callback calls it.
            BufferError: If the replay data of so many steps would not fit into the machine's memory.
            TrainingError: If a loss is not finite, with its name and the step; or an action, before it is taken.
        """
        if self.env is None or self.replay_buffer is None:
            raise ConfigurationError("The agent has no environment to learn in. Call set_env, or pass env to load.")
        if self._learning == id(self):
            raise ConfigurationError(
                "A callback has called learn() of the agent that is learning. Let the callback return False to end "
                "this call, and call learn(..., reset_num_timesteps=False) after it; set_env changes the environment "
                "in between."
            )
        if isinstance(total_timesteps, float) and total_timesteps % 1 == 0:  # such as 1e5
            total_timesteps = int(total_timesteps)
        total_timesteps = whole_number("total_timesteps", total_timesteps, 0)
        if log_interval is not None:
            log_interval = whole_number("log_interval", log_interval, 1)
        _check_callbacks(callback)
        self.replay_buffer.check_budget(total_timesteps)
        self.lr_schedule(self._current_progress_remaining)  # fails now rather than after the first steps
        tb_log_name = tb_log_name or self.model.config.model_type
        self._learning = id(self)
        try:
            total_timesteps, callback = self._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
            )
            if self.verbose >= 1:
                print(self._learner.describe_schedule())
            started = locals()
            with stopping_on_signals() as self._stop:
                self._learn(total_timesteps, callback, log_interval, started)
        finally:
            self._learning = None
        return self

    def _learn(
        self, total_timesteps: int, callback: BaseCallback, log_interval: int | None, started: dict[str, Any]
    ) -> None:
        """The loop of `learn`, whose variables callbacks get."""
        try:
            callback.on_training_start(started, globals())
            keep_going = True
            if not self._steps_in_subprocesses:
                self._train()  # what was owed when the agent was saved
            while keep_going and self.num_timesteps < total_timesteps:
                logged_episodes = self._episode_num
                keep_going = self._collect_step(callback)
                if not self._steps_in_subprocesses:
                    self._train()
                if log_interval is not None and self._episode_num // log_interval > logged_episodes // log_interval:
                    self.dump_logs()
            self._train()
            self.trainer.check_finite()
        except BaseException as error:
            self._leave_episodes()
            if isinstance(error, Exception):
                # Sampling from a broken policy fails first, with a message that explains nothing.
                self.trainer.check_finite()
            raise
        finally:
            endings, self._endings = self._endings, []
            call_all([callback.on_training_end, *endings])

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if not self._random_started:
            # Again, because other things may have drawn random numbers since the model was built.
            self.set_random_seed(self.seed)
            self._random_started = True
        if self._collector is not None and self._collector.moved:
            self._leave_episodes()
        if reset_num_timesteps and self._continues_from:
            logger.warning(
                "The step counter begins at 0 again; reset_num_timesteps=False continues it at %d.",
                self._continues_from,
            )
        self._continues_from = None
        starts_episodes = reset_num_timesteps or self._last_obs is None
        collector = self._get_collector() if starts_episodes else None
        if self.tensorboard_log is not None and not self._custom_logger:
            with writing(self.tensorboard_log, ConfigurationError):
                Path(self.tensorboard_log).mkdir(parents=True, exist_ok=True)
        set_up = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        if collector is not None and collector is self._collector:  # no callback has set another environment
            self._begin_episodes(collector)
        return set_up

    def _collect_step(self, callback: BaseCallback) -> bool:
        """Acts once in every environment and stores what came of it; False if the callback wants to stop.

        Gradient steps that earlier environment steps owe are taken while other processes make this one.
        """
        callback.on_rollout_start()
        collector = self._collector
        if collector is None or collector.moved:  # by a callback
            self._leave_episodes()
            collector = self._get_collector()
            self._last_obs = collector.env.reset()  # type: ignore[assignment]
            self._begin_episodes(collector)
        assert self._last_episode_starts is not None and self.replay_buffer is not None
        actions, new_obs, rewards, dones, infos = collector.step(
            self._last_obs, self._last_episode_starts, at_random=self._learner.acts_at_random, meanwhile=self._train
        )
        self.num_timesteps += self.n_envs
        self._learner.collected += self.n_envs
        self._last_obs, self._last_episode_starts = new_obs, dones
        self._episode_num += int(np.count_nonzero(dones))
        self._update_info_buffer(infos, dones)
        self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)

        self._learner.owe(self.n_envs, self.replay_buffer)

        callback.update_locals(locals())
        stopping = self.stopping  # one that comes later is for the next step, so that the callbacks see it
        answer = callback.on_step()  # None, of a function that returns nothing, goes on
        keep_going = (answer is None or bool(answer)) and not stopping
        callback.on_rollout_end()
        return keep_going

    def _train(self) -> None:
        """Takes the gradient steps that are owed."""
        assert self.replay_buffer is not None
        if self._learner.updates_owed:
            for optimizer in self.trainer.optimizers:
                update_learning_rate(optimizer, self.lr_schedule(self._current_progress_remaining))
        self._learner.train(self.replay_buffer, self._vec_normalize_env)

    def dump_logs(self) -> None:
        """Writes what happened since the last dump to the logger, under SB3's names."""
        assert self.ep_info_buffer is not None and self.ep_success_buffer is not None
        self.trainer.check_finite()
        elapsed = max((time.time_ns() - self.start_time) / 1e9, sys.float_info.epsilon)
        record = self.logger.record
        if self.ep_info_buffer:
            record("rollout/ep_rew_mean", safe_mean([info["r"] for info in self.ep_info_buffer]))
            record("rollout/ep_len_mean", safe_mean([info["l"] for info in self.ep_info_buffer]))
        if self.ep_success_buffer:
            record("rollout/success_rate", safe_mean(self.ep_success_buffer))
        record("time/episodes", self._episode_num, exclude="tensorboard")
        record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / elapsed))
        record("time/time_elapsed", int(elapsed), exclude="tensorboard")
        record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        if self._frames_per_step > 1:
            record("time/total_frames", self.num_timesteps * self._frames_per_step, exclude="tensorboard")
        record("train/n_updates", self._n_updates, exclude="tensorboard")
        record("train/learning_rate", self.lr_schedule(self._current_progress_remaining))
        for name, mean in self._learner.mean_losses.take().items():
            record(f"train/{name}", mean)
        health_metrics, problems = self._learner.health()
        for name, value in health_metrics.items():
            record(f"health/{name}", value)
        for problem in problems:
            self.logger.warn(problem)
        dump_log(self.logger, self.num_timesteps)

    # --- acting

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: Memory | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Memory | None]:
        """Actions for observations, with the memory that goes from one call to the next.

        Args:
            observation: One observation, or one for each of n environments `[n, ...]`, as the environment gives them
                (images in either channel order).
            state: What the previous call returned; None where every episode has just begun.
            episode_start: True where an episode has just begun, whose row of `state` is not used. `[n]`
            deterministic: Take the most likely action in the most likely state, without random numbers. The agent
                learns and explores with False.

        Returns:
            Actions in the environment's form, `[n, ...]` or for one observation a single one, which is an integer of
            NumPy where the action space is `Discrete`; and the next `state`, for each of its arrays `[n, ...]`.

        Raises:
            ShapeMismatchError: If an array has another shape or dtype than expected, or the observation holds NaN.
            TrainingError: If an action is not finite, with the first tensor that is not: of the model or the state.
        """
        return self.actor.predict(observation, state, episode_start, deterministic)


_SETTINGS = frozenset(item.name for item in fields(AgentSettings))


def _check_callbacks(given: object) -> None:
    """Raises a `ConfigurationError` if a callback of a `Trainer` is among what was given to `learn`."""
    for callback in given.callbacks if isinstance(given, CallbackList) else given if isinstance(given, list) else ():
        _check_callbacks(callback)
    if isinstance(given, Callback):
        takes = "AgentCheckpointCallback" if isinstance(given, CheckpointCallback) else "callbacks of stable-baselines3"
        raise ConfigurationError(f"{type(given).__name__} is for train(); an agent takes {takes}.")


_CHANGEABLE = ("learning_rate", "train_ratio", "tensorboard_log", "verbose")
"""Settings of which an agent that is built takes another value."""
_PREDICT = WorldFluxAgent.predict
