"""Image encoder and decoder of DreamerV3: four halvings with max-pooling, four doublings with up-sampling.

Public images are `[N, C, H, W]`; inside, convolutions run channels-last, where the norms over channels are free of
copies.
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
"""Channels of the four stages in units of `depth`."""

_PORTION = 32
"""Images that a CPU works on at a time."""


class Conv(nn.Conv2d):
    """A stride-one convolution that keeps the image's size, with the truncated-normal kernel and a zero bias."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(in_channels, out_channels, kernel, padding="same" if kernel % 2 == 0 else kernel // 2)

    def reset_parameters(self) -> None:
        """Draws the kernel anew and zeroes the bias."""
        truncated_normal_(self.weight, self.in_channels * self.kernel_size[0] * self.kernel_size[1])
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class UpConv(Conv):
    """Doubles the size of an image (nearest neighbour) and convolves it, without ever making the large image.

    Four neighbouring pixels of the doubled image are copies of one, so a kernel of 5 x 5 sees only 3 x 3 different
    pixels, and which ones depends on where it stands: at an even or an odd row, an even or an odd column. The four
    cases are four convolutions of the small image with sums of the kernel's entries, evaluated as one: 9
    multiplications in place of 25, and the same numbers up to rounding.
    """

    phases: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(in_channels, out_channels, kernel)
        before = (kernel - 1) // 2  # pixels that "same" padding puts before the image, as torch does
        # Pixel 2i + a of the result sees, at the kernel's entry u, pixel i + (a + u - before) // 2 of the small image.
        self.pad_before, self.pad_after = -(-before // 2), (kernel - before) // 2
        source = torch.div(torch.arange(2)[:, None] + torch.arange(kernel) - before, 2, rounding_mode="floor")
        taps = torch.arange(-self.pad_before, self.pad_after + 1)
        phases = (source[:, None] == taps[:, None]).float()  # [2, taps, kernel]
        self.register_buffer("phases", phases, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[N, in, H, W]` to `[N, out, 2 * H, 2 * W]`, channels-last in memory."""
        N, _, H, W = x.shape
        with autocast(x.device, None):  # the sums are exact in float32; the convolution rounds
            kernels = torch.einsum("atu,oiuv,bsv->aboits", self.phases, self.weight, self.phases).flatten(0, 2)
        assert self.bias is not None
        if self.pad_before == self.pad_after:
            small = F.conv2d(x, kernels, self.bias.repeat(4), padding=self.pad_after)
        else:
            small = F.conv2d(F.pad(x, (self.pad_before, self.pad_after) * 2), kernels, self.bias.repeat(4))
        parts = small.permute(0, 2, 3, 1).reshape(N, H, W, 2, 2, -1)  # the last axes: odd row, odd column, channel
        return parts.transpose(2, 3).reshape(N, 2 * H, 2 * W, -1).permute(0, 3, 1, 2)


def channel_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Norm over the channels of each pixel, then SiLU. `[N, C, H, W]`"""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvEncoder(nn.Module):
    """Images to flat features: per stage convolution, 2x2 max-pool, norm, SiLU.

    Args:
        in_channels: Channels of all images together.
        size: Height and width, each divisible by 16.
        depth: Channels grow as `depth * (2, 3, 4, 4)`.
        kernels: Kernel size of each stage.
    """

    def __init__(self, in_channels: int, size: tuple[int, int], depth: int, kernels: Sequence[int]) -> None:
        super().__init__()
        channels = [in_channels] + [depth * m for m in _MULTIPLIERS]
        self.convs = nn.ModuleList(Conv(i, o, k) for i, o, k in zip(channels[:-1], channels[1:], kernels, strict=True))
        self.norms = nn.ModuleList(NormSiLU(c) for c in channels[1:])
        self.out_features = channels[-1] * (size[0] // 16) * (size[1] // 16)

    def forward(self, image: Tensor) -> Tensor:
        """Maps bytes `[N, C, H, W]` to `[N, H/16 * W/16 * 4 * depth]` in (h, w, c) order."""
        return in_portions(self._forward, image, size=_PORTION)

    def _forward(self, image: Tensor) -> Tensor:
        x = (image.float() / 255.0 - 0.5).contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = channel_norm(norm, F.max_pool2d(conv(x), 2))
        return x.permute(0, 2, 3, 1).flatten(1)


class ConvDecoder(nn.Module):
    """Latent states to images in [0, 1].

    The deterministic part enters through a block-linear layer whose blocks each fill some channels of the smallest map,
    the stochastic part through a small MLP; their sum is up-sampled four times.

    Args:
        deter_dim: Width of the deterministic part; divisible by `bspace`.
        stoch_dim: Width of the flattened stochastic part.
        out_channels: Channels of all images together.
        size: Height and width, each divisible by 16.
        depth: As in the encoder; `4 * depth` is divisible by `bspace`.
        units: The stochastic part's hidden layer has twice as many.
        bspace: Blocks of the deterministic part's layer.
        kernels: Kernel sizes of the encoder; used in reverse.
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
        """The map before any up-sampling. `[N, 4 * depth, H/16, W/16]`"""
        rows, columns = self.grid
        # Each block's outputs are a (rows, columns, channels / bspace) map: blocks become neighbouring channels.
        blocks = self.sp0(deter).unflatten(-1, (self.bspace, rows, columns, -1))  # [N, g, h, w, c/g]
        spatial = blocks.permute(0, 2, 3, 1, 4).flatten(3)  # [N, h, w, c]
        vector = self.sp2(self.sp1norm(self.sp1(stoch))).unflatten(-1, (rows, columns, -1))
        return self.spnorm(spatial + vector).permute(0, 3, 1, 2)
