"""Flags that several scripts share, declared once, and the last word of a script that a user's mistake ends."""

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
from pathlib import Path
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

    added: published flags that the published form of this script lacks. rest: words that it does not know are left in `rest`.
    """

    def __init__(self, *args: Any, added: Sequence[str] = (), rest: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.added, self.rest = added, rest
        # Values, -1e-4 too, which Python's own pattern misses.
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan)", re.I)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as usual, but where a script hands on what it does not know."""
        if not self.rest:
            return super().parse_args(args, namespace)
        known, known.rest = self.parse_known_args(args, namespace)
        return known

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
        first = [match for match in matches if match[1] in LLAMAGEN_FLAGS and not self._is_added(*match[:2])]
        return first or [match for match in matches if match[1] in LLAMAGEN_FLAGS + NPP_AND_PAR_FLAGS]

    def _is_added(self, action: argparse.Action, flag: str) -> bool:
        switched_off = flag.startswith("--no-") and isinstance(action, argparse.BooleanOptionalAction)
        return flag in self.added or switched_off

    def error(self, message: str) -> NoReturn:
        """End with one line, as every other mistake of a user does (see `run_script`)."""
        said = re.sub(r"^argument (\S+): must", r"\1 must", message)
        if os.environ.get("RANK", "0") != "0":  # the first process says it, and torchrun ends the others with it
            time.sleep(_AFTER_OTHERS)
        _tell(f"{said} ({self.prog} --help lists the flags)")
        self.exit(2)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the description as it is written, and every default that is neither None nor said already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default in (None, []) or "(default" in (action.help or "")
        return action.help if said else super()._get_help_string(action)


def flag_parser(description: str | None, added: Sequence[str] = (), rest: bool = False) -> argparse.ArgumentParser:
    """Return a parser whose help shows the defaults. added, rest: as of _Parser."""
    parser = _Parser(description=description, formatter_class=_Formatter, added=added, rest=rest)
    help = "a file of your own that registers layouts, conditions, objectives, rewards or quantisers (docs/extending.md); repeatable"
    parser.add_argument("--import", dest="import", metavar="FILE.py", action="append", default=[], help=help)
    return parser


class _Unused(argparse.Action):
    """Takes a flag that old command lines have and says on stderr why it changes nothing (`const`)."""

    def __call__(self, parser: object, namespace: object, values: object, option: str | None = None) -> None:
        print(f"{option} is not used: {self.const}", file=sys.stderr)


def add_flag(parser: Flags, name: str, type: Any, default: Any, help: str, **more: Any) -> None:
    """Add a flag with a value. type: None for text."""
    parser.add_argument(name, type=type, default=default, help=help, **more)


def add_switch(parser: Flags, name: str, default: bool | None, help: str) -> None:
    """Add a switch with its --no-… form."""
    parser.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=help)


def add_store_true(parser: Flags, name: str, help: str) -> None:
    """Add a switch that is off unless it is given."""
    parser.add_argument(name, action="store_true", help=help)


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
        bounds = (f"{self.least:,} or more", f"above {self.above:,}", f"at most {self.most:,}", f"below {self.below:,}")
        return " and ".join(bound for bound in bounds if "inf" not in bound)


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
CONTROL_TYPES = ("canny", "seg", "depth", "hed", "lineart")  # of control images (ControlAR)


def colour(text: str) -> str:
    """Return a colour's name or #rrggbb as '#rrggbb', and 'none' as it is: an argparse type."""
    from PIL import ImageColor

    try:
        return text if text == "none" else "#{:02x}{:02x}{:02x}".format(*ImageColor.getrgb(text)[:3])
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no colour: give a name, #rrggbb, or none") from error


def named_settings(text: str) -> dict[str, Any]:
    """Return NAME or NAME,key=value,… as {"name": NAME, key: value, …}: an argparse type."""
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
    """Return a whole number above zero, or "auto": an argparse type."""
    return text if text == "auto" else positive_int(text)


class _UntoldInt(int):
    pass


class _UntoldStr(str):
    pass


def untold(value: int | str) -> Any:
    """Return a default that the command line's absence is known by: equal to the published value, and None to `given`."""
    return _UntoldStr(value) if isinstance(value, str) else _UntoldInt(value)


def given(value: Any) -> Any:
    """Return a flag's value, or None where it is a default of `untold`: no belief, so that a file's own value counts."""
    return None if isinstance(value, _UntoldInt | _UntoldStr) else value


