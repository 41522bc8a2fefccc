"""Image-text pairs in WebDataset shards: tar files in which members that follow each other under one name are a sample.

    pairs = TarPairs("laion_shards")                 # all *.tar of the folder, by name
    pairs.identity(7), pairs.texts(7)                # ('00000', 7), ['a bee on a flower']
    image = load_rgb(pairs.image_file(7))            # dataset/images.py

The format is WebDataset's (uncompressed tar; `000123.jpg` beside `000123.json` or `000123.txt`), its way of reading is not:
streams are shuffled in a buffer and cannot be taken up where they were left. Where every member lies is found out once
and kept in an index file of 40 bytes a sample; a sample is then one read at an offset. So the data order, the exact
resume and the moves between numbers of processes of all other data hold for shards too. What it costs: reads at random
places, which local disks do well and a network's object store does not (copy the shards to a disk first).
"""

import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dataset.images import IMAGE_EXTENSIONS
from utils.files import atomic_write, crc32_of, write_json

logger = logging.getLogger(__name__)

INDEX_NAME = "webdataset-index"
FORMAT = 1
_COLUMNS = 5  # image offset, image bytes, text offset, text bytes, whether the text is JSON
_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")
_READERS = 8


class Member(io.BytesIO):
    """The bytes of a member of a shard, which tells where it is from."""

    def __init__(self, content: bytes, place: str):
        super().__init__(content)
        self.place = place

    def __str__(self) -> str:
        return self.place


class TarPairs:
    """The samples of a folder's *.tar files: identity (file stem, number in the file from 0), image and texts.

    Opening looks at every shard's size and time and indexes the new and changed ones. The index lies in the folder, or in
    `index_path` where the folder is not writable; processes share its pages.
    Raises FileNotFoundError where the folder is missing, ValueError where it has no *.tar, or one is damaged or has no
    image, OSError where the index cannot be written.
    """

    def __init__(self, folder: str | Path, index_path: str | Path | None = None):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"the folder of shards {self.folder} does not exist: check --data-path")
        self.index_path = Path(index_path) if index_path else self.folder
        self._shards = sorted(p for p in self.folder.glob("*.tar") if not p.name.startswith("."))
        if not self._shards:
            packed = sorted(p.name for p in self.folder.glob("*.tar.*"))
            hint = f"; {packed[0]} is compressed, and samples are read at their offsets: unpack it" if packed else ""
            raise ValueError(f"no *.tar files in {self.folder}{hint}")
        self._counts = _open_index(self._shards, self.index_path)
        self._ends = np.cumsum(self._counts)
        self._map: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}

    @property
    def files(self) -> list[tuple[str, int]]:
        """(stem, samples) of every shard, in order."""
        return [(shard.stem, count) for shard, count in zip(self._shards, self._counts)]

    def identity(self, index: int) -> tuple[str, int]:
        """A sample's (file stem, number in the file): what its features and codes are kept by."""
        which = self._shard_of(index)
        return self._shards[which].stem, index - int(self._ends[which]) + self._counts[which]

    def image_file(self, index: int) -> Member:
        """The bytes of a sample's image. Raises ValueError where it has none or the shard is shorter than it was, OSError."""
        offset, size = self._rows[index, :2].tolist()
        if not size:
            raise ValueError(f"{self.where(index)} has no image")
        return Member(self._read(index, offset, size), self.where(index))

    def texts(self, index: int) -> list[str]:
        """A sample's captions: `text` or `caption` of its .json (a string or a list of them), else its .txt.

        Raises ValueError where there is neither, or it is damaged.
        """
        offset, size, is_json = self._rows[index, 2:].tolist()
        content = self._read(index, offset, size)
        try:
            value = json.loads(content) if is_json else content.decode()
        except ValueError as error:
            raise ValueError(f"the text of {self.where(index)} is damaged: {error}") from error
        if is_json:
            value = value.get("text", value.get("caption")) if isinstance(value, dict) else None
        texts = [value] if isinstance(value, str) else value
        if not size or not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{self.where(index)} has no caption: neither `text` nor `caption` in a .json, nor a .txt")
        return texts

    def where(self, index: int) -> str:
        """A sample's place, for messages."""
        return f"sample {self.identity(index)[1]} of {self._shards[self._shard_of(index)]}"

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._ends, range(len(self))[index], side="right"))

    @property
    def _rows(self) -> np.ndarray:
        if self._map is None:
            self._map = np.load(self.index_path / f"{INDEX_NAME}.npy", mmap_mode="r")
        return self._map

    def _read(self, index: int, offset: int, size: int) -> bytes:
        path = self._shards[self._shard_of(index)]
        with open(path, "rb") as f:
            f.seek(offset)
            content = f.read(size)
        if len(content) != size:
            raise ValueError(f"{path} is shorter than when it was indexed: is it being written?")
        return content


