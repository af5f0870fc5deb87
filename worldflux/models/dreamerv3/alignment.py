"""The one place where replayed rows are shifted to DreamerV3's own alignment.

A replayed row holds what its action led to; DreamerV3 looks at what a step *arrived with*:

    row of the batch        t-1                    t
    obs                     o[t-1]                 o[t]
    actions                 a[t-1]  ──────────►    previous action of t
    rewards                 r[t-1]  ──────────►    reward on arriving at t
    terminations            d[t-1]  ──────────►    is_terminal of t

Nothing crosses into a row that is the first of an episode.

The buffer keeps the last observation of an episode in a row of its own, which is what the last reward and the
termination arrive at. A provider that gives the four documented fields alone has no such row: the step that ends an
episode is followed directly by the first one of the next. There a row is put in between, marked as never seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from worldflux.models.final_rows import with_final_rows
from worldflux.replay.batch import Batch


@dataclass(frozen=True)
class ArrivalRows:
    """A batch in DreamerV3's alignment."""

    obs: dict[str, Tensor]
    """`[B, T, ...]` each"""
    prev_actions: Tensor
    """`[B, T, A]`"""
    is_first: Tensor
    """The recurrent state and the previous action are zeroed here. `[B, T]`"""
    rewards: Tensor
    """`[B, T]`"""
    is_terminal: Tensor
    """The episode terminated on arriving here. `[B, T]` float"""
    is_last: Tensor
    """The episode ended here for any reason. `[B, T]` float"""
    arrival_known: Tensor
    """False where reward and termination on arrival lie before the window. `[B, T]`"""
    obs_mask: Tensor | None
    """False where nothing was seen. `[B, T]`"""


def arrival_rows(batch: Batch, *, has_context: bool) -> ArrivalRows:
    """Shifts a batch to DreamerV3's alignment.

    Args:
        batch: Windows of replayed rows. `[B, T, ...]`
        has_context: The first row is only context: its stored latents and its action start the window, and the result
            has one row less. Otherwise all rows are trained, the first one from the initial state; what that one
            arrived with is unknown, unless it is the first of its episode.
    """
    if batch.is_first is None:
        batch = with_final_rows(batch)
    assert batch.is_first is not None
    obs = batch.obs if isinstance(batch.obs, dict) else {"obs": batch.obs}
    is_first, terminations = batch.is_first, batch.terminations
    ends = terminations if batch.truncations is None else terminations | batch.truncations
    actions, rewards = batch.actions.float(), batch.rewards.float()
    mask = batch.obs_mask
    if has_context:
        obs = {k: v[:, 1:] for k, v in obs.items()}
        prev_actions, rewards, ends, terminations = (x[:, :-1] for x in (actions, rewards, ends, terminations))
        is_first = is_first[:, 1:]
        mask = None if mask is None else mask[:, 1:]
        known = torch.ones_like(is_first)
    else:
        prev_actions, rewards, ends, terminations = (
            torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1) for x in (actions, rewards, ends, terminations)
        )
        known = torch.ones_like(is_first)
        known[:, 0] = is_first[:, 0]
        is_first = is_first.clone()
        is_first[:, 0] = True
    within = ~is_first
    return ArrivalRows(
        obs=obs,
        prev_actions=prev_actions,
        is_first=is_first,
        rewards=rewards * within,
        is_terminal=(terminations & within).float(),
        is_last=(ends & within).float(),
        arrival_known=known,
        obs_mask=mask,
    )
