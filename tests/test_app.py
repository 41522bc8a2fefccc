"""app.py: its flags, what it loads and what it says where it cannot; its page in a process of its own, under attack and in a browser."""

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import app
from autoregressive.demo import Painter, View
from autoregressive.models.build import build_gpt
from autoregressive.models.gpt import GPT_models
from autoregressive.pipeline import ImagePipeline, load_gpt
from autoregressive.serve.engine import ModelInfo
from autoregressive.serve.server import hub_file, native_service
from tests.helpers import ROOT, free_port, randomize
from tests.serve.servers import listening
from tests.training import environment
from tokenizer.load import load_tokenizer
from utils.checkpoint import save_checkpoint

pytestmark = pytest.mark.slow  # through whole scripts and servers

PATIENCE = 120  # seconds that a busy machine may take
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


def parse(*words):
    return app.flags().parse_args([str(word) for word in words])


def test_the_published_flags():
    args = parse()
    published = {
        "gpt_model": "GPT-XL", "gpt_type": "c2i", "from_fsdp": False, "cls_token_num": 1, "precision": "bf16",
        "compile": False, "vq_model": None, "codebook_size": None, "codebook_embed_dim": None, "downsample_size": 16,
        "num_classes": None, "cfg_scale": 4.0, "cfg_interval": -1, "top_k": 2000, "temperature": 1.0, "top_p": 1.0,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in published} == published


def test_help_needs_neither_torch_nor_gradio():
    code = "import sys, app; app.flags(); print(*{'torch', 'gradio', 'numpy', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == ""


# What is loaded


def make_quickstart(small_files, folder: Path) -> Path:
    """quickstart/ as scripts/quickstart.sh leaves it, with random weights."""
    for part, file in (("gpt/000-GPT-XS", small_files.gpt), ("tokenizer/000-VQ-8-XS", small_files.vq)):
        target = folder / "quickstart" / part / "checkpoints" / "0000010.pt"
        target.parent.mkdir(parents=True)
        shutil.copy(file, target)
    return folder / "quickstart"


@pytest.fixture
def quickstart(small_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_quickstart(small_files, tmp_path)


def add_text(quickstart: Path) -> None:
    """quickstart/text/ too: a text-conditional GPT and the encoder it reads with."""
    from language.t5 import T5Embedder, encoder_identity
    from tests.language.small_t5 import make_small_t5

    t5 = T5Embedder("cpu", make_small_t5(quickstart / "text" / "t5" / "small", dim=24))
    shape = {"vocab_size": 64, "block_size": 64, "model_type": "t2i", "cls_token_num": 9, "caption_dim": 24}
    model = randomize(GPT_models["GPT-XS"](**shape), seed=5)
    args = {"image_size": 32, "downsample_size": 4}
    save_checkpoint(
        quickstart / "text/gpt/000-GPT-XS/checkpoints/0000010.pt",
        {"model": model.state_dict(), "steps": 10, "args": args, "config": {"text_encoder": encoder_identity(t5)}},
    )


def test_the_quickstart_models(quickstart):
    loads = app.models(parse("--quickstart"))
    assert list(loads) == ["class"]
    pipeline = loads["class"]()
    assert pipeline.gpt.tok_embeddings.weight.dtype == torch.float32
    assert "10 classes" in app.describe(pipeline) and "32x32 pixels, on " in app.describe(pipeline)
    add_text(quickstart)
    loads = app.models(parse("--quickstart"))
    assert list(loads) == ["class", "text"]
    pipeline = loads["text"]()
    assert len(pipeline(["a red lantern"], progress=False)) == 1 and pipeline.t5_tokens == 9


def test_no_quickstart(quickstart, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"text/gpt: run `bash scripts/quickstart\.sh text` first"):
        app.models(parse("--quickstart", "--gpt-type", "t2i"))
    shutil.rmtree(quickstart / "gpt")
    with pytest.raises(
        FileNotFoundError, match=r"no trained model in quickstart/gpt: run `bash scripts/quickstart.sh` first"
    ):
        app.models(parse("--quickstart"))


def test_files_and_folders_and_flags(small_files, tmp_path):
    """Weights decide; a flag that is given is compared with them."""
    files = ["--gpt-ckpt", small_files.gpt, "--vq-ckpt", small_files.vq]
    pipeline = app.models(parse(*files))["class"]()
    assert pipeline.image_size == 32 and pipeline.gpt.tok_embeddings.weight.dtype == torch.bfloat16
    for words, message in (
        (["--gpt-model", "GPT-B"], "--gpt-model GPT-B"),
        (["--num-classes", 11], "--num-classes 11"),
        (["--codebook-size", 128], "--codebook-size 128"),
        (["--vq-model", "VQ-8"], "--vq-model VQ-8"),
        (["--ar-token-num", 4], "--ar-token-num 4"),
        (["--gpt-type", "t2i"], "--gpt-type t2i"),
    ):
        with pytest.raises(ValueError, match=message):
            next(iter(app.models(parse(*files, *words)).values()))()
    with pytest.raises(FileNotFoundError, match=r"no/file\.pt"):
        app.models(parse("--gpt-ckpt", "no/file.pt", "--vq-ckpt", small_files.vq))["class"]()


def test_what_was_saved_for_the_hub(small_files, tmp_path):
    from tests.training import run_here
    from tools import push_gpt_to_hf, push_vae_to_hf

    shape = [
        "--num-classes",
        10,
        "--image-size",
        32,
        "--downsample-size",
        4,
        "--codebook-size",
        64,
        "--precision",
        "none",
    ]
    run_here(
        push_gpt_to_hf, "--gpt-ckpt", small_files.gpt, "--gpt-model", "GPT-XS", *shape, "--output", tmp_path / "gpt"
    )
    vq = ["--vq-ckpt", small_files.vq, "--vq-model", "VQ-4", "--codebook-size", 64]
    run_here(push_vae_to_hf, *vq, "--output", tmp_path / "vq")
    words = ["--gpt-ckpt", tmp_path / "gpt", "--vq-ckpt", tmp_path / "vq", "--precision", "none"]
    plain = ["--gpt-ckpt", small_files.gpt, "--vq-ckpt", small_files.vq, "--precision", "none"]
    drawn = [app.models(parse(*given))["class"]()([3], progress=False)[0] for given in (words, plain)]
    assert np.array_equal(*drawn)


def test_owner_and_name_are_downloaded_from_the_hub_and_files_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *asked: "/".join(asked))
    assert hub_file("me/model") == "me/model/model.safetensors"
    files = ("c2i_L_384.pt", "FoundationVision/LlamaGen/c2i_L_384.pt", "runs/a.pt", "results", tmp_path)
    assert [hub_file(file) for file in files] == list(files)


