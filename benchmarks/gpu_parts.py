"""The parts of benchmarks/gpu.py: each measures one thing and writes every figure at once, beside its prediction.

    python3 -m benchmarks.gpu_parts sampling_b OUT/sampling_b.json --device cuda

Predictions are for an H100 at 3.0 TB/s, made by reading the code before any GPU had run it; "-" where none was made. The
weights are random: speed does not depend on their values.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoregressive.models.generate import generate, release_cache
from autoregressive.models.gpt import GPT_models, Transformer
from autoregressive.quantization import quantize, require_torchao
from utils.files import atomic_write

SAMPLING = {"cfg_scale": 4.0, "top_k": 2000}
BACKENDS = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


class Part:
    """What a part works with: the device, whether models are small, and the file that takes its figures."""

    def __init__(self, file: Path, device: torch.device, small: bool):
        self.file, self.device, self.small = file, device, small
        self.cuda = device.type == "cuda"
        self.rows: list[dict[str, str]] = []

    def put(self, what: str, measured: object, predicted: str = "-") -> None:
        """Adds a figure and writes the file."""
        self.rows.append({"what": what, "measured": str(measured), "predicted": predicted})
        with atomic_write(self.file) as f:
            f.write(json.dumps({"rows": self.rows}, indent=1).encode())
        print(f"{what}: {measured} ({predicted})", flush=True)

    def attempt(self, what: str, measure: Callable[[], object], predicted: str = "-") -> None:
        """Adds what `measure` returns as a figure, or the error it raises: the next figure is measured all the same."""
        try:
            self.put(what, measure(), predicted)
        except Exception as error:
            traceback.print_exc()
            self.put(what, f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")

    def seconds(self, work: Callable[[], object], repeats: int = 1) -> float:
        """Seconds of a call to its end on the device, the mean over `repeats`."""
        self.wait()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        self.wait()
        return (time.perf_counter() - began) / repeats

    def wait(self) -> None:
        """Waits for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def peak(self, work: Callable[[], object]) -> float:
        """The most memory that a call allocates on the device, GiB; nan on a CPU."""
        if not self.cuda:
            work()
            return float("nan")
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) / 2**30

    def captured(self, work: Callable[[], object], calls: int) -> float:
        """Microseconds of a call inside a CUDA graph of `calls`; outside a graph on a CPU."""
        work()
        if not self.cuda:
            return self.seconds(work, calls) * 1e6
        graph = torch.cuda.CUDAGraph()
        self.wait()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
        graph.replay()
        return self.seconds(graph.replay, 20) / calls * 1e6

    def gpt(self, name: str, tokens: int, **changes: int) -> Transformer:
        """A model with random weights in bf16, of two layers of GPT-XS where models are small."""
        if self.small:
            groups = {key: value for key, value in changes.items() if key == "ar_token_num"}
            name, tokens, changes = "GPT-XS", 16, {"n_layer": 2, "vocab_size": 4096, **groups}
        torch.manual_seed(0)
        with self.device:
            model = GPT_models[name](block_size=tokens, **changes)
            torch.nn.init.normal_(model.output.weight, std=0.02)
        return model.to(torch.bfloat16).eval().requires_grad_(False)

    def draw(self, model: Transformer, batch: int, compile: bool = True, **settings: object) -> float:
        """Draws images with the published guidance and top-k; returns the seconds."""
        noise = torch.rand(batch, model.layout.tokens, generator=torch.Generator().manual_seed(1))
        labels = torch.arange(batch, device=self.device) % 1000
        asked = {"compile": compile, **SAMPLING, **settings}
        return self.seconds(lambda: generate(model, labels, noise=noise, **asked))


