"""Images found in folders: one folder per class (ImageNet, Pexels), one flat folder (COCO), or a list (OpenImages).

images = class_folders("imagenet/train")    # an ImageList: paths, labels, classes

Images are regular files, or links to such, whose names end as one of IMAGE_EXTENSIONS. Links to folders are followed, but
a folder is read once: a second way to it is an error, as is a link that leads nowhere. A link to an image that is gone is
kept, as an image that cannot be read. Whatever else is there is counted in one line of the log.
"""

import errno
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dataset.images import ImageList, PathList
from dataset.pixels import IMAGE_EXTENSIONS

logger = logging.getLogger(__name__)

IMAGE_PATHS_FILE = "image_paths.json"
_SPLITS = {"train", "val", "valid", "validation", "test"}


def class_folders(folder: str | Path, classes: Sequence[str] | None = None, order: str = "natural") -> ImageList:
    """List the images at any depth below one sub-folder per class; a label is the place of its class among the names.

    Order: by class, then folder, then file name. Hidden files and folders are left out.
    classes: the names by label, of which some may have no folder. Without them the folders' own, in `order`: natural (2
    before 10) or text (10 before 2), which is the published one.
    Raises FileNotFoundError, and ValueError where it holds no images, images outside class folders, a class without
    images or that is not among `classes`, a link that leads nowhere, or a folder that two links lead to.
    """
    tree = _Tree(folder)
    loose, there = tree.children("")
    unknown = [name for name in there if classes is not None and name not in classes]
    if unknown:
        other = f"{folder} has a class folder {unknown[0]!r}, which is none of the {len(classes)} classes that the codes record"
        raise ValueError(f"{other}: extract to another folder without --classes-of, or rename the class folder")
    if loose and there:
        raise ValueError(f"{folder} mixes loose images ({loose[0]}) with class folders ({there[0]}): move one of them")
    if loose:
        lying = f"{len(loose)} images lie directly in {folder} ({loose[0]})"
        raise ValueError(f"{lying}: use --dataset coco, or put them in one folder per class")
    # The parent of the splits is an easy slip that would train on the classes 'train' and 'val'.
    if there and _SPLITS.issuperset(there) and all(_Tree(tree.path(name)).children("")[1] for name in there):
        raise ValueError(f"{folder} holds the splits {', '.join(there)}: give one of them, {tree.path(there[0])}")
    if classes is None:
        classes = sorted(there, key=natural_key) if order == "natural" else there
    found = {label: tree.images(name) for label, name in enumerate(classes) if name in there}
    if not any(found.values()):
        raise _no_images(tree)
    empty = [classes[label] for label, images in found.items() if not images]
    if empty:
        raise ValueError(f"the class folder {tree.path(empty[0])} has no images: fill it, or remove it")
    labels = np.repeat(np.asarray([*found], np.int64), [len(images) for images in found.values()])
    return ImageList(tree.listed([image for images in found.values() for image in images]), labels, list(classes))


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a sorting key by which numbers inside names count as numbers: 2 before 10."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def flat_folder(folder: str | Path) -> ImageList:
    """List the images that lie directly in a folder, by name, all with label 0. Raises FileNotFoundError, or ValueError for none."""
    tree = _Tree(folder)
    loose, folders = tree.children("")
    if not loose:
        inside = f"; it has sub-folders ({folders[0]}): give one of them, or use --dataset imagenet" if folders else ""
        raise _no_images(tree, inside)
    if folders:
        tree.left_out["sub-folders"] = len(folders)
    return ImageList(tree.listed(loose))


def nested_folder(folder: str | Path) -> ImageList:
    """List the images at any depth below a folder, all with label 0. Raises FileNotFoundError, or ValueError for none."""
    tree = _Tree(folder)
    found = tree.images("")
    if not found:
        raise _no_images(tree)
    return ImageList(tree.listed(found))


