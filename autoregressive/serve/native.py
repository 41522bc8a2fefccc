"""The engine that needs nothing but torch: requests gathered into micro-batches of ImagePipeline, in one thread.

    engine = NativeEngine(pipeline, "c2i_L_384")
    async with aclosing(engine.generate(ImageRequest(label=207, cfg_scale=4.0))) as tokens:
        async for so_far in tokens: ...

A micro-batch is of requests with equal sampling settings, in the order in which they came, and is drawn to its end. A
request's image is that of `pipeline([label], seed=request.seed, …)`, whatever it was drawn with.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch
from torch import Tensor

from autoregressive.models.sampling import NotFiniteLogits, SamplingConfig
from autoregressive.pipeline import ImagePipeline
from autoregressive.serve.engine import ImageRequest, ModelInfo

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class _Abandoned(Exception):
    """Ends a decode loop of which nobody waits for the result."""


class _Job:
    """A request and what is known of its tokens. The worker tells of news through the event loop of who asked."""

    def __init__(self, request: ImageRequest):
        self.request = request
        self.settings = sampling_settings(request)
        self.closed = False  # nobody waits for it any more
        self.tokens: list[int] = []
        self.error: Exception | None = None
        self.news = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def tell(self, tokens: list[int], error: Exception | None = None) -> None:
        """Called in the worker."""

        def set_news() -> None:
            self.tokens, self.error = tokens, error
            self.news.set()

        if not self.closed:
            try:
                self._loop.call_soon_threadsafe(set_news)
            except RuntimeError:  # the loop has ended, and whoever waited with it
                self.closed = True


class NativeEngine:
    """Serves a pipeline (engine.py tells what an engine is). The pipeline is the engine's alone until it is closed.

    name: of the model. gather: seconds that a request waits for others to be drawn with.
    A request that is closed early is not begun; of a micro-batch that runs, the rest is skipped once all are closed.
    """

    def __init__(self, pipeline: ImagePipeline, name: str = "native", gather: float = 0.005):
        args, layout = pipeline.gpt.args, pipeline.gpt.layout
        self.info = ModelInfo(
            name=name,
            kind="t2i" if pipeline.is_text else "c2i",
            image_size=pipeline.image_size,
            tokens=layout.tokens,
            num_classes=0 if pipeline.is_text else args.num_classes,
            raster=layout.is_raster,
            classes=tuple(pipeline.gpt.file_config.get("classes", ())),
        )
        self.pipeline = pipeline
        self._gather = gather
        self._closed = False
        self._waiting: list[_Job] = []
        self._calls: deque[tuple[Callable[[], object], Future]] = deque()
        self._changed = threading.Condition()  # guards the three above
        self._thread = threading.Thread(target=self._work, name="native engine", daemon=True)
        self._thread.start()

    @property
    def dead(self) -> bool:
        """Whether the engine has ended, by itself or by close(): requests raise RuntimeError then."""
        return self._closed or not self._thread.is_alive()

    def token_age(self) -> float | None:
        return None

    def check(self, request: ImageRequest) -> None:
        """Raises ValueError for a label, features or a setting that the model cannot take."""
        SamplingConfig(**dict(sampling_settings(request)))
        if not self.pipeline.is_text:
            if request.label is None or request.features is not None:
                raise ValueError(f"this model draws classes: give a label, 0 to {self.info.num_classes - 1}")
            self.pipeline.gpt.check_conditions(torch.tensor([request.label]))
            return
        features, width = request.features, self.pipeline.gpt.args.caption_dim
        if features is None or request.label is not None:
            raise ValueError("this model draws from prompts: give a prompt's features, not a label")
        if features.dim() != 2 or features.shape[1] != width or not len(features) or not features.is_floating_point():
            raise ValueError(
                f"features are floats of shape (length, {width}), got {features.dtype} of {tuple(features.shape)}"
            )
        if not features.isfinite().all():
            raise ValueError("the features are not all finite")

    async def generate(self, request: ImageRequest) -> AsyncIterator[list[int]]:
        """Yields the tokens so far after each row of the image, in raster order; what comes too fast is passed over."""
        self.check(request)
        job = _Job(request)
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._waiting.append(job)
            self._changed.notify()
        try:
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
            with self._changed:
                if job in self._waiting:
                    self._waiting.remove(job)

    async def run(self, function: Callable[[], Result]) -> Result:
        """Calls the function in the worker, before the next micro-batch.

        For work that would only slow a decode loop down, and be slowed down by it: both want all cores.
        """
        future: Future = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._calls.append((function, future))
            self._changed.notify()
        return await asyncio.wrap_future(future)

    async def close(self) -> None:
        """Ends the worker, after the decode step that it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._calls or self._waiting)
                if self._closed:
                    break
                call = self._calls.popleft() if self._calls else None
                if call is None:
                    self._changed.wait_for(
                        lambda: self._closed or self._calls or len(self._waiting) >= self.pipeline.batch_size,
                        self._gather,
                    )
            if call is not None:
                _answer(*call)
            elif not self._calls:
                self._draw(self._next_batch())
        with self._changed:
            left, self._waiting = self._waiting, []
            for _, future in self._calls:
                future.cancel()
        for job in left:
            job.tell([], RuntimeError("the engine was closed"))

    def _next_batch(self) -> list[_Job]:
        """The first in the line, and those behind it that want the same settings."""
        with self._changed:
            same = [job for job in self._waiting if job.settings == self._waiting[0].settings]
            batch = same[: self.pipeline.batch_size]
            self._waiting = [job for job in self._waiting if job not in batch]
        return batch

    def _draw(self, batch: Sequence[_Job]) -> None:
        if not batch:
            return
        row = self.pipeline.gpt.layout.grid_size

        def on_step(done: int, tokens: Tensor) -> None:
            if self._closed or all(job.closed for job in batch):
                raise _Abandoned
            # A whole row is what can be shown; reading each token would have an accelerator wait at every step.
            if self.info.raster and done % row == 0 and done < self.info.tokens:
                for job, so_far in zip(batch, tokens[: len(batch), :done].tolist()):
                    job.tell(so_far)

        try:
            if self.pipeline.is_text:
                cond, mask = self.pipeline.condition_rows([job.request.features for job in batch])
            else:
                cond, mask = torch.tensor([job.request.label for job in batch]), None
            codes = self.pipeline.generate_codes(
                cond,
                emb_masks=mask,
                seed=[job.request.seed for job in batch],
                indices=[0] * len(batch),
                on_step=on_step,
                **dict(batch[0].settings),
            )
        except _Abandoned:
            for job in batch:
                job.tell([], RuntimeError("the engine was closed"))
        except NotFiniteLogits as error:
            for i, job in enumerate(batch):
                broken = error.of(slice(i, i + 1))
                job.tell([] if broken else error.tokens[i].tolist(), broken)
        except Exception as error:  # whatever it is, the next batch may do well
            log.exception("a micro-batch failed")
            for job in batch:
                job.tell([], RuntimeError(f"drawing failed: {error}"))
        else:
            for job, tokens in zip(batch, codes.tolist()):
                job.tell(tokens)


def sampling_settings(request: ImageRequest) -> tuple[tuple[str, float], ...]:
    """The fields of SamplingConfig that a request has, as items to compare."""
    names = ("cfg_scale", "cfg_interval", "temperature", "top_k", "top_p", "sample_logits")
    return tuple((name, getattr(request, name)) for name in names)


def _answer(function: Callable[[], object], future: Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:  # it is for who waits
        future.set_exception(error)
