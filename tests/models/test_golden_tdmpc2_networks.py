"""TD-MPC2's networks compared with the reference: each network, values of action sequences, initial weights."""

import numpy as np
import pytest
import torch
from helpers.golden_tdmpc2 import KINDS, TOLERANCE, Golden, assert_matches, golden, model
from helpers.small_models import value_of_sequences
from torch import Tensor

from worldflux.config import TDMPC2Config
from worldflux.interop.tdmpc2 import official_to_state_dict
from worldflux.models.base import State
from worldflux.models.tdmpc2.encoder import shifted
from worldflux.models.tdmpc2.policy import squashed_normal
from worldflux.models.tdmpc2.world_model import TDMPC2
from worldflux.nn.distributions import TwoHot


@pytest.fixture(params=KINDS)
def ref(request: pytest.FixtureRequest) -> Golden:
    return golden(request.param)


def tasks_of(ref: Golden, steps: int) -> Tensor | None:
    return None if ref.task is None else ref.task.expand(steps, -1)


def check(ref: Golden, actual: Tensor, name: str, index: tuple[slice | int, ...] = ()) -> None:
    expected = ref[name][index]
    if expected.shape[-1] == 1 and expected.ndim == actual.ndim + 1:
        expected = expected.squeeze(-1)
    assert_matches(actual, expected, TOLERANCE[ref.kind])


def test_encoder(ref):
    net, obs = model(ref.kind), ref["in/obs"]
    shift = ref["fwd/shift"] if "fwd/shift" in ref else None
    for t in range(len(obs)):
        state = net.encode(obs[t], task=0 if ref.task is None else ref.task, shift=None if shift is None else shift[t])
        check(ref, state["latent"], "fwd/z", (t,))


def test_image_shift_and_convolutions():
    ref = golden("pixels")
    image = shifted(ref["in/obs"][0, :1], ref["fwd/shift"][0, :1]).float()
    assert_matches(image, ref["fwd/aug_0"], 2e-4)
    x = image / 255.0 - 0.5
    convs = model("pixels").encoder.parts[0].convs
    for index, conv in enumerate(convs):
        x = conv(x) if index == len(convs) - 1 else torch.relu(conv(x))
    assert_matches(x, ref["fwd/conv_0"], 2e-4)


def test_dynamics_and_latent_rollout(ref):
    net = model(ref.kind)
    start, actions = ref.state(ref["fwd/z"][0]), ref["in/action"]
    check(ref, net.transition(start, actions[0])["latent"], "fwd/next_z0_a0")
    trajectory = net.rollout(start, actions)
    latents = torch.cat([start["latent"].unsqueeze(0), trajectory.states["latent"]])
    check(ref, latents, "fwd/zs")
    check(ref, trajectory.rewards, "fwd/reward")
    if ref.kind == "episodic":
        check(ref, 1.0 - trajectory.continues, "fwd/termination_prob")
    else:
        assert torch.equal(trajectory.continues, torch.ones_like(trajectory.rewards))


def test_reward_values_and_target_values(ref):
    net = model(ref.kind)
    zs, actions = ref["fwd/zs"][:-1], ref["in/action"]
    x = net._inputs(zs, tasks_of(ref, len(zs)), actions)
    logits = net.reward_head(*x)
    check(ref, logits, "fwd/reward_logits")
    check(ref, net._decoded(logits), "fwd/reward")
    for ensemble, name in ((net.critics, "q"), (net.target_critics, "qt")):
        check(ref, ensemble(*(part.flatten(0, 1) for part in x)).unflatten(1, actions.shape[:2]), f"fwd/{name}_logits")
        check(ref, net._q(ensemble, x), f"fwd/{name}")
    check(ref, net._q(net.critics, x, ref["fwd/q_avg_idx"]).mean(0), "fwd/q_avg")
    check(ref, net._q(net.critics, x, ref["fwd/q_min_idx"]).amin(0), "fwd/q_min")
    check(ref, net._q(net.target_critics, x, ref["fwd/qt_min_idx"]).amin(0), "fwd/qt_min")
    check(ref, net.q_values(ref.state(zs[0]), actions[0]), "fwd/q", (slice(None), 0))


