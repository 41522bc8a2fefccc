"""From tokens to pictures beside the event loop: what comes while a batch is decoded is decoded together after it.

decoder = Decoder(tokenizer, grid_size=24)
image = await decoder.decode(tokens)                    # uint8 (384, 384, 3); of fewer tokens the first rows, the rest grey
jpeg = await decoder.file(tokens, 256, "jpeg", 90)      # bytes
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
    """Decodes for the requests of one event loop, in a thread of its own; other threads resize and write the files.

    grid_size: tokens a side. batch_size: images decoded at once.
    """

    def __init__(self, tokenizer: Tokenizer, grid_size: int, batch_size: int = 8):
        self.tokenizer, self.grid_size, self.batch_size = tokenizer, grid_size, batch_size
        self._waiting: list[tuple[list[int], asyncio.Future]] = []
        self._busy: asyncio.Task | None = None
        # One thread: the tokenizer is put into a mode while it decodes, and PyTorch has threads of its own.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        # Pictures of the model's size do not wait for those that are resized, which may take a hundred times as long.
        self._writing = ThreadPoolExecutor(2, thread_name_prefix="files")
        self._resizing = ThreadPoolExecutor(1, thread_name_prefix="resized files")

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self.grid_size * self.tokenizer.downsample

    async def decode(self, tokens: list[int]) -> np.ndarray:
        """Return tokens in raster order as uint8 (side, side, 3), as ImagePipeline decodes them.

        Of fewer than an image's the whole rows are decoded and the rest is grey.
        """
        rows = len(tokens) // self.grid_size
        if rows == self.grid_size:
            return await self._decode(tokens)
        canvas = np.full((self.image_size, self.image_size, 3), GREY, np.uint8)
        if rows:
            image = await self._decode(tokens[: rows * self.grid_size])
            canvas[: len(image)] = image
        return canvas

    async def file(
        self, tokens: list[int], size: int | None = None, kind: str = "png", quality: int | None = None
    ) -> bytes:
        """Return the bytes of a picture's file, of `size` pixels a side."""
        image = await self.decode(tokens)
        thread = self._writing if size in (None, self.image_size) else self._resizing
        return await asyncio.get_running_loop().run_in_executor(thread, file_bytes, image, size, kind, quality)

    async def _decode(self, tokens: list[int]) -> np.ndarray:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((tokens, future))
        if self._busy is None:
            self._busy = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                self._waiting = [(tokens, future) for tokens, future in self._waiting if not future.done()]  # given up
                if not self._waiting:
                    break
                length = max(len(tokens) for tokens, _ in self._waiting)  # whole images come before partial ones
                batch = [item for item in self._waiting if len(item[0]) == length][: self.batch_size]
                self._waiting = [item for item in self._waiting if item not in batch]
                results = await loop.run_in_executor(self._thread, self._compute, [tokens for tokens, _ in batch])
                for (_, future), result in zip(batch, results):
                    if future.done():
                        continue
                    if isinstance(result, Exception):
                        future.set_exception(result)
                    else:
                        future.set_result(result)
        finally:
            self._busy = None

    def _compute(self, tokens: list[list[int]]) -> "list[np.ndarray | Exception]":
        """Return the images; where decoding them together fails, each alone, an error in the place of one that fails."""
        try:
            codes = torch.tensor(tokens)
            return list(decode_codes(self.tokenizer, codes, width=self.grid_size, batch_size=self.batch_size))
        except Exception as error:
            if len(tokens) > 1:
                return [result for one in tokens for result in self._compute([one])]
            return [error if isinstance(error, NotFiniteError) else RuntimeError(f"decoding failed: {error}")]

    async def close(self) -> None:
        """Ends the threads, after what they are at."""
        for threads in (self._thread, self._writing, self._resizing):
            await asyncio.to_thread(threads.shutdown)


def file_bytes(image: np.ndarray, size: int | None = None, kind: str = "png", quality: int | None = None) -> bytes:
    """Return uint8 (side, side, 3) as a file's bytes.

    Args:
        image: the picture.
        size: pixels a side to resize to, bicubically.
        kind: "png", "jpeg" or "webp".
        quality: 0 to 100, of jpeg and webp; Pillow's default where None.
    """
    picture, buffer = Image.fromarray(image), io.BytesIO()
    if size not in (None, picture.width):
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    picture.save(buffer, format=kind, **({} if quality is None else {"quality": quality}))
    return buffer.getvalue()
