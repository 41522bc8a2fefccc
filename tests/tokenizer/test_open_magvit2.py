"""Open-MAGVIT2 against the recorded runs: network, bits, losses, discriminators, and its published files."""

import copy

import pytest
import torch
import torch.nn.functional as F

from autoregressive.train import extract_codes_c2i
from dataset.augmentation import center_view
from dataset.codes import open_codes
from dataset.pixels import load_rgb
from tests.helpers import assert_close, golden_state, load_golden, randomize
from tests.tokenizer.taming import save_lightning
from tests.training import load, make_images, metrics, run_folder, run_here, same
from tokenizer import base
from tokenizer.base import CodebookLosses
from tokenizer.load import build_tokenizer
from tokenizer.tokenizer_image import vq_train
from tokenizer.tokenizer_image.quantizers.lfq import LookupFreeQuantizer, entropy_loss
from tokenizer.tokenizer_image.strips import decode_in_strips
from tokenizer.tokenizer_image.vq_loss import VQLoss
from tools import convert_codes
from utils.checkpoint import save_checkpoint
from utils.origin import origin

IMAGES = {"rtol": 1e-3, "atol": 5e-5}  # decoders amplify a rounding, and the entropy's temperature the latents'


@pytest.fixture(scope="module")
def recorded() -> tuple[dict[str, torch.Tensor], dict]:
    arrays, meta = load_golden("lfq")
    return {name: torch.as_tensor(array) for name, array in arrays.items()}, meta


def weights(meta, seed: int = 0) -> dict[str, torch.Tensor]:
    config = meta["config"]
    return golden_state(meta["state_dict"], config["seed"] + seed, config["gain"])


@pytest.fixture(scope="module")
def tokenizer(recorded):
    config = recorded[1]["config"]
    network = {"name": "open-magvit2", "ch": config["ch"], "ch_mult": config["ch_mult"], "blocks": 4}
    quantizer = {"name": "lfq", "codebook_size": 2 ** config["bits"]}
    losses = {"entropy_loss_ratio": config["codebook_weight"], "commit_loss_beta": config["commit_weight"]}
    made = build_tokenizer({"network": network, "quantizer": quantizer}, **losses)
    made.load_state_dict(weights(recorded[1]))
    return made


def test_open_magvit2_names_and_shapes_are_the_published_ones(recorded, tokenizer):
    assert {name: list(value.shape) for name, value in tokenizer.state_dict().items()} == recorded[1]["state_dict"]
    with torch.device("meta"):
        for levels, entries, numbers in (([1, 1, 2, 2, 4], 339, 115.1), ([1, 2, 2, 4], 283, 112.0)):
            whole = build_tokenizer(
                {"network": {"name": "open-magvit2", "ch_mult": levels}, "quantizer": {"name": "lfq"}}
            )
            assert len(whole.state_dict()) == entries
            assert sum(p.numel() for p in whole.parameters()) / 1e6 == pytest.approx(numbers, abs=0.05)


@pytest.mark.slow
def test_open_magvit2_codes_and_pixels_are_the_recorded_ones(recorded, tokenizer):
    arrays, _ = recorded
    tokenizer.eval()
    with torch.no_grad():
        assert_close(tokenizer.latents(arrays["image"]), arrays["encode/latent"])
    codes = tokenizer.to_codes(arrays["image"])
    assert torch.equal(codes.flatten(), arrays["encode/indices"])
    assert_close(tokenizer.to_pixels(codes), arrays["decode_code/image"], **IMAGES)
    assert torch.equal(tokenizer.quantize.lookup(codes), arrays["encode/quant"])
    some = arrays["codes"].view(2, 4, 4)
    assert torch.equal(tokenizer.quantize.lookup(some), arrays["codes/bits"].float())
    assert_close(tokenizer.to_pixels(some), arrays["codes/image"], **IMAGES)
    assert_close(tokenizer.to_pixels_in_strips(some), arrays["codes/image"], **IMAGES)


