"""The engine that needs nothing but torch: requests share the decode passes of one thread.

    engine = NativeEngine(pipeline, "c2i_L_384")
    async with aclosing(engine.generate(Request({"label": 207}))) as tokens:
        async for so_far in tokens: ...

On a CPU the engine has as many slots as the pipeline has images in a batch, and a request enters a free one before any
decode pass, whatever its settings (models/slots.py). Elsewhere a micro-batch is of requests with equal sampling settings, in
the order in which they came, and is drawn to its end. A request's image is that of `pipeline([label], seed=request.seed, …)`,
whatever it was drawn with.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from autoregressive.editing import ROUNDS, Edited, Hole, fill_holes
from autoregressive.models.layouts import Layout
from autoregressive.models.sampling import NotFiniteLogits
from autoregressive.models.slots import Slots, plan_for_slots
from autoregressive.pipeline import ImagePipeline, OnStep
from autoregressive.request import Request
from autoregressive.serve.engine import NOT_DRAWN, model_info
from utils.errors import NotFiniteError

log = logging.getLogger(__name__)

# A decode step ends sooner; a worker that takes longer hangs, and is left to the end of the process.
SECONDS_TO_CLOSE = 30

# After so long the worker takes up what else waits for it, such as prompts to encode.
SECONDS_AT_ONCE = 0.1


class _Abandoned(Exception):
    """Ends a decode loop of which nobody waits for the result."""


@dataclass(eq=False)
class _Job:
    """A request. news: its tokens as they come, then all of them or an error. closed: nobody waits for it any more."""

    request: Request
    news: asyncio.Queue = field(default_factory=asyncio.Queue)
    closed: bool = False


class NativeEngine:
    """Serves a pipeline (engine.py tells what an engine is), in one event loop. The pipeline is its alone until it is closed.

    name: of the model. gather: seconds that a request waits for others to be drawn with, where there are no slots. thread: the
    worker. slots: None where a batch is drawn to its end. A request that is closed early is not begun, or leaves its slot
    before the next pass; of a micro-batch that runs, the rest is skipped once all are closed. An edit is drawn alone, between
    the passes of others, which wait for it.
    """

    edits = True

    def __init__(self, pipeline: ImagePipeline, name: str = "native", gather: float = 0.005):
        if extra := ", ".join(name for name in pipeline.gpt.args.extra_conditions if name != "control"):
            raise ValueError(
                f"the server draws from a class or a prompt, and a control image; this model is conditioned on {extra} too"
            )
        self.info = model_info(pipeline.gpt, name, pipeline.image_size)
        self.pipeline = pipeline
        self.dead = False
        plan = None if pipeline.compile else plan_for_slots(pipeline.gpt)
        self.slots = plan and Slots(pipeline.gpt, pipeline.batch_size, plan, pipeline.window)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="native engine")
        self._gather = gather
        self._waiting: list[_Job] = []
        self._in_slots: dict[int, _Job] = {}
        self._gathering: asyncio.Task | None = None

    def check(self, request: Request) -> None:
        """Raise ValueError for a label, features or a setting that the model cannot take."""
        known, given = self.pipeline.gpt.conditions, request.conditions
        if "control" in known and "control" in given:  # it is encoded in the worker, where it is drawn
            request = replace(request, conditions={**given, "control": known["control"].example()})
        self.pipeline.layout(request.read(known))

    async def _read(self, request: Request) -> Request:
        """Return a request with its values read, its control image in the worker. Raises RuntimeError in a closed engine."""
        if self.dead:
            raise RuntimeError("the engine is closed")
        known = self.pipeline.gpt.conditions
        if "control" not in known:
            return request.read(known)
        return await asyncio.get_running_loop().run_in_executor(self.thread, request.read, known)

    async def generate(self, request: Request) -> AsyncIterator[list[int]]:
        """Yield the tokens so far after every so many as a row of the image has."""
        self.check(request)
        request = await self._read(request)
        job = _Job(replace(request, order=self.pipeline.order(request)))
        if self.dead:
            raise RuntimeError("the engine is closed")
        self._waiting.append(job)
        self._gathering = self._gathering or asyncio.create_task(self._draw_what_waits())
        try:
            tokens: list[int] = []
            while len(tokens) < self.info.tokens or NOT_DRAWN in tokens:
                tokens = await job.news.get()
                if isinstance(tokens, Exception):
                    raise tokens
                yield tokens
        finally:
            job.closed = True
            with suppress(ValueError):  # the worker took it
                self._waiting.remove(job)

    async def edit(
        self, request: Request, hole: Hole, rounds: int = ROUNDS, keep_pixels: bool = True
    ) -> AsyncIterator[list[int] | Edited]:
        """Yield [] after each pass of an edit, then the picture."""
        request = await self._read(request)
        loop, job = asyncio.get_running_loop(), _Job(request)

        def on_step(done: int, tokens: Tensor) -> None:
            if self.dead or job.closed:
                raise _Abandoned
            loop.call_soon_threadsafe(job.news.put_nowait, [])

        def draw() -> Edited:
            on_step(0, torch.empty(0))
            more = {"rounds": rounds, "keep_pixels": keep_pixels, "on_step": on_step}
            return fill_holes(self.pipeline, [hole], [request], **more)[0]

        def tell(done: asyncio.Future) -> None:
            job.news.put_nowait(RuntimeError("the engine was closed") if done.cancelled() else done.result())

        loop.run_in_executor(self.thread, outcome, draw).add_done_callback(tell)
        try:
            while isinstance(news := await job.news.get(), list):
                yield news
            if isinstance(news, Exception):
                raise news
            yield news
        finally:
            job.closed = True

    async def close(self) -> None:
        """End the worker, after the decode step or the call that it is at."""
        if self.dead:
            return
        self.dead = True
        self.thread.shutdown(wait=False, cancel_futures=True)
        if self._gathering and (await asyncio.wait([self._gathering], timeout=SECONDS_TO_CLOSE))[1]:
            log.error(f"the native engine's worker has hung for {SECONDS_TO_CLOSE} s and is left behind")
        for job in (*self._waiting, *self._in_slots.values()):
            job.news.put_nowait(RuntimeError("the engine was closed"))

    async def _draw_what_waits(self) -> None:
        loop = asyncio.get_running_loop()
        while self.slots and (self._waiting or self._in_slots) and not self.dead:
            await loop.run_in_executor(self.thread, self._draw_in_slots, loop)
        while self._waiting and not self.dead:
            if len(self._waiting) < self.pipeline.batch_size:
                await asyncio.sleep(self._gather)
            # The first in the line, and those behind it that can be drawn with it.
            kind = self.pipeline.kind(self._waiting[0].request)
            same = [job for job in self._waiting if self.pipeline.kind(job.request) == kind]
            batch = same[: self.pipeline.batch_size]
            self._waiting = [job for job in self._waiting if job not in batch]
            if batch and not self.dead:
                results = await loop.run_in_executor(self.thread, self._draw, batch, loop)
                for job, result in zip(batch, results, strict=True):
                    job.news.put_nowait(result)
        self._gathering = None

    def _draw_in_slots(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take passes in the worker for a while."""

        def tell(job: _Job, news: list[int] | Exception) -> None:
            loop.call_soon_threadsafe(job.news.put_nowait, news)

        try:
            with self.slots.drawing():
                broken = self._take_passes(tell)
        except Exception as error:  # whatever it is, the next images may do well
            log.exception("a decode pass failed")
            for job in self._in_slots.values():
                tell(job, RuntimeError(f"drawing failed: {error}"))
            self._in_slots.clear()
            self.slots.clear()
            return
        for job in broken:  # perhaps by a draft alone
            tell(job, self._results([job], None)[0])

    def _take_passes(self, tell: Callable[[_Job, list[int] | Exception], None]) -> list[_Job]:
        """Take passes until no slot has an image, some logits are not finite, or it is time for others to use the worker.

        Returns the requests with such logits.
        """
        slots, jobs, layout = self.slots, self._in_slots, self.pipeline.gpt.layout
        broken: list[_Job] = []
        until = time.monotonic() + SECONDS_AT_ONCE
        while not (broken or self.dead) and time.monotonic() < until:
            entering: dict[int, _Job] = {}
            for slot in slots.free:
                with suppress(IndexError):  # none waits
                    entering[slot] = self._waiting.pop(0)
            if entering:
                jobs |= entering
                requests = [job.request for job in entering.values()]
                noise = [self.pipeline.noise(request) for request in requests]
                configs = [request.sampling for request in requests]
                slots.admit([*entering], configs, noise, **self.pipeline.inputs(requests))
            if not jobs:
                break
            before = {slot: slots.done(slot) // layout.grid_size for slot in jobs}
            slots.take_pass()
            for slot, job in list(jobs.items()):
                done, rows = slots.done(slot), slots.done(slot) // layout.grid_size
                if job.closed or done == self.info.tokens:
                    tokens = slots.tokens(slot).tolist()
                    del jobs[slot]
                    if not slots.release(slot):
                        broken.append(job)
                    elif not job.closed:
                        tell(job, tokens)
                elif rows > before[slot]:
                    tell(job, so_far(slots.state.tokens[slot], done, layout, job.request.order))
        return [job for job in broken if not job.closed]

    def _draw(self, batch: list[_Job], loop: asyncio.AbstractEventLoop) -> list[list[int] | Exception]:
        """Draw a micro-batch in the worker and tell of its rows. Returns each image's tokens, or its error."""
        layout, rows_shown = self.pipeline.gpt.layout, 0

        def on_step(done: int, tokens: Tensor) -> None:
            nonlocal rows_shown
            if self.dead or all(job.closed for job in batch):
                raise _Abandoned
            # A whole row is what can be shown; reading each token would have an accelerator wait at every step.
            rows = done // layout.grid_size
            if done < self.info.tokens and rows > rows_shown:
                rows_shown = rows
                for job, sequence in zip(batch, tokens.cpu()):
                    shown = so_far(sequence, done, layout, job.request.order)
                    loop.call_soon_threadsafe(job.news.put_nowait, shown)

        return self._results(batch, on_step)

    def _results(self, batch: list[_Job], on_step: OnStep | None) -> list[list[int] | Exception]:
        """Return the tokens of each image of a batch, or its error."""
        drawn = outcome(lambda: self.pipeline.draw([job.request for job in batch], on_step=on_step).tolist())
        if isinstance(drawn, NotFiniteLogits):
            broken = [drawn.of(slice(i, i + 1)) for i in range(len(batch))]
            return [drawn.tokens[i].tolist() if each is None else each for i, each in enumerate(broken)]
        return [drawn] * len(batch) if isinstance(drawn, Exception) else drawn


def outcome(draw: Callable[[], Any]) -> Any:
    """Return what a call in the worker returns, or the error for its requests."""
    try:
        return draw()
    except _Abandoned:
        return RuntimeError("the engine was closed")
    except NotFiniteError as error:
        return error
    except Exception as error:  # whatever it is, the next ones may do well
        log.exception("drawing failed")
        return RuntimeError(f"drawing failed: {error}")


def so_far(sequence: Tensor, done: int, layout: Layout, order: Tensor | None = None) -> list[int]:
    """Return the first `done` tokens of a sequence (N or more,) as an engine yields them, of a raster image its whole rows.

    order: of the image, where that is not the layout's.
    """
    if layout.is_raster and order is None:
        return sequence[: done - done % layout.grid_size].tolist()
    image = torch.full((layout.tokens,), NOT_DRAWN)
    return image.scatter(0, (layout.order if order is None else order)[:done], sequence[:done]).tolist()
