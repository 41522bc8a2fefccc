"""What the demo's page calls: names of classes, the views of a drawing, its end when nobody looks, and what a user gets wrong."""

import threading
import time

import numpy as np
import pytest
import torch

from autoregressive.demo import (
    MOST_IMAGES,
    Painter,
    View,
    error_html,
    status_html,
)
from autoregressive.models.gpt import GPT_models
from autoregressive.pipeline import GREY, ImagePipeline, load_gpt
from tests.helpers import randomize
from tokenizer.load import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


class Words:
    """A text encoder: each word has the features that its length draws; `dim` numbers."""

    dim, use_text_preprocessing = 24, False

    def get_text_embeddings(self, texts):
        rows = [torch.randn(self.dim, generator=torch.Generator().manual_seed(len(w))) for w in texts[0].split()[:9]]
        return torch.stack(rows)[None], torch.ones(1, len(rows))


@pytest.fixture(scope="module")
def pipeline(small_files):
    return ImagePipeline(load_gpt(small_files.gpt), load_tokenizer(small_files.vq), batch_size=2)


@pytest.fixture(scope="module")
def text_pipeline(pipeline):
    shape = {"vocab_size": 64, "block_size": 64, "model_type": "t2i", "cls_token_num": 9, "caption_dim": Words.dim}
    gpt = randomize(GPT_models["GPT-XS"](**shape), seed=4).requires_grad_(False)
    return ImagePipeline(gpt, pipeline.tokenizer, text_encoder=Words(), batch_size=2)


def painter_of(pipeline, **settings) -> Painter:
    return Painter(lambda: pipeline, **{"interval": 3600, **settings})


EVERY_STEP = {"interval": 0, "preview_share": 1e9}  # a view after each step, with a preview


# Views


@pytest.mark.slow
def test_images_are_those_of_the_pipeline(pipeline):
    settings = {"cfg_scale": 3.0, "top_k": 20}
    views = list(painter_of(pipeline).draw("7", count=5, seed=3, **settings))
    expected = pipeline([7] * 5, seed=3, progress=False, **settings)
    last = views[-1]
    assert last.done == last.total == 5 * 64 and len(last.pictures) == 5
    for (image, caption), other in zip(last.pictures, expected, strict=True):
        assert np.array_equal(image, other) and image.std() > 5
        assert (
            caption.startswith("7 · image ")
            and " · seed 3 · guidance 3 · top-k 20 · top-p 1 · temperature 1 · " in caption
        )
    assert [caption.split(" · ")[1] for _, caption in last.pictures] == [f"image {i}" for i in range(5)]
    assert last.pictures[0][1].endswith(" s for 2") and last.pictures[4][1].endswith(" s"), (
        "batches of two, two and one"
    )


def test_tokens_are_counted_as_they_come(pipeline):
    views = list(painter_of(pipeline, interval=0, preview_share=-1).draw("7", count=3))
    done = [view.done for view in views]
    assert done == sorted(done) and done[0] == 0 and done[-1] == 3 * 64 and len(set(done)) > 100
    seconds = [view.seconds for view in views]
    assert seconds == sorted(seconds) and {view.total for view in views} == {3 * 64}


def test_previews_are_the_first_rows(pipeline):
    views = list(painter_of(pipeline, **EVERY_STEP).draw("7", count=3))
    final = [image for image, _ in views[-1].pictures]
    previews = [view for view in views if 0 < view.done < 128 and view.pictures]
    assert min(view.done for view in previews) == 16, "from the first whole row on, of two images"
    for view in previews:
        assert len(view.pictures) == 2
        for i, (image, caption) in enumerate(view.pictures):
            tokens = int(caption.split(" · ")[2].split()[0])
            assert caption == f"7 · image {i} · {tokens} of 64 tokens" and tokens <= view.done // 2
            rows = tokens // 8 * 4  # of pixels, four a token
            assert (image[rows + 4 :] == GREY).all() and image[:rows].std() > 5
            close = np.abs(image[: max(rows - 12, 0)].astype(int) - final[i][: max(rows - 12, 0)])
            assert not close.size or np.median(close) < 40
    third = [view for view in views if view.done > 128]
    assert all(np.array_equal(view.pictures[0][0], final[0]) for view in third), "finished ones stay"


def test_previews_take_no_more_than_their_share(pipeline):
    never = list(painter_of(pipeline, interval=0, preview_share=-1).draw("7"))
    assert all(not view.pictures for view in never[:-1])
    rare = list(painter_of(pipeline, interval=3600).draw("7"))
    assert [view.done for view in rare] == [0, 64]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({}, "seed 0 · no guidance · top-k all · top-p 1 · temperature 1"),
        (
            {"cfg_scale": 4.5, "cfg_interval": 6},
            "seed 0 · guidance 4.5 to step 6 · top-k all · top-p 1 · temperature 1",
        ),
        ({"sample_logits": False, "cfg_scale": 2}, "seed 0 · guidance 2 · greedy"),
    ],
)
def test_settings_stand_under_an_image(pipeline, settings, words):
    (_, caption), *_ = list(painter_of(pipeline).draw(3, **settings))[-1].pictures
    assert caption.startswith(f"3 · image 0 · {words} · ")


