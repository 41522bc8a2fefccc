"""The decode loop as one writes it first, to compare with: the same weights and the same sum of work, nothing made fast.

    tokens = plain_generate(model, labels, cfg_scale=4.0, top_k=2000)        # (B, N), raster order

Eager; every step attends over the whole cache behind a mask; both guidance streams to the end; top-k by torch.topk, the
draw by torch.multinomial. Class-conditional models of one token a step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.gpt import Transformer
from autoregressive.models.rope import apply_rope


@torch.inference_mode()
def plain_generate(
    model: Transformer, labels: Tensor, *, cfg_scale: float, top_k: int, steps: int | None = None
) -> Tensor:
    """Draw images token by token. labels: int64 (B,). steps: tokens to draw (default: an image's). Returns int64 (B, steps)."""
    args, layout = model.args, model.layout
    if not layout.is_raster or args.model_type != "c2i":
        raise ValueError("the plain loop draws class-conditional models, one token a step")
    weight = model.tok_embeddings.weight
    device, dtype, rows = weight.device, weight.dtype, layout.rows
    guided = cfg_scale > 1
    cond = torch.cat([labels, torch.full_like(labels, args.num_classes)]) if guided else labels
    head_dim = args.dim // args.n_head
    shape = (len(cond), args.n_kv_head, rows, head_dim)
    keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in model.layers]
    values = [torch.zeros(shape, device=device, dtype=dtype) for _ in model.layers]
    table, causal = model.rope(device), torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
    h = model.cls_embedding(cond).to(dtype)
    tokens = []
    for position in range(steps or layout.tokens):
        rope, mask = table[position : position + 1], causal[position][None, None, None]
        for i, layer in enumerate(model.layers):
            attention = layer.attention
            qkv = attention.wqkv(layer.attention_norm(h)).unflatten(-1, (-1, head_dim))
            q, k, v = qkv.split([args.n_head, args.n_kv_head, args.n_kv_head], dim=2)
            keys[i][:, :, position] = apply_rope(k, rope).transpose(1, 2)[:, :, 0]
            values[i][:, :, position] = v.transpose(1, 2)[:, :, 0]
            q = apply_rope(q, rope).transpose(1, 2)
            repeats = args.n_head // args.n_kv_head
            k, v = keys[i].repeat_interleave(repeats, dim=1), values[i].repeat_interleave(repeats, dim=1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            h = h + attention.wo(out.transpose(1, 2).flatten(2))
            h = h + layer.feed_forward(layer.ffn_norm(h))
        logits = model.output(model.norm(h))[:, -1].float()
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (conditional - unconditional) * cfg_scale
        smallest_kept = torch.topk(logits, min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
        token = torch.multinomial(logits.softmax(-1), 1)
        tokens.append(token)
        h = model.embed(torch.cat([token, token]) if guided else token)
    return torch.cat(tokens, dim=1)
