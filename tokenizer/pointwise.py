"""The 1x1 convolution of tokenizers, which a CPU can compute alike for any number of threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution; with `as_product` computed as the matrix product that it is (see `independent_of_threads`)."""

    as_product = False

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.as_product:
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


@contextmanager
def independent_of_threads(model: nn.Module) -> Iterator[None]:
    """Have a CPU's result be the same for any number of threads inside the block.

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
