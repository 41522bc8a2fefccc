"""Packed code shards: the files of an extracted data set, written shard by shard and read through memory maps.

    writer = CodeWriter("codes", CodeSettings(dataset="imagenet", image_size=256, tokens=256, views=FLIP_VIEWS,
                                              codebook_size=16384, num_images=1281167))
    for k in writer.missing_shards(rank, world):
        writer.write_shard(k, codes, labels, indices, skipped)
    codes = ShardFolder("codes").rows(positions, views)        # (n, tokens)

Shard k holds the data set's images [k * shard_size, (k + 1) * shard_size), less those that could not be read:
`shard-{k:06d}.npy` (n, views, tokens), `.labels.npy` and `.indices.npy` int64 (n,), and `.json`, which is written last:
a shard without it does not exist, whatever was left behind when a run was killed. `index.json` holds the settings.
"""

import hashlib
import io
import json
import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from dataset.augmentation import TEN_CROP_VIEWS, corrected_views
from dataset.pixels import Reading
from utils.files import atomic_write, crc32_of, write_json
from utils.origin import same_tokenizer

logger = logging.getLogger(__name__)

INDEX_FILE = "index.json"
FORMAT = 1
EXTRACTION = "autoregressive/train/extract_codes_c2i.py"
SHARD_SIZE = 4096  # images; ImageNet has 313 such shards
PROBED = 64  # samples whose codes tell folders apart that record nothing else
_ARRAYS = {"codes": ".npy", "labels": ".labels.npy", "indices": ".indices.npy"}


