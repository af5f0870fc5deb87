"""Means of two-hot distributions: rounding must not affect them, and the tolerance for it must not hide differences."""

import numpy as np
import pytest
import torch

from worldflux import create_world_model
from worldflux.nn.distributions import TwoHot
from worldflux.nn.transforms import symexp_bins, symlog_bins

BINS = symexp_bins(255)
WORTH = float(BINS[-1])  # 4.85e8


def nudged(logits: torch.Tensor, column: int, ulps: int) -> torch.Tensor:
    """Returns the logits with one column increased by a number of units in the last place."""
    moved = logits.clone()
    for _ in range(ulps):
        moved[..., column] = torch.nextafter(moved[..., column], torch.tensor(torch.inf, dtype=moved.dtype))
    return moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("column", [0, 1, 250, 254])
def test_a_pair_that_differs_by_rounding_counts_as_equal(dtype, column):
    logits = torch.full((2, 255), 3.0, dtype=dtype)
    logits[1, 127 + 9] = 12.0  # e^9 times the weight of each of the others: 8103 / (8103 + 254) of symexp(20 / 127 * 9)
    moved = nudged(logits, column, 1)
    expected = torch.tensor([0.0, (8103.08 - 1) / (8103.08 + 254) * np.expm1(180 / 127)], dtype=torch.float64)
    torch.testing.assert_close(TwoHot(moved, BINS).mean.double(), expected, rtol=1e-5, atol=0.0)
    # Without the exception, the difference would contribute more than the values themselves.
    plain = torch.softmax(moved.float().double(), -1) @ BINS.double()
    assert (plain - expected).abs()[0] > 0.1


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 1e-5), (torch.float32, 1.0), (torch.bfloat16, 0.125)])
def test_a_far_bin_that_was_trained_counts_in_full(dtype, step, sign):
    logits = torch.zeros(255, dtype=dtype)
    logits[-1 if sign > 0 else 0] = step
    # p+ = e^step / (254 + e^step) and p- = 1 / (254 + e^step)
    step = float(logits.abs().max())
    expected = sign * WORTH * np.expm1(step) / (254 + np.exp(step))
    assert float(TwoHot(logits, BINS).mean) == pytest.approx(expected, rel=1e-2 if step < 1e-3 else 1e-5)


def test_hand_worked_means_of_three_bins():
    bins = torch.tensor([-1e9, 0.0, 1e9])
    # Weights 1, 2, 1; then 1, 2, 5: (5 - 1) / 8 of the outermost bin; and the mirror image.
    weights = torch.tensor([[1.0, 2.0, 1.0], [1.0, 2.0, 5.0], [5.0, 2.0, 1.0], [1.0, 2.0, 1.0 + 1e-6]])
    mean = TwoHot(weights.log(), bins).mean
    torch.testing.assert_close(mean, torch.tensor([0.0, 5e8, -5e8, 0.0]))


@pytest.mark.parametrize("bins", [BINS, symlog_bins(101, 10.0)])
def test_random_logits_have_the_plain_mean(bins):
    logits = 2.0 * torch.randn(64, len(bins), generator=torch.Generator().manual_seed(0))
    plain = torch.softmax(logits.double(), -1) @ bins.double()
    torch.testing.assert_close(TwoHot(logits, bins).mean.double(), plain, rtol=1e-5, atol=1e-5)


def test_a_larger_logit_of_an_upper_bin_never_lowers_the_mean():
    steps = torch.cat([torch.linspace(-1e-5, 1e-5, 401), torch.linspace(-1.0, 1.0, 401)]).sort().values
    logits = torch.zeros(len(steps), 255)
    logits[:, -1] = steps
    mean = TwoHot(logits, BINS).mean
    assert (mean.diff() >= 0).all()
    assert mean[0] < 0 < mean[-1] and (mean == 0).any()


def test_the_gradient_is_that_of_the_plain_mean():
    logits = torch.randn(3, 255, generator=torch.Generator().manual_seed(1))
    logits[0] = 0.5  # every pair is equal
    logits[1] = nudged(torch.full((255,), 3.0), 254, 1)  # one pair differs by rounding
    logits.requires_grad_()
    dist = TwoHot(logits, BINS)
    (gradient,) = torch.autograd.grad(dist.mean.sum(), logits)
    probs = torch.softmax(logits.detach(), -1)
    expected = probs * (BINS - dist.mean.detach()[:, None])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * WORTH / 255)
    with torch.no_grad():
        torch.testing.assert_close(TwoHot(logits, BINS).mean, dist.mean.detach(), rtol=1e-5, atol=1e-5)


def test_transposing_keeps_the_tolerance_for_rounding():
    logits = nudged(torch.full((2, 3, 255), 3.0, dtype=torch.bfloat16), 254, 1)
    assert torch.equal(TwoHot(logits, BINS).t().mean, torch.zeros(3, 2))


def test_autocast_does_not_round_the_mean():
    logits = torch.full((1, 255), -30.0)
    logits[0, 164] = 0.0  # symexp(20 / 127 * 37) = 338.7
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = TwoHot(logits, BINS).mean
    assert mean.dtype == torch.float32
    assert float(mean) == pytest.approx(float(BINS[164]), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_untrained_far_bins_do_not_affect_predictions(dtype):
    """Changes the last bit of one far weight in every two-hot head of DreamerV3 and TD-MPC2."""
    dreamer = create_world_model("dreamerv3:tiny", obs_shape=(4,), action_dim=2, dtype=dtype)
    for head in (dreamer.reward_head, dreamer.critic, dreamer.slow_critic):
        with torch.no_grad():
            head.out.bias.fill_(3.0)
            head.out.bias[-1] = torch.nextafter(head.out.bias[-1], torch.tensor(4.0))
    state = dreamer.encode(torch.randn(5, 4))
    trajectory, _ = dreamer.imagine(state, 3)
    assert torch.equal(dreamer.value(state), torch.zeros(5))
    assert torch.equal(trajectory.rewards, torch.zeros(3, 5))
    assert torch.equal(dreamer._predict(dreamer.features(state))[:, 2], torch.zeros(5))
    tdmpc2 = create_world_model("tdmpc2:tiny", obs_shape=(4,), action_dim=2, dtype=dtype)
    with torch.no_grad():
        for bias in (tdmpc2.reward_head.layers[-1].bias, tdmpc2.critics.layers[-1].bias):
            bias.fill_(3.0)
            bias[..., -1] = torch.nextafter(bias[..., -1], torch.tensor(4.0))
    state = tdmpc2.encode(torch.randn(5, 4))
    assert torch.equal(tdmpc2.value(state), torch.zeros(5))
    assert torch.equal(tdmpc2.rollout(state, torch.zeros(2, 5, 2)).rewards, torch.zeros(2, 5))
