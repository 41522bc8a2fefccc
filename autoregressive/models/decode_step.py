"""One decode pass: tokens in, rows computed, tokens drawn, all of it on the device and in memory that stays in place.

    state = DecodeState(model, layout, cache, batch)
    state.begin(plan, noise, prefix_mask)
    take_pass(model, state, kind, decode_rows)            # reads and writes state.tokens at state.cursor

A pass computes a window: the rows of a decode step or of several, fed with tokens that are drafts as far as they are not
drawn yet. A step's tokens are right where every token that it reads was, so the leading steps that read no wrong draft are
done. That is Jacobi iteration, and its fixed point is the sequence that one step a pass draws (Wiggers and Hoogeboom, arXiv
2002.09928). Images advance by themselves: each has its cursor, and, among slots (slots.py), its settings.

Unconditional rows stand behind the conditional ones in reversed order, so that the samples of the last images of a batch
are neighbours in the cache, with and without their unconditional rows.

What a pass computes is fixed by its kind; where it stands, the noise and the numbers of the sampling are read from the
state. So a pass that was recorded as a CUDA graph (on_cuda.py) serves all later ones of its kind, and of later calls.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.kv_cache import StaticCache
from autoregressive.models.layouts import Layout, Reader
from autoregressive.models.machine import attention_bias
from autoregressive.models.plans import PassKind, Plan
from autoregressive.models.sampling import NOISE, SamplingConfig, choose, draw_race, guide, spread
from autoregressive.models.trunk import Rows, Trunk

Decode = Callable[..., Tensor]  # as decode_rows
Drafter = Callable[["DecodeState", Tensor, Tensor], Tensor]
"""Proposes tokens, int64 (B, n), for the places (B, n) that enter a window, from the logits (B, 1, V) of the window's last row."""


class StepTables:
    """The decode steps of a layout as tables on a device, so that each image can be at a step of its own.

    Of steps, 0 the prefill and one after the last: `first`, int64 (steps + 1, 2), their first row and output. Of rows, counted
    from the first one after the prefill, and one to spare for what is past the end: `rows`, int64 (rows + 1, 4), a row's place
    in the cache, the token it is fed, its special vector and the token that it is the query of, -1 for none; `sees`, bool
    (rows + 1, cache rows). Of tokens and one to spare: `step_of`, int64 (N + 1,); `readers`, int64 (N + 1, readers, 2), row
    and head, None where the outputs of a step are read one from each of its rows.
    """

    def __init__(self, layout: Layout, cache_rows: int, device: torch.device):
        passes, steps = layout.passes, layout.steps
        first_row = [0, *accumulate((len(step.rows) for step in steps), initial=0)]
        self.first = torch.tensor([*zip(first_row, [*(step.outputs.start for step in passes), layout.tokens])])
        rows, readers = [], [(Reader(0),)] * passes[0].outputs.stop
        self.sees = torch.zeros(first_row[-1] + 1, cache_rows, dtype=torch.bool)
        self.sees[-1] = True
        for start, step in zip(first_row[1:], steps):
            inputs, width = range(step.inputs.start, step.inputs.stop), len(step.rows)
            queries = list(range(step.outputs.start, step.outputs.stop))[: step.queries]
            held = [
                *((token, -1, -1) for token in inputs),
                *((0, vector, -1) for vector in range(step.special)),
                *((0, -1, token) for token in queries),
            ]
            rows += [(place, *row) for place, row in zip(step.rows, held, strict=True)]
            here = self.sees[start : start + width]
            here[:, : step.rows.start] = True
            here[:, step.rows.start : step.rows.stop] = torch.tensor(step.sees) if step.sees else True
            read = step.reads or [(Reader(i),) for i in range(width)]
            readers += [tuple(Reader(start + row, head) for row, head in each) for each in read]
        self.rows = torch.tensor([*rows, (cache_rows - 1, 0, -1, -1)])
        self.step_of = torch.tensor(
            [i for i, step in enumerate(passes) for _ in range(step.outputs.start, step.outputs.stop)] + [len(passes)]
        )
        most = max(map(len, readers))
        one_to_one = all(step.reads is None for step in steps)
        self.readers = None if one_to_one else torch.tensor([(each * most)[:most] for each in [*readers, readers[0]]])
        for name, table in vars(self).items():
            setattr(self, name, table if table is None else table.to(device))
        self.has_vectors, self.has_queries = (any(row[i] >= 0 for row in rows) for i in (2, 3))


