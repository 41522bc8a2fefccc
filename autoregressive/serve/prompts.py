"""Prompts to features beside the event loop, the last ones kept.

encoder = PromptEncoder(pipeline.encode, run=engine.run)      # or without `run`: in a thread of its own
features = await encoder("a red lantern")                     # (length, caption_dim)
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from torch import Tensor

from autoregressive.pipeline import TextEncoder
from autoregressive.text import check_prompts


class PromptEncoder:
    """Encodes prompts.

    Args:
        encode: as ImagePipeline.encode.
        run: calls a function where it may take long.
        keep: prompts whose features stay.
        rows: text tokens of a prompt that are read; None where that is not known.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str]], list[Tensor]],
        run: Callable[[Callable[[], Tensor]], Awaitable[Tensor]] | None = None,
        keep: int = 64,
        rows: int | None = None,
    ):
        self.rows = rows
        self._run = run or self._in_thread
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._find = lru_cache(keep)(lambda prompt: encode([prompt])[0])

    async def __call__(self, prompt: str) -> Tensor:
        """Return the prompt's features. Raises ValueError for one that cannot be read, FileNotFoundError without a T5."""
        return await self._run(lambda: self._find(prompt))

    def close(self) -> None:
        """Ends its thread, after what it is at."""
        self._thread.shutdown(cancel_futures=True)

    async def _in_thread(self, function: Callable[[], Tensor]) -> Tensor:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


def encoding_with(encoder: TextEncoder) -> Callable[[Sequence[str]], list[Tensor]]:
    """Return what ImagePipeline.encode does, where there is no pipeline: the rows of each prompt, on the CPU."""

    def encode(prompts: Sequence[str]) -> list[Tensor]:
        check_prompts(prompts, getattr(encoder, "use_text_preprocessing", True))
        found = []
        for prompt in prompts:
            features, mask = encoder.get_text_embeddings([prompt])
            found.append(features[0][mask[0].bool().to(features.device)].cpu())
        return found

    return encode
