"""Actions that are played back: equal to plain ones, for each number of environments."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_models import PRESETS
from tape import TapeRecorder

from worldflux import WorldModel, create_world_model
from worldflux.agents import acting as acting_module
from worldflux.agents.acting import Acting, Actor
from worldflux.envs.spaces import ActionCodec, ObservationCodec
from worldflux.models.planning import Planner, PlannerConfig
from worldflux.training.graphs import WARM_UP_CALLS

OBS = {
    "vector": spaces.Box(-1, 1, (4,), np.float32),
    "both": spaces.Dict({"camera": spaces.Box(0, 255, (3, 48, 48), np.uint8), "joints": spaces.Box(-1, 1, (4,))}),
}
CASES = [
    ("dreamerv3:tiny", "vector", False),
    ("dreamerv3:tiny", "both", False),
    ("dreamerv3:tiny", "vector", True),
    ("tdmpc2:tiny", "vector", True),
    ("tdmpc2:tiny", "vector", False),
]


def actors(preset: str, obs: str, plans: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Actor, Actor]:
    """One that acts plainly and one that plays tapes back, with equal models."""
    torch.manual_seed(0)
    sizes = {**PRESETS[preset], **({"cnn_depth": 2} if obs == "both" else {})}
    codec = ObservationCodec(OBS[obs])
    model = create_world_model(preset, obs_shape=codec.obs_shape, action_dim=2, **sizes)
    for p in model.parameters():  # heads that begin at zero would make every plan alike
        torch.nn.init.normal_(p, std=0.3)
    monkeypatch.setattr(acting_module, "CudaRecorder", TapeRecorder)
    made = []
    for captured in (False, True):
        own: WorldModel = copy.deepcopy(model)
        planner = None
        if plans:
            search = PlannerConfig(horizon=2, num_samples=16, num_elites=4, num_pi_trajs=2, iterations=2)
            planner = Planner(own, search)
        made.append(Actor(own, codec, ActionCodec(spaces.Box(-1, 1, (2,))), planner, captured=captured))
    return made[0], made[1]


def observations(actor: Actor, rows: int, count: int) -> list[Any]:
    space = actor.obs_codec.space
    space.seed(0)
    found = [[space.sample() for _ in range(rows)] for _ in range(count)]
    if isinstance(space, spaces.Dict):
        return [{key: np.stack([one[key] for one in each]) for key in space.spaces} for each in found]
    return [np.stack(each) for each in found]


def acted(actor: Actor, rows: int, deterministic: bool, count: int = 3 + 2 * WARM_UP_CALLS) -> list[Acting]:
    torch.manual_seed(1)
    acting, seen = actor.start(rows), []
    for step, obs in enumerate(observations(actor, rows, count)):
        starts = np.array([(step + row) % 4 == 0 for row in range(rows)])
        acting = actor.observe(acting, obs, starts, deterministic=deterministic)
        acting = actor.act(acting, starts, deterministic=deterministic)
        seen.append(acting)
    return seen


def assert_same(one: list[Acting], other: list[Acting]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(dict(a.state), dict(b.state))
        torch.testing.assert_close(a.actions, b.actions)
        assert (a.plan is None) == (b.plan is None)
        if a.plan is not None:
            torch.testing.assert_close(a.plan, b.plan)


def recorded(actor: Actor) -> int:
    assert actor._captures is not None
    return actor._captures.recorded


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("preset", "obs", "plans"), CASES)
def test_actions_played_back_equal_plain_ones(
    preset: str, obs: str, plans: bool, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, played = actors(preset, obs, plans, monkeypatch)
    expected = acted(plain, 3, deterministic)
    assert_same(expected, acted(played, 3, deterministic))
    assert recorded(played) == 2
    assert not torch.equal(expected[-1].actions, expected[-2].actions)
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
