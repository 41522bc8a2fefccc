"""A pipeline as one folder: saved, loaded, pushed, through diffusers, and by the code of its model card."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from autoregressive.models.gpt import GPT_models
from autoregressive.pipeline import ImagePipeline
from autoregressive.sample import sample_c2i
from tests.helpers import randomize
from tests.language.small_t5 import make_small_t5
from tests.training import run_here
from tokenizer.load import load_tokenizer
from utils.checkpoint import save_checkpoint

TEXT = {"vocab_size": 64, "block_size": 64, "model_type": "t2i", "cls_token_num": 9, "caption_dim": 24}


@pytest.fixture
def pipeline(small_files):
    return ImagePipeline.from_pretrained(small_files.folder, gpt="gpt.pt", vq="vq.pt", device="cpu")


@pytest.fixture
def text(small_files, tmp_path):
    """A pipeline that reads prompts with a small T5 of its own."""
    make_small_t5(tmp_path / "t5" / "small", dim=24)
    model = randomize(GPT_models["GPT-XS"](**TEXT), seed=5)
    args = {"image_size": 32, "downsample_size": 4}
    save_checkpoint(tmp_path / "t2i.pt", {"model": model.state_dict(), "steps": 1, "args": args})
    own = {"t5_path": tmp_path / "t5", "t5_model_type": "small", "t5_tokens": 7, "left_padding": False}
    return ImagePipeline.from_pretrained(tmp_path / "t2i.pt", vq=small_files.vq, device="cpu", **own)


def drawn(pipeline, asked=(3, 7), **settings) -> np.ndarray:
    return np.stack([np.asarray(image) for image in pipeline(list(asked), progress=False, **settings)])


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_saved_pipeline_draws_the_same_pictures(pipeline, tmp_path):
    pipeline.gpt.file_config = {"classes": [f"class {i}" for i in range(10)]}
    pipeline.save_pretrained(tmp_path / "digits")
    assert files(tmp_path / "digits") == {
        "README.md", "model_index.json", "pipeline.py", "gpt/config.json", "gpt/model.safetensors", "gpt/gpt_component.py",
        "tokenizer/config.json", "tokenizer/model.safetensors", "tokenizer/tokenizer_component.py",
    }  # fmt: skip
    (tmp_path / "digits").rename(tmp_path / "moved")
    again = ImagePipeline.from_pretrained(tmp_path / "moved", device="cpu")
    assert np.array_equal(drawn(again, cfg_scale=2.0, seed=5), drawn(pipeline, cfg_scale=2.0, seed=5))
    assert again.gpt.args.identity == pipeline.gpt.args.identity
    assert again.gpt.file_config["classes"][3] == "class 3"
    assert again.gpt.file_config["tokenizer"] == again.tokenizer.fingerprint() == pipeline.tokenizer.fingerprint()
    again.save_pretrained(tmp_path / "moved")  # over itself
    assert np.array_equal(drawn(ImagePipeline.from_pretrained(tmp_path / "moved", device="cpu")), drawn(pipeline))


def test_a_script_takes_the_folder_whole(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline.save_pretrained("digits")
    run_here(
        sample_c2i,
        "--gpt-ckpt",
        "digits",
        "--precision",
        "none",
        "--labels",
        3,
        7,
        "--seed",
        5,
        "--top-k",
        0,
        "--no-names",
    )
    sheet = np.asarray(Image.open(next(tmp_path.glob("*.png"))))
    for image in drawn(pipeline, cfg_scale=4.0, seed=5):
        places = np.lib.stride_tricks.sliding_window_view(sheet, image.shape)
        assert (places == image).all((-3, -2, -1)).any()


def test_a_folder_with_another_tokenizer_is_refused(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "digits")
    file = tmp_path / "digits" / "tokenizer" / "model.safetensors"
    state = load_file(file)
    with safe_open(file, "pt") as f:
        header = f.metadata()
    save_file({name: 1.01 * value if "codebook" not in name else value for name, value in state.items()}, file, header)
    with pytest.raises(ValueError, match="give the tokenizer that made them"):
        ImagePipeline.from_pretrained(tmp_path / "digits", device="cpu")


def test_a_text_pipeline_takes_its_t5_along(text, tmp_path, monkeypatch):
    text.save_pretrained(tmp_path / "lanterns")
    index = json.loads((tmp_path / "lanterns" / "model_index.json").read_text())
    assert index["text"] == {"t5_model_type": "text_encoder", "t5_tokens": 7, "left_padding": False}
    (tmp_path / "t5").rename(tmp_path / "elsewhere")
    again = ImagePipeline.from_pretrained(tmp_path / "lanterns", device="cpu")
    text.t5_path = tmp_path / "elsewhere"
    asked = ["a red lantern", "two cats sleep"]
    assert np.array_equal(drawn(again, asked, cfg_scale=3.0), drawn(text, asked, cfg_scale=3.0))
    again.save_pretrained(tmp_path / "lanterns")
    again.save_pretrained(tmp_path / "copy")
    assert files(tmp_path / "copy") == files(tmp_path / "lanterns") >= {"text_encoder/config.json"}


def test_the_released_t5_is_saved_as_its_name(text, tmp_path):
    text.t5_path, text.t5_model_type = None, "flan-t5-xl"
    text.save_pretrained(tmp_path / "lanterns")
    assert not (tmp_path / "lanterns" / "text_encoder").exists()
    again = ImagePipeline.from_pretrained(tmp_path / "lanterns", device="cpu", t5_path="mine")
    assert (again.t5_path, again.t5_model_type, again.t5_tokens) == ("mine", "flan-t5-xl", 7)


def test_what_cannot_be_saved_is_refused(pipeline, text, small_files, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="mine is there already"):
        pipeline.save_pretrained(tmp_path / "mine")
    pipeline.tokenizer = load_tokenizer(small_files.vq, decode_precision="bf16")
    with pytest.raises(ValueError, match="decode_precision='none'"):
        pipeline.save_pretrained(tmp_path / "new")
    text.text_encoder = object()
    with pytest.raises(ValueError, match="the text encoder is a object"):
        text.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists() and files(tmp_path / "mine") == {"notes.txt"}


def test_a_name_that_is_nowhere_is_an_error_of_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="me/digits is not on this disk and HF_HUB_OFFLINE is set") as caught:
        ImagePipeline.from_pretrained("me/digits")
    assert "\n" not in str(caught.value)


# The names that people know


def test_the_names_people_know_mean_ours(pipeline):
    plain = drawn(pipeline, [3, 3, 7, 7], cfg_scale=2.0, seed=4)
    assert np.array_equal(drawn(pipeline, guidance_scale=2.0, seed=4, num_images_per_prompt=2), plain)
    array = pipeline([3, 3, 7, 7], cfg_scale=2.0, seed=4, output_type="np", progress=False)
    assert array.dtype == np.float32 and np.array_equal(np.rint(255 * array).astype(np.uint8), plain)
    tensor = pipeline([3, 3, 7, 7], cfg_scale=2.0, seed=4, output_type="pt", progress=False)
    assert tensor.shape == (4, 3, 32, 32) and np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)


def test_a_generator_gives_the_seed(pipeline):
    generator = torch.Generator().manual_seed(1)
    first, second = drawn(pipeline, generator=generator), drawn(pipeline, generator=generator)
    assert not np.array_equal(first, second)
    assert np.array_equal(drawn(pipeline, generator=generator.manual_seed(1)), first)


def test_negatives_are_repeated_with_their_labels(pipeline):
    settings = {"cfg_scale": 2.0, "seed": 4}
    each = drawn(pipeline, [3, 3, 7, 7], negative_classes=[1, 1, None, None], **settings)
    assert np.array_equal(drawn(pipeline, num_images_per_prompt=2, negative_classes=[1, None], **settings), each)
    one = drawn(pipeline, [3, 3, 7, 7], negative_classes=1, **settings)
    assert np.array_equal(drawn(pipeline, num_images_per_prompt=2, negative_classes=1, **settings), one)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": 2.0, "cfg_scale": 2.0}, "guidance_scale and cfg_scale"),
        ({"generator": torch.Generator(), "seed": 0}, "seed and generator"),
        ({"generator": [torch.Generator()]}, "generator is a list"),
        ({"output_type": "latent"}, "output_type is 'latent'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"num_images_per_prompt": 2, "indices": [0, 1]}, "indices has an item for each image"),
    ],
)
def test_settings_in_conflict_are_refused(pipeline, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        pipeline([3, 7], progress=False, **settings)
    assert "\n" not in str(caught.value)


# Through diffusers


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A place for the copies that diffusers makes of a folder's Python files."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.slow
def test_diffusers_draws_the_same_pictures(pipeline, text, tmp_path, modules):
    from diffusers import DiffusionPipeline

    for name, ours, asked in (("digits", pipeline, [3, 7]), ("lanterns", text, ["a red lantern", "two cats sleep"])):
        ours.save_pretrained(folder := str(tmp_path / name))
        theirs = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
        theirs.set_progress_bar_config(disable=True)
        images = theirs(asked, guidance_scale=2.0, seed=3).images
        assert np.array_equal(
            np.stack([np.asarray(image) for image in images]), drawn(ours, asked, cfg_scale=2.0, seed=3)
        )
        one, two = theirs(asked[0], num_images_per_prompt=2, output_type="np", return_dict=False)[0]
        assert one.shape == (32, 32, 3) and not np.array_equal(one, two)
        assert set(theirs.components) == {"gpt", "tokenizer"}
        theirs.save_pretrained(tmp_path / "again")
        again = ImagePipeline.from_pretrained(tmp_path / "again", device="cpu")
        assert np.array_equal(drawn(again, asked, cfg_scale=2.0, seed=3), drawn(ours, asked, cfg_scale=2.0, seed=3))
    half = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=folder, trust_remote_code=True, dtype=torch.bfloat16
    )
    assert half.gpt.tok_embeddings.weight.dtype == torch.bfloat16
    assert {weight.dtype for weight in half.tokenizer.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pipeline", "text"])
def test_the_code_of_the_model_card_runs(kind, request, tmp_path, monkeypatch, modules):
    ours = request.getfixturevalue(kind)
    monkeypatch.chdir(tmp_path)
    ours.save_pretrained("mine", license="cc0-1.0")
    card = Path("mine/README.md").read_text()
    assert card.startswith("---\n") and "license: cc0-1.0" in card and "# mine\n" in card
    blocks, pictures = re.findall(r"```python\n(.*?)```", card, re.DOTALL), []
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "card", "exec"), {})
        pictures.append(Path("image.png").read_bytes())
        os.remove("image.png")
    assert pictures[0] == pictures[1]
