"""The decode loop: from a condition to an image's tokens, over the steps of the model's layout.

    codes = generate(model, labels, 256, cfg_scale=2.0, top_k=2000)      # (B, 256), raster order

Caches are allocated once per model and used again by later calls. A token depends on its own row and its own noise;
`noise` makes a call reproducible (utils/rng.py draws it from a seed and an image's number).
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from autoregressive.models.gpt import Rows, Transformer
from autoregressive.models.kv_cache import StaticCache
from autoregressive.models.packed import packed, release
from autoregressive.models.sampling import SamplingConfig, choose, guide

_caches: WeakKeyDictionary[Transformer, StaticCache] = WeakKeyDictionary()


def cache_for(model: Transformer, batch: int, device: torch.device, dtype: torch.dtype) -> StaticCache:
    """The model's cache, made anew only where the last one is too small or of another kind."""
    cache = _caches.get(model)
    if cache is None or not cache.fits(batch, device, dtype):
        _caches.pop(model, None)  # free the old one before the new one is allocated
        args, rows = model.args, model.layout.rows
        cache = StaticCache(args.n_layer, batch, args.n_kv_head, rows, args.dim // args.n_head, device, dtype)
        _caches[model] = cache
    return cache


def release_cache(model: Transformer) -> None:
    """Gives the memory of the model's cache, and of its laid-out weights, back."""
    _caches.pop(model, None)
    release(model)


@contextmanager
def sampling_mode(model: Transformer) -> Iterator[None]:
    """Puts the model in eval mode for the block; on a CPU its linear layers use laid-out weights (models/packed.py)."""
    was_training = model.training
    model.eval()
    try:
        with packed(model):
            yield
    finally:
        model.train(was_training)


def decode_rows(model: Transformer, tokens: Tensor, special: int, rows: Rows, mask: Tensor | None) -> Tensor:
    """One decode step: tokens (R, s), then `special` special tokens, to logits (R, s + special, V)."""
    return model.head(model.decode(model.embed(tokens, special), rows, mask, causal=False))


def can_compile(device: torch.device) -> bool:
    """Whether the decode step can be compiled for a device: a GPU of CUDA, or a CPU beside a C++ compiler."""
    if device.type == "cpu":
        return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None
    return device.type == "cuda"


@cache
def compiled_decode_rows(on_cpu: bool) -> Callable[[Transformer, Tensor, int, Rows, Tensor | None], Tensor]:
    """The compiled decode step. Made when needed, since the compiler takes long to import.

    A step is compiled for a number of samples and of rows: with these open its loops are several times slower on a CPU.
    There one serves every length; elsewhere steps are CUDA graphs, one for each length (read_stride).
    """
    import torch._dynamo.config as config

    config.recompile_limit = max(config.recompile_limit, 64)
    if not on_cpu:
        return torch.compile(decode_rows, dynamic=False, mode="reduce-overhead")
    compiled = torch.compile(decode_rows_up_to, dynamic=False)

    def decode(model: Transformer, tokens: Tensor, special: int, rows: Rows, mask: Tensor | None) -> Tensor:
        up_to = torch.empty(rows.length, 0)  # a size that may change; a plain number would be compiled in
        torch._dynamo.mark_dynamic(up_to, 0)
        if mask is not None:
            torch._dynamo.mark_dynamic(mask, 3)
        return compiled(model, tokens, special, rows.cache, rows.positions, up_to, mask)

    return decode


def decode_rows_up_to(
    model: Transformer,
    tokens: Tensor,
    special: int,
    cache: StaticCache,
    positions: Tensor,
    up_to: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """decode_rows, with as many rows to attend to as `up_to` has."""
    return decode_rows(model, tokens, special, Rows(cache, positions, up_to.shape[0]), mask)


def read_stride(device: torch.device, dtype: torch.dtype, compile: bool) -> int:
    """Steps read the cache up to a multiple of so many rows, behind a mask: each length has a cost of its own.

    That of a compiled step on an accelerator is a CUDA graph. On a CPU in half precision it is a kernel that oneDNN makes
    for the shape; its compiled step has one loop for all.
    """
    if device.type != "cpu":
        return 128 if compile else 1
    return 1 if compile or dtype == torch.float32 else 32


@torch.inference_mode()
def generate(
    model: Transformer,
    cond: Tensor,
    max_new_tokens: int | None = None,
    emb_masks: Tensor | None = None,
    cfg_scale: float = 1.0,
    cfg_interval: float = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    sample_logits: bool = True,
    *,
    noise: Tensor | None = None,
    compile: bool = False,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draws an image's tokens for each condition.

    cond: int64 (B,) labels, or (B, T, caption_dim) caption features. emb_masks: (B, T), which caption rows are real.
    max_new_tokens: all of an image's N tokens (the default); in raster order also fewer.
    cfg_scale … sample_logits: see SamplingConfig.
    noise: float32 (B, N) in [0, 1), one number per token of the layout's order; drawn from torch's global
    generator where not given.
    compile: run the steps through torch.compile; pays off on a GPU, and on a CPU after some images.
    on_step: called after each step with the number of tokens done and the tokens, int64 (B, N) in the layout's order, of
    which those after that number are not drawn yet. Later steps write into the same tensor.

    Returns: int64 (B, max_new_tokens) in raster order.
    Raises ValueError for settings out of range (SamplingConfig), a label that the model does not have, or a
    max_new_tokens that the layout cannot stop at.
    """
    config = SamplingConfig(cfg_scale, cfg_interval, temperature, top_k, top_p, sample_logits)
    layout, device = model.layout, model.tok_embeddings.weight.device
    total = layout.tokens if max_new_tokens is None else max_new_tokens
    if total != layout.tokens and (layout.group_size > 1 or not 0 < total < layout.tokens):
        raise ValueError(f"max_new_tokens is {total}; the model's images have {layout.tokens} tokens")
    check_labels(model, cond)
    cond = cond.to(device)
    batch = len(cond)
    if noise is None:
        noise = torch.rand(batch, layout.tokens, device=device)
    noise = noise.to(device)

    dtype = model.tok_embeddings.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    with sampling_mode(model):
        steps = [step for step in layout.steps if step.outputs.start < total]
        guided_steps = [i for i, step in enumerate(steps) if config.guides(step.number)]
        last_guided = guided_steps[-1] if guided_steps else -1
        if config.guided:
            cond = torch.cat([cond, model.cls_embedding.null(cond)])
            emb_masks = None if emb_masks is None else torch.cat([emb_masks, emb_masks])
        cache = cache_for(model, len(cond), device, dtype)
        seen = torch.ones(len(cond), layout.rows, dtype=torch.bool, device=device)
        if emb_masks is not None:
            seen[:, : layout.prefix] = emb_masks.to(device, torch.bool)

        graphs = compile and device.type == "cuda"
        if graphs:
            cache.keep_addresses()
        decode = compiled_decode_rows(device.type == "cpu") if compile else decode_rows
        places, stride = torch.arange(layout.rows, device=device), read_stride(device, dtype, compile)
        logits = prefill(model, cond, cache, emb_masks)  # (R, 1, V)
        tokens = torch.zeros(batch, layout.tokens, dtype=torch.long, device=device)
        tokens[:, :1] = pick(logits, batch, config, config.guided, noise[:, :1])
        if on_step:
            on_step(1, tokens)
        for i, step in enumerate(steps):
            copies = 2 if i <= last_guided else 1  # no later step is guided: the unconditional rows are done
            inputs = tokens[:, step.inputs].repeat(copies, 1)
            positions = torch.arange(step.rows.start, step.rows.stop, device=device)
            length = min(-(-step.rows.stop // stride) * stride, layout.rows)
            mask = None
            if emb_masks is not None or length > step.rows.stop:
                mask = (seen & (places < step.rows.stop))[: len(inputs), None, None, :length]
            if graphs:
                torch.compiler.cudagraph_mark_step_begin()  # the last step's logits are read
            logits = decode(model, inputs, step.special, Rows(cache, positions, length), mask)
            guided = config.guides(step.number)
            tokens[:, step.outputs] = pick(logits, batch, config, guided, noise[:, step.outputs])
            if on_step:
                on_step(step.outputs.stop, tokens)
    if total < layout.tokens:
        return tokens[:, :total]
    return tokens[:, layout.raster.to(device)]


def prefill(model: Transformer, cond: Tensor, cache: StaticCache, emb_masks: Tensor | None) -> Tensor:
    """Runs the condition rows into the cache. Returns the logits of the first token, float32 (R, 1, V)."""
    h = model.cls_embedding(cond).to(model.tok_embeddings.weight.dtype)
    rows = h.shape[1]
    mask = None if emb_masks is None else model.attention_mask(rows, emb_masks, h.device)
    positions = torch.arange(rows, device=h.device)
    return model.head(model.decode(h, Rows(cache, positions, rows), mask, causal=mask is None)[:, -1:])


def pick(logits: Tensor, batch: int, config: SamplingConfig, guided: bool, noise: Tensor) -> Tensor:
    """Mixes the conditional rows (the first `batch`) with the unconditional ones where guided, and draws. (R, s, V) -> (B, s)."""
    conditional = logits[:batch]
    if guided:
        conditional = guide(conditional, logits[batch : 2 * batch], config.cfg_scale)
    return choose(conditional, config, noise)


def check_labels(model: Transformer, cond: Tensor) -> None:
    """Raises ValueError for a condition of the wrong kind, or for a label outside 0 … num_classes - 1."""
    args = model.args
    if args.model_type == "c2i":
        if cond.dim() != 1 or cond.is_floating_point():
            raise ValueError(f"labels are whole numbers of shape (B,), got {cond.dtype} of shape {tuple(cond.shape)}")
        labels = cond.long()  # a narrow type may not reach the number of classes
        outside = labels[(labels < 0) | (labels >= args.num_classes)]
        if len(outside):
            raise ValueError(
                f"label {int(outside[0])} is out of range: the model has classes 0 to {args.num_classes - 1}"
            )
    elif tuple(cond.shape[1:]) != (args.cls_token_num, args.caption_dim):
        expected = f"(B, {args.cls_token_num}, {args.caption_dim})"
        raise ValueError(f"caption features have shape {expected}, got {tuple(cond.shape)}")
