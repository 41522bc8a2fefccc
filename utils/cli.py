"""Flags that several scripts share, declared once, and the last word of a script that a user's mistake ends.

parser = flag_parser(__doc__)
add_gpt_flags(parser, GPT_SIZES); add_tokenizer_flags(parser, VQ_SIZES)
add_sampling_flags(parser, cfg_scale=4.0, top_k=2000)
run_script(main, parser)
"""

import argparse
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Any, NoReturn

from utils.errors import AgreedError, is_lost_process, is_out_of_memory, words_of
from utils.registry import import_file

# A parser, or a group of one.
Flags = argparse._ActionsContainer

# The published flags, in the order in which an abbreviation looks for its flag.
LLAMAGEN_FLAGS = """
    --batch_size --beta1 --beta2 --caption-key --cfg-interval --cfg-scale --ckpt-every --clip_model4eval --cloud-save-path
    --cls-token-num --code-path --codebook-embed-dim --codebook-l2-norm --codebook-size --codebook-weight --commit-loss-beta
    --compile --crop-range --data-end --data-face-path --data-parallel --data-path --data-start --dataset --debug --disc-loss
    --disc-start --disc-type --disc-weight --downsample-size --drop-path --drop-path-rate --dropout-p --ema
    --entropy-loss-ratio --epochs --eval_res --fake_dir --finetune --from-fsdp --gen-loss --global-batch-size --global-seed
    --gpt-ckpt --gpt-model --gpt-resume --gpt-type --grad-precision --gradient-accumulation-steps --how_many --image-path
    --image-size --image-size-eval --log-every --lr --max-grad-norm --mixed-precision --no-compile --no-left-padding
    --no-local-save --no-wandb --num-classes --num-fid-samples --num-workers --output-dir --per-proc-batch-size --perceptual-weight
    --precision --prompt-csv --reconstruction-loss --reconstruction-weight --ref_data --ref_dir --ref_type --results-dir
    --sample-dir --seed --short-t5-feat-path --suffix --t5-feat-path --t5-feature-dim --t5-feature-max-len --t5-model-path
    --t5-model-type --t5-path --temperature --ten-crop --token-dropout-p --top-k --top-p --trunc-caption --vae --vocab-size
    --vq-ckpt --vq-model --vqgan --wandb-project --weight-decay
""".split()  # noqa: SIM905
NPP_AND_PAR_FLAGS = """
    --ar-token-num --decay-ratio --end-lr --epoch-rate --patch-level --scheduler --spe-token-num
    --warmup-epochs
""".split()  # noqa: SIM905


class _Parser(argparse.ArgumentParser):
    """A parser that takes the abbreviations that the published scripts take; flags that were added since make none ambiguous.

    added: published flags that the published form of this script lacks.
    """

    def __init__(self, *args: Any, added: Sequence[str] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.added = added
        self._negative_number_matcher = re.compile(
            r"-(\.?\d|inf|nan)", re.I
        )  # values, -1e-4 too, which Python's own misses

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as usual, after the files of --import have registered what they define."""
        files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        files.add_argument("--import", dest="imports", action="append", default=[])
        try:
            for file in files.parse_known_args(args)[0].imports:
                import_file(file)
        except (ValueError, OSError) as error:
            self.error(str(error))
        return super().parse_known_args(args, namespace)

    def _get_option_tuples(self, option_string: str) -> list[tuple]:
        matches = super()._get_option_tuples(option_string)
        first, last = [], []
        for action, flag, *rest in matches:
            extra = flag in self.added or (
                flag.startswith("--no-") and isinstance(action, argparse.BooleanOptionalAction)
            )
            if flag in LLAMAGEN_FLAGS and not extra:
                first.append((action, flag, *rest))
            elif flag in LLAMAGEN_FLAGS + NPP_AND_PAR_FLAGS:
                last.append((action, flag, *rest))
        return first or last

    def error(self, message: str) -> NoReturn:
        """Ends with one line, as every other mistake of a user does (see `run_script`)."""
        said = re.sub(r"^argument (\S+): must", r"\1 must", message)
        self.exit(2, f"error: {said} ({self.prog} --help lists the flags)\n")


def flag_parser(description: str | None, added: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return a parser whose help shows every default. added: published flags that its published form lacks."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = _Parser(description=description, formatter_class=Formatter, added=added)
    parser.add_argument(
        "--import",
        dest="import",
        metavar="FILE.py",
        action="append",
        default=[],
        help="a file of your own that registers layouts, conditions, objectives or quantisers (docs/extending.md); repeatable",
    )
    return parser


class _Unused(argparse.Action):
    """Takes a flag that old command lines have and says on stderr why it changes nothing (`const`)."""

    def __call__(self, parser: object, namespace: object, values: object, option: str | None = None) -> None:
        print(f"{option} is not used: {self.const}", file=sys.stderr)


class _StoreGiven(argparse.Action):
    """Stores a value, and as `…_given` that the command line has it."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: object, option: object = None) -> None:
        setattr(namespace, self.dest, values)
        setattr(namespace, f"{self.dest}_given", True)


def add_switch(parser: Flags, name: str, default: bool | None, help: str) -> None:
    """A switch with its --no-… form."""
    parser.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=help)


