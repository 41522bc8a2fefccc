"""The native engine: a request's image is the pipeline's own, alone, in company, and where others hang up."""

import asyncio
import copy
import json
import threading
from contextlib import aclosing
from itertools import pairwise

import numpy as np
import pytest
import torch

from autoregressive.models.sampling import NotFiniteLogits
from autoregressive.pipeline import ImagePipeline, load_gpt
from autoregressive.serve import native
from autoregressive.serve.decoder import GREY, Decoder
from autoregressive.serve.engine import ImageRequest
from autoregressive.serve.native import NativeEngine
from tests.helpers import ROOT
from tests.serve.small import text_pipeline
from tokenizer.load import load_tokenizer
from utils.errors import NotFiniteError


@pytest.fixture(scope="module")
def tokenizer(small_files):
    return load_tokenizer(small_files.vq)


@pytest.fixture(scope="module", params=["gpt", "par"])
def pipeline(request, small_files, tokenizer) -> ImagePipeline:
    gpt = load_gpt(getattr(small_files, request.param), image_size=32, downsample_size=4)
    return ImagePipeline(gpt, tokenizer, batch_size=4)


@pytest.fixture(scope="module")
def raster(small_files, tokenizer) -> ImagePipeline:
    return ImagePipeline(load_gpt(small_files.gpt, image_size=32, downsample_size=4), tokenizer, batch_size=4)


def by_pipeline(pipeline: ImagePipeline, request: ImageRequest) -> np.ndarray:
    asked: dict = {"asked": [request.label], "negative_classes": request.negative_class}
    if pipeline.is_text:
        negative = None if request.negative_features is None else [request.negative_features]
        asked = {"features": [request.features], "negative_features": negative}
    return np.asarray(pipeline(**asked, seed=request.seed, progress=False, **request.sampling)[0])


def serve(pipeline: ImagePipeline, requests: list[ImageRequest], failures=False, **options) -> list:
    """Return the engine's answers to requests that come at once, or with `failures` its errors."""

    async def main():
        engine = NativeEngine(pipeline, **options)

        async def one(request):
            return [list(tokens) async for tokens in engine.generate(request)]

        try:
            return await asyncio.gather(*map(one, requests), return_exceptions=failures)
        finally:
            await engine.close()

    return asyncio.run(main())


def decoded(pipeline: ImagePipeline, tokens: list[int]) -> np.ndarray:
    return pipeline.decode(torch.tensor([tokens]))[0]


MIXED = [
    ImageRequest(label=3, seed=0),
    ImageRequest(label=3, seed=1),
    ImageRequest(label=7, seed=0, cfg_scale=4.0, top_k=20),
    ImageRequest(label=1, seed=2**40, cfg_scale=4.0, top_k=20),
    ImageRequest(label=9, seed=5, cfg_scale=4.0, cfg_interval=10, temperature=0.8),
    ImageRequest(label=0, seed=6, top_p=0.7),
    ImageRequest(label=5, sample_logits=False, cfg_scale=2.0),
] + [
    ImageRequest(label=i % 10, seed=i, cfg_scale=1.5, negative_class=[None, 10, 4][i % 3])
    for i in range(9)  # more than a micro-batch
]


@pytest.mark.slow
def test_images_are_the_pipelines(pipeline):
    yielded = serve(pipeline, MIXED)
    for request, tokens in zip(MIXED, yielded, strict=True):
        assert np.array_equal(decoded(pipeline, tokens[-1]), by_pipeline(pipeline, request)), request


def test_tokens_come_row_by_row(pipeline):
    (yielded,) = serve(pipeline, MIXED[:1])
    assert len(yielded[-1]) == 64
    for earlier, later in pairwise(yielded):
        assert later[: len(earlier)] == earlier and len(earlier) % 8 == 0
    raster = pipeline.gpt.layout.is_raster
    assert (len(yielded) > 1) == raster


@pytest.mark.slow
def test_prompts(small_files, tokenizer):
    pipeline = text_pipeline(tokenizer)
    prompts = ["a red lantern", "a", "two cats sleep on a chair", "rain", "a map"]
    encoded = pipeline.encode(prompts)
    negatives = [None, *encoded[1:3][::-1], None, encoded[0]]
    requests = [
        ImageRequest(features=one, negative_features=other, seed=i, cfg_scale=3.0)
        for i, (one, other) in enumerate(zip(encoded, negatives))
    ]
    for i, tokens in enumerate(serve(pipeline, requests)):
        words = [None, prompts[2], prompts[1], None, prompts[0]][i]
        expected = pipeline([prompts[i]], negative_prompts=words, seed=i, cfg_scale=3.0, progress=False)[0]
        assert np.array_equal(decoded(pipeline, tokens[-1]), np.asarray(expected))


