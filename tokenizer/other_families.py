"""Adapters of the tokenizers of other groups than LlamaGen's, one function a family (tokenizer/released.py asks them).

A config's "averaged" says that published figures and codes are of the averaged weights: load_tokenizer then takes these unless
it is told otherwise. Its "note" says what the weights do not show and a caller may know.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tokenizer.released import Adapted, Shapes, vqgan_config
from tokenizer.tokenizer_image.sizes import VQGAN_FROM_TAMING, magvit_name
from utils.checkpoint import Checkpoint, State

_JANUS = re.compile(r"gen_vision_model\.|(model\.)?vqmodel\.")
_LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(.+)")
_MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}
_MIDDLE_PART = re.compile(r"(encoder|decoder)\.mid\.(block_1|attn_1|block_2)\.(.+)")


def adapted(checkpoint: Checkpoint) -> Adapted | None:
    """Return what the first family that knows a checkpoint makes of it; None where none does."""
    return next((found for adapter in FAMILIES.values() if (found := adapter(checkpoint)) is not None), None)


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
    config = {**vqgan_config(checkpoint, state, "ibq"), "averaged": checkpoint.ema is not None}
    if checkpoint.ema is None:
        config["note"] = "it has raw weights alone; IBQ's figures, and the codes of its GPTs, are of the averaged ones"
    return config, state


def taming(checkpoint: Checkpoint) -> Adapted | None:
    """Adapt the VQGANs of taming-transformers, latent diffusion and Chameleon."""
    if "encoder.down.0.block.0.conv1.weight" not in checkpoint.model:
        return None
    state = from_taming(checkpoint.model)
    config = vqgan_config(checkpoint, state, l2_norm=False)
    network, codes = config["network"], config["quantizer"]
    shape = codes["codebook_size"], codes["codebook_embed_dim"], tuple(network["encoder_ch_mult"])
    if network["attention"] and shape not in {known.shape for known in VQGAN_FROM_TAMING.values()}:
        config["note"] = (
            'read as a VQGAN, by the nearest row; an IBQ of two blocks a level needs quantizer="ibq" (--quantizer ibq)'
        )
    return config, state


def maskgit(checkpoint: Checkpoint) -> Adapted | None:
    """Adapt MaskGIT's VQGAN carried to PyTorch, whose names are kept: RAR's tokenizer."""
    if not {"encoder.mid.0.conv1.weight", "decoder.up.1.upsample_conv.weight"} <= checkpoint.model.keys():
        return None
    shapes = Shapes(checkpoint, checkpoint.model)
    codebook_size, width = shapes("quantize.embedding.weight")
    quantizer = {"name": "vq_legacy", "codebook_size": codebook_size, "codebook_embed_dim": width}
    config = {"family": "MaskGIT-VQGAN", "network": _convolutional("maskgit", shapes), "quantizer": quantizer}
    return config, checkpoint.model


def open_magvit2(checkpoint: Checkpoint) -> Adapted | None:
    """Adapt Open-MAGVIT2's files, whose names are kept; the discriminator and LPIPS (`loss.…`) are dropped."""
    if not {"encoder.mid_block.0.conv1.weight", "decoder.adaptive.0.gamma.weight"} <= checkpoint.model.keys():
        return None
    state = {name: tensor for name, tensor in checkpoint.model.items() if not name.startswith("loss.")}
    shapes = Shapes(checkpoint, state)
    network = _convolutional("open-magvit2", shapes)
    quantizer = {"name": "lfq", "codebook_size": 2 ** shapes("encoder.conv_out.weight")[0]}
    config = {"family": magvit_name(len(network["ch_mult"])), "network": network, "quantizer": quantizer}
    if checkpoint.ema is not None:
        config["note"] = (
            "its raw weights are read, of which its GPTs' codes are; its published rFID is of the averaged ones (--use-ema)"
        )
    return config, state


def _convolutional(name: str, shapes: Shapes) -> dict[str, Any]:
    """Return the config of a network without attention."""
    return {
        "name": name,
        "ch_mult": shapes.multipliers("encoder.down.{}.block.0.conv1.weight"),
        "ch": shapes("encoder.conv_in.weight")[0],
        "blocks": shapes.count("encoder.down.0.block.{}.conv1.weight"),
    }


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


# Adapters by family: each makes a config and renamed weights of its checkpoints, None of another family's.
FAMILIES: dict[str, Callable[[Checkpoint], Adapted | None]] = {
    "janus": janus,
    "maskgit": maskgit,
    "open-magvit2": open_magvit2,
    "ibq": ibq,
    "taming": taming,
}
