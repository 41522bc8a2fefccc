"""CLIP score and FID of images drawn from captions.

    python3 evaluations/t2i/evaluation.py --fake_dir samples_coco/GPT-XL-… --ref_dir /path/to/coco --how_many 30000

--fake_dir holds images/ and captions.txt, the caption of each image in natural order, a line each, as sample_t2i_ddp.py
writes them; --ref_dir the photographs they are compared with, COCO's val2014, or the .npz that --save_statistics made of
them. Every image is cut to its centre square and resized to --eval_res. The figures go to score.txt, and with the whole
protocol to score.json, in --fake_dir. Under torchrun each process reads a share.
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from evaluations.report import Report, add_evaluation_flags, open_backend, sample_settings, versions
from utils.cli import add_switch, flag_parser, positive_int, run_script

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from evaluations.features import Features
    from evaluations.report import Inception
    from evaluations.t2i.clip import CLIP
    from evaluations.t2i.images import SquareImages
    from evaluations.t2i.reference import RecordedReference
    from utils.distributed import Distributed

PUBLISHED_IMAGES, PUBLISHED_SIZE, COCO_IMAGES = 30_000, 256, 40_504
COCO = "val2014"
ANY_TYPE = "train/valid/test"
INCEPTION_SIZE = 299


def main(args: argparse.Namespace) -> None:
    import os

    from dataset.pixels import Reading
    from evaluations.features import read_features
    from evaluations.judgement import same_images
    from evaluations.t2i.clip import find_clip, load_clip
    from evaluations.t2i.images import generated_images
    from evaluations.t2i.reference import save_reference
    from utils.distributed import start
    from utils.logger import console_logger

    check_flags(args)
    folder = fake_folder(args)
    report = Report((args.output or f"{folder}/score").removesuffix(".txt"), args.strict)
    console_logger("dataset", os.environ.get("RANK", "0") == "0")
    fakes = generated_images(folder / "images", args.eval_res, args.how_many, Reading.of(args))
    captions = read_captions(folder, fakes) if args.clip else []
    reference = open_reference(args) if args.fid else None
    require_enough(fakes, reference)
    clip_folder = find_clip(args.clip_model4eval, args.clip_path) if args.clip else None
    report.warn(judge(fakes, captions, reference, args))  # before models are read
    dist = start(args.device)
    with dist.main_first():
        backend = open_backend(args, dist) if args.fid else None
        clip = load_clip(clip_folder, dist.device) if args.clip else None
    if args.fid:
        require_fitting(reference, backend)
    if args.clip:
        report.warn(another_clip(clip, args.clip_model4eval))
    if dist.is_main:
        report.print_inputs(described(fakes, captions, reference, clip, backend))

    inception = inception_features(backend, args.inception_resize) if args.fid else None

    def extract(batch: "np.ndarray") -> "tuple[np.ndarray, ...]":
        seen_by_clip = (clip.images(batch),) if args.clip else ()
        return (*seen_by_clip, inception(batch)) if args.fid else seen_by_clip

    drawn = read_features(fakes, extract, dist, batch_size=args.batch_size, keep=args.clip, name="generated images")
    texts, cut = embed(captions, clip, args.batch_size, dist) if args.clip else (None, 0)
    seen = reference_features(reference, inception, args, dist) if args.fid else None
    late = []
    if dist.is_main:
        if args.save_statistics:
            save_reference(args.save_statistics, seen.statistics[0], reference_protocol(args, reference, backend))
            print(f"wrote {args.save_statistics}: give it as --ref_dir next time")
        late = drawn.inspection.warnings("generated images", fakes.lossy)
        if cut:
            late.append(f"{cut:,} captions are longer than CLIP's {clip.length} tokens: their ends were not read")
        figures = compare(drawn, texts, seen, args)
        if args.fid:
            scale = sum(float(one.covariance.trace()) for one in (seen.statistics[0], drawn.statistics[-1]))
            late += same_images(seen.inspection, drawn.inspection, figures["fid"], scale)
        report.warnings += late
        titles = {"clip_score": "CLIP score", "fid": f"FID_{args.eval_res}px"}
        report.write(figures, titles, protocol(args, fakes, captions, reference, clip, backend, dist))
    dist.close()
    report.warn(late, late=True)


def check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that exclude each other."""
    if not (args.clip or args.fid):
        raise ValueError("--no-clip and --no-fid leave nothing to compute: give one of them")
    if args.save_statistics and not args.fid:
        raise ValueError("--save_statistics keeps what FID knows of the reference: leave --no-fid out")
    if args.save_statistics and not args.save_statistics.endswith(".npz"):
        raise ValueError(f"--save_statistics {args.save_statistics} must end in .npz: --ref_dir knows such files by it")
    if args.save_statistics and args.ref_dir.endswith(".npz"):
        raise ValueError(f"--ref_dir {args.ref_dir} has statistics already: --save_statistics makes them of a folder")


