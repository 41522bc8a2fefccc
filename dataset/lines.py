"""The record of the lines that features and codes were made of, and its comparison with the lines of today.

    captions = CaptionLines(pairs, kind="blip", maker=fingerprint)
    record_lines(folder / "part-0", captions, 0, range(2048), made=range(2048))    # lines-00000000.npz there
    compare_lines(folder / "part-0", CaptionLines(pairs), 0)                       # ValueError for the first line that differs

A feature depends on its caption, a code on its image: an edit of the rest of a line is no difference. A record also has
the digest of its list as a whole. Where that is the same still, no line is read.
"""

import hashlib
import logging
import zipfile
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from dataset.pairs import CAPTION_KEYS, caption_of
from utils.files import atomic_write

logger = logging.getLogger(__name__)

_TRUNCATED = " truncated"
_REMEDY = "give the list it was made of, or make it anew in another folder"


class Lines:
    """The lines of a source's files by what decides something made of them.

    Args:
        source: the files.
        kind: which of several such things it is.
        maker: a fingerprint of the model that makes something of the lines.

    kind and maker are given where something is going to be made, and then refuse what others made. Subclasses name the
    `part` of a line, and have `reads(kind)`, whether records of a kind can be compared, and `digest(kind, index)`, what a
    line comes to, by its number among all (ValueError where it is damaged or has nothing).
    """

    part: str

    def __init__(self, source: Any, kind: str | None = None, maker: str | None = None):
        self.source, self.files, self.kind, self.maker = source, list(source.files), kind, maker
        self.starts = [0, *accumulate(count for _, count in self.files)]


class CaptionLines(Lines):
    """The captions that features are made of. A kind is a caption key, and whether captions are truncated."""

    part = "caption"

    @staticmethod
    def kind_of(key: str, truncated: bool) -> str:
        """Return the kind that two flags of extraction stand for."""
        return key + _TRUNCATED * truncated

    def reads(self, kind: str) -> bool:
        return kind.removesuffix(_TRUNCATED) in CAPTION_KEYS

    def digest(self, kind: str, index: int) -> int:
        return digest(caption_of(self.source, index, kind.removesuffix(_TRUNCATED), kind.endswith(_TRUNCATED)))


class ImageLines(Lines):
    """The images that codes are made of: their paths in a list; name, size and beginning of a tar's members."""

    part = "image"

    def reads(self, kind: str) -> bool:
        return kind == self.source.image_kind

    def digest(self, kind: str, index: int) -> int:
        return self.source.image_digest(index)


def digest(content: bytes | str) -> int:
    """Return a number of 63 bits that stands for a text; never 0, which stands for none."""
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1 or 1


def digest_all(contents: Iterable[bytes | str]) -> str:
    """Return hexadecimal digits that stand for a sequence of texts."""
    numbers = np.fromiter(map(digest, contents), np.int64)
    return hashlib.blake2b(numbers.tobytes(), digest_size=16).hexdigest()


def record_lines(folder: Path, lines: Lines, k: int, shard: range, made: Iterable[int]) -> None:
    """Record what the lines `made` of a shard of file `k` are made of; what is recorded of its other lines stays.

    Call it before the shard is written: features or codes without a record would pass for those of any list.
    """
    file = folder / f"lines-{shard.start:08d}.npz"
    digests = np.zeros(len(shard), np.int64)
    if file.exists():
        earlier = _read(file)["digests"][: len(shard)]
        digests[: len(earlier)] = earlier
    for line in made:
        digests[line - shard.start] = lines.digest(lines.kind, lines.starts[k] + line)
    for leftover in folder.glob(f".{file.name}.*.tmp"):  # of a run that was killed here
        leftover.unlink(missing_ok=True)
    with atomic_write(file) as f:
        np.savez(f, kind=lines.kind, maker=lines.maker or "", list=lines.source.list_digest(k), digests=digests)


