"""A network for tokenizers that a CPU trains in minutes: it takes patches of pixels in and out, so that no convolution
runs at the resolution of the image.

Each residual block begins as the identity (Fixup, arXiv 1901.09321, section 3): its last convolution is zero at first.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.base import Tokenizer, build_quantizer, register_network
from tokenizer.pointwise import GroupNorm, PointwiseConv, elementwise

_NORM_GROUPS = 8


def silu(x: Tensor) -> Tensor:
    """Return x * sigmoid(x)."""
    return elementwise(lambda x, out=None: F.silu(x) if out is None else torch.ops.aten.silu.out(x, out=out), x)


class SiLU(nn.SiLU):
    """SiLU with the same bits on a CPU for any number of threads."""

    def forward(self, x: Tensor) -> Tensor:
        return silu(x)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU, around a shortcut: (B, C, H, W) -> the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = (GroupNorm(_NORM_GROUPS, channels) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        return x + self.conv2(silu(self.norm2(h)))


def _blocks(channels: int, depth: int) -> list[nn.Module]:
    return [ResidualBlock(channels) for _ in range(depth)]


@dataclass
class PatchConfig:
    """The shape of a tokenizer of patches.

    patch: pixels a side that the first convolution takes in at once and the last gives out. ch: channels at that
    resolution, twice as many at half of it. depth: residual blocks of a resolution. quantizer: its config.
    """

    patch: int = 4
    ch: int = 64
    depth: int = 2
    quantizer: dict[str, Any] = field(default_factory=lambda: {"name": "vq"})


@register_network("patches")
class PatchTokenizer(Tokenizer):
    """Patches of pixels, halved once more, around a quantiser: a code stands for 2 * patch pixels a side."""

    name, family = "patches", "VQ-8-P"
    Config = PatchConfig

    def __init__(self, config: PatchConfig, **training: Any):
        super().__init__()
        patch, ch, depth = config.patch, config.ch, config.depth
        if ch % _NORM_GROUPS:
            raise ValueError(f"ch {ch} must be a multiple of {_NORM_GROUPS} (group normalisation)")
        if training.pop("dropout_p", 0):
            raise ValueError(f"{self.family} has no dropout: leave --dropout-p out")
        self.config = config
        self.quantize = build_quantizer(config.quantizer, **training)
        self.downsample, width = 2 * patch, self.quantize.width
        self.encoder = nn.Sequential(
            nn.Conv2d(3, ch, patch, stride=patch), *_blocks(ch, depth),
            nn.Conv2d(ch, 2 * ch, 3, stride=2, padding=1), *_blocks(2 * ch, depth),
            GroupNorm(_NORM_GROUPS, 2 * ch), SiLU(), PointwiseConv(2 * ch, width),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(width, 2 * ch, 3, padding=1), *_blocks(2 * ch, depth),
            nn.Upsample(scale_factor=2), nn.Conv2d(2 * ch, ch, 3, padding=1), *_blocks(ch, depth),
            GroupNorm(_NORM_GROUPS, ch), SiLU(), nn.Conv2d(ch, 3 * patch**2, 3, padding=1), nn.PixelShuffle(patch),
        )  # fmt: skip
