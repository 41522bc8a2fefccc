"""The HTTP interface: what it answers, what it refuses and how, and that nobody waits for what nobody wants."""

import asyncio
import copy
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

import httpx
from pydantic import ValidationError

from autoregressive.models.settings import SamplingConfig
from autoregressive.pipeline import ImagePipeline, load_gpt
from autoregressive.serve import api
from autoregressive.serve.api import IMAGES, create_app
from autoregressive.serve.body import MAX_SEED, ImageBody, Limits, ask, invalid_body
from autoregressive.serve.decoder import GREY, Decoder
from autoregressive.serve.engine import ModelInfo
from autoregressive.serve.errors import REFUSED as REFUSED_ON_PURPOSE
from autoregressive.serve.errors import RequestError
from autoregressive.serve.metrics import JsonLines
from autoregressive.serve.native import NativeEngine
from autoregressive.serve.service import PromptEncoder, Service
from tests.serve.servers import ScriptedEngine, listening, opened, picture, pixels, post, with_client
from tests.serve.small import WORDS, text_pipeline
from tokenizer.load import load_tokenizer

pytestmark = pytest.mark.slow  # through whole scripts and servers


@pytest.fixture(scope="module")
def tokenizer(small_files):
    return load_tokenizer(small_files.vq)


def events(response: httpx.Response) -> list[tuple[str, dict]]:
    """Server-sent events as (name, data)."""
    found = []
    for block in response.text.strip().split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


# What is answered


def test_an_image(tokenizer):
    async def work(client, service):
        response = await post(client, prompt="3", seed=5)
        assert response.status_code == 200 and response.headers["content-type"] == "application/json"
        answer = response.json()
        assert answer["size"] == "32x32" and answer["created"] > 1.7e9
        (image,) = answer["data"]
        assert image["seed"] == 5
        assert np.array_equal(pixels(image), picture(tokenizer, 3, 5))

    with_client(tokenizer, work)


def test_several_images_have_seeds_in_a_row(tokenizer):
    async def work(client, service):
        answer = (await post(client, class_name="4", n=3, seed=MAX_SEED)).json()
        assert answer["usage"] | {"input_tokens": 1, "output_tokens": 192, "total_tokens": 193} == answer["usage"]
        several = answer["data"]
        assert [image["seed"] for image in several] == [MAX_SEED, 0, 1]
        for image in several:
            alone = (await post(client, prompt="4", seed=image["seed"])).json()["data"][0]
            assert alone["b64_json"] == image["b64_json"]
        drawn = {(await post(client, prompt="4")).json()["data"][0]["seed"] for _ in range(3)}
        assert len(drawn) == 3

    with_client(tokenizer, work)


@pytest.mark.parametrize("size, side", [("20x20", 20), ("64X64", 64), ("auto", 32), ("32x32", 32)])
def test_sizes(tokenizer, size, side):
    async def work(client, service):
        response = await post(client, prompt="1", seed=1, size=size)
        assert np.array_equal(pixels(response.json()["data"][0]), picture(tokenizer, 1, 1, side))

    with_client(tokenizer, work)


def test_settings_reach_the_engine(tokenizer):
    async def work(client, service):
        await post(client, prompt="1", guidance_scale=2, cfg_interval=9, temperature=0.5, top_k=7, top_p=0.9)
        await post(client, prompt="1", cfg_scale=3.5, user="someone", quality="auto", output_format="png")
        await post(client, prompt="1", temperature=0, top_p=0, top_k=-1, negative_class=" 7")
        first, second, third = service.engine.asked
        assert first.sampling == SamplingConfig(2, 9, 0.5, 7, 0.9)
        assert second.sampling == SamplingConfig(3.5, -1, 1.0, 2000, 1.0)
        assert third.sampling == SamplingConfig(4.0, -1, 0, -1, 0)
        answer = await post(client, prompt="1", draw="cdf")
        assert (
            service.engine.asked[-1].sampling.draw == answer.json()["draw"] == answer.headers["x-image-draw"] == "cdf"
        )
        assert (await post(client, prompt="1")).json()["draw"] == "race1"
        assert [request.negative for request in (first, second, third)] == [{}, {}, {"label": 7}]

    with_client(tokenizer, work)


@pytest.mark.parametrize(
    "asked, rows",
    [({}, [2, 4, 6]), ({"partial_rows": 3}, [3, 6]), ({"partial_images": 1}, [4]), ({"partial_images": 0}, []),
     ({"partial_images": 2}, [3, 5]), ({"partial_images": 7}, [1, 2, 3, 4, 5, 6, 7])],
)  # fmt: skip
@pytest.mark.parametrize("step", [1, 3, 8])
def test_stream_of_any_speed_has_the_partial_images_that_were_asked_for(tokenizer, asked, rows, step):
    """step: rows that come at once."""
    engine = ScriptedEngine()

    async def by_rows(request):
        for count in [*range(step, 8, step), 8]:
            yield engine.tokens(request)[: 8 * count]

    engine.generate = by_rows

    async def work(client, service):
        response = await post(client, prompt="2", seed=3, stream=True, **asked)
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no" and response.headers["cache-control"] == "no-store"
        *partial, (last, whole) = events(response)
        assert last == whole["type"] == "image_generation.completed"
        assert np.array_equal(pixels(whole), picture(tokenizer, 2, 3))
        assert [data["rows"] for _, data in partial] == rows
        for i, (name, data) in enumerate(partial):
            assert name == data["type"] == "image_generation.partial_image" and data["partial_image_index"] == i
            assert (pixels(data)[4 * data["rows"] :] == GREY).all() and pixels(data)[: 4 * data["rows"]].std() > 1

    with_client(tokenizer, work, engine)


