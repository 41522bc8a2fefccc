"""Plan of a call's passes: how many rows each computes, how far it reads the cache, and windows of several decode steps.

What a pass computes is fixed by its kind, so that a pass that was recorded as a CUDA graph (on_cuda.py) serves all later
ones of its kind.
"""

import logging
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate
from weakref import WeakSet

import torch

from autoregressive.models.layouts import Layout
from autoregressive.models.machine import machine
from autoregressive.models.settings import SamplingConfig
from autoregressive.models.trunk import Trunk

log = logging.getLogger(__name__)

_without_windows: WeakSet[Trunk] = WeakSet()  # models of which a line said so


@dataclass(frozen=True)
class Window:
    """Shape of a window of a layout."""

    rows: int  # computed in a pass
    outputs: int  # tokens picked in it
    limits: tuple[
        int, ...
    ]  # by step, from 1 after the prefill: the step at which a pass that begins there ends at most


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
    """Kind of a pass: all that fixes its work, and so its kernels and the shapes they see."""

    rows: int  # computed
    outputs: int  # tokens drawn
    length: int  # rows attended to
    masked: bool  # not all of those rows may be seen
    streams: int  # 2 where the unconditional rows are computed too
    guided: bool | None  # these are mixed in; None where a token's own step tells
    window: bool  # tokens after the first step are drafts
    static: bool  # no number may be read off the device


@dataclass(frozen=True)
class Plan:
    """Plan of the passes of a call."""

    layout: Layout
    config: SamplingConfig
    end: int  # the step before which the passes end
    stride: int  # passes read the cache up to multiples of so many rows, from `least_read` to `longest`
    side_by_side: bool  # the rows that are read have no gaps (StaticCache.lay_out)
    least_read: int
    longest: int
    padded: bool  # some condition rows are padding
    static: bool  # as in PassKind
    compiled: bool  # each number of rows is compiled for itself
    window: Window | None = None  # None for one step a pass

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
        steps = enumerate(self.layout.passes[: self.end])
        return max(i for i, step in steps if not i or self.config.guides(step.number))

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
        unread = self.stride > 1 or length > stop
        return PassKind(
            rows=rows,
            outputs=outputs,
            length=length,
            masked=self.padded or unread or window is not None or step.sees is not None or widened,
            streams=2 if least <= self.last_guided else 1,
            guided=guided if least <= self.last_guided else False,
            window=window is not None,
            static=self.static,
        )


def plan_for(
    layout: Layout,
    config: SamplingConfig,
    cache_rows: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    end: int | None = None,
    padded: bool = True,
    static: bool = False,
    compile: bool = False,
) -> Plan:
    """Return the plan of one step a pass over a cache of so many rows of a device and dtype."""
    here = machine(device)
    stride = here.read_stride(dtype, compile)
    side_by_side = stride > 1 and not compile
    return Plan(
        layout=layout,
        config=config,
        end=len(layout.passes) if end is None else end,
        stride=stride,
        side_by_side=side_by_side,
        least_read=here.LEAST_READ,
        longest=cache_rows - (not side_by_side),
        padded=padded,
        static=static,
        compiled=compile,
    )


def check_window(size: int | str, layout: Layout) -> None:
    """Raise ValueError for what is no size of a window, and for any size where the layout has no windows."""
    if size == "auto":
        return
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"window is {size!r}: give a number of tokens, 0 for one decode step a pass, or 'auto'")
    if size:
        window_of(layout, size, len(layout.passes))


def with_window(plan: Plan, size: int | str, model: Trunk, samples: int) -> Plan:
    """Return the plan with the window that `generate` is asked for, where it can have one and needs it."""
    check_window(size, plan.layout)
    here, auto = machine(model.tok_embeddings.weight.device), size == "auto"
    size = here.auto_window(samples, plan.compiled) if auto else int(size)
    if size == 0 or plan.end == 1 or (auto and (2 * max(plan.layout.groups) > size or not all(plan.layout.kept))):
        return plan
    window = window_of(plan.layout, size, plan.end)
    if here.rows_agree(model, plan.compiled, plan.longest, plan.stride):
        return replace(plan, window=window)
    if model not in _without_windows:
        why = ", compiled" if plan.compiled else "; in float32 MKL_CBWR=AUTO,STRICT in the environment may mend that"
        log.warning(f"windows are off: here a row of a pass is rounded by the rows beside it{why}")
    _without_windows.add(model)
    return plan
