"""Arithmetic of a training sample: the numerator of model FLOPs utilisation (MFU).

flops = training_flops_per_image(model)                  # per image, forward and backward
mfu = flops * images_per_second / (processes * peak_flops(device, "bf16"))

Model FLOPs, not hardware FLOPs: what the mathematics asks for, whatever is recomputed or skipped. The convention is
PaLM's (arXiv 2204.02311, appendix B): 6 FLOPs for each weight of a matrix product and each row it multiplies (2
forward, 4 backward; a frozen weight has no gradient and so 2 backward), and 12 * layers * dim * rows² for attention, which counts the whole square of rows, also where a
causal mask leaves out half of it. Embedding look-ups, norms, activations and the optimizer are not counted; the output
head is.
"""

from collections.abc import Collection

import torch.nn as nn
from torch import Tensor

from autoregressive.models.layouts import Layout
from autoregressive.models.trunk import Trunk


def training_flops_per_image(model: Trunk, layout: Layout | None = None) -> float:
    """Model FLOPs of one training sample, forward and backward.

    layout: what the sample is read by, where it is not the model's own (the patches of Next-Patch-Prediction).
    """
    layout = layout or model.layout
    rows = layout.fed(layout.tokens - layout.step_tokens)  # the last group, or patch, is predicted and never read
    flops = cost(model.projection()[0]) * layout.units  # no logits of condition rows but the last
    apart: set[nn.Module] = {output for _, output in model.exits}
    for condition in model.conditions.values():
        apart |= {*condition.modules()}
        flops += matrices(condition) * (condition.rows or layout.tokens)
    flops += matrices(model, apart) * rows
    return flops + 12.0 * len(model.layers) * model.args.dim * rows**2


def matrices(module: nn.Module, apart: Collection[nn.Module] = ()) -> float:
    """Return the FLOPs of a row through a module's linear layers, but for those `apart`."""
    linear = {m for m in module.modules() if isinstance(m, nn.Linear)}
    return sum(cost(m.weight) for m in linear - {*apart})


def cost(weight: Tensor) -> float:
    """Return the FLOPs of a row's product with a weight, forward and backward."""
    return (6.0 if weight.requires_grad else 4.0) * weight.numel()