def machine(part: Part) -> None:
    """Measures the card: versions, bandwidth, rate of products, SDPA backends for one query row."""
    from benchmarks.sampling import bandwidth
    from utils.flops import peak_flops

    cudnn = torch.backends.cudnn.version() if part.cuda else None
    part.put(
        "torch, CUDA, cuDNN, Python", f"{torch.__version__}, {torch.version.cuda}, {cudnn}, {sys.version.split()[0]}"
    )
    part.put("device", torch.cuda.get_device_name(part.device) if part.cuda else "CPU")
    if part.cuda:
        part.attempt("memory bandwidth, TB/s", lambda: f"{bandwidth(part.device) / 1e12:.2f}", "3.0")
    side = 256 if part.small else 8192
    for dtype, predicted in ((torch.bfloat16, "600-700"), (torch.float32, "40-55")):
        a = torch.randn(side, side, device=part.device, dtype=dtype)
        part.attempt(
            f"product of {side}x{side} matrices, {str(dtype)[6:]}, TFLOP/s",
            lambda a=a: (
                f"{2 * side**3 / (part.seconds(lambda: a @ a, 3) and part.seconds(lambda: a @ a, 10)) / 1e12:.1f}"
            ),
            predicted,
        )
    part.put("peak in bf16 by utils/flops.py, TFLOP/s", (peak_flops(part.device, "bf16") or 0) / 1e12)
    rows = 64 if part.small else 576
    for heads, width in ((12, 64), (32, 100), (32, 128)):
        q = torch.randn(16, heads, 1, width, device=part.device, dtype=torch.bfloat16)
        k = torch.randn(16, heads, rows + 1, width, device=part.device, dtype=torch.bfloat16)[:, :, :rows]
        bias = torch.zeros(16, 1, 1, rows, device=part.device, dtype=torch.bfloat16)
        for title, mask in (("no mask", None), ("mask", bias)):
            part.attempt(
                f"SDPA, one row, {heads} heads of {width}, {title}, us in a graph",
                lambda q=q, k=k, mask=mask: attention_times(part, q, k, mask),
                "10-15 cuDNN, 14-20 efficient" if width != 100 else "mask: math alone",
            )


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
    chosen = "recorded_steps or one_image or drawn_ahead or (training_losses and raster and bf16)"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", chosen, "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "tests/test_accelerator.py"], capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:])
    lines = done.stdout.strip().splitlines() or ["no output"]
    part.put("tests/test_accelerator.py, the quickest", lines[-1], "passed")
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            part.put(line.split(" - ")[0], line.partition(" - ")[2][:150])
    if done.returncode and part.cuda:
        raise SystemExit(done.returncode)


def sampling(part: Part, name: str, recorded: str, plain: str, eager: str) -> None:
    """Measures a step of 8 guided images: the plain loop, ours as it is, ours compiled and recorded."""
    from benchmarks.plain_loop import plain_generate

    model = part.gpt(name, 576)
    tokens, labels, batch = model.layout.tokens, torch.arange(8, device=part.device), 8
    read = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "embedding" not in n)
    cache = 2 * 16 * model.args.n_layer * model.args.dim * 2 * (tokens + 1) / 2
    part.put("bytes of a step, mean: weights + caches, GB", f"{read / 1e9:.3f} + {cache / 1e9:.3f}")
    some = min(32, tokens)
    loop = lambda: plain_generate(model, labels, steps=some, **SAMPLING)  # noqa: E731
    loop()
    part.put("plain loop, ms a step", f"{part.seconds(loop) / some * 1e3:.3f}", plain)
    some = min(64, tokens - 1)
    first = part.draw(model, batch, compile=False, max_new_tokens=some)
    again = part.draw(model, batch, compile=False, max_new_tokens=some)
    part.put(
        f"eager, first {some} tokens of a process, ms a step", f"{first / some * 1e3:.2f}", "20-100 if cuDNN plans"
    )
    part.put("eager, the same again, ms a step", f"{again / some * 1e3:.3f}", eager)
    part.put("compiled and recorded, first call, s", f"{part.draw(model, batch):.1f}", "25-60 (B), 60-120 (XL, 3B)")
    part.draw(model, batch)
    step = min(part.draw(model, batch) for _ in range(2)) / tokens
    part.put("compiled and recorded, ms a step", f"{step * 1e3:.3f}", recorded)
    part.put("bytes read by it, TB/s", f"{(read + cache) / step / 1e12:.2f}", "0.3 (B), 1.1 (XL), 2.2 (3B) of 3.0")
    part.put("images a second", f"{batch / step / tokens:.2f}")
    if part.cuda:
        part.put("memory at most, GiB allocated, reserved", memory_held())


def memory_held() -> str:
    """Returns the peaks of the process: allocated and reserved, GiB."""
    return f"{torch.cuda.max_memory_allocated() / 2**30:.2f}, {torch.cuda.max_memory_reserved() / 2**30:.2f}"


