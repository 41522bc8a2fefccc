"""The published sizes of the transformer, apart from the model so that `--help` need not load torch."""

# name: (layers, heads, dim). GPT-M is NAR's; GPT-XS, not a published one, is for 32x32 pictures and tests.
GPT_SIZES: dict[str, tuple[int, int, int]] = {
    "GPT-XS": (4, 4, 128),
    "GPT-B": (12, 12, 768),
    "GPT-M": (18, 16, 1024),
    "GPT-L": (24, 16, 1024),
    "GPT-XL": (36, 20, 1280),
    "GPT-XXL": (48, 24, 1536),
    "GPT-XXXL": (48, 40, 2560),
    "GPT-1B": (22, 32, 2048),
    "GPT-3B": (24, 32, 3200),
    "GPT-7B": (32, 32, 4096),
}
