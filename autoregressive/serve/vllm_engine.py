"""Tokens from vLLM: continuous batching, a request an image, both streams of guidance inside it.

    folder = model_folder("c2i_L_384.pt", image_size=384)            # serve/convert.py
    engine = await VllmEngine.start(folder, max_num_seqs=32)
    async for tokens in engine.generate(ImageRequest(label=207, cfg_scale=4.0, top_k=2000, seed=0)):
        ...
    await engine.close()

    codes = draw(folder, requests)                                   # scripts: (B, N)

Drawn tokens are those of ImagePipeline for the same (seed, index), but for what float32 sums of another order round
otherwise. VllmEngine runs in a process of its own, so that a script that starts it needs its `if __name__ == "__main__":`;
one engine at a time in a process of ours.
"""

import asyncio
import importlib.util
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from importlib.metadata import entry_points
from itertools import count
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.sampling import NotFiniteLogits
from autoregressive.pipeline import shorten
from autoregressive.serve.convert import WEIGHTS_FILE, is_whole, read_config
from autoregressive.serve.engine import ImageRequest, ModelInfo
from autoregressive.serve.plugin import PLUGIN, register
from autoregressive.serve.settings import to_extra_args

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
    """What a folder of serve/convert.py takes and how it is asked. Raises ValueError for a folder of something else."""

    def __init__(self, folder: str | Path, name: str | None = None):
        if not is_whole(folder):
            raise ValueError(f"{folder} is not a whole folder of autoregressive/serve/convert.py")
        self.folder = Path(folder)
        self.config = config = read_config(folder)
        self.info = ModelInfo(
            name=name or config["converted_from"],
            kind=config["gpt_type"],
            image_size=config["image_size"],
            tokens=config["grid_size"] ** 2,
            num_classes=config["num_classes"],
            raster=True,
            classes=tuple(config["origin"].get("classes", ())),
        )
        self.dtype = getattr(torch, config["torch_dtype"])
        self._projection = read_projection(self.folder) if self.info.kind == "t2i" else None

    def check(self, request: ImageRequest) -> None:
        """Raises ValueError, with what is wrong, for a request that the model cannot take."""
        if self.info.kind == "c2i":
            self._check_label(request)
        else:
            self._check_features(request)
        to_extra_args(request)

    def prompt(self, request: ImageRequest) -> dict:
        """The request's condition as vLLM takes it. Call check() first: vLLM does not look at ids."""
        if request.features is None:
            return {"prompt_token_ids": [self.config["codes"] + request.label]}
        return {"prompt_embeds": self._project(request.features)}

    def params(self, request: ImageRequest, index: int, **fields) -> Any:
        """vLLM's SamplingParams for image `index` of the run of the request's seed. Raises ValueError."""
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0,  # the plugin draws
            max_tokens=self.info.tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=to_extra_args(request, index),
            **fields,
        )

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raises NotFiniteLogits where the plugin (serve/guidance.py) marked a token that it could not draw."""
        steps = [step for step, token in enumerate(tokens, start=1) if token >= self.config["codes"]]
        if steps:
            raise NotFiniteLogits(steps[:1], torch.tensor([tokens]), self.dtype)

    def _check_label(self, request: ImageRequest) -> None:
        label, classes = request.label, self.info.num_classes
        if request.features is not None or label is None:
            raise ValueError(f"this model is class-conditional: it takes a label, 0 to {classes - 1}, and no features")
        if isinstance(label, bool) or not isinstance(label, int):
            raise ValueError(f"a label is a whole number, got {label!r}")
        if not 0 <= label < classes:
            raise ValueError(f"label {label} is out of range: the model has classes 0 to {classes - 1}")

    def _check_features(self, request: ImageRequest) -> None:
        features, width = request.features, self.config["caption_dim"]
        if request.label is not None or features is None:
            raise ValueError("this model is text-conditional: it takes the features of a prompt, and no label")
        if not isinstance(features, Tensor):
            raise ValueError(f"features are a tensor, got {shorten(repr(features))}")
        if features.dim() != 2 or features.shape[1] != width or not len(features) or not features.is_floating_point():
            raise ValueError(
                f"the features are {features.dtype} of shape {tuple(features.shape)}; this model takes floats of shape "
                f"(length, {width}), those of the text encoder it was trained with"
            )
        if not features.isfinite().all():
            raise ValueError(f"the features are not all finite: the encoder overflows in {features.dtype}")

    @torch.inference_mode()
    def _project(self, features: Tensor) -> Tensor:
        """A caption's features (length, caption_dim) as the model's rows, (at most prefix, dim)."""
        first, second = self._projection
        features = features[: self.config["prefix"]].to("cpu", self.dtype)
        return F.linear(F.gelu(F.linear(features, first), approximate="tanh"), second)


class VllmEngine:
    """serve/engine.py's Engine over vLLM's AsyncLLM. Made by `start`."""

    def __init__(self, model: ServedModel, engine: Any):
        self.info = model.info
        self._model, self._engine, self._numbers, self._closed = model, engine, count(), False

    @classmethod
    async def start(cls, folder: str | Path, *, name: str | None = None, **settings) -> "VllmEngine":
        """Starts the engine, which takes from ten seconds to some minutes, and keeps the event loop busy meanwhile.

        folder: of model_folder(); it fixes the dtype. name: the model's, for clients (default: the checkpoint's file name).
        settings: see engine_settings.
        Raises ValueError where vLLM or its plugin is missing, for a folder of something else or settings that do not fit,
        RuntimeError where vLLM does not start.
        """
        require_vllm()
        model = ServedModel(folder, name)
        arguments = engine_settings(folder, **settings)
        set_environment()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        register()
        with start_errors(folder):
            engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        return cls(model, engine)

    def token_age(self) -> float | None:
        return None

    def check(self, request: ImageRequest) -> None:
        """Raises ValueError, with what is wrong, for a request that the model cannot take."""
        self._model.check(request)

    async def generate(self, request: ImageRequest, index: int = 0) -> AsyncIterator[list[int]]:
        """Yields the tokens so far, in raster order, growing; the last has all. Closing it early gives the place up.

        index: the image's number in the run of the request's seed, as ImagePipeline has it.
        Raises ValueError as check does, NotFiniteLogits, RuntimeError where the engine has died or was closed.
        """
        from vllm.sampling_params import RequestOutputKind

        self.check(request)
        params = self._model.params(request, index, output_kind=RequestOutputKind.CUMULATIVE)
        prompt = await asyncio.to_thread(self._model.prompt, request)
        if self._closed:
            raise RuntimeError("the engine is closed")
        with self._request_errors():
            async with aclosing(self._engine.generate(prompt, params, f"image-{next(self._numbers)}")) as outputs:
                async for output in outputs:
                    tokens = list(output.outputs[0].token_ids)
                    self._model.check_tokens(tokens)
                    yield tokens

    @contextmanager
    def _request_errors(self) -> Iterator[None]:
        """Has vLLM's errors out as ValueError, of what it refuses, and RuntimeError, of what became of the request."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            yield
        except VLLMClientError as error:
            raise ValueError(str(error)) from error
        except EngineDeadError as error:
            why = "is closed" if self._closed else "has died; what ended it stands in the log above"
            raise RuntimeError(f"the engine {why}") from error
        except EngineGenerateError as error:
            raise RuntimeError(f"the engine failed: {error.__cause__ or error}") from error

    @property
    def dead(self) -> bool:
        """Whether the engine has ended, by itself or by close(): requests raise RuntimeError then."""
        return self._closed or self._engine.errored

    async def close(self) -> None:
        """Ends the engine; requests that run are ended with RuntimeError."""
        if self._closed:
            return
        from vllm.v1.engine.exceptions import EngineDeadError

        self._closed = True
        self._engine.output_processor.propagate_error(EngineDeadError())  # else they would wait for ever
        await asyncio.sleep(0)
        self._engine.shutdown()
        self._engine.shutdown = lambda timeout=None: (
            None
        )  # called again where Python takes vLLM's modules apart, it fails
        self._engine = None


