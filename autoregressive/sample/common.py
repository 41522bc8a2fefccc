"""Common part of the sampling scripts: from their flags to a pipeline, and many images over processes.

pipeline, gpt_path, vq_path = build_pipeline(args, device)
mine = share_of_missing(dist, folder, png, count, batch)
requests = class_requests(args, pipeline.gpt, labels, mine, args.global_seed)
save_images(pipeline.batches(requests, ahead=True), png, len(mine), progress=dist.is_main)
"""

import argparse
import os
import platform
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from autoregressive.class_names import class_choice, class_names, find_class
from autoregressive.models.decode_step import can_compile
from autoregressive.models.gpt import Transformer
from autoregressive.pipeline import PRECISIONS, ImagePipeline, check_prompts, load_gpt, warn_of_long_features
from autoregressive.quantization import quantize, require_torchao
from autoregressive.request import Request
from autoregressive.sample.flags import sampling_config
from tokenizer.load import load_tokenizer
from utils.checkpoint import has_averages, read_checkpoint
from utils.cli import grid_size, layout_numbers, tokenizer_beliefs
from utils.distributed import Distributed, pick_device
from utils.images import is_whole_png, make_grid, save_png
from utils.logger import console_logger
from utils.origin import require_encoder
from utils.runs import find_checkpoint
from utils.sample_folder import file_identity

if TYPE_CHECKING:
    from language.prompts import PromptFeatures

# golden retriever, otter, red panda, geyser, macaw, valley, balloon, Arctic fox
IMAGENET_CLASSES = [207, 360, 387, 974, 88, 979, 417, 279]
PROMPTS = [
    "A lighthouse on a rocky coast at dusk, its lamp just lit, oil painting.",
    "A wooden bowl of ripe persimmons on a linen cloth in soft window light.",
    "An orange tram crosses a stone bridge in heavy snow.",
    "A paper crane stands on a stack of old books, close-up photograph.",
]
# On a CPU, where that takes longer than drawing some images does.
IMAGES_WORTH_COMPILING = 5000
# Threads that encode PNG files, and batches that may wait for them while another is drawn.
WRITERS, BATCHES_WAITING = 4, 2


def condition_files(args: argparse.Namespace) -> dict[str, Path]:
    """The files of --condition-file by the name of their condition. Raises ValueError for anything but NAME=FILE.npy."""
    named = [text.partition("=") for text in args.condition_file or ()]
    if wrong := [name for name, equals, file in named if not (name and equals and file)]:
        raise ValueError(f"--condition-file takes NAME=FILE.npy, got {wrong[0]}")
    return {name: Path(file) for name, _, file in named}


