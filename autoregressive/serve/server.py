"""Serves a model over HTTP, as OpenAI's image interface has it.

python3 -m autoregressive.serve.server --gpt-ckpt c2i_L_384.pt --vq-ckpt vq_ds16_c2i.pt --port 8000

curl localhost:8000/v1/images/generations -H 'Content-Type: application/json' -H 'Accept: image/png' \\
  -d '{"prompt": "golden retriever", "seed": 1}' > dog.png

--engine vllm draws through vLLM (continuous batching), --engine native through ImagePipeline, where vLLM is not installed.
SIGTERM: what was accepted is finished, new requests get 503, then the server ends with code 0; a second one ends it at once.
"""

import argparse
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

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

# Has vLLM's processes log as this one does.
VLLM_LOGGING = Path(__file__).parent / "vllm_logging.json"
# Once everything is answered, a client that reads slowly has so long.
SECONDS_TO_TAKE_AN_ANSWER = 30


def main(args: argparse.Namespace) -> None:
    import asyncio

    for flag, value in (("--gpt-ckpt", args.gpt_ckpt), ("--vq-ckpt", args.vq_ckpt)):
        if value is None:
            raise ValueError(
                f"{flag} is needed: a file, a run's folder, or a released file's name (pretrained_models/README.md)"
            )
    if args.max_n > args.max_queue:
        raise ValueError(f"--max-n {args.max_n} is more than --max-queue {args.max_queue} has room for")
    import fastapi  # noqa: F401 - what is absent is told before a model is loaded
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401

    from autoregressive.serve.metrics import log_as_json

    log_as_json()
    asyncio.run(serve(args))


async def serve(args: argparse.Namespace) -> None:
    """Loads the model and serves until a signal ends it."""
    import uvicorn

    from autoregressive.serve.api import create_app

    service = await load_service(args)
    app = create_app(service, api_key=args.api_key or os.environ.get("SERVE_API_KEY"))
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=SECONDS_TO_TAKE_AN_ANSWER,
    )
    await draining_server(config, service).serve()


def draining_server(config: "uvicorn.Config", service: "Service") -> "uvicorn.Server":
    """A server that goes on listening after SIGTERM, to say 503, until the service has answered what it accepted."""
    import uvicorn

    class DrainingServer(uvicorn.Server):
        def handle_exit(self, sig: int, frame: object) -> None:
            if service.draining:
                super().handle_exit(sig, frame)
            service.draining = True

        async def on_tick(self, counter: int) -> bool:
            if service.draining and not self.should_exit and service.idle:
                logging.getLogger(__name__).info("what was accepted is answered")
                self.should_exit = True
            return await super().on_tick(counter)

    return DrainingServer(config)


async def load_service(args: argparse.Namespace) -> "Service":
    """The engine that the flags name, and what stands around it.

    Raises ValueError where a flag and a file disagree, or for an engine that is not installed, FileNotFoundError.
    """
    from autoregressive.serve.body import Limits
    from autoregressive.serve.service import Service

    limits = Limits(args.max_queue, args.max_n, args.max_prompt_length, timeout=args.timeout)
    use_vllm = args.engine == "vllm" or (args.engine == "auto" and find_spec("vllm") is not None)
    return Service(*await (load_vllm if use_vllm else load_native)(args), limits)


async def load_native(args: argparse.Namespace) -> tuple:
    """Engine, decoder and prompt encoder through ImagePipeline."""
    from autoregressive.pipeline import PRECISIONS, ImagePipeline
    from utils.distributed import pick_device
    from utils.runs import find_checkpoint

    for flag, value in (
        ("--kv-cache-gib", args.kv_cache_gib),
        ("--gpu-memory-utilization", args.gpu_memory_utilization),
    ):
        if value is not None:
            raise ValueError(f"{flag} {value:g} is of vLLM, and the engine is native: leave it out")
    device = pick_device(args.device)
    if args.compile and device.type != "cuda":
        logging.getLogger(__name__).warning(
            f"--compile: on {device.type} the native engine draws with the plain step, since its batches are of any size"
        )
    gpt, vq = find_checkpoint(args.gpt_ckpt), find_checkpoint(args.vq_ckpt)
    pipeline = ImagePipeline.from_pretrained(
        gpt,
        vq=vq,
        image_size=args.image_size,
        device=device,
        dtype=PRECISIONS[args.precision] if args.precision else None,
        use_ema=args.use_ema,
        batch_size=args.batch_size,
        compile=args.compile is not False and device.type == "cuda",
        **text_settings(args),
    )
    if pipeline.is_text:
        pipeline.encode(
            ["a picture"]
        )  # a T5 that is missing or does not fit is told now, and the first request finds it loaded
    return native_parts(pipeline, args.model_name or gpt.stem)


