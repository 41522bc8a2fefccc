"""The sampling scripts as they are called: what they write, runs that go on, several processes, flags, a user's mistakes."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.gpt import build_gpt
from autoregressive.pipeline import ImagePipeline
from autoregressive.sample import many, sample_c2i, sample_c2i_ddp
from autoregressive.sample.many import BATCHES_WAITING, save_images
from tests import forkserver
from tests.helpers import ROOT, randomize
from tests.training import check_published_flags, run_here
from utils.checkpoint import save_checkpoint
from utils.cli import run_script
from utils.images import labelled_grid, make_grid, peak_signal_to_noise_ratio
from utils.rng import image_label

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

SCRIPTS = [sample_c2i, sample_c2i_ddp]
SIZES = ["--gpt-model", "GPT-XS", "--vq-model", "VQ-4", "--codebook-size", 64, "--num-classes", 10]
SHAPE = {"vocab_size": 64, "block_size": 64, "num_classes": 10}
SMALL = [*SIZES, "--image-size", 32, "--downsample-size", 4, "--precision", "none", "--device", "cpu"]
NAME = "GPT-XS-gpt-size-32-size-32-VQ-4-topk-0-topp-1.0-temperature-1.0-cfg-1.5-seed-0"


def line(files, *more) -> list:
    """The flags that fit the small files. Later ones win."""
    return [*SMALL, "--gpt-ckpt", files.gpt, "--vq-ckpt", files.vq, *more]


def ddp_line(files, folder, *more) -> list:
    size = ["--image-size-eval", 32, "--num-fid-samples", 5, "--per-proc-batch-size", 2]
    return line(files, "--sample-dir", folder, *size, *more)


def start(script, words, cwd, processes: int = 1) -> subprocess.CompletedProcess:
    """Runs a script as a user would, from another folder and without PYTHONPATH."""
    launch = [sys.executable]
    if processes > 1:
        launch += [str(ROOT / "tests/launch.py"), str(processes)]
    path = ROOT / f"{script.__name__.replace('.', '/')}.py"
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"}
    command = [*launch, str(path), *map(str, words)]
    return forkserver.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def by_pipeline(files, labels, gpt="gpt", indices=None, **settings) -> np.ndarray:
    pipeline = ImagePipeline.from_pretrained(files.folder, gpt=f"{gpt}.pt", vq="vq.pt", device="cpu")
    return np.stack(pipeline(labels, indices=indices, progress=False, **settings))


@pytest.fixture(scope="module")
def drawn(small_files, tmp_path_factory) -> Path:
    """Five images by sample_c2i_ddp.py in this process. Read-only."""
    folder = tmp_path_factory.mktemp("drawn")
    run_here(sample_c2i_ddp, *ddp_line(small_files, folder))
    return folder


# A grid


def test_negative_class_reaches_the_images_of_both_scripts(small_files, drawn, tmp_path, capsys):
    words = ["--labels", 3, 9, "--cfg-scale", 2, "--negative-class", 4]
    run_here(sample_c2i, *line(small_files, *words, "--top-k", 0, "--columns", 2, "--output", tmp_path / "grid.png"))
    images = by_pipeline(small_files, [3, 9], negative_classes=4, cfg_scale=2.0)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert np.array_equal(grid[2:34, 2:34], images[0]) and np.array_equal(grid[2:34, 36:68], images[1])
    run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path, "--negative-class", 4, "--num-fid-samples", 1))
    image = np.asarray(Image.open(tmp_path / NAME / "000000.png"))
    expected = by_pipeline(small_files, [image_label(0, 0, 10)], negative_classes=4, cfg_scale=1.5)[0]
    assert np.array_equal(image, expected)
    with pytest.raises(ValueError, match="negative_class: 4, now None"):
        run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path))
    with pytest.raises(ValueError, match="no effect without guidance"):
        run_here(sample_c2i, *line(small_files, "--negative-class", 4, "--cfg-scale", 1))


def test_grid(small_files, tmp_path):
    output = tmp_path / "new" / "grid.png"
    words = ["--labels", 3, 9, 0, "--columns", 2, "--seed", 5, "--cfg-scale", 2, "--top-k", 20, "--output", output]
    run_here(sample_c2i, *line(small_files, *words))
    grid = np.asarray(Image.open(output))
    assert grid.shape == (2 * 34 + 2, 2 * 34 + 2, 3)
    images = by_pipeline(small_files, [3, 9, 0], seed=5, cfg_scale=2.0, top_k=20)
    for i, (y, x) in enumerate([(2, 2), (2, 36), (36, 2)]):
        assert np.array_equal(grid[y : y + 32, x : x + 32], images[i])
    assert not grid[36:, 36:].any()


def test_grid_of_a_file_that_records_its_classes_has_their_names_below(small_files, tmp_path, monkeypatch):
    made = torch.load(small_files.gpt, weights_only=False)
    save_checkpoint(tmp_path / "own.pt", {**made, "config": {"classes": [f"fish {i}" for i in range(10)]}})
    grids = {}
    for words in ((), ("--names",), ("--no-names",)):
        for gpt in (small_files.gpt, tmp_path / "own.pt"):
            asked = line(small_files, "--gpt-ckpt", gpt, "--labels", 3, 9, *words, "--output", tmp_path / "grid.png")
            run_here(sample_c2i, *asked)
            grids[words, gpt.stem] = np.asarray(Image.open(tmp_path / "grid.png"))
    images = by_pipeline(small_files, [3, 9], seed=0, cfg_scale=4.0, top_k=2000)
    assert np.array_equal(grids[(), "own"], labelled_grid(images, ["fish 3", "fish 9"], 4))
    assert np.array_equal(grids[("--names",), "gpt"], labelled_grid(images, ["3", "9"], 4))
    for bare in ((), "gpt"), (("--no-names",), "gpt"), (("--no-names",), "own"):
        assert np.array_equal(grids[bare], make_grid(images, 4))


@pytest.mark.slow
def test_grid_as_a_user_starts_it(small_files, tmp_path):
    """Defaults: eight images in rows of four, sample_c2i.png in the current folder, bf16."""
    words = [*SIZES, "--image-size", 32, "--downsample-size", 4]
    words += ["--gpt-ckpt", small_files.gpt, "--vq-ckpt", small_files.vq]
    done = start(sample_c2i, words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "sample_c2i.png").size == (4 * 34 + 2, 2 * 34 + 2)
    assert [path.name for path in tmp_path.iterdir()] == ["sample_c2i.png"]
    assert "8 images of 32x32" in done.stdout and "Warning" not in done.stderr


@pytest.mark.parametrize("groups", [["--spe-token-num", 3], ["--ar-token-num", 4, "--spe-token-num", 3]])
def test_par(small_files, tmp_path, groups):
    output = tmp_path / "grid.png"
    run_here(sample_c2i, *line(small_files, "--gpt-ckpt", small_files.par, *groups, "--labels", 1, "--output", output))
    image = np.asarray(Image.open(output))[2:34, 2:34]
    assert np.array_equal(image, by_pipeline(small_files, [1], gpt="par4", cfg_scale=4.0, top_k=2000)[0])
    assert not np.array_equal(image, by_pipeline(small_files, [1], cfg_scale=4.0, top_k=2000)[0])


@pytest.mark.parametrize(
    "words, settings",
    [
        (["--top-k", -1], {"top_k": 0}),
        (["--top-p", 1.5], {}),
        (["--cfg-scale", 0.5], {"cfg_scale": 1.0}),
        (["--top-p", 0], {"sample_logits": False}),
    ],
    ids=str,
)
def test_sample_c2i_with_values_of_published_command_lines_draws(small_files, tmp_path, words, settings):
    run_here(sample_c2i, *line(small_files, *words, "--labels", 1, "--output", tmp_path / "grid.png"))
    expected = by_pipeline(small_files, [1], **{"cfg_scale": 4.0, "top_k": 2000, **settings})[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png"))[2:34, 2:34], expected)


@pytest.mark.parametrize("script", SCRIPTS)
def test_sampling_scripts_with_logits_that_are_not_finite_name_precision_and_step(script, small_files, tmp_path):
    saved = torch.load(small_files.gpt, weights_only=False)
    saved["model"]["layers.0.feed_forward.w2.weight"] *= 1e6  # float32 holds it
    torch.save(saved, tmp_path / "large.pt")
    words = ["--gpt-ckpt", tmp_path / "large.pt", "--precision", "fp16", "--output", tmp_path / "grid.png"]
    if script is sample_c2i_ddp:
        words = [*words[:-2], "--sample-dir", tmp_path, "--image-size-eval", 32, "--num-fid-samples", 2]
    with pytest.raises(ValueError, match="not finite from decode step 1 on, in fp16: give --precision bf16 or none"):
        run_here(script, *line(small_files, *words))
    assert not [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.npz")]


def test_greedy_and_interval_reach_the_model(small_files, tmp_path):
    par = line(small_files, "--gpt-ckpt", small_files.par, "--ar-token-num", 4)  # fewer steps
    for words, settings in (
        (["--greedy"], {"sample_logits": False}),
        (["--cfg-interval", 3], {"cfg_interval": 3}),
        (["--temperature", 0.5, "--top-p", 0.7, "--top-k", 0], {"temperature": 0.5, "top_p": 0.7, "top_k": 0}),
    ):
        run_here(sample_c2i, *par, *words, "--labels", 1, "--output", tmp_path / "grid.png")
        expected = by_pipeline(small_files, [1], gpt="par4", **{"cfg_scale": 4.0, "top_k": 2000, **settings})
        assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png"))[2:34, 2:34], expected[0]), words


# Many images


def test_images_and_npz(small_files, drawn):
    assert {path.name for path in drawn.iterdir()} == {NAME, f"{NAME}.npz"}
    names = sorted(path.name for path in (drawn / NAME).glob("*.png"))
    assert names == [f"{i:06d}.png" for i in range(5)]
    with np.load(drawn / f"{NAME}.npz") as data:
        assert set(data.files) == {"arr_0", "arr_1"}
        images, labels = data["arr_0"], data["arr_1"]
    assert (images.dtype, images.shape, labels.dtype) == (np.uint8, (5, 32, 32, 3), np.int64)
    assert labels.tolist() == [image_label(0, i, 10) for i in range(5)]
    for i, name in enumerate(names):
        assert np.array_equal(np.asarray(Image.open(drawn / NAME / name)), images[i])
    assert np.array_equal(images, by_pipeline(small_files, labels.tolist(), cfg_scale=1.5))
    assert len({image.tobytes() for image in images}) == 5


def test_the_name_of_the_folder(small_files, tmp_path):
    words = ["--image-size-eval", 24, "--top-k", 7, "--top-p", 0.9, "--temperature", 0.8]
    words += ["--cfg-scale", 1, "--global-seed", 3]
    run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path, *words, "--num-fid-samples", 1))
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert folder.name == "GPT-XS-gpt-size-32-size-24-VQ-4-topk-7-topp-0.9-temperature-0.8-cfg-1.0-seed-3"
    assert Image.open(folder / "000000.png").size == (24, 24)
    assert np.load(tmp_path / f"{folder.name}.npz")["arr_0"].shape == (1, 24, 24, 3)


@pytest.mark.slow
def test_from_fsdp_names_the_checkpoints_folder(small_files, tmp_path, monkeypatch):
    monkeypatch.chdir(small_files.bare.parent)
    for i, path in enumerate((small_files.bare, small_files.bare.parent, "consolidated.pth")):
        words = ["--gpt-ckpt", path, "--from-fsdp", "--num-fid-samples", 1]
        run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path / str(i), *words))
        assert (tmp_path / str(i) / NAME.replace("-gpt-", "-0005000-") / "000000.png").exists(), path
    run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path, *words[:2], *words[3:]))
    assert (tmp_path / NAME.replace("-gpt-", "-consolidated-") / "000000.png").exists()


def test_balanced_classes_and_no_npz(small_files, tmp_path):
    words = ["--balanced", "--no-npz", "--num-fid-samples", 3]
    run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path, *words))
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    images = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / NAME).glob("*.png"))])
    assert np.array_equal(images, by_pipeline(small_files, [0, 1, 2], cfg_scale=1.5))


def test_an_interrupted_run_goes_on(small_files, drawn, tmp_path, capsys):
    """Missing and half-written images are drawn again, in other batches, and nothing else."""
    expected = contents(drawn)
    for name, content in expected.items():
        if not name.endswith(("000001.png", "000004.png", ".npz")):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content[:-5] if name.endswith("000002.png") else content)
    (tmp_path / NAME / "000001.png").touch()
    before = {name: (tmp_path / NAME / name).stat().st_mtime_ns for name in ("000000.png", "000003.png")}
    run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path, "--per-proc-batch-size", 3))
    assert contents(tmp_path) == expected
    assert "2 of 5 images are there, 3 to draw" in capsys.readouterr().out
    assert before == {name: (tmp_path / NAME / name).stat().st_mtime_ns for name in before}

    run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path, "--num-fid-samples", 7))
    more = contents(tmp_path)
    assert len(more) == len(expected) + 2
    assert all(more[name] == content for name, content in expected.items() if not name.endswith(".npz"))
    assert np.load(tmp_path / f"{NAME}.npz")["arr_0"].shape[0] == 7


@pytest.mark.parametrize(
    "words, key",
    [
        (["--cfg-interval", 5], "cfg_interval: -1, now 5.0"),
        (["--precision", "bf16"], "precision: none, now bf16"),
        (["--balanced"], "balanced: False, now True"),
        (["--greedy"], "greedy: False, now True"),
        (["--draw", "cdf"], "draw: race1, now cdf"),
        (["--gpt-ckpt", "other/gpt.pt"], "gpt_ckpt: "),
    ],
)
def test_a_folder_of_other_settings_is_refused(small_files, drawn, tmp_path, monkeypatch, words, key):
    """Those that the folder's name does not tell."""
    (tmp_path / "other").mkdir()
    other = torch.load(small_files.gpt, weights_only=False)
    other["model"]["norm.weight"] += 1
    torch.save(other, tmp_path / "other" / "gpt.pt")
    monkeypatch.chdir(tmp_path)
    before = contents(drawn)
    with pytest.raises(ValueError, match=rf"seed-0 holds images drawn with other settings \({key}"):
        run_here(sample_c2i_ddp, *ddp_line(small_files, drawn, *words))
    assert contents(drawn) == before


