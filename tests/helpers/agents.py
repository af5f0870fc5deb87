"""Small agents."""

from __future__ import annotations

from typing import Any

import torch

from worldflux.agents import WorldFluxAgent

TINY = dict(deter_dim=32, hidden_dim=8, stoch_discrete=4, stoch_classes=4, units=8, cnn_depth=2, imagination_horizon=3)


SETTINGS: dict[str, Any] = dict(
    batch_size=2, seq_len=6, train_ratio=6, buffer_size=500, learning_starts=10, device="cpu", seed=0, model_kwargs=TINY
)


def make_agent(env: Any = "CartPole-v1", **settings: Any) -> WorldFluxAgent:
    return WorldFluxAgent("dreamerv3:tiny", env, **{**SETTINGS, **settings})


def weights(agent: WorldFluxAgent) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for tensor in agent.model.state_dict().values()])
