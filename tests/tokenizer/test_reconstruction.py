"""Reconstruction scripts: the figures by hand, what is written, runs that go on, several processes, a user's mistakes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.augmentation import center_view
from tests.helpers import randomize
from tests.training import check_published_flags, live, make_images, run_here
from tokenizer import reconstruction
from tokenizer.codecs import VQCodec
from tokenizer.load import load_tokenizer
from tokenizer.reconstruction import batch_figures, round_trip
from tokenizer.tokenizer_image import lpips, reconstruction_vq_ddp
from tokenizer.tokenizer_image.vq_model import VQ_models
from tokenizer.validation import val_ddp
from utils.images import to_uint8

pytestmark = pytest.mark.slow  # through whole scripts and servers

NAME = "VQ-4-imagenet-size-32-size-32-codebook-size-64-dim-8-seed-0"


def line(small_files, images, folder, *more) -> list:
    """The flags that fit the small tokenizer. Later ones win."""
    words = ["--vq-ckpt", small_files.vq, "--vq-model", "VQ-4", "--codebook-size", 64, "--device", "cpu"]
    words += ["--data-path", images, "--sample-dir", folder, "--image-size", 32, "--image-size-eval", 32]
    return [*words, "--per-proc-batch-size", 3, "--num-workers", 0, "--no-lpips", *more]


def val_line(images, folder, *more) -> list:
    words = ["--data-path", images, "--sample-dir", folder, "--image-size", 32, "--per-proc-batch-size", 3]
    return [*words, "--num-workers", 0, "--device", "cpu", *more]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the records of figures, whose archives have times in them."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and "figures" not in p.parts
    }


def results(folder: Path, name: str = NAME) -> dict:
    return json.loads((folder / f"{name}_results.json").read_text())


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two classes of four images. Read-only."""
    return make_images(tmp_path_factory.mktemp("images") / "val")


@pytest.fixture(scope="module")
def done(small_files, images, tmp_path_factory) -> Path:
    """Eight images by the small tokenizer in this process. Read-only."""
    folder = tmp_path_factory.mktemp("done")
    run_here(reconstruction_vq_ddp, *line(small_files, images, folder))
    return folder


def pixels_of(images: Path, size: int = 32) -> torch.Tensor:
    """The data set's centre crops in its order."""
    paths = sorted(images.rglob("*.png"))
    return torch.stack([center_view(Image.open(path).convert("RGB"), size) for path in paths])


# Figures


