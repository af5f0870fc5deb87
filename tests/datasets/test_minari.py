"""Data sets that Minari itself writes, read back row by row."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
from gymnasium import spaces
from helpers.data_sets import acted, assert_holds, earned, observed, stored
from minari.data_collector import EpisodeBuffer

from worldflux.datasets import load
from worldflux.errors import BufferError, WorldFluxError

pytestmark = pytest.mark.filterwarnings("ignore:.*is set to None:UserWarning", "ignore:env_spec is None:UserWarning")

EPISODES = {1: (3, "terminated"), 2: (1, "truncated"), 3: (4, "truncated")}
HELD = [(number, length, end, True) for number, (length, end) in EPISODES.items()]
VECTOR = spaces.Box(-1e4, 1e4, (2,), np.float32)
SYMMETRIC = spaces.Box(-2, 2, (1,), np.float32)


@pytest.fixture(autouse=True)
def _root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))


def write(
    observation: Any = VECTOR, action: Any = SYMMETRIC, obs_of: Any = observed, acts_of: Any = None, **settings: Any
) -> minari.MinariDataset:
    """A data set with the episodes above."""
    buffers = []
    for number, (length, end) in EPISODES.items():
        last = np.arange(length) == length - 1
        buffers.append(
            EpisodeBuffer(
                id=None,
                observations=obs_of(number, length + 1),
                actions=2 * acted(number, length) if acts_of is None else acts_of(number, length),
                rewards=list(earned(number, length).astype(float)),
                terminations=list(last & (end == "terminated")),
                truncations=list(last & (end == "truncated")),
                infos={"weight": np.ones((length + 1, 2))},
            )
        )
    return minari.create_dataset_from_buffers(
        "test/counting-v0", buffers, observation_space=observation, action_space=action, **settings
    )


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_a_data_set_is_read_by_id_by_path_and_as_an_object(data_format: str, tmp_path: Path) -> None:
    data_set = write(data_format=data_format)
    for source in ("test/counting-v0", tmp_path / "root/test/counting-v0", data_set):
        assert_holds(load(source), HELD)
    assert load("test/counting-v0").action_type == "continuous"


def test_some_of_the_episodes_are_read() -> None:
    assert_holds(load(write().filter_episodes(lambda episode: episode.id != 1)), [HELD[0], HELD[2]])


def test_discrete_actions_and_observations_become_one_hots() -> None:
    def chosen(number: int, length: int) -> np.ndarray:
        return np.arange(length) % 3 + 5

    buffer = load(write(spaces.Discrete(4), spaces.Discrete(3, start=5), lambda n, t: np.arange(t) % 4, chosen))
    assert (buffer.action_classes, buffer.obs_shape) == ((3,), (4,))
    last = stored(buffer)[-1]
    np.testing.assert_array_equal(last.actions, np.eye(3)[[0, 1, 2, 0]])
    np.testing.assert_array_equal(last.obs, np.eye(4))
    np.testing.assert_array_equal(last.final, np.eye(4)[0])


NESTED = spaces.Dict(
    {
        "arm": spaces.Dict({"joints": VECTOR, "grip": spaces.Discrete(2)}),
        "pair": spaces.Tuple((VECTOR, VECTOR)),
        "camera": spaces.Box(0, 255, (40, 32, 3), np.uint8),
        "mission": spaces.Text(20),
    }
)


def nested(number: int, length: int) -> dict[str, Any]:
    shade = np.broadcast_to((40 * np.arange(length))[:, None, None, None], (length, 40, 32, 3)).astype(np.uint8)
    shade[..., 2] //= 2
    rows = observed(number, length)
    return {
        "arm": {"joints": rows, "grip": np.arange(length) % 2},
        "pair": (rows + 1, rows + 2),
        "camera": shade,
        "mission": ["go"] * length,
    }


def test_nested_observations_are_flattened_and_texts_left_out() -> None:
    write(NESTED, obs_of=nested, jpeg_encoding=False)
    buffer = load("test/counting-v0")
    shapes = {"arm/joints": (2,), "arm/grip": (2,), "pair/0": (2,), "pair/1": (2,), "camera": (3, 40, 32)}
    assert buffer.obs_shape == shapes
    episode = stored(buffer)[0]
    np.testing.assert_array_equal(episode.obs["pair/1"], observed(1, 3) + 2)
    np.testing.assert_array_equal(episode.obs["arm/grip"], np.eye(2)[[0, 1, 0]])
    assert (episode.obs["camera"][2] == np.array([80, 80, 40])[:, None, None]).all()
    assert (episode.final["camera"] == np.array([120, 120, 60])[:, None, None]).all()
    assert_holds(load("test/counting-v0", obs="arm/joints"), HELD)
    some = load("test/counting-v0", obs={"joints": "arm/joints", "view": "camera"})
    assert some.obs_shape == {"joints": (2,), "view": (3, 40, 32)}


def test_compressed_pictures_are_decoded() -> None:
    write(NESTED, obs_of=nested)
    picture = stored(load("test/counting-v0", obs="camera"))[0].obs
    assert picture.dtype == np.uint8 and np.abs(picture[2] - np.array([80, 80, 40])[:, None, None]).max() <= 3


def test_actions_beyond_the_space_are_clipped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    write(acts_of=lambda n, t: np.full((t, 1), 3.0 if n == 3 else 1.0))
    actions = [one.actions.max() for one in stored(load("test/counting-v0"))]
    assert actions == [0.5, 0.5, 1.0]
    assert "4 of 8 actions were outside" in caplog.text


def test_actions_without_bounds_have_to_lie_between_minus_one_and_one() -> None:
    write(action=spaces.Box(-np.inf, np.inf, (1,), np.float32), acts_of=lambda n, t: 4 * acted(n, t))
    with pytest.raises(BufferError, match="action_low and action_high"):
        load("test/counting-v0")
    assert_holds(load("test/counting-v0", action_low=-4, action_high=4), HELD)


def test_a_data_set_that_is_not_there_says_how_to_get_it() -> None:
    with pytest.raises(FileNotFoundError, match="download=True"):
        load("D4RL/pendulum/human-v2")


def test_no_environment_is_asked_for_its_spaces(tmp_path: Path) -> None:
    write()
    path = tmp_path / "root/test/counting-v0/data/metadata.json"
    metadata = json.loads(path.read_text())
    spec = copy.deepcopy(gym.spec("CartPole-v1"))
    spec.entry_point = "os:system"
    spec.kwargs = {"command": f"touch {tmp_path}/ran"}
    metadata["env_spec"] = spec.to_json()
    del metadata["action_space"]
    path.write_text(json.dumps(metadata))
    with pytest.raises(BufferError, match="runs code"):
        load("test/counting-v0")
    assert not (tmp_path / "ran").exists()


def test_damaged_data_sets_are_refused(tmp_path: Path) -> None:
    write()
    path = tmp_path / "root/test/counting-v0/data"
    whole = (path / "main_data.hdf5").read_bytes()
    for size in (0, 100, len(whole) // 2):
        (path / "main_data.hdf5").write_bytes(whole[:size])
        with pytest.raises(WorldFluxError):
            load(path)
    (path / "main_data.hdf5").write_bytes(whole)
    metadata = json.loads((path / "metadata.json").read_text())
    for changes in ({"total_steps": 5}, {"total_episodes": 9}, {"observation_space": "{}"}, {"data_format": "x"}):
        (path / "metadata.json").write_text(json.dumps({**metadata, **changes}))
        with pytest.raises(WorldFluxError):
            load(path)
    (path / "metadata.json").write_text("[")
    with pytest.raises(WorldFluxError):
        load(path)
