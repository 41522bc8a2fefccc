"""Writes the weights of a checkpoint of training in a form for sampling or for other programs.

    python3 tools/export_checkpoint.py --checkpoint results/000-GPT-XXL --format safetensors

Reads a sharded checkpoint's folder, a file in any published format, or a run's folder (its newest checkpoint), without
the processes that wrote it. Formats: `pt` (the published layout with model, ema, steps and args), `consolidated` (a bare
state dict, for --from-fsdp) and `safetensors`. Each keeps the record of what the weights belong to. Of a run with
--lora-rank these have the sum of base and adapter, and `peft` is a folder of the adapter alone, in peft's format.
"""

import argparse
from pathlib import Path

from utils.cli import flag_parser, run_script

SUFFIX = {"pt": ".pt", "consolidated": ".pth", "safetensors": ".safetensors", "peft": "-peft"}


def main(args: argparse.Namespace) -> None:
    import torch

    from tokenizer.load import kept
    from utils import lora
    from utils.checkpoint import read_checkpoint, save_bare_weights, save_checkpoint, save_safetensors
    from utils.distributed import Distributed
    from utils.runs import find_checkpoint
    from utils.training.shards import ShardedCheckpoint, whole_weights
    from utils.training.state import TrainingState

    found = find_checkpoint(args.checkpoint)
    read = TrainingState.read(found, Distributed(torch.device("cpu")))
    source = read.path
    if args.format == "peft":
        if "lora" not in read.config:
            raise ValueError(f"{source} is no adapter: --format peft is of runs with --lora-rank")
    elif "lora" in read.config:
        read = read_checkpoint(found)
    if isinstance(read, ShardedCheckpoint):
        model, ema = whole_weights(source, "model"), whole_weights(source, "ema") or None
        steps, flags, config = read.record["steps"], read.record["args"], read.record.get("config", {})
    else:
        read = kept(read)
        model, ema, steps, flags, config = dict(read.model), read.ema, read.steps, read.args, read.config
    if args.use_ema or (config.get("averaged") and ema is not None and args.format != "pt"):
        if ema is None:
            raise ValueError(f"{source} has no averaged weights; leave out --use-ema")
        model, ema = dict(ema), None
    beside = _beside(source, args.format, args.use_ema)
    target = Path(args.output) if args.output else beside
    if args.output and target.is_dir():
        target = target / beside.name
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is the checkpoint itself: give another --output")
    if args.format == "pt":
        averaged = {} if ema is None else {"ema": dict(ema)}
        save_checkpoint(target, {"model": model, **averaged, "steps": steps, "args": flags, "config": config})
    elif args.format == "consolidated":
        save_bare_weights(target, model, config)
    elif args.format == "peft":
        target.mkdir(parents=True, exist_ok=True)
        whole = [name.rpartition(".")[0] for name in model if ".lora_" not in name]
        lora.write_settings(target, config["lora"], config["base_file"]["path"], whole)
        named = {lora.in_file(name): tensor for name, tensor in model.items()}
        save_safetensors(target / lora.WEIGHTS_FILE, named, {"args": flags, "steps": steps, "config": config})
    else:
        known = {"args": flags, "steps": steps, "config": config}
        save_safetensors(target, model, {key: value for key, value in known.items() if value is not None})
    print(f"{target}: {sum(tensor.numel() for tensor in model.values()):,} numbers of {source}")


def _beside(source: Path, format: str, averaged: bool) -> Path:
    """Return the default place of an export: a sharded checkpoint's folder, else beside the file under its name."""
    if source.is_dir() and format == "consolidated":
        return source / f"consolidated{'_ema' if averaged else ''}.pth"
    name = (source.name if source.is_dir() else source.stem) + ("-ema" if averaged else "")
    return source.with_name(name + ("-export" if format == "pt" else "") + SUFFIX[format])


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="a checkpoint's file or folder, or a run's folder")
    parser.add_argument("--format", choices=list(SUFFIX), required=True, help="what to write")
    parser.add_argument("--output", default=None, help="file or folder to write to (default: beside the checkpoint)")
    parser.add_argument("--use-ema", action="store_true", help="export the averaged weights as the model")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