def compare_lines(folder: Path, lines: Lines, k: int) -> int:
    """Compare what a folder records with the lines of file `k` as they are now. Returns how many lines are recorded.

    Raises ValueError that names the first line that differs, or another kind or maker.
    """
    recorded, differing, start, count = 0, [], lines.starts[k], lines.files[k][1]
    for file in sorted(folder.glob("lines-*.npz")):
        record = _read(file)
        its_kind, digests = record["kind"].item(), record["digests"]
        for now, there in ((lines.kind, its_kind), (lines.maker, record["maker"].item())):
            if None not in (now, there) and there and now != there:
                raise ValueError(f"{folder} was made with {there!r}, now it is {now!r}: write to another folder")
        if not lines.reads(its_kind):
            continue
        recorded += len(digests)
        if record["list"].item() == lines.source.list_digest(k):
            continue
        for line, made_of in enumerate(
            digests[: max(count - (first := int(file.stem.removeprefix("lines-"))), 0)].tolist(), start=first
        ):
            if made_of and _digest_or_none(lines, its_kind, start + line) != made_of:
                differing.append(line)
    if differing:
        first = f"the {lines.part} of {lines.source.where(start + differing[0])} is another now"
        others = f"{len(differing) - 1} more are; {_REMEDY} (without {folder}/lines-*.npz nothing is compared)"
        raise ValueError(f"{folder} was made of other lines: {first}, and {others}")
    return recorded


def compare_before_writing(folder: Path, lines: Lines, chosen: Iterable[int]) -> None:
    """Compare what there is in a folder already of the `chosen` files, whose missing parts are going to be written."""
    unknown = 0
    for k in chosen:
        stem, count = lines.files[k]
        if not compare_lines(folder / stem, lines, k) and any((folder / stem).glob("*.npy")):
            unknown += count
    _tell_unknown(folder, lines, unknown)


def compare_folder(folder: Path, lines: Lines, count_of: Callable[[str], int | None]) -> None:
    """Compare the folder of every file in `folder` with its lines, and log what could not be compared.

    count_of: how many lines a stem's file had, None where that is not known. Raises ValueError as compare_lines does, and
    where the number of lines is another and nothing tells which they were.
    """
    there = [k for k, (stem, _) in enumerate(lines.files) if (folder / stem).is_dir()]
    if len(there) < len(lines.files):
        counts = len(there), len(lines.files)
        logger.warning("%s has a folder of %d of %d files; it has nothing of the others", folder, *counts)
    unknown = 0
    for k in there:
        stem, count = lines.files[k]
        made_of, recorded = count_of(stem) or count, compare_lines(folder / stem, lines, k)
        if made_of != count:
            other = f"{folder / stem} was made of {made_of} lines, now there are {count}"
            if recorded < made_of:
                raise ValueError(f"{other}, and it does not record which they were: {_REMEDY}")
            logger.warning("%s; all but the last are the same", other)
        unknown += max(made_of - recorded, 0)
    _tell_unknown(folder, lines, unknown)


def recorded_digest(folder: Path, stems: Iterable[str]) -> str | None:
    """Return what the records of all lines come to; None where there are none."""
    found = [_read(file) for stem in stems for file in sorted((folder / stem).glob("lines-*.npz"))]
    contents = [part for one in found for part in (one["kind"].item(), one["digests"].tobytes())]
    return digest_all(contents) if found else None


def recorded_maker(folder: Path, stems: Iterable[str]) -> str | None:
    """Return the fingerprint of the model that made what a folder has of these files; None where that is not recorded.

    Raises ValueError where two made it.
    """
    makers = {}
    for stem in stems:
        for file in sorted((folder / stem).glob("lines-*.npz"))[:1]:
            makers.setdefault(_read(file)["maker"].item(), folder / stem)
    makers.pop("", None)
    if len(makers) > 1:
        (one, there), (other, here), *_ = makers.items()
        raise ValueError(f"{there} was made with {one}, {here} with {other}: extract one of them again")
    return next(iter(makers), None)


def _tell_unknown(folder: Path, lines: Lines, unknown: int) -> None:
    if unknown:
        logger.info("%s does not record the %ss of %d lines: they could not be compared", folder, lines.part, unknown)


def _digest_or_none(lines: Lines, kind: str, index: int) -> int:
    try:
        return lines.digest(kind, index)
    except ValueError:
        return 0


def _read(file: Path) -> dict[str, np.ndarray]:
    """Return a record's kind, maker, list and digests."""
    try:
        with np.load(file) as record:
            return {name: record[name] for name in ("kind", "maker", "list", "digests")}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is damaged ({error}): without it its lines are not compared") from error