def sampling_b(part: Part) -> None:
    """Measures GPT-B."""
    sampling(part, "GPT-B", "0.6-0.8", "4-6", "3-4")
    if part.cuda:
        part.attempt("kernels of a recorded step", lambda: kernels_of_a_step(part), "220")


def kernels_of_a_step(part: Part) -> str:
    """Counts the kernels of GPT-B's recorded steps by the profiler, and names those that take most time."""
    from torch.profiler import ProfilerActivity, profile

    model, some = part.gpt("GPT-B", 576), 33
    for _ in range(3):
        part.draw(model, 8, max_new_tokens=some)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        part.draw(model, 8, max_new_tokens=some)
    events = found.key_averages()
    print(events.table(sort_by="self_device_time_total", row_limit=20, max_name_column_width=70))
    most = sorted(events, key=lambda event: -event.self_device_time_total)[:4]
    return f"{sum(e.count for e in events) / (some - 1):.0f}; " + ", ".join(
        f"{e.key[:40]} {e.self_device_time_total / (some - 1):.0f} us" for e in most
    )


def sampling_xl(part: Part) -> None:
    """Measures GPT-XL."""
    sampling(part, "GPT-XL", "1.9-2.7", "12-18", "10-12")


def sampling_3b(part: Part) -> None:
    """Measures GPT-3B, whose heads have 100 channels."""
    sampling(part, "GPT-3B", "3.3-4.0", "8-12", "8-9")


def mends(part: Part) -> None:
    """Checks on cut models what reading found: backends of bf16, caches larger than the batch, heads of 100, the draw."""
    from autoregressive.models.sampling import SamplingConfig, choose, guide

    few = {"n_layer": 2}
    model = part.gpt("GPT-XL", 576, **few)
    part.attempt("2 layers of XL, 32 images, unguided, ms a step", lambda: step_of(part, model, 32, cfg_scale=1.0))
    part.attempt("the same guided", lambda: step_of(part, model, 32))
    wanted = "as the first line; slower: the cache is copied"
    part.attempt("unguided again, in the guided call's cache", lambda: step_of(part, model, 32, cfg_scale=1.0), wanted)
    part.attempt("guided to step 100 of 576", lambda: step_of(part, model, 32, cfg_interval=100), "below guided")
    release_cache(model)
    for heads, width in ((32, 100), (25, 128)):
        cut = part.gpt("GPT-3B", 576, n_head=heads, dim=3200, **few)
        wanted = "as heads of 128" if width == 100 else "-"
        part.attempt(f"2 layers of 3B, heads of {width}, ms a step", lambda cut=cut: step_of(part, cut, 8), wanted)
        del cut
    batch, vocab = 8, 16384
    logits = torch.randn(2 * batch, 1, vocab, device=part.device)
    noise = torch.rand(batch, 1, device=part.device)
    for settings in ({"top_k": 2000}, {"top_k": 2000, "top_p": 0.9}, {}):
        config = SamplingConfig(cfg_scale=4.0, **settings)
        numbers = torch.tensor(config.numbers, device=part.device)
        draw = lambda c=config, n=numbers: choose(guide(logits[:batch], logits[batch:], n[0]), c, noise, n)  # noqa: E731
        part.attempt(f"the draw, {settings or 'no filter'}, us", lambda d=draw: f"{part.captured(d, 1):.0f}", "100-150")
    part.attempt("recordings after other batches, settings and moved weights", lambda: follow(part), "0 of 45 disagree")


def step_of(part: Part, model: Transformer, batch: int, **settings: object) -> str:
    """Measures a recorded step, ms: the third call, after compilation and recording."""
    for _ in range(2):
        part.draw(model, batch, **settings)
    return f"{part.draw(model, batch, **settings) / model.layout.tokens * 1e3:.3f}"


