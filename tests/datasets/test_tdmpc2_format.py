"""Data sets of TD-MPC2, read from pickled TensorDicts without tensordict and without unpickling."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data_sets import acted, earned, observed, stored

from worldflux.datasets import detect, load
from worldflux.errors import BufferError, ConfigurationError, WorldFluxError

LENGTH = 4
"""Steps of each episode."""


def tensors(numbers: range, task: int | None = None, padding: int = 0) -> dict[str, torch.Tensor]:
    """Episodes of `LENGTH` steps: an action and its reward stand beside the observation that they led to."""
    nan = np.full((1, 1), np.nan, np.float32)
    obs = np.stack([np.pad(observed(n, LENGTH + 1), ((0, 0), (0, padding))) for n in numbers])
    actions = np.stack([np.concatenate([nan, acted(n, LENGTH)]) for n in numbers])
    rewards = np.stack([np.append(np.float32(np.nan), earned(n, LENGTH)) for n in numbers])
    found = {"obs": obs, "action": np.pad(actions, ((0, 0), (0, 0), (0, padding))), "reward": rewards}
    if task is not None:
        found["task"] = np.full(rewards.shape, task, np.int32)
    return {name: torch.from_numpy(array) for name, array in found.items()}


def module(name: str) -> ModuleType:
    return ModuleType(name)


@pytest.fixture(params=["current", "of 2023"])
def as_tensordict(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes objects that are pickled as TensorDicts of two versions are, and are gone when the files are read."""
    package, inner, utils, reductions = map(
        module, ("tensordict", "tensordict._td", "tensordict.utils", "tensordict._reductions")
    )

    class StringOnlyDict(dict):
        pass

    StringOnlyDict.__name__ = StringOnlyDict.__qualname__ = "_StringOnlyDict"

    class TensorDict:
        def __init__(self, content: dict[str, torch.Tensor]) -> None:
            old = request.param != "current"
            self._tensordict = StringOnlyDict(content) if old else content
            self._batch_size, self._device = torch.Size([2, LENGTH + 1]), torch.device("cpu") if old else None
            self._td_dim_names = None
            self._lock_id: Any = set() if old else None

        def __reduce_ex__(self, protocol: Any) -> Any:
            if request.param == "current":
                return make_td, (TensorDict, dict(self.__dict__))
            return super().__reduce_ex__(protocol)

    def make_td(kind: type, state: dict[str, Any]) -> Any:
        raise AssertionError("no code of the file runs")

    make_td.__name__ = make_td.__qualname__ = "_make_td"
    for thing, home in ((StringOnlyDict, utils), (TensorDict, inner), (make_td, reductions)):
        thing.__module__ = home.__name__
        thing.__qualname__ = thing.__name__
        setattr(home, thing.__name__, thing)
    for one in (package, inner, utils, reductions):
        monkeypatch.setitem(sys.modules, one.__name__, one)

    def write(content: dict[str, torch.Tensor], path: Path) -> Path:
        torch.save(TensorDict(content), path)
        return path

    return write


def check(buffer: Any, numbers: range) -> None:
    found = stored(buffer)
    assert [(len(one.actions), one.end) for one in found] == [(LENGTH, "truncated")] * len(numbers)
    for number, one in zip(numbers, found, strict=True):
        rows = observed(number, LENGTH + 1)
        np.testing.assert_array_equal(one.obs, rows[:-1])
        np.testing.assert_array_equal(one.final, rows[-1])
        np.testing.assert_array_equal(one.actions, acted(number, LENGTH))
        np.testing.assert_array_equal(one.rewards, earned(number, LENGTH))


def test_a_tensordict_is_read_without_its_package(
    as_tensordict: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = as_tensordict(tensors(range(1, 4)), tmp_path / "data.pt")
    for name in [name for name in sys.modules if name.startswith("tensordict")]:
        monkeypatch.delitem(sys.modules, name)
    assert detect(path) == "tdmpc2"
    check(load(path), range(1, 4))


def test_the_task_is_chosen_and_padding_left_out(
    as_tensordict: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = [tensors(range(1, 4), 5, padding=3), tensors(range(4, 6), 7, padding=3)]
    as_tensordict({name: torch.cat([one[name] for one in both]) for name in both[0]}, tmp_path / "chunk_0.pt")
    as_tensordict(tensors(range(6, 8), 5, padding=3), tmp_path / "chunk_1.pt")
    with pytest.raises(ConfigurationError, match=r"2 tasks \(5, 7\)"):
        load(tmp_path)
    check(load(tmp_path, task=7), range(4, 6))
    assert "obs has 5 numbers, of which the last 3 are zero" in caplog.text
    several = load(tmp_path, task=5)
    assert [int(one.obs[0, 0]) for one in stored(several)] == [1000, 2000, 3000, 6000, 7000]
    padded = load(tmp_path, task=7, keep_padding=True)
    assert (padded.obs_shape, padded.action_dim) == ((5,), 4)
    with pytest.raises(ConfigurationError, match="no task 6, expected 5, 7"):
        load(tmp_path, task=6)


def test_a_dict_of_tensors_is_read_with_its_terminations(tmp_path: Path) -> None:
    content = tensors(range(1, 3))
    content["terminated"] = torch.tensor([[torch.nan, 0, 0, 0, 1], [torch.nan, 0, 0, 0, 0]])
    torch.save(content, tmp_path / "data.pt")
    assert [one.end for one in stored(load(tmp_path / "data.pt"))] == ["terminated", "truncated"]


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


def test_nothing_in_a_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**tensors(range(1)), "x": Harmful()}, "data.pt")
    with pytest.raises(BufferError, match=r"posix\.mkdir|nt\.mkdir"):
        load("data.pt")
    assert not Path("harm").exists()


def test_damaged_and_unfitting_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.pt"
    torch.save(tensors(range(3)), path)
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(WorldFluxError):
            load(path, format="tdmpc2")
    good = tensors(range(3))
    nan = good["obs"].clone()
    nan[1, 2] = torch.nan
    for changes, message in (
        ({"reward": good["reward"][:, :3]}, r"expected \[episodes, rows, \.\.\.\]"),
        ({"obs": nan}, r"step 6 \(step 2 of episode 1\): obs has nan at index 0"),
        ({"action": good["action"] * 100}, "action_low and action_high"),
        ({"obs": 3}, "no tensor 'obs'"),
    ):
        torch.save({**good, **changes}, path)
        with pytest.raises(WorldFluxError, match=message):
            load(path)
    torch.save([1], path)
    with pytest.raises(BufferError, match="neither a TensorDict nor a dict"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pt", format="tdmpc2")
