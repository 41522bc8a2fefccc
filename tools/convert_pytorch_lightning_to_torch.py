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
    from tokenizer.tokenizer_image.load import kept_config, vq_record
    from tokenizer.tokenizer_image.vq_model import vq_args_from_state_dict, vq_model_name
    from tokenizer.vqgan.load import from_taming, has_taming_names
    from utils.checkpoint import read_checkpoint, save_checkpoint

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
    if not has_taming_names(checkpoint.model):
        raise ValueError(
            f"{checkpoint.path} holds no VQGAN under taming's names (no encoder.down.0.block.0.conv1.weight); --keep-names "
            "converts other checkpoints"
        )
    model = owned(from_taming(checkpoint.model))
    try:
        shape = vq_args_from_state_dict(model)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path} holds {error}") from error
    shape.codebook_l2_norm = False  # which the weights do not show: --vq-ckpt would normalise the codes otherwise
    save_checkpoint(target, {"model": model, "config": vq_record(shape)})
    print(
        f"{target}: {len(model)} tensors of {checkpoint.path} ({len(checkpoint.model) - len(model)} of its loss left out), for "
        f"--vqgan-ckpt, or --vq-ckpt with --vq-model {vq_model_name(shape)} --codebook-size {shape.codebook_size} "
        f"--codebook-embed-dim {shape.codebook_embed_dim}"
    )


def owned(state: dict) -> dict:
    """Tensors with memory of their own: torch.save writes all that a tensor is a view of."""
    return {name: tensor.clone() for name, tensor in state.items()}


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--input", required=True, help="the Lightning checkpoint")
    parser.add_argument("--output", default=None, help="file or folder to write to (default: beside it, .pt)")
    parser.add_argument("--keep-names", action="store_true", help="all weights under the names they have")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
