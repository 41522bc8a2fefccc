"""The evaluator as its users run it: the recorded figures, every kind of input, several processes, mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluations.c2i import evaluator, figures
from evaluations.image_sets import open_images, save_statistics
from tests.helpers import GOLDEN
from tests.training import live, run_here

pytestmark = pytest.mark.slow  # through whole scripts and servers

RECORDED = GOLDEN / "evaluator"
GRAPH = RECORDED / "standin_graph.pb"
EXPECTED = json.loads((RECORDED / "expected.json").read_text())
FIVE = ("inception_score", "fid", "sfid", "precision", "recall")


@pytest.fixture
def batches(tmp_path) -> tuple[Path, Path]:
    """The recorded run's reference and samples."""
    for name in ("reference", "sample"):
        (tmp_path / f"{name}.npz").write_bytes((RECORDED / f"{name}_batch.npz").read_bytes())
    return tmp_path / "reference.npz", tmp_path / "sample.npz"


def images_of(path: Path) -> np.ndarray:
    with np.load(path) as archive:
        return archive["arr_0"]


def save_folder(images: np.ndarray, folder: Path) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:06d}.png")
    return folder


def evaluate(*words, graph: Path = GRAPH) -> None:
    run_here(evaluator, *words, "--graph", graph, "--device", "cpu")


def report_of(samples: Path) -> dict:
    return json.loads(samples.with_suffix(".json").read_text())


