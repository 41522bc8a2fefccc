"""The parts of benchmarks/gpu.py that train: a step, the scripts on random codes, FSDP2 killed and resumed."""

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

from autoregressive.train.class_data import train_classes
from autoregressive.train.flags import class_flags
from benchmarks.gpu_part import Part, memory_held


def training(part: Part) -> None:
    """Measures a training step as the scripts take it: tokens a second, MFU, memory beside the plan."""
    from autoregressive.train.flops import training_flops_per_image
    from benchmarks.measuring import project_step, random_batch, random_gpt
    from utils.distributed import Distributed
    from utils.flops import peak_flops

    peak = peak_flops(part.device, "bf16")
    for name in ("GPT-B", "GPT-L"):
        images, tokens = (2, 16) if part.small else (64, 256)
        if part.cuda:
            torch.cuda.reset_peak_memory_stats()
        model = random_gpt("GPT-XS" if part.small else name, tokens, part.device)
        step = project_step(model, "bf16", Distributed(part.device))
        step = partial(step, *random_batch(images, tokens, part.device))
        part.put(f"{name}: first step, s", f"{part.seconds(step):.1f}")
        part.seconds(step, 3)
        took = part.seconds(step, 2 if part.small else 20)
        flops = images * training_flops_per_image(model)
        part.put(f"{name}, batch {images}: tokens/s", f"{images * tokens / took:,.0f}")
        part.put(f"{name}: MFU", f"{flops / took / peak:.1%}" if peak else "peak unknown")
        if part.cuda:
            part.put(f"{name}: GiB allocated, reserved at most", memory_held())
        del model, step


class Scripts:
    """Runs the training scripts on random codes in a folder of their own."""

    def __init__(self, part: Part, folder: Path):
        self.part, self.folder = part, folder
        self.gpt = "GPT-XS" if part.small else "GPT-B"

    def codes(self, side: int, images: int) -> Path:
        """Makes a folder of random codes, `side` x `side` tokens an image."""
        import numpy as np

        from dataset.code_files import CodeSettings, CodeWriter

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
        """Return the flags of a run on codes of this size."""
        size, batch = 16 * side, 4 if self.part.small else 32
        common = ["--code-path", self.codes(side, 512), "--image-size", size, "--gpt-model", self.gpt, "--no-wandb"]
        common += ["--num-workers", 2, "--epochs", 99, "--device", self.part.device, "--log-every", 5]
        common += ["--results-dir", self.folder / results, "--global-batch-size", batch, *more]
        return [str(word) for word in common]

    def train(self, side: int, results: str, *more: object) -> None:
        """Train as train_c2i.py does, in this process."""
        train_classes(class_flags(None).parse_args(self.flags(side, results, *more)))

    def last(self, results: str) -> Path:
        """Return the newest checkpoint of a run."""
        from utils.runs import find_checkpoint

        return find_checkpoint(self.folder / results)


def runs(part: Part) -> None:
    """Runs train_c2i.py: places that wait for the device, recompilations by pictures, two equal runs bit by bit."""
    side, long = (4, 6) if part.small else (16, 24)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before the first product, for the runs with --deterministic
    with TemporaryDirectory() as folder:
        scripts = Scripts(part, Path(folder))
        if part.cuda:
            quiet = ("--no-compile", "--max-steps", 20, "--log-every", 10, "--ckpt-every", 1000)
            waits = waiting_places(partial(scripts.train, side, "waits", *quiet))
            for place, count in waits.most_common(6):
                part.put(f"waits for the device at {place}", count)
            part.put("waits for the device in 20 steps, all places", sum(waits.values()))
        for tokens in (side, long):
            for way in ((), ("--deterministic",)):
                for run in "ab":
                    scripts.train(tokens, f"{tokens}{way}{run}", "--no-compile", "--max-steps", 10, *way)
                torch.use_deterministic_algorithms(False)
                name = (
                    f"two equal runs of 10 steps, {tokens**2} tokens{' ' + way[0] if way else ''}: tensors that differ"
                )
                part.put(name, differing(*(scripts.last(f"{tokens}{way}{run}") for run in "ab")))
        torch._dynamo.reset()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        pictures = ("--vq-ckpt", tokenizer_file(Path(folder)), "--sample-every", 5, "--max-steps", 12)
        took = part.seconds(partial(scripts.train, side, "pictures", *pictures))
        made = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
        part.put("graphs compiled by 12 steps with pictures twice", made)
        part.put("seconds of that run", f"{took:.0f}")


def waiting_places(work: Callable[[], object]) -> Counter:
    """Counts the calls that wait for the device, by the innermost line of this project."""
    found, root = Counter(), str(Path(__file__).parent.parent)
    show = warnings.showwarning

    def note(message: Warning | str, *rest: object, **more: object) -> None:
        if "synchroniz" in str(message):
            lines = [
                f for f in traceback.extract_stack() if f.filename.startswith(root) and "gpu_training" not in f.filename
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


def fsdp(part: Part) -> None:
    """Trains with FSDP2 in one process, kills it, resumes, and takes the seconds of a checkpoint."""
    with TemporaryDirectory() as folder:
        scripts = Scripts(part, Path(folder))
        scripts.gpt = "GPT-XS" if part.small else "GPT-B"
        flags = scripts.flags(4 if part.small else 16, "fsdp", "--ema", "--ckpt-every", 10)
        script = [sys.executable, "autoregressive/train/train_c2i_fsdp.py", *flags, "--max-steps"]
        began = time.monotonic()
        running = subprocess.Popen([*script, "1000000"], start_new_session=True)
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
        part.put("killed after the checkpoint of step", step)
        began = time.monotonic()
        subprocess.run([*script, str(step + 5), "--resume"], check=True, timeout=60)
        part.put("resumed for 5 steps, s in all", f"{time.monotonic() - began:.1f}")
        part.put("last checkpoint", scripts.last("fsdp").name)
