"""How fast training reads text features: packed shards against the published layout of one file a caption, in one run.

    python3 benchmarks/text_features.py --captions 4000

Both hold the same captions, of lengths drawn as alternative texts have them, and are read in the same random order.
Everything is in the page cache. Opening is not timed; neither is padding, which is the same for both.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import flag_parser, positive_float, positive_int, run_script

if TYPE_CHECKING:
    from torch import Tensor

    from dataset.text_features import Features

STEM = "part-00000"


def main(args: argparse.Namespace) -> None:
    import numpy as np
    import torch

    from dataset.text_features import FeatureWriter, open_features, write_published_features

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(3.0, args.mean_length / 3, args.captions).astype(int), 1, 120)
    order = rng.permutation(args.captions).tolist()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        packed, published = Path(folder) / "packed", Path(folder) / "published"
        writer = FeatureWriter(packed, dim=args.dim, max_length=120, dtype=args.dtype, shard_size=args.shard_size)
        generator = torch.Generator().manual_seed(0)
        features = [torch.randn(length, args.dim, generator=generator).bfloat16() for length in lengths]
        writer.write_stem(STEM, features)
        for line, rows in enumerate(features):
            write_published_features(published, STEM, line, rows)
        del features
        stores = {f"packed, {args.dtype}": open_features(packed), "published, float32": open_features(published)}
        print(f"{args.captions} captions of {lengths.mean():.1f} rows of {args.dim} on average")
        seconds: dict[str, list[float]] = {name: [] for name in stores}
        for run in range(args.runs + 1):  # the first fills the page cache
            for name, store in stores.items():  # in turn, so that another job on the machine slows all alike
                begin = time.perf_counter()
                read(store, order)
                if run:
                    seconds[name].append(time.perf_counter() - begin)
        rates = {name: args.captions / statistics.median(times) for name, times in seconds.items()}
        sizes = [sum(file.stat().st_blocks * 512 for file in place.rglob("*.npy")) for place in (packed, published)]
        for (name, rate), size in zip(rates.items(), sizes, strict=True):
            print(
                f"{name}: {rate:,.0f} captions/s (median of {args.runs} passes), {size / args.captions:,.0f} bytes each on disk"
            )
        first, second = rates.values()
        print(f"ratio: {first / second:.1f}")


def read(store: "Features", order: Sequence[int]) -> "list[Tensor]":
    """The features of every line, a batch of 256 held at a time; the last batch."""
    batch: list[Tensor] = []
    for place, line in enumerate(order):
        if place % 256 == 0:
            batch = []
        batch.append(store.get(STEM, line))
    return batch


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--captions", type=positive_int, default=4000, help="captions in either layout")
    parser.add_argument("--mean-length", type=positive_float, default=18.0, help="their tokens, on average")
    parser.add_argument("--dim", type=positive_int, default=2048, help="width of the features")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of packed ones"
    )
    parser.add_argument("--shard-size", type=positive_int, default=2048, help="captions a packed shard")
    parser.add_argument("--runs", type=positive_int, default=5, help="timed passes over all captions")
    parser.add_argument("--folder", default=None, help="where to write them (default: the system's for such)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
