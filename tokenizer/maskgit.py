"""MaskGIT's VQGAN, the tokenizer of RAR: residual blocks without biases, no attention, average pooling.

    tokenizer = load_tokenizer("pretrained_models/maskgit-vqgan-imagenet-f16-256.bin")

MaskGIT (arXiv 2202.04200, section 3.1) as carried to PyTorch; modules have the names of the published file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.base import Tokenizer, build_quantizer, register_network
from tokenizer.pointwise import PointwiseConv
from tokenizer.tokenizer_image.blocks import NORM_GROUPS, ResnetBlock, group_norm, swish
from tokenizer.tokenizer_image.strips import decode_in_strips


class MaskGITBlock(ResnetBlock):
    """Residual block without biases: (B, Cin, H, W) -> (B, Cout, H, W).

    Where the widths differ the shortcut takes the convolutions' output in place of the block's input. The published code
    does so, and the weights were trained with it.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, bias=False)
        self.same = in_channels == out_channels
        if not self.same:
            self.nin_shortcut = PointwiseConv(out_channels, out_channels, bias=False)

    def join(self, h: Tensor, x: Tensor) -> Tensor:
        return h + (x if self.same else self.nin_shortcut(h))


class UpsamplingConv(nn.Conv2d):
    """Doubles height and width, nearest neighbour, before a 3x3 convolution."""

    scale = 2

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


@dataclass
class MaskGITConfig:
    """The shape of the network: channel multipliers, one a level from the image down, and blocks of a level and of the middle.

    quantizer: its config; its width is that of the latents.
    """

    ch_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    ch: int = 128
    blocks: int = 2
    quantizer: dict[str, Any] = field(default_factory=lambda: {"name": "vq_legacy"})


def _blocks(in_channels: int, channels: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(MaskGITBlock(channels if i else in_channels, channels) for i in range(count))


class Encoder(nn.Module):
    """(B, 3, H, W) in [0, 1] -> (B, width, H/f, W/f) with f = 2^(levels - 1)."""

    def __init__(self, config: MaskGITConfig, width: int):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            nn.ModuleDict({"block": _blocks(before, after, config.blocks)})
            for before, after in zip([config.ch, *widths], widths, strict=False)
        )
        self.mid = _blocks(widths[-1], widths[-1], config.blocks)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = PointwiseConv(widths[-1], width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for i, level in enumerate(self.down):
            x = F.avg_pool2d(x, 2) if i else x
            for block in level["block"]:
                x = block(x)
        for block in self.mid:
            x = block(x)
        return self.conv_out(swish(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, width, H/f, W/f) -> (B, 3, H, W), about [0, 1]. `up` starts at the finest level."""

    def __init__(self, config: MaskGITConfig, width: int):
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = nn.Conv2d(width, widths[-1], 3, padding=1)
        self.mid = _blocks(widths[-1], widths[-1], config.blocks)
        self.up = nn.ModuleList(
            nn.ModuleDict({"block": _blocks(before, after, config.blocks)})
            for before, after in zip([*widths[1:], widths[-1]], widths, strict=True)
        )
        for level, channels in list(zip(self.up, widths, strict=True))[1:]:
            level["upsample_conv"] = UpsamplingConv(channels, channels, 3, padding=1)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def path(self) -> Iterator[nn.Module]:
        """Yield what latents pass before `norm_out`, one after another."""
        yield self.conv_in
        yield from self.mid
        for level in reversed(self.up):
            yield from level["block"]
            if "upsample_conv" in level:
                yield level["upsample_conv"]

    def forward(self, z: Tensor) -> Tensor:
        for module in self.path():
            z = module(z)
        return self.conv_out(swish(self.norm_out(z)))


@register_network("maskgit")
class MaskGITTokenizer(Tokenizer):
    """MaskGIT's VQGAN around a quantiser. Raises ValueError for a width that is not a multiple of 32."""

    family = "MaskGIT-VQGAN"

    def __init__(self, config: MaskGITConfig, **training: Any):
        super().__init__()
        widths = [config.ch * mult for mult in (1, *config.ch_mult)]
        if any(width % NORM_GROUPS for width in widths):
            raise ValueError(f"the widths {widths} must be multiples of {NORM_GROUPS} (group normalisation)")
        if training.pop("dropout_p", 0):
            raise ValueError(f"{self.family} has no dropout: leave --dropout-p out")
        self.config = config
        self.quantize = build_quantizer(config.quantizer, **training)
        self.encoder = Encoder(config, self.quantize.width)
        self.decoder = Decoder(config, self.quantize.width)
        self.downsample = 2 ** (len(config.ch_mult) - 1)

    @classmethod
    def build(cls, network: Mapping[str, Any], quantizer: Mapping[str, Any], **training: Any) -> "MaskGITTokenizer":
        return cls(MaskGITConfig(**network, quantizer=dict(quantizer)), **training)

    @property
    def network(self) -> dict[str, Any]:
        config = self.config
        return {"name": "maskgit", "ch_mult": list(config.ch_mult), "ch": config.ch, "blocks": config.blocks}

    def latents(self, pixels: Tensor) -> Tensor:
        self.require_fitting(pixels)
        return self.encoder((pixels + 1) / 2)

    def render(self, latents: Tensor) -> Tensor:
        return 2 * self.decoder(latents.to(self.decoder.conv_in.weight.dtype)) - 1

    def to_pixels_in_strips(self, codes: Tensor) -> Tensor:
        with self.exact():
            return 2 * decode_in_strips(nn.Identity(), self.decoder, self.quantize.lookup(codes)) - 1
