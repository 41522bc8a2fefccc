"""IBQ against the recorded run of the published one, and its files: never taken for a VQGAN's, and averaged unless told."""

import logging
import re

import pytest
import torch

from autoregressive.sample import sample_c2i
from autoregressive.train import extract_codes_c2i, train_c2i
from dataset.codes import open_codes
from tests.helpers import assert_close, golden_state, golden_tokenizer_state, load_golden
from tests.tokenizer.taming import F8, TamingByHand, save_lightning, taming_state, with_averages
from tests.training import live, load, make_images, metrics, run_folder, run_here, same
from tokenizer.base import CodebookLosses, build_quantizer
from tokenizer.codecs import vqgan
from tokenizer.load import build_tokenizer, load_tokenizer
from tokenizer.tokenizer_image import reconstruction_vq_ddp, vq_train
from tokenizer.tokenizer_image.hub import VQModelHF, for_hub
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from tokenizer.tokenizer_image.vq_loss import VQLoss
from tools import convert_pytorch_lightning_to_torch as convert
from tools import export_checkpoint

# Decoders amplify a rounding of 1e-7 by 300, entropy at temperature 0.01 amplifies the latents'.
IMAGES = {"rtol": 1e-3, "atol": 5e-5}


@pytest.fixture(scope="module")
def record() -> tuple[dict[str, torch.Tensor], dict]:
    arrays, meta = load_golden("ibq")
    return {name: torch.as_tensor(array) for name, array in arrays.items()}, meta


@pytest.fixture(scope="module")
def published(record, tmp_path_factory):
    """A Lightning file with all names of a published one; its averages are the recorded weights, its raw weights others."""
    _, meta = record
    averaged = golden_tokenizer_state(meta)
    raw = golden_state(meta["state_dict"], seed=99)
    discriminator = {f"loss.discriminator.{name}": torch.zeros(s) for name, s in meta["discriminator"].items()}
    averages = averaged | {
        name: t for name, t in discriminator.items() if ".running_" not in name and "num_batches" not in name
    }
    state = with_averages({**raw, **discriminator}, averages)
    assert state.keys() == {*meta["names_in_a_checkpoint"]}
    return save_lightning(tmp_path_factory.mktemp("ibq") / "imagenet256_16384.ckpt", state)


@pytest.fixture(scope="module")
def tokenizer(published):
    return load_tokenizer(published)


def test_ibq_file_is_recognised_with_its_shape(tokenizer, record):
    assert (tokenizer.family, tokenizer.codebook_size, tokenizer.downsample) == ("IBQ-16", 512, 16)
    assert tokenizer.quantize.config == {"name": "ibq", "codebook_size": 512, "codebook_embed_dim": 40}
    assert (tokenizer.network["blocks"], tokenizer.network["z_channels"]) == (4, 48)
    assert len(tokenizer.state_dict()) == len(record[1]["state_dict"]) == 543


def test_ibq_codes_and_pixels_are_the_recorded_ones(tokenizer, record):
    arrays, _ = record
    codes = tokenizer.to_codes(arrays["image"])
    assert torch.equal(codes.flatten(), arrays["encode/indices"]) and codes.shape == (2, 4, 4)
    with torch.no_grad():
        assert_close(tokenizer.latents(arrays["image"]), arrays["encode/latent"])
    assert_close(tokenizer.quantize.lookup(codes).detach(), arrays["encode/quant"])
    assert_close(tokenizer.to_pixels(codes), arrays["decode_code/image"], **IMAGES)
    assert_close(tokenizer.to_pixels(arrays["codes"].view(2, 4, 4)), arrays["codes/image"], **IMAGES)


@pytest.mark.slow
def test_ibq_training_step_is_the_recorded_one(tokenizer, record):
    arrays, _ = record
    trained = build_tokenizer(tokenizer.identity).train()
    trained.load_state_dict(tokenizer.state_dict())
    recons, losses = trained(arrays["image"])
    loss = (recons - arrays["image"]).abs().mean() + losses.total
    assert_close(recons, arrays["train/recon"], **IMAGES)
    assert_close(losses.parts["quant"], arrays["train/quant_loss"])
    assert_close(losses.parts["entropy"] / 0.05, arrays["train/entropy_loss"], **IMAGES)
    assert_close(loss, arrays["train/loss"])
    loss.backward()
    for name in [name for name in arrays if name.startswith("train/grad/")]:
        assert_close(trained.get_parameter(name.removeprefix("train/grad/")).grad, arrays[name], **IMAGES)


