"""Episodes whose numbers say which episode and step they are, and what a replay buffer holds, episode by episode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from worldflux.replay.ring import FINAL, TERMINATED, TRUNCATED, UNSEEN


def count(episode: int, length: int) -> np.ndarray:
    """`1000 * episode + step` of each row. `[length]`"""
    return 1000.0 * episode + np.arange(length)


def observed(episode: int, length: int) -> np.ndarray:
    """Observations of two numbers, the count and its negative. `[length, 2]`"""
    return np.stack([count(episode, length), -count(episode, length)], 1).astype(np.float32)


def acted(episode: int, length: int) -> np.ndarray:
    """Actions in [-1, 1], a different one for each step. `[length, 1]`"""
    return (count(episode, length)[:, None] / 2**13).astype(np.float32)


def earned(episode: int, length: int) -> np.ndarray:
    """Rewards of the actions: the count at which each was taken and a half. `[length]`"""
    return (count(episode, length) + 0.5).astype(np.float32)


@dataclass
class Stored:
    """An episode as a buffer holds it: T steps, and the observation after them if it was recorded."""

    obs: Any
    actions: np.ndarray
    rewards: np.ndarray
    final: Any
    end: str


def stored(buffer: Any) -> list[Stored]:
    """The episodes of a buffer, in their order."""
    rows, _ = buffer.stored()
    found = []
    for stream, begin, end in zip(*rows.episodes_at(), strict=True):
        at = rows.at(stream, np.arange(begin, end))
        flags = rows.flags[at]
        step = at[(flags & FINAL) == 0]
        assert len(step) == len(at) - 1, "an episode has ended, and has one final row"
        last = rows.flags[step[-1]]
        obs = {key: array[step] for key, array in rows.obs.items()}
        final = None if flags[-1] & UNSEEN else {key: array[at[-1]] for key, array in rows.obs.items()}
        if not isinstance(buffer.obs_shape, dict):
            obs, final = obs["obs"], None if final is None else final["obs"]
        end_kind = "terminated" if last & TERMINATED else "truncated" if last & TRUNCATED else "open"
        assert not (rows.flags[step[:-1]] & (TERMINATED | TRUNCATED)).any(), "only a last step ends an episode"
        found.append(Stored(obs, rows.actions[step], rows.rewards[step], final, end_kind))
    return found


def assert_holds(buffer: Any, episodes: list[tuple[int, int, str, bool]]) -> None:
    """The buffer holds episodes of these numbers, lengths and ends, each with its last observation or without."""
    found = stored(buffer)
    assert [(len(one.actions), one.end, one.final is not None) for one in found] == [one[1:] for one in episodes]
    for (number, length, _, seen), one in zip(episodes, found, strict=True):
        rows = observed(number, length + 1)
        np.testing.assert_array_equal(one.obs, rows[:-1])
        np.testing.assert_allclose(one.actions, acted(number, length), atol=1e-6)
        np.testing.assert_array_equal(one.rewards, earned(number, length))
        if seen:
            np.testing.assert_array_equal(one.final, rows[-1])