def follow(part: Part) -> str:
    """Compares recorded draws with plain ones over batches and settings, with the model moved away and back."""
    torch.manual_seed(0)
    model = GPT_models["GPT-XS"](block_size=64, vocab_size=64).eval().requires_grad_(False)
    torch.nn.init.normal_(model.output.weight, std=0.02)
    model, wrong = model.to(part.device), 0
    settings = ({}, {"temperature": 0.7}, {"top_k": 9, "top_p": 0.8}, {"cfg_scale": 1.0}, {"cfg_interval": 5})
    for _ in range(1 if part.small else 3):
        for batch in (4, 8, 4):
            noise = torch.rand(batch, 64, generator=torch.Generator().manual_seed(2))
            labels = torch.arange(batch, device=part.device)
            for asked in settings:
                asked = {"cfg_scale": 4.0, "top_k": 16, **asked}
                drawn = [generate(model, labels, noise=noise, compile=way, **asked) for way in (True, False)]
                wrong += bool((drawn[0][:, :8] != drawn[1][:, :8]).float().mean() > 0.1)
        model.to("cpu"), model.to(part.device)
    return f"{wrong} disagree"


def batch(part: Part) -> None:
    """Measures images a second at 16x16 tokens for growing batches."""
    model = part.gpt("GPT-B", 256)
    for images in (2,) if part.small else (32, 64, 128, 256):
        part.attempt(f"{images} guided images at once, images/s", lambda n=images: rate_of(part, model, n))


def rate_of(part: Part, model: Transformer, images: int) -> str:
    """Measures images a second of recorded steps."""
    for _ in range(2):
        part.draw(model, images)
    return f"{images / part.draw(model, images):.1f}"


def training(part: Part) -> None:
    """Measures a training step as the scripts take it: tokens a second, MFU, memory beside the plan."""
    from autoregressive.train.flops import training_flops_per_image
    from benchmarks.training_step import project_step, random_batch, random_model
    from utils.distributed import Distributed
    from utils.flops import peak_flops

    predicted = {
        "GPT-B": ("430-545k", "27-34 %", "7.4-8.6"),
        "GPT-L": ("146-182k", "30-37 %", "19.8-22.5"),
    }
    peak = peak_flops(part.device, "bf16")
    for name, (speed, use, memory) in predicted.items():
        args = argparse.Namespace(
            gpt_model="GPT-XS" if part.small else name,
            image_size=64 if part.small else 256,
            downsample_size=16,
            batch_size=2 if part.small else 64,
            mixed_precision="bf16",
        )
        if part.cuda:
            torch.cuda.reset_peak_memory_stats()
        dist = Distributed(part.device)
        model = random_model(args, dist)
        step = partial(project_step(model, args, dist), *random_batch(args, dist))
        part.put(f"{name}: first step, s", f"{part.seconds(step):.1f}", "15-40")
        part.seconds(step, 3)
        took = part.seconds(step, 2 if part.small else 20)
        tokens = args.batch_size * model.args.block_size
        flops = args.batch_size * training_flops_per_image(model.args)
        part.put(f"{name}, batch {args.batch_size}: tokens/s", f"{tokens / took:,.0f}", speed)
        part.put(f"{name}: MFU", f"{flops / took / peak:.1%}" if peak else "peak unknown", use)
        if part.cuda:
            part.put(f"{name}: GiB allocated, reserved at most", memory_held(), memory)
        del model, step


class Scripts:
    """Runs the training scripts on random codes in a folder of their own."""

    def __init__(self, part: Part, folder: Path):
        self.part, self.folder = part, folder
        self.gpt = "GPT-XS" if part.small else "GPT-B"

    def codes(self, side: int, images: int) -> Path:
        """Makes a folder of random codes, `side` x `side` tokens an image."""
        import numpy as np

        from dataset.codes import CodeSettings, CodeWriter

        path = self.folder / f"codes{side}"
        settings = CodeSettings(
            dataset="random", image_size=16 * side, tokens=side**2, views=["center"], codebook_size=16384,
            num_images=images, num_classes=1000,
        )  # fmt: skip
        if not path.exists():
            draw = np.random.default_rng(0)
            codes = draw.integers(16384, size=(images, 1, side**2))
            CodeWriter(path, settings).write_shard(0, codes, draw.integers(1000, size=images), np.arange(images))
        return path

    def flags(self, side: int, results: str, *more: object) -> list[str]:
        """Returns the flags of a run on codes of this size."""
        common = [
            "--code-path",
            self.codes(side, 512),
            "--image-size",
            16 * side,
            "--gpt-model",
            self.gpt,
            "--no-wandb",
        ]
        common += [
            "--num-workers",
            2,
            "--epochs",
            99,
            "--device",
            self.part.device,
            "--results-dir",
            self.folder / results,
        ]
        common += ["--global-batch-size", 4 if self.part.small else 32, "--log-every", 5, *more]
        return [str(word) for word in common]

    def command(self, script: str, flags: list[str]) -> list[str]:
        """Returns the command line of a training script."""
        return [sys.executable, f"autoregressive/train/{script}.py", *flags]

    def last(self, results: str) -> Path:
        """Returns the newest checkpoint of a run."""
        from utils.runs import find_checkpoint

        return find_checkpoint(self.folder / results)


