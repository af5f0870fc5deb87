"""DreamerV3 behind the common interface: all kinds of observations and actions, files, isolation, unusual batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldflux.config import DreamerV3Config
from worldflux.errors import CheckpointError, ShapeMismatchError
from worldflux.models.base import State
from worldflux.models.dreamerv3.world_model import Draws, DreamerV3
from worldflux.replay.batch import Batch

SMALL = dict(
    deter_dim=32,
    hidden_dim=16,
    units=16,
    stoch_discrete=4,
    stoch_classes=4,
    cnn_depth=4,
    blocks=4,
    bspace=4,
    bins=15,
    imagination_horizon=3,
)
OBSERVATIONS = {
    "grid": dict(obs_shape={"grid": (2, 3), "number": ()}),
    "vector": dict(obs_shape=(5,)),
    "image": dict(obs_shape=(3, 48, 64)),
    "one-hot": dict(obs_shape=(7,), obs_classes={"obs": (3, 4)}),
    "several": dict(
        obs_shape={"b": (2,), "a": (3,), "left": (1, 48, 48), "right": (3, 48, 48), "class": (4,)},
        obs_classes={"class": (4,)},
    ),
}
ACTIONS = {
    "continuous": dict(action_dim=2),
    "discrete": dict(action_dim=3, action_type="discrete"),
    "multi_discrete": dict(action_dim=5, action_type="multi_discrete", action_classes=(2, 3)),
}


def build(observation: str = "vector", action: str = "continuous", **overrides) -> DreamerV3:
    torch.manual_seed(0)
    return DreamerV3(DreamerV3Config(**{**SMALL, **OBSERVATIONS[observation], **ACTIONS[action], **overrides}))


def observations(model: DreamerV3, *leading: int):
    """Returns random observations for the model with the given leading axes."""
    made = {}
    for key, shape in model.config.obs_shapes.items():
        if len(shape) == 3:
            # Each image has one brightness, which a few training steps suffice to distinguish.
            shade = torch.randint(0, 256, (*leading, 1, 1, 1), dtype=torch.uint8)
            made[key] = shade.expand(*leading, *shape).contiguous()
        elif key in model.config.obs_classes:
            parts = [
                torch.nn.functional.one_hot(torch.randint(0, n, leading), n) for n in model.config.obs_classes[key]
            ]
            made[key] = torch.cat(parts, -1).float()
        else:
            made[key] = torch.randn(*leading, *shape)
    return made if isinstance(model.config.obs_shape, dict) else made["obs"]


def actions(model: DreamerV3, *leading: int) -> torch.Tensor:
    if not model.config.action_classes:
        return torch.rand(*leading, model.config.action_dim) * 2 - 1
    parts = [torch.nn.functional.one_hot(torch.randint(0, n, leading), n) for n in model.config.action_classes]
    return torch.cat(parts, -1).float()


def batch(model: DreamerV3, B: int = 2, T: int = 5, **fields) -> Batch:
    base = dict(
        obs=observations(model, B, T),
        actions=actions(model, B, T),
        rewards=torch.randn(B, T),
        terminations=torch.zeros(B, T, dtype=torch.bool),
        is_first=torch.zeros(B, T, dtype=torch.bool),
    )
    return Batch(**{**base, **fields})


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_one_gradient_step_lowers_the_reconstruction_of_every_kind_of_space(observation, action):
    model = build(observation, action)
    data = batch(model, B=3, T=6)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(15):
        torch.manual_seed(1)
        output = model.loss(data)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        model.after_step([output])
        losses.append(float(output.terms["reconstruction"]))
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_the_whole_interface_for_every_kind_of_space(observation, action):
    model = build(observation, action)
    state = model.encode(observations(model, 2))
    assert {k: tuple(v.shape) for k, v in state.items()} == {"deter": (2, 32), "stoch": (2, 4, 4), "logits": (2, 4, 4)}
    assert torch.equal(state["stoch"].sum(-1), torch.ones(2, 4))
    chosen = model.policy(state)
    assert chosen.shape == (2, model.config.action_dim)
    if model.config.action_classes:
        assert torch.equal(chosen.sum(-1), torch.full((2,), float(len(model.config.action_classes))))
    state = model.update(state, chosen, observations(model, 2))
    trajectory = model.rollout(state, actions(model, 3, 2))
    assert trajectory.rewards.shape == trajectory.continues.shape == (3, 2)
    assert trajectory.states["deter"].shape == (3, 2, 32)
    assert torch.equal(trajectory.rewards, torch.zeros(3, 2))  # the reward head starts at exactly zero
    assert bool(((trajectory.continues > 0) & (trajectory.continues <= 1)).all())
    assert torch.equal(model.value(state), torch.zeros(2))
    decoded = model.decode(state)
    obs = observations(model, 2)
    pairs = [(decoded["obs"][k], obs[k]) for k in obs] if isinstance(obs, dict) else [(decoded["obs"], obs)]
    assert all(predicted.shape == seen.shape for predicted, seen in pairs)


def test_rollout_is_repeated_transitions():
    model = build()
    state = model.encode(observations(model, 2))
    plan = actions(model, 3, 2)
    trajectory = model.rollout(state, plan, deterministic=True)
    for h in range(3):
        state = model.transition(state, plan[h], deterministic=True)
        assert torch.equal(trajectory.states[h]["deter"], state["deter"])
        assert torch.equal(trajectory.rewards[h], model.decode(state)["reward"])


def test_deterministic_calls_use_no_random_numbers():
    model = build()
    obs, before = observations(model, 2), torch.get_rng_state()
    first = model.policy(model.encode(obs, deterministic=True), deterministic=True)
    second = model.policy(model.encode(obs, deterministic=True), deterministic=True)
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_a_row_with_is_first_ignores_its_previous_state():
    model = build()
    obs = observations(model, 2)
    fresh = model.encode(obs, deterministic=True)
    worn = State({k: torch.randn_like(v) for k, v in fresh.items()})
    is_first = torch.tensor([True, False])
    updated = model.update(worn, actions(model, 2), obs, is_first=is_first, deterministic=True)
    torch.testing.assert_close(updated["deter"][0], fresh["deter"][0])
    assert not torch.allclose(updated["deter"][1], fresh["deter"][1])


def test_what_comes_before_an_episode_start_has_no_effect_on_its_losses():
    model = build()
    torch.nn.init.normal_(model.reward_head.out.weight)
    is_first = torch.zeros(2, 5, dtype=torch.bool)
    is_first[:, 2] = True
    one = batch(model, is_first=is_first)
    obs, acts, rewards = one.obs.clone(), one.actions.clone(), one.rewards.clone()
    obs[:, :2], acts[:, :2], rewards[:, :2] = 9.0, 0.5, 100.0
    other = batch(model, obs=obs, actions=acts, rewards=rewards, is_first=is_first)
    outcomes = []
    for data in (one, other):
        torch.manual_seed(3)
        outcomes.append(model.loss_parts(data))
    for name in ("reconstruction", "reward", "dynamics"):
        assert torch.equal(outcomes[0].losses[name][:, 2:], outcomes[1].losses[name][:, 2:]), name
        if name != "dynamics":
            assert not torch.equal(outcomes[0].losses[name][:, :2], outcomes[1].losses[name][:, :2]), name


def test_a_batch_with_only_the_four_documented_fields_is_trained():
    """The reward before the window is unknown and does not count; the last reward of an episode has no observation."""
    model = build()
    terminations = torch.zeros(2, 5, dtype=torch.bool)
    terminations[0, 1] = True
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 10.0]])
    data = Batch(observations(model, 2, 5), actions(model, 2, 5), rewards, terminations)
    parts = model.loss_parts(data)
    # Rows of the first window: o0, o1 (its action ends the episode), no observation, p0, p1; p2 is shifted out.
    assert parts.rows.is_first.tolist() == [[True, False, False, True, False], [True, False, False, False, False]]
    assert parts.rows.rewards.tolist() == [[0.0, 1.0, 2.0, 0.0, 3.0], [0.0, 6.0, 7.0, 8.0, 9.0]]
    assert parts.rows.is_terminal.tolist() == [[0.0, 0.0, 1.0, 0.0, 0.0], [0.0] * 5]
    assert parts.rows.obs_mask.tolist() == [[True, True, False, True, True], [True] * 5]
    assert torch.equal(parts.rows.obs["obs"][0, 3:], data.obs[0, 2:4])
    assert torch.equal(parts.rows.prev_actions[0, 1:3], data.actions[0, :2])
    assert torch.equal(parts.rows.prev_actions[0, 4], data.actions[0, 2])
    assert parts.rows.arrival_known[:, 0].tolist() == [False, False]
    assert parts.losses["reward"][:, 0].tolist() == [0.0, 0.0]
    mean = parts.losses["reward"].sum() / 8
    torch.testing.assert_close(model._reduce(parts).terms["reward"], mean.detach())


def test_rows_without_an_observation_train_reward_but_not_reconstruction():
    model = build()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 4] = False
    plain = batch(model, obs_mask=mask)
    hidden = plain.obs.clone()
    hidden[:, 4] = 77.0
    outcomes = []
    for obs in (plain.obs, hidden):
        torch.manual_seed(3)
        outcomes.append(
            model.loss_parts(batch(model, obs=obs, actions=plain.actions, rewards=plain.rewards, obs_mask=mask))
        )
    for name, loss in outcomes[0].losses.items():
        torch.testing.assert_close(loss, outcomes[1].losses[name], msg=name)
    assert outcomes[0].losses["reconstruction"][:, 4].tolist() == [0.0, 0.0]
    assert bool((outcomes[0].losses["reward"][:, 4] > 0).all())
    torch.testing.assert_close(outcomes[0].kl[:, 4], torch.zeros(2), atol=1e-6, rtol=0)


def test_stored_latents_initialise_the_window_and_are_returned_updated():
    model = build()
    T = 5
    extras = {
        "deter": torch.full((2, T, 32), 0.25, dtype=torch.float16),
        "stoch": torch.tensor([1, 2, 0, 4], dtype=torch.uint8).expand(2, T, 4),
    }
    data = batch(model, extras=extras)
    deter, stoch = model._context(data)
    assert torch.equal(deter, torch.full((2, 32), 0.25))
    assert stoch[0].argmax(-1).tolist() == [0, 1, 0, 3]
    assert stoch[0].sum(-1).tolist() == [1, 1, 0, 1]  # the third row has no stored latents
    output = model.loss(data)
    assert output.extras["deter"].shape == (2, T - 1, 32)
    assert output.extras["deter"].dtype == torch.float16
    spec = model.replay_extras()
    assert spec["stoch"] == ((4,), "uint8")
    assert int(output.extras["stoch"].min()) >= 1
    assert int(output.extras["stoch"].max()) <= 4


@pytest.mark.parametrize(("length", "imag_last"), [(1, 0), (5, 1), (5, 2)])
def test_short_windows_and_few_starts_have_finite_losses(length, imag_last):
    model = build(imag_last=imag_last)
    parts = model.loss_parts(batch(model, T=length))
    starts = imag_last or length
    assert parts.losses["actor"].shape == (2, starts)
    assert parts.losses["replay_critic"].shape == (2, starts - 1)
    output = model._reduce(parts)
    output.loss.backward()
    assert all(torch.isfinite(value) for value in output.terms.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("action", "imag_last"), [("continuous", 0), ("discrete", 3)])
def test_the_policy_imitates_recorded_actions_that_were_better_than_expected(action: str, imag_last: int) -> None:
    model = build(action=action, imag_last=imag_last, loss_scales={"imitation": 2.0})
    torch.nn.init.normal_(model.critic.out.weight)
    is_first, truncations = torch.zeros(2, 6, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)
    truncations[:, 2] = is_first[:, 4] = is_first[:, 0] = True  # row 3 only has the last observation of the episode
    data = batch(model, T=6, rewards=torch.randn(2, 6), is_first=is_first, truncations=truncations)
    parts = model.loss_parts(data)
    feat = torch.cat([parts.observed.deter, parts.observed.stoch.flatten(-2)], -1)[:, :-1]
    starts = imag_last or 6
    better = parts.replay_returns > model.critic(feat).mean[:, 1 - starts :]
    better &= torch.tensor([True, True, True, False, True])[1 - starts :]
    assert 0 < int(better.sum()) < better.numel()
    expected = -model.actor(feat).log_prob(data.actions[:, :-1])[:, 1 - starts :] * better
    torch.testing.assert_close(parts.losses["imitation"], expected)
    expected.mean().mul(2.0).backward()
    gradients = [p.grad.clone() for p in model.actor.parameters()]
    model.zero_grad()
    parts.losses["imitation"].mean().mul(2.0).backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"actor"}
    torch.testing.assert_close([p.grad for p in model.actor.parameters()], gradients)
    output = model._reduce(parts)
    others = sum(model.loss_scale(name) * output.terms[name] for name in parts.losses if name != "imitation")
    torch.testing.assert_close(output.loss.detach(), others + 2.0 * expected.mean().detach())


def test_the_paper_imitates_nothing() -> None:
    model = build()
    output = model.loss(batch(model))
    assert "imitation" not in output.terms


def test_imagination_from_the_last_steps_equals_that_from_all_steps():
    few, every = build(imag_last=2), build()
    torch.nn.init.normal_(few.critic.out.weight)
    every.load_state_dict(few.state_dict())
    data = batch(few, T=5)
    torch.manual_seed(0)
    whole = every.loss_parts(data)
    H = SMALL["imagination_horizon"]
    draws = Draws(
        whole.observed.stoch.detach().argmax(-1),
        whole.imagined.feat[..., 32:].unflatten(-1, (4, 4)).argmax(-1).unflatten(0, (2, 5))[:, -2:].flatten(0, 1),
        whole.imagined.actions.unflatten(0, (2, 5))[:, -2:].flatten(0, 1),
    )
    part = few.loss_parts(data, draws)
    assert draws.imagined_actions.shape == (4, H + 1, 2)
    torch.testing.assert_close(part.losses["critic"], whole.losses["critic"][:, -2:])
    torch.testing.assert_close(part.losses["replay_critic"], whole.losses["replay_critic"][:, -1:])


def test_a_saved_model_loads_and_does_the_same(tmp_path):
    model = build("several", "multi_discrete")
    obs = observations(model, 2)
    torch.nn.init.normal_(model.critic.out.weight)
    model.return_high.fill_(7.0)
    model.save_pretrained(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    loaded = DreamerV3.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    a, b = model.encode(obs, deterministic=True), loaded.encode(obs, deterministic=True)
    assert torch.equal(model.value(a), loaded.value(b))
    assert torch.equal(model.policy(a, True), loaded.policy(b, True))
    assert float(loaded.return_high) == 7.0


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="save_pretrained"):
        DreamerV3.from_pretrained(tmp_path)
    model = build()
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        DreamerV3.from_pretrained(tmp_path)
    build(units=8).save_pretrained(tmp_path)
    model.config.save(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"belongs to another model: actor\.mean\.weight has shape"):
        DreamerV3.from_pretrained(tmp_path)


def test_wrong_shapes_say_what_was_expected():
    image, vector = build("image"), build()
    with pytest.raises(ShapeMismatchError, match="transpose HWC to CHW"):
        image.encode(torch.zeros(2, 48, 64, 3, dtype=torch.uint8))
    with pytest.raises(ShapeMismatchError, match=r"\(2, 4\), expected B and then \(5,\)"):
        vector.encode(torch.zeros(2, 4))
    with pytest.raises(ShapeMismatchError, match="leading batch axes"):
        vector.encode(torch.zeros(5))
    with pytest.raises(ShapeMismatchError, match=r"shape \[1, 3\], expected a tensor of shape \[1, 2\]"):
        vector.transition(vector.initial_state(1), torch.zeros(1, 3))
    with pytest.raises(ShapeMismatchError, match=r"keys \['a'\], expected \['obs'\]"):
        vector.encode({"a": torch.zeros(1, 5)})
    state = vector.initial_state(3)
    with pytest.raises(ShapeMismatchError, match=r"expected torch\.uint8"):
        image.encode(torch.zeros(2, 3, 48, 64))
    with pytest.raises(ShapeMismatchError, match="expected a torch tensor"):
        vector.encode(np.zeros((2, 5), np.float32))
    with pytest.raises(ShapeMismatchError, match=r"\[7, 2\], expected \[H, B, A\]"):
        vector.rollout(state, torch.zeros(7, 2))
    with pytest.raises(ShapeMismatchError, match=r"\[7, 2\], expected a tensor of shape \[3, 2\]"):
        vector.rollout(state, torch.zeros(3, 7, 2))
    with pytest.raises(ShapeMismatchError, match="at least 1"):
        vector.rollout(state, torch.zeros(0, 3, 2))
    with pytest.raises(ShapeMismatchError, match="2 rows, but the state has 3"):
        vector.update(state, torch.zeros(3, 2), torch.zeros(2, 5))
    with pytest.raises(ShapeMismatchError, match=r"is_first has shape \[2\], expected \[3\]"):
        vector.update(state, torch.zeros(3, 2), torch.zeros(3, 5), is_first=torch.zeros(2))
    with pytest.raises(ShapeMismatchError, match="one-hot"):
        vector.loss(batch(vector, actions=torch.zeros(2, 5, 1)))


def test_bfloat16_computes_nearly_the_same_and_keeps_float32_parameters():
    exact, rough = build(), build(dtype="bfloat16")
    rough.load_state_dict(exact.state_dict())
    data, results = batch(exact), []
    for model in (exact, rough):
        torch.manual_seed(5)
        parts = model.loss_parts(data)
        assert parts.observed.deter.dtype == parts.imagined.feat.dtype == torch.float32
        output = model._reduce(parts)
        output.loss.backward()
        results.append(output.terms)
    assert all(p.dtype == torch.float32 and (p.grad is None or p.grad.dtype == p.dtype) for p in rough.parameters())
    for name in ("reconstruction", "reward", "continue", "dynamics", "critic"):
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0.05, atol=0.02, msg=name)


def test_two_models_of_one_seed_are_equal_and_learn_the_same_bits():
    results = []
    for _ in range(2):
        model = build("several", "discrete")
        data = batch(model)
        output = model.loss(data)
        output.loss.backward()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 3))
def test_a_batch_of_one_equals_its_row_in_a_larger_batch(size, row):
    model = build()
    obs = observations(model, size)
    row = min(row, size - 1)
    whole = model.encode(obs, deterministic=True)[row : row + 1]
    single = model.encode(obs[row : row + 1], deterministic=True)
    torch.testing.assert_close(whole["logits"], single["logits"], rtol=1e-5, atol=1e-6)


def test_state_is_an_immutable_mapping_that_indexes_all_tensors():
    state = State({"a": torch.arange(6.0).reshape(3, 2), "b": torch.arange(3.0)})
    assert dict(state[1]).keys() == {"a", "b"}
    assert state[1]["a"].tolist() == [2.0, 3.0]
    assert state[torch.tensor([True, False, True])]["b"].tolist() == [0.0, 2.0]
    assert State.cat([state, state])["b"].shape == (6,)
    assert State.stack([state, state], 1)["a"].shape == (3, 2, 2)
    assert state.to(torch.float64)["b"].dtype == torch.float64
    with pytest.raises(TypeError):
        state["a"] = torch.zeros(1)


def test_imagining_with_the_policy_returns_actions_and_their_trajectory():
    model = build("vector", "discrete")
    torch.nn.init.normal_(model.reward_head.out.weight)
    state = model.encode(observations(model, 2))
    torch.manual_seed(0)
    trajectory, chosen = model.imagine(state, 4)
    assert chosen.shape == (4, 2, 3)
    decoded = model.decode(trajectory.states[2])["reward"]
    torch.testing.assert_close(trajectory.rewards[2], decoded, rtol=1e-5, atol=1e-5)  # of some millions


def test_training_mode_reaches_every_module_and_calls_overridden_train_methods():
    class Frozen(torch.nn.Linear):
        def train(self, mode=True):
            return super().train(False)

    model = build()
    model.extra = torch.nn.Sequential(Frozen(2, 2), torch.nn.Dropout())
    assert model.eval() is model and not any(module.training for module in model.modules())
    assert model.train() is model
    assert [name for name, module in model.named_modules() if not module.training] == ["extra.0"]
    with pytest.raises(ValueError, match="boolean"):
        model.train("no")
