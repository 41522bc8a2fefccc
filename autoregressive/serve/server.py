"""Serves a model over HTTP, as OpenAI's image interface has it.

python3 -m autoregressive.serve.server --gpt-ckpt c2i_L_384.pt --vq-ckpt vq_ds16_c2i.pt --port 8000

curl localhost:8000/v1/images/generations -H 'Content-Type: application/json' -H 'Accept: image/png' \\
  -d '{"prompt": "golden retriever", "seed": 1}' > dog.png

--engine vllm draws through vLLM (continuous batching), --engine native through ImagePipeline, where vLLM is not installed.
SIGTERM or SIGINT: what was accepted is finished, new requests get 503, then the server ends with code 0, at the latest
--timeout and a minute after the signal (then with code 1). While the model is loaded it ends at once, with code 0. A second
signal ends it at once as that signal does (143 or 130 in a shell).
"""

import argparse
import errno
import ipaddress
import logging
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
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
    flag_parser,
    positive_float,
    positive_int,
    run_script,
)

if TYPE_CHECKING:
    import uvicorn

    from autoregressive.pipeline import ImagePipeline
    from autoregressive.serve.service import Service

if __name__ == "__mp_main__":  # a process that vLLM starts, before it reads anything
    end_with_parent()

log = logging.getLogger(__name__)

# Has vLLM's processes log as this one does.
VLLM_LOGGING = Path(__file__).parent / "vllm_logging.json"
SECONDS_TO_ASK = 10  # from connecting, or from the last answer, to a whole request's headers
# Without taking anything of an answer; so long the last answers have, too, once everything is drawn.
SECONDS_TO_READ = 30
SECONDS_TO_HEAR = 0.5  # what clients that are connected by then ask, once no others can connect
SECONDS_TO_CLOSE = 30  # for the engine, after that
MOST_UNREAD = 64 * 2**20  # bytes of answers that clients do not take; four times as many of those that they take slowly
SECONDS_BETWEEN_WARNINGS = 60


def main(args: argparse.Namespace) -> None:
    import asyncio

    signals = Signals(lambda: sys.exit(0))
    for flag, value in (("--gpt-ckpt", args.gpt_ckpt), ("--vq-ckpt", args.vq_ckpt)):
        if value is None:
            raise ValueError(
                f"{flag} is needed: a file, a run's folder, or a released file's name (pretrained_models/README.md)"
            )
    if args.max_n > args.max_queue:
        raise ValueError(f"--max-n {args.max_n} is more than --max-queue {args.max_queue} has room for")
    if args.root_path and not re.fullmatch(r"(/[^/?#]+)+", args.root_path):
        raise ValueError(f"--root-path is {args.root_path}: write it as /images, without a slash at its end")
    args.api_key = api_keys(args.api_key)
    import fastapi  # noqa: F401 - what is absent is told before a model is loaded
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401

    from autoregressive.serve.metrics import log_as_json

    log_as_json()
    bound = bound_socket(args)
    try:
        asyncio.run(serve(args, bound, signals))
    finally:
        bound.close()
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


def api_keys(given: list[str]) -> list[str]:
    """Return the keys of --api-key, or else those of SERVE_API_KEY. Raises ValueError for an empty one."""
    for name, keys in (("--api-key", given), ("SERVE_API_KEY", [os.environ.get("SERVE_API_KEY", "none")])):
        if not all(key.strip() for key in keys):
            raise ValueError(f"{name} is empty, which would let everybody in: give a key, or leave it out")
    return [key.strip() for key in given] or os.environ.get("SERVE_API_KEY", "").split()


def bound_socket(args: argparse.Namespace) -> socket.socket:
    """Return a socket at --uds, or at --host and --port; nobody can connect before the server listens at it.

    Raises ValueError for an address that is in use or cannot be had.
    """
    if args.uds:
        bound = socket.socket(socket.AF_UNIX)
        if Path(args.uds).is_socket():
            if not bound.connect_ex(args.uds):
                raise ValueError(f"--uds {args.uds} is in use: end the server there, or choose another path")
            Path(args.uds).unlink()  # of a server that was killed
        bound.bind(args.uds)
        os.chmod(args.uds, 0o666)
        return bound
    try:
        found = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(found)  # IPv4 comes first
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ValueError(
            f"--host {args.host} --port {args.port}: {error.strerror}; give another address, port 0 for one that is free"
        ) from error
    if not args.api_key and not ipaddress.ip_address(address[0]).is_loopback:
        log.warning(f"anybody who reaches {args.host} can draw: give an --api-key, or listen at 127.0.0.1")
    return bound


