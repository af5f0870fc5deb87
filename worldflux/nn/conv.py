"""Image encoder and decoder of DreamerV3: four stages of max-pooling, and four stages of upsampling.

Inputs and outputs are `[N, C, H, W]`. Internally the memory format is channels-last, in which the norms over channels
need no copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux.nn.init import truncated_normal_
from worldflux.nn.layers import BlockLinear, Linear, NormSiLU, in_portions
from worldflux.nn.precision import autocast

_MULTIPLIERS = (2, 3, 4, 4)
"""Channels of the four stages, as multiples of `depth`."""

_PORTION = 32
"""Number of images that are processed at a time on a CPU."""


class Conv(nn.Conv2d):
    """Convolution of stride one that preserves the image size, with a truncated-normal kernel and a zero bias."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(in_channels, out_channels, kernel, padding="same" if kernel % 2 == 0 else kernel // 2)

    def reset_parameters(self) -> None:
        """Draws a new kernel and sets the bias to zero."""
        truncated_normal_(self.weight, self.in_channels * self.kernel_size[0] * self.kernel_size[1])
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class UpConv(Conv):
    """Nearest-neighbour upsampling by a factor of 2 followed by a convolution, without materialising the large image.

    Each pixel of the small image appears four times in the large one, so a 5 x 5 kernel sees only 3 x 3 distinct
    pixels. Which ones depends on whether its row and its column are even or odd. These four cases are four convolutions
    of the small image with sums of kernel entries, evaluated as one convolution: 9 multiplications instead of 25, with
    the same result up to rounding.
    """

    phases: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(in_channels, out_channels, kernel)
        before = (kernel - 1) // 2  # pixels that torch's "same" padding adds before the image
        # For pixel 2i + a of the result, kernel entry u reads pixel i + (a + u - before) // 2 of the small image.
        self.pad_before, self.pad_after = -(-before // 2), (kernel - before) // 2
        source = torch.div(torch.arange(2)[:, None] + torch.arange(kernel) - before, 2, rounding_mode="floor")
        taps = torch.arange(-self.pad_before, self.pad_after + 1)
        phases = (source[:, None] == taps[:, None]).float()  # [2, taps, kernel]
        self.register_buffer("phases", phases, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, in, H, W]` to `[N, out, 2 * H, 2 * W]` in the channels-last memory format."""
        N, _, H, W = x.shape
        with autocast(x.device, None):  # the sums stay in float32; only the convolution is in reduced precision
            kernels = torch.einsum("atu,oiuv,bsv->aboits", self.phases, self.weight, self.phases).flatten(0, 2)
        assert self.bias is not None
        if self.pad_before == self.pad_after:
            small = F.conv2d(x, kernels, self.bias.repeat(4), padding=self.pad_after)
        else:
            small = F.conv2d(F.pad(x, (self.pad_before, self.pad_after) * 2), kernels, self.bias.repeat(4))
        parts = small.permute(0, 2, 3, 1).reshape(N, H, W, 2, 2, -1)  # last axes: row parity, column parity, channel
        return parts.transpose(2, 3).reshape(N, 2 * H, 2 * W, -1).permute(0, 3, 1, 2)


def channel_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Applies `norm` (a norm followed by SiLU) over the channels of each pixel. `[N, C, H, W]`"""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvEncoder(nn.Module):
    """Encoder of images into flat features. Each stage is a convolution, 2 x 2 max-pooling, a norm and SiLU.

    Args:
        in_channels: Total number of channels of all images.
        size: Height and width, each divisible by 16.
        depth: Base number of channels; the stages have `depth * (2, 3, 4, 4)`.
        kernels: Kernel size of each stage.
    """

    def __init__(self, in_channels: int, size: tuple[int, int], depth: int, kernels: Sequence[int]) -> None:
        super().__init__()
        channels = [in_channels] + [depth * m for m in _MULTIPLIERS]
        self.convs = nn.ModuleList(Conv(i, o, k) for i, o, k in zip(channels[:-1], channels[1:], kernels, strict=True))
        self.norms = nn.ModuleList(NormSiLU(c) for c in channels[1:])
        self.out_features = channels[-1] * (size[0] // 16) * (size[1] // 16)

    def forward(self, image: Tensor) -> Tensor:
        """Maps uint8 images `[N, C, H, W]` to `[N, H/16 * W/16 * 4 * depth]`, flattened in (h, w, c) order."""
        return in_portions(self._forward, image, size=_PORTION)

    def _forward(self, image: Tensor) -> Tensor:
        x = (image.float() / 255.0 - 0.5).contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = channel_norm(norm, F.max_pool2d(conv(x), 2))
        return x.permute(0, 2, 3, 1).flatten(1)


class ConvDecoder(nn.Module):
    """Decoder of latent states into images with values in [0, 1].

    The deterministic part enters through a block-linear layer, each block of which fills some channels of the smallest
    feature map. The stochastic part enters through a small MLP. Their sum is upsampled four times.

    Args:
        deter_dim: Width of the deterministic part; divisible by `bspace`.
        stoch_dim: Width of the flattened stochastic part.
        out_channels: Total number of channels of all images.
        size: Height and width, each divisible by 16.
        depth: Base number of channels, as in the encoder; `4 * depth` must be divisible by `bspace`.
        units: Half the width of the hidden layer for the stochastic part.
        bspace: Number of blocks in the layer for the deterministic part.
        kernels: Kernel sizes of the encoder, used in reverse order.
    """

    def __init__(
        self,
        deter_dim: int,
        stoch_dim: int,
        out_channels: int,
        size: tuple[int, int],
        *,
        depth: int,
        units: int,
        bspace: int,
        kernels: Sequence[int],
    ) -> None:
        super().__init__()
        self.bspace = bspace
        self.grid = (size[0] // 16, size[1] // 16)
        channels = depth * _MULTIPLIERS[-1]
        width = channels * self.grid[0] * self.grid[1]
        self.sp0 = BlockLinear(deter_dim, width, bspace)
        self.sp1 = Linear(stoch_dim, 2 * units)
        self.sp1norm = NormSiLU(2 * units)
        self.sp2 = Linear(2 * units, width)
        self.spnorm = NormSiLU(channels)
        outs = [depth * m for m in reversed(_MULTIPLIERS[:-1])]
        ins = [channels, *outs[:-1]]
        reverse = list(reversed(kernels))
        self.convs = nn.ModuleList(UpConv(i, o, k) for i, o, k in zip(ins, outs, reverse[:-1], strict=True))
        self.norms = nn.ModuleList(NormSiLU(o) for o in outs)
        self.out = UpConv(outs[-1], out_channels, reverse[-1])

    def forward(self, deter: Tensor, stoch: Tensor) -> Tensor:
        """Maps `[N, D]` and `[N, S * C]` to `[N, out_channels, H, W]`."""
        return in_portions(self._images, self.smallest_map(deter, stoch), size=_PORTION)

    def _images(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = channel_norm(norm, conv(x))
        return torch.sigmoid(self.out(x).float())

    def smallest_map(self, deter: Tensor, stoch: Tensor) -> Tensor:
        """Returns the feature map before upsampling. `[N, 4 * depth, H/16, W/16]`"""
        rows, columns = self.grid
        # The outputs of each block form a (rows, columns, channels / bspace) map; the blocks are joined as channels.
        blocks = self.sp0(deter).unflatten(-1, (self.bspace, rows, columns, -1))  # [N, g, h, w, c/g]
        spatial = blocks.permute(0, 2, 3, 1, 4).flatten(3)  # [N, h, w, c]
        vector = self.sp2(self.sp1norm(self.sp1(stoch))).unflatten(-1, (rows, columns, -1))
        return self.spnorm(spatial + vector).permute(0, 3, 1, 2)
