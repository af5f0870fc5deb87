"""The faults that `benchmarks/lint.py` plants in good recordings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.ring import FINAL, TERMINATED, TRUNCATED


@dataclass
class Episode:
    """An episode of T steps; `obs` has T+1 rows, or T where the last observation is left out."""

    obs: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    truncated: bool


@dataclass
class Data:
    """Episodes with a fault, and what shows it.

    Attributes:
        episodes: The episodes.
        rows: Rows that are faulty, where the fault is about single rows.
        changed: Whether the fault changed anything.
        classes: Sizes of the actions' one-hots, as for `ReplayBuffer.action_classes`.
    """

    episodes: list[Episode]
    rows: set[int] = field(default_factory=set)
    changed: bool = True
    classes: tuple[int, ...] | None = None

    def save(self, path: Path) -> None:
        """Writes the file as users do: with the documented arrays, and the last observations where they are kept."""
        lengths = [len(episode.rewards) for episode in self.episodes]
        steps = [episode.obs[:length] for episode, length in zip(self.episodes, lengths, strict=True)]
        obs, actions = np.concatenate(steps), np.concatenate([episode.actions for episode in self.episodes])
        last = np.cumsum(lengths) - 1
        flags = np.zeros((2, last[-1] + 1), np.bool_)
        flags[0, last] = [episode.terminated for episode in self.episodes]
        flags[1, last] = [episode.truncated for episode in self.episodes]
        arrays = {
            "obs": obs,
            "actions": actions,
            "rewards": np.concatenate([episode.rewards for episode in self.episodes]),
            "dones": flags[0],
            "truncations": flags[1],
            "obs_shape": np.array(obs.shape[1:]),
            "action_dim": np.array(actions.shape[1]),
            "capacity": np.array(len(obs)),
        }
        if self.classes is not None:
            arrays["action_classes"] = np.array(self.classes, np.int64)
        if all(len(episode.obs) > len(episode.rewards) for episode in self.episodes):
            count = len(lengths)
            arrays |= {
                "episode_lengths": np.array(lengths),
                "episode_streams": np.zeros(count, np.int64),
                "episode_starts": np.ones(count, np.bool_),
                "episode_ends": np.ones(count, np.bool_),
                "final_obs": np.stack([episode.obs[-1] for episode in self.episodes]),
                "final_obs_mask": np.ones(count, np.bool_),
                "n_envs": np.array(1),
            }
        np.savez(path, **arrays)


def episodes_of(buffer: ReplayBuffer) -> list[Episode]:
    """The episodes of a buffer with one observation array."""
    rows, _ = buffer.stored()
    episodes = []
    for stream, begin, end in zip(*rows.episodes_at(), strict=True):
        at = rows.at(stream, np.arange(begin, end))
        step = at[(rows.flags[at] & FINAL) == 0]
        flags = rows.flags[step[-1]]
        (obs,) = rows.obs.values()
        episodes.append(
            Episode(
                obs[at],
                rows.actions[step],
                rows.rewards[step],
                bool(flags & TERMINATED),
                bool(flags & TRUNCATED),
            )
        )
    return episodes


def kept(data: Data, change: Callable[[Episode], Episode | None]) -> Data:
    """The episodes with a change of each; those of which nothing is left are dropped."""
    changed = [change(episode) for episode in data.episodes if len(episode.rewards) > 2]
    return replace(data, episodes=[episode for episode in changed if episode is not None])


def part(episode: Episode, start: int, stop: int, **changes: Any) -> Episode:
    """Steps of an episode, with the observation after them."""
    last = stop == len(episode.rewards)
    return Episode(
        episode.obs[start : stop + 1],
        changes.get("actions", episode.actions[start:stop]),
        changes.get("rewards", episode.rewards[start:stop]),
        last and episode.terminated,
        episode.truncated if last else changes.get("truncated", False),
    )


# --- faults. Each takes good data and random numbers.


def reward_late(data: Data, rng: np.random.Generator) -> Data:
    """Rewards stand one row late."""
    return _if_rewards_vary(kept(data, lambda e: part(e, 1, len(e.rewards), rewards=e.rewards[:-1])))


def reward_early(data: Data, rng: np.random.Generator) -> Data:
    """Rewards stand one row early, as where own rows are read with align="arrives"."""
    return _if_rewards_vary(
        kept(data, lambda e: part(e, 0, len(e.rewards) - 1, rewards=e.rewards[1:], truncated=not e.terminated))
    )


def _if_rewards_vary(data: Data) -> Data:
    rewards = np.concatenate([episode.rewards for episode in data.episodes])
    return replace(data, changed=bool((rewards != rewards[0]).any()))


def action_late(data: Data, rng: np.random.Generator) -> Data:
    """Actions led to the observation of their row."""
    return kept(data, lambda e: part(e, 1, len(e.rewards), actions=e.actions[:-1]))


def action_early(data: Data, rng: np.random.Generator) -> Data:
    """Actions stand one row early."""
    return kept(data, lambda e: part(e, 0, len(e.rewards) - 1, actions=e.actions[1:], truncated=not e.terminated))


def arrives(data: Data, rng: np.random.Generator) -> Data:
    """Chunks of DreamerV3 read as own rows: rewards arrive with the next observation, the last action is zero."""

    def change(e: Episode) -> Episode:
        zero = np.zeros(1, np.float32)
        actions = np.concatenate([e.actions, np.zeros_like(e.actions[:1])])
        return Episode(e.obs, actions, np.concatenate([zero, e.rewards]), e.terminated, e.truncated)

    return replace(kept(data, change), classes=None)


def led_to(data: Data, rng: np.random.Generator) -> Data:
    """Episodes of dreamerv3-torch or V-D4RL read as own rows: action and reward led to the observation."""

    def change(e: Episode) -> Episode:
        zero = np.zeros(1, np.float32)
        actions = np.concatenate([np.zeros_like(e.actions[:1]), e.actions])
        return Episode(e.obs, actions, np.concatenate([zero, e.rewards]), e.terminated, e.truncated)

    return replace(kept(data, change), classes=None)


def _merged(data: Data, chosen: np.ndarray) -> Data:
    """Joins each chosen episode with the next one."""
    episodes: list[Episode] = []
    rows: set[int] = set()
    count = 0
    joins = False
    for number, e in enumerate(data.episodes):
        e = replace(e, obs=e.obs[: len(e.rewards)])
        if joins:
            before = episodes.pop()
            names = ("obs", "actions", "rewards")
            e = replace(e, **{name: np.concatenate([getattr(before, name), getattr(e, name)]) for name in names})
        episodes.append(e)
        count += len(data.episodes[number].rewards)
        joins = bool(chosen[number]) and number + 1 < len(data.episodes)
        if joins:
            rows.add(count - 1)
    return replace(data, episodes=episodes, rows=rows, changed=bool(rows))


def some_merged(data: Data, rng: np.random.Generator) -> Data:
    """A fifth of the ends is not marked."""
    return _merged(data, rng.permutation(len(data.episodes)) < max(2, len(data.episodes) // 5))


def all_merged(data: Data, rng: np.random.Generator) -> Data:
    """No end is marked."""
    return _merged(data, np.ones(len(data.episodes), np.bool_))


def _cut(data: Data, rng: np.random.Generator, share: float, with_finals: bool) -> Data:
    episodes, rows, count = [], set(), 0
    for e in data.episodes:
        length = len(e.rewards)
        stops = [length]
        if length > 5 and rng.random() < share:
            stops = [int(rng.integers(2, length - 2)), length]
        for start, stop in zip([0, *stops], stops, strict=False):
            piece = part(e, start, stop)
            piece.terminated = piece.terminated or stop < length
            piece.obs = piece.obs if with_finals else piece.obs[: stop - start]
            episodes.append(piece)
            if stop < length:
                rows.add(count + stop - 1)
        count += length
    return replace(data, episodes=episodes, rows=rows, changed=bool(rows))


def some_cut(data: Data, rng: np.random.Generator) -> Data:
    """Three in ten episodes have a false end in their middle, without last observations."""
    return _cut(data, rng, 0.3, with_finals=False)


def some_cut_with_finals(data: Data, rng: np.random.Generator) -> Data:
    """Three in ten episodes have a false end in their middle, with last observations."""
    return _cut(data, rng, 0.3, with_finals=True)


def limits_as_deaths(data: Data, rng: np.random.Generator) -> Data:
    """Time limits are stored as terminations."""
    last = np.cumsum([len(e.rewards) for e in data.episodes]) - 1
    rows = {int(row) for row, e in zip(last, data.episodes, strict=True) if e.truncated}
    episodes = [replace(e, terminated=e.terminated or e.truncated, truncated=False) for e in data.episodes]
    return replace(data, episodes=episodes, rows=rows, changed=len(rows) > 2)


def not_a_number(data: Data, rng: np.random.Generator) -> Data:
    """Three observations have a NaN."""
    rows, count = set(), 0
    episodes = [replace(e, obs=e.obs.copy()) for e in data.episodes]
    for e in episodes[:3]:
        step = int(rng.integers(len(e.rewards)))
        if e.obs.dtype.kind == "f":
            e.obs[step].flat[0] = np.nan
            rows.add(count + step)
        count += len(e.rewards)
    return replace(data, episodes=episodes, rows=rows, changed=bool(rows))


def in_other_units(data: Data, rng: np.random.Generator) -> Data:
    """Actions are in [-2, 2]."""
    if data.classes:
        return replace(data, changed=False)
    episodes = [replace(e, actions=2 * e.actions) for e in data.episodes]
    flat = np.concatenate([e.actions for e in episodes])
    return replace(
        data, episodes=episodes, rows=set(np.flatnonzero((np.abs(flat) > 1.0001).any(1)).tolist()), classes=None
    )


def clipped(data: Data, rng: np.random.Generator) -> Data:
    """Actions in [-2, 2] were clipped instead of rescaled."""
    if data.classes:
        return replace(data, changed=False)
    return replace(data, episodes=[replace(e, actions=np.clip(2 * e.actions, -1, 1)) for e in data.episodes])


def as_integers(data: Data, rng: np.random.Generator) -> Data:
    """Discrete actions are numbers instead of one-hots."""
    if not data.classes:
        return replace(data, changed=False)
    episodes = [replace(e, actions=e.actions.argmax(1)[:, None].astype(np.float32)) for e in data.episodes]
    return replace(data, episodes=episodes, classes=None)


def _with_column(data: Data, column: Callable[[np.ndarray], np.ndarray]) -> Data:
    if data.episodes[0].obs.ndim != 2:
        return replace(data, changed=False)
    return replace(
        data, episodes=[replace(e, obs=np.concatenate([e.obs, column(e.obs)[:, None]], axis=1)) for e in data.episodes]
    )


def constant(data: Data, rng: np.random.Generator) -> Data:
    """A column of the observation is constant."""
    return _with_column(data, lambda obs: np.full(len(obs), 0.5, np.float32))


def duplicated(data: Data, rng: np.random.Generator) -> Data:
    """A column of the observation is there twice."""
    return _with_column(data, lambda obs: obs[:, 0])


def black(data: Data, rng: np.random.Generator) -> Data:
    """Images were scaled to 0 to 1 before they became bytes."""
    if data.episodes[0].obs.ndim != 4:
        return replace(data, changed=False)
    return replace(data, episodes=[replace(e, obs=(e.obs / 255).round().astype(np.uint8)) for e in data.episodes])


def float_images(data: Data, rng: np.random.Generator) -> Data:
    """Images are floats from 0 to 255."""
    if data.episodes[0].obs.ndim != 4:
        return replace(data, changed=False)
    return replace(data, episodes=[replace(e, obs=e.obs.astype(np.float32)) for e in data.episodes])


FAULTS: dict[str, tuple[Callable[[Data, np.random.Generator], Data], str]] = {
    "rewards one row late": (reward_late, "reward-late"),
    "rewards one row early": (reward_early, "reward-early"),
    "actions one row late (led-to)": (action_late, "action-led-to"),
    "actions one row early": (action_early, "action-early"),
    "rewards that arrived, with zeros (DreamerV3 chunks)": (arrives, "reward-late"),
    "actions that led to, with zeros (V-D4RL): actions": (led_to, "action-led-to"),
    "actions that led to, with zeros (V-D4RL): rewards": (led_to, "reward-late"),
    "a fifth of the ends not marked": (some_merged, "jump-without-end"),
    "no end marked": (all_merged, "jump-without-end"),
    "false ends": (some_cut, "end-inside-trajectory"),
    "false ends, with last observations": (some_cut_with_finals, "end-inside-trajectory"),
    "time limits as terminations": (limits_as_deaths, "time-limit-as-termination"),
    "NaN in observations": (not_a_number, "not-finite"),
    "actions in other units": (in_other_units, "action-range"),
    "actions clipped instead of rescaled (note)": (clipped, "action-saturated"),
    "numbers instead of one-hots": (as_integers, "integer-actions"),
    "constant column (note)": (constant, "constant-column"),
    "duplicated column (note)": (duplicated, "duplicate-column"),
    "images scaled before they became bytes": (black, "image-scale"),
    "images as floats from 0 to 255": (float_images, "image-scale"),
}
