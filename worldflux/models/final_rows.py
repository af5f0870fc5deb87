"""Layout of replayed rows that all model families share."""

from __future__ import annotations

import torch
from torch import Tensor

from worldflux.replay.batch import Batch


def with_final_rows(batch: Batch) -> Batch:
    """Inserts a row after each episode that ends inside a window, at which its last reward arrives.

        given rows      o0  o1  o2* | p0  p1         * ends its episode, p0 starts the next
        returned rows   o0  o1  o2* ·   p0           · has no observation; the window keeps its length and loses p1

    Args:
        batch: Batch without `is_first`. `[B, T, ...]`

    Returns:
        A batch of the same size, with `is_first` and `obs_mask`.
    """
    ends = batch.terminations if batch.truncations is None else batch.terminations | batch.truncations
    B, T = ends.shape
    steps = torch.arange(T, device=ends.device)
    before = torch.cumsum(ends, 1) - ends.long()  # number of ends before each row, each of which shifts it by one
    # Rows that are shifted out of the window go into an extra column, which is cut off.
    place = (steps + before).clamp(max=T)
    source = torch.zeros(B, T + 1, dtype=torch.long, device=ends.device).scatter_(1, place, steps.expand(B, T))
    made = torch.zeros(B, T + 1, dtype=torch.bool, device=ends.device)
    made.scatter_(1, torch.where(ends, (place + 1).clamp(max=T), T), True)
    source, made = source[:, :T], made[:, :T]
    first = torch.cat([torch.zeros_like(made[:, :1]), made[:, :-1]], 1)

    def moved(x: Tensor) -> Tensor:
        index = source.reshape(B, T, *[1] * (x.ndim - 2)).expand(B, T, *x.shape[2:])
        return torch.gather(x, 1, index) * ~made.reshape(B, T, *[1] * (x.ndim - 2))

    seen = ~made if batch.obs_mask is None else moved(batch.obs_mask)
    return Batch(
        obs={k: moved(v) for k, v in batch.obs.items()} if isinstance(batch.obs, dict) else moved(batch.obs),
        actions=moved(batch.actions),
        rewards=moved(batch.rewards),
        terminations=moved(batch.terminations),
        truncations=None if batch.truncations is None else moved(batch.truncations),
        is_first=first,
        obs_mask=seen,
        extras={k: moved(v) for k, v in batch.extras.items()},
    )
