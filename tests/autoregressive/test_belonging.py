"""Codes, tokenizers, classes and GPTs that do not belong together are refused, with both names; those that do go together."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregressive.hub import TransformerHF
from autoregressive.pipeline import ImagePipeline, load_gpt
from autoregressive.sample import sample_c2i, sample_c2i_ddp
from autoregressive.serve.convert import open_gpt
from autoregressive.train import extract_codes_c2i, train_c2i
from dataset.codes import open_codes
from tests.helpers import randomize
from tests.training import load, make_images, quiet_loggers, run_folder, run_here
from tokenizer.load import load_tokenizer
from tokenizer.tokenizer_image.vq_model import VQ_models
from tools import convert_codes, export_checkpoint, push_gpt_to_hf
from utils.checkpoint import read_checkpoint
from utils.runs import newest_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet")]  # through whole scripts and servers

NAMES = ["class1", "class2", "class10"]
EXTRACT = ["--vq-model", "VQ-4", "--image-size", 16, "--num-workers", 0, "--shard-size", 4, "--device", "cpu"]
TRAIN = ["--gpt-model", "GPT-XS", "--image-size", 16, "--downsample-size", 4, "--global-batch-size", 4]
TRAIN += ["--num-workers", 0, "--mixed-precision", "none", "--max-steps", 1, "--device", "cpu"]
SAMPLE = ["--gpt-model", "GPT-XS", "--vq-model", "VQ-4", "--image-size", 16, "--downsample-size", 4, "--device", "cpu"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Images of three classes, two tokenizers of equal shape, codes by the first, a run on them."""
    folder = tmp_path_factory.mktemp("home")
    make_images(folder / "images", classes=3, per_class=3, size=20)
    for label in (2, 1, 0):
        (folder / "images" / f"class{label}").rename(folder / "images" / NAMES[label])
    for name, seed in (("a.pt", 1), ("b.pt", 2)):
        torch.save({"model": randomize(VQ_models["VQ-4"](codebook_size=64), seed=seed).state_dict()}, folder / name)
    with quiet_loggers():
        extract(folder, "a.pt", folder / "codes")
        train(folder / "codes", folder / "run")
    return folder


def extract(home, tokenizer, target, *more, images="images"):
    run_here(
        extract_codes_c2i,
        *("--data-path", home / images, "--vq-ckpt", home / tokenizer, "--code-path", target, *EXTRACT, *more),
    )
    return target


def train(codes, results, *more):
    run_here(train_c2i, "--code-path", codes, "--results-dir", results, *TRAIN, *more)
    return results


def fingerprint(path) -> str:
    return load_tokenizer(path).fingerprint()


def edit_index(folder, file="index.json", **values):
    """The record as if it had been written so; None removes an entry."""
    record = json.loads((folder / file).read_text())
    record |= values
    record = {key: value for key, value in record.items() if key != "images" or value is not None}
    (folder / file).write_text(json.dumps(record))
    return folder


def test_sampling_without_flags_takes_all_from_the_files(home, tmp_path):
    """Two tokenizers lie beside the run, or beside its codes; the one that made them is taken."""
    shared = ["--labels", "class10", "--device", "cpu", "--precision", "none"]
    run_here(sample_c2i, "--gpt-ckpt", home / "run", *shared, "--output", tmp_path / "told.png")
    files = ["--gpt-ckpt", home / "run", "--vq-ckpt", home / "a.pt", "--num-classes", 3]
    run_here(sample_c2i, *files, *SAMPLE, *shared, "--output", tmp_path / "flags.png")
    assert (tmp_path / "told.png").read_bytes() == (tmp_path / "flags.png").read_bytes()
    far = shutil.copytree(home / "run", tmp_path / "far" / "away" / "from" / "it" / "run")
    run_here(sample_c2i, "--gpt-ckpt", far, *shared, "--output", tmp_path / "far.png")
    assert (tmp_path / "told.png").read_bytes() == (tmp_path / "far.png").read_bytes()
    content = torch.load(newest_checkpoint(far), weights_only=False)
    content["args"].code_path = "gone/codes"
    torch.save(content, far / "gone.pt")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer .* give --vq-ckpt"):
        run_here(sample_c2i, "--gpt-ckpt", far / "gone.pt", *shared)


