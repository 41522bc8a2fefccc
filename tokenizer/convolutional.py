"""The network without attention that MaskGIT's tokenizer and Open-MAGVIT2's share: residual blocks without biases.

tokenizer/maskgit.py and tokenizer/open_magvit2.py say what differs. Modules have the names of the published files.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tokenizer.base import Tokenizer, build_quantizer
from tokenizer.pointwise import PointwiseConv
from tokenizer.tokenizer_image.blocks import NORM_GROUPS, ResnetBlock, group_norm, swish


@dataclass
class ConvolutionalConfig:
    """The shape of the network: channel multipliers, one a level from the image down, and blocks of a level and of the middle.

    quantizer: its config; its width is that of the latents.
    """

    ch_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    ch: int = 128
    blocks: int = 2
    quantizer: dict[str, Any] = field(default_factory=dict)

    @property
    def widths(self) -> list[int]:
        """Return the channels of each level, from the image down."""
        return [self.ch * mult for mult in self.ch_mult]


class PlainBlock(ResnetBlock):
    """Residual block without biases in its convolutions: (B, Cin, H, W) -> (B, Cout, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, bias=False)


class Half(nn.Module):
    """The common part of encoder and decoder. middle: the attribute that holds the middle blocks."""

    middle = "mid"
    block: type[ResnetBlock] = PlainBlock

    def blocks(self, in_channels: int, channels: int, count: int) -> nn.ModuleList:
        """Return residual blocks, of which the first changes the width."""
        return nn.ModuleList(self.block(channels if i else in_channels, channels) for i in range(count))

    def levels(self, arriving: Iterable[int], widths: Iterable[int], count: int) -> nn.ModuleList:
        """Return the levels, by the channels that arrive at each and leave it."""
        pairs = zip(arriving, widths, strict=False)
        return nn.ModuleList(nn.ModuleDict({"block": self.blocks(*pair, count)}) for pair in pairs)


class Encoder(Half):
    """(B, 3, H, W) -> (B, width, H/f, W/f) with f = 2^(levels - 1)."""

    def __init__(self, config: ConvolutionalConfig, width: int):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1, bias=False)
        self.down = self.levels([config.ch, *widths], widths, config.blocks)
        for level, channels in zip(self.down[:-1], widths, strict=False):
            level["downsample"] = self.downsampling(channels)
        self.add_module(self.middle, self.blocks(widths[-1], widths[-1], config.blocks))
        self.norm_out = group_norm(widths[-1])
        self.conv_out = PointwiseConv(widths[-1], width)

    def downsampling(self, channels: int) -> nn.Module:
        """Return the module that halves height and width."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            for block in level["block"]:
                x = block(x)
            x = level["downsample"](x) if "downsample" in level else x
        for block in self.get_submodule(self.middle):
            x = block(x)
        return self.conv_out(swish(self.norm_out(x)))


class Decoder(Half):
    """(B, width, H/f, W/f) -> (B, 3, H, W). `up` starts at the finest level.

    upsample: the entry of a level that holds its upsampling.
    """

    upsample = "upsample"

    def __init__(self, config: ConvolutionalConfig, width: int):
        super().__init__()
        widths = config.widths
        arriving = [*widths[1:], widths[-1]]
        self.conv_in = nn.Conv2d(width, widths[-1], 3, padding=1)
        self.add_module(self.middle, self.blocks(widths[-1], widths[-1], config.blocks))
        self.add_norms(width, arriving)
        self.up = self.levels(arriving, widths, config.blocks)
        for level, channels in zip(self.up[1:], widths[1:], strict=True):
            level[self.upsample] = self.upsampling(channels)
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def add_norms(self, width: int, arriving: list[int]) -> None:
        """Add what `before` returns, for the channels that arrive at each level; most networks have nothing there."""

    def before(self, level: int) -> Iterable[nn.Module]:
        """Return what a map passes before the blocks of a level."""
        return ()

    def upsampling(self, channels: int) -> nn.Module:
        """Return the module that doubles height and width."""
        raise NotImplementedError

    def path(self) -> Iterator[nn.Module]:
        """Yield what latents pass before `norm_out`, one after another."""
        yield self.conv_in
        yield from self.get_submodule(self.middle)
        for i, level in reversed(list(enumerate(self.up))):
            yield from self.before(i)
            yield from level["block"]
            if self.upsample in level:
                yield level[self.upsample]

    def forward(self, latents: Tensor) -> Tensor:
        h = latents
        for module in self.path():
            h = self.step(module, h, latents)
        return self.conv_out(swish(self.norm_out(h)))

    def step(self, module: nn.Module, h: Tensor, latents: Tensor) -> Tensor:
        """Return what a module of the path makes of a map, given the image's latents."""
        return module(h)


class ConvolutionalTokenizer(Tokenizer):
    """The network around a quantiser. Raises ValueError for widths that are no multiples of 32."""

    Config = ConvolutionalConfig
    parts: tuple[type[Encoder], type[Decoder]]

    def __init__(self, config: ConvolutionalConfig, **training: Any):
        super().__init__()
        if training.pop("dropout_p", 0):
            raise ValueError(f"{self.family} has no dropout: leave --dropout-p out")
        if wrong := {width for width in (config.ch, *config.widths) if width % NORM_GROUPS}:
            raise ValueError(
                f"ch {config.ch} with channel multipliers {list(config.ch_mult)} gives the widths {sorted(wrong)}; all "
                f"must be multiples of {NORM_GROUPS} (group normalisation)"
            )
        self.config = config
        self.quantize = build_quantizer(config.quantizer, **training)
        self.encoder, self.decoder = (part(config, self.quantize.width) for part in self.parts)
        self.downsample = 2 ** (len(config.ch_mult) - 1)
