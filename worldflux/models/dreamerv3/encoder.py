"""Encoder and decoder of observations, and the reconstruction losses.

Observations are dictionaries here; a single tensor has the key "obs". Keys are used in sorted order: first all vectors
(transformed with symlog, except one-hot vectors), then all images (concatenated on the channel axis).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux.config import DreamerV3Config
from worldflux.nn.conv import ConvDecoder, ConvEncoder
from worldflux.nn.layers import MLP, Linear, in_portions
from worldflux.nn.transforms import symexp, symlog


class ObservationLayout:
    """Keys and shapes of the vectors and images in an observation."""

    def __init__(self, config: DreamerV3Config) -> None:
        shapes = config.obs_shapes
        self.vectors = {k: math.prod(shapes[k]) for k in config.vector_keys}
        self.images = {k: shapes[k] for k in config.image_keys}
        self.shapes = shapes
        self.classes = dict(config.obs_classes)
        self.use_symlog = config.use_symlog

    @property
    def image_channels(self) -> int:
        """Total number of channels of all images."""
        return sum(shape[0] for shape in self.images.values())

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width, the same for all images."""
        _, height, width = next(iter(self.images.values()))
        return height, width

    def squash(self, key: str, value: Tensor) -> Tensor:
        """Applies symlog to a vector, unless it is one-hot or the configuration disables it."""
        return value if key in self.classes or not self.use_symlog else symlog(value)

    def unsquash(self, key: str, value: Tensor) -> Tensor:
        """Converts predictions to the observation's units, the inverse of `squash`; one-hot logits become
        probabilities.
        """
        if key in self.classes:
            return torch.cat([part.softmax(-1) for part in value.split(self.classes[key], -1)], -1)
        return symexp(value) if self.use_symlog else value


class Encoder(nn.Module):
    """Encoder of observations into embeddings of width E."""

    def __init__(self, config: DreamerV3Config) -> None:
        super().__init__()
        self.layout = layout = ObservationLayout(config)
        self.out_features = 0
        if layout.vectors:
            self.mlp = MLP(sum(layout.vectors.values()), config.units, config.encoder_layers)
            self.out_features += self.mlp.out_features
        if layout.images:
            self.cnn = ConvEncoder(layout.image_channels, layout.image_size, config.cnn_depth, config.cnn_kernels)
            self.out_features += self.cnn.out_features

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Maps observations, `[N, ...]` for each key, to embeddings `[N, E]`."""
        parts = []
        layout = self.layout
        if layout.vectors:
            vectors = [layout.squash(k, _flat(obs[k])) for k in layout.vectors]
            joined = torch.cat(vectors, -1)
            # A missing observation may be marked by -inf and is replaced by zeros, as in the reference implementation.
            parts.append(self.mlp(torch.where(joined.isneginf(), 0.0, joined)))
        if layout.images:
            images = torch.cat([obs[k] for k in layout.images], -3)
            parts.append(self.cnn(images))
        return torch.cat(parts, -1)


class Decoder(nn.Module):
    """Decoder of latent states into predicted observations, in the space in which the losses compare them."""

    def __init__(self, config: DreamerV3Config) -> None:
        super().__init__()
        self.layout = layout = ObservationLayout(config)
        stoch_dim = config.stoch_discrete * config.stoch_classes
        if layout.vectors:
            self.mlp = MLP(config.deter_dim + stoch_dim, config.units, config.decoder_layers)
            self.vectors = nn.ModuleList(Linear(self.mlp.out_features, width) for width in layout.vectors.values())
        if layout.images:
            self.cnn = ConvDecoder(
                config.deter_dim,
                stoch_dim,
                layout.image_channels,
                layout.image_size,
                depth=config.cnn_depth,
                units=config.units,
                bspace=config.bspace,
                kernels=config.cnn_kernels,
            )

    def forward(self, deter: Tensor, stoch: Tensor) -> dict[str, Tensor]:
        """Predicts observations: vectors in symlog space, logits for one-hot vectors, images in [0, 1].

        Args:
            deter: Deterministic part of the state. `[N, D]`
            stoch: Flattened stochastic part of the state. `[N, S * C]`

        Returns:
            Predictions, `[N, ...]` for each key.
        """
        predictions: dict[str, Tensor] = {}
        if self.layout.vectors:
            # The order is the opposite of the other heads' features, as in the reference implementation.
            hidden = self.mlp(torch.cat([stoch, deter], -1))
            for key, layer in zip(self.layout.vectors, self.vectors, strict=True):
                predictions[key] = layer(hidden).float()
        if self.layout.images:
            channels = [shape[0] for shape in self.layout.images.values()]
            predictions |= zip(self.layout.images, self.cnn(deter, stoch).split(channels, 1), strict=True)
        return predictions

    def losses(self, predictions: Mapping[str, Tensor], obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Computes the reconstruction losses, summed over the entries of each observation. `[N]` for each key.

        They are squared errors without the factor one half, and cross-entropies for one-hot vectors.
        """
        losses = {}
        for key, predicted in predictions.items():
            if key in self.layout.images:
                losses[key] = in_portions(_image_loss, predicted, obs[key], size=64)
                continue
            target = _flat(obs[key])
            if key in self.layout.classes:
                groups = self.layout.classes[key]
                parts = zip(predicted.split(groups, -1), target.split(groups, -1), strict=True)
                losses[key] = -sum((t * F.log_softmax(p, -1)).sum(-1) for p, t in parts)
                continue
            losses[key] = (predicted - self.layout.squash(key, target)).square().sum(-1)
        return losses

    def observations(self, predictions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Converts predictions to the units and shapes of the observations; images stay floats in [0, 1]."""
        layout = self.layout
        vectors = {
            k: layout.unsquash(k, predictions[k]).unflatten(-1, layout.shapes[k] or (1,)) for k in layout.vectors
        }
        scalars = {k: v.squeeze(-1) for k, v in vectors.items() if not layout.shapes[k]}
        return {**predictions, **vectors, **scalars}


def _image_loss(predicted: Tensor, image: Tensor) -> Tensor:
    """Computes the squared error between predictions and uint8 images, `[N, C, H, W]` each. `[N]`"""
    return (predicted - image.float() / 255.0).square().flatten(1).sum(-1)


def _flat(vector: Tensor) -> Tensor:
    """Flattens `[N, ...]` to float32 `[N, width]`; scalars have width 1."""
    return vector.float().reshape(len(vector), -1)
