"""The image tokenizer: a convolutional encoder, a codebook and a decoder.

    tokenizer = VQ_models["VQ-16"](codebook_size=16384, codebook_embed_dim=8).eval()
    quant, _, (_, _, indices) = tokenizer.encode(images)  # (B, 3, H, W) in [-1, 1] -> (B, 8, H/16, W/16) and its codes
    images = tokenizer.decode_code(indices, shape=quant.shape)

VQGAN (arXiv 2012.09841) with the sizes of LlamaGen (arXiv 2406.06525, section 3.1). Fully convolutional: any height and
width that the downsampling divides. `tokenizer.to(memory_format=torch.channels_last)` runs it in channels-last.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.tokenizer_image.quantizer import CodebookLosses, VectorQuantizer
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.precision import full_float32

NORM_GROUPS = 32


@dataclass
class VQModelArgs:
    """The shape of a tokenizer. The channel multipliers, one per level from the image down, set the downsampling."""

    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    codebook_l2_norm: bool = True
    codebook_show_usage: bool = True
    commit_loss_beta: float = 0.25
    entropy_loss_ratio: float = 0.0

    encoder_ch_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    decoder_ch_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    z_channels: int = 256
    ch: int = 128
    dropout_p: float = 0.0


# The name that code written for LlamaGen imports.
ModelArgs = VQModelArgs


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


def swish(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    # The fused kernel saves a tensor per call. On the CPU the two operations meet the recorded figures to the last bit:
    # the difference is a rounding, but group norm in channels-last amplifies it there to the size of the tolerance.
    return x * torch.sigmoid(x) if x.device.type == "cpu" else F.silu(x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Single-head attention over all positions, scale C^-0.5: three times (B, C, H, W) -> (B, C, H, W)."""
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


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution; with `as_product` computed as the matrix product that it is (see `independent_of_threads`)."""

    as_product = False

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.as_product:
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


@contextmanager
def independent_of_threads(model: nn.Module) -> Iterator[None]:
    """For the block, a CPU's result is the same for any number of threads.

    Its kernel for 1x1 convolutions rounds by how many there are, and so a process of several would draw other pixels than one alone.
    """
    convolutions = [module for module in model.modules() if isinstance(module, PointwiseConv)]
    for module in convolutions:
        module.as_product = True
    try:
        yield
    finally:
        for module in convolutions:
            module.as_product = False


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and swish, around a shortcut: (B, Cin, H, W) -> (B, Cout, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, dropout_p: float = 0.0):
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout_p)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = PointwiseConv(in_channels, out_channels) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """Single-head attention over all H*W positions, around a shortcut: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
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

    def __init__(
        self, ch: int = 128, ch_mult: Sequence[int] = (1, 1, 2, 2, 4), z_channels: int = 256, dropout_p: float = 0.0
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        channels, deepest = ch, len(ch_mult) - 1
        for i, mult in enumerate(ch_mult):
            level = Level(channels, ch * mult, blocks=2, attention=i == deepest, dropout_p=dropout_p)
            channels = ch * mult
            if i != deepest:
                level.downsample = Downsample(channels)
            self.conv_blocks.append(level)
        self.mid = _middle(channels, dropout_p)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.conv_blocks[:-1]:
            h = level.downsample(level(h))
        h = self.conv_blocks[-1](h)
        for block in self.mid:
            h = block(h)
        return self.conv_out(swish(self.norm_out(h)))


class Decoder(nn.Module):
    """(B, z_channels, H/f, W/f) -> (B, 3, H, W) with f = 2^(levels - 1). `conv_blocks` starts at the deepest level."""

    def __init__(
        self, ch: int = 128, ch_mult: Sequence[int] = (1, 1, 2, 2, 4), z_channels: int = 256, dropout_p: float = 0.0
    ):
        super().__init__()
        channels, deepest = ch * ch_mult[-1], len(ch_mult) - 1
        self.conv_in = nn.Conv2d(z_channels, channels, 3, padding=1)
        self.mid = _middle(channels, dropout_p)
        self.conv_blocks = nn.ModuleList()
        for i, mult in reversed(list(enumerate(ch_mult))):
            level = Level(channels, ch * mult, blocks=3, attention=i == deepest, dropout_p=dropout_p)
            channels = ch * mult
            if i != 0:
                level.upsample = Upsample(channels)
            self.conv_blocks.append(level)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance the adaptive adversarial loss (VQGAN, equation 7)."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for block in self.mid:
            h = block(h)
        for level in self.conv_blocks[:-1]:
            h = level.upsample(level(h))
        h = self.conv_blocks[-1](h)
        return self.conv_out(swish(self.norm_out(h)))


class VQModel(nn.Module):
    """Image tokenizer: images in [-1, 1] to codebook indices and back.

    Raises ValueError if encoder and decoder have different numbers of levels, or a width is not a multiple of 32.
    """

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
        self.config = config
        self.encoder = Encoder(config.ch, encoder_mult, config.z_channels, config.dropout_p)
        self.decoder = Decoder(config.ch, decoder_mult, config.z_channels, config.dropout_p)
        self.quantize = VectorQuantizer(
            config.codebook_size,
            config.codebook_embed_dim,
            config.commit_loss_beta,
            config.entropy_loss_ratio,
            config.codebook_l2_norm,
            config.codebook_show_usage,
        )
        self.quant_conv = PointwiseConv(config.z_channels, config.codebook_embed_dim)
        self.post_quant_conv = PointwiseConv(config.codebook_embed_dim, config.z_channels)

    @property
    def downsample(self) -> int:
        """Pixels per token along each side."""
        return 2 ** (len(self.config.encoder_ch_mult) - 1)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance the adaptive adversarial loss (VQGAN, equation 7)."""
        return self.decoder.last_layer

    def encode(self, x: Tensor) -> tuple[Tensor, CodebookLosses, tuple[None, None, Tensor]]:
        """Tokenizes images.

        x: (B, 3, H, W) in [-1, 1] -> quant (B, codebook_embed_dim, H/f, W/f), (vq, commit, entropy, usage), all None
        in eval mode, and (None, None, indices) with indices (B*H/f*W/f,) in raster order.
        Raises ValueError if the downsampling f does not divide H or W.
        """
        height, width = x.shape[-2:]
        if height % self.downsample or width % self.downsample:
            raise ValueError(
                f"images are {height} high and {width} wide; both must be multiples of {self.downsample}, the "
                "downsampling of this tokenizer: resize or crop them"
            )
        with self._precision():
            return self.quantize(self.quant_conv(self.encoder(x)))

    def decode(self, quant: Tensor) -> Tensor:
        """Latents (B, codebook_embed_dim, h, w) to images (B, 3, h*f, w*f), roughly in [-1, 1], not clamped."""
        with self._precision():
            return self.decoder(self.post_quant_conv(quant.to(self.post_quant_conv.weight.dtype)))

    def _precision(self) -> AbstractContextManager:
        """Return the float32 to compute in: without TF32 in eval mode, in training what the run asks for."""
        return nullcontext() if self.training else full_float32()

    def decode_in_bfloat16(self) -> "VQModel":
        """Turns what decodes into bfloat16 and channels-last, in place, and returns the model. What encodes stays as it is.

        For pixels sooner that are not quite the same (benchmarks/image_tokenizer.py): images come in bfloat16.
        """
        for part in (self.post_quant_conv, self.decoder):
            part.to(torch.bfloat16, memory_format=torch.channels_last)
        return self

    def decode_code(self, codes: Tensor, shape: Sequence[int] | None = None, channel_first: bool = True) -> Tensor:
        """Codes to images.

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
            batch, height, width = codes.shape
            shape, channel_first = (batch, self.config.codebook_embed_dim, height, width), True
        quant = self.quantize.get_codebook_entry(codes, shape, channel_first)
        return self.decode(quant if channel_first else quant.permute(0, 3, 1, 2).contiguous())

    def forward(self, x: Tensor) -> tuple[Tensor, CodebookLosses]:
        """(B, 3, H, W) in [-1, 1] -> reconstruction (B, 3, H, W) and the losses of `encode`, whose errors it raises."""
        quant, losses, _ = self.encode(x)
        return self.decode(quant), losses


def build_tokenizer(name: str, **overrides) -> VQModel:
    """A tokenizer of the table of sizes, with any field of VQModelArgs overridden."""
    return VQModel(VQModelArgs(**{**VQ_SIZES[name], **overrides}))


VQ_models: dict[str, Callable[..., VQModel]] = {name: partial(build_tokenizer, name) for name in VQ_SIZES}


def vq_model_name(args: VQModelArgs) -> str | None:
    """The key of `VQ_models` with the levels of `args`, or else its downsampling, whatever the width; None for neither."""
    mults = [list(args.encoder_ch_mult), list(args.decoder_ch_mult)]
    same = [name for name, size in VQ_SIZES.items() if [size["encoder_ch_mult"], size["decoder_ch_mult"]] == mults]
    similar = [name for name, size in VQ_SIZES.items() if len(size["encoder_ch_mult"]) == len(mults[0])]
    return next(iter(same + similar), None)


def vq_args_from_state_dict(state: Mapping[str, Tensor]) -> VQModelArgs:
    """Reads the shape of a tokenizer off its weights, so that a file can be loaded without flags.

    What leaves no trace in the weights (l2 normalisation, loss factors, dropout) keeps its default; see `recorded_l2_norm`.
    Raises ValueError that names the entry if one is missing, or if a width is not a multiple of the first one.
    """

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise ValueError(f"not the weights of an image tokenizer: no entry {name!r} among {len(state)} entries")
        return state[name].shape

    ch = shape("encoder.conv_in.weight")[0]

    def multipliers(part: str) -> list[int]:
        mults: list[int] = []
        name = f"{part}.conv_blocks.0.res.0.conv1.weight"
        while not mults or name in state:
            mult, rest = divmod(shape(name)[0], ch)
            if rest:
                raise ValueError(f"{name} has {shape(name)[0]} channels, not a multiple of the {ch} of the first layer")
            mults.append(mult)
            name = f"{part}.conv_blocks.{len(mults)}.res.0.conv1.weight"
        return mults

    codebook_size, codebook_embed_dim = shape("quantize.embedding.weight")
    return VQModelArgs(
        codebook_size=codebook_size,
        codebook_embed_dim=codebook_embed_dim,
        codebook_show_usage="quantize.codebook_used" in state,
        encoder_ch_mult=multipliers("encoder"),
        decoder_ch_mult=multipliers("decoder")[::-1],
        z_channels=shape("encoder.conv_out.weight")[0],
        ch=ch,
    )
