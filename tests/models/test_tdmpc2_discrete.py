"""TD-MPC2 with discrete actions: its policy, the gradient of the policy, and learning."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from helpers.small_models import TDMPC2 as SMALL
from torch import Tensor

from worldflux import create_world_model
from worldflux.models.tdmpc2.policy import alternatives, categorical, expected_value
from worldflux.models.tdmpc2.world_model import TDMPC2
from worldflux.nn.distributions import gumbel_noise, one_hots
from worldflux.training import Batch, ReplayBuffer, Trainer, TrainingConfig, train

CLASSES = {"discrete": (3,), "two parts": (2, 3), "binary": (2, 2, 2)}
CPU = torch.device("cpu")


def build(classes: tuple[int, ...], **fields) -> TDMPC2:
    torch.manual_seed(0)
    kind = "discrete" if len(classes) == 1 else "multi_discrete"
    return create_world_model(
        "tdmpc2:tiny", obs_shape=(4,), action_dim=sum(classes), action_type=kind, action_classes=classes,
        **{**SMALL, **fields},
    )  # fmt: skip


def batch_for(model: TDMPC2, B: int = 4, T: int = 5) -> Batch:
    rng = torch.Generator().manual_seed(1)
    actions = one_hots(torch.rand(B, T, model.config.action_dim, generator=rng), model.config.action_classes)
    extras = {} if model.tasks is None else {"task": torch.arange(B).remainder(2).unsqueeze(1).expand(B, T)}
    return Batch(
        obs=torch.randn(B, T, 4, generator=rng),
        actions=actions,
        rewards=torch.randn(B, T, generator=rng),
        terminations=torch.rand(B, T, generator=rng) < 0.1,
        is_first=torch.zeros(B, T, dtype=torch.bool),
        extras=extras,
    )


# The policy


@pytest.mark.parametrize("classes", CLASSES.values())
def test_samples_are_one_hot_and_follow_the_probabilities(classes):
    torch.manual_seed(0)
    raw = torch.randn(sum(classes))
    sample = categorical(raw, gumbel_noise(20_000, sum(classes), device=CPU), classes)
    expected = torch.cat([part.softmax(-1) for part in raw.split(classes)])
    torch.testing.assert_close(sample.probs, expected)
    torch.testing.assert_close(sample.action.mean(0), expected, atol=0.02, rtol=0.0)
    for part in sample.action.split(classes, -1):
        assert (part.sum(-1) == 1.0).all()
    most = categorical(raw, torch.zeros(()), classes)
    assert torch.equal(most.action, torch.cat([torch.eye(len(p))[p.argmax()] for p in raw.split(classes)]))


def test_entropies_by_hand():
    even = categorical(torch.zeros(5), torch.zeros(5), (2, 3))
    torch.testing.assert_close(even.entropy, torch.tensor([2.0, 3.0]).log().sum())
    torch.testing.assert_close(even.scaled_entropy, 2.0 * even.entropy)
    masked = categorical(torch.zeros(5), torch.zeros(5), (2, 3), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(masked.entropy, torch.tensor([2.0, 2.0]).log().sum())
    assert masked.probs.tolist() == [0.5, 0.5, 0.5, 0.5, 0.0]
    gone = categorical(torch.zeros(5), torch.zeros(5), (2, 3), torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))
    assert gone.action.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(gone.entropy, torch.tensor(2.0).log())


def test_numbers_that_are_not_finite_give_actions_that_are_not_finite():
    assert categorical(torch.tensor([0.0, torch.nan]), torch.zeros(2), (2,)).action.isnan().all()


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("classes", CLASSES.values())
def test_a_model_acts_with_one_hots(classes, deterministic):
    model = build(classes).eval()
    actions = model.policy(model.encode(torch.randn(50, 4)), deterministic=deterministic)
    assert actions.shape == (50, sum(classes))
    for part in actions.split(classes, -1):
        assert (part.sum(-1) == 1.0).all() and (part.amax(-1) == 1.0).all()


# Its gradient


def test_alternatives_by_hand():
    found = alternatives(torch.tensor([[0.0, 1.0, 1.0, 0.0]]), (2, 2))[:, 0]
    assert found.tolist() == [[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize("classes", CLASSES.values())
def test_the_gradient_is_that_of_the_expected_value(classes):
    """Averaged over all samples by their probabilities; with a single part, each sample has the exact gradient."""
    torch.manual_seed(0)
    raw = torch.randn(sum(classes), requires_grad=True)
    joint = [
        torch.cat([torch.eye(n)[i] for i, n in zip(index, classes, strict=True)])
        for index in product(*map(range, classes))
    ]
    worth = torch.randn(*classes)

    def value(actions: Tensor) -> Tensor:
        return worth[tuple(part.argmax(-1) for part in actions.split(classes, -1))]

    def probability(action: Tensor) -> Tensor:
        return (categorical(raw, torch.zeros(()), classes).probs * action + 1.0 - action).prod()

    exact = torch.stack([probability(action) * value(action) for action in joint]).sum()
    (wanted,) = torch.autograd.grad(exact, raw)
    mean, gradient = torch.zeros(()), torch.zeros_like(raw)
    for action in joint:
        probs = categorical(raw, torch.zeros(()), classes).probs
        estimate = expected_value(value(alternatives(action, classes)), probs, len(classes))
        (slope,) = torch.autograd.grad(estimate, raw)
        if len(classes) == 1:
            torch.testing.assert_close(slope, wanted)
        mean = mean + probability(action).detach() * estimate.detach()
        gradient = gradient + probability(action).detach() * slope
    torch.testing.assert_close(mean, exact.detach())
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("classes", CLASSES.values())
def test_the_policys_loss_trains_the_policy_alone(classes):
    model = build(classes, dropout=0.1)
    torch.nn.init.normal_(model.critics.layers[-1].weight)
    found = model.model_loss(batch_for(model))
    model.policy_loss(found).loss.backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"actor"}


def test_critics_that_ignore_actions_prefer_none_whatever_dropout_leaves_of_them():
    model = build((2, 3), dropout=0.5, entropy_coef=0.0)
    with torch.no_grad():
        model.critics.layers[-1].weight.normal_()
        model.critics.layers[0].weight[..., -5:] = 0.0
    model.policy_loss(model.model_loss(batch_for(model))).loss.backward()
    assert max(weights.grad.abs().max() for weights in model.actor.parameters()) < 1e-6


@pytest.mark.parametrize("classes", CLASSES.values())
def test_the_policy_comes_to_prefer_what_the_critics_value(classes):
    """Fixed critics value the last class of each part; only the policy is trained."""
    model = build(classes, entropy_coef=1e-4)
    last = [sum(classes[: i + 1]) - 1 for i in range(len(classes))]
    wanted = torch.zeros(sum(classes)).index_fill(0, torch.tensor(last), 1.0)
    model._q = lambda ensemble, inputs, *_, **__: (inputs[-1] @ wanted).expand(2, *inputs[-1].shape[:-1])  # type: ignore[method-assign]
    optimizer = torch.optim.Adam(model.actor.parameters(), 0.01)
    found = model.model_loss(batch_for(model))
    for _ in range(60):
        optimizer.zero_grad()
        model.policy_loss(found).loss.backward()
        optimizer.step()
    state = model.encode(torch.randn(20, 4))
    assert (model.policy(state) @ wanted).mean() > 0.9 * len(classes)


# Tasks, files, learning


def test_tasks_have_their_own_classes():
    model = build((4,), num_tasks=2, task_dim=4, task_action_dims=(2, 4))
    state = model.encode(torch.randn(400, 4), task=torch.arange(400).remainder(2))
    used = model.policy(state).view(200, 2, 4).sum(0)
    assert (used[0, 2:] == 0).all() and (used[0, :2] > 0).all() and (used[1] > 0).all()
    losses = Trainer(model, TrainingConfig(device="cpu")).step(batch_for(model))
    assert all(torch.isfinite(torch.as_tensor(value)) for value in losses.values())


def test_a_saved_model_acts_the_same(tmp_path: Path):
    model = build((2, 3)).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = create_world_model(tmp_path / "model").eval()
    obs = torch.randn(20, 4)
    ours, theirs = (m.policy(m.encode(obs), deterministic=True) for m in (model, loaded))
    assert loaded.config == model.config and torch.equal(ours, theirs)


def test_a_bandit_is_learned_from_recorded_data():
    """The reward is 1 if the action is the class that the observation shows; trained offline, the policy knows it."""
    rng = torch.Generator().manual_seed(0)
    buffer = ReplayBuffer(2000, (3,), 3, action_type="discrete", seed=0)
    for _ in range(100):
        shown = torch.eye(3)[torch.randint(3, (11,), generator=rng)]
        actions = torch.eye(3)[torch.randint(3, (10,), generator=rng)]
        buffer.add_episode(shown.numpy(), actions.numpy(), (shown[:10] * actions).sum(-1).numpy())
    torch.manual_seed(0)
    model = create_world_model(
        "tdmpc2:tiny", obs_shape=(3,), action_dim=3, action_type="discrete",
        **{**SMALL, "latent_dim": 32, "hidden_dim": 32, "mlp_dim": 32, "enc_dim": 32, "discount_max": 0.5,
           "discount_min": 0.5, "value_coef": 1.0, "reward_coef": 1.0},
    )  # fmt: skip
    train(model, buffer, total_steps=300, batch_size=32, sequence_length=6, learning_rate=3e-3, device="cpu")
    model.eval()
    actions = model.policy(model.encode(torch.eye(3)), deterministic=True)
    assert torch.equal(actions, torch.eye(3))
