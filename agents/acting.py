"""Acting with a world model: from observations and a memory to actions and the next memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from worldflux.accel.cuda_graphs import Captures, CudaGraphCapturer, places, signature_of
from worldflux.accel.guard import Tensors, Work
from worldflux.accel.transfers import to_device, to_host
from worldflux.envs.spaces import ActionCodec, Array, Arrays, ObservationCodec
from worldflux.errors import ConfigurationError, ShapeMismatchError, TrainingError, a_type
from worldflux.models.base import State, WorldModel
from worldflux.models.finite import first_not_finite, largest, weights_of
from worldflux.models.planning import Planner
from worldflux.replay.batch import Observation
from worldflux.validation import SINGLE_KEY, TASK_KEY, is_vector

MAX_FORMS = 8
"""Largest number of CUDA graphs. Observing and acting, deterministic or not, have one each for every number of
environments."""

PredictState = tuple[np.ndarray, ...]
"""The `state` that `predict` returns and takes: the arrays of a `Memory`, in the order of `Memory.tensors`."""


@dataclass(frozen=True)
class Memory:
    """Everything that acting carries from one observation to the next, for N environments."""

    state: State
    """State of the model. `[N, ...]`"""
    actions: Tensor
    """Last actions, in the library's form. `[N, A]`"""
    plan: Tensor | None
    """Means of the planner; None if there is no planner. `[N, H, A]`"""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: the state's in the order of their names, the actions, the plan."""
        named = {**{name: self.state[name] for name in sorted(self.state)}, "actions": self.actions}
        return named if self.plan is None else {**named, "plan": self.plan}

    def arrays(self) -> PredictState:
        """All tensors as arrays."""
        return tuple(to_host(self.tensors()).values())

    def with_tasks(self, tasks: Array | None) -> Memory:
        """The memory for these numbers of tasks `[N]`, where the model has several; otherwise the same one."""
        if tasks is None or TASK_KEY not in self.state:
            return self
        numbers = to_device(torch.tensor(tasks), self.state[TASK_KEY].device)
        return replace(self, state=State({**self.state, TASK_KEY: numbers}))

    def with_arrays(self, arrays: PredictState | None) -> Memory:
        """A memory of the same shapes and devices that holds these arrays.

        Raises:
            ShapeMismatchError: If they have another number or other shapes.
        """
        expected = self.tensors()
        if not isinstance(arrays, tuple | list) or len(arrays) != len(expected):
            given = f"{len(arrays)} arrays" if isinstance(arrays, tuple | list) else a_type(arrays)
            raise ShapeMismatchError(
                f"state is {given}, expected the {len(expected)} arrays that predict returned: {', '.join(expected)}."
            )
        tensors = {}
        for (name, tensor), array in zip(expected.items(), arrays, strict=True):
            if np.shape(array) != tuple(tensor.shape):
                raise ShapeMismatchError(
                    f"state '{name}' has shape {np.shape(array)}, expected {tuple(tensor.shape)} "
                    f"for {len(tensor)} observations. Pass state=None when the number of environments changes."
                )
            tensors[name] = to_device(torch.as_tensor(array, dtype=tensor.dtype), tensor.device)
        return Memory(State({name: tensors[name] for name in self.state}), tensors["actions"], tensors.get("plan"))


