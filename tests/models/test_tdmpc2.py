"""TD-MPC2 beyond the reference: ends of episodes, short episodes, all kinds of observations, several tasks, files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.small_models import value_of_sequences
from torch import Tensor

from worldflux import create_world_model, list_models
from worldflux.config import TDMPC2Config
from worldflux.errors import ConfigurationError, ShapeMismatchError
from worldflux.models.base import State
from worldflux.models.tdmpc2.alignment import windows
from worldflux.models.tdmpc2.encoder import MAX_SHIFT, shifted
from worldflux.models.tdmpc2.world_model import TDMPC2, ModelDraws
from worldflux.replay.batch import Batch
from worldflux.replay.buffer import ReplayBuffer
from worldflux.training.config import TrainingConfig
from worldflux.training.trainer import Trainer

SMALL = dict(latent_dim=16, hidden_dim=16, mlp_dim=16, enc_dim=16, num_channels=8, num_q_networks=3)
SMALL |= dict(num_bins=21, vmin=-5.0, vmax=5.0)
A = 2


def tdmpc2(obs_shape=(4,), *, filled: bool = True, **fields) -> TDMPC2:
    torch.manual_seed(0)
    model = TDMPC2(TDMPC2Config(**{"obs_shape": obs_shape, "action_dim": A, **SMALL, **fields}))
    if filled:  # new heads give 0 for every input
        for head in (model.reward_head, model.critics, model.target_critics):
            torch.nn.init.normal_(head.layers[-1].weight, std=0.3)
    return model.eval()


def random_obs(shape, *leading: int):
    if isinstance(shape, dict):
        return {key: random_obs(one, *leading) for key, one in shape.items()}
    if len(shape) == 3:
        return torch.randint(0, 256, (*leading, *shape), dtype=torch.uint8)
    return torch.randn(*leading, *shape)


def random_batch(B: int = 4, T: int = 4, obs_shape=(4,), **fields) -> Batch:
    torch.manual_seed(1)
    flags = torch.zeros(B, T, dtype=torch.bool)
    given = dict(
        obs=random_obs(obs_shape, B, T),
        actions=torch.rand(B, T, A) * 2 - 1,
        rewards=torch.randn(B, T),
        terminations=flags,
        is_first=flags,
    )
    return Batch(**{**given, **fields})


def draws(windows: int, steps: int = 3) -> ModelDraws:
    generator = torch.Generator().manual_seed(2)
    return ModelDraws(torch.randn(windows, steps, A, generator=generator), torch.tensor([0, 2]))


def flags(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def gradient(model: TDMPC2, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


# Ends of episodes inside windows


def test_rows_after_the_end_of_an_episode_do_not_affect_the_losses():
    model = tdmpc2(episodic=True)
    ends = dict(is_first=flags([0, 0, 1, 0], [0] * 4, [0, 1, 0, 0], [0, 0, 0, 1]))
    batch = random_batch(**ends)
    other = random_batch(B=4, T=4)
    past = batch.is_first.cumsum(1) > 0
    moved = replace(
        batch,
        obs=torch.where(past.unsqueeze(-1), 9.0 * other.obs - 5.0, batch.obs),
        actions=torch.where(past.unsqueeze(-1), -batch.actions, batch.actions),
        rewards=torch.where(past, 100.0, batch.rewards),
        terminations=past,
    )
    losses, policies = [], []
    for one in (batch, moved):
        output = model.model_loss(one, draws(4))
        losses.append(gradient(model, output.loss))
        torch.manual_seed(3)
        policies.append(gradient(model, model.policy_loss(output).loss))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(policies[0], policies[1])


def test_a_window_with_one_valid_step_equals_a_window_of_one_step():
    long, short = tdmpc2(), tdmpc2(horizon=1)
    batch = random_batch(is_first=flags(*[[0, 0, 1, 0]] * 4))
    cut = replace(
        batch,
        **{name: getattr(batch, name)[:, :2] for name in ("obs", "actions", "rewards", "terminations", "is_first")},
    )
    given = draws(4)
    expected = short.model_loss(cut, ModelDraws(given.noise[:, :1], given.members))
    found = long.model_loss(batch, given)
    torch.testing.assert_close(found.loss, expected.loss)
    for name, value in expected.terms.items():
        torch.testing.assert_close(found.terms[name], value)


def test_masks_of_a_window_by_hand():
    batch = random_batch(
        B=3,
        is_first=flags([0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 1]),
        terminations=flags([1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]),
        obs_mask=flags([1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]),
    )
    w = windows(batch, 3, multitask=False)
    assert w.steps.tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    # The observation after the termination was not recorded. The value's target does not need it, the latent's does.
    assert w.arrived.tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert w.targets.tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert w.states.tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]


def test_windows_with_an_unrecorded_first_observation_have_zero_loss():
    model = tdmpc2()
    batch = random_batch(obs_mask=flags(*[[0, 1, 1, 1]] * 4))
    output = model.loss(batch)
    assert output.loss == 0.0
    assert torch.equal(gradient(model, output.loss), torch.zeros_like(gradient(model, model.loss(batch).loss)))
    assert float(output.updates["value_scale"]) == 1.0


def test_windows_that_start_at_last_observations_give_finite_losses():
    model = tdmpc2(episodic=True)
    output = model.loss(random_batch(is_first=flags(*[[0, 1, 0, 0]] * 4)))
    assert output.terms["consistency"] == output.terms["value"] == output.terms["reward"] == 0.0
    # The policy is also trained there.
    assert output.terms["policy"] != 0.0 and torch.isfinite(output.loss)


def test_batches_with_only_the_four_documented_fields_get_final_rows():
    model = tdmpc2(episodic=True)
    ends = flags(*[[0, 1, 0, 0]] * 4)
    four = replace(random_batch(), terminations=ends, is_first=None)

    def put_in(x: Tensor) -> Tensor:
        return torch.cat([x[:, :2], torch.zeros_like(x[:, :1]), x[:, 2:3]], 1)

    full = Batch(
        obs=put_in(four.obs),
        actions=put_in(four.actions),
        rewards=put_in(four.rewards),
        terminations=put_in(four.terminations),
        is_first=flags(*[[0, 0, 0, 1]] * 4),
        obs_mask=flags(*[[1, 1, 0, 1]] * 4),
    )
    torch.testing.assert_close(model.model_loss(four, draws(4)).loss, model.model_loss(full, draws(4)).loss)


def test_the_target_of_a_terminated_step_is_its_reward():
    model = tdmpc2()
    ended = flags(*[[0, 1, 0, 0]] * 4)
    parts = [
        model.model_parts(model._windows(random_batch(terminations=terminations)), draws(4))
        for terminations in (torch.zeros_like(ended), ended)
    ]
    rewards = random_batch().rewards
    assert torch.equal(parts[1].targets[:, 1], rewards[:, 1])
    assert torch.equal(parts[1].targets[:, [0, 2]], parts[0].targets[:, [0, 2]])
    assert (parts[0].targets[:, 1] != rewards[:, 1]).all()


def test_long_windows_are_cut_into_consecutive_ones():
    model = tdmpc2()
    batch = random_batch(B=2, T=12, is_first=torch.rand(2, 12) < 0.2)
    starts = [(row, start) for row in range(2) for start in (0, 3, 6)]

    def taken(x: Tensor) -> Tensor:
        return torch.stack([x[row, start : start + 4] for row, start in starts])

    apart = Batch(
        *(taken(x) for x in (batch.obs, batch.actions, batch.rewards, batch.terminations)),
        is_first=taken(batch.is_first),
    )
    torch.testing.assert_close(model.model_loss(batch, draws(6)).loss, model.model_loss(apart, draws(6)).loss)
    assert len(windows(random_batch(B=16, T=50), 3, multitask=False).rewards) == 256


def test_batches_shorter_than_a_window_are_rejected():
    with pytest.raises(ShapeMismatchError, match=r"has 3 rows in each window, expected at least horizon \+ 1 = 4"):
        tdmpc2().loss(random_batch(T=3))


def test_episodes_shorter_than_the_horizon_are_learned():
    """Episodes have one step and a reward that depends on the action; reward and value are learned after some steps."""
    rng = np.random.default_rng(0)
    buffer = ReplayBuffer(400, (1,), A, seed=0)
    for _ in range(200):
        action = rng.uniform(-1, 1, (1, A)).astype(np.float32)
        reward = 2.0 * action[:, 0]
        buffer.add_episode(np.zeros((2, 1), np.float32), action, reward, terminations=np.ones(1, bool))
    torch.manual_seed(0)
    model = tdmpc2((1,), filled=False, episodic=True, tau=0.1)
    config = TrainingConfig(
        total_steps=200, batch_size=64, sequence_length=4, learning_rate=3e-3, grad_clip=20.0, device="cpu", seed=0
    )
    Trainer(model, config).train(buffer)
    state = model.encode(torch.zeros(3, 1))
    actions = torch.tensor([[0.8, 0.0], [-0.8, 0.0], [0.0, 0.5]])
    trajectory = model.rollout(state, actions.unsqueeze(0))
    expected = torch.tensor([1.6, -1.6, 0.0])
    torch.testing.assert_close(trajectory.rewards[0], expected, atol=0.3, rtol=0.0)
    torch.testing.assert_close(model.q_values(state, actions).mean(0), expected, atol=0.4, rtol=0.0)
    assert (trajectory.continues < 0.5).all()
    assert model.policy(state, deterministic=True)[0, 0] > 0.5


# Terminations


def test_the_termination_head_is_used_from_the_first_termination_on(tmp_path: Path):
    model = tdmpc2(episodic=True)
    trainer = Trainer(model, TrainingConfig(device="cpu", grad_clip=20.0))
    before = [p.clone() for p in model.termination_head.parameters()]
    trainer.step(random_batch())
    assert all(torch.equal(p, old) for p, old in zip(model.termination_head.parameters(), before, strict=True))
    state, actions = model.encode(torch.randn(3, 4)), torch.rand(2, 3, A)
    assert torch.equal(model.rollout(state, actions).continues, torch.ones(2, 3))

    trainer.step(random_batch(terminations=flags(*[[0, 0, 1, 0]] * 4)))
    assert not any(torch.equal(p, old) for p, old in zip(model.termination_head.parameters(), before, strict=True))
    assert (model.rollout(state, actions).continues < 1.0).all()
    model.save_pretrained(tmp_path)
    assert float(TDMPC2.from_pretrained(tmp_path).termination_seen) == 1.0


def test_without_a_termination_the_head_does_not_affect_other_networks():
    outcomes = []
    for episodic in (False, True):
        model = tdmpc2(episodic=episodic, dropout=0.0)
        trainer = Trainer(model, TrainingConfig(device="cpu", grad_clip=0.01))
        torch.manual_seed(5)
        fresh = tdmpc2(dropout=0.0).state_dict()
        model.load_state_dict(fresh, strict=False)
        torch.manual_seed(6)
        for _ in range(2):
            trainer.step(random_batch())
        outcomes.append({name: value for name, value in model.state_dict().items() if "termination" not in name})
    for name, value in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], value, msg=name)


def test_rewards_after_a_predicted_termination_do_not_count():
    model = tdmpc2(episodic=True)
    model.termination_seen.fill_(1.0)
    torch.nn.init.zeros_(model.termination_head.layers[-1].weight)
    torch.nn.init.constant_(model.termination_head.layers[-1].bias, 9.0)
    state, actions = model.encode(torch.randn(3, 4)), torch.rand(2, 3, 5, A)
    found = value_of_sequences(model, state, actions)
    rows = State({"latent": state["latent"].repeat_interleave(5, 0)})
    expected = model.rollout(rows, actions.flatten(1, 2)).rewards[0].unflatten(0, (3, 5))
    torch.testing.assert_close(found, expected)


def test_a_given_discount_replaces_the_models_own():
    model = tdmpc2()
    state, actions = model.encode(torch.randn(1, 4)), torch.rand(1, 1, 1, A)
    values = [
        float(value_of_sequences(model, state, actions, discount=discount, deterministic=True).detach())
        for discount in (None, model.discount, 0.5)
    ]
    assert values[0] == pytest.approx(values[1])
    reward = float(model.rollout(state, actions[:, 0]).rewards.detach())
    assert values[2] - reward == pytest.approx(0.5 / model.discount * (values[1] - reward), rel=1e-4)


# Observations


def test_a_state_only_depends_on_the_observation():
    model, obs = tdmpc2(), torch.randn(3, 4)
    state = model.update(model.initial_state(3), torch.rand(3, A), obs, is_first=torch.tensor([True, False, True]))
    assert torch.equal(state["latent"], model.encode(obs)["latent"])
    torch.testing.assert_close(state["latent"].unflatten(-1, (-1, 8)).sum(-1), torch.ones(3, 2))


OBSERVATIONS = [
    (),
    (2, 3),
    (3, 64, 64),
    (9, 84, 84),
    (1, 39, 50),
    {"camera": (3, 64, 64), "position": (3,), "speed": ()},
    {"left": (1, 40, 48), "right": (3, 64, 64)},
]


@pytest.mark.parametrize("obs_shape", OBSERVATIONS, ids=str)
def test_every_kind_of_observation_is_trained_on_and_decoded(obs_shape):
    model = tdmpc2(obs_shape, use_decoder=True)
    trainer = Trainer(model, TrainingConfig(device="cpu", grad_clip=20.0))
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = trainer.step(random_batch(B=2, obs_shape=obs_shape))
    assert all(torch.isfinite(value) for value in losses.values())
    unchanged = [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
    assert not unchanged
    obs = random_obs(obs_shape, 2)
    model.eval()
    pictured = model.decode(model.encode(obs))["obs"]
    for key, one in obs.items() if isinstance(obs, dict) else [(None, obs)]:
        assert (pictured if key is None else pictured[key]).shape == one.shape


def test_the_order_of_the_keys_does_not_matter():
    shape = {"b": (2,), "a": (3,)}
    model = tdmpc2(shape)
    obs = random_obs(shape, 4)
    assert torch.equal(model.encode(obs)["latent"], model.encode(dict(sorted(obs.items())))["latent"])


def test_images_are_shifted_randomly_unless_deterministic():
    model, image = tdmpc2((3, 64, 64)), random_obs((3, 64, 64), 2)
    still = [model.encode(image, deterministic=True)["latent"] for _ in range(2)]
    assert torch.equal(*still)
    middle = torch.full((2, 2), MAX_SHIFT)
    assert torch.equal(still[0], model.encode(image, shift=middle)["latent"])
    assert not torch.equal(still[0], model.encode(image)["latent"])


def test_a_shifted_image_repeats_its_edge():
    image = torch.arange(12).reshape(1, 1, 3, 4)
    moved = shifted(image, torch.tensor([[MAX_SHIFT + 1, MAX_SHIFT - 2]]))
    assert moved[0, 0].tolist() == [[1, 2, 3, 3], [1, 2, 3, 3], [1, 2, 3, 3]]
    moved = shifted(image, torch.tensor([[MAX_SHIFT - 1, MAX_SHIFT + 1]]))
    assert moved[0, 0].tolist() == [[4, 4, 5, 6], [8, 8, 9, 10], [8, 8, 9, 10]]
    assert torch.equal(shifted(image, torch.tensor([[MAX_SHIFT, MAX_SHIFT]])), image)


@pytest.mark.parametrize("shape", [(9, 64, 64), (3, 64, 64)])
def test_features_of_a_single_image_of_latent_width_are_not_projected(shape):
    assert tdmpc2(shape, num_channels=1).encoder.project is None
    assert tdmpc2(shape).encoder.project is not None


def test_the_decoder_is_trained_without_affecting_the_model():
    model = tdmpc2(use_decoder=True)
    batch = random_batch()
    output = model.model_loss(batch, draws(4))
    pictured = model.decoder_loss(batch, output)
    reached = torch.autograd.grad(pictured.loss, list(model.parameters())[:3], allow_unused=True)
    assert all(g is None for g in reached)
    trainer = Trainer(model, TrainingConfig(device="cpu", learning_rate=3e-3))
    losses = [float(trainer.step(batch)["reconstruction"]) for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]
    assert "reconstruction" not in Trainer(tdmpc2(), TrainingConfig(device="cpu")).step(batch)


def test_inputs_that_do_not_fit_the_model_are_rejected():
    model = tdmpc2()
    state = model.encode(torch.randn(2, 4))
    for call, message in (
        (lambda: model.encode(torch.randn(2, 5)), r"shape \(2, 5\)"),
        (lambda: model.transition(state, torch.rand(2, 3)), r"actions have shape \[2, 3\], expected"),
        (lambda: model.q_values(state, torch.rand(3, A)), r"actions have shape \[3, 2\], expected"),
        (lambda: model.rollout(state, torch.rand(2, A)), r"expected \[H, B, A\]"),
        (lambda: model.update(state, torch.rand(2, A), torch.randn(3, 4)), "has 3 rows, but the state has 2"),
        (lambda: tdmpc2((3, 64, 64)).encode(torch.rand(2, 3, 64, 64)), "expected torch.uint8"),
    ):
        with pytest.raises(ShapeMismatchError, match=message):
            call()


# Learning


def test_the_encoder_has_its_own_learning_rate():
    model = tdmpc2()
    before = {name: p.clone() for name, p in model.named_parameters()}
    Trainer(model, TrainingConfig(device="cpu", learning_rate=1e-3, grad_clip=20.0)).step(random_batch())

    def moved(name: str) -> float:
        return float((dict(model.named_parameters())[name] - before[name]).detach().abs().max())

    # The size of Adam's first step is the learning rate, whatever the gradient.
    assert moved("encoder.project.weight") == pytest.approx(3e-4, rel=0.01)
    assert moved("dynamics.layers.0.weight") == pytest.approx(1e-3, rel=0.01)
    assert moved("critics.layers.2.bias") == pytest.approx(1e-3, rel=0.01)


def test_dropout_only_applies_in_training():
    model = tdmpc2(dropout=0.25)
    assert model.model_draws(4, 3).dropout is None and model.policy_draws(4, 4).dropout is None
    factors = model.train().model_draws(40, 3).dropout
    assert factors.shape == (3, 120, 16)
    torch.testing.assert_close(factors.unique(), torch.tensor([0.0, 4 / 3]))
    assert float(factors.mean()) == pytest.approx(1.0, abs=0.05)
    assert model.policy_draws(4, 4).dropout.shape == (2, 16, 16)
    # Values outside of the losses use no dropout.
    state, action = model.encode(torch.randn(2, 4)), torch.rand(2, A)
    assert torch.equal(model.q_values(state, action), model.q_values(state, action))


def test_two_different_members_are_drawn():
    model = tdmpc2()
    drawn = {tuple(sorted(model.model_draws(1, 1).members.tolist())) for _ in range(60)}
    assert drawn == {(0, 1), (0, 2), (1, 2)}
    assert tdmpc2(num_q_networks=1).policy_draws(1, 1).members.tolist() == [0]


def test_the_value_is_that_of_the_mean_action():
    model = tdmpc2()
    state = model.encode(torch.randn(5, 4))
    expected = model.q_values(state, model.policy(state, deterministic=True)).mean(0)
    torch.testing.assert_close(model.value(state), expected)
    random = model.policy(state)
    assert (random.abs() <= 1.0).all() and not torch.equal(random, model.policy(state))


def test_resumed_training_equals_uninterrupted_training(tmp_path: Path):
    config = TrainingConfig(device="cpu", grad_clip=20.0, warmup_steps=3)
    batches = [random_batch(B=3), random_batch(B=5), random_batch(B=4)]
    whole = Trainer(tdmpc2(episodic=True), config)
    torch.manual_seed(7)
    for batch in batches[:2]:
        whole.step(batch)
    whole.save_checkpoint(tmp_path / "run")
    expected = whole.step(batches[2])

    again = Trainer(tdmpc2(episodic=True, filled=False), config)
    again.load_checkpoint(tmp_path / "run")
    assert [group["rate_scale"] for group in again.optimizers[0].param_groups] == [0.3, 1.0]
    assert again.optimizers[1].param_groups[0]["eps"] == 1e-5
    found = again.step(batches[2])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_bfloat16_computes_nearly_the_same_and_trains_every_network():
    exact, rough = tdmpc2(dropout=0.0), tdmpc2(dropout=0.0, dtype="bfloat16")
    batch = random_batch()
    losses = [model.model_loss(batch, draws(4)).loss for model in (exact, rough)]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0.0)
    losses[1].backward()
    for name, p in rough.named_parameters():
        assert p.dtype == torch.float32
        if p.requires_grad and not name.startswith("actor"):
            assert p.grad is not None and float(p.grad.abs().max()) > 0.0, name


# Several tasks

TASKS = dict(num_tasks=3, task_dim=5, task_action_dims=(2, 1, 2), task_episode_lengths=(500, 50, 1000))


def test_tasks_differ_in_embedding_actions_and_discount():
    model = tdmpc2(**TASKS)
    obs = torch.randn(1, 4).expand(3, 4)
    state = model.encode(obs, task=torch.arange(3))
    assert not torch.equal(state["latent"][0], state["latent"][2])
    torch.testing.assert_close(state["latent"][1:2], model.encode(obs[:1], task=1)["latent"])
    actions = model.policy(state)
    assert actions[1, 1] == 0.0 and (actions[[0, 2]] != 0.0).all()
    assert model.action_mask(state).tolist() == [[1, 1], [1, 0], [1, 1]]
    torch.testing.assert_close(model._discount(state["task"]), torch.tensor([0.99, 0.95, 0.995]))
    later = model.transition(state, actions)
    assert torch.equal(later["task"], state["task"])
    assert model.update(later, actions, obs)["task"].tolist() == [0, 1, 2]
    trajectory = model.rollout(state, actions.unsqueeze(0))
    assert trajectory.states["task"].tolist() == [[0, 1, 2]]


def test_several_tasks_are_trained_from_a_buffer_with_task_indices(tmp_path: Path):
    model = tdmpc2(**TASKS)
    buffer = ReplayBuffer(200, (4,), A, n_envs=3, extras=model.replay_extras(), seed=0)
    rng = np.random.default_rng(0)
    state = model.initial_state(3, task=torch.arange(3))
    for _ in range(30):
        buffer.add(
            rng.normal(size=(3, 4)).astype(np.float32),
            rng.uniform(-1, 1, (3, A)).astype(np.float32),
            rng.normal(size=3).astype(np.float32),
            np.zeros(3, bool),
            np.zeros(3, bool),
            extras={name: value.numpy() for name, value in model.extras_from_state(state).items()},
        )
    batch = buffer.sample(8, 4)
    assert set(batch.extras["task"].unique().tolist()) <= {0, 1, 2}
    trainer = Trainer(model, TrainingConfig(device="cpu", learning_rate=0.5, batch_size=8, sequence_length=4))
    losses = trainer.step(batch, buffer)
    assert torch.isfinite(losses["loss"])
    assert float(model.tasks.weight.detach().norm(dim=-1).max()) <= 1.0 + 1e-6
    model.save_pretrained(tmp_path)
    again = TDMPC2.from_pretrained(tmp_path)
    assert torch.equal(again.tasks.weight, model.tasks.weight) and again.config == model.config


def test_a_multitask_model_rejects_a_batch_without_tasks():
    with pytest.raises(ShapeMismatchError, match=r"no extras\['task'\]"):
        tdmpc2(**TASKS).loss(random_batch())
    with pytest.raises(ConfigurationError, match="task is 3, expected 0 to 2"):
        tdmpc2(**TASKS).encode(torch.randn(1, 4), task=3)


# Presets


def test_presets_are_made_and_saved_by_name(tmp_path: Path):
    model = create_world_model("tdmpc2:tiny", obs_shape=(24,), action_dim=6, learning_rate=1e-3)
    assert isinstance(model, TDMPC2)
    assert (model.config.model_name, model.config.learning_rate) == ("tiny", 1e-3)
    state = model.encode(torch.randn(2, 24))
    assert model.policy(state).shape == (2, 6) and model.value(state).shape == (2,)
    model.save_pretrained(tmp_path)
    again = create_world_model(tmp_path)
    assert isinstance(again, TDMPC2)
    obs = torch.randn(3, 24)
    assert torch.equal(again.encode(obs)["latent"], model.encode(obs)["latent"])
    assert {"tdmpc2:5m", "tdmpc2:317m", "tdmpc2:reference-5m"} <= set(list_models())


def test_every_listed_size_is_as_large_as_its_name_says():
    listed = list_models(verbose=True)
    for name in ("5m", "19m", "48m", "317m"):
        millions = int(name[:-1]) * 1e6
        assert listed[f"tdmpc2:{name}"]["params"] == pytest.approx(millions, rel=0.01), name
        with torch.device("meta"):
            vectors = TDMPC2(TDMPC2Config.from_size(name, obs_shape=(24,)))
        count = sum(p.numel() for p in vectors.parameters() if p.requires_grad)
        assert count == pytest.approx(millions, rel=0.01), name
    assert "tdmpc2" in listed["tdmpc2:5m"]["aliases"]


def test_the_online_defaults_are_one_gradient_step_per_environment_step():
    defaults = tdmpc2(episode_length=500).online_defaults()
    assert defaults.train_ratio is None  # one gradient step for each environment step
    assert (defaults.batch_size, defaults.seq_len, defaults.buffer_size) == (256, 4, 1_000_000)
    assert (defaults.learning_starts, defaults.random_start, defaults.planner) == (2500, True, "mppi")
    assert tdmpc2(episode_length=100).online_defaults().learning_starts == 1000


@pytest.mark.parametrize(("samples", "proposed"), [(512, 24), (192, 12), (2048, 24), (16, 1), (8, 0)])
def test_the_policys_share_of_the_samples_follows_their_number(samples: int, proposed: int):
    assert TDMPC2Config.from_size("5m", num_samples=samples, num_elites=4).num_pi_trajs == proposed
    assert TDMPC2Config.from_size("tiny", num_samples=samples, num_elites=4).num_pi_trajs == proposed
    assert TDMPC2Config.from_size("5m", num_samples=samples, num_elites=4, num_pi_trajs=3).num_pi_trajs == 3
