"""The image tokenizers as models that the Hugging Face hub keeps.

    tokenizer = VQModelHF.from_pretrained("owner/name")             # or a folder that save_pretrained wrote
    tokenizer.save_pretrained("folder"); tokenizer.push_to_hub("owner/name")

tools/push_vae_to_hf.py makes one of any checkpoint. A VQModelHF is a VQModel: ImagePipeline and training take it.
"""

from collections.abc import Callable
from functools import partial

from tokenizer.tokenizer_image.load import vq_record
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from tokenizer.tokenizer_image.vq_model import VQModel, VQModelArgs, vq_model_name
from utils.pretrained import HubModel
from utils.recognition import count_parameters, format_count


class VQModelHF(
    VQModel,
    HubModel,
    library_name="pytorch",
    license="mit",
    paper_url="https://arxiv.org/abs/2406.06525",
    tags=["image-tokenizer", "vqgan"],
):
    """A VQModel with save_pretrained, push_to_hub and from_pretrained."""

    def __init__(self, config: VQModelArgs):
        super().__init__(config)
        self.file_config = vq_record(config)

    def describe(self) -> str:
        config = self.config
        return (
            f"An image tokenizer ({vq_model_name(config) or 'VQGAN'}, {format_count(count_parameters(self.state_dict()))}): "
            f"{config.codebook_size} codes of {config.codebook_embed_dim} numbers, one for {self.downsample}x{self.downsample} "
            "pixels."
        )

    def how_to_load(self, name: str) -> str:
        return "\n".join(
            [
                "from tokenizer.tokenizer_image.hub import VQModelHF",
                "",
                f'tokenizer = VQModelHF.from_pretrained("{name}")',
                "quant, _, (_, _, codes) = tokenizer.encode(images)  # (B, 3, H, W) in [-1, 1]",
                "images = tokenizer.decode_code(codes, shape=quant.shape)",
            ]
        )


def build_tokenizer_for_hub(name: str, **overrides) -> VQModelHF:
    """A tokenizer of the table of sizes, with any field of VQModelArgs overridden."""
    return VQModelHF(VQModelArgs(**{**VQ_SIZES[name], **overrides}))


VQ_models_HF: dict[str, Callable[..., VQModelHF]] = {name: partial(build_tokenizer_for_hub, name) for name in VQ_SIZES}
