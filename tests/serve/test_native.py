"""The native engine: a request's image is the pipeline's own, alone, in company, and where others hang up."""

import asyncio
import copy
import json
import threading
from contextlib import aclosing
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autoregressive.models.sampling import NotFiniteLogits
from autoregressive.models.slots import Slots
from autoregressive.pipeline import ImagePipeline, load_gpt
from autoregressive.request import Request
from autoregressive.serve import native
from autoregressive.serve.decoder import GREY, Decoder
from autoregressive.serve.engine import NOT_DRAWN
from autoregressive.serve.native import NativeEngine
from tests.helpers import ROOT
from tests.serve.small import image
from tokenizer.load import load_tokenizer
from utils.errors import NotFiniteError

PATIENCE = 120  # seconds that a busy machine may take


@pytest.fixture(scope="module")
def tokenizer(small_files):
    return load_tokenizer(small_files.vq)


@pytest.fixture(scope="module", params=["gpt", "par", "nar"])
def pipeline(request, small_files, tokenizer) -> ImagePipeline:
    gpt = load_gpt(getattr(small_files, request.param), image_size=32, downsample_size=4)
    return ImagePipeline(gpt, tokenizer, batch_size=4)


@pytest.fixture(scope="module")
def raster(small_files, tokenizer) -> ImagePipeline:
    return ImagePipeline(load_gpt(small_files.gpt, image_size=32, downsample_size=4), tokenizer, batch_size=4)


def by_pipeline(pipeline: ImagePipeline, request: Request) -> np.ndarray:
    (images,) = [images for _, images in pipeline.batches([request])]
    return images[0]


