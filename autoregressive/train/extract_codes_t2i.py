"""Encodes the images of image-text pairs for train_t2i.py: packed shards, or with --published-layout one file a pair.

    torchrun --nproc_per_node=8 autoregressive/train/extract_codes_t2i.py --data-path laion_coco --code-path codes \\
        --vq-ckpt vq_ds16_t2i.pt --image-size 256 --data-start 0 --data-end 39

Of the *.jsonl files (or WebDataset *.tar shards) in --data-path, in the order of their names, those from number
--data-start to number --data-end, both included. Codes are those of the centre crop, a folder for each file:
`{code-path}/{stem}/`. Rerun the command to write what is missing, on any number of processes. Images that cannot
be read or are smaller than --image-size get no codes. Without --vq-ckpt the tokenizer is the released one of the text-conditional models.
"""

import argparse

from dataset.flags import add_encoder_precision_flag, add_extraction_flags, add_pairs_flags
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import (
    add_image_size_flags,
    add_reading_flags,
    add_tokenizer_flags,
    flag_parser,
    positive_int,
    run_script,
    tokenizer_beliefs,
)

RELEASED_TOKENIZER = "vq_ds16_t2i.pt"


def main(args: argparse.Namespace) -> None:
    from functools import partial
    from itertools import accumulate
    from pathlib import Path

    from autoregressive.train.extraction import (
        PackedTarget,
        PublishedPairs,
        code_settings,
        extract,
        recorded_extra,
        require_whole_tokens,
    )
    from dataset.code_files import TEXT_EXTRACTION
    from dataset.lines import ImageLines, compare_before_writing, record_lines
    from dataset.pixels import Reading
    from dataset.sources import PairViews, chosen_files, open_pairs
    from tokenizer.load import load_tokenizer
    from utils.distributed import start
    from utils.logger import console_logger
    from utils.runs import find_checkpoint

    dist = start(args.device)
    log = console_logger("dataset", dist.is_main)
    with dist.main_first():
        vq_path = find_checkpoint(args.vq_ckpt or RELEASED_TOKENIZER)
        pairs = open_pairs(args.data_path, args.index_path)
    chosen = chosen_files(pairs, args.data_start, args.data_end)
    tokenizer = load_tokenizer(vq_path, **tokenizer_beliefs(args), device=dist.device)
    require_whole_tokens(tokenizer, args.image_size)
    folders = {k: Path(args.code_path, pairs.files[k][0]) for k in chosen}
    begun = [extra for folder in folders.values() if (extra := recorded_extra(folder)) is not None]
    reading = Reading.of(args, next((extra for extra in begun if "exif" not in extra), begun[0] if begun else None))
    log.info(reading)
    source = ImageLines(pairs, pairs.image_kind, tokenizer.fingerprint())
    if dist.is_main:
        compare_before_writing(Path(args.code_path), source, chosen)
    starts = [0, *accumulate(count for _, count in pairs.files)]
    make = PublishedPairs if args.published_layout else PackedTarget
    targets = []
    for k, folder in folders.items():
        count, views = pairs.files[k][1], ("center",)
        settings = code_settings(
            tokenizer, args, reading, dataset="t2i", views=views, num_images=count, made_by=TEXT_EXTRACTION
        )
        targets.append(make(folder, settings, starts[k], partial(record_lines, folder, source, k)))
    data = PairViews(pairs, args.image_size, reading=reading)
    extract(tokenizer, data, targets, dist, log, args)
    skipped = sum(dist.gather(data.skipped))
    if dist.is_main:
        log.info(
            f"{args.code_path}: {len(chosen)} of {len(pairs.files)} files done; of the images looked at now {skipped} are "
            "unreadable or too small and have no codes"
        )
    dist.close()


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--data-path", required=True, help="folder of *.jsonl lists, or of WebDataset *.tar shards")
    parser.add_argument("--code-path", required=True, help="folder to write the codes to, a folder for each file")
    add_pairs_flags(parser)
    add_tokenizer_flags(parser, VQ_SIZES, default=f"the released {RELEASED_TOKENIZER}")
    add_image_size_flags(parser, 512, downsample=False)
    add_reading_flags(parser)
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images a batch")
    add_encoder_precision_flag(parser)
    add_extraction_flags(parser, items="images", shard_size=4096, published="one .npy a pair")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
