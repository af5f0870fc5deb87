"""The lint of recorded data: each fault is planted in good data and found with its rows, and good data pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from worldflux.cli.main import main
from worldflux.datasets import Report, lint, load
from worldflux.envs import collect
from worldflux.errors import BufferError
from worldflux.training import ReplayBuffer

LENGTH = 40


@dataclass(frozen=True)
class Flat:
    """Rows of several episodes: a mass that is pushed on a spring, whose rewards depend on where it is and the push."""

    obs: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    dones: np.ndarray
    truncations: np.ndarray

    def save(self, path: Path, **further: Any) -> Path:
        shape = np.array(self.obs.shape[1:])
        np.savez(
            path,
            **vars(self),
            obs_shape=shape,
            action_dim=np.array(self.actions.shape[1]),
            capacity=np.array(len(self.obs)),
            **further,
        )
        return path

    def buffer(self) -> ReplayBuffer:
        found = ReplayBuffer(len(self.obs), self.obs.shape[1:], self.actions.shape[1])
        found.add_episode(self.obs, self.actions, self.rewards, terminations=self.dones, truncations=self.truncations)
        return found


def spring(seed: int = 0, episodes: int = 25, smooth: float = 0.0, lengths: tuple[int, int] | None = None) -> Flat:
    """Good data. Episodes are cut after 40 steps, or terminate after a random number between two lengths."""
    rng = np.random.default_rng(seed)
    parts: dict[str, list[Any]] = {name: [] for name in Flat.__annotations__}
    for _ in range(episodes):
        position, velocity, push = rng.normal(), rng.normal(), rng.normal()
        length = LENGTH if lengths is None else int(rng.integers(*lengths))
        for step in range(length):
            push = smooth * push + np.sqrt(1 - smooth**2) * rng.normal()
            action = float(np.clip(0.6 * push, -1, 1))
            parts["obs"].append([position, velocity])
            parts["actions"].append([action])
            parts["rewards"].append(np.cos(position) - 0.3 * action**2)
            parts["dones"].append(lengths is not None and step == length - 1)
            parts["truncations"].append(lengths is None and step == length - 1)
            velocity += 0.4 * action - 0.3 * position - 0.1 * velocity + 0.005 * rng.normal()
            position += 0.3 * velocity
    arrays = {name: np.array(part) for name, part in parts.items()}
    return Flat(
        **{name: array.astype(np.float32) if array.dtype.kind == "f" else array for name, array in arrays.items()}
    )


GOOD = spring()
FIRST = np.arange(0, len(GOOD.rewards), LENGTH)
LAST = FIRST + LENGTH - 1


def codes(report: Report) -> list[str]:
    return [finding.code for finding in report.findings]


def shifted(array: np.ndarray, rows: int, zeros: bool = False) -> np.ndarray:
    """An array whose entries stand so many rows later, in each episode."""
    result = np.roll(array, rows, axis=0)
    if zeros:
        result[FIRST if rows > 0 else LAST] = 0
    return result


# --- good data


@pytest.mark.parametrize(
    "data",
    [GOOD, spring(1, smooth=0.9), spring(2, lengths=(10, 60)), spring(3, episodes=4)],
    ids=["random", "smooth", "terminating", "few rows"],
)
def test_good_data_has_no_findings(data: Flat) -> None:
    report = lint(data.buffer())
    assert codes(report) == [] and report.ok
    assert (report.transitions, report.episodes) == (len(data.rewards), data.dones.sum() + data.truncations.sum())


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_what_collect_records_has_no_findings(env: str) -> None:
    assert codes(lint(collect(env, episodes=20, seed=0))) == []


def test_rows_are_the_same_in_a_buffer_with_several_streams_and_in_its_file(tmp_path: Path) -> None:
    buffer = ReplayBuffer(10_000, (2,), 1, n_envs=3)
    for start in FIRST.tolist():
        part = slice(start, start + LENGTH)
        buffer.add_episode(GOOD.obs[part], GOOD.actions[part], GOOD.rewards[part])
    # One episode with a jump in its middle.
    joined = np.append(np.arange(20), np.arange(80, 100))
    buffer.add_episode(GOOD.obs[joined], GOOD.actions[joined], GOOD.rewards[joined])
    buffer.save(tmp_path / "data.npz")
    for report in (lint(buffer), lint(tmp_path / "data.npz")):
        (finding,) = [finding for finding in report.findings if finding.code == "jump-without-end"]
        (row,), ((episode, step),) = finding.rows, finding.places
        saved = np.load(tmp_path / "data.npz")
        assert np.array_equal(saved["obs"][row : row + 2], GOOD.obs[[19, 80]])
        assert step == 19 and saved["episode_lengths"][:episode].sum() + step == row


# --- alignment


@pytest.mark.parametrize("smooth", [0.0, 0.9])
@pytest.mark.parametrize(
    ("name", "rows", "code"),
    [
        ("rewards", 1, "reward-late"),
        ("rewards", -1, "reward-early"),
        ("actions", 1, "action-led-to"),
        ("actions", -1, "action-early"),
    ],
)
def test_shifted_rows_are_found(name: str, rows: int, code: str, smooth: float) -> None:
    data = spring(4, smooth=smooth)
    report = lint(replace(data, **{name: shifted(getattr(data, name), rows)}).buffer())
    assert not report.ok
    (finding,) = report.findings
    assert finding.code == code
    assert len(finding.rows) == 10
    assert all(finding.places[i] == divmod(row, LENGTH) for i, row in enumerate(finding.rows))


def test_rewards_of_zero_in_all_first_rows_are_found_where_all_others_are_one() -> None:
    data = replace(GOOD, rewards=shifted(np.ones_like(GOOD.rewards), 1, zeros=True))
    (finding,) = lint(data.buffer()).findings
    assert finding.code == "reward-late" and finding.rows == tuple(FIRST)


def test_constant_rewards_tell_nothing() -> None:
    assert codes(lint(replace(GOOD, rewards=np.ones_like(GOOD.rewards)).buffer())) == []


def test_the_wrong_alignment_of_an_importer_is_found() -> None:
    episodes = [
        {"obs": GOOD.obs[at], "actions": GOOD.actions[at], "rewards": GOOD.rewards[at]}
        for at in (slice(start, start + LENGTH) for start in FIRST)
    ]
    found = {align: codes(lint(load(episodes, format="arrays", align=align))) for align in ("own", "arrives", "led_to")}
    assert found == {"own": [], "arrives": ["reward-early"], "led_to": ["action-early", "reward-early"]}


@pytest.mark.parametrize(
    ("align", "found"), [("arrives", ["reward-late"]), ("led_to", ["action-led-to", "reward-late"])]
)
def test_rows_of_another_alignment_that_are_read_as_own_are_found(align: str, found: list[str]) -> None:
    episodes = []
    for start in FIRST:
        part = slice(start, start + LENGTH - 1)
        rewards, actions = np.append(0, GOOD.rewards[part]), GOOD.actions[part]
        actions = np.append(actions, [[0]], axis=0) if align == "arrives" else np.append([[0]], actions, axis=0)
        episodes.append({"obs": GOOD.obs[start : start + LENGTH], "actions": actions, "rewards": rewards})
    assert codes(lint(load(episodes, format="arrays", align=align))) == []
    assert codes(lint(load(episodes, format="arrays"))) == found


# --- episodes


def test_missing_ends_are_found() -> None:
    missing = LAST[[3, 8, 15]]
    truncations = GOOD.truncations.copy()
    truncations[missing] = False
    (finding,) = lint(replace(GOOD, truncations=truncations).buffer()).findings
    assert finding.code == "jump-without-end" and set(finding.rows) <= set(missing) and len(finding.rows) >= 2


def test_ends_inside_a_trajectory_are_found() -> None:
    false = FIRST[::3] + 17
    dones = GOOD.dones.copy()
    dones[false] = True
    (finding,) = lint(replace(GOOD, dones=dones).buffer()).findings
    assert finding.code == "end-inside-trajectory" and set(finding.rows) == set(false)


def test_ends_inside_a_trajectory_are_found_with_last_observations() -> None:
    buffer = ReplayBuffer(len(GOOD.obs), (2,), 1)
    for start in range(0, 600, 20):  # each real episode in two halves
        is_half = start % LENGTH == 0
        obs = GOOD.obs[start : start + 21] if is_half else np.append(GOOD.obs[start : start + 20], [[9, 9]], axis=0)
        buffer.add_episode(obs, GOOD.actions[start : start + 20], GOOD.rewards[start : start + 20])
    finding = next(finding for finding in lint(buffer).findings if finding.code == "end-inside-trajectory")
    assert finding.rows == tuple(range(19, 600, 40))


@pytest.mark.parametrize("some_die", [False, True])
def test_time_limits_that_are_stored_as_terminations_are_found(some_die: bool) -> None:
    data = spring(5, lengths=(10, 100)) if some_die else GOOD
    ends = np.flatnonzero(data.dones | data.truncations)
    starts = np.append(0, ends[:-1] + 1)
    keep = np.concatenate([np.arange(start, min(end, start + 59) + 1) for start, end in zip(starts, ends, strict=True)])
    cut = np.flatnonzero(np.diff(keep, append=keep[-1] + 2) != 1)
    arrays = {name: getattr(data, name)[keep] for name in Flat.__annotations__}
    arrays["dones"] = np.zeros(len(keep), np.bool_)
    arrays["dones"][cut] = True
    arrays["dones"][np.searchsorted(keep, ends[np.isin(ends, keep)])] = True
    arrays["truncations"] = np.zeros(len(keep), np.bool_)
    (finding,) = lint(Flat(**arrays).buffer()).findings
    assert finding.code == "time-limit-as-termination"
    longest = 59 if some_die else LENGTH - 1
    assert {step for _, step in finding.places} == {longest}


def test_terminations_at_different_lengths_are_no_time_limit() -> None:
    assert codes(lint(spring(6, episodes=60, lengths=(5, 20)).buffer())) == []


def merged(buffer: ReplayBuffer, path: Path, ends: Callable[[np.ndarray], np.ndarray]) -> Report:
    """What is found in a buffer's rows with other ends, which are computed from its own."""
    buffer.save(path)
    with np.load(path) as saved:
        names = ("obs", "actions", "rewards", "obs_shape", "action_dim", "capacity", "action_classes")
        arrays = {name: saved[name] for name in names}
        dones = ends(saved["dones"] | saved["truncations"])
    np.savez(path, dones=dones, **arrays)
    return lint(path)


