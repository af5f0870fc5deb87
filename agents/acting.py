"""Acting with a world model: the recurrent state that goes from one observation to the next."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldflux.envs.spaces import ActionCodec, Array, Arrays, ObservationCodec
from worldflux.errors import ShapeMismatchError
from worldflux.models.base import State, WorldModel
from worldflux.training.batch import Observation

Memory = tuple[np.ndarray, ...]
"""What `predict` hands back and takes again: the state's arrays in the order of their names, and the last actions."""


class Actor:
    """Turns observations into actions; it keeps nothing between two calls.

    Args:
        model: Which acts.
        obs_codec: Of the environment's observations.
        action_codec: Of the environment's actions.
    """

    def __init__(self, model: WorldModel, obs_codec: ObservationCodec, action_codec: ActionCodec) -> None:
        self.model = model
        self.obs_codec = obs_codec
        self.action_codec = action_codec

    @torch.inference_mode()
    def start(self, rows: int) -> tuple[State, Tensor]:
        """State and previous actions `[N, A]` before the first observation."""
        no_actions = torch.zeros(rows, self.action_codec.action_dim, device=self.model.device)
        return self.model.initial_state(rows), no_actions

    @torch.inference_mode()
    def step(
        self, state: State, previous: Tensor, obs: Arrays, episode_starts: Array, *, deterministic: bool
    ) -> tuple[State, Tensor]:
        """State after the previous actions and the observations that followed, and the actions to take there.

        Args:
            state: Before the previous actions. `[N, ...]`
            previous: In the library's form. `[N, A]`
            obs: In the library's form. `[N, ...]`
            episode_starts: True where `obs` begins an episode; state and action of that row are ignored. `[N]`
            deterministic: Take the likeliest everywhere, without random numbers.

        Returns:
            The state `[N, ...]` and unclipped actions `[N, A]`.
        """
        if self.model.training:
            self.model.eval()
        device = self.model.device
        is_first = torch.as_tensor(episode_starts, dtype=torch.bool, device=device)
        state = self.model.update(
            state, previous, _to_torch(obs, device), is_first=is_first, deterministic=deterministic
        )
        return state, self.model.policy(state, deterministic=deterministic).float()

    def predict(
        self, observation: Any, memory: Memory | None, episode_start: Any, deterministic: bool
    ) -> tuple[Array, Memory]:
        """SB3's protocol; see `WorldFluxAgent.predict`."""
        obs, batched = self.obs_codec.encode_any(observation)
        rows = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        state, previous = self.start(rows)
        starts = np.ones(rows, dtype=bool)
        if memory is not None:
            state, previous = _recall(memory, state, previous)
            starts = _episode_starts(episode_start, rows)
        state, library_actions = self.step(state, previous, obs, starts, deterministic=deterministic)
        memory = (*(_to_numpy(state[name]) for name in sorted(state)), _to_numpy(library_actions))
        actions = self.action_codec.to_env(memory[-1])
        return (actions if batched else actions.squeeze(axis=0)), memory


def _recall(memory: Memory, like: State, previous: Tensor) -> tuple[State, Tensor]:
    """State and previous actions out of a memory; `like` and `previous` show what is expected."""
    names = [*sorted(like), "actions"]
    expected = [*(like[name] for name in names[:-1]), previous]
    if not isinstance(memory, tuple | list) or len(memory) != len(names):
        given = f"{len(memory)} arrays" if isinstance(memory, tuple | list) else f"a {type(memory).__name__}"
        raise ShapeMismatchError(
            f"state is {given}, expected the {len(names)} arrays that predict returned: {', '.join(names)}."
        )
    tensors = {}
    for name, array, tensor in zip(names, memory, expected, strict=True):
        if np.shape(array) != tuple(tensor.shape):
            raise ShapeMismatchError(
                f"state '{name}' has shape {np.shape(array)}, expected {tuple(tensor.shape)} "
                f"for {len(tensor)} observations. Pass state=None when the number of environments changes."
            )
        tensors[name] = torch.as_tensor(array, dtype=tensor.dtype, device=tensor.device)
    return State({name: tensors[name] for name in names[:-1]}), tensors["actions"]


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
