"""tools/draw_training.py: curves of runs over each other, named by what differs."""

import json

import pytest
from PIL import Image

from tools.draw_training import flags, labels, main, read_curves


def make_run(folder, *lines, **args):
    """A run's folder with what it logged and the flags it began with."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps({"stores": [], "args": {"results_dir": str(folder.parent), **args}}))
    return folder


def draw(*words):
    main(flags().parse_args([str(word) for word in words]))


def test_a_resumed_and_killed_run_has_one_value_a_step(tmp_path):
    lines = [
        {"step": 10, "loss": 3.0},
        {"step": 20, "loss": 9.0},
        {"step": 20, "loss": 2.0},
        {"step": 20, "val_loss": 2.5},
    ]
    run = make_run(tmp_path / "results" / "000-GPT-XS", *lines)
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 30, "lo')
    assert read_curves(run / "metrics.jsonl") == {"loss": [(10, 3.0), (20, 2.0)], "val_loss": [(20, 2.5)]}


def test_runs_share_a_panel_a_metric(tmp_path):
    steps = [{"step": step, "loss": 5.0 / step, "discriminator_loss": 0.0} for step in (1, 2)]
    one, other = (make_run(tmp_path / name / "000-GPT-XS", *steps, lr=lr) for name, lr in (("a", 1e-4), ("b", 3e-4)))
    output = tmp_path / "curves.png"
    draw("--runs", one, other, "--output", output)
    assert Image.open(output).size == (600, 400)  # the loss alone: what is 0 throughout is switched off
    draw("--runs", tmp_path / "a", "--metrics", "loss", "discriminator_loss", "val_loss", "--output", output)
    assert Image.open(output).size == (600, 400)


def test_curves_are_named_by_folder_and_by_the_flags_that_differ(tmp_path):
    one = make_run(tmp_path / "a" / "000-GPT-XS", lr=1e-4, ema=False, epochs=3)
    other = make_run(tmp_path / "b" / "000-GPT-XS", lr=3e-4, ema=True, epochs=3)
    third = make_run(tmp_path / "b" / "001-GPT-XS", lr=3e-4, ema=True, epochs=3)
    assert labels([one, other]) == ["a/000-GPT-XS --ema False --lr 0.0001", "b/000-GPT-XS --ema True --lr 0.0003"]
    assert labels([other, third]) == ["000-GPT-XS", "001-GPT-XS"]
    assert labels([one]) == ["000-GPT-XS"]


def test_what_no_run_has_is_an_error_with_what_there_is(tmp_path):
    run = make_run(tmp_path / "000-GPT-XS", {"step": 1, "loss": 2.0, "lr": 0.1})
    with pytest.raises(ValueError, match="no run has val_loss; --metrics takes loss, lr"):
        draw("--runs", run, "--metrics", "val_loss")
    with pytest.raises(FileNotFoundError, match=r"nowhere.*metrics\.jsonl does not exist"):
        draw("--runs", tmp_path / "nowhere")
