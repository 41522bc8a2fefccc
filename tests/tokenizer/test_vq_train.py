"""Training the tokenizer: discriminators, resuming, damaged images, VGG16; and the demo that uses what comes out."""

import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from autoregressive.pipeline import load_tokenizer
from dataset.augmentation import center_view
from dataset.folders import class_folders
from dataset.pixels import load_rgb
from tests.training import (
    check_published_flags,
    live,
    load,
    make_images,
    metrics,
    run_folder,
    run_here,
    same,
)
from tokenizer.tokenizer_image import lpips, vq_demo, vq_train
from tokenizer.tokenizer_image.hub import VQModelHF
from tools import convert_pytorch_lightning_to_torch as convert
from tools import export_checkpoint
from utils.checkpoint import save_safetensors
from utils.images import make_grid, to_uint8

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet")]  # through whole scripts and servers

SCRIPT = "tokenizer.tokenizer_image.vq_train"
MODEL = ["--vq-model", "VQ-4", "--codebook-size", 32]
PLAIN = ["--image-size", 32, "--global-batch-size", 4, "--num-workers", 0, "--mixed-precision", "none"]
PLAIN += ["--log-every", 1, "--perceptual-weight", 0, "--lr", 1e-3]
NO_DISC = ["--disc-weight", 0]
STILL = 1e-30  # a learning rate that moves no weight of float32
KEYS = {"model", "ema", "optimizer", "discriminator", "optimizer_disc", "steps", "args", "config", "trainer"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two class folders of six images."""
    return make_images(tmp_path_factory.mktemp("images") / "train", classes=2, per_class=6)


def train(images, results, *more):
    """Trains in this process; returns the last checkpoint's path."""
    run_here(vq_train, "--data-path", images, "--results-dir", results, *MODEL, *PLAIN, *more)
    return last(results)


def last(results, number=0):
    return max((run_folder(results, number) / "checkpoints").glob("*.pt"))


def log_of(results):
    return (run_folder(results) / "log.txt").read_text()


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A short run with everything: EMA, a discriminator from the third step on, a checkpoint every second step."""
    results = tmp_path_factory.mktemp("trained")
    flags = ["--ema", "--ema-decay", 0.5, "--disc-start", 3, "--max-steps", 5, "--ckpt-every", 2, "--dropout-p", 0.1]
    return results, train(images, results, *flags), flags


# Runs


def test_what_a_checkpoint_holds(trained):
    _, path, _ = trained
    saved = load(path)
    assert saved.keys() == KEYS and saved["steps"] == 5 and saved["args"].codebook_size == 32
    for use_ema, key in ((False, "model"), (True, "ema")):
        tokenizer = load_tokenizer(path, vq_model="VQ-4", codebook_size=32, codebook_embed_dim=8, use_ema=use_ema)
        assert same(dict(tokenizer.state_dict()), dict(saved[key]))
    assert not torch.equal(saved["model"]["decoder.conv_out.weight"], saved["ema"]["decoder.conv_out.weight"])


def test_weight_decay_that_is_given_decays_and_the_default_does_not(images, tmp_path):
    """One step by hand: AdamW takes lr * decay * weight besides Adam's step."""
    runs = {"start": ["--lr", 0], "plain": [], "decayed": ["--weight-decay", 10]}
    flags = ["--max-steps", 1, "--disc-weight", 0, "--lr", 0.01, "--image-size", 16]
    start, plain, decayed = (
        load(train(images, tmp_path / name, *flags, *more))["model"] for name, more in runs.items()
    )
    for name in ("decoder.conv_out.weight", "encoder.conv_in.bias"):
        torch.testing.assert_close(decayed[name], plain[name] - 0.01 * 10 * start[name])
    assert "ends at step 1, before --disc-start" not in log_of(tmp_path / "plain")


def test_run_that_ends_before_its_discriminator_says_so(images, tmp_path):
    train(images, tmp_path, "--max-steps", 1, "--lr", 0)
    assert "ends at step 1, before --disc-start 20000" in log_of(tmp_path)


def test_the_discriminator_begins_at_its_step(trained):
    results, path, _ = trained
    assert set(metrics(results, "discriminator_loss")) == set(metrics(results, "logits_real")) == {3, 4, 5}
    adversarial = metrics(results, "adversarial_loss")
    assert [adversarial[step] for step in (1, 2)] == [0, 0] and all(adversarial[step] for step in (3, 4, 5))
    before, after = load(path.with_name("0000002.pt")), load(path)
    assert before["optimizer_disc"]["state"] == {} and after["optimizer_disc"]["state"][0]["step"] == 3
    torch.manual_seed(0)
    assert not torch.equal(before["discriminator"]["main.0.weight"], after["discriminator"]["main.0.weight"])


def test_the_sum_of_the_losses(trained):
    for line in metrics(trained[0]):
        parts = line["reconstruction_loss"] + line["adversarial_weight"] * line["adversarial_loss"]
        parts += line["vq_loss"] + line["commit_loss"] + line["entropy_loss"]
        assert line["generator_loss"] == pytest.approx(parts, rel=1e-5)
        assert line["adversarial_weight"] == (0.5 if line["step"] > 2 else 0) and line["perceptual_loss"] == 0
        assert 1 / 32 <= line["codebook_usage"] <= 1


def test_resuming_is_bit_identical(trained, images, tmp_path):
    """Stopped in the second epoch, once the discriminator is at work."""
    _, path, flags = trained
    train(images, tmp_path, *flags, "--max-steps", 4)
    train(images, tmp_path, *flags, "--resume")
    whole, parts = load(path), load(last(tmp_path))
    for key in KEYS - {"args"}:
        assert same(whole[key], parts[key]), key
    assert metrics(tmp_path, "generator_loss") == metrics(trained[0], "generator_loss")


def test_every_weight_and_choice_reaches_its_loss(images, tmp_path):
    """At the first step the logits are small: the adversarial losses are nearly linear in them."""
    flags = ["--commit-loss-beta", 0.7, "--reconstruction-weight", 2, "--codebook-weight", 3, "--disc-weight", 0.3]
    flags += ["--entropy-loss-ratio", 0.1, "--beta1", 0.8, "--beta2", 0.9, "--disc-start", 0, "--max-steps", 1]
    path = train(images, tmp_path, *flags, "--disc-loss", "vanilla", "--gen-loss", "non-saturating")
    (line,) = metrics(tmp_path)
    codebook = line["vq_loss"] + line["commit_loss"] + line["entropy_loss"]
    parts = 2 * line["reconstruction_loss"] + 0.3 * line["adversarial_loss"] + 3 * codebook
    assert line["generator_loss"] == pytest.approx(parts, rel=1e-5)
    assert line["commit_loss"] == pytest.approx(0.7 * line["vq_loss"], rel=1e-5)
    assert line["entropy_loss"] != 0
    real, fake = line["logits_real"], line["logits_fake"]
    assert line["discriminator_loss"] == pytest.approx(0.3 * (np.log(2) + (fake - real) / 4), abs=0.03)
    assert line["adversarial_loss"] == pytest.approx(np.log(2) - fake / 2, abs=0.1)
    for optimizer in ("optimizer", "optimizer_disc"):
        (group,) = load(path)[optimizer]["param_groups"]
        assert tuple(group["betas"]) == (0.8, 0.9) and group["lr"] == 1e-3


def test_choices_that_change_the_first_loss(images, tmp_path):
    def first(name, *more):
        train(images, tmp_path / name, *NO_DISC, "--max-steps", 1, "--lr", STILL, "--image-size", 16, *more)
        return metrics(tmp_path / name, "reconstruction_loss")[1]

    plain = first("plain")
    assert first("l1", "--reconstruction-loss", "l1") > plain * 1.05
    assert first("no-flip", "--no-flip") != plain
    assert first("no-crop", "--no-random-crop") != plain
    assert first("dropout", "--dropout-p", 0.5) != plain


def test_weights_stay_float32_in_the_recipe_s_precision(images, tmp_path):
    path = train(images, tmp_path, "--image-size", 24, "--disc-start", 2, "--max-steps", 2, "--mixed-precision", "bf16")
    assert set(metrics(tmp_path, "discriminator_loss")) == {2}
    assert load(path)["model"]["decoder.conv_out.weight"].dtype == torch.float32


def test_two_processes_give_the_losses_of_one(images, tmp_path):
    """With the stylegan discriminator, which has no batch statistics, and accumulation; then with one that has them.

    Adam's first steps are near to signs, so that roundings grow tenfold a step; what is not averaged is off by far more.
    """
    flags = ["--disc-type", "stylegan", "--image-size", 8, "--disc-start", 2, "--max-steps", 3]
    train(images, tmp_path / "one", *flags)

    def life(name, *more):
        words = ["--data-path", images, "--results-dir", tmp_path / name, *MODEL, *PLAIN, *more]
        return {"module": SCRIPT, "args": list(map(str, words)), "world": 2}

    live(
        life("two", *flags, "--gradient-accumulation-steps", 2),
        life("statistics", "--image-size", 24, "--disc-start", 1, "--max-steps", 1, "--ema", "--num-workers", 1),
    )
    for name in ("reconstruction_loss", "vq_loss", "adversarial_loss", "discriminator_loss", "logits_fake"):
        single, double = metrics(tmp_path / "one", name), metrics(tmp_path / "two", name)
        assert double == pytest.approx(single, rel=1e-3, abs=5e-4), name
        assert list(single) == ([2, 3] if name in ("discriminator_loss", "logits_fake") else [1, 2, 3])
    assert len(list((tmp_path / "two").iterdir())) == 1
    assert load(last(tmp_path / "statistics")).keys() == KEYS


# Weights to start from


def round_trip(tokenizer, pixels):
    return tokenizer.to_pixels(tokenizer.to_codes(pixels))


def tokenizer_parts(state):
    """The weights of a tokenizer without its count of codes."""
    return {name: tensor for name, tensor in state.items() if name != "quantize.codebook_used"}


def test_finetune_keeps_discriminator_and_optimizers_and_begins_at_step_0(trained, images, tmp_path):
    path = train(
        images, tmp_path, "--finetune", "--vq-ckpt", trained[1], "--lr", STILL, "--max-steps", 2, "--disc-start", 0
    )
    first, second = load(trained[1]), load(path)
    assert list(metrics(tmp_path, "generator_loss")) == [1, 2] and second["steps"] == 2
    assert second["trainer"]["samples_seen"] == 8
    assert same(tokenizer_parts(first["model"]), tokenizer_parts(second["model"]))
    name = "main.0.weight"
    assert torch.equal(first["discriminator"][name], second["discriminator"][name])
    for key, before in (("optimizer", 5), ("optimizer_disc", 3)):
        assert first[key]["state"][0]["step"] == before and second[key]["state"][0]["step"] == before + 2
        assert second[key]["param_groups"][0]["lr"] == STILL


def test_finetune_without_keep_discriminator_takes_the_tokenizer_alone(trained, images, tmp_path):
    flags = ["--finetune", "--vq-ckpt", trained[1], "--lr", STILL, "--max-steps", 1, "--disc-start", 0]
    path = train(images, tmp_path, *flags, "--no-keep-discriminator")
    first, second = load(trained[1]), load(path)
    assert same(tokenizer_parts(first["model"]), tokenizer_parts(second["model"]))
    assert not torch.equal(first["discriminator"]["main.0.weight"], second["discriminator"]["main.0.weight"])
    assert second["optimizer"]["state"][0]["step"] == second["optimizer_disc"]["state"][0]["step"] == 1


def test_finetune_with_another_discriminator_is_refused(trained, images, tmp_path):
    flags = ["--finetune", "--vq-ckpt", trained[1], "--disc-type", "stylegan", "--max-steps", 1]
    with pytest.raises(ValueError, match=r"another discriminator than --disc-type stylegan .*--no-keep-discriminator"):
        train(images, tmp_path, *flags)


def test_vq_ckpt_of_a_gpt_says_what_it_is(small_files, images, tmp_path):
    with pytest.raises(ValueError, match=r"is not an image tokenizer's checkpoint: it looks like a GPT"):
        train(images, tmp_path, "--vq-ckpt", small_files.gpt)


def test_finetune_resumes_bit_identically(trained, images, tmp_path):
    flags = ["--finetune", "--vq-ckpt", trained[1], "--disc-start", 2, "--ema", "--dropout-p", 0.1, "--ckpt-every", 1]
    whole = load(train(images, tmp_path / "whole", *flags, "--max-steps", 3))
    train(images, tmp_path / "parts", *flags, "--max-steps", 1)
    parts = load(train(images, tmp_path / "parts", *flags, "--max-steps", 3, "--resume"))
    for key in KEYS - {"args"}:
        assert same(whole[key], parts[key]), key


# Settings that the shapes of weights do not show


@pytest.fixture(scope="module")
def unnormalised(images, tmp_path_factory):
    """The checkpoint of a run without l2-normalised codes."""
    results = tmp_path_factory.mktemp("unnormalised")
    return train(images, results, *NO_DISC, "--no-codebook-l2-norm", "--max-steps", 1, "--image-size", 16)


def codes_of(path):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        return load_tokenizer(path).to_codes(images)


@pytest.fixture(scope="module")
def first_edition(unnormalised, tmp_path_factory):
    """The same file as the first edition wrote it: the setting is in the flags alone."""
    path = tmp_path_factory.mktemp("first_edition") / "vq.pt"
    torch.save({key: value for key, value in load(unnormalised).items() if key != "config"}, path)
    return path


@pytest.mark.parametrize(
    ("edition", "format"),
    [
        ("unnormalised", "consolidated"),
        ("unnormalised", "safetensors"),
        ("first_edition", "consolidated"),
        ("first_edition", "pt"),
    ],
)
def test_exported_tokenizer_gives_the_codes_of_its_checkpoint(request, edition, format, tmp_path):
    source = request.getfixturevalue(edition)
    run_here(export_checkpoint, "--checkpoint", source, "--format", format, "--output", tmp_path / "exported")
    assert torch.equal(codes_of(tmp_path / "exported"), codes_of(source))
    run_here(
        export_checkpoint, "--checkpoint", tmp_path / "exported", "--format", "consolidated", "--output", tmp_path / "b"
    )
    assert torch.equal(codes_of(tmp_path / "b"), codes_of(source))
    run_here(convert, "--input", source, "--output", tmp_path / "c", "--keep-names")
    assert torch.equal(codes_of(tmp_path / "c"), codes_of(source))
    bare = load(source)["model"]
    torch.save(bare, tmp_path / "bare.pth")
    assert not torch.equal(codes_of(tmp_path / "bare.pth"), codes_of(source)), "the setting matters"


def test_tokenizer_saved_for_the_hub_gives_the_codes_of_its_checkpoint(unnormalised, tmp_path):
    VQModelHF.holding(load_tokenizer(unnormalised)).save_pretrained(tmp_path / "new")
    assert torch.equal(codes_of(tmp_path / "new"), codes_of(unnormalised))
    (tmp_path / "old").mkdir()  # the first edition's: nothing in the header of the weights
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "new" / "config.json").read_bytes())
    save_safetensors(tmp_path / "old" / "model.safetensors", load_tokenizer(unnormalised).state_dict())
    assert torch.equal(codes_of(tmp_path / "old"), codes_of(unnormalised))


