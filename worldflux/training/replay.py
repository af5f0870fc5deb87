"""The replay buffer: what was observed, done and earned, in rows; windows of them to learn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError
from worldflux.training.arrays import ObsShape, as_numpy, checked, extras_spec, obs_dtypes, obs_shapes
from worldflux.training.batch import Batch, BatchRequest
from worldflux.training.config import resolve_device, whole_number
from worldflux.training.npz import NpzFile
from worldflux.training.replay_file import SINGLE, collect_data, dtype_in_memory, fill, read_replay, write_replay
from worldflux.training.rows import FIRST, STEP, TERMINATED, TRUNCATED, UNSEEN, RowStore

DEFAULT_SEQ_LEN = 50

_BOOL = np.dtype(np.bool_)
_FLOAT = np.dtype(np.float32)


class ReplayBuffer:
    """The newest `capacity` transitions of one or more environments, as windows of consecutive rows.

    A row is an observation, the action taken there, and what came of that action. An episode of T transitions takes
    T+1 rows, because its last observation is kept; here T = 3, and the next episode of the same environment follows:

        row            0     1     2     3     4     5
        obs            o0    o1    o2    o3    o0'   o1'   o3: the observation after the last step
        actions        a0    a1    a2    ·     a0'   a1'   taken at obs[t]; · is zero
        rewards        r0    r1    r2    ·     r0'   r1'   what actions[t] earned on the way to obs[t+1]
        terminations   0     0     1     0     0     0     nothing is worth anything beyond obs[t+1]
        truncations    0     0     0     0     0     0     or 1 with terminations 0: obs[t+1] is still bootstrapped
        is_first       1     0     0     0     1     0     recurrent state and previous action are reset here
        obs_mask       1     1     1     1     1     1     0 on row 3 if the last observation was not recorded

    Each environment has a stream of its own, a ring of rows. A sampled window is any run of rows of one stream: it may
    cross episode ends, and rows of an episode in flight are sampled like all others. The oldest rows make room for new
    ones; where that cuts an episode, its oldest remaining row has `is_first` False. Very short episodes (fewer
    than 16 steps on average) can fill a large buffer's rows before `capacity` transitions are reached.

    Args:
        capacity: Transitions to keep, over all environments.
        obs_shape: Of one observation, images channel-first; a dict of shapes where observations are dictionaries.
        action_dim: Width of an action vector. Discrete actions are one-hot.
        obs_dtype: uint8 or float32, or a dict with one for each key. By default uint8 for three-dimensional shapes
            (images) and float32 for the others.
        n_envs: Streams, one for each environment that `add` receives.
        extras: Further arrays beside each row, as `{name: (shape, dtype)}`, which a model fills through `add` and
            `update_extras`; zero until then.
        seed: Of the sampler; None draws one.

    Raises:
        ConfigurationError: If an argument is out of its range.
        ShapeMismatchError: If `obs_shape` is that of a channel-last image.
        BufferError: If the machine has no memory for it.
    """

    def __init__(
        self,
        capacity: int,
        obs_shape: ObsShape,
        action_dim: int,
        *,
        obs_dtype: Any = None,
        n_envs: int = 1,
        extras: Mapping[str, tuple[tuple[int, ...], Any]] | None = None,
        seed: int | None = None,
    ) -> None:
        self._capacity = whole_number("capacity", capacity, 1)
        self._action_dim = whole_number("action_dim", action_dim, 1)
        self._n_envs = whole_number("n_envs", n_envs, 1)
        if capacity < n_envs:
            raise ConfigurationError(f"capacity is {capacity}, expected at least n_envs ({n_envs}).")
        self._is_dict = isinstance(obs_shape, Mapping)
        self._shapes = obs_shapes(obs_shape if isinstance(obs_shape, Mapping) else {SINGLE: obs_shape})
        self._extras_spec = extras_spec(extras)
        self.seed(seed)
        self._dtypes = obs_dtypes(obs_dtype, self._shapes)
        self._hand_over: Callable[[], None] | None = None  # of a recorder that holds steps back
        self._store = self._make_store(self._capacity)
        # The row of each stream where the first window begins that is still fresh. No part of the sampler's state:
        # only who asks for fresh windows, while it records them, reads or moves it.
        self._fresh = np.zeros(self._n_envs, np.int64)

    def _make_store(self, capacity: int) -> RowStore:
        spec = {key: (shape, self._dtypes[key]) for key, shape in self._shapes.items()}
        try:
            return RowStore(capacity, self._n_envs, spec, self._action_dim, self._extras_spec)
        except (MemoryError, OverflowError, ValueError) as error:  # depending on how much too much it is
            raise BufferError(f"A buffer of {capacity} transitions does not fit into memory: {error}") from error

    @property
    def _rows(self) -> RowStore:
        """The store with every step that was made; nothing but this is to look into `_store`."""
        if self._hand_over is not None:
            self._hand_over()
        return self._store

    # --- what it is and what it holds

    @property
    def capacity(self) -> int:
        """Transitions it keeps at most."""
        return self._capacity

    @property
    def obs_shape(self) -> ObsShape:
        """Shape of one observation, or a dict of them."""
        return dict(self._shapes) if self._is_dict else self._shapes[SINGLE]

    @property
    def obs_dtype(self) -> np.dtype | dict[str, np.dtype]:
        """In which observations are stored, or a dict of them."""
        return dict(self._dtypes) if self._is_dict else self._dtypes[SINGLE]

    @property
    def action_dim(self) -> int:
        """Width of an action vector."""
        return self._action_dim

    @property
    def n_envs(self) -> int:
        """Streams."""
        return self._n_envs

    @property
    def extras(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of what is stored beside each row, by name."""
        return dict(self._extras_spec)

    @property
    def num_transitions(self) -> int:
        """Transitions stored now, those of episodes in flight included."""
        return int(self._rows.transitions.sum())

    @property
    def num_episodes(self) -> int:
        """Episodes that have ended and of which at least one transition is still stored."""
        return int(self._rows.episodes.sum())

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays once every row has been written to."""
        return self._rows.nbytes

    def __len__(self) -> int:
        return self.num_transitions

    def __repr__(self) -> str:
        return (
            f"ReplayBuffer({self.num_transitions} of {self.capacity} transitions, {self.num_episodes} episodes, "
            f"obs_shape={self.obs_shape}, action_dim={self.action_dim}, n_envs={self.n_envs})"
        )

    @property
    def room(self) -> int:
        """Steps of every environment that `add` can take, however their episodes end, before it drops old rows."""
        return self._rows.room

    def grow(self, capacity: int) -> None:
        """Makes room for more transitions; what is stored stays, with the same numbers in `Batch.rows`.

        Args:
            capacity: At least the present one.

        Raises:
            ConfigurationError: If it is less.
            BufferError: If the machine has no memory for it; nothing is changed then.
        """
        capacity = whole_number("capacity", capacity, self._capacity)
        store = self._make_store(capacity)
        self._rows.move_to(store)
        self._store, self._capacity = store, capacity

    def num_windows(self, seq_len: int) -> int:
        """How many different windows of `seq_len` rows there are to sample from."""
        return int(self._windows(whole_number("seq_len", seq_len, 1, error=BufferError)).sum())

    # --- putting in

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
            actions: As executed. `[n_envs, A]`
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
        obs_arrays = self._checked_obs("obs", obs, (n,), rows)
        actions = checked("actions", actions, (n, self._action_dim), _FLOAT, rows)
        rewards = checked("rewards", rewards, (n,), _FLOAT, rows)
        extra_arrays = {name: self._extra(name, value, (n,), rows) for name, value in (extras or {}).items()}
        flags = terminated * TERMINATED | truncated * TRUNCATED | STEP
        ended = np.flatnonzero(flags > STEP)
        finals = self._checked_finals(final_obs, ended if rows is None else rows[ended]) if ended.size else {}
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
    ) -> None:
        """Stores a whole episode, or several one after another that are told apart by their flags.

        With several environments the stream with the fewest transitions receives it. An episode of which more than
        that stream's share of the capacity is given keeps its newest transitions. If the last step has no flag, it
        counts as truncated; if no flags are given at all, as terminated.

        Args:
            obs: T+1 observations, or T where the one after the last step is not known. `[T+1, ...]` or `[T, ...]`
            actions: Taken at the first T of them. `[T, A]`
            rewards: What they earned. `[T]`
            dones: Another name of `terminations`. `[T]`
            terminations: The step ended an episode for good. `[T]`
            truncations: The step was cut from outside. `[T]`

        Raises:
            ShapeMismatchError: If a shape is not as above; nothing is stored then.
            BufferError: If a value cannot be stored, or every stream has an episode in flight; nothing is stored then.
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
        obs_arrays = self._checked_obs("obs", obs, (obs_count,))
        actions = checked("actions", actions, (count, self._action_dim), _FLOAT)
        rewards = checked("rewards", rewards, (count,), _FLOAT)
        name = "terminations" if dones is None else "dones"
        terminations = terminations if dones is None else dones
        if terminations is None and truncations is None:
            terminations = np.arange(count) == count - 1
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
            self._rows.close(envs, None if final_obs is None else self._checked_finals(final_obs, envs))

    def update_extras(self, rows: Any, values: Mapping[str, Any]) -> None:
        """Writes what a model computed back beside the rows of a batch; rows overwritten since then are left out.

        Where windows overlap, the last one's values stay.

        Args:
            rows: `Batch.rows` or a part of it. `[B, T]`
            values: Cast to the stored dtype. `{name: [B, T, ...]}`
        """
        ids = as_numpy("rows", rows)
        row, stream = np.divmod(ids, self._n_envs)
        stored = (row >= self._rows.begin[stream]) & (row < self._rows.end[stream])  # [B, T]
        at = self._rows.at(stream, row)[stored]
        for name, value in values.items():
            array = self._extra(name, value, ids.shape)
            self._rows.extras[name][at] = array[stored]

    # --- taking out

    def sample(
        self,
        batch_size: int | BatchRequest,
        seq_len: int | None = None,
        device: str | torch.device = "cpu",
        *,
        fresh: bool = False,
    ) -> Batch:
        """A batch of windows, each row of which is aligned as drawn above.

        They are drawn uniformly, with replacement, from all windows of all streams: what is stored, `seed` and the
        calls since then decide on them, and nothing else.

        Args:
            batch_size: Windows, `B`; or a request that holds all three.
            seq_len: Rows of each, `T`. None means 50.
            device: Where the batch is wanted.
            fresh: For learning while recording: begin with the windows that `add` completed and no call with `fresh`
                has given yet (non-overlapping ones of `seq_len` rows in each stream, oldest first), and draw only the
                rest. Episodes that came through `add_episode` or a file have no such turn.

        Raises:
            BufferError: If a size is not a whole number from 1, or no stream holds `seq_len` rows.
            ConfigurationError: If there is no such device.
        """
        if isinstance(batch_size, BatchRequest):
            request = batch_size
            batch_size, seq_len, device = request.batch_size, request.seq_len, request.device
        batch_size = whole_number("batch_size", batch_size, 1, error=BufferError)
        seq_len = whole_number("seq_len", DEFAULT_SEQ_LEN if seq_len is None else seq_len, 1, error=BufferError)
        device = resolve_device(device)
        stream, start = self._choose(batch_size, seq_len, fresh)
        row = start[:, None] + np.arange(seq_len)  # [B, T]
        at = self._rows.at(stream[:, None], row)  # [B, T]

        def gathered(stored: np.ndarray) -> Tensor:
            return torch.from_numpy(np.take(stored, at, axis=0))

        flags = self._rows.flags[at]
        obs = {key: gathered(stored) for key, stored in self._rows.obs.items()}
        for key, shape in self._shapes.items():
            if obs[key].dtype == torch.uint8 and len(shape) != 3:  # only images stay bytes
                obs[key] = obs[key].float()
        batch = Batch(
            obs=obs if self._is_dict else obs[SINGLE],
            actions=gathered(self._rows.actions),
            rewards=gathered(self._rows.rewards),
            terminations=_has(flags, TERMINATED),
            truncations=_has(flags, TRUNCATED),
            is_first=_has(flags, FIRST),
            obs_mask=~_has(flags, UNSEEN),
            extras={name: gathered(stored) for name, stored in self._rows.extras.items()},
            rows=torch.from_numpy(row * self._n_envs + stream[:, None]),
        )
        return batch if device.type == "cpu" else batch.to(device)

    def seed(self, seed: int | None) -> None:
        """Starts the sampler's random numbers anew; None draws a seed.

        Raises:
            ConfigurationError: If it is not a whole number from 0.
        """
        self._rng = np.random.default_rng(None if seed is None else whole_number("seed", seed, 0))

    def rng_state(self) -> dict[str, Any]:
        """State of the sampler's random numbers, ready for JSON."""
        return dict(self._rng.bit_generator.state)

    def set_rng_state(self, state: Mapping[str, Any]) -> None:
        """Continues the random numbers from what `rng_state` returned.

        Raises:
            BufferError: If it is something else; the sampler is as before then.
        """
        rng = np.random.default_rng()
        try:
            rng.bit_generator.state = dict(state)
        except (LookupError, OverflowError, TypeError, ValueError) as error:
            raise BufferError(f"This is no state that ReplayBuffer.rng_state returned: {error}") from error
        self._rng = rng

    def _windows(self, seq_len: int) -> np.ndarray:
        """How many windows each stream has. `[n_envs]`."""
        return np.maximum(self._rows.end - self._rows.begin - seq_len + 1, 0)

    def _choose(self, count: int, seq_len: int, fresh: bool) -> tuple[np.ndarray, np.ndarray]:
        """Stream and first row of `count` windows. `[B]`, `[B]`."""
        windows = self._windows(seq_len)
        until = np.cumsum(windows)
        if not until[-1]:
            longest = int((self._rows.end - self._rows.begin).max())
            raise BufferError(
                f"The longest stream has {longest} rows, but seq_len is {seq_len}: no window fits. "
                "Add more steps, or sample shorter windows."
            )
        stream, start = self._take_fresh(count, seq_len) if fresh else np.zeros((2, 0), np.int64)
        drawn = self._rng.integers(until[-1], size=count - len(stream))
        drawn_stream = np.searchsorted(until, drawn, side="right")
        drawn_start = drawn - (until - windows)[drawn_stream] + self._rows.begin[drawn_stream]
        return np.concatenate([stream, drawn_stream]), np.concatenate([start, drawn_start])

    def _take_fresh(self, count: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Up to `count` completed windows that are fresh, oldest first; from now on they are not."""
        overwritten = np.maximum(self._rows.begin - self._fresh, 0)
        self._fresh += -(-overwritten // seq_len) * seq_len
        start = self._fresh[:, None] + np.arange(count) * seq_len  # [n_envs, B]
        complete = start + seq_len <= self._rows.end[:, None]
        stream = np.nonzero(complete)[0]
        start = start[complete]
        oldest = np.argsort(start, kind="stable")[:count]
        stream, start = stream[oldest], start[oldest]
        self._fresh += seq_len * np.bincount(stream, minlength=self._n_envs)
        return stream, start

    # --- files

    def stored(self) -> tuple[RowStore, np.ndarray]:
        """What it holds, for who keeps it on disk: the rows, and where the fresh windows of each stream begin.

        Both are the buffer's own; `[n_envs]` int64 the second.
        """
        return self._rows, self._fresh

    def checked_final_obs(self, final_obs: Any, envs: np.ndarray) -> dict[str, np.ndarray]:
        """The rows `envs` of `final_obs`, an array or a dict of them, by key as they are stored. `[E, ...]` each.

        Raises:
            ShapeMismatchError: If `final_obs` has another shape than `[n_envs, ...]`.
            BufferError: If it cannot be stored.
        """
        return self._checked_finals(final_obs, envs)

    def save(self, path: str | Path) -> None:
        """Writes everything but the extras and the sampler's state to exactly `path`, an `.npz` without pickle.

        The file is moved into place when it is complete. N transitions, stream by stream and oldest first:

            obs              [N, ...]  where each action was taken; `obs/<key>` for each key of a dictionary
            actions          [N, A]    float32
            rewards          [N]       float32
            dones            [N]       bool, the terminations
            obs_shape        [...]     shape of one observation; `obs_shape/<key>` for a dictionary
            action_dim, capacity       numbers

        `load` needs no more than these. They are followed by what they cannot say, with one entry for each of the S
        episodes:

            truncations      [N]       bool
            episode_lengths  [S]       transitions
            episode_streams  [S]       the environment, 0 to n_envs - 1
            episode_starts   [S]       False where the episode's oldest rows were overwritten
            episode_ends     [S]       False where the episode is in flight
            final_obs        [S, ...]  the observation after the last step; `final_obs/<key>` for a dictionary
            final_obs_mask   [S]       False where that was not recorded (zeros)
            n_envs                     number

        Args:
            path: Target; directories above it are created.

        Raises:
            BufferError: If `path` is a directory.
        """
        write_replay(path, collect_data(self._rows, self._capacity, self._is_dict))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        capacity: int | None = None,
        n_envs: int | None = None,
        extras: Mapping[str, tuple[tuple[int, ...], Any]] | None = None,
        seed: int | None = None,
    ) -> ReplayBuffer:
        """A buffer with what `save`, or anybody who follows its schema, wrote.

        Of the arrays, the seven documented ones suffice; episodes then end at their dones, without an observation
        after their last step.

        Args:
            path: The file.
            capacity: Another one than the file's; if it is smaller, the newest transitions are kept.
            n_envs: Another number of streams than the file's. Episodes are shared out among them, and those in flight
                are closed as truncated.
            extras: As for the constructor; the file has none.
            seed: Of the sampler.

        Raises:
            FileNotFoundError: If there is no such file.
            BufferError: If the file is damaged, lacks arrays, contradicts itself, or holds NaN or objects.
        """
        with NpzFile(path) as file:
            data = read_replay(file)
            count = len(data.rewards)
            if capacity is None and count > data.capacity:
                raise BufferError(
                    f"{file.path.name} says that its capacity is {data.capacity}, but has {count} transitions. "
                    "Pass capacity= to load."
                )
            shapes = {key: obs.shape[1:] for key, obs in data.obs.items()}
            buffer = cls(
                data.capacity if capacity is None else capacity,
                shapes if data.is_dict else shapes[SINGLE],
                data.action_dim,
                obs_dtype={key: dtype_in_memory(obs) for key, obs in data.obs.items()},
                n_envs=data.n_envs if n_envs is None else n_envs,
                extras=extras,
                seed=seed,
            )
            fill(buffer._rows, data, file.path.name)
        buffer._fresh[:] = buffer._rows.end
        return buffer

    # --- checks

    def _checked_obs(
        self, name: str, obs: Any, lead: tuple[int, ...], rows: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        return {
            key: checked(
                name if not self._is_dict else f"{name}[{key!r}]",
                value,
                (*lead, *self._shapes[key]),
                self._dtypes[key],
                rows,
            )
            for key, value in self._by_key(name, obs).items()
        }

    def _checked_finals(self, final_obs: Any, envs: np.ndarray) -> dict[str, np.ndarray]:
        if final_obs is None:
            raise BufferError(
                f"Episodes ended in environments {envs.tolist()}, but final_obs is missing: pass the observations "
                "after the step, those before the reset."
            )
        return self._checked_obs("final_obs", final_obs, (self._n_envs,), envs)

    def _by_key(self, name: str, obs: Any) -> Mapping[str, Any]:
        if isinstance(obs, Mapping) != self._is_dict or (self._is_dict and obs.keys() != self._shapes.keys()):
            given = f"a dict with {sorted(obs)}" if isinstance(obs, Mapping) else "one array"
            wanted = f"a dict with {sorted(self._shapes)}" if self._is_dict else f"one array of {self.obs_shape}"
            raise ShapeMismatchError(f"{name} is {given}, expected {wanted}.")
        return obs if self._is_dict else {SINGLE: obs}

    def _extra(self, name: str, value: Any, lead: tuple[int, ...], rows: np.ndarray | None = None) -> np.ndarray:
        if name not in self._extras_spec:
            raise BufferError(f"The buffer was created without extras {name!r}; it has {sorted(self._extras_spec)}.")
        shape, dtype = self._extras_spec[name]
        array = as_numpy(f"extras[{name!r}]", value)
        if array.shape != (*lead, *shape):
            raise ShapeMismatchError(f"extras[{name!r}] has shape {array.shape}, expected {(*lead, *shape)}.")
        return (array if rows is None else array[rows]).astype(dtype, copy=False)


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


def _has(flags: np.ndarray, bit: np.uint8) -> Tensor:
    return torch.from_numpy((flags & bit) != 0)
