"""DreamerV3's transforms, returns and actor-critic losses compared with the reference implementation."""

import numpy as np
import pytest
import torch
from helpers.golden_dreamerv3 import KINDS, Golden, assert_matches, golden
from hypothesis import given
from hypothesis import strategies as st

from worldflux.models.dreamerv3.behavior import (
    ReturnNorm,
    imagination_losses,
    imagined_returns,
    replay_critic_loss,
)
from worldflux.models.dreamerv3.returns import lambda_return
from worldflux.nn.distributions import CategoricalPolicy, NormalPolicy, OneHot, TwoHot, two_hot
from worldflux.nn.transforms import symexp, symexp_bins, symlog

GAMMA = 1 - 1 / 333


@pytest.fixture(params=KINDS)
def ref(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


def test_symlog_and_symexp(ref):
    for name, function in (("symlog", symlog), ("symexp", symexp)):
        assert_matches(function(ref[f"{name}/x"]), ref[f"{name}/y"])


def test_two_hot_bins_predictions_losses_and_gradients(ref):
    bins = symexp_bins(255)
    np.testing.assert_allclose(bins.numpy(), ref.arrays["twohot/bins"], rtol=1e-5)
    logits = ref["twohot/logits"].requires_grad_()
    dist = TwoHot(logits, ref["twohot/bins"])
    target = ref["twohot/target"]
    loss = dist.loss(target)
    assert_matches(loss, ref["twohot/loss"])
    assert_matches(dist.mean, ref["twohot/pred"])
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert_matches(gradient, ref["twohot/grad"])


def test_two_hot_predictions_far_from_zero(ref):
    logits, bins = ref["twohot/wide_logits"], ref["twohot/bins"]
    magnitude = (logits.softmax(-1) * bins.abs()).sum(-1)
    error = (TwoHot(logits, bins).mean - ref["twohot/wide_pred"]).abs() / magnitude
    assert float(error.max()) < 1e-5


def test_two_hot_of_zero_logits_is_exactly_zero(ref):
    zeros = TwoHot(torch.zeros(12, 255), symexp_bins(255))
    assert torch.equal(zeros.mean, ref["twohot/zero_pred"])
    assert_matches(zeros.loss(ref["twohot/target"]), ref["twohot/zero_loss"])


def test_the_loss_of_several_targets_is_the_sum_of_their_losses(ref):
    dist, target = TwoHot(ref["twohot/logits"], ref["twohot/bins"]), ref["twohot/target"]
    other = target.flip(0)
    torch.testing.assert_close(dist.loss(target, other), dist.loss(target) + dist.loss(other))


@given(st.floats(-4.8e8, 4.8e8, width=32))
def test_two_hot_weights_reproduce_the_target(value):
    bins = symexp_bins(255)
    lower, upper, weight = two_hot(torch.tensor(value), bins)
    assert 0.0 <= float(weight) <= 1.0
    assert int(upper) - int(lower) in (0, 1)
    low, high = bins[lower].double(), bins[upper].double()
    mixed = low + (high - low) * weight.double()
    assert float(mixed) == pytest.approx(value, rel=1e-5, abs=1e-6)


@given(st.floats(-1e6, 1e6, width=32))
def test_symexp_inverts_symlog(value):
    x = torch.tensor(value, dtype=torch.float64)
    assert float(symexp(symlog(x))) == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_lambda_returns_with_terminations_and_cuts(ref):
    read = lambda name: ref[f"lambda_return/in/{name}"].float()  # noqa: E731
    gamma, lam = (float(x) for x in ref["lambda_return/disc_lam"])
    reward, boot, last, term = read("rew"), read("boot"), read("last"), read("term")
    hard = lambda_return(reward, gamma * (1 - term), lam, boot, trace=1 - last)
    assert_matches(hard, ref["lambda_return/ret"])
    soft = lambda_return(reward, 1 - ref["lambda_return/term_soft"], lam, boot)
    assert_matches(soft, ref["lambda_return/ret_soft"])


def test_lambda_return_worked_by_hand():
    """Lambda is 0.5, the discount is 0.5, and the second row terminates on arriving at its last step."""
    reward = torch.tensor([[9.0, 1.0, 2.0], [9.0, 4.0, 8.0]])
    discount = torch.tensor([[9.0, 0.5, 0.5], [9.0, 0.5, 0.0]])
    bootstrap = torch.tensor([[9.0, 2.0, 4.0], [9.0, 2.0, 4.0]])
    # Row 1: t=1: 2 + .5 * 4 = 4; t=0: 1 + .5 * (.5 * 2 + .5 * 4) = 2.5. Row 2: t=1: 8; t=0: 4 + .5 * (1 + 4) = 6.5.
    expected = torch.tensor([[2.5, 4.0], [6.5, 8.0]])
    torch.testing.assert_close(lambda_return(reward, discount, 0.5, bootstrap), expected)


def test_return_normaliser_over_six_updates(ref):
    norm = ReturnNorm(torch.zeros(()), torch.zeros(()), 1.0)
    for x, (offset, scale) in zip(ref["norm/x"], ref["norm/perc"], strict=True):
        norm = norm.update(x, 0.01)
        assert_matches(norm.low, offset)
        assert_matches(norm.scale, scale)
    fast = ReturnNorm(torch.zeros(()), torch.zeros(()), 1.0)
    for x, (offset, scale) in zip(ref["norm/x"], ref["norm/perc_fast"], strict=True):
        fast = fast.update(x, 0.3)
        assert_matches(fast.low, offset)
        assert_matches(fast.scale, scale)


def policy_of(ref: Golden, prefix: str):
    if ref.kind == "proprio":
        mean, std = ref[f"{prefix}in/mean"], ref[f"{prefix}in/std"]
        # The arrays contain parameters of the distribution; the inverse gives the corresponding network outputs.
        raw_std = torch.logit((std.double() - 0.1) / 0.9) - 2.0
        raw = [torch.atanh(mean.double()).requires_grad_(), raw_std.requires_grad_()]
        return NormalPolicy(*raw), raw
    logits = ref[f"{prefix}in/logits"].requires_grad_()
    return CategoricalPolicy(logits, (logits.shape[-1],)), [logits]


@pytest.mark.parametrize("variant", ["imag_loss", "imag_loss_alt"])
def test_imagination_losses_and_their_gradients(ref, variant):
    alternative = variant == "imag_loss_alt"
    read = lambda name: ref[f"imag_loss/in/{name}"]  # noqa: E731
    bins = symexp_bins(255)
    vlogits = read("vlogits").requires_grad_()
    critic, slow = TwoHot(vlogits, bins), TwoHot(read("slogits"), bins)
    low, high = ref["imag_loss/retnorm_before"]
    norm = ReturnNorm(low, high, 1.0)
    baseline = (slow if alternative else critic).mean.detach()
    returns, weight = imagined_returns(
        read("rew"), read("con"), baseline, lam=0.95, discount=GAMMA if alternative else 1.0
    )
    if not alternative:
        norm = norm.update(returns, 0.01)
        assert_matches(torch.stack([norm.low, norm.high]), ref["imag_loss/retnorm_after"])
        assert_matches(torch.stack([norm.low, norm.scale]), ref["imag_loss/retnorm_stats_after"])
    policy, raw = policy_of(ref, "imag_loss/")
    actions = (
        ref.actions("imag_loss/in/act") if "imag_loss/in/act" in ref.arrays else ref.actions("imag_loss/in/act/action")
    )
    out = imagination_losses(
        returns=returns,
        weight=weight,
        baseline=baseline,
        critic=critic,
        slow_value=slow.mean,
        policy=policy,
        actions=actions,
        norm=norm,
        entropy_scale=3e-4,
    )
    expect = lambda name: ref[f"{variant}/{name}"]  # noqa: E731
    assert_matches(out.returns, expect("out/ret"))
    assert_matches(out.weight, expect("out/weight"))
    assert_matches(out.advantage, expect("out/adv_normed"))
    assert_matches(out.entropy, expect("out/ent"))
    assert_matches(out.actor, expect("loss/policy"))
    assert_matches(out.critic, expect("loss/value"))
    if alternative:
        return
    assert_matches(policy.log_prob(actions)[:, :-1], expect("out/logpi"))
    (out.actor.mean() + out.critic.mean()).backward()
    assert_matches(vlogits.grad, expect("grad/vlogits"))
    if ref.kind == "pixels":
        assert_matches(raw[0].grad, expect("grad/logits"))
    else:
        mean, std = ref["imag_loss/in/mean"].double(), ref["imag_loss/in/std"].double()
        share = (std - 0.1) / 0.9
        assert_matches(raw[0].grad / (1 - mean.square()), expect("grad/mean"))
        assert_matches(raw[1].grad / (0.9 * share * (1 - share)), expect("grad/std"))


def test_replay_critic_loss(ref):
    read = lambda name: ref[f"repl_loss/in/{name}"]  # noqa: E731
    bins = symexp_bins(255)
    slow = TwoHot(read("slogits"), bins).mean
    loss, targets = replay_critic_loss(
        rewards=read("rew"),
        is_terminal=read("term").float(),
        is_last=read("last").float(),
        bootstrap=read("boot"),
        critic=TwoHot(read("vlogits"), bins),
        slow_value=slow,
        discount=GAMMA,
        lam=0.95,
    )
    assert_matches(targets, ref["repl_loss/out/ret"])
    assert_matches(loss, ref["repl_loss/loss"])
    assert torch.equal((1 - read("last").float())[:, :-1] == 0, loss == 0)


def test_slow_critic_moves_two_percent_of_the_way(ref):
    from worldflux.interop.dreamerv3 import official_to_state_dict

    model = ref.model()
    model.after_step([])
    expected = official_to_state_dict(ref.under("slow/"), model)
    assert len(expected) == len(list(model.slow_critic.parameters()))
    for name, tensor in expected.items():
        assert_matches(model.state_dict()[name], tensor)


def test_unimix_keeps_every_class_possible_and_the_sum_one():
    dist = OneHot(torch.tensor([[[1000.0, 0.0, -1000.0]]]), unimix=0.03)
    torch.testing.assert_close(dist.probs, torch.tensor([[[0.98, 0.01, 0.01]]]))


def test_samples_follow_the_probabilities_and_carry_their_gradient():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, 1, 3).clone().requires_grad_()
    dist = OneHot(logits, unimix=0.0)
    sample = dist.sample()
    frequencies = sample.detach().mean((0, 1))
    torch.testing.assert_close(frequencies, torch.tensor([0.0900, 0.2447, 0.6652]), atol=0.01, rtol=0)
    (through,) = torch.autograd.grad(sample[..., 0].sum(), logits)
    (direct,) = torch.autograd.grad(OneHot(logits, unimix=0.0).probs[..., 0].sum(), logits)
    torch.testing.assert_close(through, direct)


def test_categorical_policy_of_several_softmaxes_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, np.log(3.0)]], dtype=torch.float32)
    dist = CategoricalPolicy(logits, (2, 2))
    action = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    assert float(dist.log_prob(action)) == pytest.approx(np.log(0.5 * 0.75), rel=1e-6)
    entropy = np.log(2) - 0.25 * np.log(0.25) - 0.75 * np.log(0.75)
    assert float(dist.entropy()) == pytest.approx(entropy, rel=1e-6)
    assert torch.equal(dist.mode, torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    assert torch.equal(dist.sample().sum(-1), torch.tensor([2.0]))