def test_sample_folder_of_an_edition_before_the_race_goes_on_with_cdf_alone(small_files, tmp_path, monkeypatch):
    """It does not record the draw; what is drawn greedily has none."""
    monkeypatch.chdir(tmp_path)
    for words in (["--draw", "cdf"], ["--draw", "cdf", "--temperature", 0.0]):
        run_here(sample_c2i_ddp, *ddp_line(small_files, "samples", *words))
    for folder in Path("samples").iterdir():
        if folder.is_dir():
            settings = json.loads((folder / "settings.json").read_text())
            assert settings.pop("draw") == (None if settings["temperature"] == 0 else "cdf")
            (folder / "settings.json").write_text(json.dumps(settings))
            (folder / "000003.png").unlink()
    before = contents(Path("samples"))
    with pytest.raises(ValueError, match=r"other settings \(draw: cdf, now race1\)"):
        run_here(sample_c2i_ddp, *ddp_line(small_files, "samples"))
    assert contents(Path("samples")) == before
    run_here(sample_c2i_ddp, *ddp_line(small_files, "samples", "--draw", "cdf"))
    assert json.loads(Path("samples", NAME, "settings.json").read_text())["draw"] == "cdf"
    run_here(sample_c2i_ddp, *ddp_line(small_files, "samples", "--temperature", 0.0))
    with pytest.raises(ValueError, match=r"other settings \(draw: cdf, now race1\)"):
        run_here(sample_c2i_ddp, *ddp_line(small_files, "samples"))


