"""Prompts to features beside the event loop, the last ones kept."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from torch import Tensor


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
        """Return the prompt's features. Raises ValueError for one that cannot be read."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._find, prompt)
