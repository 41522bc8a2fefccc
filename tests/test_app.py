"""app.py: its flags, what it loads and what it says where it cannot; with gradio its page, with a browser the page's use."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import app
from autoregressive.demo import Painter
from autoregressive.models.gpt import GPT_models
from tests.helpers import ROOT, free_port, randomize
from tests.training import environment
from utils.checkpoint import save_checkpoint

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


def parse(*words):
    return app.flags().parse_args([str(word) for word in words])


def test_the_published_flags():
    args = parse()
    published = {
        "gpt_model": "GPT-XL", "gpt_type": "c2i", "from_fsdp": False, "cls_token_num": 1, "precision": "bf16",
        "compile": False, "vq_model": None, "codebook_size": None, "codebook_embed_dim": None, "downsample_size": 16,
        "num_classes": None, "cfg_scale": 4.0, "cfg_interval": -1, "seed": 0, "top_k": 2000, "temperature": 1.0, "top_p": 1.0,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in published} == published


def test_help_needs_neither_torch_nor_gradio():
    code = "import sys, app; app.flags(); print(*{'torch', 'gradio', 'numpy', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == ""


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ModuleNotFoundError):
        app.main(parse("--quickstart"))


# What is loaded


@pytest.fixture
def quickstart(small_files, tmp_path, monkeypatch):
    """quickstart/ as scripts/quickstart.sh leaves it, with random weights."""
    monkeypatch.chdir(tmp_path)
    for folder, file in (("gpt/000-GPT-XS", small_files.gpt), ("tokenizer/000-VQ-8-XS", small_files.vq)):
        target = tmp_path / "quickstart" / folder / "checkpoints" / "0000010.pt"
        target.parent.mkdir(parents=True)
        shutil.copy(file, target)
    return tmp_path / "quickstart"


def add_text(quickstart: Path) -> None:
    """quickstart/text/ too: a text-conditional GPT and the encoder it reads with."""
    from tests.language.small_t5 import make_small_t5

    make_small_t5(quickstart / "text" / "t5" / "small", dim=24)
    shape = {"vocab_size": 64, "block_size": 64, "model_type": "t2i", "cls_token_num": 9, "caption_dim": 24}
    model = randomize(GPT_models["GPT-XS"](**shape), seed=5)
    args = {"image_size": 32, "downsample_size": 4}
    save_checkpoint(
        quickstart / "text/stage2/000-GPT-XS/checkpoints/0000010.pt",
        {"model": model.state_dict(), "steps": 10, "args": args},
    )


@pytest.mark.slow
def test_the_quickstart_models(quickstart):
    painters = app.make_painters(parse("--quickstart"))
    assert list(painters) == ["class"]
    pipeline = painters["class"].pipeline()
    assert pipeline.gpt.tok_embeddings.weight.dtype == torch.float32 and painters["class"].names == list("0123456789")
    assert "10 classes" in app.describe(pipeline) and "32x32 pixels, on " in app.describe(pipeline)
    add_text(quickstart)
    painters = app.make_painters(parse("--quickstart"))
    assert list(painters) == ["class", "text"]
    views = list(painters["text"].draw("a red lantern"))
    assert len(views[-1].pictures) == 1 and painters["text"].pipeline().t5_tokens == 9


def test_no_quickstart(quickstart, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"stage2: run `bash scripts/quickstart\.sh text` first"):
        app.make_painters(parse("--quickstart", "--gpt-type", "t2i"))
    shutil.rmtree(quickstart / "gpt")
    with pytest.raises(
        FileNotFoundError, match=r"no trained model in quickstart/gpt: run `bash scripts/quickstart.sh` first"
    ):
        app.make_painters(parse("--quickstart"))


def test_files_and_folders_and_flags(small_files, tmp_path):
    """Weights decide; a flag that is given is compared with them."""
    files = ["--gpt-ckpt", small_files.gpt, "--vq-ckpt", small_files.vq]
    pipeline = app.make_painters(parse(*files))["class"].pipeline()
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
            next(iter(app.make_painters(parse(*files, *words)).values())).pipeline()
    with pytest.raises(FileNotFoundError, match=r"no/file\.pt"):
        app.make_painters(parse("--gpt-ckpt", "no/file.pt", "--vq-ckpt", small_files.vq))["class"].pipeline()


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
    painter = app.make_painters(parse(*words))["class"]
    plain = app.make_painters(parse("--gpt-ckpt", small_files.gpt, "--vq-ckpt", small_files.vq, "--precision", "none"))[
        "class"
    ]
    drawn = [list(p.draw(3))[-1].pictures[0][0] for p in (painter, plain)]
    assert np.array_equal(*drawn)
    assert app.is_on_hub("me/model") and app.is_on_hub(tmp_path / "gpt")
    assert not any(
        map(app.is_on_hub, ("c2i_L_384.pt", "FoundationVision/LlamaGen/c2i_L_384.pt", "runs/a.pt", "results"))
    )


def test_released_weights_by_default():
    assert app.released_gpt("c2i", "GPT-XL") == "FoundationVision/LlamaGen/c2i_XL_384.pt"
    assert app.released_gpt("t2i", "GPT-XL") == "peizesun/llamagen_t2i/t2i_XL_stage2_512.pt"
    assert app.released_gpt("c2i", "GPT-B") == "FoundationVision/LlamaGen/c2i_B_384.pt"
    with pytest.raises(ValueError, match="no --gpt-model GPT-7B of --gpt-type c2i was released"):
        app.make_painters(parse("--gpt-model", "GPT-7B"))


def test_where_the_sliders_stand():
    assert app.settings_for("class", parse())["cfg_scale"] == 4.0
    assert app.settings_for("text", parse()) | {"cfg_scale": 7.5, "top_k": 1000} == app.settings_for("text", parse())
    assert app.settings_for("text", parse("--cfg-scale", 3))["cfg_scale"] == 3
    assert app.settings_for("class", parse("--quickstart"))["temperature"] == 0.8
    ends = app.settings_for("class", parse("--cfg-scale", 0.5, "--top-k", -1, "--top-p", 3, "--temperature", 0))
    assert [ends[name] for name in ("cfg_scale", "top_k", "top_p", "temperature")] == [1, 0, 1, 0]


# What the page is told

SETTINGS = {"count": 1, "seed": 0, "cfg_scale": 2.0, "cfg_interval": -1, "top_k": 0, "top_p": 1.0, "temperature": 1.0}


def respond(painter, asked, **settings):
    return list(app.respond(painter, False, asked, **{**SETTINGS, **settings}))


def test_mistakes_become_messages(small_files, tmp_path, caplog):
    painter = app.make_painters(parse("--gpt-ckpt", small_files.gpt, "--vq-ckpt", small_files.vq))["class"]
    pictures, status = respond(painter, "3")[-1]
    assert len(pictures) == 1 and "data-done" in status
    for asked, settings, message in (
        ("11", {}, "Class 11 is out of range"),
        ("", {}, "No class is chosen"),
        ("3", {"seed": None}, "The seed is missing"),
        ("3", {"top_p": -1}, "--top-p must be 0"),
        ("3", {"cfg_interval": None}, "No value is given for cfg interval"),
    ):
        assert respond(painter, asked, **settings) == [([], app_error(message, respond(painter, asked, **settings)))]
    painter = app.make_painters(parse("--gpt-ckpt", tmp_path / "no.pt", "--vq-ckpt", small_files.vq))["class"]
    ((pictures, status),) = respond(painter, "3")
    assert pictures == [] and "class='error'" in status and "no.pt" in status and not caplog.records


def app_error(message: str, answers: list) -> str:
    """The HTML of the answers, which has to be an error's and to hold the message."""
    ((_, status),) = answers
    assert status.startswith("<div class='error'") and message in status, status
    return status


