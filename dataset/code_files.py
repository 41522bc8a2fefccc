"""Image codes on disk: packed shards, and the published layout of one small file an image.

    writer = CodeWriter("codes", CodeSettings(dataset="imagenet", image_size=256, tokens=256, views=FLIP_VIEWS,
                                              codebook_size=16384, num_images=1281167))
    for k in writer.missing_shards():
        writer.write_shard(k, codes, labels, indices, skipped)
    codes = ShardFolder("codes").rows(positions, views)              # (n, tokens)

Packed (dataset/store.py): shards of codes (n, views, tokens), `.labels.npy` and `.indices.npy` int64 (n,); `index.json`
holds the settings. Published: codes `{folder}/imagenet{size}_codes/{i}.npy` int64 (1, views, tokens) and labels
`imagenet{size}_labels/{i}.npy` (1,); `imagenet{size}.json`, which folders of the published scripts and of the first edition
lack, has the settings.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from dataset.augmentation import VIEWS, corrected_views
from dataset.pixels import Reading
from dataset.store import INDEX_FILE, Fixed, Loose, Shards, read_record, refuse_other, shard_items
from utils.files import write_json
from utils.origin import same_tokenizer

logger = logging.getLogger(__name__)

FORMAT = 1
EXTRACTION = "autoregressive/train/extract_codes_c2i.py"
TEXT_EXTRACTION = "autoregressive/train/extract_codes_t2i.py"
SHARD_SIZE = 4096  # images; ImageNet has 313 such shards
PROBED = 64  # samples whose codes tell folders apart that record nothing else
_SIZED = re.compile(r"imagenet([0-9]+)_codes")


@dataclass(frozen=True)
class CodeSettings:
    """Record of a folder of codes.

    Args:
        vq_model, tokenizer: name of the tokenizer's size and fingerprint of its weights.
        crop_range: of ten crops.
        made_by: the script that wrote the codes.
        extra: precision of the encoder, and how files were read.
        images: identity of the list of images and their labels (dataset/images.py:ImageList.identity).

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
            object.__setattr__(self, "num_classes", self.num_classes or len(self.classes))
        numbers = (self.image_size, self.tokens, self.codebook_size, self.num_images, self.shard_size, len(self.views))
        if min(numbers) <= 0:
            raise ValueError(f"sizes, numbers and views of codes must be positive, got {self}")

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.codebook_size <= 2**16 else np.uint32)

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_size)

    def images_of(self, shard: int) -> range:
        """Return the data set indices that belong to a shard."""
        return shard_items(shard, self.num_images, self.shard_size)

    def to_json(self) -> dict:
        return json.loads(json.dumps({"format": FORMAT, "dtype": self.dtype.name, **asdict(self)}))

    @classmethod
    def read(cls, folder: str | Path, name: str = INDEX_FILE) -> "CodeSettings":
        """Return the record of a folder. Raises FileNotFoundError or ValueError that names it."""
        file = Path(folder) / name
        values = {"images": None, **read_record(file)}  # the first edition records no images
        if values.pop("format", None) != FORMAT:
            raise ValueError(f"{file} is of a format this version does not read (it reads format {FORMAT})")
        values.pop("dtype", None)
        if wrong := values.keys() ^ {f.name for f in fields(cls)}:
            raise ValueError(f"{file} lacks or has unknown settings: {', '.join(sorted(wrong))}")
        return cls(**values)

    @property
    def remedy(self) -> str:
        """Return what completes a folder of these codes, for errors."""
        return f"run {self.made_by} again with the flags that began it, which keeps what is there"


def published_record(image_size: int) -> str:
    """Return the name of the file with the settings of published codes of one image size."""
    return f"imagenet{image_size}.json"


def recorded_settings(folder: str | Path, image_size: int) -> CodeSettings | None:
    """Return the record of a folder's codes in either layout; None where it is not there or records nothing."""
    for name in (INDEX_FILE, published_record(image_size)):
        if (Path(folder) / name).exists():
            return CodeSettings.read(folder, name)
    return None


def record_settings(folder: str | Path, settings: CodeSettings, name: str = INDEX_FILE) -> None:
    """Write the settings before codes are.

    Raises ValueError where the folder records others. What it lacks, in records of the first edition, may differ.
    """
    if not (Path(folder) / name).exists():
        write_json(Path(folder) / name, settings.to_json())
        return
    recorded = CodeSettings.read(folder, name)
    there, now = recorded.to_json(), settings.to_json()
    if recorded.images is None:
        there["images"] = now["images"]
    for side in (there, now):
        side["extra"] = Reading.recorded(side["extra"]).record() | side["extra"]
    if recorded.tokenizer and same_tokenizer(recorded.tokenizer, settings.tokenizer):
        there["tokenizer"] = now["tokenizer"]
    moved = there["images"] != now["images"]
    hint = " (images were added, removed, renamed or moved to another class)" if moved else ""
    refuse_other(Path(folder), "codes", there, now, hint)


