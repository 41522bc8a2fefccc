"""What the tests of the vLLM engine share: an engine that lives through a module's tests, and what ImagePipeline draws."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import torch

from autoregressive.pipeline import ImagePipeline, load_gpt
from autoregressive.request import Request
from autoregressive.serve.vllm_engine import ServedModel, VllmEngine
from tokenizer.load import load_tokenizer

# Fewer places than images, an odd number of them, and a cache in which five images find room but do not stay: an image
# of 65 rows takes three blocks, and the nine blocks there are (one of which vLLM keeps) serve two and a half.
SETTINGS = {"max_num_seqs": 5, "block_size": 32, "num_gpu_blocks_override": 9, "enforce_eager": True}


class Running:
    """An engine and the event loop it lives in."""

    def __init__(self, gpt: Path, **settings):
        self.runner = asyncio.Runner()
        self.gpt, self.model = load_gpt(gpt), ServedModel(gpt, dtype=torch.float32)
        self.engine = self.runner.run(VllmEngine.start(self.model, **(SETTINGS | settings)))

    def close(self) -> None:
        self.runner.run(self.engine.close())
        self.runner.close()

    def draw(self, requests: Sequence[Request], delays: Sequence[float] | None = None, failures=False) -> list:
        """The tokens of requests that come all at once, or each so many seconds after the first; with `failures` errors."""

        async def one(request: Request, delay: float) -> list[int]:
            await asyncio.sleep(delay)
            last: list[int] = []
            async for tokens in self.engine.generate(request):
                assert tokens[: len(last)] == last and len(tokens) > len(last)
                last = tokens
            return last

        async def all_of_them() -> list[list[int]]:
            work = map(one, requests, delays or [0.0] * len(requests))
            return await asyncio.gather(*work, return_exceptions=failures)

        return self.runner.run(all_of_them())

    def expected(self, vq: Path, requests: Sequence[Request]) -> list[list[int]]:
        """What ImagePipeline draws for each, as image 0 of a run of its seed."""
        pipeline = ImagePipeline(self.gpt, load_tokenizer(vq))
        return [pipeline.draw(pipeline.read([request]))[0].tolist() for request in requests]


def preemptions() -> float:
    """How often this process's engines have taken an image's place away and given it back later."""
    from prometheus_client import REGISTRY

    return sum(
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "vllm:num_preemptions_total"
    )
