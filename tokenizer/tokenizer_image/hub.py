"""The image tokenizers as models that the Hugging Face hub keeps.

    tokenizer = VQModelHF.from_pretrained("owner/name")             # or a folder that save_pretrained wrote
    tokenizer.save_pretrained("folder"); tokenizer.push_to_hub("owner/name")

tools/push_vae_to_hf.py makes one of any checkpoint. A VQModelHF is a VQModel: ImagePipeline and training take it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from tokenizer.base import Tokenizer
from tokenizer.maskgit import MaskGITConfig, MaskGITTokenizer
from tokenizer.open_magvit2 import OpenMagvit2, OpenMagvitConfig
from tokenizer.patches import PatchConfig, PatchTokenizer
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from tokenizer.tokenizer_image.vq_model import VQ_models, VQModel, VQModelArgs
from utils.checkpoint import parameter_count
from utils.origin import origin
from utils.pretrained import HubModel


class _Described(HubModel):
    """The card's words about a tokenizer."""

    def describe(self) -> str:
        return (
            f"An image tokenizer ({self.family}, {parameter_count(self.state_dict())}): "
            f"{self.codebook_size} codes of {self.quantize.width} numbers, one for {self.downsample}x{self.downsample} "
            "pixels."
        )

    def how_to_load(self, name: str) -> str:
        return "\n".join(
            [
                f"from tokenizer.tokenizer_image.hub import {type(self).__name__}",
                "",
                f'tokenizer = {type(self).__name__}.from_pretrained("{name}")',
                "codes = tokenizer.to_codes(images)  # (B, 3, H, W) in [-1, 1] -> (B, h, w)",
                "images = tokenizer.to_pixels(codes)",
            ]
        )


class VQModelHF(
    VQModel,
    _Described,
    library_name="pytorch",
    license="mit",
    paper_url="https://arxiv.org/abs/2406.06525",
    tags=["image-tokenizer", "vqgan"],
):
    """A VQModel with save_pretrained, push_to_hub and from_pretrained."""

    def __init__(self, config: VQModelArgs):
        super().__init__(config)
        self.file_config = origin(**self.identity)


class PatchTokenizerHF(PatchTokenizer, _Described, library_name="pytorch", license="mit", tags=["image-tokenizer"]):
    """A PatchTokenizer with save_pretrained, push_to_hub and from_pretrained."""

    def __init__(self, config: PatchConfig):
        super().__init__(config)
        self.file_config = origin(**self.identity)


class MaskGITTokenizerHF(MaskGITTokenizer, _Described, library_name="pytorch", tags=["image-tokenizer", "maskgit"]):
    """A MaskGITTokenizer with save_pretrained, push_to_hub and from_pretrained."""

    def __init__(self, config: MaskGITConfig):
        super().__init__(config)
        self.file_config = origin(**self.identity)


class OpenMagvit2HF(
    OpenMagvit2,
    _Described,
    library_name="pytorch",
    paper_url="https://arxiv.org/abs/2409.04410",
    tags=["image-tokenizer", "lookup-free"],
):
    """An OpenMagvit2 with save_pretrained, push_to_hub and from_pretrained."""

    def __init__(self, config: OpenMagvitConfig):
        super().__init__(config)
        self.file_config = origin(**self.identity)


def for_hub(tokenizer: Tokenizer, *what: Any) -> HubModel:
    """Return a tokenizer's weights (not a copy) as a model for the hub; `what` as `HubModel.holding` takes it.

    Raises ValueError for a network that the hub has no model of.
    """
    kinds: dict[str, type[HubModel]] = {
        "vqgan": VQModelHF,
        "patches": PatchTokenizerHF,
        "maskgit": MaskGITTokenizerHF,
        "open-magvit2": OpenMagvit2HF,
    }
    if tokenizer.network["name"] not in kinds:
        raise ValueError(
            f"the tokenizer is of the network {tokenizer.network['name']}; what can be saved is {', '.join(kinds)}"
        )
    return kinds[tokenizer.network["name"]].holding(tokenizer, *what)


def new_tokenizer_for_hub(name: str, **overrides) -> VQModelHF:
    """Build a tokenizer of the table of sizes, with any field of VQModelArgs overridden."""
    return VQModelHF(VQModelArgs(**{**VQ_SIZES[name], **overrides}))


VQ_models_HF: dict[str, Callable[..., VQModelHF]] = {name: partial(new_tokenizer_for_hub, name) for name in VQ_models}
