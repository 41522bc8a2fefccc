"""Serves a model over HTTP, as OpenAI's image interface has it.

python3 -m autoregressive.serve.server --gpt-ckpt c2i_L_384.pt --vq-ckpt vq_ds16_c2i.pt --port 8000

curl localhost:8000/v1/images/generations -H 'Content-Type: application/json' -H 'Accept: image/png' \\
  -d '{"prompt": "golden retriever", "seed": 1}' > dog.png

--engine vllm draws through vLLM, --engine native through this project's own decode loop, where vLLM is not installed.
SIGTERM or SIGINT: what was accepted is finished, new requests get 503, then the server ends with code 0, at the latest
--timeout and a minute after the signal (then with code 1). While the model is loaded it ends at once, with code 0. A second
signal ends it at once as that signal does (143 or 130 in a shell).
"""

import argparse
import ipaddress
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoregressive.serve.plugin import end_with_parent
from utils.cli import (
    PORT,
    add_gpt_file_flags,
    add_run_flags,
    add_text_flags,
    add_vllm_flags,
    add_window_flag,
    flag_parser,
    given,
    positive_float,
    positive_int,
    run_script,
)

if TYPE_CHECKING:
    from autoregressive.pipeline import ImagePipeline
    from autoregressive.serve.service import Service

if __name__ == "__mp_main__":  # a process that vLLM starts, before it reads anything
    end_with_parent()
    from autoregressive.serve.metrics import log_as_json

    log_as_json()

log = logging.getLogger(__name__)


def main(args: argparse.Namespace) -> None:
    import asyncio

    signals = Signals(lambda: sys.exit(0))
    if args.gpt_ckpt is None:
        raise ValueError(
            "--gpt-ckpt is needed: a file, a run's folder, or a released file's name (pretrained_models/README.md)"
        )
    if args.max_n > args.max_queue:
        raise ValueError(f"--max-n {args.max_n} is more than --max-queue {args.max_queue} has room for")
    args.api_key = api_keys(args.api_key)
    import fastapi  # noqa: F401 - what is absent is told before a model is loaded
    import uvicorn  # noqa: F401

    from autoregressive.serve.metrics import log_as_json

    log_as_json()
    with bound_socket(args.host, args.port, args.uds) as bound:
        if not args.api_key and is_public(bound):
            log.warning(f"anybody who reaches {args.host} can draw: give an --api-key, or listen at 127.0.0.1")
        try:
            asyncio.run(serve(args, bound, signals))
        finally:
            if args.uds:
                Path(args.uds).unlink(missing_ok=True)


class Signals:
    """SIGTERM and SIGINT: the first one calls `act`, the second one ends the process at once."""

    def __init__(self, act: Callable[[], object]):
        self.act, self.received = act, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._first)

    def _first(self, number: int, frame: object) -> None:
        # As the system does it, so that nothing can hold it up; but process 1, of a container, ends by itself or not at all.
        again = signal.SIG_DFL if os.getpid() > 1 else lambda number, frame: os._exit(128 + number)
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, again)
        self.received = True
        self.act()


def api_keys(listed: list[str]) -> list[str]:
    """Return the keys of --api-key, or else those of SERVE_API_KEY. Raises ValueError for an empty one."""
    for name, keys in (("--api-key", listed), ("SERVE_API_KEY", [os.environ.get("SERVE_API_KEY", "none")])):
        if not all(key.strip() for key in keys):
            raise ValueError(f"{name} is empty, which would let everybody in: give a key, or leave it out")
    return [key.strip() for key in listed] or os.environ.get("SERVE_API_KEY", "").split()


def url_path(text: str) -> str:
    """Return the path under which a proxy has a server: an argparse type."""
    if text and not re.fullmatch(r"(/[^/?#]+)+", text):
        raise argparse.ArgumentTypeError(f"must be written as /images, without a slash at its end, got {text}")
    return text


