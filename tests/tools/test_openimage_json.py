"""tools/openimage_json.py as it is run."""

import json
import subprocess
import sys

from PIL import Image

from dataset.folders import listed_images
from tests.helpers import ROOT


def run(folder):
    command = [sys.executable, "tools/openimage_json.py", "--data-path", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_lists_images_in_natural_order(tmp_path):
    for name in ["img10.png", "img2.JPG", "b/1.webp", "a/9/x.png", "a/10/x.png", ".thumb/t.png", "img02.png"]:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file, "PNG")
    (tmp_path / "notes.txt").write_text("")
    done = run(tmp_path)
    assert done.returncode == 0 and "6 images" in done.stdout
    expected = ["a/9/x.png", "a/10/x.png", "b/1.webp", "img02.png", "img2.JPG", "img10.png"]
    assert json.loads((tmp_path / "image_paths.json").read_text()) == expected
    assert len(listed_images(tmp_path)) == 6
    assert run(tmp_path).returncode == 0  # its own list is no image


def test_errors_are_one_line(tmp_path):
    for folder, message in [(tmp_path / "nowhere", "does not exist"), (tmp_path, "no images")]:
        done = run(folder)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
