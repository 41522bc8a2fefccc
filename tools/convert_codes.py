"""Converts extracted codes between packed shards and the published layout of one small file per image.

    python tools/convert_codes.py --from imagenet_code_c2i_flip --to imagenet_code_c2i_flip_packed --image-size 256
    python tools/convert_codes.py --from maskgitvq.jsonl --to maskgitvq_packed --image-size 256 --codebook-size 1024

The layout of `--from` is recognised and `--to` gets the other one. RAR's published codes, a .jsonl file with
{"class_id": 207, "tokens": [256 numbers]} a line, become packed shards with one view a line, and LPD's, class folders of
.npz files, such with two. A stopped conversion resumes where it was; what is already in `--to` is compared with the
source, and refused where it differs.
"""

import argparse
from pathlib import Path

from utils.cli import add_flag, flag_parser, positive_int, run_script


def main(args: argparse.Namespace) -> None:
    from dataset import conversion
    from dataset.code_files import published_sizes
    from dataset.store import INDEX_FILE

    source, target = Path(args.source), Path(args.target)
    asked = {name: getattr(args, name) for name in ("shard_size", "codebook_size", "num_classes", "vq_model")}
    known = {name: value for name, value in asked.items() if value is not None}
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"--from and --to are the same folder {source}: give another one to write to")
    if source.is_file() and source.suffix == ".jsonl":
        conversion.lines_to_packed(source, target, args.image_size, **known)
    elif not source.is_dir():
        raise FileNotFoundError(f"the code folder {source} does not exist: check --from")
    elif (source / INDEX_FILE).exists():
        conversion.packed_to_published(source, target, args.image_size)
    elif sizes := published_sizes(source):
        if args.image_size not in sizes:
            there = ", ".join(map(str, sizes))
            raise ValueError(f"{source} holds codes of --image-size {there}, not {args.image_size}")
        conversion.published_to_packed(source, target, args.image_size, **known)
    elif next(source.glob("*/*.npz"), None):
        conversion.archives_to_packed(source, target, args.image_size, **known)
    else:
        raise ValueError(f"{source} holds no codes: neither {INDEX_FILE} nor imagenet{args.image_size}_codes/")
    print(f"{target} holds the codes of {source}")


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    help = "folder of codes in either layout, or a .jsonl file of them"
    parser.add_argument("--from", dest="source", required=True, help=help)
    parser.add_argument("--to", dest="target", required=True, help="folder that gets the other layout")
    add_flag(parser, "--image-size", positive_int, None, "pixels, as given at extraction", required=True)
    help = "to packed: noted in the index (default: what --from records, or 16384)"
    add_flag(parser, "--codebook-size", positive_int, None, help)
    help = "to packed: noted in the index (default: what --from records)"
    add_flag(parser, "--num-classes", positive_int, None, help)
    add_flag(parser, "--vq-model", None, None, help)
    add_flag(parser, "--shard-size", positive_int, 4096, "to packed: images per shard")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