@pytest.mark.slow
def test_open_magvit2_training_step_is_the_recorded_one(recorded, tokenizer):
    arrays, meta = recorded
    tokenizer.train().zero_grad()
    recon, losses = tokenizer(arrays["image"])
    assert_close(recon, arrays["train/recon"], **IMAGES)
    assert_close(losses.parts["entropy"] / meta["config"]["codebook_weight"], arrays["train/entropy_loss"])
    assert_close(losses.parts["commit"] / meta["config"]["commit_weight"], arrays["train/commit_loss"])
    loss = F.l1_loss(recon, arrays["image"]) + losses.total
    assert_close(loss, arrays["train/loss"])
    loss.backward()
    grads = [name for name in arrays if name.startswith("train/grad/")]
    assert len(grads) == 7
    for name in grads:
        assert_close(tokenizer.get_parameter(name.removeprefix("train/grad/")).grad, arrays[name], **IMAGES)
    tokenizer.eval()


def test_lfq_losses_at_small_latents_are_the_recorded_ones(recorded):
    arrays, _ = recorded
    latents = arrays["quantizer/latent"].clone().requires_grad_()
    quantizer = LookupFreeQuantizer(2**10, commit_loss_beta=1, entropy_loss_ratio=1).train()
    _, losses, codes = quantizer(latents)
    assert torch.equal(codes.flatten(), arrays["quantizer/indices"])
    assert_close(losses.parts["commit"], arrays["quantizer/commit_loss"])
    assert_close(losses.parts["entropy"], arrays["quantizer/entropy_loss"])
    losses.parts["entropy"].backward()
    assert_close(latents.grad, arrays["quantizer/entropy_loss_grad_latent"])


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_lfq_entropy_is_that_of_the_table_of_all_codes(bits):
    latents = 0.01 * torch.randn(40, bits, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    codes = LookupFreeQuantizer(2**bits).lookup(torch.arange(2**bits)[None, None])[0, :, 0].double()  # (bits, codes)
    p = torch.softmax(2 * latents @ codes / 0.01, dim=1)
    expected = -(p * p.log()).sum(1).mean() + (p.mean(0) * (p.mean(0) + 1e-5).log()).sum()
    assert_close(entropy_loss(latents), expected)


def test_lfq_of_18_bits_gives_the_recorded_codes(recorded):
    arrays, _ = recorded
    codes = LookupFreeQuantizer().nearest(arrays["rule18/latent"]).flatten()
    assert torch.equal(codes, arrays["rule18/indices"]) and codes.max() >= 2**16
    assert torch.equal(codes % 64, arrays["rule18/indices_pre"])
    assert torch.equal(codes // 64, arrays["rule18/indices_post"])


def test_lfq_of_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="--codebook-size 48 is no power of two"):
        LookupFreeQuantizer(48)


@pytest.mark.parametrize("kind", ["patch", "blur"])
def test_discriminators_give_the_recorded_losses(recorded, kind):
    arrays, meta = recorded
    config = meta["config"]
    dim = config["disc_hidden_channels"] if kind == "blur" else None
    loss = VQLoss(
        0, disc_type={"patch": "patchgan"}.get(kind, kind), disc_dim=dim, disc_weight=1.0, gen_weight=0.1, lecam_weight=0.05,
        gen_adv_loss="non-saturating-mean", reconstruction_loss="l1", perceptual_weight=0.0,
    )  # fmt: skip
    shapes = meta[f"discriminator_{kind}"]
    assert {name: list(value.shape) for name, value in loss.discriminator.state_dict().items()} == shapes
    kept = ("running_", "num_batches_tracked", ".kernel")
    state = golden_state(shapes, config["seed"], config["discriminator_gain"], keep=kept)
    loss.discriminator.load_state_dict(state, strict=False)
    for average, start in zip((loss.lecam.real, loss.lecam.fake), config["lecam_start"], strict=True):
        average.fill_(start)
    real, fake = arrays["gan/real"], arrays["gan/fake"].clone().requires_grad_()
    for step in (1, 2):
        found, _ = loss.discriminator_loss(real, fake, step=0)
        assert_close(found, arrays[f"gan/{kind}/d_loss{step}"])
    parts = {"commit": 0.25 * torch.tensor(0.3), "entropy": 0.1 * torch.tensor(-0.4)}
    total, logs = loss.generator_loss(CodebookLosses(parts, torch.tensor(1.0)), real, fake, step=0)
    assert_close(0.1 * logs["adversarial_loss"], arrays[f"gan/{kind}/g_loss"])
    assert_close(total, arrays[f"gan/{kind}/g_total"])
    total.backward()
    assert_close(fake.grad, arrays[f"gan/{kind}/g_grad"], atol=1e-8)
    with torch.no_grad():
        assert_close(loss.discriminator.eval()(real), arrays[f"gan/{kind}/logits_eval"])


def test_blur_discriminator_takes_odd_sizes():
    discriminator = VQLoss(0, disc_type="blur", disc_dim=32, perceptual_weight=0.0).discriminator
    assert discriminator(torch.randn(1, 3, 26, 41)).shape == (1, 1, 4, 6)


def published(path, meta, seed: int = 0):
    """The file as Lightning writes it: raw weights, averaged ones without dots in their names, and the losses' networks."""
    config = meta["config"]
    raw, averaged = weights(meta, seed), weights(meta, seed + 100)
    shapes = {f"loss.discriminator.{name}": shape for name, shape in meta["discriminator_blur"].items()}
    state = {**raw, **golden_state(shapes, config["seed"])}
    for name in meta["names_in_a_checkpoint"]:
        if name not in state and name.startswith("model_ema."):
            whole = {"decay": torch.tensor(0.999), "num_updates": torch.tensor(-1, dtype=torch.int)}
            source = {**averaged, **{k: v + 1 for k, v in state.items() if k.startswith("loss.")}}
            dotless = {key.replace(".", ""): value for key, value in source.items()}
            state[name] = (whole | dotless)[name.removeprefix("model_ema.")]
    assert set(state) >= set(meta["names_in_a_checkpoint"])
    return save_lightning(path, state), raw, averaged


@pytest.mark.slow
def test_open_magvit2_published_file_gives_raw_weights_and_averaged_ones_where_asked_for(recorded, tmp_path):
    arrays, meta = recorded
    path, raw, averaged = published(tmp_path / "imagenet_256_L.ckpt", meta)
    for use_ema, expected in ((False, raw), (True, averaged)):
        loaded = base.load_tokenizer(path, use_ema=use_ema)
        assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
        assert (loaded.family, loaded.codebook_size, loaded.downsample) == ("Open-MAGVIT2", 1024, 16)
    assert torch.equal(base.load_tokenizer(path).to_codes(arrays["image"]).flatten(), arrays["encode/indices"])


def test_open_magvit2_image_of_one_code_is_refused(tokenizer):
    for decode in (tokenizer.to_pixels, tokenizer.to_pixels_in_strips):
        with pytest.raises(ValueError, match="an image of one code has no deviation, which Open-MAGVIT2 decodes by"):
            decode(torch.zeros(1, 1, 1, dtype=torch.long))


def test_open_magvit2_without_a_level_is_not_whole(recorded, tmp_path):
    state = weights(recorded[1])
    del state["encoder.conv_out.weight"]
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"not a whole image tokenizer: it has no entry 'encoder\.conv_out\.weight'"):
        base.load_tokenizer(tmp_path / "x.pt")


