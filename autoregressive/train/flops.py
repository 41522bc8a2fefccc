"""Arithmetic of a training sample: the numerator of model FLOPs utilisation (MFU).

flops = training_flops_per_image(model.args)             # per image, forward and backward
mfu = flops * images_per_second / (processes * peak_flops(device, "bf16"))

Model FLOPs, not hardware FLOPs: what the mathematics asks for, whatever is recomputed or skipped. The convention is
PaLM's (arXiv 2204.02311, appendix B): 6 FLOPs for each weight of a matrix product and each row it multiplies (2
forward, 4 backward), and 12 * layers * dim * rows² for attention, which counts the whole square of rows, also where a
causal mask leaves out half of it. Embedding look-ups, norms, activations and the optimizer are not counted; the output
head is.
"""

from math import isqrt

from autoregressive.models.gpt import ModelArgs
from autoregressive.models.layouts import Layout, build_layout


def training_flops_per_image(args: ModelArgs, layout: Layout | None = None) -> float:
    """Model FLOPs of one training sample, forward and backward.

    layout: what the sample is read by, where it is not the model's own (the patches of Next-Patch-Prediction).
    """
    layout = layout or build_layout(args.layout_config, isqrt(args.block_size), args.cls_token_num)
    rows = layout.fed(layout.tokens - layout.step_tokens)  # the last group, or patch, is predicted and never read
    head_dim = args.dim // args.n_head
    attention = args.dim * (args.n_head + 2 * args.n_kv_head) * head_dim + args.dim**2
    products = args.blocks * (attention + 3 * args.dim * args.ffn_dim) * rows
    products += (
        layout.heads * args.vocab_size * args.dim * layout.rope_grid**2
    )  # no logits of condition rows but the last
    if args.model_type == "t2i":
        products += (args.caption_dim * args.dim + args.dim**2) * layout.prefix
    return 6.0 * products + 12.0 * args.blocks * args.dim * rows**2
