"""What is read off the features `[deter, flat(stoch)]`: reward, continuation, policy and value."""

from __future__ import annotations

from torch import Tensor, nn

from worldflux.accel.overriding import steps_back
from worldflux.nn.distributions import CategoricalPolicy, NormalPolicy, PolicyDistribution, TwoHot
from worldflux.nn.layers import MLP, Linear, are_plain
from worldflux.nn.transforms import symexp_bins


class TwoHotHead(nn.Module):
    """An MLP whose output is a two-hot distribution over real numbers; starts at exactly 0."""

    def __init__(self, in_features: int, units: int, layers: int, bins: int) -> None:
        super().__init__()
        self.mlp = MLP(in_features, units, layers)
        self.out = Linear(self.mlp.out_features, bins, scale=0.0)
        self.register_buffer("bins", symexp_bins(bins), persistent=False)
        self.bins: Tensor

    def forward(self, feat: Tensor) -> TwoHot:
        """`[..., F]` → a distribution over `[...]`."""
        return self.output(self.mlp(feat))

    def output(self, hidden: Tensor) -> TwoHot:
        """The distribution that the last hidden layer `[..., units]` gives."""
        return TwoHot(self.out(hidden), self.bins)


class ContinueHead(nn.Module):
    """An MLP whose output is the logit of the episode going on."""

    def __init__(self, in_features: int, units: int, layers: int) -> None:
        super().__init__()
        self.mlp = MLP(in_features, units, layers)
        self.out = Linear(self.mlp.out_features, 1)

    def forward(self, feat: Tensor) -> Tensor:
        """`[..., F]` → logits `[...]`."""
        return self.output(self.mlp(feat))

    def output(self, hidden: Tensor) -> Tensor:
        """The logits that the last hidden layer `[..., units]` gives."""
        return self.out(hidden).squeeze(-1).float()


class Actor(nn.Module):
    """The policy: normals for continuous actions, softmaxes for discrete ones.

    Args:
        in_features: F
        units: Width of the hidden layers.
        layers: Number of hidden layers.
        action_dim: A
        classes: Widths of the softmaxes; empty for continuous actions.
    """

    def __init__(self, in_features: int, units: int, layers: int, action_dim: int, classes: tuple[int, ...]) -> None:
        super().__init__()
        self.classes = classes
        self.mlp = MLP(in_features, units, layers)
        # Small outputs: the first actions are centred and noisy, or nearly uniform.
        if classes:
            self.logits = Linear(self.mlp.out_features, action_dim, scale=0.01)
        else:
            self.mean = Linear(self.mlp.out_features, action_dim, scale=0.01)
            self.std = Linear(self.mlp.out_features, action_dim, scale=0.01)

    def forward(self, feat: Tensor) -> PolicyDistribution:
        """`[..., F]` → a distribution over actions `[..., A]`."""
        return self.output(self.mlp(feat))

    def output(self, hidden: Tensor) -> PolicyDistribution:
        """The distribution that the last hidden layer `[..., units]` gives."""
        if self.classes:
            return CategoricalPolicy(self.logits(hidden), self.classes)
        return NormalPolicy(self.mean(hidden), self.std(hidden))


def give_by_stacks(*heads: nn.Module) -> bool:
    """Whether `stacked_mlps` and each head's `output` give what calling the heads gives: nothing was replaced."""
    if are_plain(heads, TwoHotHead.forward, ContinueHead.forward, Actor.forward):
        return True
    return not steps_back("The joint computation of DreamerV3's heads", heads[0], ["forward, layers or hooks"])
