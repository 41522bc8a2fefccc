"""RAR from published files through pipeline and scripts: MaskGIT's pixels, guidance schedules, previews, folders."""

import asyncio
import json
from contextlib import aclosing

import numpy as np
import pytest
import torch

from autoregressive.hub import hub_class
from autoregressive.models.build import build_gpt
from autoregressive.models.generate import generate
from autoregressive.models.sampling import SamplingConfig
from autoregressive.pipeline import ImagePipeline, load_gpt
from autoregressive.request import Request
from autoregressive.sample import sample_c2i, sample_c2i_ddp
from autoregressive.serve.convert import open_gpt
from autoregressive.serve.native import NativeEngine
from tests.helpers import golden_tokenizer_state, load_golden, randomize
from tests.training import run_here

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

SCHEDULE = {"cfg_scale": 8.0, "cfg_schedule": "power-cosine", "cfg_power": 2.0}
WORDS = ["--cfg-scale", 8.0, "--cfg-schedule", "power-cosine", "--cfg-power", 2.0, "--top-k", 0, "--top-p", 1.0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A RAR and MaskGIT's VQGAN, small and in their published formats."""
    folder = tmp_path_factory.mktemp("rar")
    meta = load_golden("maskgit_vqgan")[1]
    torch.save(golden_tokenizer_state(meta), folder / "maskgit-vqgan-imagenet-f16-256.bin")
    codes = meta["state_dict"]["quantize.embedding.weight"][0]
    model = randomize(build_gpt("RAR-XS", vocab_size=codes, num_classes=10, block_size=16), gain=2.0)
    torch.save(model.state_dict(), folder / "rar_xs.bin")
    return folder


@pytest.fixture(scope="module")
def pipeline(files):
    return ImagePipeline.from_pretrained(files, gpt="rar_xs.bin", device="cpu")  # which finds its tokenizer


def test_pipeline_finds_the_tokenizer_and_draws_the_same_image_in_any_batch(pipeline):
    images = pipeline([1, 4, 9], seed=3, progress=False, **SCHEDULE)
    alone = pipeline([4], seed=3, indices=[1], progress=False, **SCHEDULE)
    assert np.array_equal(images[1], alone[0])
    assert not np.array_equal(images[1], pipeline([4], seed=3, indices=[1], progress=False, cfg_scale=8.0)[0])


def test_scripts_draw_what_the_pipeline_draws_and_resume(files, pipeline, tmp_path, capsys):
    rar, size = files / "rar_xs.bin", pipeline.image_size
    words = ["--gpt-ckpt", rar, "--device", "cpu", "--precision", "none", "--vq-ckpt", pipeline_tokenizer(files)]
    folder = ["--sample-dir", tmp_path, "--num-fid-samples", 5, "--per-proc-batch-size", 2, "--image-size-eval", size]
    run_here(sample_c2i_ddp, *words, *folder, "--balanced", *WORDS)
    (drawn,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert "-cfg-8.0-power-cosine-2.0-seed-0" in drawn.name and drawn.name.startswith("RAR-XS-rar_xs")
    settings = json.loads((drawn / "settings.json").read_text())
    assert settings["cfg_schedule"] == "power-cosine" and settings["cfg_power"] == 2.0
    expected = np.stack(pipeline([0, 1, 2, 3, 4], progress=False, **SCHEDULE))
    with np.load(f"{drawn}.npz") as data:
        np.testing.assert_array_equal(data["arr_0"], expected)
    run_here(sample_c2i_ddp, *words, *folder, "--balanced", *WORDS)  # resumes, and has nothing to do
    run_here(sample_c2i, *words, "--labels", 1, 2, "--output", tmp_path / "grid.png", *WORDS)
    assert (tmp_path / "grid.png").stat().st_size


def pipeline_tokenizer(files):
    return files / "maskgit-vqgan-imagenet-f16-256.bin"


def test_server_shows_rows_and_gives_the_pipelines_tokens(pipeline):
    request = Request({"label": 7}, sampling=SamplingConfig(**SCHEDULE), seed=5)

    async def drawn():
        engine, shown = NativeEngine(pipeline), []
        async with aclosing(engine.generate(request)) as tokens:
            async for so_far in tokens:
                shown.append(list(so_far))
        await engine.close()
        return shown

    shown = asyncio.run(drawn())
    expected = pipeline.draw(pipeline.read([request]))[0].tolist()
    assert shown[-1] == expected and [len(rows) for rows in shown] == [4, 8, 12, 16]
    assert all(rows == expected[: len(rows)] for rows in shown)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"gpt_model": "GPT-L"}, r"RAR-XS .* does not fit the flags: --gpt-model GPT-L \(file: RAR-XS\)"),
        ({"image_size": 256}, "--image-size 256"),
        ({"num_classes": 1000}, "--num-classes 1000"),
    ],
)
def test_beliefs_that_the_file_contradicts_are_refused(files, flags, message):
    with pytest.raises(ValueError, match=message):
        load_gpt(files / "rar_xs.bin", **flags)


def test_vllm_refuses_a_rar_by_name(files):
    with pytest.raises(ValueError, match=r"trunk 'rar'.*--engine native"):
        open_gpt(files / "rar_xs.bin")


def test_file_without_some_of_its_tensors_is_refused(files, tmp_path):
    state = torch.load(files / "rar_xs.bin")
    for name, message in (
        ("lm_head.weight", r"a RAR has lm_head\.weight"),
        ("blocks.1.norm1.bias", r"blocks\.1\.norm1\.bias"),
    ):
        torch.save({key: value for key, value in state.items() if key != name}, tmp_path / "rar.bin")
        with pytest.raises(ValueError, match=message):
            load_gpt(tmp_path / "rar.bin")


def test_saved_pipeline_and_hub_class_give_the_same_model(pipeline, tmp_path):
    expected = pipeline([2, 5], seed=1, progress=False, output_type="np")
    pipeline.save_pretrained(tmp_path / "saved")
    again = ImagePipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.gpt.args.trunk == "rar"
    assert np.array_equal(again([2, 5], seed=1, progress=False, output_type="np"), expected)
    made = hub_class("rar").holding(pipeline.gpt)
    made.save_pretrained(tmp_path / "hub")
    loaded = hub_class("rar").from_pretrained(tmp_path / "hub")
    assert all(torch.equal(w, loaded.state_dict()[name]) for name, w in pipeline.gpt.state_dict().items())
    assert 'hub_class("rar").from_pretrained' in (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.parametrize("ordered", [False, True])
def test_compiled_steps_draw_the_same_tokens(pipeline, ordered):
    labels, generator = torch.tensor([1, 8]), torch.Generator().manual_seed(3)
    orders = torch.stack([torch.randperm(16, generator=generator) for _ in range(2)]) if ordered else None
    noise = torch.randint(2**62, (2, 16), generator=generator)
    drawn = [generate(pipeline.gpt, labels, orders=orders, noise=noise, compile=c, **SCHEDULE) for c in (False, True)]
    assert torch.equal(*drawn)
