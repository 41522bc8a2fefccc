"""Edits over HTTP: the pictures of ImagePipeline.edit, what is no picture and no hole, and others who wait meanwhile."""

import asyncio
import io

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from PIL import Image

from autoregressive.pipeline import ImagePipeline, load_gpt
from autoregressive.serve.api import EDITS
from autoregressive.serve.decoder import Decoder
from autoregressive.serve.native import NativeEngine
from autoregressive.serve.service import Service
from tests.serve.servers import listening, opened, pixels, post, with_client
from tokenizer.load import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:the effective sample size")]

HOLE = (8, 4, 20, 16)


@pytest.fixture(scope="module")
def tokenizer(small_files):
    return load_tokenizer(small_files.vq)


def pipeline_of(small_files, tokenizer) -> ImagePipeline:
    return ImagePipeline(load_gpt(small_files.gpt, image_size=32, downsample_size=4), tokenizer, batch_size=4)


@pytest.fixture
def pipeline(small_files, tokenizer):
    return pipeline_of(small_files, tokenizer)


@pytest.fixture(scope="module")
def drawn(small_files, tokenizer) -> Image.Image:
    return pipeline_of(small_files, tokenizer)([4], seed=3, progress=False)[0]


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    mask = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), HOLE)
    return mask


def file(image: Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


async def edit(client, image=None, mask=None, headers=None, **fields):
    pictures = {"image": image, "mask": mask}
    files = {
        name: (f"{name}.png", value if isinstance(value, bytes) else file(value), "image/png")
        for name, value in pictures.items()
        if value is not None
    }
    return await client.post(EDITS, data=fields, files=files, headers=headers)


def test_edits_are_those_of_the_pipeline(tokenizer, pipeline, drawn, mask, small_files):
    async def work(client, service):
        response = await edit(
            client, drawn, mask, prompt="2", n="2", seed="5", particles="3", guidance_scale="2", top_k="0"
        )
        assert response.status_code == 200, response.text
        told = response.json()
        assert told["usage"]["output_tokens"] == 128 and response.headers["x-image-seed"] == "5,6"
        other = pipeline_of(small_files, tokenizer)
        for i, image in enumerate(told["data"]):
            settings = {"seed": 5 + i, "particles": 3, "cfg_scale": 2.0}
            assert np.array_equal(pixels(image), np.asarray(other.edit(drawn, mask, 2, **settings)[0]))
        assert service.queued_images == 0 and service.idle

    with_client(tokenizer, work, NativeEngine(pipeline, "small"))


def test_edit_takes_the_image_s_own_transparency_and_answers_with_a_file(tokenizer, pipeline, drawn, mask):
    own = drawn.convert("RGBA")
    own.putalpha(mask.getchannel("A"))

    async def work(client, service):
        fields = {"class_label": 2, "seed": 1, "particles": 2}
        by_mask = await edit(client, drawn, mask, **fields)
        raw = await edit(client, own, headers={"Accept": "image/webp"}, size="64x64", **fields)
        assert raw.headers["content-type"] == "image/webp" and opened(raw.content).size == (64, 64)
        same = await edit(client, own, **fields)
        assert same.json()["data"] == by_mask.json()["data"]
        whole = await edit(client, drawn, Image.new("RGBA", (32, 32)), **fields)  # all of it is transparent
        ordinary = await post(client, class_label=2, seed=1)
        assert whole.json()["data"] == ordinary.json()["data"]

    with_client(tokenizer, work, NativeEngine(pipeline, "small"))


def test_edit_of_one_particle_s_luck_is_told_as_a_warning(tokenizer, pipeline, drawn, mask):
    async def work(client, service):
        answers = [await edit(client, drawn, mask, class_label=2, seed=seed, particles=4) for seed in range(4)]
        assert any("effective sample size" in warning for each in answers for warning in each.json()["warnings"])

    with_client(tokenizer, work, NativeEngine(pipeline, "small"))


@pytest.mark.parametrize(
    "fields, param, status",
    [
        ({"image": None}, "image", 400),
        ({"mask": None}, "mask", 400),
        ({"mask": "RGB"}, "mask", 400),
        ({"mask": "opaque"}, "mask", 400),
        ({"mask": "small"}, "mask", 400),
        ({"image": "wide"}, "image", 400),
        ({"image": b"no picture"}, "image", 400),
        ({"image": "cut"}, "image", 400),
        ({"image": "gif"}, "image", 400),
        ({"image": "16 bits"}, "image", 400),
        ({"image": "bomb"}, "image", 400),
        ({"image": "large"}, None, 413),
        ({"particles": "0"}, "particles", 400),
        ({"particles": "257"}, "particles", 400),
        ({"rounds": "none"}, "rounds", 400),
        ({"class_label": None}, "class_label", 400),
        ({"class_label": "99"}, "class_label", 400),
        ({"n": "9"}, "n", 400),
        ({"size": "32x64"}, "size", 400),
        ({"stream": "true"}, "stream", 400),
        ({"strength": "1"}, "strength", 400),
        ({"draw": "cdf"}, "particles", 400),
        ({"model": "dall-e-2"}, "model", 404),
    ],
    ids=str,
)
def test_what_is_no_edit_is_refused(tokenizer, pipeline, drawn, mask, fields, param, status):
    made = {
        "RGB": drawn,
        "opaque": Image.new("RGBA", (32, 32), (1, 2, 3, 255)),
        "small": mask.resize((16, 16)),
        "wide": drawn.resize((48, 32)),
        "cut": file(drawn)[:300],
        "gif": file(drawn, "gif"),
        "16 bits": Image.new("I;16", (32, 32)),
        "bomb": lambda: file(Image.new("1", (8192, 8192))),
        "large": b"0" * (17 * 2**20),
    }
    whole = {"image": drawn, "mask": mask, "class_label": "2", **fields}
    for name in ("image", "mask"):
        given = made.get(whole[name], whole[name]) if isinstance(whole[name], str) else whole[name]
        whole[name] = given() if callable(given) else given

    async def work(client, service):
        response = await edit(client, **{name: value for name, value in whole.items() if value is not None})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (status, param), error
        assert "\n" not in error["message"] and service.idle

    with_client(tokenizer, work, NativeEngine(pipeline, "small"))


def test_other_bodies_and_engines_are_refused(tokenizer, pipeline, drawn, mask):
    async def work(client, service):
        for response in (await client.post(EDITS, json={"prompt": "2"}), await client.post(EDITS)):
            assert response.status_code == 415 and "multipart/form-data" in response.json()["error"]["message"]
        broken = await client.post(
            EDITS, content=b"--x\r\nno", headers={"content-type": "multipart/form-data; boundary=x"}
        )
        assert broken.status_code == 400
        twice = [("image", ("a.png", file(drawn))), ("image[]", ("b.png", file(drawn)))]
        assert (await client.post(EDITS, files=twice)).json()["error"]["param"] == "image"
        text = await client.post(EDITS, data={"image": "dog.png"}, files={"mask": file(mask)})
        assert text.json()["error"]["param"] == "image"
        assert (await client.get(EDITS)).status_code == 405

    with_client(tokenizer, work, NativeEngine(pipeline, "small"))

    async def without(client, service):
        response = await edit(client, drawn, mask, prompt="2")
        assert (response.status_code, response.json()["error"]["code"]) == (400, "unsupported")
        assert "--engine native" in response.json()["error"]["message"]

    with_client(tokenizer, without)


def test_images_are_drawn_around_an_edit_and_both_are_their_own(tokenizer, pipeline, drawn, mask):
    async def work(client, service):
        asked = [post(client, class_label=i, seed=i) for i in range(3)]
        edits = [edit(client, drawn, mask, class_label=2, seed=1, particles=3) for _ in range(2)]
        images, edited = await asyncio.gather(asyncio.gather(*asked), asyncio.gather(*edits))
        assert edited[0].json()["data"] == edited[1].json()["data"]
        for i, response in enumerate(images):
            alone = await post(client, class_label=i, seed=i)
            assert response.json()["data"] == alone.json()["data"]

    with_client(tokenizer, work, NativeEngine(pipeline, "small"))


def test_closed_engine_ends_its_edits(tokenizer, pipeline, drawn, mask):
    async def work(client, service):
        asked = asyncio.create_task(edit(client, drawn, mask, class_label=2, particles=256, rounds=8))
        async with asyncio.timeout(60):
            while not service._drawings:
                await asyncio.sleep(0.01)
        await service.engine.close()
        assert (await asked).status_code == 503

    with_client(tokenizer, work, NativeEngine(pipeline, "small"))


def test_the_openai_client_edits(small_files, tokenizer, drawn, mask):
    openai = pytest.importorskip("openai")
    pipeline = pipeline_of(small_files, tokenizer)
    service = lambda: Service(NativeEngine(pipeline, "small"), Decoder(tokenizer, 8))  # noqa: E731
    with listening(service) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        with client:
            answer = client.images.edit(
                model="small", image=("a.png", file(drawn)), mask=("m.png", file(mask)), prompt="2", n=1, size="32x32",
                extra_body={"seed": 4, "particles": 2},
            )  # fmt: skip
    other = pipeline_of(small_files, tokenizer)
    expected = other.edit(drawn, mask, 2, seed=4, particles=2, cfg_scale=4.0, top_k=2000)[0]
    assert np.array_equal(pixels({"b64_json": answer.data[0].b64_json}), np.asarray(expected))