@pytest.mark.parametrize(
    "request_, message",
    [
        (ImageRequest(label=10), "label 10 is out of range"),
        (ImageRequest(label=-1), "label -1 is out of range"),
        (ImageRequest(), "give a label, 0 to 9"),
        (ImageRequest(features=torch.zeros(1, 3)), "give a label, 0 to 9"),
        (ImageRequest(label="3"), "a label is a whole number, got '3'"),
        (ImageRequest(label=1, negative_class=11, cfg_scale=2.0), "label 11 is out of range"),
        (ImageRequest(label=1, negative_class=3), "no effect without guidance"),
        (ImageRequest(label=1, negative_features=torch.zeros(1, 3), cfg_scale=2.0), "give a label, 0 to 9"),
        (ImageRequest(label=1, cfg_scale="4"), "cfg_scale: .*number"),
        (ImageRequest(label=1, cfg_scale=float("nan")), "--cfg-scale must be a number"),
        (ImageRequest(label=1, top_p=-1), "--top-p must be 0"),
    ],
)
def test_requests_that_are_refused(raster, request_, message):
    async def main():
        engine = NativeEngine(raster)
        with pytest.raises(ValueError, match=message):
            engine.check(request_)
        with pytest.raises(ValueError, match=message):
            await anext(engine.generate(request_))
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "request_, message",
    [
        (ImageRequest(label=1), "not a label"),
        (ImageRequest(features=torch.zeros(3, 5)), "takes floats of shape"),
        (ImageRequest(features=torch.zeros(0, 12)), "takes floats of shape"),
        (ImageRequest(features=torch.full((2, 12), float("inf"))), "not all finite"),
    ],
)
def test_features_that_are_refused(tokenizer, request_, message):
    async def main():
        engine = NativeEngine(text_pipeline(tokenizer))
        with pytest.raises(ValueError, match=message):
            engine.check(request_)
        await engine.close()

    asyncio.run(main())


def test_a_closed_request_gives_its_place_up(raster, monkeypatch):
    """Of requests that are closed early, waiting ones are not begun, and a batch of closed ones ends early."""
    steps = []
    generate_codes = raster.generate_codes

    def counted(cond, on_step, **more):
        steps.append(0)

        def count(done, tokens):
            steps[-1] = done
            on_step(done, tokens)

        return generate_codes(cond, on_step=count, **more)

    monkeypatch.setattr(raster, "generate_codes", counted)

    async def main():
        engine = NativeEngine(raster, gather=0.05)
        waiting = asyncio.create_task(anext(engine.generate(ImageRequest(label=2))))
        await asyncio.sleep(0)
        waiting.cancel()
        async with aclosing(engine.generate(ImageRequest(label=1))) as running:
            await anext(running)
        last = [tokens async for tokens in engine.generate(ImageRequest(label=3, seed=4))][-1]
        await engine.close()
        return last

    last = asyncio.run(main())
    assert len(steps) == 2 and steps[0] < 64 and steps[1] == 64
    monkeypatch.undo()
    assert np.array_equal(decoded(raster, last), by_pipeline(raster, ImageRequest(label=3, seed=4)))


def test_closing_ends_what_runs_and_what_waits(raster):
    async def main():
        engine = NativeEngine(raster)
        running = engine.generate(ImageRequest(label=1))
        await anext(running)
        waiting = asyncio.create_task(anext(engine.generate(ImageRequest(label=2, top_k=3))))
        await asyncio.sleep(0.01)
        await engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            async for _ in running:
                pass
        with pytest.raises(RuntimeError, match="closed"):
            await waiting
        with pytest.raises(RuntimeError, match="closed"):
            await anext(engine.generate(ImageRequest(label=2)))
        with pytest.raises(RuntimeError, match="closed"):
            await engine.run(lambda: 1)
        await engine.close()
        await asyncio.wait_for(asyncio.to_thread(engine._thread.shutdown), 10)
        assert engine.dead

    asyncio.run(main())


def test_token_age_is_that_of_a_hung_worker(raster, monkeypatch):
    """Known in the event loop while the worker hangs; a worker that waits for its turn does not hang."""
    held = threading.Event()
    monkeypatch.setattr(raster, "generate_codes", lambda *_, **__: held.wait(60))

    async def main():
        engine = NativeEngine(raster)
        assert engine.token_age() is None
        drawing = asyncio.create_task(anext(engine.generate(ImageRequest(label=1))))
        await asyncio.sleep(0.5)
        hung = engine.token_age()
        held.set()
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match="drawing failed"):
            await drawing
        idle = engine.token_age()
        stream = engine.generate(ImageRequest(label=1))
        await anext(stream)
        drawn = engine.token_age()
        await stream.aclose()
        await engine.close()
        return hung, idle, drawn

    hung, idle, drawn = asyncio.run(main())
    assert hung > 0.4 and idle is None and drawn < 0.4


def test_closing_an_engine_whose_worker_hangs_ends(raster, monkeypatch, caplog):
    held = threading.Event()
    monkeypatch.setattr(raster, "generate_codes", lambda *_, **__: held.wait(60))
    monkeypatch.setattr(native, "SECONDS_TO_CLOSE", 0.2)

    async def main():
        engine = NativeEngine(raster)
        drawing = asyncio.create_task(anext(engine.generate(ImageRequest(label=1))))
        await asyncio.sleep(0.1)
        await engine.close()
        held.set()
        with pytest.raises(RuntimeError):
            await drawing

    asyncio.run(main())
    assert "has hung" in caplog.text


