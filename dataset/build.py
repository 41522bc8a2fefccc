"""Data sets by `--dataset` and the paths beside it.

data = build_dataset(args, transform=partial(random_view, image_size=256))
"""

import logging
from argparse import Namespace
from functools import partial
from typing import Any

from torch.utils.data import Dataset

from dataset.arrays import PairArrays, codes_of, condition_folders
from dataset.augmentation import center_view
from dataset.codes import CODES
from dataset.folders import class_folders, flat_folder, listed_images, nested_folder
from dataset.images import ImageDataset
from dataset.jsonl import jsonl_images
from dataset.pixels import Reading
from dataset.t2i import TextCodes, TextImages, open_pairs
from dataset.text_features import open_features
from utils.cli import grid_size

logger = logging.getLogger(__name__)

IMAGE_LISTS = {
    "imagenet": class_folders,
    "pexels": class_folders,
    "coco": flat_folder,
    "openimage": listed_images,
    "t2i_image": jsonl_images,
}
TEXT, TEXT_CODES = "t2i", "t2i_code"


def build_dataset(args: Namespace, **kwargs: Any) -> Dataset:
    """Build the data set that `args.dataset` names.

    Images (imagenet, pexels, coco, openimage, t2i_image) of `args.data_path`, followed by those below `args.data_face_path`:
    an ImageDataset, by default of centre crops of `args.image_size` pixels. Codes (imagenet_code) of `args.code_path`: a
    CodeDataset. Image-text pairs (t2i, t2i_code) of `args.data_path` with the features of `args.t5_feat_path` and
    `args.short_t5_feat_path`: TextImages, of pixels (t2i) or of the codes in `args.code_path` (t2i_code). What is stored
    beside codes comes from `args.condition_path`. `args.global_seed` seeds the draws. Further keyword arguments go to
    `class_folders` (classes, order) and to the data set.

    Raises ValueError for an unknown name or a path that is not given, and what the data sets raise for their files.
    """
    name = getattr(args, "dataset", None)
    seed = kwargs.pop("seed", getattr(args, "global_seed", 0))
    image_size = getattr(args, "image_size", 256)
    if name == CODES:
        kwargs.pop("transform", None)
        _given(args, "code_path")
        return codes_of(args, seed=seed, **kwargs)
    if name in (TEXT, TEXT_CODES):
        return _text_images(args, image_size, seed=seed, **kwargs)
    if name not in IMAGE_LISTS:
        known = ", ".join([*IMAGE_LISTS, CODES, TEXT, TEXT_CODES])
        raise ValueError(f"unknown --dataset {name!r}; choose one of {known}")
    by_class = {key: kwargs.pop(key) for key in ("classes", "order") if key in kwargs}
    if by_class.get("classes") is not None and IMAGE_LISTS[name] is not class_folders:
        raise ValueError(f"--dataset {name} has no classes, and those of other codes are asked for: use imagenet")
    by_class = by_class if IMAGE_LISTS[name] is class_folders else {}
    images = IMAGE_LISTS[name](_given(args, "data_path"), **by_class)
    if getattr(args, "data_face_path", None):
        images += nested_folder(args.data_face_path)
    transform = kwargs.pop("transform", None) or partial(center_view, image_size=image_size)
    reading = kwargs.pop("reading", None) or Reading.of(args)
    logger.info(reading)
    return ImageDataset(images, transform, seed=seed, reading=reading, **kwargs)


def _text_images(args: Namespace, image_size: int, **kwargs: Any) -> TextImages:
    further = condition_folders(getattr(args, "condition_path", None))
    width, short = getattr(args, "t5_feature_dim", None), getattr(args, "short_t5_feat_path", None)
    pairs = open_pairs(_given(args, "data_path"), getattr(args, "index_path", None))
    features = open_features(_given(args, "t5_feat_path"), dim=width)
    kwargs["short_features"] = open_features(short, dim=features.dim) if short else None
    stems = [stem for stem, _ in pairs.files]
    kwargs["arrays"] = {name: PairArrays(folder, name, stems) for name, folder in further.items()}
    if args.dataset == TEXT:
        kwargs["reading"] = Reading.of(args)
        logger.info(kwargs["reading"])
        return TextImages(pairs, features, image_size=image_size, **kwargs)
    tokens = grid_size(image_size, getattr(args, "downsample_size", 16)) ** 2
    codes = TextCodes(_given(args, "code_path"), stems, tokens, getattr(args, "vocab_size", None))
    return TextImages(pairs, features, codes=codes, **kwargs)


def _given(args: Namespace, name: str) -> str:
    value = getattr(args, name, None)
    if not value:
        raise ValueError(f"--dataset {args.dataset} needs --{name.replace('_', '-')}")
    return value
