"""The HTTP interface: OpenAI's image generation, the model list, health and metrics.

    app = create_app(service, api_keys=["…"])        # an ASGI application; server.py runs it

    POST /v1/images/generations    body.py tells the fields; JSON, a file (Accept: image/png) or server-sent events
    POST /v1/images/edits          a form with a picture and its mask
    GET  /v1/models, /v1/models/{name}, /health, /metrics, /openapi.json

Every refusal has OpenAI's form of an error (errors.py).
"""

import asyncio
import base64
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from hmac import compare_digest
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autoregressive.serve.body import Asked, EditBody, ImageBody, ask, ask_edit, invalid_body, unknown_model
from autoregressive.serve.engine import NOT_DRAWN
from autoregressive.serve.errors import REFUSED, ErrorBody, RequestError, refuse
from autoregressive.serve.service import Job, Service

log = logging.getLogger(__name__)
Result = TypeVar("Result")

IMAGES, EDITS = "/v1/images/generations", "/v1/images/edits"
CLIENT_GONE = 499  # for the log and the metrics; nobody is there to be answered
MAX_HEADERS = 32 * 1024  # bytes, the address among them
SECONDS_TO_SEND_A_BODY = 30
SECONDS_BETWEEN_EVENTS = 15  # then a comment keeps proxies from closing a stream


class Json(Response):
    """JSON in ASCII: a client's own text is quoted in messages, and half a surrogate pair has no UTF-8."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return json.dumps(content).encode("ascii")


class Image(BaseModel):
    """One picture's file, and the seed that draws it again."""

    b64_json: str
    seed: int


