"""Control images through the ordinary scripts: edges of the digits, from stored images to drawn ones."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.pipeline import ImagePipeline
from autoregressive.sample import sample_c2i, sample_c2i_ddp
from autoregressive.train import train_c2i
from dataset.arrays import ArrayFolder, write_arrays
from tests.examples.conftest import IMAGES, SAMPLE, SIZE, TOKENS, TRAIN
from tests.training import live, load, metrics, run_folder, run_here, same
from tools import edges_report, make_controls

pytestmark = pytest.mark.slow  # through whole scripts and servers

ENCODER = ["--control-encoder", "vit,width=16,layers=1,heads=2,positions=8"]


@pytest.fixture(scope="module")
def edges(digits):
    """Stored edges of each image."""
    run_here(
        make_controls,
        *("--code-path", digits / "codes", "--data-path", digits / "images", "--output", digits / "edges"),
    )
    return digits / "edges"


def words(digits, edges, results, *more):
    data = ["--code-path", digits / "codes", "--control-path", edges, "--results-dir", results]
    return [str(word) for word in (*data, *TRAIN, "--lr", 2e-3, *more)]


def train(digits, edges, results, *more):
    run_here(train_c2i, *words(digits, edges, results, *ENCODER, *more))
    return max((run_folder(results) / "checkpoints").glob("*.pt"))


@pytest.fixture(scope="module")
def trained(digits, edges, tmp_path_factory):
    return train(digits, edges, tmp_path_factory.mktemp("control"), "--max-steps", 4, "--vq-ckpt", digits / "vq.pt")


@pytest.fixture(scope="module")
def pipeline(digits, trained):
    """The trained model with an output layer that tells images apart."""
    pipeline = ImagePipeline.from_pretrained(trained, vq=digits / "vq.pt", device="cpu", batch_size=3)
    control = pipeline.gpt.conditions["control"]
    for weight in (pipeline.gpt.output.weight, *control.parameters()):
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(1))
    return pipeline


def pictures(digits, count):
    return sorted((digits / "images").glob("*/*.png"))[:count]


def test_edges_are_stored_of_every_image_and_maps_where_they_are(digits, edges, tmp_path):
    stored = ArrayFolder(edges, "control").get(3)
    assert stored.shape == (1, SIZE, SIZE) and set(stored.unique().tolist()) == {0, 255}
    files = ["--code-path", digits / "codes", "--data-path", digits / "images", "--output", tmp_path / "maps"]
    run_here(make_controls, *files, "--map-path", digits / "images")
    assert ArrayFolder(tmp_path / "maps", "control").get(3).shape == (3, SIZE, SIZE)
    with pytest.raises(FileNotFoundError, match=r"has no 0/0.png"):
        run_here(make_controls, *files, "--map-path", tmp_path)
    with pytest.raises(ValueError, match="has other images than"):
        shutil.copytree(digits / "images/1", tmp_path / "images/1")
        run_here(make_controls, *files[:2], "--data-path", tmp_path / "images", "--output", tmp_path / "maps")


def test_control_is_learned_recorded_and_resumed(digits, edges, trained, tmp_path):
    saved = load(trained)
    control = {"encoder": "vit", "width": 16, "layers": 1, "heads": 2, "positions": 8, "patch": 4, "pixels": 4}
    assert saved["config"]["conditions"] == {"label": {"num_classes": 10}, "control": {**control, "kind": "canny"}}
    drawn = ["--vq-ckpt", digits / "vq.pt"]
    train(digits, edges, tmp_path, "--max-steps", 2, *drawn)
    resumed = load(train(digits, edges, tmp_path, "--max-steps", 4, "--resume", *drawn))
    assert same(resumed["model"], saved["model"])


def test_two_processes_give_the_losses_of_one(digits, edges, tmp_path):
    exact = [*ENCODER, "--max-steps", 3, "--dropout-p", 0, "--token-dropout-p", 0]
    train(digits, edges, tmp_path / "one", *exact[2:])
    ways = {"ddp": ["--data-parallel", "ddp"], "fsdp": ["--data-parallel", "fsdp"]}
    module = "autoregressive.train.train_c2i"
    live(
        *(
            {"module": module, "args": words(digits, edges, tmp_path / way, *exact, *more), "world": 2}
            for way, more in ways.items()
        )
    )
    one = metrics(tmp_path / "one", "loss")
    assert len(one) == 3
    for way in ways:
        assert metrics(tmp_path / way, "loss") == pytest.approx(one, abs=1e-3)


def test_a_base_model_begins_a_run_with_control(digits, edges, tmp_path):
    base = ["--code-path", digits / "codes", "--results-dir", tmp_path / "base", *TRAIN, "--max-steps", 1]
    run_here(train_c2i, *base)
    file = max((run_folder(tmp_path / "base") / "checkpoints").glob("*.pt"))
    with pytest.raises(ValueError, match="has no control images: give --finetune too"):
        train(digits, edges, tmp_path / "tuned", "--gpt-ckpt", file, "--max-steps", 2)
    tuned = train(digits, edges, tmp_path / "again", "--gpt-ckpt", file, "--finetune", "--max-steps", 1)
    assert load(tuned)["config"]["conditions"].keys() == {"label", "control"}


def test_features_are_stored_in_place_of_images(digits, edges, tmp_path):
    features = np.random.default_rng(0).standard_normal((IMAGES, TOKENS, 12)).astype(np.float16)
    write_arrays(tmp_path / "features", "control", features, of=digits / "codes")
    with pytest.raises(ValueError, match="holds features already: leave out --control-encoder"):
        train(digits, tmp_path / "features", tmp_path, "--max-steps", 1)
    run_here(train_c2i, *words(digits, tmp_path / "features", tmp_path / "run", "--max-steps", 1))
    saved = load(max((run_folder(tmp_path / "run") / "checkpoints").glob("*.pt")))
    control = {"encoder": None, "width": 12, "kind": "canny", "pixels": 4}
    assert saved["config"]["conditions"]["control"] == control


def test_control_pictures_reach_the_images_whatever_the_batch(digits, pipeline):
    files, labels = pictures(digits, 5), [1, 1, 2, 3, 4]
    drawn = pipeline(labels, control_images=files, cfg_scale=2.0, progress=False)
    alone = pipeline([2], control_images=Image.open(files[2]), cfg_scale=2.0, indices=[2], progress=False)
    other = pipeline([2], control_images=files[3], cfg_scale=2.0, indices=[2], progress=False)
    none = [
        pipeline([2], control_images=file, cfg_scale=2.0, indices=[2], control_strength=0.0, progress=False)[0]
        for file in files[:2]
    ]
    assert np.array_equal(drawn[2], alone[0]) and not np.array_equal(drawn[2], other[0])
    assert np.array_equal(*none) and not np.array_equal(none[0], drawn[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "conditions label, control; given were label"),
        ({"control_type": "canny"}, "--control-type canny is of a control image: give --control-image too"),
        ({"control_images": [torch.zeros(3, 16, 16, dtype=torch.uint8)]}, "control takes images of 32x32 pixels"),
        ({"control_images": [], "control_type": "hed"}, "0 control for 1 images: give one for each"),
    ],
)
def test_control_pictures_that_do_not_fit_are_refused(pipeline, settings, message):
    with pytest.raises(ValueError, match=message):
        pipeline([2], progress=False, **settings)


def test_sampling_scripts_take_control_pictures(digits, edges, trained, tmp_path):
    files = ["--gpt-ckpt", trained, "--vq-ckpt", digits / "vq.pt", *SAMPLE]
    one = pictures(digits, 1)[0]
    run_here(sample_c2i, *files, "--control-image", one, "--control-strength", 0.6, "--output", tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size[0] > 32
    (tmp_path / "drawings").mkdir()
    for i, file in enumerate(pictures(digits, 4)):
        Image.open(file).save(tmp_path / "drawings" / f"{i}.png")
    many = [*files, "--sample-dir", tmp_path, "--image-size-eval", 32, "--control-type", "canny", "--num-fid-samples"]
    run_here(sample_c2i_ddp, *many, 4, "--control-image", tmp_path / "drawings")
    assert len(list(tmp_path.glob("*/00*.png"))) == 4
    with pytest.raises(ValueError, match="gives 4 pictures, and image 4 is to be drawn"):
        run_here(sample_c2i_ddp, *many, 5, "--control-image", tmp_path / "drawings")
    with pytest.raises(ValueError, match="control_image"):
        run_here(sample_c2i_ddp, *many, 4, "--control-image", one)
    with pytest.raises(FileNotFoundError):
        run_here(sample_c2i, *files, "--control-image", tmp_path / "absent.png")
    with pytest.raises(ValueError, match="is no picture that can be read"):
        run_here(sample_c2i, *files, "--control-image", trained)


def test_edges_report_compares_what_is_drawn_with_what_was_asked_for(digits, trained, tmp_path):
    files = ["--data-path", digits / "images", "--gpt-ckpt", trained, "--vq-ckpt", digits / "vq.pt"]
    run_here(edges_report, *files, "--output", tmp_path, "--images", 4, "--ten-crop")
    report = json.loads((tmp_path / "report.json").read_text())
    drawn = {"with", "again", "half", "without", "shuffled", "reconstructions"}
    assert report["images"] == 4 and report["edge_f1"].keys() == drawn
    assert Image.open(tmp_path / "edges.png").width > 4 * SIZE
    line = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    line[..., 3] = 255
    found = [edges_report.edge_f1(line.roll(shift, 3), line) for shift in (0, 1, 3)]
    assert found == [1.0, 1.0, 0.0] and edges_report.edge_f1(0 * line, 0 * line) == 1.0


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 16, 16), np.uint8),  # of smaller images
        ((4, SIZE, SIZE), np.uint8),
        ((SIZE, SIZE), np.uint8),
        ((1, SIZE, SIZE), np.uint16),
        ((1, SIZE, SIZE), np.float32),
        ((TOKENS - 4, 12), np.float32),
    ],
)
def test_stored_controls_that_do_not_fit_are_refused(digits, edges, tmp_path, shape, dtype):
    write_arrays(tmp_path / "other", "control", np.zeros((IMAGES, *shape), dtype), of=digits / "codes")
    with pytest.raises(ValueError, match="control images for --image-size 32 are uint8 of shape"):
        train(digits, tmp_path / "other", tmp_path / "run", "--max-steps", 1)
    with pytest.raises(ValueError, match="control images for --image-size 32 are uint8 of shape"):
        held_out = ["--val-code-path", digits / "codes", "--val-control-path", tmp_path / "other"]
        train(digits, edges, tmp_path / "run", *held_out, "--max-steps", 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--control-path", "edges", "--control-encoder", "vit,width=8,depth=3"], "--control-encoder has depth: give"),
        (["--control-type", "canny"], "--control-path is needed"),
        (["--control-path", "edges"], "--control-encoder is needed"),
        (["--control-path", "edges", *ENCODER, "--condition", "control"], "describe the same condition"),
        (["--control-path", "edges", *ENCODER, "--lora-rank", 2], "--lora-rank trains a model without"),
        (
            ["--control-path", "edges", *ENCODER, "--val-control-path", "x"],
            "--val-control-path x needs --val-code-path",
        ),
        (["--control-path", "edges", *ENCODER, "--val-code-path", "x"], "--val-code-path x needs --val-control-path"),
        (["--val-control-path", "x", "--val-code-path", "x"], "--val-control-path x needs --control-path"),
        (["--val-condition-path", "depth=x"], "--val-condition-path depth=x needs --val-code-path"),
        (["--control-path", "edges", "--control-encoder", "/absent"], "is no model of transformers"),
        (["--control-path", "edges", "--control-encoder", "vit,width=10,heads=4"], "4 heads must divide the width 10"),
    ],
)
def test_training_flags_that_do_not_fit_are_refused(digits, edges, tmp_path, more, message):
    more = [edges if word == "edges" else word for word in more]
    with pytest.raises(ValueError, match=message):
        run_here(train_c2i, "--code-path", digits / "codes", "--results-dir", tmp_path, *TRAIN, *more)
    with pytest.raises(FileNotFoundError, match="has no control images"):
        train(digits, tmp_path / "absent", tmp_path)
