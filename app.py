"""The demo: a page that draws images of a class or of a prompt while one looks on. Needs gradio (bash scripts/setup.sh demo).

    python app.py --quickstart                                       # the models of scripts/quickstart.sh, on any machine
    python app.py --gpt-ckpt c2i_L_384.pt --vq-ckpt vq_ds16_c2i.pt   # files, runs, released files, or owner/name on the hub
    python app.py --gpt-model GPT-XL --text-gpt-ckpt t2i_XL_stage2_512.pt       # released weights in both tabs
    python app.py --server http://gpu-box:8000                       # the model of a running server (docs/serving.md)

What a file holds is read off its weights: of the flags that say so, those that are given otherwise than by default are
compared with it.
"""

import argparse
import asyncio
import base64
import logging
import os
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from secrets import randbelow, token_urlsafe
from tempfile import TemporaryDirectory, mkdtemp
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from autoregressive.models.settings import SamplingConfig
from autoregressive.models.sizes import GPT_SIZES
from autoregressive.sample.flags import add_sampling_flags
from autoregressive.serve.server import Signals, bound_socket, is_public, load_pipeline, native_service, url_path
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from utils.cli import (
    CONTROL_TYPES,
    PORT,
    Number,
    add_batch_size_flag,
    add_gpt_file_flags,
    add_gpt_flags,
    add_run_flags,
    add_text_flags,
    add_tokenizer_flags,
    add_window_flag,
    flag_parser,
    layout_numbers,
    positive_int,
    run_script,
)

if TYPE_CHECKING:
    import gradio

    from autoregressive.demo import Painter
    from autoregressive.pipeline import ImagePipeline

QUICKSTART = Path("quickstart")
BRUSH = Path(__file__).resolve().parent / "autoregressive" / "brush.js"
TITLE = "Autoregressive image generation"
CSS = """
.status progress { width: 100%; height: .6em; display: block; margin-bottom: .4em }
.error { color: #b00020; font-weight: 600 } .note { opacity: .8 }
.gallery .caption-label { position: static; display: block; max-width: none; white-space: normal; text-align: left; \
background: none; border: 0; font-size: .8em; opacity: .85 }
.gallery .thumbnail-lg { aspect-ratio: auto; height: auto; overflow: visible; align-self: start }
.gallery .thumbnail-lg img { aspect-ratio: 1; height: auto }
.brush canvas { width: 100%; max-width: 384px; border: 1px solid #8888; touch-action: none; cursor: crosshair }
.brush label, .brush button { margin-right: 1em } .brush button { text-decoration: underline }
"""
# What a tab's pictures are, by the server's name, and what is said where one is missing.
PICTURES = {
    "image": "open a picture, and paint over what is to be filled",
    "control_image": "open a control image: a picture to take the edges of, or a map",
}
BRUSH_HTML = """
<label>Brush <input type="range" min="1" max="50" value="12"></label> <button type="button" class="clear">Clear</button>
"""
PICTURE_HTML = """
<div class="brush"><canvas></canvas><div><label>{} <input type="file" accept="image/*"></label>
<button type="button" class="take">Take the first drawn one</button>{}</div></div>
"""
PICTURE_PARTS = {"image": ("Picture", BRUSH_HTML), "control_image": ("Control image", "")}
SHARP = ".gallery img { image-rendering: pixelated }"  # pictures of a few pixels are shown as they are
# Settings where the flags say nothing: as published for text, and as the quickstart samples.
TEXT_SETTINGS = {"cfg_scale": 7.5, "top_k": 1000}
QUICKSTART_SETTINGS = {
    "class": {"cfg_scale": 1.5, "top_k": 0, "temperature": 0.6},
    "text": {"cfg_scale": 1.0, "top_k": 0, "temperature": 0.4},
}
SETTINGS = {name: field for name, field in SamplingConfig.fields().items() if "page" in field.metadata}
UNSHOWN = [name for name, field in SamplingConfig.fields().items() if not {"page", "switch"} & field.metadata.keys()]
PROMPTS = ["A lighthouse on a rocky coast at dusk, its lamp just lit, oil painting.", "An orange tram in heavy snow."]
QUICKSTART_PROMPTS = ["woman judge, dark skin tone", "man cook, medium-light skin tone", "person raising hand"]
CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)  # of ImageNet's, those of the published pictures
LARGEST_SEED = 2**53 - 1  # a browser's numbers are exact up to it

