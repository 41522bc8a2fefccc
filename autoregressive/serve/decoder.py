"""From tokens to pictures beside the event loop: what comes while a batch is decoded is decoded together after it."""

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np
import torch
from PIL import Image

from autoregressive.pipeline import decode_codes
from autoregressive.serve.engine import NOT_DRAWN
from tokenizer.base import Tokenizer
from utils.errors import NotFiniteError

GREY = 128  # of what is not drawn yet: the middle of the range


class Decoder:
    """Decodes for the requests of one event loop, a batch at a time; other threads resize and write the files.

    grid_size: tokens a side. batch_size: images decoded at once.
    """

    def __init__(self, tokenizer: Tokenizer, grid_size: int, batch_size: int = 8):
        self.tokenizer, self.grid_size, self.batch_size = tokenizer, grid_size, batch_size
        self.image_size = grid_size * tokenizer.downsample
        self._waiting: list[tuple[list[int], asyncio.Future]] = []
        self._busy: asyncio.Task | None = None
        self._thread = ThreadPoolExecutor(1, "decoder")  # PyTorch has threads of its own, for each of ours
        # Pictures of the model's size do not wait for those that are resized, which may take a hundred times as long.
        self._resizing = asyncio.Semaphore(1)

    async def decode(self, tokens: list[int]) -> np.ndarray:
        """Return tokens in raster order as uint8 (side, side, 3), as ImagePipeline decodes them.

        Of fewer than an image's the whole rows are decoded and the rest is grey, as is each cell that is NOT_DRAWN: those are
        decoded as the token before them, which the cells beside them see.
        """
        if NOT_DRAWN in tokens:
            before = accumulate(tokens, lambda last, token: last if token == NOT_DRAWN else token)
            image = await self.decode([max(token, 0) for token in before])
            drawn = (np.array(tokens) != NOT_DRAWN).reshape(self.grid_size, self.grid_size)
            pixels = np.kron(drawn, np.ones((self.tokenizer.downsample,) * 2, bool))
            return np.where(pixels[..., None], image, np.uint8(GREY))
        rows = len(tokens) // self.grid_size
        canvas = np.full((self.image_size, self.image_size, 3), GREY, np.uint8)
        if rows:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append((tokens[: rows * self.grid_size], future))
            self._busy = self._busy or asyncio.create_task(self._work())
            image = await future
            canvas[: len(image)] = image
        return canvas

    async def file(
        self, tokens: list[int], size: int | None = None, kind: str = "png", quality: int | None = None
    ) -> bytes:
        """Return the bytes of a picture's file, of `size` pixels a side."""
        return await self.write(await self.decode(tokens), size, kind, quality)

    async def write(
        self, image: np.ndarray, size: int | None = None, kind: str = "png", quality: int | None = None
    ) -> bytes:
        """Return the bytes of the file of a picture of the model's size, resized to `size` pixels a side."""
        if size in (None, self.image_size):
            return await asyncio.to_thread(file_bytes, image, None, kind, quality)
        async with self._resizing:
            return await asyncio.to_thread(file_bytes, image, size, kind, quality)

    async def _work(self) -> None:
        while self._waiting:
            self._waiting = [(tokens, future) for tokens, future in self._waiting if not future.done()]  # given up
            # Whole images come before partial ones.
            length = max((len(tokens) for tokens, _ in self._waiting), default=0)
            batch = [item for item in self._waiting if len(item[0]) == length][: self.batch_size]
            self._waiting = [item for item in self._waiting if item not in batch]
            codes = [tokens for tokens, _ in batch]
            results = await asyncio.get_running_loop().run_in_executor(self._thread, self._compute, codes)
            for (_, future), result in zip(batch, results):
                if not future.done():
                    (future.set_exception if isinstance(result, Exception) else future.set_result)(result)
        self._busy = None

    def _compute(self, tokens: list[list[int]]) -> "list[np.ndarray | Exception]":
        """Return the images; where decoding them together fails, each alone, an error in the place of one that fails."""
        try:
            codes = torch.tensor(tokens)
            return list(decode_codes(self.tokenizer, codes, width=self.grid_size, batch_size=self.batch_size))
        except Exception as error:
            if len(tokens) != 1:
                return [result for one in tokens for result in self._compute([one])]
            return [error if isinstance(error, NotFiniteError) else RuntimeError(f"decoding failed: {error}")]


def file_bytes(image: np.ndarray, size: int | None = None, kind: str = "png", quality: int | None = None) -> bytes:
    """Return uint8 (side, side, 3) as the bytes of a "png", "jpeg" or "webp" file, resized bicubically to `size` pixels a side.

    quality: 0 to 100, of jpeg and webp; Pillow's default where None.
    """
    picture, buffer = Image.fromarray(image), io.BytesIO()
    if size is not None:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    picture.save(buffer, format=kind, **({} if quality is None else {"quality": quality}))
    return buffer.getvalue()
