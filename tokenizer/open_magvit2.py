"""The network of Open-MAGVIT2 (arXiv 2409.04410, section 3.1), by its published names: convolutions alone, and a decoder
whose norms at each level are scaled and shifted by the image's own bits.

So every pixel depends on all codes of its image: the rows that a preview shows change as later rows are drawn.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.base import Tokenizer, build_quantizer, register_network
from tokenizer.pointwise import PointwiseConv
from tokenizer.tokenizer_image.blocks import NORM_GROUPS, ResnetBlock, group_norm, swish
from tokenizer.tokenizer_image.sizes import magvit_name
from tokenizer.tokenizer_image.strips import STRIP, Strips
from utils.precision import full_float32


class AdaptiveNorm(nn.Module):
    """A group norm whose scale and shift are linear in the deviation and the mean of the latents over the image.

    (B, C, H, W) and latents (B, width, h, w) -> (B, C, H, W).
    """

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6, affine=False)
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


class DepthToSpace(nn.Module):
    """A 3x3 convolution to four times the channels, which become twice the height and width."""

    scale = 2

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.conv1(x).unflatten(1, (4, -1))  # the pixel of the four is the slow index, pixel_shuffle's fast one
        return F.pixel_shuffle(parts.transpose(1, 2).flatten(1, 2), 2)


def _blocks(in_channels: int, channels: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(ResnetBlock(channels if i else in_channels, channels, bias=False) for i in range(count))


@dataclass
class OpenMagvitConfig:
    """The shape of the network: channel multipliers, one a level from the image down, and blocks of a level and of the middle.

    quantizer: its config; its width is that of the latents.
    """

    ch_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    ch: int = 128
    blocks: int = 4
    quantizer: dict[str, Any] = field(default_factory=lambda: {"name": "lfq"})


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, width, H/f, W/f) with f = 2^(levels - 1)."""

    def __init__(self, config: OpenMagvitConfig, width: int):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            nn.ModuleDict({"block": _blocks(before, after, config.blocks)})
            for before, after in zip([config.ch, *widths], widths, strict=False)
        )
        for level, channels in zip(self.down[:-1], widths, strict=False):
            level["downsample"] = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.mid_block = _blocks(widths[-1], widths[-1], config.blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = PointwiseConv(widths[-1], width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            for block in level["block"]:
                x = block(x)
            x = level["downsample"](x) if "downsample" in level else x
        for block in self.mid_block:
            x = block(x)
        return self.conv_out(swish(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, width, H/f, W/f) -> (B, 3, H, W). `up` and `adaptive` start at the finest level."""

    def __init__(self, config: OpenMagvitConfig, width: int):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        arriving = [*widths[1:], widths[-1]]
        self.conv_in = nn.Conv2d(width, widths[-1], 3, padding=1)
        self.mid_block = _blocks(widths[-1], widths[-1], config.blocks)
        self.adaptive = nn.ModuleList(AdaptiveNorm(width, channels) for channels in arriving)
        self.up = nn.ModuleList(
            nn.ModuleDict({"block": _blocks(before, after, config.blocks)})
            for before, after in zip(arriving, widths, strict=True)
        )
        for level, channels in zip(self.up[1:], widths[1:], strict=True):
            level["upsample"] = DepthToSpace(channels)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def path(self) -> Iterator[nn.Module]:
        """Yield what latents pass before `norm_out`, one after another."""
        yield self.conv_in
        yield from self.mid_block
        for level, adaptive in zip(reversed(self.up), reversed(self.adaptive), strict=True):
            yield adaptive
            yield from level["block"]
            if "upsample" in level:
                yield level["upsample"]

    def forward(self, latents: Tensor) -> Tensor:
        h = latents
        for module in self.path():
            h = module(h, latents) if isinstance(module, AdaptiveNorm) else module(h)
        return self.conv_out(swish(self.norm_out(h)))

    @full_float32()
    @torch.inference_mode()
    def in_strips(self, latents: Tensor, numbers: int = STRIP) -> Tensor:
        """Decode as `forward`, on the CPU. numbers: of a feature map, at once on the latents' device."""
        run, h = Strips(latents.device, numbers), latents
        for module in self.path():
            if isinstance(module, AdaptiveNorm):
                h = run(partial(module, latents=latents, norm=run.norm(module.norm, h)), h)
            else:
                h = run.through(module, h)
        norm = run.norm(self.norm_out, h)
        return run(lambda x: self.conv_out(swish(norm(x))), h)


@register_network("open-magvit2")
class OpenMagvit2(Tokenizer):
    """Open-MAGVIT2's network around a quantiser. Raises ValueError for widths that are no multiples of 32."""

    def __init__(self, config: OpenMagvitConfig, **training: Any):
        super().__init__()
        if training.pop("dropout_p", 0):
            raise ValueError("Open-MAGVIT2 has no dropout: leave --dropout-p out")
        if wrong := {width for mult in (1, *config.ch_mult) if (width := config.ch * mult) % NORM_GROUPS}:
            raise ValueError(
                f"ch {config.ch} with channel multipliers {list(config.ch_mult)} gives the widths {sorted(wrong)}; all "
                f"must be multiples of {NORM_GROUPS} (group normalisation)"
            )
        self.config = config
        self.quantize = build_quantizer(config.quantizer, **training)
        self.encoder, self.decoder = (kind(config, self.quantize.width) for kind in (Encoder, Decoder))
        self.downsample = 2 ** (len(config.ch_mult) - 1)
        self.family = magvit_name(len(config.ch_mult))

    @classmethod
    def build(cls, network: Mapping[str, Any], quantizer: Mapping[str, Any], **training: Any) -> "OpenMagvit2":
        return cls(OpenMagvitConfig(**network, quantizer=dict(quantizer)), **training)

    @property
    def network(self) -> dict[str, Any]:
        config = self.config
        return {"name": "open-magvit2", "ch": config.ch, "ch_mult": list(config.ch_mult), "blocks": config.blocks}

    def latents(self, pixels: Tensor) -> Tensor:
        self.require_fitting(pixels)
        return self.encoder(pixels)

    def render(self, latents: Tensor) -> Tensor:
        return self.decoder(self._decodable(latents))

    def to_pixels_in_strips(self, codes: Tensor) -> Tensor:
        with self.exact():
            return self.decoder.in_strips(self._decodable(self.quantize.lookup(codes.to(self.device))))

    def _decodable(self, latents: Tensor) -> Tensor:
        if latents.shape[2:].numel() < 2:
            raise ValueError(
                f"an image of one code has no deviation, which {self.family} decodes by: give at least two codes an image"
            )
        return latents.to(self.decoder.conv_in.weight.dtype)
