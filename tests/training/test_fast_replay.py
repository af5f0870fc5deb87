"""DreamerV3's fast computations where users are: on batches of the real replay buffer, in `learn` and in `train`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from helpers.envs import CountingEnv
from helpers.fast import SMALL, episodes, times_entered
from torch import Tensor

from worldflux import WorldFluxAgent, create_world_model
from worldflux.training import Batch, Trainer, TrainingConfig
from worldflux.training.callbacks import Callback


@pytest.mark.parametrize("obs", ["vector", "image", "dict"])
def test_every_update_of_learn_takes_the_fast_form(obs: str) -> None:
    sizes = SMALL if obs == "vector" else {**SMALL, "cnn_depth": 2, "bspace": 4}
    env = CountingEnv(lengths=(3, 7), ends=("terminate", "truncate"), obs=obs)
    agent = WorldFluxAgent(
        "dreamerv3:tiny", env, batch_size=4, seq_len=6, train_ratio=12, learning_starts=30, seed=0, device="cpu",
        model_kwargs=sizes,
    )  # fmt: skip
    entered = times_entered(lambda: agent.learn(42))
    assert entered == agent.trainer.step_count > 5


@pytest.mark.parametrize("storage", [None, "disk", "cpu"])
@pytest.mark.parametrize("finals", [True, False])
def test_every_update_of_train_takes_the_fast_form(storage: str | None, finals: bool, tmp_path: Path) -> None:
    buffer = episodes(finals=finals, storage=tmp_path / "rows" if storage == "disk" else storage)
    model = create_world_model("dreamerv3:tiny", obs_shape=(3,), action_dim=2, **SMALL)
    trainer = Trainer(model, TrainingConfig(total_steps=5, batch_size=4, sequence_length=6, device="cpu"))
    assert times_entered(lambda: trainer.train(buffer)) == 5


def test_a_provider_of_the_four_documented_fields_takes_the_fast_form() -> None:
    class FourFields:
        def sample(self, batch_size: int, seq_len: int | None = None, device: str = "cpu") -> Batch:
            shape = (batch_size, seq_len or 6)
            ends = torch.rand(shape) < 0.2
            return Batch(torch.randn(*shape, 3), torch.rand(*shape, 2), torch.randn(shape), ends)

    model = create_world_model("dreamerv3:tiny", obs_shape=(3,), action_dim=2, **SMALL)
    trainer = Trainer(model, TrainingConfig(total_steps=3, batch_size=4, sequence_length=6, device="cpu"))
    assert times_entered(lambda: trainer.train(FourFields())) == 3


def test_the_plain_form_is_taken_where_it_is_asked_for() -> None:
    model = create_world_model("dreamerv3:tiny", obs_shape=(3,), action_dim=2, **SMALL)
    model.rssm.fast = False  # type: ignore[union-attr]
    trainer = Trainer(model, TrainingConfig(total_steps=2, batch_size=4, sequence_length=6, device="cpu"))
    assert times_entered(lambda: trainer.train(episodes(finals=True))) == 0


class Recorded(Callback):
    """Keeps the losses of every step."""

    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []

    def on_step_end(self, step: int, losses: Any) -> None:
        self.losses.append(dict(losses))


@pytest.mark.parametrize("context", [True, False])
@pytest.mark.parametrize("finals", [True, False])
def test_ten_updates_on_replayed_windows_equal_those_of_the_plain_form(finals: bool, context: bool) -> None:
    torch.manual_seed(0)
    made = create_world_model("dreamerv3:tiny", obs_shape=(3,), action_dim=2, **SMALL)
    found: list[tuple[list[dict[str, float]], dict[str, Tensor]]] = []
    for fast in (False, True):
        model = copy.deepcopy(made)
        model.rssm.fast = fast  # type: ignore[union-attr]
        buffer = episodes(finals=finals, model=model if context else None)
        assert (buffer.sample(30, 12).obs_mask is None) == finals
        recorded = Recorded()
        config = TrainingConfig(
            total_steps=10, batch_size=4, sequence_length=12, learning_rate=1e-3, device="cpu", grad_clip=0.0
        )
        found.append((recorded.losses, dict(Trainer(model, config, [recorded]).train(buffer).named_parameters())))
    (plain_losses, plain), (fast_losses, fast_parameters) = found
    assert plain_losses[0]["loss"] != plain_losses[9]["loss"]
    for ours, theirs in zip(fast_losses, plain_losses, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)
    torch.testing.assert_close(fast_parameters, plain, rtol=1e-3, atol=2e-4)


def test_the_gradient_reaches_the_prior_where_nothing_was_seen() -> None:
    torch.manual_seed(0)
    model = create_world_model("dreamerv3:tiny", obs_shape=(3,), action_dim=2, **SMALL)
    for head in (model.reward_head, model.critic, model.slow_critic):  # type: ignore[union-attr]
        torch.nn.init.normal_(head.out.weight, std=0.1)  # type: ignore[union-attr,arg-type]
    batch = episodes(finals=False).sample(6, 12)
    assert batch.obs_mask is not None and not batch.obs_mask.all(1).all()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    for fast in (False, True):
        model.rssm.fast = fast  # type: ignore[union-attr]
        torch.manual_seed(0)
        gradients.append(torch.autograd.grad(model.loss(batch).loss, trained))
    for plain, ours in zip(*gradients, strict=True):
        assert (ours - plain).norm() <= 1e-4 * plain.norm()


def test_batches_have_a_mask_only_where_something_was_not_seen() -> None:
    agent = WorldFluxAgent("dreamerv3:tiny", gym.make("CartPole-v1"), learning_starts=100, device="cpu", seed=0)
    agent.learn(90)
    assert agent.replay_buffer is not None
    assert agent.replay_buffer.sample(16, 20).obs_mask is None
    unseen = episodes(finals=False)
    masked = unseen.sample(50, 6)
    assert masked.obs_mask is not None and bool((masked.obs[~masked.obs_mask] == 0).all())
    several = [unseen.sample(1, 3).obs_mask for _ in range(50)]
    assert any(mask is None for mask in several) and any(mask is not None for mask in several)
    assert not any(mask.all() for mask in several if mask is not None)
