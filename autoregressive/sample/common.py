"""What the class-conditional sampling scripts share: from their flags to a pipeline.

pipeline, gpt_path, vq_path = build_pipeline(args, device)
"""

import argparse
from pathlib import Path

import torch

from autoregressive.models.generate import SamplingConfig
from autoregressive.pipeline import PRECISIONS, ImagePipeline, load_gpt
from tokenizer.tokenizer_image.load import load_tokenizer
from utils.cli import grid_size, layout_numbers
from utils.runs import find_checkpoint


def sampling_settings(args: argparse.Namespace) -> dict:
    """The fields of SamplingConfig that the flags give. Raises ValueError for a value out of range."""
    settings = {
        "cfg_scale": args.cfg_scale,
        "cfg_interval": args.cfg_interval,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "sample_logits": not args.greedy,
    }
    SamplingConfig(**settings)
    return settings


def build_pipeline(
    args: argparse.Namespace, device: torch.device, batch_size: int | None = None
) -> tuple[ImagePipeline, Path, Path]:
    """Loads both models as the flags ask. Returns the pipeline and the paths of the GPT's and the tokenizer's file.

    Raises ValueError where a flag and a file disagree, FileNotFoundError for a file that is not there.
    """
    grid_size(args.image_size, args.downsample_size)
    ar_token_num, spe_token_num = layout_numbers(args)
    for flag, value in (("--gpt-ckpt", args.gpt_ckpt), ("--vq-ckpt", args.vq_ckpt)):
        if value is None:
            raise ValueError(
                f"{flag} is needed: a file, a run's folder, or a released file's name (pretrained_models/README.md)"
            )
    gpt_path, vq_path = find_checkpoint(args.gpt_ckpt), find_checkpoint(args.vq_ckpt)
    tokenizer = load_tokenizer(
        vq_path,
        vq_model=args.vq_model,
        codebook_size=args.codebook_size,
        codebook_embed_dim=args.codebook_embed_dim,
        device=device,
        use_ema=args.use_ema,
    )
    if args.downsample_size != tokenizer.downsample:
        raise ValueError(
            f"--vq-model {args.vq_model} makes tokens of {tokenizer.downsample} pixels: pass --downsample-size {tokenizer.downsample}"
        )
    gpt = load_gpt(
        gpt_path,
        device=device,
        dtype=PRECISIONS[args.precision],
        use_ema=args.use_ema,
        image_size=args.image_size,
        downsample_size=args.downsample_size,
        gpt_model=args.gpt_model,
        gpt_type=args.gpt_type,
        codebook_size=args.codebook_size,
        num_classes=args.num_classes if args.gpt_type == "c2i" else None,
        cls_token_num=args.cls_token_num,
        ar_token_num=ar_token_num or 1,
        spe_token_num=spe_token_num or 0,
    )
    if args.compile and device.type != "cuda":
        print(f"--compile: on {device.type} the plain decode step is used")
    return ImagePipeline(gpt, tokenizer, batch_size=batch_size, compile=args.compile), gpt_path, vq_path
