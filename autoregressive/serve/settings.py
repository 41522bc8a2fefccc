"""Settings of a request on their way to vLLM's engine: plain values in `SamplingParams.extra_args`.

    settings = DrawSettings.read({"cfg_scale": 4.0, "top_k": 2000, "seed": 3})
    noise = settings.noise(tokens=256)

Over vLLM's own HTTP server the same names go into `vllm_xargs`. Needs no vLLM.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from reprlib import repr as short
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from autoregressive.models.sampling import SamplingConfig
from utils.rng import image_noise

Number = Annotated[float, Field(strict=True)]
Bits64 = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]  # numbers travel in 64 bits


@dataclass(frozen=True)
class DrawSettings(SamplingConfig):
    """Settings by which one image is drawn. seed, index: of its noise (utils/rng.py:image_noise)."""

    cfg_scale: Number = 1.0
    cfg_interval: Number = -1
    temperature: Number = 1.0
    top_k: Bits64 = 0
    top_p: Number = 1.0
    sample_logits: bool = True  # 0 and 1 too: vLLM's server has no truth values
    seed: Bits64 = 0
    index: Bits64 = 0

    @classmethod
    def read(cls, values: Mapping[str, object] | None) -> "DrawSettings":
        """From extra_args; what is not given has its default, other names are let be. Raises ValueError."""
        try:
            return _SETTINGS.validate_python({name: value for name, value in (values or {}).items() if name in _NAMES})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            why = str(first.get("ctx", {}).get("error") or "")
            raise ValueError(why or f"{first['loc'][0]}: {first['msg']}, got {short(first['input'])}") from error

    @property
    def config(self) -> SamplingConfig:
        """The settings without the noise: images of equal ones are drawn together."""
        return SamplingConfig(**{field.name: getattr(self, field.name) for field in fields(SamplingConfig)})

    def guides_token(self, token: int) -> bool:
        """Tell whether the step that draws token `token` of the image is guided: `cfg_interval` counts from the second on."""
        return self.guides(token - 1)

    def noise(self, tokens: int) -> Tensor:
        """The numbers that draw the image's tokens, float32 (tokens,)."""
        return image_noise(self.seed, [self.index], tokens)[0]


_NAMES = {field.name for field in fields(DrawSettings)}
_SETTINGS = TypeAdapter(DrawSettings)