# What is recorded


def test_training_records_tokenizer_classes_and_codes(home):
    saved = read_checkpoint(next((run_folder(home / "run") / "checkpoints").glob("*.pt")))
    assert (
        saved.config["version"] == 2
        and saved.config["layout"]["grid_size"] == 4
        and saved.config["tokenizer"] == fingerprint(home / "a.pt")
    )
    assert saved.config["classes"] == NAMES
    assert saved.config["codes"] == open_codes(home / "codes", 16, 4).identity()
    assert saved.args["num_classes"] == 3 and saved.args["vocab_size"] == 64  # no flag said so
    assert saved.model["cls_embedding.embedding_table.weight"].shape[0] == 4


def test_training_prints_the_classes_once(home, tmp_path, capfd):
    train(home / "codes", tmp_path)
    assert capfd.readouterr().out.count("classes: 0 class1, 1 class2, 2 class10") == 1


# Sampling


@pytest.mark.parametrize("script", [sample_c2i, sample_c2i_ddp])
def test_sampling_by_another_tokenizer_is_refused(home, tmp_path, script):
    more = (
        ["--output", tmp_path / "x.png"] if script is sample_c2i else ["--sample-dir", tmp_path, "--num-fid-samples", 2]
    )
    run_here(script, "--gpt-ckpt", home / "run", "--vq-ckpt", home / "a.pt", *SAMPLE, *more)
    a, b = fingerprint(home / "a.pt"), fingerprint(home / "b.pt")
    with pytest.raises(ValueError, match=rf"b\.pt is the tokenizer {b}, and the codes are of the tokenizer {a}"):
        run_here(script, "--gpt-ckpt", home / "run", "--vq-ckpt", home / "b.pt", *SAMPLE, *more)


def test_pipeline_of_another_tokenizer_is_refused(home):
    gpt = load_gpt(next((run_folder(home / "run") / "checkpoints").glob("*.pt")), image_size=16)
    with pytest.raises(ValueError, match=r"speaks the codes of the tokenizer .*, and the tokenizer given is"):
        ImagePipeline(gpt, load_tokenizer(home / "b.pt"))
    with pytest.raises(ValueError, match=r"b\.pt is the tokenizer"):
        ImagePipeline.from_pretrained(home, gpt=home / "run", vq=home / "b.pt")
    gpt.file_config = {}  # as in files of the first edition
    ImagePipeline(gpt, load_tokenizer(home / "b.pt"))


def test_sampling_prints_and_takes_the_names_of_classes(home, tmp_path, capsys):
    words = ["--gpt-ckpt", home / "run", "--vq-ckpt", home / "a.pt", *SAMPLE, "--output", tmp_path / "x.png"]
    run_here(sample_c2i, *words, "--labels", "class10", 0)
    assert "classes: 2: class10, 0: class1\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no class is called 'class3'"):
        run_here(sample_c2i, *words, "--labels", "class3")


# Exports


def test_exports_keep_the_record(home, tmp_path):
    path = next((run_folder(home / "run") / "checkpoints").glob("*.pt"))
    config = read_checkpoint(path).config
    for kind, suffix in (("pt", ".pt"), ("safetensors", ".safetensors")):
        run_here(export_checkpoint, "--checkpoint", path, "--format", kind, "--output", tmp_path / f"x{suffix}")
        assert read_checkpoint(tmp_path / f"x{suffix}").config == config
    words = [
        "--gpt-ckpt",
        path,
        "--gpt-model",
        "GPT-XS",
        "--image-size",
        16,
        "--downsample-size",
        4,
        "--precision",
        "none",
    ]
    run_here(push_gpt_to_hf, *words, "--output", tmp_path / "hub")
    assert TransformerHF.from_pretrained(tmp_path / "hub").file_config == config
    assert "0 class1, 1 class2, 2 class10" in (tmp_path / "hub" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"b\.pt is the tokenizer"):
        run_here(push_gpt_to_hf, *words, "--vq-ckpt", home / "b.pt", "--vq-model", "VQ-4", "--output", tmp_path / "no")
    assert open_gpt(path, image_size=16, downsample_size=4).file_config == config


# Held-out codes


