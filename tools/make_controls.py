"""Writes the control images of a folder of codes, for `--control-path` of train_c2i.py: edges, or maps that you have.

    python3 tools/make_controls.py --code-path codes --data-path images --output controls
    python3 tools/make_controls.py --code-path codes --data-path images --map-path depth_maps --output depths

Edges are drawn in each view of the images that the codes are of. A map is a picture at the same place in --map-path as the
image in --data-path; it is cropped and mirrored as the image was.
"""

import argparse
from pathlib import Path

from utils.cli import flag_parser, run_script


def main(args: argparse.Namespace) -> None:
    import tempfile

    import numpy as np
    import torch

    from autoregressive.models.canny import canny
    from dataset.arrays import write_arrays
    from dataset.augmentation import code_views
    from dataset.codes import open_codes
    from dataset.image_build import image_dataset
    from dataset.pixels import Reading, load_rgb

    codes = open_codes(args.code_path).sources[0]
    settings = codes.settings
    if settings is None:
        raise ValueError(f"{args.code_path} does not record its images: extract the codes again, packed")
    reading = Reading.recorded(settings.extra)
    asked = argparse.Namespace(dataset=settings.dataset, data_path=args.data_path)
    by_class = {"classes": settings.classes} if settings.classes else {}
    lists = (image_dataset(asked, **by_class, order=order, reading=reading).images for order in ("natural", "text"))
    images = next((each for each in lists if settings.images in (None, each.identity())), None)
    if images is None:
        raise ValueError(f"--data-path {args.data_path} has other images than {args.code_path} was extracted from")
    crops = {"ten_crop": len(settings.views) > 2, "crop_range": settings.crop_range or 1.1}

    def control(number: int) -> np.ndarray:
        path = Path(images.paths[number])
        if args.map_path:
            path = map_of(path, args.data_path, args.map_path)
        views = code_views(
            load_rgb(path, reading), settings.image_size, **crops, flip=len(settings.views) not in (1, 5)
        )
        pixels = ((torch.stack(views) + 1) * 127.5).round().to(torch.uint8)
        return (pixels if args.map_path else canny(pixels)).numpy()

    first = control(int(codes.numbers[0]))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=Path(args.output).parent, suffix=".npy") as file:
        arrays = np.memmap(file.name, np.uint8, "w+", shape=(len(codes.numbers), *first.shape))
        for row, number in enumerate(codes.numbers):
            arrays[row] = control(int(number))
        alone = len(settings.views) == 1
        write_arrays(args.output, "control", arrays[:, 0] if alone else arrays, of=args.code_path, views=settings.views)
    print(f"{args.output}: {len(arrays)} control images of {settings.image_size} pixels, {len(settings.views)} views")


def map_of(image: Path, images: str, maps: str) -> Path:
    """Return the map of an image: the file of its name, whatever its suffix. Raises FileNotFoundError."""
    place = image.parent.absolute().relative_to(Path(images).absolute())
    found = sorted((Path(maps) / place).glob(f"{image.stem}.*"))
    if not found:
        raise FileNotFoundError(f"--map-path {maps} has no {place / image.stem}.png for the image {image}")
    return found[0]


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--code-path", required=True, help="folder of packed codes of class folders")
    parser.add_argument("--data-path", required=True, help="the images that they were extracted from")
    help = "pictures to take as control images, such as depth maps, at the images' places; without it edges are drawn"
    parser.add_argument("--map-path", default=None, help=help)
    parser.add_argument("--output", required=True, help="folder to write the control images to")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
