"""Text features on disk: of each caption as many rows as it has tokens, packed in shards and read through memory maps.

    writer = FeatureWriter("t5_features", dim=2048, max_length=120, dtype="bfloat16", settings={"model": "flan-t5-xl"})
    for k in writer.missing_shards("part-00000", lines=50_000):
        writer.write_shard("part-00000", k, features, lines=50_000)      # a tensor (length, D) or None for every line
    store = open_features("t5_features", dim=2048)
    features = store.get("part-00000", 17)                               # (length, D), None where there is none

A caption is known by its jsonl file's stem and its line there, from 0. Shard k of a stem holds its lines
[k * shard_size, (k + 1) * shard_size): `{stem}/shard-{k:06d}.npy` (sum of lengths, D), `.ends.npy` uint32 (lines,), where
each line's rows end (a line without features has no rows), and `.json`, which is written last: a shard without it does
not exist. `index.json` holds the settings, `lines-*.npz` what captions they are of (dataset/lines.py). `open_features` reads the published layout too, `{stem}/{line}.npy` float32
(1, length, D).
"""

import json
import os
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import IO

import numpy as np
import torch
from torch import Tensor

from dataset.lines import recorded_maker
from dataset.shards import INDEX_FILE, OPEN_MAPS, read_record
from utils.files import atomic_write, crc32_of, write_json

FORMAT = 1
SHARD_SIZE = 2048  # lines; with 120 rows of 2048 bfloat16 numbers each, 1 GB
EXTRACTION = "language/extract_t5_feature.py"