@pytest.mark.parametrize("rows", [2, 4, 6, 16, 24, 32])
def test_ask_partial_images_are_as_many_as_asked_and_evenly_spaced(rows):
    info = ModelInfo("small", "c2i", 16 * rows, rows * rows, 10, raster=True, classes=tuple("0123456789"))
    for count in range(rows):
        partial = ask(ImageBody(prompt="1", stream=True, partial_images=count), info, Limits()).partial
        assert len(partial) == count
        gaps = np.diff([0, *partial, rows])
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    with pytest.raises(RequestError, match=f"at most {rows - 1}"):
        ask(ImageBody(prompt="1", stream=True, partial_images=rows), info, Limits())


def test_stream_of_several_images_has_all_events_of_each(tokenizer):
    async def work(client, service):
        response = await post(client, prompt="2", seed=3, stream=True, n=3, partial_images=2)
        assert response.headers["x-image-seed"] == "3,4,5"
        for i in range(3):
            mine = [data for _, data in events(response) if data["image_index"] == i]
            assert [data.get("partial_image_index") for data in mine] == [0, 1, None]
            assert {data["seed"] for data in mine} == {3 + i}
            assert np.array_equal(pixels(mine[-1]), picture(tokenizer, 2, 3 + i))
            assert mine[-1]["usage"]["output_tokens"] == 64

    with_client(tokenizer, work)


def test_stream_that_waits_is_kept_alive_by_comments(tokenizer, monkeypatch):
    monkeypatch.setattr(api, "SECONDS_BETWEEN_EVENTS", 0.02)
    engine, told = ScriptedEngine(), api.events

    async def until_a_comment(*args):
        async for event in told(*args):
            if event.startswith(b":"):
                engine.gate.set()
            yield event

    monkeypatch.setattr(api, "events", until_a_comment)

    async def work(client, service):
        engine.gate = asyncio.Event()
        response = await post(client, prompt="2", seed=3, stream=True)
        assert response.text.startswith(": still drawing\n\n") and len(events(response)) == 4

    with_client(tokenizer, work, engine)


def test_stream_in_another_order_shows_tokens_where_they_stand(tokenizer):
    async def work(client, service):
        *partial, (name, whole) = events(await post(client, prompt="2", seed=3, stream=True))
        assert name == "image_generation.completed" and np.array_equal(pixels(whole), picture(tokenizer, 2, 3))
        assert [data["rows"] for _, data in partial] == [2, 4, 6]
        for _, data in partial:
            grey = (pixels(data) == GREY).all(axis=(1, 2))  # what was drawn by the time it was decoded is shown too
            assert grey.sum() <= 32 - 4 * data["rows"] and grey[: grey.sum()].all()
        assert b"\nimage_tokens_total" in service.metrics.text()

    with_client(tokenizer, work, ScriptedEngine(raster=False))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_output_format_is_the_files_kind_in_every_way_of_answering(tokenizer, kind):
    async def work(client, service):
        told = {"prompt": "2", "seed": 3, "output_format": kind}
        answer = (await post(client, **told)).json()
        stream = events(await post(client, **told, stream=True))
        raw = [
            await post(client, headers={"Accept": f"image/{kind}"}, prompt="2", seed=3),
            await post(client, prompt="2", seed=3, response_format=kind),
        ]
        assert {response.headers["content-type"] for response in raw} == {f"image/{kind}"}
        assert {response.headers["x-image-seed"] for response in raw} == {"3"}
        assert answer["output_format"] == kind and {data["output_format"] for _, data in stream} == {kind}
        files = [answer["data"][0], stream[-1][1], *(response.content for response in raw)]
        for file in files:
            assert opened(file).format == kind.upper()
            assert np.abs(pixels(file).astype(int) - picture(tokenizer, 2, 3)).mean() < 30  # chance: 70
        if kind != "png":
            small = (await post(client, **told, output_compression=1)).json()["data"][0]["b64_json"]
            assert len(small) < len(answer["data"][0]["b64_json"])

    with_client(tokenizer, work)


def test_models_and_health(tokenizer):
    async def work(client, service):
        (model,) = (await client.get("/v1/models")).json()["data"]
        assert model["id"] == "small" and model["object"] == "model" and model["num_classes"] == 10
        assert model["classes"] == [str(label) for label in range(10)]
        assert (await client.get("/v1/models/small")).json() == model
        for name in ("other", "../../etc/passwd", "a/b"):
            response = await client.get(f"/v1/models/{name.replace('.', '%2E')}")
            assert response.status_code == 404 and "error" in response.json(), name
        response = await client.get("/health")
        assert response.status_code == 200 and response.json()["status"] == "ok"

    with_client(tokenizer, work)


