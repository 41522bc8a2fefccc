"""tools/openimage_json.py as it is run."""

import json
import sys

import pytest
from PIL import Image

from dataset.folders import listed_images
from tests import forkserver
from tests.helpers import ROOT
from tests.training import run_here
from tools import openimage_json


@pytest.mark.slow
def test_lists_images_in_natural_order(tmp_path):
    for name in ["img10.png", "img3.JPG", "b/1.webp", "a/9/x.png", "a/10/x.png", ".thumb/t.png", "img02.png"]:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file, "PNG")
    (tmp_path / "notes.txt").write_text("")
    command = [sys.executable, "tools/openimage_json.py", "--data-path", str(tmp_path)]
    done = forkserver.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "6 images" in done.stdout
    expected = ["a/9/x.png", "a/10/x.png", "b/1.webp", "img02.png", "img3.JPG", "img10.png"]
    assert json.loads((tmp_path / "image_paths.json").read_text()) == expected
    assert len(listed_images(tmp_path)) == 6
    run_here(openimage_json, "--data-path", tmp_path)
    assert len(listed_images(tmp_path)) == 6  # its own list is no image


def test_errors(tmp_path):
    for folder, message in [(tmp_path / "nowhere", "does not exist"), (tmp_path, "no images")]:
        with pytest.raises((ValueError, OSError), match=message):
            run_here(openimage_json, "--data-path", folder)
    assert not list(tmp_path.iterdir())
