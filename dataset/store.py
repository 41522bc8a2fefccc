"""Packed store: arrays of numbered items on disk, in shards that are whole or not there at all.

    shards = Shards("codes")
    for k in shards.missing(count): shards.write(k, {"": [codes], "labels": [labels]}, samples=4096)
    depth = Fixed(Shards("depth"), np.float32, (16, 16), items=50_000, shard_size=4096, finish="write the rest")
    depth.get(17)                                                    # (16, 16); None if item 17 is missing

Shard k holds the items [k * shard_size, (k + 1) * shard_size). Each of its arrays is a file, `shard-{k:06d}.NAME.npy` (the
main one has no name). `shard-{k:06d}.json` has their sizes and checksums and is written last: a shard without it does not
exist, whatever a killed run left. `index.json` has the settings. Image codes (dataset/code_files.py), caption features
(dataset/text_features.py) and whatever is stored beside them (dataset/arrays.py) are such folders. `Loose` is the
published format of all of them: one file an item.
"""

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from utils.files import atomic_write, crc32_of, write_json

INDEX_FILE = "index.json"
ENDS = "ends"  # name of the array that tells where the items of a ragged one end
REMEDY = "run again what wrote this folder, which rewrites the shard"
# Each mapped file holds a file descriptor, of which a process commonly has 1024. Two folders of ImageNet have 626 shards.
OPEN_MAPS = 700
_NUMBERED = re.compile(r"(0|[1-9][0-9]*)\.npy")
_openings = itertools.count()


