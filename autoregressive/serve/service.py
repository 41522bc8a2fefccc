"""From what a client asks to its pictures: a place in the bounded queue, tokens, PNGs; whatever engine draws.

    service = Service(engine, Decoder(…), encoder, Limits(max_queue=64))
    with service.accept(asked) as job:               # RequestError 429 where the queue is full, 503 while shutting down
        pngs = await service.draw(job)               # RequestError 504 after limits.timeout

The queue counts images: those accepted and not yet done. An engine begins as many of them as it has places for.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from math import ceil

from autoregressive.serve.body import Asked, ClassNames, Limits
from autoregressive.serve.decoder import Decoder
from autoregressive.serve.engine import Engine, ImageRequest
from autoregressive.serve.errors import RequestError
from autoregressive.serve.metrics import Metrics
from autoregressive.serve.prompts import PromptEncoder
from utils.errors import NotFiniteError

log = logging.getLogger(__name__)


class Job:
    """An accepted request. It holds its place in the queue until it is closed."""

    def __init__(self, service: "Service", asked: Asked):
        self.asked = asked
        self.accepted_at = time.monotonic()
        self._service = service
        self._closed = False
        service._jobs.add(self)
        service.metrics.queued.inc(len(asked.seeds))
        self.waiting = len(asked.seeds)  # images that are not begun
        self.drawing = 0

    def begin(self) -> None:
        """One of its images has been begun."""
        self.waiting, self.drawing = self.waiting - 1, self.drawing + 1
        self._service.metrics.queued.dec()
        self._service.metrics.in_flight.inc()

    def end(self) -> None:
        """One that was begun is no longer drawn."""
        self.drawing -= 1
        self._service.metrics.in_flight.dec()

    def close(self) -> None:
        """Gives its place up."""
        if self._closed:
            return
        self._closed = True
        self._service._jobs.remove(self)
        self._service.metrics.queued.dec(self.waiting)
        self._service.metrics.seconds.observe(time.monotonic() - self.accepted_at)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Service:
    """An engine, what stands before and behind it, and the requests it has accepted. Of one event loop.

    encoder: of prompts, with a text-conditional model.
    """

    def __init__(
        self, engine: Engine, decoder: Decoder, encoder: PromptEncoder | None = None, limits: Limits | None = None
    ):
        self.engine, self.decoder, self.encoder = engine, decoder, encoder
        self.limits = limits or Limits()
        self.info = engine.info
        self.classes = ClassNames(engine.info.num_classes, engine.info.classes)
        self.metrics = Metrics()
        self.draining = False
        self._jobs: set[Job] = set()
        self._seconds_an_image: float | None = None  # between images that leave, a moving average
        self._last_left = 0.0

    @property
    def queued_images(self) -> int:
        """Images accepted and not yet done."""
        return sum(len(job.asked.seeds) for job in self._jobs)

    @property
    def idle(self) -> bool:
        """Whether every accepted request has been answered."""
        return not self._jobs

    @property
    def state(self) -> str:
        """What /health tells: "ok", or why no requests are taken."""
        return "shutting down" if self.draining else "the engine has died" if self.engine.dead else "ok"

    def refuse_while_draining(self) -> None:
        """Raises RequestError 503 once the server is shutting down."""
        if self.draining:
            raise RequestError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})

    def accept(self, asked: Asked) -> Job:
        """A place for the request. Raises RequestError 503 while shutting down, 429 where there is no room."""
        self.refuse_while_draining()
        queued, room = self.queued_images, self.limits.max_queue
        if queued + len(asked.seeds) > room:
            each = 1.0 if self._seconds_an_image is None else self._seconds_an_image
            seconds = min(60, max(1, ceil(each * queued / 2)))
            raise RequestError(
                429,
                f"{queued} images wait or are being drawn, and there is room for {room}: try again in {seconds} s",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )
        return Job(self, asked)

    async def draw(self, job: Job, on_rows: Callable[[list[int]], None] | None = None) -> list[bytes]:
        """The PNG of each of its images. on_rows: told of the first image's tokens so far, as they come.

        Raises RequestError: 400 where the model refuses the request, 500 for logits or pixels that are not finite, 503 where
        the engine fails, 504 for a timeout.
        """
        asked = job.asked
        try:
            async with asyncio.timeout(self.limits.timeout):
                features = await self.encoder(asked.prompt) if asked.prompt is not None else None
                requests = asked.requests(features)
                for request in requests:
                    self.engine.check(request)
                told = [on_rows] + [None] * (len(requests) - 1)
                return await together([self._image(job, *one) for one in zip(requests, told)])
        except TimeoutError:
            raise RequestError(
                504, f"there was no time for it within {self.limits.timeout:g} s", code="timeout"
            ) from None
        except NotFiniteError as error:
            log.error("an image is broken", extra={"fields": {"error": str(error)}})
            raise RequestError(500, str(error), code="not_finite") from error
        except ValueError as error:
            param = "prompt" if asked.prompt is not None else None
            raise RequestError(400, str(error), param=param, code="invalid_value") from error
        except RuntimeError as error:
            log.error("the engine failed", extra={"fields": {"error": str(error)}})
            raise RequestError(503, f"the engine failed: {error}", code="engine_failed") from error

    async def _image(self, job: Job, request: ImageRequest, on_rows: Callable[[list[int]], None] | None) -> bytes:
        done, begun_at = 0, None
        try:
            async with aclosing(self.engine.generate(request)) as tokens_so_far:
                async for tokens in tokens_so_far:
                    if begun_at is None:
                        begun_at = time.monotonic()
                        job.begin()
                    self.metrics.tokens.inc(len(tokens) - done)
                    done = len(tokens)
                    if on_rows:
                        on_rows(tokens)
            if done != self.info.tokens:
                raise RuntimeError(f"the engine ended after {done} of {self.info.tokens} tokens")
            png = await self.decoder.png(tokens, job.asked.size)
        finally:
            if begun_at is not None:
                job.end()
        self.metrics.images.inc()
        now = time.monotonic()
        seconds = now - max(job.accepted_at, self._last_left)
        before = seconds if self._seconds_an_image is None else self._seconds_an_image
        self._seconds_an_image = before + 0.2 * (seconds - before)
        self._last_left = now
        return png

    async def close(self) -> None:
        """Ends the engine and the threads beside it."""
        await self.engine.close()
        await self.decoder.close()
        if self.encoder:
            self.encoder.close()


async def together(work: list[Coroutine[None, None, bytes]]) -> list[bytes]:
    """The results in order; where one raises or the caller is cancelled, the others are cancelled and waited for."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