def test_a_whole_pipeline_is_one_name_with_its_own_t5(quickstart):
    add_text(quickstart)
    for kind, load in app.models(parse("--quickstart")).items():
        load().save_pretrained(f"saved/{kind}")
    shutil.rmtree(quickstart)
    loads = app.models(parse("--gpt-ckpt", "saved/class", "--text-gpt-ckpt", "saved/text"))
    assert {kind: load().image_size for kind, load in loads.items()} == {"class": 32, "text": 32}
    assert loads["text"]().t5_model_type == "text_encoder"


def test_the_space_loads_the_pipeline_that_its_variable_names(quickstart, monkeypatch):
    app.models(parse("--quickstart"))["class"]().save_pretrained("owner/name")
    page = (ROOT / "docs" / "hub.md").read_text()
    source = textwrap.dedent(re.search(r"`space.py`.*?\n\n(.*?)\n`requirements", page, re.DOTALL)[1])
    ran = []
    monkeypatch.setattr("utils.cli.run_script", lambda main, parser: ran.append((main, parser.parse_args())))
    monkeypatch.setattr(sys, "argv", ["space.py"])
    monkeypatch.setenv("MODEL", "owner/name")
    exec(compile(source, "space.py", "exec"), {})
    ((main, args),) = ran
    assert main is app.main and (args.host, args.port) == ("0.0.0.0", 7860)
    assert app.models(args)["class"]().image_size == 32


def test_released_weights_by_default():
    assert app.released_gpt("c2i", "GPT-XL") == "FoundationVision/LlamaGen/c2i_XL_384.pt"
    assert app.released_gpt("t2i", "GPT-XL") == "peizesun/llamagen_t2i/t2i_XL_stage2_512.pt"
    assert app.released_gpt("c2i", "GPT-B") == "FoundationVision/LlamaGen/c2i_B_384.pt"
    with pytest.raises(ValueError, match="no --gpt-model GPT-7B of --gpt-type c2i was released"):
        app.models(parse("--gpt-model", "GPT-7B"))


