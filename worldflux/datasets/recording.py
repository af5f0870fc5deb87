"""The common form in which every reader hands over what a source holds, and the alignment of its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium import spaces

from worldflux.envs.spaces import space_like
from worldflux.errors import BufferError, ConfigurationError, nearest
from worldflux.validation import SINGLE_KEY

Arrays = dict[str, np.ndarray]
ObsChoice = str | Sequence[str] | Mapping[str, str] | None
"""Which of a source's observations are read: one of them, several, or several under new names; None: all."""

BLOCK_BYTES = 2 * 2**20
"""Bytes of a source that are in memory at once, about."""

ALIGNMENTS = ("own", "arrives", "led_to")


@dataclass
class Block:
    """Consecutive steps of one or several episodes, as the source stores them: nothing is converted yet.

    An episode may go on in the next block. Where a step ends its episode, the observation after it is in `final_obs`.

    Attributes:
        obs: Observations at which the actions were taken, by key. `[K, ...]` each
        actions: `[K, ...]`
        rewards: What the actions earned; None where the source has none. `[K]`
        terminations: `[K]` bool
        truncations: `[K]` bool
        final_obs: The observations after the last steps of the E episodes that end here, in their order; None where
            none of them is known. `[E, ...]` each
        final_seen: Which of them are known; None: all. `[E]` bool
    """

    obs: Arrays
    actions: np.ndarray
    rewards: np.ndarray | None
    terminations: np.ndarray
    truncations: np.ndarray
    final_obs: Arrays | None = None
    final_seen: np.ndarray | None = None

    @property
    def size(self) -> int:
        """Bytes of its observations and actions."""
        return self.actions.nbytes + sum(array.nbytes for array in self.obs.values())

    @property
    def form(self) -> tuple[Any, ...]:
        """What it has in common with the blocks that it can be joined with."""
        arrays = [*self.obs.items(), ("actions", self.actions)]
        shapes = [(name, array.shape[1:], array.dtype) for name, array in arrays]
        return self.rewards is None, self.final_obs is None, self.final_seen is None, shapes

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> Block:
        """Several blocks of one form in one."""
        if len(blocks) == 1:
            return blocks[0]

        def along(name: str) -> Any:
            return np.concatenate([getattr(block, name) for block in blocks])

        def by_key(name: str) -> Arrays:
            return {key: np.concatenate([getattr(one, name)[key] for one in blocks]) for key in blocks[0].obs}

        has_finals = blocks[0].final_obs is not None
        return cls(
            by_key("obs"),
            along("actions"),
            None if blocks[0].rewards is None else along("rewards"),
            along("terminations"),
            along("truncations"),
            by_key("final_obs") if has_finals else None,
            along("final_seen") if has_finals and blocks[0].final_seen is not None else None,
        )

    def part(self, begin: int, end: int) -> Block:
        """Steps `begin` to `end - 1`."""
        ended = self.terminations | self.truncations
        first = np.count_nonzero(ended[:begin])
        finals = slice(first, first + np.count_nonzero(ended[begin:end]))
        return Block(
            {key: array[begin:end] for key, array in self.obs.items()},
            self.actions[begin:end],
            None if self.rewards is None else self.rewards[begin:end],
            self.terminations[begin:end],
            self.truncations[begin:end],
            None if self.final_obs is None else {key: array[finals] for key, array in self.final_obs.items()},
            None if self.final_seen is None else self.final_seen[finals],
        )


@dataclass
class Recording:
    """A source that has been opened: what its rows look like, and the rows themselves.

    Attributes:
        name: What the source is called in messages.
        obs_space: Space of the observations; a `Dict` where they are several.
        action_shape: Shape of an action as it is stored.
        action_dtype: Its dtype.
        steps: Number of steps, at most.
        episodes: Number of episodes, at most.
        blocks: The steps in their order; it is called once.
        action_space: Space of the stored actions, if the source names it.
        notes: What the source cannot tell and which option decides it; each is logged as a warning.
        close: Closes the source.
    """

    name: str
    obs_space: spaces.Space[Any]
    action_shape: tuple[int, ...]
    action_dtype: np.dtype[Any]
    steps: int
    episodes: int
    blocks: Callable[[], Iterator[Block]]
    action_space: spaces.Space[Any] | None = None
    notes: list[str] = field(default_factory=list)
    close: Callable[[], object] = lambda: None


def chosen_obs(name: str, available: Iterable[str], obs: ObsChoice) -> tuple[dict[str, str], bool]:
    """Which observations are read: the name in the source by the key in the buffer, and whether they are a dict.

    Args:
        name: What the source is called in messages.
        available: The names of all observations in the source.
        obs: The user's choice.

    Raises:
        ConfigurationError: If there is no such observation, or none at all.
    """
    names = list(available)
    if not names:
        raise BufferError(f"{name} has no observations.")
    if obs is None:
        wanted = {key: key for key in names}
    elif isinstance(obs, str):
        wanted = {obs: obs}
    else:
        wanted = dict(obs) if isinstance(obs, Mapping) else {key: key for key in obs}
    for source in wanted.values():
        if source not in names:
            raise ConfigurationError(
                f"{name} has no observation {source!r}{nearest(str(source), names)} It has {', '.join(sorted(names))}."
            )
    if not wanted:
        raise ConfigurationError("obs is empty, expected the name of at least one observation.")
    is_dict = len(wanted) > 1 or isinstance(obs, Mapping)
    return (wanted, True) if is_dict else ({SINGLE_KEY: next(iter(wanted.values()))}, False)