@dataclass(frozen=True)
class Number:
    """An argparse type: a finite number with its range; `least` and `most` belong to the range, `above` and `below` do not."""

    kind: type[int] | type[float]
    least: float = -inf
    above: float = -inf
    most: float = inf
    below: float = inf

    def __call__(self, text: str) -> int | float:
        try:
            value = self.kind(text)
        except ValueError:
            value = nan
        if isinstance(value, float) and not isfinite(value):
            kind = "a whole number" if self.kind is int else "a finite number"
            raise argparse.ArgumentTypeError(f"must be {kind} {self}, got {text or 'nothing'}")
        if not (self.least <= value <= self.most and self.above < value < self.below):
            raise argparse.ArgumentTypeError(f"must be {self}, got {value}")
        return value

    def __str__(self) -> str:
        words = {
            "{:,} or more": self.least,
            "above {:,}": self.above,
            "at most {:,}": self.most,
            "below {:,}": self.below,
        }
        return " and ".join(form.format(bound) for form, bound in words.items() if abs(bound) != inf)


positive_int = Number(int, above=0)
nonnegative_int = Number(int, least=0)
positive_float = Number(float, above=0)
nonnegative_float = Number(float, least=0)
PROBABILITY = Number(float, least=0, below=1)
SHARE = Number(float, least=0, most=1)
PORTION = Number(float, above=0, most=1)
SEED = Number(int, least=-(2**63), most=2**63 - 1)
PORT = Number(int, least=0, most=2**16 - 1)
# Guidance is off at 1 and below; published command lines also write 0 or -1 for that.
CFG_SCALE = Number(float, least=-1)


def colour(text: str) -> str:
    """An argparse type: a colour's name or #rrggbb, as '#rrggbb'; or 'none'."""
    from PIL import ImageColor

    try:
        return text if text == "none" else "#{:02x}{:02x}{:02x}".format(*ImageColor.getrgb(text)[:3])
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no colour: give a name, #rrggbb, or none") from error


def named_settings(text: str) -> dict[str, Any]:
    """An argparse type: a registered name and its settings, NAME or NAME,key=value,…, as {"name": NAME, key: value, …}."""
    name, *settings = text.split(",")
    if not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be a registered name, got {name or 'nothing'}")
    found: dict[str, Any] = {"name": name}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise argparse.ArgumentTypeError(f"must be NAME or NAME,key=value,…, got {text}")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def positive_int_or_auto(text: str) -> float | str:
    """An argparse type: a whole number above zero, or "auto"."""
    return text if text == "auto" else positive_int(text)


