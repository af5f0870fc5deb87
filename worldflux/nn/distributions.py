"""Distributions parametrised by network outputs: two-hot values, one-hot latents, and two kinds of policy."""

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
"""Rounding error of logits with magnitudes below 16, as a multiple of the machine epsilon of their dtype."""


class TwoHot:
    """Categorical distribution over fixed bins that represents one real number.

    Source: DreamerV3, arXiv:2301.04104, symexp twohot loss.

    Args:
        logits: Output of the head in the precision of its matrix product; converted to float32. `[..., n]`
        bins: Bin positions: increasing, antisymmetric, and odd in number. `[n]`
    """

    def __init__(self, logits: Tensor, bins: Tensor) -> None:
        self.logits = logits.float()
        self.bins = bins
        self._probs: Tensor | None = None
        self._mean: Tensor | None = None  # without gradient
        # Largest relative difference between the probabilities of two bins that rounding alone can cause: rounding of
        # the logits to their own dtype, and rounding of the float32 sums that produced them.
        self._rounding = _UNITS * (torch.finfo(logits.dtype).eps + torch.finfo(torch.float32).eps)

    @property
    def probs(self) -> Tensor:
        """Probabilities of the bins without gradient, shared by the loss and the mean. `[..., n]`"""
        if self._probs is None:
            found = two_hot_mean(self.logits.detach(), self.bins, self._rounding)
            self._probs, self._mean = (torch.softmax(self.logits.detach(), -1), None) if found is None else found
        return self._probs

    def t(self) -> TwoHot:
        """Returns the same distributions with their first two batch axes swapped."""
        transposed = TwoHot(self.logits.transpose(0, 1), self.bins)
        transposed._probs, transposed._rounding = self.probs.transpose(0, 1), self._rounding
        transposed._mean = None if self._mean is None else self._mean.transpose(0, 1)
        return transposed

    @property
    def mean(self) -> Tensor:
        """Expected value. `[...]`

        Each bin is paired with its mirror image before summing, so that uniform probabilities give exactly 0. A pair
        whose probabilities differ by no more than rounding counts as equal: DreamerV3's outermost bins represent 4.8e8,
        so the last bit of a probability that no target has ever changed would contribute half a unit or more. The
        reference implementation has no such exception. The gradient is that of the sum without the exception.
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
        # Not a matrix product: autocast would compute it in bfloat16 and round returns of a few hundred to integers.
        return (excess * self.bins[middle + 1 :]).sum(-1)

    def loss(self, *targets: Tensor) -> Tensor:
        """Computes the cross-entropy with the two-hot encoding of each target, summed over the targets.

        Args:
            targets: Real numbers, each `[...]`. A target beyond the outermost bins puts all weight on the nearest bin.

        Returns:
            The loss. `[...]`
        """
        # -sum_i w_i * log_softmax_i with weights that sum to one: all targets share the normaliser, and the dense
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
    """`-sum_j weight_j * log_softmax(logits)[index_j]`, whose gradient reuses the given probabilities.

    The inputs are logits `[..., n]`, their softmax `[..., n]`, and indices and weights `[..., k]`; the weights of each
    target sum to one.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, probs: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(probs, index, weight)
        # Logarithm of the softmax's denominator, computed from the most likely bin, where nothing can underflow.
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
    """Finds the two bins around each target and the weight of the upper one.

    Returns:
        Lower index (int64), upper index (int64), and weight of the upper bin in [0, 1], which is NaN if the target is
        NaN or infinite. Each is `[...]`.
    """
    last = bins.shape[0] - 1
    above = torch.searchsorted(bins, target.detach().contiguous(), right=True)  # first bin beyond the target
    lower, upper = (above - 1).clamp(0, last), above.clamp(0, last)
    low, high = bins[lower], bins[upper]
    # Beyond the bins the weight is 0. For a target that is not finite it is NaN, so that the error cannot go unnoticed.
    weight = torch.where(upper == lower, 0.0 * target, (target - low) / torch.where(upper == lower, 1.0, high - low))
    return lower, upper, weight


