"""Interface of engines to the server and the offline scripts: the tokens of one image a request, as they come.

engine = NativeEngine(pipeline)                     # native.py, through ImagePipeline
engine = await VllmEngine.start("c2i_L_384.pt")     # vllm_engine.py, where vLLM is installed
async for done in engine.generate(ImageRequest(label=207, cfg_scale=4.0, seed=0)):
    ...                                             # the last one has all tokens
"""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, fields
from typing import Protocol

from torch import Tensor

from autoregressive.models.sampling import SamplingConfig
from autoregressive.pipeline import check_guided, shorten
from autoregressive.serve.settings import DrawSettings

_SAMPLING = [field.name for field in fields(SamplingConfig)]


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
    caption_dim: int = 0  # 0 where it draws classes


@dataclass(frozen=True)
class ImageRequest:
    """One image: a label, or the features (length, caption_dim) of a prompt; and how its tokens are drawn.

    negative_class, negative_features: what guidance leads away from, in place of "no class" (also: num_classes) or "no
    caption". seed: of the image's noise. The other fields are those of SamplingConfig.
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

    @property
    def sampling(self) -> dict[str, float]:
        """The fields of SamplingConfig."""
        return {name: getattr(self, name) for name in _SAMPLING}

    @property
    def negative(self) -> int | Tensor | None:
        """The negative, of whichever kind."""
        return self.negative_features if self.negative_class is None else self.negative_class


class Engine(Protocol):
    """Draws tokens for many requests at once. `check` is cheap and comes first; `generate` may wait for a place."""

    info: ModelInfo

    @property
    def dead(self) -> bool:
        """Tell whether the engine has ended, by itself or by close(): requests raise RuntimeError then."""

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


def check_request(request: ImageRequest, info: ModelInfo) -> None:
    """Raises ValueError for a condition, a negative or a setting that the model cannot take."""
    DrawSettings.read({"seed": request.seed, **request.sampling})
    check_guided(SamplingConfig(**request.sampling), request.negative)
    if info.kind == "c2i":
        if request.label is None or request.features is not None or request.negative_features is not None:
            raise ValueError(f"this model draws classes: give a label, 0 to {info.num_classes - 1}, and no features")
        _check_label(request.label, info.num_classes, info.num_classes)
        if request.negative_class is not None:
            _check_label(request.negative_class, info.num_classes + 1, info.num_classes)
        return
    if request.features is None or request.label is not None or request.negative_class is not None:
        raise ValueError("this model draws from prompts: give a prompt's features, not a label")
    for features in (request.features, request.negative_features):
        if features is not None:
            _check_features(features, info.caption_dim)


def _check_label(label: object, end: int, classes: int) -> None:
    if isinstance(label, bool) or not isinstance(label, int):
        raise ValueError(f"a label is a whole number, got {shorten(repr(label))}")
    if not 0 <= label < end:
        raise ValueError(f"label {label} is out of range: the model has classes 0 to {classes - 1}")


def _check_features(features: object, width: int) -> None:
    if not isinstance(features, Tensor):
        raise ValueError(f"features are a tensor, got {shorten(repr(features))}")
    if features.dim() != 2 or features.shape[1] != width or not len(features) or not features.is_floating_point():
        raise ValueError(
            f"the features are {features.dtype} of shape {tuple(features.shape)}; this model takes floats of shape (length, "
            f"{width}), those of the text encoder it was trained with"
        )
    if not features.isfinite().all():
        raise ValueError(f"the features are not all finite: the encoder overflows in {features.dtype}")