@pytest.mark.parametrize("edition, how", [("unnormalised", []), ("first_edition", ["--finetune"])])
def test_training_goes_on_with_the_setting_of_its_file(request, edition, images, tmp_path, how):
    source = request.getfixturevalue(edition)
    flags = ["--vq-ckpt", source, *how, *NO_DISC, "--max-steps", 2, "--image-size", 16, "--lr", STILL]
    path = train(images, tmp_path, *flags)
    assert torch.equal(codes_of(path), codes_of(source)) and load(path)["args"].codebook_l2_norm is False
    assert "codes are looked up among vectors that are not normalised" in log_of(tmp_path)
    with pytest.raises(ValueError, match=r"--codebook-l2-norm: \S+ was trained with --no-codebook-l2-norm"):
        train(images, tmp_path, *flags, "--codebook-l2-norm")


def test_resume_keeps_the_setting_of_its_run(images, tmp_path):
    flags = [*NO_DISC, "--image-size", 16, "--ckpt-every", 1]
    train(images, tmp_path, *flags, "--max-steps", 1, "--no-codebook-l2-norm")
    path = train(images, tmp_path, *flags, "--max-steps", 2, "--resume")
    assert path.stem == "0000002" and not load_tokenizer(path).quantize.l2_norm
    with pytest.raises(ValueError, match="was trained with --no-codebook-l2-norm; leave the flag out"):
        train(images, tmp_path, *flags, "--max-steps", 3, "--resume", "--codebook-l2-norm")


