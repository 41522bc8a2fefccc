"""What an accelerator has to compute as a CPU does. Run where there is one; nothing here has a meaning without."""

import numpy as np
import pytest
import torch

from autoregressive.models.generate import generate
from autoregressive.pipeline import ImagePipeline
from autoregressive.sample.batch_size import fits_on_cuda, fitting_batch_size
from autoregressive.train import train_c2i, train_c2i_fsdp
from tests.autoregressive.test_goldens import MODELS, RUNS, build, condition
from tests.training import make_codes, metrics, repetitive_codes, run_here
from utils.distributed import Distributed, pick_device

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", MODELS)
def test_recorded_greedy_tokens(name, run, compile):
    device = pick_device()
    if compile and device.type != "cuda":
        pytest.skip("the compiled step is for CUDA")
    model, arrays, _ = build(name)
    cond, emb_masks = condition(arrays)
    codes = generate(model.to(device), cond, emb_masks=emb_masks, sample_logits=False, compile=compile, **RUNS[run])
    expected = arrays.get(f"generate/{run}/raster_tokens", arrays[f"generate/{run}/tokens"])
    assert codes.tolist() == expected.tolist()


def test_bfloat16_stays_close_to_float32():
    device = pick_device()
    model, arrays, _ = build("c2i")
    tokens, labels = torch.from_numpy(arrays["codes"]), torch.from_numpy(arrays["labels"])
    exact = model(tokens[:, :-1], labels)
    rounded = model.to(device, torch.bfloat16)(tokens[:, :-1].to(device), labels.to(device)).cpu()
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_images_drawn_ahead(small_files, compile):
    """Decoded in a thread while the next are drawn, they are the same to the byte; errors of the thread end the drawing."""
    device = pick_device()
    if compile and device.type != "cuda":
        pytest.skip("the compiled step is for CUDA")
    pipeline = ImagePipeline.from_pretrained(
        small_files.folder, gpt="gpt.pt", vq="vq.pt", device=device, batch_size=4, compile=compile
    )
    labels = [i % 10 for i in range(22)]
    expected = list(pipeline.batches(labels, cfg_scale=2.0))
    for _ in range(3):
        drawn = list(pipeline.batches(labels, cfg_scale=2.0, ahead=True))
        assert [numbers for numbers, _ in drawn] == [numbers for numbers, _ in expected]
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(drawn, expected, strict=True))

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    pipeline.decode = full
    with pytest.raises(torch.OutOfMemoryError):
        list(pipeline.batches(labels, ahead=True))


def test_the_largest_batch_that_fits(small_files):
    device = pick_device()
    if device.type != "cuda":
        pytest.skip("batches are tried on CUDA")
    pipeline = ImagePipeline.from_pretrained(small_files.folder, gpt="gpt.pt", vq="vq.pt", device=device)
    assert fitting_batch_size(pipeline, Distributed(device), 48, cfg_scale=2.0) == 48 == pipeline.batch_size
    before = torch.cuda.memory_reserved(device)
    assert not fits_on_cuda(pipeline, 10**7, cfg_scale=2.0)
    assert torch.cuda.memory_reserved(device) <= before


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes") / "packed"
    return make_codes(folder, repetitive_codes(48, 2, 16, 64), np.arange(48) % 10, image_size=16, vocab=64, classes=10)


def losses(codes, results, script, device, *more):
    """Ten steps of GPT-XS without dropout."""
    flags = ["--code-path", codes, "--results-dir", results, "--gpt-model", "GPT-XS", "--vocab-size", 64]
    flags += ["--num-classes", 10, "--image-size", 16, "--downsample-size", 4, "--global-batch-size", 16]
    flags += ["--num-workers", 0, "--log-every", 1, "--lr", 5e-4, "--dropout-p", 0, "--token-dropout-p", 0, "--ema"]
    run_here(script, *flags, "--max-steps", 10, "--epochs", 9, "--no-wandb", "--device", device, *more)
    return metrics(results, "loss")


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 3e-2), ("fp16", 3e-2)])
@pytest.mark.parametrize("kind", ["ddp", "ddp --no-compile", "fsdp", "fsdp --activation-checkpointing"])
@pytest.mark.parametrize("layout", ["", "--ar-token-num 4", "--patch-level 2"], ids=["raster", "PAR", "NPP"])
def test_training_losses(codes, tmp_path, precision, tolerance, kind, layout):
    """As on a CPU in float32, compiled or not, in shards or whole; the checkpoint is written too."""
    device = pick_device().type
    if device != "cuda" and kind != "ddp --no-compile":
        pytest.skip("compilation and shards are for CUDA")
    script = train_c2i_fsdp if kind.startswith("fsdp") else train_c2i
    flags = [*layout.split(), "--mixed-precision", precision, *kind.split()[1:]]
    on_device = losses(codes, tmp_path / "device", script, device, *flags)
    on_cpu = losses(codes, tmp_path / "cpu", train_c2i, "cpu", *layout.split(), "--mixed-precision", "fp32")
    assert on_device == pytest.approx(on_cpu, abs=tolerance) and len(on_cpu) == 10
    assert len(list((tmp_path / "device").glob("*/checkpoints/0000010*"))) == 1