async def serve(args: argparse.Namespace, bound: socket.socket, signals: Signals) -> None:
    """Loads the model and serves until a signal ends it."""
    from autoregressive.serve.api import create_app

    service = await load_service(args)
    if signals.received:  # by code that went on
        return
    app = create_app(service, api_keys=args.api_key, root_path=args.root_path, cors_origins=args.cors_origin)
    server = draining_server(app, service, seconds=args.timeout + SECONDS_TO_READ + SECONDS_TO_CLOSE)
    server.told = {
        "model": service.info.name,
        "engine": type(service.engine).__name__.removesuffix("Engine").lower(),
        "kind": service.info.kind,
        "image_size": service.info.image_size,
        "precision": args.precision,
        "device": args.device,
    }
    signals.act = server.drain
    await server.serve([bound])


def draining_server(app: Any, service: "Service", seconds: float = 600) -> "uvicorn.Server":
    """Return a server that goes on listening after `drain`, to say 503, until the service has answered what it accepted.

    It closes connections whose clients ask for nothing, or do not take what they asked for. seconds: from `drain` to the
    end, at most.
    """
    import asyncio

    import uvicorn

    class DrainingServer(uvicorn.Server):
        told: dict = {}
        _since: dict = {}  # connections and what they are at, and since when
        _drawn_at = None

        def capture_signals(self) -> Any:
            return nullcontext()

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().set_exception_handler(sparing_handler())
            await super().startup(sockets)
            name = self.servers[0].sockets[0].getsockname()
            host = f"[{name[0]}]" if ":" in name[0] else name[0]
            url = f"unix:{name}" if isinstance(name, str) else f"http://{host}:{name[1]}"
            log.info(f"running on {url} with {service.info.name}", extra={"fields": self.told})

        def drain(self) -> None:
            """Takes no more requests, and ends once what was accepted is answered."""
            service.draining = True
            last_resort = threading.Timer(seconds, os._exit, [1])
            last_resort.daemon = True
            last_resort.start()

        async def on_tick(self, counter: int) -> bool:
            self._close_idle()
            if service.draining and service.idle and not self.should_exit:
                for listener in self.servers:
                    listener.close()
                self._drawn_at = self._drawn_at or time.monotonic()
                waited = time.monotonic() - self._drawn_at
                unread = [each for each in self.server_state.connections if each.transport.get_write_buffer_size()]
                if waited > SECONDS_TO_READ or not (waited < SECONDS_TO_HEAR or unread or self.server_state.tasks):
                    log.info("what was accepted is answered")
                    for connection in unread:
                        connection.transport.abort()
                    self.should_exit = True
            return await super().on_tick(counter)

        def _close_idle(self) -> None:
            now, since, unread = time.monotonic(), {}, 0
            for connection in self.server_state.connections:
                cycle, size = connection.cycle, connection.transport.get_write_buffer_size()
                unread += size
                if size or cycle is None or cycle.response_complete or connection.transport.is_closing():
                    since[connection, cycle, size] = self._since.get((connection, cycle, size), now)
            self._since = since
            excess = len(self.server_state.connections) - resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
            for (connection, _, size), began in sorted(since.items(), key=lambda item: item[1]):
                late = now - began > (SECONDS_TO_READ if size else SECONDS_TO_ASK)
                crowded = size and unread > MOST_UNREAD * (1 if now - began > 1 else 4)
                if late or crowded or excess > 0:
                    connection.transport.abort()
                    unread, excess = unread - size, excess - 1

    # One HTTP parser and no websockets whatever is installed beside it.
    return DrainingServer(
        uvicorn.Config(
            app, http="h11", ws="none", loop="asyncio", h11_max_incomplete_event_size=32 * 1024, log_config=None,
            access_log=False, server_header=False, lifespan="on", timeout_graceful_shutdown=5,
        )
    )  # fmt: skip


def sparing_handler() -> Callable:
    """Return an event loop's handler of exceptions that tells only once a minute that there are no descriptors left."""
    told_at = -float("inf")

    def handle(loop: Any, context: dict) -> None:
        nonlocal told_at
        if getattr(context.get("exception"), "errno", None) not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif time.monotonic() - told_at > SECONDS_BETWEEN_WARNINGS:
            told_at = time.monotonic()
            log.warning("no file descriptors are left, connections have to wait: raise the limit (ulimit -n)")

    return handle


