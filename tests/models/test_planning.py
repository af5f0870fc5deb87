"""The planner on problems with known optima, for several rows, over several steps, and in DreamerV3's latent space."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.points import PLACES, MaskedPointModel, PointModel, points
from torch import Tensor, nn

from worldflux.config import DreamerV3Config, PlannerConfig, TDMPC2Config, WorldModelConfig
from worldflux.errors import ConfigurationError, ShapeMismatchError
from worldflux.models.base import State, Trajectory, WorldModel
from worldflux.models.dreamerv3.world_model import DreamerV3
from worldflux.models.mppi import discounted_rewards
from worldflux.models.planning import PlanDraws, Planner, PlanTrace

SMALL = dict(num_samples=64, num_elites=8, num_pi_trajs=4)


def planner(model: WorldModel | None = None, **fields) -> Planner:
    return Planner(model or PointModel(), PlannerConfig(**{**SMALL, **fields}))


# Results of the search


METHODS = pytest.mark.parametrize("temperature", [0.5, None], ids=["mppi", "cem"])


@METHODS
@pytest.mark.parametrize("deterministic", [True, False])
def test_the_best_action_of_a_quadratic_problem_is_found(deterministic, temperature):
    """Uses the paper's settings with twice the iterations, so that the standard deviation becomes small."""
    model = PointModel()
    search = Planner(model, PlannerConfig(iterations=12, min_std=0.01, temperature=temperature))

    actions, mean = search.plan(PLACES, search.start(4), deterministic=deterministic)

    torch.testing.assert_close(mean[:, 0], model.best_action(PLACES), atol=0.02, rtol=0.0)
    torch.testing.assert_close(actions, model.best_action(PLACES), atol=0.05, rtol=0.0)


def test_more_iterations_come_closer_to_the_optimum():
    model = PointModel()

    def error(iterations: int) -> float:
        search = Planner(model, PlannerConfig(iterations=iterations, min_std=0.01))
        _, mean = search.plan(PLACES, search.start(4), deterministic=True)
        return float((mean[:, 0] - model.best_action(PLACES)).detach().abs().max())

    errors = [error(iterations) for iterations in (1, 6, 12)]

    assert errors[0] > 1.5 * errors[1] > 3.0 * errors[2]


def test_a_good_policy_is_followed_where_sampling_alone_fails():
    model = PointModel()
    model.policy = lambda state, deterministic=False: model.best_action(state)

    def found(num_pi_trajs: int) -> Tensor:
        search = planner(model, num_samples=8, num_elites=2, num_pi_trajs=num_pi_trajs, iterations=1, temperature=9.0)
        return search.plan(PLACES, search.start(4), deterministic=True)[0]

    torch.testing.assert_close(found(2), model.best_action(PLACES))
    assert (found(0) - model.best_action(PLACES)).abs().max() > 0.2


def test_sequences_are_valued_by_hand():
    # Two sequences of two steps; the second one's episode ends with probability 3/4 after the first step.
    rewards = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    continues = torch.tensor([[1.0, 0.25], [0.5, 1.0]])

    earned, weight = discounted_rewards(rewards, continues, discount=0.5)

    # 1 + 0.5 * 2 + 0.25 * 0.5 * 10 and 1 + 0.5 * 0.25 * 2 + 0.25 * 0.25 * 10
    torch.testing.assert_close(earned + weight * 10.0, torch.tensor([3.25, 1.875]))
    earned, weight = discounted_rewards(rewards, None, discount=0.5)
    assert torch.equal(earned, torch.tensor([2.0, 2.0])) and torch.equal(weight, torch.tensor([0.25, 0.25]))


def test_the_discount_of_the_configuration_replaces_the_models_own():
    first = {}
    for discount in (None, 0.5):
        traces: list[PlanTrace] = []
        search = planner(discount=discount, horizon=2)
        search.plan(PLACES, search.start(4), deterministic=True, trace=traces.append)
        first[discount] = traces[0].values[2]

    # Far from the goal all terms are negative, so a smaller weight of the later ones raises the value.
    assert (first[0.5] > first[None]).all()


