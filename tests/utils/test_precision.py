"""float32 is float32: which of PyTorch's settings of TF32 are made where."""

import pytest
import torch

from autoregressive.pipeline import ImagePipeline
from tests.helpers import ROOT
from tests.training import make_images, run_here
from tokenizer.load import load_tokenizer
from tokenizer.tokenizer_image import reconstruction_vq_ddp
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.distributed import pick_device, start
from utils.precision import full_float32, use_tf32

BACKENDS = torch.backends
EXACT, TF32 = (False, "highest", "ieee", "ieee"), (True, "high", "tf32", "tf32")


@pytest.fixture(autouse=True)
def restored():
    use_tf32(True)
    yield
    BACKENDS.fp32_precision = "none"
    use_tf32(False)


def settings():
    """The settings that decide, by their older and their newer names."""
    return (
        BACKENDS.cudnn.allow_tf32,
        torch.get_float32_matmul_precision(),
        BACKENDS.cudnn.conv.fp32_precision,
        BACKENDS.cuda.matmul.fp32_precision,
    )


def test_use_tf32_sets_every_name_of_the_setting():
    assert settings() == TF32
    use_tf32(False)
    assert settings() == EXACT


def test_use_tf32_false_wins_over_a_setting_of_all_backends():
    BACKENDS.fp32_precision = "tf32"
    use_tf32(False)
    assert settings() == EXACT
    BACKENDS.fp32_precision = "tf32"
    with full_float32():
        assert settings() == EXACT


def test_full_float32_restores_what_was_allowed():
    torch.set_float32_matmul_precision("medium")
    with full_float32():
        assert settings() == EXACT
        with full_float32():
            assert settings() == EXACT
        assert settings() == EXACT
    assert settings() == (True, "medium", "tf32", "tf32")


@pytest.mark.parametrize("begin", [pick_device, start])
def test_every_script_s_beginning_turns_tf32_off(begin):
    begin("cpu")
    assert settings() == EXACT


def seen_by(module):
    """The settings during each forward pass of a module, as they come."""
    seen = []
    module.register_forward_hook(lambda *_: seen.append(settings()))
    return seen


def test_tokenizer_in_eval_mode_encodes_and_decodes_without_tf32(small_files):
    tokenizer = load_tokenizer(small_files.vq)
    encoder, decoder = seen_by(tokenizer.encoder.conv_in), seen_by(tokenizer.decoder.conv_in)
    images = torch.zeros(1, 3, 32, 32)
    with torch.inference_mode():
        quant, _, _ = tokenizer.encode(images)
        tokenizer.decode(quant)
        codes = tokenizer.to_codes(images)
        tokenizer.decode_code(codes)
        tokenizer.to_pixels(codes)
        tokenizer.to_pixels_in_strips(codes)
        tokenizer(images)
    assert set(encoder) == set(decoder) == {EXACT} and len(decoder) >= 4
    assert settings() == TF32


def test_tokenizer_in_training_computes_as_the_run_asks():
    tokenizer = VQ_models["VQ-4"](codebook_size=8).train()
    seen = seen_by(tokenizer.decoder.conv_in)
    tokenizer(torch.zeros(1, 3, 32, 32))
    assert seen == [TF32]


def test_pipeline_draws_without_tf32(small_files):
    pipeline = ImagePipeline.from_pretrained(small_files.folder, gpt="gpt.pt", vq="vq.pt", device="cpu")
    seen = seen_by(pipeline.gpt.tok_embeddings)
    pipeline([0], seed=0)
    assert set(seen) == {EXACT}


def test_reconstruction_is_measured_without_tf32(small_files, tmp_path):
    images = make_images(tmp_path / "val", classes=1, per_class=1)
    words = ["--vq-ckpt", small_files.vq, "--vq-model", "VQ-4", "--codebook-size", 64, "--device", "cpu"]
    words += ["--data-path", images, "--sample-dir", tmp_path, "--image-size", 32, "--image-size-eval", 32]
    run_here(reconstruction_vq_ddp, *words, "--num-workers", 0, "--no-lpips")
    assert settings() == EXACT


def test_no_script_takes_a_device_without_pick_device():
    """A script that names its own device would compute with PyTorch's defaults."""
    folders = ("autoregressive", "tokenizer", "language", "evaluations", "dataset", "tools")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")] + [ROOT / "app.py"]
    assert [str(file) for file in files if 'torch.device("cuda' in file.read_text()] == []
