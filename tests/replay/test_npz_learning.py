"""A file without the observations after the last steps still teaches the rewards and terminations of those steps.

Episodes of four steps, of which only the last one earns anything and ends the episode: whoever loses what the last step
led to learns that nothing is ever earned and that episodes never end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from worldflux import WorldModel, create_world_model
from worldflux.training import Batch, ReplayBuffer, train

LENGTH, EPISODES = 4, 40
FAMILIES: dict[str, dict[str, Any]] = {
    "dreamerv3:tiny": dict(
        deter_dim=32, hidden_dim=16, units=16, stoch_discrete=4, stoch_classes=4, blocks=4, bins=41,
        imagination_horizon=1, imag_last=1,
    ),
    "tdmpc2:tiny": dict(
        latent_dim=16, hidden_dim=16, mlp_dim=16, enc_dim=16, num_q_networks=2, horizon=2, num_bins=15, episodic=True,
        reward_coef=1.0,
    ),
}  # fmt: skip


def arrays() -> dict[str, Any]:
    """The documented arrays of all episodes, one after another."""
    place = np.tile(np.arange(LENGTH), EPISODES)
    ends = place == LENGTH - 1
    return dict(
        obs=np.eye(LENGTH + 1, dtype=np.float32)[place],
        actions=np.random.default_rng(0).uniform(-1, 1, (len(place), 1)).astype(np.float32),
        rewards=ends.astype(np.float32),
        dones=ends,
        obs_shape=np.array([LENGTH + 1]),
        action_dim=1,
        capacity=1000,
    )


def from_file(tmp_path: Path) -> ReplayBuffer:
    np.savez(tmp_path / "a.npz", **arrays())
    buffer = ReplayBuffer.load(tmp_path / "a.npz", seed=0)
    assert len(buffer) == LENGTH * EPISODES
    return buffer


def with_final_observations() -> ReplayBuffer:
    buffer, data = ReplayBuffer(1000, (LENGTH + 1,), 1, seed=0), arrays()
    last = np.eye(LENGTH + 1, dtype=np.float32)[-1:]
    for start in range(0, LENGTH * EPISODES, LENGTH):
        part = {name: data[name][start : start + LENGTH] for name in ("obs", "actions", "rewards", "dones")}
        buffer.add_episode(**{**part, "obs": np.concatenate([part["obs"], last])})
    return buffer


def small_model(family: str) -> WorldModel:
    torch.manual_seed(0)
    return create_world_model(family, obs_shape=(LENGTH + 1,), action_dim=1, **FAMILIES[family])


def one_step_ahead(model: WorldModel) -> tuple[Tensor, Tensor]:
    """What the model expects of a step at each place of an episode: reward and chance to go on. `[4]`, `[4]`"""
    torch.manual_seed(0)
    rows, rewards, continues = 64, [], []
    obs, action = torch.eye(LENGTH + 1), torch.zeros(rows, 1)
    with torch.no_grad():
        state = model.encode(obs[0].expand(rows, -1))
        for t in range(LENGTH):
            step = model.rollout(state, action[None])
            rewards.append(step.rewards.mean())
            continues.append(step.continues.mean())
            state = model.update(state, action, obs[t + 1].expand(rows, -1))
    return torch.stack(rewards), torch.stack(continues)


def gradient_of(model: WorldModel, name: str, batch: Batch) -> Tensor:
    torch.manual_seed(1)
    head: Any = getattr(model, name)
    model.zero_grad(set_to_none=True)
    if model.config.model_type == "tdmpc2":
        model.phases()[0].loss(batch, []).loss.backward()
    else:
        model.loss(batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in head.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_losses_see_the_last_steps_of_such_a_file(family: str, tmp_path: Path) -> None:
    model, batch = small_model(family), from_file(tmp_path).sample(16, 10)
    assert not batch.obs_mask.all() and batch.terminations.any()
    fields = {field: getattr(batch, field) for field in batch.__dataclass_fields__}
    end_head = "continue_head" if family.startswith("dreamerv3") else "termination_head"
    for head, field in (("reward_head", "rewards"), (end_head, "terminations")):
        # The same windows, in which the last steps earn nothing, or are only cut off.
        without = {field: torch.zeros_like(fields[field]), "truncations": batch.terminations | batch.truncations}
        seen, unseen = (gradient_of(model, head, Batch(**{**fields, **changed})) for changed in ({}, without))
        assert (seen - unseen).norm() > 0.05 * seen.norm() > 0, head


@pytest.mark.parametrize("family", FAMILIES)
def test_such_a_file_teaches_the_last_reward_and_the_end_as_well_as_a_complete_one(family: str, tmp_path: Path) -> None:
    for buffer in (from_file(tmp_path), with_final_observations()):
        model = train(
            small_model(family),
            buffer,
            total_steps=100,
            batch_size=8,
            sequence_length=10,
            learning_rate=1e-2,
            device="cpu",
            seed=0,
        )
        rewards, continues = one_step_ahead(model)
        assert rewards[:3].max() < 0.35 and 0.65 < rewards[3] < 1.35, rewards
        assert continues[:3].min() > 0.6 and continues[3] < 0.3, continues