def fake_folder(args: argparse.Namespace) -> "Path":
    """--fake_dir, once it has images/. Raises FileNotFoundError that says what it has instead."""
    from pathlib import Path

    folder = Path(args.fake_dir).expanduser()
    if folder.is_dir() and not (folder / "images").is_dir():
        inside = sorted(child.name for child in folder.iterdir() if (child / "images").is_dir())
        hint = f"it has {folder / inside[0]}, which does" if inside else "give the folder that sample_t2i_ddp.py wrote"
        if folder.absolute().name == "images":
            hint = f"give {folder.absolute().parent}, the folder that holds it"
        raise FileNotFoundError(f"--fake_dir {folder} has no folder images/: {hint}")
    return folder


def reference_folder(args: argparse.Namespace) -> "Path":
    """Return the folder of reference images: val2014 of --ref_dir for coco2014, else its --ref_type; or --ref_dir itself.

    Raises FileNotFoundError where there is no such folder.
    """
    from pathlib import Path

    folder = Path(args.ref_dir).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of reference images at {folder}: check --ref_dir")
    name = COCO if args.ref_data == "coco2014" else args.ref_type
    if name == ANY_TYPE:
        return folder
    for place in (folder / name, *sorted(folder.glob(f"*/{name}"))):
        if place.is_dir():
            return place
    if args.ref_data != "coco2014":
        raise FileNotFoundError(f"--ref_dir {folder} has no folder {name} (--ref_type)")
    return folder  # val2014 itself, or a folder of photographs chosen from it


def open_reference(args: argparse.Namespace) -> "SquareImages | RecordedReference":
    """Open the --ref_dir: an .npz of statistics, or a folder of images. Raises as RecordedReference and `reference_images` do."""
    from dataset.pixels import Reading
    from evaluations.t2i.images import reference_images
    from evaluations.t2i.reference import RecordedReference

    if not args.ref_dir.endswith(".npz"):
        return reference_images(reference_folder(args), args.eval_res, Reading.of(args))
    reference = RecordedReference(args.ref_dir)
    reading = Reading.of(args).record()
    reference.require(eval_res=args.eval_res, inception_resize=args.inception_resize, reading=reading)
    return reference


def require_fitting(reference: "SquareImages | RecordedReference", backend: "Inception") -> None:
    """Raises ValueError where recorded statistics are of another network's features."""
    if reference.kind != "statistics":
        return
    reference.require(graph=backend.sha256)
    dim = len(reference.statistics.mean)
    if dim != backend.pool_dim:
        raise ValueError(
            f"{reference.path} has statistics of {dim} features and the graph {backend.path} makes {backend.pool_dim}: they "
            "were recorded with another graph"
        )


def another_clip(clip: "CLIP", name: str) -> list[str]:
    """Return a warning where the weights cannot be those of --clip_model4eval."""
    from evaluations.t2i.clip import DIMS

    if clip.dim == DIMS[name]:
        return []
    return [f"{clip.folder} makes vectors of {clip.dim} numbers, {name} has {DIMS[name]}: these are other weights"]


