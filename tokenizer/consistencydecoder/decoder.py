"""OpenAI's consistency decoder as a Codec for tokenizer/reconstruction.py.

codec, weights = load_consistency_decoder(device=device, seed=0)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NAME, RELEASE = "consistency-decoder", "openai/consistency-decoder"


class ConsistencyCodec:
    """A diffusers ConsistencyDecoderVAE: the encoder of Stable Diffusion's VAE, and two steps of a consistency model
    (arXiv 2303.01469) in the place of its decoder.

    The decoder starts from noise and adds some between its steps: for each image a function of the seed and its number.
    """

    codebook_size = None
    packages = ("diffusers",)
    draws = True

    def __init__(self, model: "torch.nn.Module", seed: int = 0):
        from tokenizer.vae.diffusers_folder import downsampling

        self.model = model
        self.seed = seed
        self.downsample = downsampling(model)

    def __call__(self, images: "Tensor", indices: Sequence[int]) -> "tuple[Tensor, None]":
        from tokenizer.vae.diffusers_folder import image_generators

        latents = self.model.encode(images).latent_dist.mode()
        return self.model.decode(latents, generator=image_generators(self.seed, indices)).sample, None


def load_consistency_decoder(
    path: str | Path | None = None, device: "torch.device | str" = "cpu", seed: int = 0
) -> tuple[ConsistencyCodec, Path]:
    """The consistency decoder, or the folder of one at `path`, and the file of its weights.

    Raises FileNotFoundError, ConnectionError or ValueError as `resolve` and `load_autoencoder` do.
    """
    from tokenizer.vae.diffusers_folder import load_autoencoder
    from utils.hub import resolve

    model, weights = load_autoencoder("ConsistencyDecoderVAE", resolve(path or RELEASE), device)
    return ConsistencyCodec(model, seed), weights
