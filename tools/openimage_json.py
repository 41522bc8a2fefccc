"""Lists the images below a folder in its `image_paths.json`, which `--dataset openimage` reads.

    python3 tools/openimage_json.py --data-path open_images/train

The list is in natural order: img2.jpg before img10.jpg.
"""

import argparse
from pathlib import Path

from utils.cli import flag_parser, run_script


def main(args: argparse.Namespace) -> None:
    from dataset.folders import IMAGE_PATHS_FILE, natural_key, nested_folder
    from utils.files import write_json
    from utils.logger import console_logger

    console_logger("dataset")
    found = nested_folder(args.data_path).paths
    paths = sorted(map(found.relative, range(len(found))), key=natural_key)
    file = Path(args.data_path) / IMAGE_PATHS_FILE
    write_json(file, paths)
    print(f"{len(paths)} images listed in {file}")


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--data-path", required=True, help="folder with images at any depth")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
