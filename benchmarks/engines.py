"""What draws tokens how fast: vLLM's engine, ImagePipeline and a plain loop, one after the other on the same weights.

    .venv-serve/bin/python benchmarks/engines.py --gpt-model GPT-B --precision bf16        # bash scripts/setup.sh serve
    .venv-serve/bin/python benchmarks/engines.py --gpt-model GPT-B --batches 8 --engines vllm-compiled pipeline --device cuda

Random weights, 256-pixel images of 256 tokens, guidance 4, top-k 2000; tokens only. vLLM runs in its own process, as it
does in the server; requests come all at once.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from autoregressive.models.sizes import GPT_SIZES
from utils.cli import flag_parser, positive_int, run_script

if TYPE_CHECKING:
    import torch

ENGINES = ["plain", "pipeline", "vllm", "vllm-compiled"]
SAMPLING = {"cfg_scale": 4.0, "top_k": 2000}


def main(args: argparse.Namespace) -> None:
    import torch

    from autoregressive.models.gpt import GPT_models
    from autoregressive.pipeline import PRECISIONS
    from utils.checkpoint import save_checkpoint
    from utils.distributed import pick_device

    device, dtype = pick_device(args.device), PRECISIONS[args.precision]
    shape = {"block_size": args.tokens, "num_classes": 1000}
    torch.manual_seed(0)
    model = GPT_models[args.gpt_model](**shape)
    torch.nn.init.normal_(model.output.weight, std=0.02)  # zeros at first; with draws all over the codebook
    size = {"image_size": int(args.tokens**0.5) * 16, "downsample_size": 16}
    recorded = argparse.Namespace(gpt_model=args.gpt_model, gpt_type="c2i", num_classes=1000, **size)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gpt.pt"
        save_checkpoint(file, {"model": model.state_dict(), "args": recorded})
        model = model.to(device, dtype).requires_grad_(False).eval()
        for engine in args.engines:
            if engine.startswith("vllm"):
                seconds[engine] = time_vllm(file, dtype, args, compiled=engine == "vllm-compiled")
            else:
                seconds[engine] = time_here(engine, model, args)
            print(f"{engine}: " + ", ".join(f"{batch}: {s:.2f} s" for batch, s in zip(args.batches, seconds[engine])))
    print(f"\n{args.gpt_model}, {args.tokens} tokens, {args.precision}, images/s:\n")
    print("| | " + " | ".join(f"{batch} image{'s' * (batch > 1)}" for batch in args.batches) + " |")
    print("|---|" + "---|" * len(args.batches))
    for engine, times in seconds.items():
        cells = [f"{batch / s:.3g}" for batch, s in zip(args.batches, times)]
        if "plain" in seconds and engine != "plain":
            cells = [
                f"{cell} ({base / s:.2f}x)" for cell, s, base in zip(cells, times, seconds["plain"])
            ]  # of the plain loop
        print(f"| {engine} | " + " | ".join(cells) + " |")


def time_here(engine: str, model: "torch.nn.Module", args: argparse.Namespace) -> list[float]:
    """Seconds of each batch in this process."""
    import torch

    from autoregressive.models.generate import generate
    from benchmarks.plain_loop import plain_generate

    def draw(labels: "torch.Tensor") -> None:
        if engine == "plain":
            plain_generate(model, labels, **SAMPLING)
        else:
            generate(model, labels, compile=labels.device.type == "cuda", **SAMPLING)
        if labels.device.type == "cuda":
            torch.cuda.synchronize()

    device = model.tok_embeddings.weight.device
    if engine == "plain":
        plain_generate(model, torch.zeros(1, dtype=torch.long, device=device), steps=8, **SAMPLING)
    else:
        draw(torch.zeros(1, dtype=torch.long, device=device))
    times = []
    for batch in args.batches:
        labels = torch.arange(batch, device=device) % 1000
        if device.type == "cuda":
            draw(labels)
        times.append(min(timed(lambda: draw(labels)) for _ in range(args.repeats)))  # noqa: B023
    return times


def timed(work) -> float:  # noqa: ANN001
    """Seconds of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def time_vllm(file: Path, dtype: "torch.dtype", args: argparse.Namespace, *, compiled: bool) -> list[float]:
    """Seconds of each batch in an engine that has drawn before."""
    from autoregressive.serve.engine import ImageRequest
    from autoregressive.serve.vllm_engine import ServedModel, VllmEngine

    async def measure() -> list[float]:
        began = time.perf_counter()
        engine = await VllmEngine.start(
            ServedModel(file, dtype=dtype), max_num_seqs=max(args.batches), enforce_eager=not compiled
        )
        print(f"vLLM {'compiled' if compiled else 'eager'} started in {time.perf_counter() - began:.1f} s")

        async def draw(batch: int) -> float:
            async def one(i: int) -> None:
                async for _ in engine.generate(ImageRequest(label=i % 1000, seed=i, **SAMPLING)):
                    pass

            began = time.perf_counter()
            await asyncio.gather(*map(one, range(batch)))
            return time.perf_counter() - began

        try:
            await draw(1)
            return [min([await draw(batch) for _ in range(args.repeats)]) for batch in args.batches]
        finally:
            await engine.close()

    return asyncio.run(measure())


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--gpt-model", choices=list(GPT_SIZES), default="GPT-B", help="the model's size")
    parser.add_argument("--tokens", type=positive_int, default=256, help="of an image, a square number")
    parser.add_argument("--batches", type=positive_int, nargs="+", default=[1, 8, 32], help="images at once")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="what to time")
    parser.add_argument("--precision", choices=["none", "fp16", "bf16"], default="bf16", help="of the weights")
    parser.add_argument("--repeats", type=positive_int, default=1, help="of each figure; the best counts")
    parser.add_argument(
        "--device", default=None, help="of the pipeline and the plain loop (default: the best there is)"
    )
    return parser


if __name__ == "__main__":
    run_script(main, flags())