def test_native_engine_with_one_broken_image_draws_the_others_of_its_batch(small_files, tokenizer):
    whole, gpt = load_gpt(small_files.gpt), load_gpt(small_files.gpt)
    gpt.cls_embedding.embedding_table.weight.data[3] = float("nan")
    requests = [ImageRequest(label=label, seed=label, cfg_scale=2.0) for label in (1, 3, 2)]
    expected = serve(ImagePipeline(whole, tokenizer), requests, gather=0.2)
    first, broken, third = serve(ImagePipeline(gpt, tokenizer), requests, failures=True, gather=0.2)
    assert [first[-1], third[-1]] == [expected[0][-1], expected[2][-1]]
    assert isinstance(broken, NotFiniteLogits) and broken.steps == [1]


def test_decoder_with_one_broken_image_decodes_the_others_of_its_batch(raster):
    tokenizer = copy.deepcopy(raster.tokenizer)
    tokenizer.quantize.embedding.weight.data[9] = float("nan")

    async def main():
        decoder = Decoder(tokenizer, 8)
        images = [decoder.decode([code] * 64) for code in (1, 9, 2)]
        results = await asyncio.gather(*images, return_exceptions=True)
        await decoder.close()
        return results

    first, broken, third = asyncio.run(main())
    assert np.array_equal(first, decoded(raster, [1] * 64)) and np.array_equal(third, decoded(raster, [2] * 64))
    assert isinstance(broken, NotFiniteError) and "1 of 1 images" in str(broken)


def test_a_batch_that_fails_leaves_the_next_alone(raster, monkeypatch):
    generate_codes = raster.generate_codes

    def fails_once(*args, **more):
        monkeypatch.setattr(raster, "generate_codes", generate_codes)
        raise MemoryError("no memory left")

    monkeypatch.setattr(raster, "generate_codes", fails_once)

    async def main():
        engine = NativeEngine(raster)
        with pytest.raises(RuntimeError, match="drawing failed: no memory left"):
            await anext(engine.generate(ImageRequest(label=1)))
        tokens = [tokens async for tokens in engine.generate(ImageRequest(label=1))][-1]
        await engine.close()
        return tokens

    assert len(asyncio.run(main())) == 64


def test_calls_run_between_micro_batches(raster):
    async def main():
        engine = NativeEngine(raster)
        drawing = asyncio.create_task(anext(engine.generate(ImageRequest(label=1))))
        assert await engine.run(lambda: 6 * 7) == 42
        with pytest.raises(KeyError):
            await engine.run(lambda: {}["absent"])
        assert len(await drawing) >= 8
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "flag, value", [("--kv-cache-gib", 2), ("--tensor-parallel-size", 2), ("--data-parallel-size", 4)]
)
def test_flags_of_vllm_with_the_native_engine_are_refused(flag, value):
    pytest.importorskip("fastapi")
    from autoregressive.serve import server

    args = server.flags().parse_args(["--engine", "native", flag, str(value)])
    with pytest.raises(ValueError, match=f"{flag} {value} is of vLLM"):
        asyncio.run(server.load_native(args))


# Decoding


def test_decoding_is_the_pipelines(raster):
    codes = torch.randint(64, (11, 64), generator=torch.Generator().manual_seed(0))

    async def main():
        decoder = Decoder(raster.tokenizer, 8, batch_size=4)
        images = await asyncio.gather(*map(decoder.decode, codes.tolist()))
        await decoder.close()
        return images

    assert np.array_equal(asyncio.run(main()), raster.decode(codes))


def test_partial_images(raster):
    codes = torch.randint(64, (1, 64), generator=torch.Generator().manual_seed(0))[0].tolist()

    async def main():
        decoder = Decoder(raster.tokenizer, 8)
        images = await asyncio.gather(*(decoder.decode(codes[:n]) for n in (3, 24, 29)))
        await decoder.close()
        return images

    nothing, three, same = asyncio.run(main())
    assert (nothing == GREY).all()
    assert (three[12:] == GREY).all() and three[:12].std() > 1
    assert np.array_equal(three, same)


def test_a_failing_decoder_tells_and_goes_on(raster):
    async def main():
        decoder = Decoder(raster.tokenizer, 8)
        with pytest.raises(RuntimeError, match="decoding failed"):
            await decoder.decode([10**6] * 64)
        given_up = asyncio.create_task(decoder.decode([1] * 64))
        await asyncio.sleep(0)
        given_up.cancel()
        image = await decoder.decode([1] * 64)
        await decoder.close()
        return image

    assert asyncio.run(main()).shape == (32, 32, 3)


def test_the_names_of_imagenets_classes_are_torchvisions():
    models = pytest.importorskip("torchvision").models
    names = json.loads((ROOT / "autoregressive" / "serve" / "imagenet_classes.json").read_text())["names"]
    assert names == models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