# Fitting the distribution


def one_iteration(model: WorldModel, draws: PlanDraws, previous: Tensor, state: State, **fields):
    traces: list[PlanTrace] = []
    search = planner(model, iterations=len(draws.actions), num_pi_trajs=0, **fields)
    actions, mean = search.plan(state, previous, draws=draws, trace=traces.append)
    return actions, mean, traces


@pytest.mark.parametrize(("gumbel", "chosen"), [(0.1, 0.3), (0.2, -0.1)])
def test_one_iteration_worked_by_hand(gumbel, chosen):
    """Plans one row and one step; only one action dimension matters, with reward and value -(a - 0.3)^2 each."""
    model = PointModel()
    model.discount = 1.0
    # Candidates 0.3, -0.1, 1 (clipped from 2) and -1; the second dimension is optimal in all of them.
    noise = torch.tensor([[0.3, -0.6], [-0.1, -0.6], [2.0, -0.6], [-1.0, -0.6]]) / 2.0
    draws = PlanDraws(
        policy=torch.zeros(1, 1, 0, 2),
        actions=noise.reshape(1, 1, 1, 4, 2),
        gumbel=torch.tensor([[0.0, gumbel]]),
        final=torch.tensor([[1.0, -1.0]]),
    )
    start = torch.zeros(1, 1, 2)

    actions, mean, [trace] = one_iteration(
        model, draws, start, points((0.0, 0.0)), horizon=1, num_samples=4, num_elites=2, temperature=0.5, max_std=2.0
    )

    # The elites are the first two, with values 0 and -0.32: weights softmax(0, -0.16) = 0.539915, 0.460085.
    torch.testing.assert_close(trace.values[0], torch.tensor([0.0, -0.32, -0.98, -3.38]))
    assert trace.elites.tolist() == [[0, 1]]
    torch.testing.assert_close(trace.weights, torch.tensor([[0.539915, 0.460085]]))
    torch.testing.assert_close(mean[0, 0], torch.tensor([0.115966, -0.6]))
    torch.testing.assert_close(trace.std[0, 0], torch.tensor([0.199362, 0.05]))
    # The log weights differ by 0.16, so the Gumbel noise decides; noise with the final standard deviation is added.
    torch.testing.assert_close(actions, torch.tensor([[chosen + 0.199362, -0.65]]))


def test_an_iteration_of_cem_worked_by_hand():
    """The elites' plain mean and standard deviation, of the same candidates as above."""
    model = PointModel()
    model.discount = 1.0
    noise = torch.tensor([[0.3, -0.6], [-0.1, -0.6], [2.0, -0.6], [-1.0, -0.6]]) / 2.0
    draws = PlanDraws(torch.zeros(1, 1, 0, 2), noise.reshape(1, 1, 1, 4, 2), torch.tensor([[0.0, 0.1, 0.0]]), None)
    previous, sizes = torch.zeros(1, 1, 2), dict(horizon=1, num_samples=4, num_elites=3, temperature=None)

    actions, mean, [trace] = one_iteration(model, draws, previous, points((0.0, 0.0)), **sizes)

    # Elites 0.3, -0.1 and 1; the Gumbel noise draws the second of them.
    torch.testing.assert_close(trace.weights, torch.full((1, 3), 1.0 / 3.0))
    torch.testing.assert_close(mean[0, 0], torch.tensor([0.4, -0.6]))
    torch.testing.assert_close(trace.std[0, 0], torch.tensor([(0.62 / 3.0) ** 0.5, 0.05]))
    torch.testing.assert_close(actions, torch.tensor([[-0.1, -0.6]]))
    _, slow, [again] = one_iteration(model, draws, previous, points((0.0, 0.0)), momentum=0.25, **sizes)
    torch.testing.assert_close(slow[0, 0], torch.tensor([0.3, -0.45]))
    torch.testing.assert_close(again.std, trace.std)


