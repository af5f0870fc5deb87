"""WorldFluxAgent: a world model that acts, collects and learns behind the interface of stable-baselines3 (SB3)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import update_learning_rate

from worldflux.accel import ranks
from worldflux.accel.overriding import overridden, steps_back
from worldflux.agents.acting import PredictState, TaskPolicy
from worldflux.agents.asynchronous import LearnerThread, check_can_run_beside, learner_beside, learning_beside, nothing
from worldflux.agents.collecting import Collector, frames_per_vec_step, steps_in_subprocesses
from worldflux.agents.habits import refuse_callbacks_of_trainers
from worldflux.agents.learning import write_log
from worldflux.agents.progress import ProgressBar
from worldflux.agents.saving import SavedAgent
from worldflux.errors import ConfigurationError, StoppedError
from worldflux.files import writing
from worldflux.training.saving import call_all
from worldflux.training.signals import StopRequest, stopping_on_signals
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
        schedule: Says how many gradient steps are due.
        last_losses: Losses of the last gradient step, as tensors on the device.
        objective: What the planner maximises; it can be set at any time, also by a callback.

    Args:
        model: A preset (`list_models()` shows them), a directory written by `save_pretrained`, or a `WorldModel`. A
            preset's name wins over a directory that is called the same, as in `create_world_model`.
        env: A name as in `make_env`, a Gymnasium environment, an SB3 `VecEnv`, or a Gymnasium vector environment; or
            one of these for each name of a task, which TD-MPC2 learns together.
        learning_rate: Step size of the optimiser after its warm-up; or, as for every algorithm of SB3, a function that
            gives it for the share of the steps that remain, from 1 when `learn` begins to 0 at its end.
        train_ratio: Replayed time steps per environment step, over all environments. Larger learns more from each
            step and takes longer. 0 only collects.
        batch_size: Windows in a gradient step.
        seq_len: Trained time steps in each window.
        buffer_size: Transitions kept, over all environments.
        buffer_storage: Where transitions are kept, as for `ReplayBuffer`: a directory for more than fits into memory,
            or a device. None keeps them in memory.
        learning_starts: Environment steps before the first gradient step. None: DreamerV3 waits until the buffer has as
            many windows as a batch has time steps, which is after `(batch_size + n_envs) * seq_len` steps; TD-MPC2
            waits for five episodes and at least 1,000 steps. TD-MPC2 acts at random until then, and makes up for the
            gradient steps of this time at its end.
        replay_context: Start each window from the recurrent state that was stored beside its first row. Costs
            memory in the buffer (`replay_buffer.nbytes`); False starts every window from the initial state.
        planner: "mppi" and "cem" plan each action in the latent space of the model, None acts with its policy, and
            "auto" does what the family's paper does: TD-MPC2 plans with MPPI, DreamerV3 does not. MPPI weights the best
            candidates by their values; the cross-entropy method, CEM, weights them alike.
        planner_kwargs: Fields of `PlannerConfig` to override, such as `{"num_samples": 128}`.
        objective: Function of a `PlannedTrajectory` that the planner maximises in place of the learned reward; it
            returns a number for each step `[H, B]`, or minus infinity where a state is forbidden. With
            `RewardPlus(function)` the planner maximises the sum of both. `learn` collects with it, too, but trains for
            the environment's reward. Files do not contain it: pass it again to `load`.
        model_kwargs: Fields of the preset's configuration to override.
        stats_window_size: Episodes over which `rollout/` logs average.
        tensorboard_log: Directory for TensorBoard; None writes none.
        verbose: 1 prints what is logged. What `learn` will do, and how long a long call takes, is printed on stderr in
            any case.
        device: "auto" takes CUDA if there is a device.
        seed: Seed of Python, NumPy, torch, the environments and the sampler.
        buffer: Recorded data to learn from besides what is collected; see `learn_from`. Training then starts with the
            first step unless `learning_starts` is given, and TD-MPC2 does not act at random first.
        offline_share: Share of the windows in each batch that come from `buffer`.
        compile: On CUDA, capture gradient steps and actions as CUDA graphs and compile the model's hot functions; on a
            CPU, only compile these functions, which requires a C++ compiler. "auto" does so on CUDA only.

    Raises:
        ConfigurationError: If a name, a setting or a space cannot be used.
        ShapeMismatchError: If a given model was built for other observations or actions.
    """

    _learning: int | None = None
    """This agent's id while it learns, which is not the id of a copy."""
    _stop: StopRequest | None = None
    """Whether a signal has asked the present call of `learn` to stop."""
    _stops_together = False
    """With several ranks: whether they have agreed that a signal ends the present call of `learn`."""
    _endings: tuple[Callable[[], None], ...] = ()
    """What is called when `learn` ends."""
    _predictions: int | None = None
    """Calls of `predict` since a signal has arrived, while a callback is called for a step."""
    _between: tuple[Callable[[], None], ...] = ()
    """What is called before each gradient step of the present call of `learn`."""
    _rate = 0.0
    """Learning rate of gradient steps on another thread."""
    _steps_in_subprocesses = False
    """Whether gradient steps are taken while other processes step the environments, or a GPU computes."""
    _frames_per_step = 1
    """Frames that a step of each environment takes."""

    @property
    def stopping(self) -> bool:
        """Whether Ctrl-C or SIGTERM was received, so that this step of `learn` is its last.

        With several ranks, all of them know it at the same step, whichever has received the signal.
        """
        return bool(self._stop) if ranks.size() == 1 else self._stops_together

    def remaining_seconds(self, total: int | None = None) -> float | None:
        """Estimates how long learning will still take, from the steps that this call of `learn` has measured.

        Args:
            total: Environment step at which learning ends (`num_timesteps`); None stands for the end of this call.

        Returns:
            The seconds; None before a few gradient steps were taken.
        """
        env_steps = max((self._total_timesteps if total is None else total) - self.num_timesteps, 0)
        return self._report.pace.remaining(env_steps / self._envs_of_all, self._learner.updates_until(env_steps))

    def at_gradient_steps(self, function: Callable[[], None]) -> None:
        """Has a function called before each gradient step until `learn` ends, such as to show its progress."""
        self._between = (*self._between, function)

    def at_end_of_learn(self, function: Callable[[], None]) -> None:
        """Has a function called when `learn` ends, whatever ends it and whatever other callbacks do then."""
        self._endings = (*self._endings, function)

    # --- learning

    def learn(
        self: SelfAgent,
        total_timesteps: int = 100_000,
        callback: MaybeCallback = None,
        log_interval: int | None = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        *,
        asynchronous: bool = False,
        max_policy_lag: int | None = None,
    ) -> SelfAgent:
        """Acts in the environments and trains on what was collected, in turn or at the same time.

        Where environments step in processes of their own (`SubprocVecEnv`, Gymnasium's `AsyncVectorEnv`), or the agent
        is on CUDA, it trains while they step: the gradient steps that a step owes are taken during the next one, whose
        actions were chosen before.

        Ctrl-C and SIGTERM end it when the step is done and callbacks, such as `AgentCheckpointCallback`, were called
        for it; then `KeyboardInterrupt` is raised, or `SystemExit(143)`. An evaluation that a callback makes is broken
        off, and gradient steps that are owed are left for later. The agent stays usable after these and after an error
        in the environment: what was learned and collected remains, and the next call starts new episodes.

        Args:
            total_timesteps: Environment steps, over all environments. It is rounded up to a multiple of their number.
            callback: As for every algorithm of SB3. It is called after each step was stored, before the training that
                this step owes; returning False stops. It may change the run: set another environment, replay buffer or
                parameters, `learning_rate` or `train_ratio`, save, or act with this agent. It cannot call `learn`.
            log_interval: Episodes between two dumps of the log; None leaves them to a callback.
            tb_log_name: Name of the run for TensorBoard; None takes the model's family.
            reset_num_timesteps: False continues the count of steps, and the episodes in flight. If the environments
                were reset or stepped in between, as by an evaluation in them or in a callback, these are closed as
                truncated and new ones begin.
            progress_bar: Show a progress bar on stderr, with the time that is left.
            asynchronous: Take gradient steps on a thread of their own while this one acts with a copy of the weights
                and steps the environments. Their numbers are the same, but a run cannot be repeated bit by bit. Reading
                `model` or `trainer`, `predict` and saving wait for the gradient step that is under way.
            max_policy_lag: With `asynchronous`, largest number of gradient steps that an agent which acts and trains in
                turn would have taken before an action was chosen, and whose result the action lacks. The agent waits
                rather than to exceed it. At most 16, or those of four steps of all environments. None: those of two
                steps, at least 2.

        Returns:
            This agent.

        Raises:
            ConfigurationError: If there is no environment, a number is out of its range, a callback is one of a
                `Trainer`, a callback calls it, or it cannot be asynchronous: on several ranks, with `VecNormalize`, and
                for a class that overrides `predict`.
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
        refuse_callbacks_of_trainers(callback)
        beside = learner_beside(self, asynchronous, max_policy_lag)
        self.replay_buffer.check_budget(-(-total_timesteps // ranks.size()))
        self._rate = self.lr_schedule(self._current_progress_remaining)  # fails now rather than after the first steps
        tb_log_name = tb_log_name or self.model.config.model_type
        self._learning, self._stops_together = id(self), False
        try:
            total_timesteps, callback = self._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
            )
            self._report.begin(total_timesteps - self.num_timesteps, None if beside is None else beside.max_lag)
            started = locals()
            with stopping_on_signals() as self._stop:
                self._learn(total_timesteps, callback, log_interval, started, beside)
            self._report.end()
        finally:
            self._learning = None
        return self

    def _learn(
        self,
        total_timesteps: int,
        callback: BaseCallback,
        log_interval: int | None,
        started: dict[str, Any],
        beside: LearnerThread | None,
    ) -> None:
        """The loop of `learn`; `started` holds the local variables that callbacks see when it starts."""
        pace = self._report.pace
        try:
            callback.on_training_start(started, globals())
            keep_going = True
            with learning_beside(self, beside):
                if not self._trains_during_step:
                    self._train()  # gradient steps that were owed when the agent was saved
                while keep_going and self.num_timesteps < total_timesteps:
                    began, trained, at_random = time.perf_counter(), pace.training, self._learner.acts_at_random
                    logged_episodes = self._episode_num
                    keep_going = self._collect_step(callback)
                    if not self._trains_during_step:
                        self._train()
                    seconds = time.perf_counter() - began - (pace.training - trained)
                    (pace.random_step if at_random else pace.vec_step).add(seconds)
                    self._report.check()
                    if self.stopping and self._learner.updates_owed and not self._trains_during_step:
                        break  # between two gradient steps, which come before another step of the environments
                    if log_interval is not None and self._episode_num // log_interval > logged_episodes // log_interval:
                        self.dump_logs()
                self._train(0)
            self.trainer.check_finite()
        except BaseException as error:
            self._leave_episodes()
            if isinstance(error, Exception):
                # Sampling from a broken policy fails before a loss does, with a message that explains nothing.
                self.trainer.check_finite()
            raise
        finally:
            endings, self._endings, self._between = self._endings, (), ()
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
            # Again, because random numbers may have been drawn since the model was built.
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
        log, verbose = self.tensorboard_log, self.verbose
        if not ranks.is_first():  # rank 0 logs the same
            vars(self).update(tensorboard_log=None, verbose=0)
            progress_bar = False
        try:
            set_up = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        finally:
            vars(self).update(tensorboard_log=log, verbose=verbose)
        if collector is not None and collector is self._collector:  # no callback has set another environment
            self._begin_episodes(collector)
        return set_up

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        """As SB3's, with a progress bar that knows how long gradient steps take."""
        if progress_bar:
            given = callback if isinstance(callback, list) else [] if callback is None else [callback]
            callback = [item if isinstance(item, BaseCallback) else ConvertCallback(item) for item in given]
            callback.append(ProgressBar())
        return super()._init_callback(callback)

    def _begin_episodes(self, collector: Collector) -> None:
        """Begins episodes at `_last_obs`, which the environments showed when they were just reset."""
        collector.begin(self._last_obs)
        self._last_episode_starts = np.ones(self.n_envs, dtype=bool)

    def _get_collector(self) -> Collector:
        """The collector, which has to be there before the environments are reset, to see their first observations."""
        if self._collector is None:
            assert self.replay_buffer is not None and self.env is not None
            if self._beside is not None:
                check_can_run_beside(self)
            self._collector = Collector(
                self.env,
                self.replay_buffer,
                self.actor,
                replay_context=self.replay_context,
                predict=self.predict if self._own_predict() else None,
            )
            # A GPU computes while this process steps the environments, too.
            self._steps_in_subprocesses = steps_in_subprocesses(self.env) or self.device.type == "cuda"
            self._frames_per_step = frames_per_vec_step(self.env)
        return self._collector

    def _own_predict(self) -> bool:
        """Whether a subclass overrides `predict`, which is then asked for every action."""
        return steps_back("Acting without `predict`", self, overridden(self, _PREDICT))

    @property
    def _trains_during_step(self) -> bool:
        """Whether this thread takes gradient steps between asking for a step of the environments and fetching it."""
        return self._steps_in_subprocesses and self._beside is None

    def _collect_step(self, callback: BaseCallback) -> bool:
        """Acts once in every environment and stores the step; False if the callback wants to stop.

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
        beside = self._beside
        collector.actor = self.actor if beside is None else beside.prepare_to_act()
        actions, new_obs, rewards, dones, infos = collector.step(
            self._last_obs,
            self._last_episode_starts,
            at_random=self._learner.acts_at_random,
            meanwhile=self._train if beside is None else nothing,
        )
        n_envs = self._envs_of_all
        self.num_timesteps += n_envs
        self._learner.collected += n_envs
        self._last_obs, self._last_episode_starts = new_obs, dones
        self._count_episodes(infos, dones)
        self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)

        self._learner.owe(n_envs, self.replay_buffer)
        if beside is not None:
            beside.wake()

        callback.update_locals(locals())
        stopping = self.stopping  # a signal that comes later ends the next step, so that callbacks see it first
        keep_going = self._ask(callback) and not stopping
        callback.on_rollout_end()
        return not ranks.largest(int(not keep_going))[0]

    def _ask(self, callback: BaseCallback) -> bool:
        """Whether the callback wants to continue. An evaluation that it makes ends when a signal asks to stop."""
        self._predictions = 0
        try:
            answer = callback.on_step()
        except StoppedError:
            return False
        finally:
            self._predictions = None
        return answer is None or bool(answer)  # a function that returns nothing wants to continue

    def _count_episodes(self, infos: list[dict[str, Any]], dones: np.ndarray) -> None:
        """Counts the episodes that have ended, and keeps their returns for the log; those of all ranks."""
        if ranks.size() > 1:
            assert self._stop is not None
            self._stops_together, ended = self._stop.shared(bool(dones.any()))
            if not ended:
                return
            mine = [{name: info[name] for name in _OF_EPISODES if name in info} for info in infos]
            told = [one for of_rank in ranks.every((mine, dones.tolist())) for one in zip(*of_rank, strict=True)]
            infos, dones = [info for info, _ in told], np.array([done for _, done in told])
        self._episode_num += int(np.count_nonzero(dones))
        self._update_info_buffer(infos, dones)

    def _train(self, max_lag: int | None = None) -> None:
        """Takes the gradient steps that are owed, or waits until no more than `max_lag` are, if another thread does."""
        assert self.replay_buffer is not None
        if self._beside is not None:
            self._rate = self.lr_schedule(self._current_progress_remaining)
            if not self.stopping:  # or else the learner stays as callbacks have seen it
                most = self._beside.max_lag if max_lag is None else max_lag
                self._report.pace.training += self._beside.catch_up(most, self._before_gradient_step)
            return
        if self._learner.updates_owed:
            for optimizer in self.trainer.optimizers:
                update_learning_rate(optimizer, self.lr_schedule(self._current_progress_remaining))
        self._learner.train(self.replay_buffer, self._vec_normalize_env, self._report.pace, self._before_gradient_step)

    def _before_gradient_step(self) -> bool:
        """Shows the progress; False if a signal has asked `learn` to stop."""
        if self.stopping:
            return False
        self._report.check()
        for function in self._between:
            function()
        if self._stop is not None:
            self._stop.seconds_per_step = self._report.pace.gradient_step.mean
        return not self.stopping

    def dump_logs(self) -> None:
        """Writes the log since the last dump, under SB3's names."""
        write_log(self)

    # --- acting

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: PredictState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        *,
        task: str | int | Sequence[str | int] | None = None,
    ) -> tuple[np.ndarray, PredictState | None]:
        """Returns actions for observations, and the state that goes from one call to the next.

        Args:
            observation: One observation, or one for each of n environments `[n, ...]`, as the environment gives them
                (images in either channel order).
            state: What the previous call returned; None where every episode has just begun.
            episode_start: True where an episode has just begun, whose row of `state` is not used. `[n]`
            deterministic: Take the most likely action in the most likely state, without random numbers. The agent
                learns and explores with False.
            task: Name or number of the task, or one for each environment, for a model of several tasks. None: that of
                `state`. `for_task` pads the observations of narrower environments.

        Returns:
            Actions in the environment's form, `[n, ...]` or for one observation a single one, which is an integer of
            NumPy where the action space is `Discrete`; and the next `state`, for each of its arrays `[n, ...]`.

        Raises:
            ShapeMismatchError: If an array has another shape or dtype than expected, or the observation holds NaN.
            ConfigurationError: If the model has several tasks and none is named, or it has no such task.
            TrainingError: If an action is not finite; names the first tensor of the model or the state that is not.
            StoppedError: If a callback evaluates the agent, and Ctrl-C or SIGTERM has asked `learn` to stop; `learn`
                handles it.
        """
        if self._predictions is not None and self.stopping:
            self._predictions += 1
            if self._predictions > 1:  # more than a callback that looks at one action
                raise StoppedError("learn was asked to stop, so that no callback goes on with an evaluation.")
        return self.actor.predict(observation, state, episode_start, deterministic, task)

    def for_task(self, task: str | int | Sequence[str | int], env: Any = None) -> TaskPolicy:
        """Returns this agent in one of its tasks, for `evaluate_policy`, `collect` and others that call `predict`.

            >>> evaluate_policy(agent.for_task("walker-walk", env), env)

        Args:
            task: As for `predict`.
            env: Environment or `VecEnv` of the task, whose observations it takes and whose actions it returns. None:
                `predict` has the agent's spaces, which `TaskVecEnv` has padded, and actions in [-1, 1].
        """
        return TaskPolicy(self, task, env)


_OF_EPISODES = ("episode", "is_success")
"""Entries of an environment's infos that SB3 keeps for the log."""
_PREDICT = WorldFluxAgent.predict
