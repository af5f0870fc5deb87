"""DreamerV3's networks compared with the reference: encoder, recurrent core, latents, decoder, heads, acting."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.golden_dreamerv3 import KINDS, Golden, assert_matches, golden

from worldflux.models.base import State
from worldflux.models.dreamerv3.rssm import kl_losses
from worldflux.nn.conv import channel_norm
from worldflux.nn.distributions import CategoricalPolicy, NormalPolicy
from worldflux.nn.layers import BlockLinear, Linear


@pytest.fixture(params=KINDS)
def ref(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


def observed(ref: Golden, model):
    rows = ref.rows()
    embed = model.encoder({k: v.flatten(0, 1) for k, v in rows.obs.items()}).unflatten(0, rows.is_first.shape)
    return model.rssm.observe(
        ref["in/carry/deter"],
        ref["in/carry/stoch"],
        rows.prev_actions,
        embed,
        rows.is_first,
        draws=ref.classes("obs/stoch"),
    )


def test_encoder_layers_and_tokens(ref):
    model = ref.model()
    obs = {k: v.flatten(0, 1) for k, v in ref.rows().obs.items()}
    assert_matches(model.encoder(obs), ref["enc/tokens"].flatten(0, 1))
    if ref.kind == "proprio":
        x = torch.cat([model.encoder.layout.squash(k, obs[k]) for k in sorted(obs)], -1)
        for i, (linear, norm) in enumerate(zip(model.encoder.mlp.linears, model.encoder.mlp.norms, strict=True)):
            x = norm(linear(x))
            assert_matches(x, ref[f"enc/mlp{i}"])
    else:
        x = obs["image"].float() / 255 - 0.5
        for i, (conv, norm) in enumerate(zip(model.encoder.cnn.convs, model.encoder.cnn.norms, strict=True)):
            x = channel_norm(norm, F.max_pool2d(conv(x), 2))
            assert_matches(x.permute(0, 2, 3, 1), ref[f"enc/cnn{i}"])


def test_core_with_its_intermediate_values(ref):
    rssm = ref.model().rssm
    deter, stoch, actions = ref["core/deter"], ref["core/stoch"], ref.actions("core/action/action")
    assert_matches(actions, ref["core/action_vec"])
    assert_matches(rssm.core(deter, stoch, actions), ref["core/out"])
    # The input of the hidden layer is built here to check the intermediate layers.
    scaled = actions / actions.abs().clamp(min=1)
    shared = torch.cat([rssm.deter_in(deter), rssm.stoch_in(stoch.flatten(1)), rssm.action_in(scaled)], -1)
    pieces = deter.unflatten(-1, (8, -1))
    x_in = torch.cat([pieces, shared.unsqueeze(1).expand(-1, 8, -1)], -1).flatten(1)
    assert_matches(x_in, ref["core/x_in"])
    hidden = rssm.hidden_norm(rssm.hidden(x_in))
    assert_matches(hidden, ref["core/hid"])
    assert_matches(rssm.gates(hidden), ref["core/gates"])


def test_observe_scan_with_resets(ref):
    model = ref.model()
    seen = observed(ref, model)
    assert_matches(seen.deter, ref["obs/deter"])
    assert_matches(seen.stoch, ref["obs/stoch"])
    assert_matches(seen.logits, ref["obs/logit"])
    assert_matches(model.rssm.dist(seen.logits).logprobs, ref["obs/logit_unimix"])
    prior = model.rssm.prior(seen.deter)
    assert_matches(prior, ref["obs/prior_logit"])
    assert_matches(model.rssm.dist(prior).logprobs, ref["obs/prior_logit_unimix"])
    state = State({"deter": seen.deter, "stoch": seen.stoch})
    assert_matches(model.features(state), ref["obs/feat"])


def test_one_step_updates_equal_the_scan(ref):
    """`update`, which acting uses, is the same function as one step of `observe`."""
    model, rows = ref.model(), ref.rows()
    state = State({"deter": ref["in/carry/deter"], "stoch": ref["in/carry/stoch"]})
    draws = ref["obs/stoch"]
    for t in range(rows.is_first.shape[1]):
        obs = {k: v[:, t] for k, v in rows.obs.items()}
        new = model.update(state, rows.prev_actions[:, t], obs, is_first=rows.is_first[:, t])
        assert_matches(new["deter"], ref["obs/deter"][:, t])
        assert_matches(new["logits"], ref["obs/logit"][:, t])
        state = State({"deter": new["deter"], "stoch": draws[:, t]})


def test_kl_losses_and_entropies(ref):
    model = ref.model()
    posterior, prior = model.rssm.dist(ref["obs/logit"]), model.rssm.dist(ref["obs/prior_logit"])
    dynamics, representation, kl = kl_losses(posterior, prior, 1.0)
    assert_matches(kl, ref["kl/raw"])
    assert_matches(dynamics, ref["kl/dyn"])
    assert_matches(representation, ref["kl/rep"])
    assert_matches(posterior.entropy(), ref["kl/post_ent"])
    assert_matches(prior.entropy(), ref["kl/prior_ent"])


def test_imagination_with_given_actions(ref):
    model = ref.model()
    state = State({"deter": ref["img/start/deter"], "stoch": ref["img/start/stoch"]})
    actions = ref.actions("img/act/action")
    for t in range(actions.shape[1]):
        new = model.transition(state, actions[:, t])
        assert_matches(new["deter"], ref["img/deter"][:, t])
        assert_matches(new["logits"], ref["img/logit"][:, t])
        assert_matches(model.rssm.dist(new["logits"]).logprobs, ref["img/logit_unimix"][:, t])
        state = State({"deter": new["deter"], "stoch": ref["img/stoch"][:, t]})


def test_decoder_predictions_and_losses(ref):
    model = ref.model()
    B, T = ref["in/is_first"].shape
    deter, stoch = ref["obs/deter"].flatten(0, 1), ref["obs/stoch"].flatten(0, 1).flatten(1)
    predictions = model.decoder(deter, stoch)
    losses = model.decoder.losses(predictions, {k: v.flatten(0, 1) for k, v in ref.rows().obs.items()})
    for key, predicted in predictions.items():
        expected = ref[f"dec/{key}"].flatten(0, 1)
        if key == "image":
            expected = expected.movedim(-1, 1)
        elif key == "height":
            expected = expected.unsqueeze(-1)
        assert_matches(predicted, expected)
        assert_matches(losses[key].unflatten(0, (B, T)), ref[f"loss/{key}"])


def test_decoder_image_path_step_by_step():
    ref = golden("pixels")
    cnn = ref.model().decoder.cnn
    deter, stoch = ref["obs/deter"].flatten(0, 1), ref["obs/stoch"].flatten(0, 1).flatten(1)
    x = cnn.smallest_map(deter, stoch)
    assert_matches(x.permute(0, 2, 3, 1), ref["decmid/sp"])
    for i, (conv, norm) in zip((2, 1, 0), zip(cnn.convs, cnn.norms, strict=True), strict=True):
        x = channel_norm(norm, conv(x))
        assert_matches(x.permute(0, 2, 3, 1), ref[f"decmid/conv{i}"])


def test_reward_and_continue_heads(ref):
    model = ref.model()
    feat = ref["obs/feat"]
    reward = model.reward_head(feat)
    assert_matches(reward.logits, ref["rew/logits"])
    assert_matches(reward.mean, ref["rew/pred"])
    assert_matches(reward.loss(ref["in/reward"]), ref["loss/rew"])
    logit = model.continue_head(feat)
    assert_matches(logit, ref["con/logit"] if "con/logit" in ref.arrays else ref["con/logits"])
    assert_matches(torch.sigmoid(logit), ref["con/prob"])
    target = (1 - ref["in/is_terminal"].float()) * model.discount
    assert_matches(target, ref["con/target"])
    assert_matches(F.binary_cross_entropy_with_logits(logit, target, reduction="none"), ref["loss/con"])


def test_policy_distributions(ref):
    actor = ref.model().actor
    feat = ref["pol/feat"]
    assert_matches(actor.mlp(feat), ref["pol/hidden"])
    dist = actor(feat)
    if ref.kind == "proprio":
        assert isinstance(dist, NormalPolicy)
        hidden = actor.mlp(feat)
        assert_matches(actor.mean(hidden), ref["pol/raw_mean"])
        assert_matches(actor.std(hidden), ref["pol/raw_std"])
        assert_matches(dist.mean, ref["pol/mean"])
        assert_matches(dist.std, ref["pol/std"])
        assert_matches(dist.mode, ref["pol/pred"])
    else:
        assert isinstance(dist, CategoricalPolicy)
        assert_matches(actor.logits(actor.mlp(feat)), ref["pol/raw_logits"])
        assert_matches(dist.logprobs, ref["pol/logprobs"])
        assert torch.equal(dist.mode.argmax(-1), ref["pol/pred"].long())
    assert_matches(dist.log_prob(ref.actions("pol/act/action")), ref["pol/logp"])
    assert_matches(dist.entropy(), ref["pol/ent"])


def test_critic_and_slow_critic(ref):
    model = ref.model()
    for head, name in ((model.critic, "val"), (model.slow_critic, "slowval")):
        dist = head(ref["pol/feat"])
        assert_matches(dist.logits, ref[f"{name}/logits"])
        assert_matches(dist.mean, ref[f"{name}/pred"])


def test_three_acting_steps(ref):
    """Starts from the zero state and uses the recorded samples; each action is the previous action of the next step."""
    model = ref.model()
    n = ref["policy/0/is_first"].shape[0]
    state, action = model.initial_state(n), torch.zeros(n, model.config.action_dim)
    for i in range(3):
        new = model.update(state, action, ref.obs(f"policy/{i}/obs/"), is_first=ref[f"policy/{i}/is_first"].bool())
        assert_matches(new["deter"], ref[f"policy/{i}/deter"])
        state = State({"deter": new["deter"], "stoch": ref[f"policy/{i}/stoch"]})
        dist = model.actor(model.features(state))
        if ref.kind == "proprio":
            assert_matches(dist.mean, ref[f"policy/{i}/mean"])
            assert_matches(dist.std, ref[f"policy/{i}/std"])
        else:
            assert_matches(dist.logprobs, ref[f"policy/{i}/logits"].log_softmax(-1))
        action = ref.actions(f"policy/{i}/act/action")


def test_initialisation_has_the_reference_scale(ref):
    """Compares standard deviations and largest magnitudes of each tensor of a new model, in the reference's order."""
    model = type(ref.model())(ref.model().config)
    names = sorted(n for n in ref.under("p/") if n.split("/")[0] in ("con", "dec", "dyn", "enc", "pol", "rew", "val"))
    from worldflux.interop.dreamerv3 import official_to_state_dict

    # Filling every official tensor with its index shows to which of our tensors it corresponds.
    marks = official_to_state_dict({n: np.full_like(ref.arrays[f"p/{n}"], i) for i, n in enumerate(names)}, model)
    fresh = model.state_dict()
    checked = 0
    for name, mark in marks.items():
        i = int(mark.flatten()[0])
        tensor = fresh[name]
        fan_in = float(ref["init/fan_in"][i])
        expected_std, expected_max = float(ref["init/std"][i]), float(ref["init/absmax"][i])
        if expected_max == 0.0 or names[i].endswith(("bias", "scale")):
            assert float(tensor.std(unbiased=False)) == pytest.approx(expected_std, abs=1e-7), name
            assert float(tensor.abs().max()) == pytest.approx(expected_max), name
            continue
        scale = 0.01 if names[i].startswith("pol/head") else 1.0
        assert float(tensor.abs().max()) <= scale * 2.2737 / fan_in**0.5, name
        if tensor.numel() >= 256:
            assert float(tensor.std()) == pytest.approx(scale / fan_in**0.5, rel=4 / tensor.numel() ** 0.5), name
            checked += 1
    assert checked > 10


def test_block_linear_multiplies_contiguous_pieces():
    layer = BlockLinear(4, 2, blocks=2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))
        layer.bias.copy_(torch.tensor([0.5, -0.5]))
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 2.0]])
    assert torch.equal(layer(x), torch.tensor([[3.5, 6.5], [1.5, 7.5]]))


def test_output_layers_with_scale_zero_start_at_zero():
    assert torch.equal(Linear(3, 4, scale=0.0).weight, torch.zeros(4, 3))
