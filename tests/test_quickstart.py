"""scripts/quickstart.sh: drawings and digits, by class and from text, with few steps and samples."""

import json
import os
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

from autoregressive.sample import sample_c2i, sample_t2i
from autoregressive.train import train_c2i
from tests import forkserver
from tests.helpers import ROOT
from tests.training import run_here
from tools import draw_rows, orders_report

pytestmark = pytest.mark.slow

ROLES = 12  # of 76: artist, astronaut, …, cook


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The folder that a short recipe leaves things in, and a function that runs the recipe with words of the command line."""
    folder = tmp_path_factory.mktemp("quickstart")
    text, out = (ROOT / "scripts" / "quickstart.sh").read_text(), folder / "quickstart"
    for before, after, times in (
        (r'cd "\$\(dirname "\$0"\)/\.\."', f'cd "{ROOT}"', 1),
        (r"home=quickstart", f'home="{out}"', 1),
        (r"bash scripts/setup.sh quickstart [^\n]*\nsource .venv/bin/activate\n", "", 1),
        (r"--max-steps \d+", "--max-steps 2", 7),
        (r"--global-batch-size 32", "--global-batch-size 8", 3),
        (r"(make_drawings.py --output \S+)", rf"\1 --roles {ROLES}", 1),
        (r"--num-fid-samples \d+", "--num-fid-samples 20", 4),
        (r" --ten-crop --crop-range 1.1", "", 1),
        (r"(make_digits.py --output \S+)", r"\1 --scans 600", 1),
        (r"(make_digit_captions.py .*--image-size 32)", r"\1 --scans 60 --prompts 30", 1),
    ):
        text, replaced = re.subn(before, after, text)
        assert replaced == times, before
    script = folder / "quickstart.sh"
    script.write_text(text)
    environment = {**os.environ, "PATH": f"{forkserver.shim()}{os.pathsep}{os.environ['PATH']}"}

    def run(*words):
        command, streams = ["bash", str(script), *words], {"stdin": subprocess.DEVNULL, "capture_output": True}
        done = subprocess.run(command, env=environment, text=True, timeout=500, **streams)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    return out, run


def check_report(folder, stages):
    """Check what both recipes report, and return the report."""
    report = json.loads((folder / "report.json").read_text())
    assert set(report["seconds"]) == {*stages.split(), "total"} and report["samples"] == 20
    assert report["held_out_digits_read_right"] > 0.95 and 0 <= report["samples_read_as_asked"] <= 1
    held_out, samples = report["train_against_held_out"], report["train_against_samples"]
    assert held_out["frechet_distance"] < samples["frechet_distance"]  # hardly trained
    assert held_out["precision"] > 0.5 and held_out["recall"] > 0.5 and 0 <= samples["precision"] <= 1
    return report


@pytest.mark.timeout(1000)
def test_quickstart_of_drawings_makes_pictures_and_a_report(recipe):
    out, run = recipe
    assert "are nearest to a real one of the role that was asked for" in run()
    for name in ("samples.png", "reconstructions.png", "training.png"):
        assert Image.open(out / name).size[0] > 100
    width, height = Image.open(next(out.glob("gpt/*/samples/*.png"))).size
    assert width == 4 * (128 + 8) and height > 2 * (128 + 8), "while it trains: eight images, the class below each"
    report = json.loads((out / "report.json").read_text())
    assert set(report["seconds"]) == {*["drawings", "tokenizer", "codes", "gpt", "samples", "curves", "total"]}
    assert report["samples"] == 20 and 0 <= report["samples_role_as_asked"] <= 1
    assert report["chance_of_a_role"] == 1 / ROLES and set(report["reconstructions_right"]) == {
        "role",
        "person",
        "tone",
    }
    assert report["nll_held_out_nats_per_token"] == pytest.approx(np.log(1024), abs=0.5)  # hardly trained
    assert all(value > 0 for value in report["mean_square_to_nearest_training_drawing"].values())
    given = ["--gpt-ckpt", out / "gpt", "--labels", "cook", "blond hair", "--device", "cpu"]
    for script in (sample_c2i, draw_rows):
        run_here(script, *given, "--output", out / "drawn.gif")
        assert Image.open(out / "drawn.gif").size[0] > 64


@pytest.mark.timeout(1000)
def test_orders_are_compared_on_the_drawings(recipe):
    """One training line of compare_orders.sh with few steps, and its table with the quickstart's own model beside it."""
    out, run = recipe
    if not (out / "gpt").exists():
        run()
    words = (ROOT / "scripts" / "compare_orders.sh").read_text()
    flags = re.search(r"(--epochs 32 [^\n]*) \\\n *(--num-workers[^$]*)--results-dir", words)
    line = re.search(r"^train LPD (.*)$", words, re.MULTILINE)[1].split()
    codes = ["--code-path", out / "codes_train", "--val-code-path", out / "codes_held_out"]
    flags = [*flags[1].split(), *flags[2].replace("\\", "").split()]
    run_here(
        train_c2i, *codes, *flags, *line, "--max-steps", 2, "--results-dir", out / "orders" / "LPD", "--device", "cpu"
    )
    given = ["--drawings", out / "drawings", "--codes", out / "codes_held_out", "--vq-ckpt", out / "tokenizer"]
    few = ["--images-per-class", 1, "--batch-size", ROLES, "--output", out / "orders"]
    run_here(orders_report, "--runs", out / "gpt", out / "orders" / "LPD", *given, *few)
    report = json.loads((out / "orders" / "report.json").read_text())
    assert [(name, each["passes"]) for name, each in report.items()] == [("gpt", 64), ("LPD", 10)]
    assert all(0 <= each["as_asked_plain"] <= 1 and each["images_per_second_guided"] > 0 for each in report.values())
    assert report["LPD"]["nll_held_out"] == pytest.approx(np.log(1024), abs=1)  # hardly trained
    assert Image.open(out / "orders" / "orders.png").size[0] > 100


