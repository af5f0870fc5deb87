"""Both families in sizes with which a gradient step takes milliseconds."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from worldflux import State
from worldflux.models.tdmpc2.latent_model import LatentModel

DREAMERV3: dict[str, Any] = dict(
    deter_dim=16, hidden_dim=8, units=8, stoch_discrete=2, stoch_classes=4, blocks=4, bins=15, imagination_horizon=3
)
TDMPC2: dict[str, Any] = dict(
    latent_dim=16, hidden_dim=16, mlp_dim=16, enc_dim=16, num_q_networks=3, num_bins=15, horizon=2
)
SIZES = {"dreamerv3": DREAMERV3, "tdmpc2": TDMPC2}
PRESETS = {f"{family}:tiny": sizes for family, sizes in SIZES.items()}
"""The same sizes by the preset that they override."""


def value_of_sequences(
    model: LatentModel,
    state: State,
    actions: Tensor,
    *,
    discount: float | None = None,
    deterministic: bool = True,
    noise: Tensor | None = None,
    members: Tensor | None = None,
) -> Tensor:
    """What TD-MPC2's planner takes sequences of actions `[H, N, S, A]` to be worth. `[N, S]`"""
    partial = model.partial_return(state, actions, discount=discount, deterministic=deterministic)
    return model.estimated_return(partial, deterministic=deterministic, noise=noise, members=members)
