"""From the common form into a replay buffer: conversion, checks, and a bar that shows the progress."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from gymnasium import spaces

from worldflux.datasets.recording import BLOCK_BYTES, Arrays, Block, Recording
from worldflux.envs.spaces import ActionCodec, ObservationCodec, OneHots
from worldflux.errors import BufferError, ConfigurationError, ShapeMismatchError, WorldFluxError
from worldflux.replay.actions import Classes, as_executed, declared_classes, rescaled, type_of
from worldflux.replay.backends import StoragePlace
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.ring import STEP, TERMINATED, TRUNCATED, spare_rows
from worldflux.replay.spec import checked
from worldflux.validation import SINGLE_KEY, clean_sizes

logger = logging.getLogger("worldflux.datasets")

_FLOAT = np.dtype(np.float32)
_ROUNDING = 1e-6
"""Distance from the bounds of a space, as a share of its range, at which an action still counts as inside."""


class ActionForm:
    """Conversion of stored actions into the library's form.

    Attributes:
        classes: Sizes of the one-hots, none for continuous actions; None where the values decide.
        dim: Width of an action vector.
        clipped: Number of actions so far that were outside of their bounds.

    Args:
        recording: The source.
        action_type: See `load`.
        action_classes: See `load`.
        action_low: See `load`.
        action_high: See `load`.
        clip_actions: See `load`.

    Raises:
        ConfigurationError: If the source's actions need an option that was not given.
    """

    def __init__(
        self,
        recording: Recording,
        action_type: str | None,
        action_classes: Sequence[int] | None,
        action_low: Any,
        action_high: Any,
        clip_actions: bool,
    ) -> None:
        self.clipped = 0
        self._low, self._high, self._clip = action_low, action_high, clip_actions
        self._codec: ActionCodec | None = None
        self._one_hots: OneHots | None = None
        width = int(np.prod(recording.action_shape, dtype=np.int64))
        classes: Classes | None = () if action_low is not None or action_high is not None else None
        if action_classes is not None:
            action_classes = clean_sizes("action_classes", action_classes)
        if action_type is not None or action_classes is not None:
            is_numbers = action_type != "continuous" and recording.action_dtype.kind in "iu"
            if is_numbers and action_classes is None:
                raise _classes_wanted(recording)
            dim = sum(action_classes) if is_numbers and action_classes is not None else width
            classes = declared_classes(action_type, action_classes, dim)
            if classes and is_numbers and width == len(classes):
                self._one_hots = OneHots(classes, (0,) * len(classes))
        elif classes is None and _is_bounded(recording.action_space):
            assert recording.action_space is not None
            self._codec = ActionCodec(recording.action_space)
            classes, width = self._codec.action_classes, self._codec.action_dim
        elif classes is None and recording.action_dtype.kind in "iu" and width == 1:
            raise _classes_wanted(recording)
        self.classes = classes
        self.dim = width if self._one_hots is None else self._one_hots.width

    def convert(self, stored: np.ndarray) -> np.ndarray:
        """Actions in the library's form. `[K, A]`"""
        if self._codec is not None:
            actions = self._codec.from_env(stored.reshape(len(stored), *(self._codec.space.shape or ())))
            if isinstance(self._codec.space, spaces.Box):
                self._count_outside(stored, self._codec.space.low, self._codec.space.high)
            return actions
        flat = stored.reshape(len(stored), -1)
        if self._one_hots is not None:
            return self._one_hots.encode(flat, "actions")
        if self._clip:
            low, high = (-1.0, 1.0) if self._low is None else (self._low, self._high)
            self._count_outside(flat, low, high)
            flat = np.clip(flat, low, high)
        flat = rescaled(flat, self._low, self._high)
        return as_executed("actions", stored, checked("actions", flat, (len(flat), self.dim), _FLOAT), self.classes)

    def _count_outside(self, actions: np.ndarray, low: Any, high: Any) -> None:
        margin = _ROUNDING * (np.asarray(high, np.float64) - low)
        outside = (actions < low - margin) | (actions > high + margin)
        self.clipped += int(np.count_nonzero(outside.reshape(len(outside), -1).any(1)))


def _is_bounded(space: spaces.Space[Any] | None) -> bool:
    """Whether a space tells how its actions become those of the library."""
    return space is not None and not (isinstance(space, spaces.Box) and not space.is_bounded())


def _classes_wanted(recording: Recording) -> ConfigurationError:
    return ConfigurationError(
        f"{recording.name} has whole numbers as actions ({recording.action_dtype}, {recording.action_shape or 'one'} "
        "each), and does not say how many choices there are. Pass action_classes=(n,) for n discrete actions, or "
        "action_low and action_high for continuous ones."
    )