def test_sample_folder_and_weights_that_were_copied_go_on(small_files, drawn, tmp_path):
    shutil.copytree(drawn, tmp_path / "samples")
    for name, file in (("gpt.pt", small_files.gpt), ("vq.pt", small_files.vq)):
        (tmp_path / name).write_bytes(file.read_bytes())
    (tmp_path / "samples" / NAME / "000003.png").unlink()
    weights = ["--gpt-ckpt", tmp_path / "gpt.pt", "--vq-ckpt", tmp_path / "vq.pt"]
    run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path / "samples", *weights))
    after, before = contents(tmp_path / "samples"), contents(drawn)
    assert all(after[name] == content for name, content in before.items() if not name.endswith("settings.json"))


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(small_files, drawn, tmp_path):
    done = start(sample_c2i_ddp, ddp_line(small_files, "samples"), tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "samples") == contents(drawn)
    assert done.stdout.count("0 of 5 images are there") == 1 and done.stdout.count("wrote") == 1
    for name in ("000003.png", "000004.png"):
        (tmp_path / "samples" / NAME / name).unlink()
    done = start(sample_c2i_ddp, ddp_line(small_files, "samples", "--per-proc-batch-size", 32), tmp_path, processes=2)
    assert done.returncode == 0 and contents(tmp_path / "samples") == contents(drawn), done.stderr