def test_termination_head():
    ref = golden("episodic")
    logits = model("episodic")._termination_logits(ref["fwd/zs"][1:], None)
    check(ref, logits, "fwd/termination_logits")
    check(ref, torch.sigmoid(logits), "fwd/termination_prob")


def test_policy_and_its_entropies(ref):
    net, zs = model(ref.kind), ref["fwd/zs"]
    tasks = tasks_of(ref, len(zs))
    check(ref, net.actor(*net._inputs(zs, tasks)), "pi/raw")
    sample = net._policy(zs, tasks, ref["pi/eps"])
    for name in ("action", "log_std", "log_prob", "entropy", "scaled_entropy"):
        check(ref, getattr(sample, name), f"pi/{name}")
    check(ref, net._policy(zs, tasks, torch.zeros(())).action, "pi/mean")
    check(ref, net.policy(ref.state(zs[0]), deterministic=True), "pi/mean", (0,))


@pytest.mark.parametrize("kind", ["state", "episodic", "pixels"])
def test_policy_on_a_single_step(kind):
    ref = golden(kind)
    net, latent = model(kind), ref["fwd/zs"][0]
    sample = net._policy(latent, None, ref["pi2d/eps"])
    for name in ("action", "entropy", "scaled_entropy"):
        check(ref, getattr(sample, name), f"pi2d/{name}")
    check(ref, net.propose(State({"latent": latent}), ref["pi2d/eps"], deterministic=False), "pi2d/action")


def test_a_saturated_action_has_the_reference_log_density():
    raw = torch.tensor([[9.0, 0.0, -1.0, 0.0]])
    sample = squashed_normal(raw, torch.zeros(1, 2), log_std_min=-10.0, log_std_max=2.0)
    log_std = -10.0 + 6.0 * (np.tanh([-1.0, 0.0]) + 1.0)
    gaussian = -log_std.sum() - np.log(2 * np.pi)
    expected = gaussian - np.log(1e-6 + max(0.0, float(1 - torch.tanh(torch.tensor(9.0)) ** 2))) - np.log(1 + 1e-6)
    assert float(sample.log_prob) == pytest.approx(expected, rel=1e-5)
    assert float(sample.scaled_entropy) == pytest.approx(-2 * gaussian, rel=1e-5)


@pytest.mark.parametrize("kind", ["state", "episodic"])
def test_dropout_sits_between_the_first_linear_layer_and_its_norm(kind):
    ref = golden(kind)
    x = [part.flatten(0, 1) for part in (ref["fwd/zs"][:-1], ref["in/action"])]
    logits = model(kind).critics(*x, dropout=ref["dropout/mult"].flatten(1, 2))
    check(ref, logits.unflatten(1, ref["in/action"].shape[:2]), "dropout/q_logits")


def test_members_of_the_ensemble_are_evaluated_one_by_one_as_together():
    ref = golden("state")
    critics = model("state").critics
    x = torch.cat([ref["fwd/zs"][0], ref["in/action"][0]], -1)
    everything = critics(x)
    for member in range(5):
        torch.testing.assert_close(critics(x, members=torch.tensor([member]))[0], everything[member])


def test_values_of_action_sequences(ref):
    net, actions = model(ref.kind), ref["value/actions"]
    found = value_of_sequences(
        net,
        ref.state(ref["value/z"], task=0),
        actions.unsqueeze(1),  # [H, 1, 32, A]
        discount=None,
        deterministic=False,
        noise=ref["value/pi_eps"].unsqueeze(0),
        members=ref["value/q_idx"],
    )
    assert_matches(found[0], ref["value/value"].squeeze(-1), 2e-4)
    if ref.kind == "episodic":
        trajectory = net.rollout(ref.state(ref["value/z"].expand(32, -1)), actions)
        check(ref, 1.0 - trajectory.continues, "value/termination_prob")
        assert 0.1 < float((trajectory.continues < 0.5).float().mean()) < 0.5


def test_each_row_of_sequences_is_evaluated_independently():
    ref = golden("multitask")
    net, latents, actions = model("multitask"), ref["fwd/z"][0, :3], ref["value/actions"]

    def values(rows: slice) -> Tensor:
        state = State({"latent": latents[rows], "task": torch.tensor([0, 1, 2])[rows]})
        several = actions.unsqueeze(1).expand(-1, len(state["latent"]), -1, -1) * net.action_mask(state).unsqueeze(1)
        return value_of_sequences(net, state, several)

    together = values(slice(0, 3))
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], values(slice(row, row + 1)))


