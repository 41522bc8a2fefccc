"""MaskGIT's VQGAN, the tokenizer of RAR: residual blocks without biases, no attention, average pooling.

    tokenizer = load_tokenizer("pretrained_models/maskgit-vqgan-imagenet-f16-256.bin")

MaskGIT (arXiv 2202.04200, section 3.1) as carried to PyTorch.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer import convolutional
from tokenizer.base import register_network
from tokenizer.pointwise import PointwiseConv
from tokenizer.tokenizer_image.strips import decode_in_strips


class MaskGITBlock(convolutional.PlainBlock):
    """Residual block without biases: (B, Cin, H, W) -> (B, Cout, H, W).

    Where the widths differ the shortcut takes the convolutions' output in place of the block's input. The published code
    does so, and the weights were trained with it.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels)
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


class Encoder(convolutional.Encoder):
    """(B, 3, H, W) in [0, 1] -> latents."""

    block = MaskGITBlock

    def downsampling(self, channels: int) -> nn.Module:
        return nn.AvgPool2d(2)


class Decoder(convolutional.Decoder):
    """Latents -> (B, 3, H, W), about [0, 1]."""

    block, upsample = MaskGITBlock, "upsample_conv"

    def upsampling(self, channels: int) -> nn.Module:
        return UpsamplingConv(channels, channels, 3, padding=1)


@register_network("maskgit")
class MaskGITTokenizer(convolutional.ConvolutionalTokenizer):
    """MaskGIT's VQGAN around a quantiser."""

    name, family = "maskgit", "MaskGIT-VQGAN"
    parts = Encoder, Decoder

    def latents(self, pixels: Tensor) -> Tensor:
        return super().latents((pixels + 1) / 2)

    def render(self, latents: Tensor) -> Tensor:
        return 2 * super().render(latents) - 1

    def to_pixels_in_strips(self, codes: Tensor) -> Tensor:
        with self.exact():
            return 2 * decode_in_strips(nn.Identity(), self.decoder, self.quantize.lookup(codes)) - 1
