"""Streams of rows: checking and adding steps and episodes, and which recorder may write to which stream."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError, WorldFluxError
from worldflux.locks import ThreadLock, locked
from worldflux.replay.actions import as_executed, rescaled
from worldflux.replay.backends import Storage
from worldflux.replay.ring import FINAL, STEP, TERMINATED, TRUNCATED, UNSEEN, RingStorage
from worldflux.replay.spec import TransitionSpec, as_numpy, checked
from worldflux.validation import SINGLE_KEY, TASK_KEY, whole_number

_BOOL = np.dtype(np.bool_)
_FLOAT = np.dtype(np.float32)


class StepWriter(Protocol):
    """A recorder that passes steps on several at a time: `hand_over` is called before anybody looks at the rows."""

    streams: np.ndarray
    """The streams that it alone writes to, one for each of its environments. `[S]`"""
    is_resting: bool
    """Whether none of its episodes goes on, so that another one may have its streams."""
    is_abandoned: bool
    """Whether nobody will ever make another step with it."""

    def hand_over(self) -> None:
        """Calls `add_checked` with the steps that were held back."""

    def end_episodes(self) -> None:
        """Ends its episodes in flight as truncated."""

    def limit(self, steps: int) -> None:
        """Says how many steps may be held back from now on."""


class RecordedStreams:
    """The part of `ReplayBuffer` that records rows, without sampling and files.

    Args:
        capacity: Transitions to keep, over all streams.
        n_envs: Environments that `add` receives, each with a stream.
        form: Shapes and dtypes of a row.
        storage: Storage of the rows.
    """

    lock: ThreadLock

    def __init__(self, capacity: int, n_envs: int, form: TransitionSpec, storage: Storage) -> None:
        self._capacity, self._n_envs, self._form = capacity, n_envs, form
        self._store = _new_store(capacity, n_envs, form, storage)
        self._writers: list[StepWriter] = []
        self._process = os.getpid()  # also of copies that are sent to others
        # The row of each stream where the first window begins that is still fresh. This is no part of the sampler's
        # state: only whoever asks for fresh windows, while recording them, reads or moves it.
        self._fresh = np.zeros(n_envs, np.int64)

    @property
    def _rows(self) -> RingStorage:
        """The store with every step that was made; outside of this class, nobody reads `_store`."""
        with self.lock:
            for writer in self._writers:
                writer.hand_over()
        return self._store

    def stored(self) -> tuple[RingStorage, np.ndarray]:
        """The rows, and where the fresh windows of each stream begin, `[num_streams]` int64; both the buffer's own."""
        return self._rows, self._fresh

    @property
    def capacity(self) -> int:
        """Largest number of transitions that are kept."""
        return self._capacity

    @property
    def n_envs(self) -> int:
        """Environments whose steps `add` receives, each with a stream."""
        return self._n_envs

    @property
    def num_streams(self) -> int:
        """Number of streams: one for each of `n_envs`, and those of recorders of further environments."""
        return len(self._store.base)

    @property
    def num_transitions(self) -> int:
        """Transitions stored now, those of episodes in flight included."""
        return int(self._rows.transitions.sum())

    @property
    def num_episodes(self) -> int:
        """Episodes that have ended and of which at least one transition is still stored."""
        return int(self._rows.episodes.sum())

    def __len__(self) -> int:
        return self.num_transitions

    # --- steps and episodes

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
        streams: np.ndarray | None = None,
    ) -> None:
        """Stores one step of every environment; the rows can be sampled at once.

        Args:
            obs: Observations at which the actions were taken, an array or a dict of arrays. `[n_envs, ...]`
            actions: Actions as executed, in the library's form. `[n_envs, A]`
            rewards: What the actions earned, as the environment gave it. `[n_envs]`
            terminations: Whether the step ended the episode for good. `[n_envs]`
            truncations: Whether the step was cut from outside. `[n_envs]`
            final_obs: The observation after the step, required where an episode ended; only the rows of those
                environments are read. `[n_envs, ...]`
            extras: What to store beside the rows, zero where nothing is given. `{name: [n_envs, ...]}`
            active: The environments that made a step; the rows of the others are neither read nor stored. None means
                all of them. `[n_envs]`
            streams: The streams of a recorder's environments, in ascending order; `n_envs` is their number then. None:
                those that the buffer was made with. `[n_envs]`

        Raises:
            ShapeMismatchError: If a shape is not as above; nothing is stored then.
            BufferError: If a value cannot be stored or `final_obs` is missing; nothing is stored then.
        """
        streams = np.arange(self._n_envs) if streams is None else streams
        n = len(streams)
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
        with self.lock:
            self._rows.add_steps(
                {key: array[None] for key, array in obs_arrays.items()},
                actions[None],
                rewards[None],
                flags[None],
                finals,
                {name: array[None] for name, array in extra_arrays.items()},
                self._or_all(streams),
            )

    def add_checked(
        self,
        obs: Mapping[str, np.ndarray],
        actions: np.ndarray,
        rewards: np.ndarray,
        flags: np.ndarray,
        finals: Mapping[str, np.ndarray],
        streams: np.ndarray,
        seen: np.ndarray | None = None,
    ) -> None:
        """Stores several steps from a writer that has checked everything: arrays of the stored dtypes, and finite.

        Args:
            obs: Observations by key; the key of an observation that is one array is `SINGLE_KEY`. `[K, S, ...]`
            actions: `[K, S, A]`
            rewards: `[K, S]`
            flags: As for `RingStorage.add_steps`. `[K, S]`
            finals: The observations after the ends of episodes, in the order of `flags`. `[E, ...]`
            streams: The writer's streams, in ascending order. `[S]`
            seen: As for `RingStorage.add_steps`. `[E]`
        """
        with self.lock:
            self._store.add_steps(obs, actions, rewards, flags, finals, {}, self._or_all(streams), seen)

    def _or_all(self, streams: np.ndarray) -> np.ndarray | None:
        """None in place of all streams, which takes less time."""
        return None if len(streams) == self.num_streams else streams

    @locked
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
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        """Stores a whole episode, or several one after another that are told apart by their flags.

        With several environments the stream with the fewest transitions receives it. Of an episode that is longer than
        that stream's share of the capacity, the newest transitions are kept. A last step without a flag counts as
        truncated, here and in `load`: that an episode terminated has to be said.

        Args:
            obs: T+1 observations, or T where the one after the last step is not known. `[T+1, ...]` or `[T, ...]`
            actions: Actions taken at the first T of them. `[T, A]`
            rewards: What the actions earned. `[T]`
            dones: Another name of `terminations`. `[T]`
            terminations: Whether the step ended an episode for good. `[T]`
            truncations: Whether the step was cut from outside. `[T]`
            action_low: With `action_high`, the bounds of continuous actions in the environment's own units, a number or
                one for each entry; they are rescaled to [-1, 1]. `[A]`
            action_high: See `action_low`. `[A]`
            extras: What to store beside the rows, zero where nothing is given, such as `{"task": numbers}`.
                `{name: [T, ...]}`

        Raises:
            ShapeMismatchError: If a shape is not as above; nothing is stored then.
            BufferError: If a value cannot be stored, actions are not in [-1, 1] (or not one-hot where they are
                discrete), or every stream has an episode in flight; nothing is stored then.
        """
        if dones is not None and terminations is not None:
            raise BufferError("Both dones and terminations were given. They mean the same: pass one of them.")
        count, reward_count = _length("actions", actions), _length("rewards", rewards)
        obs_count = _length("obs", next(iter(obs.values()), ()) if isinstance(obs, Mapping) else obs)
        if reward_count != count or obs_count not in (count, count + 1):
            raise ShapeMismatchError(
                f"obs has {obs_count} rows, actions has {count} and rewards has {reward_count}. Expected one reward "
                "for each action, and as many observations, or one more with the one after the last step."
            )
        obs_arrays = self._form.checked_obs("obs", obs, (obs_count,), in_time=True)
        actions = self._form.checked_actions(rescaled(actions, action_low, action_high), (count,))
        rewards = checked("rewards", rewards, (count,), _FLOAT, in_time=True)
        extra_arrays = {name: self._form.checked_extra(name, value, (count,)) for name, value in (extras or {}).items()}
        name = "terminations" if dones is None else "dones"
        terminated = _flags_or_zeros(name, terminations if dones is None else dones, count)
        truncated = _flags_or_zeros("truncations", truncations, count)
        truncated[-1] |= not terminated[-1]
        rows = self._rows
        if rows.in_flight.all() and self._owned(is_resting=False):
            self.add_streams(1)
            rows = self._store
        if rows.in_flight.all():
            raise BufferError(
                "Every stream has an episode in flight, and a whole episode cannot be stored in its middle. "
                "Call end_episodes() first."
            )
        stream = int(np.argmin(np.where(rows.in_flight, np.iinfo(np.int64).max, rows.transitions)))
        flags = STEP | terminated * TERMINATED | truncated * TRUNCATED
        seen = np.zeros(np.count_nonzero(flags > STEP), np.bool_)
        seen[-1] = obs_count > count  # of several episodes, only the last one can have it
        finals = {}
        for key, array in obs_arrays.items():
            finals[key] = np.zeros((len(seen), *array.shape[1:]), array.dtype)
            finals[key][-1] = array[-1]
        steps = {key: array[:count] for key, array in obs_arrays.items()}
        rows.add_episodes(stream, steps, actions, rewards, flags, finals, seen, extra_arrays)
        self._fresh[stream] = rows.end[stream]

    def add_episodes_of(self, other: RecordedStreams, *, first: int = 0, every: int = 1) -> None:
        """Copies whole episodes from another buffer of the same shapes, without extras other than their tasks.

        Args:
            other: The other buffer, of which episodes in flight are copied as truncated.
            first: Number of the first episode to copy.
            every: Distance to the next one.
        """
        rows = other._rows
        tasks = rows.extras.keys() & self._form.extras.keys() & {TASK_KEY}
        for stream, begin, end in list(zip(*rows.episodes_at(), strict=True))[first::every]:
            at = rows.at(stream, np.arange(begin, end))
            flags = rows.flags[at]
            step = at[(flags & FINAL) == 0]
            seen = step if flags[-1] & UNSEEN else at
            obs = {key: stored[seen] for key, stored in rows.obs.items()}
            self.add_episode(
                obs if self._form.is_dict else obs[SINGLE_KEY],
                rows.actions[step],
                rows.rewards[step],
                terminations=(rows.flags[step] & TERMINATED) != 0,
                truncations=(rows.flags[step] & TRUNCATED) != 0,
                extras={name: rows.extras[name][step] for name in tasks},
            )

    def end_episodes(self, env: int | None = None, *, final_obs: Any = None) -> None:
        """Closes episodes in flight as truncated; for a reset from outside.

        Args:
            env: The only environment whose episode is closed; None for all of them.
            final_obs: The observations after their last steps, as for `add`; None where they are not known.
                `[n_envs, ...]`

        Raises:
            ShapeMismatchError: If `final_obs` has another shape; nothing is changed then.
            BufferError: If there is no such environment, or `final_obs` cannot be stored; nothing is changed then.
        """
        if env is not None and not 0 <= env < self._n_envs:
            raise BufferError(f"env is {env}, expected 0 to {self._n_envs - 1}.")
        self.end_in(np.arange(self._n_envs) if env is None else np.array([env]), final_obs, self._n_envs)
        if env is None:
            self.end_in(np.arange(self._n_envs, self.num_streams))

    @locked
    def end_in(
        self, streams: np.ndarray, final_obs: Any = None, count: int = 0, envs: np.ndarray | None = None
    ) -> None:
        """Closes the episodes in flight in these streams as truncated.

        Args:
            streams: `[S]`
            final_obs: The observations after the last steps of `count` environments; None where they are not known.
                `[count, ...]`
            count: Number of these observations.
            envs: The rows of `final_obs` that belong to `streams`; None: those of the same numbers. `[S]`
        """
        in_flight = self._rows.in_flight[streams]
        if in_flight.any():
            envs = (streams if envs is None else envs)[in_flight]
            finals = None if final_obs is None else self._form.checked_finals(final_obs, count, envs)
            self._store.close(streams[in_flight], finals)

    def checked_final_obs(self, final_obs: Any, envs: np.ndarray) -> dict[str, np.ndarray]:
        """The rows `envs` of `final_obs`, an array or a dict of them, by key as they are stored. `[E, ...]` each.

        Raises:
            ShapeMismatchError: If `final_obs` has another shape than `[n_envs, ...]`.
            BufferError: If it cannot be stored.
        """
        return self._form.checked_finals(final_obs, self._n_envs, envs)

    # --- room

    @property
    def room(self) -> int:
        """Steps of every environment that `add` can take, however their episodes end, before it drops old rows."""
        return self._rows.room

    @locked
    def grow(self, capacity: int) -> None:
        """Makes room for more transitions; what is stored stays, with the same numbers in `Batch.row_ids`.

        Args:
            capacity: The new capacity, at least the present one.

        Raises:
            ConfigurationError: If it is less.
            BufferError: If the machine has no memory for it; nothing is changed then.
        """
        capacity = whole_number("capacity", capacity, self._capacity)
        self._move_rows(_new_store(capacity, self.num_streams, self._form, self._store.storage))
        self._capacity = capacity

    @locked
    def add_streams(self, count: int) -> None:
        """Makes further streams, for environments that move by themselves.

        All streams have equal shares of the capacity from then on: the oldest rows of those that hold more are dropped.

        Raises:
            BufferError: If the capacity is less than a transition for each, or the machine has no memory for it;
                nothing is changed then.
        """
        streams = self.num_streams + count
        if self._capacity < streams:
            raise BufferError(
                f"The buffer's capacity is {self._capacity}, and {streams} environments record into it, each of which "
                "needs a stream of its own. Make it larger."
            )
        store = _new_store(self._capacity, streams, self._form, self._store.storage)
        self._rows.drop_excess(store)
        self._move_rows(store)
        self._fresh = np.append(self._fresh, np.zeros(count, np.int64))
        for writer in self._writers:
            writer.limit(store.most_steps)

    @locked
    def clear(self, streams: int) -> None:
        """Forgets all rows, and makes so many streams."""
        self._store = _new_store(self._capacity, streams, self._form, self._store.storage)
        self._fresh = np.zeros(streams, np.int64)

    def _move_rows(self, store: RingStorage) -> None:
        """Copies all rows to another store, and goes on with it."""
        rows = self._rows
        if not store.storage.takes_all_at_once:
            what = f"A copy of the replay buffer's {len(self):,} transitions, which changing its size needs,"
            store.storage.budget().require(rows.bytes_taken, what=what, fits=0)
        rows.move_to(store)
        self._store = store

    # --- recorders

    @locked
    def attach(self, writer: StepWriter, count: int) -> np.ndarray:
        """Gives a writer streams that nobody else writes to, one for each of its environments, until `detach`.

        Streams without an owner come first. Where there are too few, further ones are made.

        Returns:
            Their numbers. `[count]`
        """
        for other in [other for other in self._writers if other.is_abandoned]:
            if not other.is_resting:
                other.end_episodes()
            self.detach(other)
        rows = self._rows
        resting, moving = self._owned(is_resting=True), self._owned(is_resting=False)
        if (missing := count - (self.num_streams - len(moving))) > 0:
            self.add_streams(missing)
            rows = self._store
        free = np.setdiff1d(np.arange(self.num_streams), moving)
        # Episodes that are in flight here have no known owner; they are ended only as a last resort.
        rank = 2 * rows.in_flight[free] + np.isin(free, resting)
        streams = np.sort(free[np.argsort(rank, kind="stable")][:count])
        self._writers = [other for other in self._writers if not np.isin(other.streams, streams).any()]
        self._writers.append(writer)
        in_flight = streams[rows.in_flight[streams]]
        if in_flight.size:
            rows.close(in_flight, None)
        return streams

    def _owned(self, *, is_resting: bool) -> list[int]:
        """The streams of the writers that rest, or of those that do not."""
        writers = [writer for writer in self._writers if writer.is_resting is is_resting]
        return [stream for writer in writers for stream in writer.streams.tolist()]

    @locked
    def detach(self, writer: StepWriter) -> None:
        """Takes a writer's streams back, once its steps are passed on."""
        writer.hand_over()
        self._writers = [other for other in self._writers if other is not writer]

    def is_attached(self, writer: StepWriter) -> bool:
        """Whether a writer has streams."""
        return any(other is writer for other in self._writers)

    @property
    def most_steps(self) -> int:
        """Number of steps that a writer may hold back."""
        return self._store.most_steps

    def check_process(self) -> None:
        """Refuses to record into the copy of a buffer in another process; called before somebody records.

        Raises:
            ConfigurationError: If this process was started to step environments, and the buffer is a copy.
        """
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid == self._process:
            raise ConfigurationError(
                "The buffer belongs to another process, and what an environment in this process records would stay in "
                "a copy of it. Record the vector environment from outside, VecRecordEpisodes(SubprocVecEnv(...), "
                "buffer) or VectorRecordEpisodes(AsyncVectorEnv(...), buffer), or step the environments in one process "
                "(DummyVecEnv, SyncVectorEnv)."
            )


def _new_store(capacity: int, n_envs: int, form: TransitionSpec, storage: Storage) -> RingStorage:
    storage.check_writable()
    obs = {key: (shape, form.dtypes[key]) for key, shape in form.shapes.items()}
    try:
        return RingStorage(capacity, n_envs, obs, form.action_dim, form.extras, storage)
    except WorldFluxError:
        raise
    except (MemoryError, OverflowError, ValueError) as error:  # depending on how much too much it is
        raise BufferError(f"A buffer of {capacity} transitions does not fit into memory: {error}") from error


def _length(name: str, value: Any) -> int:
    array = as_numpy(name, value)
    if not array.size:
        raise ShapeMismatchError(f"{name} has shape {array.shape}: an episode has at least one step.")
    return len(array) if array.ndim else 1


def _flags_or_zeros(name: str, value: Any, count: int) -> np.ndarray:
    """A copy, because the end of the last episode may be added. `[T]`"""
    return np.zeros(count, np.bool_) if value is None else checked(name, value, (count,), _BOOL).copy()


def _spread(array: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """An array of `count` rows with the given ones at their places."""
    spread = np.zeros((count, *array.shape[1:]), array.dtype)
    spread[rows] = array
    return spread
