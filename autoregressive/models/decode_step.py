"""One decode step: tokens in, rows computed, tokens drawn, all of it on the device and in memory that stays in place.

    state = DecodeState(model, cache, batch)
    take_step(model, state, kind, decode_rows)            # reads and writes state.tokens at state.at

What a step computes is fixed by its kind; where it stands, the noise and the numbers of the sampling are read from the
state. So a step that was recorded as a CUDA graph (on_cuda.py) serves all later ones of its kind, and of later calls.
"""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from autoregressive.models.gpt import Rows, Transformer
from autoregressive.models.kv_cache import StaticCache
from autoregressive.models.layouts import DecodeStep, Reader
from autoregressive.models.machine import attention_bias
from autoregressive.models.sampling import NOISE, SamplingConfig, choose, draw_race, guide, race, spread

Decode = Callable[..., Tensor]  # as decode_rows


@dataclass(frozen=True)
class StepKind:
    """Kind of a step: all that fixes its work, and so its kernels and the shapes they see.

    inputs, special, queries: rows of tokens, special vectors and queries. outputs: tokens drawn. reads, sees: as in
    DecodeStep. length: rows attended to. masked: whether not all of those rows may be seen. streams: 2 where the
    unconditional rows are computed too. guided: whether these are mixed in.
    """

    inputs: int
    special: int
    queries: int
    outputs: int
    reads: tuple[tuple[Reader, ...], ...] | None
    sees: tuple[tuple[bool, ...], ...] | None
    length: int
    masked: bool
    streams: int
    guided: bool