def add_gpt_flags(
    parser: Flags, sizes: Iterable[str], *, training: bool = False, gpt_type: str = "c2i", gpt_model: str = "GPT-B"
) -> None:
    """--gpt-model (one of `sizes`), --gpt-type and what fixes the sequence."""
    group = parser.add_argument_group("model")
    group.add_argument("--gpt-model", choices=list(sizes), default=gpt_model, help="size of the transformer")
    group.add_argument(
        "--gpt-type", choices=["c2i", "t2i"], default=gpt_type, help="conditioned on a class or a caption"
    )
    tokens = 1 if gpt_type == "c2i" else 120
    group.add_argument("--cls-token-num", type=positive_int, default=tokens, help="condition tokens before the image's")
    said_by = "the codes say" if training else "the file says"
    group.add_argument(
        "--num-classes", type=positive_int, default=None, help=f"classes the model knows (default: as {said_by})"
    )
    group.add_argument(
        "--ar-token-num",
        type=positive_int,
        default=None,
        help="tokens a step predicts, a square number (PAR; 1: raster)",
    )
    group.add_argument(
        "--spe-token-num",
        type=nonnegative_int,
        default=None,
        help="special tokens of PAR, one less than --ar-token-num",
    )
    if training:
        group.add_argument(
            "--layout",
            type=named_settings,
            default=None,
            metavar="NAME[,key=value]",
            help="a registered order of tokens (default: raster, or what --ar-token-num says); docs/extending.md",
        )
        group.add_argument(
            "--condition",
            type=named_settings,
            action="append",
            default=[],
            metavar="NAME[,key=value]",
            help="a further registered condition, read from the data by its name; repeatable",
        )
    why = "rotary tables are made for the grid of --image-size, as those of the released models"
    group.add_argument(
        "--rescale-rope", action=_Unused, nargs="?", const=why, default=argparse.SUPPRESS, help="not used"
    )
    if training:
        group.add_argument(
            "--vocab-size", type=positive_int, default=None, help="codes in the codebook (default: as the codes say)"
        )
        group.add_argument("--dropout-p", type=PROBABILITY, default=0.1, help="residual and feed-forward dropout")
        group.add_argument("--token-dropout-p", type=PROBABILITY, default=0.1, help="dropout after the embedding")
        group.add_argument("--drop-path-rate", type=PROBABILITY, default=0.0, help="stochastic depth of the last layer")


def add_gpt_file_flags(parser: Flags, *, required: bool = False) -> None:
    """--gpt-ckpt, --from-fsdp and --use-ema of the scripts that sample."""
    help = "GPT weights: a file, a run's folder, or a released file's name"
    parser.add_argument("--gpt-ckpt", default=None, required=required, help=help)
    help = "a bare state dict (recognised without the flag too); sample folders are named after its folder"
    parser.add_argument("--from-fsdp", action="store_true", help=help)
    help = "sample from the GPT's averaged weights, and the tokenizer's where its file has some"
    parser.add_argument("--use-ema", action="store_true", help=help)


def layout_numbers(args: argparse.Namespace) -> tuple[int | None, int | None]:
    """(--ar-token-num, --spe-token-num) where giving one implies the other; (None, None) where neither is given."""
    ar, special = args.ar_token_num, args.spe_token_num
    if ar is None and special is None:
        return None, None
    ar = special + 1 if ar is None else ar
    special = ar - 1 if special is None else special
    if ar < 1 or special != ar - 1:
        raise ValueError(
            f"--ar-token-num {ar} goes with --spe-token-num {ar - 1}, got --spe-token-num {special}; "
            "give one of the two and the other follows"
        )
    return ar, special


def grid_size(image_size: int, downsample_size: int) -> int:
    """Tokens a side. Raises ValueError where the tokenizer does not divide the image."""
    if image_size % downsample_size:
        below = image_size // downsample_size * downsample_size
        sizes = f"{below} or {below + downsample_size}" if below else f"{downsample_size}"
        raise ValueError(
            f"--image-size {image_size} is not a multiple of --downsample-size {downsample_size}; try {sizes}"
        )
    return image_size // downsample_size