@pytest.fixture(scope="module")
def held_out(home):
    """Held-out images of two of the three classes, and the same in a flat folder."""
    for name in NAMES[1:]:
        shutil.copytree(home / "images" / name, home / "held_out" / name)
    shutil.copytree(home / "images" / NAMES[0], home / "flat")
    return home


@pytest.mark.parametrize("layout", [[], ["--published-layout"]], ids=["packed", "published"])
def test_held_out_codes_without_a_class_are_refused(held_out, tmp_path, layout):
    codes = held_out / "codes"
    other = extract(held_out, "a.pt", tmp_path / "flip", *layout, images="held_out")
    message = rf"--code-path {codes} and --val-code-path .* class 0 is 'class1' and 'class2' \(3 and 2 classes\)"
    with pytest.raises(ValueError, match=message):
        train(codes, tmp_path / "run", "--val-code-path", other)
    right = extract(held_out, "a.pt", tmp_path / "flip2", *layout, "--classes-of", codes, images="held_out")
    data = open_codes(right, 16, 4, random_view=False)
    assert sorted({item["label"] for item in data}) == [1, 2]
    train(codes, tmp_path / "run", "--val-code-path", right)


def test_held_out_codes_of_a_flat_folder_are_refused(held_out, tmp_path):
    flat = extract(held_out, "a.pt", tmp_path / "flat", "--dataset", "coco", images="flat")
    with pytest.raises(ValueError, match="do not belong together: num classes 3 and 1"):
        train(held_out / "codes", tmp_path / "run", "--val-code-path", flat)
    with pytest.raises(ValueError, match="--dataset coco has no classes"):
        extract(
            held_out, "a.pt", tmp_path / "x", "--dataset", "coco", "--classes-of", held_out / "codes", images="flat"
        )


def test_held_out_codes_of_another_tokenizer_are_refused(home, tmp_path):
    other = extract(home, "b.pt", tmp_path / "codes")
    a, b = fingerprint(home / "a.pt"), fingerprint(home / "b.pt")
    with pytest.raises(ValueError, match=f"do not belong together: tokenizer {a} and {b}"):
        train(home / "codes", tmp_path / "run", "--val-code-path", other)


def test_held_out_codes_that_record_nothing_are_taken_with_a_line(home, tmp_path, capfd):
    published = extract(home, "a.pt", tmp_path / "codes", "--published-layout")
    (published / "imagenet16.json").unlink()
    train(home / "codes", tmp_path / "run", "--val-code-path", published)
    assert "records no tokenizer and classes and num classes: not compared" in capfd.readouterr().out


def test_classes_of_a_folder_outside_them_is_refused(home, tmp_path):
    shutil.copytree(home / "images" / "class1", tmp_path / "more" / "zebra")
    with pytest.raises(ValueError, match="has a class folder 'zebra', which is none of the 3 classes"):
        extract(home, "a.pt", tmp_path / "codes", "--classes-of", home / "codes", images=tmp_path / "more")


# The second crop


@pytest.mark.parametrize("layout", ["packed", "published"])
def test_ten_crop_sibling_that_does_not_belong_is_refused(home, tmp_path, layout):
    more = ["--published-layout"] if layout == "published" else []
    codes = extract(home, "a.pt", tmp_path / "flip_ten_crop", "--ten-crop", *more)
    sibling = extract(home, "a.pt", tmp_path / "flip_ten_crop_105", "--ten-crop", "--crop-range", 1.05, *more)
    assert len(open_codes(codes, 16, 4).sources) == 2
    record = "imagenet16.json" if layout == "published" else "index.json"
    right = json.loads((sibling / record).read_text())
    for values, message in (
        ({"tokenizer": fingerprint(home / "b.pt")}, f"tokenizer {right['tokenizer']} and {fingerprint(home / 'b.pt')}"),
        ({"tokenizer": "0123456789abcdef"}, f"tokenizer {right['tokenizer']} and 0123456789abcdef"),
        ({"classes": sorted(NAMES)}, "class 1 is 'class2' and 'class10'"),
        ({"images": "0123456789abcdef"}, "images"),
        ({"crop_range": 1.1}, r"is of --crop-range 1\.1"),
        ({"views": right["views"][::-1]}, "views"),
    ):
        edit_index(sibling, record, **(right | values))
        with pytest.raises(ValueError, match=message):
            open_codes(codes, 16, 4)
    edit_index(sibling, record, **(right | {"images": None, "tokenizer": right["tokenizer"][:16]}))
    open_codes(codes, 16, 4)  # recorded by the first edition