def filled_buffer(
    recording: Recording,
    form: ActionForm,
    *,
    capacity: int | None,
    extras: Any,
    seed: int | None,
    storage: StoragePlace,
    progress: bool | None,
) -> ReplayBuffer:
    """A buffer with everything that a source holds; the arguments are those of `load`."""
    if not recording.steps:
        raise BufferError(f"{recording.name} has no steps: there is nothing to load.")
    codec = ObservationCodec(recording.obs_space)
    buffer = ReplayBuffer(
        _room_for(recording.steps, recording.episodes) if capacity is None else capacity,
        codec.obs_shape,
        form.dim,
        obs_dtype=codec.obs_dtype,
        extras=extras,
        seed=seed,
        storage=storage,
        action_type=None if form.classes is None else type_of(form.classes),
        action_classes=form.classes,
    )
    buffer.check_budget(min(recording.steps, buffer.capacity))
    filler = _Filler(recording, buffer, codec, form)
    told = len(recording.notes)
    for note in recording.notes[:told]:
        logger.warning("%s: %s", recording.name, note)
    with _shown(recording, progress) as show:
        for block in joined(recording.blocks()):
            filler.add(block)
            show(len(block.actions))
    for note in recording.notes[told:]:  # what came to light while it was read
        logger.warning("%s: %s", recording.name, note)
    filler.finish()
    return buffer


