"""Encodes the captions of image-text pairs by flan-T5-XL for train_t2i.py: packed shards, or one .npy a caption.

    torchrun --nproc_per_node=8 language/extract_t5_feature.py --data-path laion_coco --t5-path t5_features \\
        --data-start 0 --data-end 9 --caption-key blip

    python3 language/extract_t5_feature.py --data-path PartiPrompts.tsv --t5-path prompt_features

Of the *.jsonl files (or WebDataset *.tar shards) in --data-path, in the order of their names, those from number
--data-start to number --data-end, both included. A caption is cleaned, cut to 120 tokens and encoded together with others
of its length. Rerun the command to write what is missing, on any number of processes. Where --data-path is a
file, a table with a column Prompt (.tsv, .csv) or a prompt on each line, its prompts are encoded for the --t5-feat-path of
the sampling scripts.
"""

import argparse

from dataset.pairs import CAPTION_KEYS
from utils.cli import HALF, add_extraction_flags, flag_parser, nonnegative_int, positive_int, run_script


def main(args: argparse.Namespace) -> None:
    from pathlib import Path

    import torch

    from dataset.extraction import counted, dealt
    from dataset.lines import CaptionLines, compare_before_writing, record_lines
    from dataset.t2i import chosen_files, open_pairs
    from dataset.text_features import shard_lines
    from language.extraction import (
        DTYPES,
        MAX_LENGTH,
        Captions,
        PackedTarget,
        PublishedTarget,
        encode_captions,
        read_shards,
    )
    from language.prompts import open_prompts
    from language.t5 import T5Embedder, encoder_identity, find_t5, without_fork_warnings
    from utils.distributed import start
    from utils.errors import AgreedError
    from utils.loading import loader_workers
    from utils.logger import console_logger

    without_fork_warnings()
    dist = start(args.device)
    log = console_logger("dataset", dist.is_main)
    with dist.main_first():
        pairs = open_prompts(args.data_path) or open_pairs(args.data_path, args.index_path)
        folder = find_t5(args.t5_model_path, args.t5_model_type)
    chosen = chosen_files(pairs, args.data_start, args.data_end)
    embedder = T5Embedder(
        dist.device, folder, torch_dtype=getattr(torch, DTYPES[args.precision]), model_max_length=MAX_LENGTH
    )
    lines = CaptionLines(pairs, CaptionLines.kind_of(args.caption_key, args.trunc_caption), encoder_identity(embedder))
    target, missing = (PublishedTarget if args.published_layout else PackedTarget)(args, embedder), None
    if dist.is_main:  # it looks for all: one that looked for itself would miss what a quicker one has written already
        missing = [(k, shard) for k in chosen for shard in target.missing(*pairs.files[k])]
        compare_before_writing(Path(args.t5_path), lines, chosen)
    mine = dealt(dist.broadcast(missing), dist)
    captions = Captions(pairs, embedder.tokenizer, args.caption_key, args.trunc_caption)
    total = sum(len(shard_lines(shard, pairs.files[k][1], args.shard_size)) for k, shard in mine)
    encoded = 0
    with counted(dist, log, "captions", total, lambda: encoded) as progress:
        for (k, shard), items in read_shards(captions, mine, args.shard_size, loader_workers(args.num_workers, dist)):
            stem, count = pairs.files[k]
            here = shard_lines(shard, count, args.shard_size)
            for reason in (item for item in items if isinstance(item, str)):
                log.warning(f"skipped: {reason}")
            ids = {line: item for line, item in zip(here, items, strict=True) if not isinstance(item, str)}
            wanted = target.wanted(stem, ids)
            # All of the shard where any is missing: what is encoded together, and so rounded, does not depend on it.
            features = dict(zip(ids, encode_captions(embedder, [*ids.values()], args.batch_size))) if wanted else {}
            encoded += len(features)
            record_lines(Path(args.t5_path, stem), lines, k, here, made=wanted)
            target.write(stem, shard, count, here, {line: features[line] for line in wanted})
            progress.update(len(here))
    files = [pairs.files[k] for k in chosen]
    count, skipped = sum(lines for _, lines in files), sum(dist.gather(captions.skipped))
    there = target.count(files, count - skipped) if dist.is_main else None
    if dist.broadcast(there) == 0:
        first = captions[sum(count for _, count in pairs.files[: chosen[0]])]
        raise AgreedError(
            f"none of the {count} lines has a caption: check --data-path and --caption-key, and give another --t5-path, or "
            f"remove {args.t5_path}; the first: {first}"
        )
    if dist.is_main:
        log.info(f"{args.t5_path}: features of {there} captions, {count - there} lines without a caption skipped")
    dist.close()


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument(
        "--data-path",
        required=True,
        help="folder of *.jsonl lists, or of WebDataset *.tar shards; or a file of prompts",
    )
    parser.add_argument("--t5-path", required=True, help="folder to write the features to")
    parser.add_argument(
        "--data-start", type=nonnegative_int, default=0, help="number of the first file, in the order of names"
    )
    parser.add_argument(
        "--data-end", type=nonnegative_int, default=None, help="number of the last file (default: of all)"
    )
    parser.add_argument(
        "--index-path", default=None, help="where the index of WebDataset shards goes (default: beside them)"
    )
    parser.add_argument("--caption-key", choices=CAPTION_KEYS, default="blip", help="which of a line's three texts")
    parser.add_argument("--trunc-caption", action="store_true", help="only the text before the first full stop")
    group = parser.add_argument_group("text encoder")
    help = "folder that holds the encoder's folder, or that folder itself"
    group.add_argument("--t5-model-path", default="./pretrained_models/t5-ckpt", help=help)
    group.add_argument("--t5-model-type", default="flan-t5-xl", help="name of the encoder's folder in there")
    group.add_argument("--precision", choices=HALF, default="bf16", help="of the encoder's weights")
    group.add_argument("--batch-size", type=positive_int, default=64, help="captions encoded at once")
    group = parser.add_argument_group("files")
    group.add_argument(
        "--feature-dtype",
        choices=["bfloat16", "float16", "float32"],
        default=None,
        help="of packed features (default: that of --precision, which loses nothing)",
    )
    add_extraction_flags(group, items="captions", shard_size=2048, published="one float32 .npy a caption")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
