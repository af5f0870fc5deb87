"""Objectives: what the planner maximises in place of the model's reward, on problems with known optima."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers.points import PLACES, PointModel, points
from helpers.small_models import PRESETS
from torch import Tensor

from worldflux import ConfigurationError, PlannedTrajectory, RewardPlus, State, TrainingError, create_world_model
from worldflux.config import PlannerConfig
from worldflux.errors import ShapeMismatchError
from worldflux.models.base import Trajectory, WorldModel
from worldflux.models.objective import Objective, ObjectivePlanning
from worldflux.models.planning import Planner

ELSEWHERE = torch.tensor([-0.5, 0.4])
SMALL: dict[str, Any] = dict(horizon=3, num_samples=64, num_elites=8, num_pi_trajs=4)


def planner(model: WorldModel, objective: Objective | None = None, **fields: Any) -> Planner:
    return Planner(model, PlannerConfig(**{**SMALL, **fields}), objective)


def elsewhere(trajectory: PlannedTrajectory) -> Tensor:
    return -(trajectory.states["place"] - ELSEWHERE).square().sum(-1)


def zero(trajectory: PlannedTrajectory) -> Tensor:
    return torch.zeros_like(trajectory.rewards)


def zero_in_place(trajectory: PlannedTrajectory) -> Tensor:
    found = (trajectory.rewards, trajectory.continues, trajectory.actions, *trajectory.states.values())
    for tensor in found:
        tensor.zero_()
    return trajectory.rewards


def family(preset: str, **fields: Any) -> WorldModel:
    torch.manual_seed(0)
    model = create_world_model(preset, obs_shape=(4,), action_dim=2, **{**PRESETS[preset], **fields}).eval()
    with torch.no_grad():
        for weights in model.parameters():  # heads that begin at zero would make all plans alike
            weights.add_(torch.randn_like(weights), alpha=0.3)
        if fields.get("episodic"):
            model.get_buffer("termination_seen").fill_(1.0)
    return model


MODELS = {
    "point": PointModel,
    "dreamerv3": lambda: family("dreamerv3:tiny"),
    "tdmpc2": lambda: family("tdmpc2:tiny"),
    "tdmpc2 that ends": lambda: family("tdmpc2:tiny", episodic=True),
    "tdmpc2, two tasks": lambda: family(
        "tdmpc2:tiny", num_tasks=2, task_action_dims=(2, 1), task_episode_lengths=(100, 1000), task_dim=4
    ),
}


def start(model: WorldModel) -> State:
    if isinstance(model, PointModel):
        return PLACES
    torch.manual_seed(1)
    tasks = {"task": torch.tensor([0, 1, 1, 0])} if getattr(model.config, "num_tasks", 1) > 1 else {}
    return model.encode(torch.randn(4, 4), deterministic=True, **tasks)


# What is maximised


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_objective_takes_the_place_of_the_reward(deterministic: bool) -> None:
    model = PointModel()
    search = planner(model, elsewhere, num_samples=512, num_elites=64, iterations=12, min_std=0.01)

    _, mean = search.plan(PLACES, search.start(4), deterministic=deterministic)

    best = (ELSEWHERE - PLACES["place"]).clamp(-1.0, 1.0)
    torch.testing.assert_close(mean[:, 0], best, atol=0.03, rtol=0.0)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_added_to_the_reward_changes_no_plan(name: str, deterministic: bool) -> None:
    model = MODELS[name]()
    state, search = start(model), planner(model)

    def plan() -> tuple[Tensor, Tensor]:
        torch.manual_seed(2)
        return search.plan(state, search.start(4), deterministic=deterministic)

    plain = plan()
    for function in (zero, zero_in_place):
        search.objective = RewardPlus(function)
        torch.testing.assert_close(plan(), plain, atol=1e-5, rtol=1e-5)
    search.objective = zero
    assert not torch.allclose(plan()[1], plain[1], atol=1e-3)
    search.objective = None
    assert all(torch.equal(one, other) for one, other in zip(plan(), plain, strict=True))


@pytest.mark.parametrize("temperature", [0.5, None], ids=["mppi", "cem"])
@pytest.mark.parametrize("num_samples", [64, 26], ids=["all sequences", "sampled"])
@pytest.mark.parametrize("preset", PRESETS)
def test_discrete_actions_follow_an_objective_as_well(preset: str, num_samples: int, temperature: float | None) -> None:
    torch.manual_seed(0)
    fields = dict(obs_shape=(4,), action_dim=3, action_type="discrete", action_classes=(3,))
    model = create_world_model(preset, **fields, **PRESETS[preset]).eval()
    search = planner(model, temperature=temperature, num_samples=num_samples, num_elites=4, iterations=4)
    for wanted in range(3):
        search.objective = lambda t, wanted=wanted: t.actions[..., wanted]
        actions, _ = search.plan(start(model), search.start(4), deterministic=True)
        assert torch.equal(actions, torch.eye(3)[wanted].expand(4, 3))
    search.objective = lambda t: torch.zeros_like(t.rewards).masked_fill(t.actions[..., 0] > 0, -torch.inf)
    for _ in range(3):
        actions, _ = search.plan(start(model), search.start(4))
        assert (actions[:, 1:].sum(-1) == 1.0).float().mean() >= 0.5  # exploration may take any
    actions, _ = search.plan(start(model), search.start(4), deterministic=True)
    assert (actions[:, 0] == 0.0).all()


def test_the_value_of_the_last_state_counts_only_after_the_reward() -> None:
    """One step of two candidates, whose value is worked by hand; the point model's discount is 0.9."""
    model = PointModel()
    state, actions = points((0.0, 0.0)), torch.tensor([[0.3, -0.6], [0.0, 0.0]]).reshape(1, 1, 2, 2)

    def values(objective: Objective) -> Tensor:
        scorer = ObjectivePlanning(model, planner(model)._model_scorer, objective)
        partial = scorer.partial_return(state, actions, discount=None, deterministic=True)
        return scorer.estimated_return(partial, deterministic=True).detach()[0]

    # The squared distances to the goal (0.3, -0.6) are 0 and 0.45; those to (-0.5, 0.4) are 1.64 and 0.41.
    torch.testing.assert_close(values(elsewhere), torch.tensor([-1.64, -0.41]))
    torch.testing.assert_close(values(RewardPlus(elsewhere)), torch.tensor([-1.64, -0.41 - 0.45 - 0.9 * 0.45]))


