"""How a request's settings travel to the engine: as plain values in vLLM's `SamplingParams.extra_args`.

    extra_args = to_extra_args(ImageRequest(label=207, cfg_scale=4.0, seed=3))
    settings = DrawSettings.read(extra_args)
    noise = settings.noise(tokens=256)

Over vLLM's own HTTP server the same names go into `vllm_xargs`. Needs no vLLM.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from autoregressive.models.sampling import SamplingConfig
from autoregressive.serve.engine import ImageRequest
from utils.rng import image_noise

_NUMBERS = {"cfg_scale", "cfg_interval", "temperature", "top_p"}
_INTEGERS = {"top_k", "seed", "index"}
NAMES = {field.name for field in fields(SamplingConfig)} | {"seed", "index"}
_LARGEST = 2**63  # numbers travel in 64 bits


@dataclass(frozen=True)
class DrawSettings:
    """How the tokens of one image are drawn. seed, index: of its noise (utils/rng.py:image_noise)."""

    config: SamplingConfig
    seed: int = 0
    index: int = 0

    @classmethod
    def read(cls, values: Mapping[str, object] | None) -> "DrawSettings":
        """From extra_args; what is not given has SamplingConfig's default, other names are let be. Raises ValueError."""
        given = {name: value for name, value in (values or {}).items() if name in NAMES}
        for name, value in given.items():
            given[name] = _checked(name, value)
        seed, index = given.pop("seed", 0), given.pop("index", 0)
        return cls(SamplingConfig(**given), seed, index)

    def guides(self, token: int) -> bool:
        """Whether the step that draws token `token` of the image is guided: `cfg_interval` counts from the second on."""
        return self.config.guides(token - 1)

    def noise(self, tokens: int) -> Tensor:
        """The numbers that draw the image's tokens, float32 (tokens,)."""
        return image_noise(self.seed, [self.index], tokens)[0]


def to_extra_args(request: ImageRequest, index: int = 0) -> dict[str, int | float | bool]:
    """The request's settings as extra_args. Raises ValueError for one that SamplingConfig refuses."""
    values = {name: getattr(request, name) for name in NAMES - {"index"}} | {"index": index}
    DrawSettings.read(values)
    return values


def _checked(name: str, value: object) -> int | float | bool:
    """The value as the number that it should be. Raises ValueError for something else."""
    if name == "sample_logits":
        if value in (0, 1):  # True and False are these too
            return bool(value)
        raise ValueError(f"sample_logits is true or false, got {value!r}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is a number, got {value!r}")
    if name in _NUMBERS:
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(f"{name} is out of range") from error
    if value != value or value in (float("inf"), float("-inf")) or int(value) != value:
        raise ValueError(f"{name} is a whole number, got {value!r}")
    if not -_LARGEST <= value < _LARGEST:
        raise ValueError(f"{name} is between -2^63 and 2^63 - 1, got {value!r}")
    return int(value)