def _room_for(steps: int, episodes: int) -> int:
    """The capacity at which so many steps, and the last observations of so many episodes, find room."""
    rows = steps + episodes
    if steps + spare_rows(steps, 1) >= rows:
        return steps
    return max(steps, rows - rows // 32)  # many short episodes: a bit over half of the rows are steps


class _Judge:
    """The kind that actions look like, block by block; see `replay.actions.judged_classes`."""

    def __init__(self) -> None:
        self._is_binary = self._is_one_hot = True
        self._has_zero = self._has_one = False

    def see(self, actions: np.ndarray) -> None:
        """Takes account of some actions. `[K, A]`"""
        if not self._is_binary:
            return
        ones = actions == 1
        zeros = actions == 0
        self._is_binary = bool((ones | zeros).all())
        self._has_zero, self._has_one = self._has_zero or bool(zeros.any()), self._has_one or bool(ones.any())
        self._is_one_hot = self._is_one_hot and actions.shape[1] > 1 and bool((ones.sum(1) == 1).all())

    def classes(self, dim: int) -> Classes | None:
        """The kind of all of them; None where zeros and ones can be of several kinds."""
        if not self._is_binary or not (self._has_zero and self._has_one):
            return ()
        return (dim,) if self._is_one_hot else None


class _Filler:
    """Stores blocks in an empty buffer."""

    def __init__(self, recording: Recording, buffer: ReplayBuffer, codec: ObservationCodec, form: ActionForm) -> None:
        self._recording, self._buffer, self._codec, self._form = recording, buffer, codec, form
        self._is_dict = isinstance(buffer.obs_shape, dict)
        self._rows, self._fresh = buffer.stored()
        self._count = self._episodes = self._begin = 0  # steps so far, ends among them, and the first step after these
        self._judge = _Judge() if form.classes is None else None

    def add(self, block: Block) -> None:
        """Converts and stores a block.

        Raises:
            WorldFluxError: If something cannot be stored, with the steps among which it is.
        """
        count = len(block.actions)
        if self._count + count > self._recording.steps:
            raise BufferError(
                f"{self._recording.name}: there are more than the {self._recording.steps} steps that it says it has. "
                "It is damaged."
            )
        most = self._rows.most_steps
        for begin in range(0, count, most):
            part = block if count <= most else block.part(begin, min(begin + most, count))
            try:
                self._append(part)
            except (BufferError, ShapeMismatchError) as error:
                raise self._placed(part, error) from error

    def _placed(self, block: Block, error: BufferError | ShapeMismatchError) -> WorldFluxError:
        """The error for a block that cannot be stored, with the step that is wrong or the steps among which it is."""
        name, first = self._recording.name, self._count
        fault = _first_fault(block)
        if fault is None:
            return type(error)(f"{name}, steps {first} to {first + len(block.actions) - 1}: {error}")
        step, what = fault
        ends = np.flatnonzero(block.terminations[:step] | block.truncations[:step])
        begin = first + int(ends[-1]) + 1 if len(ends) else self._begin
        place = f"step {first + step} (step {first + step - begin} of episode {self._episodes + len(ends)})"
        return BufferError(f"{name}, {place}: {what} Correct it, or leave the episode out.")

    def _append(self, block: Block) -> None:
        count = len(block.actions)
        obs = self._encoded(block.obs)
        actions = self._form.convert(block.actions)
        if self._judge is not None:
            self._judge.see(actions)
        rewards = np.zeros(count, np.float32)
        if block.rewards is not None:
            rewards = checked("rewards", block.rewards.reshape(count, *block.rewards.shape[2:]), (count,), _FLOAT)
        flags = STEP | block.terminations * TERMINATED | block.truncations * TRUNCATED
        last = np.flatnonzero(flags > STEP)
        ends = len(last)
        seen = np.full(ends, block.final_obs is not None) if block.final_seen is None else block.final_seen
        finals: Arrays = {}
        if block.final_obs is not None and seen.any():
            known = self._encoded({key: array[seen] for key, array in block.final_obs.items()})
            for key, array in known.items():
                finals[key] = array
                if not seen.all():
                    finals[key] = np.zeros((ends, *array.shape[1:]), array.dtype)
                    finals[key][seen] = array
        self._buffer.add_checked(
            {key: array[:, None] for key, array in obs.items()},
            actions[:, None],
            rewards[:, None],
            flags[:, None],
            finals,
            np.zeros(1, np.int64),
            seen=seen,
        )
        if ends:
            self._begin = self._count + int(last[-1]) + 1
        self._count, self._episodes = self._count + count, self._episodes + ends

    def _encoded(self, obs: Arrays) -> Arrays:
        encoded = self._codec.encode(obs if self._is_dict else obs[SINGLE_KEY])
        return encoded if isinstance(encoded, dict) else {SINGLE_KEY: encoded}

    def finish(self) -> None:
        """Ends an episode that the source leaves open, and names the kind of the actions."""
        self._buffer.end_episodes()
        self._fresh[:] = self._rows.end
        if not len(self._buffer):
            raise BufferError(f"{self._recording.name} has no steps: there is nothing to load.")
        if self._form.clipped:
            logger.warning(
                "%s: %d of %d actions were outside of the bounds of the action space, and were clipped to them.",
                self._recording.name,
                self._form.clipped,
                self._count,
            )
        classes = None if self._judge is None else self._judge.classes(self._form.dim)
        if classes is not None:
            self._buffer.declare_actions(type_of(classes), classes or None)


def _first_fault(block: Block) -> tuple[int, str] | None:
    """The first step of a block with a number that cannot be stored, and a sentence about it; None if there is none."""
    steps = np.arange(len(block.actions))
    columns = [("actions", block.actions, steps)]
    columns += [] if block.rewards is None else [("rewards", block.rewards, steps)]
    final_obs, seen = block.final_obs or {}, block.final_seen
    ends = np.flatnonzero(block.terminations | block.truncations)
    for arrays, at, after in ((block.obs, steps, ""), (final_obs, ends, " after the last step")):
        names = {key: "obs" if list(arrays) == [SINGLE_KEY] else f"obs[{key!r}]" for key in arrays}
        columns += [(names[key] + after, array, at) for key, array in arrays.items()]
    found: list[tuple[int, str]] = []
    for what, array, at in columns:
        if array.dtype.kind != "f":
            continue
        with np.errstate(over="ignore"):
            wrong = ~np.isfinite(array.astype(np.float32)).reshape(len(array), -1)
        if at is ends and seen is not None:
            wrong &= seen[:, None]
        if wrong.any():
            row, column = (int(one) for one in np.argwhere(wrong)[0])
            value = array.reshape(len(array), -1)[row, column]
            expected = "at most 3.4e+38, as float32 is" if np.isfinite(value) else "finite numbers"
            place = f" at index {column}" if wrong.shape[1] > 1 else ""
            found.append((int(at[row]), f"{what} has {value:g}{place}, expected {expected}."))
    return min(found, default=None)


def joined(blocks: Iterable[Block]) -> Iterator[Block]:
    """The same steps in fewer blocks: storing a block of ten steps takes as long as storing one of some hundreds."""
    waiting: list[Block] = []
    size = 0
    for block in blocks:
        if waiting and (size + block.size > BLOCK_BYTES or block.form != waiting[0].form):
            yield Block.of(waiting)
            waiting, size = [], 0
        if len(block.actions):
            waiting.append(block)
            size += block.size
    if waiting:
        yield Block.of(waiting)


@contextmanager
def _shown(recording: Recording, progress: bool | None) -> Iterator[Any]:
    """A function that counts steps in a bar on stderr, if that is a terminal and tqdm is installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        progress = False
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield lambda steps: None
        return
    with tqdm(total=recording.steps, unit=" steps", unit_scale=True, desc=recording.name, dynamic_ncols=True) as bar:
        yield bar.update
