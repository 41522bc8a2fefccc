"""Puts a GPT on the Hugging Face hub, as safetensors with config.json and a model card, or into a folder.

    python3 tools/push_gpt_to_hf.py --gpt-ckpt results --gpt-model GPT-L --image-size 256 --repo-id owner/name
    python3 tools/push_gpt_to_hf.py --gpt-ckpt c2i_L_384.pt --gpt-model GPT-L --output folder      # touches no network

Weights are stored in --precision: `none` keeps float32 to the bit. What is pushed loads with
`TransformerHF.from_pretrained("owner/name")` (autoregressive/hub.py), and a folder also as --gpt-ckpt of every script.
The hub's token is read from HF_TOKEN, or from what `hf auth login` left.
"""

import argparse

from autoregressive.models.sizes import GPT_SIZES
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import (
    add_gpt_file_flags,
    add_gpt_flags,
    add_hub_flags,
    add_image_size_flags,
    add_run_flags,
    add_tokenizer_flags,
    flag_parser,
    given,
    run_script,
    tokenizer_beliefs,
)


def main(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from autoregressive.hub import hub_class
    from autoregressive.pipeline import PRECISIONS, ImagePipeline
    from autoregressive.sample.common import load_gpt_of_flags
    from tokenizer.load import load_tokenizer
    from utils.checkpoint import read_checkpoint
    from utils.pretrained import check_destination, send
    from utils.runs import find_checkpoint

    check_destination(args.repo_id, args.output)
    if args.gpt_ckpt is None:
        raise ValueError("--gpt-ckpt is needed: a file, a run's folder, or a released file's name")
    path = find_checkpoint(args.gpt_ckpt)
    gpt = load_gpt_of_flags(args, path, PRECISIONS[args.precision])
    if args.vq_ckpt is not None:
        known = {**tokenizer_beliefs(args), "fingerprint": gpt.file_config.get("tokenizer")}
        ImagePipeline(gpt, load_tokenizer(find_checkpoint(args.vq_ckpt), **known))  # raises where they do not fit

    # The feed-forward width by the rule of the table of sizes, where it is that.
    ruled = replace(gpt.args, ffn_width=None)
    if ruled.ffn_dim == gpt.args.ffn_dim:
        gpt.args = gpt.config = ruled
    checkpoint = read_checkpoint(path)
    known = {name: given(getattr(args, name)) for name in ("gpt_model", "image_size", "downsample_size")}
    known = {name: value for name, value in known.items() if value is not None}
    model = hub_class(gpt.args.trunk).holding(gpt, {**(checkpoint.args or {}), **known}, checkpoint.steps)
    send(model, args.repo_id, args.output, private=args.private, license=args.license)


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    add_gpt_flags(parser, GPT_SIZES)
    add_gpt_file_flags(parser)
    add_tokenizer_flags(parser, VQ_SIZES)
    add_image_size_flags(parser, 384, evaluation=256, of_file=True)
    add_run_flags(parser, compile=True)
    add_hub_flags(parser)
    return parser


if __name__ == "__main__":
    run_script(main, flags())
