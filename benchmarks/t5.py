"""How fast captions are encoded: many together by length, as extraction does it, against one at a time, in one run.

    python3 benchmarks/t5.py
    python3 benchmarks/t5.py --preset xl --device cuda --dtype bf16 --captions 2048 --batch-size 64

The encoder has random weights, which cost what trained ones cost, in the proportions of flan-T5 (gated GELU, heads of 64,
a feed-forward part of 2.5 times the width). The published extraction computes one caption a time, all 120 positions. On a
CPU one core encodes and its processor time is what is measured, which other work on the machine does not lengthen.
Reading, cleaning and splitting into tokens are not timed: loader processes do that.
"""

import argparse
import time
from types import SimpleNamespace

from utils.cli import flag_parser, positive_float, positive_int, run_script

# layers, heads, width, feed-forward width; base and xl are flan-T5's own
PRESETS = {"small": (4, 4, 256, 640), "base": (12, 12, 768, 2048), "xl": (24, 32, 2048, 5120)}
LENGTH = 120


def main(args: argparse.Namespace) -> None:
    import numpy as np
    import torch
    from transformers import T5Config, T5EncoderModel

    from language.extract_t5_feature import encode_captions
    from language.t5 import T5Embedder
    from utils.distributed import start

    device = start(args.device).device
    clock = time.perf_counter
    if device.type == "cpu":
        torch.set_num_threads(1)
        clock = time.process_time
    layers, heads, dim, hidden = PRESETS[args.preset]
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32128,
        d_model=dim,
        d_kv=64,
        d_ff=hidden,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
    )
    dtype = {"none": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    embedder = T5Embedder.__new__(T5Embedder)  # without files: a model that is made here
    embedder.device, embedder.tokenizer = device, SimpleNamespace(pad_token_id=0)
    embedder.model = T5EncoderModel(config).to(device, dtype).eval().requires_grad_(False)
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(3.0, args.mean_length / 3, args.captions).astype(int), 1, LENGTH)
    captions = [rng.integers(3, 32100, length).tolist() for length in lengths]

    def one_at_a_time(padded_to: int) -> None:
        for ids in captions:
            length = max(padded_to, len(ids))
            padded, mask = torch.zeros(1, length, dtype=torch.int64), torch.zeros(1, length, dtype=torch.int64)
            padded[0, : len(ids)], mask[0, : len(ids)] = torch.tensor(ids), 1
            embedder.encode(padded, mask).cpu()

    cases = {
        "one at a time, all 120 positions": lambda: one_at_a_time(LENGTH),
        "one at a time, its own length": lambda: one_at_a_time(0),
        f"batches of {args.batch_size} of like length": lambda: encode_captions(embedder, captions, args.batch_size),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for run in range(args.runs + 1):  # the first is a warm-up
        for name, case in cases.items():  # in turn, so that another job on the machine slows all alike
            begin = clock()
            case()
            if run:
                seconds[name].append(clock() - begin)
    where = "one core" if device.type == "cpu" else device.type
    print(
        f"{args.preset} ({layers} layers, width {dim}), {args.dtype}, {args.captions} captions of {lengths.mean():.1f} tokens, "
        f"{where}, best of {args.runs} passes"
    )
    first = min(next(iter(seconds.values())))  # other work on the machine only ever adds
    print(f"{'':40}{'captions/s':>12}{'ratio':>8}")
    for name, times in seconds.items():
        print(f"{name:40}{args.captions / min(times):12.1f}{first / min(times):8.2f}")


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--preset", choices=list(PRESETS), default="small", help="size of the encoder")
    parser.add_argument("--captions", type=positive_int, default=256, help="captions encoded in a run")
    parser.add_argument("--mean-length", type=positive_float, default=18.0, help="their tokens, on average")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="captions a batch")
    parser.add_argument("--dtype", choices=["none", "fp16", "bf16"], default="none", help="of the weights")
    parser.add_argument("--runs", type=positive_int, default=3, help="timed passes over the captions")
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
