"""The network of Open-MAGVIT2 (arXiv 2409.04410, section 3.1), by its published names: convolutions alone, and a decoder
whose norms at each level are scaled and shifted by the image's own bits.

So every pixel depends on all codes of its image: the rows that a preview shows change as later rows are drawn.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer import convolutional
from tokenizer.base import register_network
from tokenizer.pointwise import GroupNorm
from tokenizer.tokenizer_image.blocks import NORM_GROUPS
from tokenizer.tokenizer_image.sizes import magvit_name
from tokenizer.tokenizer_image.strips import Strips, decode_in_strips


class AdaptiveNorm(nn.Module):
    """A group norm whose scale and shift are linear in the deviation and the mean of the latents over the image.

    (B, C, H, W) and latents (B, width, h, w) -> (B, C, H, W).
    """

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm = GroupNorm(NORM_GROUPS, channels, eps=1e-6, affine=False)
        self.gamma, self.beta = (nn.Linear(width, channels) for _ in range(2))

    def affine(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and shift of the latents' images, float32 (B, C, 1, 1) each."""
        variance, mean = torch.var_mean(latents.float(), dim=(2, 3))  # unbiased, (B, width)

        def linear(layer: nn.Linear, x: Tensor) -> Tensor:
            # Not a matrix product, which a CPU rounds by the number of images.
            return ((x[:, None] * layer.weight.float()).sum(-1) + layer.bias.float())[:, :, None, None]

        return linear(self.gamma, torch.sqrt(variance + 1e-6)), linear(self.beta, mean)

    def forward(self, x: Tensor, latents: Tensor, norm: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Normalise a map by the latents of its images. norm: the group norm, where x is a strip of the map."""
        normed = (norm or self.norm)(x)
        scale, shift = self.affine(latents)
        return scale.to(normed.dtype) * normed + shift.to(normed.dtype)

    def in_strips(self, run: Strips, x: Tensor, latents: Tensor) -> Tensor:
        """Normalise a map on the CPU (tokenizer/tokenizer_image/strips.py)."""
        return run(partial(self, latents=latents, norm=run.norm(self.norm, x)), x)


class DepthToSpace(nn.Module):
    """A 3x3 convolution to four times the channels, which become twice the height and width."""

    scale = 2

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.conv1(x).unflatten(1, (4, -1))  # the pixel of the four is the slow index, pixel_shuffle's fast one
        return F.pixel_shuffle(parts.transpose(1, 2).flatten(1, 2), 2)


class Encoder(convolutional.Encoder):
    """(B, 3, H, W) -> latents."""

    middle = "mid_block"

    def downsampling(self, channels: int) -> nn.Module:
        return nn.Conv2d(channels, channels, 3, stride=2, padding=1)


class Decoder(convolutional.Decoder):
    """Latents -> (B, 3, H, W). `adaptive` starts at the finest level, as `up`."""

    middle = "mid_block"

    def add_norms(self, width: int, arriving: list[int]) -> None:
        self.adaptive = nn.ModuleList(AdaptiveNorm(width, channels) for channels in arriving)

    def before(self, level: int) -> Iterable[nn.Module]:
        return (self.adaptive[level],)

    def upsampling(self, channels: int) -> nn.Module:
        return DepthToSpace(channels)

    def step(self, module: nn.Module, h: Tensor, latents: Tensor) -> Tensor:
        return module(h, latents) if isinstance(module, AdaptiveNorm) else module(h)


@register_network("open-magvit2")
class OpenMagvit2(convolutional.ConvolutionalTokenizer):
    """Open-MAGVIT2's network around a quantiser."""

    name, family = "open-magvit2", "Open-MAGVIT2"
    parts = Encoder, Decoder

    @dataclass
    class Config(convolutional.ConvolutionalConfig):
        """The shape of the network, with the published number of blocks."""

        blocks: int = 4

    def __init__(self, config: Config, **training: Any):
        super().__init__(config, **training)
        self.family = magvit_name(len(config.ch_mult))

    def render(self, latents: Tensor) -> Tensor:
        return super().render(self._decodable(latents))

    def to_pixels_in_strips(self, codes: Tensor) -> Tensor:
        with self.exact():
            latents = self._decodable(self.quantize.lookup(codes.to(self.device)))
            return decode_in_strips(nn.Identity(), self.decoder, latents)

    def _decodable(self, latents: Tensor) -> Tensor:
        if latents.shape[2:].numel() < 2:
            raise ValueError(
                f"an image of one code has no deviation, which {self.family} decodes by: give at least two codes an image"
            )
        return latents.to(self.decoder.conv_in.weight.dtype)
