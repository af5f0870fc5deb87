"""TD-MPC2's transforms, two-hot values, value scale and statistics compared with the reference implementation."""

import pytest
import torch
from helpers.golden_tdmpc2 import Golden, assert_matches, golden

from worldflux.models.tdmpc2.losses import (
    moved_scale,
    step_weights,
    termination_statistics,
    value_percentiles,
    value_range,
)
from worldflux.nn.distributions import TwoHot, two_hot
from worldflux.nn.transforms import simnorm, symexp, symlog, symlog_bins

BINS = symlog_bins(101, 10.0)


@pytest.fixture(params=["state", "episodic", "multitask"])
def ref(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


def test_symlog_symexp_and_simnorm(ref):
    assert_matches(symlog(ref["math/x"]), ref["math/symlog"])
    assert_matches(symexp(ref["math/s"]), ref["math/symexp"])
    assert_matches(simnorm(ref["math/simnorm_in"], 8), ref["math/simnorm_out"])


def test_two_hot_encoding_decoding_and_cross_entropy(ref):
    x = ref["math/x"].squeeze(-1)
    lower, upper, weight = two_hot(symlog(x), BINS)
    dense = torch.zeros(len(x), 101)
    dense.scatter_add_(1, lower.unsqueeze(1), (1 - weight).unsqueeze(1))
    dense.scatter_add_(1, upper.unsqueeze(1), weight.unsqueeze(1))
    assert_matches(dense, ref["math/two_hot"])
    dist = TwoHot(ref["math/logits"], BINS)
    assert_matches(symexp(dist.mean), ref["math/two_hot_inv"].squeeze(-1))
    assert_matches(dist.loss(symlog(x)), ref["math/soft_ce"].squeeze(-1))


def test_bins_mirror_to_the_last_bit():
    assert torch.equal(BINS, -BINS.flip(0))
    assert float(BINS[50]) == 0.0
    torch.testing.assert_close(BINS, torch.linspace(-10.0, 10.0, 101))


def test_running_value_scale(ref):
    scale = ref["scale/value"][0, 0]
    for x, percentiles, expected in zip(
        ref["scale/x"], ref["scale/percentiles"], ref["scale/value"][1:, 0], strict=True
    ):
        values, counted = x.squeeze(-1), torch.ones(len(x))
        assert_matches(value_percentiles(values, counted), percentiles.squeeze(-1))
        scale = moved_scale(scale, value_range(values, counted), 0.01)
        assert_matches(scale, expected)
    x = ref["scale/x256"].squeeze(-1)
    assert_matches(value_percentiles(x, torch.ones(256)), ref["scale/percentiles256"].squeeze(-1))


def test_values_that_do_not_count_do_not_move_the_scale():
    values, counted = torch.tensor([1.0, 1e9, 3.0, -1e9]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(value_percentiles(values, counted), torch.tensor([1.1, 2.9]))
    nothing = value_range(values, torch.zeros(4))
    assert float(moved_scale(torch.tensor(7.0), nothing, 0.5)) == 7.0


def test_termination_statistics():
    ref = golden("episodic")
    for prob, terminated, rate, f1 in zip(
        ref["termstat/prob"], ref["termstat/terminated"], ref["termstat/rate"], ref["termstat/f1"], strict=True
    ):
        found = termination_statistics(prob.squeeze(-1), terminated.squeeze(-1), torch.ones(12))
        assert_matches(torch.stack(found), torch.stack([rate, f1]))


def test_statistics_with_a_mask_equal_those_of_a_smaller_batch():
    ref = golden("episodic")
    prob, terminated = ref["termstat/prob"][0, :, 0], ref["termstat/terminated"][0, :, 0]
    counted = (torch.arange(12) < 7).float()
    assert_matches(
        torch.stack(termination_statistics(prob, terminated, counted)),
        torch.stack(termination_statistics(prob[:7], terminated[:7], torch.ones(7))),
    )


def test_step_weights_give_a_weighted_mean_over_steps_that_count():
    everything = step_weights(torch.ones(2, 3), 0.5)
    torch.testing.assert_close(everything, torch.tensor([[1.0, 0.5, 0.25]]).expand(2, 3) / 6)
    part = step_weights(torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), 0.5)
    torch.testing.assert_close(part, torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.0, 0.0]]) / 3)
    assert torch.equal(step_weights(torch.zeros(2, 3), 0.5), torch.zeros(2, 3))
