"""Acting with a world model: the recurrent state that goes from one observation to the next."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldflux.envs.spaces import ActionCodec, Array, Arrays, ObservationCodec
from worldflux.errors import ShapeMismatchError
from worldflux.models.base import State, WorldModel
from worldflux.models.planning import Planner
from worldflux.training.batch import Observation

Memory = tuple[np.ndarray, ...]
"""What `predict` hands back and takes again: the state's arrays in the order of their names, the last actions, and,
where the agent plans, the plan."""


@dataclass(frozen=True)
class Acting:
    """What goes from one observation to the next, for N environments."""

    state: State
    """`[N, ...]`"""
    actions: Tensor
    """The last ones, in the library's form. `[N, A]`"""
    plan: Tensor | None
    """The planner's means; None where there is no planner. `[N, H, A]`"""


class Actor:
    """Turns observations into actions; it keeps nothing between two calls.

    Args:
        model: Which acts.
        obs_codec: Of the environment's observations.
        action_codec: Of the environment's actions.
        planner: Chooses the actions in place of the model's policy.
    """

    def __init__(
        self,
        model: WorldModel,
        obs_codec: ObservationCodec,
        action_codec: ActionCodec,
        planner: Planner | None = None,
    ) -> None:
        self.model = model
        self.obs_codec = obs_codec
        self.action_codec = action_codec
        self.planner = planner

    @torch.inference_mode()
    def start(self, rows: int) -> Acting:
        """What there is before the first observation."""
        no_actions = torch.zeros(rows, self.action_codec.action_dim, device=self.model.device)
        plan = None if self.planner is None else self.planner.start(rows)
        return Acting(self.model.initial_state(rows), no_actions, plan)

    @torch.inference_mode()
    def observe(self, acting: Acting, obs: Arrays, episode_starts: Array, *, deterministic: bool) -> Acting:
        """With the state after the last actions and the observations that followed.

        Args:
            acting: From the step before.
            obs: In the library's form. `[N, ...]`
            episode_starts: True where `obs` begins an episode; state and action of that row are ignored. `[N]`
            deterministic: Take the likeliest state, without random numbers.
        """
        if self.model.training:
            self.model.eval()
        device = self.model.device
        state = self.model.update(
            acting.state,
            acting.actions,
            _to_torch(obs, device),
            is_first=torch.as_tensor(episode_starts, dtype=torch.bool, device=device),
            deterministic=deterministic,
        )
        return replace(acting, state=state)

    @torch.inference_mode()
    def act(self, acting: Acting, episode_starts: Array, *, deterministic: bool) -> Acting:
        """With the actions to take in the state, unclipped, and the plan behind them.

        Args:
            acting: From `observe`.
            episode_starts: True where an episode begins; the plan of that row is ignored. `[N]`
            deterministic: Take the likeliest actions, without random numbers.
        """
        if self.planner is None or acting.plan is None:
            return replace(acting, actions=self.model.policy(acting.state, deterministic=deterministic).float())
        is_first = torch.as_tensor(episode_starts, dtype=torch.bool, device=self.model.device)
        actions, plan = self.planner.plan(acting.state, acting.plan, is_first=is_first, deterministic=deterministic)
        return replace(acting, actions=actions.float(), plan=plan)

    def predict(
        self, observation: Any, memory: Memory | None, episode_start: Any, deterministic: bool
    ) -> tuple[Array, Memory]:
        """SB3's protocol; see `WorldFluxAgent.predict`."""
        obs, batched = self.obs_codec.encode_any(observation)
        rows = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        acting = self.start(rows)
        starts = np.ones(rows, dtype=bool)
        if memory is not None:
            acting = _recall(memory, acting)
            starts = _episode_starts(episode_start, rows)
        acting = self.observe(acting, obs, starts, deterministic=deterministic)
        acting = self.act(acting, starts, deterministic=deterministic)
        actions = self.action_codec.to_env(_to_numpy(acting.actions))
        memory = tuple(_to_numpy(tensor) for tensor in _tensors(acting).values())
        return (actions if batched else actions.squeeze(axis=0)), memory


def _tensors(acting: Acting) -> dict[str, Tensor]:
    """All tensors by their names, in the order of a memory."""
    named = {**{name: acting.state[name] for name in sorted(acting.state)}, "actions": acting.actions}
    return named if acting.plan is None else {**named, "plan": acting.plan}


def _recall(memory: Memory, like: Acting) -> Acting:
    """What a memory holds; `like` shows what is expected."""
    expected = _tensors(like)
    if not isinstance(memory, tuple | list) or len(memory) != len(expected):
        given = f"{len(memory)} arrays" if isinstance(memory, tuple | list) else f"a {type(memory).__name__}"
        raise ShapeMismatchError(
            f"state is {given}, expected the {len(expected)} arrays that predict returned: {', '.join(expected)}."
        )
    tensors = {}
    for (name, tensor), array in zip(expected.items(), memory, strict=True):
        if np.shape(array) != tuple(tensor.shape):
            raise ShapeMismatchError(
                f"state '{name}' has shape {np.shape(array)}, expected {tuple(tensor.shape)} "
                f"for {len(tensor)} observations. Pass state=None when the number of environments changes."
            )
        tensors[name] = torch.as_tensor(array, dtype=tensor.dtype, device=tensor.device)
    return Acting(State({name: tensors[name] for name in like.state}), tensors["actions"], tensors.get("plan"))


def _episode_starts(given: Any, rows: int) -> Array:
    if given is None:
        return np.zeros(rows, dtype=bool)
    starts = np.asarray(given, dtype=bool).reshape(-1)
    if len(starts) != rows:
        raise ShapeMismatchError(
            f"episode_start has shape {np.shape(given)}, expected one value for each of {rows} observations."
        )
    return starts


def _to_torch(obs: Arrays, device: torch.device) -> Observation:
    if isinstance(obs, dict):
        return {key: torch.from_numpy(array).to(device) for key, array in obs.items()}
    return torch.from_numpy(obs).to(device)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    # NumPy has no bfloat16.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
