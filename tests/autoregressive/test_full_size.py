"""GPT-B and VQ-16 at their published size, with random weights, from every published kind of file to a picture."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.gpt import GPT_models, Transformer
from autoregressive.pipeline import ImagePipeline, load_gpt, load_tokenizer
from autoregressive.sample import sample_c2i
from tests.training import run_here
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.checkpoint import read_checkpoint, save_safetensors

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ARGS = {"gpt_model": "GPT-B", "gpt_type": "c2i", "image_size": 256, "downsample_size": 16, "num_classes": 1000}
TOKENS = torch.randint(16384, (2, 15), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([207, 999])


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in state.items()}


def published_forms(state: dict) -> dict[str, dict]:
    """File name: what the published systems write into it."""
    stray = {"freqs_cis": torch.zeros(257, 32, 2)}
    shifted = {name: value + 1 for name, value in state.items()}
    return {
        "c2i_B_256.pt": {
            "model": state,
            "optimizer": {"state": {}},
            "steps": 5,
            "args": Namespace(**ARGS),
            "ema": shifted,
        },
        "deepspeed.pt": {
            "module": {**prefixed(state, "module."), "module.freqs_cis": stray["freqs_cis"]},
            "global_steps": 5,
        },
        "lightning.ckpt": {"state_dict": prefixed(state, "model._orig_mod."), "global_step": 5},
        "0005000/consolidated.pth": {**state, **stray},
    }


@pytest.fixture(scope="module")
def gpt() -> Transformer:
    torch.manual_seed(0)
    model = GPT_models["GPT-B"](vocab_size=16384, block_size=256, num_classes=1000).eval()
    torch.nn.init.normal_(model.output.weight, std=0.05)
    return model


@pytest.fixture(scope="module")
def logits(gpt) -> torch.Tensor:
    with torch.no_grad():
        return gpt(TOKENS, LABELS)


@pytest.fixture(scope="module")
def vq(tmp_path_factory) -> Path:
    """A tokenizer's file {"model", "ema"}, the averaged weights being others."""
    torch.manual_seed(1)
    state = VQ_models["VQ-16"]().state_dict()
    path = tmp_path_factory.mktemp("vq") / "vq_ds16_c2i.pt"
    torch.save({"model": state, "ema": {name: value * 2 for name, value in state.items()}}, path)
    return path


def same_logits(path: Path, logits: torch.Tensor, **flags) -> None:
    model = load_gpt(path, gpt_model="GPT-B", num_classes=1000, codebook_size=16384, ar_token_num=1, **flags)
    assert 110.5e6 < model.num_parameters < 111.5e6
    with torch.no_grad():
        assert torch.equal(model(TOKENS, LABELS), logits)


@pytest.mark.parametrize("name", ["c2i_B_256.pt", "deepspeed.pt", "lightning.ckpt", "0005000/consolidated.pth"])
@pytest.mark.slow
def test_published_files(gpt, vq, logits, name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    torch.save(published_forms(gpt.state_dict())[name], path)
    same_logits(path, logits, image_size=256)

    if name == "c2i_B_256.pt":
        same_logits(path, logits)  # the size is in the file
        checkpoint = read_checkpoint(path)
        assert (checkpoint.format, checkpoint.steps, checkpoint.args) == ("ddp", 5, ARGS)
        averaged = load_gpt(path, use_ema=True)
        assert torch.equal(averaged.norm.weight, gpt.norm.weight + 1)
        with pytest.raises(ValueError, match=r"GPT-B \(12 layers, dim 768, 111M\).*--gpt-model GPT-L"):
            load_gpt(path, gpt_model="GPT-L")
    if name == "lightning.ckpt":
        output = tmp_path / "grid.png"
        files = ["--gpt-ckpt", path, "--vq-ckpt", vq, "--output", output, "--device", "cpu"]
        run_here(sample_c2i, *files, "--image-size", 64, "--labels", 207, 360, "--cfg-scale", 2)
        grid = np.asarray(Image.open(output))
        assert grid.shape == (68, 4 * 66 + 2, 3) and len(np.unique(grid[2:66, 2:66])) > 20
    if name == "0005000/consolidated.pth":
        pipeline = ImagePipeline.from_pretrained(path, vq=vq, image_size=64, device="cpu")
        (image,) = pipeline([207], cfg_scale=2.0, top_k=2000, progress=False)
        assert image.size == (64, 64) and np.asarray(image).std() > 1
        assert image.tobytes() == pipeline([207], cfg_scale=2.0, top_k=2000, progress=False)[0].tobytes()
        assert image.tobytes() != pipeline([208], cfg_scale=2.0, top_k=2000, progress=False)[0].tobytes()
    path.unlink()


def test_safetensors(gpt, logits, tmp_path):
    save_safetensors(tmp_path / "model.safetensors", gpt.state_dict(), {"args": ARGS})
    same_logits(tmp_path / "model.safetensors", logits)
    same_logits(tmp_path, logits)
    (tmp_path / "model.safetensors").unlink()


def test_tokenizer_file(vq):
    tokenizer = load_tokenizer(vq, vq_model="VQ-16", codebook_size=16384, codebook_embed_dim=8)
    assert 71e6 < sum(p.numel() for p in tokenizer.parameters()) < 73e6
    averaged = load_tokenizer(vq, use_ema=True)
    assert torch.equal(averaged.decoder.conv_in.weight, tokenizer.decoder.conv_in.weight * 2)
    assert tokenizer.downsample == 16
