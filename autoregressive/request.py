"""One image to draw: what every way to ask for images makes, and what pipeline, engines and the loop read.

request = Request({"label": 207}, sampling=SamplingConfig(cfg_scale=4.0), seed=0)
images = pipeline.batches([request])
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from reprlib import repr as shorten
from typing import TYPE_CHECKING, Any

from autoregressive.models.settings import SamplingConfig

if TYPE_CHECKING:
    from torch import Tensor

    from autoregressive.models.conditions import Condition


@dataclass(frozen=True, eq=False)
class Request:
    """One image.

    conditions: values by the names of the model's conditions: a label; a prompt, a caption's features (length, dim) or the
        path of their .npy file; whatever a condition of one's own reads.
    """

    conditions: Mapping[str, Any]
    negative: Mapping[str, Any] = field(default_factory=dict)  # what guidance leads away from, in place of "no class"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0  # of the noise (utils/rng.py:image_noise)
    index: int = 0  # number in a run of the seed
    known: "Tensor | None" = None  # int64 (N,) in raster order, tokens that are given, -1 for those to draw
    order: "Tensor | None" = None  # int64 (N,), raster indices by sequence position, where the image has its own
    particles: int = 1  # drawn for the image; one is taken by how likely it makes known tokens (models/particles.py)

    def read(self, conditions: "Mapping[str, Condition]", encoded: "Mapping[str, Tensor] | None" = None) -> "Request":
        """Return the request with its values as the model's conditions read them. Raises ValueError, FileNotFoundError.

        encoded: features by prompt, for conditions that are texts.
        """
        if set(self.conditions) != set(conditions) or not set(self.negative) <= set(conditions):
            known, asked = (", ".join(names) or "none" for names in (conditions, {**self.conditions, **self.negative}))
            raise ValueError(f"the model takes the conditions {known}; given were {asked}")
        require_guidance(self.sampling, self.negative)
        if self.sampling.control_strength != 1 and conditions and all(each.rows for each in conditions.values()):
            raise ValueError(
                f"--control-strength {self.sampling.control_strength:g} is for models with control images; this one takes "
                f"{', '.join(conditions)}: leave it out"
            )
        for name, number in (("seed", self.seed), ("index", self.index)):
            if isinstance(number, bool) or not isinstance(number, int) or not -(2**63) <= number < 2**63:
                raise ValueError(f"{name} must be a whole number of 64 bits, got {shorten(number)}")
        self.sampling.check_particles(self.particles)
        features = encoded or {}

        def value(name: str, given: Any) -> Any:
            is_prompt = isinstance(given, str) and conditions[name].text_dim
            return features.get(given, given) if is_prompt else given

        return replace(
            self,
            conditions={name: conditions[name].read(value(name, self.conditions[name])) for name in conditions},
            negative={name: conditions[name].read_negative(value(name, each)) for name, each in self.negative.items()},
        )

    def settings(self) -> dict[str, float]:
        """Return sampling settings, seed and index as plain values; `from_settings` reads them in another process."""
        return {**asdict(self.sampling), "seed": self.seed, "index": self.index}

    @classmethod
    def from_settings(cls, values: Mapping[str, Any] | None) -> "Request":
        """Return a request without conditions; what is not given has its default. Raises ValueError for a value out of range."""
        given = values or {}
        sampling = SamplingConfig(**{name: given[name] for name in SamplingConfig.fields() if name in given})
        return cls({}, {}, sampling, given.get("seed", 0), given.get("index", 0)).read({})


def require_guidance(sampling: SamplingConfig, negatives: Mapping[str, Any] | Sequence[Any]) -> None:
    """Raise ValueError where a negative is given and guidance, which would lead away from it, is off."""
    if negatives and not sampling.guided:
        raise ValueError(
            f"a negative has no effect without guidance: --cfg-scale is {sampling.cfg_scale:g}, give more than 1"
        )
