"""Data sets of images by `--dataset` and `--data-path`.

data = image_dataset(args, transform=partial(random_view, image_size=256))
"""

import hashlib
import logging
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dataset.augmentation import center_view
from dataset.folders import class_folders, flat_folder, listed_images, nested_folder
from dataset.images import ImageDataset, ImageList
from dataset.jsonl import JsonPairs
from dataset.pixels import Reading

logger = logging.getLogger(__name__)


class _ImagePaths(Sequence[str]):
    def __init__(self, pairs: JsonPairs):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> str:
        return self.pairs.image_file(index)

    def update(self, digest: "hashlib._Hash") -> None:
        """Add the content of the lists to a digest."""
        for k in range(len(self.pairs.files)):
            digest.update(self.pairs.list_digest(k).encode())


def jsonl_images(folder: str | Path) -> ImageList:
    """Return the images of a folder's jsonl files without their texts, all with label 0. Raises as JsonPairs does."""
    return ImageList(_ImagePaths(JsonPairs(folder)))


IMAGE_LISTS = {
    "imagenet": class_folders,
    "pexels": class_folders,
    "coco": flat_folder,
    "openimage": listed_images,
    "t2i_image": jsonl_images,
}


def image_dataset(args: Namespace, others: tuple[str, ...] = (), **kwargs: Any) -> ImageDataset:
    """Build the data set of the images of `args.data_path`, followed by those below `args.data_face_path`.

    `transform` takes a PIL image; without it items are centre crops of `args.image_size` pixels. `args.exif` and
    `args.background` say how files are read, `args.global_seed` seeds the draws. Further keyword arguments go to
    `class_folders` (classes, order) and ImageDataset. others: further names that the caller takes.

    Raises ValueError for an unknown name or a path that is not given, and what the lists raise for their files.
    """
    name, seed = getattr(args, "dataset", None), kwargs.pop("seed", getattr(args, "global_seed", 0))
    if name not in IMAGE_LISTS:
        raise ValueError(f"unknown --dataset {name!r}; choose one of {', '.join([*IMAGE_LISTS, *others])}")
    by_class = {key: kwargs.pop(key) for key in ("classes", "order") if key in kwargs}
    if by_class.get("classes") is not None and IMAGE_LISTS[name] is not class_folders:
        raise ValueError(f"--dataset {name} has no classes, and those of other codes are asked for: use imagenet")
    by_class = by_class if IMAGE_LISTS[name] is class_folders else {}
    images = IMAGE_LISTS[name](required(args, "data_path"), **by_class)
    if getattr(args, "data_face_path", None):
        images += nested_folder(args.data_face_path)
    transform = kwargs.pop("transform", None) or partial(center_view, image_size=getattr(args, "image_size", 256))
    reading = kwargs.pop("reading", None) or Reading.of(args)
    logger.info(reading)
    return ImageDataset(images, transform, seed=seed, reading=reading, **kwargs)


def required(args: Namespace, name: str) -> str:
    """Return a path that the data set needs. Raises ValueError where it is not given."""
    value = getattr(args, name, None)
    if not value:
        raise ValueError(f"--dataset {args.dataset} needs --{name.replace('_', '-')}")
    return value
