"""Makes the prompt tables that sample_t2i_parti.sh and sample_t2i_coco.sh read, which are not part of this project.

    python3 tools/prompt_tables.py parti                                       # downloads evaluations/t2i/PartiPrompts.tsv
    python3 tools/prompt_tables.py coco --annotations captions_val2014.json    # makes evaluations/t2i/coco_captions.csv

The COCO table has a caption each of 30,000 images of val2014, drawn by --seed: which captions the published figures are of
is not known. Without --annotations COCO's archive is downloaded (241 MB).
"""

import argparse
import csv
import io
import json
import random
import zipfile
from pathlib import Path

from utils.cli import add_flag, flag_parser, nonnegative_int, positive_int, run_script

FOLDER = Path("evaluations/t2i")
TABLES = {"parti": FOLDER / "PartiPrompts.tsv", "coco": FOLDER / "coco_captions.csv"}
PARTI_URL = "https://raw.githubusercontent.com/google-research/parti/main/PartiPrompts.tsv"
COCO_URL = "http://images.cocodataset.org/annotations/annotations_trainval2014.zip"
COCO_MEMBER = "annotations/captions_val2014.json"


def main(args: argparse.Namespace) -> None:
    from language.prompts import read_prompt_table
    from utils.download import download
    from utils.files import atomic_write

    output = Path(args.output or TABLES[args.table])
    if args.table == "parti":
        download(PARTI_URL, output, "PartiPrompts")
    else:
        source = args.annotations or download(COCO_URL, FOLDER / "annotations_trainval2014.zip", "COCO's annotations")
        captions = captions_of_images(read_annotations(Path(source)), args.count, args.seed)
        text = io.StringIO()
        rows = csv.writer(text, delimiter="\t", lineterminator="\n")
        rows.writerows([("Prompt", "image_id"), *((caption, image) for image, caption in captions)])
        with atomic_write(output) as f:
            f.write(text.getvalue().encode())
    print(f"{output}: {len(read_prompt_table(output))} prompts")


def read_annotations(path: Path) -> list[dict]:
    """Return the captions of a COCO annotation file, as JSON or in COCO's zip: `image_id`, `id`, `caption`.

    Raises FileNotFoundError, and ValueError for a file that is neither.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give --annotations captions_val2014.json, or leave it out")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                content = archive.read(COCO_MEMBER)
        else:
            content = path.read_bytes()
        annotations = json.loads(content)["annotations"]
        return sorted(annotations, key=lambda one: (one["image_id"], one["id"], one["caption"]))
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} has no captions of COCO ({error!r}): give captions_val2014.json") from error


def captions_of_images(annotations: list[dict], count: int, seed: int) -> list[tuple[int, str]]:
    """Return (image, its first caption) of `count` images drawn by `seed`, or of all where there are fewer, by image."""
    first: dict[int, str] = {}
    for one in annotations:
        caption = " ".join(one["caption"].split())
        if caption:
            first.setdefault(one["image_id"], caption)
    if count < len(first):
        chosen = sorted(random.Random(seed).sample(list(first), count))
        first = {image: first[image] for image in chosen}
    return list(first.items())


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("table", choices=list(TABLES), help="which table")
    parser.add_argument("--output", default=None, help="where it goes (default: where the sampling scripts look)")
    help = "coco: captions_val2014.json or the zip that holds it (default: downloaded)"
    add_flag(parser, "--annotations", None, None, help)
    parser.add_argument("--count", type=positive_int, default=30000, help="coco: images, a caption each")
    parser.add_argument("--seed", type=nonnegative_int, default=0, help="coco: of the draw of images")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