def read_captions(folder: "Path", fakes: "SquareImages") -> list[str]:
    """Return the lines of captions.txt, one for each image that is evaluated.

    Raises FileNotFoundError, or ValueError where there are not as many as images, or the file is not UTF-8.
    """
    file = folder / "captions.txt"
    again = "sample_t2i_ddp.py, run again, completes an interrupted folder"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: a line of text for each image. {again}; --no-clip computes FID without it"
        )
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): save it as such") from error
    if lines[-1] == "":
        lines.pop()
    images = fakes.total
    if len(lines) != images:
        raise ValueError(
            f"{file} has {len(lines):,} lines and {folder / 'images'} {images:,} images: every image needs its caption, in "
            f"natural order; {again}"
        )
    return [line.strip() for line in lines[: fakes.count]]


def require_enough(fakes: "SquareImages", reference: "SquareImages | RecordedReference | None") -> None:
    """Raises ValueError for sets that have no covariance."""
    for images in (fakes, reference):
        if images is not None and images.count is not None and images.count < 2:
            raise ValueError(f"{images.path} has {images.count} image: at least 2 are needed, covariances are of many")


def judge(
    fakes: "SquareImages",
    captions: list[str],
    reference: "SquareImages | RecordedReference | None",
    args: argparse.Namespace,
) -> list[str]:
    """List what makes the figures incomparable with published ones, as far as is known before the images are read."""
    found = []
    if fakes.count < PUBLISHED_IMAGES:
        found.append(
            f"{fakes.count:,} images; published figures are of {PUBLISHED_IMAGES:,}, and FID falls with the number of images"
        )
    if len(fakes.sizes) > 1:
        sizes = ", ".join(f"{count:,} of {w}x{h}" for (w, h), count in fakes.sizes.most_common(3))
        found.append(f"the generated images are of {len(fakes.sizes)} sizes ({sizes}): were they drawn by one model?")
    for name, images in (("generated", fakes), ("reference", reference)):
        if images is not None and images.enlarged:
            found.append(
                f"{images.enlarged:,} of the {images.count:,} {name} images are smaller than --eval_res {args.eval_res} and "
                "are enlarged: what is blurred by that counts as a property of the images"
            )
    if args.eval_res != PUBLISHED_SIZE:
        found.append(f"--eval_res is {args.eval_res}; published figures are at {PUBLISHED_SIZE}")
    if fakes.lossy:
        found.append(
            f"{fakes.lossy:,} of the generated images are JPEG or WebP files: compression alone changes FID; use PNG"
        )
    empty = sum(not caption for caption in captions)
    if empty:
        found.append(f"{empty:,} of the {len(captions):,} captions are empty: CLIP compares those images with no text")
    again = len(captions) - len(set(captions))
    if again:
        found.append(f"{again:,} of the {len(captions):,} captions repeat an earlier one")
    found += other_pairs(fakes) if captions else []
    if reference is not None and reference.kind == "statistics" and reference.made is None:
        found.append(
            f"{reference.path} does not say what its statistics were made with: whether the images had {args.eval_res} pixels "
            f"a side and were resized for the network by '{args.inception_resize}' is not known"
        )
    elif reference is not None and reference.kind == "folder" and overlap(reference.path, fakes.path):
        found.append(f"the reference {reference.path} and the generated images {fakes.path} lie one in the other")
    if reference is not None and args.ref_data == "coco2014":
        if reference.count not in (COCO_IMAGES, None):
            found.append(
                f"the reference has {reference.count:,} images; published FID is against all {COCO_IMAGES:,} of COCO's {COCO}"
            )
        if args.ref_type not in (ANY_TYPE, "valid", "val", COCO):
            found.append(f"--ref_type {args.ref_type} is not used: for coco2014 the reference is {COCO}, as published")
    if reference is not None and args.inception_resize != "clean":
        found.append("--inception_resize graph: published text-to-image FID resizes for the network as clean-fid does")
    return found


def other_pairs(fakes: "SquareImages") -> list[str]:
    """Return a warning where result.jsonl, beside images/, has other images in the places of captions.txt's lines.

    So it is when one image was removed and another added: the counts agree, and the captions have slipped.
    """
    import json
    from pathlib import Path

    file = fakes.path.parent / "result.jsonl"
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        listed = [Path(line.get("image_path") or line["image"]).name for line in lines]  # image: of the first edition
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # none, or another program's
    wrong = [place for place, pair in enumerate(zip(listed, fakes.names)) if pair[0] != pair[1]]
    if not wrong:
        return []
    place = wrong[0]
    return [
        f"{len(wrong):,} of the {fakes.count:,} images are not those that {file} pairs with the captions (the first: line "
        f"{place + 1} has {listed[place]}, images/ has {fakes.names[place]}): were files removed, added or renamed?"
    ]


