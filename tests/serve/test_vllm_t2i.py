"""The vLLM engine with a text-conditional model: captions of any length, their padding left out, the same tokens."""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here (bash scripts/serve.sh)")

from autoregressive.models.gpt import GPT_models
from autoregressive.models.sampling import NotFiniteLogits
from tests.helpers import randomize
from tests.serve.small import image
from tests.serve.vllm_engines import Running, preemptions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WIDTH = 32
SCALES = [1.0, 1.5, 4.0, 7.5]


def features(i: int) -> torch.Tensor:
    length = [1, 2, 7, 30, 119, 120, 150, 16][i % 8]
    return torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(i))


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    shape = {"vocab_size": 64, "block_size": 64, "cls_token_num": 120, "caption_dim": WIDTH, "model_type": "t2i"}
    gpt = randomize(GPT_models["GPT-XS"](**shape), seed=4).state_dict()
    args = Namespace(gpt_model="GPT-XS", gpt_type="t2i", image_size=32, downsample_size=4)
    torch.save({"model": gpt, "optimizer": {}, "steps": 7, "args": args}, folder / "t2i.pt")
    # An image takes up to six blocks of 32 rows.
    engine = Running(folder / "t2i.pt", num_gpu_blocks_override=13)
    yield engine
    engine.close()


def test_greedy_tokens_while_images_lose_their_places(running, small_files):
    requests = [image(features=features(i), cfg_scale=SCALES[i % 4], sample_logits=False) for i in range(16)]
    before = preemptions()
    drawn = running.draw(requests)
    assert drawn == running.expected(small_files.vq, requests)
    assert preemptions() > before
    assert len({tuple(tokens) for tokens in drawn}) > 8


def test_drawn_tokens_with_late_arrivals(running, small_files):
    requests = [
        image(features=features(i), cfg_scale=SCALES[i % 4], cfg_interval=[-1, 20][i % 2], seed=i, top_k=30)
        for i in range(16)
    ]
    drawn = running.draw(requests, [0.03 * i for i in range(16)])
    assert drawn == running.expected(small_files.vq, requests)


def test_negatives_of_any_length_draw_what_the_pipeline_draws(running, small_files):
    requests = [
        image(
            features=features(i), negative=None if i % 4 == 0 else features(3 * i + 1), cfg_scale=3.0, seed=i, top_k=30
        )
        for i in range(16)
    ]
    drawn = running.draw(requests)
    assert drawn == running.expected(small_files.vq, requests)
    without = running.draw([replace(request, negative={}) for request in requests[:2]])
    assert without[0] == drawn[0] and without[1] != drawn[1]


def test_vllm_engine_with_one_broken_image_draws_the_others(running, small_files):
    requests = [image(features=features(i), cfg_scale=2.0, seed=i) for i in range(6)]
    expected = running.expected(small_files.vq, requests)
    overflowing = image(features=torch.full((7, WIDTH), 3e38))  # leaves NaN in the engine's cache
    *drawn, broken = running.draw([*requests, overflowing], failures=True)
    assert drawn == expected == running.draw(requests)
    assert isinstance(broken, NotFiniteLogits) and broken.steps == [1] and not running.engine.dead
