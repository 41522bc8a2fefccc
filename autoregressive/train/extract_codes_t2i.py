"""Encodes the images of image-text pairs for train_t2i.py: packed shards, or with --published-layout one file a pair.

    torchrun --nproc_per_node=8 autoregressive/train/extract_codes_t2i.py --data-path laion_coco --code-path codes \\
        --vq-ckpt vq_ds16_t2i.pt --image-size 256 --data-start 0 --data-end 39

Of the *.jsonl files (or WebDataset *.tar shards) in --data-path, in the order of their names, those from number
--data-start to number --data-end, both included. Codes are those of the centre crop, a folder for each file:
`{code-path}/{stem}/`. The same command again goes on with what is missing, on any number of processes. Images that cannot
be read or are smaller than --image-size get no codes. Without --vq-ckpt the tokenizer is the released one of the text-conditional models.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from autoregressive.train.extract_codes_c2i import encode_shards, extra_settings, shard_batches
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import (
    add_encoder_precision_flag,
    add_extraction_flags,
    add_image_size_flags,
    add_reading_flags,
    add_tokenizer_flags,
    flag_parser,
    nonnegative_int,
    positive_int,
    run_script,
    tokenizer_beliefs,
)

if TYPE_CHECKING:
    from dataset.codes import CodeSettings
    from dataset.pixels import Reading
    from tokenizer.base import Tokenizer

RECORD = "extraction.json"  # of the published layout, which has no index
RELEASED_TOKENIZER = "vq_ds16_t2i.pt"

Unit = tuple[int, int]
"""A file's number among all, and a shard's among the file's."""


def main(args: argparse.Namespace) -> None:
    import time
    from itertools import accumulate
    from pathlib import Path

    import numpy as np
    from tqdm import tqdm

    from dataset.codes import CodeWriter
    from dataset.lines import ImageLines, compare_before_writing, record_lines
    from dataset.pixels import Reading
    from dataset.t2i import PairViews, chosen_files, open_pairs, write_text_codes
    from tokenizer.load import load_tokenizer
    from utils.distributed import start
    from utils.loading import loader_workers
    from utils.logger import console_logger
    from utils.runs import find_checkpoint

    dist = start(args.device)
    log = console_logger("dataset", dist.is_main)
    with dist.main_first():
        vq_path = find_checkpoint(args.vq_ckpt or RELEASED_TOKENIZER)
        pairs = open_pairs(args.data_path, args.index_path)
    chosen = chosen_files(pairs, args.data_start, args.data_end)
    tokenizer = load_tokenizer(
        vq_path,
        **tokenizer_beliefs(args),
        device=dist.device,
    )
    if args.image_size % tokenizer.downsample:
        raise ValueError(
            f"--image-size {args.image_size} is not a multiple of {tokenizer.downsample}, the pixels a side of a token"
        )
    starts = [0, *accumulate(count for _, count in pairs.files)]
    folders = {k: f"{args.code_path}/{pairs.files[k][0]}" for k in chosen}
    begun = [extra for k in chosen if (extra := recorded_settings(folders[k], args.published_layout)) is not None]
    reading = Reading.of(args, next((extra for extra in begun if "exif" not in extra), begun[0] if begun else None))
    log.info(reading)
    settings = {k: code_settings(args, pairs.files[k], tokenizer, reading) for k in chosen}
    source = ImageLines(pairs, pairs.image_kind, settings[chosen[0]].tokenizer)
    # The first process looks for all: one that looked for itself would miss what a quicker one has written already.
    batches = None
    if dist.is_main:
        look = missing_published if args.published_layout else missing_packed
        batches = [batch for k in chosen for batch in look(args, k, starts[k], settings[k], folders[k])]
        compare_before_writing(Path(args.code_path), source, chosen)
    batches = dist.broadcast(batches)
    # Dealt out in turn, so that no process has more than one shard more than another, in a resumed run either.
    units = list(dict.fromkeys(unit for unit, _ in batches))[dist.rank :: dist.world_size]
    mine = set(units)
    batches = [batch for batch in batches if batch[0] in mine]

    data = PairViews(pairs, args.image_size, reading)
    total = sum(len(images) for _, images in batches)
    of_all = f" (process 1 of {dist.world_size})" if dist.world_size > 1 else ""
    started = time.monotonic()
    with tqdm(total=total, unit="images", desc=f"encoding{of_all}", disable=not dist.is_main) as progress:
        encoded = encode_shards(
            tokenizer,
            data,
            settings[chosen[0]],
            batches,
            workers=loader_workers(args.num_workers, dist),
            mixed_precision=args.mixed_precision,
            progress=progress,
        )
        for (k, shard), codes, labels, numbers in encoded:
            lines = (numbers - starts[k]).numpy()
            shard_lines = settings[k].images_of(shard)
            record_lines(Path(folders[k]), source, k, shard_lines, lines.tolist())
            if args.published_layout:
                for line, code in zip(lines.tolist(), codes[:, 0].numpy(), strict=True):
                    write_text_codes(args.code_path, pairs.files[k][0], line, code)
            else:
                skipped = np.setdiff1d(np.asarray(shard_lines), lines).tolist()
                CodeWriter(folders[k], settings[k]).write_shard(shard, codes, labels, lines, skipped)
    total, skipped = (sum(dist.gather(value)) for value in (total, data.skipped))
    if dist.is_main:
        seconds = time.monotonic() - started
        if total:
            log.info(f"encoded {total} images in {seconds:.1f} s, {total / seconds:.1f} images/s over all processes")
        log.info(
            f"{args.code_path}: {len(chosen)} of {len(pairs.files)} files done; of the images looked at now {skipped} are "
            "unreadable or too small and have no codes"
        )
    dist.close()