def kinds_of(
    steps: Sequence[DecodeStep], config: SamplingConfig, stride: int, longest: int, padded: bool
) -> list[StepKind]:
    """The kinds of a layout's steps, which read the cache up to multiples of `stride`, at most `longest` rows.

    padded: whether some condition rows are padding. The unconditional rows are computed as long as a later step is guided.
    """
    guided = [config.guides(step.number) for step in steps]
    last = max((i for i, one in enumerate(guided) if one), default=-1)
    return [
        StepKind(
            inputs=step.inputs.stop - step.inputs.start,
            special=step.special,
            queries=step.queries,
            outputs=step.outputs.stop - step.outputs.start,
            reads=step.reads,
            sees=step.sees,
            length=min(-(-step.rows.stop // stride) * stride, longest),
            masked=padded or stride > 1 or step.sees is not None,
            streams=2 if i <= last else 1,
            guided=guided[i],
        )
        for i, step in enumerate(steps)
    ]


class DecodeState:
    """State of a batch of images, which its steps read and write.

    tokens: int64 (B, N), in the layout's order. noise: (B, N) by draw. seen: bool (samples of the cache, rows), false where
    a condition row is padding. at: int64 (3,): the step's first row, first input and first output.
    numbers: config.numbers, float32 (3,). spread: float32 (B, N), that of the logits each token was drawn from.
    known: int64 (B, N), tokens that are not drawn but given, -1 elsewhere. added: (samples of the cache, N, dim), what is
    added to the row that predicts each token; None for a model without such conditions. All in the layout's order.
    draw: draw_race, or compiled_race().
    """

    def __init__(self, model: Transformer, cache: StaticCache, batch: int):
        layout, device = model.layout, cache.keys[0].device
        self.order = layout.order.to(device)
        self.cache, self.batch = cache, batch
        self.tokens = torch.zeros(batch, layout.tokens, dtype=torch.long, device=device)
        self.noise = {draw: torch.zeros_like(self.tokens, dtype=dtype) for draw, dtype in NOISE.items()}
        self.seen = torch.ones(len(cache.keys[0]), cache.rows, dtype=torch.bool, device=device)
        self.at = torch.zeros(3, dtype=torch.long, device=device)
        self.numbers = torch.zeros(3, device=device)
        self.draw: Callable[[Tensor, Tensor], Tensor] = draw_race
        self.spread = torch.zeros(batch, layout.tokens, device=device)
        self.known = torch.full_like(self.tokens, -1)
        self._constants: dict[tuple, Tensor] = {}
        self.added: Tensor | None = None
        if any(not condition.rows for condition in model.conditions.values()):
            shape = len(self.seen), layout.tokens, model.args.dim
            self.added = torch.zeros(shape, dtype=cache.keys[0].dtype, device=device)
        self.count = torch.arange(cache.rows, device=device)

    def begin(
        self,
        config: SamplingConfig,
        noise: Tensor,
        prefix_mask: Tensor | None,
        known: Tensor | None = None,
        added: Tensor | None = None,
    ) -> None:
        """Set out for new images.

        noise: (B, N), or as much as is needed of it. prefix_mask: (R, T), nonzero where the condition row is real.
        known, added: (B, N) and (R, N, dim) in raster order.
        """
        self.known.fill_(-1)
        if known is not None:
            self.known.copy_(known[:, self.order])
        if self.added is not None and added is not None:
            self.added[: len(added)] = added[:, self.order].to(self.added.dtype)
        self.config = config
        self.numbers.copy_(torch.tensor(config.numbers))
        self.noise[config.draw][:, : noise.shape[1]].copy_(noise)
        self.tokens.zero_()
        self.spread.zero_()
        self.seen.fill_(True)
        if prefix_mask is not None:
            self.seen[: len(prefix_mask), : prefix_mask.shape[1]] = prefix_mask.to(self.seen.device, torch.bool)

    def constant(self, numbers: tuple) -> Tensor:
        """Return a table of numbers on the device; kept, since a step that is recorded cannot copy it there."""
        if numbers not in self._constants:
            self._constants[numbers] = torch.tensor(numbers, device=self.tokens.device)
        return self._constants[numbers]


def take_step(model: Transformer, state: DecodeState, kind: StepKind, decode: Decode) -> None:
    """Draws the tokens of the step at `state.at`, of this kind, into state.tokens."""
    row, first_input, first_output = state.at.unbind()
    width = kind.inputs + kind.special + kind.queries
    outputs = first_output + state.count[: kind.outputs]
    inputs = state.tokens.index_select(1, first_input + state.count[: kind.inputs]).repeat(kind.streams, 1)
    mask = None
    if kind.masked:
        mask = state.seen[: len(inputs), None, : kind.length] & (state.count[: kind.length] < row + width)
        if kind.sees is not None:
            mask = mask.repeat(1, width, 1)
            mask[:, :, row + state.count[:width]] &= state.constant(kind.sees)
        mask = attention_bias(mask[:, None], state.cache.keys[0].dtype)
    rows = Rows(state.cache, row + state.count[:width], kind.length)
    added = None
    if state.added is not None:
        assert kind.reads is None and kind.outputs == width, "a condition per token needs a row for each token drawn"
        added = state.added[: len(inputs)].index_select(1, outputs)
    queries = outputs if kind.queries else None
    logits = decode(
        model,
        inputs,
        kind.special,
        rows,
        mask,
        None if kind.reads is None else state.constant(kind.reads),
        added,
        queries,
    )
    draw_tokens(logits, state, kind.guided, outputs)


def draw_tokens(logits: Tensor, state: DecodeState, guided: bool, outputs: Tensor) -> None:
    """Draw the tokens at `outputs` (s,) from logits (R, s, V), conditional rows before unconditional ones; known ones stay."""
    conditional = logits[: state.batch]
    if guided:
        conditional = guide(conditional, logits[state.batch : 2 * state.batch], state.numbers[0])
    noise = state.noise[state.config.draw].index_select(1, outputs)
    tokens = choose(conditional, state.config, noise, state.numbers, state.draw)
    known = state.known.index_select(1, outputs)
    state.tokens.index_copy_(1, outputs, torch.where(known >= 0, known, tokens))
    state.spread.index_copy_(1, outputs, spread(conditional))


def decode_rows(
    model: Transformer,
    tokens: Tensor,
    special: int,
    rows: Rows,
    mask: Tensor | None,
    reads: Tensor | None = None,
    added: Tensor | None = None,
    queries: Tensor | None = None,
) -> Tensor:
    """Compute the model's part of a step: tokens (R, s), special vectors, queries to logits (R, outputs, V)."""
    h = model.embed(tokens, special, queries)
    h = h if added is None else h + added
    return model.head(model.decode(h, rows, mask, causal=False), reads)


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

    def decode(model: Transformer, tokens: Tensor, special: int, rows: Rows, mask: Tensor | None, *more: Any) -> Tensor:
        up_to = torch.empty(rows.length, 0)  # a size that may change; a plain number would be compiled in
        torch._dynamo.mark_dynamic(up_to, 0)
        if mask is not None:
            torch._dynamo.mark_dynamic(mask, 3)
        return compiled(model, tokens, special, rows.cache, rows.positions, up_to, mask, *more)

    return decode


def decode_rows_up_to(
    model: Transformer,
    tokens: Tensor,
    special: int,
    cache: StaticCache,
    positions: Tensor,
    up_to: Tensor,
    mask: Tensor | None,
    *more: Any,
) -> Tensor:
    """Compute decode_rows with as many rows to attend to as `up_to` has."""
    return decode_rows(model, tokens, special, Rows(cache, positions, up_to.shape[0]), mask, *more)
