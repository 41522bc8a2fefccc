"""Servers for tests: an engine that does what the test says, an application without a network, and one on a port."""

import asyncio
import base64
import io
import socket
import threading
from contextlib import contextmanager

import httpx
import numpy as np
import torch
from PIL import Image

from autoregressive.class_names import class_names
from autoregressive.pipeline import decode_codes
from autoregressive.request import Request
from autoregressive.serve.api import IMAGES, create_app
from autoregressive.serve.body import Limits
from autoregressive.serve.decoder import Decoder
from autoregressive.serve.draining import DrainingServer
from autoregressive.serve.engine import NOT_DRAWN, ModelInfo
from autoregressive.serve.service import Service
from tests.serve.small import image


class ScriptedEngine:
    """Draws 8x8 tokens that are a function of the request, a row at a time, from the last row up where not in raster order.

    gate: where set, nothing is drawn beyond `rows_before` rows until it opens. open: requests that are being drawn.
    """

    dead = edits = False

    def __init__(self, num_classes: int = 10, raster: bool = True):
        self.info = ModelInfo("small", "c2i", 32, 64, num_classes, raster, tuple(class_names(num_classes)))
        self.gate: asyncio.Event | None = None
        self.rows_before = 0
        self.error: Exception | None = None
        self.open, self.asked = 0, []

    @staticmethod
    def tokens(request: Request) -> list[int]:
        return [(7 * request.seed + 3 * request.conditions["label"] + i * i) % 64 for i in range(64)]

    def check(self, request):
        if request.sampling.top_k == 13:
            raise ValueError("top_k is 13: this model is superstitious")

    async def generate(self, request):
        self.asked.append(request)
        self.open += 1
        try:
            for rows in range(1, 9):
                if self.gate is not None and rows > self.rows_before:
                    await self.gate.wait()
                if self.error:
                    raise self.error
                tokens, count = self.tokens(request), 8 * rows
                yield tokens[:count] if self.info.raster else [NOT_DRAWN] * (64 - count) + tokens[64 - count :]
                await asyncio.sleep(0)
        finally:
            self.open -= 1

    async def close(self):
        self.dead = True


def picture(tokenizer, label: int, seed: int, size: int | None = None) -> np.ndarray:
    """What a ScriptedEngine's request looks like."""
    codes = torch.tensor([ScriptedEngine.tokens(image(label=label, seed=seed))])
    whole = Image.fromarray(decode_codes(tokenizer, codes)[0])
    return np.asarray(whole.resize((size, size), Image.Resampling.BICUBIC) if size else whole)


def pixels(image: bytes | dict) -> np.ndarray:
    """A file's pixels, or those of an item of `data`."""
    return np.asarray(opened(image))


def opened(image: bytes | dict) -> Image.Image:
    """A file's picture, or that of an item of `data`."""
    return Image.open(io.BytesIO(image if isinstance(image, bytes) else base64.b64decode(image["b64_json"])))


def with_client(tokenizer, work, engine=None, app=None, aliases=(), **limits):
    """Runs `await work(client, service)` against an application of this engine; the client needs no network.

    app: further arguments of create_app.
    """

    async def main():
        drawing = engine or ScriptedEngine()
        decoder = Decoder(tokenizer, 8)
        service = Service(drawing, decoder, None, Limits(**limits), aliases)
        transport = httpx.ASGITransport(create_app(service, **(app or {})), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            try:
                return await work(client, service)
            finally:
                await service.close()

    return asyncio.run(main())


async def post(client: httpx.AsyncClient, headers: dict | None = None, **body) -> httpx.Response:
    """Asks for images."""
    return await client.post(IMAGES, json=body, headers=headers)


@contextmanager
def listening(make_service, sock: socket.socket | None = None, **app):
    """A server on a port of this machine, in a thread. make_service: called in its event loop. Yields (address, service).

    app: further arguments of create_app.
    """
    made, begun = [], threading.Event()
    sock = sock or socket.create_server(("127.0.0.1", 0))

    async def main():
        service = make_service()
        server = DrainingServer(create_app(service, **app), service)
        running = asyncio.create_task(server.serve([sock]))
        while not server.started:
            await asyncio.sleep(0.01)
        made.extend([server, service])
        begun.set()
        await running

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert begun.wait(120)
    try:
        name = sock.getsockname()
        yield name if isinstance(name, str) else f"http://127.0.0.1:{name[1]}", made[1]
    finally:
        made[0].should_exit = True
        thread.join(120)
        assert not thread.is_alive()
