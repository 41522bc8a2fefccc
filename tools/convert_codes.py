"""Converts extracted codes between packed shards and the published layout of one small file per image.

    python tools/convert_codes.py --from imagenet_code_c2i_flip --to imagenet_code_c2i_flip_packed --image-size 256
    python tools/convert_codes.py --from maskgitvq.jsonl --to maskgitvq_packed --image-size 256 --codebook-size 1024

The layout of `--from` is recognised and `--to` gets the other one. RAR's published codes, a .jsonl file with
{"class_id": 207, "tokens": [256 numbers]} a line, become packed shards with one view a line, and LPD's, class folders of .npz files, such with
two. A stopped conversion resumes where it was; what is
already in `--to` is compared with the source, and refused where it differs.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from utils.cli import flag_parser, positive_int, run_script


def published_to_packed(
    source: str | Path,
    target: str | Path,
    image_size: int,
    codebook_size: int | None = None,
    num_classes: int | None = None,
    vq_model: str | None = None,
    shard_size: int = 4096,
) -> None:
    """Write packed shards of the codes in the published layout; numbers without a file count as skipped.

    What the source records (tokenizer, classes, …) is kept; the arguments stand for what it does not record.
    Raises FileNotFoundError and ValueError as PublishedFolder and CodeWriter do, and ValueError where a shard that is
    already there is not of this source.
    """
    import numpy as np
    from tqdm import tqdm

    from dataset.code_files import CodeSettings, CodeWriter, PublishedFolder

    published = PublishedFolder(source, image_size)
    given = {"codebook_size": codebook_size, "num_classes": num_classes, "vq_model": vq_model}
    settings = published.settings or CodeSettings(
        dataset="imagenet",
        image_size=image_size,
        tokens=published.tokens,
        views=published.view_names,
        num_images=int(published.numbers[-1]) + 1,
        **{**given, "codebook_size": codebook_size or 16384},
    )
    for name, value in given.items():
        if value not in (None, getattr(settings, name)):
            raise ValueError(f"{source} records {name} {getattr(settings, name)}, not {value}: leave the flag out")
    writer = CodeWriter(target, replace(settings, shard_size=shard_size, made_by="tools/convert_codes.py"))
    missing = set(writer.missing_shards())
    for shard in tqdm(range(writer.settings.num_shards), unit="shard"):
        images = writer.settings.images_of(shard)
        positions = np.arange(*np.searchsorted(published.numbers, [images.start, images.stop]))
        indices, labels = published.numbers[positions], published.labels(positions)
        # Of a shard that is there the first sample is compared: reading all small files would be a second conversion.
        read = positions if shard in missing else positions[:1]
        codes = np.zeros((len(read), len(settings.views), settings.tokens), np.int64)
        for row, position in enumerate(read):
            codes[row] = published.all_views(position)
        if shard in missing:
            writer.write_shard(shard, codes, labels, indices, np.setdiff1d(images, indices).tolist())
            continue
        there, labels_there, indices_there = writer.read_shard(shard)
        pairs = ((indices_there, indices), (labels_there[:1], labels[:1]), (there[:1], codes))
        if not all(np.array_equal(one, other) for one, other in pairs):
            raise ValueError(f"shard {shard} in {target} is not of the codes in {source}: use another folder")


def lines_to_packed(
    source: str | Path,
    target: str | Path,
    image_size: int,
    codebook_size: int | None = None,
    num_classes: int | None = None,
    vq_model: str | None = None,
    shard_size: int = 4096,
) -> None:
    """Write packed shards of a .jsonl file, a sample of one view for each line.

    Raises ValueError for a line that is no sample of as many tokens as the first, or where a shard that is already there is
    not of this file.
    """
    import numpy as np

    def read(images: range) -> tuple[np.ndarray, np.ndarray]:
        nonlocal at
        lines = list(islice(file, images.start - at, images.stop - at))
        at = images.stop
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
        sizes = {"tokens": tokens, "views": ["view_0"], "num_images": count, "image_size": image_size}
        sizes |= {"codebook_size": codebook_size or 16384, "num_classes": num_classes}
        _write_packed(source, target, read, vq_model=vq_model, shard_size=shard_size, **sizes)


def archives_to_packed(
    source: str | Path,
    target: str | Path,
    image_size: int,
    codebook_size: int | None = None,
    num_classes: int | None = None,
    vq_model: str | None = None,
    shard_size: int = 4096,
) -> None:
    """Write packed shards of LPD's codes: class folders with an .npz of `indices` and `indices_flip` for each image.

    Raises ValueError for a file without these, or where a shard that is already there is not of this folder.
    """
    import numpy as np

    from dataset.augmentation import FLIP_VIEWS

    names = sorted(folder.name for folder in Path(source).iterdir() if folder.is_dir())
    files = [(file, label) for label, name in enumerate(names) for file in sorted(Path(source, name).glob("*.npz"))]

    def codes_of(file: Path) -> np.ndarray:
        try:
            with np.load(file) as archive:
                return np.stack([archive[name].ravel() for name in ("indices", "indices_flip")]).astype(np.int64)
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(f"{file} has no indices and indices_flip of one length: {error}") from error

    def read(images: range) -> tuple[np.ndarray, np.ndarray]:
        found = [codes_of(file) for file, _ in files[images.start : images.stop]]
        return np.stack(found), np.array([label for _, label in files[images.start : images.stop]])

    sizes = {"tokens": codes_of(files[0][0]).shape[1], "views": list(FLIP_VIEWS), "num_images": len(files)}
    sizes |= {
        "codebook_size": codebook_size or 16384,
        "num_classes": num_classes or len(names),
        "image_size": image_size,
    }
    _write_packed(source, target, read, classes=names, vq_model=vq_model, shard_size=shard_size, **sizes)


def _write_packed(
    source: str | Path, target: str | Path, read: Callable[[range], tuple[Any, Any]], **settings: Any
) -> None:
    """Write the shards that are missing, of codes and labels that `read` returns of some images, and compare the others."""
    import numpy as np
    from tqdm import tqdm

    from dataset.code_files import CodeSettings, CodeWriter

    writer = CodeWriter(target, CodeSettings(dataset="imagenet", made_by="tools/convert_codes.py", **settings))
    missing = set(writer.missing_shards())
    for shard in tqdm(range(writer.settings.num_shards), unit="shard"):
        images = writer.settings.images_of(shard)
        if shard in missing:
            writer.write_shard(shard, *read(images), np.asarray(images))
            continue
        there, labels_there, _ = writer.read_shard(shard)
        first, label = read(images[:1])
        if not (np.array_equal(there[:1], first) and labels_there[0] == label[0]):
            raise ValueError(f"shard {shard} in {target} is not of the codes in {source}: use another folder")


def packed_to_published(source: str | Path, target: str | Path, image_size: int) -> None:
    """Write the published layout of packed shards; the files are numbered by data set index.

    Raises FileNotFoundError and ValueError as ShardFolder and its `verify` do, and ValueError where the codes are of
    another image size or the target holds other samples.
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
            raise ValueError(
                f"{folder} holds {len(foreign)} samples that {source} has not ({foreign[0]}.npy): use another folder"
            )
    settings = replace(packed.settings, shard_size=code_files.SHARD_SIZE)
    code_files.record_settings(target, settings, code_files.published_record(image_size))
    whole = set(np.intersect1d(*present).tolist())
    for part in tqdm(packed.parts(), unit="shard"):
        for codes, label, i in zip(*(array.tolist() if array.ndim == 1 else array for array in part), strict=True):
            if i not in whole:
                code_files.write_published(target, image_size, i, codes, label)
                continue
            for folder, expected in zip(folders, (codes[None], np.asarray([label]))):
                if not np.array_equal(np.load(folder / f"{i}.npy"), expected):
                    raise ValueError(f"{folder / f'{i}.npy'} differs from the packed codes: use another folder")


