"""The tokenizers by name, apart from the model so that `--help` need not load torch."""

from collections.abc import Sequence

# Channel multipliers, one a level from the image down; each level but the last halves it. Not published are VQ-8-P, of
# patches of 4 pixels, for drawings on a CPU, and VQ-8-XS and VQ-4, narrow ones for 32x32 pictures and tests.
VQ_SIZES: dict[str, dict] = {
    "VQ-16": {"encoder_ch_mult": [1, 1, 2, 2, 4], "decoder_ch_mult": [1, 1, 2, 2, 4]},
    "VQ-8": {"encoder_ch_mult": [1, 2, 2, 4], "decoder_ch_mult": [1, 2, 2, 4]},
    "VQ-8-P": {"encoder_ch_mult": [1, 2], "decoder_ch_mult": [1, 2], "ch": 64, "z_channels": 128, "patch": 4},
    "VQ-8-XS": {"encoder_ch_mult": [1, 1, 2, 2], "decoder_ch_mult": [1, 1, 2, 2], "ch": 32, "z_channels": 64},
    "VQ-4": {"encoder_ch_mult": [1, 1, 2], "decoder_ch_mult": [1, 1, 2], "ch": 32, "z_channels": 64},
}


def size_name(encoder_ch_mult: Sequence[int], decoder_ch_mult: Sequence[int], patch: int = 1) -> str | None:
    """Return the name of these levels, or else of their downsampling, whatever the width; None for neither."""
    levels = [list(encoder_ch_mult), list(decoder_ch_mult)]
    sizes = {name: size for name, size in VQ_SIZES.items() if size.get("patch", 1) == patch}
    same = [name for name, size in sizes.items() if [size["encoder_ch_mult"], size["decoder_ch_mult"]] == levels]
    similar = [name for name, size in sizes.items() if len(size["encoder_ch_mult"]) == len(levels[0])]
    return next(iter(same + similar), None)