def recorded_settings(folder: str, published: bool) -> dict | None:
    """Return what a file's folder of codes records beside them, {} where it has codes alone; None where it has none."""
    import json
    from pathlib import Path

    from dataset.shards import recorded_extra

    if not published:
        return recorded_extra(folder)
    record = Path(folder) / RECORD
    if record.exists():
        return json.loads(record.read_bytes())
    return {} if any(Path(folder).glob("[0-9]*.npy")) else None


def missing_packed(
    args: argparse.Namespace, k: int, start: int, settings: "CodeSettings", folder: str
) -> list[tuple[Unit, range]]:
    """The batches of a file's shards that are not there whole: ((file, shard), data set indices)."""
    from dataset.codes import CodeWriter

    shards = CodeWriter(folder, settings).missing_shards()
    return _moved(shard_batches(settings, shards, args.batch_size), k, start)


def missing_published(
    args: argparse.Namespace, k: int, start: int, settings: "CodeSettings", folder: str
) -> list[tuple[Unit, range]]:
    """The batches of a file in which a pair has no codes yet; whole ones, so that rounding does not depend on what is there."""
    from pathlib import Path

    import numpy as np

    from dataset.pixels import Reading
    from utils.files import write_json

    there = {path.stem for path in Path(folder).glob("[0-9]*.npy")}
    if there:
        file = Path(folder) / f"{min(there)}.npy"
        shape = np.load(file, mmap_mode="r").shape
        if shape != (1, settings.tokens):
            raise ValueError(f"{file} has shape {shape}, these codes (1, {settings.tokens}): write to another folder")
    before = recorded_settings(folder, True)
    if before is None:
        write_json(Path(folder) / RECORD, settings.extra)
    elif Reading.recorded(before) != Reading.recorded(settings.extra):
        raise ValueError(
            f"the codes in {folder} were made with{Reading.recorded(before).flags() or ' --exif --background white'}: give the "
            "same flags, or another --code-path"
        )
    batches = shard_batches(settings, range(settings.num_shards), args.batch_size)
    return _moved([(shard, images) for shard, images in batches if not there.issuperset(map(str, images))], k, start)


def _moved(batches: Sequence[tuple[int, range]], k: int, start: int) -> list[tuple[Unit, range]]:
    """A file's batches by the numbers that all files' pairs have together."""
    return [((k, shard), range(images.start + start, images.stop + start)) for shard, images in batches]


def code_settings(
    args: argparse.Namespace, file: tuple[str, int], tokenizer: "Tokenizer", reading: "Reading"
) -> "CodeSettings":
    """What the index of a file's shards records of the codes."""
    from dataset.codes import CodeSettings
    from dataset.t2i import CODE_VIEW, EXTRACTION

    return CodeSettings(
        dataset="t2i",
        image_size=args.image_size,
        tokens=(args.image_size // tokenizer.downsample) ** 2,
        views=(CODE_VIEW,),
        codebook_size=tokenizer.codebook_size,
        num_images=file[1],
        vq_model=tokenizer.family,
        tokenizer=tokenizer.fingerprint(),
        shard_size=args.shard_size,
        made_by=EXTRACTION,
        extra=extra_settings(args.mixed_precision, reading),
    )


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--data-path", required=True, help="folder of *.jsonl lists, or of WebDataset *.tar shards")
    parser.add_argument("--code-path", required=True, help="folder to write the codes to, a folder for each file")
    parser.add_argument(
        "--data-start", type=nonnegative_int, default=0, help="number of the first file, in the order of names"
    )
    parser.add_argument(
        "--data-end", type=nonnegative_int, default=None, help="number of the last file (default: of all)"
    )
    parser.add_argument(
        "--index-path", default=None, help="where the index of WebDataset shards goes (default: beside them)"
    )
    add_tokenizer_flags(parser, VQ_SIZES)
    add_image_size_flags(parser, 512, downsample=False)
    add_reading_flags(parser)
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images a batch")
    add_encoder_precision_flag(parser)
    add_extraction_flags(parser, items="images", shard_size=4096, published="one .npy a pair")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