def test_where_the_sliders_stand():
    assert app.settings_for("class", parse())["cfg_scale"] == 4.0
    assert app.settings_for("text", parse()) | {"cfg_scale": 7.5, "top_k": 1000} == app.settings_for("text", parse())
    assert app.settings_for("text", parse("--cfg-scale", 3))["cfg_scale"] == 3
    assert app.settings_for("class", parse("--quickstart"))["temperature"] == 0.6
    assert "control_strength" not in app.settings_for("class", parse())
    assert app.settings_for("class", parse("--control-strength", 0.4), control=True)["control_strength"] == 0.4
    assert app.settings_for("text", parse("--quickstart"))["temperature"] == 0.4
    ends = app.settings_for("class", parse("--cfg-scale", 0.5, "--top-k", -1, "--top-p", 3, "--temperature", 0))
    assert [ends[name] for name in ("cfg_scale", "top_k", "top_p", "temperature")] == [1, 0, 1, 0]


def test_settings_beyond_the_sliders_and_without_one_are_those_of_the_flags(tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed")
    assert app.setting_control("temperature", 3.0).maximum == 3 and app.setting_control("top_p", 0.5).maximum == 1
    args = parse("--order", "random", "--repulsion", 2, "--seed", 0)
    asked = []

    class Listener:
        info = ModelInfo("small", "c2i", 32, 64, 10, True, tuple("0123456789"))

        async def draw(self, what, **settings):
            asked.append(settings)
            yield View([], "done", True)

    page = app.build_page({"class": Listener()}, {}, args, tmp_path, Counter())
    opening = next(fn for fn in page.fns.values() if getattr(fn.fn, "__name__", "") == "opening").fn
    asyncio.run(opening())
    assert asked[0]["order"] == "random" and asked[0]["repulsion"] == 2 and "draw" not in asked[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--server", "http://127.0.0.1:1", "--gpt-ckpt", "a.pt"], "--gpt-ckpt is of models that are loaded here"),
        (["--quickstart", "--server", "http://127.0.0.1:1"], "--quickstart is of models"),
        (["--api-key", "x"], "--api-key is the key of a --server"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        app.main(parse(*flags))


@pytest.mark.parametrize("login", ["", "me", "me:", ":secret", ":"])
def test_login_with_an_empty_half_is_refused(login, monkeypatch):
    with pytest.raises(ValueError, match="USER:PASSWORD"):
        app.logins(parse("--auth", login))
    monkeypatch.setenv("DEMO_AUTH", login)
    with pytest.raises(ValueError, match="USER:PASSWORD"):
        app.logins(parse())


@pytest.fixture
def stays(monkeypatch):
    """Has app.main leave the signals of this process alone."""
    monkeypatch.setattr(app, "Signals", lambda act: None)


def test_open_page_beyond_this_machine_is_warned_of(capsys, monkeypatch, stays):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for words, warned in (
        ([], False),
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--auth", "a:b:c"], False),
    ):
        with pytest.raises(ModuleNotFoundError):
            app.main(parse("--quickstart", *words, "--port", free_port()))
        assert ("whoever reaches 0.0.0.0:" in capsys.readouterr().err) == warned
    assert app.logins(parse("--auth", "a:b:c")) == [("a", "b:c")]


def test_port_in_use_is_told_before_a_model_is_loaded(stays):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--host 127\.0\.0\.1 --port {port}: Address already in use"):
            app.main(parse("--gpt-ckpt", "absent.pt", "--port", port))


def test_server_that_is_not_there_is_told(stays):
    pytest.importorskip("gradio", reason="gradio is not installed")
    with pytest.raises(ConnectionError, match="no server answers at http"):
        app.main(parse("--server", f"http://127.0.0.1:{free_port()}", "--port", free_port()))


def test_tab_whose_model_is_missing_says_why_and_the_other_is_there(quickstart, capsys):
    pytest.importorskip("gradio", reason="gradio is not installed")
    args = parse("--quickstart", "--text-gpt-ckpt", "no.pt", "--text-vq-ckpt", quickstart / "tokenizer")
    loaded = app.load_models(args)
    assert "\ntext: no file no.pt" in capsys.readouterr().out
    info = ModelInfo("small", "c2i", 32, 64, 10, True, tuple("0123456789"))
    painter, problems = Painter(None, info), {"text": loaded["text"]}
    page = app.build_page({"class": painter}, problems, args, Path(), Counter())
    parts = {part["props"].get("elem_id"): part["props"] for part in page.get_config_file()["components"]}
    assert "No file no.pt" in parts["text-missing"]["value"] and "class-generate" in parts
    with pytest.raises(FileNotFoundError):  # where there is no other
        app.load_models(parse("--gpt-ckpt", "no.pt"))


# The page's answers


class Artist:
    """A painter that shows one unfinished picture and then raises, or finishes."""

    def __init__(self, error: Exception | None = None):
        self.error, self.seeds = error, []

    async def draw(self, asked, *, seed, **settings):
        self.seeds.append(seed)
        yield View([("0-2.png", b"part", "2 of 8 rows")], "begun", False)
        if self.error:
            raise self.error
        yield View([("0-done.png", b"whole", "3 s")], "done", True)


def respond(painter, folder, **settings):
    asked = {"count": 1, "seed": 0, "fresh": False, "settings": {"cfg_scale": 2.0}}

    async def main():
        shown = [shown async for shown in app.respond(painter, folder, "3", *{**asked, **settings}.values())]
        await asyncio.sleep(0.01)
        return shown

    return asyncio.run(main())


def test_unfinished_pictures_files_go_after_the_drawing(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "SECONDS_TO_LISTEN", 0)
    *_, (files, status, seed) = respond(Artist(), tmp_path / "pictures")
    assert (status, seed) == ("done", 0) and [caption for _, caption in files] == ["3 s"]
    assert [path.read_bytes() for path in tmp_path.rglob("*.png")] == [b"whole"]
    respond(Artist(ValueError("no")), tmp_path / "others")
    assert not list((tmp_path / "others").rglob("*.png"))


def test_seed_is_new_at_each_click_unless_it_is_kept(tmp_path):
    artist = Artist()
    shown = [respond(artist, tmp_path, seed=7, fresh=fresh)[-1][2] for fresh in (True, True, False, False)]
    assert shown == artist.seeds and len(set(shown)) == 3 and shown[2:] == [7, 7]
    assert respond(artist, tmp_path, seed=None)[-1][2] != respond(artist, tmp_path, seed=None)[-1][2]


@pytest.mark.parametrize(
    "error, message",
    [
        (ValueError("no <b>class</b>"), "No &lt;b&gt;class"),
        (ConnectionError("the server is gone"), "The server is gone"),
        (KeyError("x"), "Drawing failed (KeyError); the terminal has the details"),
    ],
)
def test_error_becomes_a_message_on_the_page(error, message, tmp_path, caplog):
    _, (_, status, _) = respond(Artist(error), tmp_path)
    assert status.startswith("<div class='error'") and message in status and "Traceback" not in status
    assert ("drawing failed" in caplog.messages) == isinstance(error, KeyError)


# The page, in a process of its own


class Page:
    """A running app.py. folder: where it was started, with its log and tmp/, its folder for temporary files."""

    def __init__(self, folder: Path, *words: object, **env: str):
        pytest.importorskip("gradio", reason="gradio is not installed")
        (folder / "tmp").mkdir(parents=True)
        self.folder, self.port, self.log = folder, free_port(), folder / "app.log"
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.address = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py"), *map(str, words), "--port", str(self.port)],
            cwd=folder, env=environment(PYTHONPATH=paths, TMPDIR=str(folder / "tmp"), **env),
            stdout=self.log.open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    def wait(self) -> "Page":
        """Wait for the line with its address."""
        deadline = time.monotonic() + 200
        while self.address not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)
        return self

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()

    def temporary_files(self) -> list[Path]:
        return [path for path in (self.folder / "tmp").rglob("*") if path.is_file()]

    def left(self) -> list[str]:
        """Return what is left of it, but for the folder of torch's compiler."""
        found = [path.name for path in (*self.folder.iterdir(), *(self.folder / "tmp").iterdir())]
        return [
            name
            for name in found
            if name not in ("app.log", "tmp", "quickstart") and not name.startswith("torchinductor")
        ]


@pytest.fixture(scope="module")
def page(small_files, tmp_path_factory):
    """The demo with the quickstart's two models, ended by SIGTERM, which leaves nothing."""
    folder = tmp_path_factory.mktemp("page")
    add_text(make_quickstart(small_files, folder / "models"))
    (folder / "run").mkdir()
    (folder / "run" / "quickstart").symlink_to(folder / "models" / "quickstart")
    page = Page(folder / "run", "--quickstart").wait()
    yield page
    assert page.end() == 0, page.log.read_text()
    assert "Traceback" not in (told := page.log.read_text()), told
    assert not page.left()


def visitor(page: Page, **settings):
    from gradio_client import Client

    return Client(page.address, verbose=False, download_files=False, httpx_kwargs={"timeout": PATIENCE}, **settings)


def asked(asked="3", count=1, seed=0, fresh=False) -> list:
    return [asked, count, seed, fresh, 2.0, -1, 1.0, 0, 1.0, "constant", 1.0, 0]


def test_visitor_gets_pictures_captions_and_a_seed(page):
    guest = visitor(page)
    gallery, status, seed = guest.predict(*asked(count=2, seed=5), api_name="/draw_class")
    assert seed == 5 and "data-done" in status
    assert [item["caption"].split(" · ")[:2] for item in gallery] == [["3", "seed 5"], ["3", "seed 6"]]
    again, other = (guest.predict(*asked(fresh=True), api_name="/draw_class")[2] for _ in range(2))
    assert again != other


def test_visitor_fills_a_hole(page, small_files):
    pipeline = ImagePipeline(load_gpt(small_files.gpt), load_tokenizer(small_files.vq), batch_size=1)
    picture = pipeline([4], seed=3, progress=False)[0].convert("RGBA")
    picture.paste((0, 0, 0, 0), (8, 4, 20, 16))
    text = address_of(picture)
    front, settings = asked(count=2, seed=5)[:4], asked()[4:]
    guest = visitor(page)
    gallery, status, seed = guest.predict(text, *front, 4, 2, *settings, api_name="/edit_class")
    assert seed == 5 and "data-done" in status and "particles 4" in gallery[0]["caption"]
    for i, item in enumerate(gallery):
        (expected,) = pipeline.edit(picture, None, 3, seed=5 + i, particles=4, cfg_scale=2.0)
        assert np.array_equal(np.asarray(Image.open(item["image"]["path"]).convert("RGB")), np.asarray(expected))
    for wrong in ("", "http://elsewhere/a.png", "data:image/png;base64,???", "data:image/png;base64,AAAA"):
        _, status, _ = guest.predict(wrong, *front, 4, 2, *settings, api_name="/edit_class")
        assert "class='error'" in status, wrong


def address_of(picture: Image.Image, kind: str = "png") -> str:
    """Return a picture as the page's canvas gives it."""
    file = BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


CONTROL = {"encoder": "vit", "width": 32, "layers": 1, "heads": 2, "positions": 8, "patch": 4, "pixels": 4}


@pytest.fixture(scope="module")
def control_page(small_files, tmp_path_factory):
    """The demo with a GPT of classes that draws by depth maps, and that model's pipeline."""
    folder = tmp_path_factory.mktemp("control")
    args = {"block_size": 64, "vocab_size": 64, "num_classes": 10}
    model = randomize(build_gpt("GPT-XS", **args, extra_conditions={"control": CONTROL | {"kind": "depth"}}), gain=1.5)
    save_checkpoint(folder / "gpt.pt", {"model": model.state_dict(), "config": model.args.identity})
    words = ["--gpt-ckpt", folder / "gpt.pt", "--vq-ckpt", small_files.vq, "--precision", "none", "--seed", 5]
    page = Page(folder / "page", *words).wait()
    yield page, ImagePipeline(load_gpt(folder / "gpt.pt"), load_tokenizer(small_files.vq), batch_size=1)
    assert page.end() == 0 and "Traceback" not in page.log.read_text()


def noise(*shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))


@pytest.mark.timeout(300)
def test_page_of_a_model_with_control_images_draws_and_fills_by_them(control_page):
    page, pipeline = control_page
    guest, picture, drawn = visitor(page), noise(48, 64), {}
    front, settings = asked(count=2, seed=5)[:4], [*asked()[4:], 0.5]
    for kind in ("depth", "canny"):
        values = [address_of(picture), *front, kind, *settings]
        gallery, status, _ = guest.predict(*values, api_name="/draw_class")
        assert "data-done" in status and f"control-type {kind} · " in gallery[0]["caption"]
        drawn[kind] = [np.asarray(Image.open(item["image"]["path"])) for item in gallery]
        control = {"control_images": picture, "control_type": kind, "control_strength": 0.5}
        for i, image in enumerate(drawn[kind]):
            (expected,) = pipeline([3], seed=5 + i, cfg_scale=2.0, progress=False, **control)
            assert np.array_equal(image, np.asarray(expected))
    assert not np.array_equal(drawn["depth"], drawn["canny"])

    holed = noise(32, 32).convert("RGBA")
    holed.paste((0, 0, 0, 0), (8, 4, 20, 16))
    values = [address_of(holed), address_of(picture, "webp"), *front, "canny", 4, 2, *settings]
    gallery, status, _ = guest.predict(*values, api_name="/edit_class")
    assert "data-done" in status and "particles 4" in gallery[0]["caption"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", "Open a control image"),
        ("http://elsewhere/a.png", "Open a control image"),
        ("data:image/gif;base64,AAAA", "Open a control image"),
        ("data:image/png;base64,AAAA", "Control_image is no picture that can be read"),
        ("data:image/png;base64,?", "base64"),
    ],
)
def test_what_is_no_control_image_is_told_in_one_line(control_page, address, message):
    values = [address, *asked()[:4], "depth", *asked()[4:], 1.0]
    _, status, _ = visitor(control_page[0]).predict(*values, api_name="/draw_class")
    assert status.startswith("<div class='error'") and message in status and "\n" not in status


