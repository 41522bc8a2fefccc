"""Autoencoders in diffusers' folders: config.json and diffusion_pytorch_model.safetensors.

model, weights = load_autoencoder("AutoencoderKL", resolve("stabilityai/sd-vae-ft-mse"), device)
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def load_autoencoder(kind: str, folder: Path, device: "torch.device | str" = "cpu") -> "tuple[torch.nn.Module, Path]":
    """The autoencoder of a folder, in eval mode and float32, and the file its weights are in.

    kind: the diffusers class that config.json has to name. Nothing is downloaded and no pickle runs code.
    Raises FileNotFoundError where a file is missing, ValueError where the folder holds another model or damaged weights.
    """
    import diffusers
    import torch
    from diffusers.utils import logging

    folder = Path(folder)
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise FileNotFoundError(f"{folder} is not a folder of a diffusers model: it has no {CONFIG_FILE}")
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{folder} has no weights: neither {' nor '.join(WEIGHT_FILES)}")
    try:
        found = json.loads(config.read_bytes())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{config} is not the configuration of a diffusers model ({error!r})") from error
    if found != kind:
        raise ValueError(f"{folder} holds a model of class {found}, not {kind}")
    logging.set_verbosity_error()
    try:
        model, fit = getattr(diffusers, kind).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=weights.suffix == ".safetensors",
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # damaged weights and configurations fail in arbitrary ways
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"{weights} is damaged or does not fit {config}: {reason}") from error
    wrong = [
        f"{title} {', '.join(map(str, fit[title][:5]))}" for title in ("missing_keys", "unexpected_keys") if fit[title]
    ]
    if wrong:
        raise ValueError(f"{weights} does not fit {config}: {'; '.join(wrong)}")
    return model.to(device=device, dtype=torch.float32).eval().requires_grad_(False), weights


def image_generators(seed: int, indices: Sequence[int]) -> "list[torch.Generator]":
    """One generator for each image: what is drawn for image i is a function of the seed and i, on any device."""
    import torch

    from utils.rng import item_seed

    return [torch.Generator().manual_seed(item_seed(seed, index)) for index in indices]


def downsampling(model: "torch.nn.Module") -> int:
    """Pixels a side of one latent."""
    return 2 ** (len(model.config.block_out_channels) - 1)
