"""The VQGANs of taming-transformers and latent diffusion by name, apart from the model so that `--help` need not load torch.

known = VQGAN_FROM_TAMING["vqgan_imagenet_f16_1024"]    # its shape, and where its weights are to be had
"""

from typing import NamedTuple


class TamingVQGAN(NamedTuple):
    """A released file: its number of codes, numbers of a code and channel multipliers, and its address for a browser."""

    shape: tuple[int, int, tuple[int, ...]]
    address: str


_F16, _F8 = (1, 1, 2, 2, 4), (1, 2, 2, 4)
_TAMING, _LATENT_DIFFUSION = "https://heibox.uni-heidelberg.de/d", "https://ommer-lab.com/files/latent-diffusion"

# The first two were published with VQGAN (arXiv 2012.09841), the others with latent diffusion (2112.10752, table 8).
VQGAN_FROM_TAMING: dict[str, TamingVQGAN] = {
    "vqgan_imagenet_f16_1024": TamingVQGAN((1024, 256, _F16), f"{_TAMING}/8088892a516d4e3baf92/"),
    "vqgan_imagenet_f16_16384": TamingVQGAN((16384, 256, _F16), f"{_TAMING}/a7530b09fed84f80a887/"),
    "vqgan_openimage_f8_256": TamingVQGAN((256, 4, _F8), f"{_LATENT_DIFFUSION}/vq-f8-n256.zip"),
    "vqgan_openimage_f8_16384": TamingVQGAN((16384, 4, _F8), f"{_LATENT_DIFFUSION}/vq-f8.zip"),
}