def test_page_opens_with_a_picture_that_is_drawn_once(page):
    import httpx

    with httpx.Client(base_url=page.address, timeout=PATIENCE) as client:
        config = client.get("/config").json()
        load, _ = [fn["id"] for fn in config["dependencies"] if ["load"] in [target[1:] for target in fn["targets"]]]
        urls = []
        for session in ("one", "two"):
            joined = {"data": [], "fn_index": load, "session_hash": session}
            assert client.post("/gradio_api/queue/join", json=joined).status_code == 200
            with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
                told = (json.loads(line[5:]) for line in stream.iter_lines() if line.startswith("data:"))
                done = next(message for message in told if message["msg"] == "process_completed")
            ((item,), status) = done["output"]["data"]
            assert "data-done" in status and item["caption"].startswith("0 · seed 0 · ")
            urls.append(item["image"]["url"])
        assert urls[0] == urls[1]
        assert np.asarray(Image.open(BytesIO(client.get(urls[0]).content))).shape == (32, 32, 3)
        examples = [part for part in config["components"] if part["type"] == "dataset"]
        assert examples and [row[0] for row in examples[0]["props"]["samples"]] == list("01234567")


def test_page_takes_no_files(page):
    """Neither uploads, nor large bodies, nor addresses of files that gradio would fetch."""
    import httpx

    fetched = []

    class Trap(BaseHTTPRequestHandler):
        def do_GET(self):
            fetched.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_HEAD = do_GET

    with HTTPServer(("127.0.0.1", 0), Trap) as server, httpx.Client(base_url=page.address, timeout=PATIENCE) as client:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        before = page.temporary_files()
        large = b"x" * (app.MOST_BODY + 1)
        for path in ("upload", "upload?upload_id=x", "component_server", "stream/x", "process_recording", "vibe-edit"):
            answer = client.post(f"/gradio_api/{path}", files={"files": ("a.png", large)})
            assert answer.status_code in (404, 413), (path, answer.status_code)
            assert client.post(f"/gradio_api/{path}", files={"files": ("a.png", b"x")}).status_code == 404, path
        assert client.post("/gradio_api/queue/join", content=large).status_code == 413
        file = {"path": f"http://127.0.0.1:{server.server_port}/a.png", "meta": {"_type": "gradio.FileData"}}
        config = client.get("/config").json()
        (draw,) = [fn["id"] for fn in config["dependencies"] if fn["api_name"] == "draw_class"]
        for value in (file, [file], {"a": [file]}):
            joined = {"data": asked(value), "fn_index": draw, "session_hash": "files"}
            assert client.post("/gradio_api/queue/join", json=joined).status_code == 400
            assert client.post("/gradio_api/call/draw_class", json={"data": asked(value)}).status_code == 400
            assert client.post("/gradio_api/call/v2/draw_class", json={"asked": value}).status_code == 400
            for path in ("run/draw_class", "run/predict", "api/draw_class"):
                answer = client.post(f"/gradio_api/{path}", json={"data": asked(value), "fn_index": draw})
                assert answer.status_code in (400, 404)
        for path in ("run/draw_class", "run/predict"):  # past the queue
            answer = client.post(f"/gradio_api/{path}", json={"data": asked(), "fn_index": draw})
            assert answer.status_code == 404, answer.text
        for body in ([], "x", {"data": {}}, {"data": None}):
            assert 400 <= client.post("/gradio_api/queue/join", json=body).status_code < 500
        assert set(page.temporary_files()) <= set(before) and not fetched  # those of earlier visitors may go meanwhile
        server.shutdown()


