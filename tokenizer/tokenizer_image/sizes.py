"""The tokenizers by name, apart from the model so that `--help` need not load torch."""

from collections.abc import Mapping
from typing import Any, NamedTuple


def _levels(*multipliers: int) -> dict[str, list[int]]:
    return {"encoder_ch_mult": [*multipliers], "decoder_ch_mult": [*multipliers]}


def _codes(name: str, codebook_size: int, **options: Any) -> dict[str, Any]:
    return {"name": name, "codebook_size": codebook_size, "codebook_embed_dim": 256, **options}


# Channel multipliers, one a level from the image down; each level but the last halves it. A size with a `name` is of
# another network than VQGAN's, one with a `quantizer` has that one unless --quantizer names another. Not published are
# VQ-8-P, a network of its own (tokenizer/patches.py), IBQ-8, and VQ-8-XS and VQ-4, narrow ones for 32x32 pictures and tests.
VQ_SIZES: dict[str, dict] = {
    "VQ-16": _levels(1, 1, 2, 2, 4),
    "VQ-8": _levels(1, 2, 2, 4),
    "IBQ-16": {**_levels(1, 1, 2, 2, 4), "blocks": 4, "quantizer": _codes("ibq", 16384)},
    "IBQ-8": {**_levels(1, 2, 2, 4), "blocks": 4, "quantizer": _codes("ibq", 16384)},
    "MaskGIT-VQGAN": {"name": "maskgit", "quantizer": _codes("vq_legacy", 1024)},
    "Chameleon": {**_levels(1, 1, 2, 2, 4), "attention": [], "quantizer": _codes("vq", 8192, l2_norm=False)},
    "Open-MAGVIT2": {
        "name": "open-magvit2",
        "ch_mult": [1, 1, 2, 2, 4],
        "quantizer": {"name": "lfq", "codebook_size": 2**18},
    },
    "Open-MAGVIT2-8": {
        "name": "open-magvit2",
        "ch_mult": [1, 2, 2, 4],
        "quantizer": {"name": "lfq", "codebook_size": 2**18},
    },
    "VQ-8-P": {"name": "patches", "patch": 4, "ch": 64, "depth": 2},
    "VQ-8-XS": {**_levels(1, 1, 2, 2), "ch": 32, "z_channels": 64},
    "VQ-4": {**_levels(1, 1, 2), "ch": 32, "z_channels": 64},
}


def size_name(network: Mapping[str, Any]) -> str | None:
    """Return the name of a VQGAN of these levels, or else of this downsampling, whatever the width; None for neither."""

    def kind(size: Mapping[str, Any]) -> tuple:
        return len(size["encoder_ch_mult"]), size.get("blocks", 2)

    def likeness(name: str) -> tuple:
        size = {"attention": [-1], **VQ_SIZES[name]}
        return size["attention"] == network["attention"], all(size[part] == network[part] for part in _levels())

    similar = [name for name, size in VQ_SIZES.items() if "name" not in size and kind(size) == kind(network)]
    return max(similar, key=likeness, default=None)


def magvit_name(levels: int) -> str:
    """Return the name of Open-MAGVIT2's network of so many levels."""
    return "Open-MAGVIT2" if levels == 5 else f"Open-MAGVIT2-{2 ** (levels - 1)}"


class TamingVQGAN(NamedTuple):
    """A VQGAN that taming or latent diffusion released: codes, numbers of a code, channel multipliers; its address for a browser."""

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
