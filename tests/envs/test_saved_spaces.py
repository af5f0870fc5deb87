"""The spaces in an agent's file are those of its environment, whatever their dtypes, starts and forms."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from helpers.sb3_families import AnySpaces

from worldflux import WorldFluxAgent
from worldflux.agents.callbacks import AgentCheckpointCallback
from worldflux.envs.spaces_json import space_from_json, space_to_json

INF = np.inf
SIGNED, UNSIGNED = ("int8", "int16", "int32", "int64"), ("uint8", "uint16", "uint32", "uint64")
FLOATS = ("float16", "float32", "float64", ">f4", "longdouble")
BOX = spaces.Box(-1, 1, (2,))


def choices() -> list[spaces.Space[Any]]:
    """Discrete, MultiDiscrete and MultiBinary spaces in every dtype and form."""
    found: list[spaces.Space[Any]] = [
        spaces.MultiBinary(n) for n in (1, 4, [1], [4], (4,), [2, 3], np.array([4]), np.array([2, 2]))
    ]
    for dtype in (*SIGNED, *UNSIGNED):
        for start in (0, 3) if dtype in UNSIGNED else (0, 3, -3):
            found.append(spaces.Discrete(5, start=start, dtype=dtype))
            found.append(spaces.MultiDiscrete([3, 2], start=[start, 0], dtype=dtype))
        found.append(spaces.MultiDiscrete([3], dtype=dtype))
        found.append(spaces.MultiDiscrete(np.array([[3, 2], [1, 4]]), dtype=dtype))
    return found


def boxes() -> list[spaces.Space[Any]]:
    """Boxes of every dtype, with bounds that are finite, infinite, or both."""
    found: list[spaces.Space[Any]] = [spaces.Box(0, 1, (3,), bool), spaces.Box(0, 1, (0,))]
    for dtype in FLOATS:
        for low, high in ((-INF, INF), (0, 1), (-INF, 3.1), (0.1, INF)):
            found += [spaces.Box(low, high, shape, dtype) for shape in ((), (1,), (2, 3))]
        found.append(spaces.Box(np.array([-INF, 0, 1.1], dtype), np.array([INF, INF, 2.3], dtype), dtype=dtype))
    for dtype in SIGNED:
        found += [spaces.Box(-INF, INF, (2,), dtype), spaces.Box(-INF, 4, (), dtype), spaces.Box(-3, 5, (2,), dtype)]
        found.append(spaces.Box(np.array([-INF, 0.0]), np.array([4.0, 5.0]), dtype=dtype))
        found.append(spaces.Box(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max) - 1, (2,), dtype))
    for dtype in UNSIGNED:
        found.append(spaces.Box(0, int(np.iinfo(dtype).max) - 1, (2,), dtype))
        found.append(spaces.Box(np.array([0, 3]), np.array([7, 9]), dtype=dtype))
    return found


def dicts() -> list[spaces.Space[Any]]:
    """Dictionaries whose keys are not in alphabetical order."""
    parts = OrderedDict(z=spaces.Discrete(2, dtype="uint8"), a=spaces.MultiBinary([4]), m=BOX)
    return [spaces.Dict(parts), spaces.Dict(OrderedDict(y=spaces.Dict(parts), b=spaces.MultiBinary(2)))]


@pytest.mark.parametrize("space", [*choices(), *boxes(), *dicts()], ids=lambda space: f"{space}-{space.dtype}")
def test_a_space_comes_back_from_json_as_it_was(space: Any) -> None:
    restored: Any = space_from_json(json.loads(json.dumps(space_to_json(space))))

    assert restored == space and space == restored
    assert (restored.shape, restored.dtype) == (space.shape, space.dtype)
    assert str(restored) == str(space)  # which shows the order of keys
    if isinstance(space, spaces.Box):
        for name in ("low", "high", "bounded_below", "bounded_above"):
            np.testing.assert_array_equal(getattr(restored, name), getattr(space, name))


@pytest.mark.parametrize(
    ("observation_space", "action_space"),
    [
        (BOX, spaces.Discrete(3, dtype=np.int32)),
        (BOX, spaces.MultiDiscrete([3, 2], start=[1, 0], dtype=np.int16)),
        (BOX, spaces.MultiBinary([2, 2])),
        (BOX, spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, 2.0]), dtype=np.float64)),
        (spaces.Discrete(5, start=2, dtype=np.int32), spaces.Discrete(2)),
        (spaces.MultiBinary([4]), spaces.Discrete(2)),
        (spaces.Dict(OrderedDict(x=spaces.Discrete(5, dtype=np.uint8), b=BOX)), spaces.Discrete(2)),
    ],
)
def test_a_run_goes_on_in_its_own_environment(tmp_path: Path, observation_space: Any, action_space: Any) -> None:
    env = AnySpaces(observation_space, action_space)
    settings: dict[str, Any] = {"buffer_size": 3000, "learning_starts": 1000, "seed": 0}
    agent = WorldFluxAgent("dreamerv3:tiny", env, **settings)
    agent.save(tmp_path / "agent.zip")
    agent.learn(20, AgentCheckpointCallback(tmp_path / "run"))

    loaded = WorldFluxAgent.load(tmp_path / "agent.zip", env=env)
    resumed = WorldFluxAgent.load(tmp_path / "run", env, resume=True)
    alone = WorldFluxAgent.load(tmp_path / "agent.zip")

    assert loaded.observation_space == alone.observation_space == observation_space
    assert alone.action_space == action_space
    action, _ = alone.predict(observation_space.sample())
    assert action.dtype == action_space.dtype and action_space.contains(action[()])
    assert resumed.learn(10, reset_num_timesteps=False).num_timesteps == 30
