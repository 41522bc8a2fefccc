"""The GPTs as models that the Hugging Face hub keeps.

    model = TransformerHF.from_pretrained("owner/name")             # or a folder that save_pretrained wrote
    model.save_pretrained("folder"); model.push_to_hub("owner/name")

tools/push_gpt_to_hf.py makes one of any checkpoint. A TransformerHF is a Transformer: ImagePipeline and training take it.
"""

from collections.abc import Callable
from functools import partial

from autoregressive.models.gpt import Transformer
from autoregressive.models.sizes import GPT_SIZES
from autoregressive.models.trunk import ModelArgs
from autoregressive.released import describe
from utils.pretrained import HubModel


class TransformerHF(
    Transformer,
    HubModel,
    library_name="pytorch",
    license="mit",
    paper_url="https://arxiv.org/abs/2406.06525",
    tags=["image-generation", "autoregressive"],
):
    """A Transformer with save_pretrained, push_to_hub and from_pretrained."""

    def __init__(self, config: ModelArgs):
        super().__init__(config)

    def describe(self) -> str:
        side, found = self.layout.grid_size, describe(self.args.identity, self.state_dict())
        dtype = str(self.tok_embeddings.weight.dtype).removeprefix("torch.")
        return f"{found}, {side}x{side} image tokens, weights in {dtype}."

    def how_to_load(self, name: str) -> str:
        asked = "[0]" if self.args.model_type == "c2i" else '["a red lantern"]'
        return "\n".join(
            [
                "from autoregressive.hub import TransformerHF",
                "from autoregressive.pipeline import ImagePipeline",
                "from tokenizer.load import load_tokenizer",
                "",
                f'gpt = TransformerHF.from_pretrained("{name}")',
                'pipeline = ImagePipeline(gpt, load_tokenizer("the tokenizer it was trained with"))',
                f"pipeline({asked}, cfg_scale=4.0, seed=0)[0].save('image.png')",
            ]
        )


def build_gpt_for_hub(name: str, **overrides) -> TransformerHF:
    """A model of a size in the table, with any field of ModelArgs overridden."""
    return TransformerHF(ModelArgs(**GPT_SIZES[name].fields | overrides))


GPT_models_HF: dict[str, Callable[..., TransformerHF]] = {
    name: partial(build_gpt_for_hub, name) for name, size in GPT_SIZES.items() if size.trunk == "llama"
}
