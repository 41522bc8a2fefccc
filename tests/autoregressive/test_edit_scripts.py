"""The scripts that edit a picture, as they are called: holes and margins, sheets and single pictures, mistakes."""

import numpy as np
import pytest
from PIL import Image

from autoregressive.pipeline import ImagePipeline
from autoregressive.sample import edit_c2i, edit_t2i
from tests.autoregressive.test_sample_t2i import line as text_line
from tests.autoregressive.test_sample_t2i import text_files  # noqa: F401
from tests.training import run_here
from utils.images import open_picture

pytestmark = pytest.mark.usefixtures("one_thread")

HOLE = ["--box", 8, 4, 20, 16]


@pytest.fixture(scope="module")
def picture(small_files, tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    pipeline = ImagePipeline.from_pretrained(small_files.gpt, vq=small_files.vq, device="cpu")
    pipeline([4], seed=3, progress=False)[0].save(path)
    return path


def line(files, image, output, *more) -> list:
    """The flags of a small edit. Later ones win."""
    models = ["--gpt-ckpt", files.gpt, "--vq-ckpt", files.vq, "--device", "cpu", "--precision", "none"]
    return [*models, "--image", image, "--output", output, "--label", 2, "--particles", 2, "--top-k", 9, *more]


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_edit_writes_the_picture_its_hole_and_the_results(small_files, picture, tmp_path, capsys):
    sheet, alone = tmp_path / "sheet.png", tmp_path / "alone.png"
    run_here(edit_c2i, *line(small_files, picture, sheet, *HOLE, "--num-images", 2, "--seed", 5))
    said = capsys.readouterr().out
    assert said.count("log-evidence -") == said.count("of 2\n") == 2
    run_here(edit_c2i, *line(small_files, picture, alone, *HOLE, "--num-images", 2, "--seed", 5, "--no-sheet"))
    pipeline = ImagePipeline.from_pretrained(small_files.gpt, vq=small_files.vq, device="cpu")
    with Image.open(picture) as image:
        expected = pipeline.edit(image, None, 2, box=HOLE[1:], n=2, seed=5, particles=2, cfg_scale=4.0, top_k=9)
    drawn = [pixels(tmp_path / f"alone-{i}.png") for i in range(2)]
    assert all(np.array_equal(one, np.asarray(other)) for one, other in zip(drawn, expected, strict=True))
    columns = [pixels(sheet)[2:34, 2 + 34 * i : 34 + 34 * i] for i in range(4)]
    hole = np.zeros((32, 32), bool)
    hole[4:16, 8:20] = True
    assert np.array_equal(columns[0], pixels(picture))
    assert (columns[1][hole] == 128).all() and np.array_equal(columns[1][~hole], pixels(picture)[~hole])
    assert np.array_equal(np.stack(columns[2:]), np.stack(drawn))


def test_edit_takes_a_mask_and_the_picture_s_own_transparency(small_files, picture, tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[4:16, 8:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    own = Image.open(picture).convert("RGBA")
    own.putalpha(Image.fromarray(255 - mask))
    own.save(tmp_path / "own.png")
    for name, image, more in (
        ("box", picture, HOLE),
        ("mask", picture, ["--mask", tmp_path / "mask.png"]),
        ("own", tmp_path / "own.png", []),
    ):
        run_here(edit_c2i, *line(small_files, image, tmp_path / f"{name}.png", *more, "--no-sheet"))
    written = [(tmp_path / f"{name}.png").read_bytes() for name in ("box", "mask", "own")]
    assert written[0] == written[1] == written[2]


def test_edit_extends_a_picture(small_files, picture, tmp_path):
    run_here(edit_c2i, *line(small_files, picture, tmp_path / "wide.png", "--left", 8, "--down", 4, "--no-sheet"))
    wide = pixels(tmp_path / "wide.png")
    assert wide.shape == (36, 40, 3) and np.array_equal(wide[:32, 8:], pixels(picture))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fill all .* text tokens")
def test_edit_draws_from_a_prompt(text_files, tmp_path, capsys):  # noqa: F811
    image = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(image)
    (tmp_path / "prompts.txt").write_text("a red lantern\n")
    line = text_line(text_files, "--image", image, "--box", 4, 4, 12, 8, "--particles", 2)
    for name, more in (("one", ["--prompt", "a red lantern"]), ("two", ["--prompt-file", tmp_path / "prompts.txt"])):
        run_here(edit_t2i, *line, *more, "--output", tmp_path / f"{name}.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with pytest.raises(ValueError, match="--prompt, or --prompt-file"):
        run_here(edit_t2i, *line)


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "nothing says what to fill"),
        (["--box", 0, 0, 40, 8], "no part of a picture of 32x32"),
        ([*HOLE, "--left", 8], "--box is of a hole, and --left extends"),
        (["--left", 8, "--no-keep-pixels"], "--no-keep-pixels is of a hole"),
        (["--up", 6], "whole tokens of 4 pixels"),
        (["--mask", "small"], "the mask has 8x8 pixels and the picture 32x32"),
        (["--mask", "empty"], "nothing is to be filled"),
        (["--mask", "damaged"], "no picture that can be read"),
        (["--mask", "large"], "at most 67,108,864"),
        ([*HOLE, "--label", 77], "77"),
        ([*HOLE, "--draw", "cdf"], "--draw race1, or --particles 1"),
        ([*HOLE, "--gpt-type", "t2i"], "edit_t2i.py"),
    ],
)
def test_mistakes_are_told_in_one_line(small_files, picture, tmp_path, more, message):
    Image.new("L", (8, 8), 255).save(tmp_path / "small.png")
    Image.new("RGBA", (32, 32), (0, 0, 0, 255)).save(tmp_path / "empty.png")
    (tmp_path / "damaged.png").write_bytes(picture.read_bytes()[:200])
    Image.new("1", (2**13 + 8, 2**13)).save(tmp_path / "large.png")
    words = [tmp_path / f"{word}.png" if word in ("small", "empty", "damaged", "large") else word for word in more]
    with pytest.raises(ValueError, match=message) as caught:
        run_here(edit_c2i, *line(small_files, picture, tmp_path / "out.png", *words))
    assert "\n" not in str(caught.value) and not (tmp_path / "out.png").exists()


def test_picture_is_turned_as_its_exif_says(tmp_path):
    image = Image.new("RGB", (8, 4), "red")
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (4, 8)


def test_file_that_is_not_there_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_picture(tmp_path / "none.png")
