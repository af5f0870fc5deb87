"""Properties of tasks that share one model: embedding, action dimensions and discount."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from worldflux.config import TDMPC2Config
from worldflux.errors import ConfigurationError

if TYPE_CHECKING:
    from worldflux.models.tdmpc2.latent_model import LatentModel

ModelT = TypeVar("ModelT", bound="LatentModel")


class Tasks(nn.Module):
    """Learned embeddings with norms of at most 1, action masks and discounts of all tasks, by the task's index."""

    discounts: Tensor
    action_masks: Tensor

    def __init__(self, config: TDMPC2Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_tasks, config.task_dim).uniform_(-0.02, 0.02))
        columns = torch.arange(config.action_dim)
        masks = (columns < torch.tensor(config.used_action_dims).unsqueeze(1)).float()
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


def with_task(
    model: ModelT, name: str, like: str | int | None, action_dim: int | None, episode_length: int | None
) -> ModelT:
    """Returns a copy of a model with one more task; see `LatentModel.with_task`."""
    old = model.config
    if model.tasks is None:
        raise ConfigurationError(
            "The model has a single task and no embeddings of tasks, to which one could be added. Train a model with "
            "num_tasks of at least 2, whose tasks may be trained one after the other."
        )
    known = None if like is None else old.task_number(like)
    lengths = old.task_episode_lengths or (old.episode_length,) * old.num_tasks
    if episode_length is None:
        episode_length = old.episode_length if known is None else lengths[known]
    names = old.task_names or tuple(str(number) for number in range(old.num_tasks))
    config = replace(
        old,
        num_tasks=old.num_tasks + 1,
        task_names=(*names, name),
        task_action_dims=(*old.used_action_dims, old.action_dim if action_dim is None else action_dim),
        task_episode_lengths=(*lengths, episode_length),
    )
    grown = type(model)(config).to(model.device)
    weights = model.state_dict()
    assert grown.tasks is not None
    new = grown.tasks.weight[-1:].detach() if known is None else model.tasks.weight[known : known + 1].detach()
    grown.load_state_dict({**weights, "tasks.weight": torch.cat([model.tasks.weight.detach(), new])})
    grown.train(model.training)
    return grown


def _limited(rows: Tensor) -> Tensor:
    """Rescales rows with a norm above 1 to a norm of 1."""
    rows = rows.detach()
    norm = rows.norm(dim=-1, keepdim=True)
    return torch.where(norm > 1.0, rows / (norm + 1e-7), rows)