class CodeWriter:
    """Writer of a folder's shards; any number of ranks may write, each its own shards.

    The first opening writes `index.json`. Raises ValueError where the folder holds codes of other settings.
    """

    def __init__(self, folder: str | Path, settings: CodeSettings):
        self.folder, self.settings, self._shards = Path(folder), settings, Shards(folder)
        record_settings(folder, settings)

    def missing_shards(self) -> list[int]:
        """Return the shards that are not there whole."""
        return self._shards.missing(self.settings.num_shards)

    def compare_labels(self, labels: np.ndarray | None) -> None:
        """Compare the labels of finished shards with those of all images (n,), None where all are 0.

        For folders of the first edition, which do not record of which images they are. Raises ValueError where they differ.
        """
        for shard in set(range(self.settings.num_shards)) - set(self.missing_shards()):
            _, there, numbers = self.read_shard(shard)
            now = np.zeros_like(there) if labels is None else labels[numbers]
            if len(wrong := np.flatnonzero(there != now)):
                raise ValueError(
                    f"{self.folder} has label {there[wrong[0]]} for image {numbers[wrong[0]]}, which is {now[wrong[0]]} "
                    "now: images were added, removed, renamed or moved to another class; use another folder"
                )
        logger.info("%s does not record its images: their labels alone were compared", self.folder)

    def read_shard(self, shard: int) -> tuple[np.ndarray, ...]:
        """Return a finished shard: codes (n, views, tokens), labels (n,), data set indices (n,)."""
        return _read_shard(self._shards, self.settings, shard, self._shards.record(shard)["samples"])

    def write_shard(
        self, shard: int, codes: np.ndarray, labels: np.ndarray, indices: np.ndarray, skipped: Sequence[int] = ()
    ) -> None:
        """Write one shard, of its images in any order.

        Args:
            shard: its number.
            codes: (n, views, tokens), of any integer type; a tensor too.
            labels: (n,).
            indices: (n,), numbers of the images in the data set.
            skipped: numbers of the images that could not be read.

        Raises ValueError for a code outside the codebook, or a label outside the classes.
        """
        settings = self.settings
        codes, labels, indices = np.asarray(codes), np.asarray(labels), np.asarray(indices, dtype=np.int64)
        assert codes.shape == (len(indices), len(settings.views), settings.tokens), codes.shape
        assert sorted([*indices.tolist(), *skipped]) == list(settings.images_of(shard)), (shard, indices, skipped)
        for what, values, limit, group in (
            ("codes", codes, settings.codebook_size, "a codebook of {}: check --codebook-size"),
            ("labels", labels, settings.num_classes, "{} classes: check --num-classes"),
        ):
            if limit is not None and values.size and not 0 <= values.min() <= values.max() < limit:
                place = f"shard {shard} of {self.folder} has {what} from {values.min()} to {values.max()}"
                raise ValueError(f"{place}, outside {group.format(limit)}")
        order = np.argsort(indices)
        arrays = {
            "": [codes[order].astype(settings.dtype)],
            "labels": [labels[order].astype(np.int64)],
            "indices": [indices[order]],
        }
        self._shards.write(shard, arrays, samples=len(indices), skipped=sorted(map(int, skipped)))


def _read_shard(shards: Shards, settings: CodeSettings, shard: int, samples: int) -> tuple[np.ndarray, ...]:
    codes = shards.load(shard, "", settings.dtype, (samples, len(settings.views), settings.tokens))
    return codes, *(shards.load(shard, name, np.int64, (samples,)) for name in ("labels", "indices"))