def test_ends_are_found_missing_where_none_is_marked_and_they_can_be_foreseen(tmp_path: Path) -> None:
    buffer = collect("CartPole-v1", episodes=60, seed=1)
    last: list[int] = []

    def none(ends: np.ndarray) -> np.ndarray:
        last.extend(np.flatnonzero(ends)[:-1].tolist())
        return np.zeros_like(ends)

    (finding,) = merged(buffer, tmp_path / "data.npz", none).findings
    assert finding.code == "jump-without-end"
    assert set(finding.rows) <= set(last) and len(finding.rows) > 0.8 * len(last)


def test_false_ends_are_not_where_episodes_begin(tmp_path: Path) -> None:
    buffer = collect("Pendulum-v1", episodes=20, seed=1)
    buffer.declare_actions("continuous")

    def more(ends: np.ndarray) -> np.ndarray:
        ends[np.random.default_rng(0).permutation(len(ends))[:20]] = True
        return ends

    found = merged(buffer, tmp_path / "data.npz", more).findings
    assert [finding.code for finding in found if "limit" not in finding.code] == ["end-inside-trajectory"]


def steps(path: np.ndarray, length: int) -> Flat:
    """Episodes of a length, whose observations are a path `[N, 2]` and whose actions mean nothing."""
    rng = np.random.default_rng(0)
    ends = np.arange(1, len(path) + 1) % length == 0
    actions = rng.uniform(-1, 1, (len(path), 1)).astype(np.float32)
    return Flat(path.astype(np.float32), actions, np.ones(len(path), np.float32), np.zeros_like(ends), ends)


