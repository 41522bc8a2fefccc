"""Adapters of published tokenizers, known by the names of their weights: from a file to a config and weights under our names.

    config, state = adapted(read_checkpoint("vqgan_imagenet_f16_1024.ckpt"))

A released family is one function here. Files that this project wrote say their config themselves. A config's "averaged" says
that published figures and codes are of the averaged weights: load_tokenizer then takes these unless it is told otherwise.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tokenizer.tokenizer_image.sizes import magvit_name, size_name
from tokenizer.vqgan.sizes import VQGAN_FROM_TAMING
from utils.checkpoint import Checkpoint, State

Adapted = tuple[dict[str, Any], State]
_JANUS = re.compile(r"gen_vision_model\.|(model\.)?vqmodel\.")
_LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(.+)")
_MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}
_MIDDLE_PART = re.compile(r"(encoder|decoder)\.mid\.(block_1|attn_1|block_2)\.(.+)")


def adapted(checkpoint: Checkpoint) -> Adapted | None:
    """Return the config and the weights of a tokenizer's checkpoint; None for what no family knows.

    Raises ValueError for a family's file that lacks weights or has impossible shapes.
    """
    if "network" in checkpoint.config:
        return checkpoint.config, checkpoint.model
    return next((found for adapter in FAMILIES.values() if (found := adapter(checkpoint)) is not None), None)


def llamagen(checkpoint: Checkpoint) -> Adapted | None:
    """Adapt LlamaGen's files and this project's first ones. They say nothing, or the codebook's norm; released ones have it."""
    if "encoder.conv_blocks.0.res.0.conv1.weight" not in checkpoint.model:
        return None
    l2_norm = recorded_l2_norm(checkpoint) is not False
    return vqgan_config(checkpoint, checkpoint.model, l2_norm=l2_norm), checkpoint.model


def janus(checkpoint: Checkpoint) -> Adapted | None:
    """Adapt the VQ-16 inside Janus: of DeepSeek's files, which have LlamaGen's names, and of transformers'.

    transformers counts the decoder's levels from the latents: its up.0 has an upsampling, taming's has none. The rule is
    LlamaGen's: latents and rows are l2-normalised. (transformers' own `encode` leaves that out.)
    """
    inside = {match.string[match.end() :]: match.string for match in map(_JANUS.match, checkpoint.model) if match}
    if not inside and "decoder.up.0.upsample.conv.weight" not in checkpoint.model:
        return None
    state = {name: checkpoint.model[whole] for name, whole in inside.items()} or checkpoint.model
    state = from_taming(state, deepest_first=True)
    return vqgan_config(checkpoint, state, l2_norm=True), state


def ibq(checkpoint: Checkpoint) -> Adapted | None:
    """Adapt IBQ's files, whose names are taming's: four blocks a level, or averaged weights under their names without dots."""
    state = checkpoint.model
    if "encoder.down.0.block.0.conv1.weight" not in state:
        return None
    if "encoder.down.0.block.3.conv1.weight" not in state and "model_ema" not in checkpoint.extra:
        return None
    state = from_taming(state)
    config = vqgan_config(checkpoint, state, "ibq")
    return {**config, "averaged": checkpoint.ema is not None}, state


def taming(checkpoint: Checkpoint) -> Adapted | None:
    """Adapt the VQGANs of taming-transformers, latent diffusion and Chameleon."""
    if "encoder.down.0.block.0.conv1.weight" not in checkpoint.model:
        return None
    state = from_taming(checkpoint.model)
    return vqgan_config(checkpoint, state, l2_norm=False), state


def maskgit(checkpoint: Checkpoint) -> Adapted | None:
    """Adapt MaskGIT's VQGAN carried to PyTorch, whose names are kept: RAR's tokenizer."""
    state = checkpoint.model
    if not {"encoder.mid.0.conv1.weight", "decoder.up.1.upsample_conv.weight"} <= state.keys():
        return None
    shapes = Shapes(checkpoint, state)
    codebook_size, width = shapes("quantize.embedding.weight")
    network = {
        "name": "maskgit",
        "ch_mult": shapes.multipliers("encoder.down.{}.block.0.conv1.weight"),
        "ch": shapes("encoder.conv_in.weight")[0],
        "blocks": shapes.count("encoder.down.0.block.{}.conv1.weight"),
    }
    quantizer = {"name": "vq_legacy", "codebook_size": codebook_size, "codebook_embed_dim": width}
    return {"family": "MaskGIT-VQGAN", "network": network, "quantizer": quantizer}, state