@pytest.mark.parametrize("window, processes", [(0, 1), (8, 1), ("auto", 1), (8, 2)])
def test_windows_write_the_bytes_of_one_token_a_pass(window, processes, small_files, drawn, tmp_path):
    words = ddp_line(small_files, tmp_path / "samples", "--window", window)
    if processes == 1:
        shutil.copytree(drawn, tmp_path / "samples")  # a folder goes on with another window
        (tmp_path / "samples" / NAME / "000003.png").unlink()
        run_here(sample_c2i_ddp, *words)
    else:
        assert start(sample_c2i_ddp, words, tmp_path, processes).returncode == 0
    assert contents(tmp_path / "samples") == contents(drawn)


def test_drafts_of_another_gpt_write_the_same_bytes(small_files, drawn, tmp_path):
    save_checkpoint(tmp_path / "small.pt", {"model": randomize(build_gpt("GPT-XS", **SHAPE), seed=9).state_dict()})
    drafts = ["--window", 8, "--draft-gpt", tmp_path / "small.pt"]
    run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path / "samples", *drafts))
    assert contents(tmp_path / "samples") == contents(drawn)
    with pytest.raises(ValueError, match=r"the draft model has the layout .*parallel.*raster"):
        run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path / "samples", "--draft-gpt", small_files.par))


