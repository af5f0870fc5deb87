"""Wrong arguments of `load`: the message names the argument, what was given and what is expected."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldflux.datasets import FORMATS, load
from worldflux.errors import ConfigurationError
from worldflux.training import ReplayBuffer


def arrays(**more: Any) -> dict[str, np.ndarray]:
    """Flat arrays of four steps."""
    return {
        "obs": np.ones((4, 2)),
        "actions": np.zeros((4, 1)),
        "rewards": np.ones(4),
        "terminals": np.eye(4)[3],
        **more,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": "obs"}, "keys is 'obs', expected a dict with the names of arrays"),
        ({"keys": ["obs"]}, "keys is ['obs'], expected a dict"),
        (
            {"keys": {"rewards": {"a": "rewards"}}},
            "keys['rewards'] is {'a': 'rewards'}, expected the name of an array, or None",
        ),
        ({"keys": {"terminations": 3}}, "keys['terminations'] is 3, expected the name of an array, or None"),
        (
            {"keys": {"obs": ["obs"]}},
            "keys['obs'] is ['obs'], expected the name of an array, or a dict of names",
        ),
        ({"keys": {"obs": {}}}, "keys['obs'] is an empty dict"),
        ({"keys": {"obs": {"a": 3}}}, "keys['obs']['a'] is 3, expected a name"),
        ({"keys": {"obs": {1: "obs"}}}, "A key of keys['obs'] is 1, expected a name"),
        ({"keys": {"actions": None}}, "keys['actions'] is None, expected a name"),
        ({"final_row": "no"}, "final_row is 'no', expected True or False"),
        ({"align": 3}, "align is '3'"),
        ({"time_limit": "3"}, "time_limit is '3', expected a whole number from 1"),
        ({"clip_actions": "no"}, "clip_actions is 'no', expected True or False"),
        ({"progress": "no"}, "progress is 'no', expected True or False"),
        ({"image_size": "no"}, "image_size is 'no', expected a number of pixels"),
        ({"format": ["arrays"]}, "format is '['arrays']'"),
        ({"action_classes": 3}, "action_classes is 3, expected a tuple of integers above 0. Write (3,)"),
        ({"action_classes": "3"}, "action_classes is '3', expected a tuple of integers above 0"),
        ({"action_low": -1}, "action_low is given without action_high"),
        ({"action_low": "a", "action_high": "b"}, "action_low is a and action_high is b, expected a number each"),
        ({"action_low": [-1] * 3, "action_high": 1}, "Actions have shape (4, 1)"),
    ],
)
def test_wrong_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        load(arrays(actions=np.array([[0], [1], [2], [0]])) if "action_classes" in options else arrays(), **options)


@pytest.mark.parametrize(
    ("format", "option"),
    [
        *((name, "obs") for name in ("minari", "lerobot", "robomimic", "dreamerv3", "dreamerv3-torch")),
        *((name, "action") for name in ("lerobot", "dreamerv3", "dreamerv3-torch")),
        *(("lerobot", name) for name in ("reward", "ends", "action_bounds")),
        *(("tdmpc2", name) for name in ("task", "keep_padding")),
        *(("arrays", name) for name in ("keys", "align", "final_row", "time_limit")),
        *(("worldflux", name) for name in ("n_envs", "sharded")),
        *(("minari", "download"), ("robomimic", "ends"), ("d4rl", "time_limit")),
    ],
)
@pytest.mark.parametrize("value", [3.5, [3], np.zeros(2)])
def test_options_are_checked_before_anything_is_read(format: str, option: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{option}(\[0\])? is "):
        load(tmp_path, format=format, **{option: value})


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "arrays"])
def test_a_dict_is_no_source_of_formats_with_files(format: str) -> None:
    expected = f"The source is a dict, which is read with format='arrays' and not with format='{format}'"
    with pytest.raises(ConfigurationError, match=expected):
        load(arrays(), format=format)


def test_what_is_no_source_is_named() -> None:
    for source, kind in ((3, "an int"), (None, "None"), (b"a", "a bytes")):
        with pytest.raises(ConfigurationError, match=f"The source is {kind}, expected a path, a replay buffer of SB3"):
            load(source)


def test_classes_of_a_buffer_are_a_tuple() -> None:
    with pytest.raises(ConfigurationError, match=r"action_classes is 3, expected a tuple .* Write \(3,\)"):
        ReplayBuffer(10, (2,), 3, action_classes=3)  # type: ignore[arg-type]
