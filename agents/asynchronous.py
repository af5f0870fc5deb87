"""Learning beside acting: a thread takes the gradient steps that are owed while the agent steps its environments."""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import torch
from stable_baselines3.common.utils import update_learning_rate
from torch import Tensor

from worldflux.accel import ranks
from worldflux.accel.compilation import compiles
from worldflux.agents.acting import Actor
from worldflux.agents.learning import Learner
from worldflux.errors import ConfigurationError
from worldflux.locks import ThreadLock
from worldflux.models.objective import Objective
from worldflux.validation import check_flag, whole_number

if TYPE_CHECKING:
    from worldflux.agents.agent import WorldFluxAgent

T = TypeVar("T")


class ActingCopy:
    """A copy of an actor, whose weights are always those after a whole gradient step of the original.

    The thread that learns publishes its weights between two gradient steps, and the thread that acts takes over what
    was published last. Both are copies in memory, and neither waits for a gradient step.

    Attributes:
        actor: The copy. It shares the codecs of the original.
        published: Gradient steps in the weights that were published last.
        taken: Gradient steps in the weights that act.

    Args:
        actor: The original, while nobody trains its model.
        updates: Gradient steps that its model has taken.
        compiled: Whether to compile the functions of the copied model.
    """

    def __init__(self, actor: Actor, updates: int, *, compiled: bool) -> None:
        shared = {id(item): item for item in (actor.obs_codec, actor.action_codec, _objective(actor))}
        self.actor = copy.deepcopy(actor, shared)
        if compiled:  # which the copy of a compiled model is not
            self.actor.model.compile_functions()
        self.published = self.taken = updates
        self._lock = threading.Lock()
        self._trained, self._original, self._own = actor, _tensors(actor), _tensors(self.actor)
        self._between = [tensor.clone() for tensor in self._own]
        self._is_new = False

    def publish(self, updates: int, *, replaced: bool = False) -> None:
        """Copies the weights of the original. Called while no gradient step is taken.

        Args:
            updates: Gradient steps in these weights.
            replaced: Whether other tensors may have taken their place, as `parameter.data = ...` and PyTorch's
                `vector_to_parameters` do it.
        """
        if replaced:
            self._original = _tensors(self._trained)
        with self._lock, torch.no_grad():
            torch._foreach_copy_(self._between, self._original)
            self.published, self._is_new = updates, True

    def refresh(self) -> None:
        """Takes over the weights that were published last, and the objective of the original."""
        if self.actor.planner is not None:
            self.actor.planner.objective = _objective(self._trained)
        with self._lock, torch.no_grad():
            if self._is_new:
                torch._foreach_copy_(self._own, self._between)
                self.taken, self._is_new = self.published, False


def _objective(actor: Actor) -> Objective | None:
    return None if actor.planner is None else actor.planner.objective


def _tensors(actor: Actor) -> list[Tensor]:
    return [tensor.detach() for tensor in (*actor.model.parameters(), *actor.model.buffers())]


