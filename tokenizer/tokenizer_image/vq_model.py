"""The published image tokenizer: VQGAN's network around a quantiser, by the names that code for LlamaGen imports.

    tokenizer = VQ_models["VQ-16"](codebook_size=16384, codebook_embed_dim=8).eval()
    quant, _, (_, _, indices) = tokenizer.encode(images)  # (B, 3, H, W) in [-1, 1] -> (B, 8, H/16, W/16) and its codes
    images = tokenizer.decode_code(indices, shape=quant.shape)

VQGAN (arXiv 2012.09841) with the sizes of LlamaGen (arXiv 2406.06525, section 3.1). Inside this project nobody calls these
three: what a tokenizer is to others is tokenizer/base.py. `tokenizer.to(memory_format=torch.channels_last)` runs it in
channels-last.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

from torch import Tensor

from tokenizer.base import LOSS_WEIGHTS, Tokenizer, build_quantizer, register_network
from tokenizer.pointwise import PointwiseConv
from tokenizer.tokenizer_image.blocks import NORM_GROUPS, Decoder, Encoder
from tokenizer.tokenizer_image.sizes import VQ_SIZES, size_name
from tokenizer.tokenizer_image.strips import decode_in_strips

# An option of the published quantiser: the field that has it.
VQ_OPTIONS = {
    "codebook_size": "codebook_size",
    "codebook_embed_dim": "codebook_embed_dim",
    "l2_norm": "codebook_l2_norm",
    "show_usage": "codebook_show_usage",
}


@dataclass
class VQModelArgs:
    """The shape of a tokenizer. The channel multipliers, one per level from the image down, set the downsampling.

    commit_loss_beta, entropy_loss_ratio: weights of the quantiser's losses; None for its own.
    blocks: residual blocks of a level of the encoder; the decoder has one more. attention: levels that have
    some, counted from the image; -1 is the deepest.
    quantizer: the config of another quantiser than the published one of the `codebook_…` fields.
    """

    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    codebook_l2_norm: bool = True
    codebook_show_usage: bool = True
    commit_loss_beta: float | None = None
    entropy_loss_ratio: float | None = None

    encoder_ch_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    decoder_ch_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    z_channels: int = 256
    ch: int = 128
    dropout_p: float = 0.0
    blocks: int = 2
    attention: list[int] = field(default_factory=lambda: [-1])
    quantizer: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.quantizer and self.quantizer["name"] == "vq" and self.quantizer.keys() <= {"name", *VQ_OPTIONS}:
            for option in self.quantizer.keys() - {"name"}:
                setattr(self, VQ_OPTIONS[option], self.quantizer[option])
            self.quantizer = None

    def quantizer_config(self) -> dict[str, Any]:
        """Return the config of the quantiser, whichever way it was given."""
        published = {"name": "vq", **{option: getattr(self, name) for option, name in VQ_OPTIONS.items()}}
        return self.quantizer or published


# The name that code written for LlamaGen imports.
ModelArgs = VQModelArgs


@register_network("vqgan")
class VQModel(Tokenizer):
    """VQGAN's network around a quantiser.

    Raises ValueError if encoder and decoder have different numbers of levels, or a width is not a multiple of 32.
    """

    name, Config = "vqgan", VQModelArgs
    decoding = ("post_quant_conv", "decoder")

    def __init__(self, config: VQModelArgs):
        super().__init__()
        encoder_mult, decoder_mult = config.encoder_ch_mult, config.decoder_ch_mult
        if len(encoder_mult) != len(decoder_mult):
            raise ValueError(
                f"encoder_ch_mult {list(encoder_mult)} and decoder_ch_mult {list(decoder_mult)} have different numbers "
                "of levels, so the decoder would not return to the size of the image"
            )
        widths = [config.ch * mult for mult in (1, *encoder_mult, *decoder_mult)]
        if any(width % NORM_GROUPS for width in widths):
            raise ValueError(
                f"ch {config.ch} with channel multipliers {list(encoder_mult)} and {list(decoder_mult)} gives the "
                f"widths {sorted(set(widths))}; all must be multiples of {NORM_GROUPS} (group normalisation)"
            )
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        weights = {name: weight for name in LOSS_WEIGHTS if (weight := getattr(config, name)) is not None}
        self.quantize = build_quantizer(config.quantizer_config(), **weights)
        self.quant_conv = PointwiseConv(config.z_channels, self.quantize.width)
        self.post_quant_conv = PointwiseConv(self.quantize.width, config.z_channels)
        self.config = replace(config, codebook_size=self.quantize.codebook_size, codebook_embed_dim=self.quantize.width)
        self.family = size_name(self.network) or "VQGAN"
        self.downsample = 2 ** (len(encoder_mult) - 1)

    @classmethod
    def build(cls, network: Mapping[str, Any], quantizer: Mapping[str, Any], **training: Any) -> Self:
        return cls(VQModelArgs(**network, quantizer=dict(quantizer), **training))

    @property
    def network(self) -> dict[str, Any]:
        names = "encoder_ch_mult", "decoder_ch_mult", "z_channels", "ch", "blocks", "attention"
        return {"name": self.name, **{name: deepcopy(getattr(self.config, name)) for name in names}}

    def latents(self, pixels: Tensor) -> Tensor:
        return self.quant_conv(super().latents(pixels))

    def render(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype)))

    def to_pixels_in_strips(self, codes: Tensor) -> Tensor:
        with self.exact():
            return decode_in_strips(self.post_quant_conv, self.decoder, self.quantize.lookup(codes))

    # What code written for LlamaGen calls

    def encode(self, x: Tensor) -> tuple[Tensor, Sequence[Tensor | None], tuple[None, None, Tensor]]:
        """Tokenize images, as published.

        x: (B, 3, H, W) in [-1, 1] -> quant (B, codebook_embed_dim, H/f, W/f), (vq, commit, entropy, usage), all None
        in eval mode, and (None, None, indices) with indices (B*H/f*W/f,) in raster order.
        """
        with self.precision():
            quant, losses, codes = self.quantized(self.latents(x))
        return quant, (None,) * 4 if losses is None else tuple(losses), (None, None, codes.flatten())

    def decode(self, quant: Tensor) -> Tensor:
        """Return the images of latents: (B, codebook_embed_dim, h, w) -> (B, 3, h*f, w*f), as published."""
        with self.precision():
            return self.render(quant)

    def decode_code(self, codes: Tensor, shape: Sequence[int] | None = None, channel_first: bool = True) -> Tensor:
        """Return the images of codes, as published.

        codes: (B, N) or flat integers in raster order with `shape` (B, codebook_embed_dim, h, w), or (B, h, w,
        codebook_embed_dim) where not `channel_first`; (B, h, w) needs no shape. -> (B, 3, h*f, w*f), not clamped.
        Raises ValueError if the shape is missing or does not fit the codes.
        """
        if shape is None:
            if codes.dim() != 3:
                raise ValueError(
                    f"codes of shape {tuple(codes.shape)} do not say their grid: pass shape=(B, C, h, w), or codes of "
                    "shape (B, h, w)"
                )
            return self.decode(self.quantize.lookup(codes))
        quant = self.quantize.get_codebook_entry(codes, shape, channel_first)
        return self.decode(quant if channel_first else quant.permute(0, 3, 1, 2).contiguous())


def new_tokenizer(name: str, **overrides: Any) -> VQModel:
    """Build a tokenizer of the table of sizes, with any field of VQModelArgs overridden."""
    return VQModel(VQModelArgs(**{**VQ_SIZES[name], **overrides}))


VQ_models: dict[str, Callable[..., VQModel]] = {
    name: partial(new_tokenizer, name) for name, size in VQ_SIZES.items() if not {"name", "quantizer"} & size.keys()
}
