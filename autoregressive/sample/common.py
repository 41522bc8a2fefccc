"""Common part of the sampling scripts: from their flags to a pipeline and to requests."""

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoregressive.class_names import class_choice, class_names, find_class
from autoregressive.models.compiled import can_compile
from autoregressive.models.trunk import Trunk
from autoregressive.pipeline import PRECISIONS, ImagePipeline, control_column, load_gpt, load_tokenizer_of, tokenizer_of
from autoregressive.quantization import quantize, require_torchao
from autoregressive.released import flags_of
from autoregressive.request import Request
from autoregressive.sample.flags import sampling_config
from utils.cli import RESULTS, given, grid_size, layout_numbers, tokenizer_beliefs
from utils.images import labelled_grid, make_grid, save_png
from utils.runs import find_checkpoint, newest_checkpoint

# golden retriever, otter, red panda, geyser, macaw, valley, balloon, Arctic fox
IMAGENET_CLASSES = [207, 360, 387, 974, 88, 979, 417, 279]
# On a CPU, where that takes longer than drawing some images does.
IMAGES_WORTH_COMPILING = 5000
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def condition_files(args: argparse.Namespace) -> dict[str, Path]:
    """The files of --condition-file by the name of their condition. Raises ValueError for anything but NAME=FILE.npy."""
    named = [text.partition("=") for text in args.condition_file or ()]
    if wrong := [name for name, equals, file in named if not (name and equals and file)]:
        raise ValueError(f"--condition-file takes NAME=FILE.npy, got {wrong[0]}")
    return {name: Path(file) for name, _, file in named}


def control_files(args: argparse.Namespace) -> list[Path]:
    """Return the files of --control-image. Raises FileNotFoundError for a folder without pictures."""
    files = []
    for place in map(Path, args.control_image or ()):
        inside = sorted(file for file in place.glob("*") if file.suffix.lower() in PICTURES)
        if place.is_dir() and not inside:
            raise FileNotFoundError(f"--control-image {place} is a folder without pictures")
        files += inside if place.is_dir() else [place]
    return files


def extra_conditions(args: argparse.Namespace, numbers: Sequence[int]) -> dict[str, Any]:
    """Read the further conditions of the images with these numbers. Raises FileNotFoundError, ValueError for too few rows."""
    found: dict[str, Any] = {}
    for name, file in condition_files(args).items():
        try:
            rows = np.load(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"--condition-file {name}={file} is no .npy file of an array ({error})") from error
        if numbers and max(numbers) >= len(rows):
            raise ValueError(
                f"--condition-file {name}={file} has {len(rows)} rows, and image {max(numbers)} is to be drawn"
            )
        found[name] = torch.from_numpy(np.ascontiguousarray(rows[list(numbers)]))
    files = control_files(args)
    if len(files) > 1 and numbers and max(numbers) >= len(files):
        raise ValueError(
            f"--control-image gives {len(files)} pictures, and image {max(numbers)} is to be drawn: give one for all images, "
            "or one for each"
        )
    of_images = [files[number] for number in numbers] if len(files) > 1 else files[0] if files else None
    return found | control_column(of_images, args.control_type, len(numbers))


def class_requests(
    args: argparse.Namespace, gpt: Trunk, labels: Sequence[int], numbers: Sequence[int], seed: int
) -> list[Request]:
    """Return the requests that the flags make of labels, for the images with these numbers. Raises ValueError."""
    negative = {}
    if args.negative_class is not None:
        names = class_names(gpt.args.num_classes, recorded=gpt.file_config.get("classes"))
        negative = {"label": find_class(args.negative_class, names)}
    return requests_of(args, "label", labels, negative, numbers, seed)


def requests_of(
    args: argparse.Namespace, name: str, values: Sequence, negative: dict, numbers: Sequence[int], seed: int
) -> list[Request]:
    """Return the requests that the flags make of values of the first condition, for the images with these numbers."""
    config, columns, orders = (
        sampling_config(args),
        {name: values, **extra_conditions(args, numbers)},
        orders_of(args, numbers),
    )
    own = [None] * len(numbers) if orders is None else orders
    return [
        Request({each: column[i] for each, column in columns.items()}, negative, config, seed, number, order=own[i])
        for i, number in enumerate(numbers)
    ]


