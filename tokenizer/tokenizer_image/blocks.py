"""The network of VQGAN (arXiv 2012.09841) with the sizes of LlamaGen: its blocks, the encoder and the decoder.

Fully convolutional: any height and width that the downsampling divides.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.pointwise import GroupNorm, PointwiseConv, elementwise

if TYPE_CHECKING:
    from tokenizer.tokenizer_image.vq_model import VQModelArgs

NORM_GROUPS = 32


def group_norm(channels: int) -> GroupNorm:
    """Return the group norm that all of these networks have."""
    return GroupNorm(NORM_GROUPS, channels, eps=1e-6)


def swish(x: Tensor) -> Tensor:
    """Return x * sigmoid(x)."""
    # The fused kernel saves a tensor per call. On the CPU the two operations meet the recorded figures to the last bit:
    # the difference is a rounding, but group norm in channels-last amplifies it there to the size of the tolerance.
    return x * elementwise(torch.sigmoid, x) if x.device.type == "cpu" else F.silu(x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute single-head attention over all positions, scale C^-0.5: three times (B, C, H, W) -> (B, C, H, W)."""
    shape = q.shape
    q, k, v = (x.flatten(2).transpose(1, 2) for x in (q, k, v))  # (B, H*W, C)
    if q.device.type == "cpu":  # for the reason given in swish
        weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * shape[1] ** -0.5, dim=-1)
        h = torch.bmm(v.transpose(1, 2), weights.transpose(1, 2))  # (B, C, H*W)
    else:
        q, k, v = (x.contiguous().unsqueeze(1) for x in (q, k, v))  # fused kernels want the channels side by side
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.squeeze(1).transpose(1, 2)
    return h.reshape(shape)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and swish, around a shortcut: (B, Cin, H, W) -> (B, Cout, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, dropout_p: float = 0.0, bias: bool = True):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout_p)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else PointwiseConv(in_channels, out_channels, bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        return self.join(self.conv2(self.dropout(swish(self.norm2(h)))), x)

    def join(self, h: Tensor, x: Tensor) -> Tensor:
        """Add the shortcut of the block's input x to what its convolutions make of it: h and the result (B, Cout, H, W)."""
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Single-head attention over all H*W positions, around a shortcut: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = PointwiseConv(channels, channels)
        self.k = PointwiseConv(channels, channels)
        self.v = PointwiseConv(channels, channels)
        self.proj_out = PointwiseConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.proj_out(attention(self.q(h), self.k(h), self.v(h)))


class Downsample(nn.Module):
    """Halves height and width with a stride-2 3x3 convolution, padded on the right and at the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution."""

    scale = 2

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Blocks of one resolution, each followed by attention where `attention`. The owner adds the resize after them."""

    def __init__(self, in_channels: int, channels: int, blocks: int, attention: bool, dropout_p: float):
        super().__init__()
        self.res = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else channels, channels, dropout_p) for i in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(channels) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


def _middle(channels: int, dropout_p: float) -> nn.ModuleList:
    return nn.ModuleList(
        [ResnetBlock(channels, channels, dropout_p), AttnBlock(channels), ResnetBlock(channels, channels, dropout_p)]
    )


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, z_channels, H/f, W/f) with f = 2^(levels - 1)."""

    def __init__(self, config: "VQModelArgs"):
        super().__init__()
        channels, mults = config.ch, config.encoder_ch_mult
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        attended = {level % len(mults) for level in config.attention}
        for i, mult in enumerate(mults):
            level = Level(channels, config.ch * mult, config.blocks, i in attended, config.dropout_p)
            channels = config.ch * mult
            if i != len(mults) - 1:
                level.downsample = Downsample(channels)
            self.conv_blocks.append(level)
        self.mid = _middle(channels, config.dropout_p)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.conv_blocks[:-1]:
            h = level.downsample(level(h))
        h = self.conv_blocks[-1](h)
        for block in self.mid:
            h = block(h)
        return self.conv_out(swish(self.norm_out(h)))


class Decoder(nn.Module):
    """(B, z_channels, H/f, W/f) -> (B, 3, H, W), f as the encoder's. `conv_blocks` starts at the deepest level."""

    def __init__(self, config: "VQModelArgs"):
        super().__init__()
        mults = config.decoder_ch_mult
        channels, attended = config.ch * mults[-1], {level % len(mults) for level in config.attention}
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = _middle(channels, config.dropout_p)
        self.conv_blocks = nn.ModuleList()
        for i, mult in reversed(list(enumerate(mults))):
            level = Level(channels, config.ch * mult, config.blocks + 1, i in attended, config.dropout_p)
            channels = config.ch * mult
            if i != 0:
                level.upsample = Upsample(channels)
            self.conv_blocks.append(level)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def path(self) -> Iterator[nn.Module]:
        """Yield what latents pass before `norm_out`, one after another; a module with a `scale` enlarges its map."""
        yield self.conv_in
        yield from self.mid
        for level in self.conv_blocks:
            for i, block in enumerate(level.res):
                yield block
                yield from level.attn[i : i + 1]
            if level is not self.conv_blocks[-1]:
                yield level.upsample

    def forward(self, z: Tensor) -> Tensor:
        for module in self.path():
            z = module(z)
        return self.conv_out(swish(self.norm_out(z)))
