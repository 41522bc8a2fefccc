"""Takes the weights out of a Lightning checkpoint of a tokenizer, which mostly holds its optimizers.

    python3 tools/convert_pytorch_lightning_to_torch.py --input last.ckpt --output vqgan_imagenet_f16_1024.pt
    python3 tools/convert_pytorch_lightning_to_torch.py --input imagenet256_16384.ckpt

The weights, raw and averaged, get the names of our tokenizer, without the discriminator and LPIPS: the result is a file for
--vq-ckpt of any script (a VQGAN's for --vqgan-ckpt too). --keep-names writes all weights of any Lightning checkpoint under their own names. Lightning is
not needed, and nothing in the file is run.
"""

import argparse
from pathlib import Path

from utils.cli import flag_parser, run_script


def main(args: argparse.Namespace) -> None:
    from tokenizer.load import kept
    from utils.checkpoint import read_checkpoint, save_checkpoint

    checkpoint = read_checkpoint(args.input)
    target = Path(args.output) if args.output else checkpoint.path.with_suffix(".pt")
    if target.is_dir():
        target = target / checkpoint.path.with_suffix(".pt").name
    if target.exists() and target.samefile(checkpoint.path):
        raise ValueError(f"{target} is the checkpoint itself: give another --output")
    converted = kept(checkpoint)
    if args.keep_names:
        state = {**checkpoint.model, **checkpoint.extra.get("model_ema", {})}
        config = converted.config if converted.model is checkpoint.model else checkpoint.config
        save_checkpoint(target, {"model": owned(state), **({"config": config} if config else {})})
        print(f"{target}: {len(state)} tensors of {checkpoint.path}, names kept")
        return
    if "network" not in converted.config:
        raise ValueError(
            f"{checkpoint.path} holds no VQGAN or another image tokenizer that is known; --keep-names converts other checkpoints"
        )
    state = converted.model
    averages = {} if converted.ema is None else {"ema": owned(converted.ema)}
    save_checkpoint(target, {"model": owned(state), **averages, "config": converted.config})
    print(
        f"{target}: {len(state)} tensors{' and their averages' * bool(averages)} of {checkpoint.path} "
        f"({len(checkpoint.model) - len(state)} of its loss left out), for --vq-ckpt of any script"
    )


def owned(state: dict) -> dict:
    """Tensors with memory of their own: torch.save writes all that a tensor is a view of."""
    return {name: tensor.clone() for name, tensor in state.items()}


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--input", required=True, help="the Lightning checkpoint")
    parser.add_argument("--output", default=None, help="file or folder to write to (default: beside it, .pt)")
    parser.add_argument("--keep-names", action="store_true", help="all weights under the names they have")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