def orders_of(args: argparse.Namespace, numbers: Sequence[int]) -> torch.Tensor | None:
    """Read the orders of the images with these numbers from --order-file, int64 (images, N); None without the flag.

    Raises ValueError for what is no list of equally many whole numbers for each image, FileNotFoundError.
    """
    if args.order_file is None:
        return None
    try:
        listed = json.loads(Path(args.order_file).read_bytes())
        if numbers and max(numbers) >= len(listed):
            raise ValueError(f"it has {len(listed)} orders, and image {max(numbers)} is to be drawn")
        orders = np.array([listed[number] for number in numbers])
        if orders.ndim != 2 or orders.dtype.kind != "i":
            raise ValueError("an order is a list of whole numbers, all of one length")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--order-file {args.order_file}: {error}") from error
    return torch.from_numpy(orders)


def labels_to_draw(args: argparse.Namespace, gpt: Trunk) -> tuple[list[int], list[str]]:
    """Return --labels, or eight classes of the model's, and their names. Raises ValueError for an unknown name."""
    count = gpt.args.num_classes
    names = class_names(count, recorded=gpt.file_config.get("classes"))
    default = IMAGENET_CLASSES if count >= 1000 else [i % count for i in range(8)]
    labels = default if args.labels is None else [find_class(asked, names) for asked in args.labels]
    print("classes:", ", ".join(class_choice(label, names[label]) for label in labels))
    return labels, [names[label] for label in labels]


def write_grid(args: argparse.Namespace, gpt: Trunk, images: np.ndarray, names: Sequence[str]) -> None:
    """Write images (B, H, W, 3) as one picture, --output: with their names, or without as published of published files."""
    named = bool(gpt.file_config) if args.names is None else args.names
    grid = labelled_grid(images, names, args.columns) if named else make_grid(images, columns=args.columns)
    save_png(grid, args.output)
    print(f"wrote {args.output}: {len(images)} images of {images.shape[2]}x{images.shape[1]}")


def weights_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of --precision; for bf16 float32, with a line that says so, on a processor without instructions for it."""
    dtype = PRECISIONS[precision]
    if dtype == torch.bfloat16 and device.type == "cpu" and not has_bf16_units():
        print("--precision bf16: this processor has no instructions for it, float32 is used")
        return torch.float32
    return dtype


def has_bf16_units() -> bool:
    """Tell whether the processor multiplies bf16 itself (AVX512_BF16 or AMX; assumed on other architectures)."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of torch.cpu, not in every release
    known = [getattr(torch.cpu, name) for name in names if hasattr(torch.cpu, name)]
    return not known or any(supported() for supported in known)


