"""Conversion of replayed rows to DreamerV3's alignment, which happens only here.

A replayed row holds the results of its action, while a step of DreamerV3 holds the results of the previous action:

    row of the batch        t-1                    t
    obs                     o[t-1]                 o[t]
    actions                 a[t-1]  ──────────►    previous action of t
    rewards                 r[t-1]  ──────────►    reward on arriving at t
    terminations            d[t-1]  ──────────►    is_terminal of t

Nothing is shifted into the first row of an episode.

The buffer keeps the last observation of an episode in an additional row, at which the last reward and the termination
arrive. A provider that only returns the four documented fields has no such row: the last step of an episode is directly
followed by the first step of the next. In this case a row without an observation is inserted between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from worldflux.models.final_rows import with_final_rows
from worldflux.replay.batch import Batch


@dataclass(frozen=True)
class ArrivalRows:
    """Batch in DreamerV3's alignment."""

    obs: dict[str, Tensor]
    """Observations by key, `[B, T, ...]` each."""
    prev_actions: Tensor
    """Action that led to each step. `[B, T, A]`"""
    is_first: Tensor
    """True where the recurrent state and the previous action are set to zero. `[B, T]`"""
    rewards: Tensor
    """Reward on arriving at each step. `[B, T]`"""
    is_terminal: Tensor
    """1 where the episode terminated on arriving, else 0. `[B, T]` float"""
    is_last: Tensor
    """1 where the episode ended for any reason, else 0. `[B, T]` float"""
    arrival_known: Tensor
    """False where the reward and the termination on arrival lie before the window. `[B, T]`"""
    obs_mask: Tensor | None
    """False where there is no observation; None if there always is. `[B, T]`"""


def arrival_rows(batch: Batch, *, has_context: bool) -> ArrivalRows:
    """Converts a batch to DreamerV3's alignment.

    Args:
        batch: Windows of replayed rows. `[B, T, ...]`
        has_context: Whether the first row is only context: its stored latents and its action initialise the window, and
            the result has one row less. Otherwise all rows are trained, starting from the initial state; the reward and
            termination on arriving at the first row are unknown, unless it is the first of its episode.
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
