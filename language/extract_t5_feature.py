"""Encodes the captions of image-text pairs by flan-T5-XL for train_t2i.py: packed shards, or one .npy a caption.

    torchrun --nproc_per_node=8 language/extract_t5_feature.py --data-path laion_coco --t5-path t5_features \\
        --data-start 0 --data-end 9 --caption-key blip

    python3 language/extract_t5_feature.py --data-path PartiPrompts.tsv --t5-path prompt_features

Of the *.jsonl files (or WebDataset *.tar shards) in --data-path, in the order of their names, those from number
--data-start to number --data-end, both included. A caption is cleaned, cut to 120 tokens and encoded together with others
of its length. The same command again goes on with what is missing, on any number of processes. Where --data-path is a
file, a table with a column Prompt (.tsv, .csv) or a prompt on each line, its prompts are encoded for the --t5-feat-path of
the sampling scripts.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dataset.caption_keys import CAPTION_KEYS, caption_of
from utils.cli import add_extraction_flags, flag_parser, nonnegative_int, positive_int, run_script

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm
    from transformers import PreTrainedTokenizerBase

    from dataset.t2i import Pairs
    from language.prompts import PromptList
    from language.t5 import T5Embedder

MAX_LENGTH = 120
LINES_AT_ONCE = 256  # that a loader process reads and cleans before it hands them over
# A shard of so many lines without a single caption is no accident, but another kind of file or the wrong key.
NONE_OF = 100

_DTYPES = {"none": "float32", "fp16": "float16", "bf16": "bfloat16"}

Unit = tuple[int, int]
"""A file's number among all, and a shard's among the file's."""


def main(args: argparse.Namespace) -> None:
    import time
    from pathlib import Path

    import torch
    from tqdm import tqdm

    from dataset.lines import CaptionLines, compare_before_writing, record_lines
    from dataset.t2i import chosen_files, open_pairs
    from dataset.text_features import FeatureWriter, published_lines, shard_lines, write_published_features
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
        dist.device, folder, torch_dtype=getattr(torch, _DTYPES[args.precision]), model_max_length=MAX_LENGTH
    )
    if args.published_layout:
        refuse_packed(args.t5_path)
        writer, missing = None, missing_published(args, pairs, chosen) if dist.is_main else None
    else:
        # The first process writes the index and looks for all: one that looked for itself would miss what a quicker one
        # has written already.
        make = {"dim": embedder.dim, "max_length": MAX_LENGTH, "dtype": args.feature_dtype or _DTYPES[args.precision]}
        make |= {"settings": feature_settings(args, embedder), "shard_size": args.shard_size}
        writer = FeatureWriter(args.t5_path, **make) if dist.is_main else None
        missing = [(k, shard) for k in chosen for shard in writer.missing_shards(*pairs.files[k])] if writer else None
    lines = CaptionLines(pairs, CaptionLines.kind_of(args.caption_key, args.trunc_caption), encoder_identity(embedder))
    if dist.is_main:
        compare_before_writing(Path(args.t5_path), lines, chosen)
    missing = dist.broadcast(missing)
    if not args.published_layout:
        writer = writer or FeatureWriter(args.t5_path, **make)
    # Dealt out in turn, so that no process has more than one shard more than another, in a resumed run either.
    mine = missing[dist.rank :: dist.world_size]
    total = sum(len(shard_lines(shard, pairs.files[k][1], args.shard_size)) for k, shard in mine)
    of_all = f" (process 1 of {dist.world_size})" if dist.world_size > 1 else ""
    encoded, started = 0, time.monotonic()
    with tqdm(total=total, unit="captions", desc=f"encoding{of_all}", disable=not dist.is_main) as progress:
        captions = Captions(pairs, embedder.tokenizer, args.caption_key, args.trunc_caption)
        read = read_shards(captions, mine, args.shard_size, loader_workers(args.num_workers, dist))
        for (k, shard), items in read:
            stem, count = pairs.files[k]
            lines_here = shard_lines(shard, count, args.shard_size)
            for reason in (item for item in items if isinstance(item, str)):
                log.warning(f"skipped: {reason}")
            ids = [None if isinstance(item, str) else item for item in items]
            if args.published_layout:
                there = published_here(args.t5_path, stem, lines_here)
                wanted = [line for line, i in zip(lines_here, ids, strict=True) if i is not None and line not in there]
                # All of the shard where any is missing: what is encoded together, and so rounded, does not depend on it.
                features = encode_captions(embedder, ids, args.batch_size, progress) if wanted else []
                encoded += sum(rows is not None for rows in features)
                record_lines(Path(args.t5_path, stem), lines, k, lines_here, made=wanted)
                for line in wanted:
                    write_published_features(args.t5_path, stem, line, features[line - lines_here.start])
            else:
                features = encode_captions(embedder, ids, args.batch_size, progress)
                encoded += sum(rows is not None for rows in features)
                made = [line for line, i in zip(lines_here, ids, strict=True) if i is not None]
                record_lines(Path(args.t5_path, stem), lines, k, lines_here, made)
                writer.write_shard(stem, shard, features, count)
            progress.update(sum(i is None for i in ids) if features else len(ids))
    encoded, skipped = (sum(dist.gather(value)) for value in (encoded, captions.skipped))
    count = sum(pairs.files[k][1] for k in chosen)
    if writer and dist.is_main:  # some shards may be an earlier run's
        skipped = sum(writer.skipped(*pairs.files[k]) for k in chosen)
    nothing = dist.is_main and skipped == count
    if nothing and not writer:
        nothing = not any(
            published_lines(args.t5_path, stem, range(count)).any()
            for stem, count in map(pairs.files.__getitem__, chosen)
        )
    if dist.broadcast(nothing):
        first = captions[sum(count for _, count in pairs.files[: chosen[0]])]
        another = f" and give another --t5-path, or remove {args.t5_path}" if writer else ""
        raise AgreedError(
            f"none of the {count} lines has a caption: check --data-path and --caption-key{another}; the first: {first}"
        )
    if dist.is_main:
        seconds = time.monotonic() - started
        if encoded:
            log.info(
                f"encoded {encoded} captions in {seconds:.1f} s, {encoded / seconds:.1f} captions/s over all processes"
            )
        log.info(f"{args.t5_path}: features of {count - skipped} captions, {skipped} lines without a caption skipped")
    dist.close()