step_tables = lru_cache(maxsize=16)(StepTables)


class DecodeState:
    """State of a batch of images, which its passes read and write. Tokens are in the layout's order, with one to spare."""

    OF_IMAGES = ("cursor", "tokens", "numbers", "spread", "guided", "scales", "known", "orders")

    def __init__(self, model: Trunk, layout: Layout, cache: StaticCache, batch: int):
        self.layout, device = layout, cache.keys[0].device
        self.order = layout.order.to(device)
        # Raster indices by sequence position, int64 (B, N), and whether these are not the layout's.
        self.orders, self.ordered = self.order.repeat(batch, 1), False
        self.cache, self.batch = cache, batch
        self.steps = step_tables(layout, cache.rows, device)
        self.cursor = torch.zeros(batch, dtype=torch.long, device=device)  # the step that each image is at
        self.limits = torch.zeros(len(self.steps.first), dtype=torch.long, device=device)  # as in Window
        # From the cursor's step on they are drafts.
        self.tokens = torch.zeros(batch, layout.tokens + 1, dtype=torch.long, device=device)
        self.noise = {draw: torch.zeros_like(self.tokens, dtype=dtype) for draw, dtype in NOISE.items()}
        # Of the samples of the cache, false where a condition row is padding.
        self.seen = torch.ones(len(cache.keys[0]), cache.rows, dtype=torch.bool, device=device)
        self.numbers = torch.zeros(batch, 2, device=device)  # config.numbers of each image
        self.groups: Sequence[tuple[SamplingConfig, slice | Tensor]] = ()  # settings, and the images they are of
        self.draw: Callable[[Tensor, Tensor], Tensor] = draw_race  # or what the compiler made of it
        self.spread = torch.zeros_like(self.tokens, dtype=torch.float32)  # of the logits each token was drawn from
        self.guided = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.scales = torch.ones_like(self.spread)  # of guidance
        self.known = torch.full_like(self.tokens, -1)  # tokens that are given, -1 for those to draw
        # Log-probabilities of the tokens in the unfiltered distribution, where the state weighs.
        self.likelihood, self.weighs = torch.zeros_like(self.spread), False
        self.added: Tensor | None = None  # what is added to the row that predicts each token
        if any(not condition.rows for condition in model.conditions.values()):
            assert self.steps.readers is None, "a condition per token needs a row for each token drawn"
            shape = len(self.seen), layout.tokens + 1, model.added_width
            self.added = torch.zeros(shape, dtype=cache.keys[0].dtype, device=device)
        self.context: Tensor | None = None  # what Trunk.context made of the conditions
        if model.has_context:
            self.context = model.tok_embeddings.weight.new_zeros(len(self.seen), model.args.dim)
        self.count = torch.arange(cache.rows, device=device)

    def begin(
        self,
        plan: Plan,
        noise: Tensor,
        prefix_mask: Tensor | None,
        known: Tensor | None = None,
        added: Tensor | None = None,
        drafter: Drafter | None = None,
        orders: Tensor | None = None,
    ) -> None:
        """Set out for new images.

        noise: (B, N). prefix_mask: (R, T), nonzero where the condition row is real.
        known, added: (B, N) and (R, N, added_width) in raster order; added counts control_strength times. orders: (B, N), the layout's where not given.
        """
        config = plan.config
        self.groups, self.drafter = [(config, slice(None))], drafter or draft_from_last
        self.ordered = orders is not None
        self.orders.copy_(self.order if orders is None else orders)
        self.known.fill_(-1)
        if known is not None:
            self.known[:, :-1].copy_(known.gather(1, self.orders))
        if self.added is not None and added is not None:
            at = both(self.orders, len(added) // self.batch)[..., None].expand_as(added)
            self.added[: len(added), :-1] = added.gather(1, at) * config.control_strength
        if plan.window:
            self.limits.copy_(torch.tensor(plan.window.limits))
            self.guided.copy_(self.guided_tokens(config))
        self.numbers.copy_(torch.tensor(config.numbers))
        self.scales[:, :-1].copy_(torch.tensor(config.scales(plan.layout.tokens)))
        self.noise[config.draw][:, :-1].copy_(noise)
        self.cursor.fill_(1)
        self.tokens.zero_()
        self.spread.zero_()
        self.seen.fill_(True)
        if prefix_mask is not None:
            self.seen[: len(prefix_mask), : prefix_mask.shape[1]] = prefix_mask.to(self.seen.device, torch.bool)

    def guided_tokens(self, config: SamplingConfig) -> Tensor:
        """Return which tokens are guided, bool (N + 1,)."""
        guided = [config.guides(step.number) for step in self.layout.passes]
        return torch.tensor([*guided, False])[self.steps.step_of.cpu()].to(self.guided.device)

    def part(self, images: slice | Tensor, samples: slice | Tensor, cache: StaticCache) -> "DecodeState":
        """Return the state of some images, which are these samples of the cache, over another cache."""
        part = copy(self)
        part.cache, part.seen = cache, self.seen[samples]
        part.context = None if self.context is None else self.context[samples]
        for name in self.OF_IMAGES:
            setattr(part, name, getattr(self, name)[images])
        part.noise = {draw: noise[images] for draw, noise in self.noise.items()}
        part.batch = len(part.cursor)
        return part

    def last(self, count: int) -> "DecodeState":
        """Return the state of the last `count` images, over the same memory."""
        first, samples = self.batch - count, slice(self.batch - count, self.batch + count)
        return self.part(slice(first, None), samples, self.cache.part(samples))

    def rows(self, positions: Tensor, length: int) -> Rows:
        """Return the places of a pass's rows, (R, s)."""
        samples = len(positions)
        orders = both(self.orders, samples // self.batch) if self.ordered else None
        context = None if self.context is None else self.context[:samples]
        return Rows(self.cache, positions, length, orders=orders, context=context)

    def places(self, first: Tensor, count: int) -> Tensor:
        """Return `count` places of tokens from first (B,) on, (B, count); what is past the end has the spare place."""
        return (first[:, None] + self.count[:count]).clamp(max=self.tokens.shape[1] - 1)


def both(x: Tensor, streams: int) -> Tensor:
    """Repeat what images have, (B, …), for their unconditional rows where there are two streams."""
    return torch.cat([x, x.flip(0)]) if streams == 2 else x


def in_order(logits: Tensor, images: int) -> Tensor:
    """Put the logits of unconditional rows, where there are some, in the order of their images."""
    return logits if len(logits) == images else torch.cat([logits[:images], logits[images:].flip(0)])


def prefill(model: Trunk, conditions: Tensor, state: DecodeState, emb_masks: Tensor | None) -> Tensor:
    """Run the condition rows (R, prefix, dim), and the queries of the first tokens where these have some, into the cache.

    Returns the logits of the first tokens, float32 (R, first, V).
    """
    layout, step = state.layout, state.layout.passes[0]
    h, added = conditions.to(model.tok_embeddings.weight.dtype), state.added
    if added is not None:  # to the last row, which predicts the first token
        added = F.pad(added[: len(h), :1], (0, 0, h.shape[1] - 1, 0))
    h, before_blocks = model.split_added(h, added)
    mask = None if emb_masks is None else model.attention_mask(h.shape[1], emb_masks, h.device, layout)
    if step.queries:
        assert mask is None, "no trunk has both captions and queries"
        queries = model.queries(torch.arange(step.outputs.start, step.outputs.stop, device=h.device))
        h = torch.cat([h, queries.to(h.dtype).expand(len(h), -1, -1)], dim=1)
        mask = attention_bias(torch.tensor(step.sees, device=h.device), h.dtype)
    rows = h.shape[1]
    context = model.context(h)
    if state.context is not None and context is not None:
        state.context[: len(h)] = context
    positions = torch.arange(rows, device=h.device).expand(len(h), -1)
    h = model.decode(h, replace(state.rows(positions, rows), added=before_blocks), mask, causal=mask is None)
    reads = None if step.reads is None else torch.tensor(step.reads, device=h.device).expand(len(h), -1, -1, -1)
    return in_order(model.logits(h, reads), state.batch)


def take_pass(model: Trunk, state: DecodeState, kind: PassKind, decode: Decode) -> None:
    """Draws the tokens of each image's window into state.tokens, and moves its cursor past the steps that are done."""
    steps, samples = state.steps, kind.streams * state.batch
    first_row, first = steps.first[state.cursor].unbind(1)
    outputs = state.places(first, kind.outputs)
    rows = (first_row[:, None] + state.count[: kind.rows]).clamp(max=len(steps.rows) - 1)
    held = both(rows, kind.streams)
    places, fed, vectors, queries = steps.rows[held].unbind(2)
    mask = None
    if kind.masked:
        mask = steps.sees[:, : kind.length][held] & state.seen[:samples, None, : kind.length]
        mask = attention_bias(mask[:, None], state.cache.keys[0].dtype)
    reads = added = None
    if steps.readers is not None:
        reads = steps.readers[outputs].clone()
        reads[..., 0] = (reads[..., 0] - first_row[:, None, None]).clamp(0, kind.rows - 1)
        reads = both(reads, kind.streams)
    if state.added is not None:
        added = state.added[state.count[:samples, None], both(outputs, kind.streams)]
    drafts = state.tokens.gather(1, outputs)
    logits = decode(
        model,
        both(state.tokens, kind.streams).gather(1, fed),
        state.rows(places, kind.length),
        mask,
        vectors if steps.has_vectors else None,
        queries if steps.has_queries else None,
        reads,
        added,
    )
    logits = draw_tokens(in_order(logits, state.batch), state, kind.guided, outputs)
    if not kind.window:
        state.cursor += 1
        return
    agreed = (state.tokens.gather(1, outputs) == drafts).long().cumprod(1).sum(1)
    wrong = (first + agreed).clamp(max=state.tokens.shape[1] - 1)  # the first token whose draft was
    state.cursor.copy_(torch.minimum(steps.step_of[wrong] + 1, state.limits[state.cursor]))
    entering = kind.outputs if kind.static else int((steps.first[state.cursor, 1] - first).max())
    draft_tokens(logits, state, state.places(first + kind.outputs, entering))


def draw_tokens(logits: Tensor, state: DecodeState, guided: bool | None, outputs: Tensor) -> Tensor:
    """Draw the tokens at `outputs` (B, s) from logits (R, s, V), conditional rows before unconditional ones; known ones stay.

    guided: None where state.guided tells of each token. Returns the logits that they are drawn from, (B, s, V).
    """
    conditional = logits[: state.batch]
    if guided is not False:
        scales = state.scales.gather(1, outputs)[..., None]
        mixed = guide(conditional, logits[state.batch : 2 * state.batch], scales)
        conditional = mixed if guided else torch.where(state.guided.gather(1, outputs)[..., None], mixed, conditional)
    tokens, known = pick(conditional, state, outputs), state.known.gather(1, outputs)
    tokens = torch.where(known >= 0, known, tokens)
    state.tokens.scatter_(1, outputs, tokens)
    if state.weighs:
        unfiltered = (conditional.float() / state.numbers[:, :1, None]).log_softmax(-1)
        state.likelihood.scatter_(1, outputs, unfiltered.gather(2, tokens[..., None])[..., 0])
    state.spread.scatter_(1, outputs, spread(conditional))
    return conditional


def pick(logits: Tensor, state: DecodeState, places: Tensor) -> Tensor:
    """Choose tokens for `places` (B, n) by each image's settings and noise, from logits (B, n, V), or (B, 1, V) for all places."""
    tokens = torch.empty_like(places)
    for config, images in state.groups:
        noise = state.noise[config.draw][images].gather(1, places[images])
        tokens[images] = choose(logits[images], config, noise, state.numbers[images, None], state.draw)
    return tokens


def draft_tokens(logits: Tensor, state: DecodeState, places: Tensor) -> None:
    """Write drafts for the tokens at `places` (B, n), which enter the window behind the one of logits (B, s, V)."""
    drafts, known = state.drafter(state, logits[:, -1:], places), state.known.gather(1, places)
    state.tokens.scatter_(1, places, torch.where(known >= 0, known, drafts))


def draft_from_last(state: DecodeState, logits: Tensor, places: Tensor) -> Tensor:
    """Draw each token with its own noise as if it were the window's last one: a Drafter."""
    return pick(logits, state, places)


def as_drafted(state: DecodeState, logits: Tensor, places: Tensor) -> Tensor:
    """Leave the drafts that are there: a Drafter, where another model writes them."""
    return state.tokens.gather(1, places)


def decode_rows(
    model: Trunk,
    tokens: Tensor,
    rows: Rows,
    mask: Tensor | None,
    vectors: Tensor | None = None,
    queries: Tensor | None = None,
    reads: Tensor | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """Compute the model's part of a pass: tokens (R, s), or what stands in their place, to logits (R, outputs, V)."""
    h, before_blocks = model.split_added(model.embed(tokens, vectors, queries), added)
    # dataclasses.replace is not for the compiler
    rows = Rows(rows.cache, rows.positions, rows.length, rows.layout, rows.orders, rows.context, before_blocks)
    return model.logits(model.decode(h, rows, mask, causal=False), reads)