def test_windows_on_an_accelerator_are_a_setting_of_the_folder(small_files, drawn, tmp_path, monkeypatch):
    """Whose kernels round by the number of rows."""
    monkeypatch.setattr(many, "pick_device", lambda name: torch.device("cuda"))
    run_here(sample_c2i_ddp, *ddp_line(small_files, drawn, "--window", 0))  # the default there
    with pytest.raises(ValueError, match=r"other settings.*window"):
        run_here(sample_c2i_ddp, *ddp_line(small_files, drawn, "--window", 8))
    run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path, "--window", 8))
    assert json.loads((tmp_path / NAME / "settings.json").read_text())["window"] == 8


@pytest.mark.slow
def test_a_mistake_ends_every_process(small_files, drawn, tmp_path):
    done = start(sample_c2i_ddp, ddp_line(small_files, drawn, "--greedy"), tmp_path, processes=2)
    assert done.returncode == 1 and "other settings" in done.stderr


def test_the_batch_that_fits(small_files, drawn, tmp_path, capsys):
    """The images are the same, and the folder goes on with another number."""
    run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path, "--per-proc-batch-size", "auto"))
    assert contents(tmp_path) == contents(drawn)
    assert "--per-proc-batch-size auto: 5 images at once" in capsys.readouterr().out


@pytest.mark.slow
def test_a_decoder_in_bfloat16(small_files, drawn, tmp_path):
    """Its images are close, and it is a setting of the folder; float32 is what folders without a word of it have."""
    run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path, "--decode-precision", "bf16"))
    half, exact = (np.load(folder / f"{NAME}.npz")["arr_0"] for folder in (tmp_path, drawn))
    assert not np.array_equal(half, exact) and peak_signal_to_noise_ratio(half, exact) > 30
    with pytest.raises(ValueError, match=r"other settings \(decode_precision: bf16, now None\)"):
        run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path))

    record = drawn / NAME / "settings.json"
    settings = json.loads(record.read_text())
    assert settings.pop("decode_precision") is None
    for path in (tmp_path / NAME).glob("*.png"):
        path.write_bytes((drawn / NAME / path.name).read_bytes())
    (tmp_path / NAME / "settings.json").write_text(json.dumps(settings))  # of a run before there was a choice
    run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path))
    with pytest.raises(ValueError, match=r"other settings \(decode_precision: None, now bf16\)"):
        run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path, "--decode-precision", "bf16"))


