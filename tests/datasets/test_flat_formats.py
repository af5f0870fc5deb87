"""D4RL, OGBench, robomimic and replay buffers of SB3: episodes whose numbers say where they belong, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from gymnasium import spaces
from helpers.data_sets import acted, assert_holds, earned, observed, stored
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer

from worldflux.datasets import load
from worldflux.errors import BufferError, ConfigurationError, WorldFluxError

EPISODES = {1: (3, "terminated"), 2: (2, "truncated"), 3: (1, "truncated"), 4: (4, "terminated")}


def expected(seen: bool, ends: dict[str, str] | None = None) -> list[tuple[int, int, str, bool]]:
    return [(number, length, (ends or {}).get(end, end), seen) for number, (length, end) in EPISODES.items()]


def joined(make: Any) -> np.ndarray:
    return np.concatenate([make(number, length) for number, (length, _) in EPISODES.items()])


def d4rl(*, following: bool = False, timeouts: bool = True) -> dict[str, np.ndarray]:
    """What `d4rl.get_dataset` reads: a row a step, flags in the last one."""
    arrays = {
        "observations": joined(observed),
        "actions": joined(acted),
        "rewards": joined(earned),
        "terminals": joined(lambda n, t: (np.arange(t) == t - 1) & (EPISODES[n][1] == "terminated")),
        "infos/qpos": joined(observed),
        "metadata/algorithm": np.array(3),
    }
    if timeouts:
        arrays["timeouts"] = joined(lambda n, t: (np.arange(t) == t - 1) & (EPISODES[n][1] == "truncated"))
    if following:
        arrays["next_observations"] = joined(lambda n, t: observed(n, t + 1)[1:])
    return arrays


def write_hdf5(path: Path, arrays: dict[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


def test_d4rl_files_lack_last_observations_unless_the_next_ones_are_stored(tmp_path: Path) -> None:
    assert_holds(load(write_hdf5(tmp_path / "a.hdf5", d4rl())), expected(seen=False))
    assert_holds(load(write_hdf5(tmp_path / "b.hdf5", d4rl(following=True))), expected(seen=True))
    np.savez(tmp_path / "c.npz", **{name: array for name, array in d4rl().items() if "/" not in name})
    assert_holds(load(str(tmp_path / "c.npz")), expected(seen=False))


def test_a_d4rl_file_without_timeouts_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    buffer = load(write_hdf5(tmp_path / "a.hdf5", d4rl(timeouts=False)), time_limit=3)
    assert [len(one.actions) for one in stored(buffer)] == [3, 3, 3, 1]
    assert not caplog.records
    load(tmp_path / "a.hdf5")
    assert "Pass time_limit" in caplog.text


def test_ogbench_rows_end_with_an_observation_without_a_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arrays = {
        "observations": joined(lambda n, t: observed(n, t + 1)),
        "actions": joined(lambda n, t: np.concatenate([acted(n, t), [[9.0]]])),
        "terminals": joined(lambda n, t: np.arange(t + 1) == t),
        "qpos": joined(lambda n, t: observed(n, t + 1)),
    }
    np.savez_compressed(tmp_path / "cube.npz", **arrays)
    buffer = load(tmp_path / "cube.npz")
    assert [(len(one.actions), one.end) for one in stored(buffer)] == [(t, "truncated") for t, _ in EPISODES.values()]
    assert "no rewards" in caplog.text
    np.savez_compressed(tmp_path / "cube.npz", rewards=joined(lambda n, t: np.append(earned(n, t), 9)), **arrays)
    assert_holds(load(tmp_path / "cube.npz", format="ogbench"), expected(seen=True, ends={"terminated": "truncated"}))


def test_files_of_d4rl_without_rewards_are_not_taken_for_those_of_ogbench(tmp_path: Path) -> None:
    names = ("observations", "terminals", "timeouts")
    np.savez(tmp_path / "a.npz", actions=np.zeros((9, 1)), **{name: np.zeros(9) for name in names})
    with pytest.raises(ConfigurationError, match="which are those of no known format"):
        load(tmp_path / "a.npz")


def robomimic(path: Path, **changes: Any) -> Path:
    """A file as robomimic's scripts write it, with a dictionary of observations and a group for each episode."""
    arrays: dict[str, Any] = {}
    for number, (length, end) in EPISODES.items():
        rows = observed(number, length + 1)
        shade = np.broadcast_to((rows[:, :1, None, None] % 251).astype(np.uint8), (length + 1, 20, 20, 3))
        for folder, part in (("obs", slice(None, -1)), ("next_obs", slice(1, None))):
            arrays[f"data/demo_{number + 7}/{folder}/state"] = rows[part]
            arrays[f"data/demo_{number + 7}/{folder}/camera"] = shade[part]
        arrays[f"data/demo_{number + 7}/actions"] = acted(number, length)
        arrays[f"data/demo_{number + 7}/rewards"] = earned(number, length)
        arrays[f"data/demo_{number + 7}/dones"] = (np.arange(length) == length - 1) & (end == "terminated")
    arrays["mask/train"] = np.array([b"demo_8"])
    return write_hdf5(path, {**arrays, **changes})


