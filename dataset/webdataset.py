"""Image-text pairs in WebDataset shards: tar files in which members that follow each other under one name are a sample.

    pairs = TarPairs("laion_shards")                 # all *.tar of the folder, by name
    pairs.identity(7), pairs.texts(7)                # ('00000', 7), ['a bee on a flower']
    image = load_rgb(pairs.image_file(7))            # dataset/pixels.py

The format is WebDataset's (uncompressed tar; `000123.jpg` beside `000123.json` or `000123.txt`), its way of reading is not:
streams are shuffled in a buffer and cannot be taken up where they were left. Where every member lies is found out once
and kept in an index file of 56 bytes a sample; a sample is then one read at an offset. So the data order, the exact
resume and the moves between numbers of processes of all other data hold for shards too. What it costs: reads at random
places, which local disks do well and a network's object store does not (copy the shards to a disk first).
"""

import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np

from dataset.lines import digest, digest_all
from dataset.pairs import PairFiles
from dataset.pixels import IMAGE_EXTENSIONS
from utils.files import atomic_write

logger = logging.getLogger(__name__)

INDEX_NAME = "webdataset-index.npy"
FORMAT = 3
_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")  # path up to the first dot of the name, extension
_DOTTED = re.compile(r"(.*)\.([^/.]*)")  # up to the last
_TEXTS = ("json", "txt")
_READERS = 8
_BEGINNING = 4096  # bytes of an image that tell it from others, with its name and size


class TarPairs(PairFiles):
    """The samples of a folder's *.tar files, image and texts.

    A sample's members follow each other and share their path up to the first dot of the name, as WebDataset's do. Where
    no image is among them (`a.v1.jpg`, `a.v1.txt`, `a.v2.jpg`), they share it up to the last dot.

    Opening looks at every shard's size and time and indexes the new and changed ones. The index lies in the folder, or in
    `index_path` where the folder is not writable; processes share its pages.
    Raises as PairFiles does, ValueError where a shard is damaged or has no image, OSError where the index cannot be
    written.
    """

    image_kind = "tar members"

    def __init__(self, folder: str | Path, index_path: str | Path | None = None):
        packed = next((path.name for path in sorted(Path(folder).glob("*.tar.*"))), None)
        hint = f"; {packed} is compressed, and samples are read at their offsets: unpack it" if packed else ""
        super().__init__(folder, ".tar", hint)
        self.index_file = Path(index_path or self.folder) / INDEX_NAME
        self.number(*_open_index(self.paths, self.index_file))
        self._map: np.ndarray | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}

    def image_file(self, index: int) -> io.BytesIO:
        """Return the bytes of a sample's image. Raises ValueError where it has none or the shard is shorter than it was, OSError."""
        offset, size = self._rows[index, :2].tolist()
        if not size:
            raise ValueError(f"{self.where(index)} has no image")
        return io.BytesIO(self._read(index, offset, size))

    def texts(self, index: int) -> list[str]:
        """Return a sample's captions: `text` or `caption` of its .json (a string or a list), else its .txt. Raises ValueError."""
        json_offset, json_size, offset, size = self._rows[index, 2:6].tolist()
        try:
            value = json.loads(self._read(index, json_offset, json_size)) if json_size else {}
            found = [value.get(key) for key in ("text", "caption")] if isinstance(value, dict) else []
            found += [self._read(index, offset, size).decode()] if size else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the text of {self.where(index)} is damaged: {error}") from error
        for texts in ([text] if isinstance(text, str) else text for text in found):
            if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
                return texts
        raise ValueError(f"{self.where(index)} has no caption: neither `text` nor `caption` in a .json, nor a .txt")

    def image_digest(self, index: int) -> int:
        """Return what the image's name, size and first bytes come to; 0 for a sample without one."""
        return int(self._rows[index, 6])

    def where(self, index: int) -> str:
        """Return a sample's place, for messages."""
        which, number = self.place(index)
        return f"sample {number} of {self.paths[which]}"

    @property
    def _rows(self) -> np.ndarray:
        if self._map is None:
            self._map = np.load(self.index_file, mmap_mode="r")
        return self._map

    def _read(self, index: int, offset: int, size: int) -> bytes:
        path = self.paths[self.place(index)[0]]
        with open(path, "rb") as f:
            f.seek(offset)
            content = f.read(size)
        if len(content) != size:
            raise ValueError(f"{path} is shorter than when it was indexed: is it being written?")
        return content


def _open_index(shards: Sequence[Path], file: Path) -> tuple[list[int], list[str]]:
    """Bring the index up to date; returns the samples of each shard and what they come to.

    The index is an array of rows, and after it in the same file the shards they are of, as JSON.
    """
    now = {shard.name: [shard.stat().st_size, shard.stat().st_mtime_ns] for shard in shards}
    known = _known_rows(file)
    kept = {name: (rows, digest) for name, (state, rows, digest) in known.items() if now.get(name) == state}
    new = [shard for shard in shards if shard.name not in kept]
    if new or list(known) != list(now):
        logger.info("indexing %d of the %d shards in %s", len(new), len(shards), shards[0].parent)
        with ThreadPoolExecutor(_READERS) as pool:
            kept |= zip([shard.name for shard in new], pool.map(shard_rows, new))
        record = [[name, state, len(kept[name][0]), kept[name][1]] for name, state in now.items()]
        try:
            with atomic_write(file) as f:
                np.save(f, np.concatenate([kept[name][0] for name in now]))
                f.write(json.dumps({"format": FORMAT, "shards": record}).encode())
        except OSError as error:
            raise OSError(error.errno, f"{error}; give --index-path a folder that can be written to") from error
    return [len(kept[name][0]) for name in now], [kept[name][1] for name in now]