def test_episodes_that_begin_where_any_other_ends_are_no_false_ends() -> None:
    path = 0.3 * np.random.default_rng(0).normal(size=(1000, 2))
    assert codes(lint(steps(path, 20).buffer())) == []


def test_kicks_to_where_no_episode_begins_are_no_missing_ends() -> None:
    rng = np.random.default_rng(0)
    path = np.concatenate([np.cumsum(0.05 * rng.normal(size=(50, 2)), axis=0) for _ in range(20)])
    for row in range(25, 1000, 100):
        path[row : 50 * (row // 50 + 1)] += 8
    assert codes(lint(steps(path, 50).buffer())) == []


def test_fast_motions_are_no_missing_ends() -> None:
    rng = np.random.default_rng(0)
    speed = 0.01 * rng.normal(size=(2000, 2))
    for row in range(100, 2000, 100):
        speed[row : row + 6] += rng.normal(size=2)
    assert codes(lint(steps(np.cumsum(speed, axis=0), 2000).buffer())) == []


def collisions() -> Flat:
    """Episodes of 50 steps that begin anywhere without motion. In each the 26th step leads anywhere, in motion."""
    rng = np.random.default_rng(0)
    path = []
    for _ in range(20):
        place, speed = rng.uniform(-1, 1, 6), 0.0
        for step in range(50):
            path.append([*place, speed])
            speed = 0.9 * speed + 0.01 * rng.normal()
            place = place + speed + 0.02 * rng.normal(size=6)
            if step == 25:
                place, speed = rng.uniform(-1, 1, 6), rng.choice([-0.03, 0.03])
    return steps(np.array(path), 50)


@pytest.mark.parametrize(
    "missing", [[], [199, 499, 749], list(range(49, 999, 50))], ids=["none", "three", "all but the last"]
)
def test_collisions_are_no_missing_ends_where_episodes_begin_without_motion(missing: list[int]) -> None:
    data = collisions()
    truncations = data.truncations.copy()
    truncations[missing] = False
    found = lint(replace(data, truncations=truncations).buffer()).findings
    assert [(finding.code, finding.rows) for finding in found] == [("jump-without-end", tuple(missing))] * bool(missing)


# --- values


def test_nan_is_found_with_its_rows_in_a_file_that_load_refuses(tmp_path: Path) -> None:
    obs, rewards = GOOD.obs.copy(), GOOD.rewards.copy()
    obs[[7, 300], 1], rewards[FIRST] = np.nan, np.nan
    path = replace(GOOD, obs=obs, rewards=rewards).save(tmp_path / "data.npz")
    with pytest.raises(BufferError):
        ReplayBuffer.load(path)
    found = [finding for finding in lint(path).findings if finding.code == "not-finite"]
    assert [finding.rows for finding in found] == [tuple(FIRST), (7, 300)]
    assert "align" in found[0].message and found[1].places == ((0, 7), (7, 20))


def test_actions_out_of_range_are_found_with_their_rows(tmp_path: Path) -> None:
    path = replace(GOOD, actions=2 * GOOD.actions).save(tmp_path / "data.npz")
    (finding,) = lint(path).findings
    outside = np.flatnonzero(np.abs(GOOD.actions[:, 0]) > 0.5001)
    assert finding.code == "action-range" and finding.total == len(outside) and finding.rows == tuple(outside[:100])
    assert codes(lint(path, action_low=-2, action_high=2)) == []


def test_saturated_actions_are_a_note() -> None:
    report = lint(replace(GOOD, actions=np.clip(3 * GOOD.actions, -1, 1)).buffer())
    assert "action-saturated" in codes(report)
    assert all(finding.severity == "note" for finding in report.findings if finding.code == "action-saturated")


@pytest.mark.parametrize("choices", [2, 4])
def test_numbers_in_place_of_one_hots_are_found(choices: int, tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, choices, (len(GOOD.obs), 1)).astype(np.float32)
    assert "integer-actions" in codes(lint(replace(GOOD, actions=numbers).save(tmp_path / "data.npz")))


def test_rows_that_are_no_one_hots_are_found(tmp_path: Path) -> None:
    actions = np.eye(3, dtype=np.float32)[np.random.default_rng(0).integers(0, 3, len(GOOD.obs))]
    actions[[5, 9]] = [[1, 1, 0], [0, 0, 0]]
    path = replace(GOOD, actions=actions).save(tmp_path / "data.npz", action_classes=np.array([3]))
    finding = next(finding for finding in lint(path).findings if finding.code == "not-one-hot")
    assert finding.rows == (5, 9)


def test_constant_and_duplicated_columns_are_notes() -> None:
    obs = np.concatenate([GOOD.obs, np.full((len(GOOD.obs), 1), 2, np.float32), GOOD.obs[:, 1:]], axis=1)
    report = lint(replace(GOOD, obs=obs).buffer())
    assert codes(report) == ["constant-column", "duplicate-column"] and report.ok
    assert "Column 2 of the observations" in report.findings[0].message and "1 and 3" in report.findings[1].message


def test_observations_that_never_change_are_a_warning() -> None:
    report = lint(replace(GOOD, obs=np.zeros_like(GOOD.obs)).buffer())
    assert codes(report) == ["constant-column"] and not report.ok


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda images: (images > 127).astype(np.uint8), "no value above 1"),
        (lambda images: images.astype(np.float32), "0 to 255"),
        (lambda images: (images / 255).astype(np.float32), "0 to 1"),
        (lambda images: images, None),
    ],
    ids=["black", "floats", "scaled floats", "good"],
)
def test_images_of_a_wrong_scale_are_found(change: Callable[[np.ndarray], np.ndarray], words: str | None) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 3, 16, 16)).astype(np.uint8)
    images[0, 0, 0, :2] = 0, 255
    images = change(images)
    buffer = ReplayBuffer(60, (3, 16, 16), 1, obs_dtype=images.dtype)
    buffer.add_episode(images, GOOD.actions[:60], GOOD.rewards[:60])
    found = lint(buffer).findings
    assert [finding.code for finding in found] == ["image-scale"] * (words is not None)
    assert words is None or words in found[0].message


