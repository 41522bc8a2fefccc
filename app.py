"""The demo: a page that draws images of a class or of a prompt while one looks on. Needs gradio (bash scripts/setup.sh demo).

    python app.py --quickstart                                       # the models of scripts/quickstart.sh, on any machine
    python app.py --gpt-ckpt c2i_L_384.pt --vq-ckpt vq_ds16_c2i.pt   # files, runs, released files, or owner/name on the hub
    python app.py --gpt-model GPT-XL --text-gpt-ckpt t2i_XL_stage2_512.pt       # released weights in both tabs

What a file holds is read off its weights: of the flags that say so, those that are given otherwise than by default are
compared with it.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoregressive.models.sizes import GPT_SIZES
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import (
    SEED,
    Number,
    add_gpt_file_flags,
    add_gpt_flags,
    add_run_flags,
    add_sampling_flags,
    add_text_flags,
    add_tokenizer_flags,
    flag_parser,
    layout_numbers,
    positive_int,
    run_script,
)

if TYPE_CHECKING:
    import gradio

    from autoregressive.demo import Painter
    from autoregressive.pipeline import ImagePipeline

ROOT = Path(__file__).resolve().parent
QUICKSTART = "quickstart"
TITLE = "Autoregressive image generation"
CSS = """
.status progress { width: 100%; height: .6em; display: block; margin-bottom: .4em }
.error { color: #b00020; font-weight: 600 } .note { opacity: .8 }
.gallery .caption-label { position: static; display: block; max-width: none; white-space: normal; text-align: left; \
background: none; border: 0; font-size: .8em; opacity: .85 }
.gallery .thumbnail-lg { aspect-ratio: auto; height: auto; overflow: visible; align-self: start }
.gallery .thumbnail-lg img { aspect-ratio: 1; height: auto }
"""
SHARP = ".gallery img { image-rendering: pixelated }"  # pictures of a few pixels are shown as they are
# What the sliders stand at where the flags say nothing: as published for text, and as the quickstart samples.
TEXT_SETTINGS = {"cfg_scale": 7.5, "top_k": 1000}
QUICKSTART_SETTINGS = {"cfg_scale": 2.0, "top_k": 0, "temperature": 0.8}
PROMPTS = ["A lighthouse on a rocky coast at dusk, its lamp just lit, oil painting.", "An orange tram in heavy snow."]
QUICKSTART_PROMPTS = ["bold strokes, leaning right: seven", "thin strokes, upright: three", "medium strokes: zero"]


def main(args: argparse.Namespace) -> None:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    from autoregressive.demo import error_html

    painters, problems = make_painters(args), {}
    for kind, painter in painters.items():
        try:
            print(f"{kind}: {describe(painter.pipeline())}", flush=True)
        except (ValueError, OSError) as error:
            print(f"{kind}: {error}", flush=True)
            problems[kind] = error_html(error)  # the page says it too, and tries again when it is asked to draw
    page = build_page(painters, args, problems)
    sides = [loaded.image_size for painter in painters.values() if (loaded := painter.loaded)]
    try:
        page.queue(default_concurrency_limit=1).launch(
            server_name=args.host,
            server_port=args.port,
            share=args.share,
            show_error=False,
            css=CSS + (SHARP if sides and max(sides) < 128 else ""),
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        )
    finally:
        for painter in painters.values():
            painter.close()


def make_painters(args: argparse.Namespace) -> dict[str, "Painter"]:
    """What draws in each tab: "class", "text", or both. Nothing is loaded yet.

    Raises FileNotFoundError where the quickstart was not run.
    """
    from autoregressive.demo import Painter
    from utils.runs import newest_checkpoint

    if args.t5_feat_path:
        raise ValueError(
            "--t5-feat-path has features of prompts that are known before: the page needs a T5 (--t5-path)"
        )
    gpt, vq, text_gpt, text_vq, t5 = args.gpt_ckpt, args.vq_ckpt, args.text_gpt_ckpt, args.text_vq_ckpt, {}
    if args.gpt_type == "t2i":
        gpt, vq, text_gpt, text_vq = None, None, gpt or text_gpt, vq or text_vq
    if args.quickstart:
        folder = next((f for f in (Path(QUICKSTART), ROOT / QUICKSTART) if f.is_dir()), ROOT / QUICKSTART)
        trained = {part: newest_checkpoint(folder / part) is not None for part in ("gpt", "tokenizer", "text/stage2")}
        needed = ("tokenizer", "gpt" if args.gpt_type == "c2i" else "text/stage2")
        missing = [str(folder / part) for part in needed if not trained[part]]
        if missing:
            which = "" if args.gpt_type == "c2i" else " text"
            raise FileNotFoundError(
                f"no trained model in {' and '.join(missing)}: run `bash scripts/quickstart.sh{which}` first"
            )
        gpt, vq = gpt or folder / "gpt", vq or folder / "tokenizer"
        if text_gpt is None and trained["text/stage2"]:
            text_gpt, text_vq = folder / "text" / "stage2", text_vq or folder / "tokenizer"
            t5 = {"t5_path": folder / "text" / "t5", "t5_model_type": "small"}
    believed, painters = given_flags(args), {}
    if args.gpt_type == "c2i":
        gpt = gpt or released_gpt("c2i", args.gpt_model)
        load = partial(load_pipeline, args, gpt, vq or "vq_ds16_c2i.pt", "c2i", believed)
        painters["class"], believed = Painter(load, args.class_names), {}
    elif text_gpt is None:
        text_gpt = released_gpt("t2i", args.gpt_model)
    if text_gpt is not None:
        load = partial(load_pipeline, args, text_gpt, text_vq or "vq_ds16_t2i.pt", "t2i", believed, **t5)
        painters["text"] = Painter(load)
    return painters


def released_gpt(kind: str, gpt_model: str) -> str:
    """The released weights of a kind and a size, those for the largest images. Raises ValueError where there are none."""
    from utils.hub import RELEASED

    home = {"c2i": "FoundationVision/LlamaGen", "t2i": "peizesun/llamagen_t2i"}[kind]
    names = [r.name for r in RELEASED.values() if r.repo_id == home and r.flags.get("--gpt-model") == gpt_model]
    if not names:
        raise ValueError(f"no --gpt-model {gpt_model} of --gpt-type {kind} was released: give --gpt-ckpt")
    return names[-1]


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of the files, where they are not at their defaults."""
    parser, ar_token_num = flags(), layout_numbers(args)[0]
    names = ("gpt_model", "num_classes", "cls_token_num", "codebook_size", "downsample_size", "image_size", "vq_model")
    given = {name: getattr(args, name) for name in (*names, "codebook_embed_dim")}
    given = {name: value for name, value in given.items() if value != parser.get_default(name)}
    return {**given, **({"ar_token_num": ar_token_num} if ar_token_num else {})}


def load_pipeline(
    args: argparse.Namespace, gpt: str | Path, vq: str | Path, kind: str, given: dict[str, Any], **text
) -> "ImagePipeline":
    """Both models, wherever they are. given: what the files are believed to hold. text: of the T5, in the flags' place.

    Raises FileNotFoundError, ConnectionError, and ValueError where a file is not what the flags say.
    """
    from autoregressive.hub import TransformerHF
    from autoregressive.pipeline import PRECISIONS, ImagePipeline, load_gpt
    from tokenizer.load import load_tokenizer
    from tokenizer.tokenizer_image.hub import VQModelHF
    from utils.checkpoint import has_averages, read_checkpoint
    from utils.distributed import pick_device
    from utils.runs import find_checkpoint

    device, given = pick_device(args.device), dict(given)
    precision = "none" if args.quickstart else args.precision
    beliefs = {name: given.pop(name) for name in ("vq_model", "codebook_embed_dim") if name in given}
    path = None if is_on_hub(gpt) else find_checkpoint(gpt)
    if path is None:
        if args.use_ema:
            raise ValueError(f"{gpt} has no averaged weights, for which --use-ema asks; leave the flag out")
        model = TransformerHF.from_pretrained(str(gpt)).to(device, PRECISIONS[precision]).requires_grad_(False)
        fingerprint = model.file_config.get("tokenizer")
    else:
        fingerprint = read_checkpoint(path).config.get("tokenizer")
    if is_on_hub(vq):
        tokenizer = VQModelHF.from_pretrained(str(vq)).to(device).float().requires_grad_(False)
    else:
        size = {"codebook_size": given["codebook_size"]} if "codebook_size" in given else {}
        vq_path = find_checkpoint(vq)
        averaged = args.use_ema and has_averages(vq_path)
        tokenizer = load_tokenizer(vq_path, **beliefs, **size, device=device, use_ema=averaged, fingerprint=fingerprint)
    if path is not None:
        given.setdefault("downsample_size", tokenizer.downsample)
        dtype = PRECISIONS[precision]
        model = load_gpt(path, device=device, dtype=dtype, use_ema=args.use_ema, gpt_type=kind, **given)
    if model.args.model_type != kind:
        raise ValueError(f"{gpt} is {model.args.model_type}: give --gpt-type {model.args.model_type}")
    if kind == "t2i":
        text = {"t5_path": args.t5_path, "t5_model_type": args.t5_model_type, **text}
        text |= {"t5_tokens": min(args.t5_feature_max_len, model.args.cls_token_num), "t5_device": args.t5_device}
        text |= {"t5_dtype": PRECISIONS[args.t5_precision or precision], "left_padding": not args.no_left_padding}
    return ImagePipeline(model, tokenizer, batch_size=args.batch_size, compile=args.compile, **text)


def is_on_hub(name: str | Path) -> bool:
    """Whether this names a model that save_pretrained wrote: owner/name on the hub, or a folder with config.json."""
    from utils.hub import is_released

    path = Path(name)
    if path.exists():
        return (path / "config.json").is_file() and (path / "model.safetensors").is_file()
    return str(name).count("/") == 1 and not path.is_absolute() and not path.suffix and not is_released(name)


def describe(pipeline: "ImagePipeline") -> str:
    """A loaded model in a line."""
    from autoregressive.released import describe

    side, device = pipeline.image_size, pipeline.device
    return f"{describe(pipeline.gpt.args.identity, pipeline.gpt.state_dict())}, {side}x{side} pixels, on {device}"


def settings_for(kind: str, args: argparse.Namespace) -> dict[str, float]:
    """Where a tab's sliders stand at first: the flags' values, and where those are at their defaults what suits the models."""
    parser = flags()
    values = {name: getattr(args, name) for name in ("cfg_scale", "cfg_interval", "top_k", "top_p", "temperature")}
    own = QUICKSTART_SETTINGS if args.quickstart else TEXT_SETTINGS if kind == "text" else {}
    values = {name: own.get(name, v) if v == parser.get_default(name) else v for name, v in values.items()}
    # A slider ends where a value stops to matter.
    return values | {
        "cfg_scale": max(values["cfg_scale"], 1), "top_k": max(values["top_k"], 0), "top_p": min(values["top_p"], 1)
    }  # fmt: skip


def respond(
    painter: "Painter",
    greedy: bool,
    asked: str | int | None,
    count: float,
    seed: float,
    cfg_scale: float,
    cfg_interval: float,
    top_k: float,
    top_p: float,
    temperature: float,
) -> Iterator[tuple[list, str]]:
    """What the page shows from a click on: pictures with captions, and a line of HTML. Raises nothing."""
    import logging

    from autoregressive.demo import error_html, status_html

    settings = {"cfg_scale": cfg_scale, "cfg_interval": cfg_interval, "top_k": top_k, "top_p": top_p}
    try:
        for view in painter.draw(
            asked, count=count, seed=seed, temperature=temperature, sample_logits=not greedy, **settings
        ):
            yield view.pictures, status_html(view)
    except (ValueError, OSError, MemoryError) as error:
        yield [], error_html(error)
    except Exception as error:
        logging.exception("drawing failed")
        kind = "the device's memory is full: ask for fewer images" if "out of memory" in str(error).lower() else None
        yield [], error_html(kind or f"drawing failed ({type(error).__name__}); the terminal has the details")


def show(painter: "Painter", greedy: bool, folder: str, *asked: Any) -> Iterator[tuple[list, str]]:
    """As `respond`, with pictures as files in `folder`.

    A picture's file is written once, and whole: gradio would write it anew for each view, while a browser reads it.
    """
    import hashlib

    from utils.images import save_png

    for pictures, status in respond(painter, greedy, *asked):
        files = []
        for image, caption in pictures:
            path = Path(folder) / hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest() / "image.png"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                save_png(image, path)
            files.append((str(path), caption))
        yield files, status


def build_page(
    painters: dict[str, "Painter"], args: argparse.Namespace, problems: Mapping[str, str]
) -> "gradio.Blocks":
    """The page with its two tabs. problems: by tab, the HTML of why its model could not be loaded."""
    import gradio as gr

    with gr.Blocks(title=TITLE) as page:
        gr.Markdown(f"# {TITLE}")
        if "class" in painters:
            with gr.Tab("Class", id="class"):
                class_tab(gr, painters["class"], args, problems.get("class", ""))
        with gr.Tab("Text", id="text"):
            if "text" in painters:
                text_tab(gr, painters["text"], args, problems.get("text", ""))
            else:
                how = (
                    "`bash scripts/quickstart.sh text`" if args.quickstart else "`--text-gpt-ckpt`, or `--gpt-type t2i`"
                )
                gr.Markdown(f"No text-conditional model is loaded: {how} brings one.", elem_id="text-missing")
    return page


def class_tab(gr: Any, painter: "Painter", args: argparse.Namespace, problem: str) -> None:
    """A class, chosen from a list that typing searches."""
    from autoregressive.demo import class_choice

    choices = [class_choice(i, name) for i, name in enumerate(painter.names)]
    first = choices[207 if len(choices) == 1000 else 0] if choices else None

    def asked() -> Any:
        return gr.Dropdown(
            choices, value=first, allow_custom_value=True, label="Class", info="type to search", elem_id="class-asked"
        )

    drawing_tab(gr, "class", asked, painter, problem, args)


def text_tab(gr: Any, painter: "Painter", args: argparse.Namespace, problem: str) -> None:
    """A prompt."""
    prompts = QUICKSTART_PROMPTS if args.quickstart else PROMPTS

    def asked() -> Any:
        return gr.Textbox(
            prompts[0], label="Prompt", info=f"or: {' · '.join(prompts[1:])}", lines=2, elem_id="text-asked"
        )

    drawing_tab(gr, "text", asked, painter, problem, args)


def drawing_tab(
    gr: Any, kind: str, make_asked: Callable[[], Any], painter: "Painter", problem: str, args: argparse.Namespace
) -> None:
    """What both tabs have: what is asked for and the settings at the left, the gallery at the right."""
    at = settings_for(kind, args)
    codes = painter.loaded.gpt.args.vocab_size if painter.loaded else args.codebook_size or 16384
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            asked = make_asked()
            with gr.Row():
                button = gr.Button("Generate", variant="primary", elem_id=f"{kind}-generate")
                stop = gr.Button("Stop", elem_id=f"{kind}-stop")
            with gr.Row():
                count = gr.Slider(1, 16, value=4, step=1, label="Images")
                seed = gr.Number(args.seed, precision=0, label="Seed")
            with gr.Row():
                scale = gr.Slider(1, 20, value=at["cfg_scale"], step=0.1, label="Guidance scale")
                interval = gr.Number(at["cfg_interval"], label="Last guided step (-1: all are)")
            with gr.Row():
                top_k = gr.Slider(0, codes, value=min(at["top_k"], codes), step=1, label="Top-k (0: all)")
                top_p = gr.Slider(0, 1, value=at["top_p"], step=0.01, label="Top-p (1: all)")
            temperature = gr.Slider(
                0, 2, value=at["temperature"], step=0.05, label="Temperature (0: the likeliest token)"
            )
        with gr.Column(scale=3, min_width=320):
            status = gr.HTML(problem, elem_id=f"{kind}-status")
            gallery = gr.Gallery(
                show_label=False, columns=4, object_fit="contain", format="png", height="auto", interactive=False,
                elem_id=f"{kind}-gallery", elem_classes="gallery",
            )  # fmt: skip
    inputs = [asked, count, seed, scale, interval, top_k, top_p, temperature]
    click = button.click(
        partial(show, painter, args.greedy, gallery.GRADIO_CACHE),
        inputs,
        [gallery, status],
        show_progress="hidden",  # the status has it, and the previews stay to be seen
        concurrency_id="drawing",
        api_name=f"draw_{kind}",
    )
    stop.click(lambda: "<div class='status'>stopped</div>", None, status, cancels=[click], queue=False)


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__, added=("--vq-ckpt", "--no-left-padding"))
    add_gpt_flags(parser, GPT_SIZES, gpt_model="GPT-XL")
    add_gpt_file_flags(parser)
    parser.add_argument(
        "--text-gpt-ckpt", default=None, help="weights of the text tab's GPT, where both tabs are to draw"
    )
    parser.add_argument("--text-vq-ckpt", default=None, help="of its tokenizer (default: the released one)")
    add_tokenizer_flags(parser, VQ_SIZES)
    parser.add_argument("--downsample-size", type=positive_int, default=16, help="pixels a side of a token")
    parser.add_argument(
        "--image-size", type=positive_int, default=None, help="pixels a side (default: what the file or its name says)"
    )
    parser.add_argument("--class-names", default=None, help="file with the classes' names, one a line")
    add_sampling_flags(parser, cfg_scale=4.0, top_k=2000)
    parser.add_argument("--seed", type=SEED, default=0, help="that the page begins with")
    add_run_flags(parser)
    parser.add_argument(
        "--batch-size", type=positive_int, default=None, help="images at once (default: 32, 8 on a CPU)"
    )
    add_text_flags(parser)
    group = parser.add_argument_group("page")
    group.add_argument("--quickstart", action="store_true", help="the models that scripts/quickstart.sh trained")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for other machines too")
    group.add_argument("--port", type=Number(int, above=0, most=65_535), default=7860, help="port to listen at")
    group.add_argument("--share", action="store_true", help="a public address for three days, through gradio's servers")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