@pytest.mark.parametrize("error, message", [(torch.OutOfMemoryError("CUDA out of memory."), "memory is full: ask for fewer images"), (KeyError("x"), r"Drawing failed (KeyError); the terminal has the details")])  # fmt: skip
def test_what_was_not_foreseen(error, message, caplog):
    def load():
        raise error

    ((_, status),) = respond(Painter(load), "3")
    assert message in status and "Traceback" not in status and caplog.records


@pytest.mark.slow
def test_pictures_are_written_once(small_files, tmp_path):
    """And are those of `respond`."""
    painter = app.make_painters(parse("--gpt-ckpt", small_files.gpt, "--vq-ckpt", small_files.vq))["class"]
    asked = ["3", 2, *list(SETTINGS.values())[1:]]
    *_, (pictures, _) = app.respond(painter, False, *asked)
    *_, (files, status) = app.show(painter, False, str(tmp_path), *asked)
    assert "data-done" in status and len(files) == 2
    for (file, _), (image, _) in zip(files, pictures, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), image)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert {str(path) for path in written} >= {file for file, _ in files}
    *_, (again, _) = app.show(painter, False, str(tmp_path), *asked)
    assert [file for file, _ in again] == [file for file, _ in files]
    assert {path: path.stat().st_mtime_ns for path in written} == written