def ssim_by_hand(a: np.ndarray, b: np.ndarray, span: int = 255) -> float:
    """Equation 13 of Wang et al. 2004 in 7x7 windows that lie within the image, with unbiased variances."""
    values = []
    for channel in range(3):
        x, y = a[..., channel].astype(float), b[..., channel].astype(float)
        for top in range(x.shape[0] - 6):
            for left in range(x.shape[1] - 6):
                p, q = (image[top : top + 7, left : left + 7].ravel() for image in (x, y))
                (vp, cov), (_, vq) = np.cov(p, q)
                c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
                numerator = (2 * p.mean() * q.mean() + c1) * (2 * cov + c2)
                values.append(numerator / ((p.mean() ** 2 + q.mean() ** 2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def random_pair(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, (12, 14, 3), np.uint8)
    return a, np.clip(a + rng.integers(-40, 41, a.shape), 0, 255).astype(np.uint8)


def test_ssim_and_psnr_by_hand():
    pairs = [random_pair(seed) for seed in range(3)]
    a, b = (np.stack(part) for part in zip(*pairs))
    rng = np.random.default_rng(0)
    exact = ((a + rng.uniform(-0.5, 0.5, a.shape)) / 255).astype(np.float32)
    figures = batch_figures(reconstruction.RoundTrip(a, b, None, exact), None, torch.device("cpu"))
    assert set(figures) == {"psnr", "ssim", "psnr_published", "ssim_published"}
    for i, (x, y) in enumerate(pairs):
        error = sum((int(p) - int(q)) ** 2 for p, q in zip(x.ravel(), y.ravel())) / x.size
        assert figures["psnr"][i] == pytest.approx(20 * np.log10(255 / error**0.5))
        assert figures["ssim"][i] == pytest.approx(ssim_by_hand(x, y), abs=1e-9)
        before = 255 * exact[i].astype(float)
        assert figures["psnr_published"][i] == pytest.approx(10 * np.log10(255**2 / np.mean((before - y) ** 2)))
        assert figures["ssim_published"][i] == pytest.approx(ssim_by_hand(before, y, span=510), abs=1e-9)
        assert figures["ssim_published"][i] > figures["ssim"][i]


def test_results(small_files, images, done):
    """Against the model called by hand, image by image."""
    found = results(done)
    tokenizer = load_tokenizer(small_files.vq)
    pixels = pixels_of(images)
    with torch.inference_mode():
        codes = tokenizer.to_codes(pixels)
        recons = to_uint8(tokenizer.to_pixels(codes))
    codes = codes.flatten()
    originals = to_uint8(pixels)
    written = np.stack([np.asarray(Image.open(done / NAME / f"{i:06d}.png")) for i in range(8)])
    assert np.abs(written.astype(int) - recons).max() <= 1  # other batches round otherwise
    psnr = [10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)) for a, b in zip(originals, written)]
    assert found["psnr_db"] == pytest.approx(np.mean(psnr), rel=1e-12)
    assert found["ssim"] == pytest.approx(np.mean([ssim_by_hand(a, b) for a, b in zip(originals, written)]), abs=1e-9)
    assert found["lpips"] is None and found["images_without_a_difference"] == 0
    times = np.bincount(codes, minlength=64)
    p = times[times > 0] / len(codes)
    assert found["codebook_entries_used"] == (times > 0).sum() and found["codebook_size"] == 64
    assert found["codebook_usage"] == (times > 0).mean()
    assert found["codebook_perplexity"] == pytest.approx(2 ** -(p * np.log2(p)).sum())
    assert found["images"] == 8 and found["skipped"] == []
    assert set(found["versions"]) == {"torch", "numpy", "scikit-image"}
    text = (done / f"{NAME}_results.txt").read_text()
    assert text.startswith(
        f"PSNR: {found['psnr_db']:.4f} dB, SSIM: {found['ssim']:.4f}, LPIPS: none (8 images of 32x32)\n"
    )
    assert f"codebook: {found['codebook_entries_used']} of 64 entries used" in text


def test_npz(done):
    with np.load(done / f"{NAME}.npz") as data:
        arrays, labels = data["arr_0"], data["arr_1"]
    assert (arrays.dtype, arrays.shape) == (np.uint8, (8, 32, 32, 3))
    assert labels.tolist() == [0] * 4 + [1] * 4
    for i, array in enumerate(arrays):
        assert np.array_equal(np.asarray(Image.open(done / NAME / f"{i:06d}.png")), array)
    assert {p.name for p in done.iterdir()} == {NAME, f"{NAME}.npz", f"{NAME}_results.txt", f"{NAME}_results.json"}


def test_other_evaluation_size(small_files, images, tmp_path):
    """Both sides are resized in the same way, and everything is written at that size."""
    run_here(reconstruction_vq_ddp, *line(small_files, images, tmp_path, "--image-size-eval", 24))
    name = "VQ-4-imagenet-size-32-size-24-codebook-size-64-dim-8-seed-0"
    written = np.load(tmp_path / f"{name}.npz")["arr_0"]
    assert written.shape == (8, 24, 24, 3)
    pixels = pixels_of(images)[:3]
    trip = round_trip(VQCodec(load_tokenizer(small_files.vq)), pixels, [0, 1, 2], size=24)
    assert np.array_equal(trip.recons, written[:3])
    smaller = torch.nn.functional.interpolate(pixels, size=(24, 24), mode="bicubic")
    assert np.array_equal(trip.originals, to_uint8(smaller))
    record = np.load(tmp_path / name / "figures" / "000000-000003.npz")
    assert record["ssim"][0] == pytest.approx(ssim_by_hand(to_uint8(smaller)[0], written[0]), abs=1e-9)


def test_the_reference(images, tmp_path):
    run_here(val_ddp, *val_line(images, tmp_path))
    name = "val_imagenet"
    arrays = np.load(tmp_path / f"{name}.npz")["arr_0"]
    assert np.array_equal(arrays, to_uint8(pixels_of(images)))
    found = results(tmp_path, name)
    assert found["images"] == 8 and not {"psnr_db", "ssim", "codebook_usage"} & set(found)
    assert (tmp_path / f"{name}_results.txt").read_text() == "reference: 8 images of 32x32, no model\n"


def test_images_that_come_back_as_they_were(images, tmp_path):
    """They have no PSNR: it is the others' mean."""
    files = reconstruction.ReconstructionFolder(tmp_path, 3, 2, reconstruction.FIGURES)
    a, b = random_pair()
    for batch, recons in ((range(0, 2), [a, b]), (range(2, 3), [a])):
        originals = np.stack([a] * len(batch))
        trip = reconstruction.RoundTrip(originals, np.stack(recons), None, originals / 255)
        files.write(batch, list(batch), trip, batch_figures(trip, None, torch.device("cpu")))
    indices, figures = files.summary(None)
    assert indices == [0, 1, 2]
    assert figures["images_without_a_difference"] == 2
    assert figures["psnr_db"] == pytest.approx(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))
    assert figures["ssim"] == pytest.approx((2 + ssim_by_hand(a, b)) / 3)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_reconstructions_that_are_not_finite_are_told(small_files, images, part):
    tokenizer = load_tokenizer(small_files.vq)
    with torch.inference_mode():
        getattr(tokenizer, part).conv_out.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match="the reconstructions of images 3 to 4 are not finite: are the weights whole"):
        round_trip(VQCodec(tokenizer), pixels_of(images)[:2], [3, 4])