class Shards:
    """The shards of one folder. remedy: what a user does about a damaged one, for errors."""

    def __init__(self, folder: str | Path, remedy: str = REMEDY):
        self.folder, self.remedy = Path(folder), remedy
        self._opening = next(_openings)

    def file(self, shard: int, name: str = "") -> Path:
        """Return the path of a shard's array."""
        return self.folder / f"shard-{shard:06d}{'.' * bool(name)}{name}.npy"

    def record_file(self, shard: int) -> Path:
        """Return the path of a shard's record."""
        return self.folder / f"shard-{shard:06d}.json"

    def record(self, shard: int) -> dict:
        """Return a shard's record. Raises ValueError if a file has not the recorded size, FileNotFoundError without one."""
        record = read_record(self.record_file(shard), self.remedy)
        if "files" not in record:
            raise damaged(self.record_file(shard), "no files in it", self.remedy)
        for name, written in record["files"].items():
            file = self.folder / name
            size = file.stat().st_size if file.is_file() else None
            if size != written["bytes"]:
                what = "missing" if size is None else f"{size} bytes, written with {written['bytes']}"
                raise damaged(file, what, self.remedy)
        return record

    def missing(self, count: int) -> list[int]:
        """Return which of `count` shards are not there whole."""

        def finished(shard: int) -> bool:
            try:
                return bool(self.record(shard))
            except (FileNotFoundError, ValueError):
                return False

        return [shard for shard in range(count) if not finished(shard)]

    def write(self, shard: int, arrays: Mapping[str, Sequence[np.ndarray]], **record: Any) -> None:
        """Write one shard.

        Args:
            shard: its number.
            arrays: by name the parts of each array, which are joined along their first axis.
            record: what else the shard's record says.
        """
        # The record of a damaged shard must not vouch for files that are being replaced.
        self.record_file(shard).unlink(missing_ok=True)
        for leftover in self.folder.glob(f".shard-{shard:06d}.*.tmp"):
            leftover.unlink(missing_ok=True)
        written = {}
        for name, parts in arrays.items():
            file = self.file(shard, name)
            with atomic_write(file) as f:
                np.save(f, np.concatenate(parts))
            written[file.name] = {"bytes": file.stat().st_size, "crc32": crc32_of(file)}
        write_json(self.record_file(shard), {**record, "files": written})

    def load(self, shard: int, name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Return an array of a shard, mapped into memory. Raises ValueError if it has not this dtype and shape."""
        file = self.file(shard, name)
        try:
            array = _mapped(os.fspath(file), self._opening)
        except (OSError, ValueError, EOFError) as error:
            raise damaged(file, f"not an array: {error}", self.remedy) from error
        if array.shape != shape or array.dtype != dtype:
            what = f"{array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}"
            raise damaged(file, what, self.remedy)
        return array

    def verify(self, count: int) -> list[str]:
        """Return the files of `count` shards whose checksum is not the recorded one."""
        return [
            name
            for shard in range(count)
            for name, written in self.record(shard)["files"].items()
            if crc32_of(self.folder / name) != written["crc32"]
        ]


@lru_cache(OPEN_MAPS)
def _mapped(file: str, opening: int) -> np.ndarray:
    """Return a file's array mapped into memory; `opening` tells readers apart, between which it may be written anew."""
    # A plain array: indexing the subclass costs more than the bytes that are read.
    return np.asarray(np.load(file, mmap_mode="r"))


class Fixed:
    """Reader of the main array of shards, whose items have one shape and of which some may be missing.

    Args:
        dtype, shape: of an item.
        items: how many there are, missing ones too.
        shard_size: items a shard.
        finish: what completes the folder, for errors.

    Raises ValueError if a shard is missing or damaged.
    """

    def __init__(self, shards: Shards, dtype: Any, shape: tuple[int, ...], items: int, shard_size: int, finish: str):
        self.shards, self.dtype, self.shape, self.items = shards, np.dtype(dtype), shape, items
        self.count = -(-items // shard_size)
        missing = [shard for shard in range(self.count) if not shards.record_file(shard).exists()]
        if missing:
            there = f"{self.count - len(missing)} of {self.count} shards are there (missing: {short(missing)})"
            raise ValueError(f"{shards.folder} is incomplete: {there}: {finish}")
        records = [shards.record(shard) for shard in range(self.count)]
        self.skipped = np.asarray([number for record in records for number in record["skipped"]], np.int64)
        self.ends = np.cumsum([record["samples"] for record in records])

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def numbers(self) -> np.ndarray:
        """Return the number of every item that is there, (n,) ascending."""
        return np.flatnonzero(self.present())

    def present(self) -> np.ndarray:
        """Return which items are there, bool (items,)."""
        there = np.ones(self.items, bool)
        there[self.skipped] = False
        return there

    def array(self, shard: int) -> np.ndarray:
        """Return the items of a shard, (n, *shape)."""
        samples = int(self.ends[shard] - (self.ends[shard - 1] if shard else 0))
        return self.shards.load(shard, "", self.dtype, (samples, *self.shape))

    def get(self, number: int) -> np.ndarray | None:
        """Return a copy of an item by its number; None where it is missing."""
        before = int(np.searchsorted(self.skipped, number))
        absent = before < len(self.skipped) and self.skipped[before] == number
        if absent or not 0 <= number < self.items:
            return None
        return self.rows(np.asarray([number - before]))[0]

    def rows(self, positions: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """Return the items at these positions among those that are there, (n, *shape); with `views` one row of each."""
        out = np.empty((len(positions), *self.shape[views is not None :]), self.dtype)
        shards = np.searchsorted(self.ends, positions, side="right")
        for shard in np.unique(shards).tolist():  # one fancy index per shard touched
            chosen = np.flatnonzero(shards == shard)
            rows = positions[chosen] - (self.ends[shard - 1] if shard else 0)
            out[chosen] = self.array(shard)[rows if views is None else (rows, views[chosen])]
        return out


class Ragged:
    """Reader of the main array of shards whose items have as many rows as each needs; of one that is missing, none.

    In memory there are 4 bytes an item: where its rows end in its shard. Args as of Fixed, of rows in place of items.

    Raises ValueError where a shard is missing or damaged.
    """

    def __init__(self, shards: Shards, dtype: Any, shape: tuple[int, ...], shard_size: int, finish: str):
        self.shards, self.dtype, self.shape, self.shard_size = shards, np.dtype(dtype), shape, shard_size
        there = sorted(int(file.stem[-6:]) for file in shards.folder.glob("shard-*.json"))
        items = {shards.record(shard)["lines"] for shard in there}
        self.count = -(-max(items, default=1) // shard_size)
        if len(items) != 1 or there != list(range(self.count)):
            of_all = self.count if items else "an unknown number of"
            raise ValueError(f"{shards.folder} is incomplete: {len(there)} of {of_all} shards are there: {finish}")
        (self.items,) = items
        self._ends = np.concatenate([self._load_ends(shard) for shard in there])

    def _load_ends(self, shard: int) -> np.ndarray:
        items = shard_items(shard, self.items, self.shard_size)
        ends = self.shards.load(shard, ENDS, np.uint32, (len(items),))
        if (np.diff(ends.astype(np.int64), prepend=0) < 0).any():
            raise damaged(self.shards.file(shard, ENDS), "its numbers fall", self.shards.remedy)
        return ends

    def present(self) -> np.ndarray:
        """Return which items have rows, bool (items,)."""
        starts = np.concatenate([np.zeros(1, np.uint32), self._ends])[:-1]
        starts[:: self.shard_size] = 0
        return self._ends > starts

    def get(self, number: int) -> np.ndarray | None:
        """Return a copy of an item's rows (length, *shape) by its number; None where it is missing."""
        if not 0 <= number < self.items:
            return None
        shard, place = divmod(number, self.shard_size)
        start, end = int(self._ends[number - 1]) if place else 0, int(self._ends[number])
        if start == end:
            return None
        rows = int(self._ends[min((shard + 1) * self.shard_size, self.items) - 1])
        # A copy: what is made of it may outlive the map, and pages are read here, not in the middle of a step.
        return np.array(self.shards.load(shard, "", self.dtype, (rows, *self.shape))[start:end])


class Loose:
    """Items of the published format: `{number}.npy` each, with a first axis of 1.

    Args:
        folder: where the files lie.
        kind: "integers" or "floats".
        shape: of an item; None for a length that each has of its own, a name for one that the first file decides.
        remedy: what a user does about a damaged one, for errors.
    """

    items = None  # the files do not say how many there should be

    def __init__(
        self, folder: str | Path, kind: str, shape: tuple[int | str | None, ...], remedy: str = "extract it again"
    ):
        self.folder, self.kind, self.shape, self.remedy = Path(folder), kind, shape, remedy

    def files(self) -> Iterator[tuple[int, str]]:
        """Yield the number and the path of every item, in no order."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if found := _NUMBERED.fullmatch(entry.name):
                    yield int(found[1]), entry.path

    @property
    def numbers(self) -> np.ndarray:
        """Return the number of every item, (n,) ascending; none where the folder is missing."""
        numbers = (number for number, _ in self.files()) if self.folder.is_dir() else ()
        return np.sort(np.fromiter(numbers, np.int64))

    def present(self) -> np.ndarray:
        """Return which items are there up to the last one, bool (n,)."""
        there = np.zeros(max(self.numbers, default=-1) + 1, bool)
        there[self.numbers] = True
        return there

    def get(self, number: int) -> np.ndarray | None:
        """Return an item; None where it is missing. Raises ValueError where its file is damaged."""
        file = self.folder / f"{number}.npy"
        try:
            array = np.load(file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{file} is damaged (not an array: {error}): {self.remedy}") from error
        expected = tuple(size if isinstance(size, int) else None for size in self.shape)
        fits = array.ndim == 1 + len(expected) and array.shape[0] == 1 and array.size
        fits = fits and all(size in (None, there) for size, there in zip(expected, array.shape[1:], strict=True))
        if not fits or array.dtype.kind not in ("iu" if self.kind == "integers" else "f"):
            shape = ", ".join("length" if size is None else str(size) for size in (1, *self.shape))
            raise ValueError(f"{file} holds {array.dtype} {array.shape}, expected {self.kind} ({shape}): {self.remedy}")
        return array[0]

    def write(self, number: int, item: np.ndarray, durable: bool = False) -> None:
        """Write an item; durable: wait for the disk, which thousands of small files that can be made again need not."""
        with atomic_write(self.folder / f"{number}.npy", durable) as f:
            np.save(f, item[None])


class Stems:
    """Stores of image-text pairs by file: an item is known by its file's stem and its line there, from 0."""

    def __init__(self, folder: str | Path, stems: Mapping[str, Any]):
        self.folder, self.stems = Path(folder), stems

    def get(self, stem: str, line: int) -> Any:
        """Return a pair's item; None where it has none."""
        return self.stems[stem].get(line) if stem in self.stems else None

    def lines(self, stem: str) -> int | None:
        """Return how many lines a stem's file had when this was made of it; None where that is not known."""
        return self.stems[stem].items if stem in self.stems else None


def shard_items(shard: int, items: int, shard_size: int) -> range:
    """Return the numbers of a shard's items, of so many in all."""
    return range(shard * shard_size, min((shard + 1) * shard_size, items))


def damaged(file: Path, what: str, remedy: str) -> ValueError:
    """Return the error for a file that is not as it was written."""
    return ValueError(f"{file} is damaged ({what}): {remedy}")


def refuse_other(folder: Path, what: str, there: Mapping[str, Any], now: Mapping[str, Any], hint: str = "") -> None:
    """Raise ValueError where a folder's settings are not those of now. what: it holds."""
    wrong = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    if wrong:
        listed = "; ".join(f"{key}: {short(there.get(key))} there, {short(now.get(key))} now" for key in wrong)
        raise ValueError(
            f"{folder} holds {what} of other settings; use another folder, or the same ones: {listed}{hint}"
        )


def read_record(file: Path, remedy: str = "write to another folder") -> dict:
    """Return the JSON object in a file. Raises FileNotFoundError, or ValueError where it holds none."""
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{file} is missing: {file.parent} is no folder of packed files, or not whole"
        ) from None
    except ValueError as error:
        raise damaged(file, f"not JSON: {error}", remedy) from error
    if not isinstance(values, dict):
        raise damaged(file, "not a JSON object", remedy)
    return values
