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
    from transformers import PreTrainedTokenizerBase

    from dataset.t2i import Pairs
    from language.t5 import T5Embedder

MAX_LENGTH = 120
LINES_AT_ONCE = 256  # that a loader process reads and cleans before it hands them over
# A shard of so many lines without a single caption is no accident, but another kind of file or the wrong key.
NONE_OF = 100

_DTYPES = {"none": "float32", "fp16": "float16", "bf16": "bfloat16"}

Unit = tuple[int, int]
"""A file's number among all, and a shard's among the file's."""


def main(args: argparse.Namespace) -> None:
    from pathlib import Path

    import torch

    from dataset.extraction import counted, dealt
    from dataset.lines import CaptionLines, compare_before_writing, record_lines
    from dataset.t2i import chosen_files, open_pairs
    from dataset.text_features import shard_lines
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
        dist.device, folder, torch_dtype=getattr(torch, _DTYPES[args.precision]), model_max_length=MAX_LENGTH
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


class PackedTarget:
    """Folder of packed features that captions go to."""

    def __init__(self, args: argparse.Namespace, embedder: "T5Embedder"):
        from language.t5 import fingerprint

        self.folder = args.t5_path
        settings = {
            "t5": args.t5_model_type,
            "fingerprint": fingerprint(embedder),
            "precision": args.precision,
            "caption_key": args.caption_key,
            "truncated": args.trunc_caption,
            "cleaning": "twice",
        }
        self.index = {
            "dim": embedder.dim,
            "max_length": MAX_LENGTH,
            "dtype": args.feature_dtype or _DTYPES[args.precision],
            "settings": settings,
            "shard_size": args.shard_size,
        }

    def missing(self, stem: str, lines: int) -> list[int]:
        """Return the shards of a file that are not there whole."""
        from dataset.text_features import FeatureWriter

        return FeatureWriter(self.folder, **self.index).missing_shards(stem, lines)

    def wanted(self, stem: str, lines: "dict[int, list[int]]") -> list[int]:
        """Return which of these lines of a shard are to be written."""
        return [*lines]

    def write(self, stem: str, shard: int, lines: int, here: range, features: "dict[int, Tensor]") -> None:
        """Write a shard, the lines `here` of a file of so many."""
        from dataset.text_features import FeatureWriter

        FeatureWriter(self.folder, **self.index).write_shard(stem, shard, [features.get(line) for line in here], lines)

    def count(self, files: Sequence[tuple[str, int]], found: int) -> int:
        """Return how many captions of the files have features: some may be an earlier run's."""
        from dataset.text_features import FeatureWriter

        writer = FeatureWriter(self.folder, **self.index)
        return sum(lines - writer.skipped(stem, lines) for stem, lines in files)


class PublishedTarget(PackedTarget):
    """Folder of the published layout. Raises ValueError where it has packed features: with both, which are meant is a guess."""

    def __init__(self, args: argparse.Namespace, embedder: "T5Embedder"):
        from pathlib import Path

        from dataset.store import INDEX_FILE

        self.folder, self.shard_size = args.t5_path, args.shard_size
        if Path(self.folder, INDEX_FILE).exists():
            raise ValueError(
                f"{self.folder} holds packed features: give --t5-path another folder for the published layout"
            )

    def missing(self, stem: str, lines: int) -> list[int]:
        """Return the shards of a file in which a line has no features yet."""
        from dataset.text_features import num_shards, published_lines, shard_lines

        there = published_lines(self.folder, stem, range(lines))
        shards = [shard_lines(shard, lines, self.shard_size) for shard in range(num_shards(lines, self.shard_size))]
        return [shard for shard, here in enumerate(shards) if not there[here.start : here.stop].all()]

    def wanted(self, stem: str, lines: "dict[int, list[int]]") -> list[int]:
        """Return those of the lines that have no features yet."""
        from pathlib import Path

        return [line for line in lines if not Path(self.folder, stem, f"{line}.npy").exists()]

    def write(self, stem: str, shard: int, lines: int, here: range, features: "dict[int, Tensor]") -> None:
        """Write the lines."""
        from dataset.text_features import write_published_features

        for line, rows in features.items():
            write_published_features(self.folder, stem, line, rows)

    def count(self, files: Sequence[tuple[str, int]], found: int) -> int:
        """Return how many captions were found, or 1 where an earlier run has written some: others are not counted."""
        from dataset.text_features import published_lines

        return found or int(any(published_lines(self.folder, stem, range(lines)).any() for stem, lines in files))


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
        """Return the items of several lines at once: DataLoader calls this instead of one index at a time."""
        from language.t5 import preprocess

        items: list[list[int] | str] = [""] * len(indices)
        texts = {}
        for place, index in enumerate(indices):
            try:
                text = caption_of(self.pairs, index, self.key, self.truncate)
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


def read_shards(
    captions: Captions, units: Sequence[Unit], shard_size: int, workers: int
) -> "Iterator[tuple[Unit, list[list[int] | str]]]":
    """Yield (file and shard, an item of `captions` for each of its lines) of every shard in `units`.

    One loader goes through all the shards, so that its `workers` processes start once and work ahead of the encoder.
    """
    from itertools import accumulate, groupby

    from dataset.text_features import shard_lines
    from utils.loading import load

    starts = [0, *accumulate(count for _, count in captions.pairs.files)]
    batches = []
    for k, shard in units:
        lines = shard_lines(shard, captions.pairs.files[k][1], shard_size)
        for first in range(lines.start, lines.stop, LINES_AT_ONCE):
            last = min(first + LINES_AT_ONCE, lines.stop)
            batches.append(((k, shard), range(starts[k] + first, starts[k] + last)))
    loaded_lines = load(captions, [indices for _, indices in batches], workers, list)
    for unit, loaded in groupby(zip(batches, loaded_lines, strict=True), key=lambda pair: pair[0][0]):
        items = [item for _, batch in loaded for item in batch]
        reasons = [item for item in items if isinstance(item, str)]
        if len(reasons) == len(items) >= NONE_OF:
            raise ValueError(f"none of {len(items)} lines in a row has a caption; the first: {reasons[0]}")
        captions.skipped += len(reasons)
        yield unit, items


def encode_captions(
    embedder: "T5Embedder", ids: "Sequence[list[int] | None]", batch_size: int
) -> "list[Tensor | None]":
    """Return the features (length, dim) of captions given as token numbers, on the CPU; None for a None.

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
    return features


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