def settle(args: argparse.Namespace, **known: Any) -> None:
    """Set flags that are not given to what files say (`known`; None: nothing), else to their default, a plain value."""
    for name, value in known.items():
        asked = getattr(args, name)
        if value is not None and given(asked) is None:
            asked = value
        plain = str if isinstance(asked, _UntoldStr) else int if isinstance(asked, _UntoldInt) else None
        setattr(args, name, plain(asked) if plain else asked)


RESULTS = "results"
HALF = ["none", "fp16", "bf16"]
_AS_FILE = "; unless given, the file's"
DEVICE = "cuda, mps or cpu (default: the best there is)"
WORKERS = "loader processes (at most the processor's cores)"


def add_gpt_flags(
    parser: Flags, sizes: Iterable[str], *, training: bool = False, gpt_type: str = "c2i", gpt_model: str = "GPT-B"
) -> None:
    """Add --gpt-model (one of `sizes`), --gpt-type and what fixes the sequence; unless in training, of a file (see `untold`)."""
    group = parser.add_argument_group("model")
    default, says = (lambda value: value, "") if training else (untold, _AS_FILE)
    says_size = "; unless given, that of --gpt-ckpt or of the run that is resumed" if training else says
    add_flag(group, "--gpt-model", None, untold(gpt_model), f"size of the transformer{says_size}", choices=list(sizes))
    add_flag(group, "--gpt-type", None, gpt_type, "conditioned on a class or a caption", choices=["c2i", "t2i"])
    tokens = 1 if gpt_type == "c2i" else 120
    add_flag(group, "--cls-token-num", positive_int, default(tokens), f"condition tokens before the image's{says}")
    said_by = "the codes say" if training else "the file says"
    add_flag(group, "--num-classes", positive_int, None, f"classes the model knows (default: as {said_by})")
    add_flag(group, "--ar-token-num", positive_int, None, "tokens a step predicts, a square number (PAR; 1: raster)")
    add_flag(group, "--spe-token-num", nonnegative_int, None, "special tokens of PAR, one less than --ar-token-num")
    if not training:
        add_flag(group, "--layout", None, None, f"name of a registered order of tokens{says}")
    if training:
        named: dict[str, Any] = {"type": named_settings, "metavar": "NAME[,key=value]"}
        help = "a registered order of tokens (default: raster, or what --ar-token-num says); docs/extending.md"
        add_flag(group, "--layout", default=None, help=help, **named)
        help = "a further registered condition, read from the data by its name; repeatable"
        add_flag(group, "--condition", default=[], help=help, action="append", **named)
        help = "each sample in an order of its own, fewer of them from epoch START on and none from END on (RAR: 200 300 of 400)"
        more: dict[str, Any] = {"nargs": 2, "metavar": ("START", "END")}
        add_flag(group, "--random-orders", nonnegative_float, None, help, **more)
    why = "rotary tables are made for the grid of --image-size, as those of the released models"
    add_flag(group, "--rescale-rope", None, argparse.SUPPRESS, "not used", action=_Unused, nargs="?", const=why)
    if training:
        add_flag(group, "--vocab-size", positive_int, None, "codes in the codebook (default: as the codes say)")
        add_flag(group, "--dropout-p", PROBABILITY, 0.1, "residual and feed-forward dropout")
        add_flag(group, "--token-dropout-p", PROBABILITY, 0.1, "dropout after the embedding")
        add_flag(group, "--drop-path-rate", PROBABILITY, 0.0, "stochastic depth of the last layer")


def add_gpt_file_flags(parser: Flags, *, required: bool = False, default: str | None = None) -> None:
    """Add --gpt-ckpt, --from-fsdp and --use-ema of the scripts that sample. default: what is taken without the first."""
    help = "GPT weights: a file, a run's folder, or a released file's name"
    help += f" (default: {default})" if default else ""
    add_flag(parser, "--gpt-ckpt", None, None, help, required=required)
    help = "a bare state dict (recognised without the flag too); sample folders are named after its folder"
    add_store_true(parser, "--from-fsdp", help)
    help = "sample from the GPT's averaged weights, and the tokenizer's where its file has some"
    add_store_true(parser, "--use-ema", help)