def _known_rows(file: Path) -> dict[str, tuple[list[int], np.ndarray, str]]:
    """Return {shard name: (its size and time, its rows, their digest)} of an index; nothing where it is missing or damaged."""
    try:
        rows = np.load(file, mmap_mode="r")
        with open(file, "rb") as f:
            f.seek(rows.offset + rows.nbytes)
            record = json.load(f)
        shards = record["shards"] if record["format"] == FORMAT else []
        parts = np.split(rows, np.cumsum([samples for _, _, samples, _ in shards]))
        return {name: (state, part, digest) for (name, state, _, digest), part in zip(shards, parts)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def shard_rows(shard: Path) -> tuple[np.ndarray, str]:
    """Return where the image and the texts of every sample of a shard are, int64 (samples, 7), and what all of them come to.

    A row has offset and bytes of image, .json and .txt, and what the image comes to. Raises ValueError for a file that is
    no tar or is cut off, that has two members of one name, or no image.
    """
    rows, contents, several = [], [], 0
    with open(shard, "rb") as f:

        def read(offset: int, size: int) -> bytes:
            f.seek(offset)
            return f.read(size)

        for sample in _samples(shard):
            images = sorted(filter(_is_image, sample), key=lambda extension: IMAGE_EXTENSIONS.index(f".{extension}"))
            several += len(images) > 1
            name, *image = sample[images[0]] if images else ("", 0, 0)
            texts = [number for extension in _TEXTS for number in sample.get(extension, ("", 0, 0))[1:]]
            beginning = f"{os.path.basename(name)} {image[1]} ".encode() + read(image[0], min(image[1], _BEGINNING))
            rows.append([*image, *texts, digest(beginning) if images else 0])
            contents += [str(rows[-1][6]), read(*texts[:2]), read(*texts[2:])]
    if several:
        logger.warning("%s has %d samples with several images: of jpg, png, … the first is taken", shard, several)
    if not any(row[1] for row in rows):
        raise ValueError(f"{shard} has no images: {len(rows)} samples, none with {', '.join(IMAGE_EXTENSIONS[:12])}, …")
    return np.asarray(rows, np.int64), digest_all(contents)


Entry = tuple[str, int, int]  # a member's name, offset and bytes
Sample = dict[str, Entry]  # members by extension, in lower case


def _samples(shard: Path) -> list[Sample]:
    """Return the samples of a shard, in order. Warns of pairs that WebDataset's names make parts of another sample."""
    samples, hidden = [], []
    for key, group in _grouped(shard, _members(shard), _NAME):
        dotted = list(_grouped(shard, group.values(), _DOTTED))
        pairs = [name for name, part in dotted if any(map(_is_image, part)) and not part.keys().isdisjoint(_TEXTS)]
        if pairs and not any(map(_is_image, group)):
            samples += [part for _, part in dotted]
        else:
            samples.append(group)
            hidden += [name for name in pairs if name != key]
    if hidden:
        logger.warning(
            "%s: image and text of %s (and %d more) count as parts of the sample named by what is before their first dot; "
            "rename them if they are pairs",
            *(shard, hidden[0], len(hidden) - 1),
        )
    return samples


def _grouped(shard: Path, members: Iterable[Entry], name: re.Pattern) -> Iterator[tuple[str, Sample]]:
    """Yield names and the members that follow each other under them."""
    matched = ((match, member) for member in members if (match := name.fullmatch(member[0])))
    for key, group in groupby(matched, key=lambda item: item[0][1]):
        sample: Sample = {}
        for match, member in group:
            extension = match[2].lower()
            if extension in sample:
                raise ValueError(f"{shard} has two members {member[0]}: a sample's members have names of their own")
            sample[extension] = member
        yield key, sample


def _is_image(extension: str) -> bool:
    return f".{extension}" in IMAGE_EXTENSIONS


def _members(shard: Path) -> Iterator[Entry]:
    """Yield (name, offset, bytes) of the files in a tar."""
    end = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                name = member.name
                # Members called __…__ are WebDataset's own notes.
                if member.isreg() and not ("/" not in name and name.startswith("__") and name.endswith("__")):
                    yield name, member.offset_data, member.size
                tar.members = []  # or every header of a shard is held
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{shard} is damaged or not an uncompressed tar ({error}): get it again") from error
    with open(shard, "rb") as f:
        f.seek(end)
        if f.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # a header that is cut short passes for the end
            raise ValueError(f"{shard} is cut off ({shard.stat().st_size:,} bytes, no end mark): get it again")
