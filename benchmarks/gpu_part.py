"""A part of benchmarks/gpu.py: the device, the clock, and the file that takes its figures.

part = Part(Path("OUT/vq.json"), torch.device("cuda"), small=False)
part.put("decoding, ms an image", 5.1)
"""

import json
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from autoregressive.models.generate import generate
from autoregressive.models.gpt import Transformer
from benchmarks.measuring import random_gpt, timed
from utils.files import atomic_write
from utils.rng import image_noise

SAMPLING = {"cfg_scale": 4.0, "top_k": 2000}


class Part:
    """Means of a part: the device, whether models are small, and the file that takes its figures."""

    def __init__(self, file: Path, device: torch.device, small: bool):
        self.file, self.device, self.small = file, device, small
        self.cuda = device.type == "cuda"
        self.rows: list[dict[str, str]] = []

    def put(self, what: str, measured: object) -> None:
        """Adds a figure and writes the file."""
        self.rows.append({"what": what, "measured": str(measured)})
        with atomic_write(self.file) as f:
            f.write(json.dumps({"rows": self.rows}, indent=1).encode())
        print(f"{what}: {measured}", flush=True)

    def attempt(self, what: str, measure: Callable[[], object]) -> None:
        """Adds what `measure` returns as a figure, or the error it raises: the next figure is measured all the same."""
        try:
            self.put(what, measure())
        except Exception as error:
            traceback.print_exc()
            self.put(what, f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")

    def seconds(self, work: Callable[[], object], repeats: int = 1) -> float:
        """Return seconds of a call to its end on the device, the mean over `repeats`."""
        return timed(work, self.device, repeats)

    def peak(self, work: Callable[[], object]) -> float:
        """Return the most memory that a call allocates on the device, GiB; nan on a CPU."""
        if not self.cuda:
            work()
            return float("nan")
        torch.cuda.reset_peak_memory_stats(self.device)
        self.seconds(work)
        return torch.cuda.max_memory_allocated(self.device) / 2**30

    def captured(self, work: Callable[[], object], calls: int) -> float:
        """Microseconds of a call inside a CUDA graph of `calls`; outside a graph on a CPU."""
        work()
        if not self.cuda:
            return self.seconds(work, calls) * 1e6
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
        graph.replay()
        return self.seconds(graph.replay, 20) / calls * 1e6

    def gpt(self, name: str, tokens: int, **changes: int) -> Transformer:
        """Return a model with random weights in bf16, of two layers of GPT-XS where models are small."""
        if self.small:
            groups = {key: value for key, value in changes.items() if key == "ar_token_num"}
            name, tokens, changes = "GPT-XS", 16, {"n_layer": 2, "vocab_size": 4096, **groups}
        model = random_gpt(name, tokens, self.device, **changes)
        return model.to(torch.bfloat16).eval().requires_grad_(False)

    def draw(self, model: Transformer, batch: int, compile: bool = True, **settings: object) -> float:
        """Draws images with the published guidance and top-k; returns the seconds."""
        noise = image_noise(1, range(batch), model.layout.tokens)
        labels = torch.arange(batch, device=self.device) % 1000
        asked = {"compile": compile and self.cuda, **SAMPLING, **settings}
        return self.seconds(lambda: generate(model, labels, noise=noise, **asked))


def memory_held() -> str:
    """Return the peaks of the process: allocated and reserved, GiB."""
    return f"{torch.cuda.max_memory_allocated() / 2**30:.2f}, {torch.cuda.max_memory_reserved() / 2**30:.2f}"
