"""From a VQGAN's file of taming-transformers to our VQModel: the network is the same, its weights have other names.

    tokenizer = load_vqgan("last.ckpt", "vqgan_imagenet_f16_1024")

Reads Lightning checkpoints as they were published, and what tools/convert_pytorch_lightning_to_torch.py makes of them.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tokenizer.tokenizer_image.load import recorded_l2_norm
from tokenizer.tokenizer_image.vq_model import VQModel, vq_args_from_state_dict
from tokenizer.vqgan.sizes import VQGAN_FROM_TAMING
from utils.checkpoint import load_into, read_checkpoint
from utils.hub import resolve

# Where a file may lie in pretrained_models/.
_PLACES = ("{0}/ckpts/last.pth", "{0}/ckpts/last.ckpt", "{0}/checkpoints/last.ckpt", "{0}/last.ckpt", "{0}/model.ckpt")
_SUFFIXES = (".ckpt", ".pth", ".pt", ".safetensors")

_MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}
_LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(.+)")
_MIDDLE_PART = re.compile(r"(encoder|decoder)\.mid\.(block_1|attn_1|block_2)\.(.+)")


def has_taming_names(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of a VQGAN under taming's names."""
    return "encoder.down.0.block.0.conv1.weight" in state


def from_taming(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a taming VQGAN under the names of our VQModel; the discriminator and LPIPS (`loss.…`) are dropped.

    Taming counts the decoder's levels from the image (up.0 is the finest), our `conv_blocks` from the latents.
    """
    levels = 1 + max((int(match[2]) for match in map(_LEVEL.fullmatch, state) if match), default=0)

    def ours(name: str) -> str:
        if match := _LEVEL.fullmatch(name):
            part, level, rest = match[1], int(match[2]), match[3]
            if rest.startswith("block."):
                rest = "res." + rest.removeprefix("block.")
            level = level if part == "encoder.down" else levels - 1 - level
            return f"{part.split('.')[0]}.conv_blocks.{level}.{rest}"
        if match := _MIDDLE_PART.fullmatch(name):
            return f"{match[1]}.mid.{_MIDDLE[match[2]]}.{match[3]}"
        return name

    return {ours(name): tensor for name, tensor in state.items() if not name.startswith("loss.")}


def find_vqgan(name: str, path: str | Path | None = None) -> Path:
    """The file of a VQGAN: `path` where given, else in pretrained_models/.

    Raises FileNotFoundError that says where it was looked for and where it is to be had.
    """
    if path is not None:
        return resolve(path)
    places = [place.format(name) for place in _PLACES] + [name + suffix for suffix in _SUFFIXES]
    for place in places:
        try:
            return resolve(f"pretrained_models/{place}")
        except FileNotFoundError:
            continue
    raise FileNotFoundError(
        f"no weights of {name} in pretrained_models/ (looked for {', '.join(places)}): fetch them from "
        f"{VQGAN_FROM_TAMING[name].address} and put the checkpoint at pretrained_models/{name}.ckpt, or give its path with "
        "--vqgan-ckpt"
    )


def load_vqgan(path: str | Path, name: str | None = None, device: torch.device | str = "cpu") -> VQModel:
    """Builds the VQGAN that a file's weights describe, in eval mode and float32; codes are looked up without l2-norm.

    Raises ValueError where the file holds something else, or another one than `name` of VQGAN_FROM_TAMING.
    """
    checkpoint = read_checkpoint(path)
    state = from_taming(checkpoint.model) if has_taming_names(checkpoint.model) else checkpoint.model
    try:
        args = vq_args_from_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{path} holds {error}") from error
    if name is not None:
        known = VQGAN_FROM_TAMING[name]
        found = (args.codebook_size, args.codebook_embed_dim, tuple(args.encoder_ch_mult))
        if found != (known.codebook_size, known.embed_dim, known.ch_mult):
            fitting = [
                other for other, v in VQGAN_FROM_TAMING.items() if found == (v.codebook_size, v.embed_dim, v.ch_mult)
            ]
            advice = f": use --vqgan {fitting[0]}" if fitting else ""
            raise ValueError(
                f"{path} is not {name}, which has {known.codebook_size} codes of {known.embed_dim} numbers and levels "
                f"{list(known.ch_mult)}; it has {found[0]} codes of {found[1]} and levels {list(found[2])}{advice}"
            )
    if recorded_l2_norm(checkpoint):
        raise ValueError(
            f"{path} is no VQGAN of taming-transformers: its codes are l2-normalised; give it as --vq-ckpt of the tokenizer's scripts"
        )
    args.codebook_l2_norm = False
    with torch.device("meta"):
        model = VQModel(args)
    load_into(model, state, path, assign=True)
    return model.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