def _open_index(shards: Sequence[Path], index_path: Path) -> list[int]:
    """Brings the index up to date; returns the samples of each shard."""
    rows_file, record_file = (index_path / f"{INDEX_NAME}{ending}" for ending in (".npy", ".json"))
    states = [(shard.name, os.stat(shard)) for shard in shards]
    now = {name: [state.st_size, state.st_mtime_ns] for name, state in states}
    known = _known_rows(rows_file, record_file)
    kept = {name: rows for name, (state, rows) in known.items() if now.get(name) == state}
    new = [shard for shard in shards if shard.name not in kept]
    if not new and list(known) == list(now):
        return [len(kept[name]) for name in now]
    logger.info("indexing %d of the %d shards in %s", len(new), len(shards), shards[0].parent)
    with ThreadPoolExecutor(_READERS) as pool:
        kept |= zip([shard.name for shard in new], pool.map(shard_rows, new))
    rows = np.concatenate([kept[name] for name in now])
    try:
        with atomic_write(rows_file) as f:
            np.save(f, rows)
        counts = [{"name": name, "state": state, "samples": len(kept[name])} for name, state in now.items()]
        # Written last: rows without their record, or with another's, count for nothing.
        write_json(record_file, {"format": FORMAT, "crc32": crc32_of(rows_file), "shards": counts})
    except OSError as error:
        raise OSError(error.errno, f"{error}; give --index-path a folder that can be written to") from error
    return [len(kept[name]) for name in now]


def _known_rows(rows_file: Path, record_file: Path) -> dict[str, tuple[list[int], np.ndarray]]:
    """{shard name: (its size and time, its rows)} of an index; nothing where it is missing, damaged or half written."""
    try:
        record = json.loads(record_file.read_bytes())
        if record["format"] != FORMAT or record["crc32"] != crc32_of(rows_file):
            return {}
        rows = np.load(rows_file, mmap_mode="r")
        ends = np.cumsum([shard["samples"] for shard in record["shards"]]).tolist()
        parts = np.split(rows, ends[:-1]) if ends and ends[-1] == len(rows) else []
        return {shard["name"]: (shard["state"], part) for shard, part in zip(record["shards"], parts)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def shard_rows(shard: Path) -> np.ndarray:
    """Where the image and the text of every sample of a shard are: int64 (samples, 5), see _COLUMNS.

    Samples are WebDataset's: members that follow each other and have the same path up to the first dot of the name.
    Raises ValueError for a file that is no tar or is cut off, that has two members of one name, or no image at all.
    """
    rows, key, seen = [], None, set()
    for name, offset, size in _members(shard):
        match = _NAME.fullmatch(name)
        if not match:
            continue
        if match[1] != key:
            key, seen = match[1], set()
            rows.append([0] * _COLUMNS)
        extension = match[2].lower()
        if extension in seen:
            raise ValueError(f"{shard} has two members {name}: a sample's members have names of their own")
        seen.add(extension)
        row = rows[-1]
        if f".{extension}" in IMAGE_EXTENSIONS:
            row[:2] = offset, size
        elif extension == "json" or (extension == "txt" and not row[4]):
            row[2:] = offset, size, extension == "json"
    if not any(row[1] for row in rows):
        raise ValueError(f"{shard} has no images: {len(rows)} samples, none with {', '.join(IMAGE_EXTENSIONS)}")
    return np.asarray(rows, np.int64)


def _members(shard: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, bytes) of the files in a tar."""
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
