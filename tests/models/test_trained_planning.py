"""Both planners with trained models of both families, for the reward that they learned and for another goal."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from worldflux import PlannedTrajectory, WorldModel, create_world_model
from worldflux.config import PlannerConfig
from worldflux.models.planning import Planner
from worldflux.training import ReplayBuffer, Trainer, TrainingConfig

LEARNED, ELSEWHERE = 0.3, -0.4
CASES = [
    ("tdmpc2", dict(latent_dim=32, hidden_dim=32, mlp_dim=32, enc_dim=32, num_q_networks=2, num_bins=41,
                    use_decoder=True), dict(steps=200, learning_rate=1e-3), 0.1),
    ("dreamerv3", dict(deter_dim=32, hidden_dim=16, units=32, stoch_discrete=4, stoch_classes=8, blocks=4, bins=41,
                       imagination_horizon=3), dict(steps=300, learning_rate=4e-3), 0.35),
]  # fmt: skip


@cache
def trained(family: str) -> WorldModel:
    """A model of a point that moves by half its action, rewarded for being at 0.3."""
    _, sizes, fit, _ = next(case for case in CASES if case[0] == family)
    rng, buffer = np.random.default_rng(0), ReplayBuffer(1000, (2,), 1, seed=0)
    for _ in range(20):
        actions = rng.uniform(-1.0, 1.0, (50, 1)).astype(np.float32)
        places = [rng.uniform(-1.0, 1.0)]
        for action in actions[:, 0]:
            places.append(np.clip(places[-1] + 0.5 * action, -1.0, 1.0))
        observed = np.outer(places, [1.0, -1.0]).astype(np.float32)
        buffer.add_episode(observed[:-1], actions, -np.abs(np.array(places[1:], np.float32) - LEARNED))
    torch.manual_seed(0)
    model = create_world_model(f"{family}:tiny", obs_shape=(2,), action_dim=1, **sizes)
    trainer = Trainer(model, TrainingConfig(learning_rate=fit["learning_rate"], warmup_steps=0, device="cpu", seed=0))
    for _ in range(fit["steps"]):
        trainer.step(buffer.sample(16, 8))
    return model.eval()


def near_elsewhere(trajectory: PlannedTrajectory) -> torch.Tensor:
    return -(trajectory.observations[..., 0] - ELSEWHERE).abs()  # type: ignore[index]


@pytest.mark.parametrize("temperature", [0.5, None], ids=["mppi", "cem"])
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case[0], marks=pytest.mark.slow if case[0] == "dreamerv3" else ()) for case in CASES]
)
def test_planners_reach_the_goal_that_was_learned_and_another_one(case: Any, temperature: float | None) -> None:
    family, _, _, tolerance = case
    model, places = trained(family), torch.tensor([-0.5, 0.0, 0.6])
    state = model.encode(torch.stack([places, -places], 1), deterministic=True)
    config = PlannerConfig(horizon=2, num_samples=128, num_elites=16, discount=0.5, temperature=temperature)
    planner = Planner(model, config)

    for goal, objective in ((LEARNED, None), (ELSEWHERE, near_elsewhere)):
        planner.objective = objective
        actions, _ = planner.plan(state, planner.start(3), deterministic=True)
        after = places + 0.5 * actions[:, 0]
        nearest = places + (goal - places).clamp(-0.5, 0.5)
        torch.testing.assert_close(after, nearest, atol=tolerance, rtol=0.0)