def bound_socket(host: str, port: int, uds: str | None = None) -> socket.socket:
    """Return a socket at a Unix socket's path, or at host and port; nobody can connect before the server listens at it.

    Raises ValueError for an address that is in use or cannot be had.
    """
    if uds:
        bound = socket.socket(socket.AF_UNIX)
        if Path(uds).is_socket():
            if not bound.connect_ex(uds):
                raise ValueError(f"--uds {uds} is in use: end the server there, or choose another path")
            Path(uds).unlink()  # of a server that was killed
        bound.bind(uds)
        os.chmod(uds, 0o666)
        return bound
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(found)  # IPv4 comes first
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port}: {error.strerror}; give another address, port 0 for one that is free"
        ) from error
    return bound


def is_public(bound: socket.socket) -> bool:
    """Tell whether other machines reach a socket."""
    return bound.family != socket.AF_UNIX and not ipaddress.ip_address(bound.getsockname()[0]).is_loopback


async def serve(args: argparse.Namespace, bound: socket.socket, signals: Signals) -> None:
    """Load the model and serve until a signal ends it."""
    from autoregressive.serve.api import create_app
    from autoregressive.serve.draining import DrainingServer

    service = await load_service(args)
    if signals.received:  # by code that went on
        return
    app = create_app(service, api_keys=args.api_key, root_path=args.root_path, cors_origins=args.cors_origin)
    info, engine = service.info, type(service.engine).__name__.removesuffix("Engine").lower()
    told = {"model": info.name, "engine": engine, "kind": info.kind, "image_size": info.image_size}
    server = DrainingServer(app, service, told | {"precision": args.precision, "device": args.device})
    signals.act = partial(server.drain, args.timeout)
    await server.serve([bound])


async def load_service(args: argparse.Namespace) -> "Service":
    """Return the engine that the flags name, and what stands around it.

    Raises ValueError where a flag and a file disagree, or for an engine that is not installed, FileNotFoundError.
    """
    from autoregressive.class_names import class_names
    from autoregressive.pipeline import tokenizer_of
    from autoregressive.serve.body import Limits
    from utils.distributed import pick_device
    from utils.runs import find_checkpoint

    use_vllm = args.engine == "vllm" or (args.engine == "auto" and find_spec("vllm") is not None)
    args.device = pick_device(args.device)
    args.precision = args.precision or ("none" if args.device.type == "cpu" else "bf16")
    limits = Limits(args.max_queue, args.max_n, args.max_prompt_length, timeout=args.timeout, stall=args.stall_timeout)
    args.vq_ckpt = find_checkpoint(args.vq_ckpt) if args.vq_ckpt else tokenizer_of(args.gpt_ckpt)
    args.gpt_ckpt = find_checkpoint(args.gpt_ckpt)
    engine, pipeline = await (start_vllm if use_vllm else start_native)(args)
    if args.class_names:
        engine.info = replace(engine.info, classes=tuple(class_names(engine.info.num_classes, args.class_names)))
    return around(engine, pipeline, limits, args.served_model_name)


def around(engine: Any, pipeline: "ImagePipeline", limits: Any = None, aliases: list[str] | None = None) -> "Service":
    """Return what serves an engine: pixels and prompts are the pipeline's."""
    from autoregressive.serve.decoder import Decoder
    from autoregressive.serve.service import PromptEncoder, Service

    decoder = Decoder(pipeline.tokenizer, pipeline.gpt.layout.grid_size, pipeline.batch_size)
    thread = getattr(engine, "thread", None)  # the native engine's: both want all cores
    encoder = PromptEncoder(pipeline.encode, pipeline.t5_tokens, thread) if pipeline.text else None
    return Service(engine, decoder, encoder, limits, aliases or ())


def native_service(pipeline: "ImagePipeline", name: str, **limits: float) -> "Service":
    """Return what serves a pipeline by itself; limits as body.py:Limits has them. The demo has it too."""
    from autoregressive.serve.body import Limits
    from autoregressive.serve.native import NativeEngine

    return around(NativeEngine(pipeline, name), pipeline, Limits(**limits))