def add_tokenizer_flags(parser: Flags, names: Iterable[str], *, required: bool = False) -> None:
    """--vq-ckpt, and what its file is believed to hold: --vq-model (one of `names`) and the shape of the codebook."""
    group = parser.add_argument_group("tokenizer")
    group.add_argument(
        "--vq-model", choices=list(names), default=None, help="image tokenizer (default: as the file says)"
    )
    group.add_argument(
        "--vq-ckpt",
        default=None,
        required=required,
        help="tokenizer weights: a file, a run's folder, or a released file's name",
    )
    group.add_argument(
        "--codebook-size", type=positive_int, default=None, help="codes in the codebook (default: as the file says)"
    )
    group.add_argument(
        "--codebook-embed-dim", type=positive_int, default=None, help="numbers a code has (default: as the file says)"
    )


def tokenizer_beliefs(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags of `add_tokenizer_flags` say of the file, as `load_tokenizer` takes it."""
    return {name: getattr(args, name, None) for name in ("vq_model", "codebook_size", "codebook_embed_dim")}


def add_image_size_flags(parser: Flags, size: int, *, downsample: bool = True, evaluation: int | None = None) -> None:
    """--image-size and, where asked for, --downsample-size and --image-size-eval."""
    parser.add_argument(
        "--image-size", type=positive_int, default=size, help="pixels a side; the tokenizer must divide it"
    )
    if downsample:
        parser.add_argument("--downsample-size", type=positive_int, default=16, help="pixels a side of a token")
    if evaluation:
        parser.add_argument(
            "--image-size-eval", type=positive_int, default=evaluation, help="pixels a side of the saved images"
        )


def add_reading_flags(parser: Flags) -> None:
    """--exif and --background of the scripts that read image files; `dataset/pixels.py:Reading.of` takes them."""
    add_switch(parser, "--exif", None, "turn images as their EXIF says (on unless --no-exif, the published way)")
    parser.add_argument(
        "--background",
        type=colour,
        default=None,
        help="colour laid under transparent pixels, a name or #rrggbb (white unless given); none drops transparency, as published",
    )


def add_sampling_flags(
    parser: Flags, *, cfg_scale: float, top_k: int, interval: bool = True, negative: str | None = None
) -> None:
    """Guidance, temperature, top-k, top-p, greedy. negative: what guidance may lead away from, "class" or "prompt"."""
    group = parser.add_argument_group("sampling")
    if negative:
        says = "a class, by name or number," if negative == "class" else "a prompt"
        group.add_argument(
            f"--negative-{negative}",
            default=None,
            help=f"{says} that guidance leads away from (default: no {negative})",
        )
    group.add_argument("--cfg-scale", type=CFG_SCALE, default=cfg_scale, help="guidance scale, 1 or less for none")
    if interval:
        group.add_argument(
            "--cfg-interval", type=Number(float, least=-1), default=-1, help="last guided decode step, -1 for all"
        )
    group.add_argument("--temperature", type=nonnegative_float, default=1.0, help="divides the logits, 0 as --greedy")
    group.add_argument(
        "--top-k", type=Number(int, least=-1), default=top_k, help="keep the k most likely tokens, 0 or -1 for all"
    )
    group.add_argument(
        "--top-p",
        type=nonnegative_float,
        default=1.0,
        help="keep the most likely tokens of this mass: 1 or more for all, 0 as --greedy",
    )
    group.add_argument("--greedy", action="store_true", help="take the likeliest token, the first of equal ones")


def add_text_flags(parser: Flags) -> None:
    """Where the T5 is that encodes prompts, how it is run, and how its features stand before the image."""
    group = parser.add_argument_group("text")
    group.add_argument(
        "--t5-path", default="pretrained_models/t5-ckpt", help="folder of T5 folders, or the T5's folder itself"
    )
    group.add_argument("--t5-model-type", default="flan-t5-xl", help="the T5's folder in --t5-path")
    group.add_argument(
        "--t5-feature-max-len", type=positive_int, default=120, help="text tokens that are read of a prompt"
    )
    group.add_argument("--t5-feature-dim", type=positive_int, default=2048, help="width of the T5's features")
    group.add_argument(
        "--no-left-padding",
        action="store_true",
        help="features stand before their padding; released models were trained with them behind it",
    )
    group.add_argument(
        "--t5-feat-path",
        default=None,
        help="folder of the prompts' features in the T5's place, which is not loaded then: language/extract_t5_feature.py "
        "makes it of the same file of prompts (--data-path FILE); line i of the features belongs to prompt i",
    )
    group.add_argument("--t5-device", default=None, help="where the T5 runs (default: --device)")
    group.add_argument(
        "--t5-precision", choices=["none", "fp16", "bf16"], default=None, help="of the T5 (default: --precision)"
    )


def add_run_flags(parser: Flags, *, compile: bool | None = False, precision: bool = True) -> None:
    """--device, --precision, --compile. compile: its default, None where the script decides."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")
    if precision:
        group.add_argument(
            "--precision", choices=["none", "fp16", "bf16"], default="bf16", help="of the transformer's weights"
        )
    add_switch(group, "--compile", compile, "torch.compile the decode step, on CUDA and on a CPU beside a C++ compiler")