def runs(part: Part) -> None:
    """Runs train_c2i.py: places that wait for the device, recompilations by pictures, two equal runs bit by bit."""
    from autoregressive.train import train_c2i

    side, long = (4, 6) if part.small else (16, 24)
    with TemporaryDirectory() as folder:
        scripts = Scripts(part, Path(folder))
        if part.cuda:
            waits = waiting_places(lambda: train_c2i.main(train_c2i.flags().parse_args(
                scripts.flags(side, "waits", "--max-steps", 20, "--log-every", 10, "--ckpt-every", 1000)
            )))  # fmt: skip
            for place, count in waits.most_common(6):
                part.put(f"waits for the device at {place}", count, "log lines and checkpoint alone")
            part.put("waits for the device in 20 steps, all places", sum(waits.values()), "below 20")
        torch._dynamo.reset()
        graphs = Counter(torch._dynamo.utils.counters["stats"])["unique_graphs"]
        pictures = ["--vq-ckpt", tokenizer_file(Path(folder)), "--sample-every", 5, "--max-steps", 12]
        took = part.seconds(
            lambda: train_c2i.main(train_c2i.flags().parse_args(scripts.flags(side, "pictures", *pictures)))
        )
        made = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
        part.put("graphs compiled by 12 steps with pictures twice", made, "2-3; 93 and more: pictures are compiled")
        part.put("seconds of that run", f"{took:.0f}")
        for tokens in (side, long):
            for attempt in "ab":
                command = scripts.command("train_c2i", scripts.flags(tokens, f"{tokens}{attempt}", "--max-steps", 10))
                subprocess.run(command, check=True, timeout=60)
            part.put(
                f"two equal runs of 10 steps, {tokens**2} tokens: tensors that differ",
                differing(scripts.last(f"{tokens}a"), scripts.last(f"{tokens}b")),
                "0 at 256 perhaps, not at 576",
            )


