"""Discriminators of the tokenizer's adversarial loss.

logits = PatchGANDiscriminator()(images)  # (B, 3, H, W) in [-1, 1] -> (B, 1, H', W')
logits = StyleGANDiscriminator(image_size=256)(images)  # (B, 3, 256, 256) -> (B, 1)
logits = BlurDiscriminator()(images)  # (B, 3, H, W) -> (B, 1, H/8, W/8)
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Channels at each resolution.
STYLEGAN_CHANNELS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}


class PatchGANDiscriminator(nn.Module):
    """Scores overlapping patches (pix2pix, arXiv 1611.07004, section 3.2.2; VQGAN, arXiv 2012.09841).

    Three stride-2 4x4 convolutions of `ndf`, 2*ndf and 4*ndf channels, one of 8*ndf with stride 1, and one to a single
    channel; BatchNorm on all but the first and the last. A patch is 70x70 pixels.
    Weights start at N(0, 0.02).
    """

    def __init__(self, ndf: int = 64):
        super().__init__()
        layers = [nn.Conv2d(3, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        channels = ndf
        for stride in (2, 2, 1):
            previous, channels = channels, 2 * channels
            layers += [
                nn.Conv2d(previous, channels, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers.append(nn.Conv2d(channels, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Score images (B, 3, H, W), H and W at least 24 -> logits (B, 1, H/8 - 2, W/8 - 2)."""
        return self.main(x)


class Blur(nn.Module):
    """Normalised [1, 2, 1] binomial filter in both directions, reflected at the borders: same shape out."""

    def __init__(self):
        super().__init__()
        self.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.outer(self.f, self.f)
        kernel = (kernel / kernel.sum()).to(x.dtype).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=x.shape[1])


class DiscriminatorBlock(nn.Module):
    """Residual block that halves the resolution: (B, Cin, H, W) -> (B, Cout, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv_res = nn.Conv2d(in_channels, out_channels, 1, stride=2)
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
        )
        self.downsample = nn.Sequential(Blur(), nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        # 1/sqrt(2) keeps the variance of the sum of the two branches.
        return (self.downsample(self.net(x)) + self.conv_res(x)) * (1 / math.sqrt(2))


class StyleGANDiscriminator(nn.Module):
    """One logit per image, residual blocks down to 4x4 (StyleGAN2, arXiv 1912.04958, section 4.1).

    Raises ValueError if `image_size` is not a power of two from 8 to 1024.
    """

    def __init__(self, image_size: int = 256):
        super().__init__()
        if image_size not in STYLEGAN_CHANNELS or image_size < 8:
            sizes = [size for size in STYLEGAN_CHANNELS if size >= 8]
            raise ValueError(f"the StyleGAN discriminator takes an image size of {sizes}, not {image_size}")
        self.image_size = image_size
        channels, size = STYLEGAN_CHANNELS[image_size], image_size
        blocks = [nn.Conv2d(3, channels, 3, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        while size > 4:
            size //= 2
            blocks.append(DiscriminatorBlock(channels, STYLEGAN_CHANNELS[size]))
            channels = STYLEGAN_CHANNELS[size]
        self.blocks = nn.ModuleList(blocks)
        self.final_conv = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(0.2, inplace=True))
        self.final_linear = nn.Sequential(
            nn.Linear(channels * size * size, channels), nn.LeakyReLU(0.2, inplace=True), nn.Linear(channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Score images (B, 3, image_size, image_size) -> logits (B, 1). Raises ValueError for another size."""
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"this StyleGAN discriminator was built for images of {self.image_size}x{self.image_size}, "
                f"not {x.shape[-2]}x{x.shape[-1]}"
            )
        for block in self.blocks:
            x = block(x)
        x = self.final_conv(x)  # (B, C, 4, 4)
        return self.final_linear(x.flatten(1))


class BlurPool(nn.Module):
    """Normalised [1, 3, 3, 1] filter at stride 2, padded with zeros: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2))."""

    def __init__(self):
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(line, line)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        padded = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2))
        kernel = self.kernel.to(x.dtype).expand(channels, 1, 4, 4)
        return F.conv2d(padded, kernel, stride=2, groups=channels)


class BlurDiscriminator(nn.Module):
    """Scores patches through three blurred halvings (Open-MAGVIT2, arXiv 2409.04410): `ndf`, 2*ndf and 4*ndf channels."""

    def __init__(self, ndf: int = 128):
        super().__init__()
        widths = [ndf, ndf, 2 * ndf, 4 * ndf]
        self.block_in = nn.Sequential(nn.Conv2d(3, ndf, 5, padding=2), nn.LeakyReLU(0.1))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1), BlurPool(), nn.GroupNorm(32, after), nn.LeakyReLU(0.1)
            )
            for before, after in pairwise(widths)
        )
        self.to_logits = nn.Sequential(
            nn.Conv2d(4 * ndf, 4 * ndf, 1), nn.LeakyReLU(0.1), nn.Conv2d(4 * ndf, 1, 5, padding=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Score images (B, 3, H, W) -> logits (B, 1, H/8, W/8), rounded up."""
        h = self.block_in(x)
        for block in self.blocks:
            h = block(h)
        return self.to_logits(h)