def add_quantize_flag(parser: Flags) -> None:
    """--quantize of the scripts that sample."""
    parser.add_argument(
        "--quantize",
        choices=["none", "int8"],
        default="none",
        help="int8: the blocks' matrices in 8 bits, about half of bf16's memory in large models; other images (needs torchao)",
    )


def add_batch_size_flag(parser: Flags) -> None:
    """--batch-size of a script that draws."""
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=None,
        help="images at once (default: 32 on an accelerator, 8 on a CPU)",
    )


def add_per_process_batch_size_flag(parser: Flags) -> None:
    """--per-proc-batch-size of a script that draws many images."""
    parser.add_argument(
        "--per-proc-batch-size",
        type=positive_int_or_auto,
        default=32,
        help="images at once on each process; auto: as many as fit into memory",
    )


def add_decode_precision_flag(parser: Flags) -> None:
    """--decode-precision of a script that turns tokens into pixels."""
    parser.add_argument(
        "--decode-precision",
        choices=["none", "bf16"],
        default="none",
        help="of the tokenizer's decoder: none for float32, bf16 for pixels sooner that are not quite the same",
    )


def add_extraction_flags(parser: Flags, *, items: str, shard_size: int, published: str) -> None:
    """Flags of the scripts that make files from a data set once: codes, features. items: what a shard has, in the plural.

    published: what the published layout is.
    """
    parser.add_argument(
        "--shard-size",
        type=positive_int,
        default=shard_size,
        help=f"{items} a shard, and what an interruption may cost",
    )
    parser.add_argument("--published-layout", action="store_true", help=f"{published}, as the published scripts write")
    parser.add_argument(
        "--global-seed", type=SEED, default=0, help="kept for published command lines; encoding draws nothing"
    )
    parser.add_argument(
        "--num-workers", type=nonnegative_int, default=24, help="loader processes (at most the processor's cores)"
    )
    parser.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")


def add_encoder_precision_flag(parser: Flags) -> None:
    """--mixed-precision of a tokenizer whose codes are kept."""
    parser.add_argument(
        "--mixed-precision",
        choices=["none", "fp16", "bf16"],
        default="none",
        help="autocast of the encoder: faster, but some codes differ from those of float32, which published codes are",
    )


