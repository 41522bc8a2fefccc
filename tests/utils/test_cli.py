"""Ranges of numeric flags, and the published command lines that they have to let through."""

import argparse
from importlib import import_module

import pytest

from autoregressive.sample import sample_c2i, sample_t2i
from autoregressive.train import train_c2i
from tests.helpers import scripts
from utils.cli import Number, run_script
from utils.errors import AgreedError


@pytest.mark.parametrize("name", scripts())
def test_numeric_flags_of_every_script_have_a_range(name):
    for action in import_module(name).flags()._actions:
        kind, flag = action.type, (action.option_strings or [action.dest])[0]
        if kind in (None, str):
            assert isinstance(action.default, bool) or not isinstance(action.default, int | float), flag
            continue
        assert kind not in (int, float), flag
        words = ["nan", "inf", "-inf", "-1e9", "", "1e400"] if isinstance(kind, Number) else []
        for word in (*words, str(-(10**30))):
            with pytest.raises(argparse.ArgumentTypeError):
                kind(word)


@pytest.mark.parametrize(
    "number, taken, refused",
    [
        (Number(float, above=0), ["1e-9", "5"], ["0", "-1"]),
        (Number(float, least=0, below=1), ["0", "0.999"], ["1", "-0.1"]),
        (Number(float, above=0, most=1), ["1", "0.5"], ["0", "1.001"]),
        (Number(int, least=-1), ["-1", "7"], ["-2", "0.5", "x"]),
        (Number(int, least=-(2**63), most=2**63 - 1), [str(2**63 - 1), str(-(2**63))], [str(2**63)]),
    ],
)
def test_number_takes_its_range_and_nothing_else(number, taken, refused):
    assert [number(word) for word in taken] == [number.kind(word) for word in taken]
    for word in refused:
        with pytest.raises(argparse.ArgumentTypeError):
            number(word)


def test_number_out_of_range_names_the_range_and_the_value(capsys):
    with pytest.raises(SystemExit):
        train_c2i.flags().parse_args(["--code-path", "codes", "--max-grad-norm", "-1"])
    assert capsys.readouterr().err.startswith("error: --max-grad-norm must be 0 or more, got -1.0 (")


@pytest.mark.parametrize(
    "script, line, expected",
    [
        (sample_c2i, "--gpt-ckpt a.pt --top-k -1 --top-p 0 --cfg-scale 0.5", {"top_k": -1, "top_p": 0.0, "cfg_scale": 0.5}),
        (sample_c2i, "--top-p 1.5 --cfg-interval -1 --temp 0.9", {"top_p": 1.5, "cfg_interval": -1.0, "temperature": 0.9}),
        (sample_c2i, "--gpt-m GPT-L --image 256 --spe 3 --ar 4", {"gpt_model": "GPT-L", "image_size": 256, "ar_token_num": 4}),
        (sample_c2i, "--rescale-rope --top-k 5", {"top_k": 5}),
        (sample_t2i, "--cfg 7 --no-left --t5-path t5", {"cfg_scale": 7.0, "no_left_padding": True, "t5_path": "t5"}),
        (train_c2i, "--code c --max-grad-norm 0 --epoch 30 --grad 2", {"epochs": 30, "gradient_accumulation_steps": 2}),
        (train_c2i, "--code c --cloud /x --drop-path 0.1 --warmup 2 --w 0", {"warmup_epochs": 2, "weight_decay": 0.0}),
    ],
)  # fmt: skip
def test_pasted_command_lines_parse_as_published(script, line, expected):
    args = vars(script.flags().parse_args(line.split()))
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("value", ["-1e-4", "-.5", "-inf", "-1E3", ""])
def test_number_negative_or_empty_is_refused_by_its_range(value, capsys):
    with pytest.raises(SystemExit):
        train_c2i.flags().parse_args(["--code-path", "codes", "--lr", value])
    said = capsys.readouterr().err
    assert said.startswith("error: --lr must be ") and ("got -" if value else "got nothing") in said


def test_lost_process_ends_a_script_with_one_line(capsys, monkeypatch):
    def main(args):
        raise RuntimeError("[/gloo/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer. ...")

    monkeypatch.setattr("utils.cli.time.sleep", lambda seconds: None)
    monkeypatch.setattr("sys.argv", ["script"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended:
        run_script(main, argparse.ArgumentParser())
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.startswith("error: process 1 lost the others") and said.count("\n") == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError):
        run_script(main, argparse.ArgumentParser())


def test_abbreviations_of_flags_that_were_not_published_are_refused():
    with pytest.raises(SystemExit):
        train_c2i.flags().parse_args(["--code-path", "codes", "--keep", "3"])


@pytest.mark.parametrize(
    "error, rank, waits, told",
    [
        (ValueError, "0", False, True), (ValueError, "1", True, True), (AgreedError, "0", False, True),
        (AgreedError, "1", True, False), (RuntimeError, "0", True, False), (RuntimeError, "1", True, False),
    ],
)  # fmt: skip
def test_run_script_error_of_all_processes_is_told_by_the_first(error, rank, waits, told, monkeypatch, capsys):
    def fail(args):
        raise error("no such codes")

    slept = []
    monkeypatch.setattr("utils.cli.time.sleep", slept.append)
    monkeypatch.setattr("sys.argv", ["script"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(RuntimeError if error is RuntimeError else SystemExit):
        run_script(fail, argparse.ArgumentParser())
    assert (len(slept) == 1, capsys.readouterr().err == "error: no such codes\n") == (waits, told)
