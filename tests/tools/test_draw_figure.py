"""tools/draw_figure.py: which reports are read, how lines are told apart, what is drawn where, a user's mistakes."""

import json

import matplotlib
import numpy as np
import pytest
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from autoregressive.models.gpt import GPT_models
from evaluations.published import ROWS
from tests.training import run_here
from tools import draw_figure
from tools.draw_figure import (
    draw_against_parameters,
    draw_against_scale,
    finish,
    format_parameters,
    lines_of,
    read_results,
)

SETTINGS = {
    "gpt_model": "GPT-B",
    "image_size": 384,
    "image_size_eval": 256,
    "downsample_size": 16,
    "codebook_size": 16384,
    "num_classes": 1000,
    "cls_token_num": 1,
    "ar_token_num": None,
    "spe_token_num": None,
    "cfg_scale": 2.0,
    "cfg_interval": -1,
    "top_k": 0,
    "top_p": 1.0,
    "temperature": 1.0,
    "precision": "bf16",
    "use_ema": False,
    "gpt_ckpt": {"file": "/weights/c2i_B_384.pt", "bytes": 1, "modified": 1},
}


def write_report(path, fid=5.0, warnings=(), count=50_000, file=None, **settings) -> None:
    """A report as evaluations/c2i/evaluator.py writes it."""
    settings = {**SETTINGS, **settings}
    if file:
        settings["gpt_ckpt"] = {"file": file, "bytes": 1, "modified": 1}
    report = {"inception_score": 100 + fid, "fid": fid, "sfid": 2 * fid, "precision": 0.8, "recall": None}
    protocol = {"samples": {"count": count, "settings": settings}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**report, "warnings": list(warnings), "protocol": protocol}))


@pytest.fixture
def folder(tmp_path):
    """GPT-B at three scales in folders below, and files of other kinds."""
    for scale, fid in ((1.5, 8.0), (2.0, 6.0), (2.5, 7.0)):
        write_report(tmp_path / "deep" / "er" / f"b{scale}.json", fid, cfg_scale=scale)
    write_report(tmp_path / "l.json", 3.25, gpt_model="GPT-L", file="/weights/c2i_L_384.pt")
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "broken.json").write_text('{"fid": 1')
    (tmp_path / "list.json").write_text("[1, 2]")
    return tmp_path


def axes_of(lines, rows, metric="fid"):
    figure, (by_size, by_scale) = plt.subplots(1, 2, sharey=True)
    draw_against_parameters(by_size, lines, rows, metric)
    draw_against_scale(by_scale, lines, rows, metric)
    finish((by_size, by_scale), metric)
    plt.close(figure)
    return by_size, by_scale


def points(axis) -> set[tuple[float, float]]:
    return {(float(x), float(y)) for line in axis.lines for x, y in zip(*line.get_data(), strict=True)}


def test_reports_are_found_and_other_files_named(folder):
    results, skipped = read_results([folder])
    assert sorted(result.figures["fid"] for result in results) == [3.25, 6.0, 7.0, 8.0]
    assert [line.split(": ")[0].rsplit("/", 1)[1] for line in skipped] == ["broken.json", "list.json", "settings.json"]
    assert all("not a report of the evaluator" in line for line in skipped)


def test_a_report_without_settings_is_skipped_with_a_word(tmp_path):
    write_report(tmp_path / "a.json")
    report = json.loads((tmp_path / "a.json").read_text())
    report["protocol"]["samples"]["settings"] = None
    (tmp_path / "a.json").write_text(json.dumps(report))
    results, skipped = read_results([tmp_path])
    assert not results and "without the settings" in skipped[0]


def test_parameters_are_the_models(tmp_path):
    write_report(tmp_path / "a.json", gpt_model="GPT-XS", num_classes=10, codebook_size=64, ar_token_num=4)
    ((result,), _) = read_results([tmp_path])
    model = GPT_models["GPT-XS"](vocab_size=64, num_classes=10, block_size=576, ar_token_num=4)
    assert result.parameters == sum(p.numel() for p in model.parameters())


def test_files_and_folders_are_read_once(folder):
    results, skipped = read_results([folder / "l.json", folder])
    assert len(results) == 4 and len(skipped) == 3


