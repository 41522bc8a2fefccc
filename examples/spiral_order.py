"""Your own token order: a spiral from the upper left corner to the middle.

    python3 autoregressive/train/train_c2i.py --import examples/spiral_order.py --layout spiral --code-path codes
    python3 autoregressive/sample/sample_c2i.py --import examples/spiral_order.py --gpt-ckpt results --vq-ckpt vq.pt

The model's file records that its layout is the spiral; without --import it is refused.
"""

from torch import Tensor, arange, cat

from autoregressive.models.layouts import Layout, register_layout


@register_layout("spiral")
class SpiralLayout(Layout):
    """Single tokens from the border inwards, clockwise."""

    def places(self) -> Tensor:
        grid, rings = arange(self.tokens).view(self.grid_size, -1), []
        while grid.numel():
            rings.append(grid[0])
            grid = grid[1:].rot90()
        return cat(rings)
