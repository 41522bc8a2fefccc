"""An exponential moving average of a model's weights.

ema = EMA(model, decay=0.9999); ema.update(model); ema.module(x)
"""

import copy

import torch
import torch.nn as nn


class EMA:
    """`module` holds the averaged parameters and the latest buffers."""

    def __init__(self, model: nn.Module, decay: float = 0.9999):
        self.decay = decay
        self.module = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """average = decay * average + (1 - decay) * model, for every parameter."""
        averages, current = list(self.module.parameters()), [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(averages, current, 1 - self.decay)
        for average, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
