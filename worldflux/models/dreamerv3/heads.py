"""Heads on the features `[deter, flat(stoch)]`: reward, continuation, policy and value."""

from __future__ import annotations

from torch import Tensor, nn

from worldflux.accel.overriding import steps_back
from worldflux.nn.distributions import CategoricalPolicy, NormalPolicy, PolicyDistribution, TwoHot
from worldflux.nn.layers import MLP, Linear, are_plain
from worldflux.nn.transforms import symexp_bins


class TwoHotHead(nn.Module):
    """MLP whose output is a two-hot distribution over real numbers, with an initial mean of exactly 0."""

    def __init__(self, in_features: int, units: int, layers: int, bins: int) -> None:
        super().__init__()
        self.mlp = MLP(in_features, units, layers)
        self.out = Linear(self.mlp.out_features, bins, scale=0.0)
        self.register_buffer("bins", symexp_bins(bins), persistent=False)
        self.bins: Tensor

    def forward(self, feat: Tensor) -> TwoHot:
        """Maps features `[..., F]` to a distribution over `[...]`."""
        return self.output(self.mlp(feat))

    def output(self, hidden: Tensor) -> TwoHot:
        """Maps the last hidden layer `[..., units]` to the distribution."""
        return TwoHot(self.out(hidden), self.bins)


class ContinueHead(nn.Module):
    """MLP whose output is the logit of the probability that the episode continues."""

    def __init__(self, in_features: int, units: int, layers: int) -> None:
        super().__init__()
        self.mlp = MLP(in_features, units, layers)
        self.out = Linear(self.mlp.out_features, 1)

    def forward(self, feat: Tensor) -> Tensor:
        """Maps features `[..., F]` to logits `[...]`."""
        return self.output(self.mlp(feat))

    def output(self, hidden: Tensor) -> Tensor:
        """Maps the last hidden layer `[..., units]` to the logits."""
        return self.out(hidden).squeeze(-1).float()


class Actor(nn.Module):
    """Policy with normal distributions for continuous actions and categorical ones for discrete actions.

    Args:
        in_features: Width F of the features.
        units: Width of the hidden layers.
        layers: Number of hidden layers.
        action_dim: Number of action dimensions A.
        classes: Number of classes of each categorical distribution; empty for continuous actions.
    """

    def __init__(self, in_features: int, units: int, layers: int, action_dim: int, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.classes = classes
        self.mlp = MLP(in_features, units, layers)
        # Outputs are small at first, so that initial actions are centred and noisy, or nearly uniform.
        if classes:
            self.logits = Linear(self.mlp.out_features, action_dim, scale=0.01)
        else:
            self.mean = Linear(self.mlp.out_features, action_dim, scale=0.01)
            self.std = Linear(self.mlp.out_features, action_dim, scale=0.01)

    def forward(self, feat: Tensor) -> PolicyDistribution:
        """Maps features `[..., F]` to a distribution over actions `[..., A]`."""
        return self.output(self.mlp(feat))

    def output(self, hidden: Tensor) -> PolicyDistribution:
        """Maps the last hidden layer `[..., units]` to the distribution."""
        if self.classes:
            return CategoricalPolicy(self.logits(hidden), self.classes)
        return NormalPolicy(self.mean(hidden), self.std(hidden))


def give_by_stacks(*heads: nn.Module) -> bool:
    """Returns whether `stacked_mlps` and each head's `output` may replace calls of the heads: nothing is overridden."""
    if are_plain(heads, TwoHotHead.forward, ContinueHead.forward, Actor.forward):
        return True
    return not steps_back("The joint computation of DreamerV3's heads", heads[0], ["forward, layers or hooks"])