def overlap(one: "Path", other: "Path") -> bool:
    """Tell whether one of two folders is the other or lies in it."""
    one, other = one.resolve(), other.resolve()
    return one == other or one in other.parents or other in one.parents


def described(
    fakes: "SquareImages",
    captions: list[str],
    reference: "SquareImages | RecordedReference | None",
    clip: "CLIP | None",
    backend: "Inception | None",
) -> list[str]:
    """Return a line about everything that is compared, and what compares it."""
    named = [("generated", fakes), ("reference", reference)]
    lines = [
        f"{name}: {images.path}, {images.count:,} images at {images.size[0]}x{images.size[1]}"
        for name, images in named
        if images is not None and images.kind == "folder"
    ]
    if reference is not None and reference.kind == "statistics":
        lines.append(f"reference: {reference.path}, statistics of {reference.count or 'an unknown number of'} images")
    if clip is not None:
        lines.append(f"captions: {len(captions):,}; CLIP: {clip.folder} by {clip.library} on {clip.device}")
    if backend is not None:
        lines.append(f"graph: {backend.path} by {backend.name} on {backend.device}, SHA-256 {backend.sha256}")
    return lines


def inception_features(backend: "Inception", resize: str) -> "Callable[[np.ndarray], np.ndarray]":
    """Return a function from uint8 (B, H, W, 3) to pool features (B, D).

    resize: 'clean', to the network's 299 pixels by Pillow's bicubic filter, in floating point and antialiased (Parmar et
    al., 2104.11222); 'graph', by the graph's own bilinear operation, as class-conditional figures are made.
    """
    import numpy as np
    from PIL import Image

    if resize == "graph":
        return lambda images: backend(images)[0]

    def resized(channel: "np.ndarray") -> "np.ndarray":
        picture = Image.fromarray(channel.astype(np.float32))  # of floats: nothing is rounded to bytes
        return np.asarray(picture.resize((INCEPTION_SIZE, INCEPTION_SIZE), Image.Resampling.BICUBIC))

    def extract(images: "np.ndarray") -> "np.ndarray":
        large = np.stack([np.stack([resized(image[..., c]) for c in range(3)], axis=-1) for image in images])
        # Below the check that images are bytes; the network takes floats in either backend.
        return backend._features(large.clip(0, 255))[0].reshape(len(images), -1)

    return extract


def reference_features(
    reference: "SquareImages | RecordedReference",
    inception: "Callable[[np.ndarray], np.ndarray]",
    args: argparse.Namespace,
    dist: "Distributed",
) -> "Features | None":
    """Return the reference's statistics, and what its pixels showed, on the first process; None on the others."""
    from evaluations.features import Features, read_features

    if reference.kind == "statistics":
        return Features([reference.statistics]) if dist.is_main else None
    return read_features(
        reference,
        lambda batch: (inception(batch),),
        dist,
        batch_size=args.batch_size,
        keep=False,
        name="reference",
    )


def reference_protocol(args: argparse.Namespace, reference: "SquareImages", backend: "Inception") -> dict:
    """Return the settings that the statistics of the reference depend on, JSON values."""
    return {
        "path": str(reference.path),
        "data": args.ref_data,
        "eval_res": args.eval_res,
        "inception_resize": args.inception_resize,
        "reading": reference.reading.record(),
        "graph": backend.sha256,
    }


