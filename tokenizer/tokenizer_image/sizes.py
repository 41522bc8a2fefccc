"""The tokenizers by name, apart from the model so that `--help` need not load torch."""

from collections.abc import Sequence

# Channel multipliers, one a level from the image down; each level but the last halves it. Not published are VQ-8-P,
# another network (tokenizer/patches.py), and VQ-8-XS and VQ-4, narrow ones for 32x32 pictures and tests. A size with a
# `name` is of another network than VQGAN's, one with a `quantizer` has another one unless --quantizer says so.
VQ_SIZES: dict[str, dict] = {
    "VQ-16": {"encoder_ch_mult": [1, 1, 2, 2, 4], "decoder_ch_mult": [1, 1, 2, 2, 4]},
    "VQ-8": {"encoder_ch_mult": [1, 2, 2, 4], "decoder_ch_mult": [1, 2, 2, 4]},
    "MaskGIT-VQGAN": {
        "name": "maskgit",
        "quantizer": {"name": "vq_legacy", "codebook_size": 1024, "codebook_embed_dim": 256},
    },
    "VQ-8-P": {"name": "patches", "patch": 4, "ch": 64, "depth": 2},
    "VQ-8-XS": {"encoder_ch_mult": [1, 1, 2, 2], "decoder_ch_mult": [1, 1, 2, 2], "ch": 32, "z_channels": 64},
    "VQ-4": {"encoder_ch_mult": [1, 1, 2], "decoder_ch_mult": [1, 1, 2], "ch": 32, "z_channels": 64},
}


def size_name(encoder_ch_mult: Sequence[int], decoder_ch_mult: Sequence[int]) -> str | None:
    """Return the name of these levels, or else of their downsampling, whatever the width; None for neither."""
    levels = [list(encoder_ch_mult), list(decoder_ch_mult)]
    sizes = {name: size for name, size in VQ_SIZES.items() if "name" not in size}
    same = [name for name, size in sizes.items() if [size["encoder_ch_mult"], size["decoder_ch_mult"]] == levels]
    similar = [name for name, size in sizes.items() if len(size["encoder_ch_mult"]) == len(levels[0])]
    return next(iter(same + similar), None)