MOST_WAITING = 64  # clicks that wait for a place among the open ones
MOST_OPEN = 512  # clicks that are answered at once; the server's queue says which of them draw
MOST_BODY = 4 * 2**20  # a picture to edit, as text
SECONDS_TO_LISTEN = 5  # for whoever asked to come for the answer
SECONDS_KEPT = 3600  # of a picture's file


def main(args: argparse.Namespace) -> None:
    models = ("quickstart", "gpt_ckpt", "vq_ckpt", "text_gpt_ckpt", "text_vq_ckpt")
    own = (*models, "class_names", "use_ema", "compile", "window")
    if args.server and (given := [name for name in own if getattr(args, name)]):
        flag = "--" + given[0].replace("_", "-")
        raise ValueError(f"{flag} is of models that are loaded here, and --server draws elsewhere: give one of the two")
    if args.api_key is not None and not args.server:
        raise ValueError("--api-key is the key of a --server: give that too; --auth asks visitors for a login")
    args.auth = logins(args)
    signals = Signals(lambda: sys.exit(0))  # so that the folder goes
    with TemporaryDirectory(prefix="demo-") as folder, bound_socket(args.host, args.port) as sock:
        if not args.auth and (args.share or is_public(sock)):
            told = f"warning: whoever reaches {args.host}:{args.port} can draw; --auth USER:PASSWORD asks for a login"
            print(told, file=sys.stderr)
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": f"{folder}/pictures"}
        import gradio  # noqa: F401 - what is absent is told before a model is loaded

        loaded = {} if args.server else load_models(args)
        asyncio.run(serve(args, Path(folder), sock, loaded, signals))


def load_models(args: argparse.Namespace) -> "dict[str, ImagePipeline | str]":
    """Return the pipeline of each tab, or the HTML of why there is none; where no tab has one its error is raised."""
    from autoregressive.demo import error_html

    loads, loaded = models(args), {}
    for kind, load in loads.items():
        try:
            loaded[kind] = load()
            print(f"{kind}: {describe(loaded[kind])}", flush=True)
        except (ValueError, OSError) as error:
            if len(loads) == 1:
                raise
            loaded[kind] = error_html(error)  # the page says it, and has the other tab
            print(f"{kind}: {error}", flush=True)
    return loaded


def logins(args: argparse.Namespace) -> list[tuple[str, str]] | None:
    """Return who may see the page, None for everybody."""
    given = args.auth or ([os.environ["DEMO_AUTH"]] if "DEMO_AUTH" in os.environ else [])
    if not all(re.fullmatch("[^:]+:.+", login) for login in given):
        raise ValueError("--auth (or DEMO_AUTH) is USER:PASSWORD, and one of them is empty: leave it out to ask nobody")
    return [tuple(login.split(":", 1)) for login in given] or None


def models(args: argparse.Namespace) -> dict[str, Callable[[], "ImagePipeline"]]:
    """Return what loads the model of each tab: "class", "text", or both. Raises FileNotFoundError before the quickstart."""
    if args.quickstart:
        args.precision = "none"
    parser, kind = flags(), "class" if args.gpt_type == "c2i" else "text"
    files = {"text": (args.text_gpt_ckpt, args.text_vq_ckpt)}
    if kind == "text":
        files["text"] = (args.gpt_ckpt or args.text_gpt_ckpt, args.vq_ckpt or args.text_vq_ckpt)
    else:
        files = {"class": (args.gpt_ckpt, args.vq_ckpt), **files}
    if args.quickstart:
        files = {name: quickstart_files(name, *found, needed=name == kind) for name, found in files.items()}
    names = ("gpt_model", "layout", "num_classes", "cls_token_num", "codebook_size", "downsample_size", "vq_model")
    given = {name: getattr(args, name) for name in (*names, "codebook_embed_dim", "quantizer")}
    given = {name: value for name, value in given.items() if value != parser.get_default(name)}
    if ar_token_num := layout_numbers(args)[0]:
        given["ar_token_num"] = ar_token_num
    loads = {}
    for name, (gpt, vq) in files.items():
        if gpt or name == kind:  # what the flags say is of the first model
            gpt = gpt or released_gpt(args.gpt_type, args.gpt_model)
            beliefs = {"gpt_type": "c2i" if name == "class" else "t2i", **(given if name == kind else {})}
            loads[name] = partial(load_pipeline, args, gpt, vq, beliefs)
    return loads