# Writing beside drawing


def numbered(folder: Path):
    return lambda index: folder / f"{index}.png"


def batches_of(count: int, size: int = 2, begun: list | None = None):
    """`count` batches of small images; `begun` takes the number of each that is asked for."""
    for start in range(0, count * size, size):
        if begun is not None:
            begun.append(start // size)
        yield list(range(start, start + size)), np.full((size, 4, 4, 3), start, np.uint8)


def test_images_are_written_while_the_next_are_drawn(tmp_path, monkeypatch):
    """No more than two batches wait for a slow disk; all are written at the end."""
    disk, begun, write = threading.Event(), [], many.save_png
    monkeypatch.setattr(many, "save_png", lambda *args: disk.wait(120) and write(*args))

    def watched():
        for batch in batches_of(BATCHES_WAITING + 2, begun=begun):
            if begun[-1] == BATCHES_WAITING:  # so many are drawn and none is written
                assert not list(tmp_path.iterdir())
                threading.Timer(0.2, lambda: (stopped.append(len(begun)), disk.set())).start()
            yield batch

    stopped = []
    save_images(watched(), numbered(tmp_path), 8, progress=False)
    assert stopped == [BATCHES_WAITING + 1] and len(begun) == BATCHES_WAITING + 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i}.png" for i in range(2 * BATCHES_WAITING + 4)]


def test_a_failing_writer_ends_the_run(tmp_path, monkeypatch):
    write, begun = many.save_png, []

    def full(image, path):
        if path.name == "3.png":
            raise OSError(28, f"could not write {path} (No space left on device)")
        write(image, path)

    monkeypatch.setattr(many, "save_png", full)
    with pytest.raises(OSError, match=r"could not write .*3\.png"):
        save_images(batches_of(50, begun=begun), numbered(tmp_path), 100, progress=False)
    assert len(begun) <= 2 + BATCHES_WAITING + 1
    assert (tmp_path / "2.png").exists() and not (tmp_path / "3.png").exists()


def test_what_is_drawn_is_written_where_drawing_fails(tmp_path):
    def drawn():
        yield from batches_of(2)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        save_images(drawn(), numbered(tmp_path), 8, progress=False)
    assert len(list(tmp_path.iterdir())) == 4


# Flags

C2I = """
`--gpt-ckpt` str = None; `--gpt-type` str ∈ [c2i, t2i] = c2i; `--from-fsdp` switch = –; `--cls-token-num` int = 1;
`--precision` str ∈ [none, fp16, bf16] = bf16; `--compile` switch = off; `--vq-model` str ∈ [VQ-8, VQ-16] = VQ-16;
`--vq-ckpt` str = None; `--codebook-size` int = 16384; `--codebook-embed-dim` int = 8;
`--gpt-model` str ∈ [GPT-B, GPT-L, GPT-XL, GPT-XXL, GPT-XXXL, GPT-1B, GPT-3B, GPT-7B] = GPT-B;
`--image-size` int ∈ [256, 384, 512] = 384; `--downsample-size` int ∈ [8, 16] = 16; `--num-classes` int = 1000;
`--cfg-scale` float = 4.0; `--cfg-interval` float = -1; `--seed` int = 0; `--top-k` int = 2000; `--temperature` float = 1.0;
`--top-p` float = 1.0
"""
C2I_DDP = """
`--gpt-ckpt` str = None; `--gpt-type` str ∈ [c2i, t2i] = c2i; `--from-fsdp` switch = –; `--cls-token-num` int = 1;
`--precision` str ∈ [none, fp16, bf16] = bf16; `--compile` switch = on; `--vq-model` str ∈ [VQ-8, VQ-16] = VQ-16;
`--vq-ckpt` str = None; `--codebook-size` int = 16384; `--codebook-embed-dim` int = 8;
`--gpt-model` str ∈ [GPT-B, GPT-L, GPT-XL, GPT-XXL, GPT-XXXL, GPT-1B, GPT-3B, GPT-7B] = GPT-B;
`--image-size` int ∈ [256, 384, 512] = 384; `--image-size-eval` int ∈ [256, 384, 512] = 256;
`--downsample-size` int ∈ [8, 16] = 16; `--num-classes` int = 1000; `--cfg-scale` float = 1.5;
`--cfg-interval` float = -1; `--sample-dir` str = samples; `--per-proc-batch-size` int = 32;
`--num-fid-samples` int = 50000; `--global-seed` int = 0; `--top-k` int = 0; `--temperature` float = 1.0;
`--top-p` float = 1.0
"""
PAR = "`--spe-token-num` int = 3; `--ar-token-num` int = 4"


