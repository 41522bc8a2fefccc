"""The demo's painter, over a real server: views of a drawing, waiting, leaving, the class that is meant, and mistakes."""

import asyncio
import threading
from contextlib import aclosing
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from autoregressive.demo import MOST_IMAGES, Painter, Picture, error_html, view, words
from autoregressive.pipeline import ImagePipeline, load_gpt
from autoregressive.serve.body import Limits
from autoregressive.serve.decoder import GREY, Decoder
from autoregressive.serve.server import native_service
from autoregressive.serve.service import Service
from tests.serve.servers import ScriptedEngine, listening, pixels
from tests.serve.small import text_pipeline
from tokenizer.load import load_tokenizer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture(scope="module")
def tokenizer(small_files):
    return load_tokenizer(small_files.vq)


def scripted(tokenizer, engine=None, **limits) -> Service:
    return Service(engine or ScriptedEngine(), Decoder(tokenizer, 8), None, Limits(**limits))


def shut(engine: ScriptedEngine, rows: int = 0) -> None:
    """Have the engine stop after so many rows, until its open_gate is called, from any thread."""
    engine.gate, engine.rows_before, loop = asyncio.Event(), rows, asyncio.get_running_loop()
    engine.open_gate = lambda: loop.call_soon_threadsafe(engine.gate.set)


async def views_of(address, asked, **settings) -> list:
    painter = await Painter.connect(address)
    async with aclosing(painter.draw(asked, **settings)) as views:
        return [shown async for shown in views]


def draw(address, asked, **settings) -> list:
    return asyncio.run(views_of(address, asked, **settings))


# Views


def test_painter_draws_the_images_of_consecutive_seeds(small_files, tokenizer):
    pipeline = ImagePipeline(load_gpt(small_files.gpt), tokenizer, batch_size=4)
    with listening(lambda: native_service(pipeline, "small")) as (address, _):
        last = draw(address, "7", count=3, seed=5, cfg_scale=3.0, top_k=20)[-1]
    expected = [pipeline([7], seed=seed, progress=False, cfg_scale=3.0, top_k=20)[0] for seed in (5, 6, 7)]
    assert last.done and "data-done" in last.status and "3 images in" in last.status
    for i, ((_, png, caption), image) in enumerate(zip(last.pictures, expected, strict=True)):
        assert np.array_equal(pixels(png), image)
        assert caption.startswith(f"7 · seed {5 + i} · guidance 3 · top-k 20 · ") and caption.endswith(" s")


def test_painter_of_a_text_model_draws_prompts(tokenizer):
    pipeline = text_pipeline(tokenizer)
    with listening(lambda: native_service(pipeline, "words")) as (address, _):
        ((_, png, caption),) = draw(address, "two cats sleep", seed=1, cfg_scale=2.0, top_k=0)[-1].pictures
        assert caption.startswith("two cats sleep · seed 1 · guidance 2 · top-k all · ")
        with pytest.raises(ValueError, match="blank"):
            draw(address, "  \n")
    (expected,) = pipeline(["two cats sleep"], seed=1, cfg_scale=2.0, progress=False)
    assert np.array_equal(pixels(png), expected)


def test_unfinished_picture_shows_its_rows_and_grey_below(tokenizer):
    engine = ScriptedEngine()

    async def main(address):
        painter = await Painter.connect(address)
        async with aclosing(painter.draw("3", seed=2)) as views:
            async for shown in views:
                if shown.pictures:
                    engine.open_gate()
                    ((_, png, caption),) = shown.pictures
                    return pixels(png), caption, shown.done

    def make():
        shut(engine, rows=4)
        return scripted(tokenizer, engine)

    with listening(make) as (address, _):
        image, caption, done = asyncio.run(main(address))
    rows = int(caption.split(" · ")[-1].split()[0])
    assert not done and 1 <= rows <= 4 and caption.endswith(f"{rows} of 8 rows")
    assert (image[rows * 4 :] == GREY).all() and image[: rows * 4].std() > 5


def test_painter_waits_for_its_place_in_a_full_server(tokenizer):
    engine = ScriptedEngine()

    def make():
        shut(engine)
        return scripted(tokenizer, engine, max_queue=1, max_n=1)

    async def main(address, service):
        painter = await Painter.connect(address)
        async with aclosing(painter.draw("3")) as first, aclosing(painter.draw("4")) as second:
            while not engine.open:
                await anext(first)
            while "waiting for the images of others" not in (shown := await anext(second)).status:
                assert not shown.pictures
            engine.open_gate()
            return [[shown async for shown in views][-1] for views in (first, second)]

    with listening(make) as (address, service):
        lasts = asyncio.run(main(address, service))
    assert [len(last.pictures) for last in lasts] == [1, 1]


