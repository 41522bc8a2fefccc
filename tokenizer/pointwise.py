"""Operations of tokenizers that a CPU computes alike for any number of threads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Elements that torch gives a thread at least, and a multiple of those that a loop over vectors takes at once.
GRAIN, VECTORS = 2**15, 64


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution; where `independent`, computed as the matrix product that it is (see `independent_of_threads`)."""

    independent = False

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True):
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.independent:
            return super().forward(x)
        # Convolutions and norms of channels-last maps round by the number of threads too.
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2).contiguous()


class GroupNorm(nn.GroupNorm):
    """A group norm; where `independent`, of maps with the channels apart (see `independent_of_threads`)."""

    independent = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous() if self.independent else x)


@contextmanager
def independent_of_threads(model: nn.Module) -> Iterator[None]:
    """Have a CPU's result be the same for any number of threads inside the block.

    Its kernels for 1x1 convolutions, and for norms of large channels-last maps, round by how many there are, and so a process
    of several would draw other pixels than one alone.
    """
    modules = [module for module in model.modules() if isinstance(module, PointwiseConv | GroupNorm)]
    for module in modules:
        module.independent = True
    try:
        yield
    finally:
        for module in modules:
            module.independent = False


def elementwise(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Apply an elementwise function to (B, C, H, W), on a CPU with the same bits for any number of threads.

    The end of a thread's share, which fills no vector, is rounded otherwise than vectors are: here shares are whole vectors, and
    what is left comes by itself. function: takes `out=` too. With gradients it is applied as it is.
    """
    strided = x if x.is_contiguous() else x.movedim(1, -1)
    if x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad) or not strided.is_contiguous():
        return function(x)
    out = torch.empty_like(x)
    source, target = strided.flatten(), (out if strided is x else out.movedim(1, -1)).flatten()
    whole = len(source)
    while rest := whole % (VECTORS * max(1, min(torch.get_num_threads(), -(-whole // GRAIN)))):
        whole -= rest
    function(source[:whole], out=target[:whole])
    function(source[whole:], out=target[whole:])
    return out