# LPIPS


@pytest.fixture
def random_lpips(monkeypatch):
    """LPIPS with random weights in the place of the pretrained ones."""
    real = lpips.LPIPS

    def made():
        torch.manual_seed(0)
        model = real(pretrained=False)
        for i in range(5):
            model.get_submodule(f"lin{i}").model[1].weight.abs_()
        return model

    monkeypatch.setattr(lpips, "find_weights", lambda: (Path("vgg"), Path("lin")))
    monkeypatch.setattr(lpips, "LPIPS", made)
    return made


def test_lpips_is_added_where_its_weights_appear(
    small_files, images, done, tmp_path, random_lpips, monkeypatch, capsys
):
    monkeypatch.setattr(lpips, "find_weights", lambda: (_ for _ in ()).throw(FileNotFoundError("vgg")))
    run_here(reconstruction_vq_ddp, *line(small_files, images, tmp_path, "--lpips"))
    assert "LPIPS is left out: it needs vgg16-397923af.pth" in capsys.readouterr().out
    assert results(tmp_path)["lpips"] is None and "vgg16-397923af.pth" in results(tmp_path)["lpips_note"]

    monkeypatch.setattr(lpips, "find_weights", lambda: (Path("vgg"), Path("lin")))
    run_here(reconstruction_vq_ddp, *line(small_files, images, tmp_path, "--lpips"))
    found = results(tmp_path)
    a, b = pixels_of(images), torch.from_numpy(np.load(tmp_path / f"{NAME}.npz")["arr_0"]).permute(0, 3, 1, 2)
    expected = random_lpips()(a, b / 127.5 - 1).mean().item()
    assert found["lpips"] == pytest.approx(expected, rel=1e-4) and "lpips_note" not in found
    assert found["psnr_db"] == results(done)["psnr_db"]
    run_here(reconstruction_vq_ddp, *line(small_files, images, tmp_path, "--lpips"))
    assert "0 of 8 images to do" in capsys.readouterr().out and results(tmp_path) == found