def quickstart_files(kind: str, gpt: str | None, vq: str | None, *, needed: bool) -> tuple:
    """Return a tab's GPT and tokenizer as scripts/quickstart.sh leaves them, where the flags name none.

    Raises FileNotFoundError where the tab is needed and its models were not trained.
    """
    from utils.runs import newest_checkpoint

    folder = QUICKSTART if QUICKSTART.is_dir() else Path(__file__).resolve().parent / QUICKSTART
    part, own, words = ("gpt", "tokenizer", "") if kind == "class" else ("text/gpt", "tokenizer", " text")
    missing = [str(folder / each) for each in (own, part) if newest_checkpoint(folder / each) is None]
    if missing and needed:
        told = " and ".join(missing)
        raise FileNotFoundError(f"no trained model in {told}: run `bash scripts/quickstart.sh{words}` first")
    return (gpt, vq) if missing else (gpt or folder / part, vq or folder / own)


def released_gpt(kind: str, gpt_model: str) -> str:
    """Return the released weights of a kind and a size, those for the largest images. Raises ValueError if there are none."""
    from utils.hub import RELEASED

    home = {"c2i": "FoundationVision/LlamaGen", "t2i": "peizesun/llamagen_t2i"}[kind]
    names = [r.name for r in RELEASED.values() if r.repo_id == home and r.flags.get("--gpt-model") == gpt_model]
    if not names:
        raise ValueError(f"no --gpt-model {gpt_model} of --gpt-type {kind} was released: give --gpt-ckpt")
    return names[-1]


def describe(pipeline: "ImagePipeline") -> str:
    """Return a loaded model in a line."""
    from autoregressive.released import describe

    side, device = pipeline.image_size, pipeline.device
    return f"{describe(pipeline.gpt.args.identity, pipeline.gpt.state_dict())}, {side}x{side} pixels, on {device}"


def settings_for(kind: str, args: argparse.Namespace, control: bool = False) -> dict[str, Any]:
    """Return a tab's first settings: the flags' values, and where those are at their defaults what suits the models.

    control: of a model with control images.
    """
    parser, values = flags(), {}
    own = QUICKSTART_SETTINGS[kind] if args.quickstart else TEXT_SETTINGS if kind == "text" else {}
    for name, field in SETTINGS.items():
        value = getattr(args, name)
        value = own.get(name, value) if value == parser.get_default(name) else value
        if "choices" not in field.metadata:  # a control ends where a value stops to matter
            value = min(max(value, field.metadata["page"][0]), field.metadata["served"][1])
        if control or name != "control_strength":
            values[name] = value
    return values | ({"temperature": 0} if args.greedy else {})