# Runs that go on


def test_resume_on_the_same_codes_elsewhere_goes_on(home, tmp_path):
    run = shutil.copytree(home / "run", tmp_path / "run")
    moved = shutil.copytree(home / "codes", tmp_path / "elsewhere")
    train(moved, run, "--resume", "--max-steps", 2)
    assert load(max((run_folder(run) / "checkpoints").glob("*.pt")))["steps"] == 2


def test_resume_on_the_same_codes_in_the_other_layout_goes_on(home, tmp_path):
    run = shutil.copytree(home / "run", tmp_path / "run")
    run_here(convert_codes, "--from", home / "codes", "--to", tmp_path / "flip", "--image-size", 16)
    train(tmp_path / "flip", run, "--resume", "--max-steps", 2)


def test_resume_on_other_codes_is_refused(home, tmp_path):
    run = shutil.copytree(home / "run", tmp_path / "run")
    a, b = fingerprint(home / "a.pt"), fingerprint(home / "b.pt")
    other = extract(home, "b.pt", tmp_path / "other")
    with pytest.raises(ValueError, match=f"do not belong together: tokenizer {a} and {b}; codes"):
        train(other, run, "--resume", "--max-steps", 2)
    images = shutil.copytree(home / "images", tmp_path / "moved")
    (images / "class1" / "0.png").rename(images / "class2" / "moved.png")
    with pytest.raises(ValueError, match=r"codes' images '[0-9a-f]{16}' and '[0-9a-f]{16}'"):
        train(extract(home, "a.pt", tmp_path / "codes", images=images), run, "--resume", "--max-steps", 2)
    half = extract(home, "a.pt", tmp_path / "half", "--mixed-precision", "bf16")
    with pytest.raises(ValueError, match="codes' checksums in shards of 4"):
        train(half, run, "--resume", "--max-steps", 2)


def test_resume_on_published_codes_without_a_record_compares_their_content(home, tmp_path):
    for name, tokenizer in (("one", "a.pt"), ("other", "b.pt")):
        folder = extract(home, tokenizer, tmp_path / name, "--published-layout")
        (folder / "imagenet16.json").unlink()
    run = train(tmp_path / "one", tmp_path / "run", "--num-classes", 3, "--vocab-size", 64)
    with pytest.raises(ValueError, match="codes' content of 64 samples"):
        train(tmp_path / "other", run, "--resume", "--max-steps", 2)


def test_codes_without_a_record_leave_the_record_of_the_weights(home, tmp_path):
    folder = extract(home, "a.pt", tmp_path / "codes", "--published-layout")
    (folder / "imagenet16.json").unlink()
    run = train(folder, tmp_path / "run", "--gpt-ckpt", home / "run", "--max-steps", 2)
    config = read_checkpoint(next((run_folder(run) / "checkpoints").glob("*.pt"))).config
    assert (config["tokenizer"], config["classes"]) == (fingerprint(home / "a.pt"), NAMES)


def test_finetune_tells_nothing_of_records_that_both_have(home, tmp_path, capfd):
    train(home / "codes", tmp_path, "--gpt-ckpt", home / "run", "--finetune")
    assert "not compared" not in capfd.readouterr().out


def test_resume_of_the_first_edition_goes_on_with_a_line(home, tmp_path, capfd):
    """Its checkpoints record nothing, and its model has the published number of classes."""
    run = train(home / "codes", tmp_path / "run", "--num-classes", 1000)
    path = max((run_folder(run) / "checkpoints").glob("*.pt"))
    saved = torch.load(path, weights_only=False)
    del saved["config"]
    torch.save(saved, path)
    train(home / "codes", run, "--resume", "--max-steps", 2)
    assert "records no tokenizer and no classes and no codes: not compared" in capfd.readouterr().out
    last = load(max((run_folder(run) / "checkpoints").glob("*.pt")))
    assert last["args"].num_classes == 1000 and last["config"]["classes"] == NAMES