class OneHot:
    """Independent categorical distributions mixed with a small uniform part, sampled as one-hot vectors.

    Source: DreamerV3, arXiv:2301.04104, 1% unimix.

    Args:
        logits: Logits of S distributions over C classes, converted to float32. `[..., S, C]`
        unimix: Weight of the uniform distribution in the mixture.
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
        """Draws one-hot samples with the straight-through gradient of the probabilities. `[..., S, C]`

        Args:
            noise: Uniform random numbers in [0, 1); drawn here if not given. `[..., S]`
        """
        return self.straight_through(inverse_cdf(self.probs.detach(), noise))

    @property
    def mode(self) -> Tensor:
        """Most likely class of each distribution as a one-hot vector. `[..., S, C]`"""
        return self.straight_through(self.probs.detach().argmax(-1))

    def straight_through(self, index: Tensor) -> Tensor:
        """Returns one-hot vectors of the given classes `[..., S]` with the gradient of the probabilities."""
        onehot = torch.zeros_like(self.probs).scatter_(-1, index.unsqueeze(-1), 1.0)
        if not self.probs.requires_grad:
            return onehot
        return onehot + (self.probs - self.probs.detach())

    def entropy(self) -> Tensor:
        """Computes the entropy, summed over the distributions. `[...]`"""
        return -(self.probs * self.logprobs).sum((-2, -1))

    def kl(self, other: OneHot) -> Tensor:
        """Computes KL(self || other), summed over the distributions. `[...]`"""
        return (self.probs * (self.logprobs - other.logprobs)).sum((-2, -1))

    def detach(self) -> OneHot:
        """Returns the same distribution without gradient."""
        copy = object.__new__(OneHot)
        copy.probs, copy._logprobs = self.probs.detach(), self.logprobs.detach()
        return copy


def softmax(logits: Tensor) -> Tensor:
    """Computes the softmax over the last axis from elementary operations.

    On a CPU, torch's own kernel is five times slower than this if the last axis is short, as for latents and actions.
    """
    exp = torch.exp(logits - logits.detach().amax(-1, keepdim=True))
    return exp / exp.sum(-1, keepdim=True)


def log_softmax(logits: Tensor) -> Tensor:
    """Computes the log-softmax over the last axis from elementary operations, for the reason given in `softmax`."""
    shifted = logits - logits.detach().amax(-1, keepdim=True)
    return shifted - torch.log(torch.exp(shifted).sum(-1, keepdim=True))


def inverse_cdf(probs: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Draws a class (int64 `[...]`) from each row of `probs` `[..., C]` with one uniform random number per row."""
    uniform = torch.rand(probs.shape[:-1], device=probs.device) if uniform is None else uniform
    # Rounding may leave the last cumulative sum slightly below one; the factor keeps every number below that sum.
    return (probs.cumsum(-1) <= uniform.unsqueeze(-1) * (1.0 - 1e-6)).sum(-1)


def one_hots(scores: Tensor, classes: Sequence[int]) -> Tensor:
    """Returns the class with the largest score in each part, as concatenated one-hot vectors.

    NaN scores give NaN.

    Args:
        scores: Concatenated scores of the parts. `[..., A]`
        classes: Number of classes of each part; the sum is A.
    """
    parts = scores.detach().split(list(classes), -1)
    found = [torch.zeros_like(part).scatter_(-1, part.argmax(-1, keepdim=True), 1.0) for part in parts]
    return torch.add(torch.cat(found, -1), scores.detach(), alpha=0.0)  # argmax of NaN gives a class; this keeps NaN


