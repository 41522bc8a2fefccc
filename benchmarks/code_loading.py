"""How fast training reads codes: packed shards against the published layout of one file an image, in one run.

python3 benchmarks/code_loading.py --samples 4096
"""

import argparse
import tempfile
import time
from pathlib import Path

from utils.cli import flag_parser, positive_int, run_script


def main(args: argparse.Namespace) -> None:
    import numpy as np

    from dataset.codes import CodeSettings, CodeWriter, PackedCodes, PublishedCodes, write_published

    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16384, (args.samples, args.views, args.tokens))
    labels = rng.integers(0, 1000, args.samples)
    side = int(args.tokens**0.5) * 16
    views = [f"view{i}" for i in range(args.views)]
    with tempfile.TemporaryDirectory() as folder:
        packed, published = Path(folder) / "packed", Path(folder) / "published_flip"
        settings = CodeSettings("imagenet", side, args.tokens, views, 16384, args.samples, num_classes=1000)
        writer = CodeWriter(packed, settings)
        for shard in writer.missing_shards():
            indices = np.asarray(settings.images_of(shard))
            writer.write_shard(shard, codes[indices], labels[indices], indices)
        for i in range(args.samples):
            write_published(published, side, i, codes[i], labels[i])
        order = rng.permutation(args.samples)
        batches = [order[i : i + args.batch_size].tolist() for i in range(0, args.samples, args.batch_size)]
        seconds = {}
        for name, dataset in (("packed", PackedCodes(packed)), ("published", PublishedCodes(published, side))):
            runs = []
            for _ in range(args.runs):
                start = time.perf_counter()
                for batch in batches:
                    dataset.__getitems__(batch)
                runs.append(time.perf_counter() - start)
            seconds[name] = sorted(runs)[len(runs) // 2]
            print(
                f"{name}: {args.samples / seconds[name]:,.0f} samples/s (median of {args.runs} passes, warm page cache)"
            )
        print(f"ratio: {seconds['published'] / seconds['packed']:.1f}")


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--samples", type=positive_int, default=4096, help="images")
    parser.add_argument("--views", type=positive_int, default=10, help="views an image")
    parser.add_argument("--tokens", type=positive_int, default=576, help="tokens an image")
    parser.add_argument("--batch-size", type=positive_int, default=256, help="samples fetched at once")
    parser.add_argument("--runs", type=positive_int, default=5, help="passes over all samples")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