def test_images_too_small_for_lpips(small_files, images, tmp_path, random_lpips, capsys):
    run_here(reconstruction_vq_ddp, *line(small_files, images, tmp_path, "--lpips", "--image-size-eval", 8))
    assert "LPIPS is left out: it needs images of 16 pixels a side, these have 8" in capsys.readouterr().out


# Runs that go on


@pytest.mark.parametrize("damage", ["no image", "half an image", "no record", "half a record"])
def test_what_is_missing_is_done_again(small_files, images, done, tmp_path, damage, capsys):
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    image, record = tmp_path / NAME / "000004.png", tmp_path / NAME / "figures" / "000003-000006.npz"
    if damage == "no image":
        image.unlink()
    elif damage == "half an image":
        image.write_bytes(image.read_bytes()[:-20])
    elif damage == "no record":
        record.unlink()
    else:
        record.write_bytes(record.read_bytes()[:200])
    untouched = (tmp_path / NAME / "000000.png").stat().st_mtime_ns
    capsys.readouterr()
    run_here(reconstruction_vq_ddp, *line(small_files, images, tmp_path))
    assert "3 of 8 images to do" in capsys.readouterr().out
    assert contents(tmp_path) == contents(done)
    assert (tmp_path / NAME / "000000.png").stat().st_mtime_ns == untouched


def test_another_batch_size_leaves_no_image_counted_twice(small_files, images, done, tmp_path):
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    run_here(reconstruction_vq_ddp, *line(small_files, images, tmp_path, "--per-proc-batch-size", 5))
    assert len(list((tmp_path / NAME / "figures").iterdir())) == 2
    assert results(tmp_path)["images"] == 8


def test_killed_runs_and_two_processes_write_the_same(small_files, images, done, tmp_path):
    """Two processes; two killed with the first figures there, then one that goes on; two with a mistake."""
    module = "tokenizer.tokenizer_image.reconstruction_vq_ddp"

    def life(name, *more, **kwargs):
        return {"module": module, "args": list(map(str, line(small_files, images, tmp_path / name, *more))), **kwargs}

    one = ["--per-proc-batch-size", 1]
    run_here(reconstruction_vq_ddp, *line(small_files, images, tmp_path / "whole", *one))
    printed = live(
        life("two", world=2),
        life("killed", *one, world=2, kill_at=str(tmp_path / "killed" / NAME / "figures" / "*.npz")),
        life("killed", *one),
        life("two", "--precision", "bf16", world=2, fails=True),
    )
    lives = [row for row in printed.splitlines() if row.startswith("life")]
    assert lives == ["life: ended", "life: killed", "life: ended", "life: ended"]
    assert contents(tmp_path / "two") == contents(done)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert "precision: none, now bf16" in printed


# What cannot be read


def test_an_unreadable_image_is_left_out_and_named(small_files, tmp_path, capsys):
    folder = make_images(tmp_path / "val")
    (folder / "class0" / "2.png").write_bytes(b"no image")
    run_here(reconstruction_vq_ddp, *line(small_files, folder, tmp_path / "out"))
    found = results(tmp_path / "out")
    assert found["images"] == 7
    assert found["skipped"] == [{"index": 2, "path": str(folder / "class0" / "2.png")}]
    assert "1 unreadable images left out:\n  000002" in (tmp_path / "out" / f"{NAME}_results.txt").read_text()
    with np.load(tmp_path / "out" / f"{NAME}.npz") as data:
        assert len(data["arr_0"]) == 7 and data["arr_1"].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert not (tmp_path / "out" / NAME / "000002.png").exists()

    make_images(tmp_path / "again")
    (folder / "class0" / "2.png").write_bytes((tmp_path / "again" / "class0" / "2.png").read_bytes())
    capsys.readouterr()
    run_here(reconstruction_vq_ddp, *line(small_files, folder, tmp_path / "out"))
    assert "3 of 8 images to do" in capsys.readouterr().out
    assert results(tmp_path / "out")["skipped"] == [] and results(tmp_path / "out")["images"] == 8