def test_task_embeddings_have_norms_of_at_most_one_and_lookups_do_not_change_them():
    ref = golden("multitask")
    net = model("multitask")
    stored = ref["sd/_task_emb.weight"]
    net.tasks.weight.data.copy_(stored)
    assert_matches(net.tasks(torch.arange(3)), ref["fwd/task_emb_weight_after"])
    assert torch.equal(net.tasks.weight, stored)
    net.tasks.renormalize()
    assert_matches(net.tasks.weight, ref["fwd/task_emb_weight_after"])


def test_discounts_follow_from_the_episode_lengths():
    ref = golden("multitask")
    assert_matches(model("multitask").tasks.discounts, ref["math/discount_task"])
    lengths = [int(n) for n in ref["math/discount_len"]]
    found = [TDMPC2Config(obs_shape=(3,), episode_length=n).discounts[0] for n in lengths]
    np.testing.assert_allclose(found, ref.arrays["math/discount"], rtol=1e-6)
    assert model("episodic").discount == pytest.approx(0.98)


# New networks

FRESH = {
    "init_state": dict(obs_shape=(24,)),
    "init_episodic": dict(obs_shape=(24,), episodic=True),
    "init_pixels": dict(obs_shape=(9, 64, 64)),
    "init_multitask": dict(obs_shape=(24,), num_tasks=4, task_dim=96),
}


@pytest.mark.parametrize("group", FRESH)
def test_initialisation_has_the_reference_scale(group):
    init = golden("init")
    torch.manual_seed(0)
    net = TDMPC2(TDMPC2Config(**FRESH[group]))
    names = [name for name in init.under(f"{group}/") if not name.startswith("_detach")]
    # Filling every official tensor with its index shows to which of our tensors it corresponds.
    marks = official_to_state_dict(
        {
            name: torch.full([int(n) for n in init[f"{group}_shape/{name}"]], float(index))
            for index, name in enumerate(names)
        },
        net,
    )
    assert len(marks) == len(names)
    fresh = net.state_dict()
    for ours, mark in marks.items():
        mean, std, low, high = init[f"{group}/{names[int(mark.flatten()[0])]}"].tolist()
        tensor = fresh[ours]
        assert tensor.shape == mark.shape, ours
        if std == 0.0:
            assert torch.equal(tensor, torch.full_like(tensor, mean)), ours
            continue
        assert float(tensor.std()) == pytest.approx(std, rel=5 / tensor.numel() ** 0.5), ours
        if tensor.numel() > 100:
            assert (float(tensor.amin()), float(tensor.amax())) == pytest.approx((low, high), rel=0.4), ours
    for name, tensor in net.critics.state_dict().items():
        assert torch.equal(tensor, net.target_critics.state_dict()[name])


def test_fresh_rewards_and_values_are_exactly_zero():
    net = TDMPC2(TDMPC2Config(obs_shape=(3,), action_dim=2, latent_dim=16, mlp_dim=16, enc_dim=16, hidden_dim=16))
    state = net.encode(torch.randn(4, 3))
    assert torch.equal(net.q_values(state, torch.rand(4, 2)), torch.zeros(5, 4))
    assert torch.equal(net.rollout(state, torch.rand(2, 4, 2)).rewards, torch.zeros(2, 4))
    assert torch.equal(TwoHot(torch.zeros(2, 101), net.bins).mean, torch.zeros(2))


def test_the_reference_sizes_have_the_parameter_counts_of_the_reference():
    init = golden("init")

    def count(size: str, obs_shape: tuple[int, ...]) -> int:
        with torch.device("meta"):
            net = TDMPC2(TDMPC2Config.from_size(size, obs_shape=obs_shape, action_dim=6))
        return sum(p.numel() for p in net.parameters() if p.requires_grad)

    for millions, expected in zip(
        init["param_count/model_size"].tolist(), init["param_count/total_params_obs24_act6"].tolist(), strict=True
    ):
        assert count(f"reference-{millions}m", (24,)) == expected
    assert count("reference-5m", (9, 64, 64)) == int(init["param_count/pixels_5M_act6"])
