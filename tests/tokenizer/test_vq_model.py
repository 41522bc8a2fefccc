"""The tokenizer against the recorded runs, and what the recordings do not show: sizes, inference from weights, errors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers import assert_close, golden_state, load_golden, randomize
from tokenizer.load import build_tokenizer, load_tokenizer
from tokenizer.released import adapted
from tokenizer.tokenizer_image.vq_model import ModelArgs, VQ_models, VQModel, VQModelArgs
from utils.checkpoint import Checkpoint, save_safetensors

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(scope="module", params=["vq16", "vq8"])
def recorded(request) -> tuple[VQModel, dict[str, np.ndarray], dict]:
    arrays, meta = load_golden(request.param)
    config = meta["config"]
    names = ("codebook_size", "codebook_embed_dim", "z_channels", "ch", "entropy_loss_ratio")
    model = VQ_models[config["vq_model"]](**{name: config[name] for name in names})
    weights = golden_state(meta["state_dict"], config["seed"], keep=("codebook_used",))
    assert model.load_state_dict(weights, strict=False).missing_keys == ["quantize.codebook_used"]
    return model, {name: torch.as_tensor(array) for name, array in arrays.items()}, meta


def small_vq4(**kwargs) -> VQModel:
    torch.manual_seed(0)
    return VQ_models["VQ-4"](**{"codebook_size": 32, "z_channels": 32, **kwargs})


def test_state_dict_names_and_shapes(recorded):
    model, _, meta = recorded
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == meta["state_dict"]
    assert model.quantize.codebook_used.dtype == torch.int64


@torch.no_grad()
def test_encode(recorded):
    model, arrays, _ = recorded
    model.eval()
    quant, losses, (perplexity, encodings, indices) = model.encode(arrays["image"])
    assert torch.equal(indices, arrays["encode/indices"])
    assert_close(F.normalize(model.quant_conv(model.encoder(arrays["image"])), dim=1), arrays["encode/latent"])
    assert_close(quant, arrays["encode/quant"])
    assert losses == (None, None, None, None) and perplexity is None and encodings is None


@pytest.mark.slow
@torch.no_grad()
def test_decode_code(recorded):
    model, arrays, _ = recorded
    model.eval()
    shape = arrays["encode/quant"].shape
    assert_close(model.decode_code(arrays["encode/indices"], shape), arrays["decode_code/image"])
    batch, _, height, width = shape
    assert_close(model.decode_code(arrays["codes"].view(batch, height, width)), arrays["codes/image"])


@pytest.mark.slow
def test_training_losses_and_gradients(recorded):
    model, arrays, _ = recorded
    model.train()
    model.zero_grad()
    model.quantize.codebook_used.zero_()
    recon, (vq, commit, entropy, usage) = model(arrays["image"])
    assert_close(recon, arrays["train/recon"])
    assert_close(vq, arrays["train/vq_loss"])
    assert_close(commit, arrays["train/commit_loss"])
    assert_close(entropy, arrays["train/entropy_loss"])
    assert_close(usage, arrays["train/usage"])

    (F.mse_loss(recon, arrays["image"]) + vq + commit + entropy).backward()
    gradients = [name for name in arrays if name.startswith("train/grad/")]
    assert gradients
    for name in gradients:
        assert_close(model.get_parameter(name.removeprefix("train/grad/")).grad, arrays[name])


@pytest.mark.parametrize(("name", "millions", "downsample"), [("VQ-16", 72, 16), ("VQ-8", 70, 8)])
def test_full_size(name, millions, downsample):
    with torch.device("meta"):
        model = VQ_models[name](codebook_size=16384, codebook_embed_dim=8)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert model.downsample == downsample


@pytest.mark.slow
@torch.no_grad()
def test_wide_and_tall_images():
    model = small_vq4().eval()
    images = torch.rand(2, 3, 16, 40) * 2 - 1
    quant, _, (_, _, indices) = model.encode(images)
    assert quant.shape == (2, 8, 4, 10) and indices.shape == (80,)
    expected = model.decode(quant)
    assert_close(model.decode_code(indices, quant.shape), expected)
    assert_close(model.decode_code(indices.view(2, -1), list(quant.shape)), expected)
    assert_close(model.decode_code(indices, (2, 4, 10, 8), channel_first=False), expected)
    assert model(images.transpose(2, 3))[0].shape == (2, 3, 40, 16)


@pytest.mark.slow
@torch.no_grad()
def test_channels_last_gives_the_same_numbers():
    model = small_vq4().eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    quant, _, (_, _, indices) = model.encode(images)
    expected = model.decode_code(indices, quant.shape)
    model = model.to(memory_format=torch.channels_last)
    _, _, (_, _, again) = model.encode(images.contiguous(memory_format=torch.channels_last))
    images = model.decode_code(again, quant.shape)
    assert torch.equal(indices, again)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert_close(images, expected, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_decoder_in_bfloat16():
    """Images are close to float32's, and codes are those of float32."""
    model = randomize(small_vq4())
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    quant, _, (_, _, indices) = model.encode(images)
    expected = model.decode_code(indices, quant.shape)
    assert model.decode_in_bfloat16() is model
    assert torch.equal(model.encode(images)[2][2], indices)
    decoded = model.decode_code(indices, quant.shape)
    assert decoded.dtype == torch.bfloat16 and not torch.equal(decoded.float(), expected)
    assert (decoded.float() - expected).abs().mean() < 0.03 * expected.abs().mean()


