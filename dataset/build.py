"""Data sets by `--dataset` and the paths beside it.

data = build_dataset(args, transform=partial(random_view, image_size=256))
"""

import logging
from argparse import Namespace
from typing import Any

from torch.utils.data import Dataset

from dataset.arrays import PairArrays, codes_of, condition_folders
from dataset.codes import CODES
from dataset.image_build import image_dataset, required
from dataset.pixels import Reading
from dataset.sources import open_pairs
from dataset.t2i import TextCodes, TextImages
from dataset.text_features import Features
from utils.cli import grid_size

logger = logging.getLogger(__name__)

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
    seed = kwargs.pop("seed", getattr(args, "global_seed", 0))
    if args.dataset == CODES:
        kwargs.pop("transform", None)
        required(args, "code_path")
        return codes_of(args, seed=seed, **kwargs)
    if args.dataset in (TEXT, TEXT_CODES):
        return _text_images(args, getattr(args, "image_size", 256), seed=seed, **kwargs)
    return image_dataset(args, (CODES, TEXT, TEXT_CODES), seed=seed, **kwargs)


def _text_images(args: Namespace, image_size: int, **kwargs: Any) -> TextImages:
    further = condition_folders(getattr(args, "condition_path", None))
    width, short = getattr(args, "t5_feature_dim", None), getattr(args, "short_t5_feat_path", None)
    pairs = open_pairs(required(args, "data_path"), getattr(args, "index_path", None))
    features = Features(required(args, "t5_feat_path"), dim=width)
    kwargs["short_features"] = Features(short, dim=features.dim) if short else None
    stems = [stem for stem, _ in pairs.files]
    kwargs["arrays"] = {name: PairArrays(folder, name, stems) for name, folder in further.items()}
    if args.dataset == TEXT:
        kwargs["reading"] = Reading.of(args)
        logger.info(kwargs["reading"])
        return TextImages(pairs, features, image_size=image_size, **kwargs)
    tokens = grid_size(image_size, getattr(args, "downsample_size", 16)) ** 2
    codes = TextCodes(required(args, "code_path"), stems, tokens, getattr(args, "vocab_size", None))
    return TextImages(pairs, features, codes=codes, **kwargs)