def condition_identity(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return the record of --condition-file for a folder of samples; None without the flag."""
    return {name: file_identity(file) for name, file in condition_files(args).items()} or None


def extra_conditions(args: argparse.Namespace, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    """Read the further conditions of the images with these numbers. Raises FileNotFoundError, ValueError for too few rows."""
    found = {}
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
    return found


def class_requests(
    args: argparse.Namespace, gpt: Transformer, labels: Sequence[int], numbers: Sequence[int], seed: int
) -> list[Request]:
    """Return the requests that the flags make of labels, for the images with these numbers. Raises ValueError."""
    negative = {}
    if args.negative_class is not None:
        names = class_names(gpt.args.num_classes, recorded=gpt.file_config.get("classes"))
        negative = {"label": find_class(args.negative_class, names)}
    return _requests(args, "label", labels, negative, numbers, seed)


def prompt_requests(
    args: argparse.Namespace,
    pipeline: ImagePipeline,
    prompts: Sequence[str] | Sequence[torch.Tensor],
    numbers: Sequence[int],
    seed: int,
    *,
    progress: bool = True,
) -> list[Request]:
    """Return the requests that the flags make of prompts or their features, encoded; the text encoder's memory is given back."""
    negative = {"caption": args.negative_prompt} if (args.negative_prompt or "").strip() else {}
    requests = pipeline.read(_requests(args, "caption", prompts, negative, numbers, seed), progress=progress)
    pipeline.release_text_encoder()
    return requests


def _requests(
    args: argparse.Namespace, name: str, values: Sequence, negative: dict, numbers: Sequence[int], seed: int
) -> list[Request]:
    config, others = sampling_config(args), extra_conditions(args, numbers)
    return [
        Request({name: value, **{other: rows[i] for other, rows in others.items()}}, negative, config, seed, number)
        for i, (value, number) in enumerate(zip(values, numbers, strict=True))
    ]


def labels_to_draw(args: argparse.Namespace, gpt: Transformer) -> list[int]:
    """Return --labels, or eight classes of the model's; print what they are called. Raises ValueError for an unknown name."""
    count = gpt.args.num_classes
    names = class_names(count, recorded=gpt.file_config.get("classes"))
    default = IMAGENET_CLASSES if count >= 1000 else [i % count for i in range(8)]
    labels = default if args.labels is None else [find_class(asked, names) for asked in args.labels]
    print("classes:", ", ".join(class_choice(label, names[label]) for label in labels))
    return labels


def prompts_to_draw(args: argparse.Namespace) -> tuple[list[str], list[torch.Tensor]]:
    """Return the prompts that the flags name, and their features where those are stored (else none).

    Raises ValueError for flags that do not go together, and for a prompt of which nothing would be read.
    """
    from language.prompts import read_prompt_lines

    if args.gpt_type != "t2i":
        raise ValueError("sample_t2i.py draws from text-conditional models; for classes there is sample_c2i.py")
    if args.t5_feat_path and (args.prompt or not args.prompt_file):
        raise ValueError(
            f"--t5-feat-path {args.t5_feat_path} has features of a file's prompts: give that file as --prompt-file, and no "
            "--prompt"
        )
    prompts = list(args.prompt or [])
    if args.prompt_file:
        prompts += read_prompt_lines(args.prompt_file)
    prompts = prompts or PROMPTS
    check_prompts(prompts)
    stored = open_prompt_features(args, args.prompt_file, prompts)
    return prompts, features_of(stored, range(len(prompts)), args.t5_feature_max_len) if stored else []


def print_prompts(prompts: Sequence[str]) -> None:
    """Print which image of the grid is of which prompt."""
    for i, prompt in enumerate(prompts):
        print(f"{i}: {' '.join(prompt.split())}")


def write_grid(args: argparse.Namespace, images: np.ndarray) -> None:
    """Write images (B, H, W, 3) as one picture, --output."""
    save_png(make_grid(images, columns=args.columns), args.output)
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
) -> Transformer:
    """The GPT of a file, compared with what the flags say of it. Raises ValueError where they disagree."""
    ar_token_num, spe_token_num = layout_numbers(args)
    return load_gpt(
        path,
        device=device,
        dtype=dtype,
        use_ema=args.use_ema,
        image_size=args.image_size,
        downsample_size=args.downsample_size,
        gpt_model=args.gpt_model,
        gpt_type=args.gpt_type,
        codebook_size=args.codebook_size,
        num_classes=args.num_classes if args.gpt_type == "c2i" else None,
        cls_token_num=args.cls_token_num,
        ar_token_num=ar_token_num or 1,
        spe_token_num=spe_token_num or 0,
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


def build_pipeline(
    args: argparse.Namespace, device: torch.device, batch_size: int | None = None, images: int | None = None
) -> tuple[ImagePipeline, Path, Path]:
    """Loads both models as the flags ask. Returns the pipeline and the paths of the GPT's and the tokenizer's file.

    images: of the run, see `compiles`.
    With --gpt-type t2i the T5 has to be there too, but with --t5-feat-path; it is loaded with the first prompt.
    Raises ValueError where a flag and a file disagree or --quantize lacks torchao, FileNotFoundError for a file that is not
    there.
    """
    grid_size(args.image_size, args.downsample_size)
    layout_numbers(args)
    quantized = getattr(args, "quantize", "none") == "int8"  # the scripts over vLLM have no such flag
    if quantized:
        require_torchao()
    for flag, value in (("--gpt-ckpt", args.gpt_ckpt), ("--vq-ckpt", args.vq_ckpt)):
        if value is None:
            raise ValueError(
                f"{flag} is needed: a file, a run's folder, or a released file's name (pretrained_models/README.md)"
            )
    gpt_path, vq_path = find_checkpoint(args.gpt_ckpt), find_checkpoint(args.vq_ckpt)
    text = text_settings(args) if args.gpt_type == "t2i" else {}
    tokenizer = load_tokenizer(
        vq_path,
        **tokenizer_beliefs(args),
        device=device,
        use_ema=args.use_ema and has_averages(vq_path),
        decode_precision=args.decode_precision,
        fingerprint=read_checkpoint(gpt_path).config.get("tokenizer"),
    )
    if args.downsample_size != tokenizer.downsample:
        raise ValueError(
            f"the tokens of {vq_path} are {tokenizer.downsample} pixels a side: pass --downsample-size {tokenizer.downsample}"
        )
    gpt = load_gpt_of_flags(args, gpt_path, weights_dtype(args.precision, device), device)
    if args.gpt_type == "t2i" and args.t5_feature_dim != gpt.args.caption_dim:
        raise ValueError(
            f"{gpt_path} takes text features of {gpt.args.caption_dim} numbers: pass --t5-feature-dim {gpt.args.caption_dim}"
        )
    # What the flags left to the files: a folder of samples records it.
    vars(args).update(tokenizer.flags)
    if args.gpt_type == "c2i":
        args.num_classes = gpt.args.num_classes
    if quantized:
        quantize(gpt)
    compile = args.compile and compiles(device, images)
    pipeline = ImagePipeline(gpt, tokenizer, batch_size=batch_size, compile=compile, **text)
    return pipeline, gpt_path, vq_path


def text_settings(args: argparse.Namespace) -> dict:
    """Return the settings of ImagePipeline for encoding prompts. Raises FileNotFoundError where there is no T5, ValueError."""
    from language.t5 import find_t5

    if args.t5_device:
        pick_device(args.t5_device)  # a device that is not there is told before models are read
    if args.t5_feature_max_len > args.cls_token_num:
        raise ValueError(
            f"--t5-feature-max-len {args.t5_feature_max_len} is more than the model's --cls-token-num {args.cls_token_num}"
        )
    settings = {"t5_tokens": args.t5_feature_max_len, "left_padding": not args.no_left_padding}
    if args.t5_feat_path:
        return settings
    return {
        "t5_path": find_t5(args.t5_path, args.t5_model_type),
        "t5_device": args.t5_device,
        "t5_dtype": PRECISIONS[args.t5_precision or args.precision],
        **settings,
    }


def open_prompt_features(args: argparse.Namespace, file: str | Path, prompts: Sequence[str]) -> "PromptFeatures | None":
    """Return the features that --t5-feat-path has of the file's prompts; None without the flag. Raises as PromptFeatures does."""
    if not args.t5_feat_path:
        return None
    if args.negative_prompt:
        raise ValueError("--negative-prompt needs a T5, and --t5-feat-path draws without: leave one of the two out")
    from language.prompts import PromptFeatures

    console_logger("dataset", os.environ.get("RANK", "0") == "0")  # which tells what could not be compared
    stored = PromptFeatures(args.t5_feat_path, file, prompts, dim=args.t5_feature_dim)
    if args.gpt_ckpt:
        config = read_checkpoint(find_checkpoint(args.gpt_ckpt)).config
        require_encoder(config, stored.store.encoder, args.t5_feat_path)
    return stored


def features_of(stored: "PromptFeatures", numbers: Sequence[int], tokens: int) -> list[torch.Tensor]:
    """The features of the prompts with these numbers, at most `tokens` rows of each. Warns of those that are cut."""
    found = [stored[number] for number in numbers]
    warn_of_long_features(list(zip(numbers, map(len, found), strict=True)), tokens)
    return [rows[:tokens] for rows in found]


def share_of_missing(dist: Distributed, folder: Path, png: Callable[[int], Path], count: int, batch: int) -> list[int]:
    """The images of 0 … count - 1 that this process is to draw: those not there whole, dealt out in batches."""
    missing = dist.broadcast([i for i in range(count) if not is_whole_png(png(i))] if dist.is_main else None)
    if dist.is_main:
        print(f"{folder}: {count - len(missing)} of {count} images are there, {len(missing)} to draw")
    shares = [missing[i : i + batch] for i in range(0, len(missing), batch)]
    return [index for share in shares[dist.rank :: dist.world_size] for index in share]


def save_images(
    batches: Iterable[tuple[list[int], np.ndarray]], png: Callable[[int], Path], total: int, *, progress: bool
) -> None:
    """Writes the images of ImagePipeline.batches in threads, while the next ones are drawn. At its end all are written.

    Raises what drawing and writing raise. Drawn images are written even then, each whole or not at all.
    """
    counted = threading.Lock()
    with tqdm(total=total, unit="img", disable=not progress) as bar, ThreadPoolExecutor(WRITERS, "png") as threads:

        def write(image: np.ndarray, path: Path) -> None:
            save_png(image, path)
            with counted:
                bar.update()

        waiting: deque[list[Future]] = deque()
        for indices, images in batches:
            waiting.append([threads.submit(write, i, png(n)) for n, i in zip(indices, images, strict=True)])
            while len(waiting) > BATCHES_WAITING or (waiting and all(one.done() for one in waiting[0])):
                for one in waiting.popleft():
                    one.result()
        for one in chain.from_iterable(waiting):
            one.result()