def test_later_steps_are_discounted_and_weighted_by_the_continuation() -> None:
    class Ending(PointModel):
        def rollout(self, state: State, actions: Tensor, *, deterministic: bool = False) -> Trajectory:
            found = super().rollout(state, actions)
            return Trajectory(found.states, found.rewards, torch.full_like(found.rewards, 0.5))

    model = Ending()
    scorer = ObjectivePlanning(model, planner(model)._model_scorer, lambda t: torch.ones_like(t.rewards))
    partial = scorer.partial_return(points((0.0, 0.0)), torch.zeros(3, 1, 1, 2), discount=0.8, deterministic=True)

    torch.testing.assert_close(partial.earned, torch.tensor([[1.0 + 0.4 + 0.16]]))


def test_a_trajectory_holds_what_the_model_predicts() -> None:
    model = family("tdmpc2:tiny", use_decoder=True, episodic=True)
    state, seen = start(model), []
    search = planner(model, lambda t: (seen.append(t), t.rewards)[1], iterations=1)
    search.plan(state, search.start(4), deterministic=True)

    proposals, candidates = seen
    assert proposals.actions.shape == (3, 4 * 4, 2) and candidates.actions.shape == (3, 4 * 60, 2)
    for trajectory in seen:
        rows = State({name: x.repeat_interleave(trajectory.rewards.shape[1] // 4, 0) for name, x in state.items()})
        expected = model.rollout(rows, trajectory.actions)
        torch.testing.assert_close(trajectory.states["latent"], expected.states["latent"])
        torch.testing.assert_close(trajectory.rewards, expected.rewards)
        torch.testing.assert_close(trajectory.continues, expected.continues)
        assert (trajectory.continues < 1.0).all()
        torch.testing.assert_close(trajectory.observations[2], model.decode(expected.states[2])["obs"])


def test_observations_are_decoded_only_if_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("dreamerv3:tiny")
    decode, calls = model.decode, []
    monkeypatch.setattr(model, "decode", lambda state: (calls.append(1), decode(state))[1])
    search = planner(model, zero, iterations=2)
    search.plan(start(model), search.start(4))
    assert not calls
    search.objective = lambda t: t.observations[..., 0] + t.observations[..., 1]
    search.plan(start(model), search.start(4))
    assert len(calls) == 3  # once for the policy's sequences, and once in each iteration


def test_observations_of_several_keys_keep_their_structure() -> None:
    shapes = {"camera": (3, 48, 48), "joints": (2,)}
    model = create_world_model(
        "dreamerv3:tiny", obs_shape=shapes, action_dim=2, cnn_depth=2, **PRESETS["dreamerv3:tiny"]
    ).eval()
    state, seen = model.initial_state(2), []
    search = planner(model, lambda t: (seen.append(t.observations), t.rewards)[1], num_samples=6, num_elites=2)
    search.plan(state, search.start(2))
    assert {key: tuple(x.shape) for key, x in seen[0].items()} == {
        "camera": (3, 8, 3, 48, 48), "joints": (3, 8, 2)
    }  # fmt: skip
    assert 0.0 <= seen[0]["camera"].min() and seen[0]["camera"].max() <= 1.0


def test_an_objective_is_called_without_gradient() -> None:
    model, seen = PointModel(), []
    search = planner(model, lambda t: (seen.append(torch.is_grad_enabled()), model.goal.sum() + t.rewards)[1])
    actions, mean = search.plan(PLACES, search.start(4))
    assert seen and not any(seen) and not actions.requires_grad and not mean.requires_grad


# Forbidden states


def behind_a_wall(trajectory: PlannedTrajectory) -> Tensor:
    """The goal (0.3, -0.6) of the reward lies in a region that is forbidden."""
    return trajectory.rewards.masked_fill(trajectory.states["place"][..., 0] > 0.1, -torch.inf)


@pytest.mark.parametrize("temperature", [20.0, None])
@pytest.mark.parametrize("objective", [behind_a_wall, RewardPlus(lambda t: behind_a_wall(t) - t.rewards)])
def test_forbidden_states_are_avoided(objective: Objective, temperature: float | None) -> None:
    model, state = PointModel(), points((-0.5, 0.0), (0.0, 0.5))
    search = planner(model, objective, horizon=1, num_samples=512, iterations=8, temperature=temperature)
    actions, mean = search.plan(state, search.start(2), deterministic=True)

    after = state["place"] + actions
    assert (after[:, 0] <= 0.1).all()  # what is carried out is one of the candidates
    torch.testing.assert_close(after, torch.tensor([[0.1, -0.6]] * 2), atol=0.12, rtol=0.0)
    assert torch.isfinite(mean).all()
    search.objective = None
    free, _ = search.plan(state, search.start(2), deterministic=True)
    assert ((state["place"] + free)[:, 0] > 0.1).all()


@pytest.mark.parametrize("temperature", [0.5, None])
def test_elites_that_are_forbidden_do_not_count(temperature: float | None) -> None:
    """Only 1 of 64 candidates is allowed, although 8 elites are kept."""

    def only_the_fifth(trajectory: PlannedTrajectory) -> Tensor:
        worth = torch.full_like(trajectory.rewards, -torch.inf)
        if worth.shape[1] == 60:  # the sampled candidates
            worth[:, 5] = -3.0
        return worth

    search, traces = planner(PointModel(), only_the_fifth, iterations=1, temperature=temperature), []
    actions, mean = search.plan(points((0.0, 0.0)), search.start(1), deterministic=True, trace=traces.append)

    torch.testing.assert_close(traces[0].weights[0], torch.eye(8)[0])
    torch.testing.assert_close(mean[:, 0], actions)
    assert (traces[0].std == search.config.min_std).all()


def test_where_everything_is_forbidden_the_fewest_forbidden_steps_are_taken() -> None:
    def outside(trajectory: PlannedTrajectory) -> Tensor:
        forbidden = trajectory.states["place"][..., 0] > 0.0
        return torch.zeros_like(trajectory.rewards).masked_fill(forbidden, -torch.inf)

    # From 1.5 two steps to the left leave the region at best: the first of them is forbidden in any case.
    search = planner(PointModel(), outside, num_samples=256, iterations=8)
    actions, mean = search.plan(points((1.5, 0.0), (9.0, 0.0)), search.start(2), deterministic=True)

    assert 1.5 + actions[0, 0] + mean[0, 1, 0] < 0.05
    assert torch.isfinite(actions).all() and torch.isfinite(mean).all()
    assert actions.abs().max() <= 1.0


@pytest.mark.parametrize("deterministic", [True, False])
def test_an_objective_that_forbids_everything_still_gives_valid_actions(deterministic: bool) -> None:
    search = planner(PointModel(), lambda t: torch.full_like(t.rewards, -torch.inf))
    actions, mean = search.plan(PLACES, search.start(4), deterministic=deterministic)
    assert torch.isfinite(actions).all() and actions.abs().max() <= 1.0 and torch.isfinite(mean).all()


def test_what_lies_behind_the_end_of_an_episode_is_not_forbidden() -> None:
    class Short(PointModel):
        def rollout(self, state: State, actions: Tensor, *, deterministic: bool = False) -> Trajectory:
            found = super().rollout(state, actions)
            ends = torch.ones_like(found.rewards)
            ends[1] = 0.0  # the second step ends the episode
            return Trajectory(found.states, found.rewards, ends)

    def forbidding(steps: list[int]) -> Objective:
        def objective(trajectory: PlannedTrajectory) -> Tensor:
            worth = torch.zeros_like(trajectory.rewards)
            worth[steps] = -torch.inf
            return worth

        return objective

    model, actions = Short(), torch.zeros(3, 1, 2, 2)
    for steps, expected in (([2], 0), ([1], 1), ([0, 1, 2], 2)):
        scorer = ObjectivePlanning(model, planner(model)._model_scorer, forbidding(steps))
        partial = scorer.partial_return(points((0.0, 0.0)), actions, discount=None, deterministic=True)
        assert partial.forbidden is not None and partial.forbidden.tolist() == [[expected] * 2]
        assert partial.earned.tolist() == [[0.0] * 2]


# Errors


def nan(trajectory: PlannedTrajectory) -> Tensor:
    return (trajectory.rewards - 1.0).sqrt()  # rewards are not positive


@pytest.mark.parametrize(
    ("objective", "error", "message"),
    [
        (nan, TrainingError, r"'nan' returned NaN or plus infinity for 48 of 48 steps whose predictions are finite"),
        (RewardPlus(nan), TrainingError, "'nan' returned NaN or plus infinity for 48 of 48 steps"),
        (lambda t: t.rewards + torch.inf, TrainingError, "'<lambda>' returned NaN or plus infinity"),
        (lambda t: t.states["place"], ShapeMismatchError, r"shape \[3, 16, 2\], expected \[3, 16\].*\.sum\(-1\)"),
        (lambda t: t.rewards.sum(0), ShapeMismatchError, r"returned shape \[16\], expected \[3, 16\]"),
        (lambda t: 1.0, ConfigurationError, r"returned a float, expected a tensor of shape \[3, 16\]"),
        (lambda t: t.observations[..., 0], ConfigurationError, "PointModel has no decoder. Judge trajectory.states"),
    ],
)  # fmt: skip
def test_what_an_objective_may_not_return_is_named(objective: Objective, error: type, message: str) -> None:
    search = planner(PointModel(), objective)
    with pytest.raises(error, match=message):
        search.plan(PLACES, search.start(4))


def test_an_error_in_an_objective_is_the_users_own() -> None:
    def objective(trajectory: PlannedTrajectory) -> Tensor:
        return trajectory.states["speed"]

    search = planner(PointModel(), objective)
    with pytest.raises(KeyError, match="speed"):
        search.plan(PLACES, search.start(4))


def test_predictions_that_are_not_finite_are_not_blamed_on_the_objective() -> None:
    model = PointModel()
    with torch.no_grad():
        model.goal.fill_(torch.nan)
    search = planner(model, RewardPlus(zero), num_pi_trajs=0)
    actions, _ = search.plan(PLACES, search.start(4))
    assert torch.isnan(actions).all()


@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        (family("tdmpc2:tiny"), "TDMPC2 has no decoder. Train it with model_kwargs={'use_decoder': True}"),
        (
            family("dreamerv3:tiny", representation="redundancy"),
            "DreamerV3 has no decoder. Train it with model_kwargs={'representation': 'reconstruction'}",
        ),
    ],
    ids=["tdmpc2", "dreamerv3"],
)
def test_a_model_without_a_decoder_that_could_have_one_names_the_option(model: WorldModel, remedy: str) -> None:
    search = planner(model, lambda t: t.observations[..., 0])
    with pytest.raises(ConfigurationError, match=re.escape(remedy)):
        search.plan(start(model), search.start(4))


@pytest.mark.parametrize("wrap", [lambda x: x, RewardPlus])
def test_an_objective_that_is_no_function_is_refused(wrap: Any) -> None:
    with pytest.raises(ConfigurationError, match="The objective is 3, expected a function of a PlannedTrajectory"):
        planner(PointModel(), wrap(3))