def test_only_the_order_of_the_values_matters_to_cem():
    class Scaled(PointModel):
        scale = 1.0

        def rollout(self, state: State, actions: Tensor, *, deterministic: bool = False) -> Trajectory:
            found = super().rollout(state, actions)
            return Trajectory(found.states, self.scale * found.rewards, found.continues)

        def value(self, state: State) -> Tensor:
            return self.scale * super().value(state)

    def mean(scale: float, temperature: float | None) -> Tensor:
        model = Scaled()
        model.scale = scale
        search = planner(model, temperature=temperature, iterations=3)
        return search.plan(PLACES, search.start(4), deterministic=True)[1]

    torch.testing.assert_close(mean(1.0, None), mean(1000.0, None))
    assert not torch.allclose(mean(1.0, 0.5), mean(1000.0, 0.5), atol=0.01)


@METHODS
def test_momentum_keeps_a_share_of_the_old_mean_and_leaves_the_spread(temperature):
    draws = planner()._sample_draws(torch.zeros(4, 3, 2))
    draws = PlanDraws(torch.zeros(3, 1, 0, 2), draws.actions[:1], draws.gumbel, draws.final)
    previous = torch.randn(4, 3, 2).clamp(-1.0, 1.0)
    shifted = torch.cat([previous[:, 1:], torch.zeros(4, 1, 2)], 1)
    fields = dict(num_samples=60, temperature=temperature)

    _, mean, [plain] = one_iteration(PointModel(), draws, previous, PLACES, **fields)
    _, blended, [slow] = one_iteration(PointModel(), draws, previous, PLACES, momentum=0.25, **fields)

    torch.testing.assert_close(blended, 0.25 * shifted + 0.75 * mean)
    torch.testing.assert_close(slow.std, plain.std)


@METHODS
def test_values_that_are_not_numbers_count_as_zero(temperature):
    class Faulty(PointModel):
        def value(self, state: State) -> Tensor:
            value = super().value(state) + 100.0
            return torch.where(state["place"][..., 0] > 0.5, torch.nan, value)

    traces: list[PlanTrace] = []
    search = planner(Faulty(), temperature=temperature)
    actions, mean = search.plan(PLACES, search.start(4), deterministic=True, trace=traces.append)

    assert any(trace.values.isnan().any() for trace in traces)
    assert torch.isfinite(actions).all() and torch.isfinite(mean).all()
    assert all(torch.isfinite(trace.std).all() and torch.isfinite(trace.weights).all() for trace in traces)


def test_actions_are_nan_if_all_values_or_the_policys_actions_are_nan():
    class Lost(PointModel):
        lost_in = "value"

        def value(self, state: State) -> Tensor:
            at = state["place"][..., :1] > 0.5 if self.lost_in == "value" else torch.zeros(1, dtype=torch.bool)
            return torch.where(at[..., 0], torch.nan, super().value(state))

        def policy(self, state: State, deterministic: bool = False) -> Tensor:
            action = super().policy(state, deterministic)
            return action * torch.nan if self.lost_in == "policy" else action

    model = Lost()
    search = planner(model)
    places = State({"place": torch.tensor([[-0.9, 0.0], [9.0, 0.0]])})
    actions, _ = search.plan(places, search.start(2), deterministic=True)
    assert torch.isfinite(actions[0]).all() and torch.isnan(actions[1]).all()
    model.lost_in = "policy"
    actions, _ = search.plan(places, search.start(2), deterministic=True)
    assert torch.isnan(actions).all()


@pytest.mark.parametrize("temperature", [100.0, None])
def test_infinite_values_leave_the_weights_finite(temperature):
    class Exploding(PointModel):
        def value(self, state: State) -> Tensor:
            return super().value(state).div(0.0)

    search = planner(Exploding(), temperature=temperature)
    actions, mean = search.plan(PLACES, search.start(4), deterministic=True)

    assert torch.isfinite(actions).all() and torch.isfinite(mean).all()