def test_prompts(text_pipeline):
    views = list(painter_of(text_pipeline).draw("two cats sleep", count=2, seed=1, cfg_scale=2.0))
    expected = text_pipeline(["two cats sleep"] * 2, seed=1, cfg_scale=2.0, progress=False)
    for (image, caption), other in zip(views[-1].pictures, expected, strict=True):
        assert np.array_equal(image, other) and caption.startswith("two cats sleep · image ")
    assert not views[-1].note
    with pytest.warns(UserWarning, match="fill all 9 text tokens"):
        views = list(painter_of(text_pipeline).draw("a b c d e f g h i j k l"))
    assert "fills all 9 text tokens" in views[-1].note and "fills all 9" in status_html(views[-1])


@pytest.mark.slow
def test_no_two_drawings_at_once(pipeline, text_pipeline):
    """Two pages at the same time: each gets its own images."""
    results = {}

    def draw(key, painter, asked):
        results[key] = list(painter.draw(asked, count=2, seed=5))[-1].pictures

    asked = {"class": (painter_of(pipeline), 4), "text": (painter_of(text_pipeline), "rain")}
    threads = [threading.Thread(target=draw, args=(key, *pair)) for key, pair in asked.items()]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    expected = {
        "class": pipeline([4, 4], seed=5, progress=False),
        "text": text_pipeline(["rain"] * 2, seed=5, progress=False),
    }
    for key, images in expected.items():
        assert all(np.array_equal(drawn, image) for (drawn, _), image in zip(results[key], images, strict=True))


def test_a_drawing_ends_when_nobody_looks(pipeline, monkeypatch):
    steps = []
    painter = painter_of(pipeline, interval=0, preview_share=-1)
    batches = pipeline.batches

    def watched(*args, on_step, **settings):
        def step(numbers, done, tokens):
            steps.append(done)
            time.sleep(0.01)
            on_step(numbers, done, tokens)

        return batches(*args, on_step=step, **settings)

    monkeypatch.setattr(pipeline, "batches", watched)
    views = painter.draw(3, count=64)
    next(views), next(views)
    views.close()
    seen = len(steps)
    monkeypatch.undo()
    assert len(list(painter.draw(3))[-1].pictures) == 1, "the next one is drawn at once"
    assert len(steps) <= seen + 3


def test_a_program_that_ends_does_not_wait_for_its_images(pipeline):
    painter = painter_of(pipeline, interval=0, preview_share=-1)
    views = painter.draw(3, count=64)
    next(views)
    painter.close()
    left = list(views)
    assert not left or left[-1].done < 64 * 64
    assert list(painter.draw(3)) == []


# Mistakes


@pytest.mark.parametrize(
    "asked, settings, message",
    [
        (10, {}, "class 10 is out of range"),
        (None, {}, "no class is chosen"),
        (3, {"count": 0}, f"number of images is 1 to {MOST_IMAGES}, got 0"),
        (3, {"count": 10**6}, "got 1000000"),
        (3, {"count": 1.5}, "whole number, got 1.5"),
        (3, {"count": None}, "number of images is missing"),
        (3, {"seed": None}, "the seed is missing"),
        (3, {"seed": "x"}, "the seed must be a whole number, got 'x'"),
        (3, {"seed": float("nan")}, "the seed must be a whole number, got nan"),
        (3, {"temperature": None}, "no value is given for temperature"),
        (3, {"temperature": -1}, "--temperature must be 0 or more"),
        (3, {"top_p": -1}, "--top-p must be 0"),
        (3, {"top_k": 0.5}, "--top-k must be a whole number"),
        (3, {"cfg_scale": float("inf")}, "--cfg-scale"),
    ],
)
def test_mistakes_are_told(pipeline, asked, settings, message):
    painter = painter_of(pipeline)
    with pytest.raises(ValueError, match=message):
        list(painter.draw(asked, **settings))
    assert len(list(painter.draw(3))[-1].pictures) == 1, "and the next one is drawn"


@pytest.mark.parametrize("prompt", ["", "  \n", None])
def test_blank_prompts(text_pipeline, prompt):
    with pytest.raises(ValueError, match="the prompt is blank: write what to draw"):
        list(painter_of(text_pipeline).draw(prompt))


def test_a_model_that_is_not_there_is_asked_for_again(pipeline, tmp_path):
    tries = []

    def load():
        tries.append(1)
        return load_gpt(tmp_path / "no.pt") if len(tries) < 3 else pipeline

    painter = Painter(load)
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*no\.pt"):
            list(painter.draw(3))
    assert painter.loaded is None
    assert len(list(painter.draw(3))[-1].pictures) == 1 and len(tries) == 3
    list(painter.draw(3))
    assert len(tries) == 3 and painter.loaded is pipeline


# HTML


def test_html_is_escaped():
    assert error_html(ValueError("no <script>")) == "<div class='error' role='alert'>No &lt;script&gt;</div>"
    assert error_html(ValueError()) == "<div class='error' role='alert'>ValueError</div>"
    view = View([], 3, 64, 1.23, 1, "<b>")
    assert (
        "value='3' max='64'" in status_html(view)
        and "&lt;b&gt;" in status_html(view)
        and "1 image:" in status_html(view)
    )
    assert "4 images in 9.9 s" in status_html(View([], 64, 64, 9.9, 4))