async def serve(
    args: argparse.Namespace, folder: Path, sock: socket.socket, loaded: dict[str, Any], signals: Signals
) -> None:
    """Serve the page, and to it alone, over a Unix socket in `folder`, the models that are loaded here, until a signal ends it.

    loaded: by tab, a pipeline, or the HTML of why there is none.
    """
    import gradio
    import httpx
    from fastapi import Depends, FastAPI, HTTPException
    from starlette.middleware.body_limit import RequestBodyLimitMiddleware

    from autoregressive.demo import HTTP, Painter
    from autoregressive.serve.api import create_app
    from autoregressive.serve.draining import DrainingServer

    problems = {kind: found for kind, found in loaded.items() if isinstance(found, str)}
    private, services, painters = FastAPI(), [], {}
    for kind, pipeline in loaded.items():
        if kind not in problems:
            service = native_service(pipeline, kind, timeout=24 * 3600)  # visitors wait as long as they like
            services.append(service)
            private.mount(f"/{kind}", create_app(service))
            transport = httpx.AsyncHTTPTransport(uds=f"{folder}/socket", limits=HTTP["limits"])
            client = httpx.AsyncClient(base_url=f"http://demo/{kind}/", transport=transport, timeout=HTTP["timeout"])
            painters[kind] = Painter(client, service.info)
    for url in args.server:
        painter = await Painter.connect(url, args.api_key or os.environ.get("SERVE_API_KEY"))
        kind = "text" if painter.info.kind == "t2i" else "class"
        if kind in painters:
            raise ValueError(f"--server {url} is a second {kind} model: give one of each kind")
        painters[kind] = painter

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        told_host, told_port = sock.getsockname()[:2]
        print(f"http://{f'[{told_host}]' if ':' in told_host else told_host}:{told_port}{args.root_path}", flush=True)
        if args.share:
            tunnel = ("127.0.0.1", told_port, token_urlsafe(32), None, None)
            print(await asyncio.to_thread(gradio.networking.setup_tunnel, *tunnel), flush=True)
        yield
        for service in services:
            await service.close()

    public = FastAPI(lifespan=lifespan, openapi_url=None)
    public.add_middleware(RequestBodyLimitMiddleware, max_body_size=MOST_BODY)
    here: Counter[str] = Counter()
    sharp = any(painter.info.image_size < 128 for painter in painters.values())
    gradio.mount_gradio_app(
        public,
        build_page(painters, problems, args, folder, here),
        "/",
        auth=args.auth,
        root_path=args.root_path or None,
        show_error=False,
        max_file_size=1,
        enable_monitoring=False,
        run_history=False,
        css=CSS + (SHARP if sharp else ""),
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        app_kwargs={"dependencies": [Depends(guard(here))]},
    )

    async def both(scope: dict, receive: Callable, send: Callable) -> None:
        inside = scope["type"] == "http" and (scope.get("server") or (None, None))[1] is None  # over the Unix socket
        gone = False

        async def receiving() -> dict:
            nonlocal gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        try:
            await (private if inside else public)(scope, receiving, send)
        except Exception as error:  # gradio's, of a stream whose session ended with the visitor's leaving
            if not gone and not isinstance(error.__cause__, HTTPException):
                raise

    server = DrainingServer(both)
    signals.act = lambda: setattr(server, "should_exit", True)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"{folder}/socket")
        await server.serve([sock, unix])


def guard(here: Counter[str]) -> Callable:
    """Return a dependency of all of gradio's routes: it refuses what the page never sends, and counts in `here` who is there.

    The page sends values. Files, whose routes and addresses gradio would take, are nothing that it draws from.
    """
    from fastapi import HTTPException, Request

    async def guarding(request: Request) -> AsyncIterator[None]:
        path = request.url.path.rstrip("/")
        if request.method == "POST" and not path.endswith(("/login", "/reset", "/cancel")):
            if not (path.endswith("/queue/join") or "/call/" in path or "/run/" in path):
                raise HTTPException(404)
            body = await request.json()
            values = body.get("data", body) if isinstance(body, dict) else None
            values = list(values.values()) if isinstance(values, dict) else values
            if not isinstance(values, list) or any(isinstance(value, dict | list) for value in values):
                raise HTTPException(400, "the page's fields are words and numbers")
            request.state.joined = time.monotonic()
        found = {**request.path_params, **request.query_params}
        session = found.get("session_hash") or found.get("event_id")  # of the routes that stream to it
        here[session] += 1
        try:
            yield
        finally:
            here[session] -= 1
            if not here[session]:
                del here[session]

    return guarding


async def is_here(here: Counter[str], request: "gradio.Request") -> bool:
    """Return whether somebody waits for the answer to a request, or comes for it in time."""
    while not here[request.session_hash]:
        if time.monotonic() > request.state.joined + SECONDS_TO_LISTEN:
            return False
        await asyncio.sleep(0.05)
    return True


