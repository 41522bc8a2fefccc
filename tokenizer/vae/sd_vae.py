"""Stable Diffusion's VAEs as a Codec for tokenizer/reconstruction.py.

codec, weights = load_vae("sd-vae-ft-mse", device=device)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VAES = {"sdxl-vae": "stabilityai/sdxl-vae", "sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse"}


class VAECodec:
    """A diffusers AutoencoderKL: an image becomes the mean of its posterior, and is decoded from that.

    With `sample` a draw from the posterior instead, a function of the seed and the image's number. The factor that scales
    latents for a diffusion model cancels out.
    """

    codebook_size = None
    packages = ("diffusers",)

    def __init__(self, model: "torch.nn.Module", sample: bool = False, seed: int = 0):
        from tokenizer.vae.diffusers_folder import downsampling

        self.model = model
        self.seed = seed
        self.draws = sample
        self.downsample = downsampling(model)

    def __call__(self, images: "Tensor", indices: Sequence[int]) -> "tuple[Tensor, None]":
        from tokenizer.vae.diffusers_folder import image_generators

        posterior = self.model.encode(images).latent_dist
        latents = posterior.sample(image_generators(self.seed, indices)) if self.draws else posterior.mode()
        return self.model.decode(latents).sample, None


def load_vae(
    name: str,
    path: str | Path | None = None,
    device: "torch.device | str" = "cpu",
    sample: bool = False,
    seed: int = 0,
) -> tuple[VAECodec, Path]:
    """The VAE `name` of VAES, or the folder at `path`, and the file of its weights.

    Raises FileNotFoundError, ConnectionError or ValueError as `resolve` and `load_autoencoder` do.
    """
    from tokenizer.vae.diffusers_folder import load_autoencoder
    from utils.hub import resolve

    model, weights = load_autoencoder("AutoencoderKL", resolve(path or VAES[name]), device)
    return VAECodec(model, sample, seed), weights