def layout_numbers(args: argparse.Namespace) -> tuple[int | None, int | None]:
    """Return (--ar-token-num, --spe-token-num), of which giving one implies the other; (None, None) where neither is given."""
    ar, special = args.ar_token_num, args.spe_token_num
    if ar is None and special is None:
        return None, None
    ar = special + 1 if ar is None else ar
    special = ar - 1 if special is None else special
    if ar < 1 or special != ar - 1:
        what = f"--ar-token-num {ar} goes with --spe-token-num {ar - 1}, got --spe-token-num {special}"
        raise ValueError(f"{what}; give one of the two and the other follows")
    return ar, special


def grid_size(image_size: int, downsample_size: int) -> int:
    """Return the tokens a side. Raises ValueError where the tokenizer does not divide the image."""
    if image_size % downsample_size:
        below = image_size // downsample_size * downsample_size
        sizes = f"{below} or {below + downsample_size}" if below else f"{downsample_size}"
        what = f"--image-size {image_size} is not a multiple of --downsample-size {downsample_size}"
        raise ValueError(f"{what}; try {sizes}")
    return image_size // downsample_size


def add_tokenizer_flags(
    parser: Flags, names: Iterable[str], *, required: bool = False, default: str | None = None
) -> None:
    """Add --vq-ckpt, and what its file is believed to hold: --vq-model (one of `names`) and the shape of the codebook.

    default: what is taken without the flag, in words.
    """
    group = parser.add_argument_group("tokenizer")
    add_flag(group, "--vq-model", None, None, "image tokenizer (default: as the file says)", choices=list(names))
    help = "tokenizer weights: a file, a run's folder, or a released file's name"
    help += f" (default: {default})" if default else ""
    add_flag(group, "--vq-ckpt", None, None, help, required=required)
    add_flag(group, "--codebook-size", positive_int, None, "codes in the codebook (default: as the file says)")
    add_flag(group, "--codebook-embed-dim", positive_int, None, "numbers a code has (default: as the file says)")
    help = "kind of quantiser, one of --import too (default: as the file or --vq-model says)"
    add_flag(group, "--quantizer", None, None, help)


