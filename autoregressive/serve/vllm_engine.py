"""Tokens from vLLM: continuous batching, a request an image, both streams of guidance inside it.

    model = ServedModel("c2i_L_384.pt", image_size=384)
    engine = await VllmEngine.start(model, max_num_seqs=32)
    async for tokens in engine.generate(Request({"label": 207}, seed=0)):
        ...
    await engine.close()

    codes = draw(model, requests)                                    # scripts: (B, N)

Drawn tokens are those of ImagePipeline for the same (seed, index), but for what float32 sums of another order round
otherwise. VllmEngine runs in a process of its own, so that a script that starts it needs its `if __name__ == "__main__":`;
one engine at a time in a process of ours.
"""

import asyncio
import importlib.util
import logging
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from importlib.metadata import entry_points
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.sampling import NotFiniteLogits
from autoregressive.request import Request
from autoregressive.serve.convert import STREAMS, engine_config, hidden_value, open_gpt
from autoregressive.serve.engine import model_info
from autoregressive.serve.plugin import PLUGIN, STARTED_BY, register
from utils.checkpoint import read_checkpoint

INSTALL = "`bash scripts/serve.sh` makes an environment with it, .venv-serve; run this with .venv-serve/bin/python"
MAX_NUM_SEQS = 32


def require_vllm() -> None:
    """Raises ValueError, with what to run, where vLLM or this project's plugin is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f"vLLM is not installed here: {INSTALL}")
    for group in ("vllm.general_plugins", "vllm.logits_processors"):
        if PLUGIN not in {entry.name for entry in entry_points(group=group)}:
            raise ValueError(
                f"vLLM does not find this project's plugin ({group}): run `pip install --no-deps -e .` in the project's folder "
                f"with the interpreter that has vLLM, or {INSTALL}"
            )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise ValueError(f"VLLM_PLUGINS={allowed} leaves this project's plugin out: add {PLUGIN}")


class ServedModel:
    """A checkpoint whose images vLLM draws: what it takes, and how it is asked.

    name: the model's, for clients (default: the checkpoint's file name). dtype: of the weights.
    image_size, downsample_size, use_ema, flags: as load_gpt (autoregressive/pipeline.py) takes them.
    Raises ValueError and FileNotFoundError as load_gpt does, ValueError for a PAR file.
    """

    def __init__(
        self,
        path: str | Path,
        name: str | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        image_size: int | None = None,
        downsample_size: int | None = None,
        use_ema: bool = False,
        **flags,
    ):
        checkpoint = read_checkpoint(path)
        own = {"image_size": image_size, "downsample_size": downsample_size, "use_ema": use_ema}
        gpt = open_gpt(path, **own, **flags)
        self.path, self.dtype, self.flags = checkpoint.path.absolute(), dtype, own
        self.gpt, self.config = gpt, engine_config(gpt)
        pixels = downsample_size or (checkpoint.args or {}).get("downsample_size") or 16
        self.info = model_info(gpt, name or self.path.stem, gpt.layout.grid_size * pixels)
        self._embed = gpt.cls_embedding.to(dtype)
        with torch.inference_mode():
            self._none = self._embed.cap_proj(self._embed.uncond_embedding) if self.info.kind == "t2i" else None

    def check(self, request: Request) -> None:
        """Raises ValueError, with what is wrong, for a request that the model cannot take."""
        request.read(self.gpt.conditions)
        self.gpt.layout.adapted(request.sampling.steps, request.sampling.repulsion)
        if request.order is not None or request.sampling.order == "random":
            message = "vLLM draws in raster order alone: leave out --order and --order-file, or give --engine native"
            raise ValueError(message)

    @torch.inference_mode()
    def prompt(self, request: Request) -> dict:
        """The request's condition and its negative as vLLM takes them: embedded rows (T, 2 dim), side by side."""
        request = request.read(self.gpt.conditions)
        (name,) = self.gpt.conditions
        value, negative = request.conditions[name], request.negative.get(name)
        if self.info.kind == "c2i":
            none = torch.tensor(self.gpt.args.num_classes) if negative is None else negative
            return {"prompt_embeds": self._embed(torch.stack([value, none])).view(1, -1)}
        streams = [self._project(value)]
        streams.append(self._none[-len(streams[0]) :] if negative is None else self._project(negative))
        count, hidden = max(map(len, streams)), hidden_value(self.dtype)
        rows = [F.pad(stream, (0, 0, count - len(stream), 0), value=hidden) for stream in streams]
        return {"prompt_embeds": torch.cat(rows, dim=1)}

    def params(self, request: Request, **fields) -> Any:
        """vLLM's SamplingParams for the request's settings and its noise."""
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0,  # the plugin draws
            max_tokens=self.info.tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=request.settings(),
            **fields,
        )

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raises NotFiniteLogits where the plugin (serve/guidance.py) marked a token that it could not draw."""
        steps = [step for step, token in enumerate(tokens, start=1) if token >= self.config["codes"]]
        if steps:
            raise NotFiniteLogits(steps[:1], torch.tensor([tokens]), self.dtype)

    def _project(self, features: Tensor) -> Tensor:
        """A caption's features (length, caption_dim) as the model's rows, (at most prefix, dim)."""
        return self._embed.cap_proj(features[: self.config["prefix"]].to("cpu", self.dtype))


class VllmEngine:
    """serve/engine.py's Engine over vLLM's AsyncLLM. Made by `start`."""

    edits = False

    def __init__(self, model: ServedModel, engine: Any):
        self.info = model.info
        self._model, self._engine, self._numbers, self._closed = model, engine, count(), False

    @classmethod
    async def start(cls, model: ServedModel, **settings) -> "VllmEngine":
        """Start the engine, in ten seconds to some minutes for which the event loop is busy; it ends with this thread.

        settings: see engine_settings. Raises ValueError where vLLM or its plugin is missing, or for settings that do not fit,
        RuntimeError where vLLM does not start.
        """
        arguments = prepare(model, **settings)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        with start_errors(model):
            engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        return cls(model, engine)

    def check(self, request: Request) -> None:
        self._model.check(request)

    async def generate(self, request: Request) -> AsyncIterator[list[int]]:
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        self.check(request)
        params = self._model.params(request, output_kind=RequestOutputKind.CUMULATIVE)
        prompt = await asyncio.to_thread(self._model.prompt, request)
        if self._closed:
            raise RuntimeError("the engine is closed")
        try:
            async with aclosing(self._engine.generate(prompt, params, f"image-{next(self._numbers)}")) as outputs:
                async for output in outputs:
                    tokens = list(output.outputs[0].token_ids)
                    self._model.check_tokens(tokens)
                    yield tokens
        except VLLMClientError as error:
            raise ValueError(str(error)) from error
        except EngineDeadError as error:
            why = "is closed" if self._closed else "has died; what ended it stands in the log above"
            raise RuntimeError(f"the engine {why}") from error
        except EngineGenerateError as error:
            raise RuntimeError(f"the engine failed: {error.__cause__ or error}") from error

    @property
    def dead(self) -> bool:
        return self._closed or self._engine.errored

    async def close(self) -> None:
        if self._closed:
            return
        from vllm.v1.engine.exceptions import EngineDeadError

        self._closed = True
        self._engine.output_processor.propagate_error(EngineDeadError())  # else they would wait for ever
        await asyncio.sleep(0)
        self._engine.shutdown()
        # Called again where Python takes vLLM's modules apart, it fails.
        self._engine.shutdown = lambda timeout=None: None
        self._engine = None


def engine_settings(
    model: ServedModel,
    *,
    max_num_seqs: int = MAX_NUM_SEQS,
    kv_cache_gib: float | None = None,
    gpu_memory_utilization: float | None = None,
    tensor_parallel_size: int = 1,
    **engine_args,
) -> dict:
    """The fields of vLLM's engine arguments for such a model.

    max_num_seqs: images drawn at once; more wait.
    kv_cache_gib: memory of the keys and values (default: on a CPU what max_num_seqs images need, on a GPU what
    gpu_memory_utilization leaves). tensor_parallel_size: processes that share each layer. engine_args: further fields
    (data_parallel_size, enforce_eager: without torch.compile and CUDA graphs), or others in the place of these.
    Raises ValueError for what does not fit.
    """
    config = model.config
    rows, blocks = config["max_position_embeddings"], -(-config["max_position_embeddings"] // 128)
    # Bytes of one image's keys and values, in whole blocks of vLLM's cache (at most 128 rows).
    numbers = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    image = 128 * blocks * numbers * model.dtype.itemsize
    heads = config["num_attention_heads"] // STREAMS
    if heads % tensor_parallel_size:
        raise ValueError(f"--tensor-parallel-size {tensor_parallel_size} does not divide the model's {heads} heads")
    settings = {
        "model": str(Path(__file__).parent / "vllm_model"),
        "hf_overrides": {**config, "checkpoint": {"path": str(model.path), **model.flags}},
        "load_format": PLUGIN,
        "dtype": str(model.dtype).removeprefix("torch."),
        "skip_tokenizer_init": True,
        "max_model_len": rows,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max(rows, min(2048, max_num_seqs * rows), max_num_seqs),
        # A request that had to make room comes back with all its rows at once.
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "enable_prompt_embeds": True,
        "generation_config": "vllm",
        "use_tqdm_on_load": False,
        "tensor_parallel_size": tensor_parallel_size,
    }
    if kv_cache_gib is None and not torch.cuda.is_available():
        kv_cache_gib = (max_num_seqs + 2) * image / 2**30
    if kv_cache_gib is not None:
        if not kv_cache_gib * 2**30 >= image:
            raise ValueError(f"kv_cache_gib is {kv_cache_gib}; keys and values of one image take {image / 2**30:.3f}")
        settings["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
    if gpu_memory_utilization is not None:
        settings["gpu_memory_utilization"] = gpu_memory_utilization
    return settings | engine_args


def prepare(model: ServedModel, **settings) -> dict:
    """Sets what vLLM reads from the environment where the user has not, before vLLM is imported. Returns its arguments."""
    require_vllm()
    arguments = engine_settings(model, **settings)
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # its newer one on GPUs takes no such logits processors
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Its warnings are of settings that are meant, such as no chunked prefill.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ[STARTED_BY] = str(os.getpid())
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # until it sets up its own logs
    register()
    return arguments


@contextmanager
def start_errors(model: ServedModel) -> Iterator[None]:
    """Has a start that failed end in RuntimeError."""
    try:
        yield
    except Exception as error:  # of many kinds, few of which are of Python's own
        why = " ".join(str(error).split())
        raise RuntimeError(f"vLLM did not start with {model.path}: {why}") from error


def draw(model: ServedModel, requests: Sequence[Request], **settings) -> Tensor:
    """Draws an image for each request, without an event loop, by an engine in this process, behind vLLM's progress bar.

    settings: see engine_settings.
    Returns codes, int64 (B, N) in raster order. Raises as VllmEngine.start and check do, and NotFiniteLogits.
    """
    for request in requests:
        model.check(request)
    arguments = prepare(model, **settings)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    with start_errors(model):
        llm = LLM(**arguments)
    try:
        outputs = llm.generate(list(map(model.prompt, requests)), list(map(model.params, requests)))
    finally:
        llm.llm_engine.engine_core.shutdown()
    codes = [list(output.outputs[0].token_ids) for output in outputs]
    for tokens in codes:
        model.check_tokens(tokens)
    return torch.tensor(codes)