def test_an_image_lost_between_runs_leaves_no_picture(small_files, tmp_path):
    """Batch by batch, what could be read before and cannot now goes out of the figures and out of the folder."""
    folder = make_images(tmp_path / "val")
    words = line(small_files, folder, tmp_path / "out")
    run_here(reconstruction_vq_ddp, *words)
    for name in ("0.png", "1.png", "2.png"):
        (folder / "class0" / name).write_bytes(b"no image")
    (tmp_path / "out" / NAME / "000001.png").unlink()
    run_here(reconstruction_vq_ddp, *words)
    found = results(tmp_path / "out")
    assert [item["index"] for item in found["skipped"]] == [0, 1, 2]
    assert sorted(p.name for p in (tmp_path / "out" / NAME).glob("*.png")) == [f"{i:06d}.png" for i in range(3, 8)]


def test_nothing_readable(small_files, tmp_path):
    folder = make_images(tmp_path / "val", per_class=2)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the 4 images in .*val could be read"):
        run_here(reconstruction_vq_ddp, *line(small_files, folder, tmp_path / "out"))


# Which weights


def test_reconstruction_is_by_the_averaged_weights_where_the_file_has_them(small_files, images, tmp_path, capsys):
    model = torch.load(small_files.vq, weights_only=True)["model"]
    averaged = randomize(VQ_models["VQ-4"](codebook_size=64), seed=4).state_dict()
    files = {"ema": {"model": model, "ema": averaged}, "raw": {"model": model}}
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pt")
    written = {}
    for name, file, more, which in (
        ("averaged", "ema.pt", [], "averaged"),
        ("asked for", "ema.pt", ["--no-use-ema"], "raw"),
        ("raw", "raw.pt", [], "raw"),
    ):
        run_here(
            reconstruction_vq_ddp, *line(small_files, images, tmp_path / name, "--vq-ckpt", tmp_path / file, *more)
        )
        assert f"{file}: its {which} weights" in capsys.readouterr().out
        written[name] = np.load(tmp_path / name / f"{NAME}.npz")["arr_0"]
        assert results(tmp_path / name)["settings"]["use_ema"] == (which == "averaged")
    tokenizer = load_tokenizer(tmp_path / "ema.pt", use_ema=True)
    expected = round_trip(VQCodec(tokenizer), pixels_of(images)[:3], [0, 1, 2]).recons
    assert np.array_equal(written["averaged"][:3], expected)
    assert not np.array_equal(written["averaged"], written["raw"])
    assert np.array_equal(written["raw"], written["asked for"])
    with pytest.raises(ValueError, match=r"other settings \(use_ema: True, now False\)"):
        run_here(
            reconstruction_vq_ddp,
            *line(small_files, images, tmp_path / "averaged", "--vq-ckpt", tmp_path / "ema.pt", "--no-use-ema"),
        )


