"""An exponential moving average of a model's weights, sharded as the weights are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, which shares its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def warmed_up(decay: float, step: int) -> float:
    """Return the decay at a step (from 0): small at first, so that the initial weights are soon forgotten.

    With (1 + step) / (10 + step) the average spans the last tenth or so of the steps; it reaches 0.9999 at step 89,990.
    """
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """`averages` has a tensor for every trained parameter of `model`, by name; what is frozen, and buffers, are the model's."""

    def __init__(self, model: nn.Module, decay: float = 0.9999):
        self.model, self.decay = model, decay
        self.averages = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        weights = [local(p.detach()) for p in self.model.parameters() if p.requires_grad]
        return [local(t) for t in self.averages.values()], weights

    @torch.no_grad()
    def update(self, decay: float | None = None) -> None:
        """Set average = decay * average + (1 - decay) * weight, for every parameter. decay: in place of the usual one."""
        averages, weights = self._pairs()
        torch._foreach_lerp_(averages, weights, 1 - (self.decay if decay is None else decay))

    @torch.no_grad()
    def restart(self) -> None:
        """Make the averages the model's present weights."""
        torch._foreach_copy_(*self._pairs())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages under the names of the model's state dict and in its order, with its buffers."""
        return {name: self.averages.get(name, tensor) for name, tensor in self.model.state_dict().items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the model for a while, and its own weights back afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, weight in zip(*self._pairs(), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