def test_masked_dimensions_stay_zero_and_the_others_reach_the_goal():
    model = MaskedPointModel()
    traces: list[PlanTrace] = []
    search = planner(model, num_samples=512, temperature=10.0, momentum=0.1)
    previous = torch.full((4, 3, 2), 0.5)

    actions, mean = search.plan(PLACES, previous, trace=traces.append)

    assert (actions[::2, 1] == 0.0).all() and (mean[::2, :, 1] == 0.0).all()
    assert all((trace.std[::2, :, 1] == 0.0).all() for trace in traces)
    assert all((trace.std[1::2] >= 0.05).all() for trace in traces)
    torch.testing.assert_close(actions[:, 0], model.best_action(PLACES)[:, 0], atol=0.25, rtol=0.0)


# Several steps


def test_the_next_plan_is_shifted_by_one_step_and_reset_with_each_episode():
    # Without noise the only candidate is the starting mean itself.
    draws = PlanDraws(torch.zeros(3, 1, 0, 2), torch.zeros(1, 3, 2, 1, 2), torch.zeros(1, 1), None)
    previous = torch.arange(12.0).reshape(2, 3, 2) / 12.0
    search = planner(num_samples=1, num_elites=1, num_pi_trajs=0, iterations=1)

    actions, mean = search.plan(PLACES[:2], previous, is_first=torch.tensor([False, True]), draws=draws)

    torch.testing.assert_close(mean[0], torch.cat([previous[0, 1:], torch.zeros(1, 2)]))
    assert (mean[1] == 0.0).all()
    torch.testing.assert_close(actions, torch.stack([previous[0, 1], torch.zeros(2)]))


def test_a_row_that_starts_an_episode_plans_as_if_it_had_no_past():
    search = planner()
    past = torch.randn(4, 3, 2).clamp(-1.0, 1.0)
    first = torch.tensor([True, False, True, False])

    actions, mean = search.plan(PLACES, past, is_first=first, deterministic=True)
    fresh_actions, fresh_mean = search.plan(PLACES, search.start(4), deterministic=True)

    assert torch.equal(actions[first], fresh_actions[first]) and torch.equal(mean[first], fresh_mean[first])
    assert not torch.equal(mean[~first], fresh_mean[~first])


# Random numbers