# The page


@pytest.mark.slow
def test_the_page_is_built_where_nothing_is_loaded(small_files, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed")
    args = parse("--gpt-ckpt", tmp_path / "no.pt", "--vq-ckpt", small_files.vq)
    page = app.build_page(app.make_painters(args), args, {"class": "<div class='error'>No checkpoint</div>"})
    parts = {block.elem_id: block for block in page.blocks.values() if getattr(block, "elem_id", None)}
    assert parts["class-status"].value == "<div class='error'>No checkpoint</div>" and "text-missing" in parts
    assert parts["class-asked"].choices == []


@pytest.fixture
def served(quickstart):
    """The address of the demo, in a process of its own."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    add_text(quickstart)
    port = free_port()
    words = [sys.executable, str(ROOT / "app.py"), "--quickstart", "--port", str(port)]
    log = (quickstart.parent / "app.log").open("w+")
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        words, cwd=quickstart.parent, env=environment(PYTHONPATH=paths), stdout=log, stderr=subprocess.STDOUT
    )
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 200
    try:
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(address, timeout=5)
                break
            except OSError:
                assert process.poll() is None, Path(log.name).read_text()
                time.sleep(0.5)
        yield address
        assert "Traceback" not in Path(log.name).read_text()
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


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


def wait(driver, selector: str, seconds: float = 90):
    """The first visible element, once there is one."""
    from selenium.webdriver.support.ui import WebDriverWait

    def found(driver):
        return next((e for e in driver.find_elements("css selector", selector) if e.is_displayed()), None)

    return WebDriverWait(driver, seconds, ignored_exceptions=[Exception]).until(found, f"no {selector}")


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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_in_a_browser(served, browser):
    """A class, a prompt, and mistakes in both tabs."""
    from selenium.webdriver.common.keys import Keys

    browser.get(served)
    for kind, asked, bad, message in (
        ("class", "7", "horse", "No class is called 'horse'"),
        ("text", "a red lantern", " ", "The prompt is blank"),
    ):
        if kind == "text":
            wait(browser, "button[role=tab]:nth-of-type(2)").click()
        box = f"#{kind}-asked {'input' if kind == 'class' else 'textarea'}"
        type_into(browser, box, asked)
        if kind == "class":
            browser.switch_to.active_element.send_keys(Keys.ENTER)
        wait(browser, f"#{kind}-generate").click()
        wait(browser, f"#{kind}-status [data-done]")
        wait(browser, f"#{kind}-gallery .thumbnail-item:nth-of-type(1) img")
        time.sleep(1)
        shown = pictures(browser, kind)
        assert len(shown) == 4 and all(image.shape == (32, 32, 3) and image.std() > 5 for image in shown)
        assert len({image.tobytes() for image in shown}) == 4
        captions = [e.text for e in browser.find_elements("css selector", f"#{kind}-gallery .caption-label")]
        assert all(
            caption.startswith(f"{asked} · image {i} · seed 0 · guidance 2") for i, caption in enumerate(captions)
        )
        assert len(captions) == 4 and all(" s for 4" in caption for caption in captions)

        type_into(browser, box, bad)
        browser.switch_to.active_element.send_keys(Keys.TAB)
        wait(browser, f"#{kind}-generate").click()
        error = wait(browser, f"#{kind}-status .error")
        assert message in error.text
        assert "Traceback" not in browser.page_source
    if "SCREENSHOT" in os.environ:
        browser.save_screenshot(os.environ["SCREENSHOT"])
