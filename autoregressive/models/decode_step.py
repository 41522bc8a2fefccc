"""One decode pass: tokens in, rows computed, tokens drawn, all of it on the device and in memory that stays in place.

    state = DecodeState(model, cache, batch)
    state.begin(config, noise, mask, plan)
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

import os
import shutil
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from autoregressive.models.kv_cache import StaticCache
from autoregressive.models.layouts import Layout, Reader
from autoregressive.models.machine import attention_bias
from autoregressive.models.sampling import NOISE, SamplingConfig, choose, draw_race, guide, race, spread
from autoregressive.models.trunk import Rows, Trunk

Decode = Callable[..., Tensor]  # as decode_rows
Drafter = Callable[["DecodeState", Tensor, Tensor], Tensor]
"""Proposes tokens, int64 (B, n), for the places (B, n) that enter a window, from the logits (B, 1, V) of the window's last row."""


@dataclass(frozen=True)
class Window:
    """Shape of a window of a layout.

    rows: computed in a pass. outputs: tokens picked in it. limits: for each step, counted from 1 after the prefill, the step
    at which a pass that begins there ends at most.
    """

    rows: int
    outputs: int
    limits: tuple[int, ...]


@cache
def window_of(layout: Layout, size: int, end: int) -> Window:
    """Return a window of about `size` tokens, of whole steps of a layout of which those before `end` are taken.

    Raises ValueError for a layout with rows that later ones overwrite.
    """
    steps = layout.steps
    places = [place for step in steps for place in step.rows]
    if places != list(range(layout.prefix, layout.prefix + len(places))):
        raise ValueError(f"the layout {layout.name!r} overwrites rows of its queries: it is drawn with --window 0")
    first_row = [0, *accumulate((len(step.rows) for step in steps), initial=0)]
    first_output = [step.outputs.start for step in layout.passes] + [layout.tokens]
    widest = max(len(step.rows) for step in steps)
    rows = min(-(-size // widest) * widest, len(places))
    limits = [bisect_right(first_row, row + rows) - 1 for row in first_row]
    outputs = max(first_output[limit] - first for limit, first in zip(limits[1:], first_output[1:]))
    if all(step.reads is None for step in steps):
        outputs = rows  # also where no window of whole steps has as many
    return Window(rows, outputs, tuple(min(limit, end) for limit in limits))


@dataclass(frozen=True)
class PassKind:
    """Kind of a pass: all that fixes its work, and so its kernels and the shapes they see.

    rows: computed. outputs: tokens drawn. length: rows attended to. masked: whether not all of those rows may be seen.
    streams: 2 where the unconditional rows are computed too. guided: whether these are mixed in; None where a token's own
    step tells. window: whether tokens after the first step are drafts. static: whether no number may be read off the device.
    """

    rows: int
    outputs: int
    length: int
    masked: bool
    streams: int
    guided: bool | None
    window: bool
    static: bool


@dataclass(frozen=True)
class Plan:
    """Plan of the passes of a call.

    end: the step before which the passes end. window: None for one step a pass. stride: passes read the cache up to multiples
    of so many rows, `least_read` to `longest`. padded: whether some condition rows are padding. static: as in PassKind.
    compiled: whether each number of rows is compiled for itself.
    """

    layout: Layout
    config: SamplingConfig
    end: int
    window: Window | None
    stride: int
    least_read: int
    longest: int
    padded: bool
    static: bool
    compiled: bool = False

    @cached_property
    def sizes(self) -> dict[int, tuple[int, int]]:
        """Rows and outputs of the pass of a step, by the step's rows.

        Of compiled steps of many sizes a few sizes serve all: a pass computes some rows of later steps too, for nothing.
        """
        steps = self.layout.steps
        widths = {len(step.rows) for step in steps}
        few = not self.compiled or len(widths) <= 4 or not all(self.layout.kept)
        unit = 1 if few else -(-max(widths) // 4)
        rows = {width: -(-width // unit) * unit for width in widths}
        outputs = {
            size: max(step.outputs.stop - step.outputs.start for step in steps if rows[len(step.rows)] == size)
            for size in rows.values()
        }
        return {width: (size, outputs[size]) for width, size in rows.items()}

    @cached_property
    def last_guided(self) -> int:
        """Last step that is guided; the unconditional rows are computed up to it."""
        if self.window and self.static and self.config.guided:
            return self.end
        return max(
            i for i, step in enumerate(self.layout.passes[: self.end]) if not i or self.config.guides(step.number)
        )

    def kind(self, least: int, most: int) -> PassKind:
        """Return the kind of the pass in which the slowest image begins the step `least` and the fastest the step `most`."""
        step, last, window = self.layout.passes[least], self.layout.passes[min(most, self.end - 1)], self.window
        guided: bool | None = self.config.guides(step.number)
        rows, outputs, stop = len(step.rows), step.outputs.stop - step.outputs.start, last.rows.stop
        if self.compiled:
            rows, outputs = self.sizes[rows]
        widened = rows > len(step.rows)
        if window:
            guided = None if self.config.guided and self.config.cfg_interval >= 0 else self.config.guided
            rows, outputs, stop = window.rows, window.outputs, self.longest if self.static else stop + window.rows
        length = min(max(-(-stop // self.stride) * self.stride, self.least_read), self.longest)
        return PassKind(
            rows=rows,
            outputs=outputs,
            length=length,
            masked=self.padded
            or self.stride > 1
            or length > stop
            or window is not None
            or step.sees is not None
            or widened,
            streams=2 if least <= self.last_guided else 1,
            guided=guided if least <= self.last_guided else False,
            window=window is not None,
            static=self.static,
        )


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
    """State of a batch of images, which its passes read and write.

    cursor: int64 (B,), the step that each image is at. tokens: int64 (B, N + 1), in the layout's order and one to spare; those
    from the cursor's step on are drafts. noise: (B, N + 1). seen: bool (samples of the cache, rows), false where
    a condition row is padding. limits: int64 (steps + 1,), as in Window.
    numbers: config.numbers of each image, float32 (B, 2). groups: settings and the images whose operations on logits they
    fix. spread: float32 (B, N + 1), that of the logits each token was drawn from.
    guided: bool (B, N + 1). scales: float32 (B, N + 1), those of guidance. known: int64 (B, N + 1), tokens that are not drawn but given, -1 elsewhere. added: (samples of the
    cache, N + 1, Trunk.added_width), what is added to the row that predicts each token; None for a model without such conditions. All in the
    layout's order. context: (samples of the cache, dim), what Trunk.context made of the conditions; None where there is none.
    orders: int64 (B, N), the raster index at each sequence position of each image; `ordered` where these are not the layout's.
    likelihood: float32 (B, N + 1), the log-probability of each token in the unfiltered distribution, where it `weighs`.
    draw: draw_race, or compiled_race().
    """

    OF_IMAGES = ("cursor", "tokens", "numbers", "spread", "guided", "scales", "known", "orders")

    def __init__(self, model: Trunk, layout: Layout, cache: StaticCache, batch: int):
        self.layout, device = layout, cache.keys[0].device
        self.order = layout.order.to(device)
        self.orders, self.ordered = self.order.repeat(batch, 1), False
        self.cache, self.batch = cache, batch
        self.steps = step_tables(layout, cache.rows, device)
        self.cursor = torch.zeros(batch, dtype=torch.long, device=device)
        self.limits = torch.zeros(len(self.steps.first), dtype=torch.long, device=device)
        self.tokens = torch.zeros(batch, layout.tokens + 1, dtype=torch.long, device=device)
        self.noise = {draw: torch.zeros_like(self.tokens, dtype=dtype) for draw, dtype in NOISE.items()}
        self.seen = torch.ones(len(cache.keys[0]), cache.rows, dtype=torch.bool, device=device)
        self.numbers = torch.zeros(batch, 2, device=device)
        self.groups: Sequence[tuple[SamplingConfig, slice | Tensor]] = ()
        self.draw: Callable[[Tensor, Tensor], Tensor] = draw_race
        self.spread = torch.zeros_like(self.tokens, dtype=torch.float32)
        self.guided = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.scales = torch.ones_like(self.spread)
        self.known = torch.full_like(self.tokens, -1)
        self.likelihood, self.weighs = torch.zeros_like(self.spread), False
        self.added: Tensor | None = None
        if any(not condition.rows for condition in model.conditions.values()):
            assert self.steps.readers is None, "a condition per token needs a row for each token drawn"
            shape = len(self.seen), layout.tokens + 1, model.added_width
            self.added = torch.zeros(shape, dtype=cache.keys[0].dtype, device=device)
        dtype = model.tok_embeddings.weight.dtype
        self.context = (
            torch.zeros(len(self.seen), model.args.dim, dtype=dtype, device=device) if model.has_context else None
        )
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

        noise: (B, N), or as much as is needed of it. prefix_mask: (R, T), nonzero where the condition row is real.
        known, added: (B, N) and (R, N, added_width) in raster order; added counts control_strength times. orders: (B, N), the layout's where not given.
        """
        self.groups, self.drafter = [(plan.config, slice(None))], drafter or draft_from_last
        self.ordered = orders is not None
        self.orders.copy_(self.order if orders is None else orders)
        self.known.fill_(-1)
        if known is not None:
            self.known[:, :-1].copy_(known.gather(1, self.orders))
        if self.added is not None and added is not None:
            at = both(self.orders, len(added) // self.batch)[..., None].expand_as(added)
            self.added[: len(added), :-1] = added.gather(1, at) * plan.config.control_strength
        if plan.window:
            self.limits.copy_(torch.tensor(plan.window.limits))
            self.guided.copy_(self.guided_tokens(plan.layout, plan.config))
        self.numbers.copy_(torch.tensor(plan.config.numbers))
        self.scales[:, :-1].copy_(torch.tensor(plan.config.scales(plan.layout.tokens)))
        self.noise[plan.config.draw][:, : noise.shape[1]].copy_(noise)
        self.cursor.fill_(1)
        self.tokens.zero_()
        self.spread.zero_()
        self.seen.fill_(True)
        if prefix_mask is not None:
            self.seen[: len(prefix_mask), : prefix_mask.shape[1]] = prefix_mask.to(self.seen.device, torch.bool)

    def guided_tokens(self, layout: Layout, config: SamplingConfig) -> Tensor:
        """Return which tokens are guided, bool (N + 1,)."""
        guided = [config.guides(step.number) for step in layout.passes]
        return torch.tensor([*guided, False])[self.steps.step_of.cpu()].to(self.guided.device)

    def last(self, count: int) -> "DecodeState":
        """Return the state of the last `count` images, over the same memory."""
        part, samples = copy(self), slice(self.batch - count, self.batch + count)
        part.batch, part.seen, part.cache = count, self.seen[samples], self.cache.part(samples)
        part.context = None if self.context is None else self.context[samples]
        for name in self.OF_IMAGES:
            setattr(part, name, getattr(self, name)[self.batch - count :])
        part.noise = {draw: noise[self.batch - count :] for draw, noise in self.noise.items()}
        return part

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
    rows = Rows(rows.cache, rows.positions, rows.length, rows.layout, rows.orders, rows.context, before_blocks)
    return model.logits(model.decode(h, rows, mask, causal=False), reads)


def can_compile(device: torch.device) -> bool:
    """Tell whether steps can be compiled for a device: a CPU beside a C++ compiler, a GPU of CUDA beside a C compiler.

    Triton builds a module of the driver's in C when it is first used.
    """
    if device.type == "cpu":
        return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is not None
    compilers = [os.environ.get("CC"), "gcc", "clang"]
    return device.type == "cuda" and any(shutil.which(name) for name in compilers if name)


@cache
def compiled_race() -> Callable[[Tensor, Tensor], Tensor]:
    """Return the race through the compiler, one kernel in place of some thirty; one serves every number of rows."""
    return torch.compile(race, dynamic=True)


@cache
def compiled_decode_rows() -> Decode:
    """decode_rows through the compiler. Made when needed, since that takes long to import.

    It is compiled for a number of samples and of rows: with these open its loops are several times slower on a CPU. One
    serves every length.
    """
    import torch._dynamo.config as config

    config.recompile_limit = max(config.recompile_limit, 64)
    compiled = torch.compile(decode_rows_up_to, dynamic=False)

    def decode(model: Trunk, tokens: Tensor, rows: Rows, mask: Tensor | None, *more: Any) -> Tensor:
        up_to = torch.empty(rows.length, 0)  # a size that may change; a plain number would be compiled in
        torch._dynamo.mark_dynamic(up_to, 0)
        if mask is not None:
            torch._dynamo.mark_dynamic(mask, 3)
        return compiled(model, tokens, replace(rows, length=0), up_to, mask, *more)

    return decode


def decode_rows_up_to(
    model: Trunk,
    tokens: Tensor,
    rows: Rows,
    up_to: Tensor,
    mask: Tensor | None,
    *more: Any,
) -> Tensor:
    """Compute decode_rows with as many rows to attend to as `up_to` has."""
    return decode_rows(
        model,
        tokens,
        Rows(rows.cache, rows.positions, up_to.shape[0], rows.layout, rows.orders, rows.context),
        mask,
        *more,
    )
