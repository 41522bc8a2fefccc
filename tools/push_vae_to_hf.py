"""Puts an image tokenizer on the Hugging Face hub, as safetensors with config.json and a model card, or into a folder.

    python3 tools/push_vae_to_hf.py --vq-ckpt results --vq-model VQ-16 --repo-id owner/name
    python3 tools/push_vae_to_hf.py --vq-ckpt vq_ds16_c2i.pt --output folder                       # touches no network

What is pushed loads with `VQModelHF.from_pretrained("owner/name")` (other networks as the model card says), and a folder also as
--vq-ckpt of every script. The hub's token is read from HF_TOKEN, or from what `hf auth login` left.
"""

import argparse

from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import add_hub_flags, add_tokenizer_flags, flag_parser, run_script, tokenizer_beliefs


def main(args: argparse.Namespace) -> None:
    from tokenizer.load import load_tokenizer
    from tokenizer.tokenizer_image.hub import for_hub
    from utils.checkpoint import read_checkpoint
    from utils.pretrained import check_destination, send
    from utils.runs import find_checkpoint

    check_destination(args.repo_id, args.output)
    if args.vq_ckpt is None:
        raise ValueError("--vq-ckpt is needed: a file, a run's folder, or a released file's name")
    path = find_checkpoint(args.vq_ckpt)
    tokenizer = load_tokenizer(path, **tokenizer_beliefs(args), use_ema=args.use_ema or None)
    checkpoint = read_checkpoint(path)
    model = for_hub(tokenizer, {**(checkpoint.args or {}), "vq_model": tokenizer.family}, checkpoint.steps)
    send(model, args.repo_id, args.output, private=args.private, license=args.license)


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__, added=["--vq-ckpt"])
    add_tokenizer_flags(parser, VQ_SIZES)
    parser.add_argument("--gpt-model", default="GPT-XL", help="read by nothing: published commands have it")
    parser.add_argument("--use-ema", action="store_true", help="push the averaged weights where the file has them")
    add_hub_flags(parser)
    return parser


if __name__ == "__main__":
    run_script(main, flags())
