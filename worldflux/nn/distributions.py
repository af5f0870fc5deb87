"""Distributions over network outputs: two-hot values, one-hot latents, and the two kinds of policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from worldflux.nn.fast.two_hot import two_hot_mean

_UNITS = 8
"""Logits with magnitudes below 16 are known to this many times their type's precision."""


class TwoHot:
    """A categorical distribution over fixed bins that stands for one real number.

    Source: DreamerV3, arXiv:2301.04104, symexp twohot loss.

    Args:
        logits: As they come out of the head's product, in its precision; taken to float32. `[..., n]`
        bins: Increasing, antisymmetric, odd in number. `[n]`
    """

    def __init__(self, logits: Tensor, bins: Tensor) -> None:
        self.logits = logits.float()
        self.bins = bins
        self._probs: Tensor | None = None
        self._mean: Tensor | None = None  # without gradient
        # How far the probabilities of two bins may differ, relative to each other, by rounding alone: that of the
        # logits in their own type, and that of the float32 sums which they were.
        self._rounding = _UNITS * (torch.finfo(logits.dtype).eps + torch.finfo(torch.float32).eps)

    @property
    def probs(self) -> Tensor:
        """The bins' probabilities, without gradient: what the loss and the mean share. `[..., n]`"""
        if self._probs is None:
            found = two_hot_mean(self.logits.detach(), self.bins, self._rounding)
            self._probs, self._mean = (torch.softmax(self.logits.detach(), -1), None) if found is None else found
        return self._probs

    def t(self) -> TwoHot:
        """The same distributions over `[a, b]` as over `[b, a]`."""
        transposed = TwoHot(self.logits.transpose(0, 1), self.bins)
        transposed._probs, transposed._rounding = self.probs.transpose(0, 1), self._rounding
        transposed._mean = None if self._mean is None else self._mean.transpose(0, 1)
        return transposed

    @property
    def mean(self) -> Tensor:
        """Expected value. `[...]`

        Each bin is paired with its mirror before summing, so that uniform probabilities give exactly 0. A pair that
        differs by no more than rounding counts as equal: DreamerV3's outermost bins stand for 4.8e8, so that the last
        bit of a probability which no target has ever moved would be worth half a unit and more. The reference counts
        it. The gradient is that of the sum without this exception.
        """
        middle = self.bins.shape[0] // 2
        needs_gradient = torch.is_grad_enabled() and self.logits.requires_grad
        probs = torch.softmax(self.logits, -1) if needs_gradient else self.probs
        if not needs_gradient and self._mean is not None:
            return self._mean
        upper, lower = probs[..., middle + 1 :], probs[..., :middle].flip(-1)
        excess = upper - lower
        with torch.no_grad():
            share = 0.5 * self._rounding
            counts = excess.abs().sub_(lower, alpha=share).sub_(upper, alpha=share).gt_(0.0)
        if needs_gradient:
            excess = excess + (counts - 1.0) * excess.detach()
        else:
            excess.mul_(counts)
        # Not a matrix product: autocast would round it to bfloat16, returns of some hundred to whole numbers.
        return (excess * self.bins[middle + 1 :]).sum(-1)

    def loss(self, *targets: Tensor) -> Tensor:
        """Cross-entropy with the two-hot encoding of each target, summed over the targets.

        Args:
            targets: Real numbers, each `[...]`; beyond the outermost bins all weight is on that bin.

        Returns:
            `[...]`
        """
        # -sum_i w_i * log_softmax_i with weights of sum one: the normaliser is shared by all targets, and the dense
        # [..., n] weights need not be built.
        index, weight = [], []
        for target in targets:
            lower, upper, upper_weight = two_hot(target, self.bins)
            index += [lower, upper]
            weight += [1.0 - upper_weight, upper_weight]
        loss: Tensor = _SparseCrossEntropy.apply(
            self.logits, self.probs, torch.stack(index, -1), torch.stack(weight, -1)
        )
        return loss


