"""Many images, on any number of processes: a folder that an interrupted run continues, as many at once as memory holds."""

import argparse
import gc
import threading
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from autoregressive.models.generate import release_cache
from autoregressive.models.settings import SamplingConfig
from autoregressive.pipeline import ImagePipeline
from autoregressive.request import Request
from autoregressive.sample.common import condition_files, control_files
from autoregressive.sample.flags import sampling_config
from utils.distributed import Distributed, pick_device
from utils.errors import is_out_of_memory
from utils.images import is_whole_png, save_png
from utils.sample_folder import file_identity

# Threads that encode PNG files, and batches that may wait for them while another is drawn.
WRITERS, BATCHES_WAITING = 4, 2
# Flags that change neither an image nor which images there are.
IMMATERIAL = (
    "import", "sample_dir", "num_fid_samples", "compile", "device", "per_proc_batch_size", "npz", "from_fsdp", "gpt_ckpt",
    "vq_ckpt", "window", "draft_gpt",
)  # fmt: skip
# More at once hardly draws more images in a given time.
MOST_ON_CUDA, IMAGES_ELSEWHERE = 512, 8
# Of the memory that is there, what may be used: compiled steps keep buffers of their own, and others want some too.
SHARE_ON_CUDA = 0.9


def run_settings(
    args: argparse.Namespace, gpt_path: Path, vq_path: Path, immaterial: Collection[str] = (), **more: Any
) -> dict[str, Any]:
    """Return all settings that decide the images, as plain values. immaterial: further flags that do not."""
    settings = {key: value for key, value in vars(args).items() if key not in {*IMMATERIAL, *immaterial}}
    for name in ("quantize", "decode_precision"):
        if settings[name] == "none":
            settings[name] = None  # as in folders drawn before there was a choice, which do not say
    if sampling_config(args).greedy:
        settings["draw"] = None  # nothing is drawn
    if args.cfg_schedule != "power-cosine":
        settings["cfg_power"] = None  # not used
    if args.cfg_schedule == "constant":
        settings["cfg_schedule"] = None  # as in folders drawn before there was a choice
    if args.window and pick_device(args.device).type != "cpu":  # where rounding goes by the number of rows
        more["window"] = args.window
    files = {name: file_identity(file) for name, file in condition_files(args).items()}
    if args.order_file:
        more["order_file"] = file_identity(Path(args.order_file))
    own = {"gpt_ckpt": file_identity(gpt_path), "vq_ckpt": file_identity(vq_path), "condition_file": files or None}
    own["control_image"] = [file_identity(file)["content"] for file in control_files(args)] or None
    return {**settings, **own, **more}


