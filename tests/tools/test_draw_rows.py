"""tools/draw_rows.py: images that appear row by row; by windows; and grids with labels."""

import re

import numpy as np
import pytest
from PIL import Image

from autoregressive.models.layouts import build_layout
from tests.helpers import ROOT
from tools import draw_windows
from tools.draw_rows import flags, main
from utils.images import labelled_grid


def draw(small_files, *words):
    given = ["--gpt-ckpt", small_files.gpt, "--vq-ckpt", small_files.vq, "--device", "cpu", "--labels", 1, 2, *words]
    main(flags().parse_args([str(word) for word in given]))


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_rows_appear_one_after_another(small_files, tmp_path, ending):
    output = tmp_path / f"rows.{ending}"
    draw(small_files, "--output", output, "--scale", 1, "--columns", 2)
    animation = Image.open(output)
    frames = []
    for number in range(animation.n_frames):
        animation.seek(number)
        frames.append(np.asarray(animation.convert("RGB")).astype(int))
    side = (frames[0].shape[0] - 4) // (len(frames) - 1)
    assert len(frames) - 1 == 8 and side == 4, "8x8 codes of 4x4 pixels"
    for row, frame in enumerate(frames):
        upper, lower = frame[2 : 2 + side * row, 2:34], frame[2 + side * row : -2, 2:34]
        if ending != "gif":  # of 256 colours
            assert (lower == 235).all() and (upper == frames[-1][2 : 2 + side * row, 2:34]).all()


def test_other_formats_are_refused(small_files, tmp_path):
    with pytest.raises(
        ValueError, match=r"--output .*rows\.mp4 is no animation: give a name that ends in \.gif, \.png, \.webp"
    ):
        draw(small_files, "--output", tmp_path / "rows.mp4")


def test_labels_stand_below_their_images():
    images = np.full((3, 8, 8, 3), 200, np.uint8)
    plain, named = (
        labelled_grid(images, labels, columns=2, side=32) for labels in (["", "", ""], ["cook", "a", "raising hand"])
    )
    assert (named[4:36, 4:36] == 200).all() and (named[4:36, 44:76] == 200).all()
    assert (plain[36:44, :40] == 255).all() and (named[36:60, :40] < 128).any()
    assert named.shape[1] == plain.shape[1] == 2 * 40 and named.shape[0] > plain.shape[0]


def test_reports_of_the_quickstart_need_nothing_but_its_extra():
    for name in ("digits_report", "drawings", "drawings_report", "stages"):
        text = (ROOT / "tools" / f"{name}.py").read_text()
        assert "tokenizer.reconstruction" not in text and "skimage" not in text, "scikit-image is of the extra `eval`"


def test_windows_fill_the_same_image_in_fewer_frames(small_files, tmp_path, capsys):
    given = ["--gpt-ckpt", small_files.gpt, "--vq-ckpt", small_files.vq, "--device", "cpu", "--labels", 1, 2]
    output = tmp_path / "windows.png"
    given += ["--precision", "none", "--windows", 0, 8, "--output", output]
    draw_windows.main(draw_windows.flags().parse_args([str(word) for word in given]))
    passes = dict(re.findall(r"window (\d+): ([\d.]+) passes for 64 tokens", capsys.readouterr().out))
    assert float(passes["0"]) == 64 and float(passes["8"]) < 64
    assert Image.open(output).n_frames <= 64


def test_partly_drawn_image_shows_drafts_pale_and_the_rest_empty():
    layout = build_layout({"name": "raster"}, grid_size=2)
    whole, drafts = np.full((4, 4, 3), 100, np.uint8), np.zeros((4, 4, 3), np.uint8)
    image = draw_windows.partly_drawn(whole, drafts, layout, done=1, window=1)
    assert [int(image[y, x, 0]) for y, x in ((0, 0), (0, 2), (2, 0))] == [
        100,
        round(0.65 * draw_windows.EMPTY),
        draw_windows.EMPTY,
    ]