def _open_maps() -> int:
    """How many shards a folder keeps mapped: each holds a file descriptor, of which a process commonly has 1024.

    A third of them: two folders may be drawn from together, and other things are files too.
    """
    try:
        limit = os.sysconf("SC_OPEN_MAX")
    except (AttributeError, ValueError, OSError):  # not on every system
        limit = -1
    return min(limit // 3, 4096) if limit > 0 else 256


OPEN_MAPS = _open_maps()


@dataclass(frozen=True)
class CodeSettings:
    """What the codes of a folder are. `views` are names, such as FLIP_VIEWS; `tokenizer` a fingerprint of the weights.

    images: the identity of the list of images and their labels (dataset/images.py:ImageList.identity).
    Raises ValueError for values that no codes can have.
    """

    dataset: str
    image_size: int
    tokens: int
    views: Sequence[str]
    codebook_size: int
    num_images: int
    num_classes: int | None = None
    classes: Sequence[str] | None = None
    vq_model: str | None = None
    tokenizer: str | None = None
    crop_range: float | None = None
    shard_size: int = SHARD_SIZE
    made_by: str = EXTRACTION
    extra: dict = field(default_factory=dict)
    images: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", corrected_views(self.views))
        if self.classes is not None:
            object.__setattr__(self, "classes", list(self.classes))
            if self.num_classes is None:
                object.__setattr__(self, "num_classes", len(self.classes))
        for name in ("image_size", "tokens", "codebook_size", "num_images", "shard_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.views:
            raise ValueError("codes need at least one view")

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.codebook_size <= 2**16 else np.uint32)

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_size)

    def images_of(self, shard: int) -> range:
        """The data set indices that belong to a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def to_json(self) -> dict:
        return json.loads(json.dumps({"format": FORMAT, "dtype": self.dtype.name, **asdict(self)}))

    @classmethod
    def read(cls, folder: str | Path, name: str = INDEX_FILE) -> "CodeSettings":
        """Reads `index.json` of a folder. Raises FileNotFoundError or ValueError that names it."""
        file = Path(folder) / name
        values = read_record(file)
        if values.pop("format", None) != FORMAT:
            raise ValueError(f"{file} is of a format this version does not read (it reads format {FORMAT})")
        values.pop("dtype", None)
        names = {f.name for f in fields(cls)}
        values.setdefault("images", None)  # the first edition has none
        if values.keys() != names:
            raise ValueError(f"{file} lacks or has unknown settings: {', '.join(sorted(values.keys() ^ names))}")
        return cls(**values)

    def finish_command(self, folder: str | Path) -> str:
        """The command line that completes a folder of these codes."""
        common = f"--image-size {self.image_size} --codebook-size {self.codebook_size}"
        if self.vq_model:
            common += f" --vq-model {self.vq_model}"
        if self.made_by != EXTRACTION:
            classes = f" --num-classes {self.num_classes}" if self.num_classes else ""
            common += f" --shard-size {self.shard_size}"
            return f"python {self.made_by} --from THE_SOURCE --to {folder} {common}{classes}"
        crops = f" --ten-crop --crop-range {self.crop_range}" if TEN_CROP_VIEWS[0] in self.views else ""
        crops += "" if any(view.endswith("_flip") for view in self.views) else " --no-flip"
        crops += f" --shard-size {self.shard_size}" if self.shard_size != SHARD_SIZE else ""
        precision = self.extra.get("mixed_precision")
        crops += f" --mixed-precision {precision}" if precision else ""
        crops += Reading.recorded(self.extra).flags()
        return (
            "bash scripts/autoregressive/extract_codes_c2i.sh --data-path THE_IMAGES --vq-ckpt THE_TOKENIZER "
            f"--code-path {folder} --dataset {self.dataset} {common}{crops}"
        )


def recorded_extra(folder: str | Path, name: str = INDEX_FILE) -> dict | None:
    """Return the extra settings that a folder records; None where it has no record."""
    return CodeSettings.read(folder, name).extra if (Path(folder) / name).exists() else None


class CodeWriter:
    """Writes the shards of one folder; any number of ranks may, each its own shards.

    The first opening writes `index.json`. Raises ValueError where the folder holds codes of other settings.
    """

    def __init__(self, folder: str | Path, settings: CodeSettings):
        self.folder = Path(folder)
        self.settings = settings
        if (self.folder / INDEX_FILE).exists():
            refuse_other_settings(self.folder, settings)
        else:
            write_json(self.folder / INDEX_FILE, settings.to_json())

    def missing_shards(self, rank: int = 0, world: int = 1) -> list[int]:
        """The shards this rank has to write: those numbered rank, rank + world, ... that are not there whole.

        The numbers alone decide whose a shard is: ranks agree while some of them are already writing.
        """
        return [k for k in range(rank, self.settings.num_shards, world) if not self._finished(k)]

    def _finished(self, shard: int) -> bool:
        try:
            _checked_sidecar(self.folder, shard)
        except (FileNotFoundError, ValueError):
            return False
        return True

    def compare_labels(self, labels: np.ndarray | None) -> None:
        """Compares the labels of finished shards with those of all images (n,), None where all are 0.

        For folders of the first edition, which do not record of which images they are. Raises ValueError where they differ.
        """
        for shard in range(self.settings.num_shards):
            if self._finished(shard):
                _, there, numbers = self.read_shard(shard)
                now = np.zeros_like(there) if labels is None else labels[numbers]
                if len(wrong := np.flatnonzero(there != now)):
                    raise ValueError(
                        f"{self.folder} has label {there[wrong[0]]} for image {numbers[wrong[0]]}, which is {now[wrong[0]]} "
                        "now: images were added, removed, renamed or moved to another class; use another folder"
                    )
        logger.info("%s does not record its images: their labels alone were compared", self.folder)

    def read_shard(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A finished shard: codes (n, views, tokens) as a memory map, labels (n,), data set indices (n,)."""
        return _read_shard(self.folder, self.settings, shard)

    def write_shard(
        self,
        shard: int,
        codes: np.ndarray,
        labels: np.ndarray,
        indices: np.ndarray,
        skipped: Sequence[int] = (),
    ) -> None:
        """Writes one shard: codes (n, views, tokens), labels (n,), data set indices (n,) in any order, tensors too.

        `skipped` are the indices of the images that could not be read. Raises ValueError where the shapes are others,
        a code is outside the codebook or a label outside the classes, or indices and skipped are not exactly the images
        of this shard.
        """
        settings = self.settings
        codes, labels, indices = np.asarray(codes), np.asarray(labels), np.asarray(indices, dtype=np.int64)
        expected = (len(indices), len(settings.views), settings.tokens)
        if codes.shape != expected or labels.shape != indices.shape:
            raise ValueError(
                f"shard {shard} of {self.folder}: expected codes {expected} and labels ({len(indices)},), "
                f"got {codes.shape} and {labels.shape}"
            )
        if sorted([*indices.tolist(), *skipped]) != list(settings.images_of(shard)):
            wanted = settings.images_of(shard)
            raise ValueError(
                f"shard {shard} of {self.folder} is of the images {wanted.start} to {wanted.stop - 1}, each once: "
                f"got {len(indices)} indices and {len(skipped)} skipped"
            )
        if codes.size and not 0 <= codes.min() <= codes.max() < settings.codebook_size:
            raise ValueError(
                f"shard {shard} of {self.folder} has codes from {codes.min()} to {codes.max()}, outside a codebook of "
                f"{settings.codebook_size}: check --codebook-size"
            )
        classes = settings.num_classes
        if classes is not None and labels.size and not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(
                f"shard {shard} of {self.folder} has labels from {labels.min()} to {labels.max()}, outside {classes} "
                "classes: check --num-classes"
            )
        order = np.argsort(indices)
        arrays = {
            "codes": codes[order].astype(settings.dtype),
            "labels": labels[order].astype(np.int64),
            "indices": indices[order],
        }
        # The sidecar of a damaged shard must not vouch for files that are being replaced.
        _sidecar(self.folder, shard).unlink(missing_ok=True)
        for leftover in self.folder.glob(f".{_name(shard)}.*.tmp"):
            leftover.unlink(missing_ok=True)
        written = {}
        for kind, array in arrays.items():
            file = self.folder / (_name(shard) + _ARRAYS[kind])
            content = io.BytesIO()
            np.save(content, array)
            with atomic_write(file) as f:
                f.write(content.getbuffer())
            written[file.name] = {"bytes": content.getbuffer().nbytes, "crc32": zlib.crc32(content.getbuffer())}
        sidecar = {"samples": len(indices), "skipped": sorted(int(i) for i in skipped), "files": written}
        write_json(_sidecar(self.folder, shard), sidecar)