class ShardFolder(Fixed):
    """Reader of a complete folder of packed codes, which stay on disk. Raises as Fixed does."""

    def __init__(self, folder: str | Path):
        self.folder, self.settings = Path(folder), CodeSettings.read(folder)
        self.tokens, self.view_names = self.settings.tokens, self.settings.views
        shape = (len(self.view_names), self.tokens)
        number, size = self.settings.num_images, self.settings.shard_size
        super().__init__(Shards(folder), self.settings.dtype, shape, number, size, self.settings.remedy)

    @cached_property
    def all_labels(self) -> np.ndarray:
        """Return the label of every sample, int64 (n,)."""
        return np.concatenate([labels for _, labels, _ in self.parts()])

    @property
    def num_classes(self) -> int:
        """Return the recorded number, or what the labels reach to."""
        return self.settings.num_classes or int(self.all_labels.max()) + 1

    def identity(self) -> dict[str, str]:
        """Return digests that tell whether codes are still the same; those that both sides have are compared."""
        records = [self.shards.record(shard) for shard in range(self.count)]
        checksums = [file["crc32"] for record in records for _, file in sorted(record["files"].items())]
        labels = hashlib.sha256(self.all_labels.tobytes()).hexdigest()[:16]
        content = hashlib.sha256(repr(checksums).encode()).hexdigest()[:16]
        size = self.settings.shard_size
        return samples_identity(self) | {"labels": labels, f"checksums in shards of {size}": content}

    def labels(self, positions: np.ndarray) -> np.ndarray:
        """Return the labels (n,) int64 of the samples at these positions, 0 to len - 1."""
        return self.all_labels[positions]

    def parts(self) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield (codes (n, views, tokens), labels (n,), data set indices (n,)) of every shard in order."""
        for shard in range(self.count):
            yield _read_shard(self.shards, self.settings, shard, len(self.array(shard)))

    def verify(self, codebook_size: int | None = None) -> str:
        """Read every file and compare its checksum; say so. Raises ValueError that names the damaged ones."""
        if names := self.shards.verify(self.count):
            records = dict.fromkeys(f"{name.split('.')[0]}.json" for name in names)
            what = f"damaged in {self.folder}: {', '.join(names)} (checksum differs)"
            raise ValueError(f"{what}: remove {', '.join(records)} and {self.settings.remedy}")
        return f"the checksums of all {self.count} shards are right"


class PublishedFolder:
    """Reader of the published layout; position p is the p-th number among the files.

    Raises FileNotFoundError where a folder is missing, ValueError where codes and labels are not of the same samples or
    a file is not as the layout has it.
    """

    def __init__(self, folder: str | Path, image_size: int):
        self.folder = Path(folder)
        codes, labels = published_folders(folder, image_size)
        for one in (codes, labels):
            if not one.is_dir():
                raise FileNotFoundError(f"{one} does not exist: the published layout has both codes and labels")
        self._codes, self._labels = Loose(codes, "integers", ("views", "tokens")), Loose(labels, "integers", ())
        self.numbers, labelled = self._codes.numbers, self._labels.numbers  # (n,), ascending: the data set indices
        alone = np.setxor1d(self.numbers, labelled)
        if len(alone):
            lacking = labels if alone[0] in self.numbers else codes
            found = f"{len(self.numbers)} samples in {codes}, {len(labelled)} in {labels}, {len(alone)} of them in one alone"
            raise ValueError(
                f"{found} (missing in {lacking}: {alone[0]}.npy): extract them again, or remove the others"
            )
        if not len(self.numbers):
            raise ValueError(f"no codes ({{i}}.npy) in {codes}")
        views, self.tokens = self._codes.shape = self._codes.get(self.numbers[0]).shape
        recorded = self.folder / published_record(image_size)
        self.settings = CodeSettings.read(self.folder, recorded.name) if recorded.exists() else None
        # The files carry no names of views: without a record they go by their number, as extraction orders them.
        names = self.settings.views if self.settings else VIEWS.get(views)
        self.view_names = list(names or [f"view_{k}" for k in range(views)])
        # As recorded: reading a label of every file would take long.
        self.num_classes = self.settings.num_classes if self.settings else None
        if self.settings and self.numbers[-1] >= self.settings.num_images:
            images = f"{recorded} tells of {self.settings.num_images} images"
            raise ValueError(f"{codes} has {self.numbers[-1]}.npy, and {images}: remove what another extraction left")

    def __len__(self) -> int:
        return len(self.numbers)

    def identity(self) -> dict[str, str]:
        """Return digests that tell whether codes are still the same; those that both sides have are compared."""
        return samples_identity(self)

    def all_views(self, position: int) -> np.ndarray:
        """Return the codes of one sample, (views, tokens) int64."""
        return self._codes.get(self.numbers[position])

    def labels(self, positions: np.ndarray) -> np.ndarray:
        """Return the labels (n,) int64 of the samples at these positions, 0 to len - 1."""
        return np.asarray([self._labels.get(number) for number in self.numbers[positions]], np.int64)

    def rows(self, positions: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Return the codes (n, tokens) int64 of one view of each sample."""
        return np.stack([self.all_views(p)[view] for p, view in zip(positions, views)])

    def verify(self, codebook_size: int = 2**63 - 1) -> str:
        """Read every file; say so. Raises ValueError that names the first that is damaged or has a code outside the codebook."""
        for position in range(len(self)):
            codes = self.all_views(position)
            if not 0 <= codes.min() <= codes.max() < codebook_size:
                raise ValueError(
                    f"{self.folder}, sample {self.numbers[position]}: codes from {codes.min()} to {codes.max()}, outside a "
                    f"codebook of {codebook_size}: check --codebook-size, or extract them again"
                )
            self.labels(np.asarray([position]))
        return f"all {len(self)} samples can be read (this layout has no checksums)"


def published_folders(folder: str | Path, image_size: int) -> tuple[Path, Path]:
    """Return the folders of the codes and of the labels of one image size."""
    return Path(folder) / f"imagenet{image_size}_codes", Path(folder) / f"imagenet{image_size}_labels"


def published_sizes(folder: str | Path) -> list[int]:
    """Return the image sizes of which a folder holds codes in the published layout."""
    return sorted(int(found[1]) for name in os.listdir(folder) if (found := _SIZED.fullmatch(name)))


def write_published(folder: str | Path, image_size: int, i: int, codes: np.ndarray, label: int) -> None:
    """Write the sample numbered `i`: codes (views, tokens), tensors too. A sample is whole once its label is there."""
    for place, array in zip(published_folders(folder, image_size), (codes, int(label)), strict=True):
        Loose(place, "integers", ()).write(i, np.asarray(array, np.int64), durable=True)


def samples_identity(folder: ShardFolder | PublishedFolder) -> dict[str, str]:
    """Return the part of an identity that both layouts have: samples, their images, codes and labels of some of them."""
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
