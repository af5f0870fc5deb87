"""`worldflux envs`: the ids that ENV can be."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import gymnasium as gym
import pytest

from worldflux.cli import provenance
from worldflux.cli.main import main
from worldflux.envs.suites import ATARI_57, ATARI_100K, DMC_TASKS


def listed(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, dict[str, Any]]:
    assert main(["envs", *args, "--json"]) == 0
    return {entry["id"]: entry for entry in json.loads(capsys.readouterr().out)}


def test_everything_that_can_be_named_is_listed_with_its_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys)
    suites = Counter(name.partition("/")[0] for name in found)
    assert (suites["dmc"], suites["atari"], suites["atari100k"]) == (len(DMC_TASKS), len(ATARI_57), len(ATARI_100K))
    assert suites["dmc"] == 51
    kinds = {name: (entry["observations"], entry["actions"]) for name, entry in found.items()}
    assert kinds["CartPole-v1"] == ("vector (4)", "discrete (2)")
    assert kinds["Pendulum-v1"] == ("vector (3)", "continuous (1)")
    assert kinds["Ant-v5"] == ("vector", "continuous")  # not made, only known
    assert kinds["atari/pong"] == ("image", "discrete")
    assert kinds["Blackjack-v1"][0] == "Tuple, which worldflux does not support"
    assert not {"CartPole-v0", "Ant-v4", "Ant-v2"} & set(found)
    gym_ids = {entry["gymnasium_id"] for entry in found.values()}
    assert gym_ids <= set(gym.registry) and len(gym_ids) == len(found)


def test_a_pattern_narrows_the_list_and_shows_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys, "WALKER-w")
    assert list(found) == ["dmc/walker-walk"]
    assert found["dmc/walker-walk"]["observations"] == "vector (24), or image with --pixels"
    assert found["dmc/walker-walk"]["actions"] == "continuous (6)"
    assert list(listed(capsys, "dmc/*-hop")) == ["dmc/hopper-hop"]
    assert list(listed(capsys, "worldflux/dmc-walker-r")) == ["dmc/walker-run"]  # the id that Gymnasium knows
    assert {"CartPole-v0", "CartPole-v1"} <= set(listed(capsys, "cartpole-v", "--all-versions"))


def test_the_list_for_people_is_grouped_and_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["envs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("DeepMind Control (51); observations: vector, or image with --pixels; actions: continuous")
    names = [line.split() for line in lines[start + 1 : start + 27]]
    assert names[0] == ["dmc/acrobot-swingup", "dmc/humanoid-run-pure-state"]
    assert all(len(line) <= 60 for line in lines[start + 1 : start + 27])
    assert "  CartPole-v1               vector (4)  discrete (2)" in lines
    assert lines[-1] == (
        "ENV can also be a class or function of your own: package.module:MyEnv or folder/file.py:MyEnv."
    )


def test_a_pattern_without_a_match_names_what_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    for pattern, near in (("dmc/wlaker-run", "dmc/walker-run"), ("cartpol3-v1", "CartPole-v1"), ("pnog", "atari/pong")):
        assert main(["envs", pattern]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"worldflux: No environment matches '{pattern}'; did you mean ")
        assert near in err.partition("?")[0].replace(",", "").split()
    assert main(["envs", "0123456789"]) == 2
    assert "No environment matches '0123456789'. ENV can also be a class" in capsys.readouterr().err


def test_a_suite_that_is_not_installed_names_its_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = provenance.installed_version
    monkeypatch.setattr(provenance, "installed_version", lambda name: None if name == "dm-control" else installed(name))
    assert listed(capsys, "dmc/hopper-hop")["dmc/hopper-hop"]["needs"].endswith('[dmc]"')
    assert main(["envs", "dmc/*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "cannot be made here: pip install" in lines[1] and "[dmc]" in lines[1]


def test_an_environment_that_cannot_be_made_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Any:
        raise RuntimeError("no such\nlicence")

    gym.register("Locked-v3", entry_point=broken)
    try:
        assert listed(capsys, "locked")["Locked-v3"]["needs"] == "no such licence"
        assert listed(capsys)["Locked-v3"]["needs"] is None  # not made with all the others
    finally:
        del gym.registry["Locked-v3"]
