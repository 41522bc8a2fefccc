"""tools/draw_figure.py: which reports are read, how lines are told apart, what is drawn where, a user's mistakes."""

import json

import matplotlib
import pytest
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from autoregressive.models.gpt import GPT_models
from evaluations.published import ROWS
from tests.training import run_here
from tools import draw_figure

pytestmark = pytest.mark.slow  # through whole scripts and servers

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
    "top_k": 0,
    "gpt_ckpt": {"file": "/weights/c2i_B_384.pt"},
}


def write_report(path, fid=5.0, warnings=(), count=50_000, file=None, **settings) -> None:
    """Writes a report as evaluations/c2i/evaluator.py does."""
    settings = {**SETTINGS, **settings} | ({"gpt_ckpt": {"file": file}} if file else {})
    report = {"inception_score": 100 + fid, "fid": fid, "sfid": 2 * fid, "precision": 0.8, "recall": None}
    protocol = {"samples": {"count": count, "settings": settings}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**report, "warnings": list(warnings), "protocol": protocol}))


@pytest.fixture
def folder(tmp_path):
    """GPT-B at three scales in folders below, and files of other kinds."""
    for scale, fid in ((1.5, 8.0), (2.0, 6.0), (2.5, 7.0)):
        write_report(tmp_path / "deep" / "er" / f"b{scale}.json", fid, cfg_scale=scale)
    write_report(tmp_path / "l.json", 3.25, ["few"], gpt_model="GPT-L", file="/weights/c2i_L_384.pt")
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "broken.json").write_text('{"fid": 1')
    (tmp_path / "list.json").write_text("[1, 2]")
    return tmp_path


def test_read_results_of_a_folder_skips_other_files_by_name(folder, capsys):
    results = draw_figure.read_results([folder / "l.json", folder])
    assert sorted(result.figures["fid"] for result in results) == [3.25, 6.0, 7.0, 8.0]
    skipped = [line.split(": ")[0].rsplit("/", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert skipped == ["broken.json", "list.json", "settings.json"]


def test_read_result_counts_the_parameters_of_the_settings(tmp_path):
    write_report(tmp_path / "a.json", gpt_model="GPT-XS", num_classes=10, codebook_size=64, ar_token_num=4)
    model = GPT_models["GPT-XS"](vocab_size=64, num_classes=10, block_size=576, ar_token_num=4)
    parameters = draw_figure.read_result(tmp_path / "a.json").parameters
    assert parameters == sum(p.numel() for p in model.parameters())


def test_lines_of_results_are_told_apart_by_what_differs(tmp_path):
    write_report(tmp_path / "1.json", file="/a/LlamaGen/c2i_B_256.pt")
    write_report(tmp_path / "2.json", file="/a/LlamaGen-NPP/c2i_B_256.pt")
    write_report(tmp_path / "3.json", file="/runs/007-GPT-B/checkpoints/0050000.pt")
    write_report(tmp_path / "4.json", file="/w/other.pt", top_k=2000)
    assert set(draw_figure.lines_of(draw_figure.read_results([tmp_path]))) == {
        "/a/LlamaGen/c2i_B_256.pt, top k 0",
        "/a/LlamaGen-NPP/c2i_B_256.pt, top k 0",
        "007-GPT-B at 50,000, top k 0",
        "other, top k 2000",
    }


def test_axes_show_every_result_and_every_published_row(folder):
    rows = [row for row in ROWS.values() if row.gpt]
    lines = draw_figure.lines_of(draw_figure.read_results([folder]))
    figure, axes = plt.subplots(1, 2)
    draw_figure.draw_published(axes, rows)
    draw_figure.draw_lines(axes, lines, "fid", mark=True)
    plt.close(figure)
    by_size, by_scale = (
        {(float(x), float(y)) for line in axis.lines for x, y in zip(*line.get_data(), strict=True)} for axis in axes
    )
    assert by_size == {(row.parameters, row.fid) for row in rows} | {(110_888_448.0, 6.0), (342_910_976.0, 3.25)}
    assert by_scale == {(row.cfg_scale, row.fid) for row in rows} | {(1.5, 8), (2, 6), (2.5, 7), (2, 3.25)}
    labels = axes[1].get_legend_handles_labels()[1]
    assert {"c2i_B_384", "c2i_L_384 (not comparable)", "PAR 384, published"} <= set(labels)


def test_draw_figure_of_a_folder_writes_the_picture(folder, capsys):
    output = folder / "figure.png"
    run_here(draw_figure, "--results", folder, "--output", output)
    published = sum(row.gpt is not None for row in ROWS.values())
    assert f"4 results of 2 models, {published} published" in capsys.readouterr().out
    assert Image.open(output).size[0] > 800
    run_here(draw_figure, "--results", folder, "--output", output, "--metric", "precision")
    assert "0 published" in capsys.readouterr().out
    with pytest.raises(ValueError, match="recall"):
        run_here(draw_figure, "--results", folder, "--metric", "recall", "--output", output)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_here(draw_figure, "--results", folder / "nowhere", "--output", output)