def test_ibq_quantiser_gradients_are_the_recorded_ones(tokenizer, record):
    """At fixed latents: of the decoder's input along a probe, of the double quantisation loss, of the entropy."""
    arrays, _ = record
    quantiser = build_quantizer({**tokenizer.quantize.config}, entropy_loss_ratio=1.0).train()
    quantiser.load_state_dict(tokenizer.quantize.state_dict())
    latents = arrays["encode/latent"].clone().requires_grad_()
    quantised, losses, codes = quantiser(latents)
    assert torch.equal(codes.flatten(), arrays["encode/indices"])
    asked = {
        "probe": (quantised * arrays["quantizer/probe"]).sum(),
        "quant_loss": losses.parts["quant"],
        "entropy_loss": losses.parts["entropy"],
    }
    for name, value in asked.items():
        found = torch.autograd.grad(value, (latents, quantiser.embedding.weight), retain_graph=True)
        assert_close(found[0], arrays[f"quantizer/{name}_grad_latent"])
        assert_close(found[1], arrays[f"quantizer/{name}_grad_codebook"])


def test_ibq_adversarial_losses_are_the_recorded_ones(record, monkeypatch):
    """By PyTorch's own convolutions: with AVX2 those of oneDNN give a gradient that is 0.6 % of its norm away."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    arrays, meta = record
    config = meta["config"]
    loss = VQLoss(
        0, "hinge", reconstruction_loss="l1", gen_adv_loss="non-saturating-mean", gen_weight=0.1, lecam_weight=0.05,
        perceptual_weight=0.0,
    )  # fmt: skip
    weights = golden_state(
        meta["discriminator"], config["seed"], config["discriminator_gain"], keep=("running_", "num_batches_tracked")
    )
    loss.discriminator.load_state_dict(weights, strict=False)
    loss.lecam.real.fill_(config["lecam_start"][0])
    loss.lecam.fake.fill_(config["lecam_start"][1])
    real, fake = arrays["gan/real"], arrays["gan/fake"].clone().requires_grad_()
    for step in (1, 2):
        discriminator, logs = loss.discriminator_loss(real, fake, step=step)
        assert_close(discriminator, arrays[f"gan/d_loss{step}"])
        assert_close(logs["lecam_loss"], arrays[f"gan/lecam{step}"])
        assert_close(loss.lecam.real, arrays[f"gan/lecam_real{step}"])
        assert_close(loss.lecam.fake, arrays[f"gan/lecam_fake{step}"])
    parts = {"quant": torch.tensor(0.3), "entropy": 0.05 * torch.tensor(-0.4)}
    total, logs = loss.generator_loss(CodebookLosses(parts, torch.tensor(1.0)), real, fake, step=2)
    assert_close(total, arrays["gan/g_total"])
    assert_close(0.1 * logs["adversarial_loss"], arrays["gan/g_loss"])
    total.backward()
    assert_close(fake.grad, arrays["gan/g_grad"], atol=1e-8)
    with torch.no_grad():
        assert_close(loss.discriminator.eval()(real), arrays["gan/logits_eval"])


@pytest.mark.parametrize(("size", "millions"), [(1024, 107.0), (8192, 108.9), (16384, 111.0), (262144, 173.9)])
def test_ibq_full_sizes_have_the_published_numbers(size, millions):
    network = dict(VQ_SIZES["IBQ-16"])
    quantizer = {**network.pop("quantizer"), "codebook_size": size}
    with torch.device("meta"):
        tokenizer = build_tokenizer({"quantizer": quantizer, "network": {"name": "vqgan", **network}})
    assert len(tokenizer.state_dict()) == 543
    assert round(sum(p.numel() for p in tokenizer.parameters()) / 1e5) == round(millions * 10)


# Files


def small_states(blocks: int = 4) -> list[dict[str, torch.Tensor]]:
    """Raw and averaged weights of a narrow one with 8 pixels a code."""
    return [taming_state(64, 6, F8, 32, seed=seed, blocks=blocks) for seed in (1, 2)]


def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 16, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1


def codes_by_hand(state: dict[str, torch.Tensor], blocks: int = 4) -> torch.Tensor:
    """The rows with the largest dot product."""
    latents = TamingByHand(state, F8, blocks).latents(pixels())
    return torch.einsum("bchw,nc->bhwn", latents, state["quantize.embedding.weight"]).argmax(-1)


@pytest.mark.parametrize("blocks", [2, 4])
def test_ibq_lightning_file_gives_the_codes_of_its_averages_unless_told(tmp_path, blocks):
    raw, averaged = small_states(blocks)
    path = save_lightning(tmp_path / "last.ckpt", with_averages(raw, averaged))
    nearest = TamingByHand(averaged, F8, blocks).codes(TamingByHand(averaged, F8, blocks).latents(pixels()))
    expected = codes_by_hand(averaged, blocks)
    assert not torch.equal(nearest, expected), "another rule gives other codes"
    for use_ema, state in ((None, averaged), (True, averaged), (False, raw)):
        found = load_tokenizer(path, use_ema=use_ema)
        assert found.quantize.config["name"] == "ibq"
        assert torch.equal(found.to_codes(pixels()), codes_by_hand(state, blocks)), use_ema
    fingerprint = load_tokenizer(path, use_ema=False).fingerprint()
    assert load_tokenizer(path, fingerprint=fingerprint).fingerprint() == fingerprint


def test_ibq_names_that_are_one_without_dots_are_refused_where_an_average_has_them(tmp_path):
    raw, averaged = small_states()
    state = with_averages({**raw, "loss.a.b": torch.zeros(1), "loss.ab": torch.zeros(1)}, averaged)
    assert load_tokenizer(save_lightning(tmp_path / "last.ckpt", state)).family == "IBQ-8"
    path = save_lightning(tmp_path / "twice.ckpt", {**state, "model_ema.lossab": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"twice\.ckpt: two of its weights have the name of one average"):
        load_tokenizer(path)


def test_ibq_file_without_averages_says_so_and_is_refused_where_they_are_asked_for(tmp_path, caplog):
    raw, _ = small_states()
    path = save_lightning(tmp_path / "last.ckpt", raw)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(load_tokenizer(path).to_codes(pixels()), codes_by_hand(raw))
    assert "raw weights alone" in caplog.text
    with pytest.raises(ValueError, match=r"last\.ckpt has no averaged weights"):
        load_tokenizer(path, use_ema=True)


@pytest.mark.parametrize(
    "name", ["decoder.conv_out.bias", "quantize.embedding.weight", "encoder.down.0.block.0.conv1.weight"]
)
def test_ibq_file_with_an_average_missing_is_refused(tmp_path, name):
    raw, averaged = small_states()
    del averaged[name]
    path = save_lightning(tmp_path / "last.ckpt", with_averages(raw, averaged))
    with pytest.raises(ValueError, match=rf"averaged weights missing \(1\): {re.escape(name)}"):
        load_tokenizer(path)
    assert torch.equal(load_tokenizer(path, use_ema=False).to_codes(pixels()), codes_by_hand(raw))


def test_ibq_file_of_averages_alone_is_refused(tmp_path):
    state = {name: tensor for name, tensor in with_averages(*small_states()).items() if name.startswith("model_ema.")}
    with pytest.raises(ValueError, match=r"last\.ckpt has averaged weights without their raw ones"):
        load_tokenizer(save_lightning(tmp_path / "last.ckpt", state))


def test_two_blocks_without_averages_are_a_vqgan_unless_said(tmp_path, caplog):
    raw, _ = small_states(blocks=2)
    path = save_lightning(tmp_path / "last.ckpt", raw)
    by_hand = TamingByHand(raw, F8)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(load_tokenizer(path).to_codes(pixels()), by_hand.codes(by_hand.latents(pixels())))
    assert "read as a VQGAN" in caplog.text
    said = load_tokenizer(path, quantizer="ibq")
    assert torch.equal(said.to_codes(pixels()), codes_by_hand(raw, 2))
    assert said.fingerprint() != load_tokenizer(path).fingerprint()
    with pytest.raises(ValueError, match=r"no quantizer is called 'nearest'"):
        load_tokenizer(path, quantizer="nearest")


def test_ibq_in_the_place_of_a_vqgan_is_refused(tmp_path):
    path = save_lightning(tmp_path / "last.ckpt", with_averages(*small_states()))
    with pytest.raises(ValueError, match=r"last\.ckpt: quantizer ibq takes .*got .*l2_norm"):
        vqgan(path)


@pytest.mark.parametrize("attend", [(), (1, 2)])
def test_ibq_attention_is_where_the_file_has_it(tmp_path, attend):
    """Where it stands followed from the nominal size in training."""
    state = taming_state(64, 6, F8, 32, blocks=4, attend=attend)
    found = load_tokenizer(save_lightning(tmp_path / "last.ckpt", state))
    assert (found.family, found.network["attention"]) == ("IBQ-8", list(attend))
    assert torch.equal(found.to_codes(pixels()), codes_by_hand(state))
    codes = torch.arange(10).view(1, 2, 5)
    images = TamingByHand(state, F8, 4).images(codes)
    assert_close(found.to_pixels(codes), images, rtol=1e-3, atol=1e-3 * images.abs().max().item())
    assert build_tokenizer(found.identity).identity == found.identity


@pytest.mark.parametrize("blocks", [2, 4])
def test_ibq_copies_give_the_codes_of_its_file(tmp_path, blocks):
    state = with_averages(*small_states(blocks))
    path = save_lightning(tmp_path / "last.ckpt", state)
    expected = load_tokenizer(path)
    for form in ("pt", "consolidated", "safetensors"):
        run_here(export_checkpoint, "--checkpoint", path, "--format", form, "--output", tmp_path / form)
    run_here(convert, "--input", path, "--output", tmp_path / "converted.pt")
    run_here(convert, "--input", path, "--output", tmp_path / "names.pt", "--keep-names")
    for_hub(expected).save_pretrained(tmp_path / "hub")
    for copy in ("pt", "consolidated", "safetensors", "converted.pt", "names.pt", "hub"):
        found = load_tokenizer(tmp_path / copy)
        assert found.fingerprint() == expected.fingerprint() and found.identity == expected.identity, copy
    assert VQModelHF.from_pretrained(tmp_path / "hub").fingerprint() == expected.fingerprint()
    raw = load_tokenizer(path, use_ema=False).fingerprint()
    for copy in ("pt", "converted.pt", "names.pt"):
        assert load_tokenizer(tmp_path / copy, use_ema=False).fingerprint() == raw != expected.fingerprint()
    assert load(tmp_path / "names.pt")["model"].keys() == state.keys()
    with pytest.raises(ValueError, match=r"has the quantizer ibq, not vq"):
        load_tokenizer(tmp_path / "pt", quantizer="vq")


@pytest.mark.slow
def test_ibq_codes_are_extracted_trained_on_and_drawn(images, tmp_path):
    """No script knows the family; all take the averages."""
    path = save_lightning(tmp_path / "imagenet256_64.ckpt", with_averages(*small_states()))
    fingerprint, common = load_tokenizer(path).fingerprint(), ["--vq-ckpt", path, "--device", "cpu"]
    folder = tmp_path / "codes"
    words = ["--data-path", images, "--code-path", folder, "--image-size", 32, "--num-workers", 0, "--no-flip"]
    run_here(extract_codes_c2i, *common, *words)
    settings = open_codes(folder, 32, 8).settings
    assert (settings.tokenizer, settings.codebook_size, settings.vq_model) == (fingerprint, 64, "IBQ-8")
    words = [
        "--code-path",
        folder,
        "--gpt-model",
        "GPT-XS",
        "--max-steps",
        1,
        "--global-batch-size",
        4,
        "--num-workers",
        0,
    ]
    run_here(train_c2i, *common, *words, "--mixed-precision", "none", "--results-dir", tmp_path / "results")
    gpt = max((run_folder(tmp_path / "results") / "checkpoints").glob("*.pt"))
    assert load(gpt)["config"]["tokenizer"] == fingerprint
    run_here(sample_c2i, *common, "--gpt-ckpt", gpt, "--precision", "none", "--output", tmp_path / "sample.png")
    assert (tmp_path / "sample.png").stat().st_size > 0
    words = ["--data-path", images, "--image-size", 32, "--image-size-eval", 32, "--num-workers", 0, "--no-lpips"]
    run_here(reconstruction_vq_ddp, *common, *words, "--sample-dir", tmp_path / "reconstructions")
    (results,) = (tmp_path / "reconstructions").glob("*_results.json")
    assert results.name.startswith("IBQ-8-imagenet-size-32-size-32-codebook-size-64-dim-6")


# Training


RECIPE = ["--reconstruction-loss", "l1", "--disc-start", 0, "--disc-weight", 1, "--gen-weight", 0.1]
RECIPE += ["--gen-loss", "non-saturating-mean", "--lecam-weight", 0.05, "--disc-first"]
PLAIN = [
    "--image-size",
    32,
    "--global-batch-size",
    4,
    "--num-workers",
    0,
    "--mixed-precision",
    "none",
    "--log-every",
    1,
]
PLAIN += ["--perceptual-weight", 0, "--lr", 1e-3, "--ckpt-every", 1]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "train", classes=2, per_class=4)


def train(images, results, *more):
    run_here(vq_train, "--data-path", images, "--results-dir", results, *PLAIN, *more)
    return max((run_folder(results) / "checkpoints").glob("*.pt"))


SMALL = [
    "--network",
    "vqgan",
    "--quantizer",
    "ibq",
    "--vq-model",
    "VQ-4",
    "--codebook-size",
    32,
    "--codebook-embed-dim",
    8,
]


@pytest.mark.slow
def test_ibq_recipe_trains_and_resumes_bit_identically(images, tmp_path):
    whole = load(train(images, tmp_path / "whole", *SMALL, *RECIPE, "--max-steps", 3))
    train(images, tmp_path / "parts", *SMALL, *RECIPE, "--max-steps", 2)
    parts = load(train(images, tmp_path / "parts", "--vq-model", "VQ-4", *RECIPE, "--max-steps", 3, "--resume"))
    for key in whole.keys() - {"args"}:
        assert same(whole[key], parts[key]), key
    assert whole["lecam"]["real"] != 0 and whole["args"].entropy_loss_ratio == 0.05
    assert whole["config"]["quantizer"] == {"name": "ibq", "codebook_size": 32, "codebook_embed_dim": 8}
    for line in metrics(tmp_path / "whole"):
        parts = line["reconstruction_loss"] + 0.1 * line["adversarial_loss"] + line["quant_loss"] + line["entropy_loss"]
        assert line["generator_loss"] == pytest.approx(parts, rel=1e-5)
        assert (
            line["adversarial_weight"] == pytest.approx(0.1)
            and line["lecam_loss"] > 0
            and line["discriminator_loss"] > 0
        )


@pytest.mark.slow
def test_ibq_recipe_of_two_processes_gives_the_losses_of_one(images, tmp_path):
    """With the stylegan discriminator, which has no batch statistics; means of logits are over both processes."""
    words = [
        *PLAIN,
        *SMALL,
        *RECIPE,
        "--disc-type",
        "stylegan",
        "--image-size",
        8,
        "--max-steps",
        3,
        "--entropy-loss-ratio",
        0,
    ]
    train(images, tmp_path / "one", *words)
    more = ["--data-path", images, "--results-dir", tmp_path / "two", *words]
    live({"module": "tokenizer.tokenizer_image.vq_train", "args": list(map(str, more)), "world": 2})
    for name in ("reconstruction_loss", "quant_loss", "adversarial_loss", "discriminator_loss", "lecam_loss"):
        single, double = metrics(tmp_path / "one", name), metrics(tmp_path / "two", name)
        assert list(single) == [1, 2, 3] and double == pytest.approx(single, rel=1e-3, abs=5e-4), name


@pytest.mark.slow
def test_discriminator_first_moves_it_before_the_tokenizer(images, tmp_path):
    """The tokenizer's loss of the first step is then by a discriminator that has moved; its own loss is the same."""
    lines = {}
    for name, more in {
        "last": [],
        "first": ["--disc-first"],
        "parts": ["--disc-first", "--gradient-accumulation-steps", 2],
    }.items():
        flags = [*SMALL, "--disc-start", 0, "--disc-type", "stylegan", "--image-size", 8, "--max-steps", 1]
        train(images, tmp_path / name, *flags, *more)
        (lines[name],) = metrics(tmp_path / name)
    for part in ("discriminator_loss", "reconstruction_loss", "quant_loss"):
        assert lines["last"][part] == pytest.approx(lines["first"][part], rel=1e-5)
    assert lines["last"]["adversarial_loss"] != lines["first"]["adversarial_loss"]
    for part in ("discriminator_loss", "reconstruction_loss", "adversarial_loss"):
        assert lines["parts"][part] == pytest.approx(lines["first"][part], rel=1e-3)


