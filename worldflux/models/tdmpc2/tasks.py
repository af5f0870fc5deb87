"""Properties of tasks that share one model: embedding, action dimensions and discount."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from worldflux.config import TDMPC2Config


class Tasks(nn.Module):
    """Learned embeddings with norms of at most 1, action masks and discounts of all tasks, by the task's index."""

    discounts: Tensor
    action_masks: Tensor

    def __init__(self, config: TDMPC2Config) -> None:
        super().__init__()
        used = config.task_action_dims or (config.action_dim,) * config.num_tasks
        self.weight = nn.Parameter(torch.empty(config.num_tasks, config.task_dim).uniform_(-0.02, 0.02))
        columns = torch.arange(config.action_dim)
        masks = (columns < torch.tensor(used).unsqueeze(1)).float()
        self.register_buffer("action_masks", masks, persistent=False)
        self.register_buffer("discounts", torch.tensor(config.discounts), persistent=False)

    def forward(self, task: Tensor) -> Tensor:
        """Returns the embeddings of tasks `[N]`, rescaled as by `renormalize`. `[N, E]`

        The gradient treats the rescaled embedding as the parameter, as if it had been rescaled before.
        """
        rows = self.weight[task]
        return rows + (_limited(rows) - rows).detach()

    @torch.no_grad()
    def renormalize(self) -> None:
        """Rescales embeddings with a norm above 1 to a norm of 1.

        The reference implementation does this whenever it looks up an embedding; here a lookup changes nothing.
        """
        self.weight.copy_(_limited(self.weight))


def _limited(rows: Tensor) -> Tensor:
    """Rescales rows with a norm above 1 to a norm of 1."""
    rows = rows.detach()
    norm = rows.norm(dim=-1, keepdim=True)
    return torch.where(norm > 1.0, rows / (norm + 1e-7), rows)
