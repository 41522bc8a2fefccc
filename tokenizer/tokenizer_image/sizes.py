"""The tokenizers by name, apart from the model so that `--help` need not load torch."""

# Channel multipliers, one a level from the image down; each level but the last halves it. VQ-8-XS and VQ-4 are not
# published: narrow ones for 32x32 pictures and tests.
VQ_SIZES: dict[str, dict] = {
    "VQ-16": {"encoder_ch_mult": [1, 1, 2, 2, 4], "decoder_ch_mult": [1, 1, 2, 2, 4]},
    "VQ-8": {"encoder_ch_mult": [1, 2, 2, 4], "decoder_ch_mult": [1, 2, 2, 4]},
    "VQ-8-XS": {"encoder_ch_mult": [1, 1, 2, 2], "decoder_ch_mult": [1, 1, 2, 2], "ch": 32, "z_channels": 64},
    "VQ-4": {"encoder_ch_mult": [1, 1, 2], "decoder_ch_mult": [1, 1, 2], "ch": 32, "z_channels": 64},
}
