"""Health metrics: values worked out by hand, faults of small models, and that measuring changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from worldflux.config import DreamerV3Config, TDMPC2Config
from worldflux.diagnostics.health import Health, check_health
from worldflux.errors import ShapeMismatchError
from worldflux.models.base import WorldModel
from worldflux.models.dreamerv3.health import DREAMERV3_THRESHOLDS, share_at_free_nats, unused_codes
from worldflux.models.dreamerv3.world_model import DreamerV3
from worldflux.models.health import (
    HealthMetric,
    Threshold,
    counted_mean,
    largest_reward,
    randomness,
    read,
    share_at_edge,
    share_constant,
    value_over_rewards,
)
from worldflux.models.tdmpc2.health import TDMPC2_THRESHOLDS, saturated_groups, steps_that_count
from worldflux.models.tdmpc2.world_model import TDMPC2
from worldflux.nn.distributions import CategoricalPolicy, NormalPolicy
from worldflux.replay.batch import Batch

DREAMERV3 = dict(deter_dim=64, hidden_dim=32, units=32, stoch_discrete=16, stoch_classes=8, cnn_depth=4, blocks=4)
DREAMERV3 |= dict(bspace=4, imagination_horizon=5)
TD = dict(latent_dim=32, hidden_dim=32, mlp_dim=32, enc_dim=32, num_channels=8, num_q_networks=3)
OBSERVATIONS: dict[str, Any] = {
    "vector": (5,),
    "pixels": (3, 48, 48),
    "dictionary": {"picture": (3, 48, 48), "speed": (2,)},
}
ACTIONS: dict[str, dict[str, Any]] = {
    "continuous": dict(action_dim=2),
    "discrete": dict(action_dim=3, action_type="discrete"),
    "several": dict(action_dim=5, action_type="multi_discrete", action_classes=(2, 3)),
}


def dreamerv3(obs: str = "vector", action: str = "continuous", **fields: Any) -> DreamerV3:
    torch.manual_seed(0)
    return DreamerV3(DreamerV3Config(**{**DREAMERV3, "obs_shape": OBSERVATIONS[obs], **ACTIONS[action], **fields}))


def tdmpc2(obs: str = "vector", action: str = "continuous", **fields: Any) -> TDMPC2:
    torch.manual_seed(0)
    return TDMPC2(TDMPC2Config(**{**TD, "obs_shape": OBSERVATIONS[obs], **ACTIONS[action], **fields}))


def observations(shape: Any, *leading: int) -> Any:
    if isinstance(shape, dict):
        return {key: observations(one, *leading) for key, one in shape.items()}
    if len(shape) == 3:
        return torch.randint(0, 256, (*leading, *shape), dtype=torch.uint8)
    return torch.randn(*leading, *shape)


def batch_for(model: WorldModel, B: int = 8, T: int = 6, **fields: Any) -> Batch:
    torch.manual_seed(1)
    c = model.config
    classes = getattr(c, "action_classes", ())
    one_hots = [nn.functional.one_hot(torch.randint(0, n, (B, T)), n).float() for n in classes]
    given = dict(
        obs=observations(c.obs_shape, B, T),
        actions=torch.cat(one_hots, -1) if one_hots else torch.rand(B, T, c.action_dim) * 2 - 1,
        rewards=torch.randn(B, T),
        terminations=torch.zeros(B, T, dtype=torch.bool),
        is_first=torch.zeros(B, T, dtype=torch.bool),
    )
    return Batch(**{**given, **fields})


def problems(model: WorldModel, batch: Batch | None = None) -> list[str]:
    return [metric.name for metric in check_health(model, batch or batch_for(model), seed=0).problems]


@torch.no_grad()
def fill(module: nn.Module, value: float) -> None:
    for parameter in module.parameters():
        parameter.fill_(value)


# Each measure by hand


def test_a_step_is_at_the_free_nats_if_neither_prior_nor_average_would_miss_its_latents_by_more():
    certain_a, certain_b, even = [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]
    # One latent of two classes: the average is even, so that a certain step tells log 2 = 0.69 nats, an even one none.
    probs = torch.tensor([[certain_a, certain_b, even, even]]).unsqueeze(2)
    counted = torch.ones(1, 4)
    low, high = torch.full((1, 4), 0.2), torch.tensor([[0.2, 0.2, 0.2, 0.8]])
    assert share_at_free_nats(low, probs, counted, 0.5) == 0.5
    assert share_at_free_nats(high, probs, counted, 0.5) == 0.25
    assert share_at_free_nats(low, probs, counted, 0.7) == 1.0
    # Of the first step and the last two, only the certain one tells more than 0.5: KL from (2/3, 1/3) = 0.41 does not.
    assert share_at_free_nats(low, probs, torch.tensor([[1.0, 0.0, 1.0, 1.0]]), 0.4) == pytest.approx(2 / 3)


def test_latents_that_say_nothing_are_at_the_free_nats_even_if_none_are_free():
    same = torch.full((2, 3, 4, 8), 1 / 8)
    assert share_at_free_nats(torch.full((2, 3), 0.05), same, torch.ones(2, 3), free_nats=0.0) == 1.0
    assert share_at_free_nats(torch.full((2, 3), 0.15), same, torch.ones(2, 3), free_nats=0.0) == 0.0


def test_a_code_is_unused_if_all_of_its_probability_comes_from_the_unimix():
    own = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]], [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]])
    probs = 0.99 * own.unsqueeze(0) + 0.01 / 4  # [1, 2, 2, 4]: three codes unused, then one; of 2 * (4 - 1) spare ones
    assert unused_codes(probs, torch.ones(1, 2), unimix=0.01) == pytest.approx(4 / 6)
    assert unused_codes(probs, torch.tensor([[1.0, 0.0]]), unimix=0.01) == pytest.approx(5 / 6)
    assert unused_codes(own.unsqueeze(0), torch.ones(1, 2), unimix=0.0) == pytest.approx(4 / 6)
    assert unused_codes(probs, torch.zeros(1, 2), unimix=0.01) == 0.0  # nothing seen, nothing said
    assert unused_codes(torch.ones(1, 2, 3, 1), torch.ones(1, 2), unimix=0.01) == 0.0  # single classes: none to spare


def test_randomness_runs_from_the_least_entropy_of_a_policy_to_the_greatest():
    assert CategoricalPolicy(torch.zeros(5), (2, 3)).entropy_range == (0.0, pytest.approx(math.log(6)))
    even = CategoricalPolicy(torch.zeros(4, 5), (2, 3))
    sure = CategoricalPolicy(torch.tensor([[99.0, 0.0, 99.0, 0.0, 0.0]]), (2, 3))
    wide, narrow = (NormalPolicy(torch.zeros(1, 2), torch.full((1, 2), raw)) for raw in (99.0, -99.0))
    for policy, expected in ((even, 1.0), (sure, 0.0), (wide, 1.0), (narrow, 0.0)):
        found = randomness(policy.entropy(), torch.ones(1), *policy.entropy_range)
        torch.testing.assert_close(found, torch.tensor(expected))
    assert randomness(torch.zeros(3), torch.ones(3), 0.0, 0.0) == 1.0  # a single action to choose from


def test_randomness_counts_used_action_dimensions_only():
    log_std = torch.tensor([[[-10.0, 0.0], [2.0, 0.0]]])
    used = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    assert randomness(log_std, used, -10.0, 2.0) == 0.5


def test_saturated_groups_are_those_with_one_number_above_99_percent():
    groups = torch.tensor([[[0.995, 0.005], [0.985, 0.015]], [[0.0, 1.0], [0.999, 0.001]]])  # [2, 2 groups, 2]
    latents = groups.flatten(1).unsqueeze(0)  # [1, 2, 4]
    assert saturated_groups(latents, torch.ones(1, 2), 2) == 0.75
    assert saturated_groups(latents, torch.tensor([[1.0, 0.0]]), 2) == 0.5


def test_constant_latents_are_those_that_are_the_same_in_all_steps():
    groups = torch.tensor([[[[0.3, 0.7], [0.5, 0.5]], [[0.3, 0.7], [0.6, 0.4]], [[0.9, 0.1], [0.5, 0.5]]]])  # 2 groups
    assert share_constant(groups, torch.ones(1, 3)) == 0.0
    assert share_constant(groups, torch.tensor([[1.0, 1.0, 0.0]])) == 0.5
    assert share_constant(groups, torch.tensor([[1.0, 0.0, 0.0]])) == 0.0  # one step cannot vary
    slightly = torch.tensor([[[[0.5, 0.5]], [[0.5 + 1e-5, 0.5 - 1e-5]]]])  # what a fresh encoder of pictures gives
    assert share_constant(slightly, torch.ones(1, 2)) == 0.0


def test_values_are_compared_with_the_largest_reward_earned_for_ever():
    targets, counted = torch.tensor([10.0, -30.0, 1e9]), torch.tensor([1.0, 1.0, 0.0])
    # Of 0.1 and 0.3 the 95th percentile is 0.29.
    torch.testing.assert_close(value_over_rewards(targets, counted, 100.0, 0.0), torch.tensor(0.29))
    torch.testing.assert_close(value_over_rewards(targets, counted, 100.0, torch.tensor(0.4)), torch.tensor(0.4))
    bounds = torch.tensor([10.0, 100.0, 1.0])  # tasks with different discounts
    torch.testing.assert_close(value_over_rewards(targets, counted, bounds, 0.0), torch.tensor(1 - 0.05 * 0.7))
    assert value_over_rewards(targets, torch.zeros(3), 100.0, 0.25) == 0.25
    assert value_over_rewards(torch.tensor([math.nan, 1.0]), torch.ones(2), 100.0, 0.0) == math.inf
    assert value_over_rewards(torch.tensor([math.inf, 1.0]), torch.tensor([0.0, 1.0]), 100.0, 0.0) == 0.01


def test_the_largest_reward_is_at_least_one():
    assert largest_reward(torch.tensor([[0.5, -3.0]])) == 3.0
    assert largest_reward(torch.tensor([[0.5, -0.1]])) == 1.0


def test_without_a_discount_a_reward_counts_for_an_episode():
    like = torch.zeros(2, 1)
    assert steps_that_count(0.75, 500, like=like).tolist() == [[4.0], [4.0]]
    assert steps_that_count(torch.tensor([[0.5], [1.0]]), 500, like=like).tolist() == [[2.0], [500.0]]


def test_targets_at_the_edge_are_in_the_last_twentieth_of_the_bins_or_beyond():
    edge = math.expm1(9.5)  # of bins that end at symlog(y) = 10
    targets = torch.tensor([0.0, 0.99 * edge, 1.01 * edge, -1e9])
    assert share_at_edge(targets, torch.ones(4), 10.0) == 0.5
    assert share_at_edge(targets, torch.tensor([1.0, 1.0, 1.0, 0.0]), 10.0) == pytest.approx(1 / 3)


def test_a_mean_of_nothing_is_zero():
    assert counted_mean(torch.ones(2, 3), torch.zeros(2, 1)) == 0.0
    assert counted_mean(torch.tensor([[1.0, 2.0], [5.0, 6.0]]), torch.tensor([[0.0], [1.0]])) == 5.5


# Health metrics and their report


def test_a_metric_is_bad_beyond_its_threshold_and_wherever_it_is_not_finite():
    above, below = Threshold(0.5, "above", "Rest."), Threshold(0.5, "below", "Move.")
    values, never_fine = (0.4, 0.5, 0.6), (math.nan, math.inf, -math.inf)
    assert [HealthMetric("x", value, above).is_bad for value in values] == [False, False, True]
    assert [HealthMetric("x", value, below).is_bad for value in values] == [True, False, False]
    assert all(HealthMetric("x", value, limit).is_bad for value in never_fine for limit in (above, below))


def test_a_report_names_every_metric_and_says_what_to_do_about_the_bad_ones():
    limits = {"pulse": Threshold(100.0, "above", "Sit down."), "breath": Threshold(0.25, "below", "Open a window.")}
    health = Health(read({"breath": torch.tensor(0.125), "pulse": torch.tensor(80)}, limits))
    assert health.metrics() == {"pulse": 80.0, "breath": 0.125}
    assert not health.is_good
    assert [metric.name for metric in health.problems] == ["breath"]
    assert str(health) == "ok  pulse 80 (bad above 100)\nBAD breath 0.125 (bad below 0.25): Open a window."


@pytest.mark.parametrize(("family", "limits"), [(DreamerV3, DREAMERV3_THRESHOLDS), (TDMPC2, TDMPC2_THRESHOLDS)])
def test_the_docstring_of_health_gives_every_metric_with_its_threshold(family, limits):
    for name, limit in limits.items():
        assert f"- `{name}`, bad {limit.bad} {limit.value:g}:" in family.health.__doc__


def test_a_module_that_is_no_world_model_has_no_metrics():
    health = check_health(nn.Linear(2, 2), batch_for(tdmpc2()), seed=0)
    assert health == Health()
    assert health.is_good
    assert health.metrics() == {}
    assert str(health) == "This model measures no health metrics."


# Healthy models


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("obs", OBSERVATIONS)
def test_a_fresh_dreamerv3_is_well(obs, action):
    health = check_health(model := dreamerv3(obs, action), batch_for(model), seed=0)
    assert list(health.metrics()) == list(DREAMERV3_THRESHOLDS)
    assert health.is_good, str(health)


@pytest.mark.parametrize(("obs", "action"), [*((obs, "continuous") for obs in OBSERVATIONS), ("vector", "several")])
def test_a_fresh_tdmpc2_is_well(obs, action):
    health = check_health(model := tdmpc2(obs, action), batch_for(model), seed=0)
    assert list(health.metrics()) == list(TDMPC2_THRESHOLDS)
    assert health.is_good, str(health)


@pytest.mark.parametrize(("logit", "expected"), [(0.0, 1.0), (99.0, 0.0)])
def test_the_randomness_of_discrete_actions_is_their_entropy(logit, expected):
    model = tdmpc2(action="discrete")
    fill(model.actor.layers[-1], 0.0)
    with torch.no_grad():
        model.actor.layers[-1].bias[0] = logit
    found = check_health(model, batch_for(model), seed=0)
    assert found.metrics()["policy_randomness"] == pytest.approx(expected, abs=1e-5)
    assert found.is_good == (expected == 1.0)


def several_tasks() -> TDMPC2:
    return tdmpc2(num_tasks=2, task_dim=4, task_action_dims=(1, 2), task_episode_lengths=(50, 1000))


def test_several_tasks_are_judged_by_their_own_discounts_and_action_dimensions():
    model = several_tasks()
    fill(model.actor.layers[-1], 0.0)
    with torch.no_grad():
        # log_std = -4 + 6 tanh(bias): the first dimension at -1, the second, which task 0 lacks, at its largest.
        model.actor.layers[-1].bias[2:] = torch.tensor([math.atanh(3 / 6), 99.0])
    data = batch_for(model, B=4, T=4, rewards=torch.ones(4, 4))
    found = {}
    for task in (0, 1):
        health = check_health(model, replace(data, extras={"task": torch.full((4, 4), task)}), seed=0)
        found[task] = health.metrics()
        assert health.is_good, str(health)
    assert found[0]["policy_randomness"] == pytest.approx(9 / 12)
    assert found[1]["policy_randomness"] == pytest.approx((9 / 12 + 1) / 2)
    # Fresh values are 0, so that the targets are the rewards: 1 of 1 / (1 - 0.95) = 20, and of 1 / (1 - 0.995) = 200.
    assert found[0]["value_over_rewards"] == pytest.approx(1 / 20)
    assert found[1]["value_over_rewards"] == pytest.approx(1 / 200)


# Unhealthy models


@torch.no_grad()
def point_at(layer: Any, index: int, size: float) -> None:
    """Makes an output layer choose one class for every input."""
    layer.weight.zero_()
    layer.bias.zero_()
    layer.bias[..., index] = size


@torch.no_grad()
def scale(module: nn.Module, factor: float) -> None:
    for parameter in module.parameters():
        parameter.mul_(factor)


def blind(model: DreamerV3) -> None:
    """The latents are the same for every observation, and far from the prior, so that nothing else is wrong."""
    fill(model.rssm.posterior_out, 0.0)
    scale(model.rssm.prior_out, 20.0)


@torch.no_grad()
def no_deviation(model: TDMPC2) -> None:
    model.actor.layers[-1].bias[2:] = -99.0


FAULTS: dict[str, tuple[Callable[[], WorldModel], Callable[[Any], Any], str]] = {
    "latents hardly depend on the observation": (
        dreamerv3,
        lambda model: [scale(head, 0.01) for head in (model.rssm.posterior_out, model.rssm.prior_out)],
        "kl_at_free_nats",
    ),
    "more free nats than latents can carry": (partial(dreamerv3, kl_free=100.0), lambda model: None, "kl_at_free_nats"),
    "latents do not depend on the observation": (dreamerv3, blind, "constant_latents"),
    # The bin lies above 333 steps of the largest reward, and far below the last bin.
    "the critic promises too much": (
        dreamerv3,
        lambda model: point_at(model.critic.out, -75, 50.0),
        "value_over_rewards",
    ),
    "the scale of returns is too large": (
        dreamerv3,
        lambda model: model.return_high.fill_(1e5),
        "value_over_rewards",
    ),
    "one continuous action": (
        dreamerv3,
        lambda model: point_at(model.actor.std, slice(None), -99.0),
        "policy_randomness",
    ),
    **{
        f"one action, {action}": (
            partial(dreamerv3, action=action),
            lambda model: point_at(model.actor.logits, slice(0, None, 3), 99.0),
            "policy_randomness",
        )
        for action in ("discrete", "several")
    },
    "one-hot groups": (tdmpc2, lambda model: scale(model.encoder, 100.0), "saturated_groups"),
    **{
        f"the encoder ignores the {obs}": (
            partial(tdmpc2, obs),
            lambda model: fill(model.encoder, 0.0),
            "constant_latents",
        )
        for obs in OBSERVATIONS
    },
    # symexp(8) = 2980; 100 steps count, and rewards are below 4.
    "the value networks promise too much": (
        tdmpc2,
        lambda model: point_at(model.target_critics.layers[-1], 90, 50.0),
        "value_over_rewards",
    ),
    "the scale of values is too large": (tdmpc2, lambda model: model.value_scale.fill_(1e4), "value_over_rewards"),
    "values are not finite": (tdmpc2, lambda model: fill(model.target_critics, math.nan), "value_over_rewards"),
    "the policy prior has its smallest deviation": (tdmpc2, no_deviation, "policy_randomness"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported_by_its_metric_alone(fault):
    build, spoil, expected = FAULTS[fault]
    spoil(model := build())
    assert problems(model) == [expected]


def test_a_good_prior_is_no_illness():
    model = dreamerv3()
    # Latents that differ between steps, and a prior that knows them: both see the state and nothing else.
    fill(model.encoder, 0.0)
    with torch.no_grad():
        model.rssm.posterior_out.weight.mul_(20.0)
    model.rssm.prior = lambda deter: model.rssm.posterior(deter, deter.new_zeros(*deter.shape[:-1], 32))
    data = batch_for(model)
    parts = model.loss_parts(data)
    assert bool((parts.kl < 1e-4).all())
    assert "kl_at_free_nats" not in problems(model, data)


@torch.no_grad()
def test_latents_that_always_take_the_same_few_classes_are_reported_as_unused_codes():
    model = dreamerv3()
    fill(model.rssm.prior_out, 0.0)
    model.rssm.posterior_out.weight.mul_(20.0)
    model.rssm.posterior_out.bias.view(16, 8)[:, 2:] = -999.0
    health = check_health(model, batch_for(model), seed=0)
    assert [metric.name for metric in health.problems] == ["unused_codes"]
    assert health.metrics()["unused_codes"] == pytest.approx(6 / 7)


def test_returns_beyond_the_last_bin_of_dreamerv3_are_reported():
    model = dreamerv3()
    point_at(model.critic.out, -1, 50.0)
    data = batch_for(model, rewards=torch.full((8, 6), 1e7))  # no more than 333 of these add up to
    assert problems(model, data) == ["values_at_edge"]
    assert "values_at_edge" in problems(model, batch_for(model, T=1))  # windows without a replayed transition


def test_rewards_too_large_for_the_bins_of_dreamerv3_are_reported_before_any_training():
    model = dreamerv3()
    assert problems(model, batch_for(model, rewards=torch.full((8, 6), 1e9))) == ["values_at_edge"]
    assert problems(model, batch_for(model, rewards=torch.full((8, 6), 1e7))) == []


def test_rewards_too_large_for_the_bins_of_tdmpc2_are_reported_before_any_training():
    model = tdmpc2()
    data = batch_for(model)
    assert problems(model, replace(data, rewards=1e6 * data.rewards)) == ["values_at_edge"]


# What is measured is what is trained on


def test_rows_that_were_never_seen_do_not_count():
    model = dreamerv3()
    data = batch_for(model)
    seen = torch.ones(8, 6, dtype=torch.bool)
    seen[:, 3:] = False
    # Where nothing was seen, prior and posterior agree up to rounding: half of the steps would lie at the free nats.
    with torch.no_grad():
        kl = model.loss_parts(replace(data, obs_mask=seen)).kl
    assert float(kl[:, 3:].abs().max()) < 1e-5 < 1e-2 < float(kl[:, :3].min())
    assert check_health(model, replace(data, obs_mask=seen), seed=0).metrics()["kl_at_free_nats"] < 0.05
    fill(model.rssm.posterior_out, 0.0)
    fill(model.rssm.prior_out, 0.0)
    assert check_health(model, replace(data, obs_mask=seen), seed=0).metrics()["kl_at_free_nats"] == 1.0


def test_stored_latents_of_the_first_row_are_the_context_as_in_training():
    model = dreamerv3()
    data = batch_for(model)
    deter = torch.randn(8, 6, 64).half()
    with_context = replace(data, extras={"deter": deter, "stoch": torch.ones(8, 6, 16, dtype=torch.uint8)})
    other = replace(with_context, extras={**with_context.extras, "deter": -deter})
    found = [check_health(model, one, seed=0).metrics()["policy_randomness"] for one in (data, with_context, other)]
    assert len(set(found)) == 3


def test_a_window_that_runs_into_another_episode_is_measured_up_to_its_end():
    model = tdmpc2()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(100.0)  # some groups are one-hot, which ones depends on the observation
    first = torch.zeros(8, 4, dtype=torch.bool)
    first[:, 2] = True
    data = batch_for(model, T=4, is_first=first)
    behind = first.cumsum(1) > 0
    moved = replace(
        data,
        obs=torch.where(behind.unsqueeze(-1), -data.obs, data.obs),
        rewards=torch.where(behind, 1e9, data.rewards),
    )
    before, after = (check_health(model, one, seed=0).metrics() for one in (data, moved))
    assert before == after
    # Behind the end something else is seen, before it always the same.
    same = replace(data, obs=torch.where(behind.unsqueeze(-1), data.obs, 1.0))
    assert check_health(model, same, seed=0).metrics()["constant_latents"] == 1.0


# Measuring changes nothing


def test_metrics_are_measured_in_evaluation_mode():
    class Modes(WorldModel):
        def __init__(self) -> None:
            super().__init__(TDMPC2Config(**TD, obs_shape=(5,), action_dim=2))
            self.layer = nn.Linear(1, 1)

        def health(self, batch: Batch) -> tuple[HealthMetric, ...]:
            return read({"training": torch.tensor(self.layer.training)}, {"training": Threshold(0.0, "above", "Stop.")})

    assert check_health(Modes().train(), batch_for(tdmpc2()), seed=0).metrics() == {"training": 0.0}


def test_a_batch_that_does_not_fit_is_refused_and_leaves_training_as_it_was():
    model = tdmpc2().train()
    data = batch_for(model, T=2)
    stream = torch.get_rng_state()
    with pytest.raises(ShapeMismatchError, match="The batch has 2 rows in each window, expected at least horizon"):
        check_health(model, data, seed=0)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize("build", [dreamerv3, tdmpc2, several_tasks])
def test_looking_leaves_random_streams_modes_weights_and_gradients_alone(build):
    model = build().train()
    model.encoder.eval()  # a part that somebody keeps out of training mode
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    data = batch_for(model, extras={"task": torch.zeros(8, 6, dtype=torch.int64)} if build is several_tasks else {})
    torch.manual_seed(5)
    stream = torch.get_rng_state()
    check_health(model, data, seed=0)
    assert torch.equal(torch.get_rng_state(), stream)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("build", [dreamerv3, tdmpc2])
def test_two_looks_give_the_same_numbers_and_another_seed_gives_others(build):
    model = build()
    if build is tdmpc2:  # fresh value networks say 0 to every action
        nn.init.normal_(model.target_critics.layers[-1].weight)
    data = batch_for(model)
    torch.manual_seed(5)
    first = check_health(model, data, seed=0).metrics()
    torch.manual_seed(6)
    assert check_health(model.train(), data, seed=0).metrics() == first
    assert check_health(model, data, seed=1).metrics() != first


def test_no_gradient_is_recorded_even_if_the_model_is_asked_directly():
    model = dreamerv3()
    assert torch.is_grad_enabled()
    recorded: list[Tensor] = []
    model.critic.out.register_forward_hook(lambda module, args, logits: recorded.append(logits))
    assert model.health(batch_for(model))[0].name == "kl_at_free_nats"
    assert recorded
    assert not any(logits.requires_grad for logits in recorded)
