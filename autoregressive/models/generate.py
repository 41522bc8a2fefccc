"""The decode loop: from a condition to an image's tokens, over the steps of the model's layout.

    codes = generate(model, labels, 256, cfg_scale=2.0, top_k=2000)      # (B, 256), raster order

Caches are allocated once per model and used again by later calls. A token depends on its own row and its own noise;
`noise` makes a call reproducible (utils/rng.py draws it from a seed and an image's number).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from autoregressive.models import decode_step
from autoregressive.models.decode_step import DecodeState, StepGraphs
from autoregressive.models.gpt import Rows, Transformer
from autoregressive.models.kv_cache import StaticCache
from autoregressive.models.layout import TokenLayout
from autoregressive.models.packed import packed, release
from autoregressive.models.sampling import NotFiniteLogits, SamplingConfig

_caches: WeakKeyDictionary[Transformer, StaticCache] = WeakKeyDictionary()
_graphs: WeakKeyDictionary[Transformer, StepGraphs] = WeakKeyDictionary()


def cache_for(model: Transformer, batch: int, device: torch.device, dtype: torch.dtype) -> StaticCache:
    """The model's cache, made anew only where the last one is too small or of another kind."""
    cache = _caches.get(model)
    if cache is None or not cache.fits(batch, device, dtype):
        _graphs.pop(model, None)
        _caches.pop(model, None)  # free the old one before the new one is allocated
        args, rows = model.args, decode_step.cache_rows(model.layout, device)
        width = decode_step.cache_width(args.dim // args.n_head, device)
        cache = StaticCache(args.n_layer, batch, args.kv_heads, rows, width, device, dtype)
        _caches[model] = cache
    return cache


def graphs_for(model: Transformer, cache: StaticCache, batch: int) -> StepGraphs:
    """The model's recorded steps, begun anew where those that are there are for another cache, batch or other weights."""
    graphs = _graphs.get(model)
    if graphs is None or not graphs.serve(model, cache, batch):
        _graphs.pop(model, None)  # free the old ones before new ones are recorded
        graphs = _graphs[model] = StepGraphs(model, cache, batch)
    return graphs


def release_cache(model: Transformer) -> None:
    """Gives the memory of the model's cache, its recorded steps and its laid-out weights back."""
    _graphs.pop(model, None)
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
    max_new_tokens that the layout cannot stop at; NotFiniteLogits where images were drawn from logits that are not finite.
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
        if config.guided:
            cond = torch.cat([cond, model.cls_embedding.null(cond)])
            emb_masks = None if emb_masks is None else torch.cat([emb_masks, emb_masks])
        cache = cache_for(model, len(cond), device, dtype)
        recorded = compile and decode_step.records(device) and not torch.is_autocast_enabled(device.type)
        graphs = graphs_for(model, cache, batch) if recorded else None
        state = graphs.state if graphs else DecodeState(layout, cache, batch)
        state.begin(config, noise, emb_masks)

        decode = decode_step.compiled_decode_rows() if compile else decode_step.decode_rows
        stride = decode_step.read_stride(device, dtype, compile)
        side_by_side = stride > 1 and not compile
        steps = [step for step in layout.steps if step.outputs.start < total]
        kinds = decode_step.kinds_of(steps, config, stride, cache.rows - 1, padded=emb_masks is not None)
        places = torch.tensor([(s.rows.start, s.inputs.start, s.outputs.start) for s in steps]).to(device)

        with cleared_after_errors(cache), decode_step.attention_kernels(device, compile):
            cache.lay_out(kinds[0].length if side_by_side and kinds else cache.rows)
            logits = prefill(model, cond, cache, emb_masks)  # (R, 1, V)
            decode_step.draw_tokens(logits, state, config.guided, state.count[:1])
            if on_step:
                on_step(1, state.tokens)
            for step, kind, place in zip(steps, kinds, places, strict=True):
                if side_by_side:
                    cache.lay_out(kind.length)
                state.at.copy_(place)
                work = partial(decode_step.take_step, model, state, kind, decode)
                if graphs:
                    graphs.run(kind, work)
                else:
                    work()
                if on_step:
                    on_step(step.outputs.stop, state.tokens)
            whole = total == layout.tokens
            tokens = state.tokens[:, layout.raster.to(device)] if whole else state.tokens[:, :total].clone()
            finite = state.spread.isfinite()
            if not finite.all():  # the one place that waits for the device
                raise NotFiniteLogits(broken_steps(finite.tolist(), layout), tokens, dtype)
    return tokens


@contextmanager
def cleared_after_errors(cache: StaticCache) -> Iterator[None]:
    """Clears the cache where the block raises: a NaN in it would reach later images even through masked rows."""
    try:
        yield
    except BaseException:
        cache.clear()
        raise


def broken_steps(finite: list[list[bool]], layout: TokenLayout) -> list[int | None]:
    """By image, the first decode step (from 1) with a token that is not of finite logits; None for none."""
    step_of = [1] * layout.tokens
    for number, step in enumerate(layout.steps, start=2):
        step_of[step.outputs] = [number] * (step.outputs.stop - step.outputs.start)
    return [step_of[row.index(False)] if False in row else None for row in finite]


def prefill(model: Transformer, cond: Tensor, cache: StaticCache, emb_masks: Tensor | None) -> Tensor:
    """Runs the condition rows into the cache. Returns the logits of the first token, float32 (R, 1, V)."""
    h = model.cls_embedding(cond).to(model.tok_embeddings.weight.dtype)
    rows = h.shape[1]
    mask = None if emb_masks is None else model.attention_mask(rows, emb_masks, h.device)
    positions = torch.arange(rows, device=h.device)
    return model.head(model.decode(h, Rows(cache, positions, rows), mask, causal=mask is None)[:, -1:])


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
