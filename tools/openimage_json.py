"""Lists the images below a folder in its `image_paths.json`, which `--dataset openimage` reads.

    python3 tools/openimage_json.py --data-path open_images/train

The list is in natural order: img2.jpg before img10.jpg.
"""

import argparse
from pathlib import Path

from utils.cli import flag_parser, run_script


def list_images(data_path: str | Path) -> list[str]:
    """Relative paths of the images at any depth below a folder, in natural order, with '/'.

    Raises FileNotFoundError where the folder is missing, ValueError where it holds no images.
    """
    from dataset.folders import natural_key, nested_folder

    paths = nested_folder(data_path).paths
    return sorted(map(paths.relative, range(len(paths))), key=natural_key)


def main(args: argparse.Namespace) -> None:
    """Writes the list into the folder. Raises as `list_images` does."""
    from dataset.folders import IMAGE_PATHS_FILE
    from utils.files import write_json
    from utils.logger import console_logger

    console_logger("dataset")
    paths = list_images(args.data_path)
    file = Path(args.data_path) / IMAGE_PATHS_FILE
    write_json(file, paths)
    print(f"{len(paths)} images listed in {file}")


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--data-path", required=True, help="folder with images at any depth")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
