"""Arrays of the user: flat or by episode, in memory or in files, with each alignment."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.data_sets import acted, assert_holds, earned, observed, stored

from worldflux.datasets import load
from worldflux.errors import BufferError, ConfigurationError, WorldFluxError

LENGTHS = {1: 3, 2: 1, 3: 4}
ENDS = {1: "terminated", 2: "truncated", 3: "terminated"}
VOID = 7.0
"""What stands where a number means nothing."""


def own(**more: np.ndarray) -> dict[str, np.ndarray]:
    """Flat arrays with a row for each step."""
    return {
        "obs": np.concatenate([observed(number, length) for number, length in LENGTHS.items()]),
        "actions": np.concatenate([acted(number, length) for number, length in LENGTHS.items()]),
        "rewards": np.concatenate([earned(number, length) for number, length in LENGTHS.items()]),
        "terminals": np.array([0, 0, 1, 0, 0, 0, 0, 1]),
        "timeouts": np.array([0, 0, 0, 1, 0, 0, 0, 0]),
        **more,
    }


def with_final_rows(align: str) -> dict[str, np.ndarray]:
    """Flat arrays with a row for each observation, in one of the alignments."""

    def beside(values: np.ndarray, arrives: bool) -> np.ndarray:
        void = np.full_like(values[:1], VOID)
        return np.concatenate([void, values] if arrives else [values, void])

    flags = {
        "is_first": [np.eye(length + 1)[0] for length in LENGTHS.values()],
        "is_last": [np.eye(length + 1)[-1] for length in LENGTHS.values()],
        "is_terminal": [np.eye(n + 1)[-1] * (ENDS[number] == "terminated") for number, n in LENGTHS.items()],
    }
    return {
        "obs": np.concatenate([observed(number, length + 1) for number, length in LENGTHS.items()]),
        "actions": np.concatenate([beside(acted(*one), align == "led_to") for one in LENGTHS.items()]),
        "rewards": np.concatenate([beside(earned(*one), align != "own") for one in LENGTHS.items()]),
        **{name: np.concatenate(parts) for name, parts in flags.items()},
    }


def by_episode(last_obs: bool) -> list[dict[str, np.ndarray]]:
    return [
        {
            "obs": observed(number, length + last_obs),
            "actions": acted(number, length),
            "rewards": earned(number, length),
            "terminated": np.eye(length)[-1] * (ENDS[number] == "terminated"),
        }
        for number, length in LENGTHS.items()
    ]


def held(seen: bool) -> list[tuple[int, int, str, bool]]:
    return [(number, length, ENDS[number], seen) for number, length in LENGTHS.items()]


def in_npz(arrays: dict[str, Any], directory: Path) -> Path:
    np.savez_compressed(directory / "mine.npz", **arrays)
    return directory / "mine.npz"


def in_hdf5(arrays: dict[str, Any], directory: Path) -> Path:
    with h5py.File(directory / "mine.hdf5", "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return directory / "mine.hdf5"


def in_memory(arrays: dict[str, Any], directory: Path) -> dict[str, Any]:
    return arrays


PLACES = pytest.mark.parametrize("put", [in_memory, in_npz, in_hdf5])
Put = Callable[[dict[str, Any], Path], Any]


@PLACES
def test_flat_arrays_are_split_at_their_flags_and_last_observations_stay_unknown(put: Put, tmp_path: Path) -> None:
    buffer = load(put(own(), tmp_path), format="arrays")
    assert_holds(buffer, held(seen=False))
    assert buffer.action_type == "continuous"


@PLACES
def test_next_observations_give_the_last_one_of_each_episode(put: Put, tmp_path: Path) -> None:
    following = np.concatenate([observed(number, length + 1)[1:] for number, length in LENGTHS.items()])
    assert_holds(load(put(own(next_obs=following), tmp_path), format="arrays"), held(seen=True))


@PLACES
@pytest.mark.parametrize("align", ["own", "arrives", "led_to"])
def test_rows_with_last_observations_are_read_in_every_alignment(put: Put, align: str, tmp_path: Path) -> None:
    source = put(with_final_rows(align), tmp_path)
    assert_holds(load(source, format="arrays", align=align, final_row=True), held(seen=True))


@pytest.mark.parametrize("align", ["own", "arrives", "led_to"])
def test_rows_may_be_cut_anywhere_while_they_are_read(align: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in range(1, 60, 7):
        monkeypatch.setattr("worldflux.datasets.recording.BLOCK_BYTES", size)
        for marks in (["is_first"], ["is_last"], ["is_first", "is_last"]):
            arrays = with_final_rows(align)
            kept = {name: array for name, array in arrays.items() if name in marks or not name.startswith("is_f")}
            buffer = load(kept, format="arrays", align=align, final_row=True)
            assert_holds(buffer, held(seen=True))
        assert_holds(load(own()), held(seen=False))


@pytest.mark.parametrize("last_obs", [True, False])
def test_episodes_may_have_their_last_observation(last_obs: bool, tmp_path: Path) -> None:
    assert_holds(load(by_episode(last_obs)), held(seen=last_obs))
    for number, episode in enumerate(by_episode(last_obs)):
        np.savez(tmp_path / f"{number}.npz", **episode)
    assert_holds(load(tmp_path, format="arrays"), held(seen=last_obs))
    groups = {f"demo_{9 + i}/{key}": array for i, e in enumerate(by_episode(last_obs)) for key, array in e.items()}
    assert_holds(load(in_hdf5(groups, tmp_path), format="arrays"), held(seen=last_obs))


def test_a_mapping_names_arrays_and_makes_dictionaries_of_observations() -> None:
    arrays = own()
    renamed = {"state": arrays["obs"], "u": arrays["actions"], "r": arrays["rewards"], "camera": images(8)}
    buffer = load(
        renamed,
        keys={"obs": {"state": "state", "image": "camera"}, "actions": "u", "rewards": "r"},
        time_limit=2,
    )
    assert buffer.obs_shape == {"state": (2,), "image": (3, 16, 16)}
    assert buffer.obs_dtype == {"state": np.float32, "image": np.uint8}
    found = stored(buffer)
    assert [len(one.actions) for one in found] == [2, 2, 2, 2]
    np.testing.assert_array_equal(found[1].obs["image"], np.moveaxis(images(8), -1, 1)[2:4])
    np.testing.assert_array_equal(np.concatenate([one.rewards for one in found]), arrays["rewards"])


def images(count: int) -> np.ndarray:
    """Pictures HWC, each of whose channels says which one it is."""
    shades = 10 * np.arange(count)[:, None] + np.arange(3)
    return np.broadcast_to(shades[:, None, None], (count, 16, 16, 3)).astype(np.uint8)


def test_episode_numbers_and_time_limits_end_episodes() -> None:
    number = np.repeat([0, 1, 2], list(LENGTHS.values()))
    arrays = {name: array for name, array in own().items() if name not in ("terminals", "timeouts")}
    ends = [(1, 3, "truncated", False), (2, 1, "truncated", False), (3, 4, "truncated", False)]
    assert_holds(load({**arrays, "episode": number}), ends)
    found = stored(load({**arrays, "episode": number}, time_limit=2))
    assert [len(one.actions) for one in found] == [2, 1, 1, 2, 2]


def test_whole_numbers_become_one_hots() -> None:
    chosen = np.array([2, 0, 1, 2, 1, 0, 0, 2])
    buffer = load(own(actions=chosen), action_classes=(3,))
    assert (buffer.action_type, buffer.action_classes) == ("discrete", (3,))
    np.testing.assert_array_equal(np.concatenate([one.actions for one in stored(buffer)]), np.eye(3)[chosen])
    pairs = np.stack([chosen, 1 - chosen % 2], 1)
    several = load(own(actions=pairs), action_classes=(3, 2))
    np.testing.assert_array_equal(stored(several)[1].actions, [[0, 0, 1, 0, 1]])
    assert load(own(actions=np.eye(3)[chosen])).action_type == "discrete"
    with pytest.raises(ConfigurationError, match=r"action_classes=\(n,\)"):
        load(own(actions=chosen))


def test_actions_come_between_minus_one_and_one() -> None:
    scaled = own(actions=own()["actions"] * 3 + 1)
    assert_holds(load(scaled, action_low=-2, action_high=[4.0]), held(seen=False))
    with pytest.raises(BufferError, match=r"arrays, steps 0 to 7: actions has values .* action_low and action_high"):
        load(scaled)
    assert stored(load(scaled, clip_actions=True))[2].actions.max() == 1


def test_what_arrays_do_not_tell_is_said(caplog: pytest.LogCaptureFixture) -> None:
    arrays = own()
    load({"obs": arrays["obs"], "actions": arrays["actions"]})
    for told in ("no rewards", "which episodes terminated", "where episodes end"):
        assert told in caplog.text
    caplog.clear()
    load({name: array for name, array in arrays.items() if name != "timeouts"})
    assert "pass time_limit" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load(arrays)
    assert not caplog.records


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (own(rewards=np.zeros(7)), {}, r"rewards has shape \(7,\), and there are 8 rows"),
        (own(terminals=np.full(8, 2)), {}, "values other than 0 and 1"),
        (own(obs=np.array(["a"] * 8)), {}, "expected numbers"),
        ({name: array[:0] for name, array in own().items()}, {}, "no steps"),
        ([], {}, "no episodes"),
        (["text"], {}, "An episode is a str"),
        ({"states": np.zeros(3), "actions": np.zeros(3)}, {}, "none of the arrays obs, .* It has actions, states"),
        (own(dones=np.zeros(8)), {}, "terminals and dones"),
        (own(), {"keys": {"obs": "state"}}, "no array 'state'.* It has actions, obs"),
        (own(), {"keys": {"action": "actions"}}, "Unknown key 'action'; did you mean 'actions'"),
        (own(), {"align": "left"}, "align is 'left'"),
        (own(), {"align": "arrives", "final_row": False}, "leave final_row out"),
        (own(), {"aling": "own"}, "Unknown option 'aling' of the format 'arrays'; did you mean 'align'"),
        (own(), {"format": "array"}, "did you mean 'arrays'"),
    ],
)
def test_wrong_arrays_and_options_are_refused(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(WorldFluxError, match=message):
        load(source, **options)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "rewards",
            np.nan,
            r"step 5 \(step 1 of episode 2\): rewards has nan, expected finite numbers\. Correct it",
        ),
        ("obs", np.inf, r"step 5 \(step 1 of episode 2\): obs has inf at index 1, expected finite numbers"),
        ("obs", 1e39, r"step 5 \(step 1 of episode 2\): obs has 1e\+39 at index 1, expected at most 3\.4e\+38"),
        ("actions", -np.inf, r"step 5 \(step 1 of episode 2\): actions has -inf, expected finite"),
    ],
)
@PLACES
def test_a_number_that_cannot_be_stored_is_named_with_its_step(
    put: Put, name: str, value: float, message: str, tmp_path: Path
) -> None:
    arrays = own()
    arrays[name] = arrays[name].astype(np.float64)
    arrays[name].reshape(8, -1)[5, -1] = value
    with pytest.raises(BufferError, match=message):
        load(put(arrays, tmp_path), format="arrays")


def test_nan_after_the_last_step_is_named_with_that_step() -> None:
    episodes = by_episode(last_obs=True)
    episodes[1]["obs"][-1, 0] = np.nan
    with pytest.raises(BufferError, match=r"step 3 \(step 0 of episode 1\): obs after the last step has nan"):
        load(episodes)


def test_nan_does_not_count_as_an_episode() -> None:
    with pytest.raises(BufferError, match="episode is NaN in row 3"):
        load(own(episode=np.array([0, 0, 0, np.nan, 1, 1, 1, 1])))


def test_episodes_without_steps_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    episodes = by_episode(last_obs=True)
    empty = {"obs": observed(9, 1), "actions": acted(9, 0), "rewards": earned(9, 0), "terminated": np.zeros(0)}
    assert_holds(load([empty, episodes[0], empty, *episodes[1:]]), held(seen=True))
    assert "2 of its 5 episodes have no steps and are left out, such as 0" in caplog.text
    with pytest.raises(BufferError, match="the list of episodes has no steps"):
        load([empty])


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    for put in (in_npz, in_hdf5):
        path = put(own(), tmp_path)
        whole = path.read_bytes()
        for size in (0, 10, len(whole) // 2, len(whole) - 9):
            path.write_bytes(whole[:size])
            with pytest.raises(WorldFluxError):
                load(path, format="arrays")
    path = tmp_path / "objects.npz"
    np.savez(path, **own(actions=np.array([None] * 8)))
    with pytest.raises(BufferError, match="Objects are never unpickled"):
        load(path, format="arrays")
    with pytest.raises(FileNotFoundError, match="missing"):
        load(tmp_path / "missing.npz")


def test_hdf5_files_cannot_claim_more_than_they_store_or_point_elsewhere(tmp_path: Path) -> None:
    path = in_hdf5({name: array for name, array in own().items() if name != "obs"}, tmp_path)
    with h5py.File(path, "a") as file:
        file.create_dataset("obs", (8, 10**9), np.float32, chunks=True)
    with pytest.raises(BufferError, match="0 are stored"):
        load(path, format="arrays")
    other = tmp_path / "other"
    other.mkdir()
    with h5py.File(path, "a") as file:
        del file["obs"]
        file["obs"] = h5py.ExternalLink(str(in_hdf5(own(), other)), "obs")
    with pytest.raises(ConfigurationError, match="none of the arrays obs"):
        load(path, format="arrays")


def test_arrays_of_other_files_are_not_read_through_links_to_links(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    secret = str(in_hdf5(own(), other))
    with h5py.File(tmp_path / "linked.hdf5", "w") as file:
        file["outside"], file["array"] = h5py.ExternalLink(secret, "/"), h5py.ExternalLink(secret, "/obs")
        file["data"], file["obs"] = h5py.SoftLink("/outside"), h5py.SoftLink("/array")
        file["actions"], file["nowhere"] = np.zeros((4, 1)), h5py.SoftLink("/gone")
    with pytest.raises(ConfigurationError, match="has the arrays actions, which are those of no known format"):
        load(tmp_path / "linked.hdf5")
    for name in ("data/obs", "obs", "outside/obs", "array", "nowhere"):
        with pytest.raises(ConfigurationError, match=f"has no array '{name}'"):
            load(tmp_path / "linked.hdf5", format="arrays", keys={"obs": name})
    with pytest.raises(BufferError, match="has no groups data/demo_0"):
        load(tmp_path / "linked.hdf5", format="robomimic")


def test_groups_that_contain_themselves_are_read_once(tmp_path: Path) -> None:
    path = in_hdf5(own(), tmp_path)
    with h5py.File(path, "a") as file:
        group = file.create_group("extra")
        group["around"] = file["/"]
        for _ in range(40):  # 2**40 paths lead to the last one
            inner = group.create_group("one")
            group["two"], group = inner, inner
    assert_holds(load(path, format="arrays"), held(seen=False))
    with pytest.raises(ConfigurationError, match="those of no known format"):
        load(path)


def test_damaged_tables_of_contents_are_refused_when_the_format_is_told(tmp_path: Path) -> None:
    path = in_hdf5(own(), tmp_path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"TREE", b"EERT"))
    with pytest.raises(BufferError, match=f"{path.name} cannot be loaded"):
        load(path)
    with pytest.raises(BufferError, match="it is a directory, a pipe or a device"):
        load("/dev/null")


def test_worldflux_files_are_recognised(tmp_path: Path) -> None:
    buffer = load(own(), format="arrays", seed=3)
    buffer.save(tmp_path / "saved.npz")
    assert_holds(load(tmp_path / "saved.npz"), held(seen=False))
    with pytest.raises(ConfigurationError, match="Unknown option 'keys'"):
        load(tmp_path / "saved.npz", keys={})
    with pytest.raises(ConfigurationError, match="those of no known format"):
        load(in_npz(own(), tmp_path))


def test_many_short_episodes_all_find_room() -> None:
    n = 20_000
    arrays = {"obs": np.arange(n), "actions": np.zeros((n, 1)), "rewards": np.arange(n), "terminals": np.ones(n)}
    buffer = load(arrays)
    assert (len(buffer), buffer.num_episodes) == (n, n)


def test_data_go_to_a_directory_and_only_the_newest_stay_in_a_small_buffer(tmp_path: Path) -> None:
    buffer = load(own(), storage=tmp_path / "rows", capacity=4)
    assert buffer.storage == tmp_path / "rows"
    assert_holds(buffer, [(3, 4, "terminated", False)])


def test_a_bar_is_shown_on_demand(capfd: pytest.CaptureFixture[str]) -> None:
    load(own())
    assert capfd.readouterr().err == ""
    load(own(), progress=True)
    assert "8.00/8.00" in capfd.readouterr().err