@pytest.mark.timeout(1000)
def test_quickstart_of_drawings_from_names_draws_held_out_compositions(recipe):
    out, run = recipe
    there = (out / "tokenizer").exists()
    printed = run("text")
    assert printed.count("nothing left to do") == there and "drawings of names never trained on" in printed
    report = json.loads((out / "text" / "report.json").read_text())
    stages = ["encoder", "features", "codes", "gpt", "samples", "curves", "total"]
    assert set(report["seconds"]) - {"drawings", "tokenizer"} == set(stages) and report["samples"] == 20
    assert set(report["samples_as_asked"]) == set(report["chance"]) == {"role", "person", "tone"}
    assert report["nll_held_out_nats_per_token"] == pytest.approx(np.log(1024), abs=0.5)  # hardly trained
    pictures = sorted((out / "text").glob("samples/*/images/*.png"))
    assert len(pictures) == 20 and Image.open(pictures[0]).size == (64, 64)
    asked = (out / "drawings" / "prompts.tsv").read_text().splitlines()
    trained = {json.loads(line)["text"][1] for line in (out / "drawings" / "train" / "train.jsonl").open()}
    assert asked[0] == "Prompt" and len(asked) == 2 * ROLES + 1 and not trained & set(asked)
    run_here(sample_t2i, "--gpt-ckpt", out / "text" / "gpt", "--prompt", "woman cook, dark skin tone", "--device", "cpu",
             "--output", out / "named.png")  # fmt: skip
    assert Image.open(out / "named.png").size[0] >= 64


@pytest.mark.timeout(1000)
def test_quickstart_of_digits_makes_pictures_and_a_report(recipe):
    out, run = recipe
    out = out / "tiny"
    run("--tiny")
    for name in ("samples.png", "reconstructions.png", "training.png"):
        assert Image.open(out / name).size[0] > 100
    report = check_report(out, "digits tokenizer codes gpt samples curves")
    assert report["psnr_held_out_db"] > 5 and 0 < report["codebook_usage_held_out"] <= 1
    assert report["nll_held_out_nats_per_token"] == pytest.approx(np.log(256), abs=0.5)  # hardly trained
    assert len(list(out.glob("samples/*/*.png"))) == 20


@pytest.mark.timeout(1000)
def test_quickstart_from_words_goes_on_with_the_tokenizer_that_is_there(recipe):
    out, run = recipe
    there = (out / "tiny" / "tokenizer").exists()
    assert run("text", "--tiny").count("nothing left to do") == there
    left = out / "tiny" / "text"
    for name in ("samples.png", "prompts.png", "training.png"):
        assert Image.open(left / name).size[0] > 100
    report = check_report(left, "digits tokenizer captions encoder features codes stage1 stage2 samples curves")
    assert report["prompts"] == 20
    assert all(0 <= report[name] <= 1 for name in ("slant_as_asked", "stroke_as_asked"))
    losses = report["nll_held_out_nats_per_token"]
    assert set(losses) == {"stage1", "stage2"} and losses["stage1"] == pytest.approx(np.log(256), abs=0.5)
    pictures = sorted(left.glob("samples/*/images/*.png"))
    assert len(pictures) == 20 and Image.open(pictures[0]).size == (32, 32)
    with pytest.raises(AssertionError, match="wrong is none of text, --tiny, --fresh"):
        run("text", "--tiny", "wrong", "--fresh")
    assert pictures[3].exists()


def test_every_training_of_the_quickstart_resumes():
    text = (ROOT / "scripts" / "quickstart.sh").read_text()
    assert text.count("--results-dir") == text.count("--resume") == 3