class Captions:
    """The token numbers of captions, read, cleaned and cut; a string that says why where there is no caption.

    key: which of a line's texts. truncate: only the text before the first full stop.
    """

    def __init__(self, pairs: "Pairs", tokenizer: "PreTrainedTokenizerBase", key: str, truncate: bool):
        self.pairs, self.tokenizer = pairs, tokenizer
        self.key, self.truncate = key, truncate
        self.skipped = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> list[int] | str:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[list[int] | str]:
        """The items of several lines at once: DataLoader calls this instead of one index at a time."""
        from language.t5 import preprocess

        items: list[list[int] | str] = [""] * len(indices)
        texts = {}
        for place, index in enumerate(indices):
            try:
                text = self.text(index)
                texts[place] = preprocess(text)
            except ValueError as error:
                items[place] = str(error)
                continue
            if not texts[place]:
                del texts[place]
                left = f", {text[:60]!r}, once it is cleaned" if text.strip() else ""
                items[place] = f"{self.pairs.where(index)} has an empty caption{left}"
        if texts:
            tokens = self.tokenizer(list(texts.values()), max_length=MAX_LENGTH, truncation=True)["input_ids"]
            for place, ids in zip(texts, tokens, strict=True):
                items[place] = ids
        return items

    def text(self, index: int) -> str:
        """A line's caption as it is written there. Raises ValueError as caption_of does."""
        return caption_of(self.pairs, index, self.key, self.truncate)


