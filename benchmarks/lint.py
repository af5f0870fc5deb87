"""Plants faults in good data, and counts which of them `worldflux.datasets.lint` finds.

Records several tasks with several policies, lints each recording as it is, and again with each fault. Writes one row
for each to a csv file, and prints a table of the faults, the false alarms, and the datasets where a fault was missed.

    python benchmarks/lint.py --seeds 0 1 2
    python benchmarks/lint.py --table benchmarks/results/lint.csv
"""

from __future__ import annotations

import csv
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from pixel_seek import PixelSeek

from worldflux.datasets import lint
from worldflux.envs import collect, make_env
from worldflux.replay.buffer import ReplayBuffer
from worldflux.replay.ring import FINAL, TERMINATED, TRUNCATED

COLUMNS = (
    "task", "policy", "episodes", "seed", "fault", "expected", "changed", "found", "warnings", "notes", "planted",
    "reported", "right", "transitions", "seconds",
)  # fmt: skip


class Behaviour:
    """A policy with SB3's `predict`: a controller or nothing, plus noise that may be smooth over time.

    Args:
        space: The actions.
        seed: Seed of the noise.
        control: The action for an observation; None: noise alone.
        noise: Size of the noise relative to the bounds; for discrete actions the share of random ones.
        smooth: Correlation of the noise from step to step; for discrete actions the chance that a random one is kept.
    """

    def __init__(
        self,
        space: spaces.Space[Any],
        seed: int,
        control: Callable[[np.ndarray], Any] | None = None,
        noise: float = 1.0,
        smooth: float = 0.0,
    ) -> None:
        self._space, self._control, self._noise, self._smooth = space, control, noise, smooth
        self._rng = np.random.default_rng(seed)
        self._last: Any = None

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, None]:
        """Returns the actions for the observations of all environments."""
        rows = zip(observation, episode_start, strict=True)
        return np.stack([self._act(obs, bool(start)) for obs, start in rows]), None

    def _act(self, obs: np.ndarray, start: bool) -> Any:
        if isinstance(self._space, spaces.Discrete):
            if self._control is not None and self._rng.random() >= self._noise:
                return self._control(obs)
            if start or self._last is None or self._rng.random() >= self._smooth:
                self._last = int(self._rng.integers(self._space.n))
            return self._last
        assert isinstance(self._space, spaces.Box)
        fresh = self._rng.normal(size=self._space.shape)
        self._last = fresh if start or self._last is None else (
            self._smooth * self._last + np.sqrt(1 - self._smooth**2) * fresh
        )  # fmt: skip
        wanted = self._noise * 0.7 * self._last * self._space.high
        wanted = wanted if self._control is None else wanted + self._control(obs)
        return np.clip(wanted, self._space.low, self._space.high).astype(np.float32)


def balance(obs: np.ndarray) -> int:
    """Keeps the pole of CartPole upright."""
    return int(obs[2] + 0.3 * obs[3] + 0.05 * obs[0] + 0.1 * obs[1] > 0)


def swing_up(obs: np.ndarray) -> np.ndarray:
    """Swings the pendulum up, and holds it."""
    cosine, sine, velocity = obs
    angle = np.arctan2(sine, cosine)
    missing = 5.0 - (velocity**2 / 6.0 + 5.0 * cosine)
    if abs(angle) < 0.4:
        return np.array([np.clip(-10 * angle - 2 * velocity, -2, 2)])
    return np.array([2 * np.sign(velocity) * np.clip(missing, -1, 1)])


def rock(obs: np.ndarray) -> np.ndarray:
    """Drives the car where it rolls already."""
    return np.array([0.9 * np.sign(obs[1])])


def pump(obs: np.ndarray) -> int:
    """Pushes the acrobot's lower arm where it moves already."""
    return 2 if obs[5] > 0 else 0


