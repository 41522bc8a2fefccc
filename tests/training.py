"""What the tests of the training scripts share: small data, and runs of a script in this process or in others."""

import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset.augmentation import FLIP_VIEWS, TEN_CROP_VIEWS
from dataset.code_files import CodeSettings, CodeWriter
from tests import forkserver
from tests.helpers import ROOT
from utils.cli import LLAMAGEN_FLAGS


def command(module: str, *args: object, processes: int = 1) -> list[str]:
    """The command line that runs a script (named as a module), by tests/launch.py where there are several processes."""
    launch = [sys.executable]
    if processes > 1:
        launch += [str(ROOT / "tests/launch.py"), str(processes)]
    return [*launch, str(ROOT / (module.replace(".", "/") + ".py")), *map(str, args)]


def environment(**more: str) -> dict[str, str]:
    """One thread a process: two processes then add up in the same order as two threads would not."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def run_script(module: str, *args: object, processes: int = 1, fails: bool = False, **env: str) -> str:
    """Runs a script to its end and returns what it printed; it has to succeed, or with `fails` to end with code 1."""
    done = forkserver.run(
        command(module, *args, processes=processes), env=environment(**env), capture_output=True, text=True, timeout=600
    )
    output = done.stdout + done.stderr
    assert (done.returncode == 1) if fails else (done.returncode == 0), output
    return output


def live(*lives: dict, timeout: float = 280) -> str:
    """Runs lives one after another, as tests/processes.py reads them; returns what they printed."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as plan:
        json.dump(lives, plan)
        plan.flush()
        words = [sys.executable, str(ROOT / "tests/processes.py"), plan.name]
        done = forkserver.run(words, env=environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def run_here(script, *args: object) -> None:
    """Runs a script's main in this process, where starting Python and torch costs nothing."""
    with quiet_loggers():
        script.main(script.flags().parse_args([str(a) for a in args]))


@contextmanager
def quiet_loggers() -> Iterator[None]:
    """Leaves the loggers that a run sets up as they were, and computes on one thread."""
    loggers = [logging.getLogger(name) for name in ("run", "dataset")]
    before = [(logger.propagate, logger.level, logger.handlers[:]) for logger in loggers]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for logger, (propagate, level, handlers) in zip(loggers, before, strict=True):
            logger.propagate, logger.handlers = propagate, handlers
            logger.setLevel(level)


def run_folder(results: Path, number: int = 0) -> Path:
    """A run's folder in a results folder."""
    (folder,) = results.glob(f"{number:03d}-*")
    return folder


def metrics(results: Path, name: str | None = None, number: int = 0) -> list:
    """The lines of metrics.jsonl, or one figure of those that have it as {step: value}."""
    lines = [json.loads(line) for line in (run_folder(results, number) / "metrics.jsonl").read_text().splitlines()]
    return lines if name is None else {line["step"]: line[name] for line in lines if name in line}


def load(path: Path) -> dict:
    """A checkpoint file's entries as they are."""
    return torch.load(path, weights_only=False)


def same(a, b) -> bool:
    """Whether two trees of tensors and plain values are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def flag_defaults(script) -> dict[str, object]:
    """A script's flags with their defaults; "required" for those that have to be given."""
    return {
        flag: "required" if action.required else action.default
        for action in script.flags()._actions
        for flag in action.option_strings
    }


def make_images(folder: Path, classes: int = 2, per_class: int = 4, size: int = 40, seed: int = 0) -> Path:
    """Class folders of PNG files of smooth random colours."""
    generator = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(per_class):
            small = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            small.resize((size + 8 * (i % 2), size), Image.Resampling.BICUBIC).save(
                folder / f"class{label}" / f"{i}.png"
            )
    return folder


def repetitive_codes(count: int, views: int, tokens: int, vocab: int) -> np.ndarray:
    """Codes that are easily learned, int64 (count, views, tokens): each counts up from a start of its own."""
    start = np.arange(count * views).reshape(count, views, 1) * 5
    return (start + np.arange(tokens)) % vocab


def make_codes(
    folder: Path, codes: np.ndarray, labels: np.ndarray, *, image_size: int, vocab: int, classes: int
) -> Path:
    """A folder of packed codes (n, views, tokens)."""
    views = TEN_CROP_VIEWS if codes.shape[1] == 10 else FLIP_VIEWS[: codes.shape[1]]
    settings = CodeSettings(
        dataset="imagenet",
        image_size=image_size,
        tokens=codes.shape[2],
        views=views,
        codebook_size=vocab,
        num_images=len(codes),
        num_classes=classes,
        shard_size=16,
    )
    writer = CodeWriter(folder, settings)
    for shard in range(settings.num_shards):
        images = np.asarray(settings.images_of(shard))
        writer.write_shard(shard, codes[images], labels[images], images)
    return folder


def published_flags(text: str) -> dict[str, tuple[str, list[str], str]]:
    """Reads "`--lr` float = 0.1; `--kind` str ∈ [a, b] = a; `--quick` switch = off" as {flag: (kind, choices, default)}."""
    found = {}
    for item in filter(None, (item.strip() for item in text.replace("\n", " ").split(";"))):
        flag, kind, choices, default = re.fullmatch(
            r"`(--[\w-]+)` (str|int|float|switch)(?: ∈ \[(.*?)\])? = (.+)", item
        ).groups()
        found[flag] = kind, choices.split(", ") if choices else [], default
    return found


def check_abbreviations(parser, published: list[str]) -> None:
    """Check that every abbreviation that is unique in a published script means the same flag here."""
    llamagen = [flag for flag in published if flag in LLAMAGEN_FLAGS and flag not in parser.added]
    for flag in llamagen:
        for abbreviation in (flag[:length] for length in range(3, len(flag))):
            if [other for other in llamagen if other.startswith(abbreviation)] == [flag]:
                assert [match[1] for match in parser._get_option_tuples(abbreviation)] == [flag], abbreviation


# Flags whose published default is taken where no file says more.
LEFT_TO_FILES = {
    "--num-classes": 1000, "--vocab-size": 16384, "--codebook-size": 16384, "--codebook-embed-dim": 8, "--vq-model": "VQ-16",
}  # fmt: skip


def check_published_flags(script, text: str, without_default: tuple[str, ...] = ()) -> None:
    """Every published flag is there, with its default, its kind, all of its choices and its abbreviations.

    without_default: those that are optional here, or have another default by agreement. LEFT_TO_FILES have none.
    """
    actions = {flag: action for action in script.flags()._actions for flag in action.option_strings}
    given = {"str": "x", "int": "7", "float": "0.25"}
    required = [word for flag, action in actions.items() if action.required for word in (flag, "x")]
    check_abbreviations(script.flags(), [*published_flags(text)])
    for flag, (kind, choices, default) in published_flags(text).items():
        action = actions[flag]
        if flag in LEFT_TO_FILES:
            assert action.default in (None, LEFT_TO_FILES[flag]), flag
        elif flag not in without_default:
            expected = {"required": None, "None": None, "–": False, "off": False, "on": True}.get(default, default)
            convert = {"int": int, "float": float}.get(kind, str)
            expected = convert(expected) if isinstance(expected, str) else expected
            assert (action.default, action.required) == (expected, default == "required"), flag
        name = flag.removeprefix("--").replace("-", "_")
        if kind == "switch":
            assert vars(script.flags().parse_args([*required, flag]))[name] is True, flag
            if default == "on":
                assert vars(script.flags().parse_args([*required, f"--no-{flag[2:]}"]))[name] is False, flag
            continue
        for word in choices or [given[kind]]:
            value = vars(script.flags().parse_args([*required, flag, word]))[name]
            assert value == {"int": int, "float": float, "str": str}[kind](word), flag
