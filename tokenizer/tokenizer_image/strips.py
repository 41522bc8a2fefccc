"""Decoding where memory is short: feature maps stay on the host and pass the device in strips of a few rows.

    images = decode_in_strips(post_quant_conv, decoder, latents)     # decoder(post_quant_conv(latents)) to rounding, on the CPU

The strips of a convolution overlap by what it reads beyond its own rows, and group norms take their statistics from all
strips, so that the pixels are those of the whole image: not blended tiles, whose norms would see a part each. The device
holds the weights, some strips and, for attention, the maps of the deepest level; in turn each map crosses the bus.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from tokenizer.tokenizer_image.blocks import AttnBlock, ResnetBlock, swish
from utils.precision import full_float32

# Numbers of a feature map that a strip has, where a single row has no more than that.
STRIP = 2**22


class Decoder(Protocol):
    """Decoder whose modules are known in their order. One that reads the latents too has `in_strips(run, map, latents)`."""

    conv_in: nn.Conv2d
    norm_out: nn.GroupNorm
    conv_out: nn.Conv2d

    def path(self) -> Iterator[nn.Module]: ...


@full_float32()
@torch.inference_mode()
def decode_in_strips(first: nn.Module, decoder: Decoder, latents: Tensor, numbers: int = STRIP) -> Tensor:
    """Decode latents (B, width, h, w) to images (B, 3, h*f, w*f) on the CPU, in the decoder's dtype.

    numbers: of a feature map, at once on the model's device.
    """
    run, latents = Strips(decoder.conv_in.weight.device, numbers), latents.to(decoder.conv_in.weight)
    h = run.whole(first, latents)
    for module in decoder.path():
        h = module.in_strips(run, h, latents) if hasattr(module, "in_strips") else run.through(module, h)
    norm = run.norm(decoder.norm_out, h)
    return run(lambda x: decoder.conv_out(swish(norm(x))), h)


class Strips:
    """A runner of functions that read one row beyond their own, over maps (B, C, H, W) on the host."""

    def __init__(self, device: torch.device, numbers: int):
        self.device, self.numbers = device, numbers

    def rows(self, *maps: Tensor) -> int:
        """Return the rows of a strip."""
        return max(1, self.numbers // max(x[:, :, 0].numel() for x in maps))

    def __call__(self, function: Callable[..., Tensor], *maps: Tensor, scale: int = 1) -> Tensor:
        """Return function(*maps), whose output has `scale` rows for each row of the maps and reads one row on either side."""
        height, rows = maps[0].shape[2], self.rows(*maps)
        parts = []
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            before, after = min(start, 1), min(height - stop, 1)  # at the map's own edges the function pads
            part = function(*(x[:, :, start - before : stop + after].to(self.device) for x in maps))
            parts.append(part[:, :, scale * before : part.shape[2] - scale * after].cpu())
        return torch.cat(parts, dim=2)

    def whole(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return function(x), all rows at once."""
        return function(x.to(self.device)).cpu()

    def through(self, block: nn.Module, x: Tensor) -> Tensor:
        """Run a module of the decoder's path on a map."""
        if isinstance(block, AttnBlock):
            return self.whole(block, x)
        if not isinstance(block, ResnetBlock):  # a 3x3 convolution
            return self(block, x, scale=getattr(block, "scale", 1))
        norm1 = self.norm(block.norm1, x)
        h = self(lambda x: block.conv1(swish(norm1(x))), x)
        norm2 = self.norm(block.norm2, h)
        return self(lambda h, x: block.join(block.conv2(swish(norm2(h))), x), h, x)

    def norm(self, norm: nn.GroupNorm, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the group norm of a map as a function of a strip of it, with the statistics of the whole map."""
        count, mean, squares = 0, torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for part in x.split(self.rows(x), dim=2):  # the strips' statistics put together (Chan et al., 1979)
            numbers = part.to(self.device).float().unflatten(1, (norm.num_groups, -1)).flatten(2)  # (B, G, n)
            variance, own = torch.var_mean(numbers, dim=2, correction=0)
            n, difference = numbers.shape[2], own - mean
            mean = mean + difference * (n / (count + n))
            squares = squares + variance * n + difference**2 * (count * n / (count + n))
            count += n
        deviation = torch.sqrt(squares / count + norm.eps)
        mean, deviation = (y.repeat_interleave(x.shape[1] // norm.num_groups, 1) for y in (mean, deviation))  # (B, C)
        weight, bias = (norm.weight.float(), norm.bias.float()) if norm.affine else (1, torch.zeros_like(mean[0]))
        scale = (weight / deviation)[:, :, None, None]
        shift = bias[:, None, None] - mean[:, :, None, None] * scale

        def apply(strip: Tensor) -> Tensor:
            return (strip.float() * scale + shift).to(strip.dtype)

        return apply
