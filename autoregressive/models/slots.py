"""Continuous batching on a CPU: a decode loop of slots, which images enter and leave between any two passes.

    slots = Slots(model, 8, plan_for_slots(model))
    with slots.drawing():
        slots.admit([7], [config], noise, labels)      # prefills slot 7 and draws the first tokens of its image
        slots.take_pass()                              # every image in a slot goes on
        slots.done(7), slots.tokens(7)                 # how many tokens are drawn, and these

An image has its own cursor, settings and noise; its tokens are those of `generate`, whatever else is in flight.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from autoregressive.models import decode_step
from autoregressive.models.decode_step import DecodeState, as_drafted, decode_rows, draft_from_last, prefill
from autoregressive.models.generate import embed_streams, masks_with_nulls, sampling_mode
from autoregressive.models.kv_cache import StaticCache
from autoregressive.models.machine import machine
from autoregressive.models.plans import Plan, plan_for, with_window
from autoregressive.models.sampling import SamplingConfig
from autoregressive.models.trunk import Conditions, Trunk


@torch.inference_mode()
def plan_for_slots(model: Trunk) -> Plan | None:
    """Return the plan of passes of one step; None where images in slots could not be those of `generate`.

    That is so on an accelerator, where a CPU rounds a row by the rows beside it, and with a layout that has no windows.
    """
    weight, layout = model.tok_embeddings.weight, model.layout
    if weight.device.type != "cpu" or any(not condition.rows for condition in model.conditions.values()):
        return None
    rows = 1 + machine(weight.device).cache_rows(layout.cache_rows)
    try:
        plan = with_window(plan_for(layout, SamplingConfig(), rows, weight.device, weight.dtype), 1, model, 1)
    except ValueError:
        return None
    return plan if plan.window else None


class Slots:
    """A model's decode state of `count` images that come and go.

    plan: of plan_for_slots. window: tokens of a pass as `generate` takes them; "auto" goes by the images in flight.
    """

    def __init__(self, model: Trunk, count: int, plan: Plan, window: int | str = 0):
        self.model, self.count, self.plan, self.window = model, count, plan, window
        self.plans: dict[int, Plan] = {}  # by samples
        self.cache = self._new_cache(2 * count, plan.longest + (not plan.side_by_side))
        self.state = DecodeState(model, plan.layout, self.cache, count)
        self.configs: list[SamplingConfig | None] = [None] * count
        self.cursors, self.last_guided = [plan.end] * count, [0] * count
        self.state.cursor.fill_(plan.end)
        self.state.ordered = model.any_order

    def _new_cache(self, samples: int, rows: int) -> StaticCache:
        weight, args = self.model.tok_embeddings.weight, self.model.args
        width = machine(weight.device).cache_width(args.dim // args.n_head)
        return StaticCache(len(self.model.layers), samples, args.kv_heads, rows, width, weight.device, weight.dtype)

    @property
    def free(self) -> list[int]:
        """Slots without an image, the last first: a pass computes the slots from the first one with an image on."""
        return [slot for slot in reversed(range(self.count)) if self.configs[slot] is None]

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Make the model ready for passes in the block."""
        with torch.inference_mode(), sampling_mode(self.model):
            yield

    def admit(
        self,
        slots: Sequence[int],
        configs: Sequence[SamplingConfig],
        noise: Sequence[Tensor],
        cond: Conditions,
        emb_masks: Tensor | None = None,
        *,
        negative: Conditions | None = None,
        negative_masks: Tensor | None = None,
        known: Tensor | None = None,
        orders: Tensor | None = None,
    ) -> None:
        """Prefill free slots and draw the first tokens of their images.

        noise: (N,) of each image, of its settings' draw. The other arguments are those of `generate`.
        """
        state, layout, index = self.state, self.model.layout, torch.tensor(slots)
        if self.plan.side_by_side and len(self.free) == self.count:
            self.cache.lay_out(self.plan.kind(1, 1).length)
        for slot, config, each in zip(slots, configs, noise, strict=True):
            self.configs[slot], self.last_guided[slot] = config, replace(self.plan, config=config).last_guided
            state.noise[config.draw][slot, :-1] = each
            state.numbers[slot] = torch.tensor(config.numbers)
            state.scales[slot, :-1] = torch.tensor(config.scales(layout.tokens))
            state.guided[slot] = state.guided_tokens(config)
        state.tokens[index], state.known[index], state.spread[index] = 0, -1, 0
        state.orders[index] = layout.order if orders is None else orders
        if known is not None:
            state.known[index, :-1] = known.gather(1, state.orders[index])
        masks = masks_with_nulls(emb_masks, negative_masks)
        samples = torch.cat([index, (2 * self.count - 1 - index).flip(0)])
        state.seen[samples] = True
        if masks is not None:
            state.seen[samples, : masks.shape[1]] = masks.bool()

        part = state.part(index, samples, self._new_cache(len(samples), layout.prefix))
        part.groups, part.drafter = groups(configs), draft_from_last
        conditions, _ = embed_streams(self.model, cond, negative, guided=True)
        logits = prefill(self.model, conditions, part, masks)
        first = layout.passes[0].outputs.stop
        logits = decode_step.draw_tokens(logits, part, None, part.count[:first].expand(len(slots), -1))
        window = self._plan(2 * len(slots)).window
        assert window
        decode_step.draft_tokens(logits, part, part.places(torch.full((len(slots),), first), window.outputs))
        state.tokens[index], state.spread[index], state.cursor[index] = part.tokens, part.spread, 1
        if state.context is not None and part.context is not None:
            state.context[samples] = part.context
        for mine, new in zip((*self.cache.keys, *self.cache.values), (*part.cache.keys, *part.cache.values)):
            mine[samples, :, : layout.prefix] = new
        for slot in slots:
            self.cursors[slot] = 1

    def _plan(self, samples: int) -> Plan:
        """Return the plan of a pass over so many samples."""
        if samples not in self.plans:
            plan = with_window(replace(self.plan, window=None), self.window, self.model, samples)
            self.plans[samples] = plan if plan.window else self.plan
        return self.plans[samples]

    def take_pass(self) -> None:
        """Draw the next tokens of every image that is not whole."""
        running = {slot: cursor for slot, cursor in enumerate(self.cursors) if cursor < self.plan.end}
        if not running:
            return
        count = self.count - min(running)
        streams = 2 if any(cursor <= self.last_guided[slot] for slot, cursor in running.items()) else 1
        plan = self._plan(count * streams)
        assert plan.window
        kind = plan.kind(min(running.values()), max(running.values()))
        kind = replace(kind, streams=streams, guided=None if streams == 2 else False)
        if plan.side_by_side:  # the cache grows until no image is in flight: each other length would move all of it
            kind = replace(kind, length=max(kind.length, min(self.cache.rows, plan.longest)))
            self.cache.lay_out(kind.length)
        part = self.state.last(count)
        part.limits = torch.tensor(plan.window.limits)
        part.groups = groups(self.configs[self.count - count :])
        part.drafter = draft_from_last if plan is not self.plan else as_drafted
        decode_step.take_pass(self.model, part, kind, decode_rows)
        self.cursors = self.state.cursor.tolist()

    def done(self, slot: int) -> int:
        """Return how many tokens of a slot's image are drawn."""
        return self.model.layout.passes[self.cursors[slot] - 1].outputs.stop

    def tokens(self, slot: int) -> Tensor:
        """Return the tokens of a slot's image in raster order, int64 (N,), drafts where they are not drawn."""
        return self.state.tokens[slot, self.state.orders[slot].argsort()]

    def release(self, slot: int) -> bool:
        """Free a slot. Returns whether the logits of its image were finite."""
        self.configs[slot], self.cursors[slot], self.state.cursor[slot] = None, self.plan.end, self.plan.end
        finite = bool(self.state.spread[slot, :-1].isfinite().all())
        if not finite:  # a NaN would reach later images even through masked rows
            for tensor in (*self.cache.keys, *self.cache.values):
                tensor[[slot, 2 * self.count - 1 - slot]] = 0
        return finite

    def clear(self) -> None:
        """Free every slot, after a failure."""
        for slot in range(self.count):
            self.release(slot)
        self.cache.clear()


def groups(configs: Sequence[SamplingConfig | None]) -> list[tuple[SamplingConfig, slice | Tensor]]:
    """Group images by the operations on their logits. Returns settings and images of each group; None stands for no image."""
    found: dict[tuple, tuple[SamplingConfig, list[int]]] = {}
    for image, config in enumerate(configs):
        if config is not None:
            found.setdefault(config.operations, (config, []))[1].append(image)
    one = len(found) == 1  # those without an image are computed with it
    return [(config, slice(None) if one else torch.tensor(images)) for config, images in found.values()]
