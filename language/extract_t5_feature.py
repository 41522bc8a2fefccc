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
import os

from dataset.flags import add_extraction_flags, add_pairs_flags
from dataset.pairs import CAPTION_KEYS
from utils.cli import HALF, add_flag, flag_parser, positive_int, run_script


def main(args: argparse.Namespace) -> None:
    import torch

    from dataset.sources import chosen_files, open_pairs
    from language.extraction import DTYPES, MAX_LENGTH, extract
    from language.prompts import PromptList, read_prompts
    from language.t5 import T5Embedder, find_t5
    from utils.distributed import start
    from utils.logger import console_logger

    # Loader processes are forked from this one, which has used the tokenizer's threads, and each has its own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    dist = start(args.device)
    log = console_logger("dataset", dist.is_main)
    with dist.main_first():
        path = args.data_path
        pairs = PromptList(path, read_prompts(path)) if os.path.isfile(path) else open_pairs(path, args.index_path)
        folder = find_t5(args.t5_model_path, args.t5_model_type)
    chosen = chosen_files(pairs, args.data_start, args.data_end)
    dtype = getattr(torch, DTYPES[args.precision])
    embedder = T5Embedder(dist.device, folder, torch_dtype=dtype, model_max_length=MAX_LENGTH)
    extract(args, pairs, chosen, embedder, dist, log)
    dist.close()


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    help = "folder of *.jsonl lists, or of WebDataset *.tar shards; or a file of prompts"
    add_flag(parser, "--data-path", None, None, help, required=True)
    parser.add_argument("--t5-path", required=True, help="folder to write the features to")
    add_pairs_flags(parser)
    parser.add_argument("--caption-key", choices=CAPTION_KEYS, default="blip", help="which of a line's three texts")
    parser.add_argument("--trunc-caption", action="store_true", help="only the text before the first full stop")
    group = parser.add_argument_group("text encoder")
    help = "folder that holds the encoder's folder, or that folder itself"
    group.add_argument("--t5-model-path", default="./pretrained_models/t5-ckpt", help=help)
    group.add_argument("--t5-model-type", default="flan-t5-xl", help="name of the encoder's folder in there")
    group.add_argument("--precision", choices=HALF, default="bf16", help="of the encoder's weights")
    group.add_argument("--batch-size", type=positive_int, default=64, help="captions encoded at once")
    group = parser.add_argument_group("files")
    help = "of packed features (default: that of --precision, which loses nothing)"
    add_flag(group, "--feature-dtype", None, None, help, choices=["bfloat16", "float16", "float32"])
    add_extraction_flags(group, items="captions", shard_size=2048, published="one float32 .npy a caption")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