@pytest.mark.slow
def test_decode_precisions(small_files):
    assert load_tokenizer(small_files.vq).decoder.conv_in.weight.dtype == torch.float32
    half = load_tokenizer(small_files.vq, decode_precision="bf16")
    assert half.decoder.conv_in.weight.dtype == torch.bfloat16 and half.encoder.conv_in.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="decode_precision is 'fp8': give 'none'"):
        load_tokenizer(small_files.vq, decode_precision="fp8")


@torch.no_grad()
def test_half_precision_weights():
    model = small_vq4().eval().bfloat16()
    quant, _, (_, _, indices) = model.encode(torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16))
    assert quant.dtype == torch.bfloat16
    assert model.decode_code(indices, quant.shape).dtype == torch.bfloat16


@torch.no_grad()
def test_codes_under_autocast_search_the_codebook_in_float32(monkeypatch):
    """Autocast rounds the latents, and their nearest vector is found as float32 finds it."""
    model = small_vq4().eval()
    latents = torch.randn(1, 8, 30, 30)
    monkeypatch.setattr(model, "latents", lambda pixels: latents)
    expected = model.to_codes(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.to_codes(latents), expected)
        quant, _, (_, _, indices) = model.encode(latents)
    assert torch.equal(indices, expected.flatten()) and quant.dtype == torch.float32
    latents[0, 3, 2, 1] = torch.inf
    broken = model.to_codes(latents)
    assert broken[0, 2, 1] == -1 and (broken < 0).sum() == 1


@pytest.mark.slow
def test_trains_under_autocast():
    model = small_vq4(entropy_loss_ratio=0.1).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recon, losses = model(torch.rand(2, 3, 16, 16) * 2 - 1)
    assert all(loss.dtype == torch.float32 for loss in losses)
    (recon.float().square().mean() + sum(losses[:3])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("VQ-16", {"ch": 96, "z_channels": 48, "codebook_size": 24, "codebook_embed_dim": 5}),
        ("VQ-8", {"ch": 32, "z_channels": 7, "codebook_size": 100, "codebook_show_usage": False}),
        ("VQ-4", {}),
        ("VQ-4", {"ch": 32, "encoder_ch_mult": [2, 1, 3], "decoder_ch_mult": [1, 5, 2], "codebook_embed_dim": 3}),
    ],
)
def test_shape_is_read_off_the_weights(name, kwargs):
    with torch.device("meta"):
        model = VQ_models[name](**kwargs)
        config, state = adapted(checkpoint_of(model.state_dict()))
        again = build_tokenizer(config)
    assert config == model.identity == again.identity and again.config == model.config and model.family == name
    assert {n: v.shape for n, v in again.state_dict().items()} == {n: v.shape for n, v in state.items()}


def checkpoint_of(state: dict) -> Checkpoint:
    return Checkpoint(Path("vq.pt"), state, None, None, None, None, "tokenizer")


def test_no_name_for_other_downsamplings():
    assert VQModel(VQModelArgs(encoder_ch_mult=[1, 2], decoder_ch_mult=[1, 2], ch=32)).family == "VQGAN"
    assert ModelArgs is VQModelArgs


def test_weights_of_something_else():
    with torch.device("meta"):
        state = VQ_models["VQ-4"]().state_dict()
    assert adapted(checkpoint_of({"tok_embeddings.weight": torch.zeros(4, 4)})) is None
    with pytest.raises(ValueError, match=r"vq\.pt is not a whole image tokenizer: .*decoder\.conv_blocks\.0"):
        adapted(checkpoint_of({n: v for n, v in state.items() if not n.startswith("decoder.conv_blocks")}))
    name = "encoder.conv_blocks.1.res.0.conv1.weight"
    with pytest.raises(ValueError, match="48 channels"):
        adapted(checkpoint_of({**state, name: torch.empty(48, 32, 3, 3)}))


def test_size_errors():
    model = small_vq4()
    with pytest.raises(ValueError, match=r"30 high and 32 wide.*multiples of 4"):
        model.encode(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match="33 wide"):
        model(torch.zeros(1, 3, 32, 33))
    with pytest.raises(ValueError, match="pass shape"):
        model.decode_code(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="4 codes"):
        model.decode_code(torch.zeros(1, 4, dtype=torch.long), (1, 8, 3, 3))
    with pytest.raises(ValueError, match="multiples of 32"):
        VQModel(VQModelArgs(ch=48))
    with pytest.raises(ValueError, match="numbers of levels"):
        VQModel(replace(model.config, encoder_ch_mult=[1, 2]))


@pytest.mark.parametrize("content", ["{", "7", "null"])
def test_load_tokenizer_beside_a_damaged_config_names_it(small_files, tmp_path, content):
    save_safetensors(tmp_path / "model.safetensors", load_tokenizer(small_files.vq).state_dict())
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_tokenizer(tmp_path)