class Actor:
    """Turns observations into actions. It keeps no state between calls: everything is in the `Memory`.

    On CUDA, observing and choosing are captured as CUDA graphs and replayed, for each number of environments. They run
    on the same stream as gradient steps and in the order of the calls, so that an action is always chosen with the
    weights after the last whole gradient step.

    Args:
        model: The model that acts.
        obs_codec: Codec of the environment's observations.
        action_codec: Codec of the environment's actions.
        planner: Chooses the actions in place of the model's policy.
        captured: Whether to capture CUDA graphs.
    """

    turn: AbstractContextManager[Any] = nullcontext()
    """Entered while actions are chosen; a lock where a gradient step on another thread must not capture meanwhile."""

    def __init__(
        self,
        model: WorldModel,
        obs_codec: ObservationCodec,
        action_codec: ActionCodec,
        planner: Planner | None = None,
        *,
        captured: bool = False,
    ) -> None:
        self.model = model
        self.obs_codec = obs_codec
        self.action_codec = action_codec
        self.planner = planner
        self._captured = captured
        self._set_up_captures()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_captures", "_tensors")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._set_up_captures()

    def _set_up_captures(self) -> None:
        """Starts without CUDA graphs, which belong to one actor: a copy captures its own."""
        self._captures: Captures | None = None
        self._tensors: list[Tensor] = [*self.model.parameters(), *self.model.buffers()]
        if self._captured:
            device = self.model.device
            self._captures = Captures("Acting", self.model, device, CudaGraphCapturer(device), MAX_FORMS)

    @property
    def has_tasks(self) -> bool:
        """Whether the model has several tasks."""
        return getattr(self.model.config, "num_tasks", 1) > 1

    def task_numbers(self, task: Any, rows: int) -> Array:
        """Numbers of tasks, given by names or numbers: one for all rows, or one for each. `[rows]` int64

        Raises:
            ConfigurationError: If the model has no such task.
            ShapeMismatchError: If there are more or fewer tasks than rows.
        """
        if isinstance(task, np.ndarray) and task.ndim == 0:
            task = task.item()
        given = [task] * rows if isinstance(task, str) or np.ndim(task) == 0 else list(task)
        if len(given) != rows:
            raise ShapeMismatchError(f"There are {len(given)} tasks, expected one, or one for each of {rows} rows.")
        config: Any = self.model.config
        if not hasattr(config, "task_number"):
            if any(one != 0 for one in given):
                raise ConfigurationError(f"task is {task!r}, and {config.model_type} has one task. Leave it out.")
            return np.zeros(rows, np.int64)
        return np.array([config.task_number(one) for one in given], np.int64)

    @torch.inference_mode()
    def start(self, rows: int) -> Memory:
        """The memory before the first observation."""
        no_actions = torch.zeros(rows, self.action_codec.action_dim, device=self.model.device)
        plan = None if self.planner is None else self.planner.start(rows)
        return Memory(self.model.initial_state(rows), no_actions, plan)

    @torch.inference_mode()
    def observe(self, memory: Memory, obs: Arrays, episode_starts: Array, *, deterministic: bool) -> Memory:
        """The memory with the state after the last actions and the observations that followed.

        Args:
            memory: What `start` or the last `act` returned.
            obs: Observations in the library's form. `[N, ...]`
            episode_starts: True where `obs` begins an episode; state and action of that row are ignored. `[N]`
            deterministic: Take the likeliest state, without random numbers.
        """
        single = not isinstance(obs, dict)

        def update(inputs: Tensors) -> dict[str, Tensor]:
            parts = _below("obs", inputs)
            observed: Observation = parts[SINGLE_KEY] if single else parts
            state = self.model.update(
                State(_below("state", inputs)),
                inputs["actions"],
                observed,
                is_first=inputs["is_first"],
                deterministic=deterministic,
            )
            return dict(state)

        inputs = {
            **{f"state/{name}": value for name, value in memory.state.items()},
            **{f"obs/{key}": torch.from_numpy(value) for key, value in _by_key(obs).items()},
            "actions": memory.actions,
            "is_first": torch.as_tensor(episode_starts, dtype=torch.bool),
        }
        return replace(memory, state=State(self._run(("observe", deterministic), update, inputs)))

    @torch.inference_mode()
    def act(self, memory: Memory, episode_starts: Array, *, deterministic: bool) -> Memory:
        """The memory with the actions to take in its state, and the plan behind them.

        Continuous actions are clipped to [-1, 1], so that what is executed, stored and remembered is the same.

        Args:
            memory: What `observe` returned.
            episode_starts: True where an episode begins; the plan of that row is ignored. `[N]`
            deterministic: Take the likeliest actions, without random numbers.
        """
        planner = self.planner

        def choose(inputs: Tensors) -> dict[str, Tensor]:
            state = State(_below("state", inputs))
            if planner is None:
                actions = self.model.policy(state, deterministic=deterministic).float()
                # One-hots are within these bounds as well.
                return {"actions": actions.clamp(-1.0, 1.0)}
            actions, plan = planner.plan(
                state, inputs["plan"], is_first=inputs["is_first"], deterministic=deterministic
            )
            return {"actions": actions.float(), "plan": plan}

        inputs = {f"state/{name}": value for name, value in memory.state.items()}
        if memory.plan is not None:
            inputs |= {"plan": memory.plan, "is_first": torch.as_tensor(episode_starts, dtype=torch.bool)}
        # A graph would keep whatever the user's function reads besides the trajectory, such as the angle to hold.
        capturable = planner is None or planner.objective is None
        found = self._run(("act", deterministic), choose, inputs, capturable=capturable)
        return replace(memory, **found)  # type: ignore[arg-type]

    def _run(
        self,
        key: Hashable,
        function: Callable[[Tensors], dict[str, Tensor]],
        inputs: dict[str, Tensor],
        *,
        capturable: bool = True,
    ) -> dict[str, Tensor]:
        """Calls a function in evaluation mode with inputs from any device, or replays its CUDA graph."""

        def evaluated(given: Tensors) -> dict[str, Tensor]:
            # The mode is set here because a replay does not need it, and setting it takes longer than a small policy.
            if self.model.training:
                self.model.eval()
            return function(given)

        def plain() -> dict[str, Tensor]:
            return evaluated({name: to_device(value, self.model.device) for name, value in inputs.items()})

        if self._captures is None or self._captures.given_up or not capturable:
            return plain()
        self._captures.keep_while(places(self._tensors))
        form = (key, signature_of(inputs))
        if not self._captures.takes(form):
            return plain()
        outputs = self._captures(form, Work(evaluated, lambda: inputs, plain))
        return {name: value.clone() for name, value in outputs.items()}

    def check_finite(self, actions: Array, before: Memory, obs: Arrays) -> None:
        """Raises unless the actions are finite. Usually this costs one look at a few numbers.

        Args:
            actions: Actions that are about to be executed, in the library's form. `[N, A]`
            before: The memory that they were chosen with.
            obs: The observations that they were chosen for, in the library's form. `[N, ...]`

        Raises:
            TrainingError: Names the first tensor that is not finite.
        """
        if np.count_nonzero(np.isfinite(actions)) == actions.size:
            return
        weights = weights_of(self.model)
        observed = {name: torch.from_numpy(array) for name, array in _by_key(obs).items()}
        if found := first_not_finite(weights):
            reason = (
                f"of the model's weights {found}. Its training has diverged: take an earlier checkpoint, or train "
                "again with a lower learning_rate"
            )
        elif found := first_not_finite(observed):
            reason = f"of the observation {found}. Look for where the environment makes them"
        elif found := first_not_finite(before.tensors()):
            reason = f"of the state before {found}. Pass what predict returned, or None where an episode begins"
        else:
            reason = (
                f"all weights are finite, up to {largest(weights):.3g}, and so is the observation, up to "
                f"{largest(observed):.3g}, but what the model computes of them overflows. Scale what is observed, as "
                "VecNormalize does, or train again with a lower learning_rate"
            )
        raise TrainingError(f"The chosen action is not finite: {reason}.")

    def predict(
        self, observation: Any, state: PredictState | None, episode_start: Any, deterministic: bool, task: Any = None
    ) -> tuple[Array, PredictState]:
        """SB3's protocol, with a task; see `WorldFluxAgent.predict`."""
        obs, batched = self.obs_codec.encode_any(observation)
        rows = len(next(iter(_by_key(obs).values())))
        before = self.start(rows)
        starts = np.ones(rows, dtype=bool)
        if state is not None:
            before = before.with_arrays(state)
            starts = _episode_starts(episode_start, rows)
        if task is None and self.has_tasks:
            if state is None:
                names = getattr(self.model.config, "task_names", ()) or range(self.model.config.num_tasks)  # type: ignore[attr-defined]
                raise ConfigurationError(
                    f"The model has the tasks {', '.join(map(str, names))}. Say which one it is: predict(obs, task=...)"
                    ", or pass agent.for_task(..., env) to evaluate_policy. TaskEvalCallback replaces EvalCallback."
                )
            task = np.asarray(state[list(before.tensors()).index(TASK_KEY)])
        if task is not None:
            before = before.with_tasks(self.task_numbers(task, rows))
        after = self.observe(before, obs, starts, deterministic=deterministic)
        after = self.act(after, starts, deterministic=deterministic)
        arrays = to_host(after.tensors())
        self.check_finite(arrays["actions"], before, obs)
        state, actions = tuple(arrays.values()), self.action_codec.to_env(arrays["actions"])
        if batched:
            return actions, state
        # Environments look single choices up in dictionaries: the row becomes a number, because no array is hashable.
        return (actions[0] if isinstance(self.action_codec.space, Discrete) else actions.squeeze(axis=0)), state