def gumbel_noise(*shape: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Draws standard Gumbel noise. The class with the largest sum of noise and log-probability is a random draw."""
    return -torch.empty(*shape, device=device).exponential_(generator=generator).log()


class PolicyDistribution(Protocol):
    """Interface of a policy that the actor losses and the acting code use; actions are `[..., A]`."""

    def sample(self) -> Tensor:
        """Draws actions. `[..., A]`"""

    @property
    def mode(self) -> Tensor:
        """Most likely actions. `[..., A]`"""

    def log_prob(self, actions: Tensor) -> Tensor:
        """Computes the log-likelihood, summed over the dimensions of the action. `[...]`"""

    def entropy(self) -> Tensor:
        """Computes the entropy in nats, summed over the dimensions of the action. `[...]`"""

    @property
    def entropy_range(self) -> tuple[float, float]:
        """Smallest and largest entropy that such a policy can have."""


_STD_RANGE = (0.1, 1.0)
_UNIT_ENTROPY = 0.5 * math.log(2 * math.pi) + 0.5
"""Entropy of a standard normal distribution."""


class NormalPolicy:
    """Independent normal distributions with a tanh mean and a standard deviation in (0.1, 1); samples are not squashed.

    Args:
        raw_mean: Network output for the mean. `[..., A]`
        raw_std: Network output for the standard deviation. `[..., A]`
    """

    def __init__(self, raw_mean: Tensor, raw_std: Tensor) -> None:
        self.mean = torch.tanh(raw_mean.float())
        low, high = _STD_RANGE
        self.std = (high - low) * torch.sigmoid(raw_std.float() + 2.0) + low

    @property
    def mode(self) -> Tensor:
        """Mean of the distribution. `[..., A]`"""
        return self.mean

    def sample(self) -> Tensor:
        """Draws actions, which may lie outside [-1, 1]. `[..., A]`"""
        return torch.addcmul(self.mean, self.std, torch.randn_like(self.mean))

    def log_prob(self, actions: Tensor) -> Tensor:
        """Computes the log-likelihood, summed over the dimensions of the action. `[...]`"""
        normalised = (actions - self.mean) / self.std
        return -(0.5 * normalised.square() + self.std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """Computes `0.5 * log(2 pi e std^2)`, summed over the dimensions of the action. `[...]`"""
        return (self.std.log() + _UNIT_ENTROPY).sum(-1)

    @property
    def entropy_range(self) -> tuple[float, float]:
        """Entropies for the smallest and for the largest standard deviation in every dimension."""
        low, high = (self.std.shape[-1] * (math.log(std) + _UNIT_ENTROPY) for std in _STD_RANGE)
        return low, high


class CategoricalPolicy:
    """One or several independent categorical distributions in one vector; actions are concatenated one-hot vectors.

    NaN logits give NaN actions.

    The unimix of the latents is not applied: the reference implementation lists it for the policy, but its categorical
    head does not read it.

    Args:
        logits: Concatenated logits of the distributions. `[..., A]`
        classes: Number of classes of each distribution; the sum is A.
    """

    def __init__(self, logits: Tensor, classes: tuple[int, ...]) -> None:
        self.classes = classes
        self.logprobs = torch.cat([log_softmax(part) for part in logits.float().split(classes, -1)], -1)

    @property
    def mode(self) -> Tensor:
        """Most likely class of each distribution as one-hot vectors. `[..., A]`"""
        return one_hots(self.logprobs, self.classes)

    def sample(self) -> Tensor:
        """Draws one class from each distribution as one-hot vectors. `[..., A]`"""
        indices = [inverse_cdf(part.exp()) for part in self.logprobs.detach().split(self.classes, -1)]
        pairs = zip(indices, self.classes, strict=True)
        onehots = torch.cat([F.one_hot(index, width) for index, width in pairs], -1).to(self.logprobs.dtype)
        return torch.add(onehots, self.logprobs.detach(), alpha=0.0)  # NaN probabilities give a class; this keeps NaN

    def log_prob(self, actions: Tensor) -> Tensor:
        """Computes the log-likelihood of one-hot actions. `[...]`"""
        return (actions * self.logprobs).sum(-1)

    def entropy(self) -> Tensor:
        """Computes the entropy, summed over the distributions. `[...]`"""
        return -(self.logprobs.exp() * self.logprobs).sum(-1)

    @property
    def entropy_range(self) -> tuple[float, float]:
        """Entropies of deterministic and of uniform distributions."""
        return 0.0, sum(math.log(width) for width in self.classes)
