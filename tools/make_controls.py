"""Writes the control images of a folder of codes, for `--control-path` of training: edges, or maps that you have.

    python3 tools/make_controls.py --code-path codes --data-path images --output controls
    python3 tools/make_controls.py --code-path codes --data-path images --map-path depth_maps --output depths

Edges are drawn in each view of the images that the codes are of. Of image-text pairs (train_t2i.py) a folder is written for each
file, as there is one of codes. A map is a picture at the same place in --map-path as the image in --data-path; it is cropped
and mirrored as the image was.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import flag_parser, run_script

if TYPE_CHECKING:
    from dataset.code_files import CodeSettings, ShardFolder


def main(args: argparse.Namespace) -> None:
    from dataset.codes import open_codes

    code_path, output = Path(args.code_path), Path(args.output)
    if any(code_path.glob("*/index.json")):  # of pairs, a folder for each file
        for stem, image_file in pair_images(args).items():
            write_controls(args, open_codes(code_path / stem).sources[0], image_file, output / stem)
        return
    codes = open_codes(code_path).sources[0]
    if codes.settings is None:
        raise ValueError(f"{args.code_path} does not record its images: extract the codes again, packed")
    write_controls(args, codes, class_images(args, codes.settings), output)


def class_images(args: argparse.Namespace, settings: "CodeSettings") -> Callable[[int], Any]:
    """Return a function that gives the path of an image by its number. Raises ValueError for other images than the codes'."""
    from dataset.image_build import image_dataset
    from dataset.pixels import Reading

    asked = argparse.Namespace(dataset=settings.dataset, data_path=args.data_path)
    by_class = {"classes": settings.classes} if settings.classes else {}
    reading = Reading.recorded(settings.extra)
    lists = (image_dataset(asked, **by_class, order=order, reading=reading).images for order in ("natural", "text"))
    images = next((each for each in lists if settings.images in (None, each.identity())), None)
    if images is None:
        raise ValueError(f"--data-path {args.data_path} has other images than {args.code_path} was extracted from")
    return images.paths.__getitem__


def pair_images(args: argparse.Namespace) -> dict[str, Callable[[int], Any]]:
    """Return for each file of pairs that has codes a function that gives the image of a line.

    Raises ValueError for codes of other lines, of none of the files, and for maps of images in tar shards.
    """
    from dataset.lines import ImageLines, compare_lines
    from dataset.sources import open_pairs
    from dataset.webdataset import TarPairs

    pairs = open_pairs(args.data_path)
    if args.map_path and isinstance(pairs, TarPairs):
        raise ValueError(f"--map-path is for images in files, and {args.data_path} has tar shards: use write_arrays")
    lines, found = ImageLines(pairs), {}
    for k, (stem, _) in enumerate(pairs.files):
        if (folder := Path(args.code_path, stem)).is_dir():
            compare_lines(folder, lines, k)
            found[stem] = lambda line, start=lines.starts[k]: pairs.image_file(start + line)
    if not found:
        raise ValueError(
            f"{args.code_path} has no folder of codes of {pairs.files[0][0]} or another file of --data-path"
        )
    return found


def write_controls(
    args: argparse.Namespace, codes: "ShardFolder", image_file: Callable[[int], Any], output: Path
) -> None:
    """Write the control image of each view that a folder has codes of. image_file: gives an image's file by its number."""
    import tempfile

    import numpy as np
    import torch

    from autoregressive.models.canny import canny
    from dataset.arrays import write_arrays
    from dataset.augmentation import code_views
    from dataset.pixels import Reading, load_rgb

    settings = codes.settings
    reading = Reading.recorded(settings.extra)
    crops = {"ten_crop": len(settings.views) > 2, "crop_range": settings.crop_range or 1.1}

    def control(number: int) -> np.ndarray:
        file = image_file(number)
        if args.map_path:
            file = map_of(Path(file), args.data_path, args.map_path)
        views = code_views(
            load_rgb(file, reading), settings.image_size, **crops, flip=len(settings.views) not in (1, 5)
        )
        pixels = ((torch.stack(views) + 1) * 127.5).round().to(torch.uint8)
        return (pixels if args.map_path else canny(pixels)).numpy()

    first = control(int(codes.numbers[0]))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=output.parent, suffix=".npy") as file:
        arrays = np.memmap(file.name, np.uint8, "w+", shape=(len(codes.numbers), *first.shape))
        for row, number in enumerate(codes.numbers):
            arrays[row] = control(int(number))
        alone = len(settings.views) == 1
        write_arrays(output, "control", arrays[:, 0] if alone else arrays, of=codes.folder, views=settings.views)
    print(f"{output}: {len(arrays)} control images of {settings.image_size} pixels, {len(settings.views)} views")


def map_of(image: Path, images: str, maps: str) -> Path:
    """Return the map of an image: the file of its name, whatever its suffix. Raises FileNotFoundError."""
    place = image.parent.absolute().relative_to(Path(images).absolute())
    found = sorted((Path(maps) / place).glob(f"{image.stem}.*"))
    if not found:
        raise FileNotFoundError(f"--map-path {maps} has no {place / image.stem}.png for the image {image}")
    return found[0]


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--code-path", required=True, help="folder of packed codes, of images or of pairs")
    parser.add_argument("--data-path", required=True, help="the images or pairs that they were extracted from")
    help = "pictures to take as control images, such as depth maps, at the images' places; without it edges are drawn"
    parser.add_argument("--map-path", default=None, help=help)
    parser.add_argument("--output", required=True, help="folder to write the control images to")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
