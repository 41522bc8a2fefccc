"""The tokenizers by name, apart from the model so that `--help` need not load torch."""

# Channel multipliers from the image down: one level fewer than halvings of the image, plus one. VQ-4, not a published
# one, is narrow besides, for 32x32 pictures and tests.
VQ_SIZES: dict[str, dict] = {
    "VQ-16": {"encoder_ch_mult": [1, 1, 2, 2, 4], "decoder_ch_mult": [1, 1, 2, 2, 4]},
    "VQ-8": {"encoder_ch_mult": [1, 2, 2, 4], "decoder_ch_mult": [1, 2, 2, 4]},
    "VQ-4": {"encoder_ch_mult": [1, 1, 2], "decoder_ch_mult": [1, 1, 2], "ch": 32, "z_channels": 64},
}
