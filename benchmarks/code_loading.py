"""How fast training reads codes: packed shards against the published layout of one file an image, in one run.

    python3 benchmarks/code_loading.py --samples 20000

Both hold the same codes and draw the same view of each sample, in the same random order. A cold pass starts with every
file dropped from the page cache by posix_fadvise(DONTNEED); names of files and folders stay cached. Opening is not timed.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import flag_parser, positive_int, run_script

if TYPE_CHECKING:
    from dataset.codes import CodeDataset


def main(args: argparse.Namespace) -> None:
    import numpy as np
    import torch

    from dataset.codes import open_codes

    side = int(args.tokens**0.5) * 16
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        packed, published = Path(folder) / "packed", Path(folder) / "published_flip"
        write(packed, published, side, args)
        layouts = {"packed": lambda: open_codes(packed), "published": lambda: open_codes(published, side)}
        order = np.random.default_rng(0).permutation(args.samples)
        batches = [order[i : i + args.batch_size].tolist() for i in range(0, args.samples, args.batch_size)]
        first, other = (dataset().__getitems__(batches[0]) for dataset in layouts.values())
        assert all(torch.equal(a["codes"], b["codes"]) for a, b in zip(first, other, strict=True))
        print(f"{args.samples} samples of {args.views} views and {args.tokens} tokens, batches of {args.batch_size}")
        rates = {}
        for name, open_dataset in layouts.items():
            for state in ("cold", "warm"):
                runs = passes(open_dataset, batches, Path(folder) if state == "cold" else None, args.runs)
                rates[name, state] = args.samples / statistics.median(runs)
                print(f"{name}, {state}: {rates[name, state]:,.0f} samples/s (median of {args.runs} passes)")
        for state in ("cold", "warm"):
            print(f"ratio, {state}: {rates['packed', state] / rates['published', state]:.1f}")


def write(packed: Path, published: Path, side: int, args: argparse.Namespace) -> None:
    """Writes the same random codes in both layouts."""
    import numpy as np

    from dataset.code_files import CodeSettings, CodeWriter, published_folders

    views = [f"view{i}" for i in range(args.views)]
    settings = CodeSettings("imagenet", side, args.tokens, views, 16384, args.samples, num_classes=1000)
    writer = CodeWriter(packed, settings)
    folders = published_folders(published, side)
    for place in folders:
        place.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for shard in writer.missing_shards():
        indices = np.asarray(settings.images_of(shard))
        codes = rng.integers(0, 16384, (len(indices), args.views, args.tokens))
        labels = rng.integers(0, 1000, len(indices))
        writer.write_shard(shard, codes, labels, indices)
        for i, sample, label in zip(indices.tolist(), codes, labels, strict=True):
            # Not write_published, which waits for the disk twice a sample.
            np.save(folders[0] / f"{i}.npy", sample[None])
            np.save(folders[1] / f"{i}.npy", label[None])


def passes(
    open_dataset: "Callable[[], CodeDataset]", batches: list[list[int]], cold: Path | None, runs: int
) -> list[float]:
    """Seconds of each pass over the batches; before each, the files in `cold` are dropped from the page cache."""
    seconds = []
    for _ in range(runs):
        dataset = None  # mapped pages stay in the cache
        if cold:
            drop_from_page_cache(cold)
        dataset = open_dataset()
        start = time.perf_counter()
        for batch in batches:
            dataset.__getitems__(batch)
        seconds.append(time.perf_counter() - start)
    return seconds


def drop_from_page_cache(folder: Path) -> None:
    """Makes the next reading of every file below a folder go to the disk (Linux). Raises ValueError elsewhere."""
    if not hasattr(os, "posix_fadvise"):
        raise ValueError("cold passes need posix_fadvise, which this system has not")
    os.sync()  # what is not written yet cannot be dropped
    for path in folder.rglob("*.npy"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--samples", type=positive_int, default=20_000, help="images")
    parser.add_argument("--views", type=positive_int, default=10, help="views an image")
    parser.add_argument("--tokens", type=positive_int, default=576, help="tokens an image")
    parser.add_argument("--batch-size", type=positive_int, default=256, help="samples fetched at once")
    parser.add_argument("--runs", type=positive_int, default=3, help="passes over all samples")
    parser.add_argument("--folder", default=None, help="where to write the codes (default: the system's for such)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