def test_lines_are_told_apart(tmp_path):
    write_report(tmp_path / "1.json", file="/a/LlamaGen/c2i_B_256.pt")
    write_report(tmp_path / "2.json", file="/a/LlamaGen-NPP/c2i_B_256.pt")
    write_report(tmp_path / "3.json", file="/runs/007-GPT-B/checkpoints/0050000.pt")
    write_report(tmp_path / "4.json", file="/w/other.pt", top_k=2000)
    write_report(tmp_path / "5.json", file="/w/other.pt", top_k=0)
    write_report(tmp_path / "6.json", file="/w/other.pt", top_k=0, count=500)
    lines = lines_of(read_results([tmp_path])[0])
    assert set(lines) == {
        "LlamaGen/c2i_B_256",
        "LlamaGen-NPP/c2i_B_256",
        "007-GPT-B at 50,000",
        "other, samples 50000, top k 2000",
        "other, samples 50000, top k 0",
        "other, samples 500, top k 0",
    }
    assert all(len(line) == 1 for line in lines.values())


def test_points_stand_where_they_belong(folder):
    lines = lines_of(read_results([folder])[0])
    assert list(lines) == ["c2i_B_384", "c2i_L_384"]
    assert [result.cfg_scale for result in lines["c2i_B_384"]] == [1.5, 2.0, 2.5]
    row = ROWS["PAR-XL-4x"]
    by_size, by_scale = axes_of(lines, [row])
    assert points(by_size) == {(110_888_448, 6.0), (342_910_976, 3.25), (row.parameters, 2.61)}
    assert points(by_scale) == {(1.5, 8.0), (2.0, 6.0), (2.5, 7.0), (2.0, 3.25), (1.5, 2.61)}
    assert {text.get_text() for text in by_scale.texts} == {"XL"}
    assert {text.get_text() for text in by_size.texts} == {"at 2"}


def test_where_higher_is_better_the_highest_counts(folder):
    lines = lines_of(read_results([folder])[0])
    by_size, _ = axes_of(lines, [], "inception_score")
    assert points(by_size) == {(110_888_448, 108.0), (342_910_976, 103.25)}
    assert "higher is better" in by_size.get_ylabel()


def test_figures_far_apart_are_on_a_logarithmic_scale(folder):
    lines = lines_of(read_results([folder])[0])
    assert axes_of({"b": lines["c2i_B_384"]}, [])[0].get_yscale() == "linear"
    assert axes_of(lines, list(ROWS.values())[:-4])[0].get_yscale() == "log"


def test_two_seeds_are_two_points_and_a_line_through_their_mean(tmp_path):
    for number, fid in enumerate((4.0, 6.0)):
        write_report(tmp_path / f"{number}.json", fid, global_seed=number)
    write_report(tmp_path / "other.json", 9.0, cfg_scale=3.0)
    _, by_scale = axes_of(lines_of(read_results([tmp_path])[0]), [])
    line, marks = (sorted(zip(*line.get_data(), strict=True)) for line in by_scale.lines)
    assert line == [(2.0, 5.0), (3.0, 9.0)] and marks == [(2.0, 4.0), (2.0, 6.0), (3.0, 9.0)]


def test_what_the_evaluator_warned_about_is_marked(tmp_path):
    write_report(tmp_path / "a.json", warnings=["500 samples"])
    lines = lines_of(read_results([tmp_path])[0])
    assert "c2i_B_384 (not comparable)" in axes_of(lines, [ROWS["c2i_B_384"]])[1].get_legend_handles_labels()[1]


@pytest.mark.slow
def test_the_picture_is_written(folder, tmp_path, capsys):
    output = tmp_path / "new" / "figure.png"
    run_here(draw_figure, "--results", folder, "--output", output)
    pixels = np.asarray(Image.open(output).convert("RGB"))
    assert pixels.shape[1] > pixels.shape[0] > 400
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    printed = capsys.readouterr().out
    assert "4 results of 2 models, 15 published" in printed and printed.count("skipped") == 3
    run_here(draw_figure, "--results", folder, "--output", output, "--metric", "precision")
    assert "0 published" in capsys.readouterr().out


def test_mistakes(folder, tmp_path):
    output = tmp_path / "figure.png"
    with pytest.raises(ValueError, match="4 without recall"):
        run_here(draw_figure, "--results", folder, "--metric", "recall", "--output", output)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no \.json file of evaluations/c2i/evaluator\.py"):
        run_here(draw_figure, "--results", tmp_path / "empty", "--output", output)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        run_here(draw_figure, "--results", tmp_path / "nowhere", "--output", output)
    assert not output.exists()


def test_parameters_in_words():
    assert [format_parameters(n) for n in (950, 110_888_448, 774_699_520, 1_410_972_672, 3_096_659_200)] == [
        "950", "111M", "775M", "1.4B", "3.1B",
    ]  # fmt: skip