def add_hub_flags(parser: Flags) -> None:
    """Where the scripts that push to the Hugging Face hub put a model."""
    group = parser.add_argument_group("hub")
    group.add_argument("--repo-id", default=None, help="the repository to push to, owner/name; made if it is not there")
    group.add_argument("--output", default=None, help="save to this folder instead; with --repo-id do both")
    group.add_argument(
        "--private", action="store_true", help="a repository that is made shows itself to its owner only"
    )
    group.add_argument("--license", default="mit", help="of the weights, as the hub calls it")


def add_vllm_flags(parser: Flags, *, places: bool = True) -> None:
    """What vLLM's engine is given besides the model. places: of a script that draws once, not of the server."""
    group = parser.add_argument_group("vLLM")
    if places:
        group.add_argument("--max-num-seqs", type=positive_int, default=32, help="images that are drawn at once")
    else:
        group.add_argument(
            "--data-parallel-size",
            type=positive_int,
            default=None,
            help="engines that share the requests, each on a GPU of its own",
        )
    group.add_argument(
        "--tensor-parallel-size", type=positive_int, default=None, help="GPUs that share each layer of the model"
    )
    group.add_argument(
        "--kv-cache-gib",
        type=positive_float,
        default=None,
        help="memory of the keys and values (default: on a CPU what the images drawn at once need, on a GPU what is left)",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=PORTION,
        default=None,
        help="the share of a GPU's memory that vLLM takes (default: vLLM's own, 0.9 or so)",
    )


def add_training_flags(
    parser: Flags,
    *,
    epochs: int,
    batch: int,
    results_dir: str,
    num_workers: int,
    wandb_project: str | None = None,
    decays: bool = True,
) -> None:
    """Everything utils/training/trainer.py reads. decays: whether --weight-decay is used where it is not given."""
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=positive_int, default=epochs, help="passes over the data")
    group.add_argument("--max-steps", type=positive_int, default=None, help="stop after this many steps, if sooner")
    group.add_argument("--lr", type=nonnegative_float, default=1e-4, help="learning rate")
    group.add_argument("--lr-schedule", choices=["constant", "cosine"], default="constant", help="after the warm-up")
    group.add_argument("--warmup-steps", type=nonnegative_int, default=0, help="steps of linear warm-up")
    group.add_argument(
        "--weight-decay",
        type=nonnegative_float,
        action="store" if decays else _StoreGiven,
        default=0.05,
        help="of tensors with two or more dimensions"
        if decays
        else "of all tensors, where it is given; published runs have none",
    )
    group.add_argument("--beta1", type=PROBABILITY, default=0.9, help="Adam's first moment")
    group.add_argument("--beta2", type=PROBABILITY, default=0.95, help="Adam's second moment")
    group.add_argument("--max-grad-norm", type=nonnegative_float, default=1.0, help="gradient clipping, 0 for none")
    group.add_argument(
        "--global-batch-size", type=positive_int, default=batch, help="samples a step, over all processes"
    )
    group.add_argument(
        "--gradient-accumulation-steps",
        type=positive_int,
        default=1,
        help="parts a process's share of a batch is split into",
    )
    group.add_argument(
        "--mixed-precision",
        choices=["none", "fp32", "tf32", "fp16", "bf16"],
        default="bf16",
        help="of the forward and backward pass; none and fp32: float32 without TF32, tf32: float32 rounded to TF32 on the GPU; "
        "weights are kept in float32",
    )
    group.add_argument("--ema", action="store_true", help="keep an exponential moving average of the weights")
    group.add_argument("--ema-decay", type=SHARE, default=0.9999, help="of that average")
    add_switch(
        group,
        "--ema-warmup",
        None,
        "begin with a smaller decay, (1 + step) / (10 + step), without which the average of a short run is its initial weights "
        "(default: on; averages that began without it go on without it)",
    )
    group.add_argument("--global-seed", type=SEED, default=0, help="fixes every random choice")
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="on CUDA take kernels that add up in one order, so that equal runs end with equal bits; slower",
    )
    group.add_argument(
        "--num-workers",
        type=nonnegative_int,
        default=num_workers,
        help="loader processes (at most the processor's cores)",
    )

    group = parser.add_argument_group("files")
    group.add_argument("--results-dir", default=results_dir, help="runs go to numbered folders in here")
    group.add_argument("--cloud-save-path", default=None, help="a second place for the checkpoints")
    group.add_argument("--no-local-save", action="store_true", help="checkpoints go to --cloud-save-path only")
    group.add_argument(
        "--resume", action="store_true", help="go on with the newest run in --results-dir, if there is one"
    )
    group.add_argument("--log-every", type=positive_int, default=100, help="steps between log lines")
    group.add_argument("--ckpt-every", type=positive_int, default=5000, help="steps between checkpoints")
    group.add_argument("--keep-last", type=nonnegative_int, default=0, help="checkpoints to keep, 0 for all")
    group.add_argument(
        "--sample-every",
        type=positive_int,
        default=None,
        help="steps between grids of pictures (default: those of checkpoints)",
    )
    group.add_argument("--wandb-project", default=wandb_project, help="also log to this Weights & Biases project")
    group.add_argument("--no-wandb", action="store_true", help="never log to Weights & Biases")
    group.add_argument("--device", default=None, help="cuda, mps or cpu (default: the best there is)")


