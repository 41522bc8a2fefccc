"""The VQGANs of taming-transformers and latent diffusion by name, apart from the model so that `--help` need not load torch.

known = VQGAN_FROM_TAMING["vqgan_imagenet_f16_1024"]    # its shape, and where its weights are to be had
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TamingVQGAN:
    """Content of a released file, and its address for a browser.

    embed_dim: numbers a code has. ch_mult: channel multipliers, one a level from the image down.
    """

    codebook_size: int
    embed_dim: int
    ch_mult: tuple[int, ...]
    address: str

    @property
    def shape(self) -> tuple[int, int, tuple[int, ...]]:
        """Return what tells the files apart."""
        return self.codebook_size, self.embed_dim, self.ch_mult


_F16, _F8 = (1, 1, 2, 2, 4), (1, 2, 2, 4)
_TAMING, _LATENT_DIFFUSION = "https://heibox.uni-heidelberg.de/d", "https://ommer-lab.com/files/latent-diffusion"

# The first two were published with VQGAN (arXiv 2012.09841), the others with latent diffusion (2112.10752, table 8).
VQGAN_FROM_TAMING: dict[str, TamingVQGAN] = {
    "vqgan_imagenet_f16_1024": TamingVQGAN(1024, 256, _F16, f"{_TAMING}/8088892a516d4e3baf92/"),
    "vqgan_imagenet_f16_16384": TamingVQGAN(16384, 256, _F16, f"{_TAMING}/a7530b09fed84f80a887/"),
    "vqgan_openimage_f8_256": TamingVQGAN(256, 4, _F8, f"{_LATENT_DIFFUSION}/vq-f8-n256.zip"),
    "vqgan_openimage_f8_16384": TamingVQGAN(16384, 4, _F8, f"{_LATENT_DIFFUSION}/vq-f8.zip"),
}
