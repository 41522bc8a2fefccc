"""Interface of engines to the server and the offline scripts: the tokens of one image a request, as they come.

engine = NativeEngine(pipeline)                     # native.py, through ImagePipeline
engine = await VllmEngine.start("c2i_L_384.pt")     # vllm_engine.py, where vLLM is installed
async for done in engine.generate(Request({"label": 207}, seed=0)):
    ...                                             # the last one has all tokens
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from autoregressive.class_names import class_names
from autoregressive.editing import Edited, Hole
from autoregressive.models.trunk import Trunk
from autoregressive.request import Request

NOT_DRAWN = -1  # in place of a token


@dataclass(frozen=True)
class ModelInfo:
    """Description of a server's model, as `GET /v1/models` has it."""

    name: str
    kind: str  # "c2i" or "t2i"
    image_size: int
    tokens: int  # of an image
    num_classes: int  # 0 where it draws from prompts
    raster: bool  # tokens are drawn in raster order
    classes: tuple[str, ...] = ()  # names by label
    control: str | None = None  # kind of the control images that it draws by


class Engine(Protocol):
    """Draws tokens for many requests at once. `check` is cheap and comes first; `generate` may wait for a place."""

    info: ModelInfo
    edits: bool  # whether there is `edit`

    @property
    def dead(self) -> bool:
        """Tell whether the engine has ended, by itself or by close(): requests raise RuntimeError then."""

    def check(self, request: Request) -> None:
        """Raises ValueError, with what is wrong, for a request that the model cannot take."""

    def generate(self, request: Request) -> AsyncIterator[list[int]]:
        """Yields the tokens so far, in raster order, growing; the last has all. Closing it early gives the place up.

        An engine that is not `raster` yields N numbers, NOT_DRAWN where no token stands yet. Raises RuntimeError where the
        engine has died, NotFiniteError where the image's logits are NaN or infinite.
        """

    def edit(self, request: Request, hole: Hole, rounds: int, keep_pixels: bool) -> AsyncIterator[list[int] | Edited]:
        """Fill the hole of a picture: yields [] as long as it draws, then the picture. Raises as `generate` does.

        The request has the number of particles. rounds, keep_pixels: as editing.py:edit takes them.
        """

    async def close(self) -> None:
        """Ends the engine; requests that run are ended with RuntimeError."""


def model_info(gpt: Trunk, name: str, image_size: int) -> ModelInfo:
    """Return the description of a GPT that is served under a name."""
    text, recorded = gpt.args.model_type == "t2i", gpt.file_config.get("classes", ())
    return ModelInfo(
        name=name,
        kind=gpt.args.model_type,
        image_size=image_size,
        tokens=gpt.layout.tokens,
        num_classes=0 if text else gpt.args.num_classes,
        raster=gpt.layout.is_raster,
        classes=() if text else tuple(class_names(gpt.args.num_classes, recorded=recorded)),
        control=gpt.conditions["control"].config["kind"] if "control" in gpt.conditions else None,
    )