def obs_space_like(arrays: Mapping[str, Any], is_dict: bool) -> spaces.Space[Any]:
    """The space of observations that are stored in arrays `[N, ...]` (anything with a shape and a dtype)."""
    parts: dict[str, spaces.Space[Any]] = {
        key: space_like(array.shape[1:], array.dtype) for key, array in arrays.items()
    }
    return spaces.Dict(parts) if is_dict else parts[SINGLE_KEY]


def rows_at_once(arrays: Iterable[Any]) -> int:
    """Rows of several arrays `[N, ...]` that take `BLOCK_BYTES` together."""
    each = sum(math.prod(array.shape[1:]) * np.dtype(array.dtype).itemsize for array in arrays)
    return max(1, BLOCK_BYTES // max(each, 1))


def spans(count: int, step: int) -> Iterator[slice]:
    """Slices that cover `count` rows, `step` at a time."""
    return (slice(begin, min(begin + step, count)) for begin in range(0, count, step))


@dataclass
class Rows:
    """Consecutive rows of a source that keeps one row for each observation, the last ones included.

    Attributes:
        obs: `[K, ...]` each
        actions: `[K, ...]`
        rewards: `[K]`, or None
        terminal: Whether the episode terminates with the row. `[K]` bool
        is_first: Whether an episode begins with the row. `[K]` bool
        is_last: Whether the row holds an episode's last observation. `[K]` bool
    """

    obs: Arrays
    actions: np.ndarray
    rewards: np.ndarray | None
    terminal: np.ndarray
    is_first: np.ndarray
    is_last: np.ndarray

    def __len__(self) -> int:
        return len(self.is_last)

    def at(self, part: slice) -> Rows:
        """Some of the rows."""
        return Rows(
            {key: array[part] for key, array in self.obs.items()},
            self.actions[part],
            None if self.rewards is None else self.rewards[part],
            self.terminal[part],
            self.is_first[part],
            self.is_last[part],
        )

    def followed_by(self, other: Rows) -> Rows:
        """These rows and the next ones."""
        both = None if self.rewards is None or other.rewards is None else [self.rewards, other.rewards]
        return Rows(
            {key: np.concatenate([array, other.obs[key]]) for key, array in self.obs.items()},
            np.concatenate([self.actions, other.actions]),
            None if both is None else np.concatenate(both),
            np.concatenate([self.terminal, other.terminal]),
            np.concatenate([self.is_first, other.is_first]),
            np.concatenate([self.is_last, other.is_last]),
        )


def steps_of_rows(pieces: Iterable[Rows], align: str) -> Iterator[Block]:
    """The steps of rows of which one holds each episode's last observation.

    With o for observations and a, r for the action taken at them and the reward that it earned, the rows of an
    episode of three steps are

        obs              o0    o1    o2    o3
        own              a0    a1    a2    ·     r0    r1    r2    ·
        arrives          a0    a1    a2    ·     ·     r0    r1    r2
        led_to           ·     a0    a1    a2    ·     r0    r1    r2

    A row in front of another episode's first one is a last one, too. The rows may be cut anywhere.

    Args:
        pieces: The rows in their order.
        align: One of `ALIGNMENTS`.
    """
    carried: Rows | None = None  # whether an episode ends at a row may be known only from the next one
    for piece in pieces:
        if not len(piece):
            continue
        rows = piece if carried is None else carried.followed_by(piece)
        if align != "own":
            rows.is_last = rows.is_last | rows.terminal
        rows.is_last = np.append(rows.is_last[:-1] | rows.is_first[1:], rows.is_last[-1:])
        done = len(rows) if rows.is_last[-1] else max(0, len(rows) - 2)
        carried = rows.at(slice(done, None)) if done < len(rows) else None
        if done:
            yield _steps(rows, align, done)
    if carried is not None and len(carried) > 1:
        carried.is_last[-1] = True
        yield _steps(carried, align, len(carried))


def _steps(rows: Rows, align: str, count: int) -> Block:
    """The steps that begin in the first `count` rows; another row follows unless the last one is an episode's last."""
    after = slice(1, count + 1)
    keep: Any = ~rows.is_last[:count]
    ended = np.append(rows.is_last[after], np.zeros(count - len(rows.is_last[after]), np.bool_))[keep]
    earned = np.flatnonzero(keep) + (align != "own")
    acted = np.flatnonzero(keep) + (align == "led_to")
    last = np.flatnonzero(keep)[ended] + 1
    terminated = rows.terminal[np.flatnonzero(keep) + 1] & ended
    if align == "own":
        terminated |= rows.terminal[:count][keep]
    if keep.all():
        keep = slice(None)  # a view
    return Block(
        {key: array[:count][keep] for key, array in rows.obs.items()},
        rows.actions[acted],
        None if rows.rewards is None else rows.rewards[earned],
        terminated,
        ended & ~terminated,
        {key: array[last] for key, array in rows.obs.items()},
    )