def test_averages_that_lack_a_weight_are_refused(recorded, tmp_path):
    """Raw and averaged weights never mix."""
    raw = weights(recorded[1])
    averages = {f"model_ema.{name.replace('.', '')}": value for name, value in raw.items()}
    del averages["model_ema.encoderconv_inweight"]
    torch.save({"state_dict": {**raw, **averages}}, tmp_path / "part.ckpt")
    assert base.load_tokenizer(tmp_path / "part.ckpt").codebook_size == 1024
    with pytest.raises(ValueError, match=r"averaged weights missing \(1\): encoder\.conv_in\.weight"):
        base.load_tokenizer(tmp_path / "part.ckpt", use_ema=True)


def test_open_magvit2_decodes_in_strips_and_in_bfloat16(tokenizer):
    codes = torch.arange(2 * 2 * 3).view(2, 2, 3) * 83 % 1024
    images = tokenizer.eval().to_pixels(codes)
    latents = tokenizer.quantize.lookup(codes)
    assert_close(decode_in_strips(torch.nn.Identity(), tokenizer.decoder, latents, numbers=5000), images, **IMAGES)
    half = copy.deepcopy(tokenizer).decode_in_bfloat16()
    for decode in (half.to_pixels, half.to_pixels_in_strips):
        assert (decode(codes).float() - images).abs().mean() < 0.05 * images.abs().mean()
    assert half.fingerprint() == tokenizer.fingerprint()