def follow(obs: np.ndarray) -> int:
    """Moves the lower bar of the picture below the upper one."""
    picture = obs.transpose(1, 2, 0) if obs.shape[0] == 3 else obs
    return int(np.sign(np.argmax(picture[10, :, 0]) // 12 - np.argmax(picture[50, :, 2]) // 12)) + 1


def hold(obs: np.ndarray) -> np.ndarray:
    """Moves the cart of cartpole-swingup below its pole."""
    return np.array([np.tanh(2 * obs[2] - 0.3 * obs[0] - 0.5 * obs[4])])


@dataclass(frozen=True)
class Case:
    """A task with a policy.

    Attributes:
        task: Name of the task.
        policy: Name of the policy.
        settings: Arguments of `Behaviour`; None: uniformly random actions.
        sizes: Numbers of episodes to record.
        limit: Another time limit than the task's.
    """

    task: str
    policy: str
    settings: dict[str, Any] | None
    sizes: tuple[int, ...] = (20, 100)
    limit: int | None = None

    def make(self) -> gym.Env[Any, Any]:
        """Makes the environment."""
        if self.limit is not None:
            return gym.make(self.task, max_episode_steps=self.limit)
        if self.task == "PixelSeek":
            return PixelSeek()
        if self.task.endswith(" pixels"):
            return TimeLimit(make_env(self.task.removesuffix(" pixels"), pixels=True), 100)
        return make_env(self.task)


SMOOTH = {"smooth": 0.9}
CASES = (
    Case("CartPole-v1", "random", {}),
    Case("CartPole-v1", "controller, 10% random", {"control": balance, "noise": 0.1}),
    Case("CartPole-v1", "controller, 60% random", {"control": balance, "noise": 0.6}),
    Case("CartPole-v1", "controller", {"control": balance, "noise": 0.0}, (20,)),
    Case("Pendulum-v1", "random", None),
    Case("Pendulum-v1", "smooth", SMOOTH),
    Case("Pendulum-v1", "very smooth", {"smooth": 0.98}, (20,)),
    Case("Pendulum-v1", "controller", {"control": swing_up, "noise": 0.0}),
    Case("MountainCarContinuous-v0", "random", None, (20,)),
    Case("MountainCarContinuous-v0", "controller with noise", {"control": rock, "noise": 0.4, "smooth": 0.5}),
    Case("MountainCar-v0", "sticky random", {"smooth": 0.8}, (20,)),
    Case("Acrobot-v1", "random", {}, (20,)),
    Case("Acrobot-v1", "controller, 20% random", {"control": pump, "noise": 0.2}),
    Case("Pendulum-v1", "smooth, without ends", SMOOTH, (1,), 8_000),
    Case("MountainCar-v0", "sticky random, without ends", {"smooth": 0.8}, (1,), 8_000),
    Case("dmc/walker-stand", "random", None, (20,)),
    Case("dmc/walker-stand", "smooth", SMOOTH, (20,)),
    Case("dmc/cartpole-swingup", "smooth", SMOOTH, (20,)),
    Case("dmc/cartpole-swingup", "controller with noise", {"control": hold, "noise": 0.3}, (20,)),
    Case("dmc/cheetah-run", "random", None, (20,)),
    Case("dmc/cheetah-run", "smooth", SMOOTH, (20,)),
    Case("PixelSeek", "random", {}),
    Case("PixelSeek", "controller, 30% random", {"control": follow, "noise": 0.3}),
    Case("dmc/cartpole-swingup pixels", "smooth", SMOOTH, (20,)),
)


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
    return kept(data, lambda e: part(e, 1, len(e.rewards), rewards=e.rewards[:-1]))


def reward_early(data: Data, rng: np.random.Generator) -> Data:
    """Rewards stand one row early, as where own rows are read with align="arrives"."""
    return kept(data, lambda e: part(e, 0, len(e.rewards) - 1, rewards=e.rewards[1:], truncated=not e.terminated))


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


def recorded(case: Case, episodes: int, seed: int, cache: Path | None) -> ReplayBuffer:
    """The case's good data."""
    path = None
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        path = cache / (f"{case.task}-{case.policy}-{episodes}-{seed}.npz".replace("/", "-").replace(" ", "_"))
        if path.exists():
            return ReplayBuffer.load(path)
    env = case.make()
    policy = None if case.settings is None else Behaviour(env.action_space, seed + 1000, **case.settings)
    buffer = collect(env, policy, episodes=episodes, seed=seed)
    env.close()
    if path is not None:
        buffer.save(path)
    return buffer


def examine(case: Case, episodes: int, seed: int, cache: Path | None, only: Sequence[str]) -> list[dict[str, Any]]:
    """Lints a case's data, as they are and with each fault."""
    buffer = recorded(case, episodes, seed, cache)
    good = Data(episodes_of(buffer), classes=buffer.action_classes)
    results = []
    planted: Any = None
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "data.npz"
        for fault, (plant, expected) in {"none": (lambda data, rng: data, ""), **FAULTS}.items():
            if only and fault != "none" and not any(word in fault for word in only):
                continue
            data = plant(good, np.random.default_rng(seed))
            rewards = np.concatenate([episode.rewards for episode in good.episodes])
            same = plant in (reward_late, reward_early) and bool((rewards == rewards[0]).all())
            if not data.changed:
                continue
            if plant is not planted:  # two rows of the table may be about the same data
                data.save(path)
                started = time.process_time()
                report = lint(path if expected else buffer)
                seconds = time.process_time() - started
                planted = plant
            found = [finding for finding in report.findings if finding.code == expected]
            reported = set(found[0].rows) if found else set()
            results.append(
                {
                    "task": case.task,
                    "policy": case.policy,
                    "episodes": episodes,
                    "seed": seed,
                    "fault": fault,
                    "expected": expected,
                    "changed": int(not same),
                    "found": int(bool(found)),
                    "warnings": " ".join(sorted(f.code for f in report.findings if f.severity == "warning")),
                    "notes": " ".join(sorted(f.code for f in report.findings if f.severity == "note")),
                    "planted": len(data.rows),
                    "reported": len(reported) if data.rows else 0,
                    "right": len(reported & data.rows),
                    "transitions": report.transitions,
                    "seconds": round(seconds, 2),
                }
            )
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """The tables of faults and of false alarms, as Markdown."""
    lines = [
        "| fault | finding | datasets | found | rows reported that are right |",
        "| --- | --- | --- | --- | --- |",
    ]
    missed: dict[str, list[str]] = defaultdict(list)
    for fault, (_, expected) in FAULTS.items():
        rows = [row for row in results if row["fault"] == fault and int(row["changed"])]
        if not rows:
            continue
        found = sum(int(row["found"]) for row in rows)
        reported = sum(int(row["reported"]) for row in rows)
        right = f"{sum(int(row['right']) for row in rows) / reported:.1%}" if reported else ""
        lines.append(f"| {fault} | `{expected}` | {len(rows)} | {found / len(rows):.0%} | {right} |")
        for row in rows:
            if not int(row["found"]):
                missed[fault].append(f"{row['task']} {row['policy']} ({row['episodes']} episodes)")
    good = [row for row in results if row["fault"] == "none"]
    alarms = [row for row in good if row["warnings"]]
    notes = [row for row in good if row["notes"]]
    lines += [
        "",
        f"Good data: {len(alarms)} of {len(good)} datasets with a warning, {len(notes)} with a note. "
        f"{np.median([float(row['seconds']) for row in good]):.1f} s of one core in the median, "
        f"{max(float(row['seconds']) for row in good):.1f} s at most.",
    ]
    for row in alarms + notes:
        lines.append(f"- {row['task']} {row['policy']}: {row['warnings']} {row['notes']}".rstrip())
    lines += ["", "Missed:"]
    for fault, names in missed.items():
        counts = {name: names.count(name) for name in dict.fromkeys(names)}
        lines.append(f"- {fault}: " + "; ".join(f"{name} x{count}" for name, count in counts.items()))
    return "\n".join(lines)


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path = Path("benchmarks/results/lint.csv")
    """The csv file; rows are added to it."""
    cache: Path | None = None
    """A directory that keeps the recordings."""
    cases: tuple[str, ...] = ()
    """Only the tasks and policies whose names contain one of these."""
    faults: tuple[str, ...] = ()
    """Only the faults whose names contain one of these."""
    processes: int = 1
    table: Path | None = None
    """Print the table of this csv file, and do nothing else."""


def main() -> None:
    """Runs the benchmark."""
    settings = tyro.cli(Settings, description=__doc__)
    if settings.table is not None:
        with settings.table.open(newline="") as file:
            print(table(list(csv.DictReader(file))))
        return
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    jobs = [
        (case, episodes, seed, settings.cache, settings.faults)
        for seed in settings.seeds
        for case in CASES
        for episodes in case.sizes
        if not settings.cases or any(word in f"{case.task} {case.policy}" for word in settings.cases)
    ]
    results = []
    is_new = not settings.out.exists()
    with settings.out.open("a", newline="") as file, ProcessPoolExecutor(settings.processes) as pool:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        for rows in pool.map(examine, *zip(*jobs, strict=True)):
            writer.writerows(rows)
            file.flush()
            results += rows
    print(table(results))


if __name__ == "__main__":
    main()