def add_parallel_flags(parser: Flags, default: str) -> None:
    """--data-parallel and what utils/training/parallel.py does with it."""
    group = parser.add_argument_group("processes")
    group.add_argument(
        "--data-parallel",
        choices=["ddp", "fsdp", "sdp", "hsdp"],
        default=default,
        help="ddp: each process holds everything; fsdp: weights, gradients and optimizer in shards; sdp: weights gathered "
        "during a step; hsdp: shards within a group of processes, copies across groups",
    )
    group.add_argument(
        "--shard-size", type=positive_int, default=None, help="processes of an hsdp group (default: a machine's)"
    )
    group.add_argument(
        "--grad-precision",
        choices=["fp32", "fp16", "bf16"],
        default=None,
        help="in which gradients are summed over processes (default: fp32 with ddp, else that of --mixed-precision)",
    )
    group.add_argument(
        "--sync-every-micro-batch",
        action="store_true",
        help="sum gradients after each accumulation step: with shards less memory, more traffic",
    )
    group.add_argument(
        "--activation-checkpointing", action="store_true", help="recompute each block: less memory, a third more work"
    )
    group.add_argument(
        "--timeout-minutes",
        type=Number(float, above=0, most=525_600),
        default=30,
        help="how long a process waits for the others before it gives up",
    )


_AFTER_OTHERS = 3.0  # seconds


def run_script(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parses, runs, and ends a user's mistake with one clear line and exit code 1 (TRACEBACK=1 shows where it arose)."""
    for stream in (sys.stdout, sys.stderr):  # a file name's bytes that are no UTF-8 are escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = parser.parse_args()
    except SystemExit as ended:  # 2 of argparse, 0 of --help
        sys.exit(1 if ended.code else 0)
    try:
        main(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, ModuleNotFoundError, OSError, RuntimeError, MemoryError) as error:
        others, first = os.environ.get("WORLD_SIZE", "1") != "1", os.environ.get("RANK", "0") == "0"
        lost = others and is_lost_process(error)
        unforeseen = isinstance(error, RuntimeError) and not (lost or is_out_of_memory(error))
        if others and (unforeseen or lost or not first):
            # torchrun ends the others with the first to leave. An error of all is told by the first process, and one of a
            # single process before what the others make of its end.
            time.sleep(_AFTER_OTHERS)
        if unforeseen or os.environ.get("TRACEBACK"):
            raise
        if lost:
            rank = os.environ["RANK"]
            error = ConnectionError(
                f"process {rank} lost the others: one of them has ended or never came, see what it said itself"
            )
        if first or not isinstance(error, AgreedError):
            print(f"error: {words_of(error)}", file=sys.stderr, flush=True)
        sys.exit(1)
