"""The VQGANs of taming-transformers and latent diffusion by name.

    tokenizer = load_vqgan("last.ckpt", "vqgan_imagenet_f16_1024")

Reads Lightning checkpoints as they were published, and what tools/convert_pytorch_lightning_to_torch.py makes of them.
"""

from pathlib import Path

import torch

from tokenizer.base import Tokenizer
from tokenizer.load import load_tokenizer
from tokenizer.vqgan.sizes import VQGAN_FROM_TAMING
from utils.hub import resolve

# Where a file may lie in pretrained_models/.
_PLACES = ("{0}/ckpts/last.pth", "{0}/ckpts/last.ckpt", "{0}/checkpoints/last.ckpt", "{0}/last.ckpt", "{0}/model.ckpt")
_SUFFIXES = (".ckpt", ".pth", ".pt", ".safetensors")


def find_vqgan(name: str, path: str | Path | None = None) -> Path:
    """Return the file of a VQGAN: `path` where given, else in pretrained_models/.

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


def load_vqgan(path: str | Path, name: str | None = None, device: torch.device | str = "cpu") -> Tokenizer:
    """Load a VQGAN as `load_tokenizer` does; its codes are not l2-normalised.

    Raises ValueError where the file holds something else, or another one than `name` of VQGAN_FROM_TAMING.
    """
    model = load_tokenizer(path, codebook_l2_norm=False, device=device)
    found = (model.codebook_size, model.quantize.width, tuple(model.network["encoder_ch_mult"]))
    known = VQGAN_FROM_TAMING[name].shape if name else found
    if found != known:
        fitting = [other for other, vqgan in VQGAN_FROM_TAMING.items() if vqgan.shape == found]
        raise ValueError(
            f"{path} is not {name}, which has {known[0]} codes of {known[1]} numbers and levels {list(known[2])}; it has "
            f"{found[0]} codes of {found[1]} and levels {list(found[2])}"
            + (f": use --vqgan {fitting[0]}" if fitting else "")
        )
    return model