def model_name(args: argparse.Namespace) -> str:
    """Return the model's name for clients: --served-model-name, or the file's, or of a run's checkpoint the run's."""
    file = Path(args.gpt_ckpt)
    if args.served_model_name:
        return args.served_model_name[0]
    if not re.fullmatch(r"\d{7,}", file.stem):
        return file.stem
    folder = file.resolve().parent
    return (folder.parent if folder.name == "checkpoints" else folder).name


def load_pipeline(
    args: argparse.Namespace, gpt: str | Path, vq: str | Path | None, beliefs: Mapping[str, Any]
) -> "ImagePipeline":
    """Return the pipeline of a server or of a tab of the demo.

    gpt, vq: files, runs, released files; or owner/name of models that save_pretrained wrote to the hub. Without a vq gpt may
    be a whole pipeline's folder or owner/name; how its prompts are encoded is written there.
    beliefs: what the flags say of the files.
    """
    from autoregressive.folder import find_folder
    from autoregressive.pipeline import PRECISIONS, ImagePipeline

    saved, settings = None if vq else find_folder(gpt), text_settings(args)
    if saved:
        settings = {name: settings[name] for name in ("t5_device", "t5_dtype")}
    pipeline = ImagePipeline.from_pretrained(
        saved or hub_file(gpt), vq=vq and hub_file(vq), image_size=args.image_size, beliefs=beliefs, device=args.device,
        dtype=PRECISIONS[args.precision], use_ema=args.use_ema, batch_size=args.batch_size, compile=args.compile,
        window=args.window, **settings,
    )  # fmt: skip
    if pipeline.text:
        pipeline.encode(["a picture"])  # a T5 that is missing or does not fit is told now
    return pipeline


def hub_file(name: str | Path) -> str | Path:
    """Return the weights of owner/name, downloaded from the hub; other names as they are."""
    from huggingface_hub import hf_hub_download

    from utils.hub import is_released

    path = Path(name)
    if path.exists() or str(name).count("/") != 1 or path.is_absolute() or path.suffix or is_released(name):
        return name
    return hf_hub_download(str(name), "model.safetensors")


def text_settings(args: argparse.Namespace) -> dict:
    """Return the settings of ImagePipeline for encoding prompts."""
    from autoregressive.pipeline import PRECISIONS

    if args.t5_feat_path:
        raise ValueError(
            "--t5-feat-path has features of known prompts, and these come as one writes them: leave it out"
        )
    asked = given(args.t5_path) or given(args.t5_model_type)
    return {
        **({"t5_path": args.t5_path, "t5_model_type": args.t5_model_type} if asked else {}),
        "t5_device": args.t5_device or args.device,
        "t5_dtype": PRECISIONS[args.t5_precision or args.precision],
        "t5_tokens": args.t5_feature_max_len,
        "left_padding": not args.no_left_padding,
    }


async def start_native(args: argparse.Namespace) -> tuple:
    """Return the engine through ImagePipeline, and the pipeline."""
    from autoregressive.serve.native import NativeEngine

    for name in ("kv_cache_gib", "gpu_memory_utilization", "tensor_parallel_size", "data_parallel_size"):
        if (value := getattr(args, name)) is not None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {value:g} is of vLLM, and the engine is native: leave it out")
    if args.compile and args.device.type != "cuda":
        log.warning(
            f"--compile: on {args.device.type} the native engine draws with the plain step, since its batches are of any size"
        )
    args.compile = args.compile is not False and args.device.type == "cuda"
    pipeline = load_pipeline(args, args.gpt_ckpt, args.vq_ckpt, {})
    return NativeEngine(pipeline, model_name(args)), pipeline


