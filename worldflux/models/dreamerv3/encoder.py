"""Observations in, observations out: the encoder, the decoder and their losses.

An observation is a dictionary here; a single tensor has the key "obs". Keys are used in sorted order: first all vectors
(symlog, or one-hots as they are), then all images (joined on channels).
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
    """Which keys are vectors, which are images, and how wide they are."""

    def __init__(self, config: DreamerV3Config) -> None:
        shapes = config.obs_shapes
        self.vectors = {k: math.prod(shapes[k]) for k in config.vector_keys}
        self.images = {k: shapes[k] for k in config.image_keys}
        self.shapes = shapes
        self.classes = dict(config.obs_classes)
        self.use_symlog = config.use_symlog

    @property
    def image_channels(self) -> int:
        """Channels of all images together."""
        return sum(shape[0] for shape in self.images.values())

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width, the same for all images."""
        _, height, width = next(iter(self.images.values()))
        return height, width

    def squash(self, key: str, value: Tensor) -> Tensor:
        """A vector as the networks see it: symlog, unless it is one-hot or the configuration says otherwise."""
        return value if key in self.classes or not self.use_symlog else symlog(value)

    def unsquash(self, key: str, value: Tensor) -> Tensor:
        """Inverse of `squash` for predictions."""
        if key in self.classes:
            return torch.cat([part.softmax(-1) for part in value.split(self.classes[key], -1)], -1)
        return symexp(value) if self.use_symlog else value


class Encoder(nn.Module):
    """Observations to embeddings `[..., E]`."""

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
        """Maps `[N, ...]` for each key to `[N, E]`."""
        parts = []
        layout = self.layout
        if layout.vectors:
            vectors = [layout.squash(k, _flat(obs[k])) for k in layout.vectors]
            joined = torch.cat(vectors, -1)
            # A missing observation may be marked by -inf and enters as zeros, as in the reference.
            parts.append(self.mlp(torch.where(joined.isneginf(), 0.0, joined)))
        if layout.images:
            images = torch.cat([obs[k] for k in layout.images], -3)
            parts.append(self.cnn(images))
        return torch.cat(parts, -1)


class Decoder(nn.Module):
    """Latent states to observations, in the space in which the losses compare them."""

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
        """Predictions: vectors in symlog space, one-hots as logits, images in [0, 1].

        Args:
            deter: `[N, D]`
            stoch: `[N, S * C]`

        Returns:
            `[N, ...]` for each key.
        """
        predictions: dict[str, Tensor] = {}
        if self.layout.vectors:
            # The opposite order of the other heads' features, as in the reference.
            hidden = self.mlp(torch.cat([stoch, deter], -1))
            for key, layer in zip(self.layout.vectors, self.vectors, strict=True):
                predictions[key] = layer(hidden).float()
        if self.layout.images:
            channels = [shape[0] for shape in self.layout.images.values()]
            predictions |= zip(self.layout.images, self.cnn(deter, stoch).split(channels, 1), strict=True)
        return predictions

    def losses(self, predictions: Mapping[str, Tensor], obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Reconstruction losses, summed over the entries of each observation. `[N]` for each key.

        Squared errors without the factor one half; cross-entropy for one-hots.
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
        """Predictions in the observations' own units; images stay floats in [0, 1]."""
        layout = self.layout
        vectors = {
            k: layout.unsquash(k, predictions[k]).unflatten(-1, layout.shapes[k] or (1,)) for k in layout.vectors
        }
        scalars = {k: v.squeeze(-1) for k, v in vectors.items() if not layout.shapes[k]}
        return {**predictions, **vectors, **scalars}


def _image_loss(predicted: Tensor, image: Tensor) -> Tensor:
    """`[N, C, H, W]`, the image as bytes → `[N]`"""
    return (predicted - image.float() / 255.0).square().flatten(1).sum(-1)


def _flat(vector: Tensor) -> Tensor:
    """`[N, ...]` as float32 `[N, width]`; a number per row has width 1."""
    return vector.float().reshape(len(vector), -1)