class ShardFolder:
    """Reads a complete folder of shards. Codes stay on disk, as memory maps opened when first needed.

    Raises FileNotFoundError where there is no `index.json`, ValueError where shards are missing or a file has not the
    size it was written with. `verify` reads everything.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.settings = CodeSettings.read(folder)
        missing = [k for k in range(self.settings.num_shards) if not _sidecar(self.folder, k).exists()]
        if missing:
            total = self.settings.num_shards
            raise ValueError(
                f"{self.folder} is incomplete: {total - len(missing)} of {total} shards are there (missing: "
                f"{short(missing)}). Finish it, which keeps what is there:\n  {self.settings.finish_command(folder)}"
            )
        sidecars = [_checked_sidecar(self.folder, k) for k in range(self.settings.num_shards)]
        self._skipped = [index for sidecar in sidecars for index in sidecar["skipped"]]
        self._checksums = [file["crc32"] for sidecar in sidecars for _, file in sorted(sidecar["files"].items())]
        self._ends = np.cumsum([sidecar["samples"] for sidecar in sidecars])
        self.all_labels = np.concatenate(
            [_load(self.folder, self.settings, k, sidecar, "labels") for k, sidecar in enumerate(sidecars)]
        )
        self._maps: OrderedDict[int, np.ndarray] = OrderedDict()
        self._offsets: dict[int, int] = {}  # of the codes in the files that were mapped before
        if not len(self):
            raise ValueError(f"{self.folder} has no codes: all {self.settings.num_images} images were skipped")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_maps": OrderedDict(), "_offsets": {}}

    @property
    def tokens(self) -> int:
        return self.settings.tokens

    @property
    def view_names(self) -> list[str]:
        return self.settings.views

    @property
    def num_classes(self) -> int:
        """As recorded, or what the labels reach to."""
        return self.settings.num_classes or int(self.all_labels.max()) + 1

    @property
    def numbers(self) -> np.ndarray:
        """The data set index of every sample, (n,) ascending."""
        return np.delete(np.arange(self.settings.num_images), self._skipped)

    def identity(self) -> dict[str, str]:
        """Digests that tell whether codes are still the same; those that both sides have are compared."""
        labels = hashlib.sha256(self.all_labels.tobytes()).hexdigest()[:16]
        content = hashlib.sha256(repr(self._checksums).encode()).hexdigest()[:16]
        size = self.settings.shard_size
        return samples_identity(self) | {"labels": labels, f"checksums in shards of {size}": content}

    def labels(self, positions: np.ndarray) -> np.ndarray:
        """Labels (n,) int64 of the samples at these positions, 0 to len - 1."""
        return self.all_labels[positions]

    def rows(self, positions: np.ndarray, views: np.ndarray) -> np.ndarray:
        """The codes (n, tokens) of one view of each sample; one fancy index per shard touched."""
        out = np.empty((len(positions), self.tokens), self.settings.dtype)
        shards = np.searchsorted(self._ends, positions, side="right")
        for shard in np.unique(shards):
            chosen = np.flatnonzero(shards == shard)
            start = self._ends[shard - 1] if shard else 0
            out[chosen] = self._map(int(shard))[positions[chosen] - start, views[chosen]]
        return out

    def shards(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(codes (n, views, tokens), labels (n,), data set indices (n,)) of every shard in order."""
        for k in range(self.settings.num_shards):
            yield _read_shard(self.folder, self.settings, k)

    def verify(self) -> None:
        """Reads every file and compares its checksum. Raises ValueError that names the damaged ones."""
        damaged = []
        for k in range(self.settings.num_shards):
            for name, recorded in _checked_sidecar(self.folder, k)["files"].items():
                if crc32_of(self.folder / name) != recorded["crc32"]:
                    damaged.append((name, _sidecar(self.folder, k).name))
        if damaged:
            names, sidecars = zip(*damaged)
            raise ValueError(
                f"damaged in {self.folder}: {', '.join(names)} (checksum differs). Remove {', '.join(set(sidecars))} "
                f"and write them anew:\n  {self.settings.finish_command(self.folder)}"
            )

    def _map(self, shard: int) -> np.ndarray:
        """The codes (n, views, tokens) of a shard; the least recently used maps are closed."""
        if shard in self._maps:
            self._maps.move_to_end(shard)
            return self._maps[shard]
        if shard in self._offsets:  # checked before: mapping alone takes a fraction of the time
            file = self.folder / (_name(shard) + _ARRAYS["codes"])
            samples = int(self._ends[shard] - (self._ends[shard - 1] if shard else 0))
            shape = (samples, len(self.view_names), self.tokens)
            codes = np.memmap(file, self.settings.dtype, "r", self._offsets[shard], shape)
        else:
            codes = _load(self.folder, self.settings, shard, _checked_sidecar(self.folder, shard), "codes")
            self._offsets[shard] = codes.offset
        # A plain array: indexing the subclass costs more than the bytes that are read.
        self._maps[shard] = np.asarray(codes)
        if len(self._maps) > OPEN_MAPS:
            self._maps.popitem(last=False)
        return self._maps[shard]


