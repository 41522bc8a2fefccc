"""How fast extraction encodes: images in batches against one at a time, in one run.

    python3 benchmarks/extraction.py --vq-model VQ-16 --image-size 64

The tokenizer has random weights, which cost what trained ones cost. Reading and cropping images is not timed. On a CPU
one core encodes and its processor time is what is measured, which other work on the machine does not lengthen.
"""

import argparse
import time

from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import add_image_size_flags, flag_parser, positive_int, run_script


def main(args: argparse.Namespace) -> None:
    import torch

    from autoregressive.train.extraction import encode_views
    from tokenizer.tokenizer_image.vq_model import VQ_models
    from utils.distributed import start

    device = start(args.device).device
    clock = time.perf_counter
    if device.type == "cpu":
        torch.set_num_threads(1)
        clock = time.process_time
    torch.manual_seed(0)
    tokenizer = VQ_models[args.vq_model]().eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    pixels = torch.rand(args.images, args.views, 3, args.image_size, args.image_size, device=device) * 2 - 1
    cases = {("one image at a time", "none"): 1}
    cases |= {(f"batches of {args.batch_size}", precision): args.batch_size for precision in args.mixed_precision}
    seconds = {case: [] for case in cases}
    for run in range(args.runs + 1):  # the first is a warm-up
        for (name, precision), size in cases.items():  # in turn, so that another job on the machine slows all alike
            begin = clock()
            for batch in pixels.split(size):
                encode_views(tokenizer, batch, precision).cpu()
            if run:
                seconds[name, precision].append(clock() - begin)
    print(
        f"{args.vq_model}, {args.images} images of {args.views} views and {args.image_size} pixels, "
        f"{'one core' if device.type == 'cpu' else device.type}, best of {args.runs} passes"
    )
    first = min(next(iter(seconds.values())))  # other work on the machine only ever adds
    print(f"{'':24}{'precision':12}{'images/s':>10}{'ratio':>8}")
    for (name, precision), times in seconds.items():
        print(f"{name:24}{precision:12}{args.images / min(times):10.2f}{first / min(times):8.2f}")


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--vq-model", choices=list(VQ_SIZES), default="VQ-16", help="image tokenizer")
    add_image_size_flags(parser, 64, downsample=False)
    parser.add_argument("--images", type=positive_int, default=16, help="images encoded in a run")
    parser.add_argument("--views", type=positive_int, default=2, help="views an image")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="images a batch")
    parser.add_argument(
        "--mixed-precision",
        choices=["none", "fp16", "bf16"],
        nargs="+",
        default=["none", "bf16"],
        help="of the batched runs, one line each",
    )
    parser.add_argument("--runs", type=positive_int, default=5, help="timed passes over the images")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
