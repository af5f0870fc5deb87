"""Representation learning without a decoder: features are projected to predict the encoder's output, row by row.

Source: R2-Dreamer (ICLR 2026) and its authors' implementation (NM512/r2dreamer, commit 546e4fa).
"""

from __future__ import annotations

import torch
from torch import Tensor

from worldflux.accel import ranks
from worldflux.errors import ShapeMismatchError
from worldflux.nn.precision import autocast

_EPS = 1e-8
"""Added to the standard deviation of each column, as in the reference implementation."""


def redundancy_loss(
    projected: Tensor, embed: Tensor, off_diagonal: float = 5e-4, *, mask: Tensor | None = None
) -> Tensor:
    """Computes how far the correlations of projected features with embeddings are from the identity.

    Both are standardised over the rows, which gives their correlations `c` `[E, E]`. The loss is
    `sum_i (c_ii - 1)^2 + off_diagonal * sum_(i != j) c_ij^2`: the first sum asks each projected feature to predict its
    entry of the embedding, the second one to predict no other entry.

    Args:
        projected: Features projected to the width of the embeddings. `[N, E]`
        embed: Output of the encoder, to which no gradient flows. `[N, E]`
        off_diagonal: Weight of the correlations between different entries.
        mask: True for rows that count; None if all do. `[N]`

    Returns:
        The loss, in float32. A single row has no correlations: its loss is E, without a gradient. `[]`

    Raises:
        ShapeMismatchError: If the shapes do not fit together.
    """
    if projected.ndim != 2 or projected.shape != embed.shape or (mask is not None and mask.shape != embed.shape[:1]):
        masked = "" if mask is None else f" and mask {list(mask.shape)}"
        raise ShapeMismatchError(
            f"projected has shape {list(projected.shape)}, embed {list(embed.shape)}{masked}, "
            "expected [N, E] for both and [N] for a mask. Flatten batch and time to rows."
        )
    rows, width = projected.shape
    counted = torch.ones_like(projected[:, 0], dtype=torch.bool) if mask is None else mask
    count = counted.sum().clamp(min=1)
    with autocast(projected.device, None):
        ours = _standardised(projected.float(), counted.unsqueeze(1))
        theirs = _standardised(embed.detach().float(), counted.unsqueeze(1))
        diagonal = (ours * theirs).sum(0) / count  # [E]
        # The sum of all c_ij^2. With few rows, the products of the rows give it without computing c.
        if 2 * rows < width:
            squares = ((ours @ ours.t()) * (theirs @ theirs.t())).sum() / count**2
        else:
            squares = (ours.t() @ theirs / count).square().sum()
        return (diagonal - 1.0).square().sum() + off_diagonal * (squares - diagonal.square().sum())


def _standardised(x: Tensor, counted: Tensor) -> Tensor:
    """Shifts and scales each column to mean 0 and variance 1.

    Args:
        x: Values. `[N, E]`
        counted: True for rows that count; the others become 0, whatever they contain. `[N, 1]`
    """
    count = counted.sum()
    centred = torch.where(counted, x - torch.where(counted, x, 0.0).sum(0) / count.clamp(min=1), 0.0)
    # Unlike that of a root, the gradient of a norm is 0 for a constant column.
    deviation = torch.linalg.vector_norm(centred, dim=0) / (count - 1).clamp(min=1).sqrt()
    return centred / (deviation + _EPS)


def redundancy_of_batch(projected: Tensor, embed: Tensor, mask: Tensor | None) -> Tensor:
    """Computes `redundancy_loss` on the rows of all data-parallel ranks, with the gradient of this rank's rows.

    The averaged gradient of the ranks is that of one process with the whole batch.

    Args:
        projected: Projected features of this rank. `[N, E]`
        embed: Output of the encoder on this rank. `[N, E]`
        mask: True for rows that count; None if all do. `[N]`
    """
    if not ranks.is_reducing():
        return redundancy_loss(projected, embed, mask=mask)
    if mask is None:  # other ranks may have one
        mask = torch.ones_like(projected[:, 0], dtype=torch.bool)
    rows, begin = len(projected), ranks.rank() * len(projected)
    whole = ranks.gathered(projected.float())
    whole = torch.cat([whole[:begin], projected.float(), whole[begin + rows :]])
    loss = redundancy_loss(whole, ranks.gathered(embed.float()), mask=ranks.gathered(mask))
    # A row has its gradient on one rank only, so that the average over the ranks divides it by their number.
    return loss + (ranks.size() - 1) * (loss - loss.detach())