def test_model_under_several_names_answers_to_each(tokenizer):
    async def work(client, service):
        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == [
            "small",
            "gpt-image-1",
            "b/c",
        ]
        for name in ("small", "gpt-image-1", "b/c"):
            assert (await post(client, prompt="1", model=name)).status_code == 200
            assert (await client.get(f"/v1/models/{name}")).json()["id"] == name
        assert "has 'small' and 'gpt-image-1'" in (await post(client, prompt="1", model="x")).json()["error"]["message"]

    with_client(tokenizer, work, aliases=["gpt-image-1", "small", "b/c"])


def test_engine_that_draws_no_token_for_long_is_unhealthy_until_it_does(tokenizer, monkeypatch):
    engine, now = ScriptedEngine(), 100.0
    monkeypatch.setattr("autoregressive.serve.service.time", SimpleNamespace(monotonic=lambda: now))

    async def told(client, status, up):
        health = await client.get("/health")
        assert health.status_code == status, health.text
        text = (await client.get("/metrics")).text
        assert f'engine_up{{model="small"}} {up}' in text and "engine_token_age_seconds" in text
        return health.json()["token_age"]

    async def work(client, service):
        nonlocal now
        assert await told(client, 200, 1.0) is None
        engine.gate, engine.rows_before = asyncio.Event(), 3
        drawing = asyncio.create_task(post(client, prompt="1"))
        while service.metrics.tokens._value.get() < 24:
            await asyncio.sleep(0.01)
        now += 0.25
        assert await told(client, 200, 1.0) == 0.25
        now += 0.25
        assert await told(client, 503, 0.0) == 0.5
        engine.gate.set()
        assert (await drawing).status_code == 200
        assert await told(client, 200, 1.0) is None

    with_client(tokenizer, work, engine, stall=0.3)


@pytest.mark.parametrize("rows", [0, 3])
def test_one_hung_engine_among_several_is_noticed(tokenizer, rows):
    """Images of one label hang, before or after their first token, and the others are drawn."""
    engine = ScriptedEngine()
    draw, gate = engine.generate, asyncio.Event()

    async def generate(request):
        async for tokens in draw(request):
            if request.conditions["label"] == 9 and len(tokens) > 8 * rows:
                await gate.wait()
            yield tokens

    engine.generate = generate

    async def work(client, service):
        hung = asyncio.create_task(post(client, prompt="9"))
        await asyncio.sleep(0.05)
        for _ in range(6):
            assert (await post(client, prompt="1")).status_code == 200
            await asyncio.sleep(0.1)
        health = await client.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "the engine hangs"
        gate.set()
        assert (await hung).status_code == 200 and (await client.get("/health")).status_code == 200

    with_client(tokenizer, work, engine, stall=0.4)


def test_imagenet_names(tokenizer):
    async def work(client, service):
        for asked in (
            {"prompt": "golden retriever"},
            {"class_name": " Golden  RETRIEVER"},
            {"class_label": 207},
            {"prompt": "207"},
        ):
            assert (await post(client, seed=1, **asked)).status_code == 200
        assert [request.conditions["label"] for request in service.engine.asked] == [207] * 4
        error = (await post(client, prompt="golden retreiver")).json()["error"]
        assert "close to it: 207: golden retriever" in error["message"] and error["param"] == "prompt"
        error = (await post(client, class_name="a photo of a lesser panda in snow")).json()["error"]
        assert "close to it: 387: lesser panda" in error["message"] and error["param"] == "class_name"
        assert (await post(client, prompt="1000")).json()["error"]["code"] == "unknown_class"

    with_client(tokenizer, work, ScriptedEngine(num_classes=1000))


# What is refused

