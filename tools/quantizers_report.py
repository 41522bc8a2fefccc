"""Figures of tokenizers that differ in their quantiser alone, as a table: what scripts/compare_quantizers.sh ends with.

    python3 tools/quantizers_report.py --images quickstart/tiny/digits/held_out --runs quickstart/quantizers/vq \\
        quickstart/quantizers/lfq --output quickstart/quantizers

Each run's folder has tokenizer/, codes_train/ and gpt/. PSNR is of the images given, usage of the training images' codes,
and the nats are those of the GPT on held-out codes: a code's, and an image's.
"""

import argparse
from pathlib import Path

from utils.cli import flag_parser, run_script


def main(args: argparse.Namespace) -> None:
    import numpy as np

    from dataset.code_files import ShardFolder
    from dataset.pixels import load_rgb
    from tokenizer.load import load_tokenizer
    from tools.stages import last_held_out_loss, reconstruct
    from utils.files import atomic_write
    from utils.runs import find_checkpoint

    images = np.stack([np.asarray(load_rgb(path)) for path in sorted(Path(args.images).rglob("*.png"))])
    lines = ["| quantiser | codes | in use | PSNR, dB | nats a code | nats an image |", "|---|---|---|---|---|---|"]
    for run in map(Path, args.runs):
        tokenizer = load_tokenizer(find_checkpoint(run / "tokenizer"))
        _, codes, psnr = reconstruct(tokenizer, images)
        used = np.unique(np.concatenate([part.ravel() for part, *_ in ShardFolder(run / "codes_train").parts()]))
        nats = last_held_out_loss(str(run / "gpt"))
        lines.append(
            f"| {tokenizer.identity['quantizer']['name']} | {tokenizer.codebook_size:,} | {len(used) / tokenizer.codebook_size:.0%} "
            f"| {psnr:.2f} | {nats:.2f} | {nats * codes[0].size:.0f} |"
        )
    print(text := "\n".join(lines))
    with atomic_write(Path(args.output) / "table.md") as f:
        f.write(f"{text}\n".encode())


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--images", required=True, help="folder of PNG files of one size")
    parser.add_argument("--runs", nargs="+", required=True, help="folders of what was trained")
    parser.add_argument("--output", required=True, help="folder for table.md")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
