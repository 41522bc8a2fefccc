"""Control images over HTTP: the pictures of ImagePipeline, and what is no control image."""

import asyncio
import base64
import io

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from PIL import Image

from autoregressive.demo import Painter
from autoregressive.models.build import build_gpt
from autoregressive.pipeline import ImagePipeline, load_gpt
from autoregressive.serve.api import EDITS
from autoregressive.serve.native import NativeEngine
from autoregressive.serve.server import native_service
from tests.helpers import randomize
from tests.serve.servers import listening, pixels, post, with_client
from tokenizer.load import load_tokenizer

pytestmark = pytest.mark.slow

CONTROL = {"encoder": "vit", "width": 32, "layers": 1, "heads": 2, "positions": 8, "patch": 4, "pixels": 4}


@pytest.fixture(scope="module")
def tokenizer(small_files):
    return load_tokenizer(small_files.vq)


@pytest.fixture
def pipeline(tokenizer):
    args = {"block_size": 64, "vocab_size": tokenizer.codebook_size, "num_classes": 10}
    model = randomize(build_gpt("GPT-XS", **args, extra_conditions={"control": CONTROL}), gain=1.5)
    return ImagePipeline(model.requires_grad_(False), tokenizer, batch_size=4)


def noise(size: int = 200) -> Image.Image:
    """A picture whose file is larger than a request without pictures may be."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def encoded(picture: Image.Image) -> str:
    return base64.b64encode(png(picture)).decode()


def test_control_images_are_drawn_by_as_the_pipeline_does(tokenizer, pipeline):
    async def work(client, service):
        (model,) = (await client.get("/v1/models")).json()["data"]
        assert model["control"] == "canny"
        body = {"class_label": 2, "n": 2, "seed": 5, "guidance_scale": 2, "top_k": 0, "control_strength": 0.5}
        answer = await post(client, control_image="data:image/png;base64," + encoded(noise()), **body)
        assert answer.status_code == 200, answer.text
        return [pixels(image) for image in answer.json()["data"]]

    drawn = with_client(tokenizer, work, NativeEngine(pipeline, "small"))
    settings = {"cfg_scale": 2.0, "top_k": 0, "control_strength": 0.5, "progress": False}
    for i, image in enumerate(drawn):
        expected = pipeline([2], seed=5 + i, control_images=noise(), **settings)[0]
        assert np.array_equal(image, np.asarray(expected))


def test_painter_of_a_running_server_draws_by_a_control_image(pipeline):
    async def draw(address, **pictures):
        painter = await Painter.connect(address)
        assert painter.info.control == "canny"
        settings = {"cfg_scale": 2.0, "top_k": 0, "control_strength": 0.5}
        return [view async for view in painter.draw("2", seed=5, pictures=pictures, **settings)][-1].pictures

    with listening(lambda: native_service(pipeline, "small")) as (address, _):
        ((_, file, _),) = asyncio.run(draw(address, control_image=png(noise())))
        with pytest.raises(ValueError, match="draws by a control image"):
            asyncio.run(draw(address))
    settings = {"cfg_scale": 2.0, "control_strength": 0.5, "progress": False}
    (expected,) = pipeline([2], seed=5, control_images=noise(), **settings)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), np.asarray(expected))


@pytest.mark.filterwarnings("ignore:the effective sample size")
@pytest.mark.parametrize("sent", ["file", "field"])
def test_edit_by_a_control_image_is_that_of_the_pipeline(tokenizer, pipeline, sent):
    image = noise(32).convert("RGBA")
    image.paste((0, 0, 0, 0), (8, 4, 20, 16))
    files, fields = {"image": ("image.png", png(image), "image/png")}, {"class_label": 2, "seed": 5, "particles": 3}
    if sent == "file":
        files["control_image"] = ("control.png", png(noise()), "image/png")
    else:
        fields["control_image"] = encoded(noise())

    async def work(client, service):
        answer = await client.post(EDITS, data=fields | {"guidance_scale": 2, "top_k": 0}, files=files)
        assert answer.status_code == 200, answer.text
        return pixels(answer.json()["data"][0])

    drawn = with_client(tokenizer, work, NativeEngine(pipeline, "small"))
    (expected,) = pipeline.edit(image, None, 2, seed=5, particles=3, cfg_scale=2.0, control_images=noise())
    assert np.array_equal(drawn, np.asarray(expected))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "control_image"),
        ({"control_image": "no base64!"}, "control_image"),
        ({"control_image": base64.b64encode(b"no picture").decode()}, "control_image"),
        ({"control_type": "sketch"}, "control_type"),
        ({"control_image": encoded(noise(8)), "control_strength": -1}, "control_strength"),
    ],
)
def test_what_is_no_control_image_is_refused(tokenizer, pipeline, fields, param):
    async def work(client, service):
        answer = await post(client, class_label=2, **fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text

    with_client(tokenizer, work, NativeEngine(pipeline, "small"))


def test_a_model_without_control_refuses_a_control_image(tokenizer, small_files):
    plain = ImagePipeline(load_gpt(small_files.gpt, image_size=32, downsample_size=4), tokenizer, batch_size=4)

    async def work(client, service):
        for param, value in (("control_image", encoded(noise(8))), ("control_strength", 0.5)):
            answer = await post(client, class_label=2, **{param: value})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text

    with_client(tokenizer, work, NativeEngine(plain, "small"))