def main(args: argparse.Namespace) -> None:
    """Converts in the direction that `args.source` asks for. Raises ValueError where it holds no codes."""
    from dataset.code_files import published_sizes
    from dataset.store import INDEX_FILE

    source, target = Path(args.source), Path(args.target)
    given = args.image_size, args.codebook_size, args.num_classes, args.vq_model, args.shard_size
    if source.is_file() and source.suffix == ".jsonl":
        lines_to_packed(source, target, *given)
        print(f"{target} holds the codes of {source}")
        return
    if not source.is_dir():
        raise FileNotFoundError(f"the code folder {source} does not exist: check --from")
    if target.exists() and target.samefile(source):
        raise ValueError(f"--from and --to are the same folder {source}: give another one to write to")
    if (source / INDEX_FILE).exists():
        packed_to_published(source, target, args.image_size)
    elif sizes := published_sizes(source):
        if args.image_size not in sizes:
            there = ", ".join(map(str, sizes))
            raise ValueError(f"{source} holds codes of --image-size {there}, not {args.image_size}")
        published_to_packed(source, target, *given)
    elif next(source.glob("*/*.npz"), None):
        archives_to_packed(source, target, *given)
    else:
        raise ValueError(f"{source} holds no codes: neither {INDEX_FILE} nor imagenet{args.image_size}_codes/")
    print(f"{target} holds the codes of {source}")


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument(
        "--from", dest="source", required=True, help="folder of codes in either layout, or a .jsonl file of them"
    )
    parser.add_argument("--to", dest="target", required=True, help="folder that gets the other layout")
    parser.add_argument("--image-size", type=positive_int, required=True, help="pixels, as given at extraction")
    help = "to packed: noted in the index (default: what --from records, or 16384)"
    parser.add_argument("--codebook-size", type=positive_int, default=None, help=help)
    help = "to packed: noted in the index (default: what --from records)"
    parser.add_argument("--num-classes", type=positive_int, default=None, help=help)
    parser.add_argument("--vq-model", default=None, help=help)
    parser.add_argument("--shard-size", type=positive_int, default=4096, help="to packed: images per shard")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
