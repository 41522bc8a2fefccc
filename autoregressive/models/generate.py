"""The decode loop: from a condition to an image's tokens, over the steps of the model's layout.

    codes = generate(model, labels, 256, cfg_scale=2.0, top_k=2000)      # (B, 256), raster order
    codes = generate(model, labels, noise=keys, window=16)               # the same tokens in fewer passes

Caches are allocated once per model and used again by later calls. A token depends on its own row and its own noise;
`noise` makes a call reproducible (utils/rng.py draws it from a seed and an image's number).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from autoregressive.models import compiled, decode_step
from autoregressive.models.decode_step import DecodeState, Drafter, as_drafted, prefill
from autoregressive.models.drafts import ModelDrafts, check_draft_model
from autoregressive.models.kv_cache import StaticCache
from autoregressive.models.layouts import Layout
from autoregressive.models.machine import machine
from autoregressive.models.on_cpu import packed, release
from autoregressive.models.on_cuda import StepGraphs
from autoregressive.models.plans import plan_for, with_window
from autoregressive.models.sampling import NOISE, NotFiniteLogits, SamplingConfig, draw_race
from autoregressive.models.trunk import Conditions, Trunk

_caches: WeakKeyDictionary[Trunk, StaticCache] = WeakKeyDictionary()
_graphs: WeakKeyDictionary[Trunk, StepGraphs] = WeakKeyDictionary()


def cache_for(model: Trunk, batch: int, device: torch.device, dtype: torch.dtype) -> StaticCache:
    """The model's cache, made anew only where the last one is too small or of another kind."""
    cache = _caches.get(model)
    if cache is None or not cache.fits(batch, device, dtype):
        _graphs.pop(model, None)
        _caches.pop(model, None)  # free the old one before the new one is allocated
        args, here = model.args, machine(device)
        # One row to spare for what is past an image's end, which compiled passes never read: the compiler takes the whole
        # cache for a fixed length.
        rows = 1 + here.cache_rows(model.layout.cache_rows)
        width = here.cache_width(args.dim // args.n_head)
        cache = StaticCache(len(model.layers), batch, args.kv_heads, rows, width, device, dtype)
        _caches[model] = cache
    return cache


def graphs_for(model: Trunk, layout: Layout, cache: StaticCache, batch: int) -> StepGraphs:
    """The model's recorded steps, begun anew where those that are there are for another layout, cache, batch or other weights."""
    graphs = _graphs.get(model)
    if graphs is None or not graphs.serve(model, layout, cache, batch):
        _graphs.pop(model, None)  # free the old ones before new ones are recorded
        graphs = _graphs[model] = StepGraphs(model, DecodeState(model, layout, cache, batch))
    return graphs


def release_cache(model: Trunk) -> None:
    """Gives the memory of the model's cache, its recorded steps and its laid-out weights back."""
    _graphs.pop(model, None)
    _caches.pop(model, None)
    release(model)


@contextmanager
def sampling_mode(model: Trunk) -> Iterator[None]:
    """Puts the model in eval mode for the block; on a CPU its linear layers use laid-out weights (on_cpu.py)."""
    was_training = model.training
    model.eval()
    try:
        with packed(model):
            yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def generate(
    model: Trunk,
    cond: Conditions,
    max_new_tokens: int | None = None,
    emb_masks: Tensor | None = None,
    *sampling: Any,
    negative: Conditions | None = None,
    negative_masks: Tensor | None = None,
    known: Tensor | None = None,
    orders: Tensor | None = None,
    groups: Sequence[int] | int | None = None,
    noise: Tensor | None = None,
    window: int | str = 0,
    drafter: Drafter | None = None,
    draft_model: Trunk | None = None,
    compile: bool = False,
    on_step: Callable[[int, Tensor], None] | None = None,
    log_probs: Tensor | None = None,
    **settings: Any,
) -> Tensor:
    """Draw an image's tokens for each condition.

    Args:
        cond: values of the model's conditions by name, or of the first one: int64 (B,) labels, or (B, T, caption_dim)
            caption features.
        max_new_tokens: tokens to draw, of the first places of the layout's order; a decode step has to end there.
            All of an image's N tokens by default.
        emb_masks: (B, T), which caption rows are real.
        sampling, settings: the fields of SamplingConfig in their order or by name (cfg_scale, …, draw).
        negative: conditions of the same shapes that guidance leads away from, in place of "no condition"; a label may be
            num_classes, "no class". Without guidance they change nothing.
        negative_masks: (B, T), which rows of a negative caption are real (default: emb_masks).
        known: int64 (B, N) in raster order, tokens that are given and not drawn; -1 for those to draw.
        orders: int64 (B, N), the raster index at each sequence position of each image, where these are not the layout's order;
            of a model that was trained in several orders.
        groups: tokens that each decode step draws, sum N, or how many steps; for layouts whose groups are free.
        noise: (B, N), a number per token of the layout's order: int64 keys, or float32 in [0, 1) where the setting `draw` is
            "cdf" (utils/rng.py:image_noise). Drawn from torch's global generator where not given.
        window: tokens that a pass computes, the later ones from drafts; 0 for one decode step a pass. "auto" chooses by device
            and batch. On a CPU the tokens are the same for every window (exact parallel decoding, docs/sampling.md); an
            accelerator's kernels round by the number of rows.
        drafter: proposes drafts, which decide the number of passes alone. By default the window's last row draws them.
        draft_model: a smaller model of the same codes, layout and conditions, whose draws are the drafts of windows.
        compile: run the steps through torch.compile; pays off on a GPU, and on a CPU after some images.
        on_step: called after each pass with the number of tokens done in every image and the tokens, int64 (B, N) in the
            layout's order or in `orders`, of which those after that number may be drafts. Later passes write into the same tensor.
        log_probs: float32 (B, N), filled with that of each token in the distribution it was drawn from, guided and before top-k and
            top-p, in the layout's order or in `orders`.

    Returns:
        int64 (B, max_new_tokens), the tokens drawn, in raster order.

    Raises:
        ValueError: for settings out of range, conditions, orders, known tokens or noise that do not fit the model and each
            other, a max_new_tokens at which no decode step ends, groups or a window that the layout cannot have, or a draft
            model of other codes.
        NotFiniteLogits: where images were drawn from logits that are not finite.
    """
    config = SamplingConfig(*sampling, **settings)
    device, dtype, tokens = model.tok_embeddings.weight.device, model.tok_embeddings.weight.dtype, model.layout.tokens
    if autocast := torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    model.check_conditions(cond, negative)
    if draft_model is not None:
        check_draft_model(draft_model, model)
    batch = len(next(iter(model.by_name(cond).values())))
    if known is not None:
        check_known(known, batch, model)
        known = known.to(device)
    given = None if orders is None else model.as_orders(orders, batch)
    layout = model.layout.adapted(config.steps, config.repulsion, known_first(known, orders))
    layout = layout if groups is None else layout.with_groups(groups)
    total = tokens if max_new_tokens is None else max_new_tokens
    ends = [step.outputs.stop for step in layout.passes]
    if total not in ends:
        raise ValueError(
            f"max_new_tokens is {total}; the images have {tokens} tokens, and no decode step of the layout "
            f"{layout.name!r} ends after {total}"
        )
    if orders is None and (layout.own_orders or config.order == "random"):
        seeds, own = torch.randint(2**63 - 1, (batch,)).tolist(), [None] * batch if known is None else known.cpu()
        drawn = torch.stack([image_order(layout, config, *each) for each in zip(seeds, own, strict=True)])
        given = model.as_orders(drawn, batch)
    shape = batch, tokens
    if noise is None and config.draw == "cdf":
        noise = torch.rand(shape, device=device)
    elif noise is None:
        noise = torch.randint(2**63 - 1, shape, device=device)
    if noise.dtype != NOISE[config.draw] or noise.shape != shape:
        raise ValueError(
            f"noise for the draw {config.draw} is {NOISE[config.draw]} of shape {shape} (image_noise), got {noise.dtype} of "
            f"shape {tuple(noise.shape)}"
        )
    noise = noise.to(device)

    with sampling_mode(model), sampling_mode(draft_model) if draft_model else nullcontext():
        samples = batch * (2 if config.guided else 1)
        cache, here = cache_for(model, samples, device, dtype), machine(device)
        recorded = compile and here.records(device) and not autocast and log_probs is None
        masks = masks_with_nulls(emb_masks, negative_masks) if config.guided else emb_masks
        sequential = plan_for(
            layout, config, cache.rows, device, dtype, end=1 + ends.index(total), padded=masks is not None,
            static=recorded or here.PASSES_LATE > 0, compile=compile,
        )  # fmt: skip
        plan = with_window(sequential, window, model, samples)
        graphs = graphs_for(model, layout, cache, batch) if recorded else None
        state = graphs.state if graphs else DecodeState(model, layout, cache, batch)
        state.draw, state.weighs = compiled.compiled_race() if compile else draw_race, log_probs is not None
        decode = compiled.compiled_decode_rows() if compile else decode_step.decode_rows
        conditions, added = embed_streams(model, cond, negative, config.guided)
        sequence, first = state.tokens[:, :-1], layout.passes[0].outputs.stop

        while True:
            state.begin(plan, noise, masks, known, added, as_drafted if draft_model else drafter, given)
            with cleared_after_errors(cache), here.attention_kernels(compile):
                least = most = 1  # the step that the slowest and the fastest image are at
                cache.lay_out(plan.kind(1, 1).length if plan.side_by_side and plan.end > 1 else cache.rows)
                logits = prefill(model, conditions, state, masks)  # (R, first, V)
                logits = decode_step.draw_tokens(logits, state, config.guided, state.count[:first].expand(batch, -1))
                drafts = None
                if plan.window:
                    behind = state.places(state.steps.first[state.cursor, 1], plan.window.outputs)
                    decode_step.draft_tokens(logits, state, behind)
                if plan.window and draft_model:
                    small = cache_for(draft_model, samples, device, draft_model.tok_embeddings.weight.dtype)
                    embedded = embed_streams(draft_model, cond, negative, config.guided)
                    drafts = ModelDrafts(draft_model, plan, small, embedded, noise, masks, known, given)
                    drafts.redraw(state, least, most)
                if on_step:
                    on_step(first, sequence)
                cursors: deque[Callable[[], list[int]]] = deque()
                while least < plan.end:
                    kind = plan.kind(least, most)
                    if plan.side_by_side:
                        cache.lay_out(kind.length)
                    work = partial(decode_step.take_pass, model, state, kind, decode)
                    if graphs:
                        graphs.run(kind, work)
                    else:
                        work()
                    if plan.window:
                        cursors.append(here.read_later(torch.stack(state.cursor.aminmax())))
                        if len(cursors) > here.PASSES_LATE:
                            least, most = cursors.popleft()()
                        if drafts and least < plan.end:
                            drafts.redraw(state, least, most)
                    else:
                        least = most = least + 1
                    if on_step:
                        on_step(layout.passes[least - 1].outputs.stop, sequence)
                drawn = sequence.gather(1, state.orders[:, :total].argsort(1))  # by their place in the image
                finite = state.spread[:, :total].isfinite()
                if finite.all():  # the one place that waits for the device
                    if log_probs is not None:
                        log_probs.copy_(state.likelihood[:, :-1])
                    return drawn
                if not plan.window:
                    raise NotFiniteLogits(broken_steps(finite.tolist(), layout), drawn, dtype)
            cache.clear()
            plan = sequential  # perhaps it was a draft's NaN, which reaches the rows before it through their masks


def known_first(known: Tensor | None, orders: Tensor | None) -> int:
    """Return how many known tokens come first in every image: all of them where orders are still to be drawn."""
    if known is None:
        return 0
    if orders is None:
        return int((known >= 0).sum(1).min())
    return int((known.gather(1, orders.to(known.device, torch.long)) >= 0).cumprod(1).sum(1).min())


def image_order(layout: Layout, config: SamplingConfig, seed: int, known: Tensor | None = None) -> Tensor:
    """Return the order of an image's tokens, int64 (N,); where it is drawn, known ones come first.

    known: int64 (N,) in raster order, -1 for tokens to draw.
    """
    first = [] if known is None else torch.as_tensor(known).ge(0).nonzero().flatten().tolist()
    if config.order == "random":
        cells = torch.randperm(layout.tokens, generator=torch.Generator().manual_seed(seed)).tolist()
        return torch.tensor([*first, *(cell for cell in cells if cell not in set(first))])
    return layout.draw_order(seed, first)


def embed_streams(
    model: Trunk, cond: Conditions, negative: Conditions | None, guided: bool
) -> tuple[Tensor, Tensor | None]:
    """Embed the conditions as Trunk.embed_conditions does, with `guided` also what guidance leads away from, in reversed order."""
    device = model.tok_embeddings.weight.device
    values = {name: value.to(device) for name, value in model.as_conditions(cond).items()}
    if guided:
        nulls = {name: model.conditions[name].null(value) for name, value in values.items()}
        nulls |= {} if negative is None else model.by_name(negative)
        values = {name: torch.cat([value, nulls[name].to(device).flip(0)]) for name, value in values.items()}
    return model.embed_conditions(values)


def masks_with_nulls(emb_masks: Tensor | None, negative_masks: Tensor | None) -> Tensor | None:
    """Return the masks of both streams, in the order of with_nulls; None where all rows are real."""
    if emb_masks is None and negative_masks is not None:
        emb_masks = torch.ones_like(negative_masks)
    if emb_masks is None:
        return None
    return torch.cat([emb_masks, (emb_masks if negative_masks is None else negative_masks).flip(0)])


def check_known(known: Tensor, batch: int, model: Trunk) -> None:
    """Raise ValueError where known tokens are not those of `batch` images of a model."""
    shape, codes = (batch, model.layout.tokens), model.args.vocab_size
    if tuple(known.shape) != shape or known.is_floating_point() or known.max() >= codes:
        raise ValueError(
            f"known tokens are whole numbers of shape {shape} below {codes}, got {known.dtype} of shape "
            f"{tuple(known.shape)}"
        )


@contextmanager
def cleared_after_errors(cache: StaticCache) -> Iterator[None]:
    """Clears the cache where the block raises: a NaN in it would reach later images even through masked rows."""
    try:
        yield
    except BaseException:
        cache.clear()
        raise


def broken_steps(finite: list[list[bool]], layout: Layout) -> list[int | None]:
    """Return for each image the first decode step (from 1) with logits that are not finite; None where all are."""
    step_of = [1] * layout.tokens
    for number, step in enumerate(layout.steps, start=2):
        step_of[step.outputs] = [number] * (step.outputs.stop - step.outputs.start)
    return [step_of[row.index(False)] if False in row else None for row in finite]