async def respond(
    painter: "Painter",
    folder: Path,
    asked: str | int | None,
    count: float,
    seed: float | None,
    fresh: bool,
    settings: dict[str, Any],
    pictures: Mapping[str, str | None] = MappingProxyType({}),
) -> AsyncIterator[tuple[list, str, int]]:
    """Yield what the page shows from a click on: files with captions, a line of HTML, the seed. Raises nothing.

    folder: where a folder is made for the files. An unfinished picture's file goes with the drawing. fresh: takes a new seed.
    settings: fields of the server's requests. pictures: by name in PICTURES, data addresses as the canvas gives them.
    """
    from autoregressive.demo import error_html

    files, made, seed = [], None, randbelow(2**31) if fresh or seed is None else seed
    try:
        folder.mkdir(exist_ok=True)
        made = Path(mkdtemp(dir=folder))
        given = {name: picture_file(name, address) for name, address in pictures.items()}
        drawing = painter.draw(asked, count=int(count or 0), seed=int(seed), pictures=given, **settings)
        async with aclosing(drawing) as views:
            async for view in views:
                for name, png, _ in view.pictures:
                    if not (made / name).exists():
                        (made / name).write_bytes(png)
                files = [(str(made / name), caption) for name, _, caption in view.pictures]
                yield files, view.status, seed
    except (ValueError, OSError) as error:
        yield files, error_html(error), seed
    except Exception as error:
        logging.exception("drawing failed")
        yield files, error_html(f"drawing failed ({type(error).__name__}); the terminal has the details"), seed
    finally:
        if made:  # gradio may be at the last of them yet, where the visitor has left
            previews = list(made.glob("*[0-9].png"))
            asyncio.get_running_loop().call_later(SECONDS_TO_LISTEN, lambda: [file.unlink(True) for file in previews])


def picture_file(name: str, address: str | None) -> bytes:
    """Return the file of a data address. Raises ValueError for anything else."""
    kind, _, text = (address or "").partition(",")
    if not re.fullmatch("data:image/(png|jpeg|webp);base64", kind):
        raise ValueError(PICTURES[name])
    return base64.b64decode(text, validate=True)