def test_posts_that_nobody_listens_to_do_not_delay_a_visitor(page):
    import httpx

    guest = visitor(page)
    guest.predict(*asked(), api_name="/draw_class")
    with httpx.Client(base_url=page.address, timeout=PATIENCE) as client:
        config = client.get("/config").json()
        (draw,) = [fn["id"] for fn in config["dependencies"] if fn["api_name"] == "draw_class"]
        for i in range(100):
            joined = {"data": asked(count=16, seed=i), "fn_index": draw, "session_hash": f"nobody{i}"}
            assert client.post("/gradio_api/queue/join", json=joined).status_code == 200
            assert client.post("/gradio_api/call/draw_class", json={"data": asked(count=16, seed=i)}).status_code == 200
        before = len(page.temporary_files())
        _, status, _ = guest.predict(*asked(seed=77), api_name="/draw_class")
        assert "data-done" in status
        whole = [path for path in page.temporary_files() if path.name.endswith("done.png")]
        assert len(whole) <= before + 1, "nothing was drawn for them"
        time.sleep(app.SECONDS_TO_LISTEN + 1)
        wait_until(lambda: len(page.temporary_files()) <= before + 1)  # the visitor's unfinished pictures go then


def test_page_behind_a_login_and_a_path_draws_with_a_running_server(small_files, tmp_path):
    """With the server's key, from the environment; ended by an interrupt."""
    import httpx

    pipeline = ImagePipeline(load_gpt(small_files.gpt), load_tokenizer(small_files.vq), batch_size=2)
    with listening(lambda: native_service(pipeline, "small"), api_keys=["open"]) as (address, service):
        page = Page(
            tmp_path, "--server", address + "/v1", "--auth", "me:secret", "--root-path", "/demo", SERVE_API_KEY="open"
        ).wait()  # fmt: skip
        try:
            with httpx.Client(base_url=page.address, timeout=PATIENCE) as client:
                assert client.get("/config").status_code == 401
                for path in ("queue/join", "call/draw_class"):
                    answer = client.post(
                        f"/gradio_api/{path}", json={"data": asked(), "fn_index": 0, "session_hash": "x"}
                    )
                    assert answer.status_code == 401
                assert client.post("/login", data={"username": "me", "password": "wrong"}).status_code == 400
                assert client.post("/login", data={"username": "me", "password": "secret"}).status_code == 200
                assert client.get("/config").json()["root"].endswith("/demo")
            gallery, *_ = visitor(page, auth=("me", "secret")).predict(*asked(seed=5), api_name="/draw_class")
            (expected,) = pipeline([3], seed=5, cfg_scale=2.0, top_k=0, progress=False)
            assert np.array_equal(np.asarray(Image.open(gallery[0]["image"]["path"])), np.asarray(expected))
        finally:
            assert page.end(signal.SIGINT) == 0
        assert service.queued_images == 0
    assert not page.left() and "Traceback" not in page.log.read_text()


