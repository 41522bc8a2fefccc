"""How fast a tokenizer encodes and decodes: sizes of images and batches, precisions and memory layouts, in one run.

    python3 benchmarks/image_tokenizer.py --image-size 64 256 --batch-size 1 8 --precision none bf16 --channels-last no yes

The weights are random and cost what trained ones cost. bf16 is autocast; with bf16-decoder the decoder's weights are in
bfloat16 themselves, as --decode-precision bf16 of the sampling scripts has it. Ratios are to the first line of the same
image size; codes: how many are that line's; PSNR: of the decoded 8-bit images against that line's. On a CPU one core computes and its processor time is
what is measured, which other work on the machine does not lengthen.
"""

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import flag_parser, positive_int, run_script

if TYPE_CHECKING:
    import torch

    from tokenizer.base import Tokenizer


def main(args: argparse.Namespace) -> None:
    import torch

    from utils.distributed import start
    from utils.images import peak_signal_to_noise_ratio, to_uint8

    device = start(args.device).device
    clock = time.perf_counter
    if device.type == "cpu":
        torch.set_num_threads(1)
        clock = time.process_time

    def timed(step: Callable[["torch.Tensor"], "torch.Tensor"], whole: "torch.Tensor", batch: int) -> tuple:
        begin = clock()
        result = torch.cat([step(part) for part in whole.to(device).split(batch)]).cpu()
        return clock() - begin, result

    tokenizers = {
        (precision, channels_last): made_ready(args.vq_model, device, precision, channels_last)
        for precision in args.precision
        for channels_last in args.channels_last
    }
    print(f"{args.vq_model}, {'one core' if device.type == 'cpu' else device.type}, best of {args.runs} passes")
    print(
        f"{'pixels':>6} {'batch':>6}  {'precision':<14}{'channels-last':<14}{'encoded/s':>10}{'ratio':>7}{'codes':>8}"
        f"{'decoded/s':>11}{'ratio':>7}{'PSNR':>8}"
    )
    for size in args.image_size:
        pixels = torch.rand(args.images, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        cases = [(batch, *case) for batch in args.batch_size for case in tokenizers]
        best: dict[tuple, dict[str, float]] = {case: {} for case in cases}
        codes, images = {}, {}
        given = None  # every case decodes the codes of the first
        for run in range(args.runs + 1):  # the first is a warm-up
            for case in cases:  # in turn, so that another job on the machine slows all alike
                batch, precision, channels_last = case
                encode, decode = steps(tokenizers[precision, channels_last], precision, channels_last)
                took, codes[case] = timed(encode, pixels, batch)
                given = codes[case] if given is None else given
                took_back, drawn = timed(decode, given, batch)
                images[case] = to_uint8(drawn)
                if run:
                    for name, value in (("encode", took), ("decode", took_back)):
                        best[case][name] = min(value, best[case].get(name, value))
        first = cases[0]
        for case in cases:
            batch, precision, channels_last = case
            same = (codes[case] == codes[first]).double().mean()
            speeds = [args.images / best[case][name] for name in ("encode", "decode")]
            ratios = [best[first][name] / best[case][name] for name in ("encode", "decode")]
            print(
                f"{size:>6} {batch:>6}  {precision:<14}{channels_last:<14}{speeds[0]:>10.3f}{ratios[0]:>7.2f}{same:>8.2%}"
                f"{speeds[1]:>11.3f}{ratios[1]:>7.2f}{peak_signal_to_noise_ratio(images[case], images[first]):>8.2f}"
            )


def made_ready(name: str, device: "torch.device", precision: str, channels_last: str) -> "Tokenizer":
    """The tokenizer with the same random weights whatever the case."""
    import torch

    from tokenizer.tokenizer_image.vq_model import VQ_models

    torch.manual_seed(0)
    tokenizer = VQ_models[name]().eval().requires_grad_(False)
    if precision == "bf16-decoder":
        tokenizer.decode_in_bfloat16()
    layout = torch.channels_last if channels_last == "yes" else torch.contiguous_format
    return tokenizer.to(device, memory_format=layout)


def steps(tokenizer: "Tokenizer", precision: str, channels_last: str) -> tuple[Callable, Callable]:
    """Images (B, 3, H, W) to codes (B, h, w), and those to images."""
    import torch

    device = tokenizer.device
    layout = torch.channels_last if channels_last == "yes" else torch.contiguous_format

    def computed(step: Callable[["torch.Tensor"], "torch.Tensor"], argument: "torch.Tensor") -> "torch.Tensor":
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return step(argument)

    def encode(pixels: "torch.Tensor") -> "torch.Tensor":
        return tokenizer.to_codes(pixels.contiguous(memory_format=layout))

    return lambda pixels: computed(encode, pixels), lambda codes: computed(tokenizer.to_pixels, codes)


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--vq-model", choices=list(VQ_SIZES), default="VQ-16", help="image tokenizer")
    parser.add_argument("--image-size", type=positive_int, nargs="+", default=[64, 256], help="pixels a side")
    parser.add_argument("--batch-size", type=positive_int, nargs="+", default=[1, 2], help="images at once")
    parser.add_argument(
        "--precision",
        choices=["none", "bf16", "bf16-decoder"],
        nargs="+",
        default=["none", "bf16", "bf16-decoder"],
        help="none: float32; bf16: autocast; bf16-decoder: what decodes in bfloat16, what encodes in float32",
    )
    parser.add_argument(
        "--channels-last", choices=["no", "yes"], nargs="+", default=["no", "yes"], help="memory layouts of the images"
    )
    parser.add_argument("--images", type=positive_int, default=4, help="images in a pass")
    parser.add_argument("--runs", type=positive_int, default=3, help="timed passes over the images")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
