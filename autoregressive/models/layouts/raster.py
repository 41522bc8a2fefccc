"""Raster order: one token at a time, row by row (LlamaGen, arXiv 2406.06525, section 2.2)."""

import torch
from torch import Tensor

from autoregressive.models.layouts.base import Layout, register_layout


@register_layout("raster")
class RasterLayout(Layout):
    """Single tokens in raster order."""

    def places(self) -> Tensor:
        return torch.arange(self.tokens)
