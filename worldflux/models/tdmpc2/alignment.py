"""Conversion of replayed rows to TD-MPC2's windows, which happens only here: first states and the steps after them.

A row of the buffer holds an observation, the action taken there and its results; the next observation is in the next
row. H steps therefore need H+1 rows. The reference implementation only takes windows within one episode. Here a window
may extend beyond the end of an episode, which is necessary if episodes are shorter than the horizon:

    row          0     1     2     3          H = 3
    obs          o1    o2    o0'   o1'        o2 is the last observation of its episode
    is_first     0     0     1     0
    states       1     1     0     0          rows that belong to the episode of row 0
    steps           1     0     0             transitions between such rows

Other rows and transitions count in no loss. Within one episode all of them count, and the losses equal the reference's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from worldflux.errors import ShapeMismatchError
from worldflux.models.final_rows import with_final_rows
from worldflux.replay.batch import Batch


@dataclass(frozen=True)
class Windows:
    """Windows of H steps in TD-MPC2's own shapes; N is the number of windows."""

    obs: dict[str, Tensor]
    """Observations by key, `[N, H+1, ...]` each."""
    actions: Tensor
    """Actions. `[N, H, A]`"""
    rewards: Tensor
    """Rewards. `[N, H]`"""
    terminated: Tensor
    """1 where the step terminated the episode, else 0. `[N, H]` float"""
    steps: Tensor
    """1 where the step belongs to the first row's episode, else 0. `[N, H]` float"""
    arrived: Tensor
    """1 where also the observation after the step was recorded, else 0. `[N, H]` float"""
    states: Tensor
    """1 where the row belongs to the first row's episode and its observation was recorded, else 0. `[N, H+1]` float"""
    task: Tensor | None
    """Task of each window; None for a single task. `[N]` int64"""

    @property
    def targets(self) -> Tensor:
        """1 where the value's target is known, that is, not bootstrapped from an unrecorded observation. `[N, H]`"""
        return torch.where(self.terminated > 0, self.steps, self.arrived)


def windows(batch: Batch, horizon: int, *, multitask: bool) -> Windows:
    """Cuts a batch into windows of `horizon` steps.

    Longer sequences of a batch give several windows, each starting where the previous one ends; a remainder that is too
    short for a window is not used. 50 rows and 3 steps, for example, give 16 windows.

    Args:
        batch: Batch `[B, T, ...]` with T of at least `horizon + 1`. With several tasks, `extras["task"]` contains the
            index of the task of each row.
        horizon: Number of steps H in each window.
        multitask: Whether there are several tasks.

    Raises:
        ShapeMismatchError: If the batch is too short, or if it has no tasks although there are several.
    """
    if batch.seq_len < horizon + 1:
        raise ShapeMismatchError(
            f"The batch has {batch.seq_len} rows in each window, expected at least horizon + 1 = {horizon + 1}. "
            "Raise sequence_length, or choose a smaller horizon."
        )
    if multitask and "task" not in batch.extras:
        raise ShapeMismatchError(
            "The batch has no extras['task'], expected the task of each row [B, T], because the model has several."
        )
    if batch.is_first is None:
        batch = with_final_rows(batch)
    assert batch.is_first is not None
    count = (batch.seq_len - 1) // horizon
    index = torch.arange(count, device=batch.rewards.device).unsqueeze(1) * horizon
    index = index + torch.arange(horizon + 1, device=batch.rewards.device)  # [count, H+1]

    def cut(x: Tensor) -> Tensor:
        """Cuts `[B, T, ...]` into `[B * count, H+1, ...]`."""
        return x[:, : horizon + 1] if count == 1 else x[:, index].flatten(0, 1)

    # A row belongs to the first row's episode until another episode begins.
    begun = cut(batch.is_first)[:, 1:].cumsum(1)
    steps = begun == 0
    seen = torch.ones_like(batch.is_first) if batch.obs_mask is None else batch.obs_mask
    seen = cut(seen)
    steps = steps & seen[:, :1]  # nothing can be predicted from an unknown first state
    arrived = steps & seen[:, 1:]
    obs = batch.obs if isinstance(batch.obs, dict) else {"obs": batch.obs}
    task = None
    if multitask:
        task = cut(batch.extras["task"].reshape(batch.rewards.shape))[:, 0].long()
    return Windows(
        obs={key: cut(value) for key, value in obs.items()},
        actions=cut(batch.actions)[:, :-1].float(),
        rewards=cut(batch.rewards)[:, :-1].float(),
        terminated=cut(batch.terminations)[:, :-1].float(),
        steps=steps.float(),
        arrived=arrived.float(),
        states=torch.cat([seen[:, :1], arrived], 1).float(),
        task=task,
    )
