"""Converts extracted codes between packed shards and the published layout of one small file per image.

    python tools/convert_codes.py --from imagenet_code_c2i_flip --to imagenet_code_c2i_flip_packed --image-size 256
    python tools/convert_codes.py --from maskgitvq.jsonl --to maskgitvq_packed --image-size 256 --codebook-size 1024

The layout of `--from` is recognised and `--to` gets the other one. RAR's published codes, a .jsonl file with
{"class_id": 207, "tokens": [256 numbers]} a line, become packed shards with one view a line, and LPD's, class folders of
.npz files, such with two. A stopped conversion resumes where it was; what is already in `--to` is compared with the
source, and refused where it differs.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.cli import add_flag, flag_parser, positive_int, run_script

if TYPE_CHECKING:
    import numpy as np

    from dataset.code_files import CodeSettings

MADE_BY = "tools/convert_codes.py"
DEFAULT_CODES = 16384


def published_to_packed(source: Path, target: Path, image_size: int, shard_size: int = 4096, **known: Any) -> None:
    """Write packed shards of the codes in the published layout; numbers without a file count as skipped.

    known: codebook_size, num_classes and vq_model, as far as the source does not record them.
    Raises ValueError where it records others, and as `pack` does.
    """
    import numpy as np

    from dataset.code_files import CodeSettings, PublishedFolder

    published, known = PublishedFolder(source, image_size), _given(known)
    settings = published.settings or CodeSettings(
        dataset="imagenet",
        image_size=image_size,
        tokens=published.tokens,
        views=published.view_names,
        num_images=int(published.numbers[-1]) + 1,
        **{"codebook_size": DEFAULT_CODES} | known,
    )
    for name, value in known.items():
        if value != getattr(settings, name):
            raise ValueError(f"{source} records {name} {getattr(settings, name)}, not {value}: leave the flag out")

    def read(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positions = np.searchsorted(published.numbers, images)
        codes = [published.all_views(position) for position in positions]
        return np.reshape(codes, (-1, len(settings.views), settings.tokens)), published.labels(positions)

    pack(source, target, replace(settings, shard_size=shard_size, made_by=MADE_BY), read, published.numbers)


def lines_to_packed(source: Path, target: Path, image_size: int, shard_size: int = 4096, **known: Any) -> None:
    """Write packed shards of a .jsonl file, a sample of one view for each line. known: as of `published_to_packed`.

    Raises ValueError for a line that is no sample of as many tokens as the first, and as `pack` does.
    """
    import numpy as np

    from dataset.code_files import CodeSettings

    def read(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal at
        lines = list(islice(file, images[0] - at, images[-1] + 1 - at))
        at = images[-1] + 1
        codes, labels = np.empty((len(lines), 1, tokens), np.int64), np.empty(len(lines), np.int64)
        for row, line in enumerate(lines):
            try:
                sample = json.loads(line)
                codes[row, 0], labels[row] = sample["tokens"], sample["class_id"]
            except (ValueError, TypeError, LookupError) as error:
                wanted = f'{{"class_id": …, "tokens": [{tokens} numbers]}}'
                raise ValueError(f"{source}, line {images[row] + 1} is not {wanted}: {error}") from error
        return codes, labels

    with open(source, encoding="utf-8") as file:
        count = sum(1 for _ in file)
    with open(source, encoding="utf-8") as file:
        tokens, at = len(json.loads(file.readline() or "{}").get("tokens", ())), 0
        if not tokens:
            raise ValueError(f'{source} does not begin with a line of codes, {{"class_id": …, "tokens": […]}}')
        file.seek(0)
        sizes = {"tokens": tokens, "views": ["view_0"], "num_images": count, "codebook_size": DEFAULT_CODES}
        made = {"dataset": "imagenet", "made_by": MADE_BY, "image_size": image_size, "shard_size": shard_size}
        pack(source, target, CodeSettings(**made | sizes | _given(known)), read)


def archives_to_packed(source: Path, target: Path, image_size: int, shard_size: int = 4096, **known: Any) -> None:
    """Write packed shards of LPD's codes: class folders with an .npz of `indices` and `indices_flip` for each image.

    known: as of `published_to_packed`. Raises ValueError for a file without these, and as `pack` does.
    """
    import numpy as np

    from dataset.augmentation import FLIP_VIEWS
    from dataset.code_files import CodeSettings

    names = sorted(folder.name for folder in Path(source).iterdir() if folder.is_dir())
    files = [(file, label) for label, name in enumerate(names) for file in sorted(Path(source, name).glob("*.npz"))]

    def codes_of(file: Path) -> np.ndarray:
        try:
            with np.load(file) as archive:
                return np.stack([archive[name].ravel() for name in ("indices", "indices_flip")]).astype(np.int64)
        except (ValueError, KeyError, OSError, EOFError) as error:
            raise ValueError(f"{file} has no indices and indices_flip of one length: {error}") from error

    def read(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chosen = [files[image] for image in images]
        return np.stack([codes_of(file) for file, _ in chosen]), np.array([label for _, label in chosen])

    sizes = {"tokens": codes_of(files[0][0]).shape[1], "views": list(FLIP_VIEWS), "num_images": len(files)}
    made = {"dataset": "imagenet", "made_by": MADE_BY, "image_size": image_size, "shard_size": shard_size}
    classes = {"classes": names, "num_classes": len(names), "codebook_size": DEFAULT_CODES}
    pack(source, target, CodeSettings(**made | sizes | classes | _given(known)), read)


def _given(known: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in known.items() if value is not None}


def pack(
    source: str | Path,
    target: str | Path,
    settings: "CodeSettings",
    read: "Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]",
    numbers: "np.ndarray | None" = None,
) -> None:
    """Write the shards that are missing, and compare the first image of the others.

    Args:
        read: returns codes (n, views, tokens) and labels (n,) of images by their numbers.
        numbers: of the images that are there (default: all).

    Raises ValueError as CodeWriter does, and where a shard that is already there is not of this source.
    """
    import numpy as np
    from tqdm import tqdm

    from dataset.code_files import CodeWriter

    writer = CodeWriter(target, settings)
    missing, numbers = set(writer.missing_shards()), np.arange(settings.num_images) if numbers is None else numbers
    for shard in tqdm(range(settings.num_shards), unit="shard"):
        images = settings.images_of(shard)
        present = numbers[slice(*np.searchsorted(numbers, [images.start, images.stop]))]
        if shard in missing:
            writer.write_shard(shard, *read(present), present, np.setdiff1d(images, present).tolist())
            continue
        # Reading all small files would be a second conversion.
        codes, labels, there = writer.read_shard(shard)
        first = zip((codes[:1], labels[:1]), read(present[:1]), strict=True) if len(present) else ()
        if not (np.array_equal(there, present) and all(np.array_equal(one, other) for one, other in first)):
            raise ValueError(f"shard {shard} in {target} is not of the codes in {source}: use another folder")


def packed_to_published(source: str | Path, target: str | Path, image_size: int) -> None:
    """Write the published layout of packed shards; the files are numbered by data set index.

    Raises ValueError as ShardFolder and its `verify` do, where the codes are of another image size, and where the target
    holds other samples.
    """
    import numpy as np
    from tqdm import tqdm

    from dataset import code_files
    from dataset.store import Loose

    packed = code_files.ShardFolder(source)
    if packed.settings.image_size != image_size:
        raise ValueError(f"{source} holds codes of --image-size {packed.settings.image_size}, not {image_size}")
    packed.verify()
    folders = code_files.published_folders(target, image_size)
    present = [Loose(folder, "integers", ()).numbers for folder in folders]
    for folder, numbers in zip(folders, present):
        foreign = np.setdiff1d(numbers, packed.numbers)
        if len(foreign):
            found = f"{folder} holds {len(foreign)} samples that {source} has not ({foreign[0]}.npy)"
            raise ValueError(f"{found}: use another folder")
    settings = replace(packed.settings, shard_size=code_files.SHARD_SIZE)
    code_files.record_settings(target, settings, code_files.published_record(image_size))
    whole = set(np.intersect1d(*present).tolist())
    for all_codes, labels, numbers in tqdm(packed.parts(), unit="shard"):
        for codes, label, i in zip(all_codes, labels.tolist(), numbers.tolist(), strict=True):
            if i not in whole:
                code_files.write_published(target, image_size, i, codes, label)
                continue
            for folder, expected in zip(folders, (codes[None], np.asarray([label]))):
                if not np.array_equal(np.load(folder / f"{i}.npy"), expected):
                    raise ValueError(f"{folder / f'{i}.npy'} differs from the packed codes: use another folder")


def main(args: argparse.Namespace) -> None:
    from dataset.code_files import published_sizes
    from dataset.store import INDEX_FILE

    source, target = Path(args.source), Path(args.target)
    known = {name: getattr(args, name) for name in ("shard_size", "codebook_size", "num_classes", "vq_model")}
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"--from and --to are the same folder {source}: give another one to write to")
    if source.is_file() and source.suffix == ".jsonl":
        lines_to_packed(source, target, args.image_size, **known)
    elif not source.is_dir():
        raise FileNotFoundError(f"the code folder {source} does not exist: check --from")
    elif (source / INDEX_FILE).exists():
        packed_to_published(source, target, args.image_size)
    elif sizes := published_sizes(source):
        if args.image_size not in sizes:
            there = ", ".join(map(str, sizes))
            raise ValueError(f"{source} holds codes of --image-size {there}, not {args.image_size}")
        published_to_packed(source, target, args.image_size, **known)
    elif next(source.glob("*/*.npz"), None):
        archives_to_packed(source, target, args.image_size, **known)
    else:
        raise ValueError(f"{source} holds no codes: neither {INDEX_FILE} nor imagenet{args.image_size}_codes/")
    print(f"{target} holds the codes of {source}")


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    parser = flag_parser(__doc__)
    help = "folder of codes in either layout, or a .jsonl file of them"
    parser.add_argument("--from", dest="source", required=True, help=help)
    parser.add_argument("--to", dest="target", required=True, help="folder that gets the other layout")
    add_flag(parser, "--image-size", positive_int, None, "pixels, as given at extraction", required=True)
    help = "to packed: noted in the index (default: what --from records, or 16384)"
    add_flag(parser, "--codebook-size", positive_int, None, help)
    help = "to packed: noted in the index (default: what --from records)"
    add_flag(parser, "--num-classes", positive_int, None, help)
    add_flag(parser, "--vq-model", None, None, help)
    add_flag(parser, "--shard-size", positive_int, 4096, "to packed: images per shard")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
