"""From `--dataset` and the paths beside it to a data set.

data = build_dataset(args, transform=partial(random_view, image_size=256))
"""

from argparse import Namespace
from functools import partial
from typing import Any

from torch.utils.data import Dataset

from dataset.augmentation import center_view
from dataset.codes import open_codes
from dataset.folders import class_folders, flat_folder, listed_images, nested_folder
from dataset.images import ImageDataset
from dataset.jsonl import jsonl_images

IMAGE_LISTS = {
    "imagenet": class_folders,
    "pexels": class_folders,
    "coco": flat_folder,
    "openimage": listed_images,
    "t2i_image": jsonl_images,
}
CODES = "imagenet_code"


def build_dataset(args: Namespace, **kwargs: Any) -> Dataset:
    """Builds the data set that `args.dataset` names.

    Images (imagenet, pexels, coco, openimage, t2i_image) are read from `args.data_path`, followed by those below
    `args.data_face_path` where that is given: an ImageDataset. `transform` takes a PIL image; without it items are
    centre crops of `args.image_size` pixels (256 unless given). Codes (imagenet_code) are read from `args.code_path`
    for `args.image_size` and `args.downsample_size`: PackedCodes or PublishedCodes. `args.global_seed` seeds the draws.
    Further keyword arguments go to ImageDataset or `open_codes`.

    Raises ValueError for an unknown name or a path that is not given, and what the data sets raise for their files.
    """
    name = getattr(args, "dataset", None)
    seed = kwargs.pop("seed", getattr(args, "global_seed", 0))
    image_size = getattr(args, "image_size", 256)
    if name == CODES:
        kwargs.pop("transform", None)
        downsample_size = getattr(args, "downsample_size", 16)
        return open_codes(_given(args, "code_path"), image_size, downsample_size, seed=seed, **kwargs)
    if name not in IMAGE_LISTS:
        raise ValueError(f"unknown --dataset {name!r}; choose one of {', '.join([*IMAGE_LISTS, CODES])}")
    images = IMAGE_LISTS[name](_given(args, "data_path"))
    if getattr(args, "data_face_path", None):
        images += nested_folder(args.data_face_path)
    transform = kwargs.pop("transform", None) or partial(center_view, image_size=image_size)
    return ImageDataset(images, transform, seed=seed, **kwargs)


def _given(args: Namespace, name: str) -> str:
    value = getattr(args, name, None)
    if not value:
        raise ValueError(f"--dataset {args.dataset} needs --{name.replace('_', '-')}")
    return value