def test_l2_norm_of_a_file_that_does_not_say_is_as_asked(trained, images, tmp_path):
    torch.save({"model": load(trained[1])["model"]}, tmp_path / "vq.pt")
    flags = ["--finetune", "--vq-ckpt", tmp_path / "vq.pt", *NO_DISC, "--max-steps", 1, "--image-size", 16]
    for more, expected in (([], True), (["--no-codebook-l2-norm"], False)):
        path = train(images, tmp_path / "".join(more), *flags, *more)
        assert load_tokenizer(path).quantize.l2_norm == expected
        assert load(path)["config"]["quantizer"]["l2_norm"] == expected


def test_without_finetune_the_training_goes_on(trained, images, tmp_path):
    _, whole, flags = trained
    middle = whole.with_name("0000004.pt")
    path = train(images, tmp_path, *flags, "--vq-ckpt", middle)
    assert list(metrics(tmp_path, "generator_loss")) == [5]
    for key in ("model", "ema", "optimizer", "discriminator", "optimizer_disc", "steps"):
        assert same(load(path)[key], load(whole)[key]), key


def test_weights_alone(trained, images, tmp_path):
    """What the released files are: {"model": ...}."""
    torch.save({"model": load(trained[1])["model"]}, tmp_path / "vq.pt")
    path = train(
        images, tmp_path / "results", "--vq-ckpt", tmp_path / "vq.pt", "--max-steps", 1, "--lr", STILL, "--ema"
    )
    name = "encoder.conv_in.weight"
    assert torch.equal(load(path)["model"][name], load(trained[1])["model"][name])
    assert torch.equal(load(path)["ema"][name], load(trained[1])["model"][name])
    with pytest.raises(ValueError, match=r"--codebook-size 64: \S+vq\.pt was trained with --codebook-size 32"):
        train(images, tmp_path / "other", "--vq-ckpt", tmp_path / "vq.pt", "--codebook-size", 64)