# Training

RECIPE = ["--reconstruction-loss", "l1", "--disc-start", 0, "--disc-weight", 1, "--gen-weight", 0.1]
RECIPE += ["--gen-loss", "non-saturating-mean", "--lecam-weight", 0.05, "--ema", "--ema-decay", 0.5]
RECIPE += ["--image-size", 32, "--global-batch-size", 4, "--num-workers", 0, "--mixed-precision", "none"]
RECIPE += ["--log-every", 1, "--ckpt-every", 1, "--perceptual-weight", 0, "--device", "cpu"]
SMALL = ["--network", "open-magvit2", "--vq-width", 32, "--network-options", '{"ch_mult": [1, 1, 2], "blocks": 1}']


def train(images, results, *more):
    run_here(vq_train, "--data-path", images, "--results-dir", results, *RECIPE, *more)
    return max((run_folder(results) / "checkpoints").glob("*.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("discriminator", ["patchgan", "blur"])
def test_open_magvit2_recipe_trains_and_resumes_bit_identically(tmp_path, discriminator):
    images = make_images(tmp_path / "images", classes=2, per_class=4)
    flags = [*SMALL, "--disc-type", discriminator]
    path = train(images, tmp_path / "whole", *flags, "--max-steps", 3)
    whole = load(path)
    train(images, tmp_path / "parts", *flags, "--max-steps", 2)
    parts = load(train(images, tmp_path / "parts", *flags[:2], *flags[-2:], "--max-steps", 3, "--resume"))
    assert all(same(whole[key], parts[key]) for key in whole.keys() - {"args"})
    assert (whole["args"].entropy_loss_ratio, whole["args"].commit_loss_beta) == (0.1, 0.25)
    assert whole["config"]["quantizer"] == {"name": "lfq", "codebook_size": 2**18}
    for line in metrics(tmp_path / "whole"):
        parts = (
            line["reconstruction_loss"] + 0.1 * line["adversarial_loss"] + line["commit_loss"] + line["entropy_loss"]
        )
        assert line["generator_loss"] == pytest.approx(parts, rel=1e-5) and line["lecam_loss"] > 0
    for use_ema in (False, True):
        found = base.load_tokenizer(path, use_ema=use_ema)
        assert (found.family, found.codebook_size, found.downsample) == ("Open-MAGVIT2-4", 2**18, 4)
    with pytest.raises(ValueError, match=r"--vq-model VQ-4 is of the network vqgan, not open-magvit2"):
        train(images, tmp_path / "other", *SMALL, "--vq-model", "VQ-4")


@pytest.mark.slow
def test_codes_beyond_16_bits_are_stored_as_they_are(tmp_path):
    """Packed and in the published layout, and read back for training."""
    images = make_images(tmp_path / "images", classes=2, per_class=3, size=32)
    network = {"name": "open-magvit2", "ch": 32, "ch_mult": [1, 1, 2], "blocks": 1}
    made = randomize(build_tokenizer({"network": network, "quantizer": {"name": "lfq"}}))
    save_checkpoint(tmp_path / "vq.pt", {"model": made.state_dict(), "config": origin(**made.identity)})
    flags = ["--vq-ckpt", tmp_path / "vq.pt", "--image-size", 32, "--num-workers", 0, "--no-flip", "--device", "cpu"]
    run_here(extract_codes_c2i, "--data-path", images, "--code-path", tmp_path / "codes", *flags)
    run_here(convert_codes, "--from", tmp_path / "codes", "--to", tmp_path / "published", "--image-size", 32)
    files = sorted(images.rglob("*.png"))
    expected = torch.cat([made.to_codes(center_view(load_rgb(file), 32)[None]).flatten(1) for file in files])
    assert expected.max() >= 2**16
    for folder in ("codes", "published"):
        codes = open_codes(tmp_path / folder, 32, 4, random_view=False)
        assert torch.equal(torch.stack([codes[i]["codes"] for i in range(len(codes))]), expected)