MEGABYTE = "x" * 10**6
REFUSED = [
    ({"class_label": 10}, 400, "class 10 is out of range: the model has classes 0 to 9", "class_label"),
    ({"class_label": -1}, 400, "class_label is -1", "class_label"),
    ({"class_label": 1.5}, 400, "class_label is 1.5", "class_label"),
    ({"class_label": True}, 400, "class_label is true", "class_label"),
    ({"class_label": 10**30}, 400, "class_label", "class_label"),
    ({"prompt": "10"}, 400, "class 10 is out of range: the model has classes 0 to 9", "prompt"),
    ({"prompt": "a red lantern"}, 400, "no class is called 'a red lantern'", "prompt"),
    ({"prompt": "\x00"}, 400, "no class is called", "prompt"),
    ({"class_name": "seven"}, 400, "no class is called 'seven'", "class_name"),
    ({}, 400, "got none", "class_label"),
    ({"prompt": "  "}, 400, "got none", "class_label"),
    ({"prompt": "1", "class_label": 1}, 400, "got prompt and class_label", "prompt"),
    ({"prompt": 3}, 400, "prompt is 3", "prompt"),
    ({"prompt": "x" * 5000}, 400, "prompt has 5,000 characters: at most 4,000", "prompt"),
    ({"prompt": "1", "n": 0}, 400, "n is 0", "n"),
    ({"prompt": "1", "n": 10_000}, 400, "n is 10000: a request has at most 8 images", "n"),
    ({"prompt": "1", "n": "2"}, 400, "n is \"2\"", "n"),
    ({"prompt": "1", "guidance_scale": 1e9}, 400, "guidance_scale is 1000000000.0", "guidance_scale"),
    ({"prompt": "1", "cfg_scale": -1}, 400, "cfg_scale is -1", "cfg_scale"),
    ({"prompt": "1", "cfg_scale": 2, "guidance_scale": 3}, 400, "one setting", "guidance_scale"),
    ({"prompt": "1", "temperature": -0.1}, 400, "temperature is -0.1", "temperature"),
    ({"prompt": "1", "top_p": -0.1}, 400, "top_p is -0.1", "top_p"),
    ({"prompt": "1", "top_k": -2}, 400, "top_k is -2", "top_k"),
    ({"prompt": "1", "draw": "dice"}, 400, "draw is \"dice\": it should be 'race1' or 'cdf'", "draw"),
    ({"prompt": "1", "top_k": 13}, 400, "superstitious", None),
    ({"prompt": "1", "seed": -1}, 400, "seed is -1", "seed"),
    ({"prompt": "1", "seed": 2**63}, 400, "seed is", "seed"),
    ({"prompt": "1", "size": "32x64"}, 400, "images are square", "size"),
    ({"prompt": "1", "size": "large"}, 400, "size is \"large\"", "size"),
    ({"prompt": "1", "size": "0x0"}, 400, "images are square", "size"),
    ({"prompt": "1", "size": "9999x9999"}, 400, "images are square", "size"),
    ({"prompt": "1", "size": "²x²"}, 400, "write it as", "size"),
    ({"prompt": "1", "size": "129x129"}, 400, "resized to 1 to 128", "size"),
    ({"prompt": "1", "response_format": "url"}, 400, "no pictures are kept", "response_format"),
    ({"prompt": "1", "response_format": "bmp"}, 400, "it should be 'b64_json', 'png', 'jpeg' or 'webp'", "response_format"),
    ({"prompt": "1", "response_format": "png", "n": 2}, 400, "the file itself has one image", "n"),
    ({"prompt": "1", "response_format": "png", "output_format": "webp"}, 400, "give one of the two", "output_format"),
    ({"prompt": "1", "output_format": "svg"}, 400, "the model draws pixels", "output_format"),
    ({"prompt": "1", "output_compression": 101}, 400, "output_compression is 101", "output_compression"),
    ({"prompt": "1", "output_compression": 50}, 400, "of jpeg and webp", "output_compression"),
    ({"prompt": "1", "background": "transparent"}, 400, "opaque", "background"),
    ({"prompt": "1", "svg": {"model": "x"}}, 400, "the model draws pixels", "svg"),
    ({"prompt": "1", "negative_class": 10}, 400, "class 10 is out of range", "negative_class"),
    ({"prompt": "1", "negative_class": "nil"}, 400, "no class is called", "negative_class"),
    ({"prompt": "1", "negative_class": 1.5}, 400, "negative_class is 1.5", "negative_class"),
    ({"prompt": "1", "negative_class": 2, "cfg_scale": 1}, 400, "no effect without guidance", "negative_class"),
    ({"prompt": "1", "negative_prompt": "2"}, 400, "give negative_class", "negative_prompt"),
    ({"prompt": "1", "stream": True, "partial_images": 8}, 400, "at most 7", "partial_images"),
    ({"prompt": "1", "stream": True, "response_format": "png"}, 400, "base64", "stream"),
    ({"prompt": "1", "stream": "yes"}, 400, "stream is \"yes\"", "stream"),
    ({"prompt": "1", "partial_rows": 2}, 400, "give stream too", "partial_rows"),
    ({"prompt": "1", "stream": True, "partial_rows": 2, "partial_images": 1}, 400, "give one", "partial_rows"),
    ({"prompt": "1", "guidance": 2}, 400, "did you mean guidance_scale?", "guidance"),
    ({"prompt": "1", "\ud800": 2}, 400, "unknown parameter", "\ud800"),
    ({"prompt": "1", "model": "dall-e-3"}, 404, "this server has 'small'", "model"),
    ({"prompt": "1", "model": "../../../etc/passwd"}, 404, "there is no model", "model"),
    ({"prompt": "1", "model": "/tmp/model.pt"}, 404, "there is no model", "model"),
    ({"prompt": MEGABYTE}, 413, "more than the 65,536 bytes", None),
]  # fmt: skip


