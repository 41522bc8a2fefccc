"""Common part of the offline scripts: from the flags of the other sampling scripts to tokens by vLLM, and a grid."""

import argparse
from collections.abc import Sequence

import torch

from autoregressive.pipeline import PRECISIONS, ImagePipeline
from autoregressive.request import Request
from autoregressive.sample.common import build_pipeline, write_grid
from autoregressive.sample.flags import sampling_config
from autoregressive.serve.vllm_engine import ServedModel, draw, require_vllm
from utils.distributed import pick_device


def open_models(args: argparse.Namespace, text: dict | None = None) -> tuple[ServedModel, ImagePipeline]:
    """Return the GPT, for vLLM, and a pipeline without its weights, checked as the other sampling scripts do.

    text: how prompts are encoded. Raises ValueError where vLLM is missing, or a flag and a file disagree, FileNotFoundError for a file that is not there.
    """
    require_vllm()
    sampling_config(args)  # refuses settings before the models are read
    device = pick_device(args.device)
    if getattr(args, "no_left_padding", False):
        raise ValueError(
            "--no-left-padding is not for vLLM: with it the first token is read off a row of padding, which vLLM does not "
            "compute; use autoregressive/sample/sample_t2i.py"
        )
    # The weights go to vLLM, not to this process: they are read for their shapes, on the CPU.
    pipeline, gpt_path, _ = build_pipeline(args, torch.device("cpu"), text=text)
    served = ServedModel(
        gpt_path,
        dtype=PRECISIONS[args.precision],
        image_size=args.image_size,
        downsample_size=args.downsample_size,
        use_ema=args.use_ema,
    )
    pipeline.gpt.to("meta")
    pipeline.tokenizer.to(device)
    pipeline.device = device
    if not getattr(args, "t5_device", None):
        pipeline.t5_device = device
    return served, pipeline


def draw_grid(
    args: argparse.Namespace,
    served: ServedModel,
    pipeline: ImagePipeline,
    requests: Sequence[Request],
    names: Sequence[str],
) -> None:
    """Draws image i of the run for request i, and writes them as one picture, --output."""
    settings = {name: getattr(args, name) for name in ("max_num_seqs", "kv_cache_gib", "gpu_memory_utilization")}
    tensor_parallel_size = args.tensor_parallel_size or 1
    codes = draw(
        served, requests, **settings, tensor_parallel_size=tensor_parallel_size, enforce_eager=not args.compile
    )
    write_grid(args, pipeline.gpt, pipeline.decode(codes), names)
