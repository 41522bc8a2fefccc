"""Takes the weights out of a Lightning checkpoint of a VQGAN, which mostly holds its optimizers.

    python3 tools/convert_pytorch_lightning_to_torch.py --input last.ckpt --output vqgan_imagenet_f16_1024.pt

The weights get the names of our tokenizer, without the discriminator and LPIPS: the result is a file for --vqgan-ckpt, and for
--vq-ckpt of any script. --keep-names writes all weights of any Lightning checkpoint under their own names. Lightning is
not needed, and nothing in the file is run.
"""

import argparse
from pathlib import Path

from utils.cli import flag_parser, run_script


def main(args: argparse.Namespace) -> None:
    from tokenizer.load import kept_config
    from tokenizer.released import taming
    from utils.checkpoint import read_checkpoint, save_checkpoint
    from utils.origin import origin

    checkpoint = read_checkpoint(args.input)
    target = Path(args.output) if args.output else checkpoint.path.with_suffix(".pt")
    if target.is_dir():
        target = target / checkpoint.path.with_suffix(".pt").name
    if target.exists() and target.samefile(checkpoint.path):
        raise ValueError(f"{target} is the checkpoint itself: give another --output")
    if args.keep_names:
        config = kept_config(checkpoint)
        save_checkpoint(target, {"model": owned(checkpoint.model), **({"config": config} if config else {})})
        print(f"{target}: {len(checkpoint.model)} tensors of {checkpoint.path}, names kept")
        return
    converted = taming(checkpoint)
    if converted is None:
        raise ValueError(
            f"{checkpoint.path} holds no VQGAN under taming's names (no encoder.down.0.block.0.conv1.weight); --keep-names "
            "converts other checkpoints"
        )
    config, state = converted
    save_checkpoint(target, {"model": owned(state), "config": origin(**config)})
    print(
        f"{target}: {len(state)} tensors of {checkpoint.path} ({len(checkpoint.model) - len(state)} of its loss left out), for "
        "--vqgan-ckpt, or --vq-ckpt of any script"
    )


def owned(state: dict) -> dict:
    """Tensors with memory of their own: torch.save writes all that a tensor is a view of."""
    return {name: tensor.clone() for name, tensor in state.items()}


def flags() -> argparse.ArgumentParser:
    """Return the script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--input", required=True, help="the Lightning checkpoint")
    parser.add_argument("--output", default=None, help="file or folder to write to (default: beside it, .pt)")
    parser.add_argument("--keep-names", action="store_true", help="all weights under the names they have")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
