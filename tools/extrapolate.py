"""Extrapolates from one model's weights away from another's: BASE + weight * (BASE - TUNED).

    python3 tools/sample_codes.py --gpt-ckpt results --code-path own_codes
    python3 autoregressive/train/train_c2i.py --code-path own_codes --finetune --gpt-ckpt results --results-dir results_own
    python3 tools/extrapolate.py results results_own --weight 1.0 --output neon.pt

Fine-tuned on its own samples, a model degrades; away from where that leads it may improve: Neon (arXiv 2510.03597,
equation 1). A weight of 0 is BASE, of -1 TUNED, between them their mean. The file written is an ordinary one.
"""

import argparse

from utils.cli import Number, add_flag, add_store_true, flag_parser, run_script


def main(args: argparse.Namespace) -> None:
    from utils.checkpoint import read_checkpoint, require_fit, save_checkpoint
    from utils.origin import require_same
    from utils.runs import find_checkpoint

    base, tuned = (read_checkpoint(find_checkpoint(name), prefer_ema=args.use_ema) for name in (args.base, args.tuned))
    for checkpoint in (base, tuned):
        if args.use_ema:
            checkpoint.require_averages()
    keys, names = ("tokenizer", "classes", "layout", "conditions"), (str(base.path), str(tuned.path))
    require_same(base.config, tuned.config, keys, names, "give a model and one that was fine-tuned from it")
    require_fit(base.model, {name: tensor.shape for name, tensor in tuned.model.items()}, tuned.path)
    model = {
        name: (tensor + args.weight * (tensor.double() - tuned.model[name].double())).to(tensor.dtype)
        for name, tensor in base.model.items()
    }
    record = {"steps": base.steps, "args": base.args, "config": base.config}
    save_checkpoint(args.output, {"model": model, "optimizer": {}, **record})
    print(f"{args.output}: {args.weight:g} times the way from {tuned.path} to {base.path}, beyond it")


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("base", help="the model to improve: a file, a run, a released name")
    parser.add_argument("tuned", help="that model, fine-tuned on its own samples")
    help = "how far to go, in ways from TUNED to BASE"
    add_flag(parser, "--weight", Number(float, least=-1), None, help, required=True)
    parser.add_argument("--output", required=True, help="the file to write")
    add_store_true(parser, "--use-ema", "the averaged weights of both")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