def test_start_from_weights_of_another_tokenizer_is_refused(home, tmp_path):
    other = extract(home, "b.pt", tmp_path / "other")
    with pytest.raises(ValueError, match="do not belong together: tokenizer"):
        train(other, tmp_path / "run", "--gpt-ckpt", home / "run")


def test_pictures_while_training_by_another_tokenizer_are_refused(home, tmp_path):
    with pytest.raises(ValueError, match=r"b\.pt is the tokenizer"):
        train(home / "codes", tmp_path / "run", "--vq-ckpt", home / "b.pt")


# Extractions that go on


@pytest.mark.parametrize("layout", [[], ["--published-layout"]], ids=["packed", "published"])
def test_extraction_goes_on_only_with_the_same_images(home, tmp_path, layout):
    images = shutil.copytree(home / "images", tmp_path / "images")
    codes = extract(home, "a.pt", tmp_path / "codes", *layout, images=images)
    extract(home, "a.pt", codes, *layout, images=images.rename(tmp_path / "elsewhere"))
    images = tmp_path / "elsewhere"
    (images / "class1" / "0.png").rename(images / "class2" / "moved.png")
    with pytest.raises(ValueError, match=r"images: .* moved to another class"):
        extract(home, "a.pt", codes, *layout, images=images)


def test_extraction_begun_by_the_first_edition_keeps_its_order(home, tmp_path, capfd):
    codes = extract(home, "a.pt", tmp_path / "codes", "--class-order", "text")
    edit_index(codes, images=None, tokenizer=fingerprint(home / "a.pt")[:16])
    (codes / "shard-000001.json").unlink()
    extract(home, "a.pt", codes)
    assert open_codes(codes, 16, 4).settings.classes == ["class1", "class10", "class2"]


# Views


def test_extraction_begun_by_the_first_edition_refuses_an_image_that_moved(home, tmp_path):
    images = shutil.copytree(home / "images", tmp_path / "images")
    codes = edit_index(extract(home, "a.pt", tmp_path / "codes", images=images), images=None)
    extract(home, "a.pt", codes, images=images)
    (images / "class1" / "0.png").rename(images / "class2" / "moved.png")
    with pytest.raises(ValueError, match="has label 0 for image 2, which is 1 now"):
        extract(home, "a.pt", codes, images=images)


@pytest.mark.parametrize("layout", ["packed", "published", "converted", "first edition", "first edition, converted"])
def test_the_centre_of_five_crops_is_the_centre(home, tmp_path, layout):
    """By --ten-crop --no-flip, in training without 'flip' in the path and in validation."""
    more = ["--published-layout"] if layout != "packed" else []
    codes = extract(home, "a.pt", tmp_path / "codes", "--ten-crop", "--no-flip", *more)
    if layout.startswith("first"):
        (codes / "imagenet16.json").unlink()
    if layout.endswith("converted"):
        run_here(convert_codes, "--from", codes, "--to", tmp_path / "packed", "--image-size", 16, "--codebook-size", 64)
        codes = tmp_path / "packed"
        if layout.startswith("first"):
            edit_index(codes, views=[f"view_{k}" for k in range(5)])
    data = open_codes(codes, 16, 4, random_view=False)
    assert data.sources[0].view_names[4] == "center"
    centre = data.sources[0].rows(np.arange(9), np.full(9, 4))
    assert all(np.array_equal(codes, centre[i]) for i, codes in enumerate(item["codes"] for item in data))


def test_conversion_keeps_what_is_recorded(home, tmp_path):
    run_here(convert_codes, "--from", home / "codes", "--to", tmp_path / "flip", "--image-size", 16)
    run_here(convert_codes, "--from", tmp_path / "flip", "--to", tmp_path / "packed", "--image-size", 16)
    before, after = (open_codes(folder, 16, 4).settings for folder in (home / "codes", tmp_path / "packed"))
    for name in ("tokenizer", "classes", "num_classes", "images", "views", "codebook_size"):
        assert getattr(after, name) == getattr(before, name), name
    with pytest.raises(ValueError, match="records num_classes 3, not 5"):
        run_here(
            convert_codes,
            *("--from", tmp_path / "flip", "--to", tmp_path / "x", "--image-size", 16, "--num-classes", 5),
        )
