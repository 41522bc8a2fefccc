"""MaskGIT's VQGAN against the recorded run of the published one, read from a file in the published format."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import assert_close, golden_tokenizer_state, load_golden, randomize
from tests.training import load, make_images, run_folder, run_here
from tokenizer.load import build_tokenizer, load_tokenizer
from tokenizer.maskgit import MaskGITTokenizer
from tokenizer.tokenizer_image import vq_train
from tokenizer.tokenizer_image.hub import for_hub, hub_class
from tokenizer.tokenizer_image.sizes import VQ_SIZES

# A decoder amplifies a rounding of 1e-7 by 300.
IMAGES = {"rtol": 1e-3, "atol": 5e-5}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[MaskGITTokenizer, dict[str, torch.Tensor], dict]:
    """The tokenizer of a file in the published format, the record, and what the file holds."""
    arrays, meta = load_golden("maskgit_vqgan")
    path = tmp_path_factory.mktemp("maskgit") / "maskgit-vqgan-imagenet-f16-256.bin"
    torch.save(golden_tokenizer_state(meta), path)
    return load_tokenizer(path), {name: torch.as_tensor(array) for name, array in arrays.items()}, meta


def test_maskgit_file_is_recognised_with_its_shape(recorded):
    tokenizer, _, meta = recorded
    assert isinstance(tokenizer, MaskGITTokenizer)
    assert (tokenizer.family, tokenizer.codebook_size, tokenizer.downsample) == ("MaskGIT-VQGAN", 256, 16)
    assert {name: list(value.shape) for name, value in tokenizer.state_dict().items()} == meta["state_dict"]


def test_maskgit_codes_and_pixels_are_the_recorded_ones(recorded):
    tokenizer, arrays, _ = recorded
    pixels = 2 * arrays["image"] - 1
    codes = tokenizer.to_codes(pixels)
    assert torch.equal(codes.flatten(1), arrays["encode/indices"]) and codes.dtype == torch.int64
    with torch.no_grad():
        assert_close(tokenizer.latents(pixels), arrays["encode/latent"])
    images = (tokenizer.to_pixels(codes) + 1) / 2
    assert_close(images, arrays["decode_code/unclamped"], **IMAGES)
    assert_close(images.clamp(0, 1), arrays["decode_code/image"], **IMAGES)
    images = (tokenizer.to_pixels(arrays["codes"].view(2, 4, 4)) + 1) / 2
    assert_close(images.clamp(0, 1), arrays["codes/image"], **IMAGES)


@pytest.mark.slow
def test_maskgit_training_step_is_the_recorded_one(recorded):
    tokenizer, arrays, _ = recorded
    tokenizer = build_tokenizer(tokenizer.identity).train()
    tokenizer.load_state_dict(recorded[0].state_dict())
    recons, losses = tokenizer(2 * arrays["image"] - 1)
    recons = (recons + 1) / 2
    loss = F.mse_loss(recons, arrays["image"]) + losses.total
    assert_close(recons, arrays["train/recon"], **IMAGES)
    assert_close(losses.total, arrays["train/quant_loss"])
    assert_close(loss, arrays["train/loss"])
    loss.backward()
    for name in [name for name in arrays if name.startswith("train/grad/")]:
        assert_close(tokenizer.get_parameter(name.removeprefix("train/grad/")).grad, arrays[name], **IMAGES)


def test_maskgit_full_size_has_the_published_numbers():
    size = dict(VQ_SIZES["MaskGIT-VQGAN"])
    with torch.device("meta"):
        tokenizer = build_tokenizer({"quantizer": size.pop("quantizer"), "network": size})
    assert len(tokenizer.state_dict()) == 168
    assert round(sum(p.numel() for p in tokenizer.parameters()) / 1e5) == 545


@pytest.fixture(scope="module")
def small() -> MaskGITTokenizer:
    """Another downsampling and narrow levels."""
    network = {"name": "maskgit", "ch_mult": [1, 1, 2], "ch": 32, "blocks": 1}
    quantizer = {"name": "vq_legacy", "codebook_size": 40, "codebook_embed_dim": 6}
    return randomize(build_tokenizer({"network": network, "quantizer": quantizer}))


def test_maskgit_images_that_are_not_square_by_threads_batches_and_strips(small):
    pixels = torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = small.to_codes(pixels)
    images = small.to_pixels(codes)
    assert codes.shape == (3, 6, 10) and images.shape == pixels.shape and len(codes.unique()) > 5
    assert torch.equal(small.to_codes(pixels[1:2]), codes[1:2])
    assert_close(small.to_pixels(codes[1:2]), images[1:2])
    assert (small.to_pixels_in_strips(codes) - images).abs().max() < 1e-3 * images.abs().max()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(small.to_codes(pixels), codes) and torch.equal(small.to_pixels(codes), images)
    finally:
        torch.set_num_threads(threads)


def test_maskgit_half_precision_decoder_keeps_codes(small):
    tokenizer = build_tokenizer(small.identity).eval()
    tokenizer.load_state_dict(small.state_dict())
    codes = torch.arange(40)[None, :36].view(1, 6, 6)
    expected = small.to_pixels(codes)
    half = tokenizer.decode_in_bfloat16().to_pixels(codes)
    assert half.dtype == torch.bfloat16 and tokenizer.fingerprint() == small.fingerprint()
    assert (half.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_maskgit_goes_to_the_hub_and_back(small, tmp_path):
    for_hub(small).save_pretrained(tmp_path / "m")
    assert 'hub_class("maskgit").from_pretrained' in (tmp_path / "m" / "README.md").read_text()
    for back in (hub_class("maskgit").from_pretrained(tmp_path / "m"), load_tokenizer(tmp_path / "m")):
        assert back.identity == small.identity and back.fingerprint() == small.fingerprint()


@pytest.mark.slow
def test_maskgit_is_trained_by_name_and_fine_tuned_from_its_file(tmp_path):
    images = make_images(tmp_path / "images")
    words = ["--data-path", images, "--image-size", 16, "--global-batch-size", 2, "--num-workers", 0, "--lr", 0]
    words += [
        "--mixed-precision",
        "none",
        "--perceptual-weight",
        0,
        "--disc-weight",
        0,
        "--max-steps",
        1,
        "--log-every",
        1,
    ]
    new = ["--vq-model", "MaskGIT-VQGAN", "--vq-width", 32, "--codebook-size", 32]
    run_here(vq_train, *words, *new, "--results-dir", tmp_path / "new")
    path = max((run_folder(tmp_path / "new") / "checkpoints").glob("*.pt"))
    trained = load_tokenizer(path)
    quantizer = {"name": "vq_legacy", "codebook_size": 32, "codebook_embed_dim": 256}
    assert load(path)["config"]["quantizer"] == quantizer == trained.quantize.config
    assert (trained.network["ch"], trained.downsample, load(path)["args"].quantizer) == (32, 16, "vq_legacy")
    published = tmp_path / "published.bin"
    torch.save(trained.state_dict(), published)
    run_here(vq_train, *words, "--finetune", "--vq-ckpt", published, "--results-dir", tmp_path / "tuned")
    tuned = load_tokenizer(max((run_folder(tmp_path / "tuned") / "checkpoints").glob("*.pt")))
    assert tuned.fingerprint() == trained.fingerprint() == load_tokenizer(published).fingerprint()


@pytest.mark.parametrize(
    "part", ["decoder.conv_out.bias", "quantize.embedding.weight", "encoder.down.0.block.0.conv1.weight"]
)
def test_maskgit_file_without_a_weight_is_refused(small, tmp_path, part):
    torch.save({name: tensor for name, tensor in small.state_dict().items() if name != part}, tmp_path / "part.bin")
    with pytest.raises(ValueError, match=part.replace(".", r"\.")):
        load_tokenizer(tmp_path / "part.bin")


def test_maskgit_codes_do_not_depend_on_l2_norm_flags(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / "m.bin")
    with pytest.raises(ValueError, match=r"quantizer vq_legacy takes .*got .*l2_norm"):
        load_tokenizer(tmp_path / "m.bin", codebook_l2_norm=True)