class _SparseCrossEntropy(torch.autograd.Function):
    """`-sum_j weight_j * log_softmax(logits)[index_j]`, with the gradient made of the probabilities at hand.

    Inputs: logits `[..., n]`, their softmax, indices and weights `[..., k]`; the weights of each target sum to one.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, probs: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(probs, index, weight)
        # The log of the softmax's denominator, read off the likeliest bin, where nothing can underflow.
        normaliser = logits.amax(-1) - probs.amax(-1).log()
        picked = (torch.gather(logits, -1, index) * weight).sum(-1)
        return weight.shape[-1] / 2 * normaliser - picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        probs, index, weight = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        logits = probs * (weight.shape[-1] / 2 * grad)
        return logits.scatter_add_(-1, index, -grad * weight), None, None, None


def two_hot(target: Tensor, bins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbouring bins of each target and the weight of the upper one.

    Returns:
        Lower index, upper index (int64) and the upper one's weight in [0, 1], NaN if the target is NaN or infinite.
        Each `[...]`.
    """
    last = bins.shape[0] - 1
    above = torch.searchsorted(bins, target.detach().contiguous(), right=True)  # first bin beyond the target
    lower, upper = (above - 1).clamp(0, last), above.clamp(0, last)
    low, high = bins[lower], bins[upper]
    # Beyond the bins the weight is 0, and NaN for a target that is not finite: nobody shall learn from it unseen.
    weight = torch.where(upper == lower, 0.0 * target, (target - low) / torch.where(upper == lower, 1.0, high - low))
    return lower, upper, weight


class OneHot:
    """Independent categorical rows with a little of the uniform mixed in, sampled as one-hot vectors.

    Source: DreamerV3, arXiv:2301.04104, 1% unimix.

    Args:
        logits: `[..., S, C]`; taken to float32.
        unimix: Share of the uniform distribution in the probabilities.
    """

    def __init__(self, logits: Tensor, unimix: float) -> None:
        classes = logits.shape[-1]
        self.probs = (1.0 - unimix) * softmax(logits.float()) + unimix / classes
        self._logprobs: Tensor | None = None

    @property
    def logprobs(self) -> Tensor:
        """Logarithms of the mixed probabilities. `[..., S, C]`"""
        if self._logprobs is None:
            self._logprobs = torch.log(self.probs)
        return self._logprobs

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """One-hot draws, with the gradient of the probabilities passed straight through. `[..., S, C]`

        Args:
            noise: Uniform numbers in [0, 1); drawn here if not given. `[..., S]`
        """
        return self.straight_through(inverse_cdf(self.probs.detach(), noise))

    @property
    def mode(self) -> Tensor:
        """The likeliest class of each row as a one-hot vector. `[..., S, C]`"""
        return self.straight_through(self.probs.detach().argmax(-1))

    def straight_through(self, index: Tensor) -> Tensor:
        """The one-hot vectors of given classes `[..., S]`, carrying the gradient of the probabilities."""
        onehot = torch.zeros_like(self.probs).scatter_(-1, index.unsqueeze(-1), 1.0)
        if not self.probs.requires_grad:
            return onehot
        return onehot + (self.probs - self.probs.detach())

    def entropy(self) -> Tensor:
        """Summed over the rows. `[...]`"""
        return -(self.probs * self.logprobs).sum((-2, -1))

    def kl(self, other: OneHot) -> Tensor:
        """KL(self || other), summed over the rows. `[...]`"""
        return (self.probs * (self.logprobs - other.logprobs)).sum((-2, -1))

    def detach(self) -> OneHot:
        """The same distribution without gradient."""
        copy = object.__new__(OneHot)
        copy.probs, copy._logprobs = self.probs.detach(), self.logprobs.detach()
        return copy


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the last axis, written out.

    torch's own CPU kernel is five times slower than this where the last axis is short, as for latents and actions.
    """
    exp = torch.exp(logits - logits.detach().amax(-1, keepdim=True))
    return exp / exp.sum(-1, keepdim=True)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax over the last axis, written out for the reason given in `softmax`."""
    shifted = logits - logits.detach().amax(-1, keepdim=True)
    return shifted - torch.log(torch.exp(shifted).sum(-1, keepdim=True))