async def load_service(args: argparse.Namespace) -> "Service":
    """Return the engine that the flags name, and what stands around it.

    Raises ValueError where a flag and a file disagree, or for an engine that is not installed, FileNotFoundError.
    """
    from autoregressive.class_names import class_names
    from autoregressive.serve.body import Limits
    from autoregressive.serve.service import Service
    from utils.distributed import pick_device

    use_vllm = args.engine == "vllm" or (args.engine == "auto" and find_spec("vllm") is not None)
    args.device = pick_device(args.device)
    args.precision = args.precision or ("none" if args.device.type == "cpu" else "bf16")
    engine, decoder, encoder = await (load_vllm if use_vllm else load_native)(args)
    limits = Limits(args.max_queue, args.max_n, args.max_prompt_length, timeout=args.timeout, stall=args.stall_timeout)
    names = class_names(engine.info.num_classes, args.class_names, engine.info.classes) if args.class_names else None
    return Service(engine, decoder, encoder, limits, args.served_model_name, names)


def model_name(args: argparse.Namespace, file: Path) -> str:
    """Return the model's name for clients: --served-model-name, or the file's, or of a run's checkpoint the run's."""
    if args.served_model_name:
        return args.served_model_name[0]
    if not re.fullmatch(r"\d{7,}", file.stem):
        return file.stem
    folder = file.resolve().parent
    return (folder.parent if folder.name == "checkpoints" else folder).name


async def load_native(args: argparse.Namespace) -> tuple:
    """Engine, decoder and prompt encoder through ImagePipeline."""
    from autoregressive.pipeline import PRECISIONS, ImagePipeline
    from utils.runs import find_checkpoint

    for flag, value in (
        ("--kv-cache-gib", args.kv_cache_gib),
        ("--gpu-memory-utilization", args.gpu_memory_utilization),
        ("--tensor-parallel-size", args.tensor_parallel_size),
        ("--data-parallel-size", args.data_parallel_size),
    ):
        if value is not None:
            raise ValueError(f"{flag} {value:g} is of vLLM, and the engine is native: leave it out")
    if args.compile and args.device.type != "cuda":
        log.warning(
            f"--compile: on {args.device.type} the native engine draws with the plain step, since its batches are of any size"
        )
    gpt, vq = find_checkpoint(args.gpt_ckpt), find_checkpoint(args.vq_ckpt)
    pipeline = ImagePipeline.from_pretrained(
        gpt,
        vq=vq,
        image_size=args.image_size,
        device=args.device,
        dtype=PRECISIONS[args.precision],
        use_ema=args.use_ema,
        batch_size=args.batch_size,
        compile=args.compile is not False and args.device.type == "cuda",
        **text_settings(args),
    )
    if pipeline.text:
        # A T5 that is missing or does not fit is told now, and the first request finds it loaded.
        pipeline.encode(["a picture"])
    return native_parts(pipeline, model_name(args, gpt))


def native_parts(pipeline: "ImagePipeline", name: str) -> tuple:
    """Return a pipeline's engine, decoder and prompt encoder, as Service takes them; the demo has them too."""
    from autoregressive.serve.decoder import Decoder
    from autoregressive.serve.native import NativeEngine
    from autoregressive.serve.prompts import PromptEncoder

    engine = NativeEngine(pipeline, name)
    decoder = Decoder(pipeline.tokenizer, pipeline.gpt.layout.grid_size, pipeline.batch_size)
    encoder = PromptEncoder(pipeline.encode, run=engine.run, rows=pipeline.t5_tokens) if pipeline.text else None
    return engine, decoder, encoder


