"""Flags of the scripts that draw, made from the settings of SamplingConfig, and those that scripts share."""

import argparse

from autoregressive.models.settings import SamplingConfig
from autoregressive.models.sizes import GPT_SIZES
from autoregressive.request import require_guidance
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import (
    CONTROL_TYPES,
    RESULTS,
    SEED,
    Flags,
    Number,
    add_batch_size_flag,
    add_flag,
    add_gpt_file_flags,
    add_gpt_flags,
    add_image_size_flags,
    add_run_flags,
    add_switch,
    add_text_flags,
    add_tokenizer_flags,
    add_window_flag,
    flag_parser,
    nonnegative_int,
    positive_int,
    positive_int_or_auto,
)

# Of a picture, in the order of flags and of ImagePipeline.extend.
MARGINS = ("left", "right", "up", "down")


def add_sampling_flags(parser: Flags, *, negative: str | None = None, **defaults: float) -> None:
    """Add a flag for each setting. negative: what guidance may lead away from, "class" or "prompt". defaults: where not the setting's."""
    group = parser.add_argument_group("sampling")
    if negative:
        says = "a class, by name or number," if negative == "class" else "a prompt"
        help = f"{says} that guidance leads away from (default: no {negative})"
        add_flag(group, f"--negative-{negative}", None, None, help)
        help = "values of a further condition, an array whose row i is image i's; repeatable (docs/extending.md)"
        group.add_argument("--condition-file", action="append", default=None, metavar="NAME=FILE.npy", help=help)
        help = "pictures to draw by, of models with control images: one for all images, one for each, or a folder of them in order"
        group.add_argument("--control-image", nargs="+", default=None, metavar="FILE", help=help)
        help = "what is taken from them (default: what the model was trained by): canny for edges, else the pictures as they are"
        add_flag(group, "--control-type", None, None, help, choices=CONTROL_TYPES)
        help = "a JSON list of orders, of which image i takes item i, for models that draw in several orders (docs/sampling.md)"
        add_flag(group, "--order-file", None, None, help)
    for name, field in SamplingConfig.fields().items():
        help, switch, choices = field.metadata["help"], field.metadata.get("switch"), field.metadata.get("choices")
        if switch:
            group.add_argument(f"--{switch}", action="store_true", help=help)
        else:
            kind = None if choices else Number(field.type, least=field.metadata["least"])
            add_flag(
                group, f"--{name.replace('_', '-')}", kind, defaults.get(name, field.default), help, choices=choices
            )


def sampling_config(args: argparse.Namespace) -> SamplingConfig:
    """Return the settings that the flags give. Raises ValueError for a negative without guidance."""
    settings = {
        name: not getattr(args, field.metadata["switch"]) if "switch" in field.metadata else getattr(args, name)
        for name, field in SamplingConfig.fields().items()
    }
    config = SamplingConfig(**settings)
    asked = getattr(args, "negative_class", None), getattr(args, "negative_prompt", None)
    require_guidance(config, [negative for negative in asked if negative is not None])
    return config


def drawing_flags(
    description: str | None,
    asks: str,
    *,
    files_required: bool = False,
    evaluation: int | None = None,
    compile: bool = False,
    **defaults: float,
) -> argparse.ArgumentParser:
    """Return the flags of a script that draws.

    asks: "class" or "prompt". files_required: of a script without default files. evaluation: default of --image-size-eval.
    defaults: of sampling settings.
    """
    text = asks == "prompt"
    parser = flag_parser(description, added=["--cfg-interval"] if text or files_required else [])
    add_gpt_flags(parser, GPT_SIZES, **({"gpt_type": "t2i", "gpt_model": "GPT-XL"} if text else {}))
    newest, near = f"the newest run in {RESULTS}", "the GPT's, found near it"
    add_gpt_file_flags(parser, required=files_required, default=None if files_required else newest)
    add_tokenizer_flags(parser, VQ_SIZES, required=files_required, default=None if files_required else near)
    if text:
        add_text_flags(parser)
    add_image_size_flags(parser, 512 if text else 384, evaluation=evaluation, of_file=True)
    add_sampling_flags(parser, negative=asks, **({"cfg_scale": 7.5, "top_k": 1000} if text else defaults))
    add_run_flags(parser, compile=compile)
    help = "of the tokenizer's decoder: none for float32, bf16 for pixels sooner that are not quite the same"
    add_flag(parser, "--decode-precision", None, "none", help, choices=["none", "bf16"])
    return parser


