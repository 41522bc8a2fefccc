"""Conversion of codes between packed shards and the published layout, and of other groups' files to shards (tools/convert_codes.py).

    published_to_packed("imagenet_code_c2i_flip", "packed", image_size=256)
    packed_to_published("packed", "back", image_size=256)

A stopped conversion resumes where it was; what is there already is compared with the source.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset import code_files
from dataset.augmentation import FLIP_VIEWS
from dataset.code_files import CodeSettings, CodeWriter, PublishedFolder, ShardFolder
from dataset.store import Loose

MADE_BY = "tools/convert_codes.py"
# Returns codes (n, views, tokens) and labels (n,) of images by their numbers.
Read = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def new_settings(image_size: int, shard_size: int, **found: Any) -> CodeSettings:
    """Return the settings of codes of which their files do not tell all."""
    made = {"dataset": "imagenet", "made_by": MADE_BY, "image_size": image_size, "shard_size": shard_size}
    return CodeSettings(**{"codebook_size": 16384, **made, **found})


def published_to_packed(source: Path, target: Path, image_size: int, shard_size: int = 4096, **known: Any) -> None:
    """Write packed shards of the codes in the published layout; numbers without a file count as skipped.

    known: codebook_size, num_classes and vq_model, as far as the source does not record them.
    Raises ValueError where it records others, and as `pack` does.
    """
    published = PublishedFolder(source, image_size)
    sizes = {"tokens": published.tokens, "views": published.view_names, "num_images": int(published.numbers[-1]) + 1}
    settings = published.settings or new_settings(image_size, shard_size, **sizes, **known)
    for name, value in known.items():
        if value != getattr(settings, name):
            raise ValueError(f"{source} records {name} {getattr(settings, name)}, not {value}: leave the flag out")

    def read(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positions = np.searchsorted(published.numbers, images)
        codes = [published.all_views(position) for position in positions]
        return np.reshape(codes, (-1, len(settings.views), settings.tokens)), published.labels(positions)

    pack(source, target, replace(settings, shard_size=shard_size, made_by=MADE_BY), read, published.numbers)


def lines_to_packed(source: Path, target: Path, image_size: int, shard_size: int = 4096, **known: Any) -> None:
    """Write packed shards of a .jsonl file, a sample of one view for each line. known: as of `published_to_packed`.

    Raises ValueError for a line that is no sample of as many tokens as the first, and as `pack` does.
    """

    def read(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal at
        lines = list(islice(file, images[0] - at, images[-1] + 1 - at))
        at = images[-1] + 1
        codes, labels = np.empty((len(lines), 1, tokens), np.int64), np.empty(len(lines), np.int64)
        for row, line in enumerate(lines):
            try:
                sample = json.loads(line)
                codes[row, 0], labels[row] = sample["tokens"], sample["class_id"]
            except (ValueError, TypeError, LookupError) as error:
                wanted = f'{{"class_id": …, "tokens": [{tokens} numbers]}}'
                raise ValueError(f"{source}, line {images[row] + 1} is not {wanted}: {error}") from error
        return codes, labels

    with open(source, encoding="utf-8") as file:
        count = sum(1 for _ in file)
    with open(source, encoding="utf-8") as file:
        tokens, at = len(json.loads(file.readline() or "{}").get("tokens", ())), 0
        if not tokens:
            raise ValueError(f'{source} does not begin with a line of codes, {{"class_id": …, "tokens": […]}}')
        file.seek(0)
        sizes = {"tokens": tokens, "views": ["view_0"], "num_images": count}
        pack(source, target, new_settings(image_size, shard_size, **sizes, **known), read)


def archives_to_packed(source: Path, target: Path, image_size: int, shard_size: int = 4096, **known: Any) -> None:
    """Write packed shards of LPD's codes: class folders with an .npz of `indices` and `indices_flip` for each image.

    known: as of `published_to_packed`. Raises ValueError for a file without these, and as `pack` does.
    """
    names = sorted(folder.name for folder in Path(source).iterdir() if folder.is_dir())
    files = [(file, label) for label, name in enumerate(names) for file in sorted(Path(source, name).glob("*.npz"))]

    def codes_of(file: Path) -> np.ndarray:
        try:
            with np.load(file) as archive:
                return np.stack([archive[name].ravel() for name in ("indices", "indices_flip")]).astype(np.int64)
        except (ValueError, KeyError, OSError, EOFError) as error:
            raise ValueError(f"{file} has no indices and indices_flip of one length: {error}") from error

    def read(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = [files[image] for image in images]
        return np.stack([codes_of(file) for file, _ in chosen]), np.array([label for _, label in chosen])

    sizes = {"tokens": codes_of(files[0][0]).shape[1], "views": list(FLIP_VIEWS), "num_images": len(files)}
    classes = {"classes": names, "num_classes": len(names)}
    pack(source, target, new_settings(image_size, shard_size, **sizes, **(classes | known)), read)


def pack(source: Path, target: Path, settings: CodeSettings, read: Read, numbers: np.ndarray | None = None) -> None:
    """Write the shards that are missing, and compare the first image of the others. numbers: of the images that are there.

    Raises ValueError as CodeWriter does, and where a shard that is already there is not of this source.
    """
    writer = CodeWriter(target, settings)
    missing, numbers = set(writer.missing_shards()), np.arange(settings.num_images) if numbers is None else numbers
    for shard in tqdm(range(settings.num_shards), unit="shard"):
        images = settings.images_of(shard)
        present = numbers[slice(*np.searchsorted(numbers, [images.start, images.stop]))]
        if shard in missing:
            writer.write_shard(shard, *read(present), present, np.setdiff1d(images, present).tolist())
            continue
        # Reading all small files would be a second conversion.
        codes, labels, there = writer.read_shard(shard)
        first = zip((codes[:1], labels[:1]), read(present[:1]), strict=True) if len(present) else ()
        if not (np.array_equal(there, present) and all(np.array_equal(one, other) for one, other in first)):
            raise ValueError(f"shard {shard} in {target} is not of the codes in {source}: use another folder")


def packed_to_published(source: Path, target: Path, image_size: int) -> None:
    """Write the published layout of packed shards; the files are numbered by data set index.

    Raises ValueError as ShardFolder and its `verify` do, where the codes are of another image size, and where the target
    holds other samples.
    """
    packed = ShardFolder(source)
    if packed.settings.image_size != image_size:
        raise ValueError(f"{source} holds codes of --image-size {packed.settings.image_size}, not {image_size}")
    packed.verify()
    folders = code_files.published_folders(target, image_size)
    present = [Loose(folder, "integers", ()).numbers for folder in folders]
    for folder, numbers in zip(folders, present):
        foreign = np.setdiff1d(numbers, packed.numbers)
        if len(foreign):
            found = f"{folder} holds {len(foreign)} samples that {source} has not ({foreign[0]}.npy)"
            raise ValueError(f"{found}: use another folder")
    settings = replace(packed.settings, shard_size=code_files.SHARD_SIZE)
    code_files.record_settings(target, settings, code_files.published_record(image_size))
    whole = set(np.intersect1d(*present).tolist())
    for all_codes, labels, numbers in tqdm(packed.parts(), unit="shard"):
        for codes, label, i in zip(all_codes, labels.tolist(), numbers.tolist(), strict=True):
            if i not in whole:
                code_files.write_published(target, image_size, i, codes, label)
                continue
            for folder, expected in zip(folders, (codes[None], np.asarray([label]))):
                if not np.array_equal(np.load(folder / f"{i}.npy"), expected):
                    raise ValueError(f"{folder / f'{i}.npy'} differs from the packed codes: use another folder")
