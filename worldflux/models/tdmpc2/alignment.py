"""The one place where replayed rows become what TD-MPC2 learns from: starts with a few steps ahead of each.

A row of the buffer holds an observation, the action taken there and what it led to; the observation that it led to is
in the next row. H steps thus need H+1 rows. The reference takes only windows that lie within one episode. Here a window
may run over an episode's end, as it must where episodes are shorter than the horizon:

    row          0     1     2     3          H = 3
    obs          o1    o2    o0'   o1'        o2 is the last observation of its episode
    is_first     0     0     1     0
    reached      1     1     0     0          rows that belong to the episode of row 0: states
    steps           1     0     0             steps from one such row to the next: transitions

What is not reached counts in no loss. Within one episode everything is reached, and the losses are the reference's.
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
    """Starts and the steps ahead of them, in TD-MPC2's own shapes: N windows of H steps."""

    obs: dict[str, Tensor]
    """`[N, H+1, ...]` each"""
    actions: Tensor
    """`[N, H, A]`"""
    rewards: Tensor
    """`[N, H]`"""
    terminated: Tensor
    """1 where the step ended the episode for good. `[N, H]` float"""
    steps: Tensor
    """1 where the step lies within the start's episode. `[N, H]` float"""
    arrived: Tensor
    """1 where moreover the observation after it was recorded. `[N, H]` float"""
    states: Tensor
    """1 where the row belongs to the start's episode and its observation was recorded. `[N, H+1]` float"""
    task: Tensor | None
    """Task of each window; None for a single task. `[N]` int64"""

    @property
    def targets(self) -> Tensor:
        """1 where the value's target is known: nothing is bootstrapped from an unrecorded observation. `[N, H]`"""
        return torch.where(self.terminated > 0, self.steps, self.arrived)


def windows(batch: Batch, horizon: int, *, multitask: bool) -> Windows:
    """Cuts a batch into windows of `horizon` steps.

    Longer rows of a batch give several windows, each starting where the one before it ends; what is left at the end
    for less than a window is not used. With 50 rows and 3 steps these are 16.

    Args:
        batch: `[B, T, ...]` with T of at least `horizon + 1`; for several tasks, `extras["task"]` holds their numbers.
        horizon: H
        multitask: Whether there are several tasks.

    Raises:
        ShapeMismatchError: If the batch is too short, or has no tasks where there are several.
    """
    if batch.seq_len < horizon + 1:
        raise ShapeMismatchError(
            f"The batch has {batch.seq_len} rows in each window, expected at least horizon + 1 = {horizon + 1}. "
            "Raise sequence_length, or choose a smaller horizon."
        )
    if multitask and "task" not in batch.extras:
        raise ShapeMismatchError(
            "The batch has no extras['task'], expected each row's task [B, T], because the model has several."
        )
    if batch.is_first is None:
        batch = with_final_rows(batch)
    assert batch.is_first is not None
    count = (batch.seq_len - 1) // horizon
    index = torch.arange(count, device=batch.rewards.device).unsqueeze(1) * horizon
    index = index + torch.arange(horizon + 1, device=batch.rewards.device)  # [count, H+1]

    def cut(x: Tensor) -> Tensor:
        """`[B, T, ...]` → `[B * count, H+1, ...]`"""
        return x[:, : horizon + 1] if count == 1 else x[:, index].flatten(0, 1)

    # A row belongs to the start's episode until another one begins behind the start.
    begun = cut(batch.is_first)[:, 1:].cumsum(1)
    steps = begun == 0
    seen = torch.ones_like(batch.is_first) if batch.obs_mask is None else batch.obs_mask
    seen = cut(seen)
    steps = steps & seen[:, :1]  # nothing can be said of what follows an unknown start
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
