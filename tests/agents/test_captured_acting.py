"""Actions that are played back equal plain ones, for each number of environments."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.captured import acted, actors, observations

from worldflux.agents.acting import Actor, Memory

CASES = [
    ("dreamerv3:tiny", "vector", False),
    ("dreamerv3:tiny", "both", False),
    ("dreamerv3:tiny", "vector", True),
    ("tdmpc2:tiny", "vector", True),
    ("tdmpc2:tiny", "vector", False),
    ("tdmpc2:tiny discrete", "vector", True),
]


def assert_same(one: list[Memory], other: list[Memory]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.tensors(), b.tensors())


def recorded(actor: Actor) -> int:
    assert actor._captures is not None
    return actor._captures.count


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("preset", "obs", "plans"), CASES)
def test_actions_played_back_equal_plain_ones(
    preset: str, obs: str, plans: bool, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, played = actors(preset, obs, plans, monkeypatch)
    expected = acted(plain, 3, deterministic)
    assert_same(expected, acted(played, 3, deterministic))
    assert recorded(played) == 2
    last, before = (torch.cat([x.flatten() for x in memory.tensors().values()]) for memory in expected[-2:])
    assert not torch.equal(last, before)
    assert_same(acted(plain, 2, deterministic), acted(played, 2, deterministic))  # another number of environments
    assert recorded(played) == 4


def test_drawn_and_likeliest_actions_are_recorded_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, played = actors("tdmpc2:tiny", "vector", True, monkeypatch)
    for deterministic in (False, True, False, True):
        assert_same(acted(plain, 2, deterministic), acted(played, 2, deterministic))
    assert recorded(played) == 4


def test_new_weights_are_acted_with_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, played = actors("dreamerv3:tiny", "vector", False, monkeypatch)
    before = acted(played, 2, True)
    for actor in (plain, played):
        with torch.no_grad():
            for p in actor.model.parameters():
                p.mul_(0.5)
    after = acted(played, 2, True, count=2)
    assert recorded(played) == 2
    assert_same(acted(plain, 2, True, count=2), after)
    assert not torch.equal(before[0].actions, after[0].actions)


def test_weights_that_moved_are_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, played = actors("dreamerv3:tiny", "vector", False, monkeypatch)
    acted(played, 2, True)
    for actor in (plain, played):
        for p in actor.model.parameters():
            p.data = 0.5 * p.data
    assert_same(acted(plain, 2, True), acted(played, 2, True))
    assert recorded(played) == 2


def test_what_was_given_is_not_overwritten_by_later_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    _, played = actors("tdmpc2:tiny", "vector", True, monkeypatch)
    seen = acted(played, 2, False)
    kept = copy.deepcopy(seen)
    acted(played, 2, False, count=2)
    assert_same(seen, kept)


def test_predict_gives_the_same_whatever_its_memory_went_through(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    for actor in actors("dreamerv3:tiny", "both", False, monkeypatch):
        torch.manual_seed(0)
        memory, actions = None, []
        for obs in observations(actor, 2, 6):
            action, memory = actor.predict(obs, memory, None, False)
            actions.append(action)
        given.append(np.stack(actions))
    np.testing.assert_allclose(given[0], given[1], rtol=1e-5, atol=1e-6)


def test_a_copy_of_an_actor_records_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    _, played = actors("dreamerv3:tiny", "vector", False, monkeypatch)
    expected = acted(played, 2, True)
    other = copy.deepcopy(played)
    assert recorded(other) == 0
    assert_same(acted(other, 2, True), expected)
    assert (recorded(other), recorded(played)) == (2, 2)