def test_robomimic_demonstrations_are_read_in_order_with_next_observations(tmp_path: Path) -> None:
    path = robomimic(tmp_path / "demo.hdf5")
    assert_holds(load(path, obs="state"), expected(seen=True))
    assert_holds(load(path, obs="state", ends="truncation"), expected(seen=True, ends={"terminated": "truncated"}))
    both = load(path)
    assert both.obs_shape == {"state": (2,), "camera": (3, 20, 20)}
    last = stored(both)[-1]
    assert last.final["camera"].shape == (3, 20, 20) and (last.final["camera"] == 4004 % 251).all()
    renamed = load(path, obs={"image": "camera"})
    assert renamed.obs_shape == {"image": (3, 20, 20)}
    with pytest.raises(
        ConfigurationError, match=r"no observation 'camra'; did you mean 'camera'\? It has camera, state"
    ):
        load(path, obs="camra")


def test_dones_inside_a_demonstration_are_ignored_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = robomimic(tmp_path / "demo.hdf5", **{"data/demo_20/obs/state": observed(20, 3)})
    with h5py.File(path, "a") as file:
        del file["data/demo_20"]
        file["data/demo_11/dones"][...] = [0, 1, 1, 1]
    assert_holds(load(path, obs="state"), expected(seen=True))
    assert "2 rows that are not the last" in caplog.text and "ends='truncation'" in caplog.text


def test_a_robomimic_file_with_a_missing_array_is_refused(tmp_path: Path) -> None:
    path = robomimic(tmp_path / "demo.hdf5")
    with h5py.File(path, "a") as file:
        del file["data/demo_9/actions"]
    with pytest.raises(BufferError, match="data/demo_9 has no array 'actions'"):
        load(path)
    with pytest.raises(BufferError, match="no groups data/demo_0"):
        load(write_hdf5(tmp_path / "flat.hdf5", d4rl()), format="robomimic")


def sb3(kind: Any = ReplayBuffer, size: int = 100, space: Any = None, **settings: Any) -> Any:
    """A buffer of two environments: episodes 1, 2 in one and 3, 4 in the other, written in step."""
    one = spaces.Box(-1e6, 1e6, (2,), np.float32)
    obs_space = one if kind is ReplayBuffer else spaces.Dict({"state": one})
    actions = spaces.Box(-3, 3, (1,), np.float32) if space is None else space
    buffer = kind(size * 2, obs_space, actions, n_envs=2, **settings)
    steps = {
        env: [(n, t) for n in numbers for t in range(EPISODES[n][0])] for env, numbers in ((0, (1, 2)), (1, (3, 4)))
    }
    for row in zip(steps[0], steps[1], strict=True):
        at = [observed(n, t + 1)[-1] for n, t in row]
        following = [observed(n, t + 2)[-1] for n, t in row]
        action = [acted(n, t + 1)[-1] for n, t in row] if space is None else [[t % 3] for _, t in row]
        ends = [t == EPISODES[n][0] - 1 for n, t in row]
        infos = [
            {"TimeLimit.truncated": end and EPISODES[n][1] == "truncated"}
            for (n, _), end in zip(row, ends, strict=True)
        ]
        wrap = (lambda rows: {"state": np.array(rows)}) if kind is DictReplayBuffer else np.array
        rewards = [earned(n, t + 1)[-1] for n, t in row]
        buffer.add(wrap(at), wrap(following), np.array(action), np.array(rewards), np.array(ends), infos)
    return buffer


def test_buffers_of_sb3_are_read_one_environment_after_another() -> None:
    assert_holds(load(sb3()), expected(seen=True))
    as_dict = load(sb3(DictReplayBuffer))
    assert as_dict.obs_shape == {"state": (2,)}
    np.testing.assert_array_equal(stored(as_dict)[1].final["state"], observed(2, 3)[-1])


def test_a_full_ring_of_sb3_is_read_from_its_oldest_row_and_its_cut_end_is_truncated() -> None:
    found = stored(load(sb3(size=3)))
    assert [(len(one.actions), one.end) for one in found] == [(1, "terminated"), (2, "truncated"), (3, "terminated")]
    np.testing.assert_array_equal(found[0].obs, observed(1, 3)[2:])
    np.testing.assert_array_equal(found[2].rewards, earned(4, 4)[1:])
    open_end = sb3(size=4)
    open_end.dones[:] = 0
    assert [one.end for one in stored(load(open_end))] == ["truncated", "truncated"]


def test_last_observations_are_unknown_where_sb3_saves_memory(caplog: pytest.LogCaptureFixture) -> None:
    buffer = load(sb3(optimize_memory_usage=True, handle_timeout_termination=False))
    assert_holds(buffer, expected(seen=False, ends={"truncated": "terminated"}))
    assert "handle_timeout_termination=False" in caplog.text


def test_discrete_actions_of_sb3_become_one_hots() -> None:
    buffer = load(sb3(space=spaces.Discrete(3)))
    assert buffer.action_classes == (3,)
    np.testing.assert_array_equal(stored(buffer)[0].actions, np.eye(3))


def test_single_numbers_observed_in_sb3_become_one_hots() -> None:
    buffer = ReplayBuffer(10, spaces.Discrete(4), spaces.Box(-1, 1, (1,)))
    for state in (2, 1):
        buffer.add(np.array([state]), np.array([3]), np.zeros((1, 1)), np.zeros(1), np.array([state == 1]), [{}])
    (episode,) = stored(load(buffer))
    np.testing.assert_array_equal(episode.obs, np.eye(4)[[2, 1]])
    np.testing.assert_array_equal(episode.final, np.eye(4)[3])


@pytest.mark.parametrize("source", [object(), 3, "missing.hdf5", Path("missing")])
def test_other_sources_are_refused(source: Any) -> None:
    with pytest.raises((WorldFluxError, FileNotFoundError)):
        load(source)
    with pytest.raises((WorldFluxError, FileNotFoundError)):
        load(source, format="sb3" if not isinstance(source, str | Path) else "d4rl")
