"""The engine that needs nothing but torch: requests gathered into micro-batches of ImagePipeline, in one thread.

    engine = NativeEngine(pipeline, "c2i_L_384")
    async with aclosing(engine.generate(Request({"label": 207}, seed=0))) as tokens:
        async for so_far in tokens: ...

A micro-batch is of requests with equal sampling settings, in the order in which they came, and is drawn to its end. A
request's image is that of `pipeline([label], seed=request.seed, …)`, whatever it was drawn with.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from autoregressive.models.sampling import NotFiniteLogits
from autoregressive.pipeline import ImagePipeline
from autoregressive.request import Request
from autoregressive.serve.engine import ModelInfo, TokenClock

log = logging.getLogger(__name__)
Result = TypeVar("Result")

# A decode step ends sooner; a worker that takes longer hangs, and is left to the end of the process.
SECONDS_TO_CLOSE = 30


class _Abandoned(Exception):
    """Ends a decode loop of which nobody waits for the result."""


class _Job:
    """A request and what is known of its tokens."""

    def __init__(self, request: Request):
        self.request = request
        self.closed = False  # nobody waits for it any more
        self.tokens: list[int] = []
        self.error: Exception | None = None
        self.news = asyncio.Event()

    def tell(self, tokens: list[int], error: Exception | None = None) -> None:
        """Wakes who waits for the tokens. Called in the event loop."""
        self.tokens, self.error = tokens, error
        self.news.set()


class NativeEngine:
    """Serves a pipeline (engine.py tells what an engine is), in one event loop. The pipeline is its alone until it is closed.

    name: of the model. gather: seconds that a request waits for others to be drawn with.
    A request that is closed early is not begun; of a micro-batch that runs, the rest is skipped once all are closed.
    """

    def __init__(self, pipeline: ImagePipeline, name: str = "native", gather: float = 0.005):
        args, layout = pipeline.gpt.args, pipeline.gpt.layout
        if args.extra_conditions:
            names = ", ".join(args.extra_conditions)
            raise ValueError(
                f"the server draws from a class or a prompt alone; this model is conditioned on {names} too"
            )
        self.info = ModelInfo(
            name=name,
            kind=args.model_type,
            image_size=pipeline.image_size,
            tokens=layout.tokens,
            num_classes=0 if pipeline.text else args.num_classes,
            raster=layout.is_raster,
            classes=tuple(pipeline.gpt.file_config.get("classes", ())),
        )
        self.pipeline = pipeline
        self.dead = False
        self._gather = gather
        self._clock = TokenClock()
        self._waiting: list[_Job] = []
        self._gathering: asyncio.Task | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="native engine")

    def token_age(self) -> float | None:
        """Seconds since the last decode step, or since a call began, while anything is in flight; None where nothing is."""
        return self._clock.age()

    def check(self, request: Request) -> None:
        """Raises ValueError for a label, features or a setting that the model cannot take."""
        request.read(self.pipeline.gpt.conditions)

    async def generate(self, request: Request) -> AsyncIterator[list[int]]:
        """Yields the tokens so far after each row of the image, in raster order; what comes too fast is passed over."""
        job = _Job(request.read(self.pipeline.gpt.conditions))
        self._require_open()
        self._waiting.append(job)
        if self._gathering is None:
            self._gathering = asyncio.create_task(self._draw_what_waits())
        try:
            with self._clock:
                done = 0
                while done < self.info.tokens:
                    await job.news.wait()
                    job.news.clear()
                    if job.error is not None:
                        raise job.error
                    done = len(job.tokens)
                    yield job.tokens
        finally:
            job.closed = True
            if job in self._waiting:
                self._waiting.remove(job)

    async def run(self, function: Callable[[], Result]) -> Result:
        """Calls the function in the worker, before the next micro-batch.

        For work that would only slow a decode loop down, and be slowed down by it: both want all cores.
        """
        self._require_open()

        def call() -> Result:
            self._require_open()
            self._clock.tick()
            try:
                return function()
            finally:
                self._clock.tick()

        with self._clock:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def close(self) -> None:
        """Ends the worker, after the decode step or the call that it is at."""
        if self.dead:
            return
        self.dead = True
        last = asyncio.get_running_loop().run_in_executor(self._thread, lambda: None)
        self._thread.shutdown(wait=False)
        _, hanging = await asyncio.wait([last, *filter(None, [self._gathering])], timeout=SECONDS_TO_CLOSE)
        if hanging:
            log.error(f"the native engine's worker has hung for {SECONDS_TO_CLOSE} s and is left behind")
        for job in self._waiting:
            job.tell([], RuntimeError("the engine was closed"))

    def _require_open(self) -> None:
        if self.dead:
            raise RuntimeError("the engine is closed")

    async def _draw_what_waits(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting and not self.dead:
            if len(self._waiting) < self.pipeline.batch_size:
                await asyncio.sleep(self._gather)
            if (batch := self._next_batch()) and not self.dead:
                results = await loop.run_in_executor(self._thread, self._draw, batch, loop)
                for job, result in zip(batch, results, strict=True):
                    job.tell(*result)
        self._gathering = None

    def _next_batch(self) -> list[_Job]:
        """The first in the line, and those behind it that want the same settings."""
        same = [job for job in self._waiting if job.request.sampling == self._waiting[0].request.sampling]
        batch = same[: self.pipeline.batch_size]
        self._waiting = [job for job in self._waiting if job not in batch]
        return batch

    def _draw(self, batch: Sequence[_Job], loop: asyncio.AbstractEventLoop) -> list[tuple[list[int], Exception | None]]:
        """Draws a micro-batch in the worker. Returns each image's tokens, and its error."""
        row = self.pipeline.gpt.layout.grid_size

        def on_step(done: int, tokens: Tensor) -> None:
            self._clock.tick()
            if self.dead or all(job.closed for job in batch):
                raise _Abandoned
            # A whole row is what can be shown; reading each token would have an accelerator wait at every step.
            if self.info.raster and done % row == 0 and done < self.info.tokens:
                for job, so_far in zip(batch, tokens[: len(batch), :done].tolist()):
                    loop.call_soon_threadsafe(job.tell, so_far)

        self._clock.tick()
        try:
            if self.dead:
                raise _Abandoned
            codes = self.pipeline.draw([job.request for job in batch], on_step=on_step)
            return [(tokens, None) for tokens in codes.tolist()]
        except _Abandoned:
            return [([], RuntimeError("the engine was closed"))] * len(batch)
        except NotFiniteLogits as error:
            broken = [error.of(slice(i, i + 1)) for i in range(len(batch))]
            return [([] if each else error.tokens[i].tolist(), each) for i, each in enumerate(broken)]
        except Exception as error:  # whatever it is, the next batch may do well
            log.exception("a micro-batch failed")
            return [([], RuntimeError(f"drawing failed: {error}"))] * len(batch)