async def load_vllm(args: argparse.Namespace) -> tuple:
    """Engine, decoder and prompt encoder around vLLM, which holds the GPT in a process of its own."""
    from autoregressive.pipeline import PRECISIONS
    from autoregressive.request import Request
    from autoregressive.serve.decoder import Decoder
    from autoregressive.serve.prompts import PromptEncoder, encoding_with
    from autoregressive.serve.vllm_engine import MAX_NUM_SEQS, ServedModel, VllmEngine, require_vllm
    from language.t5 import T5Embedder, find_t5
    from tokenizer.load import load_tokenizer
    from utils.checkpoint import has_averages, read_checkpoint
    from utils.distributed import pick_device
    from utils.runs import find_checkpoint

    require_vllm()
    os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(VLLM_LOGGING))
    if args.no_left_padding:
        raise ValueError(
            "--no-left-padding is not for vLLM: with it the first token is read off a row of padding, which vLLM does not "
            "compute; use --engine native"
        )
    device = args.device
    gpt, vq = find_checkpoint(args.gpt_ckpt), find_checkpoint(args.vq_ckpt)
    fingerprint = read_checkpoint(gpt).config.get("tokenizer")
    tokenizer = load_tokenizer(vq, device=device, use_ema=args.use_ema and has_averages(vq), fingerprint=fingerprint)
    dtype = PRECISIONS[args.precision]
    model = ServedModel(
        gpt,
        model_name(args, gpt),
        dtype=dtype,
        image_size=args.image_size,
        downsample_size=tokenizer.downsample,
        use_ema=args.use_ema,
    )
    encoder = None
    if model.info.kind == "t2i":
        text = text_settings(args)
        embedder = T5Embedder(
            pick_device(text["t5_device"]) if text["t5_device"] else device,
            str(find_t5(text["t5_path"], text["t5_model_type"])),
            torch_dtype=text["t5_dtype"] or dtype,
            model_max_length=text["t5_tokens"],
        )
        encoder = PromptEncoder(encoding_with(embedder), rows=text["t5_tokens"])
    batch_size = args.batch_size or MAX_NUM_SEQS
    engine = await VllmEngine.start(
        model,
        max_num_seqs=batch_size,
        kv_cache_gib=args.kv_cache_gib,
        gpu_memory_utilization=args.gpu_memory_utilization,
        tensor_parallel_size=args.tensor_parallel_size or 1,
        data_parallel_size=args.data_parallel_size or 1,
        enforce_eager=not (device.type == "cuda" if args.compile is None else args.compile),
    )
    try:
        if encoder:
            engine.check(Request({"caption": await encoder("a picture")}))  # another T5's features are told now
    except BaseException:
        await engine.close()
        raise
    return engine, Decoder(tokenizer, engine.info.image_size // tokenizer.downsample, batch_size), encoder


def text_settings(args: argparse.Namespace) -> dict:
    """Return the settings of ImagePipeline for encoding prompts."""
    from autoregressive.pipeline import PRECISIONS

    if args.t5_feat_path:
        raise ValueError(
            "--t5-feat-path has features of known prompts; a server encodes prompts as they come: leave it out"
        )
    return {
        "t5_path": args.t5_path,
        "t5_model_type": args.t5_model_type,
        "t5_device": args.t5_device,
        "t5_dtype": PRECISIONS[args.t5_precision] if args.t5_precision else None,
        "t5_tokens": args.t5_feature_max_len,
        "left_padding": not args.no_left_padding,
    }


def flags() -> argparse.ArgumentParser:
    """The server's flags."""
    parser = flag_parser(__doc__)
    add_gpt_file_flags(parser)
    parser.add_argument(
        "--vq-ckpt", default=None, help="tokenizer weights: a file, a run's folder, or a released file's name"
    )
    parser.add_argument(
        "--engine",
        choices=["auto", "vllm", "native"],
        default="auto",
        help="what draws; auto is vllm where that is installed, else native",
    )
    parser.add_argument(
        "--image-size",
        type=positive_int,
        default=None,
        help="pixels a side (default: as the GPT's file or its name tells)",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=None, help="images drawn at once (default: the engine's)"
    )
    parser.add_argument(
        "--served-model-name",
        "--model-name",
        action="append",
        default=[],
        help="the model's name for clients (default: that of the GPT's file or run); may be given several times",
    )
    parser.add_argument("--class-names", default=None, help="file with the classes' names, one a line")
    add_run_flags(parser, precision=False, compile=None)
    parser.add_argument(
        "--precision",
        choices=["none", "fp16", "bf16"],
        default=None,
        help="of the transformer's weights (default: none on a CPU, else bf16)",
    )
    add_text_flags(parser)
    add_vllm_flags(parser, places=False)
    group = parser.add_argument_group("server")
    for flag, kind, default, help in (
        ("--host", str, "127.0.0.1", "the address to listen at; 0.0.0.0 for every one"),
        ("--port", PORT, 8000, "0 takes one that is free, which the log tells"),
        ("--uds", str, None, "path of a Unix socket to listen at in place of --host and --port"),
        ("--root-path", str, "", "the path under which a proxy has the server, such as /images"),
        ("--max-queue", positive_int, 64, "images accepted and not yet drawn; more get 429"),
        ("--max-n", positive_int, 8, "images of one request"),
        ("--max-prompt-length", positive_int, 4000, "characters of a prompt"),
        ("--timeout", positive_float, 600, "seconds a request may take; then it gets 504"),
        ("--stall-timeout", positive_float, 120, "seconds of drawing without a token until /health answers 503"),
    ):
        group.add_argument(flag, type=kind, default=default, help=help)
    for flag, help in (
        ("--api-key", "asked of every request to /v1 (default: those in SERVE_API_KEY, with spaces between)"),
        ("--cors-origin", "of web pages whose scripts may ask the server, * for all"),
    ):
        group.add_argument(flag, action="append", default=[], help=f"{help}; may be given several times")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