class TaskPolicy:
    """An agent in one task, or in one for each environment, for whatever only knows SB3's `predict`.

    All other attributes are those of the agent.

    Args:
        agent: The agent.
        task: As for `WorldFluxAgent.predict`.
        env: As for `WorldFluxAgent.for_task`.

    Raises:
        ConfigurationError: If the model has no such task.
        ShapeMismatchError: If the spaces of `env` do not fit the agent's.
    """

    def __init__(self, agent: Any, task: Any, env: Any = None) -> None:
        self.agent, self.task = agent, task
        self._codecs: tuple[ObservationCodec, ActionCodec] | None = None
        if env is None or (env.observation_space, env.action_space) == (agent.observation_space, agent.action_space):
            return
        obs, actions = self._codecs = ObservationCodec(env.observation_space), ActionCodec(env.action_space)
        expected, found = agent.obs_codec.obs_shape, obs.obs_shape
        if found != expected and not (is_vector(expected) and is_vector(found) and found < expected):
            shorter = ", or shorter vectors" if is_vector(expected) else ""
            raise ShapeMismatchError(f"env has observations {found}, expected {expected} as the agent{shorter}.")
        config = agent.model.config
        dims = getattr(config, "used_action_dims", (config.action_dim,))
        for number in agent.actor.task_numbers(task, 1 if isinstance(task, str) else np.size(task)):
            if (actions.action_dim, actions.action_classes) != (dims[number], config.action_classes):
                kind = "one-hot" if config.action_classes else "continuous"
                raise ShapeMismatchError(
                    f"env has actions {actions.space}, expected {kind} ones of width {dims[number]} in task {task!r}."
                )

    def __repr__(self) -> str:
        return f"{self.agent!r}.for_task({self.task!r})"

    def __getattr__(self, name: str) -> Any:
        if name in ("agent", "task"):  # of a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.agent, name)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """As `WorldFluxAgent.predict`, in the task and in the spaces of `env`."""
        if self._codecs is None:
            return self.agent.predict(observation, state, episode_start, deterministic, task=self.task)
        rows, batched = self._codecs[0].encode_any(observation)
        if isinstance(rows, np.ndarray) and is_vector(self.agent.obs_codec.obs_shape):
            observation = np.pad(rows, ((0, 0), (0, self.agent.obs_codec.obs_shape[0] - rows.shape[1])))
        given, state = self.agent.predict(observation, state, episode_start, deterministic, task=self.task)
        theirs: ActionCodec = self.agent.action_codec
        actions = theirs.from_env(np.reshape(given, (-1, *(theirs.space.shape or ()))))
        own = self._codecs[1].to_env(actions[:, : self._codecs[1].action_dim])
        return (own if batched else own[0]), state


def _episode_starts(given: Any, rows: int) -> Array:
    if given is None:
        return np.zeros(rows, dtype=bool)
    starts = np.asarray(given, dtype=bool).reshape(-1)
    if len(starts) != rows:
        raise ShapeMismatchError(
            f"episode_start has shape {np.shape(given)}, expected one value for each of {rows} observations."
        )
    return starts


def _by_key(obs: Arrays) -> Mapping[str, Array]:
    """Observations by key; those that are one array have the key `SINGLE_KEY`."""
    return obs if isinstance(obs, dict) else {SINGLE_KEY: obs}


def _below(name: str, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors whose names begin with `name/`, by the rest of their names."""
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