@pytest.mark.slow
def test_published_ibq_is_fine_tuned_from_its_averages(images, tmp_path):
    path = save_lightning(tmp_path / "last.ckpt", with_averages(*small_states()))
    flags = ["--finetune", "--vq-ckpt", path, "--disc-weight", 0, "--max-steps", 1, "--lr", 0, "--ema"]
    tuned = train(images, tmp_path / "results", *flags)
    for use_ema in (None, True):
        assert load_tokenizer(tuned, use_ema=use_ema).fingerprint() == load_tokenizer(path).fingerprint()
    with pytest.raises(ValueError, match=r"--network maskgit: \S+last\.ckpt was trained with --network vqgan"):
        train(images, tmp_path / "other", *flags, "--network", "maskgit")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more, message",
    [
        (["--network", "maskgit", "--vq-model", "VQ-4"], "--vq-model VQ-4 is of the network vqgan, not maskgit"),
        (
            ["--vq-model", "VQ-4", "--network-options", '{"depth": 3}'],
            "the network vqgan does not have these options: .*depth",
        ),
        (["--vq-model", "IBQ-8", "--codebook-l2-norm"], "quantizer ibq takes .*got .*l2_norm"),
    ],
)
def test_networks_and_options_that_do_not_fit_are_refused(images, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        train(images, tmp_path, "--max-steps", 1, *more)