def serve(pipeline: ImagePipeline, requests: list[Request], failures=False, **options) -> list:
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
    image(label=3, seed=0),
    image(label=3, seed=1),
    image(label=7, seed=0, cfg_scale=4.0, top_k=20),
    image(label=1, seed=2**40, cfg_scale=4.0, top_k=20),
    image(label=9, seed=5, cfg_scale=4.0, cfg_interval=10, temperature=0.8),
    image(label=0, seed=6, top_p=0.7),
    image(label=3, seed=0, draw="cdf"),
    image(label=5, sample_logits=False, cfg_scale=2.0),
] + [
    image(label=i % 10, seed=i, cfg_scale=1.5, negative=[None, 10, 4][i % 3])
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
    known = [{place: token for place, token in enumerate(tokens) if token != NOT_DRAWN} for tokens in yielded]
    for earlier, later in pairwise(known):
        assert earlier.items() <= later.items() and len(earlier) // 8 < len(later) // 8
    assert len(yielded) > 1 and len(known[-1]) == 64


@pytest.mark.parametrize(
    "request_, message",
    [
        (image(label=10), "label 10 is out of range"),
        (image(label=-1), "label -1 is out of range"),
        (image(), "takes the conditions label; given were none"),
        (image(features=torch.zeros(1, 3)), "takes the conditions label; given were caption"),
        (image(label="3"), "a label is a whole number, 0 to 9, got '3'"),
        (image(label=True), "a label is a whole number, 0 to 9, got True"),
        (image(label=1, seed=2**64), "seed must be a whole number"),
        (image(label=1, negative=11, cfg_scale=2.0), "label 11 is out of range"),
        (image(label=1, negative=3), "no effect without guidance"),
        (image(label=1, negative=torch.zeros(1, 3), cfg_scale=2.0), "a label is a whole number"),
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


@pytest.fixture
def without_slots(monkeypatch):
    """Engines that draw a batch to its end, as on an accelerator."""
    monkeypatch.setattr(native, "plan_for_slots", lambda gpt: None)


@pytest.mark.slow
def test_images_of_batches_are_the_pipelines(raster, without_slots):
    for request, tokens in zip(MIXED, serve(raster, MIXED), strict=True):
        assert np.array_equal(decoded(raster, tokens[-1]), by_pipeline(raster, request)), request


@pytest.mark.parametrize("window, dtype", [(0, torch.bfloat16), (6, torch.float32), ("auto", torch.float32)])
def test_images_that_come_and_go_are_the_pipelines(small_files, tokenizer, window, dtype):
    """Requests enter while others are drawn, some leave early, and the settings differ."""
    gpt = load_gpt(small_files.gpt, image_size=32, downsample_size=4, dtype=dtype)
    pipeline = ImagePipeline(gpt, tokenizer, window=window)
    requests = [*MIXED[:8], *(image(label=i, seed=i, cfg_scale=2.0, cfg_interval=20) for i in range(4))]

    async def main():
        engine = NativeEngine(pipeline)

        async def one(number):
            await asyncio.sleep(number * 0.03)
            async with aclosing(engine.generate(requests[number])) as answers:
                return [tokens async for tokens in answers][-1] if number % 4 != 3 else await anext(answers) and None

        found = await asyncio.gather(*map(one, range(len(requests))))
        await engine.close()
        return found

    for request, tokens in zip(requests, asyncio.run(main()), strict=True):
        assert tokens is None or np.array_equal(decoded(pipeline, tokens), by_pipeline(pipeline, request)), request


@pytest.fixture
def passes(monkeypatch):
    """Passes of an engine: none before `begin` is set, and once every image has its first rows none before `go` is.

    taken: the images of each.
    """
    passes, take_pass = SimpleNamespace(begin=threading.Event(), go=threading.Event(), taken=[]), Slots.take_pass

    def held(slots):
        assert passes.begin.wait(PATIENCE)
        drawn = [slots.done(slot) for slot in range(slots.count) if slot not in slots.free]
        assert min(drawn) < 16 or passes.go.wait(PATIENCE)
        passes.taken.append(len(drawn))
        take_pass(slots)

    monkeypatch.setattr(Slots, "take_pass", held)
    return passes


async def until_asked(engine: NativeEngine, count: int) -> None:
    """Returns once so many requests are in slots or wait for one."""
    while len(engine._waiting) + len(engine._in_slots) < count:
        await asyncio.sleep(0.01)


def test_request_that_comes_during_a_drawing_is_not_kept_waiting(raster, passes):
    """It enters a free slot: both images are in the decode passes at the same time."""

    async def main():
        engine = NativeEngine(raster)
        passes.begin.set()

        async def second():
            return [_ async for _ in engine.generate(image(label=2, cfg_scale=3.0, top_k=5))]

        async with aclosing(engine.generate(image(label=1))) as first:
            await anext(first)
            drawing = asyncio.create_task(second())
            await until_asked(engine, 2)
            passes.go.set()
            await drawing
            [_ async for _ in first]
        await engine.close()

    asyncio.run(main())
    assert passes.taken[0] == 1 and 2 in passes.taken


def test_a_closed_request_gives_its_slot_up(raster, monkeypatch, passes):
    """Close requests early: waiting ones are not begun, and one that runs leaves its slot."""
    admitted, admit = [], Slots.admit
    monkeypatch.setattr(
        Slots,
        "admit",
        lambda slots, given, *more, **named: (admitted.extend(given), admit(slots, given, *more, **named)),
    )

    async def main():
        engine = NativeEngine(raster)
        running = [engine.generate(image(label=i, cfg_scale=2.0)) for i in range(4)]
        first = [asyncio.ensure_future(anext(each)) for each in running]
        await until_asked(engine, 4)
        passes.begin.set()
        await asyncio.gather(*first)
        waiting = asyncio.create_task(anext(engine.generate(image(label=9))))
        await until_asked(engine, 5)
        waiting.cancel()
        await asyncio.gather(*(each.aclose() for each in running), waiting, return_exceptions=True)
        passes.go.set()
        last = [tokens async for tokens in engine.generate(image(label=3, seed=4))][-1]
        await engine.close()
        assert len(engine.slots.free) == 4
        return last

    last = asyncio.run(main())
    assert len(admitted) == 5 and len(passes.taken) < 2 * 63
    monkeypatch.undo()
    assert np.array_equal(decoded(raster, last), by_pipeline(raster, image(label=3, seed=4)))


def test_a_batch_of_closed_requests_ends_early(raster, without_slots, monkeypatch):
    steps, closed = [], threading.Event()
    draw = raster.draw

    def counted(requests, on_step):
        steps.append(0)

        def count(done, tokens):
            steps[-1] = done
            assert done < 16 or closed.wait(PATIENCE)
            on_step(done, tokens)

        return draw(requests, on_step=count)

    monkeypatch.setattr(raster, "draw", counted)

    async def main():
        engine = NativeEngine(raster)
        async with aclosing(engine.generate(image(label=1))) as running:
            await anext(running)
        closed.set()
        last = [tokens async for tokens in engine.generate(image(label=3, seed=4))][-1]
        await engine.close()
        return last

    assert len(asyncio.run(main())) == 64
    assert len(steps) == 2 and steps[0] < 64 and steps[1] == 64


def test_closing_ends_what_runs_and_what_waits(raster, passes):
    async def main():
        engine = NativeEngine(raster)
        passes.begin.set()
        running = engine.generate(image(label=1))
        await anext(running)

        async def whole(request):
            return [tokens async for tokens in engine.generate(request)]

        waiting = asyncio.create_task(whole(image(label=2, top_k=3)))
        await until_asked(engine, 2)
        closing = asyncio.create_task(engine.close())
        while not engine.dead:
            await asyncio.sleep(0.01)
        passes.go.set()
        await closing
        with pytest.raises(RuntimeError, match="closed"):
            async for _ in running:
                pass
        with pytest.raises(RuntimeError, match="closed"):
            await waiting
        with pytest.raises(RuntimeError, match="closed"):
            await anext(engine.generate(image(label=2)))
        await engine.close()
        await asyncio.wait_for(asyncio.to_thread(engine.thread.shutdown), PATIENCE)
        assert engine.dead

    asyncio.run(main())


def test_closing_an_engine_whose_worker_hangs_ends(raster, monkeypatch, caplog):
    begun, held = threading.Event(), threading.Event()
    monkeypatch.setattr(Slots, "take_pass", lambda slots: begun.set() or held.wait(PATIENCE))
    monkeypatch.setattr(native, "SECONDS_TO_CLOSE", 0.2)

    async def main():
        engine = NativeEngine(raster)
        drawing = asyncio.create_task(anext(engine.generate(image(label=1))))
        assert await asyncio.to_thread(begun.wait, PATIENCE)
        await engine.close()
        held.set()
        with pytest.raises(RuntimeError):
            await drawing

    asyncio.run(main())
    assert "has hung" in caplog.text


def test_native_engine_with_one_broken_image_draws_the_others_of_its_batch(small_files, tokenizer):
    whole, gpt = load_gpt(small_files.gpt), load_gpt(small_files.gpt)
    gpt.cls_embedding.embedding_table.weight.data[3] = float("nan")
    requests = [image(label=label, seed=label, cfg_scale=2.0) for label in (1, 3, 2)]
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
        return results

    first, broken, third = asyncio.run(main())
    assert np.array_equal(first, decoded(raster, [1] * 64)) and np.array_equal(third, decoded(raster, [2] * 64))
    assert isinstance(broken, NotFiniteError) and "1 of 1 images" in str(broken)


@pytest.mark.parametrize("owner, name", [("slots", "admit"), ("slots", "take_pass"), ("pipeline", "draw")])
def test_a_failure_leaves_the_next_request_alone(raster, monkeypatch, owner, name):
    if owner == "pipeline":
        monkeypatch.setattr(native, "plan_for_slots", lambda gpt: None)
    place = raster if owner == "pipeline" else Slots
    whole = getattr(place, name)

    def fails_once(*args, **more):
        monkeypatch.setattr(place, name, whole)
        raise MemoryError("no memory left")

    monkeypatch.setattr(place, name, fails_once)

    async def main():
        engine = NativeEngine(raster)
        with pytest.raises(RuntimeError, match="drawing failed: no memory left"):
            await anext(engine.generate(image(label=1)))
        tokens = [tokens async for tokens in engine.generate(image(label=1))][-1]
        await engine.close()
        return tokens

    assert len(asyncio.run(main())) == 64


@pytest.mark.parametrize(
    "flag, value", [("--kv-cache-gib", 2), ("--tensor-parallel-size", 2), ("--data-parallel-size", 4)]
)
def test_flags_of_vllm_with_the_native_engine_are_refused(flag, value):
    pytest.importorskip("fastapi")
    from autoregressive.serve import server

    args = server.flags().parse_args(["--engine", "native", flag, str(value)])
    with pytest.raises(ValueError, match=f"{flag} {value} is of vLLM"):
        asyncio.run(server.start_native(args))


@pytest.mark.parametrize("window", ["0", "8", "auto"])
def test_window_with_vllm_is_refused(window):
    pytest.importorskip("fastapi")
    from autoregressive.serve import server

    args = server.flags().parse_args(["--engine", "vllm", "--window", window])
    with pytest.raises(ValueError, match=f"--window {window} is of the native engine"):
        asyncio.run(server.start_vllm(args))


# Decoding


def test_decoding_is_the_pipelines(raster):
    codes = torch.randint(64, (11, 64), generator=torch.Generator().manual_seed(0))

    async def main():
        decoder = Decoder(raster.tokenizer, 8, batch_size=4)
        images = await asyncio.gather(*map(decoder.decode, codes.tolist()))
        return images

    assert np.array_equal(asyncio.run(main()), raster.decode(codes))


def test_partial_images(raster):
    codes = torch.randint(64, (1, 64), generator=torch.Generator().manual_seed(0))[0].tolist()

    async def main():
        decoder = Decoder(raster.tokenizer, 8)
        images = await asyncio.gather(*(decoder.decode(codes[:n]) for n in (3, 24, 29)))
        return images

    nothing, three, same = asyncio.run(main())
    assert (nothing == GREY).all()
    assert (three[12:] == GREY).all() and three[:12].std() > 1
    assert np.array_equal(three, same)


def test_partial_images_of_scattered_tokens(raster):
    codes = torch.randint(64, (64,), generator=torch.Generator().manual_seed(0))
    drawn = torch.rand(64, generator=torch.Generator().manual_seed(1)) < 0.5
    drawn[0] = False

    async def main():
        return await Decoder(raster.tokenizer, 8).decode(torch.where(drawn, codes, NOT_DRAWN).tolist())

    image = (
        torch.from_numpy(asyncio.run(main())).unflatten(0, (8, 4)).unflatten(2, (8, 4)).transpose(1, 2).flatten(0, 1)
    )
    for shown, cell in zip(drawn, image.flatten(1).float(), strict=True):
        assert (cell == GREY).all() != shown


def test_a_failing_decoder_tells_and_goes_on(raster):
    async def main():
        decoder = Decoder(raster.tokenizer, 8)
        with pytest.raises(RuntimeError, match="decoding failed"):
            await decoder.decode([10**6] * 64)
        given_up = asyncio.create_task(decoder.decode([1] * 64))
        await asyncio.sleep(0)
        given_up.cancel()
        image = await decoder.decode([1] * 64)
        return image

    assert asyncio.run(main()).shape == (32, 32, 3)


def test_the_names_of_imagenets_classes_are_torchvisions():
    models = pytest.importorskip("torchvision").models
    names = json.loads((ROOT / "autoregressive" / "serve" / "imagenet_classes.json").read_text())["names"]
    assert names == models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