@pytest.mark.parametrize("script, text", [(sample_c2i, C2I), (sample_c2i_ddp, C2I_DDP)], ids=["c2i", "ddp"])
def test_published_flags(script, text):
    check_published_flags(script, f"{text}; {PAR}", without_default=("--spe-token-num", "--ar-token-num"))
    defaults = script.flags().parse_args([])
    assert (defaults.spe_token_num, defaults.ar_token_num) == (None, None)


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_that_argparse_refuses(script, capsys):
    for words in (["--image-size", "0"], ["--gpt-model", "GPT-S"], ["--precision", "int8"], ["--top", "5"]):
        with pytest.raises(SystemExit) as ended:
            script.flags().parse_args(words)
        assert ended.value.code == 2 and words[0] in capsys.readouterr().err
    own = ["--batch-size", "0"] if script is sample_c2i else ["--per-proc-batch-size", "most"]
    with pytest.raises(SystemExit):
        script.flags().parse_args(own)


# A user's mistakes


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def broken(small_files, tmp_path) -> Path:
    """A folder of files that cannot be read, some of which would leave `ran` there."""
    content = small_files.gpt.read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.pt").touch()
    torch.save({"model": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol=2))
    return tmp_path


MISTAKES = {
    "no GPT": (["--gpt-ckpt", "gone.pt"], r"no file gone\.pt"),
    "no tokenizer": (["--vq-ckpt", "nowhere/gone.pt"], r"no file nowhere/gone\.pt"),
    "half a file": (["--gpt-ckpt", "half.pt"], r"half\.pt is damaged or not a checkpoint"),
    "half a tokenizer": (["--vq-ckpt", "half.pt"], r"half\.pt is damaged or not a checkpoint"),
    "an empty file": (["--gpt-ckpt", "empty.pt"], r"empty\.pt is empty"),
    "code": (["--gpt-ckpt", "evil.pt"], r"refused: evil\.pt asks to run"),
    "code for a tokenizer": (["--vq-ckpt", "evil.pkl"], r"refused: evil\.pkl asks to run"),
    "another GPT": (["--gpt-model", "GPT-L"], r"--gpt-model GPT-L \(file: GPT-XS\).*Use: --gpt-model GPT-XS"),
    "another tokenizer": (["--vq-model", "VQ-16"], r"does not fit the flags --vq-model VQ-16; it holds --vq-model VQ-4"),
    "another codebook": (["--codebook-size", 128], r"it holds --codebook-size 64"),
    "other classes": (["--num-classes", 11], r"--num-classes 11 \(file: 10\)"),
    "another downsampling": (["--downsample-size", 8], r"--downsample-size 4"),
    "negative top-p": (["--top-p", -0.5], r"--top-p .*-0\.5"),
    "negative temperature": (["--temperature", -1], r"--temperature must be 0 or more, got -1\.0"),
    "NaN": (["--cfg-interval", "nan"], r"--cfg-interval .*got nan"),
    "size": (["--image-size", 34], r"--image-size 34 is not a multiple of --downsample-size 4; try 32 or 36"),
    "another size": (["--image-size", 64], r"--image-size 64 \(file: 32\).*Use: .*--image-size 32"),
    "captions": (["--gpt-type", "t2i"], r"sample_t2i"),
    "condition tokens": (["--cls-token-num", 120], r"--cls-token-num 120"),
    "raster for groups": (["--gpt-ckpt", "PAR", "--ar-token-num", 1], r"--ar-token-num 1 \(file: 4\).*Use: --gpt-model GPT-XS.*--ar-token-num 4 --spe-token-num 3"),
    "groups for raster": (["--ar-token-num", 4], r"--ar-token-num 4 \(file: 1\)"),
    "raster for neighbours": (["--layout", "neighbours"], r"--layout neighbours \(file: raster\).*have a second exit.*Use: "),
    "neighbours for raster": (["--gpt-ckpt", "NAR", "--layout", "raster"], r"--layout raster \(file: neighbours\).*Use: .*--layout neighbours"),
    "groups and special tokens": (["--ar-token-num", 4, "--spe-token-num", 2], r"--ar-token-num 4 goes with --spe-token-num 3"),
    "device": (["--device", "cuda"], r"no CUDA device is available"),
}  # fmt: skip