# A user's mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "bf16"], r"holds images drawn with other settings \(precision: none, now bf16\)"),
        (["--vq-ckpt", "copy/vq.pt"], r"holds images drawn with other settings \(weights: "),
        (["--data-path", "other"], r"holds images drawn with other settings \(data: "),
        (["--image-size", 30], r"--image-size 30 is not a multiple of 4"),
        (["--image-size-eval", 6], r"SSIM needs images of 7 pixels a side, got 6"),
        (["--vq-ckpt", "gone.pt"], r"no file gone\.pt"),
        (["--codebook-size", 128], r"it holds --codebook-size 64"),
        (["--data-path", "nowhere"], r"the image folder nowhere does not exist"),
    ],
)
def test_mistakes(small_files, images, done, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("copy").mkdir()
    other = torch.load(small_files.vq, weights_only=False)
    other["model"]["quantize.embedding.weight"] += 1
    torch.save(other, "copy/vq.pt")
    make_images(Path("other"))
    with next(Path("other").rglob("*.png")).open("ab") as f:
        f.write(b"longer")
    before = contents(done)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_here(reconstruction_vq_ddp, *line(small_files, images, done, *words))
    assert contents(done) == before


def test_reconstructions_weights_and_data_that_were_copied_go_on(small_files, images, done, tmp_path, capsys):
    shutil.copytree(done, tmp_path / "samples")
    shutil.copytree(images, tmp_path / "data")
    weights = tmp_path / "vq.pt"
    weights.write_bytes(small_files.vq.read_bytes())
    words = line(small_files, tmp_path / "data", tmp_path / "samples", "--vq-ckpt", weights)
    run_here(reconstruction_vq_ddp, *words, "--num-workers", 1)
    assert "0 of 8 images to do" in capsys.readouterr().out


def test_half_precision(small_files, images, tmp_path, done):
    run_here(reconstruction_vq_ddp, *line(small_files, images, tmp_path, "--precision", "bf16", "--no-npz"))
    found = results(tmp_path)
    assert found["settings"]["precision"] == "bf16" and not (tmp_path / f"{NAME}.npz").exists()
    assert found["psnr_db"] != results(done)["psnr_db"]
    assert found["psnr_db"] == pytest.approx(results(done)["psnr_db"], abs=1.0)


VQ = """
`--data-path` str = required; `--dataset` str ∈ [imagenet, coco] = imagenet; `--vq-model` str ∈ [VQ-8, VQ-16] = VQ-16;
`--vq-ckpt` str = None; `--codebook-size` int = 16384; `--codebook-embed-dim` int = 8; `--image-size` int ∈ [256, 384, 512] = 256;
`--image-size-eval` int ∈ [256, 384, 512] = 256; `--sample-dir` str = reconstructions; `--per-proc-batch-size` int = 32;
`--global-seed` int = 0; `--num-workers` int = 4
"""
VAL = """
`--data-path` str = required; `--dataset` str ∈ [imagenet, coco] = imagenet; `--image-size` int ∈ [256, 512] = 256;
`--sample-dir` str = reconstructions; `--per-proc-batch-size` int = 32; `--global-seed` int = 0; `--num-workers` int = 4
"""


@pytest.mark.parametrize(("script", "text"), [(reconstruction_vq_ddp, VQ), (val_ddp, VAL)], ids=["vq", "val"])
def test_published_flags(script, text):
    check_published_flags(script, text)


def test_settings_are_plain_values(done):
    """What settings.json gives back is what is compared with."""
    settings = results(done)["settings"]
    assert settings == json.loads((done / NAME / "settings.json").read_text())
    assert set(settings) == {
        "background", "data", "dataset", "exif", "image_size", "image_size_eval",
        "precision", "use_ema", "vq_model", "weights",
    }  # fmt: skip


def test_reference_of_turned_images_is_upright_or_as_published(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 3
    halves = np.zeros((32, 32, 3), np.uint8)
    halves[:16] = 255
    (tmp_path / "data" / "a").mkdir(parents=True)
    Image.fromarray(halves).save(tmp_path / "data" / "a" / "1.png", exif=exif)

    def made(name: str, *words: str) -> np.ndarray:
        run_here(val_ddp, *val_line(tmp_path / "data", tmp_path / name, *words))
        (file,) = (tmp_path / name).glob("*/000000.png")
        return np.asarray(Image.open(file))

    assert np.array_equal(made("usual"), halves[::-1])
    assert np.array_equal(made("published", "--no-exif", "--background", "none"), halves)
    for name, words in (("usual", ["--no-exif"]), ("published", [])):
        with pytest.raises(ValueError, match=r"exif: (True, now False|False, now True)"):
            made(name, *words)
    (record,) = (tmp_path / "published").glob("*/settings.json")
    settings = json.loads(record.read_text())
    record.write_text(json.dumps({key: settings[key] for key in settings.keys() - {"exif", "background"}}))
    record.with_name("000000.png").unlink()
    assert np.array_equal(made("published"), halves)  # begun by the first edition
    assert "images are read as published, as it was begun" in capsys.readouterr().out