def embed(captions: list[str], clip: "CLIP", batch_size: int, dist: "Distributed") -> "tuple[np.ndarray | None, int]":
    """Return the captions' unit vectors (N, D) on the first process, None on the others; and how many captions were cut."""
    import numpy as np
    from tqdm import tqdm

    first, last = (len(captions) * rank // dist.world_size for rank in (dist.rank, dist.rank + 1))
    rows = np.empty((last - first, clip.dim), np.float32)
    with tqdm(total=last - first, unit="caption", desc="captions", disable=not dist.is_main) as bar:
        for place in range(first, last, batch_size):
            part = captions[place : min(place + batch_size, last)]
            rows[place - first : place - first + len(part)] = clip.texts(part)
            bar.update(len(part))
    shares = dist.collect((rows, clip.cut))
    if shares is None:
        return None, 0
    return np.concatenate([share for share, _ in shares]), sum(cut for _, cut in shares)


def compare(
    drawn: "Features", texts: "np.ndarray | None", seen: "Features | None", args: argparse.Namespace
) -> dict[str, float]:
    """Return the figures: clip_score, the mean cosine of image and caption, and fid."""
    from evaluations.metrics import frechet_distance

    figures = {}
    if args.clip:
        figures["clip_score"] = float((drawn.rows.astype("float64") * texts).sum(axis=1).mean())
    if args.fid:
        figures["fid"] = frechet_distance(seen.statistics[0], drawn.statistics[-1])
    return figures


def protocol(
    args: argparse.Namespace,
    fakes: "SquareImages",
    captions: list[str],
    reference: "SquareImages | RecordedReference | None",
    clip: "CLIP | None",
    backend: "Inception | None",
    dist: "Distributed",
) -> dict:
    """Return everything that a figure depends on, JSON values."""
    from evaluations.t2i.clip import CLIP_MODELS, PREFIX

    made = {
        "generated": {**fakes.describe(), "settings": sample_settings(fakes.path.parent)},
        "eval_res": args.eval_res,
        "crop": "centre square",
        "resize": "lanczos",
        "device": str(dist.device),
        "batch_size": args.batch_size,
        "processes": dist.world_size,
        "versions": versions(backend, "pillow", "transformers"),
    }
    if clip is not None:
        made["clip"] = {
            "model": args.clip_model4eval,
            "repository": CLIP_MODELS[args.clip_model4eval],
            "path": str(clip.folder),
            "library": clip.library,
            "image_size": clip.size,
            "prefix": PREFIX,
            "captions": len(captions),
            "different_captions": len(set(captions)),
        }
    if backend is not None:
        made["reference"] = {**reference.describe(), "data": args.ref_data}
        made["graph"] = {"path": str(backend.path), "sha256": backend.sha256, "resize": args.inception_resize}
        made["backend"] = backend.name
    return made


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--fake_dir", default="/home/GigaGAN_images/", help="folder with images/ and captions.txt")
    parser.add_argument(
        "--ref_dir",
        default="/home/COCO/",
        help=f"folder of the reference, for COCO with {COCO}/ in it; or an .npz made by --save_statistics",
    )
    parser.add_argument(
        "--save_statistics",
        default=None,
        metavar="FILE",
        help="keep the reference's statistics in FILE.npz; give it as --ref_dir next time",
    )
    parser.add_argument(
        "--ref_data",
        choices=["coco2014", "imagenet2012", "laion4k"],
        default="coco2014",
        help="what the reference is",
    )
    parser.add_argument(
        "--ref_type",
        default=ANY_TYPE,
        help=f"folder of --ref_dir, except for coco2014, where it is {COCO}; as it stands, --ref_dir itself",
    )
    parser.add_argument("--how_many", type=positive_int, default=30000, help="generated images to look at, at most")
    parser.add_argument("--clip_model4eval", default="ViT-B/32", help="ViT-B/32, ViT-G/14 or ViT-bigG/14")
    parser.add_argument("--eval_res", type=positive_int, default=256, help="pixels a side at which images are compared")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="images at once on each process")
    parser.add_argument("--clip_path", default=None, help="folder of CLIP's weights (default: looked for by name)")
    add_switch(parser, "--clip", True, "the CLIP score")
    add_switch(parser, "--fid", True, "FID")
    parser.add_argument(
        "--inception_resize",
        choices=["clean", "graph"],
        default="clean",
        help="how images get the Inception network's size: clean, as published text-to-image figures are made, or graph",
    )
    add_evaluation_flags(parser, "score in --fake_dir")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