def samples_identity(folder: Any) -> dict[str, str]:
    """Return the part of an identity that every layout has: samples, their images, codes and labels of some of them."""
    digest = hashlib.sha256(np.ascontiguousarray(folder.numbers, np.int64).tobytes())
    digest.update(repr((folder.tokens, folder.view_names)).encode())
    some = np.linspace(0, len(folder) - 1, min(len(folder), PROBED), dtype=np.int64)
    probe = hashlib.sha256(folder.labels(some).astype(np.int64).tobytes())
    probe.update(folder.rows(some, np.zeros_like(some)).astype(np.int64).tobytes())
    images = folder.settings.images if folder.settings else None
    return {
        "samples": digest.hexdigest()[:16],
        f"content of {PROBED} samples": probe.hexdigest()[:16],
        **({"images": images} if images else {}),
    }


def _read_shard(folder: Path, settings: CodeSettings, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sidecar = _checked_sidecar(folder, shard)
    return tuple(_load(folder, settings, shard, sidecar, kind) for kind in _ARRAYS)


def _load(folder: Path, settings: CodeSettings, shard: int, sidecar: dict, kind: str) -> np.ndarray:
    file = folder / (_name(shard) + _ARRAYS[kind])
    shape, dtype = (sidecar["samples"],), np.dtype(np.int64)
    if kind == "codes":
        shape, dtype = (*shape, len(settings.views), settings.tokens), settings.dtype
    try:
        # Numpy does not map files without data.
        array = np.load(file, mmap_mode="r" if kind == "codes" and sidecar["samples"] else None)
    except (ValueError, EOFError) as error:
        raise _damaged(file, f"not an array: {error}") from error
    if array.shape != shape or array.dtype != dtype:
        raise _damaged(file, f"{array.dtype} {array.shape}, expected {dtype} {shape}")
    return array


def _name(shard: int) -> str:
    return f"shard-{shard:06d}"


def _sidecar(folder: Path, shard: int) -> Path:
    return folder / f"{_name(shard)}.json"


def _checked_sidecar(folder: Path, shard: int) -> dict:
    """The sidecar of a shard whose files have the sizes it records."""
    sidecar = read_record(_sidecar(folder, shard))
    if not {"samples", "skipped", "files"} <= sidecar.keys():
        raise _damaged(_sidecar(folder, shard), "no samples, skipped and files in it")
    for name, recorded in sidecar["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != recorded["bytes"]:
            raise _damaged(file, "missing" if size is None else f"{size} bytes, written with {recorded['bytes']}")
    return sidecar


def _damaged(file: Path, what: str) -> ValueError:
    remedy = "run again what wrote this folder, which rewrites the shard"
    if file.name == INDEX_FILE:
        remedy = "write the codes to another folder"
    return ValueError(f"{file} is damaged ({what}): {remedy}")


def read_record(file: Path, damaged: Callable[[Path, str], ValueError] = _damaged) -> dict:
    """The JSON object beside packed codes or features: a folder's index, a shard's counts and checksums.

    damaged: makes the error that says how what is at fault is written again. Raises it, or FileNotFoundError.
    """
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{file} is missing: {file.parent} is no folder of packed files, or not whole"
        ) from None
    except ValueError as error:
        raise damaged(file, f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise damaged(file, "not a JSON object")
    return values


def refuse_other_settings(folder: Path, settings: CodeSettings, name: str = INDEX_FILE) -> None:
    """Raises ValueError where the folder's record differs; what it lacks, in records of the first edition, may differ."""
    recorded = CodeSettings.read(folder, name)
    there, now = recorded.to_json(), settings.to_json()
    if recorded.images is None:
        there["images"] = now["images"]
    for side in (there, now):
        side["extra"] = Reading.recorded(side["extra"]).record() | side["extra"]
    if recorded.tokenizer and same_tokenizer(recorded.tokenizer, settings.tokenizer):
        there["tokenizer"] = now["tokenizer"]
    wrong = [f"{key}: {short(there[key])} there, {short(now[key])} now" for key in now if there[key] != now[key]]
    if wrong:
        moved = there["images"] != now["images"]
        hint = " (images were added, removed, renamed or moved to another class)" if moved else ""
        raise ValueError(
            f"{folder} holds codes of other settings; use another folder, or the same ones: {'; '.join(wrong)}{hint}"
        )