def open_magvit2(checkpoint: Checkpoint) -> Adapted | None:
    """Adapt Open-MAGVIT2's files, whose names are kept; the discriminator and LPIPS (`loss.…`) are dropped."""
    if not {"encoder.mid_block.0.conv1.weight", "decoder.adaptive.0.gamma.weight"} <= checkpoint.model.keys():
        return None
    state = {name: tensor for name, tensor in checkpoint.model.items() if not name.startswith("loss.")}
    shapes = Shapes(checkpoint, state)
    network = {
        "name": "open-magvit2",
        "ch_mult": shapes.multipliers("encoder.down.{}.block.0.conv1.weight"),
        "ch": shapes("encoder.conv_in.weight")[0],
        "blocks": shapes.count("encoder.down.0.block.{}.conv1.weight"),
    }
    quantizer = {"name": "lfq", "codebook_size": 2 ** shapes("encoder.conv_out.weight")[0]}
    return {"family": magvit_name(len(network["ch_mult"])), "network": network, "quantizer": quantizer}, state


def untold(checkpoint: Checkpoint, config: Mapping[str, Any]) -> list[str]:
    """Return what the weights of a published file do not show and a caller may know, a line each."""
    lines = []
    if config.get("averaged") is False:
        lines.append("it has raw weights alone; IBQ's figures, and the codes of its GPTs, are of the averaged ones")
    known = [known.shape for known in VQGAN_FROM_TAMING.values()]
    network, codes = config["network"], config["quantizer"]
    shape = (codes.get("codebook_size"), codes.get("codebook_embed_dim"), tuple(network.get("encoder_ch_mult", ())))
    if config["family"].startswith("Open-MAGVIT2") and checkpoint.ema is not None:
        lines.append(
            "its raw weights are read, of which its GPTs' codes are; its published rFID is of the averaged ones (--use-ema)"
        )
    if codes.get("l2_norm") is False and taming(checkpoint) and network["attention"] and shape not in known:
        lines.append(
            'read as a VQGAN, by the nearest row; an IBQ of two blocks a level needs quantizer="ibq" (--quantizer ibq)'
        )
    return lines


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


def from_taming(state: Mapping[str, Tensor], deepest_first: bool = False) -> State:
    """Return the weights of a taming VQGAN under the names of VQModel, without the discriminator and LPIPS (`loss.…`).

    Taming counts the decoder's levels from the image (up.0 is the finest), our `conv_blocks` from the latents, and so do
    files with `deepest_first`.
    """
    levels = 1 + max((int(match[2]) for match in map(_LEVEL.fullmatch, state) if match), default=0)

    def ours(name: str) -> str:
        if match := _LEVEL.fullmatch(name):
            part, level, rest = match[1], int(match[2]), match[3]
            if rest.startswith("block."):
                rest = "res." + rest.removeprefix("block.")
            level = level if part == "encoder.down" or deepest_first else levels - 1 - level
            return f"{part.split('.')[0]}.conv_blocks.{level}.{rest}"
        if match := _MIDDLE_PART.fullmatch(name):
            return f"{match[1]}.mid.{_MIDDLE[match[2]]}.{match[3]}"
        return name

    return {ours(name): tensor for name, tensor in state.items() if not name.startswith("loss.")}


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


# Adapters by family: each makes a config and renamed weights of its checkpoints, None of another family's.
FAMILIES: dict[str, Callable[[Checkpoint], Adapted | None]] = {
    "llamagen": llamagen,
    "janus": janus,
    "maskgit": maskgit,
    "open-magvit2": open_magvit2,
    "ibq": ibq,
    "taming": taming,
}


def looks_like(state: Mapping[str, Tensor]) -> str:
    """Guess what a state dict of another model is of, as a clause of an error's message."""

    def has(pattern: str) -> bool:
        return any(re.match(pattern, name) for name in state)

    gpt = {"layers.0.attention.wqkv.weight", "tok_embeddings.weight"} <= state.keys() and has(r"cls_embedding\.")
    kinds = {
        "a TiTok tokenizer, which has MaskGIT's decoder without its encoder": has(r"pixel_decoder\."),
        "a Janus model (give it as --vq-ckpt for the tokenizer inside)": has(_JANUS.pattern),
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
