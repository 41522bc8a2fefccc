"""The parts of benchmarks/gpu.py by name, and those that neither draw tokens nor train.

    python3 -m benchmarks.gpu_parts sampling_b OUT/sampling_b.json --device cuda

Each part writes every figure at once. The weights are random: speed does not depend on their values.
"""

import argparse
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu_sampling, gpu_training
from benchmarks.gpu_part import Part
from benchmarks.measuring import bandwidth
from utils.precision import full_float32, use_tf32

BACKENDS = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def machine(part: Part) -> None:
    """Measures the card: versions, bandwidth, rate of products, SDPA backends for one query row."""
    from utils.flops import peak_flops

    cudnn = torch.backends.cudnn.version() if part.cuda else None
    part.put(
        "torch, CUDA, cuDNN, Python", f"{torch.__version__}, {torch.version.cuda}, {cudnn}, {sys.version.split()[0]}"
    )
    part.put("device", torch.cuda.get_device_name(part.device) if part.cuda else "CPU")
    if part.cuda:
        part.attempt("memory bandwidth, TB/s", lambda: f"{bandwidth(part.device) / 1e12:.2f}")
    side = 256 if part.small else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(side, side, device=part.device, dtype=dtype)
        work = lambda a=a: a @ a  # noqa: E731
        rate = lambda work=work: 2 * side**3 / (part.seconds(work, 3) and part.seconds(work, 10)) / 1e12  # noqa: E731
        name = f"product of {side}x{side} matrices, {str(dtype)[6:]}, TFLOP/s"
        part.attempt(name, lambda rate=rate: f"{rate():.1f}")
    part.put("peak in bf16 by utils/flops.py, TFLOP/s", (peak_flops(part.device, "bf16") or 0) / 1e12)
    rows = 64 if part.small else 576
    for heads, width in ((12, 64), (32, 100), (32, 128)):
        q = torch.randn(16, heads, 1, width, device=part.device, dtype=torch.bfloat16)
        k = torch.randn(16, heads, rows + 1, width, device=part.device, dtype=torch.bfloat16)[:, :, :rows]
        bias = torch.zeros(16, 1, 1, rows, device=part.device, dtype=torch.bfloat16)
        for title, mask in (("no mask", None), ("mask", bias)):
            name = f"SDPA, one row, {heads} heads of {width}, {title}, us in a graph"
            part.attempt(name, lambda q=q, k=k, mask=mask: attention_times(part, q, k, mask))


def attention_times(part: Part, q: Tensor, k: Tensor, mask: Tensor | None) -> str:
    """Names the backend that PyTorch chooses, and microseconds of each that takes the case."""
    found = [f"chosen {SDPBackend(torch._fused_sdp_choice(q, k, k, attn_mask=mask)).name}"]
    for name in BACKENDS:
        try:
            with warnings.catch_warnings(), sdpa_kernel(getattr(SDPBackend, name)):
                warnings.simplefilter("ignore")
                found.append(
                    f"{name} {part.captured(lambda: F.scaled_dot_product_attention(q, k, k, attn_mask=mask), 20):.1f}"
                )
        except RuntimeError:
            found.append(f"{name} refuses")
    return ", ".join(found)


def tests(part: Part) -> None:
    """Runs the quickest of the tests marked gpu."""
    chosen = "recorded_steps or bf16_step or wait_for_nothing or drawn_ahead or (training_losses and raster and bf16)"
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-k", chosen, "-p", "no:cacheprovider"]
    running = subprocess.Popen([*command, "tests/test_accelerator.py"], stdout=subprocess.PIPE, text=True)
    passed, last = 0, "no output"
    for line in running.stdout or []:  # as they come: this part may be ended at its limit
        print(line, end="", flush=True)
        last = line.strip() or last
        passed += " PASSED" in line
        if " PASSED" in line and passed % 5 == 0:
            part.put("tests passed so far", passed)
        if line.startswith(("FAILED", "ERROR")):
            part.put(line.split(" - ")[0], line.partition(" - ")[2][:150])
    part.put("tests/test_accelerator.py, the quickest", last)
    if running.wait() and part.cuda:
        raise SystemExit(running.returncode)


def vq(part: Part) -> None:
    """Measures the tokenizer: ms an image, codes that TF32 changes, memory."""
    number = 2 if part.small else 32
    for size in (64,) if part.small else (256, 384):
        pixels = torch.rand(number, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        exact = image = None
        for case in ("float32", "TF32", "TF32, channels-last", "bf16", "bf16, channels-last"):
            encode, decode = tokenizer_steps(part, case, pixels)
            codes = encode()
            exact = codes if exact is None else exact
            drawn = decode(exact)
            image = drawn if image is None else image
            times = part.seconds(encode, 3), part.seconds(partial(decode, exact), 3)
            shown = ", ".join(f"{took / number * 1e3:.2f}" for took in times)
            part.put(f"{size} pixels, {case}: encoding, decoding, ms an image", shown)
            part.put(
                f"{size} pixels, {case}: codes that differ, pixels' largest difference, GiB decoding",
                f"{(codes != exact).float().mean():.3%}, {(drawn - image).abs().max():.1e}, "
                f"{part.peak(partial(decode, exact)):.1f}",
            )


def tokenizer_steps(part: Part, case: str, pixels: Tensor) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    """Makes VQ-16 ready for a case and returns its two directions: pixels to codes (B, h, w), codes to pixels."""
    from tokenizer import base
    from tokenizer.tokenizer_image.vq_model import VQ_models

    torch.manual_seed(0)
    use_tf32(case.startswith("TF32"))
    base.full_float32 = nullcontext if case.startswith("TF32") else full_float32
    layout = torch.channels_last if "channels" in case else torch.contiguous_format
    model = VQ_models["VQ-16"]().eval().requires_grad_(False)
    if "bf16" in case:
        model.decode_in_bfloat16()
    model = model.to(part.device, memory_format=layout)
    pixels = pixels.to(part.device).contiguous(memory_format=layout)

    @torch.inference_mode()
    def encode() -> Tensor:
        with torch.autocast(part.device.type, torch.bfloat16, enabled="bf16" in case):
            return model.to_codes(pixels)

    @torch.inference_mode()
    def decode(codes: Tensor) -> Tensor:
        return model.to_pixels(codes).float()

    return encode, decode


def main() -> None:
    """Runs the part that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    measures = vars(gpu_sampling) | vars(gpu_training) | globals()
    measures[args.part](Part(args.file, args.device, args.small))


if __name__ == "__main__":
    main()