class TextTokens(BaseModel):
    """The tokens of a request's condition, by kind."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """The tokens of a request: those of its condition, and those of its images."""

    input_tokens: int
    input_tokens_details: TextTokens
    output_tokens: int
    total_tokens: int


class ImagesAnswer(BaseModel):
    """The pictures that were asked for."""

    created: int
    data: list[Image]
    background: str
    output_format: str
    size: str
    draw: str
    usage: Usage
    warnings: list[str]


class ClientGone(Exception):
    """The client hung up before its answer."""


def create_app(
    service: Service, *, api_keys: Sequence[str] = (), root_path: str = "", cors_origins: Sequence[str] = ()
) -> FastAPI:
    """Return the application. It closes the service when it ends.

    api_keys: one of them is asked of every request to /v1. root_path: the path under which a proxy has the application.
    cors_origins: of web pages whose scripts may ask it.
    """

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
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Watched, service=service, api_keys=api_keys, root_path=root_path)
    if cors_origins:
        exposed = ["X-Image-Seed", "X-Image-Draw", "X-Request-Id", "X-Warning", "Retry-After"]
        app.add_middleware(
            CORSMiddleware, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=exposed
        )

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, RequestError):
            code = {400: "invalid_json", 404: "not_found"}.get(error.status_code)
            path = get_route_path(request.scope)
            message = f"{request.method} {path[:100]}: {REFUSED.get(path, error.detail)}"
            error = RequestError(error.status_code, message, code=code, headers=error.headers)
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        given = request.headers.get("content-type", "")
        if not re.match(r"application/([\w.+-]+\+)?json\s*(;|$)", given, re.IGNORECASE):
            message = f"the body's type is {given[:100] or 'not told'}: send application/json"
            return error_response(RequestError(415, message, code="unsupported_media_type"))
        return error_response(invalid_body(error.errors()[0]))

    refusals = {status: {"model": ErrorBody, "description": "Refused"} for status in ("4XX", "5XX")}
    bearer = HTTPBearer(auto_error=False, description="A key, where the server asks for one")
    v1 = APIRouter(prefix="/v1", responses=refusals, dependencies=[Security(bearer)])

    files = {f"image/{kind}": {} for kind in ("png", "jpeg", "webp")}
    answers = {200: {"model": ImagesAnswer, "content": {**files, "text/event-stream": {}}}}

    @v1.post(IMAGES.removeprefix("/v1"), responses=answers, response_model=None)
    async def images(request: Request, body: ImageBody) -> Response:
        """Draws images. An image is a function of its seed and what it is of, whatever else the server does."""
        accept = request.headers.get("accept", "")
        read = partial(ask, body, service.info, service.limits, models=service.models, accept=accept)
        asked = await asyncio.to_thread(read) if body.control_image else read()  # a picture takes long to read
        return await answer(request, asked)

    @v1.post(EDITS.removeprefix("/v1"), responses=answers, response_model=None, openapi_extra=EDIT_FORM)
    async def edits(request: Request) -> Response:
        """Fills the transparent part of a picture, as a multipart form asks: what is kept decides what is drawn."""
        if not service.engine.edits:
            message = "this server's engine fills no holes: start it with --engine native"
            raise RequestError(400, message, code="unsupported")
        fields, files = await read_form(request, service.limits.max_upload)
        accept = request.headers.get("accept", "")
        token = service.decoder.tokenizer.downsample
        asked = await asyncio.to_thread(
            ask_edit, fields, files, service.info, service.limits, token, models=service.models, accept=accept
        )
        return await answer(request, asked)

    async def answer(request: Request, asked: Asked) -> Response:
        label = None if isinstance(asked.what, str) else asked.what  # prompts are private
        request.scope["log"] |= {"n": len(asked.seeds), "seed": asked.seeds[0], "label": label}
        job = service.accept(asked)
        if asked.stream:
            return stream(service, job, request.scope["log"])
        with job:
            files = await unless_gone(request, service.draw(job))
        headers = seed_headers(asked)
        if job.warnings:
            headers["X-Warning"] = "; ".join(job.warnings)
        if asked.raw:
            return Response(files[0], media_type=f"image/{asked.format}", headers=headers)
        told = {
            "created": int(time.time()),
            "data": [{"b64_json": _base64(file), "seed": seed} for file, seed in zip(files, asked.seeds)],
            **about(asked),
            "usage": usage(service, job, len(files)),
            "warnings": job.warnings,
        }
        return Json(told, headers=headers)

    started = int(time.time())

    def model(name: str) -> dict:
        told = {field: value for field, value in vars(service.info).items() if field not in ("name", "raster")}
        return {"id": name, "object": "model", "created": started, "owned_by": "local", **told}

    @v1.get("/models")
    async def models() -> Response:
        """Lists the model that is served, under each of its names."""
        return Json({"object": "list", "data": [model(name) for name in service.models]})

    @v1.get("/models/{name:path}")
    async def one_model(name: str) -> Response:
        """Tells of the model of this name."""
        if name not in service.models:
            raise unknown_model(name, service.models)
        return Json(model(name))

    @app.get("/health", responses={503: {"description": "Shutting down, or the engine fails"}})
    async def health() -> Response:
        """Tells whether requests are taken."""
        answer = {"status": service.state, "queued_images": service.queued_images, "token_age": service.token_age()}
        return Json(answer, status_code=200 if service.state == "ok" else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Tells the counters, for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(v1)
    return app


class Watched:
    """Surroundings of every request: its number, the API key, limits of what is read, the log line, the count, and an answer
    where something broke."""

    def __init__(self, app: ASGIApp, service: Service, api_keys: Sequence[str], root_path: str):
        self.app, self.service, self.root_path = app, service, root_path
        self.api_keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, loop = time.monotonic(), asyncio.get_running_loop()
        fields, headers = {}, dict(scope["headers"])
        method = scope["method"].replace("HEAD", "GET")  # the HTTP server leaves the body out
        # Whether a proxy has taken the root path off, or left it on.
        scope = {**scope, "method": method, "root_path": scope.get("root_path", "") + self.root_path, "log": fields}
        path = get_route_path(scope)
        given = headers.get(b"x-request-id", b"")
        number = given if re.fullmatch(rb"[!-~]{1,128}", given) else uuid.uuid4().hex.encode()
        deadline, size, status, ended, gone = loop.time() + SECONDS_TO_SEND_A_BODY, 0, None, False, False

        async def receiving() -> Message:
            nonlocal size, deadline, gone
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                message = f"the body did not come within {SECONDS_TO_SEND_A_BODY} s"
                raise RequestError(408, message, code="timeout") from None
            gone = gone or (message["type"] == "http.disconnect" and not ended)
            size += len(message.get("body", b""))
            limits = self.service.limits
            pictures = path == EDITS or self.service.info.control is not None
            if size > (most := limits.max_upload if pictures else limits.max_body):
                message = f"the body has more than the {most:,} bytes that are read"
                raise RequestError(413, message, code="body_too_large")
            if not message.get("more_body"):
                deadline = None
            return message

        async def sending(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", number)]}
            await send(message)
            ended = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            refusal = self._refusal(scope, headers, path)
            await (error_response(refusal) if refusal else self.app)(scope, receiving, sending)
        except (ClientGone, ClientDisconnect):
            gone = True
        except Exception:
            log.exception("a request broke", extra={"fields": {"id": number.decode()}})
            if status is None:
                await error_response(BROKEN)(scope, receiving, sending)
        finally:
            status = CLIENT_GONE if gone or not ended else fields.pop("ended", status)
            if path in (IMAGES, EDITS):
                self.service.metrics.requests(str(status)).inc()
            told = {"id": number.decode(), "method": method, "path": path[:200], "status": status}
            log.info("answered", extra={"fields": {**told, "seconds": round(time.monotonic() - began, 4), **fields}})

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes], path: str) -> RequestError | None:
        length = sum(len(name) + len(value) for name, value in scope["headers"])
        if length + len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_HEADERS:
            return RequestError(431, f"the headers have more than {MAX_HEADERS:,} bytes", code="headers_too_large")
        if not self.api_keys or not path.startswith("/v1"):
            return None
        given = headers.get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        if kind.lower() == b"bearer" and any(compare_digest(key.strip(), right) for right in self.api_keys):
            return None
        message = f"{'wrong' if given else 'no'} API key: send it as 'Authorization: Bearer …'"
        return RequestError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


# The form of an edit, for /openapi.json.
_PICTURE = {"type": "string", "format": "binary"}
_SCHEMA = EditBody.model_json_schema()
_SCHEMA["properties"] = {
    "image": {**_PICTURE, "description": "A square PNG, JPEG or WebP file."},
    "mask": {
        **_PICTURE,
        "description": "A PNG of its size whose transparent pixels are filled; else the image's own are.",
    },
    **_SCHEMA["properties"],
}
_SCHEMA["required"] = ["image"]
EDIT_FORM = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _SCHEMA}}}}


async def read_form(request: Request, most: int) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return the fields and the files of a form by name. Raises RequestError for anything else, and for a form without image.

    most: bytes of a field, which may be a picture in base64.
    """
    given = request.headers.get("content-type", "")
    if not given.lower().startswith("multipart/form-data"):
        message = f"the body's type is {given[:100] or 'not told'}: send multipart/form-data"
        raise RequestError(415, message, code="unsupported_media_type")
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    try:
        async with request.form(max_files=4, max_fields=64, max_part_size=most) as form:
            for name, value in form.multi_items():
                param = name.removesuffix("[]")[:100]
                if param in fields or param in files:
                    raise refuse(param, f"{param} is given twice: send one")
                if isinstance(value, str):
                    fields[param] = value
                elif param == "control_image":
                    fields[param] = _base64(await value.read())
                elif param in ("image", "mask"):
                    files[param] = await value.read()
                else:
                    raise refuse(param, f"{param} is a file: the files of an edit are image, mask and control_image")
    except RequestError:
        raise
    except HTTPException as error:
        raise RequestError(400, f"the form cannot be read: {error.detail}", code="invalid_form") from error
    for param in ("image", "mask"):
        if param in fields:
            raise refuse(param, f"{param} is a text: send it as a file, with a file name")
    if "image" not in files:
        raise refuse("image", "image is missing: send the picture to edit as a file", "missing_image")
    return fields, files


