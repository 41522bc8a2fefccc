"""Filling a hole in an image by sequential Monte Carlo: what is kept after the hole decides too, in any layout.

    filled = fill(model, labels, known, [(seed, 0)], particles=16, cfg_scale=2.0)     # known: (B, N), -1 in the hole
    filled.tokens, filled.log_evidence, filled.effective

Copying known tokens while an image is drawn shows the hole nothing of what comes after it in the layout's order. Here K
particles draw the hole, each with its own noise; a stretch of known tokens weighs each by how likely its draw makes them,
and below K/2 effective particles they are resampled, tokens and cache rows. One is taken by its weight in the end. The
target is, over the hole, the product of the sampling distribution at drawn tokens and of the unfiltered one at known
tokens: without guidance and filters the model's posterior, reached as K grows. The estimate of the known tokens' probability has no
bias at any K (Del Moral, Feynman-Kac Formulae, 2004, section 7.4).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoregressive.models import decode_step
from autoregressive.models.decode_step import DecodeState, prefill
from autoregressive.models.generate import (
    broken_steps,
    cache_for,
    check_known,
    cleared_after_errors,
    embed_streams,
    image_order,
    known_first,
    masks_with_nulls,
    sampling_mode,
)
from autoregressive.models.machine import machine
from autoregressive.models.plans import PassKind, Plan, plan_for, with_window
from autoregressive.models.sampling import NotFiniteLogits, SamplingConfig, race
from autoregressive.models.trunk import Conditions, Trunk
from utils.rng import item_seed, order_seed, particle_noise

PARTICLES = 16
# Rows of all particles that a pass over known tokens computes at most; their logits are kept at once.
ROWS_AT_ONCE = 1024
# Settings under which a known token, which is not drawn, costs no noise and no filter.
UNDRAWN = SamplingConfig(temperature=0)


@dataclass(frozen=True)
class Filled:
    """Images whose holes are filled."""

    tokens: Tensor  # int64 (B, N) in raster order
    scores: Tensor  # float32 (B, N) in raster order, each token's log-probability in the unfiltered distribution
    log_evidence: list[float]  # of each image, the estimated log-probability of its known tokens
    effective: list[
        float
    ]  # of each image, the sample size after the last known token; below 2 it is one particle's luck
    particles: int  # that were drawn; 1 where no known token comes after the hole, which is exact


@torch.inference_mode()
def fill(
    model: Trunk,
    cond: Conditions,
    known: Tensor,
    images: Sequence[tuple[int, int]],
    emb_masks: Tensor | None = None,
    *,
    particles: int = PARTICLES,
    negative: Conditions | None = None,
    negative_masks: Tensor | None = None,
    orders: Tensor | None = None,
    window: int | str = 0,
    on_step: Callable[[int, Tensor], None] | None = None,
    **settings: Any,
) -> Filled:
    """Fill one hole in each of some images.

    Image b is a function of its seed and number, the particles, its known tokens and its conditions; the hole is the same in
    all images of a call. With one particle it is that of `generate` with these known tokens and its noise.

    known: int64 (B, N) in raster order, tokens that are kept, -1 in the hole.
    images: seed and number of each image. particles: K, drawn for each image.
    cond, emb_masks, negative, negative_masks, orders, window, settings: as `generate` takes them.
    on_step: called after each pass with the number of tokens done and the first particles' tokens, (B, N) in the layout's order.
    Raises ValueError for particles below 1, particles without the draw race1, known tokens that do not fit, or settings out
    of range, and NotFiniteLogits where images were drawn from logits that are not finite.
    """
    config, weight = SamplingConfig(**settings), model.tok_embeddings.weight
    config.check_particles(particles)
    model.check_conditions(cond, negative)
    device, batch = weight.device, len(images)
    check_known(known, batch, model)
    known = known.to(device)
    layout = model.layout.adapted(config.steps, config.repulsion, known_first(known, orders))
    if orders is None and (layout.own_orders or config.order == "random"):  # known tokens come first
        each = zip(images, known.cpu(), strict=True)
        orders = torch.stack([image_order(layout, config, order_seed(*image), own) for image, own in each])
    given = None if orders is None else model.as_orders(orders, batch)
    sequence = layout.order.to(device).repeat(batch, 1) if given is None else given
    holes = (known.gather(1, sequence) < 0).tolist()
    hole = holes[0]
    if any(other != hole for other in holes):
        raise ValueError("the images of a call have their holes at the same places of the order")
    passes = layout.passes
    is_open = [any(hole[step.outputs]) for step in passes]
    first = is_open.index(True) if any(is_open) else len(passes)
    informed = first < len(passes) and not all(hole[passes[first].outputs.stop :])
    count = particles if informed else 1  # otherwise all particles weigh the same

    with sampling_mode(model):
        masks = masks_with_nulls(emb_masks, negative_masks) if config.guided else emb_masks
        streams = 2 if config.guided else 1
        samples = batch * count * streams
        cache, here = cache_for(model, samples, device, weight.dtype), machine(device)
        plan = plan_for(layout, config, cache.rows, device, weight.dtype, padded=masks is not None)
        windowed = with_window(plan, window, model, samples)
        conditions, added = embed_streams(model, cond, negative, config.guided)
        noise = torch.stack([particle_noise(*image, layout.tokens, count, config.draw) for image in images])

        def begun(copies: int) -> DecodeState:
            """Return the state of so many particles of each image, in which known tokens stand."""
            state, own = DecodeState(model, layout, cache, batch * copies), torch.arange(batch, device=device)
            own = own.repeat_interleave(copies)
            rows = samples_of(own, batch, streams)
            real, more = (None if x is None else x[rows] for x in (masks, added))
            drawn_with, places = noise[:, :copies].flatten(0, 1), None if given is None else given[own]
            state.begin(windowed, drawn_with, real, known[own], more, None, places)
            state.guided.copy_(state.guided_tokens(config))
            state.tokens.copy_(state.known.clamp(min=0))
            state.weighs = True
            if config.greedy:
                state.numbers[:, 0] = 1  # a temperature of 0 gives known tokens no probability
            return state

        with cleared_after_errors(cache), here.attention_kernels(False):
            cache.lay_out(plan.kind(min(1, len(passes) - 1), 1).length if plan.side_by_side else cache.rows)
            loop = _Loop(model, plan, windowed, begun(1), on_step, batch)
            logits = prefill(model, conditions, loop.state, masks)
            first_tokens = passes[0].outputs.stop
            if first:
                loop.draw_first(logits, first_tokens)
                loop.read(1, first)
            alone, own = loop.state, torch.arange(batch, device=device).repeat_interleave(count)
            move_samples(cache, samples_of(own, batch, streams))
            loop.state = state = begun(count)
            state.spread.copy_(alone.spread[own])
            state.likelihood.copy_(alone.likelihood[own])
            if state.context is not None and alone.context is not None:
                state.context[:samples] = alone.context[samples_of(own, batch, streams)]
            if not first:
                logits = logits.unflatten(0, (streams, batch)).repeat_interleave(count, 1).flatten(0, 1)
                loop.draw_first(logits, first_tokens)

            places = torch.tensor([not each for each in hole])
            seen = passes[first].outputs.start if first < len(passes) else layout.tokens
            evidence = sums(state.likelihood[::count, :seen], places[:seen])  # (B,), of what comes before the hole
            weights = np.zeros((batch, count))  # logarithms, since the last resampling
            effective = np.full(batch, float(count))
            step = max(first, 1)
            while step < len(passes):
                stop = next((i for i in range(step, len(passes)) if is_open[i] != is_open[step]), len(passes))
                if not is_open[step]:
                    loop.read(step, stop)
                    step = stop
                    continue
                done = passes[step].outputs.start
                if places[seen:done].any():
                    weights += sums(state.likelihood[:, seen:done], places[seen:done]).reshape(batch, count)
                    seen = done
                    effective = effective_sizes(weights)
                    chosen = np.arange(batch * count).reshape(batch, count)
                    for b in np.flatnonzero(effective < count / 2):
                        evidence[b] += log_mean(weights[b])
                        chosen[b] = chosen[b, resampled(weights[b], item_seed(*images[int(b)], done, 4))]
                        weights[b] = 0
                    loop.keep(torch.from_numpy(chosen.ravel()).to(device))
                # Steps with known tokens among the drawn ones weigh as well: particles may be resampled after each.
                mixed = (i + 1 for i in range(step, stop) if places[passes[i].outputs].any())
                stop = next(mixed, stop)
                loop.draw(step, stop)
                step = stop
            if places[seen:].any():
                weights += sums(state.likelihood[:, seen:-1], places[seen:]).reshape(batch, count)
                effective = effective_sizes(weights) if informed else effective

        evidence += [log_mean(own) for own in weights]
        raster = sequence.argsort(1)
        finite = state.spread[:, :-1].isfinite().unflatten(0, (batch, count)).all(1)
        if not finite.all():
            if windowed.window:  # perhaps by a draft alone
                cache.clear()
                return fill(
                    model, cond, known, images, emb_masks, particles=particles, orders=orders,
                    negative=negative, negative_masks=negative_masks, on_step=on_step, **settings,
                )  # fmt: skip
            tokens = state.tokens[::count, :-1].gather(1, raster)
            raise NotFiniteLogits(broken_steps(finite.tolist(), layout), tokens, weight.dtype)
        best = [b * count + picked(weights[b], item_seed(*image, layout.tokens, 5)) for b, image in enumerate(images)]
        tokens, scores = (x[best, :-1].gather(1, raster) for x in (state.tokens, state.likelihood))
        return Filled(tokens, scores, evidence.tolist(), effective.tolist(), count)


class _Loop:
    """Passes over the particles of all images: over known tokens many steps at once, over holes as `generate` takes them."""

    def __init__(self, model: Trunk, plan: Plan, windowed: Plan, state: DecodeState, on_step: Any, images: int):
        self.model, self.plan, self.windowed, self.state = model, plan, windowed, state
        self.on_step, self.images = on_step, images
        self.guided = None if plan.config.guided and plan.config.cfg_interval >= 0 else plan.config.guided

    def draw_first(self, logits: Tensor, tokens: int) -> None:
        """Draw the tokens that the prefill predicts."""
        state = self.state
        decode_step.draw_tokens(logits, state, self.plan.config.guided, state.count[:tokens].expand(state.batch, -1))
        self._tell(1)

    def read(self, start: int, stop: int) -> None:
        """Read known tokens of the steps from `start` to `stop`."""
        state, passes, groups = self.state, self.plan.layout.passes, self.state.groups
        most = ROWS_AT_ONCE // (state.batch // self.images * (2 if self.plan.config.guided else 1))
        if not all(self.plan.layout.kept):
            most = 0  # later steps overwrite rows that earlier ones need
        state.groups = [(UNDRAWN, slice(None))]
        while start < stop:
            end, rows = start + 1, len(passes[start].rows)
            while end < stop and rows + len(passes[end].rows) <= most:
                rows += len(passes[end].rows)
                end += 1
            kind = self.plan.kind(start, start)
            if end > start + 1:
                outputs = passes[end - 1].outputs.stop - passes[start].outputs.start
                length = self.plan.kind(end - 1, end - 1).length
                kind = replace(kind, rows=rows, outputs=outputs, length=length, masked=True)
                kind = replace(kind, guided=self.guided if kind.streams == 2 else False)
            self._take(kind, start, end)
            start = end
        state.groups = groups

    def draw(self, start: int, stop: int) -> None:
        """Draw the steps from `start` to `stop`."""
        if not self.windowed.window:
            for step in range(start, stop):
                self._take(self.plan.kind(step, step), step, step + 1)
            return
        state = self.state
        state.limits.copy_(torch.tensor(self.windowed.window.limits).clamp(max=stop))
        state.cursor.fill_(start)
        least = most = start
        while least < stop:
            self._take(self.windowed.kind(least, most))
            least, most = torch.stack(state.cursor.aminmax()).tolist()

    def keep(self, chosen: Tensor) -> None:
        """Put the particle `chosen[p]` in the place of p: tokens, their likelihood and rows of the cache."""
        state = self.state
        state.tokens, state.likelihood = state.tokens[chosen], state.likelihood[chosen]
        move_samples(state.cache, samples_of(chosen, state.batch, 2 if self.plan.config.guided else 1))

    def _take(self, kind: PassKind, start: int | None = None, stop: int | None = None) -> None:
        if self.plan.side_by_side:
            self.state.cache.lay_out(kind.length)
        if start is not None:
            self.state.cursor.fill_(start)
        decode_step.take_pass(self.model, self.state, kind, decode_step.decode_rows)
        self._tell(stop if stop is not None else int(self.state.cursor.min()))

    def _tell(self, step: int) -> None:
        if self.on_step:
            tokens = self.state.tokens[:: self.state.batch // self.images, :-1]
            self.on_step(self.plan.layout.passes[step - 1].outputs.stop, tokens)


def samples_of(images: Tensor, count: int, streams: int) -> Tensor:
    """Return the samples of the cache that images of `count` have, in the order of decode_step.both."""
    return images if streams == 1 else torch.cat([images, (2 * count - 1 - images).flip(0)])


def move_samples(cache: Any, samples: Tensor) -> None:
    """Put the sample `samples[i]` of a cache in the place of sample i, for every i."""
    if not samples.equal(torch.arange(len(samples), device=samples.device)):
        for tensor in (*cache.keys, *cache.values):
            tensor[: len(samples)] = tensor[samples]


def sums(likelihood: Tensor, places: Tensor) -> np.ndarray:
    """Return the sum of each row (n, L) over `places`, bool (L,), in float64 and one fixed order."""
    kept = likelihood[:, : len(places)].cpu().numpy().astype(np.float64)[:, places.numpy()]
    return np.cumsum(kept, axis=1)[:, -1] if kept.shape[1] else np.zeros(len(kept))


def effective_sizes(weights: np.ndarray) -> np.ndarray:
    """Return the effective sample size, (sum w)² / sum w², of rows of log-weights (B, K)."""
    w = np.exp(weights - weights.max(axis=1, keepdims=True))
    return w.sum(axis=1) ** 2 / (w**2).sum(axis=1)


def log_mean(weights: np.ndarray) -> float:
    """Return the logarithm of the mean of weights that are given by their logarithms, (K,)."""
    return float(weights.max() + np.log(np.exp(weights - weights.max()).mean()))


def resampled(weights: np.ndarray, seed: int) -> np.ndarray:
    """Choose K particles by log-weights (K,), systematically: at (u + 0 … K-1) / K of the running sum of weights."""
    running = np.cumsum(np.exp(weights - weights.max()))
    at = ((seed >> 10) / 2**53 + np.arange(len(weights))) / len(weights) * running[-1]
    return np.searchsorted(running, at, side="right").clip(max=len(weights) - 1)


def picked(weights: np.ndarray, key: int) -> int:
    """Choose a particle by log-weights (K,), in a race."""
    return int(race(torch.from_numpy(weights - weights.max()).float(), torch.tensor(key)))
