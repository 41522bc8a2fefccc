"""What an accelerator has to compute as a CPU does. Run where there is one; nothing here has a meaning without."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoregressive.models import compiled, decode_step, on_cuda
from autoregressive.models.generate import generate
from autoregressive.models.gpt import ModelArgs, Rows, Transformer
from autoregressive.models.kv_cache import StaticCache
from autoregressive.models.machine import attention_bias
from autoregressive.models.sampling import choose, draw_race, race_noise, running_sum
from autoregressive.models.settings import SamplingConfig
from autoregressive.pipeline import ImagePipeline
from autoregressive.sample.many import fits_on_cuda, fitting_batch_size
from autoregressive.train import train_c2i, train_c2i_fsdp
from tests.autoregressive.test_goldens import MODELS, RUNS, build, condition
from tests.helpers import randomize
from tests.training import make_codes, metrics, repetitive_codes, run_here
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.checkpoint import read_checkpoint
from utils.distributed import Distributed, pick_device
from utils.rng import image_noise
from utils.runs import find_checkpoint
from utils.training.trainer import Trainer

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


def test_recorded_steps_serve_other_images_and_settings():
    """As the plain steps on the same device, over calls that share recordings and such that need new ones."""
    device = pick_device()
    if device.type != "cuda":
        pytest.skip("steps are recorded on CUDA")
    model, arrays, _ = build("par4")
    model, labels = model.to(device), torch.from_numpy(arrays["labels"])
    settings = [{}, {"cfg_scale": 3.0}, {"cfg_scale": 1.5, "temperature": 0.7}, {"cfg_scale": 1.5, "cfg_interval": 9}]
    settings += [{"top_k": 9}, {"top_k": 7, "top_p": 0.9}, {"top_k": 7, "top_p": 0.5}, {"sample_logits": False}]
    for turn in range(3):
        for asked in settings:
            noise = image_noise(turn, range(len(labels)), model.layout.tokens)
            drawn = generate(model, labels, noise=noise, compile=True, **asked)
            agree = (drawn == generate(model, labels, noise=noise, **asked)).float().mean()
            assert agree > 0.99, f"turn {turn}, {asked}: compiled kernels round otherwise, now and then"


@pytest.mark.parametrize("dim, heads", [(256, 4), (200, 2)], ids=["heads of 64", "heads of 100"])
def test_logits_of_a_compiled_bf16_step_agree_with_plain_attention(dim, heads):
    """The production path: bfloat16, a bias, one row, whichever kernel takes it."""
    device = pick_device()
    if device.type != "cuda":
        pytest.skip("the compiled step is for CUDA")
    model = bf16_model(device, dim=dim, n_head=heads)
    width = on_cuda.cache_width(dim // heads)
    rows = 1 + on_cuda.cache_rows(model.layout.rows - 1)
    cache = StaticCache(2, 8, heads, rows, width, device, torch.bfloat16)
    for tensor in cache.keys + cache.values:
        tensor[..., : dim // heads].normal_()
    at, length = torch.tensor([40], device=device), 64
    seen = (torch.arange(length, device=device) <= 40).expand(8, 1, 1, length)
    with torch.inference_mode():
        step = (model, torch.arange(8, device=device)[:, None], Rows(cache, at, length))
        bias = attention_bias(seen, torch.bfloat16)
        fast = compiled.compiled_decode_rows()(*step, bias)
        with sdpa_kernel(SDPBackend.MATH):
            plain = decode_step.decode_rows(*step, seen)
    assert (fast - plain).abs().max() < 0.02 * plain.abs().max()


@pytest.mark.parametrize("settings", [{}, {"cfg_interval": 5}, {"cfg_scale": 1.0}, {"top_k": 9}], ids=str)
@pytest.mark.parametrize("dim, heads", [(256, 4), (200, 2)], ids=["heads of 64", "heads of 100"])
def test_recorded_bf16_steps_repeat_themselves(dim, heads, settings):
    """After a guided call the cache is larger than an unguided batch; steps past the interval have half the rows."""
    device = pick_device()
    if device.type != "cuda":
        pytest.skip("steps are recorded on CUDA")
    model = bf16_model(device, dim=dim, n_head=heads)
    labels, noise = torch.arange(4), image_noise(0, range(4), 64)
    generate(model, labels, noise=noise, compile=True, cfg_scale=2.0)
    asked = {"noise": noise, "compile": True, "cfg_scale": 2.0, **settings}
    first, *others = (generate(model, labels, **asked) for _ in range(4))
    assert all(torch.equal(drawn, first) for drawn in others) and len(first.unique()) > 8


def bf16_model(device, **sizes):
    sizes = {"n_layer": 2, "multiple_of": 32, "vocab_size": 64, "num_classes": 10, "block_size": 64, **sizes}
    return randomize(Transformer(ModelArgs(**sizes)), seed=4).to(device, torch.bfloat16).eval().requires_grad_(False)


def test_race_has_the_bits_of_the_cpu():
    device = pick_device()
    keys, codes = image_noise(0, range(16), 64).view(-1), torch.arange(4096)
    bits, noise = race_noise(keys, codes)
    there, noise_there = race_noise(keys.to(device), codes.to(device))
    assert torch.equal(there.cpu(), bits)
    torch.testing.assert_close(noise_there.cpu(), noise, rtol=1e-5, atol=0)
    logits = torch.randn(len(keys), 4096, generator=torch.Generator().manual_seed(0))
    for config in (SamplingConfig(), SamplingConfig(top_k=100, temperature=0.7)):
        expected = choose(logits, config, keys)
        for draw in (draw_race, compiled.compiled_race()) if device.type == "cuda" else (draw_race,):
            picks = choose(logits.to(device), config, keys.to(device), draw=draw).cpu()
            assert (picks == expected).float().mean() > 0.99


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_one_image_is_the_same_every_time(compile):
    device = pick_device()
    if compile and device.type != "cuda":
        pytest.skip("the compiled step is for CUDA")
    model, arrays, _ = build("c2i")
    label, noise = torch.from_numpy(arrays["labels"])[:1], image_noise(0, [0], model.layout.tokens)
    first = generate(model.to(device), label, noise=noise, compile=compile)
    assert all(torch.equal(generate(model, label, noise=noise, compile=compile), first) for _ in range(20))
    numbers = torch.rand(1, 16384, device=device)
    assert len({sum(running_sum(numbers)[0].tolist()) for _ in range(50)}) == 1


def test_decoding_in_strips():
    """The pixels of the whole image, in a part of the memory."""
    device = pick_device()
    tokenizer = VQ_models["VQ-16"]().eval().to(device)
    codes = torch.randint(16384, (1, 32, 32), generator=torch.Generator().manual_seed(0)).to(device)
    peaks, images = [], []
    for decode in (tokenizer.to_pixels, tokenizer.to_pixels_in_strips):
        held = 0  # by the weights, and by the models of earlier tests
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
        with torch.inference_mode():
            images.append(decode(codes).cpu())
        peaks.append(torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else 0)
    whole, strips = images
    assert (strips - whole).abs().max() < 2e-3 * whole.abs().max()
    assert device.type != "cuda" or peaks[1] < peaks[0] / 2


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
    expected = list(pipeline.batches(pipeline.requests(labels, cfg_scale=2.0)))
    for _ in range(3):
        drawn = list(pipeline.batches(pipeline.requests(labels, cfg_scale=2.0), ahead=True))
        assert [numbers for numbers, _ in drawn] == [numbers for numbers, _ in expected]
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(drawn, expected, strict=True))

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    pipeline.decode = full
    with pytest.raises(torch.OutOfMemoryError):
        list(pipeline.batches(pipeline.requests(labels), ahead=True))


def test_the_largest_batch_that_fits(small_files):
    device = pick_device()
    if device.type != "cuda":
        pytest.skip("batches are tried on CUDA")
    pipeline = ImagePipeline.from_pretrained(small_files.folder, gpt="gpt.pt", vq="vq.pt", device=device)
    assert (
        fitting_batch_size(pipeline, Distributed(device), 48, SamplingConfig(cfg_scale=2.0))
        == 48
        == pipeline.batch_size
    )
    before = torch.cuda.memory_reserved(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min((before + 2**28) / total, 1.0), device)
    try:
        assert not fits_on_cuda(pipeline, 20000, SamplingConfig(cfg_scale=2.0))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
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


def test_training_steps_wait_for_nothing(codes, tmp_path, monkeypatch):
    """A process that waits for its device in a step cannot notice that another is gone."""
    device = pick_device()
    if device.type != "cuda":
        pytest.skip("CUDA tells of waiting")
    take = Trainer._train_step

    def watched(trainer, batch):
        torch.cuda.set_sync_debug_mode("error" if trainer.step > 1 else "default")
        try:
            take(trainer, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_train_step", watched)
    assert len(losses(codes, tmp_path, train_c2i, "cuda", "--mixed-precision", "bf16")) == 10


def test_equal_runs_end_with_equal_bits_where_asked(codes, tmp_path):
    device = pick_device()
    if device.type != "cuda":
        pytest.skip("a CPU adds up in one order anyway")
    try:
        for name in "ab":
            losses(codes, tmp_path / name, train_c2i, "cuda", "--mixed-precision", "bf16", "--deterministic")
    finally:
        torch.use_deterministic_algorithms(False)
    a, b = (read_checkpoint(find_checkpoint(tmp_path / name)).model for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


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