def stream(service: Service, job: Job, fields: dict) -> Response:
    """Answer with server-sent events, as OpenAI's: partial images, each image's `image_generation.completed`, or `error`.

    fields: of the log line.
    """

    def drawn(task: asyncio.Task) -> None:  # from here on whoever reads slowly holds nobody up
        _ = task.cancelled() or task.exception()  # where nobody reads it
        job.close()
        job.news.set()

    drawing = asyncio.create_task(service.draw(job))
    drawing.add_done_callback(drawn)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", **seed_headers(job.asked)}
    return StreamingResponse(events(service, job, drawing, fields), media_type="text/event-stream", headers=headers)


async def events(service: Service, job: Job, drawing: asyncio.Task, fields: dict) -> AsyncIterator[bytes]:
    """Yield a stream's events; the drawing ends with it."""
    asked, grid = job.asked, service.decoder.grid_size
    shown = [0] * len(asked.seeds)  # partial images of each image
    left = list(range(len(asked.seeds)))

    def event(kind: str, file: bytes, i: int, **more: Any) -> bytes:
        data = {"type": f"image_generation.{kind}", "b64_json": _base64(file), "created_at": int(time.time())}
        data |= {"quality": "auto", **about(asked), "image_index": i, "seed": asked.seeds[i], **more}
        return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()

    try:
        while left:
            try:
                async with asyncio.timeout(SECONDS_BETWEEN_EVENTS):
                    await job.news.wait()
            except TimeoutError:
                yield b": still drawing\n\n"
                continue
            job.news.clear()
            if drawing.done() and (error := drawing.exception()):
                if not isinstance(error, RequestError):
                    log.error("a stream broke", exc_info=error)
                    error = BROKEN
                fields["ended"] = error.status
                yield f"event: error\ndata: {json.dumps(error.body())}\n\n".encode()
                return
            for i in tuple(left):
                # All that were asked for come, however fast the tokens did.
                for rows in asked.partial[shown[i] :]:
                    if job.drawn[i] < rows * grid:
                        break
                    index, shown[i] = shown[i], shown[i] + 1
                    tokens = job.tokens[i]
                    if service.info.raster and NOT_DRAWN not in tokens:
                        tokens = tokens[: rows * grid]
                    try:
                        file = await service.decoder.file(tokens, asked.size, asked.format, asked.quality)
                    except (RuntimeError, ValueError):  # the whole image, which comes the same way, will tell
                        continue
                    yield event("partial_image", file, i, partial_image_index=index, rows=rows, of_rows=grid)
                if (file := job.files[i]) is not None:
                    left.remove(i)
                    yield event("completed", file, i, usage=usage(service, job, 1), warnings=job.warnings)
    finally:
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)


