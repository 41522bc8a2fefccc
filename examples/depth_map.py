"""Your own condition: a map with a number for each token (depth, brightness, a sketch), added where the token is predicted.

    python3 autoregressive/train/train_c2i.py --import examples/depth_map.py --condition depth \\
        --condition-path depth=depth_maps --code-path codes
    python3 autoregressive/sample/sample_c2i.py --import examples/depth_map.py --condition-file depth=maps.npy …

`dataset.arrays.write_arrays("depth_maps", "depth", maps, of="codes")` writes the maps, float32 (tokens, 1) for each image.
"""

import torch.nn as nn
from torch import Tensor, zeros_like

from autoregressive.models.conditions import Condition, register_condition


@register_condition("depth")
class DepthMap(Condition):
    """Numbers (B, N, 1) in raster order; zeros mean "no map"."""

    def __init__(self, dim: int, grid_size: int):
        super().__init__()
        self.tokens = grid_size**2
        self.project = nn.Linear(1, dim, bias=False)

    def check(self, value: Tensor) -> None:
        if tuple(value.shape[1:]) != (self.tokens, 1):
            raise ValueError(f"depth maps have shape (B, {self.tokens}, 1), got {tuple(value.shape)}")

    def null(self, value: Tensor) -> Tensor:
        return zeros_like(value)

    def embed(self, value: Tensor) -> Tensor:
        return self.project(value.to(self.project.weight.dtype))
