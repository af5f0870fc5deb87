"""Learning where the optimum is known: repeat what is seen, as SB3 tests its own algorithms.

Every step of SB3's identity environments earns 1 if the action is the observation, 100 in an episode; random actions
earn about 44 of these where a distance of 0.5 counts as equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.envs import IdentityEnvBox
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from worldflux.agents import WorldFluxAgent

SETTINGS: dict[str, Any] = dict(
    batch_size=32,
    learning_rate=3e-3,
    planner_kwargs=dict(num_samples=24, num_elites=6, num_pi_trajs=4, iterations=2),
    model_kwargs=dict(
        latent_dim=32, hidden_dim=32, mlp_dim=32, enc_dim=32, num_q_networks=2, horizon=1, discount_min=0.1
    ),
)  # fmt: skip


def test_tdmpc2_learns_to_repeat_a_number_between_bounds() -> None:
    env = Monitor(IdentityEnvBox(eps=0.5))
    agent = WorldFluxAgent("tdmpc2:tiny", env, learning_starts=100, device="cpu", seed=0, **SETTINGS)

    agent.learn(250)

    unseen = Monitor(IdentityEnvBox(eps=0.5))
    unseen.action_space.seed(99)
    assert np.mean(evaluate_policy(agent, unseen, n_eval_episodes=2, deterministic=True)[0]) >= 90