def test_bad_requests_and_the_next_one(tokenizer):
    async def work(client, service):
        for body, status, message, param in REFUSED:
            response = await client.post(IMAGES, content=json.dumps(body), headers={"content-type": "application/json"})
            shown = str(body)[:100]
            assert response.status_code == status, (shown, response.text)
            error = response.json()["error"]
            assert message in error["message"], (shown, error)
            assert error["param"] == param and error["type"] == "invalid_request_error", (shown, error)
            assert len(error["message"]) < 800
        assert service.idle
        assert (await post(client, prompt="1")).status_code == 200

    with_client(tokenizer, work)


@pytest.mark.parametrize(
    "content, kind, status, message",
    [
        (b'{"prompt": "1", "cfg_scale": NaN}', "application/json", 400, "cfg_scale is NaN: it should be a finite number"),
        (b'{"prompt": "1", "cfg_scale": 1e999}', "application/json", 400, "cfg_scale is Infinity"),
        (b'{"prompt": ', "application/json", 400, "the body is not JSON"),
        (b"", "application/json", 400, "a JSON object, not nothing"),
        (b"\xff\xfe", "application/json", 400, "the body is not JSON"),
        (b"[" * 60_000, "application/json", 400, "error parsing the body"),
        (b'{"n": ' + b"9" * 5000 + b"}", "application/json", 400, "error parsing the body"),
        (b'["prompt"]', "application/json", 400, "a JSON object, not a list"),
        (b'"prompt"', "application/json", 400, "a JSON object"),
        (b"null", "application/json", 400, "the body is a JSON object, not n"),
        (b'{"prompt": "\\ud800"}', "application/json", 400, "half of a surrogate pair"),
        (b"prompt=1", "application/x-www-form-urlencoded", 415, "send application/json"),
        (b'{"prompt": "1"}', "text/plain", 415, "send application/json"),
        (b'{"prompt": "1"}', "", 415, "not told"),
    ],
)  # fmt: skip
def test_bodies_that_are_none(tokenizer, content, kind, status, message):
    async def work(client, service):
        response = await client.post(IMAGES, content=content, headers={"content-type": kind})
        assert response.status_code == status and message in response.json()["error"]["message"], response.text
        assert (await post(client, prompt="1")).status_code == 200

    with_client(tokenizer, work)


def test_a_body_in_chunks_is_measured_too(tokenizer):
    async def work(client, service):
        async def chunks():
            for _ in range(100):
                yield b" " * 1000

        response = await client.post(IMAGES, content=chunks(), headers={"content-type": "application/json"})
        assert response.status_code == 413

    with_client(tokenizer, work)


def test_a_body_that_does_not_come(tokenizer, monkeypatch):
    monkeypatch.setattr("autoregressive.serve.api.SECONDS_TO_SEND_A_BODY", 0.05)

    async def work(client, service):
        async def never():
            yield b"{"
            await asyncio.sleep(60)

        response = await client.post(IMAGES, content=never(), headers={"content-type": "application/json"})
        assert response.status_code == 408

    with_client(tokenizer, work)


def test_other_places_and_methods(tokenizer):
    async def work(client, service):
        for method, path, status in (
            ("GET", "/v1/images", 404),
            ("GET", IMAGES, 405),
            ("DELETE", "/v1/models", 405),
            ("POST", IMAGES + "/", 404),
            ("GET", "/v1/%00%ff", 404),
        ):
            response = await client.request(method, path)
            assert response.status_code == status and response.json()["error"]["message"], path
        assert (await client.get(IMAGES)).headers["allow"] == "POST"

    with_client(tokenizer, work)


def test_api_key(tokenizer):
    async def work(client, service):
        for header in (
            {},
            {"Authorization": "Bearer other"},
            {"Authorization": "Basic s3cret"},
            {"Authorization": b"Bearer \xe9"},
        ):
            for response in (
                await post(client, prompt="1", headers=header),
                await client.get("/v1/models", headers=header),
            ):
                error = response.json()["error"]
                assert response.status_code == 401 and error["code"] == "invalid_api_key", header
                assert error["type"] == "authentication_error" and "s3cret" not in response.text
        right = {"Authorization": "Bearer s3cret"}
        assert (await post(client, prompt="1", headers=right)).status_code == 200
        assert (await client.get("/health")).status_code == (await client.get("/metrics")).status_code == 200

    with_client(tokenizer, work, app={"api_keys": ["other1", "s3cret"]})


# The queue, time, and clients that go


def test_a_full_queue(tokenizer):
    engine = ScriptedEngine()

    async def work(client, service):
        engine.gate = asyncio.Event()
        accepted = [asyncio.create_task(post(client, prompt="1", n=2, seed=i)) for i in range(2)]
        while engine.open < 4:
            await asyncio.sleep(0.01)
        refused = await post(client, prompt="1")
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        error = refused.json()["error"]
        assert (
            error["type"] == "rate_limit_error" and error["code"] == "queue_full" and "room for 4" in error["message"]
        )
        assert (await post(client, prompt="1", stream=True)).status_code == 429
        engine.gate.set()
        assert [response.status_code for response in await asyncio.gather(*accepted)] == [200, 200]
        assert (await post(client, prompt="1")).status_code == 200

    with_client(tokenizer, work, engine, max_queue=4, max_n=4)