def tokenizer_beliefs(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the flags of `add_tokenizer_flags` say of the file, as `load_tokenizer` takes it."""
    names = ("vq_model", "codebook_size", "codebook_embed_dim", "quantizer")
    return {name: getattr(args, name, None) for name in names}


def add_image_size_flags(
    parser: Flags, size: int, *, downsample: bool = True, evaluation: int | None = None, of_file: bool = False
) -> None:
    """Add --image-size and, where asked for, --downsample-size and --image-size-eval. of_file: of a model that is read."""
    default, says = (untold, _AS_FILE) if of_file else (lambda value: value, "; the tokenizer must divide it")
    add_flag(parser, "--image-size", positive_int, default(size), f"pixels a side{says}")
    if downsample:
        help = f"pixels a side of a token{_AS_FILE if of_file else ''}"
        add_flag(parser, "--downsample-size", positive_int, default(16), help)
    if evaluation:
        help = "pixels a side of the saved images; unless given, at most the model's"
        add_flag(parser, "--image-size-eval", positive_int, default(evaluation), help)


def add_reading_flags(parser: Flags) -> None:
    """Add --exif and --background of the scripts that read image files; `dataset/pixels.py:Reading.of` takes them."""
    add_switch(parser, "--exif", None, "turn images as their EXIF says (on unless --no-exif, the published way)")
    help = "colour laid under transparent pixels, a name or #rrggbb (white unless given); none drops transparency, as published"
    add_flag(parser, "--background", colour, None, help)


def add_text_flags(parser: Flags) -> None:
    """Add where the T5 is that encodes prompts, how it is run, and how its features stand before the image."""
    group = parser.add_argument_group("text")
    help = "folder of T5 folders, or the T5's folder itself; unless given, the T5 that the GPT records is found near it"
    add_flag(group, "--t5-path", None, untold("pretrained_models/t5-ckpt"), help)
    add_flag(group, "--t5-model-type", None, untold("flan-t5-xl"), "the T5's folder in --t5-path")
    help = "text tokens that are read of a prompt; unless given, all that the model has"
    add_flag(group, "--t5-feature-max-len", positive_int, untold(120), help)
    add_flag(group, "--t5-feature-dim", positive_int, untold(2048), f"width of the T5's features{_AS_FILE}")
    help = "features stand before their padding; released models were trained with them behind it"
    add_store_true(group, "--no-left-padding", help)
    help = (
        "folder of the prompts' features in the T5's place, which is not loaded then: language/extract_t5_feature.py "
        "makes it of the same file of prompts (--data-path FILE); line i of the features belongs to prompt i"
    )
    add_flag(group, "--t5-feat-path", None, None, help)
    add_flag(group, "--t5-device", None, None, "where the T5 runs (default: --device)")
    add_flag(group, "--t5-precision", None, None, "of the T5 (default: --precision)", choices=HALF)


def window_size(text: str) -> int | str:
    """Read "auto" or a whole number, 0 or more: an argparse type."""
    if text != "auto" and not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"must be auto or a whole number 0 or more, got {text}")
    return text if text == "auto" else int(text)


def add_window_flag(parser: Flags) -> None:
    """Add --window, of scripts that draw through ImagePipeline."""
    help = (
        "tokens of a decode pass, the later ones from drafts; 0 for one step a pass, auto by device and batch (default: auto "
        "on a CPU, where images are the same for any window, else 0)"
    )
    add_flag(parser, "--window", window_size, None, help)


def add_run_flags(parser: Flags, *, compile: bool | None = False, precision: bool = True) -> None:
    """Add --device, --precision, --compile. compile: its default, None where the script decides."""
    group = parser.add_argument_group("machine")
    add_flag(group, "--device", None, None, DEVICE)
    if precision:
        add_flag(group, "--precision", None, "bf16", "of the transformer's weights", choices=HALF)
    add_switch(group, "--compile", compile, "torch.compile the decode step, on CUDA and on a CPU beside a C++ compiler")


def add_batch_size_flag(parser: Flags) -> None:
    """Add --batch-size of a script that draws."""
    help = "images at once (default: 32 on an accelerator, 8 on a CPU)"
    add_flag(parser, "--batch-size", positive_int, None, help)


def add_hub_flags(parser: Flags) -> None:
    """Add where the scripts that push to the Hugging Face hub put a model."""
    group = parser.add_argument_group("hub")
    add_flag(group, "--repo-id", None, None, "the repository to push to, owner/name; made if it is not there")
    add_flag(group, "--output", None, None, "save to this folder instead; with --repo-id do both")
    add_store_true(group, "--private", "a repository that is made shows itself to its owner only")
    add_flag(group, "--license", None, None, "of the weights, as the hub calls it (default: the model card names none)")


def add_vllm_flags(parser: Flags, *, places: bool = True) -> None:
    """Add what vLLM's engine is given besides the model. places: of a script that draws once, not of the server."""
    group = parser.add_argument_group("vLLM")
    if places:
        add_flag(group, "--max-num-seqs", positive_int, 32, "images that are drawn at once")
    else:
        help = "engines that share the requests, each on a GPU of its own"
        add_flag(group, "--data-parallel-size", positive_int, None, help)
    add_flag(group, "--tensor-parallel-size", positive_int, None, "GPUs that share each layer of the model")
    help = "memory of the keys and values (default: on a CPU what the images drawn at once need, on a GPU what is left)"
    add_flag(group, "--kv-cache-gib", positive_float, None, help)
    help = "the share of a GPU's memory that vLLM takes (default: vLLM's own, 0.9 or so)"
    add_flag(group, "--gpu-memory-utilization", PORTION, None, help)


_AFTER_OTHERS = 3.0  # seconds


def run_script(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse, run, and end a user's mistake with one clear line and exit code 1 (TRACEBACK=1 shows where it arose)."""
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
            # torchrun ends the others with the first to leave. An error of all is printed by the first process, and one of a
            # single process before what the others make of its end.
            time.sleep(_AFTER_OTHERS)
        if unforeseen or os.environ.get("TRACEBACK"):
            raise
        if lost:
            what = f"process {os.environ['RANK']} lost the others"
            error = ConnectionError(f"{what}: one of them has ended or never came, see what it said itself")
        if first or not isinstance(error, AgreedError):
            _tell(words_of(error))
        sys.exit(1)


def _tell(mistake: str) -> None:
    """Print a user's mistake, and leave it where torchrun's own report, which follows, takes the cause of a failure from."""
    print(f"error: {mistake}", file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": mistake, "extraInfo": {"timestamp": int(time.time())}}
        Path(file).write_text(json.dumps({"message": message}))