# --- the report and the command


def test_a_report_is_readable() -> None:
    text = str(lint(replace(GOOD, actions=shifted(GOOD.actions, 1)).buffer()))
    assert (
        text.startswith("the replay buffer: 1,000 transitions in 25 episodes, ") and "warning [action-led-to]" in text
    )
    assert "Rows: " in text and "(episode " in text and "align" in text


def test_an_empty_buffer_is_refused() -> None:
    with pytest.raises(BufferError, match="no transitions"):
        lint(ReplayBuffer(10, (2,), 1))


def test_the_command_exits_with_1_where_something_is_found(tmp_path: Path, capsys: Any) -> None:
    good, bad = GOOD.save(tmp_path / "good.npz"), tmp_path / "bad.npz"
    replace(GOOD, truncations=GOOD.dones, dones=GOOD.truncations).save(bad)
    assert main(["data", "lint", str(good)]) == 0
    assert capsys.readouterr().out == "good.npz: 1,000 transitions in 25 episodes, nothing found.\n"
    assert main(["data", "lint", str(bad), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False and report["findings"][0]["code"] == "time-limit-as-termination"
    assert report["findings"][0]["rows"] == LAST.tolist() and report["findings"][0]["places"][1] == [1, 39]


def test_the_command_reads_a_directory_of_saved_buffers_as_one_recording(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    missing = GOOD.truncations.copy()
    missing[LAST[[3, 8, 15]]] = False
    spring(1).buffer().save(folder / "0.npz")
    assert main(["data", "lint", str(folder)]) == 0
    assert capsys.readouterr().out == "recordings: 1,000 transitions in 25 episodes, nothing found.\n"
    replace(GOOD, truncations=missing).buffer().save(folder / "1.npz")
    assert main(["data", "lint", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["transitions"], report["episodes"]) == (2000, 47)
    (finding,) = report["findings"]
    assert finding["code"] == "jump-without-end"
    assert len(finding["rows"]) >= 2 and set(finding["rows"]) <= {1000 + row for row in LAST[[3, 8, 15]].tolist()}


def test_the_command_exits_with_2_where_nothing_can_be_read(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    assert main(["data", "lint", str(tmp_path / "broken.npz")]) == 2
    assert main(["data", "lint", str(tmp_path / "missing.npz")]) == 2
    assert "broken.npz" in capsys.readouterr().err


def test_dictionaries_of_observations_are_linted() -> None:
    class Both(gym.ObservationWrapper[Any, Any, Any]):
        def __init__(self) -> None:
            super().__init__(gym.make("Pendulum-v1", max_episode_steps=50))
            box = self.env.observation_space
            self.observation_space = gym.spaces.Dict({"state": box, "still": gym.spaces.Box(0, 1, (2,))})

        def observation(self, observation: Any) -> dict[str, Any]:
            return {"state": observation, "still": np.ones(2, np.float32)}

    report = lint(collect(Both(), episodes=10, seed=0))
    assert codes(report) == ["constant-column"]
    assert "'still'" in report.findings[0].message
