"""The vLLM engine with a class-conditional model: its tokens are ImagePipeline's, whatever becomes of its batch."""

import asyncio
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here (bash scripts/serve.sh)")

import psutil

from autoregressive.models.sampling import NotFiniteLogits
from autoregressive.pipeline import ImagePipeline
from autoregressive.request import Request
from autoregressive.serve.vllm_engine import engine_settings
from tests.serve.small import image
from tests.serve.vllm_engines import Running, preemptions
from tokenizer.load import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SCALES = [1.0, 1.5, 2.0, 4.0, 7.5]
GREEDY = [image(label=i % 10, cfg_scale=SCALES[i % 5], sample_logits=False) for i in range(16)]
SAMPLED = [
    image(
        label=i % 10,
        seed=i * 7,
        cfg_scale=SCALES[i % 5],
        cfg_interval=[-1, 0, 9][i % 3],
        temperature=[1.0, 0.7, 1.3][i % 3],
        top_k=[0, 20, 5][i % 3],
        top_p=[1.0, 0.9][i % 2],
        draw=["race1", "cdf"][i % 4 == 3],
    )
    for i in range(16)
]


@pytest.fixture(scope="module")
def running(small_files):
    engine = Running(small_files.gpt)
    yield engine
    engine.close()


def test_greedy_tokens_while_images_lose_their_places(running, small_files):
    before = preemptions()
    assert running.draw(GREEDY) == running.expected(small_files.vq, GREEDY)
    assert preemptions() > before


def test_drawn_tokens_with_settings_of_their_own_and_late_arrivals(running, small_files):
    delays = [0.04 * i for i in range(16)]
    drawn = running.draw(SAMPLED, delays)
    assert drawn == running.expected(small_files.vq, SAMPLED)
    assert len({tuple(tokens) for tokens in drawn}) == 16


def test_the_number_of_an_image_in_its_run(running, small_files):
    request = image(label=3, cfg_scale=2.0, seed=5)

    async def third() -> list[int]:
        return [tokens async for tokens in running.engine.generate(replace(request, index=2))][-1]

    pipeline = ImagePipeline(running.gpt, load_tokenizer(small_files.vq))
    expected = pipeline.generate_codes(torch.tensor([3]), seed=5, indices=[2], cfg_scale=2.0)[0]
    assert running.runner.run(third()) == expected.tolist()


def test_vllm_engine_with_one_broken_image_draws_the_others(running, small_files):
    requests = SAMPLED[:6]
    expected = running.expected(small_files.vq, requests)
    *drawn, broken = running.draw([*requests, image(label=1, cfg_scale=3e38)], failures=True)
    assert drawn == expected
    assert isinstance(broken, NotFiniteLogits) and broken.steps == [1] and not running.engine.dead


def test_negatives_of_any_company_draw_what_the_pipeline_draws(running, small_files):
    requests = [
        image(i % 10, seed=7 * i, cfg_scale=3.0, top_k=[0, 20, 5][i % 3], negative=[None, 10, 4, i % 10][i % 4])
        for i in range(16)
    ]
    drawn = running.draw(requests)
    assert drawn == running.expected(small_files.vq, requests)
    none, same, other = running.draw(
        [replace(requests[3], negative={} if n is None else {"label": n}) for n in (None, 10, 4)]
    )
    assert none == same != other


@pytest.mark.parametrize(
    "request_, message",
    [
        (image(label=10), "label 10 is out of range: the model has classes 0 to 9"),
        (image(label=1, negative=3), "no effect without guidance"),
        (image(label=1, seed=2**64), "seed must be a whole number"),
    ],
)
def test_a_request_that_is_refused(request_, message, running):
    with pytest.raises(ValueError, match=message):
        running.engine.check(request_)
    with pytest.raises(ValueError, match=message):
        running.draw([request_])
    assert not running.engine.dead


def test_what_the_engine_is_asked_past_the_check(running, small_files):
    """Over vLLM's own server nobody calls check(): settings are refused by the plugin, and ids past the end end nothing."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    async def ask(id_: int, **extra) -> int:
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, detokenize=False, extra_args=extra)
        stream = running.engine._engine.generate({"prompt_token_ids": [id_]}, params, f"raw-{id_}-{extra}")
        return [len(output.outputs[0].token_ids) async for output in stream][-1]

    with pytest.raises(VLLMValidationError, match="--cfg-scale must be a number"):
        running.runner.run(ask(64, cfg_scale=math.nan))
    with pytest.raises(VLLMValidationError, match="seed must be a whole number"):
        running.runner.run(ask(64, seed=0.5))
    assert running.runner.run(ask(100_000, cfg_scale=1e38)) == 64
    assert running.draw(GREEDY[:2]) == running.expected(small_files.vq, GREEDY[:2])


def test_closing_a_request_gives_its_place_up(running, small_files):
    unfinished = running.engine._engine.output_processor.get_num_unfinished_requests

    async def hang_up(request: Request) -> None:
        stream = running.engine.generate(request)
        async for tokens in stream:
            if len(tokens) >= 3:
                break
        await stream.aclose()

    async def cancelled() -> None:
        task = asyncio.ensure_future(hang_up(GREEDY[0]))
        while not (task.done() or unfinished()):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.gather(*map(hang_up, GREEDY))
        async with asyncio.timeout(120):
            while unfinished():
                await asyncio.sleep(0.01)

    running.runner.run(cancelled())
    assert running.draw(GREEDY[:5]) == running.expected(small_files.vq, GREEDY[:5])


def test_settings_that_do_not_fit(running):
    for settings, message in (
        ({"tensor_parallel_size": 3}, "--tensor-parallel-size 3 does not divide the model's 4 heads"),
        ({"kv_cache_gib": 1e-6}, "keys and values of one image take"),
        ({"kv_cache_gib": math.nan}, "kv_cache_gib is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            engine_settings(running.model, **settings)


def test_a_closed_engine(running):
    """Last: it ends the engine."""

    async def close_meanwhile() -> None:
        stream = running.engine.generate(GREEDY[0])
        await anext(stream)
        waiting = asyncio.ensure_future(collect(stream))
        await asyncio.sleep(0)
        await running.engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            await waiting
        with pytest.raises(RuntimeError, match="closed"):
            await anext(running.engine.generate(GREEDY[0]))
        await running.engine.close()

    async def collect(stream) -> list[list[int]]:
        return [tokens async for tokens in stream]

    running.runner.run(close_meanwhile())
    assert running.engine.dead


@pytest.mark.parametrize("settings", [{"tensor_parallel_size": 2}, {"data_parallel_size": 2}])
def test_images_of_several_processes_are_the_pipelines_and_none_outlives_the_engine(small_files, settings):
    engine = Running(small_files.gpt, **settings)
    try:
        assert engine.draw(SAMPLED[:8]) == engine.expected(small_files.vq, SAMPLED[:8])
        children = psutil.Process().children(recursive=True)
        begun = [each for each in children if "resource_tracker" not in " ".join(each.cmdline())]
    finally:
        engine.close()
    _, alive = psutil.wait_procs(begun, timeout=120)
    assert begun and not [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