def build_page(
    painters: dict[str, "Painter"], problems: dict[str, str], args: argparse.Namespace, folder: Path, here: Counter[str]
) -> "gradio.Blocks":
    """Return the page with its tabs, two a model. problems: by tab, the HTML of why its model could not be loaded."""
    import gradio as gr

    with gr.Blocks(title=TITLE, delete_cache=(SECONDS_KEPT // 10, SECONDS_KEPT)) as page:
        gr.Markdown(f"# {TITLE}")
        for kind in ("class", "text"):
            if kind in painters:
                title = kind.title() + (" and control image" if painters[kind].info.control else "")
                with gr.Tab(title, id=kind):
                    drawing_tab(page, kind, painters[kind], args, folder, here)
            elif kind in problems or (kind == "text" and not args.server):
                how = "`bash scripts/quickstart.sh text`" if args.quickstart else "`--text-gpt-ckpt`"
                missing = f"No text-conditional model is loaded: {how} brings one."
                with gr.Tab(kind.title(), id=kind):
                    gr.Markdown(problems.get(kind, missing), elem_id=f"{kind}-missing")
        for kind in painters:
            with gr.Tab(f"Edit by {kind}", id=f"edit-{kind}"):
                drawing_tab(None, kind, painters[kind], args, folder, here)
    page.max_threads = MOST_OPEN
    return page.queue(max_size=MOST_WAITING, default_concurrency_limit=None, api_open=False)


def drawing_tab(
    page: "gradio.Blocks | None",
    kind: str,
    painter: "Painter",
    args: argparse.Namespace,
    folder: Path,
    here: Counter[str],
) -> None:
    """Lay out a tab: what is asked for and the settings at the left, the gallery at the right.

    page: opens with this tab's first example. None for a tab in which a brush marks what of a picture is filled.
    """
    import gradio as gr

    from autoregressive.demo import MOST_IMAGES
    from autoregressive.editing import ROUNDS
    from autoregressive.models.particles import PARTICLES

    editing, control = page is None, painter.info.control
    tab = f"edit-{kind}" if editing else kind
    at = settings_for(kind, args, control is not None)
    kept = {name: getattr(args, name) for name in UNSHOWN if getattr(args, name) != flags().get_default(name)}
    sent = (["image"] if editing else []) + (["control_image"] if control else [])
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            for name in sent:
                gr.HTML(
                    html_template=PICTURE_HTML.format(*PICTURE_PARTS[name]),
                    js_on_load=BRUSH.read_text(),
                    elem_id=f"{tab}-{name}",
                    side=painter.info.image_size,
                    gallery=f"{kind}-gallery",
                )
            more: dict[str, Any] = {}
            if control:
                help = "of canny the picture's edges count, or the picture itself where it is black and white; else it is the map"
                more["control_type"] = gr.Dropdown(list(CONTROL_TYPES), value=control, label="Control", info=help)
            asked, examples = question(kind, painter, args, f"{tab}-asked")
            if not editing:
                gr.Examples([[example] for example in examples], asked, elem_id=f"{tab}-examples")
            with gr.Row():
                button = gr.Button("Fill" if editing else "Generate", variant="primary", elem_id=f"{tab}-generate")
                stop = gr.Button("Stop", elem_id=f"{tab}-stop")
            count = gr.Slider(1, MOST_IMAGES, value=2 if editing else 4, step=1, label="Images")
            if editing:
                help = "more fit better, and take longer"
                more["particles"] = gr.Slider(1, 64, value=PARTICLES, step=1, label="Particles", info=help)
                help = "times that the hole is drawn"
                more["rounds"] = gr.Slider(1, 8, value=ROUNDS, step=1, label="Rounds", info=help)
            with gr.Row():
                name, most = f"{tab}-seed", LARGEST_SEED
                seed = gr.Number(args.seed, precision=0, minimum=0, maximum=most, label="Seed", elem_id=name)
                fresh = gr.Checkbox(args.seed is None, label="A new seed each time", elem_id=f"{tab}-fresh")
            more |= {name: setting_control(name, value) for name, value in at.items()}
            pictures = [gr.Textbox(visible="hidden") for _ in sent]
        with gr.Column(scale=3, min_width=320):
            status = gr.HTML(elem_id=f"{tab}-status")
            gallery = gr.Gallery(
                show_label=False, columns=4, object_fit="contain", format="png", height="auto", interactive=False,
                elem_id=f"{tab}-gallery", elem_classes="gallery",
            )  # fmt: skip

    async def draw(request: gr.Request, *values: Any) -> AsyncIterator[tuple[list, str, int]]:
        if await is_here(here, request):
            addresses, values = dict(zip(sent, values)), values[len(sent) :]
            settings = kept | dict(zip(more, values[4:], strict=True))
            async with aclosing(respond(painter, folder / "pictures", *values[:4], settings, addresses)) as shown:
                async for update in shown:
                    if not here[request.session_hash]:
                        break
                    yield update

    canvases = [f"await document.querySelector('#{tab}-{name} canvas').picture()" for name in sent]
    click = button.click(
        draw,
        [*pictures, asked, count, seed, fresh, *more.values()],
        [gallery, status, seed],
        js=f"async (...values) => [{', '.join(canvases)}, ...values.slice({len(sent)})]" if sent else None,
        show_progress="hidden",  # the status has it, and the previews stay to be seen
        api_name=f"{'edit' if editing else 'draw'}_{kind}",
    )
    stop.click(lambda: "<div class='status'>stopped</div>", None, status, cancels=[click], queue=False)
    if editing or control:
        return

    async def draw_first() -> tuple[list, str]:
        values = (examples[0], 1, args.seed or 0, False, kept | at)
        async for files, said, _ in respond(painter, folder / "opening", *values):  # noqa: B007 - the last one is shown
            pass
        return files, said

    first: list[asyncio.Task] = []

    async def opening() -> tuple[list, str]:
        if not first or (first[0].done() and not first[0].result()[0]):
            first[:] = [asyncio.create_task(draw_first())]
        return await asyncio.shield(first[0])

    gr.set_static_paths([folder / "opening"])
    page.load(opening, None, [gallery, status], api_visibility="private", show_progress="hidden")


def question(
    kind: str, painter: "Painter", args: argparse.Namespace, elem_id: str
) -> "tuple[gradio.Dropdown | gradio.Textbox, list[str]]":
    """Return the field for a class or a prompt, and examples of it."""
    import gradio as gr

    from autoregressive.class_names import class_choice

    if kind == "text":
        examples = QUICKSTART_PROMPTS if args.quickstart else PROMPTS
        return gr.Textbox(examples[0], label="Prompt", lines=2, elem_id=elem_id), examples
    choices = [class_choice(i, name) for i, name in enumerate(painter.info.classes)]
    examples = [choices[i] for i in CLASSES] if len(choices) == 1000 else choices[:8]
    label = "Class (type to search)"
    return gr.Dropdown(choices, value=examples[0], allow_custom_value=True, label=label, elem_id=elem_id), examples


def setting_control(name: str, value: Any) -> "gradio.Slider | gradio.Number | gradio.Dropdown":
    """Return the page's control of a setting that stands at a value."""
    import gradio as gr

    field = SETTINGS[name]
    label = name.replace("_", " ").replace("cfg", "guidance").capitalize()
    told: dict[str, Any] = {"label": label, "info": field.metadata["help"]}
    if choices := field.metadata.get("choices"):
        return gr.Dropdown(list(choices), value=value, **told)
    least, most, step = field.metadata["page"]
    told["minimum"] = least
    if most is None:
        return gr.Number(value, precision=0 if field.type is int else None, **told)
    return gr.Slider(maximum=max(most, value), value=value, step=step, **told)


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__, added=("--vq-ckpt", "--no-left-padding"))
    add_gpt_flags(parser, GPT_SIZES, gpt_model="GPT-XL")
    add_gpt_file_flags(parser)
    help = "weights of the text tab's GPT, where both tabs are to draw"
    parser.add_argument("--text-gpt-ckpt", default=None, help=help)
    parser.add_argument("--text-vq-ckpt", default=None, help="of its tokenizer (default: the released one)")
    add_tokenizer_flags(parser, VQ_SIZES, default="the GPT's, found near it")
    parser.add_argument("--downsample-size", type=positive_int, default=16, help="pixels a side of a token")
    help = "pixels a side (default: what the file or its name says)"
    parser.add_argument("--image-size", type=positive_int, default=None, help=help)
    parser.add_argument("--class-names", default=None, help="file with the classes' names, one a line")
    add_sampling_flags(parser, cfg_scale=4.0, top_k=2000)
    help = "that the page begins with and keeps (default: a new one for each drawing)"
    parser.add_argument("--seed", type=Number(int, least=0, most=LARGEST_SEED), default=None, help=help)
    add_run_flags(parser)
    add_window_flag(parser)
    add_batch_size_flag(parser)
    add_text_flags(parser)
    parser.set_defaults(t5_feature_max_len=None)
    group = parser.add_argument_group("page")
    group.add_argument("--quickstart", action="store_true", help="the models that scripts/quickstart.sh trained")
    help = "draw with a running server's model (may be given twice: a class model and a text model)"
    group.add_argument("--server", action="append", default=[], metavar="URL", help=help)
    help = "the server's key (SERVE_API_KEY in the environment does the same)"
    group.add_argument("--api-key", default=None, help=help)
    group.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for other machines too")
    group.add_argument("--port", type=PORT, default=7860, help="port to listen at")
    help = "ask visitors for a login (may be given several times; DEMO_AUTH in the environment does the same)"
    group.add_argument("--auth", action="append", default=[], metavar="USER:PASSWORD", help=help)
    help = "path at which a proxy has the page, such as /demo"
    group.add_argument("--root-path", type=url_path, default="", help=help)
    group.add_argument("--share", action="store_true", help="a public address for a week, through gradio's servers")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
