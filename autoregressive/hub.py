"""The GPTs as models that the Hugging Face hub keeps.

tools/push_gpt_to_hf.py makes one of any checkpoint. A TransformerHF is a Transformer: ImagePipeline and training take it.
"""

from collections.abc import Callable
from functools import cache, partial
from types import new_class
from typing import Any

from autoregressive.models.build import TRUNKS
from autoregressive.models.gpt import Transformer
from autoregressive.models.sizes import GPT_SIZES
from autoregressive.models.trunk import ModelArgs, Trunk
from autoregressive.released import describe
from utils.pretrained import HubModel


class GPTForHub(Trunk, HubModel):
    """A trunk with save_pretrained, push_to_hub and from_pretrained; comes after the trunk among the bases."""

    def describe(self) -> str:
        side, found = self.layout.grid_size, describe(self.args.identity, self.state_dict())
        dtype = str(self.tok_embeddings.weight.dtype).removeprefix("torch.")
        return f"{found}, {side}x{side} image tokens, weights in {dtype}."

    def how_to_load(self, name: str) -> str:
        llama = isinstance(self, TransformerHF)
        imported, made = ("TransformerHF",) * 2 if llama else ("hub_class", f'hub_class("{self.args.trunk}")')
        asked = "[0]" if self.args.model_type == "c2i" else '["a red lantern"]'
        return f"""from autoregressive.hub import {imported}
from autoregressive.pipeline import ImagePipeline
from tokenizer.load import load_tokenizer

gpt = {made}.from_pretrained("{name}")
pipeline = ImagePipeline(gpt, load_tokenizer("the tokenizer it was trained with"))
pipeline({asked}, cfg_scale=4.0, seed=0)[0].save('image.png')"""


TAGS, PAPER = ["image-generation", "autoregressive"], "https://arxiv.org/abs/2406.06525"
HUB = {"library_name": "pytorch", "paper_url": PAPER, "tags": TAGS}


class TransformerHF(Transformer, GPTForHub, **HUB):
    """A Transformer with save_pretrained, push_to_hub and from_pretrained."""

    def __init__(self, config: ModelArgs):
        super().__init__(config)


@cache
def hub_class(trunk: str) -> type[GPTForHub]:
    """Return the class of a trunk's models on the hub. Raises ValueError for a trunk that is not registered."""
    if trunk == "llama":
        return TransformerHF

    def init(self: Any, config: ModelArgs) -> None:
        super(made, self).__init__(config)

    kind = TRUNKS[trunk]
    made = new_class(f"{kind.__name__}HF", (kind, GPTForHub), HUB, lambda own: own.update(__init__=init))
    return made


def build_gpt_for_hub(name: str, **overrides) -> TransformerHF:
    """Build a model of a size in the table, with any field of ModelArgs overridden."""
    return TransformerHF(ModelArgs(**GPT_SIZES[name].fields | overrides))


GPT_models_HF: dict[str, Callable[..., TransformerHF]] = {
    name: partial(build_gpt_for_hub, name) for name, size in GPT_SIZES.items() if size.trunk == "llama"
}
