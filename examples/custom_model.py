"""A world model of your own: a network that predicts the next observation and the reward, and a planner that acts.

The family is registered under a name, and from then on it has everything that the built-in families have: online and
offline training, planning, checkpoints, files and the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import tyro
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from worldflux import State, WorldFluxAgent, WorldModel, WorldModelConfig, register_model
from worldflux.envs import make_env
from worldflux.models.base import LossOutput, OnlineDefaults, OptimizerSpec, Trajectory
from worldflux.training import Batch


@dataclass(frozen=True)
class DynamicsConfig(WorldModelConfig):
    """The fields of the family; `model_type` is the name by which its files are recognised."""

    model_type: str = "dynamics"
    obs_shape: tuple[int, ...] = (3,)
    hidden_dim: int = 128


class DynamicsModel(WorldModel):
    """Predicts the change of a vector observation and the reward. Its state is the observation itself."""

    config_class = DynamicsConfig

    def __init__(self, config: DynamicsConfig) -> None:
        super().__init__(config)
        (width,), hidden = config.obs_shape, config.hidden_dim
        self.network = nn.Sequential(
            nn.Linear(width + config.action_dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, width + 1),
        )

    def predict(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """The next observation `[..., D]` and the reward `[...]`."""
        change, reward = self.network(torch.cat([obs, action], -1)).split([obs.shape[-1], 1], -1)
        return obs + change, reward.squeeze(-1)

    # What an agent needs to act: the state after an observation.

    def initial_state(self, batch_size: int) -> State:
        """The state before any observation."""
        return State({"obs": torch.zeros(batch_size, *self.config.obs_shape, device=self.device)})

    def encode(self, obs: Tensor, *, deterministic: bool = False) -> State:
        """The state after the first observation."""
        return State({"obs": obs})

    def update(self, state: State, action: Tensor, obs: Tensor, **options: Any) -> State:
        """The state after an action and the observation that followed. A recurrent model would use all three."""
        return State({"obs": obs})

    # What a planner needs: predictions of the model.

    def rollout(self, state: State, actions: Tensor, *, deterministic: bool = False) -> Trajectory:
        """Predicts the results of a sequence of actions."""
        obs, states, rewards = state["obs"], [], []
        for action in actions:
            obs, reward = self.predict(obs, action)
            states.append(State({"obs": obs}))
            rewards.append(reward)
        earned = torch.stack(rewards)
        return Trajectory(State.stack(states), earned, torch.ones_like(earned))

    def policy(self, state: State, deterministic: bool = False) -> Tensor:
        """Random actions, which the planner improves."""
        actions = torch.zeros(len(state["obs"]), self.config.action_dim, device=self.device)
        return actions if deterministic else actions.uniform_(-1.0, 1.0)

    def value(self, state: State) -> Tensor:
        """The model looks no further than the planner does."""
        return torch.zeros(len(state["obs"]), device=self.device)

    # What training needs.

    def loss(self, batch: Batch) -> LossOutput:
        """The squared errors of the predictions within episodes."""
        obs, reward = self.predict(batch.obs[:, :-1], batch.actions[:, :-1])
        inside = ~batch.is_first[:, 1:]  # a row that starts an episode does not follow from the row before it
        dynamics = mse_loss(obs[inside], batch.obs[:, 1:][inside])
        rewards = mse_loss(reward[inside], batch.rewards[:, :-1][inside])
        return LossOutput(dynamics + rewards, {"dynamics": dynamics.detach(), "reward": rewards.detach()})

    @property
    def optimizer_spec(self) -> OptimizerSpec:
        """The optimiser."""
        return OptimizerSpec("adam", learning_rate=1e-3)

    def online_defaults(self) -> OnlineDefaults:
        """The settings of an agent: one gradient step for each environment step, after 500 random actions."""
        return OnlineDefaults(
            train_ratio=None,
            batch_size=32,
            seq_len=8,
            buffer_size=100_000,
            learning_starts=500,
            random_start=True,
            planner="mppi",
        )


register_model("dynamics", DynamicsConfig, DynamicsModel, sizes={"small": {}, "large": {"hidden_dim": 512}})


def main(*, steps: int = 2_000, episodes: int = 10, seed: int = 0, horizon: int = 15, candidates: int = 128) -> float:
    """Trains an agent with the family on Pendulum, and prints its mean return.

    Args:
        steps: Environment steps.
        episodes: Evaluation episodes.
        seed: Seed of everything.
        horizon: Steps that the planner looks ahead.
        candidates: Sequences of actions that the planner compares.
    """
    agent = WorldFluxAgent(
        "dynamics:small",
        "Pendulum-v1",
        planner_kwargs={"horizon": horizon, "num_samples": candidates, "num_elites": candidates // 8, "discount": 1.0},
        seed=seed,
        verbose=1,
    )
    agent.learn(steps)
    mean, deviation = evaluate_policy(agent, Monitor(make_env("Pendulum-v1")), n_eval_episodes=episodes)
    print(f"mean return of {episodes} episodes: {mean:.0f} (standard deviation {deviation:.0f})")
    return float(mean)


if __name__ == "__main__":
    tyro.cli(main)
