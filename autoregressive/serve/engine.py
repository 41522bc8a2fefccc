"""Interface of engines to the server and the offline scripts: the tokens of one image a request, as they come.

engine = NativeEngine(pipeline)                     # native.py, through ImagePipeline
engine = await VllmEngine.start("c2i_L_384.pt")     # vllm_engine.py, where vLLM is installed
async for done in engine.generate(Request({"label": 207}, seed=0)):
    ...                                             # the last one has all tokens
"""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from autoregressive.request import Request


@dataclass(frozen=True)
class ModelInfo:
    """Description of a server's model. name: as `GET /v1/models` has it. kind: "c2i" or "t2i".

    classes: names that the checkpoint records, by label.
    """

    name: str
    kind: str
    image_size: int
    tokens: int  # of an image
    num_classes: int  # 0 where it draws from prompts
    raster: bool  # tokens come in raster order, so that the first rows of an image can be shown
    classes: tuple[str, ...] = ()


class Engine(Protocol):
    """Draws tokens for many requests at once. `check` is cheap and comes first; `generate` may wait for a place."""

    info: ModelInfo

    @property
    def dead(self) -> bool:
        """Tell whether the engine has ended, by itself or by close(): requests raise RuntimeError then."""

    def token_age(self) -> float | None:
        """Seconds since the last token (or since work came) while anything is in flight; None where nothing is."""

    def check(self, request: Request) -> None:
        """Raises ValueError, with what is wrong, for a request that the model cannot take."""

    def generate(self, request: Request) -> AsyncIterator[list[int]]:
        """Yields the tokens so far, in raster order, growing; the last has all. Closing it early gives the place up.

        An engine that is not `raster` yields once. Raises RuntimeError where the engine has died, NotFiniteError where the
        image's logits are NaN or infinite.
        """

    async def close(self) -> None:
        """Ends the engine; requests that run are ended with RuntimeError."""


class TokenClock:
    """Age of an engine's last token. Entered for as long as something is in flight.

    with clock:
        ...; clock.tick()
    """

    def __init__(self):
        self._in_flight, self._ticked_at = 0, 0.0

    def tick(self) -> None:
        """Notes that work goes on; from any thread."""
        self._ticked_at = time.monotonic()

    def age(self) -> float | None:
        """Seconds since the last tick; None while nothing is in flight."""
        return time.monotonic() - self._ticked_at if self._in_flight else None

    def __enter__(self) -> None:
        if not self._in_flight:
            self.tick()
        self._in_flight += 1

    def __exit__(self, *_: object) -> None:
        self._in_flight -= 1
