"""Flags of scripts that make files from a data set once: codes, features."""

from utils.cli import DEVICE, HALF, SEED, WORKERS, Flags, add_flag, add_store_true, nonnegative_int, positive_int


def add_extraction_flags(parser: Flags, *, items: str, shard_size: int, published: str) -> None:
    """Add the flags of the scripts that make files from a data set once: codes, features.

    items: what a shard has, in the plural. published: what the published layout is.
    """
    add_flag(parser, "--shard-size", positive_int, shard_size, f"{items} a shard, and what an interruption may cost")
    add_store_true(parser, "--published-layout", f"{published}, as the published scripts write")
    add_flag(parser, "--global-seed", SEED, 0, "kept for published command lines; encoding draws nothing")
    add_flag(parser, "--num-workers", nonnegative_int, 24, WORKERS)
    add_flag(parser, "--device", None, None, DEVICE)


def add_pairs_flags(parser: Flags) -> None:
    """Add which files of image-text pairs are read, and where their index goes."""
    add_flag(parser, "--data-start", nonnegative_int, 0, "number of the first file, in the order of names")
    add_flag(parser, "--data-end", nonnegative_int, None, "number of the last file (default: of all)")
    add_flag(parser, "--index-path", None, None, "where the index of WebDataset shards goes (default: beside them)")


def add_encoder_precision_flag(parser: Flags) -> None:
    """Add --mixed-precision of a tokenizer whose codes are kept."""
    help = "autocast of the encoder: faster, but some codes differ from those of float32, which published codes are"
    add_flag(parser, "--mixed-precision", None, "none", help, choices=HALF)
