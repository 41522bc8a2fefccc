"""Batch size of sampling: as many images as fit into memory, or a clear error where there are too many.

batch = fitting_batch_size(pipeline, dist, limit=images, sampling=config)      # --per-proc-batch-size auto
with memory_errors_told(batch):
    save_images(pipeline.batches(…), …)
"""

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from autoregressive.models.generate import release_cache
from autoregressive.models.settings import SamplingConfig
from autoregressive.pipeline import ImagePipeline
from autoregressive.request import Request
from utils.distributed import Distributed
from utils.errors import is_out_of_memory

# More at once hardly draws more images in a given time.
MOST_ON_CUDA, MOST_ELSEWHERE = 512, 64
# Of the memory that is there, what may be used: compiled steps keep buffers of their own, and others want some too.
SHARE_ON_CUDA, SHARE_ELSEWHERE = 0.9, 0.5
# What a process grows by where tensors of one byte are added (GPT-B on a CPU: 1.3).
GAPS = 1.5
# Where a system does not say how much memory it has.
DEFAULT = 8


def largest_batch(fits: Callable[[int], bool], limit: int) -> int:
    """The largest batch up to `limit` that fits, or up to an eighth less; 0 where not even one image does.

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
    """The images that every process can draw at once, at most `limit`. Sets the pipeline's batch_size and prints it.

    On CUDA batches are tried; elsewhere half of the free memory is shared out.
    Raises ValueError where there is not memory for a single image.
    """
    sampling = sampling or SamplingConfig()
    if pipeline.device.type == "cuda":
        largest = largest_batch(lambda batch: fits_on_cuda(pipeline, batch, sampling), min(limit, MOST_ON_CUDA))
    else:
        free = available_memory()
        image = image_bytes(pipeline, guided=sampling.guided)
        share = DEFAULT if free is None else int(SHARE_ELSEWHERE * free / dist.local_world_size / image)
        largest = min(share, limit, MOST_ELSEWHERE)
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


def image_bytes(pipeline: ImagePipeline, guided: bool) -> int:
    """Memory that one more image in a batch takes: caches, the condition's activations, the draw, the pixels.

    An estimate, for a CPU, where the decoder takes the same few images at a time whatever the batch.
    """
    args, layout = pipeline.gpt.args, pipeline.gpt.layout
    number = pipeline.gpt.tok_embeddings.weight.element_size()
    rows = 2 if guided else 1
    caches = 2 * args.n_layer * args.n_kv_head * layout.rows * (args.dim // args.n_head) * number
    widest = max(len(step.rows) for step in layout.passes)
    activations = widest * (8 * args.dim + 4 * args.ffn_dim + 2 * args.n_head * layout.rows) * 4
    draw = max(layout.groups) * args.vocab_size * 4 * 8  # logits, their order, their sums
    pixels = 3 * pipeline.image_size**2 * 4  # those that wait to be written too
    return int(GAPS * (rows * (caches + activations) + draw + pixels))


def available_memory() -> int | None:
    """Bytes that may still be taken, by the system's account and the control group's; None where neither is there."""
    found = []
    try:
        with open("/proc/meminfo") as lines:
            found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pass
    try:
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or "max": no limit
        pass
    if not found:
        try:
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (OSError, ValueError, AttributeError):
            return None
    return max(0, min(found))


@contextmanager
def memory_errors_told(batch: int) -> Iterator[None]:
    """Raises ValueError that says what to do where memory runs out in the block, which draws `batch` images at once."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"out of memory with {batch} images at once: pass a smaller number, or --per-proc-batch-size auto, which looks "
            "for the largest that fits; images drawn so far are kept"
        ) from error