def engine_settings(
    folder: str | Path,
    *,
    max_num_seqs: int = MAX_NUM_SEQS,
    max_num_batched_tokens: int | None = None,
    kv_cache_gib: float | None = None,
    gpu_memory_utilization: float | None = None,
    enforce_eager: bool = False,
    **engine_args,
) -> dict:
    """The fields of vLLM's engine arguments for such a folder.

    max_num_seqs: images drawn at once; more wait. max_num_batched_tokens: rows of a step (at least a whole image's).
    kv_cache_gib: memory of the keys and values (default: on a CPU what max_num_seqs images need, on a GPU what
    gpu_memory_utilization leaves). enforce_eager: without torch.compile and CUDA graphs. engine_args: further fields, or
    others in the place of these.
    Raises ValueError for what does not fit.
    """
    config = read_config(folder)
    rows, image = config["max_position_embeddings"], cache_bytes(config)
    if max_num_seqs < 1:
        raise ValueError(f"max_num_seqs is {max_num_seqs}; it is at least 1")
    if max_num_batched_tokens is not None and max_num_batched_tokens < max(rows, max_num_seqs):
        raise ValueError(
            f"max_num_batched_tokens is {max_num_batched_tokens}; a step takes at least the {rows} rows of a whole image "
            f"and one row of each of the {max_num_seqs} images at once (max_num_seqs)"
        )
    settings = {
        "model": str(folder),
        "dtype": config["torch_dtype"],
        "skip_tokenizer_init": True,
        "max_model_len": rows,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens or max(rows, min(2048, max_num_seqs * rows), max_num_seqs),
        # A request that had to make room comes back with all its rows at once.
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "enable_prompt_embeds": config["gpt_type"] == "t2i",
        "generation_config": "vllm",
        "enforce_eager": enforce_eager,
        "use_tqdm_on_load": False,
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


def cache_bytes(config: dict) -> int:
    """Bytes of one image's keys and values, in whole blocks of vLLM's cache (at most 128 rows)."""
    rows = -(-config["max_position_embeddings"] // 128) * 128
    numbers = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return rows * numbers * getattr(torch, config["torch_dtype"]).itemsize


def read_projection(folder: Path) -> tuple[Tensor, Tensor]:
    """The two weights that project a caption's features."""
    with safetensors.safe_open(folder / WEIGHTS_FILE, framework="pt") as f:
        return f.get_tensor("caption.fc1"), f.get_tensor("caption.fc2")


def set_environment() -> None:
    """What vLLM reads from the environment, where the user has not set it. Before vLLM is imported."""
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # its newer one on GPUs takes no such logits processors
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Its warnings are of settings that are meant, such as no chunked prefill; INFO has it tell what it does.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # until it sets up its own logs


@contextmanager
def start_errors(folder: str | Path) -> Iterator[None]:
    """Has a start that failed end in RuntimeError."""
    try:
        yield
    except Exception as error:  # of many kinds, few of which are of Python's own
        raise RuntimeError(f"vLLM did not start with {folder}: {error}") from error


def draw(
    folder: str | Path,
    requests: Sequence[ImageRequest],
    *,
    indices: Sequence[int] | None = None,
    on_tokens: Callable[[int], None] | None = None,
    **settings,
) -> Tensor:
    """Draws an image for each request, without an event loop, by an engine in this process.

    indices: each image's number in the run of its seed (0, 1, … by default). on_tokens: called after each step with the
    number of tokens that it drew. settings: see engine_settings.
    Returns codes, int64 (B, N) in raster order. Raises as VllmEngine.start and check do, and NotFiniteLogits.
    """
    require_vllm()
    model = ServedModel(folder)
    indices = list(range(len(requests)) if indices is None else indices)
    for request in requests:
        model.check(request)
    arguments = engine_settings(folder, **settings)
    set_environment()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    register()
    with start_errors(folder):
        engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
    for number, (request, index) in enumerate(zip(requests, indices, strict=True)):
        engine.add_request(str(number), model.prompt(request), model.params(request, index))
    codes = torch.zeros(len(requests), model.info.tokens, dtype=torch.long)
    done = [0] * len(requests)
    try:
        while engine.has_unfinished_requests():
            before = sum(done)
            for output in engine.step():
                number, tokens = int(output.request_id), output.outputs[0].token_ids
                model.check_tokens(tokens)
                codes[number, : len(tokens)] = torch.tensor(tokens)
                done[number] = len(tokens)
            if on_tokens:
                on_tokens(sum(done) - before)
    finally:
        engine.engine_core.shutdown()
    return codes
