"""Rows on their way into a replay buffer: checked, then stored, one step of every environment or whole episodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from worldflux.errors import BufferError, ShapeMismatchError
from worldflux.training.actions import as_executed, rescaled
from worldflux.training.arrays import RowForm, as_numpy, checked
from worldflux.training.rows import STEP, TERMINATED, TRUNCATED, RowStore

_BOOL = np.dtype(np.bool_)
_FLOAT = np.dtype(np.float32)


class RowReceiver:
    """The half of `ReplayBuffer` that is filled.

    Args:
        form: Of a row.
        store: Where rows go; empty.
    """

    def __init__(self, form: RowForm, store: RowStore) -> None:
        self._form, self._store = form, store
        self._n_envs = len(store.base)
        self._hand_over: Callable[[], None] | None = None  # of a recorder that holds steps back
        # The row of each stream where the first window begins that is still fresh. No part of the sampler's state:
        # only who asks for fresh windows, while it records them, reads or moves it.
        self._fresh = np.zeros(self._n_envs, np.int64)

    @property
    def _rows(self) -> RowStore:
        """The store with every step that was made; nothing but this is to look into `_store`."""
        if self._hand_over is not None:
            self._hand_over()
        return self._store

    def add(
        self,
        obs: Any,
        actions: Any,
        rewards: Any,
        terminations: Any,
        truncations: Any,
        *,
        final_obs: Any = None,
        extras: Mapping[str, Any] | None = None,
        active: Any = None,
    ) -> None:
        """Stores one step of every environment; the rows can be sampled at once.

        Args:
            obs: Where the actions were taken, an array or a dict of arrays. `[n_envs, ...]`
            actions: As executed, in the library's form. `[n_envs, A]`
            rewards: What they earned, as the environment gave it. `[n_envs]`
            terminations: The step ended the episode for good. `[n_envs]`
            truncations: The step was cut from outside. `[n_envs]`
            final_obs: The observation after the step, required where an episode ended; only the rows of those
                environments are read. `[n_envs, ...]`
            extras: What to store beside the rows, zero where nothing is given. `{name: [n_envs, ...]}`
            active: The environments that made a step; the rows of the others are neither read nor stored. None means
                all of them. `[n_envs]`

        Raises:
            ShapeMismatchError: If a shape is not as above; nothing is stored then.
            BufferError: If a value cannot be stored or `final_obs` is missing; nothing is stored then.
        """
        n = self._n_envs
        rows = None if active is None else np.flatnonzero(checked("active", active, (n,), _BOOL))
        terminated = checked("terminations", terminations, (n,), _BOOL, rows)
        truncated = checked("truncations", truncations, (n,), _BOOL, rows)
        obs_arrays = self._form.checked_obs("obs", obs, (n,), rows)
        actions = checked("actions", actions, (n, self._form.action_dim), _FLOAT, rows)
        if self._form.action_classes is not None:  # otherwise they are looked at when training starts
            actions = as_executed("actions", actions, actions, self._form.action_classes)
        rewards = checked("rewards", rewards, (n,), _FLOAT, rows)
        extra_arrays = {
            name: self._form.checked_extra(name, value, (n,), rows) for name, value in (extras or {}).items()
        }
        flags = terminated * TERMINATED | truncated * TRUNCATED | STEP
        ended = (flags > STEP).nonzero()[0]
        finals = self._form.checked_finals(final_obs, n, ended if rows is None else rows[ended]) if ended.size else {}
        if rows is not None and len(rows) < n:
            obs_arrays = {key: _spread(array, rows, n) for key, array in obs_arrays.items()}
            extra_arrays = {name: _spread(array, rows, n) for name, array in extra_arrays.items()}
            actions, rewards, flags = (_spread(array, rows, n) for array in (actions, rewards, flags))
        self._rows.add_steps(
            {key: array[None] for key, array in obs_arrays.items()},
            actions[None],
            rewards[None],
            flags[None],
            finals,
            {name: array[None] for name, array in extra_arrays.items()},
        )

    def hold_back(self, hand_over: Callable[[], None]) -> int:
        """For a recorder that passes its steps on several at a time: `hand_over` is called before anybody looks.

        Whoever was registered before hands over and is forgotten.

        Args:
            hand_over: Calls `add_checked` with what was held back.

        Returns:
            How many steps may be held back.
        """
        most = self._rows.most_steps
        self._hand_over = hand_over
        return most

    def is_fed_by(self, hand_over: Callable[[], None]) -> bool:
        """Whether `hand_over` was the last that was registered with `hold_back`."""
        return self._hand_over == hand_over

    def add_checked(
        self,
        obs: Mapping[str, np.ndarray],
        actions: np.ndarray,
        rewards: np.ndarray,
        flags: np.ndarray,
        finals: Mapping[str, np.ndarray],
    ) -> None:
        """Several steps from who has checked everything: these are arrays of the stored dtypes, and finite.

        Args:
            obs: By key; the key of an observation that is one array is `SINGLE`. `[K, n_envs, ...]`
            actions: `[K, n_envs, A]`
            rewards: `[K, n_envs]`
            flags: As for `RowStore.add_steps`. `[K, n_envs]`
            finals: The observations after the ends of episodes, in the order of `flags`. `[E, ...]`
        """
        self._store.add_steps(obs, actions, rewards, flags, finals, {})

    def add_episode(
        self,
        obs: Any,
        actions: Any,
        rewards: Any,
        dones: Any = None,
        *,
        terminations: Any = None,
        truncations: Any = None,
        action_low: Any = None,
        action_high: Any = None,
    ) -> None:
        """Stores a whole episode, or several one after another that are told apart by their flags.

        With several environments the stream with the fewest transitions receives it. An episode of which more than
        that stream's share of the capacity is given keeps its newest transitions. A last step without a flag counts as
        truncated, here and in `load`: that an episode terminated has to be said.

        Args:
            obs: T+1 observations, or T where the one after the last step is not known. `[T+1, ...]` or `[T, ...]`
            actions: Taken at the first T of them. `[T, A]`
            rewards: What they earned. `[T]`
            dones: Another name of `terminations`. `[T]`
            terminations: The step ended an episode for good. `[T]`
            truncations: The step was cut from outside. `[T]`
            action_low: With `action_high`, the bounds of continuous actions in the environment's own units, a number or
                one for each entry; they are rescaled to [-1, 1]. `[A]`
            action_high: See `action_low`. `[A]`

        Raises:
            ShapeMismatchError: If a shape is not as above; nothing is stored then.
            BufferError: If a value cannot be stored, actions are not in [-1, 1] (or not one-hot where they are
                discrete), or every stream has an episode in flight; nothing is stored then.
        """
        if dones is not None and terminations is not None:
            raise BufferError("Both dones and terminations were given. They mean the same: pass one of them.")
        count = _length("rewards", rewards)
        obs_count = _length("obs", next(iter(obs.values()), ()) if isinstance(obs, Mapping) else obs)
        if obs_count not in (count, count + 1):
            raise ShapeMismatchError(
                f"obs has {obs_count} rows and rewards has {count}: expected {count} observations, "
                f"or {count + 1} with the one after the last step."
            )
        obs_arrays = self._form.checked_obs("obs", obs, (obs_count,))
        actions = self._form.checked_actions(rescaled(actions, action_low, action_high), (count,))
        rewards = checked("rewards", rewards, (count,), _FLOAT)
        name = "terminations" if dones is None else "dones"
        terminations = terminations if dones is None else dones
        terminated = _flags_or_zeros(name, terminations, count)
        truncated = _flags_or_zeros("truncations", truncations, count)
        truncated[-1] |= not terminated[-1]
        rows = self._rows
        if rows.in_flight.all():
            raise BufferError(
                "Every stream has an episode in flight, and a whole episode cannot be stored in its middle. "
                "Call end_episodes() first."
            )
        stream = int(np.argmin(np.where(rows.in_flight, np.iinfo(np.int64).max, rows.transitions)))

        lengths = np.diff(np.flatnonzero(terminated | truncated), prepend=-1)
        always = np.ones(len(lengths), np.bool_)
        place = rows.reserve(stream, lengths, starts=always, ends=always)
        rows.write_steps(place, slice(place.skipped, None), actions, rewards, terminated, truncated)
        for key, array in obs_arrays.items():
            rows.obs[key][place.steps] = array[place.skipped : count]
        rows.write_finals(place.finals, None)
        if obs_count > count:
            rows.write_finals(place.finals[-1:], {key: array[-1:] for key, array in obs_arrays.items()})
        rows.commit(stream, place)
        self._fresh[stream] = place.end

    def end_episodes(self, env: int | None = None, *, final_obs: Any = None) -> None:
        """Closes episodes in flight as truncated; for a reset from outside.

        Args:
            env: Of this environment only; None for all of them.
            final_obs: The observations after their last steps, as for `add`; None where they are not known.
                `[n_envs, ...]`

        Raises:
            ShapeMismatchError: If `final_obs` has another shape; nothing is changed then.
            BufferError: If there is no such environment, or `final_obs` cannot be stored; nothing is changed then.
        """
        envs = np.flatnonzero(self._rows.in_flight)
        if env is not None:
            if not 0 <= env < self._n_envs:
                raise BufferError(f"env is {env}, expected 0 to {self._n_envs - 1}.")
            envs = envs[envs == env]
        if envs.size:
            self._rows.close(
                envs, None if final_obs is None else self._form.checked_finals(final_obs, self._n_envs, envs)
            )


def _length(name: str, value: Any) -> int:
    array = as_numpy(name, value)
    if not array.size:
        raise ShapeMismatchError(f"{name} has shape {array.shape}: an episode has at least one step.")
    return len(array) if array.ndim else 1


def _flags_or_zeros(name: str, value: Any, count: int) -> np.ndarray:
    """A copy, because the end of the last episode may be added. `[T]`."""
    return np.zeros(count, np.bool_) if value is None else checked(name, value, (count,), _BOOL).copy()


def _spread(array: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """An array of so many rows with the given ones at their places."""
    spread = np.zeros((count, *array.shape[1:]), array.dtype)
    spread[rows] = array
    return spread
