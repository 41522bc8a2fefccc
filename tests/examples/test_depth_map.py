"""examples/depth_map.py through the ordinary scripts: a condition of one's own, from stored maps to drawn images."""

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.pipeline import ImagePipeline
from autoregressive.sample import sample_c2i, sample_c2i_ddp
from autoregressive.train import train_c2i
from dataset.arrays import write_arrays
from tests.examples.conftest import IMAGES, SAMPLE, TOKENS, TRAIN
from tests.helpers import ROOT
from tests.training import load, run_folder, run_here, same

pytestmark = pytest.mark.slow  # through whole scripts and servers

IMPORT = ["--import", ROOT / "examples/depth_map.py"]


@pytest.fixture(scope="module")
def maps(digits):
    """A stored map for each image, and a file of eight to draw by."""
    arrays = np.random.default_rng(0).standard_normal((IMAGES, TOKENS, 1)).astype(np.float32)
    write_arrays(digits / "depth", "depth", arrays, of=digits / "codes")
    np.save(digits / "maps.npy", arrays[:8])
    return arrays


def train(digits, results, *more):
    run_here(
        train_c2i,
        *("--code-path", digits / "codes", "--results-dir", results, *TRAIN, *IMPORT, "--lr", 2e-3),
        *("--condition", "depth", "--condition-path", f"depth={digits / 'depth'}", *more),
    )
    return max((run_folder(results) / "checkpoints").glob("*.pt"))


@pytest.fixture(scope="module")
def trained(digits, maps, tmp_path_factory):
    return train(digits, tmp_path_factory.mktemp("depth"), "--max-steps", 4)


def test_depth_condition_is_learned_recorded_and_resumed(digits, trained, tmp_path):
    saved = load(trained)
    assert saved["config"]["conditions"] == {"label": {"num_classes": 10}, "depth": {}}
    assert saved["model"]["extra_conditions.depth.project.weight"].shape == (128, 1)
    train(digits, tmp_path, "--max-steps", 2)
    assert same(load(train(digits, tmp_path, "--max-steps", 4, "--resume"))["model"], saved["model"])


def test_depth_maps_reach_the_images_whatever_the_batch(digits, maps, trained):
    pipeline = ImagePipeline.from_pretrained(trained, vq=digits / "vq.pt", device="cpu", batch_size=3)
    for weight in (pipeline.gpt.extra_conditions["depth"].project.weight, pipeline.gpt.output.weight):
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))  # hardly trained
    depth, labels = torch.from_numpy(maps[:5]), [1, 1, 2, 3, 4]
    drawn = pipeline(labels, extra_conditions={"depth": depth}, cfg_scale=2.0, progress=False)
    alone = pipeline([2], extra_conditions={"depth": depth[2:3]}, cfg_scale=2.0, indices=[2], progress=False)
    other = pipeline([2], extra_conditions={"depth": -depth[2:3]}, cfg_scale=2.0, indices=[2], progress=False)
    assert np.array_equal(drawn[2], alone[0]) and not np.array_equal(drawn[2], other[0])
    with pytest.raises(ValueError, match=r"conditions label, depth; given were label"):
        pipeline([2], progress=False)
    with pytest.raises(ValueError, match=r"depth maps have shape \(B, 64, 1\), got \(\d, 4, 1\)"):
        pipeline([2], extra_conditions={"depth": depth[:1, :4]}, progress=False)


def test_sampling_scripts_take_a_file_of_maps(digits, maps, trained, tmp_path):
    files = ["--gpt-ckpt", trained, "--vq-ckpt", digits / "vq.pt", *SAMPLE, *IMPORT]
    given = ["--condition-file", f"depth={digits / 'maps.npy'}"]
    run_here(sample_c2i, *files, *given, "--output", tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size[0] > 32
    many = [*files, "--sample-dir", tmp_path, "--image-size-eval", 32, "--num-fid-samples"]
    run_here(sample_c2i_ddp, *many, 4, *given)
    assert len(list(tmp_path.glob("*/*.png"))) == 4
    with pytest.raises(ValueError, match="has 8 rows, and image 8 is to be drawn"):
        run_here(sample_c2i_ddp, *many, 9, *given)
    np.save(tmp_path / "others.npy", -maps[:8])
    with pytest.raises(ValueError, match="condition_file"):
        run_here(sample_c2i_ddp, *many, 6, "--condition-file", f"depth={tmp_path / 'others.npy'}")
