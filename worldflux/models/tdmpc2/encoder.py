"""Encoder of observations into latent states, and an optional decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux.config import TDMPC2Config
from worldflux.nn.mish import MishMLP, NormedLinear, mish
from worldflux.nn.transforms import simnorm

MAX_SHIFT = 3
"""Largest shift of an image in pixels, in each direction."""


class Encoder(nn.Module):
    """Encoder of observations into latent states.

    Each key has its own encoder, in sorted order: hidden layers for vectors, convolutions for images. Their outputs are
    concatenated and mapped to the latent width by one layer with LayerNorm and SimNorm. A single image needs no such
    layer if its convolutions have as many outputs as the latent state, as in the reference implementation.

    Args:
        config: Configuration of the model.
        task_dim: Width of the task embedding that every vector encoder takes as additional input; 0 for a single task.
    """

    def __init__(self, config: TDMPC2Config, task_dim: int) -> None:
        super().__init__()
        shapes = config.obs_shapes
        self.image_keys = config.image_keys
        self.keys = tuple(shapes)
        self.parts = nn.ModuleList()
        several = len(shapes) > 1
        width = 0
        for key, shape in shapes.items():
            if key in self.image_keys:
                # Without a norm, the features of an image would be negligible beside other features.
                conv = ConvEncoder(shape, config.num_channels, normed=several)
                self.parts.append(conv)
                width += conv.out_features
            else:
                self.parts.append(_hidden_layers(math.prod(shape) + task_dim, config))
                width += config.enc_dim
        self.simnorm = partial(simnorm, dim=config.simnorm_dim)
        direct = not several and bool(self.image_keys) and width == config.latent_dim
        self.project = None if direct else NormedLinear(width, config.latent_dim, self.simnorm)

    def forward(self, obs: Mapping[str, Tensor], task: Tensor | None, shift: Tensor | None) -> Tensor:
        """Maps observations, `[N, ...]` for each key, to latent states `[N, L]`.

        Args:
            obs: Observations: uint8 images, and vectors of any dtype.
            task: Embedding of the task of each row. `[N, E]`
            shift: Shift of the images of each row, see `shifted`; None does not shift them. `[N, 2]`
        """
        features = []
        for key, part in zip(self.keys, self.parts, strict=True):
            if key in self.image_keys:
                image = obs[key] if shift is None else shifted(obs[key], shift)
                features.append(part(image.float() / 255.0 - 0.5))
            else:
                vector = obs[key].float().flatten(1) if obs[key].ndim > 1 else obs[key].float().unsqueeze(1)
                features.append(part(vector if task is None else torch.cat([vector, task], -1)))
        joined = features[0] if len(features) == 1 else torch.cat(features, -1)
        return self.simnorm(joined) if self.project is None else self.project(joined)


def _hidden_layers(in_features: int, config: TDMPC2Config) -> nn.Module:
    """Builds all layers of a vector encoder except for the last one, which the encoders of all keys share."""
    count = max(config.num_enc_layers - 1, 1)
    widths = [in_features] + [config.enc_dim] * count
    return nn.Sequential(*(NormedLinear(i, o) for i, o in pairwise(widths)))


class ConvEncoder(nn.Module):
    """Four convolutions with ReLU between them, whose output is flattened in the order (channel, row, column).

    Args:
        shape: Shape of one image `[C, H, W]`.
        channels: Number of output channels of every convolution.
        normed: Whether a LayerNorm follows.
    """

    KERNELS_AND_STRIDES = ((7, 2), (5, 2), (3, 2), (3, 1))

    def __init__(self, shape: tuple[int, ...], channels: int, *, normed: bool) -> None:
        super().__init__()
        in_channels, *sides = shape
        self.convs = nn.ModuleList()
        for kernel, stride in self.KERNELS_AND_STRIDES:
            self.convs.append(nn.Conv2d(in_channels, channels, kernel, stride))
            in_channels = channels
            sides = [(side - kernel) // stride + 1 for side in sides]
        self.out_features = channels * sides[0] * sides[1]
        self.norm = nn.LayerNorm(self.out_features) if normed else None

    def forward(self, image: Tensor) -> Tensor:
        """Maps centred images `[N, C, H, W]` to `[N, channels * h * w]`."""
        last = len(self.convs) - 1
        for index, conv in enumerate(self.convs):
            image = conv(image)
            if index < last:
                image = F.relu(image)
        features = image.flatten(1)
        return features if self.norm is None else self.norm(features)


def shifted(image: Tensor, shift: Tensor) -> Tensor:
    """Shifts each image by whole pixels and fills the gap with its edge pixels. `[N, C, H, W]`

    The reference implementation pads the image by 3 pixels on each side, repeating its edge, and samples a window of
    the original size bilinearly at whole pixels, which differs from this only by rounding.

    Args:
        image: Images to shift. `[N, C, H, W]`
        shift: First column and first row of the window in the padded image, 0 to 6; 3 and 3 do not shift the image.
            `[N, 2]`
    """
    N, _, H, W = image.shape
    start = shift.long() - MAX_SHIFT
    columns = (torch.arange(W, device=image.device) + start[:, :1]).clamp(0, W - 1)  # [N, W]
    rows = (torch.arange(H, device=image.device) + start[:, 1:]).clamp(0, H - 1)  # [N, H]
    each = torch.arange(N, device=image.device)[:, None, None]
    # Indexing puts the channels last: [N, H, W, C].
    return image.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Decoder(nn.Module):
    """Decoder of latent states into observations, for examining predictions; it is not part of the reference."""

    def __init__(self, config: TDMPC2Config) -> None:
        super().__init__()
        self.shapes = config.obs_shapes
        self.image_keys = config.image_keys
        hidden = [config.mlp_dim] * config.num_hidden_layers
        self.parts = nn.ModuleList(
            ConvDecoder(config.latent_dim, shape, config.num_channels)
            if key in self.image_keys
            else MishMLP(config.latent_dim, hidden, math.prod(shape))
            for key, shape in self.shapes.items()
        )

    def forward(self, latent: Tensor) -> dict[str, Tensor]:
        """Maps latent states `[N, L]` to observations, `[N, ...]` for each key; images are floats in [0, 1]."""
        found = {}
        for (key, shape), part in zip(self.shapes.items(), self.parts, strict=True):
            output = part(latent).float()
            found[key] = output if key in self.image_keys else output.reshape(len(latent), *shape)
        return found

    def losses(self, predicted: Mapping[str, Tensor], obs: Mapping[str, Tensor]) -> Tensor:
        """Computes the mean squared error of each row, summed over the keys. `[N]`"""
        total = []
        for key, prediction in predicted.items():
            target = obs[key].float() / 255.0 if key in self.image_keys else obs[key].float()
            total.append((prediction - target).square().reshape(len(target), -1).mean(-1))
        return torch.stack(total).sum(0)


class ConvDecoder(nn.Module):
    """Decoder of images: upsamples a small feature map three times and crops it. `[N, L]` → `[N, C, H, W]`"""

    def __init__(self, in_features: int, shape: tuple[int, ...], channels: int) -> None:
        super().__init__()
        out_channels, self.height, self.width = shape
        self.grid = (math.ceil(self.height / 8), math.ceil(self.width / 8))
        self.start = NormedLinear(in_features, channels * self.grid[0] * self.grid[1])
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.out = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """Maps latent states `[N, L]` to images in [0, 1]."""
        x = self.start(latent).unflatten(-1, (-1, *self.grid))
        for conv in self.convs:
            x = mish(conv(F.interpolate(x, scale_factor=2, mode="nearest")))
        return torch.sigmoid(self.out(x[..., : self.height, : self.width]).float())
