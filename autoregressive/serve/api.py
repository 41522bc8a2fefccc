"""The HTTP interface: OpenAI's image generation, the model list, health and metrics.

    app = create_app(service, api_key="…")           # an ASGI application; server.py runs it

    POST /v1/images/generations    body.py tells the fields; JSON, a PNG (Accept: image/png) or server-sent events
    GET  /v1/models, /v1/models/{name}, /health, /metrics, /docs

Every refusal has OpenAI's form of an error (errors.py).
"""

import asyncio
import base64
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager
from hmac import compare_digest
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autoregressive.serve.body import ImageBody, ask, read_body, unknown_model
from autoregressive.serve.errors import RequestError
from autoregressive.serve.service import Job, Service

log = logging.getLogger(__name__)
Result = TypeVar("Result")

IMAGES = "/v1/images/generations"
CLIENT_GONE = 499  # for the log and the metrics; nobody is there to be answered
SECONDS_TO_SEND_A_BODY = 30
DRAINED_BYTES = 16 * 2**20  # of a body that is too large, read so that the client gets to hear it


class Json(Response):
    """JSON in ASCII: a client's own text is quoted in messages, and half a surrogate pair has no UTF-8."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return json.dumps(content).encode("ascii")


class ClientGone(Exception):
    """The client hung up before its answer."""


def create_app(service: Service, api_key: str | None = None) -> FastAPI:
    """The application. It closes the service when it ends. api_key: asked of every request to /v1."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(
        title="Image generation",
        description="Images drawn token by token, through OpenAI's interface.",
        version="1",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.add_middleware(Watched, service=service, api_key=api_key)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        code = "not_found" if error.status_code == 404 else None
        message = f"{request.method} {request.url.path[:100]}: {error.detail}"
        return error_response(RequestError(error.status_code, message, code=code, headers=error.headers))

    @app.post(IMAGES, openapi_extra=_images_documentation(), responses=_IMAGES_RESPONSES, response_class=Response)
    async def images(request: Request) -> Response:
        """Draws images. An image is a function of its seed and what it is of, whatever else the server does."""
        service.refuse_while_draining()
        _check_content_type(request)
        body = read_body(await _read(request, service.limits.max_body))
        asked = ask(body, service.info, service.limits, service.classes, png=_wants_png(request))
        request.scope["log"] |= {"n": len(asked.seeds), "seed": asked.seeds[0], "label": asked.label}
        job = service.accept(asked)
        if asked.stream:
            return EventStream(service, job)
        with job:
            pngs = await unless_gone(request, service.draw(job))
        seeds = {"X-Image-Seed": ",".join(map(str, asked.seeds))}
        if asked.png:
            return Response(pngs[0], media_type="image/png", headers=seeds)
        return Json(
            {
                "created": int(time.time()),
                "data": [{"b64_json": _base64(png), "seed": seed} for png, seed in zip(pngs, asked.seeds)],
                "output_format": "png",
                "size": f"{asked.size}x{asked.size}",
            },
            headers=seeds,
        )

    started = int(time.time())

    def model() -> dict:
        info = service.info
        return {
            "id": info.name,
            "object": "model",
            "created": started,
            "owned_by": "local",
            "kind": info.kind,
            "image_size": info.image_size,
            "tokens": info.tokens,
            "num_classes": info.num_classes,
            "classes": service.classes.names,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        """The model that is served."""
        return Json({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name:path}", responses={404: _ERROR})
    async def one_model(name: str) -> Response:
        """The model of this name."""
        if name != service.info.name:
            raise unknown_model(name, service.info)
        return Json(model())

    @app.get("/health", responses={503: {"description": "Shutting down, or the engine fails"}})
    async def health() -> Response:
        """Whether requests are taken."""
        return Json(
            {"status": service.state, "queued_images": service.queued_images},
            status_code=200 if service.state == "ok" else 503,
        )

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counters, for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


class Watched:
    """Around every request: its number, the API key, the log line, the count, and an answer where something broke."""

    def __init__(self, app: ASGIApp, service: Service, api_key: str | None):
        self.app, self.service = app, service
        self.api_key = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, number, status = time.monotonic(), uuid.uuid4().hex, None
        fields = scope["log"] = {}

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", number.encode())]}
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal:
                await error_response(refusal)(scope, receive, sending)
            else:
                await self.app(scope, receive, sending)
        except (ClientGone, ClientDisconnect):
            status = CLIENT_GONE
        except Exception:
            log.exception("a request broke", extra={"fields": {"id": number}})
            if status is None:
                await error_response(RequestError(500, "something broke here; the log tells more"))(
                    scope, receive, sending
                )
        finally:
            status = scope["log"].pop("ended", status) or CLIENT_GONE
            if scope["path"] == IMAGES:
                self.service.metrics.requests.labels(str(status)).inc()
            told = {"id": number, "method": scope["method"], "path": scope["path"][:200], "status": status}
            log.info("answered", extra={"fields": {**told, "seconds": round(time.monotonic() - began, 4), **fields}})

    def _refusal(self, scope: Scope) -> RequestError | None:
        if self.api_key is None or not scope["path"].startswith("/v1"):
            return None
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        if kind.lower() == b"bearer" and compare_digest(key.strip(), self.api_key):
            return None
        what = "wrong API key" if given else "no API key"
        return RequestError(
            401,
            f"{what}: send it as 'Authorization: Bearer …'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class EventStream(StreamingResponse):
    """An image as server-sent events, as OpenAI's: partial images, then `image_generation.completed`, or `error`."""

    def __init__(self, service: Service, job: Job):
        super().__init__(
            self._events(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Image-Seed": str(job.asked.seeds[0])},
        )
        self._service, self._job = service, job
        self._newest: list[int] = []
        self._news = asyncio.Event()
        self._fields: dict = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._fields = scope["log"]
        self._fields["ended"] = CLIENT_GONE  # unless the last event is sent
        with self._job:
            self._drawing = asyncio.create_task(self._service.draw(self._job, self._on_rows))
            self._drawing.add_done_callback(lambda _: self._news.set())
            try:
                await super().__call__(scope, receive, send)
            finally:
                self._drawing.cancel()
                await asyncio.gather(self._drawing, return_exceptions=True)

    def _on_rows(self, tokens: list[int]) -> None:
        self._newest = tokens
        self._news.set()

    async def _events(self) -> AsyncIterator[bytes]:
        asked, info = self._job.asked, self._service.info
        grid = self._service.decoder.grid_size
        common = {"size": f"{asked.size}x{asked.size}", "output_format": "png", "seed": asked.seeds[0]}
        shown = sent = 0  # rows of tokens, partial images
        while not self._drawing.done():
            await self._news.wait()
            self._news.clear()
            rows = len(self._newest) // grid
            if (
                asked.partial_rows
                and info.raster
                and rows < grid
                and rows // asked.partial_rows > shown // asked.partial_rows
            ):
                rows -= rows % asked.partial_rows
                try:
                    png = await self._service.decoder.png(self._newest[: rows * grid], asked.size)
                except (RuntimeError, ValueError):  # the whole image, which comes the same way, will tell
                    continue
                partial = {"partial_image_index": sent, "rows": rows, "of_rows": grid}
                yield _event("image_generation.partial_image", png, **partial, **common)
                shown, sent = rows, sent + 1
        try:
            (png,) = self._drawing.result()
        except Exception as error:
            if not isinstance(error, RequestError):
                log.exception("a stream broke")
                error = RequestError(500, "something broke here; the log tells more")
            self._fields["ended"] = error.status
            yield f"event: error\ndata: {json.dumps(error.body())}\n\n".encode()
        else:
            self._fields["ended"] = 200
            yield _event("image_generation.completed", png, **common)


def _event(kind: str, png: bytes, **fields: object) -> bytes:
    data = {"type": kind, "b64_json": _base64(png), "created_at": int(time.time()), **fields}
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


async def unless_gone(request: Request, work: Coroutine[None, None, Result]) -> Result:
    """The work's result; cancels it and raises ClientGone where the client hangs up first. The body has been read."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(request: Request, limit: int) -> bytes:
    """The body. Raises RequestError 413 for one of more than `limit` bytes, 408 for one that does not come."""

    async def read() -> tuple[bytes, int]:
        content, size = bytearray(), 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limit:
                content += chunk
            elif size > DRAINED_BYTES:
                break
        return bytes(content), size

    content, size = await _in_time(read())
    if size > limit:
        raise RequestError(413, f"the body has more than the {limit:,} bytes that are read", code="body_too_large")
    return content


async def _in_time(reading: Awaitable[Result]) -> Result:
    try:
        return await asyncio.wait_for(reading, SECONDS_TO_SEND_A_BODY)
    except TimeoutError:
        raise RequestError(408, f"the body did not come within {SECONDS_TO_SEND_A_BODY} s", code="timeout") from None


def _check_content_type(request: Request) -> None:
    given = request.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise RequestError(
            415, f"the body's type is {given[:100] or 'not told'}: send application/json", code="unsupported_media_type"
        )


def _wants_png(request: Request) -> bool:
    accepted = [kind.partition(";")[0].strip().lower() for kind in request.headers.get("accept", "").split(",")]
    return "image/png" in accepted and "application/json" not in accepted


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode("ascii")


def error_response(error: RequestError) -> Response:
    """A refusal as the client gets it."""
    return Json(error.body(), status_code=error.status, headers=error.headers)


_ERROR = {
    "description": "Refused",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}

_IMAGE = {
    "type": "object",
    "required": ["b64_json", "seed"],
    "properties": {"b64_json": {"type": "string"}, "seed": {"type": "integer"}},
}
_IMAGES_RESPONSES: dict[int | str, dict] = {
    200: {
        "description": "The images",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["created", "data"],
                    "properties": {
                        "created": {"type": "integer"},
                        "data": {"type": "array", "items": _IMAGE},
                        "size": {"type": "string"},
                        "output_format": {"type": "string"},
                    },
                }
            },
            "image/png": {},
            "text/event-stream": {},
        },
    },
    **dict.fromkeys((400, 401, 404, 408, 413, 415, 429, 500, 503, 504), _ERROR),
}


def _images_documentation() -> dict:
    """The body's schema. The route reads the body itself, so that too large ones are not read whole."""
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": ImageBody.model_json_schema()}}}
    }
