"""Patches: a row reads the mean of a block of tokens and predicts all tokens of the next block (NPP, arXiv 2412.15321, section 3).

For training only: the model is the raster one, and decodes single tokens.
"""

import torch
from torch import Tensor

from autoregressive.models.layouts.base import Layout, register_layout


@register_layout("patches")
class PatchLayout(Layout):
    """Blocks of patch_side x patch_side tokens in raster order, the tokens of a block side by side.

    Raises ValueError where the patches do not fit the grid.
    """

    side: int = 1  # tokens a side of a patch

    def __post_init__(self) -> None:
        if not isinstance(self.side, int) or self.side < 1 or self.grid_size % self.side:
            raise ValueError(
                f"a grid of {self.grid_size}x{self.grid_size} tokens cannot be cut into patches of {self.side}x"
                f"{self.side}; choose an --image-size whose grid {self.patch_side} divides, or a lower --patch-level"
            )

    @property
    def patch_side(self) -> int:
        return self.side

    def places(self) -> Tensor:
        side, cells = self.side, self.rope_grid
        return torch.arange(self.tokens).view(cells, side, cells, side).transpose(1, 2).reshape(-1)


def with_patches(layout: Layout, patch_side: int) -> Layout:
    """Return the layout that a raster model trains by with patches of that side; the layout itself for a side of 1.

    Raises ValueError where the patches do not fit the grid, or the layout is another than raster.
    """
    if patch_side == 1:
        return layout
    if not layout.is_raster:
        raise ValueError(
            f"the layout {layout.name!r} and patches of {patch_side}x{patch_side} tokens both redefine what one step "
            "predicts, and the published systems train them apart; choose --ar-token-num 1 or --patch-level 1"
        )
    return PatchLayout(layout.grid_size, layout.prefix, patch_side)
