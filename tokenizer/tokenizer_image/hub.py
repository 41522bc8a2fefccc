"""The image tokenizers as models that the Hugging Face hub keeps.

    tokenizer = VQModelHF.from_pretrained("owner/name")             # or a folder that save_pretrained wrote
    tokenizer.save_pretrained("folder"); tokenizer.push_to_hub("owner/name")

tools/push_vae_to_hf.py makes one of any checkpoint. A VQModelHF is a VQModel: ImagePipeline and training take it.
"""

from collections.abc import Callable
from functools import cache, partial
from types import new_class
from typing import Any

from tokenizer.base import NETWORKS, Tokenizer
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel, VQModelArgs
from utils.checkpoint import parameter_count
from utils.origin import origin
from utils.pretrained import HubModel


class TokenizerForHub(Tokenizer, HubModel):
    """A tokenizer with save_pretrained, push_to_hub and from_pretrained; comes after the network among the bases."""

    def describe(self) -> str:
        return (
            f"An image tokenizer ({self.family}, {parameter_count(self.state_dict())}): "
            f"{self.codebook_size} codes of {self.quantize.width} numbers, one for {self.downsample}x{self.downsample} "
            "pixels."
        )

    def how_to_load(self, name: str) -> str:
        published = isinstance(self, VQModelHF)
        imported, made = ("VQModelHF",) * 2 if published else ("hub_class", f'hub_class("{self.name}")')
        return "\n".join(
            [
                f"from tokenizer.tokenizer_image.hub import {imported}",
                "",
                f'tokenizer = {made}.from_pretrained("{name}")',
                "codes = tokenizer.to_codes(images)  # (B, 3, H, W) in [-1, 1] -> (B, h, w)",
                "images = tokenizer.to_pixels(codes)",
            ]
        )


HUB = {"library_name": "pytorch", "tags": ["image-tokenizer"]}


class VQModelHF(VQModel, TokenizerForHub, **HUB):
    """A VQModel with save_pretrained, push_to_hub and from_pretrained."""

    def __init__(self, config: VQModelArgs):
        super().__init__(config)
        self.file_config = origin(**self.identity)


@cache
def hub_class(network: str) -> type[TokenizerForHub]:
    """Return the class of a network's tokenizers on the hub. Raises ValueError for a network that is not registered."""
    if network == "vqgan":
        return VQModelHF
    kind = NETWORKS[network]

    def init(self: Any, config: kind.Config) -> None:
        super(made, self).__init__(config)
        self.file_config = origin(**self.identity)

    made = new_class(f"{kind.__name__}HF", (kind, TokenizerForHub), HUB, lambda own: own.update(__init__=init))
    return made


# The names that earlier model cards import.
PatchTokenizerHF, MaskGITTokenizerHF, OpenMagvit2HF = map(hub_class, ("patches", "maskgit", "open-magvit2"))


def for_hub(tokenizer: Tokenizer, *what: Any) -> HubModel:
    """Return a tokenizer's weights (not a copy) as a model for the hub; `what` as `HubModel.holding` takes it."""
    return hub_class(tokenizer.name).holding(tokenizer, *what)


def new_tokenizer_for_hub(name: str, **overrides) -> VQModelHF:
    """Build a tokenizer of the table of sizes, with any field of VQModelArgs overridden."""
    return VQModelHF(VQModelArgs(**{**VQ_SIZES[name], **overrides}))


VQ_models_HF: dict[str, Callable[..., VQModelHF]] = {name: partial(new_tokenizer_for_hub, name) for name in VQ_models}