def native_parts(pipeline: "ImagePipeline", name: str) -> tuple:
    """Return a pipeline's engine, decoder and prompt encoder, as Service takes them; the demo has them too."""
    from autoregressive.serve.decoder import Decoder
    from autoregressive.serve.native import NativeEngine
    from autoregressive.serve.prompts import PromptEncoder

    engine = NativeEngine(pipeline, name)
    decoder = Decoder(pipeline.tokenizer, pipeline.gpt.layout.grid_size, pipeline.batch_size)
    return engine, decoder, PromptEncoder(pipeline.encode, run=engine.run) if pipeline.is_text else None


async def load_vllm(args: argparse.Namespace) -> tuple:
    """Engine, decoder and prompt encoder around vLLM, which holds the GPT in a process of its own."""
    from autoregressive.pipeline import PRECISIONS
    from autoregressive.serve.convert import model_folder, read_config
    from autoregressive.serve.decoder import Decoder
    from autoregressive.serve.engine import ImageRequest
    from autoregressive.serve.prompts import PromptEncoder, encoding_with
    from autoregressive.serve.vllm_engine import MAX_NUM_SEQS, VllmEngine, require_vllm
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
    device = pick_device(args.device)
    gpt, vq = find_checkpoint(args.gpt_ckpt), find_checkpoint(args.vq_ckpt)
    fingerprint = read_checkpoint(gpt).config.get("tokenizer")
    tokenizer = load_tokenizer(vq, device=device, use_ema=args.use_ema and has_averages(vq), fingerprint=fingerprint)
    dtype = PRECISIONS[args.precision or ("none" if device.type == "cpu" else "bf16")]
    folder = model_folder(
        gpt, image_size=args.image_size, downsample_size=tokenizer.downsample, dtype=dtype, use_ema=args.use_ema
    )
    encoder = None
    if read_config(folder)["gpt_type"] == "t2i":
        text = text_settings(args)
        embedder = T5Embedder(
            pick_device(text["t5_device"]) if text["t5_device"] else device,
            str(find_t5(text["t5_path"], text["t5_model_type"])),
            torch_dtype=text["t5_dtype"] or dtype,
            model_max_length=text["t5_tokens"],
        )
        encoder = PromptEncoder(encoding_with(embedder))
    batch_size = args.batch_size or MAX_NUM_SEQS
    engine = await VllmEngine.start(
        folder,
        name=args.model_name or gpt.stem,
        max_num_seqs=batch_size,
        kv_cache_gib=args.kv_cache_gib,
        gpu_memory_utilization=args.gpu_memory_utilization,
        enforce_eager=not (device.type == "cuda" if args.compile is None else args.compile),
    )
    try:
        if encoder:
            engine.check(ImageRequest(features=await encoder("a picture")))  # another T5's features are told now
    except BaseException:
        await engine.close()
        raise
    return engine, Decoder(tokenizer, engine.info.image_size // tokenizer.downsample, batch_size), encoder


def text_settings(args: argparse.Namespace) -> dict:
    """How prompts are encoded, as ImagePipeline takes it."""
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
        "--model-name", default=None, help="the model's name for clients (default: that of the GPT's file)"
    )
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
    group.add_argument("--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0 for every one")
    group.add_argument("--port", type=PORT, default=8000, help="0 takes one that is free, which the log tells")
    group.add_argument(
        "--api-key", default=None, help="asked of every request to /v1 (SERVE_API_KEY in the environment does the same)"
    )
    group.add_argument(
        "--max-queue", type=positive_int, default=64, help="images accepted and not yet done; more get 429"
    )
    group.add_argument("--max-n", type=positive_int, default=8, help="images of one request")
    group.add_argument("--max-prompt-length", type=positive_int, default=4000, help="characters of a prompt")
    group.add_argument(
        "--timeout", type=positive_float, default=600, help="seconds a request may take; then it gets 504"
    )
    return parser


if __name__ == "__main__":
    run_script(main, flags())