class LearnerThread:
    """Takes the gradient steps of a learner on a thread of its own, as soon as they are owed.

    All methods are called by the thread that acts. Between `pause` and `resume` no gradient step is taken, so that
    everything of the learner can be read and changed.

    Attributes:
        acting: The actor that chooses the actions meanwhile.
        lag: Gradient steps that were owed when the last actions were chosen, and that their weights lacked.

    Args:
        learner: Takes the gradient steps.
        actor: The actor with the learner's model.
        take_step: Takes one gradient step, on the thread of the learner.
        max_lag: Gradient steps that the weights which act may lack; None: those of two steps of all environments.
        envs: Number of environments.
        compiled: Whether the functions of the model are compiled.
    """

    def __init__(
        self,
        learner: Learner,
        actor: Actor,
        take_step: Callable[[], None],
        *,
        max_lag: int | None,
        envs: int,
        compiled: bool,
    ) -> None:
        self.acting = ActingCopy(actor, learner.n_updates, compiled=compiled)
        self._max_lag, self._envs = max_lag, envs
        self.lag = 0
        self.owner = threading.get_ident()
        device = actor.model.device
        # Capturing a CUDA graph watches the whole process for calls that wait for the device, and acting does wait.
        turn: AbstractContextManager[Any] = nullcontext() if device.type == "cpu" else ThreadLock()
        self._turn = self.acting.actor.turn = turn
        self._learner, self._take_step, self._device = learner, take_step, device
        self._changed = threading.Condition()
        self._is_stepping = self._is_paused = self._ends = False
        self._steps = 0
        self._error: BaseException | None = None
        self._idle, self._waited, self._paused, self._paused_at = 0.0, 0.0, 0.0, 0.0
        self._lags, self._actions = 0, 0
        self._reported = (time.perf_counter(), 0.0, 0.0)
        self._thread = threading.Thread(target=self._run, name="learner")

    def __reduce__(self) -> Any:  # a copy of an agent has no thread
        return nothing, ()

    def __enter__(self) -> LearnerThread:
        self.acting.publish(self._learner.n_updates, replaced=True)  # by a callback
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the thread after its gradient step."""
        with self._changed:
            self._ends = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def max_lag(self) -> int:
        """Gradient steps that the weights which act may lack.

        By default two steps of all environments ask for so many, at least 2: one is learned while the next is made, and
        the other evens out that some take longer.
        """
        if self._max_lag is not None:
            return self._max_lag
        return 2 * max(1, math.ceil(self._envs / self._learner.schedule.env_steps_per_update))

    # --- the thread that acts

    def prepare_to_act(self) -> Actor:
        """The actor for the next actions, with the newest weights."""
        self.resume()
        self.acting.refresh()
        self.lag = max(self._learner.updates_asked - self.acting.taken, 0)
        self._lags, self._actions = self._lags + self.lag, self._actions + 1
        return self.acting.actor

    def catch_up(self, most: int, go_on: Callable[[], bool]) -> float:
        """Waits until actions would lack at most `most` of the gradient steps that are owed and can be taken.

        Args:
            most: Number of gradient steps.
            go_on: Called before each gradient step that is waited for; False ends the waiting.

        Returns:
            The seconds that were spent with waiting.

        Raises:
            BaseException: What has ended the thread.
        """
        began, owed = time.perf_counter(), self._learner.updates_owed
        self.resume()
        while self._is_behind(most):
            self._learner.show_burst(owed)
            if not go_on():
                break
            self.resume()  # where a function that was called has looked at the model
            steps = self._steps
            with self._changed:
                self._changed.wait_for(lambda: self._steps != steps or not self._is_behind(most))  # noqa: B023
        self._learner.burst = None
        seconds = time.perf_counter() - began
        self._waited += seconds
        self.check()
        return seconds

    def _is_behind(self, most: int) -> bool:
        learner = self._learner  # the last step that was due is taken before its weights are published
        can_change = self._error is None and (learner.is_due or self._is_stepping)
        return can_change and learner.updates_asked - self.acting.published > most

    def wake(self) -> None:
        """Tells the thread that further gradient steps may be owed."""
        self.resume()
        with self._changed:
            self._changed.notify_all()

    def pause(self) -> None:
        """Waits for the gradient step that is being taken, and lets no other one begin.

        Raises:
            BaseException: What has ended the thread.
        """
        with self._changed:
            if not self._is_paused:
                self._is_paused = True
                self._changed.wait_for(lambda: not self._is_stepping)
                self._paused_at = time.perf_counter()
        self.check()

    def resume(self) -> None:
        """Lets gradient steps begin again, and actions be chosen with weights that were changed meanwhile."""
        if self._is_paused:
            self.acting.publish(self._learner.n_updates, replaced=True)
            with self._changed:
                self._paused += time.perf_counter() - self._paused_at
                self._is_paused = False
                self._changed.notify_all()

    def check(self) -> None:
        """Raises what has ended the thread, if something has."""
        if self._error is not None:
            raise self._error

    def metrics(self) -> dict[str, float]:
        """Shares of the time since the last call in which one thread waited for the other, and the mean lag."""
        now, idle, waited = time.perf_counter(), self._idle, self._waited
        then, idle_before, waited_before = self._reported
        self._reported, seconds = (now, idle, waited), max(now - then, 1e-9)
        mean_lag = self._lags / max(self._actions, 1)
        self._lags, self._actions = 0, 0
        return {
            "time/learner_idle": min((idle - idle_before) / seconds, 1.0),
            "time/actor_idle": min((waited - waited_before) / seconds, 1.0),
            "time/policy_lag": mean_lag,
        }

    # --- the thread that learns

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            while self._is_my_turn():
                try:
                    with self._turn:
                        self._take_step()
                    self.acting.publish(self._learner.n_updates)
                finally:
                    with self._changed:
                        self._is_stepping = False
                        self._steps += 1
                        self._changed.notify_all()
        except BaseException as error:  # raised by `check` in the thread that acts
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _is_my_turn(self) -> bool:
        """Waits until a gradient step is due; False if the thread is to end."""
        with self._changed:
            began, paused = time.perf_counter(), self._paused
            self._changed.wait_for(lambda: self._ends or (self._learner.is_due and not self._is_paused))
            self._idle += max(time.perf_counter() - began - (self._paused - paused), 0.0)
            self._is_stepping = not self._ends
            return not self._ends


def nothing() -> None:
    """What a copy of a `LearnerThread` is."""


class Paused(Generic[T]):
    """An attribute of an agent that a learner beside the actor changes: whoever reads it pauses the learner.

    It is paused until the loop of `learn` goes on, so that callbacks see the model as it is between two gradient steps,
    however long they look at it.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, agent: None, owner: type) -> Paused[T]: ...
    @overload
    def __get__(self, agent: object, owner: type) -> T: ...
    def __get__(self, agent: Any, owner: type) -> Paused[T] | T:
        if agent is None:
            return self
        if self._name not in vars(agent):
            raise AttributeError(f"{type(agent).__name__} has no attribute '{self._name}' yet.")
        agent.pause_learner()
        found: T = vars(agent)[self._name]
        return found

    def __set__(self, agent: Any, value: T) -> None:
        vars(agent)[self._name] = value