def load_gpt_of_flags(
    args: argparse.Namespace, path: Path, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Trunk:
    """Load the GPT of a file, compared with the flags that are given. Raises ValueError where they disagree.

    A published file that does not tell its image size is taken for the published one of its kind.
    """
    ar_token_num, spe_token_num = layout_numbers(args)
    return load_gpt(
        path,
        device=device,
        dtype=dtype,
        use_ema=args.use_ema,
        image_size=given(args.image_size),
        untold_image_size=int(args.image_size),
        downsample_size=given(args.downsample_size),
        gpt_model=given(args.gpt_model),
        gpt_type=args.gpt_type,
        codebook_size=args.codebook_size,
        num_classes=args.num_classes if args.gpt_type == "c2i" else None,
        cls_token_num=given(args.cls_token_num),
        ar_token_num=ar_token_num,
        spe_token_num=spe_token_num,
        layout=args.layout,
    )


def compiles(device: torch.device, images: int | None = None) -> bool:
    """Tell whether --compile is followed, and print where it is not. images: of the whole run, where --compile is the default.

    A few images are drawn sooner by the plain step on a CPU. The number of the run decides, so that a run that goes on, or
    on other processes, draws as it did.
    """
    if not can_compile(device):
        missing = {"cpu": " (there is no C++ compiler)", "cuda": " (there is no C compiler)"}.get(device.type, "")
        print(f"--compile: on {device.type} the plain decode step is used{missing}")
        return False
    return device.type != "cpu" or images is None or images >= IMAGES_WORTH_COMPILING


def find_gpt(args: argparse.Namespace) -> Path:
    """Return the file of --gpt-ckpt, by default of the newest run in results/, which the flag then says. Raises ValueError."""
    if args.gpt_ckpt is None:
        if newest_checkpoint(RESULTS) is None:
            raise ValueError(
                "--gpt-ckpt is needed: a file, a run's folder, or a released file's name (pretrained_models/README.md)"
            )
        args.gpt_ckpt = RESULTS
        print(f"--gpt-ckpt {RESULTS}: the newest run there")
    return find_checkpoint(args.gpt_ckpt)


def build_pipeline(
    args: argparse.Namespace,
    device: torch.device,
    batch_size: int | None = None,
    images: int | None = None,
    text: Mapping[str, Any] | None = None,
) -> tuple[ImagePipeline, Path, Path]:
    """Load both models as the flags ask. Returns the pipeline and the paths of the GPT's and the tokenizer's file.

    images: of the run, see `compiles`. text: how ImagePipeline encodes prompts. Flags that are not given get what the
    files say, for the record of a folder.
    Raises ValueError where a flag and a file disagree or --quantize lacks torchao, FileNotFoundError for a file that is not
    there.
    """
    layout_numbers(args)
    quantized = getattr(args, "quantize", "none") == "int8"  # the scripts over vLLM have no such flag
    if quantized:
        require_torchao()
    gpt_path = find_gpt(args)
    if args.vq_ckpt is None:
        vq_path = tokenizer_of(args.gpt_ckpt)
        print(f"--vq-ckpt {vq_path}: the tokenizer of the GPT's codes")
    else:
        vq_path = find_checkpoint(args.vq_ckpt)
    known = {**tokenizer_beliefs(args), "decode_precision": args.decode_precision}
    tokenizer = load_tokenizer_of(gpt_path, vq_path, args.use_ema, device=device, **known)
    args.downsample_size = given(args.downsample_size) or tokenizer.downsample
    if args.downsample_size != tokenizer.downsample:
        raise ValueError(
            f"the tokens of {vq_path} are {tokenizer.downsample} pixels a side: pass --downsample-size {tokenizer.downsample}"
        )
    if given(args.image_size):
        grid_size(args.image_size, tokenizer.downsample)
    gpt = load_gpt_of_flags(args, gpt_path, weights_dtype(args.precision, device), device)
    if text is not None and given(args.t5_feature_dim) not in (None, gpt.args.caption_dim):
        raise ValueError(
            f"{gpt_path} takes text features of {gpt.args.caption_dim} numbers: pass --t5-feature-dim {gpt.args.caption_dim}"
        )
    if quantized:
        quantize(gpt)
    settings = {**(text or {}), "compile": args.compile and compiles(device, images), "batch_size": batch_size}
    if getattr(args, "draft_gpt", None):
        settings["draft_gpt"] = load_gpt(
            find_checkpoint(args.draft_gpt),
            device=device,
            dtype=weights_dtype(args.precision, device),
            untold_image_size=gpt.layout.grid_size * tokenizer.downsample,
            downsample_size=tokenizer.downsample,
        )
    pipeline = ImagePipeline(gpt, tokenizer, window=getattr(args, "window", None), **settings)
    told = {**tokenizer.flags, **flags_of(gpt.args.identity), "image_size": pipeline.image_size}
    if told["ar_token_num"] == 1:
        del told["ar_token_num"], told["spe_token_num"]  # folders of raster images record that they were not given
    if told["layout"] in ("raster", "parallel"):
        del told["layout"]
    told |= {"t5_feature_dim": told["caption_dim"], "t5_feature_max_len": pipeline.t5_tokens}
    told["image_size_eval"] = min(int(getattr(args, "image_size_eval", 0)), pipeline.image_size)
    for name in told.keys() & vars(args).keys():
        if given(getattr(args, name)) is None:
            setattr(args, name, told[name])
    return pipeline, gpt_path, vq_path