@pytest.mark.parametrize("model", [PointModel(), MaskedPointModel()], ids=["contract", "own methods"])
def test_deterministic_planning_uses_no_random_numbers_and_changes_no_state(model):
    search = planner(model)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = search.plan(PLACES, search.start(4), deterministic=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    search.plan(PLACES, search.start(4))  # draws random numbers in between
    again = planner(model).plan(PLACES, search.start(4), deterministic=True)

    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_each_row_is_planned_on_its_own():
    search = planner()
    past = torch.randn(4, 3, 2).clamp(-1.0, 1.0)

    actions, mean = search.plan(PLACES, past, deterministic=True)

    for row in range(4):
        alone, alone_mean = search.plan(PLACES[row : row + 1], past[row : row + 1], deterministic=True)
        torch.testing.assert_close(alone[0], actions[row])
        torch.testing.assert_close(alone_mean[0], mean[row])
    same, _ = search.plan(points(*[(0.5, 0.5)] * 3), search.start(3), deterministic=True)
    torch.testing.assert_close(same, same[:1].expand(3, 2))


def test_ties_give_the_same_action_alone_and_in_a_batch():
    """All candidates have the same value under a new TD-MPC2, whose reward and value heads start at zero."""

    class Fresh(PointModel):
        def rollout(self, state: State, actions: Tensor, *, deterministic: bool = False) -> Trajectory:
            trajectory = super().rollout(state, actions)
            return Trajectory(trajectory.states, torch.zeros_like(trajectory.rewards), trajectory.continues)

        def value(self, state: State) -> Tensor:
            return torch.zeros_like(state["place"][..., 0])

    search = planner(Fresh())
    actions, _ = search.plan(PLACES, search.start(4), deterministic=True)
    alone, _ = search.plan(PLACES[2:3], search.start(1), deterministic=True)

    assert torch.equal(actions[2], alone[0])


def test_sampled_plans_differ_between_rows_and_follow_the_seed():
    search = planner()
    same = points((0.5, 0.5), (0.5, 0.5))
    traces: list[PlanTrace] = []
    torch.manual_seed(3)
    actions, _ = search.plan(same, search.start(2), trace=traces.append)
    torch.manual_seed(3)
    again, _ = search.plan(same, search.start(2))

    assert torch.equal(actions, again)
    assert (actions[0] != actions[1]).any()
    assert (traces[0].values[0] != traces[0].values[1]).all()
    assert actions.abs().max() <= 1.0


def test_the_deterministic_plan_has_at_least_the_value_of_the_policy():
    model = PointModel()
    traces: list[PlanTrace] = []
    search = planner(model, iterations=1)
    search.plan(PLACES, search.start(4), deterministic=True, trace=traces.append)

    # Candidate 0 is the policy without noise.
    policy, state = [], PLACES
    for _ in range(3):
        policy.append(model.policy(state, deterministic=True))
        state = model.rollout(state, policy[-1].unsqueeze(0)).states[-1]
    trajectory = model.rollout(PLACES, torch.stack(policy))
    earned, weight = discounted_rewards(trajectory.rewards, trajectory.continues, 0.9)
    value = earned + weight * model.value(trajectory.states[-1])
    torch.testing.assert_close(traces[0].values[:, 0], value)
    # The policy's other trajectories must differ from it, or they would count several times among the elites.
    assert (traces[0].values[:, 1 : SMALL["num_pi_trajs"]] != value.unsqueeze(1)).all()
    assert (traces[0].values.amax(1) >= value).all()


def test_planning_leaves_no_gradient():
    search = planner()
    actions, mean = search.plan(PLACES, search.start(4))

    assert not actions.requires_grad and not mean.requires_grad


# DreamerV3


def dreamer(**fields) -> DreamerV3:
    torch.manual_seed(0)
    small = dict(deter_dim=32, hidden_dim=16, units=16, stoch_discrete=4, stoch_classes=4, blocks=4, bins=15)
    model = DreamerV3(DreamerV3Config(**{"obs_shape": (5,), "action_dim": 2, **small, **fields}))
    for head in (model.reward_head, model.critic):
        nn.init.normal_(head.out.weight, std=0.5)  # new heads give 0 for every input
    return model.eval()


@METHODS
def test_plans_in_dreamerv3s_latents_are_worth_more_than_its_policy(temperature):
    model = dreamer()
    state = model.encode(torch.randn(3, 5), deterministic=True)
    search = planner(model, num_samples=128, temperature=temperature)

    actions, mean = search.plan(state, search.start(3), deterministic=True)

    def worth(sequence: Tensor) -> Tensor:
        trajectory = model.rollout(state, sequence, deterministic=True)
        earned, weight = discounted_rewards(trajectory.rewards, trajectory.continues, model.discount)
        return earned + weight * model.value(trajectory.states[-1])

    policy, now = [], state
    for _ in range(3):
        policy.append(model.policy(now, deterministic=True).clamp(-1.0, 1.0))
        now = model.transition(now, policy[-1], deterministic=True)
    assert actions.shape == (3, 2) and actions.abs().max() <= 1.0
    assert (worth(mean.transpose(0, 1)) > worth(torch.stack(policy))).all()
    alone, _ = search.plan(state[1:2], search.start(1), deterministic=True)
    torch.testing.assert_close(alone[0], actions[1], atol=1e-4, rtol=0.0)


def test_dreamerv3_plans_from_its_prior_with_random_draws_too():
    model = dreamer()
    state = model.encode(torch.randn(2, 5))
    search = planner(model)
    actions, mean = search.plan(state, search.start(2))
    actions, mean = search.plan(state, mean, is_first=torch.tensor([False, True]))

    assert actions.shape == (2, 2) and mean.shape == (2, 3, 2)
    assert torch.isfinite(actions).all() and actions.abs().max() <= 1.0


# Messages


def test_a_model_without_a_discount_needs_one_in_the_configuration():
    model = PointModel()
    model.__class__ = type("Endless", (PointModel,), {"discount": property(lambda self: self._missing)})

    with pytest.raises(ConfigurationError, match=r"Endless has no discount.*PlannerConfig\(discount=0.99\)"):
        planner(model)
    planner(model, discount=0.99)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(horizon=0), "horizon is 0, expected a whole number from 1"),
        (dict(iterations=2.5), "iterations is 2.5, expected a whole number from 1"),
        (dict(num_elites=65), r"num_elites is 65, expected at most num_samples \(64\)"),
        (dict(num_pi_trajs=64), r"num_pi_trajs is 64, expected below num_samples \(64\)"),
        (dict(temperature=0.0), "temperature is 0.0, expected a number above 0, or None for CEM"),
        (dict(min_std=3.0), r"min_std is 3.0, expected 0 to max_std \(2.0\)"),
        (dict(momentum=1.0), "momentum is 1.0, expected at least 0 and below 1"),
        (dict(discount=1.5), "discount is 1.5, expected above 0 and at most 1, or None"),
        (dict(horizon=True), "horizon is True, expected a whole number from 1"),
        (dict(num_pi_trajs=-1), "num_pi_trajs is -1, expected a whole number from 0"),
        (dict(momentum="0.5"), "momentum is '0.5', expected a finite number"),
        (dict(uniform_share=None), "uniform_share is None, expected a finite number"),
    ],
)
def test_impossible_settings_are_named(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        PlannerConfig(**{**SMALL, **fields})


def test_plans_and_states_of_the_wrong_shape_are_named():
    search = planner()
    with pytest.raises(ShapeMismatchError, match=r"shape \[4, 2, 2\], expected \[N, 3, 2\]"):
        search.plan(PLACES, torch.zeros(4, 2, 2))
    with pytest.raises(ShapeMismatchError, match="state has 4 rows, but the previous plan has 3"):
        search.plan(PLACES, search.start(3))
    with pytest.raises(ShapeMismatchError, match=r"is_first has shape \[1\], expected \[4\]"):
        search.plan(PLACES, search.start(4), is_first=torch.ones(1, dtype=torch.bool))


def test_a_models_configuration_sets_the_planner():
    config = WorldModelConfig(obs_shape=(2,), action_dim=38)
    assert PlannerConfig.from_model(config).iterations == 8
    assert PlannerConfig.from_model(config, iterations=3).iterations == 3
    small = WorldModelConfig(obs_shape=(2,), action_dim=2)
    assert PlannerConfig.from_model(small) == PlannerConfig()
    assert PlannerConfig.from_model(small, num_samples=16, num_elites=4).num_pi_trajs == 8
    with pytest.raises(ConfigurationError, match="Unknown field 'horizn' of PlannerConfig; did you mean 'horizon'"):
        PlannerConfig.from_model(small, horizn=2)
    assert PlannerConfig.from_model(small, horizon=np.int64(2)) == PlannerConfig(horizon=2)
    object.__setattr__(small, "momentum", 0.1)  # as TDMPC2Config has it
    assert PlannerConfig.from_model(small).momentum == 0.1
    own = TDMPC2Config(obs_shape=(2,))
    assert PlannerConfig.from_model(own).num_pi_trajs == 24
    assert PlannerConfig.from_model(own, num_samples=128).num_pi_trajs == 24
    assert PlannerConfig.from_model(own, num_samples=16, num_elites=4).num_pi_trajs == 8
    assert PlannerConfig.from_model(own, num_samples=16, num_elites=4, num_pi_trajs=12).num_pi_trajs == 12
