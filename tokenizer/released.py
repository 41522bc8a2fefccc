"""Adapters of published tokenizers, known by the names of their weights: from a file to a config and weights under our names.

    config, state = adapted(read_checkpoint("vq_ds16_c2i.pt"))

LlamaGen's files are read here, those of each other group by a function of tokenizer/other_families.py. Files that this project
wrote say their config themselves.
"""

import itertools
import json
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor

from tokenizer.tokenizer_image.sizes import size_name
from utils.checkpoint import Checkpoint, State

Adapted = tuple[dict[str, Any], State]
_LLAMAGEN = "encoder.conv_blocks.0.res.0.conv1.weight"


def adapted(checkpoint: Checkpoint) -> Adapted | None:
    """Return the config and the weights of a tokenizer's checkpoint; None for what no family knows.

    Raises ValueError for a family's file that lacks weights or has impossible shapes.
    """
    if "network" in checkpoint.config:
        return checkpoint.config, checkpoint.model
    if _LLAMAGEN not in checkpoint.model:
        return import_module("tokenizer.other_families").adapted(checkpoint)
    # LlamaGen's files say nothing, this project's first ones the codebook's norm; released ones have it.
    l2_norm = recorded_l2_norm(checkpoint) is not False
    return vqgan_config(checkpoint, checkpoint.model, l2_norm=l2_norm), checkpoint.model


def recorded_l2_norm(checkpoint: Checkpoint) -> bool | None:
    """Return whether a file says that its codes are l2-normalised, which its shapes do not show; None where it does not say.

    The first editions said it in `config`, in the flags of the run, or in the hub's config.json beside the weights.
    """
    beside = checkpoint.path.with_name("config.json")
    try:
        hub = dict(json.loads(beside.read_bytes())) if checkpoint.format == "safetensors" and beside.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{beside} is damaged ({error}): download or copy it again") from error
    if "quantizer" in checkpoint.config:
        return checkpoint.config["quantizer"].get("l2_norm")
    sources = (checkpoint.config.get("vq"), checkpoint.args, hub)
    return next((source["codebook_l2_norm"] for source in sources if source and "codebook_l2_norm" in source), None)


class Shapes:
    """The shapes of a file's weights, from which a config is read."""

    def __init__(self, checkpoint: Checkpoint, state: Mapping[str, Tensor]):
        self.path, self.state = checkpoint.path, state

    def __call__(self, name: str) -> list[int]:
        """Return the shape of an entry. Raises ValueError where it is missing."""
        if name not in self.state:
            raise ValueError(f"{self.path} is not a whole image tokenizer: it has no entry {name!r}")
        return list(self.state[name].shape)

    def count(self, name: str) -> int:
        """Return how many numbers from 0 on give an entry's name in the place of {}."""
        return next(i for i in itertools.count() if name.format(i) not in self.state)

    def multipliers(self, name: str) -> list[int]:
        """Return the output channels of the entries of this name, one a level, in units of those of the first layer.

        Raises ValueError where level 0 is missing, or a number of channels is no multiple of them.
        """
        ch, mults = self("encoder.conv_in.weight")[0], []
        for level in range(self.count(name) or 1):
            channels = self(name.format(level))[0]
            if channels % ch:
                raise ValueError(
                    f"{self.path}: {name.format(level)} has {channels} channels, not a multiple of the {ch} of the first layer"
                )
            mults.append(channels // ch)
        return mults


def vqgan_config(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], quantizer: str = "vq", **options: Any
) -> dict[str, Any]:
    """Read the config of a VQGAN with a codebook off the shapes of its weights. options: of the quantiser.

    Raises ValueError that names an entry that is missing, or a width that is no multiple of the first one.
    """
    shapes = Shapes(checkpoint, state)
    encoder, decoder = (
        shapes.multipliers(part + ".conv_blocks.{}.res.0.conv1.weight") for part in ("encoder", "decoder")
    )
    levels = {"encoder_ch_mult": encoder, "decoder_ch_mult": decoder[::-1]}
    codebook_size, width = shapes("quantize.embedding.weight")
    attended = [i for i in range(len(encoder)) if f"encoder.conv_blocks.{i}.attn.0.q.weight" in state]
    inside = {
        "z_channels": shapes("encoder.conv_out.weight")[0],
        "ch": shapes("encoder.conv_in.weight")[0],
        "blocks": shapes.count("encoder.conv_blocks.0.res.{}.conv1.weight"),
        "attention": [-1] if attended == [len(encoder) - 1] else attended,
    }
    network = {"name": "vqgan", **levels, **inside}
    if quantizer == "vq":
        options["show_usage"] = "quantize.codebook_used" in state
    codes = {"name": quantizer, "codebook_size": codebook_size, "codebook_embed_dim": width, **options}
    return {"family": size_name(network) or "VQGAN", "network": network, "quantizer": codes}


def looks_like(state: Mapping[str, Tensor]) -> str:
    """Guess what a state dict of another model is of, as a clause of an error's message."""

    def has(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in state)

    gpt = {"layers.0.attention.wqkv.weight", "tok_embeddings.weight"} <= state.keys() and has(r"cls_embedding\.")
    kinds = {
        "a TiTok tokenizer, which has MaskGIT's decoder without its encoder": has(r"pixel_decoder\."),
        "a Janus model (give it as --vq-ckpt for the tokenizer inside)": has(r"gen_vision_model\.|(model\.)?vqmodel\."),
        "a VQGAN of taming-transformers (give it as --vq-ckpt)": has(r"encoder\.down\.0\.block\."),
        "a VQ image tokenizer (give it as --vq-ckpt)": has(r"quantize\.embedding\.weight") and has(r"encoder\."),
        "an image tokenizer without a codebook (give it as --vq-ckpt)": has(r"encoder\.conv_blocks\."),
        "a GPT (give it as --gpt-ckpt)": gpt,
        "a LoRA adapter (merge it into its model, and give that)": has(r".*\.lora_"),
        "a part of a GPT": has(r"layers\.\d+\.attention\.wqkv\.weight"),
        "a discriminator": has(r"main\.0\.weight") or (has(r"blocks\.") and has(r"final_linear\.")),
        "a T5 text encoder (give it as --t5-path)": has(r"shared\.weight") and has(r"encoder\.block\."),
        "an autoencoder of diffusers (tokenizer/vae/reconstruction_vae_ddp.py reads it)": has(
            r"encoder\.down_blocks\."
        ),
        "a CLIP": has(r"visual\.|vision_model\."),
        "a language model of transformers": has(r".*self_attn"),
    }
    kind = next((kind for kind, fits in kinds.items() if fits), None)
    return f"it looks like {kind}" if kind else f"its first weights are {', '.join(list(state)[:5]) or 'none'}"