def waiting_places(work: Callable[[], object]) -> Counter:
    """Counts the calls that wait for the device, by the innermost line of this project."""
    found, root = Counter(), str(Path(__file__).parent.parent)
    show = warnings.showwarning

    def note(message: Warning | str, *rest: object, **more: object) -> None:
        if "synchroniz" in str(message):
            lines = [
                f for f in traceback.extract_stack() if f.filename.startswith(root) and "gpu_parts" not in f.filename
            ]
            found[f"{os.path.relpath(lines[-1].filename, root)}:{lines[-1].lineno}" if lines else "a library"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = show
    return found


def tokenizer_file(folder: Path) -> Path:
    """Writes a VQ-16 with random weights and returns the file."""
    from tokenizer.tokenizer_image.vq_model import VQ_models

    torch.manual_seed(0)
    torch.save({"model": VQ_models["VQ-16"]().state_dict()}, folder / "vq.pt")
    return folder / "vq.pt"


def differing(first: Path, second: Path) -> str:
    """Counts the weights of two checkpoints that are not equal to the bit."""
    from utils.checkpoint import read_checkpoint

    a, b = (read_checkpoint(path).model for path in (first, second))
    unequal = [name for name in a if not torch.equal(a[name], b[name])]
    most = max((float((a[name] - b[name]).abs().max()) for name in unequal), default=0.0)
    return f"{len(unequal)} of {len(a)}" + (f", by {most:.1e} at most" if unequal else "")


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
            predicted = {"TF32": "4.5-7 decoding at 384", "bf16": "2.5-4.5 decoding at 384"}.get(case, "-")
            part.put(
                f"{size} pixels, {case}: encoding, decoding, ms an image",
                ", ".join(f"{took / number * 1e3:.2f}" for took in times),
                predicted,
            )
            part.put(
                f"{size} pixels, {case}: codes that differ, pixels' largest difference, GiB decoding",
                f"{(codes != exact).float().mean():.3%}, {(drawn - image).abs().max():.1e}, "
                f"{part.peak(partial(decode, exact)):.1f}",
                "0.3-2 % of codes" if case == "TF32" else "-",
            )


def tokenizer_steps(part: Part, case: str, pixels: Tensor) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    """Makes VQ-16 ready for a case and returns its two directions: pixels to codes (B, N), codes to pixels."""
    from tokenizer.tokenizer_image.vq_model import VQ_models

    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = case.startswith("TF32")
    layout = torch.channels_last if "channels" in case else torch.contiguous_format
    model = VQ_models["VQ-16"]().eval().requires_grad_(False)
    if "bf16" in case:
        model.decode_in_bfloat16()
    model = model.to(part.device, memory_format=layout)
    pixels = pixels.to(part.device).contiguous(memory_format=layout)
    side = pixels.shape[-1] // 16

    @torch.inference_mode()
    def encode() -> Tensor:
        with torch.autocast(part.device.type, torch.bfloat16, enabled="bf16" in case):
            return model.encode(pixels)[2][2].view(len(pixels), -1)

    @torch.inference_mode()
    def decode(codes: Tensor) -> Tensor:
        return model.decode_code(codes, (len(pixels), 8, side, side)).float()

    return encode, decode


def fsdp(part: Part) -> None:
    """Trains with FSDP2 in one process, kills it, resumes, and takes the seconds of a checkpoint."""
    with TemporaryDirectory() as folder:
        scripts = Scripts(part, Path(folder))
        scripts.gpt = "GPT-XS" if part.small else "GPT-L"
        flags = scripts.flags(4 if part.small else 16, "fsdp", "--ema", "--ckpt-every", 10)
        command = scripts.command("train_c2i_fsdp", [*flags, "--max-steps", "1000000"])
        began = time.monotonic()
        running = subprocess.Popen(command, start_new_session=True)
        while time.monotonic() - began < 35 and running.poll() is None:
            if list((Path(folder) / "fsdp").glob("*/checkpoints/0000020")):
                break
            time.sleep(0.05)
        part.put("seconds to the second checkpoint, at step 20", f"{time.monotonic() - began:.1f}")
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        log = next((Path(folder) / "fsdp").glob("*/log.txt")).read_text()
        print(log)
        step = int(scripts.last("fsdp").name)
        part.put("killed after the checkpoint of step", step, "20 or 30")
        began = time.monotonic()
        subprocess.run(
            scripts.command("train_c2i_fsdp", [*flags, "--resume", "--max-steps", str(step + 5)]),
            check=True,
            timeout=60,
        )
        part.put("resumed for 5 steps, s in all", f"{time.monotonic() - began:.1f}")
        part.put("last checkpoint", scripts.last("fsdp").name, f"{step + 5:07d}")


def int8_par(part: Part) -> None:
    """Measures PAR's four tokens a step, and int8 weights where torchao is installed."""
    model = part.gpt("GPT-B", 576, ar_token_num=4)
    part.attempt("PAR 4x, GPT-B, 24x24, 8 images: images/s", lambda: rate_of(part, model, 8), "3 times raster's")
    release_cache(model)
    try:
        require_torchao()
    except ValueError:
        part.put("int8", "torchao is not installed: not measured")
        return
    small = part.gpt("GPT-XL", 576, n_layer=4)
    part.attempt("XL of 4 layers, bf16, ms a step", lambda: step_of(part, small, 8))
    release_cache(small)
    quantize(small)
    part.attempt("the same in int8", lambda: step_of(part, small, 8), "2 times slower than bf16")


PARTS = [machine, tests, sampling_b, mends, training, sampling_xl, sampling_3b, runs, vq, batch, fsdp, int8_par]


def main() -> None:
    """Runs the part that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[part.__name__ for part in PARTS])
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    chosen = next(part for part in PARTS if part.__name__ == args.part)
    chosen(Part(args.file, args.device, args.small))


if __name__ == "__main__":
    main()