def unrecorded(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of folders that an earlier edition drew, which do not record them."""
    defaults = {name: field.default for name, field in SamplingConfig.fields().items() if name in args}
    return {"layout": args.layout, **defaults, "draw": None if sampling_config(args).greedy else "cdf"}


def draw_missing(
    args: argparse.Namespace,
    pipeline: ImagePipeline,
    dist: Distributed,
    png: Callable[[int], Path],
    count: int,
    requests: Callable[[list[int]], list[Request]],
    size: int | None = None,
) -> None:
    """Draw those of `count` images whose files are not there whole.

    png: file of an image, by its number. requests: makes the requests of the images with some numbers.
    size: pixels a side, where other than the model's.
    """
    if args.per_proc_batch_size == "auto":
        fitting_batch_size(pipeline, dist, -(-count // dist.world_size), sampling_config(args))
    mine = share_of_missing(dist, png, count, pipeline.batch_size)
    if mine:
        with memory_errors_told(pipeline.batch_size):
            batches = pipeline.batches(requests(mine), size=size, ahead=True)
            save_images(batches, png, len(mine), progress=dist.is_main)
    dist.barrier()


def share_of_missing(dist: Distributed, png: Callable[[int], Path], count: int, batch: int) -> list[int]:
    """Return the images of 0 … count - 1 that this process is to draw: those not there whole, dealt out in batches."""
    missing = dist.broadcast([i for i in range(count) if not is_whole_png(png(i))] if dist.is_main else None)
    if dist.is_main:
        print(f"{png(0).parent}: {count - len(missing)} of {count} images are there, {len(missing)} to draw")
    shares = [missing[i : i + batch] for i in range(0, len(missing), batch)]
    return [index for share in shares[dist.rank :: dist.world_size] for index in share]


def save_images(
    batches: Iterable[tuple[list[int], np.ndarray]], png: Callable[[int], Path], total: int, *, progress: bool
) -> None:
    """Write the images of ImagePipeline.batches in threads, while the next ones are drawn. At its end all are written.

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


def largest_batch(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest batch up to `limit` that fits, or up to an eighth less; 0 where not even one image does.

    Doubles until a batch does not fit, then halves the interval between. fits: tells of a batch; of one that fits every
    smaller one does too.
    """
    good, batch = 0, 1
    while fits(batch):
        good = batch
        if batch == limit:
            return good
        batch = min(2 * batch, limit)
    bad = batch
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def fitting_batch_size(
    pipeline: ImagePipeline, dist: Distributed, limit: int, sampling: SamplingConfig | None = None
) -> int:
    """Return the images that every process can draw at once, at most `limit`. Sets the pipeline's batch_size and prints it.

    On CUDA batches are tried; elsewhere more than a few gain nothing.
    Raises ValueError where there is not memory for a single image.
    """
    largest = min(limit, IMAGES_ELSEWHERE)
    if pipeline.device.type == "cuda":
        largest = largest_batch(lambda batch: fits_on_cuda(pipeline, batch, sampling), min(limit, MOST_ON_CUDA))
    found = min(dist.gather(largest))
    if found < 1:
        raise ValueError(
            "--per-proc-batch-size auto: there is not memory for a single image beside the models on each process; free "
            "some, use fewer processes on a machine, or --precision bf16"
        )
    pipeline.batch_size = found
    if dist.is_main:
        print(f"--per-proc-batch-size auto: {found} images at once on each process")
    return found


def fits_on_cuda(pipeline: ImagePipeline, batch: int, sampling: SamplingConfig) -> bool:
    """Tell whether a batch can be drawn while another is decoded, in SHARE_ON_CUDA of the memory."""
    gpt, device = pipeline.gpt, pipeline.device
    release_cache(gpt)
    gc.collect()
    torch.cuda.empty_cache()
    memory = SHARE_ON_CUDA * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    drawing, decoding = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    before = pipeline.batch_size
    try:
        pipeline.batch_size = batch
        torch.cuda.reset_peak_memory_stats(device)
        codes = draw_briefly(pipeline, batch, sampling)
        drawing.synchronize()
        with warnings.catch_warnings(), torch.cuda.stream(decoding):  # a stream has memory of its own
            warnings.filterwarnings("error", message="memory is short")  # a batch that decodes in parts does not fit
            pipeline.decode(codes)
        return torch.cuda.max_memory_reserved(device) <= memory
    except (RuntimeError, UserWarning) as error:
        if not isinstance(error, UserWarning) and not is_out_of_memory(error):
            raise
        return False
    finally:
        pipeline.batch_size = before
        codes = None
        release_cache(gpt)
        gc.collect()
        torch.cuda.empty_cache()


def draw_briefly(pipeline: ImagePipeline, batch: int, sampling: SamplingConfig) -> torch.Tensor:
    """Draw codes of `batch` images, int64 (B, N), of which only the first are drawn where the layout can stop there.

    The caches are those of whole images.
    """
    example = {name: condition.example() for name, condition in pipeline.gpt.conditions.items()}
    layout = pipeline.gpt.layout
    (request,) = pipeline.read([Request(example, sampling=sampling)])
    drawn = pipeline.draw([request] * batch, tokens=min(2, layout.tokens) if layout.is_raster else None)
    return torch.cat([drawn, drawn.new_zeros(batch, layout.tokens - drawn.shape[1])], dim=1)


@contextmanager
def memory_errors_told(batch: int) -> Iterator[None]:
    """Raise ValueError that says what to do where memory runs out in the block, which draws `batch` images at once."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"out of memory with {batch} images at once: pass a smaller number, or --per-proc-batch-size auto, which looks "
            "for the largest that fits; images drawn so far are kept"
        ) from error
