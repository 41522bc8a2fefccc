"""Arithmetic of a training sample: the numerator of model FLOPs utilisation (MFU).

flops = training_flops_per_image(model)                  # per image, forward and backward
mfu = flops * images_per_second / (processes * peak_flops(device, "bf16"))

Model FLOPs, not hardware FLOPs: what the mathematics asks for, whatever is recomputed or skipped. The convention is
PaLM's (arXiv 2204.02311, appendix B): 6 FLOPs for each weight of a matrix product and each row it multiplies (2
forward, 4 backward; a frozen weight has no gradient and so 2 backward, and none where nothing before it is trained), and
12 * layers * dim * rows² for attention (4 of them forward), which counts the whole square of rows, also where a
causal mask leaves out half of it. Embedding look-ups, norms, activations and the optimizer are not counted; the output
head is.
"""

from collections.abc import Collection

import torch.nn as nn

from autoregressive.models.layouts import Layout
from autoregressive.models.trunk import Trunk


def training_flops_per_image(model: Trunk, layout: Layout | None = None) -> float:
    """Model FLOPs of one training sample, forward and backward.

    layout: what the sample is read by, where it is not the model's own (the patches of Next-Patch-Prediction).
    """
    layout, idle = layout or model.layout, idle_modules(model)
    rows = layout.fed(layout.tokens - layout.step_tokens)  # the last group, or patch, is predicted and never read
    apart: set[nn.Module] = {output for _, output in model.exits}
    flops = sum(cost(output, idle) for _, output in model.exits) * layout.units  # condition rows: the last one's logits
    for condition in model.conditions.values():
        apart |= {*condition.modules()}
        flops += matrices(condition, idle) * (condition.rows or layout.tokens)
    flops += matrices(model, idle, apart) * rows
    return flops + sum(4.0 if block in idle else 12.0 for block in model.layers) * model.args.dim * rows**2


def idle_modules(model: Trunk) -> set[nn.Module]:
    """Return the modules that no gradient passes through: all but the second exit, where that alone is trained."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not (trained and all(map(model.of_second_exit, trained))):
        return set()
    return {module for name, module in model.named_modules() if not model.of_second_exit(f"{name}.")}


def matrices(module: nn.Module, idle: Collection[nn.Module], apart: Collection[nn.Module] = ()) -> float:
    """Return the FLOPs of a row through a module's linear layers, but for those `apart`."""
    linear = {m for m in module.modules() if isinstance(m, nn.Linear)}
    return sum(cost(m, idle) for m in linear - {*apart})


def cost(layer: nn.Linear, idle: Collection[nn.Module]) -> float:
    """Return the FLOPs of a row through a linear layer, forward and backward, of an idle one forward alone."""
    passes = 2.0 if layer in idle else 6.0 if layer.weight.requires_grad else 4.0
    return passes * layer.weight.numel()