def assert_recorded(report: dict) -> None:
    for name in ("fid", "sfid", "inception_score"):
        assert report[name] == pytest.approx(EXPECTED[name], rel=1e-3), name
    for name in ("precision", "recall"):
        assert report[name] == pytest.approx(EXPECTED[name], abs=0.01), name


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_the_recorded_figures(batches, backend, capsys):
    reference, samples = batches
    evaluate(reference, samples, "--backend", backend, "--batch-size", "33")
    report = report_of(samples)
    assert_recorded(report)
    printed = capsys.readouterr().out
    lines = samples.with_suffix(".txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in lines] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    assert float(lines[1].split(": ")[1]) == report["fid"]
    assert all(line in printed for line in lines)
    made = report["protocol"]
    assert (made["backend"], made["batch_size"], made["processes"]) == (backend, 33, 1)
    assert made["reference"]["count"], made["samples"]["size"] == (160, [16, 16])
    assert len(made["graph"]["sha256"]) == 64
    assert made["samples"]["settings"] is None
    assert {"python", "numpy", "torch"} <= set(made["versions"])
    assert ("tensorflow" in made["versions"]) == (backend == "tensorflow")
    for told in ("140 samples; published", "no recorded statistics", "the samples are 16x16"):
        assert sum(told in warning for warning in report["warnings"]) == 1
        assert told in printed


def test_exact_distances(batches):
    """What the recorded figures would be without float16: reference points at the rims of balls are the ones that move."""
    reference, samples = batches
    evaluate(reference, samples, "--exact-distances")
    report = report_of(samples)
    assert (report["precision"], report["recall"]) == (123 / 140, 103 / 160)
    assert report["protocol"]["distances"] == "exact"


def test_folders_of_images(batches, tmp_path):
    """The same pixels as PNG files; reports go beside the folder, and know what its images were drawn with."""
    reference, samples = (save_folder(images_of(path), path.with_suffix("")) for path in batches)
    (samples / "settings.json").write_text('{"cfg_scale": 2.0}')
    evaluate(reference, f"{samples}/", "--batch-size", "50")
    report = json.loads((tmp_path / "sample.json").read_text())
    assert_recorded(report)
    assert report["protocol"]["samples"]["settings"] == {"cfg_scale": 2.0}


def test_recorded_statistics_take_the_place_of_images(batches, tmp_path, capsys):
    reference, samples = batches
    evaluate(reference, samples, "--save-statistics", tmp_path / "statistics.npz", "--output", tmp_path / "first")
    evaluate(tmp_path / "statistics.npz", samples, "--output", tmp_path / "second.npz")
    recorded = open_images(tmp_path / "statistics.npz")
    made = {**recorded.made, "graph": "0123"}
    save_statistics(tmp_path / "other.npz", recorded.statistics, recorded.features, made)
    with pytest.raises(ValueError, match=r"other\.npz was made with graph 0123, this evaluation has [0-9a-f]{64}"):
        evaluate(tmp_path / "other.npz", samples)
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second"))
    assert [first[name] for name in FIVE] == [second[name] for name in FIVE]

    # As ADM's file: statistics of a larger set beside some of its images, which serve precision and recall alone.
    with np.load(tmp_path / "statistics.npz") as archive:
        arrays = {name: archive[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    arrays["mu"] = arrays["mu"] + 0.1
    np.savez(tmp_path / "adm.npz", arr_0=images_of(reference), **arrays)
    evaluate(tmp_path / "adm.npz", samples, "--output", tmp_path / "third")
    third = json.loads((tmp_path / "third.json").read_text())
    assert third["fid"] > first["fid"] + 1
    assert [third[name] for name in ("inception_score", "sfid", "precision", "recall")] == [
        first[name] for name in ("inception_score", "sfid", "precision", "recall")
    ]
    assert third["protocol"]["reference"]["kind"] == "statistics"

    np.savez(tmp_path / "bare.npz", **arrays)
    capsys.readouterr()
    evaluate(tmp_path / "bare.npz", samples, "--output", tmp_path / "fourth")
    fourth = json.loads((tmp_path / "fourth.json").read_text())
    assert (fourth["fid"], fourth["precision"], fourth["recall"]) == (third["fid"], None, None)
    assert "Precision" not in (tmp_path / "fourth.txt").read_text()
    assert "precision and recall are left out" in capsys.readouterr().out


def test_kid_and_no_precision(batches):
    reference, samples = batches
    evaluate(reference, samples, "--kid", "--no-precision-recall")
    report = report_of(samples)
    assert "precision" not in report
    assert np.isfinite(report["kid"])
    assert "KID: " in samples.with_suffix(".txt").read_text()


def test_strict(batches, tmp_path):
    reference, samples = batches
    with pytest.raises(ValueError, match=r"--strict: \(1\) 140 samples.*\(3\)"):
        evaluate(reference, samples, "--strict")
    assert not samples.with_suffix(".txt").exists()


@pytest.mark.parametrize("place", ["a file/new/score", "a folder/score", "a folder/figures"])
def test_places_where_no_report_can_be(batches, tmp_path, place):
    """Before the graph is looked for, which is missing here."""
    (tmp_path / "a file").write_text("something")
    for name in ("score.txt", "figures.json"):
        (tmp_path / "a folder" / name).mkdir(parents=True)
    with pytest.raises(OSError, match=rf"a file is no folder|is a folder; the reports .*/{place}\.txt.*--output"):
        evaluate(*batches, "--output", tmp_path / place, graph=tmp_path / "gone.pb")


def test_strict_about_what_only_the_pixels_show(batches, tmp_path, monkeypatch):
    """The figures are kept: they were paid for."""
    reference, samples = batches
    images = images_of(samples)
    images[7] = images[8]
    np.savez(samples, arr_0=images)
    monkeypatch.setattr("evaluations.c2i.figures.judge", lambda *_: [])
    with pytest.raises(ValueError, match=r"1 of the 140 samples are exact copies.*the figures are in"):
        evaluate(reference, samples, "--strict")
    assert report_of(samples)["fid"] > 0


def test_a_set_against_itself(batches):
    reference, _ = batches
    evaluate(reference, reference)
    report = report_of(reference)
    assert report["fid"] == pytest.approx(0, abs=1e-2)
    assert (report["precision"], report["recall"]) == (1, 1)
    assert any("are both" in warning for warning in report["warnings"])


def test_evaluator_given_the_samples_again_in_another_form_warns(batches, tmp_path):
    _, samples = batches
    np.savez(tmp_path / "shuffled.npz", arr_0=images_of(samples)[::-1])
    evaluate(tmp_path / "shuffled.npz", samples, "--save-statistics", tmp_path / "recorded.npz")
    assert any(
        "140 of the 140 samples are exact copies of images of the ref" in text
        for text in report_of(samples)["warnings"]
    )
    evaluate(tmp_path / "recorded.npz", samples, "--no-precision-recall")
    assert any(
        "statistics of the reference were made of these samples" in text for text in report_of(samples)["warnings"]
    )


def test_two_processes_give_the_figures_of_one(batches):
    reference, samples = batches
    evaluate(reference, samples)
    alone = report_of(samples)
    words = [str(reference), str(samples), "--graph", str(GRAPH), "--device", "cpu", "--batch-size", "24"]
    live({"module": "evaluations.c2i.evaluator", "args": words, "world": 2})
    together = report_of(samples)
    assert together["protocol"]["processes"] == 2
    for name in FIVE:
        assert together[name] == pytest.approx(alone[name], rel=1e-5), name
    assert together["warnings"] == alone["warnings"]


def test_what_is_missing(batches, tmp_path, monkeypatch):
    reference, samples = batches
    with pytest.raises(ValueError, match="two arguments are needed: REF and SAMPLES"):
        evaluate(reference)
    with pytest.raises(FileNotFoundError, match=r"no images at .*absent.npz"):
        evaluate(reference, tmp_path / "absent.npz")
    with pytest.raises(FileNotFoundError, match=r"absent.pb"):
        evaluate(reference, samples, graph=tmp_path / "absent.pb")
    with np.load(samples) as archive:
        one = archive["arr_0"][:1]
    np.savez(samples, arr_0=one)
    with pytest.raises(ValueError, match=r"sample.npz has 1 images; precision and recall need 4"):
        evaluate(reference, samples)
    np.savez(samples, mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(448), sigma_s=np.eye(448))
    with pytest.raises(ValueError, match=r"sample.npz has statistics and no images"):
        evaluate(reference, samples)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(20), "sigma": np.eye(20)}, r"statistics of 20 features and the graph .* makes 2048"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(44), "sigma_s": np.eye(44)}, r"44 .*448"),
    ],
)
def test_statistics_of_something_else(batches, tmp_path, arrays, message):
    _, samples = batches
    np.savez(tmp_path / "statistics.npz", **({"mu_s": np.zeros(448), "sigma_s": np.eye(448)} | arrays))
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "statistics.npz", samples)


@pytest.mark.parametrize("flag", ["--kid", "--fd-dinov2"])
def test_figures_that_need_the_references_images(batches, tmp_path, flag):
    _, samples = batches
    np.savez(tmp_path / "s.npz", mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(448), sigma_s=np.eye(448))
    with pytest.raises(ValueError, match=rf"{flag} compares images, and .*s.npz has statistics only"):
        evaluate(tmp_path / "s.npz", samples, flag)


class Broken:
    """A backend whose features of one image are not numbers."""

    name, device, pool_dim, versions = "torch", "cpu", 8, {}
    path, sha256, weights = Path("graph.pb"), "0", np.ones((8, 3), np.float32)

    def __call__(self, images):
        pool = np.random.default_rng(0).normal(size=(len(images), 8)).astype(np.float32)
        pool[2, 1] = np.nan
        return pool, pool


def test_features_that_are_not_finite(batches, monkeypatch):
    monkeypatch.setattr(figures, "open_backend", lambda *_: Broken())
    with pytest.raises(ValueError, match=r"reference.npz, images 0 to 31: .*2"):
        evaluate(*batches, "--batch-size", "32")