def test_drawing_that_nobody_reads_gives_its_place_up(tokenizer):
    engine = ScriptedEngine()

    def make():
        shut(engine)
        return scripted(tokenizer, engine)

    async def main(address, service):
        painter = await Painter.connect(address)
        async with aclosing(painter.draw("3", count=4)) as views:
            while engine.open < 4:
                await anext(views)
        for _ in range(2400):
            if engine.open == service.queued_images == 0:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{engine.open} images are drawn for nobody")

    with listening(make) as (address, service):
        asyncio.run(main(address, service))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"cfg_scale": 1, "top_k": 0, "top_p": 1, "temperature": 1}, "no guidance · top-k all · top-p 1 · temperature 1"),
        ({"cfg_scale": 4.5, "cfg_interval": 6, "top_k": 20}, "guidance 4.5 to step 6 · top-k 20"),
        ({"cfg_scale": 2, "temperature": 0, "top_k": 9}, "guidance 2 · greedy"),
        ({"draw": "cdf", "temperature": 0.5}, "draw cdf · temperature 0.5"),
        ({"control_type": "depth", "control_strength": 0.5, "steps": 0}, "control-type depth · control-strength 0.5"),
        ({}, ""),
    ],
)  # fmt: skip
def test_caption_has_the_settings_that_were_given(settings, said):
    assert words(settings) == said


# Which class is meant


@pytest.mark.parametrize(
    "asked, label",
    [("Cardigan", 264), ("cardigan", 474), ("264: Cardigan", 264), ("474", 474), ("GOLDEN_retriever", 207)],
)
def test_painter_and_server_draw_the_same_class_for_a_name(tokenizer, asked, label):
    engine = ScriptedEngine(num_classes=1000)
    with listening(lambda: scripted(tokenizer, engine)) as (address, _):
        draw(address, asked)

        async def ask(field):
            painter = await Painter.connect(address)
            answer = await painter.client.post("v1/images/generations", json={field: asked})
            assert answer.status_code == 200, answer.text

        for field in ("prompt", "class_name"):
            asyncio.run(ask(field))
    assert [request.conditions["label"] for request in engine.asked] == [label] * 3


# Mistakes


@pytest.mark.parametrize(
    "asked, settings, message",
    [
        (10, {}, "class 10 is out of range"),
        ("horse", {}, "no class is called 'horse'"),
        (None, {}, "no class is chosen"),
        (3, {"count": 0}, f"number of images is 1 to {MOST_IMAGES}, got 0"),
        (3, {"count": 10**6}, "got 1000000"),
        (3, {"temperature": None}, "no value is given for temperature"),
        (3, {"temperature": -1.0}, "temperature is -1"),
        (3, {"top_k": 0.5}, "top_k is 0.5"),
        (3, {"seed": -1}, "seed is -1"),
        (3, {"top_k": 13}, "superstitious"),
    ],
)  # fmt: skip
def test_mistake_is_refused_with_its_reason(scripted_address, asked, settings, message):
    with pytest.raises(ValueError, match=message):
        draw(scripted_address, asked, **settings)


@pytest.fixture(scope="module")
def scripted_address(tokenizer):
    with listening(lambda: scripted(tokenizer)) as (address, _):
        yield address


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_server_is_found_at_its_address_with_or_without_v1(scripted_address, end):
    painter = asyncio.run(Painter.connect(scripted_address + end))
    assert painter.info.name == "small" and painter.info.classes == tuple("0123456789")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "localhost:8000", "http://", "http://no such host"])
def test_address_without_a_server_is_refused(url):
    with pytest.raises(ConnectionError, match="no server answers at"):
        asyncio.run(Painter.connect(url))


def test_other_program_at_the_address_is_refused():
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "gpt-9"}]}')

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ConnectionError, match="is no server of this project"):
            asyncio.run(Painter.connect(f"http://127.0.0.1:{server.server_port}"))
        server.shutdown()


def test_key_of_the_server_is_sent_and_a_wrong_one_refused(tokenizer):
    with listening(lambda: scripted(tokenizer), api_keys=["open"]) as (address, _):
        painter = asyncio.run(Painter.connect(address, "open"))
        assert painter.info.name == "small"
        for key in (None, "", "shut"):
            with pytest.raises(ConnectionError, match="answers 401: "):
                asyncio.run(Painter.connect(address, key))


def test_failing_image_ends_the_drawing_with_the_servers_reason(tokenizer):
    engine = ScriptedEngine()
    engine.error = RuntimeError("it broke")
    with listening(lambda: scripted(tokenizer, engine)) as (address, _), pytest.raises(ValueError, match="it broke"):
        draw(address, "3")


# HTML


def test_status_counts_images_and_escapes_errors():
    assert error_html(ValueError("no <script>")) == "<div class='error' role='alert'>No &lt;script&gt;</div>"
    assert error_html(ValueError()) == "<div class='error' role='alert'>ValueError</div>"
    half = view([Picture(1, b"png", rows=2, of_rows=4), Picture(2)], "3", {}, 1.23)
    assert "value='0.250'" in half.status and "2 images: 25%, 1 s" in half.status and not half.done
    assert "1 image in 9.9 s" in view([Picture(1, b"png", seconds=9)], "3", {}, 9.9).status