async def unless_gone(request: Request, work: Coroutine[None, None, Result]) -> Result:
    """Return the work's result; cancel it and raise ClientGone where the client hangs up first. The body has been read."""
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


def usage(service: Service, job: Job, images: int) -> dict:
    """Return the tokens of a request with so many images, as OpenAI counts them."""
    read, drawn = job.text_tokens, images * service.info.tokens
    details = {"text_tokens": read, "image_tokens": 0}
    told = {"input_tokens": read, "input_tokens_details": details, "output_tokens": drawn}
    return {**told, "total_tokens": read + drawn}


def about(asked: Asked) -> dict:
    """Return what an answer tells of its pictures."""
    size = f"{asked.size}x{asked.size}"
    return {"background": "opaque", "output_format": asked.format, "size": size, "draw": asked.sampling.draw}


def seed_headers(asked: Asked) -> dict[str, str]:
    """Return the headers with which an answer tells how to draw its pictures again."""
    return {"X-Image-Seed": ",".join(map(str, asked.seeds)), "X-Image-Draw": asked.sampling.draw}


def _base64(file: bytes) -> str:
    return base64.b64encode(file).decode("ascii")


def error_response(error: RequestError) -> Response:
    """Return a refusal as the client gets it."""
    return Json(error.body(), status_code=error.status, headers=error.headers)


BROKEN = RequestError(500, "something broke here; the log tells more")