def fails(script, words, capsys, monkeypatch) -> str:
    """The one line that the script ends with."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        run_script(script.main, script.flags())
    captured = capsys.readouterr()
    assert ended.value.code == 1
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and len(captured.err) < 600
    return captured.err


@pytest.mark.parametrize(
    "number, words, message", [(i, *mistake) for i, mistake in enumerate(MISTAKES.values())], ids=MISTAKES
)
def test_mistakes(number, words, message, small_files, broken, capsys, monkeypatch):
    """By one of the scripts, in turn: what both refuse is in one place."""
    script = SCRIPTS[number % 2]
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(broken)
    before = contents(broken)
    words = [{"PAR": small_files.par, "NAR": small_files.nar}.get(word, word) for word in words]
    error = fails(script, line(small_files, *words), capsys, monkeypatch)
    assert re.search(message, error), error
    assert contents(broken) == before, "nothing was run, nothing was written"


@pytest.mark.parametrize("script, flag", [(sample_c2i, "--gpt-ckpt"), (sample_c2i_ddp, "--vq-ckpt")])
def test_missing_checkpoint_flags(script, flag, small_files, capsys, monkeypatch):
    words = line(small_files)
    at = words.index(flag)
    assert f"{flag} is needed" in fails(script, words[:at] + words[at + 2 :], capsys, monkeypatch)


def test_out_of_memory(small_files, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB")

    monkeypatch.setattr(ImagePipeline, "draw", full)
    with pytest.raises(ValueError, match=r"out of memory with 2 images at once: .*--per-proc-batch-size auto"):
        run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path, "--no-npz"))


@pytest.mark.parametrize("label", [10, -1])
def test_labels_out_of_range(label, small_files, tmp_path, capsys, monkeypatch):
    message = f"class {label} is out of range: the model has classes 0 to 9"
    words = line(small_files, "--labels", 1, label, "--output", tmp_path / "grid.png")
    error = fails(sample_c2i, words, capsys, monkeypatch)
    assert message in error and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_mistake_as_a_user_sees_it(small_files, tmp_path):
    done = start(sample_c2i, line(small_files, "--gpt-ckpt", small_files.par, "--ar-token-num", 1), tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("machine, bf16, amx, expected", [
    ("x86_64", True, False, torch.bfloat16), ("x86_64", False, True, torch.bfloat16), ("aarch64", False, False, torch.bfloat16),
    ("x86_64", False, False, torch.float32),
])  # fmt: skip
def test_bf16_where_the_processor_has_it(machine, bf16, amx, expected, monkeypatch, capsys):
    from autoregressive.sample.common import weights_dtype

    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert weights_dtype("bf16", torch.device("cpu")) == expected
    assert ("no instructions for it" in capsys.readouterr().out) == (expected == torch.float32)
    assert weights_dtype("bf16", torch.device("cuda")) == torch.bfloat16
    assert weights_dtype("none", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("compiler, images, compiled", [
    (True, None, True), (True, 4999, False), (True, 5000, True), (False, None, False), (False, 50000, False),
])  # fmt: skip
def test_when_steps_are_compiled_on_a_cpu(compiler, images, compiled, monkeypatch, capsys):
    from autoregressive.sample.common import compiles

    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/g++" if compiler else None)
    assert compiles(torch.device("cpu"), images) == compiled
    assert ("there is no C++ compiler" in capsys.readouterr().out) == (not compiler)
    assert not compiles(torch.device("mps")) and compiles(torch.device("cuda"), 3) == compiler
