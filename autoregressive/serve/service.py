"""From what a client asks to its pictures: a place in the bounded queue, tokens, files; whatever engine draws.

    service = Service(engine, Decoder(…), encoder, Limits(max_queue=64))
    with service.accept(asked) as job:               # RequestError 429 where the queue is full, 503 while shutting down
        files = await service.draw(job)              # RequestError 504 after limits.timeout

The queue counts images: those accepted and not yet drawn. An engine begins as many of them as it has places for. An image is
drawn once its file is made: whoever does not take the answer holds no place.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import NoReturn

from torch import Tensor

from autoregressive.editing import Edited
from autoregressive.request import Request
from autoregressive.serve.body import Asked, Limits
from autoregressive.serve.decoder import Decoder
from autoregressive.serve.engine import NOT_DRAWN, Engine
from autoregressive.serve.errors import RequestError
from autoregressive.serve.metrics import Metrics
from utils.errors import NotFiniteError

log = logging.getLogger(__name__)


class Job:
    """An accepted request, and how far it is. It holds its place in the queue until it is closed."""

    def __init__(self, service: "Service", asked: Asked):
        count = len(asked.seeds)
        self.asked = asked
        self.accepted_at = time.monotonic()
        self.tokens: list[list[int]] = [[] for _ in range(count)]  # of each image, as the engine yields them
        self.drawn = [0] * count  # how many of each are drawn
        self.files: list[bytes | None] = [None] * count
        self.news = asyncio.Event()  # set when one of these changes
        self.text_tokens, self.warnings = 1, []  # of its condition; what the client should know
        self.waiting = count  # images that are not begun
        self._service = service
        service._jobs.add(self)
        service.metrics.queued.inc(count)

    def close(self) -> None:
        """Give its place up."""
        if self in self._service._jobs:
            self._service._jobs.remove(self)
            self._service.metrics.queued.dec(self.waiting)
            self._service.metrics.seconds.observe(time.monotonic() - self.accepted_at)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(eq=False)
class _Drawing:
    """An image that an engine was asked for. since: when it last drew a token of it, or was found to have passed it over."""

    since: float | None = None
    begun: bool = False


class PromptEncoder:
    """Encodes prompts by `encode`, that of a pipeline, in a thread, by default one of its own.

    rows: text tokens of a prompt that are read. keep: prompts whose features stay.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], list[Tensor]],
        rows: int,
        thread: ThreadPoolExecutor | None = None,
        keep: int = 64,
    ):
        self.rows = rows
        self._thread = thread or ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._find = lru_cache(keep)(lambda prompt: encode([prompt])[0])

    async def __call__(self, prompt: str) -> Tensor:
        """Return the prompt's features, (length, caption_dim). Raises ValueError for one that cannot be read."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._find, prompt)


class Service:
    """An engine, what stands before and behind it, and the requests it has accepted. Of one event loop.

    encoder: of prompts, with a text-conditional model. aliases: further names of the model.
    """

    def __init__(
        self,
        engine: Engine,
        decoder: Decoder,
        encoder: PromptEncoder | None = None,
        limits: Limits | None = None,
        aliases: Sequence[str] = (),
    ):
        self.engine, self.decoder, self.encoder = engine, decoder, encoder
        self.limits = limits or Limits()
        self.info = engine.info
        self.models = tuple(dict.fromkeys((engine.info.name, *aliases)))
        self.draining = False
        self.metrics = Metrics(engine.info.name)
        self.metrics.engine_up.set_function(lambda: self.engine_state == "ok")
        self.metrics.token_age.set_function(lambda: self.token_age() or 0)
        self._jobs: set[Job] = set()
        self._drawings: list[_Drawing] = []  # in the order in which the engine was asked
        self._heard_at = 0.0  # when the last token came, or work to an idle engine
        self._busy_since, self._tokens = 0.0, 0  # since the queue was last empty, and drawn since then
        self._rate = 0.0  # tokens a second, as last measured

    @property
    def queued_images(self) -> int:
        """Images accepted and not yet drawn."""
        return sum(job.files.count(None) for job in self._jobs)

    @property
    def idle(self) -> bool:
        """Tell whether every accepted request has been drawn or given up."""
        return not self._jobs

    def token_age(self) -> float | None:
        """Return the seconds without a token of that image which has waited longest for one; None where nothing is drawn.

        An image that was not begun counts from when one that came after it was whole: of several engines its own may hang.
        """
        if not self._drawings:
            return None
        return time.monotonic() - min((d.since for d in self._drawings if d.since is not None), default=self._heard_at)

    @property
    def engine_state(self) -> str:
        """ "ok", or what is wrong with the engine."""
        if self.engine.dead:
            return "the engine has died"
        return "the engine hangs" if (self.token_age() or 0) > self.limits.stall else "ok"

    @property
    def state(self) -> str:
        """Return the state for /health: "ok", or why no requests are taken."""
        return "shutting down" if self.draining else self.engine_state

    def accept(self, asked: Asked) -> Job:
        """Return a place for the request. Raises RequestError 503 while shutting down, 429 where there is no room."""
        if self.draining:
            raise RequestError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        queued, room = self.queued_images, self.limits.max_queue
        if queued + len(asked.seeds) > room:
            # Half of the queue is drawn by then; nothing is known where no image's tokens have come yet.
            left = sum(self.info.tokens - drawn for job in self._jobs for drawn in job.drawn)
            seconds = min(60, max(1, ceil(left / 2 / self._rate))) if self._rate else 1
            message = f"{queued} images wait or are being drawn, and there is room for {room}: try again in {seconds} s"
            raise RequestError(429, message, code="queue_full", headers={"Retry-After": str(seconds)})
        if not self._jobs:
            self._busy_since, self._tokens = time.monotonic(), 0
        return Job(self, asked)

    async def draw(self, job: Job) -> list[bytes]:
        """Return the file of each of its images; `job` has them and their tokens as they come.

        Raises RequestError: 400 where the model refuses the request, 500 for logits or pixels that are not finite, 503 where
        the engine fails, 504 for a timeout.
        """
        try:
            async with asyncio.timeout(self.limits.timeout):
                requests = await self._requests(job)
                for request in requests:
                    self.engine.check(request)
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._image(job, *one)) for one in enumerate(requests)]
            return [task.result() for task in tasks]
        except TimeoutError:
            message = f"there was no time for it within {self.limits.timeout:g} s"
            raise RequestError(504, message, code="timeout") from None
        except (ExceptionGroup, ValueError, RuntimeError) as error:
            # Of a group the first error ended the others.
            self._refuse(job, error.exceptions[0] if isinstance(error, ExceptionGroup) else error)

    def _refuse(self, job: Job, error: Exception) -> NoReturn:
        """Raise RequestError for an error of the engine or the decoder; an unforeseen error as it is."""
        if isinstance(error, NotFiniteError):
            log.error("an image is broken", extra={"fields": {"error": str(error)}})
            raise RequestError(500, str(error), code="not_finite") from error
        if isinstance(error, ValueError):
            param = "prompt" if self.encoder else None
            raise RequestError(400, str(error), param=param, code="invalid_value") from error
        if isinstance(error, RuntimeError):
            log.error("the engine failed", extra={"fields": {"error": str(error)}})
            raise RequestError(503, f"the engine failed: {error}", code="engine_failed") from error
        raise error

    async def _requests(self, job: Job) -> list[Request]:
        """Return what the engine is asked for."""
        asked, name, values = job.asked, "caption" if self.encoder else "label", {}
        for param, value in (("prompt", asked.what), ("negative_prompt", asked.negative)):
            if isinstance(value, str):
                try:
                    value = await self.encoder(value)
                except ValueError as error:
                    raise RequestError(400, f"{param}: {error}", param=param, code="invalid_value") from error
                if len(value) >= (rows := self.encoder.rows):
                    job.warnings.append(f"{param} fills all {rows} text tokens: what stands behind them is not read")
                if param == "prompt":
                    job.text_tokens = len(value)
            values[param] = {} if value is None else {name: value}
        particles = asked.edit.particles if asked.edit else 1
        control = {} if asked.control is None else {"control": asked.control}
        return [
            Request(values["prompt"] | control, values["negative_prompt"], asked.sampling, seed, particles=particles)
            for seed in asked.seeds
        ]

    async def _image(self, job: Job, i: int, request: Request) -> bytes:
        metrics, begun_at, edit, edited = self.metrics, None, job.asked.edit, None
        if not self._drawings:
            self._heard_at = time.monotonic()
        drawing = _Drawing()
        self._drawings.append(drawing)
        try:
            drawn = self.engine.generate(request)
            if edit:
                drawn = self.engine.edit(request, edit.hole, edit.rounds, edit.keep_pixels)
            async with aclosing(drawn) as tokens_so_far:
                async for tokens in tokens_so_far:
                    if isinstance(tokens, Edited):
                        edited, tokens = tokens, tokens.tokens.tolist()
                    drawing.since = self._heard_at = time.monotonic()
                    if not drawing.begun:
                        drawing.begun, begun_at = True, self._heard_at
                        job.waiting -= 1
                        metrics.queued.dec()
                        metrics.in_flight.inc()
                        metrics.waiting.observe(begun_at - job.accepted_at)
                    self._note(job, i, tokens)
            if job.drawn[i] != self.info.tokens:
                raise RuntimeError(f"the engine ended after {job.drawn[i]} of {self.info.tokens} tokens")
            for earlier in self._drawings[: self._drawings.index(drawing)]:
                earlier.since = earlier.since or self._heard_at  # passed over
            self._drawings.remove(drawing)
            asked = job.asked
            how = asked.size, asked.format, asked.quality
            if edited:
                file = await self.decoder.write(edited.pixels, *how)
                job.warnings += [f"image {i}: {edited.warning}"] if edited.warning else []
            else:
                file = await self.decoder.file(job.tokens[i], *how)
            job.files[i] = file
            metrics.images.inc()
            metrics.drawing.observe(time.monotonic() - begun_at)
            job.news.set()
            return file
        finally:
            if drawing in self._drawings:
                self._drawings.remove(drawing)
            if drawing.begun:
                metrics.in_flight.dec()

    def _note(self, job: Job, i: int, tokens: list[int]) -> None:
        """Count an image's new tokens, and show them to whoever waits."""
        before, now, row = job.drawn[i], len(tokens) - tokens.count(NOT_DRAWN), self.decoder.grid_size
        if before < row <= now:
            self.metrics.first_row.observe(self._heard_at - job.accepted_at)
        self.metrics.tokens.inc(now - before)
        self._tokens += now - before
        self._rate = self._tokens / max(self._heard_at - self._busy_since, 1e-3)
        job.tokens[i], job.drawn[i] = tokens, now
        job.news.set()

    async def close(self) -> None:
        """End the engine."""
        await self.engine.close()