def learner_beside(agent: WorldFluxAgent, asynchronous: Any, max_lag: Any) -> LearnerThread | None:
    """The learner of an agent on a thread of its own, which is not started; None where it acts and learns in turn.

    Args:
        agent: The agent.
        asynchronous: The argument of `learn`.
        max_lag: The argument `max_policy_lag` of `learn`.

    Raises:
        ConfigurationError: If an argument is out of its range or without effect, or the agent has to act and learn in
            turn.
    """
    check_flag("asynchronous", asynchronous)
    if max_lag is not None:
        max_lag = whole_number("max_policy_lag", max_lag, 0)
        most = agent.schedule.most_ahead(agent._envs_of_all)
        if max_lag > most:
            raise ConfigurationError(
                f"max_policy_lag is {max_lag}, expected at most {most} (16, or the gradient steps of four steps of all "
                "environments)."
            )
    if not asynchronous:
        if max_lag is not None:
            raise ConfigurationError(
                f"max_policy_lag is {max_lag}, which bounds how far acting may run ahead of learning with "
                "asynchronous=True. Pass both, or none of them."
            )
        return None
    check_can_run_beside(agent)
    learner = agent._learner

    def take_step() -> None:
        for optimizer in learner.trainer.optimizers:
            update_learning_rate(optimizer, agent._rate)
        assert agent.replay_buffer is not None
        learner.take_step(agent.replay_buffer, None, agent._report.pace)

    return LearnerThread(
        learner,
        agent.actor,
        take_step,
        max_lag=max_lag,
        envs=agent._envs_of_all,
        compiled=compiles(agent.compile, agent.device),
    )


def check_can_run_beside(agent: WorldFluxAgent) -> None:
    """Raises a `ConfigurationError` if an agent has to act and learn in turn."""
    if ranks.size() > 1:
        raise ConfigurationError(
            "asynchronous=True is for a single process, because the ranks of a training agree on every step. Leave it "
            "out, and step the environments in processes of their own (SubprocVecEnv): each rank learns meanwhile."
        )
    if agent.get_vec_normalize_env() is not None:
        raise ConfigurationError(
            "asynchronous=True would learn while VecNormalize changes its statistics. Leave VecNormalize out, because "
            "both families transform observations and rewards themselves; or leave asynchronous=True out."
        )
    if agent._own_predict():
        raise ConfigurationError(
            f"{type(agent).__name__} overrides predict, which acts with the model that asynchronous=True would train "
            "meanwhile. Leave asynchronous=True out."
        )


@contextmanager
def learning_beside(agent: WorldFluxAgent, beside: LearnerThread | None) -> Iterator[None]:
    """Lets an agent's learner run beside its actor inside the block; with None they take turns.

    Raises:
        BaseException: What has ended the thread of the learner.
    """
    if beside is None:
        yield
        return
    try:
        with beside:
            agent._beside = beside
            yield
    finally:
        agent._beside = None
    beside.check()