@pytest.fixture
def browser():
    """A headless Chromium."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium with its chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,860"):
        options.add_argument(flag)
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait(driver, selector: str, seconds: float = PATIENCE):
    """The first visible element, once there is one."""
    from selenium.webdriver.support.ui import WebDriverWait

    def found(driver):
        return next((e for e in driver.find_elements("css selector", selector) if e.is_displayed()), None)

    return WebDriverWait(driver, seconds, ignored_exceptions=[Exception]).until(found, f"no {selector}")


def wait_until(holds, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def type_into(driver, selector: str, text: str) -> None:
    from selenium.webdriver.common.keys import Keys

    box = wait(driver, selector)
    box.click()
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.DELETE)
    box.send_keys(text)


def pictures(driver, kind: str) -> list[np.ndarray]:
    """The gallery's images, downloaded as the browser shows them."""
    found = driver.find_elements("css selector", f"#{kind}-gallery .thumbnail-item img")
    return [
        np.asarray(Image.open(BytesIO(urllib.request.urlopen(e.get_attribute("src")).read())).convert("RGB"))
        for e in found
    ]


def shown(driver, kind: str, count: int) -> list[np.ndarray]:
    """The gallery's images, once there are so many."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    def found(driver):
        return images if len(images := pictures(driver, kind)) == count else None

    return WebDriverWait(driver, PATIENCE, ignored_exceptions=[StaleElementReferenceException]).until(found)


def drawn(driver, kind: str) -> tuple[list[np.ndarray], int]:
    """Click Generate. Returns the four pictures, once they are whole, and the seed that the page shows."""
    driver.execute_script("document.querySelectorAll('[data-done]').forEach(e => e.removeAttribute('data-done'))")
    wait(driver, f"#{kind}-generate").click()
    wait(driver, f"#{kind}-status [data-done]")
    return shown(driver, kind, 4), int(wait(driver, f"#{kind}-seed input").get_attribute("value"))


@pytest.mark.timeout(600)
def test_the_page_in_a_browser(page, browser):
    """A class, a prompt, and mistakes in both tabs."""
    from selenium.webdriver.common.keys import Keys

    browser.get(page.address)
    wait(browser, "#class-status [data-done]")
    shown(browser, "class", 1)  # with which the page opens
    wait(browser, "#class-examples button:nth-of-type(5), #class-examples tr:nth-of-type(5)").click()
    wait_until(lambda: wait(browser, "#class-asked input").get_attribute("value") == "4")
    for kind, asked, bad, message in (
        ("class", "7", "horse", "No class is called 'horse'"),
        ("text", "a red lantern", " ", "Prompt is blank"),
    ):
        if kind == "text":
            wait(browser, "button[role=tab]:nth-of-type(2)").click()
        box = f"#{kind}-asked {'input' if kind == 'class' else 'textarea'}"
        type_into(browser, box, asked)
        if kind == "class":
            browser.switch_to.active_element.send_keys(Keys.ENTER)
        images, seed = drawn(browser, kind)
        assert all(image.shape == (32, 32, 3) and image.std() > 5 for image in images)
        assert len({image.tobytes() for image in images}) == 4
        captions = [e.text for e in browser.find_elements("css selector", f"#{kind}-gallery .caption-label")]
        guidance = {"class": "guidance 1.5 ", "text": "no guidance "}[kind]
        assert all(caption.startswith(f"{asked} · seed {seed + i} · {guidance}") for i, caption in enumerate(captions))
        if kind == "class":  # another click, other pictures; with the seed kept, the same
            others, other_seed = drawn(browser, kind)
            assert other_seed != seed and not np.array_equal(others, images)
            wait(browser, f"#{kind}-fresh input").click()
            again, same_seed = drawn(browser, kind)
            assert same_seed == other_seed and np.array_equal(again, others)

        type_into(browser, box, bad)
        browser.switch_to.active_element.send_keys(Keys.TAB)
        wait(browser, f"#{kind}-generate").click()
        error = wait(browser, f"#{kind}-status .error")
        assert message in error.text
        assert "Traceback" not in browser.page_source
    if "SCREENSHOT" in os.environ:
        browser.save_screenshot(os.environ["SCREENSHOT"])


@pytest.mark.timeout(300)
def test_control_image_opened_in_a_browser_is_sent_as_its_file_and_a_large_one_smaller(control_page, browser, tmp_path):
    page, pipeline = control_page
    picture = noise(48, 64)
    picture.save(tmp_path / "small.png")
    noise(1500, 2500).save(tmp_path / "large.png")
    browser.get(page.address)
    wait(browser, "#class-generate").click()
    assert "Open a control image" in wait(browser, "#class-status .error").text
    assert "Class and control image" in [e.text for e in browser.find_elements("css selector", "button[role=tab]")]
    script = "return document.querySelector('#class-control_image canvas').picture()"
    for name, kind in (("large", "jpeg"), ("small", "png")):
        wait(browser, "#class-control_image [type=file]").send_keys(str(tmp_path / f"{name}.png"))
        wait_until(lambda kind=kind: browser.execute_script(script).startswith(f"data:image/{kind}"))
        images, seed = drawn(browser, "class")
        assert seed == 5
    (expected,) = pipeline([0], seed=5, cfg_scale=4.0, top_k=2000, control_images=picture, progress=False)
    assert np.array_equal(images[0], np.asarray(expected))


@pytest.mark.timeout(300)
def test_brush_in_a_browser_fills_what_it_painted_over(page, browser):
    from selenium.webdriver.common.action_chains import ActionChains

    browser.get(page.address)
    wait(browser, "#class-status [data-done]")
    (opening,) = shown(browser, "class", 1)
    wait(browser, "button[role=tab]:nth-of-type(3)").click()
    canvas = wait(browser, "#edit-class-image canvas")
    wait(browser, "#edit-class-generate").click()
    assert "Open a picture" in wait(browser, "#edit-class-status .error").text
    wait(browser, "#edit-class-image .take").click()
    picture = "return document.querySelector('#edit-class-image canvas').picture()"
    wait_until(lambda: len(browser.execute_script(picture)) > 100)
    ActionChains(browser).move_to_element(canvas).click_and_hold().move_by_offset(40, 0).release().perform()
    browser.execute_script("document.querySelectorAll('[data-done]').forEach(e => e.removeAttribute('data-done'))")
    wait(browser, "#edit-class-generate").click()
    wait(browser, "#edit-class-status [data-done]")
    for filled in shown(browser, "edit-class", 2):
        assert np.array_equal(filled[:8], opening[:8]) and not np.array_equal(filled, opening)
    if "SCREENSHOT" in os.environ:
        browser.save_screenshot(os.environ["SCREENSHOT"])