def test_timeouts(tokenizer):
    engine = ScriptedEngine()

    async def work(client, service):
        engine.gate = asyncio.Event()
        response = await post(client, prompt="1", n=3)
        assert response.status_code == 504 and "within 0.1 s" in response.json()["error"]["message"]
        assert engine.open == 0 and service.idle
        ((name, data),) = events(await post(client, prompt="1", stream=True))
        assert name == "error" and data["error"]["code"] == "timeout"
        assert engine.open == 0 and service.idle
        service.limits = Limits()
        engine.gate.set()
        assert (await post(client, prompt="1")).status_code == 200

    with_client(tokenizer, work, engine, timeout=0.1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("rows", [0, 3])
def test_a_client_that_hangs_up(tokenizer, stream, rows, caplog):
    """Its tokens are no longer computed, and its place is free."""
    engine = ScriptedEngine()

    async def work(client, service):
        engine.gate, engine.rows_before = asyncio.Event(), rows
        hung_up, sent = asyncio.Event(), []
        body = json.dumps({"prompt": "1", "n": 1 if stream else 2, "stream": stream}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await hung_up.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http", "method": "POST", "path": IMAGES, "raw_path": IMAGES.encode(), "query_string": b"",
            "headers": headers, "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "scheme": "http", "server": ("server", 80), "client": ("client", 1), "root_path": "",
        }  # fmt: skip
        asking = asyncio.create_task(create_app(service)(scope, receive, send))
        while engine.open < (1 if stream else 2):
            await asyncio.sleep(0.01)
        hung_up.set()
        await asyncio.wait_for(asking, 120)
        assert engine.open == 0 and service.idle and service.queued_images == 0
        assert stream or not sent
        assert b'image_requests_total{model="small",status="499"} 1.0' in service.metrics.text()
        for gauge in (b'image_queue_length{model="small"} 0.0', b'images_in_flight{model="small"} 0.0'):
            assert gauge in service.metrics.text()
        engine.gate.set()
        assert (await post(client, prompt="1")).status_code == 200

    with_client(tokenizer, work, engine, max_queue=2, max_n=2)


def test_shutting_down(tokenizer):
    engine = ScriptedEngine()

    async def work(client, service):
        engine.gate = asyncio.Event()
        accepted = asyncio.create_task(post(client, prompt="3", seed=1))
        while not engine.open:
            await asyncio.sleep(0.01)
        service.draining = True
        refused = await post(client, prompt="1")
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert refused.headers["retry-after"]
        health = await client.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "shutting down" and not service.idle
        engine.gate.set()
        assert np.array_equal(pixels((await accepted).json()["data"][0]), picture(tokenizer, 3, 1))
        assert service.idle

    with_client(tokenizer, work, engine)


def test_an_engine_that_fails(tokenizer):
    engine = ScriptedEngine()

    async def work(client, service):
        engine.error = RuntimeError("the cable is out")
        response = await post(client, prompt="1", n=4)
        error = response.json()["error"]
        assert response.status_code == 503 and error["message"] == "the engine failed: the cable is out"
        assert error["type"] == "server_error" and engine.open == 0 and service.idle
        ((name, data),) = events(await post(client, prompt="1", stream=True))
        assert name == "error" and data["error"]["code"] == "engine_failed"
        assert (await client.get("/health")).status_code == 200
        engine.error = None
        assert (await post(client, prompt="1")).status_code == 200
        engine.dead = True
        health = await client.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "the engine has died"

    with_client(tokenizer, work, engine)


def test_server_with_an_image_that_is_not_finite_answers_500_and_goes_on(tokenizer, small_files):
    gpt = load_gpt(small_files.gpt)
    gpt.cls_embedding.embedding_table.weight.data[3] = float("nan")
    tokenizer = copy.deepcopy(tokenizer)
    pipeline = ImagePipeline(gpt, tokenizer)

    async def work(client, service):
        both = await asyncio.gather(post(client, class_label=3), post(client, class_label=1, seed=5))
        assert [response.status_code for response in both] == [500, 200]
        error = both[0].json()["error"]
        assert error["code"] == "not_finite" and "decode step 1 on, in float32" in error["message"]
        expected = pipeline([1], seed=5, cfg_scale=4.0, top_k=2000, progress=False)[0]
        assert np.array_equal(pixels(both[1].json()["data"][0]), expected)
        ((name, data),) = events(await post(client, class_label=3, stream=True, partial_images=0))
        assert name == "error" and data["error"]["code"] == "not_finite"
        tokenizer.decoder.conv_out.bias.data[0] = float("nan")
        response = await post(client, class_label=1)
        assert response.status_code == 500 and "pixels" in response.json()["error"]["message"]
        assert (await client.get("/health")).status_code == 200

    with_client(tokenizer, work, NativeEngine(pipeline, gather=0.2))


def test_what_nobody_thought_of(tokenizer, caplog):
    engine = ScriptedEngine()

    async def work(client, service):
        engine.error = ZeroDivisionError("a secret")
        response = await post(client, prompt="1")
        assert response.status_code == 500 and "secret" not in response.text and response.json()["error"]
        ((name, data),) = events(await post(client, prompt="1", stream=True))
        assert name == "error" and "secret" not in str(data)
        engine.error = None
        assert service.idle and (await post(client, prompt="1")).status_code == 200

    with_client(tokenizer, work, engine)
    assert "ZeroDivisionError" in caplog.text


# Metrics and the log


def test_metrics(tokenizer):
    async def work(client, service):
        for body in ({"prompt": "1", "n": 2}, {"prompt": "2", "stream": True}, {"prompt": "11"}):
            await post(client, **body)
        text = (await client.get("/metrics")).text
        for line in (
            'image_requests_total{model="small",status="200"} 2.0',
            'image_requests_total{model="small",status="400"} 1.0',
            'image_request_seconds_count{model="small"} 2.0',
            'image_waiting_seconds_count{model="small"} 3.0',
            'image_first_row_seconds_count{model="small"} 3.0',
            'image_drawing_seconds_count{model="small"} 3.0',
            'images_total{model="small"} 3.0',
            'image_tokens_total{model="small"} 192.0',
            'image_queue_length{model="small"} 0.0',
            'images_in_flight{model="small"} 0.0',
            'engine_up{model="small"} 1.0',
        ):
            assert line in text, text
        assert "_created" not in text

    with_client(tokenizer, work)


def test_log_lines(tokenizer, caplog):
    async def work(client, service):
        with caplog.at_level(logging.INFO):
            response = await post(client, prompt="1", seed=4, n=2)
        (record,) = [r for r in caplog.records if r.getMessage() == "answered"]
        line = json.loads(JsonLines().format(record))
        assert line["id"] == response.headers["x-request-id"] and line["status"] == 200 and line["seconds"] > 0
        assert (line["path"], line["seed"], line["n"], line["label"]) == (IMAGES, 4, 2, 1)

    with_client(tokenizer, work)


# Prompts


def text_server(tokenizer, work, **limits):
    pipeline = text_pipeline(tokenizer)
    engine = None

    async def with_engine():
        nonlocal engine
        engine = NativeEngine(pipeline, "words")
        encoder = PromptEncoder(pipeline.encode, pipeline.t5_tokens, engine.thread, keep=2)
        service = Service(engine, Decoder(tokenizer, 8), encoder, Limits(**limits))
        transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            try:
                await work(client, service, pipeline.text_encoder.calls)
            finally:
                await service.close()

    asyncio.run(with_engine())
    return pipeline


def test_prompts_draw_what_the_pipeline_draws_and_are_encoded_once(tokenizer):
    prompts = ["a red lantern", "rain", "a red lantern", "two cats"]
    bodies = [{"prompt": prompt, "seed": i, "guidance_scale": 3.0} for i, prompt in enumerate(prompts)]
    bodies[2]["negative_prompt"] = "rain"
    answers = []

    async def work(client, service, calls):
        answers.extend(await asyncio.gather(*(post(client, **body) for body in bodies)))
        assert {text for (text,) in calls} == {*prompts} and len(calls) < 5
        encoded = len(calls)
        await post(client, prompt=calls[-1][0], n=2)
        assert len(calls) == encoded
        refused = (await post(client, prompt="rain", negative_class=1)).json()["error"]
        assert refused["param"] == "negative_class" and "give negative_prompt" in refused["message"]

    pipeline = text_server(tokenizer, work)
    for body, response in zip(bodies, answers, strict=True):
        assert response.status_code == 200, response.text
        settings = {"negative_prompts": body.get("negative_prompt"), "cfg_scale": 3.0, "top_k": 1000}
        (expected,) = pipeline([body["prompt"]], seed=body["seed"], progress=False, **settings)
        assert np.array_equal(pixels(response.json()["data"][0]), np.asarray(expected)), body


def test_prompts_that_are_refused(tokenizer):
    async def work(client, service, calls):
        for body, message, param in (
            ({"prompt": " "}, "prompt is blank", "prompt"),
            ({}, "prompt is blank", "prompt"),
            ({"prompt": "a", "class_label": 1}, "give prompt, not class_label", "class_label"),
            ({"class_name": "tench"}, "give prompt, not class_name", "class_name"),
            ({"prompt": "word " * 900}, "prompt has 4,500 characters", "prompt"),
        ):
            response = await post(client, **body)
            error = response.json()["error"]
            assert response.status_code == 400 and message in error["message"] and error["param"] == param, error
        negative = (await post(client, prompt="a", negative_prompt=" ")).json()["error"]
        assert negative["param"] == "negative_prompt" and "blank" in negative["message"]

    text_server(tokenizer, work)


@pytest.mark.filterwarnings("ignore:.*fill all")
def test_prompt_longer_than_the_encoder_reads_is_answered_with_a_warning(tokenizer):
    async def work(client, service, calls):
        answer = (await post(client, prompt="word " * 300)).json()
        (warning,) = answer["warnings"]
        assert f"all {WORDS} text tokens" in warning and answer["usage"]["input_tokens"] == WORDS
        raw = await post(client, prompt="word " * 300, response_format="png")
        assert raw.headers["x-warning"] == warning
        assert events(await post(client, prompt="word " * 300, stream=True))[-1][1]["warnings"] == [warning]
        assert (await post(client, prompt="a word")).json()["warnings"] == []

    text_server(tokenizer, work)


# On a port


@pytest.fixture(scope="module")
def live(small_files, tokenizer):
    """A native server: (address, pipeline). The pipeline is the engine's while it draws."""
    gpt = load_gpt(small_files.gpt, image_size=32, downsample_size=4)
    pipeline = ImagePipeline(gpt, tokenizer, batch_size=4)
    with listening(lambda: Service(NativeEngine(pipeline, "small"), Decoder(tokenizer, 8))) as (address, _):
        yield (
            address,
            ImagePipeline(load_gpt(small_files.gpt, image_size=32, downsample_size=4), load_tokenizer(small_files.vq)),
        )


def test_the_openai_client(live):
    openai = pytest.importorskip("openai")
    address, pipeline = live
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        answer = client.images.generate(
            model="small",
            prompt="3",
            n=2,
            size="32x32",
            response_format="b64_json",
            extra_body={"seed": 5, "guidance_scale": 2},
        )
        for i, image in enumerate(answer.data):
            expected = pipeline([3], seed=5 + i, cfg_scale=2.0, top_k=2000, progress=False)[0]
            assert np.array_equal(pixels({"b64_json": image.b64_json}), np.asarray(expected))
        assert answer.size == "32x32"
        *partial, whole = client.images.generate(prompt="3", stream=True, partial_images=2, extra_body={"seed": 5})
        assert whole.type == "image_generation.completed" and len(partial) == 2 and whole.usage.output_tokens == 64
        assert all(event.type == "image_generation.partial_image" for event in partial)
        expected = pipeline([3], seed=5, cfg_scale=4.0, top_k=2000, progress=False)[0]
        assert np.array_equal(pixels({"b64_json": whole.b64_json}), np.asarray(expected))
        assert [model.id for model in client.models.list()] == ["small"]
        assert client.models.retrieve("small").owned_by == "local"
        with pytest.raises(openai.BadRequestError, match="classes 0 to 9") as caught:
            client.images.generate(prompt="10")
        assert caught.value.param == "prompt" and caught.value.code == "unknown_class"
        with pytest.raises(openai.NotFoundError, match="this server has 'small'"):
            client.images.generate(prompt="1", model="gpt-image-1")


def test_openai_options_are_all_taken_or_refused_on_purpose():
    params = pytest.importorskip("openai.types.image_generate_params")
    options = set(params.ImageGenerateParamsBase.__annotations__) | {"stream"}
    assert options <= {*ImageBody.model_fields, *REFUSED_ON_PURPOSE}
    for what in REFUSED_ON_PURPOSE:
        field, _, value = what.partition(": ")
        if field.startswith("/"):
            continue
        with pytest.raises(ValidationError) as caught:
            ImageBody.model_validate({"prompt": "1", field: value or "x"})
        (first, *_) = caught.value.errors()
        assert REFUSED_ON_PURPOSE[what] in invalid_body({**first, "loc": ("body", *first["loc"])}).message


def test_nothing_in_the_documented_interface_breaks_it(tokenizer):
    """Requests made up from the server's own OpenAPI description: none is answered with a 5xx, or otherwise than described."""
    schemathesis = pytest.importorskip("schemathesis")
    from schemathesis import checks

    conforming = [checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance]
    conforming.append(checks.response_schema_conformance)
    hypothesis = pytest.importorskip("hypothesis")
    seen = []

    with listening(lambda: Service(ScriptedEngine(), Decoder(tokenizer, 8), limits=Limits(max_n=2))) as (address, _):
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        positive, negative = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
        operations = {operation.path: operation for operation in (found.ok() for found in schema.get_all_operations())}
        assert set(operations) >= {IMAGES, "/v1/models", "/v1/models/{name}", "/health", "/metrics"}
        # What is made up is hardly ever a class: once it is given one, so that the other fields are acted on.
        runs = [(IMAGES, positive, True, 40), (IMAGES, positive, False, 20), (IMAGES, negative, False, 50)]
        runs += [(path, positive, False, 10) for path in operations if path != IMAGES]

        def ask_all(path, mode, with_class, count):
            @hypothesis.given(case=operations[path].as_strategy(generation_mode=mode))
            @hypothesis.settings(
                max_examples=count,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            def ask(case):
                if with_class:
                    left_out = ("class_label", "class_name", "model")
                    case.body = {name: value for name, value in case.body.items() if name not in left_out}
                    case.body["prompt"] = "3"
                response = case.call(timeout=120)
                seen.append((case.path, response.status_code))
                case.validate_response(response, checks=conforming)

            ask()

        for run in runs:
            ask_all(*run)
        assert {(IMAGES, 200), (IMAGES, 400), ("/health", 200)} <= set(seen)
        assert httpx.post(f"{address}{IMAGES}", json={"prompt": "1"}, timeout=120).status_code == 200