# Data


def test_a_second_folder_of_images(images, tmp_path):
    faces = make_images(tmp_path / "faces", classes=1, per_class=5, seed=1)
    train(images, tmp_path / "results", *NO_DISC, "--data-face-path", faces, "--max-steps", 1)
    assert " 17 samples, 4 steps an epoch" in log_of(tmp_path / "results")


def test_a_flat_folder_and_a_list(images, tmp_path):
    train(images / "class1", tmp_path / "coco", *NO_DISC, "--dataset", "coco", "--max-steps", 1)
    assert " 6 samples, 1 steps an epoch" in log_of(tmp_path / "coco")
    folder = make_images(tmp_path / "open", classes=1, per_class=5)
    (folder / "image_paths.json").write_text(json.dumps([f"class0/{i}.png" for i in range(4)]))
    train(folder, tmp_path / "results", *NO_DISC, "--dataset", "openimage", "--max-steps", 1)
    assert " 4 samples, 1 steps an epoch" in log_of(tmp_path / "results")


def test_a_damaged_image_is_named_skipped_and_counted(tmp_path):
    folder = make_images(tmp_path / "train", classes=2, per_class=12)
    whole = (folder / "class1" / "9.png").read_bytes()
    (folder / "class1" / "9.png").write_bytes(whole[: len(whole) // 2])
    train(folder, tmp_path / "results", *NO_DISC, "--epochs", 2, "--num-workers", 2, "--image-size", 16)
    text = log_of(tmp_path / "results")
    assert re.search(r"skipped unreadable image \S*class1/9\.png \(.+\)", text)
    assert text.count("skipped unreadable image") == 1
    assert "1 unreadable files were skipped" in text
    assert list(metrics(tmp_path / "results", "generator_loss")) == list(range(1, 13))


def test_pictures_for_tensorboard(trained, images):
    """Eight images from all over the set, each above its reconstruction by the averaged model."""
    results, path, _ = trained
    events = EventAccumulator(str(run_folder(results) / "tensorboard"))
    events.Reload()
    assert {"generator_loss", "discriminator_loss", "lr"} <= set(events.Tags()["scalars"])
    shown = events.Images("reconstructions")
    assert [event.step for event in shown] == [2, 4, 5]
    picture = np.asarray(Image.open(io.BytesIO(shown[-1].encoded_image_string)))
    paths = class_folders(images).paths
    pixels = torch.stack([center_view(load_rgb(paths[i]), 32) for i in np.linspace(0, len(paths) - 1, 8).astype(int)])
    with torch.inference_mode():
        recons = round_trip(load_tokenizer(path, use_ema=True), pixels)
    expected = make_grid(to_uint8(torch.cat([pixels, recons])), columns=8)
    assert picture.shape == expected.shape == (2 * 34 + 2, 8 * 34 + 2, 3)
    assert np.array_equal(picture[:36], expected[:36])
    assert np.abs(picture[36:].astype(int) - expected[36:].astype(int)).max() <= 1


# The perceptual loss


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Nothing but what the test puts where torchvision downloads to."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(lpips, "PRETRAINED", tmp_path / "pretrained_models")
    return tmp_path / "torch" / "hub" / "checkpoints" / "vgg16-397923af.pth"


def test_without_vgg16(images, tmp_path, hub):
    with pytest.raises(FileNotFoundError, match=r"VGG16 .*not found at .*vgg16-397923af\.pth.*--perceptual-weight 0"):
        train(images, tmp_path / "results", "--perceptual-weight", 1)
    assert not (tmp_path / "results").exists()


def test_with_vgg16(images, tmp_path, hub):
    """Weights of torchvision's names and shapes, random ones."""
    torch.manual_seed(0)
    weights = {
        re.sub(r"slice\d", "features", name): tensor for name, tensor in lpips.VGG16Features().state_dict().items()
    }
    assert {"features.0.weight", "features.28.bias"} <= weights.keys()
    hub.parent.mkdir(parents=True)
    torch.save({**weights, "classifier.6.bias": torch.zeros(1000)}, hub)
    train(images, tmp_path / "results", *NO_DISC, "--perceptual-weight", 1, "--max-steps", 1)
    (line,) = metrics(tmp_path / "results")
    assert line["perceptual_loss"] > 0
    parts = sum(line[f"{name}_loss"] for name in ("reconstruction", "perceptual", "vq", "commit", "entropy"))
    assert line["generator_loss"] == pytest.approx(parts, rel=1e-5)
    saved = load(last(tmp_path / "results"))
    assert not any(
        "lpips" in name or "perceptual" in name for name in [*saved, *saved["model"], *saved["discriminator"]]
    )


# What a user gets wrong


@pytest.mark.parametrize(
    "more, message",
    [
        (["--image-size", 34], r"--image-size 34 is not a multiple of 4, the pixels a side of a VQ-4 token"),
        (["--image-size", 16], r"--disc-type patchgan needs images of 24 pixels a side, got --image-size 16"),
        (["--image-size", 48, "--disc-type", "stylegan"], r"StyleGAN discriminator takes an image size of"),
        (["--global-batch-size", 16], r"12 samples, fewer than --global-batch-size 16"),
        (["--dataset", "coco"], r"it has sub-folders"),
        (["--finetune"], r"--finetune needs --vq-ckpt"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_flags_that_do_not_fit(images, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        train(images, tmp_path / "results", *more)
    assert not (tmp_path / "results").exists()


# The demo


def demo(*more):
    run_here(vq_demo, *MODEL, "--image-size", 32, *more)


def test_the_demo_writes_the_reconstruction(trained, images, tmp_path, capsys):
    photo = tmp_path / "a photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(photo)
    demo("--image-path", photo, "--vq-ckpt", trained[1], "--output-dir", tmp_path / "out" / "deep", "--no-use-ema")
    written = tmp_path / "out" / "deep" / "a photo_tokenizer_image.png"
    with torch.inference_mode():
        recon = round_trip(load_tokenizer(trained[1]), center_view(load_rgb(photo), 32)[None])
    picture = np.asarray(Image.open(written)).astype(int)
    assert np.abs(picture - to_uint8(recon)[0].astype(int)).max() <= 1
    printed = capsys.readouterr().out
    assert f"wrote {written}: 32x32 from 64 codes" in printed and "PSNR" in printed
    demo("--image-path", photo, "--vq-ckpt", trained[0], "--output-dir", tmp_path, "--suffix", "mine")
    assert f"{trained[1]}: its averaged weights" in capsys.readouterr().out
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "a photo_mine.png")), picture)


def test_mistakes_with_the_demo(trained, images):
    photo = images / "class0" / "0.png"
    with pytest.raises(ValueError, match="--vq-ckpt is needed"):
        demo("--image-path", photo)
    with pytest.raises(ValueError, match="--codebook-size 16"):
        demo("--image-path", photo, "--vq-ckpt", trained[1], "--codebook-size", 16)


# Flags

TRAIN_FLAGS = """
`--data-path` str = required; `--data-face-path` str = None; `--cloud-save-path` str = required;
`--no-local-save` switch = –; `--vq-model` str ∈ [VQ-8, VQ-16] = VQ-16; `--vq-ckpt` str = None;
`--finetune` switch = –; `--ema` switch = –; `--codebook-size` int = 16384; `--codebook-embed-dim` int = 8;
`--codebook-l2-norm` switch = on; `--codebook-weight` float = 1.0; `--entropy-loss-ratio` float = 0.0;
`--commit-loss-beta` float = 0.25; `--reconstruction-weight` float = 1.0;
`--reconstruction-loss` str ∈ [l1, l2] = l2; `--perceptual-weight` float = 1.0; `--disc-weight` float = 0.5;
`--disc-start` int = 20000; `--disc-type` str ∈ [patchgan, stylegan] = patchgan;
`--disc-loss` str ∈ [hinge, vanilla, non-saturating] = hinge; `--gen-loss` str ∈ [hinge, non-saturating] = hinge;
`--compile` switch = off; `--dropout-p` float = 0.0; `--results-dir` str = results_tokenizer_image;
`--dataset` str = imagenet; `--image-size` int ∈ [256, 512] = 256; `--epochs` int = 40; `--lr` float = 0.0001;
`--weight-decay` float = 0.05; `--beta1` float = 0.9; `--beta2` float = 0.95; `--max-grad-norm` float = 1.0;
`--global-batch-size` int = 128; `--global-seed` int = 0; `--num-workers` int = 16; `--log-every` int = 100;
`--ckpt-every` int = 5000; `--gradient-accumulation-steps` int = 1;
`--mixed-precision` str ∈ [none, fp16, bf16] = bf16
"""
DEMO_FLAGS = """
`--image-path` str = assets/example.jpg; `--output-dir` str = output_vq_demo; `--suffix` str = tokenizer_image;
`--vq-model` str ∈ [VQ-8, VQ-16] = VQ-16; `--vq-ckpt` str = None; `--codebook-size` int = 16384;
`--codebook-embed-dim` int = 8; `--image-size` int ∈ [256, 384, 448, 512, 1024] = 512; `--seed` int = 0
"""


def test_published_flags():
    check_published_flags(vq_train, TRAIN_FLAGS, ("--cloud-save-path", "--codebook-l2-norm"))
    assert vq_train.flags().parse_args(["--data-path", "x"]).cloud_save_path is None
    check_published_flags(vq_demo, DEMO_FLAGS)


def test_learning_rate_is_a_tenth_after_each_of_the_epochs_asked_for(images, tmp_path):
    train(images, tmp_path, *NO_DISC, "--epochs", 3, "--lr-drop-epochs", 1, 2, "--warmup-steps", 2)
    rates = metrics(tmp_path, "lr")
    assert [rates[step] for step in (1, 2, 3, 4, 6, 7, 9)] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])
