"""From tokens to pictures beside the event loop: what comes while a batch is decoded is decoded together after it.

decoder = Decoder(tokenizer, grid_size=24)
image = await decoder.decode(tokens)             # uint8 (384, 384, 3); of fewer tokens the first rows, the rest grey
png = await decoder.png(tokens, size=256)        # bytes
"""

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from autoregressive.pipeline import decode_codes
from tokenizer.base import Tokenizer
from utils.errors import NotFiniteError

GREY = 128


class Decoder:
    """Decodes for the requests of one event loop, in a thread of its own.

    grid_size: tokens a side. batch_size: images decoded at once.
    """

    def __init__(self, tokenizer: Tokenizer, grid_size: int, batch_size: int = 8):
        self.tokenizer, self.grid_size, self.batch_size = tokenizer, grid_size, batch_size
        self._waiting: list[tuple[list[int], asyncio.Future]] = []
        self._busy: asyncio.Task | None = None
        # One thread: the tokenizer is put into a mode while it decodes, and PyTorch has threads of its own.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self.grid_size * self.tokenizer.downsample

    async def decode(self, tokens: list[int], size: int | None = None) -> np.ndarray:
        """Tokens in raster order to uint8 (size, size, 3), as ImagePipeline decodes them.

        Of fewer than an image's the whole rows are decoded and the rest is grey. size: pixels a side, where other than
        the model's.
        """
        rows = len(tokens) // self.grid_size
        if rows == 0:
            side = size or self.image_size
            return np.full((side, side, 3), GREY, np.uint8)
        whole = rows == self.grid_size
        image = await self._decode(tokens[: rows * self.grid_size], size if whole else None)
        if whole:
            return image
        canvas = np.full((self.image_size, self.image_size, 3), GREY, np.uint8)
        canvas[: len(image)] = image
        if size in (None, self.image_size):
            return canvas
        return np.asarray(Image.fromarray(canvas).resize((size, size), Image.Resampling.BICUBIC))

    async def png(self, tokens: list[int], size: int | None = None) -> bytes:
        """As decode, to a PNG's bytes."""
        image = await self.decode(tokens, size)
        return await asyncio.to_thread(png_bytes, image)

    async def _decode(self, tokens: list[int], size: int | None) -> np.ndarray:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(((tokens, size), future))
        if self._busy is None:
            self._busy = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                self._waiting = [(asked, future) for asked, future in self._waiting if not future.done()]  # given up
                if not self._waiting:
                    break
                kind = _kind(self._waiting[0][0])
                batch = [item for item in self._waiting if _kind(item[0]) == kind][: self.batch_size]
                self._waiting = [item for item in self._waiting if item not in batch]
                tokens = [tokens for (tokens, _), _ in batch]
                results = await loop.run_in_executor(self._thread, self._compute, tokens, kind[1])
                for (_, future), result in zip(batch, results):
                    if future.done():
                        continue
                    if isinstance(result, Exception):
                        future.set_exception(result)
                    else:
                        future.set_result(result)
        finally:
            self._busy = None

    def _compute(self, tokens: list[list[int]], size: int | None) -> "list[np.ndarray | Exception]":
        """The images; where decoding them together fails, each alone, an error in the place of one that fails."""
        try:
            codes = torch.tensor(tokens)
            return list(
                decode_codes(self.tokenizer, codes, width=self.grid_size, size=size, batch_size=self.batch_size)
            )
        except Exception as error:
            if len(tokens) > 1:
                return [result for one in tokens for result in self._compute([one], size)]
            return [error if isinstance(error, NotFiniteError) else RuntimeError(f"decoding failed: {error}")]

    async def close(self) -> None:
        """Ends the thread, after what it is at."""
        await asyncio.to_thread(self._thread.shutdown)


def _kind(asked: tuple[list[int], int | None]) -> tuple[int, int | None]:
    """What images decoded together have in common: the number of tokens and the size."""
    tokens, size = asked
    return len(tokens), size


def png_bytes(image: np.ndarray) -> bytes:
    """uint8 (H, W, 3) to a PNG's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
