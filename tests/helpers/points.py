"""A model whose optimal plans are known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from worldflux.config import WorldModelConfig
from worldflux.models.base import State, Trajectory, WorldModel
from worldflux.models.mppi import PartialReturn

GOAL = torch.tensor([0.3, -0.6])


class PointModel(WorldModel):
    """Point that moves by its action, with the negative squared distance to a goal as reward and a bad policy."""

    discount = 0.9

    def __init__(self, **fields) -> None:
        super().__init__(WorldModelConfig(**{"obs_shape": (2,), "action_dim": 2, **fields}))
        self.goal = nn.Parameter(GOAL.clone())

    def rollout(self, state: State, actions: Tensor, *, deterministic: bool = False) -> Trajectory:
        places = state["place"] + actions.cumsum(0)
        rewards = -(places - self.goal).square().sum(-1)
        return Trajectory(State({"place": places}), rewards, torch.ones_like(rewards))

    def policy(self, state: State, deterministic: bool = False) -> Tensor:
        actions = (state["place"] - self.goal).sign()
        return actions if deterministic else actions + 0.1 * torch.randn_like(actions)

    def value(self, state: State) -> Tensor:
        return -(state["place"] - self.goal).square().sum(-1)

    def best_action(self, state: State) -> Tensor:
        return (self.goal - state["place"]).clamp(-1.0, 1.0)


class MaskedPointModel(PointModel):
    """Point model with the methods of `PlanningModel`, whose second action dimension does not exist in even rows."""

    def action_mask(self, state: State) -> Tensor:
        mask = torch.ones_like(state["place"])
        mask[::2, 1] = 0.0
        return mask

    def propose(self, state: State, noise: Tensor, *, deterministic: bool) -> Tensor:
        return torch.tanh(noise)

    def partial_return(self, state, actions, *, discount, deterministic) -> PartialReturn:
        places = state["place"].unsqueeze(1) + actions.cumsum(0)
        earned = -(places - self.goal).square().sum((0, -1))
        return PartialReturn(earned, torch.zeros_like(earned), State({"place": places[-1]}))

    def estimated_return(self, partial, *, deterministic, noise=None, members=None) -> Tensor:
        return partial.earned


def points(*places: tuple[float, float]) -> State:
    return State({"place": torch.tensor(places)})


PLACES = points((0.0, 0.0), (0.9, -0.2), (-4.0, 3.0), (0.3, -0.6))
