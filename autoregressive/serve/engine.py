"""What the server and the offline scripts ask of an engine: the tokens of one image a request, as they come.

engine = NativeEngine(pipeline)                     # native.py, through ImagePipeline
engine = await VllmEngine.start(folder)             # vllm_engine.py, where vLLM is installed
async for done in engine.generate(ImageRequest(label=207, cfg_scale=4.0, seed=0)):
    ...                                             # the last one has all tokens
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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


@dataclass(frozen=True)
class ImageRequest:
    """One image: a label, or the features (length, caption_dim) of a prompt; and how its tokens are drawn.

    seed: of the image's noise. The other fields are those of SamplingConfig.
    """

    label: int | None = None
    features: Tensor | None = None
    seed: int = 0
    cfg_scale: float = 1.0
    cfg_interval: float = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    sample_logits: bool = True
    negative_class: int | None = None
    negative_features: Tensor | None = None


class Engine(Protocol):
    """Draws tokens for many requests at once. `check` is cheap and comes first; `generate` may wait for a place."""

    info: ModelInfo

    @property
    def dead(self) -> bool:
        """Whether the engine has ended, by itself or by close(): requests raise RuntimeError then."""

    def token_age(self) -> float | None:
        """Seconds since the last token (or since work came) while anything is in flight; None where nothing is."""

    def check(self, request: ImageRequest) -> None:
        """Raises ValueError, with what is wrong, for a request that the model cannot take."""

    def generate(self, request: ImageRequest) -> AsyncIterator[list[int]]:
        """Yields the tokens so far, in raster order, growing; the last has all. Closing it early gives the place up.

        An engine that is not `raster` yields once. Raises RuntimeError where the engine has died, NotFiniteError where the
        image's logits are NaN or infinite.
        """

    async def close(self) -> None:
        """Ends the engine; requests that run are ended with RuntimeError."""