def listed_images(folder: str | Path) -> ImageList:
    """List the images named in `image_paths.json` of a folder, a list of paths relative to it, all with label 0."""
    file = Path(_Tree(folder).path(IMAGE_PATHS_FILE))
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: make it with python tools/openimage_json.py --data-path {folder}")
    try:
        paths = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): make it anew with tools/openimage_json.py") from error
    if not isinstance(paths, list) or not paths or not all(path and isinstance(path, str) for path in paths):
        raise ValueError(f"{file} must hold a list of paths relative to {folder}: make it with tools/openimage_json.py")
    return ImageList(PathList(folder, paths))


def find_images(folder: str | Path) -> list[str]:
    """Return relative paths, with '/', of the images at any depth, by folder, then file name; hidden ones are left out."""
    tree = _Tree(folder)
    found = tree.images("")
    tree.listed(found)
    return found


class _Tree:
    """One reading of a folder: which folders were entered, and what was left out. Paths are relative to it, with '/'."""

    def __init__(self, folder: str | Path):
        self.folder = os.fspath(folder)
        if not os.path.isdir(folder):
            what = "is not a folder" if os.path.exists(folder) else "does not exist"
            raise FileNotFoundError(f"the image folder {folder} {what}: check the path")
        self.left_out: Counter[str] = Counter()
        self._above = set(map(str, Path(os.path.realpath(self.folder)).parents))
        self._entered: dict[str, str] = {}  # real path -> path

    def path(self, place: str) -> str:
        return os.path.join(self.folder, place) if place else self.folder

    def images(self, start: str) -> list[str]:
        """Return the images at any depth below a folder of the tree, by folder, then file name."""
        found, waiting = {}, [start]
        while waiting:
            place = waiting.pop()
            images, folders = self.children(place)
            prefix = f"{place}/" if place else ""
            found[place] = [prefix + name for name in images]
            waiting += [prefix + name for name in folders]
        return [image for place in sorted(found) for image in found[place]]

    def children(self, place: str) -> tuple[list[str], list[str]]:
        """Return the names of the images and of the sub-folders directly in a folder, sorted."""
        images, folders = [], []
        with os.scandir(self._enter(place)) as entries:
            for entry in entries:
                kind, ending = _kind(entry), os.path.splitext(entry.name)[1].lower()
                if entry.name.startswith("."):
                    self.left_out["hidden"] += 1
                elif kind == "folder":
                    folders.append(entry.name)
                elif kind == "dangling" and ending not in IMAGE_EXTENSIONS:
                    target = os.readlink(entry.path)
                    raise ValueError(f"the link {entry.path} leads nowhere (to {target}): mend or remove it")
                elif kind == "special":
                    self.left_out["no regular file"] += 1
                elif ending not in IMAGE_EXTENSIONS:
                    self.left_out[ending or "without an ending"] += 1
                else:
                    images.append(entry.name)
        return sorted(images), sorted(folders)

    def listed(self, found: list[str]) -> PathList:
        """Return the images found as a list of paths, and say in the log what was left out."""
        if self.left_out:
            logger.info("%s: %d images; left out: %s", self.folder, len(found), self.contents())
        return PathList(self.folder, found)

    def contents(self) -> str:
        """Return what was left out, as '3 .heic, 1 hidden'."""
        return ", ".join(f"{count} {what}" for what, count in self.left_out.most_common())

    def _enter(self, place: str) -> str:
        """Return the path of a folder of the tree. Raises ValueError where it was entered by another way."""
        path = self.path(place)
        real = os.path.realpath(path)
        before = self._entered.setdefault(real, path)
        if real in self._above or (before != path and f"{path}/".startswith(f"{before}/")):
            raise ValueError(f"{path} leads back to {real}, a folder above it: remove the link")
        if before != path:
            raise ValueError(f"{before} and {path} are one folder, whose images would be taken twice: remove a link")
        return path


def _kind(entry: os.DirEntry) -> str:
    """Return folder, file, dangling (a link to nothing, or to itself) or special (a pipe, a socket, a device)."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return "dangling"
    return "dangling" if entry.is_symlink() and not os.path.exists(entry.path) else "special"


def _no_images(tree: _Tree, more: str = "") -> ValueError:
    held = f" (in it: {tree.contents()})" if tree.left_out else ""
    return ValueError(
        f"no images in {tree.folder}{held}{more}; their names end in {', '.join(IMAGE_EXTENSIONS[:12])}, …"
    )
