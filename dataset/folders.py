"""Images found in folders: one folder per class (ImageNet, Pexels), one flat folder (COCO), or a list (OpenImages).

images = class_folders("imagenet/train")    # an ImageList: paths, labels, classes
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset.images import IMAGE_EXTENSIONS, ImageList, PathList

IMAGE_PATHS_FILE = "image_paths.json"
_SPLITS = {"train", "val", "valid", "validation", "test"}


def class_folders(folder: str | Path, classes: Sequence[str] | None = None, order: str = "natural") -> ImageList:
    """Images at any depth below one sub-folder per class; a label is the place of its class among the names.

    Order: by class, then folder, then file name. Hidden files and folders are left out.
    classes: the names by label, of which some may have no folder. Without them the folders' own, in `order`: natural (2
    before 10) or text (10 before 2), which is the published one.
    Raises FileNotFoundError where the folder is missing, ValueError where it holds no images, images outside class
    folders, a class without images, or a class that is not among `classes`.
    """
    folder = _existing(folder)
    loose, there = _children(folder)
    unknown = [name for name in there if classes is not None and name not in classes]
    if unknown:
        raise ValueError(
            f"{folder} has a class folder {unknown[0]!r}, which is none of the {len(classes)} classes given"
        )
    if classes is None:
        classes = sorted(there, key=natural_key) if order == "natural" else there
    if loose and there:
        raise ValueError(
            f"{folder} mixes loose images ({loose[0]}) with class folders ({there[0]}): "
            "move the images into class folders or elsewhere"
        )
    if loose:
        raise ValueError(
            f"{len(loose)} images lie directly in {folder} ({loose[0]}): use --dataset coco, or put them in one "
            "folder per class"
        )
    if not there:
        raise _no_images(folder)
    # The parent of the splits is an easy slip that would train on the classes 'train' and 'val'.
    if _SPLITS.issuperset(there) and all(_children(folder / name)[1] for name in there):
        raise ValueError(f"{folder} holds the splits {', '.join(there)}: give one of them, {folder / there[0]}")
    relative, labels, empty = [], [], []
    for label, name in enumerate(classes):
        if name not in there:
            continue
        found = find_images(folder / name)
        relative += [f"{name}/{path}" for path in found]
        labels.append(np.full(len(found), label, np.int64))
        if not found:
            empty.append(name)
    if len(empty) == len(there):
        raise _no_images(folder)
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise ValueError(f"the class folder {folder / empty[0]}{more} has no images: fill it, or remove it")
    return ImageList(PathList(folder, relative), np.concatenate(labels), list(classes))


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a sorting key by which numbers inside names count as numbers: 2 before 10."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def flat_folder(folder: str | Path) -> ImageList:
    """The images that lie directly in a folder, by name, all with label 0.

    Raises FileNotFoundError where the folder is missing, ValueError where no image lies directly in it.
    """
    folder = _existing(folder)
    loose, folders = _children(folder)
    if not loose:
        inside = f"; it has sub-folders ({folders[0]}): give one of them, or use --dataset imagenet" if folders else ""
        raise _no_images(folder, inside)
    return ImageList(PathList(folder, loose))


def nested_folder(folder: str | Path) -> ImageList:
    """The images at any depth below a folder, all with label 0. Raises FileNotFoundError, or ValueError for none."""
    folder = _existing(folder)
    found = find_images(folder)
    if not found:
        raise _no_images(folder)
    return ImageList(PathList(folder, found))


def listed_images(folder: str | Path) -> ImageList:
    """The images named in `image_paths.json` of a folder, a list of paths relative to it, all with label 0.

    Raises FileNotFoundError where the folder or the list is missing, ValueError where the list is not one.
    """
    folder = _existing(folder)
    file = folder / IMAGE_PATHS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: make it with python tools/openimage_json.py --data-path {folder}")
    try:
        paths = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): make it anew with tools/openimage_json.py") from error
    if not isinstance(paths, list):
        raise ValueError(f"{file} must hold a list of paths, not {type(paths).__name__}")
    if not paths:
        raise ValueError(f"{file} lists no images: make it anew with tools/openimage_json.py")
    for place, path in enumerate(paths):
        if not isinstance(path, str) or not path:
            raise ValueError(f"entry {place} of {file} must be a path relative to {folder}, not {path!r}")
    return ImageList(PathList(folder, paths))


def find_images(folder: str | Path) -> list[str]:
    """Relative paths, with '/', of the images at any depth, by folder, then file name; hidden ones are left out.

    Links to folders are followed. Raises OSError for a folder that cannot be listed.
    """
    folder = str(folder)
    found = []
    for place, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = os.path.relpath(place, folder).replace(os.sep, "/")
        found.append((place, "" if prefix == "." else f"{prefix}/", sorted(filter(_is_image, files))))
    return [prefix + name for _, prefix, names in sorted(found) for name in names]


def _children(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the images and of the sub-folders directly in a folder, sorted, without hidden ones."""
    images, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if not entry.name.startswith("."):
                    folders.append(entry.name)
            elif _is_image(entry.name):
                images.append(entry.name)
    return sorted(images), sorted(folders)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"the image folder {folder} {what}: check the path")
    return folder


def _no_images(folder: Path, more: str = "") -> ValueError:
    return ValueError(f"no images ({', '.join(IMAGE_EXTENSIONS)}) in {folder}{more}")


def _raise(error: OSError) -> None:
    raise error