def inverse_cdf(probs: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Draws a class from each row of `probs` `[..., C]` with one uniform number per row. `[...]` int64"""
    uniform = torch.rand(probs.shape[:-1], device=probs.device) if uniform is None else uniform
    # Rounding may leave the last cumulative sum a little under one; the factor keeps every number below it.
    return (probs.cumsum(-1) <= uniform.unsqueeze(-1) * (1.0 - 1e-6)).sum(-1)


class PolicyDistribution(Protocol):
    """What the actor's losses and the acting code need of a policy; actions are in library form `[..., A]`."""

    def sample(self) -> Tensor:
        """Draws actions. `[..., A]`"""

    @property
    def mode(self) -> Tensor:
        """The likeliest actions. `[..., A]`"""

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-likelihood, summed over the action's dimensions. `[...]`"""

    def entropy(self) -> Tensor:
        """Entropy in nats, summed over the action's dimensions. `[...]`"""

    @property
    def entropy_range(self) -> tuple[float, float]:
        """The smallest and the largest entropy that such a policy can have."""


_STD_RANGE = (0.1, 1.0)
_UNIT_ENTROPY = 0.5 * math.log(2 * math.pi) + 0.5
"""Entropy of a standard normal."""


class NormalPolicy:
    """Independent normals with a tanh mean and a standard deviation in (0.1, 1); draws are not squashed.

    Args:
        raw_mean: Network output. `[..., A]`
        raw_std: Network output. `[..., A]`
    """

    def __init__(self, raw_mean: Tensor, raw_std: Tensor) -> None:
        self.mean = torch.tanh(raw_mean.float())
        low, high = _STD_RANGE
        self.std = (high - low) * torch.sigmoid(raw_std.float() + 2.0) + low

    @property
    def mode(self) -> Tensor:
        """The mean. `[..., A]`"""
        return self.mean

    def sample(self) -> Tensor:
        """Draws actions; they may leave [-1, 1]. `[..., A]`"""
        return torch.addcmul(self.mean, self.std, torch.randn_like(self.mean))

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-likelihood, summed over the action's dimensions. `[...]`"""
        normalised = (actions - self.mean) / self.std
        return -(0.5 * normalised.square() + self.std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """`0.5 * log(2 pi e std^2)`, summed over the action's dimensions. `[...]`"""
        return (self.std.log() + _UNIT_ENTROPY).sum(-1)

    @property
    def entropy_range(self) -> tuple[float, float]:
        """From the smallest standard deviation in every dimension to the largest."""
        low, high = (self.std.shape[-1] * (math.log(std) + _UNIT_ENTROPY) for std in _STD_RANGE)
        return low, high


class CategoricalPolicy:
    """One or several independent softmaxes, side by side in one vector; actions are concatenated one-hots.

    Where logits are NaN, so are the actions.

    Without the latents' unimix: the reference lists it for the policy, but its categorical head does not read it.

    Args:
        logits: `[..., A]`
        classes: Width of each softmax; they sum to A.
    """

    def __init__(self, logits: Tensor, classes: tuple[int, ...]) -> None:
        self.classes = classes
        self.logprobs = torch.cat([log_softmax(part) for part in logits.float().split(classes, -1)], -1)

    @property
    def mode(self) -> Tensor:
        """The likeliest class of each softmax, one-hot. `[..., A]`"""
        return self._onehots([part.argmax(-1) for part in self._parts()])

    def sample(self) -> Tensor:
        """Draws one class of each softmax, one-hot. `[..., A]`"""
        return self._onehots([inverse_cdf(part.exp()) for part in self._parts()])

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-likelihood of one-hot actions. `[...]`"""
        return (actions * self.logprobs).sum(-1)

    def entropy(self) -> Tensor:
        """Summed over the softmaxes. `[...]`"""
        return -(self.logprobs.exp() * self.logprobs).sum(-1)

    @property
    def entropy_range(self) -> tuple[float, float]:
        """From one certain class in every softmax to even ones."""
        return 0.0, sum(math.log(width) for width in self.classes)

    def _parts(self) -> tuple[Tensor, ...]:
        return self.logprobs.detach().split(self.classes, -1)

    def _onehots(self, indices: Sequence[Tensor]) -> Tensor:
        pairs = zip(indices, self.classes, strict=True)
        onehots = torch.cat([F.one_hot(index, width) for index, width in pairs], -1).to(self.logprobs.dtype)
        return torch.add(onehots, self.logprobs.detach(), alpha=0.0)  # NaN stays NaN, though a class was found