def add_loop_flags(parser: Flags) -> None:
    """Add how the project's own decode loop draws: --window, --draft-gpt and --quantize."""
    add_window_flag(parser)
    help = "file or run of a smaller GPT trained on the same codes, which draws the drafts of windows: fewer passes, the same image"
    add_flag(parser, "--draft-gpt", None, None, help)
    help = "int8: the blocks' matrices in 8 bits, about half of bf16's memory in large models; other images (needs torchao)"
    add_flag(parser, "--quantize", None, "none", help, choices=["none", "int8"])


def grid_flags(
    description: str | None, output: str, asks: str, *, files_required: bool = False
) -> argparse.ArgumentParser:
    """Return the flags of a script that draws a grid of images. output: the picture's default name."""
    parser = drawing_flags(description, asks, files_required=files_required, cfg_scale=4.0, top_k=2000)
    if not files_required:  # the scripts over vLLM
        add_loop_flags(parser)
    depends = "the seed, i and its prompt" if asks == "prompt" else "the seed and i"
    add_flag(parser, "--seed", SEED, 0, f"image i is a function of {depends}")
    if asks == "prompt":
        help = "what to draw; may be given several times (default: four prompts)"
        parser.add_argument("--prompt", action="append", default=None, help=help)
        add_flag(parser, "--prompt-file", None, None, "a text file with a prompt on each line, after those")
    else:
        help = "the classes to draw, by name or number; a name comes first where classes are called by numbers (default: eight)"
        parser.add_argument("--labels", nargs="+", default=None, help=help)
    add_flag(parser, "--columns", positive_int, 4, "images in a row of the grid")
    help = f"the {asks} below each image (on unless --no-names, but for files that record nothing, as published ones)"
    add_switch(parser, "--names", None, help)
    add_flag(parser, "--output", None, output, "the picture to write")
    return parser


def many_flags(description: str | None, asks: str, *, folder: str, images: int, npz: bool) -> argparse.ArgumentParser:
    """Return the flags of a script that draws many images on any number of processes. The others: defaults."""
    text = asks == "prompt"
    more = {} if text else {"evaluation": 256, "compile": True, "cfg_scale": 1.5}
    parser = drawing_flags(description, asks, **more)
    add_loop_flags(parser)
    add_flag(parser, "--sample-dir", None, folder, "where the folder of images and the .npz go")
    help = "images at once on each process; auto: as many as fit into memory"
    add_flag(parser, "--per-proc-batch-size", positive_int_or_auto, 32, help)
    help = "images to draw" + (", at most one for each prompt" if text else "")
    add_flag(parser, "--num-fid-samples", positive_int, images, help)
    depends = "the seed, i and its prompt" if text else "the seed and i"
    add_flag(parser, "--global-seed", SEED, 0, f"image i is a function of {depends}")
    add_switch(parser, "--npz", npz, "gather the images into one .npz")
    return parser


def editing_flags(description: str | None, output: str, asks: str) -> argparse.ArgumentParser:
    """Return the flags of a script that edits a picture. output: the sheet's default name. asks: "class" or "prompt"."""
    parser = drawing_flags(description, asks, cfg_scale=4.0, top_k=2000)
    add_loop_flags(parser)
    add_batch_size_flag(parser)
    group = parser.add_argument_group("edit")
    group.add_argument("--image", required=True, help="the picture, resized and cropped to the model's size")
    help = "the hole: a picture of the same size, transparent where to fill, or white if it has no transparency"
    add_flag(group, "--mask", None, None, help)
    help = "the hole, in the picture's pixels; without mask and box the picture's own transparent pixels are filled"
    group.add_argument("--box", type=nonnegative_int, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"), help=help)
    for side in MARGINS:
        add_flag(group, f"--{side}", nonnegative_int, 0, f"pixels to draw {side} of the picture, whole tokens")
    add_flag(group, "--num-images", positive_int, 1, "pictures to draw")
    help = "drawn for each picture, of which one is taken by how well it fits what is kept"
    add_flag(group, "--particles", positive_int, 16, help)
    help = "times that the picture is encoded and its hole drawn, each with what the one before drew"
    add_flag(group, "--rounds", positive_int, 2, help)
    add_flag(group, "--ring", nonnegative_int, 0, "tokens around the hole that are drawn too")
    add_switch(group, "--keep-pixels", True, "put the picture's own pixels back outside the hole")
    add_flag(group, "--seed", SEED, 0, f"picture i is a function of the seed, i, the picture, the hole and its {asks}")
    add_switch(
        group, "--sheet", True, "write the picture, its hole and the results side by side; else the results alone"
    )
    add_flag(group, "--output", None, output, "the picture to write; of several alone NAME-0.png, NAME-1.png, …")
    return parser
