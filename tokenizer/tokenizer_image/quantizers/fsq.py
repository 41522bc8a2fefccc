"""Finite scalar quantisation: each channel is rounded to one of a few levels, and there is no codebook to collapse.

    quantised, losses, codes = ScalarQuantizer([8, 8, 8, 5, 5, 5])(latents)

FSQ (arXiv 2309.15505, section 3.1); the bounds are those of Cosmos' tokenizers.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenizer.base import CodebookLosses, Quantizer, register_quantizer

# So much wider are the bounds that the outer levels are reached.
MARGIN = 1.001


@register_quantizer("fsq")
class ScalarQuantizer(Quantizer):
    """Levels a channel; the first channel counts fastest in a code. There are no losses.

    Raises ValueError for levels that are not two or more each.
    """

    def __init__(self, levels: Sequence[int] = (8, 8, 8, 6, 5)):
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"levels are whole numbers of 2 or more, one a channel, got {list(levels)}")
        self.levels = list(levels)
        self.codebook_size, self.width = math.prod(levels), len(levels)

    def _column(self, values: Sequence[float], like: Tensor) -> Tensor:
        dtype = torch.float32 if like.is_floating_point() else torch.int64
        return torch.tensor(values, dtype=dtype, device=like.device)[:, None, None]

    def _bounded(self, latents: Tensor) -> Tensor:
        """Return latents squashed between the outer levels, which are whole numbers around 0."""
        half = (self._column(self.levels, latents) - 1) * MARGIN / 2
        offset = self._column([0.0 if level % 2 else 0.5 for level in self.levels], latents)
        return torch.tanh(latents + torch.atanh(offset / half)) * half - offset

    def _codes(self, rounded: Tensor) -> Tensor:
        digits = rounded.long() + self._column([level // 2 for level in self.levels], rounded.long())
        return (digits * self._basis(digits)).sum(dim=1)

    def _basis(self, like: Tensor) -> Tensor:
        return self._column([math.prod(self.levels[:i]) for i in range(self.width)], like)

    def nearest(self, latents: Tensor) -> Tensor:
        return self._codes(self._bounded(latents).round())

    def lookup(self, codes: Tensor) -> Tensor:
        codes = codes.long()[:, None]
        levels = self._column(self.levels, codes)
        middle = levels // 2
        return (codes // self._basis(codes) % levels - middle) / middle

    def forward(self, latents: Tensor) -> tuple[Tensor, CodebookLosses, Tensor]:
        """Quantise with the gradient of what is rounded."""
        bounded = self._bounded(latents)
        rounded = bounded.round()
        codes = self._codes(rounded)
        quantised = bounded + (rounded - bounded).detach()
        middle = self._column([level // 2 for level in self.levels], latents)
        return quantised / middle, CodebookLosses({}, self.usage(codes)), codes