async def start_vllm(args: argparse.Namespace) -> tuple:
    """Return the engine over vLLM, which holds the GPT in a process of its own, and a pipeline for pixels and prompts."""
    if args.window is not None:
        raise ValueError(f"--window {args.window} is of the native engine, vLLM draws one token a step: leave it out")
    from autoregressive.pipeline import PRECISIONS, ImagePipeline, load_tokenizer_of
    from autoregressive.serve.vllm_engine import MAX_NUM_SEQS, ServedModel, VllmEngine, require_vllm
    from autoregressive.text import with_encoder

    require_vllm()
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")  # its lines come as ours do
    if args.no_left_padding:
        raise ValueError(
            "--no-left-padding is not for vLLM: with it the first token is read off a row of padding, which vLLM does not "
            "compute; use --engine native"
        )
    gpt = args.gpt_ckpt
    tokenizer = load_tokenizer_of(gpt, args.vq_ckpt, args.use_ema, device=args.device)
    model = ServedModel(
        gpt, model_name(args), dtype=PRECISIONS[args.precision], image_size=args.image_size,
        downsample_size=tokenizer.downsample, use_ema=args.use_ema,
    )  # fmt: skip
    batch_size = args.batch_size or MAX_NUM_SEQS
    text = with_encoder(Path(gpt), text_settings(args))
    pipeline = ImagePipeline(model.gpt, tokenizer, batch_size=batch_size, **text)
    if pipeline.text:
        pipeline.encode(["a picture"])
    engine = await VllmEngine.start(
        model,
        max_num_seqs=batch_size,
        kv_cache_gib=args.kv_cache_gib,
        gpu_memory_utilization=args.gpu_memory_utilization,
        tensor_parallel_size=args.tensor_parallel_size or 1,
        data_parallel_size=args.data_parallel_size or 1,
        enforce_eager=not (args.device.type == "cuda" if args.compile is None else args.compile),
    )
    return engine, pipeline


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    add_gpt_file_flags(parser)
    help = "tokenizer weights: a file, a run's folder, or a released file's name (default: the GPT's, found near it)"
    parser.add_argument("--vq-ckpt", default=None, help=help)
    help = "what draws; auto is vllm where that is installed, else native"
    parser.add_argument("--engine", choices=["auto", "vllm", "native"], default="auto", help=help)
    help = "of the transformer's weights (default: none on a CPU, else bf16)"
    parser.add_argument("--precision", choices=["none", "fp16", "bf16"], default=None, help=help)
    add_run_flags(parser, precision=False, compile=None)
    add_window_flag(parser)
    add_text_flags(parser)
    parser.set_defaults(t5_feature_max_len=None)
    add_vllm_flags(parser, places=False)
    group = parser.add_argument_group("server")
    for flag, kind, default, help in (
        ("--image-size", positive_int, None, "pixels a side (default: as the GPT's file or its name tells)"),
        ("--batch-size", positive_int, None, "images drawn at once (default: the engine's)"),
        ("--class-names", str, None, "file with the classes' names, one a line"),
        ("--host", str, "127.0.0.1", "the address to listen at; 0.0.0.0 for every one"),
        ("--port", PORT, 8000, "0 takes one that is free, which the log tells"),
        ("--uds", str, None, "path of a Unix socket to listen at in place of --host and --port"),
        ("--root-path", url_path, "", "the path under which a proxy has the server, such as /images"),
        ("--max-queue", positive_int, 64, "images accepted and not yet drawn; more get 429"),
        ("--max-n", positive_int, 8, "images of one request"),
        ("--max-prompt-length", positive_int, 4000, "characters of a prompt"),
        ("--timeout", positive_float, 600, "seconds a request may take; then it gets 504"),
        ("--stall-timeout", positive_float, 120, "seconds of drawing without a token until /health answers 503"),
    ):
        group.add_argument(flag, type=kind, default=default, help=help)
    for names, help in (
        ("--served-model-name --model-name", "the model's name for clients (default: that of the GPT's file or run)"),
        ("--api-key", "asked of every request to /v1 (default: those in SERVE_API_KEY, with spaces between)"),
        ("--cors-origin", "of web pages whose scripts may ask the server, * for all"),
    ):
        group.add_argument(*names.split(), action="append", default=[], help=f"{help}; may be given several times")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