# Numpy has no bfloat16: its bits are kept as whole numbers.
_STORED = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}
_TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class _Index:
    """What all shards of a folder have in common."""

    dim: int
    max_length: int
    dtype: str
    shard_size: int
    settings: dict

    def __post_init__(self) -> None:
        for name in ("dim", "max_length", "shard_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.dtype not in _STORED:
            raise ValueError(f"features are stored as {', '.join(_STORED)}, not as {self.dtype!r}")
        if self.shard_size * self.max_length >= 2**32:
            raise ValueError(f"{self.shard_size} lines of up to {self.max_length} rows are too many for one shard")

    def to_json(self) -> dict:
        values = {"dim": self.dim, "max_length": self.max_length, "dtype": self.dtype, "shard_size": self.shard_size}
        return json.loads(json.dumps({"format": FORMAT, **values, "settings": self.settings}))

    @classmethod
    def read(cls, folder: Path) -> "_Index":
        file = folder / INDEX_FILE
        values = read_record(file, _damaged)
        if values.pop("format", None) != FORMAT:
            raise ValueError(f"{file} is no index of text features, or of a format this version does not read")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{file} lacks or has unknown settings ({error}): extract to another folder") from error


def num_shards(lines: int, shard_size: int = SHARD_SIZE) -> int:
    """The number of shards of a stem with this many lines."""
    return -(-lines // shard_size)


def shard_lines(shard: int, lines: int, shard_size: int = SHARD_SIZE) -> range:
    """The lines of a shard of a stem that has `lines` of them."""
    return range(shard * shard_size, min((shard + 1) * shard_size, lines))


class FeatureWriter:
    """Writes the features of one folder; any number of processes may, each its own shards.

    dim: width of a row. max_length: rows a caption may have. dtype: bfloat16, float16 or float32, as which rows are
    stored. settings: what else decides the features (model, cleaning, which caption), plain JSON values.
    The first opening writes `index.json`. Raises ValueError for values that no features can have, and where the folder
    holds features of other settings or other files than features.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        dim: int,
        max_length: int,
        dtype: str = "bfloat16",
        settings: dict | None = None,
        shard_size: int = SHARD_SIZE,
    ):
        self.folder = Path(folder)
        self._index = _Index(dim, max_length, dtype, shard_size, settings or {})
        if (self.folder / INDEX_FILE).exists():
            _refuse_other_settings(self.folder, self._index)
        else:
            write_json(self.folder / INDEX_FILE, self._index.to_json())

    def missing_shards(self, stem: str, lines: int) -> list[int]:
        """The shards of a stem that are not there whole.

        Raises ValueError where the stem's features are of a file with another number of lines.
        """
        return [k for k in self._shards(lines) if not self._finished(stem, k, lines)]

    def _shards(self, lines: int) -> range:
        return range(num_shards(lines, self._index.shard_size))

    def _finished(self, stem: str, shard: int, lines: int) -> bool:
        try:
            there = _checked_sidecar(self.folder / stem, shard)["lines"]
        except (FileNotFoundError, ValueError):
            return False
        if there != lines:
            raise ValueError(
                f"{self.folder / stem} has features of a file {stem} of {there} lines; now it has {lines}. "
                "Extract to another folder, or remove this one"
            )
        return True

    def skipped(self, stem: str, lines: int) -> int:
        """How many lines of a finished stem have no features."""
        return lines - sum(_checked_sidecar(self.folder / stem, k)["captions"] for k in self._shards(lines))

    def write_shard(self, stem: str, shard: int, features: Sequence[Tensor | None], lines: int) -> None:
        """Writes one shard of a stem with `lines` lines.

        features: for every line of the shard, in order, a tensor (length, D) of any float dtype, or None where the line
        has no caption. Raises ValueError where their number, width or length is another, or a value is not finite in
        the dtype they are stored in.
        """
        index, folder = self._index, self.folder / stem
        expected = shard_lines(shard, lines, index.shard_size)
        if shard not in self._shards(lines) or len(features) != len(expected):
            raise ValueError(
                f"shard {shard} of {folder} is of the lines {expected.start} to {expected.stop - 1}: "
                f"got {len(features)} features"
            )
        for line, rows in zip(expected, features, strict=True):
            shape = None if rows is None else tuple(rows.shape)
            if shape and (len(shape) != 2 or shape[1] != index.dim or not 0 < shape[0] <= index.max_length):
                raise ValueError(
                    f"line {line} of {stem} has features {shape}, expected (1 to {index.max_length}, {index.dim})"
                )
        ends = np.cumsum([0 if rows is None else len(rows) for rows in features]).astype(np.uint32)
        # The sidecar of a damaged shard must not vouch for files that are being replaced.
        _sidecar(folder, shard).unlink(missing_ok=True)
        for leftover in folder.glob(f".{_name(shard)}.*.tmp"):
            leftover.unlink(missing_ok=True)
        written = {}
        with atomic_write(_rows_file(folder, shard)) as f:
            out = _Checksummed(f)
            descr = np.lib.format.dtype_to_descr(np.dtype(_STORED[index.dtype]))
            header = {"descr": descr, "fortran_order": False, "shape": (int(ends[-1]), index.dim)}
            np.lib.format.write_array_header_1_0(out, header)
            for line, rows in zip(expected, features, strict=True):
                if rows is not None:
                    out.write(self._bytes(stem, line, rows))
            written[_rows_file(folder, shard).name] = out.recorded()
        with atomic_write(_ends_file(folder, shard)) as f:
            out = _Checksummed(f)
            np.lib.format.write_array(out, ends)
            written[_ends_file(folder, shard).name] = out.recorded()
        captions = sum(rows is not None for rows in features)
        write_json(_sidecar(folder, shard), {"lines": lines, "captions": captions, "files": written})

    def write_stem(self, stem: str, features: Sequence[Tensor | None]) -> None:
        """Writes all shards of a stem: a tensor (length, D) or None for each of its lines."""
        for shard in self._shards(len(features)):
            lines = shard_lines(shard, len(features), self._index.shard_size)
            self.write_shard(stem, shard, features[lines.start : lines.stop], len(features))

    def _bytes(self, stem: str, line: int, rows: Tensor) -> bytes:
        stored = rows.detach().to("cpu", _TORCH[self._index.dtype]).contiguous()
        if not stored.isfinite().all():
            raise ValueError(
                f"the features of line {line} of {stem} are not finite as {self._index.dtype}: are the weights whole? "
                "T5 in float16 may overflow; bfloat16 does not"
            )
        return stored.view(torch.uint8).numpy().tobytes()


class FeatureStore(ABC):
    """Features of captions by (stem, line). `dim` is the width of a row, `encoder` what the encoder comes to, if recorded."""

    folder: Path
    dim: int
    encoder: str | None = None

    @abstractmethod
    def get(self, stem: str, line: int) -> Tensor | None:
        """The features (length, D) of line `line` (from 0) of the jsonl file `stem`; None where there are none.

        The tensor is the caller's own. Raises ValueError that names the file where it is damaged.
        """

    @abstractmethod
    def present(self, stem: str) -> np.ndarray:
        """Which lines of a stem have features, bool (lines,); none where the stem is not there.

        In the published layout, which does not say how many lines there are, up to the last that has features.
        """

    def lines(self, stem: str) -> int | None:
        """Return how many lines a stem's file had when its features were made; None where that is not known."""
        return None

    @abstractmethod
    def __len__(self) -> int:
        """How many captions have features."""

    @abstractmethod
    def verify(self) -> None:
        """Reads every file. Raises ValueError that names the damaged ones."""

    def describe(self) -> str:
        """One line for the log."""
        return f"text features: {self.folder}, {len(self)} captions of width {self.dim}"


class PackedFeatures(FeatureStore):
    """Reads a folder of packed features. Rows stay on disk, as memory maps opened when first needed.

    In memory there are 4 bytes a line. Raises FileNotFoundError where there is no `index.json`, ValueError where a stem
    lacks shards, or a file has not the size it was written with.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._index = _Index.read(self.folder)
        self.dim = self._index.dim
        self._ends: dict[str, np.ndarray] = {}  # per stem (lines,), counted from the beginning of the line's shard
        self._maps: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._captions = 0
        for stem in sorted(entry.name for entry in os.scandir(self.folder) if entry.is_dir()):
            self._open_stem(stem)
        self.encoder = recorded_maker(self.folder, self._ends)
        if not self._captions:
            raise ValueError(f"{self.folder} has no features yet: run {EXTRACTION} to its end")

    def _open_stem(self, stem: str) -> None:
        folder, size = self.folder / stem, self._index.shard_size
        numbers = sorted(int(file.stem[-6:]) for file in folder.glob("shard-*.json"))
        if not numbers and not any(folder.glob("*shard-*")):
            return  # not of ours
        sidecars = [_checked_sidecar(folder, number) for number in numbers]
        lines = {sidecar["lines"] for sidecar in sidecars}
        total = num_shards(max(lines, default=1), size)
        if len(lines) > 1 or numbers != list(range(total)):
            raise ValueError(
                f"{folder} is incomplete: {len(numbers)} of {total if lines else 'an unknown number of'} shards are there. "
                f"Finish it with the command that began it ({EXTRACTION}), which keeps what is there"
            )
        (lines,) = lines
        ends = np.concatenate([_load_ends(folder, number) for number in numbers])
        starts = np.concatenate([[0], ends[:-1]])
        starts[::size] = 0
        if len(ends) != lines or (ends < starts).any():
            raise ValueError(
                f"the .ends.npy files in {folder} are damaged: remove the folder and extract its features anew"
            )
        self._ends[stem] = ends
        self._captions += sum(sidecar["captions"] for sidecar in sidecars)

    def __len__(self) -> int:
        return self._captions

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": OrderedDict()}

    @property
    def settings(self) -> dict:
        """What the features are, as their writer was told."""
        return self._index.settings

    @property
    def max_length(self) -> int:
        """Rows a caption has at most."""
        return self._index.max_length

    def get(self, stem: str, line: int) -> Tensor | None:
        ends = self._ends.get(stem)
        if ends is None or not 0 <= line < len(ends):
            return None
        shard, place = divmod(line, self._index.shard_size)
        start, end = int(ends[line - 1]) if place else 0, int(ends[line])
        if start == end:
            return None
        # A copy: what is made of it may outlive the map, and pages are read here, not in the middle of a step.
        rows = torch.from_numpy(np.array(self._map(stem, shard)[start:end]))
        return rows.view(_TORCH[self._index.dtype])

    def lines(self, stem: str) -> int | None:
        return len(self._ends[stem]) if stem in self._ends else None

    def present(self, stem: str) -> np.ndarray:
        ends = self._ends.get(stem, np.zeros(0, np.uint32))
        starts = np.concatenate([np.zeros(1, ends.dtype), ends])[:-1]
        starts[:: self._index.shard_size] = 0
        return ends > starts

    def verify(self) -> None:
        damaged = []
        for stem, ends in self._ends.items():
            for shard in range(num_shards(len(ends), self._index.shard_size)):
                for name, recorded in _checked_sidecar(self.folder / stem, shard)["files"].items():
                    if crc32_of(self.folder / stem / name) != recorded["crc32"]:
                        damaged.append(f"{stem}/{name}")
        if damaged:
            listed = ", ".join(damaged)
            raise ValueError(
                f"damaged in {self.folder}: {listed} (checksum differs). Remove the .json of the same name beside each and "
                f"run {EXTRACTION} again, which rewrites them"
            )

    def _map(self, stem: str, shard: int) -> np.ndarray:
        """The rows of a shard; the least recently used maps are closed."""
        key = (stem, shard)
        if key in self._maps:
            self._maps.move_to_end(key)
            return self._maps[key]
        file, size = _rows_file(self.folder / stem, shard), self._index.shard_size
        rows = int(self._ends[stem][min((shard + 1) * size, len(self._ends[stem])) - 1])
        try:
            array = np.load(file, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(file, f"not an array: {error}") from error
        expected = (rows, self.dim), np.dtype(_STORED[self._index.dtype])
        if (array.shape, array.dtype) != expected:
            raise _damaged(file, f"{array.dtype} {array.shape}, expected {expected[1]} {expected[0]}")
        # A plain array: indexing the subclass costs more than the bytes that are read.
        self._maps[key] = np.asarray(array)
        if len(self._maps) > OPEN_MAPS:
            self._maps.popitem(last=False)
        return self._maps[key]


class PublishedFeatures(FeatureStore):
    """Reads the published layout, one file a caption. Files are looked for when asked for: none are listed before.

    Raises FileNotFoundError where the folder is missing, ValueError where it holds no features.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._captions: int | None = None
        first = next((file for stem in self._stems() for file in _numbered_files(stem)), None)
        if first is None:
            raise ValueError(
                f"{self.folder} holds no text features: neither {INDEX_FILE} of packed ones nor STEM/LINE.npy of the "
                f"published layout; {EXTRACTION} makes them"
            )
        self.dim = self._read(first).shape[2]
        self.encoder = recorded_maker(self.folder, self._stems())

    def _stems(self) -> list[str]:
        return sorted(entry.path for entry in os.scandir(self.folder) if entry.is_dir())

    def __len__(self) -> int:
        if self._captions is None:  # not before it is asked for: there may be fifty million files
            self._captions = sum(1 for stem in self._stems() for _ in _numbered_files(stem))
        return self._captions

    def get(self, stem: str, line: int) -> Tensor | None:
        try:
            array = self._read(self.folder / stem / f"{line}.npy")
        except FileNotFoundError:
            return None
        return torch.from_numpy(array[0])

    def present(self, stem: str) -> np.ndarray:
        place = self.folder / stem
        numbers = [int(os.path.basename(file)[:-4]) for file in _numbered_files(place)] if place.is_dir() else []
        there = np.zeros(max(numbers, default=-1) + 1, bool)
        there[numbers] = True
        return there

    def verify(self) -> None:
        damaged = []
        for stem in self._stems():
            for file in _numbered_files(stem):
                try:
                    self._read(file)
                except ValueError as error:
                    damaged.append(str(error))
        if damaged:
            raise ValueError("\n  ".join(["damaged text features:", *damaged]))

    def _read(self, file: str | Path) -> np.ndarray:
        """One file's features (1, length, D), float32."""
        try:
            array = np.load(file)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{file} is damaged (not an array: {error}): remove it and extract it anew") from error
        width = getattr(self, "dim", array.shape[-1] if array.ndim else None)
        if array.ndim != 3 or len(array) != 1 or array.shape[2] != width or array.dtype.kind != "f" or not array.size:
            wanted = "D" if width is None else width
            raise ValueError(
                f"{file} holds {array.dtype} {array.shape}, expected floats (1, length, {wanted}): remove it and extract it anew"
            )
        return array.astype(np.float32, copy=False)


def open_features(path: str | Path, *, dim: int | None = None) -> FeatureStore:
    """Opens a folder of text features, packed or in the published layout.

    dim: the width they must have. Raises FileNotFoundError where the folder is missing, ValueError where it holds no
    features, lacks shards, or they have another width.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder of text features {folder} does not exist; {EXTRACTION} makes one")
    store = PackedFeatures(folder) if (folder / INDEX_FILE).exists() else PublishedFeatures(folder)
    if dim is not None and store.dim != dim:
        raise ValueError(
            f"{folder} holds text features of width {store.dim}, but {dim} are needed: features of another T5 than the "
            "model is trained for"
        )
    return store


def write_published_features(folder: str | Path, stem: str, line: int, features: Tensor) -> None:
    """Writes one caption's features (length, D) in the published layout: `{stem}/{line}.npy`, float32 (1, length, D)."""
    with atomic_write(Path(folder) / stem / f"{line}.npy", durable=False) as f:
        np.save(f, features.detach().to("cpu", torch.float32).numpy()[None])


def published_lines(folder: str | Path, stem: str, lines: int) -> np.ndarray:
    """Which of a stem's `lines` lines have a file in the published layout: bool (lines,)."""
    there = np.zeros(lines, bool)
    place = Path(folder) / stem
    if place.is_dir():
        for file in _numbered_files(place):
            number = int(os.path.basename(file)[: -len(".npy")])
            if number < lines:
                there[number] = True
    return there


class _Checksummed:
    """A file that counts and sums up what is written to it."""

    def __init__(self, file: IO[bytes]):
        self.file, self.bytes, self.crc32 = file, 0, 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.bytes += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)

    def recorded(self) -> dict:
        return {"bytes": self.bytes, "crc32": self.crc32}


def _numbered_files(folder: str | Path) -> Iterator[str]:
    """Paths of the files named after a line, in no order."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".npy") and entry.name[:-4].isascii() and entry.name[:-4].isdigit():
                yield entry.path


def _name(shard: int) -> str:
    return f"shard-{shard:06d}"


def _rows_file(folder: Path, shard: int) -> Path:
    return folder / f"{_name(shard)}.npy"


def _ends_file(folder: Path, shard: int) -> Path:
    return folder / f"{_name(shard)}.ends.npy"


def _sidecar(folder: Path, shard: int) -> Path:
    return folder / f"{_name(shard)}.json"


def _load_ends(folder: Path, shard: int) -> np.ndarray:
    file = _ends_file(folder, shard)
    try:
        ends = np.load(file)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(file, f"not an array: {error}") from error
    if ends.ndim != 1 or ends.dtype != np.uint32:
        raise _damaged(file, f"{ends.dtype} {ends.shape}, expected uint32 (lines,)")
    return ends


def _checked_sidecar(folder: Path, shard: int) -> dict:
    """The sidecar of a shard whose files have the sizes it records."""
    sidecar = read_record(_sidecar(folder, shard), _damaged)
    if not {"lines", "captions", "files"} <= sidecar.keys():
        raise _damaged(_sidecar(folder, shard), "no lines, captions and files in it")
    for name, recorded in sidecar["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != recorded["bytes"]:
            raise _damaged(file, "missing" if size is None else f"{size} bytes, written with {recorded['bytes']}")
    return sidecar


def _damaged(file: Path, what: str) -> ValueError:
    remedy = f"run {EXTRACTION} again, which rewrites the shard"
    if file.name == INDEX_FILE:
        remedy = "extract the features to another folder"
    return ValueError(f"{file} is damaged ({what}): {remedy}")


def _refuse_other_settings(folder: Path, index: _Index) -> None:
    there, now = _Index.read(folder).to_json(), index.to_json()
    there, now = {**there, **there.pop("settings")}, {**now, **now.pop("settings")}
    differing = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    if differing:
        listed = "\n  ".join(f"{k}: {short(there.get(k))} there, {short(now.get(k))} now" for k in differing)
        raise ValueError(
            f"{folder} holds features of other settings; use another folder, or the same ones:\n  {listed}"
        )
