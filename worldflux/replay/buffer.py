"""The replay buffer: observations, actions and rewards in rows, of which windows are sampled to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldflux.accel.overriding import overridden
from worldflux.errors import BufferError, ConfigurationError
from worldflux.files import checked_path
from worldflux.hub.client import dataset_path
from worldflux.hub.pushing import push_dataset
from worldflux.replay.actions import declared_classes, described, type_of
from worldflux.replay.backends import IN_PLACE, InPlace, StoragePlace, storage_at
from worldflux.replay.batch import Batch, BatchRequest
from worldflux.replay.export import write_replay
from worldflux.replay.loading import ReplayFiles
from worldflux.replay.ring import RingStorage
from worldflux.replay.sampler import Drawn, Runs, WindowSampler
from worldflux.replay.spec import TASK_FORM, TransitionSpec, extras_spec
from worldflux.replay.streams import RecordedStreams
from worldflux.replay.views import ReplayPart, split
from worldflux.validation import SINGLE_KEY, TASK_KEY, ObsShape, whole_number


class ReplayBuffer(RecordedStreams, WindowSampler):
    """The newest `capacity` transitions of one or more environments, as windows of consecutive rows.

    A row is an observation, the action taken there, and that action's reward and flags. An episode of T transitions
    takes T+1 rows, because its last observation is kept; here T = 3, and the environment's next episode follows:

        row            0     1     2     3     4     5
        obs            o0    o1    o2    o3    o0'   o1'   o3: the observation after the last step
        actions        a0    a1    a2    ·     a0'   a1'   taken at obs[t]; · is zero
        rewards        r0    r1    r2    ·     r0'   r1'   what actions[t] earned on the way to obs[t+1]
        terminations   0     0     1     0     0     0     nothing is worth anything beyond obs[t+1]
        truncations    0     0     0     0     0     0     or 1 with terminations 0: obs[t+1] is still bootstrapped
        is_first       1     0     0     0     1     0     recurrent state and previous action are reset here
        obs_mask       1     1     1     1     1     1     0 on row 3 if the last observation was not recorded; a batch
                                                           in which all observations were has no obs_mask

    Each environment has a stream of its own, a ring of rows. A sampled window is any run of rows of one stream: it may
    cross episode ends, and rows of an episode in flight are sampled like all others. The oldest rows make room for new
    ones; where that cuts an episode, its oldest remaining row has `is_first` False. Very short episodes (fewer
    than 16 steps on average) can fill a large buffer's rows before `capacity` transitions are reached.

    Args:
        capacity: Transitions to keep, over all environments.
        obs_shape: Shape of one observation, images channel-first; a dict of shapes for dictionaries of observations.
        action_dim: Width of an action vector. Discrete actions are one-hot.
        action_type: "continuous", "discrete" or "multi_discrete", as in a model's configuration: what is stored has to
            be of that kind. None: recorders set it, or the values are checked when training starts.
        action_classes: Sizes of the one-hots; needed for "multi_discrete".
        obs_dtype: uint8 or float32, or a dict with one for each key. By default uint8 for three-dimensional shapes
            (images) and float32 for others.
        n_envs: Number of environments that `add` receives, each with a stream. Recorders of further environments get
            streams of their own when they need them, which share the capacity with these.
        extras: Further arrays beside each row, as `{name: (shape, dtype)}`, which a model fills through `add` and
            `update_extras`; zero until then. `{"task": ((), "int64")}` keeps the number of each row's task, which
            `save` writes, too; -1 until it is given.
        seed: Seed of the sampler; None draws one.
        storage: Where the rows are stored. None or "memory" is the machine's memory, which is taken as rows are
            written; `check_budget` tells beforehand whether all will fit. The path of a directory is for buffers
            larger than memory: files there are mapped into it. They are reserved at once and vanish with the buffer or
            its process, even a killed one; use `save` to keep the data. A device of torch ("cuda", "cuda:1") is for
            batches that are wanted there; its memory is taken at once. A directory with a device's name is written
            "./cuda".

    Raises:
        ConfigurationError: If an argument is out of its range.
        ShapeMismatchError: If `obs_shape` is that of a channel-last image.
        BufferError: If there is no room for it.
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
        storage: StoragePlace = None,
        action_type: str | None = None,
        action_classes: Sequence[int] | None = None,
    ) -> None:
        capacity = whole_number("capacity", capacity, 1)
        n_envs = whole_number("n_envs", n_envs, 1)
        if capacity < n_envs:
            raise ConfigurationError(f"capacity is {capacity}, expected at least n_envs ({n_envs}).")
        action_dim = whole_number("action_dim", action_dim, 1)
        classes = declared_classes(action_type, action_classes, action_dim)
        form = TransitionSpec(obs_shape, action_dim, obs_dtype, extras, classes)
        WindowSampler.__init__(self, form, seed)
        RecordedStreams.__init__(self, capacity, n_envs, form, storage_at(storage))
        self._known_runs: tuple[bytes, Runs] | None = None  # of the rows with these bounds

    def _runs(self, rows: RingStorage) -> Runs:
        bounds = rows.bounds
        if self._known_runs is None or self._known_runs[0] != bounds:
            self._known_runs = bounds, Runs(rows.begin, rows.end)
        return self._known_runs[1]

    # --- description

    @property
    def action_type(self) -> str | None:
        """Kind of the actions, as in a model's configuration; None if nobody has named it."""
        return None if self._form.action_classes is None else type_of(self._form.action_classes)

    @property
    def action_classes(self) -> tuple[int, ...] | None:
        """Sizes of the actions' one-hots, none if they are continuous; None if nobody has named their kind."""
        return self._form.action_classes

    def declare_actions(self, action_type: str, action_classes: Sequence[int] | None = None) -> None:
        """Names the kind of the actions, as the constructor does.

        Raises:
            ConfigurationError: If the two name no kind.
            BufferError: If the buffer holds, or was made for, another kind.
        """
        classes = declared_classes(action_type, action_classes, self.action_dim)
        assert classes is not None
        if self._form.action_classes is not None and classes != self._form.action_classes:
            raise BufferError(
                f"The buffer is for actions with {described(self._form.action_classes)}, and these have "
                f"{described(classes)}. Use another buffer."
            )
        if classes and self._form.action_classes is None:
            self.check_actions(classes)
        self._form.action_classes = classes

    def add_extras(self, extras: Mapping[str, tuple[tuple[int, ...], Any]]) -> None:
        """Adds further arrays beside each row, as blank as in a new buffer; those that are there already are kept.

        Args:
            extras: As for the constructor, such as `model.replay_extras()`.

        Raises:
            ConfigurationError: If an array of the same name has another shape or dtype.
            BufferError: If there is no room for it.
        """
        given = extras_spec(extras)
        for name, entry in given.items():
            if self._form.extras.get(name, entry) != entry:
                raise ConfigurationError(
                    f"The buffer has extras {name!r} of {self._form.extras[name]}, and these are of {entry}. Load the "
                    "data again, without extras or with those of this model."
                )
        missing = {name: entry for name, entry in given.items() if name not in self._form.extras}
        with self.lock:
            self._rows.add_extras(missing)
            self._form.extras.update(missing)

    @property
    def storage(self) -> str | Path | torch.device:
        """Where the rows are stored: "memory", a directory or a device."""
        return self._store.storage.place

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays once every row has been written to."""
        return self._rows.nbytes

    def __repr__(self) -> str:
        return (
            f"ReplayBuffer({self.num_transitions} of {self.capacity} transitions, {self.num_episodes} episodes, "
            f"obs_shape={self.obs_shape}, action_dim={self.action_dim}, n_envs={self.n_envs})"
        )

    def check_budget(self, steps: int | None = None) -> None:
        """Checks, before a long run, that the machine has memory for it.

        Memory is taken when it is first written to, so that a buffer which is too large for the machine can be created
        and fails after hours. What is written already is not counted again. On disk and on devices all is reserved.

        Args:
            steps: Transitions that are going to be stored, over all environments; None: until the buffer is full.

        Raises:
            BufferError: If that takes more memory than is free, with both numbers and what would fit.
            ConfigurationError: If `steps` is not a whole number from 0.
        """
        if steps is not None:
            steps = whole_number("steps", steps, 0)
        rows = self._rows
        if rows.storage.takes_all_at_once:
            return
        budget = rows.storage.budget()
        if steps is not None:
            what = f"Storing {steps:,} more transitions in the replay buffer"
        elif not len(self):
            what = f"A replay buffer of {self._capacity:,} transitions"
        else:
            what = f"Filling the replay buffer, which holds {len(self):,} transitions, up to {self._capacity:,}"
        fits = self._capacity * (rows.bytes_taken + (budget.free or 0)) // rows.nbytes
        budget.require(rows.bytes_to_come(steps), what=what, fits=fits)

    # --- sampling

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
            batch_size: Number of windows, `B`; or a request that holds all three.
            seq_len: Rows of each, `T`. None means 50.
            device: Device of the batch.
            fresh: For learning while recording: begin with the windows that `add` completed and no call with `fresh`
                has returned yet (non-overlapping ones of `seq_len` rows in each stream, oldest first), and draw only
                the rest. Episodes that came through `add_episode` or a file are never fresh.

        Raises:
            BufferError: If a size is not a whole number from 1, or no stream holds `seq_len` rows.
            ConfigurationError: If there is no such device.
        """
        with self.lock:
            return self._sample(batch_size, seq_len, device, first=self._take_fresh if fresh else None)

    def split(self, fraction: float, *, seed: int = 0, seq_len: int = 1) -> tuple[ReplayPart, ReplayPart]:
        """Two parts that share no row, to train on one and to evaluate on the other; nothing is copied.

        Whole episodes are drawn at random for the second part until it has its share of the transitions. Episodes in
        flight count as such. Windows of a part run over the ends of its episodes like those of the buffer, as if the
        other part's were not there. Once rows are added to the buffer, its parts cannot be sampled from any more.

        Args:
            fraction: Share of the transitions that is kept from training, in (0, 1).
            seed: Seed of the draw, and of the parts' samplers.
            seq_len: Rows of the windows that will be asked for.

        Returns:
            The part to train on, and the part to evaluate on.

        Raises:
            BufferError: If the fraction is out of its range, there are fewer than two episodes, or a part has no window
                of `seq_len` rows.
            ConfigurationError: If the seed is not a whole number from 0, or a subclass has a `sample` of its own,
                which the parts would not call.
        """
        if overridden(self, _SAMPLE):
            raise ConfigurationError(
                f"{type(self).__name__} has its own sample(), which the parts of a split would not call. Give it its "
                "own split() as well, or pass evaluation data of its own."
            )
        return split(self, fraction, seed, seq_len)

    def _take_fresh(self, count: int, seq_len: int) -> Drawn:
        """Up to `count` completed windows that are fresh, oldest first; from then on they are not."""
        rows = self._rows
        overwritten = np.maximum(rows.begin - self._fresh, 0)
        self._fresh += -(-overwritten // seq_len) * seq_len
        start = self._fresh[:, None] + np.arange(count) * seq_len  # [n_envs, B]
        complete = start + seq_len <= rows.end[:, None]
        stream = np.nonzero(complete)[0]
        start = start[complete]
        oldest = np.argsort(start, kind="stable")[:count]
        stream, start = stream[oldest], start[oldest]
        self._fresh += seq_len * np.bincount(stream, minlength=len(self._fresh))
        return Drawn(stream, start)

    # --- files

    def save(self, path: str | Path) -> None:
        """Writes everything but the sampler's state and extras other than `task` to exactly `path`, without pickle.

        The `.npz` is moved into place when it is complete. N transitions, stream by stream and oldest first:

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
            episode_streams  [S]       the stream of its environment, 0 to n_envs - 1
            episode_starts   [S]       False where the episode's oldest rows were overwritten
            episode_ends     [S]       False where the episode is in flight
            final_obs        [S, ...]  the observation after the last step; `final_obs/<key>` for a dictionary
            final_obs_mask   [S]       False where that was not recorded (zeros)
            n_envs                     number of the streams
            task             [N]       int64, the number of the task, -1 where nobody has said it; absent if
                                       nobody has said any
            action_classes   [...]     sizes of the actions' one-hots, none for continuous actions; absent where
                                       nobody has named their kind and it cannot be told from the values

        Args:
            path: Path of the file; directories above it are created.

        Raises:
            BufferError: If `path` is a directory, or cannot be written; an older file is unchanged then.
        """
        target = checked_path("path", path)
        if target.is_dir():
            raise BufferError(f"{path} is a directory, expected the path of a file. Add a name, such as buffer.npz.")
        write_replay(target, self._rows, self._capacity, self._form.is_dict, self._form.action_classes)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        env: str | None = None,
        description: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
    ) -> str:
        """Uploads what `save` writes to the Hugging Face Hub, as a data set with a card that says what is in it.

        `ReplayBuffer.load("hf://datasets/user/name")` and `worldflux.datasets.load` load it.

        Args:
            repo_id: The repository, `user/name`; it is created if there is none, and an earlier file is replaced.
            env: Name of the environment that was recorded, for the card.
            description: How it was recorded, in Markdown, for the card.
            commit_message: Message of the commit.
            private: Whether a new repository is private; None: as the owner's settings say.
            token: Token of the Hub; None: the one that `hf auth login` has stored, or `HF_TOKEN`.
            branch: Branch to push to, created if there is none; None: the main branch.

        Returns:
            The address of the repository's page.

        Raises:
            ConfigurationError: If the name of the repository is invalid.
            HubError: If the Hub cannot be reached, or refuses the upload.
            MissingDependencyError: If `huggingface_hub` is not installed.
        """
        options = dict(commit_message=commit_message, private=private, token=token, branch=branch)
        return push_dataset(self.save, repo_id, env=env, description=description, **options)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        capacity: int | None = None,
        n_envs: int | None = None,
        extras: Mapping[str, tuple[tuple[int, ...], Any]] | None = None,
        seed: int | None = None,
        storage: StoragePlace = None,
        action_type: str | None = None,
        action_classes: Sequence[int] | None = None,
        action_low: Any = None,
        action_high: Any = None,
        sharded: bool = False,
    ) -> ReplayBuffer:
        """A buffer with what `save`, or anybody who follows its schema, wrote.

        The files of a directory are one recording: their episodes follow one another, in the order of the files' names,
        as if they had been in one file. No episode goes on from one file to the next.

        Of the arrays, the seven documented ones suffice; episodes then end at their dones, without an observation
        after their last step, and a last step without a flag counts as truncated, as in `add_episode`. `truncations`
        `[N]`, which D4RL's files call `timeouts`, may come with them.

        Args:
            path: The file, or a directory of `.npz` files, others in which are ignored; or the address of what
                `push_to_hub` has pushed, such as `hf://datasets/user/name`.
            capacity: Another capacity than the file's; if it is smaller, the newest transitions are kept. That of a
                directory has room for what is in it.
            n_envs: Another number of streams than the file's. Episodes are shared out among them, and those in flight
                are closed as truncated.
            extras: As for the constructor; of the file's own, there is only the column `task`.
            seed: Seed of the sampler.
            storage: As for the constructor, or "in_place": observations are not read now, but from their files when
                they are sampled, and the system keeps as much of them in memory as it has room for. Data can thus be
                larger than memory. The files must be uncompressed, as `save` writes them, and stay unchanged; nothing
                can be added to the buffer.
            action_type: Kind of the actions, as for the constructor, for files that do not say it. None: one-hots
                are discrete, and what has other numbers than 0 and 1 is continuous.
            action_classes: As for the constructor.
            action_low: Lower bounds of continuous actions in the environment's own units, as for `add_episode`. `[A]`
            action_high: Upper bounds, as for `add_episode`. `[A]`
            sharded: For training with `torchrun`, where all ranks call this together: each of them loads a part of
                its own, of whole files if these can be divided equally, otherwise of whole episodes. A single process
                loads everything.

        Raises:
            FileNotFoundError: If there is no such file.
            BufferError: If a file is damaged, lacks arrays, contradicts itself, or holds NaN or objects; if files of a
                directory differ in shapes, dtypes or kinds of actions, or there are none; or if the machine has no room
                for what is in them.
            ConfigurationError: If `capacity` is given for data that are read in place.
            HubError: If it cannot be downloaded.
        """
        data = ReplayFiles(
            dataset_path("path", path),
            sharded=sharded,
            n_envs=None if n_envs is None else whole_number("n_envs", n_envs, 1),
            action_type=action_type,
            action_classes=action_classes,
            action_low=action_low,
            action_high=action_high,
        )
        place = InPlace() if storage == IN_PLACE else storage_at(storage)
        if isinstance(place, InPlace):
            if capacity is not None:
                raise ConfigurationError(
                    f"capacity is {capacity}, and a buffer that reads its files in place holds all that is in them. "
                    "Leave it out."
                )
            capacity = data.least_capacity
        elif capacity is None and len(data) > data.capacity:
            raise BufferError(
                f"{Path(path).name} says that its capacity is {data.capacity}, but has {len(data)} transitions. "
                "Pass capacity= to load."
            )
        try:
            buffer = cls(
                data.capacity if capacity is None else capacity,
                data.shapes if data.is_dict else data.shapes[SINGLE_KEY],
                data.action_dim,
                obs_dtype=data.obs_dtype,
                n_envs=data.n_envs,
                extras={**(extras or {}), **({TASK_KEY: TASK_FORM} if data.has_tasks else {})},
                seed=seed,
                storage=place,
                action_type=None if data.action_classes is None else type_of(data.action_classes),
                action_classes=data.action_classes,
            )
            buffer.check_budget(min(len(data), buffer.capacity))
        except BufferError as error:
            advice = " Or leave the observations in their files: storage='in_place'." if place.has_obs else ""
            raise BufferError(f"{error}{advice}") from error
        rows = buffer._rows
        data.fill(rows)
        if isinstance(place, InPlace):
            rows.obs = data.in_place(rows)
            place.is_loaded = True
        buffer._fresh[:] = rows.end
        return buffer


_SAMPLE = ReplayBuffer.sample
