"""The published sizes of the models, apart from these so that `--help` need not load torch."""

from typing import Any, NamedTuple

SPARE_PLACES = 1024  # rows that the published tables of RAR's places have to spare


class Size(NamedTuple):
    """Shapes of a model."""

    n_layer: int
    n_head: int
    dim: int
    trunk: str = "llama"  # registered name
    ffn_width: int | None = None  # of the feed-forward layers, where no rule of dim gives it
    vocab_size: int = 16384  # codes of the tokenizer that it is published with

    @property
    def fields(self) -> dict[str, Any]:
        """The size as fields of ModelArgs."""
        return self._asdict()


# GPT-M is NAR's. The sizes XS, not published ones, are for 32x32 pictures and tests.
GPT_SIZES = {
    "GPT-XS": Size(4, 4, 128),
    "NAR-XS": Size(3, 4, 128),  # with its second exit about the parameters of GPT-XS
    "GPT-B": Size(12, 12, 768),
    "GPT-M": Size(18, 16, 1024),
    "GPT-L": Size(24, 16, 1024),
    "GPT-XL": Size(36, 20, 1280),
    "GPT-XXL": Size(48, 24, 1536),
    "GPT-XXXL": Size(48, 40, 2560),
    "GPT-1B": Size(22, 32, 2048),
    "GPT-3B": Size(24, 32, 3200),
    "GPT-7B": Size(32, 32, 4096),
    "RAR-XS": Size(4, 4, 128, "rar", 512, 1024),
    "RAR-B": Size(24, 16, 768, "rar", 3072, 1024),
    "RAR-L": Size(24, 16, 1024, "rar", 4096, 1024),
    "RAR-XL": Size(32, 16, 1280, "rar", 5120, 1024),
    "RAR-XXL": Size(40, 16, 1408, "rar", 6144, 1024),
    "LPD-XS": Size(5, 4, 128, "lpd", 512),  # no published one, of about the parameters of GPT-XS
    "LPD-L": Size(24, 16, 1024, "lpd", 4096),
    "LPD-XL": Size(36, 20, 1280, "lpd", 5120),
    "LPD-XXL": Size(48, 24, 1536, "lpd", 6144),
}