def read_shards(
    captions: Captions, units: Sequence[Unit], shard_size: int, workers: int
) -> "Iterator[tuple[Unit, list[list[int] | str]]]":
    """Yields (file and shard, an item of `captions` for each of its lines) of every shard in `units`.

    One loader goes through all the shards, so that its `workers` processes start once and work ahead of the encoder.
    """
    from itertools import accumulate, groupby

    from torch.utils.data import DataLoader

    from dataset.text_features import shard_lines
    from utils.loading import batches_of

    starts = [0, *accumulate(count for _, count in captions.pairs.files)]
    batches = []
    for k, shard in units:
        lines = shard_lines(shard, captions.pairs.files[k][1], shard_size)
        for first in range(lines.start, lines.stop, LINES_AT_ONCE):
            last = min(first + LINES_AT_ONCE, lines.stop)
            batches.append(((k, shard), range(starts[k] + first, starts[k] + last)))
    loader = DataLoader(
        captions,
        batch_sampler=[indices for _, indices in batches],
        num_workers=min(workers, len(batches)),
        collate_fn=list,
    )
    for unit, loaded in groupby(zip(batches, batches_of(loader), strict=True), key=lambda pair: pair[0][0]):
        items = [item for _, batch in loaded for item in batch]
        reasons = [item for item in items if isinstance(item, str)]
        if len(reasons) == len(items) >= NONE_OF:
            raise ValueError(f"none of {len(items)} lines in a row has a caption; the first: {reasons[0]}")
        captions.skipped += len(reasons)
        yield unit, items


def encode_captions(
    embedder: "T5Embedder", ids: "Sequence[list[int] | None]", batch_size: int, progress: "tqdm | None" = None
) -> "list[Tensor | None]":
    """The features (length, dim) of captions given as token numbers, on the CPU; None for a None.

    Captions of like length are encoded together, `batch_size` at a time and padded to the longest of them: an alternative
    text has 15 tokens where the published extraction computes 120. A function of `ids` and `batch_size`.
    """
    import torch

    features: list[Tensor | None] = [None] * len(ids)
    order = sorted((place for place in range(len(ids)) if ids[place] is not None), key=lambda place: len(ids[place]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        longest = -(-len(ids[batch[-1]]) // 8) * 8  # matrix units like whole eights
        padded = torch.full((len(batch), longest), embedder.tokenizer.pad_token_id)
        mask = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, place in enumerate(batch):
            length = len(ids[place])
            padded[row, :length] = torch.tensor(ids[place])
            mask[row, :length] = 1
        rows = embedder.encode(padded, mask).cpu()  # (batch, longest, dim)
        for row, place in enumerate(batch):
            features[place] = rows[row, : len(ids[place])]
        if progress is not None:
            progress.update(len(batch))
    return features


def open_prompts(path: str) -> "PromptList | None":
    """The prompts of a file, a table or a line each; None where the path is no file. Raises ValueError as the readers do."""
    from pathlib import Path

    if not Path(path).is_file():
        return None
    from language.prompts import PromptList, read_prompts

    return PromptList(path, read_prompts(path))


def missing_published(args: argparse.Namespace, pairs: "Pairs", chosen: Sequence[int]) -> list[Unit]:
    """The shards of the files in which a line has no features in the published layout yet."""
    from dataset.text_features import num_shards, published_lines, shard_lines

    missing = []
    for k in chosen:
        stem, lines = pairs.files[k]
        there = published_lines(args.t5_path, stem, range(lines))
        for shard in range(num_shards(lines, args.shard_size)):
            here = shard_lines(shard, lines, args.shard_size)
            if not there[here.start : here.stop].all():
                missing.append((k, shard))
    return missing


def published_here(folder: str, stem: str, lines: range) -> set[int]:
    """Those of `lines` that have features in the published layout."""
    from pathlib import Path

    return {line for line in lines if Path(folder, stem, f"{line}.npy").exists()}


def refuse_packed(folder: str) -> None:
    """Raises ValueError where a folder has packed features: with both in it, which are meant would be a guess."""
    from pathlib import Path

    from dataset.store import INDEX_FILE

    if Path(folder, INDEX_FILE).exists():
        raise ValueError(f"{folder} holds packed features: give --t5-path another folder for the published layout")


def feature_settings(args: argparse.Namespace, embedder: "T5Embedder") -> dict:
    """What the index records of the features: all that decides them beyond rounding, but the captions themselves."""
    from language.t5 import fingerprint

    return {
        "t5": args.t5_model_type,
        "fingerprint": fingerprint(embedder),
        "precision": args.precision,
        "caption_key": args.caption_key,
        "truncated": args.trunc_caption,
        "cleaning": "twice",
    }


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
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
    group.add_argument("--precision", choices=list(_DTYPES), default="bf16", help="of the encoder's weights")
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
