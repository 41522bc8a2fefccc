"""Sampling from prompts as it is called: grids, tables of prompts, runs that go on, several processes, flags, mistakes."""

import json
import os
import re
import shlex
import shutil
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.build import build_gpt
from autoregressive.models.gpt import GPT_models
from autoregressive.pipeline import ImagePipeline
from autoregressive.sample import sample_t2i, sample_t2i_ddp
from autoregressive.sample.text import text_settings
from language import extract_t5_feature
from language.t5 import T5Embedder, encoder_identity
from tests.helpers import ROOT, randomize
from tests.language.small_t5 import SENTENCES, make_small_t5
from tests.training import check_published_flags, live, run_here
from utils.checkpoint import save_checkpoint
from utils.cli import run_script

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*fill all .* text tokens"),
    pytest.mark.slow,
]

SCRIPTS = [sample_t2i, sample_t2i_ddp]
ROWS, WIDTH = 16, 32  # text tokens, and the numbers of a feature of the small T5
SMALL = {
    "--gpt-model": "GPT-XS", "--vq-model": "VQ-4", "--codebook-size": 64, "--image-size": 16, "--downsample-size": 4,
    "--cls-token-num": 16, "--t5-model-type": "small", "--t5-feature-max-len": 16, "--t5-feature-dim": 32,
    "--precision": "none", "--device": "cpu", "--top-k": 50,
}  # fmt: skip
NAME = "GPT-XS-t2i-prompts-size-16-size-16-VQ-4-topk-50-topp-1.0-temperature-1.0-cfg-7.5-seed-0"
PROMPTS = [
    "a red lantern",
    "two cats sleep",
    'a sign that says "no\tcats",\nold',
    "a map of sushi",
    "a red lantern",
    "fog",
]
TABLE = (
    "Category\tPrompt\tNote\n"
    "1\ta red lantern\t\n2\ttwo cats sleep\tx\n"
    '3\t"a sign that says ""no\tcats"",\nold"\ty\n'
    "4\ta map of sushi\t\n\n5\ta red lantern\tz\n6\tfog\t\n"
)


@dataclass(frozen=True)
class TextFiles:
    """A small T5 in t5/small, a GPT of its features and the tokenizer, and a table of six prompts."""

    folder: Path
    t5: Path  # of T5 folders
    gpt: Path
    table: Path


@pytest.fixture(scope="module")
def text_files(small_files, tmp_path_factory) -> TextFiles:
    """Read-only."""
    folder = tmp_path_factory.mktemp("text")
    make_small_t5(folder / "t5" / "small", dim=WIDTH)
    shape = {"vocab_size": 64, "block_size": 16, "cls_token_num": ROWS, "caption_dim": WIDTH, "model_type": "t2i"}
    gpt = randomize(GPT_models["GPT-XS"](**shape), seed=4).state_dict()
    args = Namespace(gpt_model="GPT-XS", gpt_type="t2i", image_size=16, downsample_size=4)
    torch.save({"model": gpt, "optimizer": {}, "steps": 7, "args": args}, folder / "t2i.pt")
    (folder / "vq.pt").write_bytes(small_files.vq.read_bytes())
    (folder / "prompts.tsv").write_text(TABLE)
    return TextFiles(folder, folder / "t5", folder / "t2i.pt", folder / "prompts.tsv")


def line(files, *more) -> list:
    """The flags that fit the small files. Later ones win."""
    small = [word for pair in SMALL.items() for word in pair]
    return [*small, "--gpt-ckpt", files.gpt, "--vq-ckpt", files.folder / "vq.pt", "--t5-path", files.t5, *more]


def ddp_line(files, folder, *more) -> list:
    return line(files, "--sample-dir", folder, "--prompt-csv", files.table, "--per-proc-batch-size", 2, "--npz", *more)


def contents(folder: Path) -> dict[str, bytes]:
    """Files by their place in the folder; the paths in result.jsonl from images/ on."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: re.sub(rb'(?<="image_path": ")[^"]*/(?=images/)', b"", content) for name, content in files.items()}


def by_pipeline(files, prompts, text=None, **settings) -> np.ndarray:
    pipeline = ImagePipeline.from_pretrained(
        files.folder, gpt="t2i.pt", vq="vq.pt", device="cpu", t5_path=files.t5, t5_model_type="small", **(text or {})
    )
    return np.stack(pipeline(prompts, progress=False, **{"cfg_scale": 7.5, "top_k": 50, **settings}))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def drawn(text_files, tmp_path_factory) -> Path:
    """The table's six images by sample_t2i_ddp.py in this process. Read-only."""
    folder = tmp_path_factory.mktemp("drawn")
    with pytest.warns(UserWarning, match="join several lines into one row"):
        run_here(sample_t2i_ddp, *ddp_line(text_files, folder))
    return folder


# A grid


@pytest.mark.slow
def test_grid(text_files, tmp_path, capsys):
    """Prompts of the command line, then those of the file; an image is that of its prompt alone."""
    (tmp_path / "more.txt").write_text("\ntwo cats sleep\r\n\n  a map of sushi \n")
    output = tmp_path / "new" / "grid.png"
    words = ["--prompt", "fog", "--prompt", "a red\tlantern", "--prompt-file", tmp_path / "more.txt"]
    run_here(sample_t2i, *line(text_files, *words, "--columns", 3, "--seed", 5, "--output", output))
    grid = pixels(output)
    assert grid.shape == (2 * 18 + 2, 3 * 18 + 2, 3)
    prompts = ["fog", "a red\tlantern", "two cats sleep", "a map of sushi"]
    for i, prompt in enumerate(prompts):
        y, x = (i // 3) * 18 + 2, (i % 3) * 18 + 2
        assert np.array_equal(grid[y : y + 16, x : x + 16], by_pipeline(text_files, [prompt], seed=5, indices=[i])[0])
    shown = capsys.readouterr().out
    assert "4 images of 16x16" in shown and "1: a red lantern" in shown and "3: a map of sushi" in shown


def test_rectangles_by_a_control_image_are_those_of_the_pipeline(text_files, tmp_path):
    control = {"encoder": "vit", "width": 16, "layers": 1, "heads": 2, "positions": 4, "patch": 4, "pixels": 4}
    shape = {"vocab_size": 64, "block_size": 16, "cls_token_num": ROWS, "caption_dim": WIDTH, "model_type": "t2i"}
    picture = tmp_path / "map.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(picture)
    words = [
        "--prompt",
        "fog",
        "--prompt",
        "a red lantern",
        "--seed",
        5,
        "--output",
        tmp_path / "grid.png",
        "--no-names",
    ]
    words += ["--height", 8, "--width", 24]
    for name, places in (("several.pt", 4), ("one.pt", None)):
        model = build_gpt("GPT-XS", **shape, rope_grid=places, extra_conditions={"control": control})
        config = {"version": 2, **model.args.identity}
        state = randomize(model, seed=4).state_dict()
        torch.save({"model": state, "optimizer": {}, "steps": 7, "args": None, "config": config}, tmp_path / name)
    several, one = (line(text_files, "--gpt-ckpt", tmp_path / name, *words) for name in ("several.pt", "one.pt"))
    run_here(sample_t2i, *several, "--control-image", picture)
    pipeline = ImagePipeline.from_pretrained(
        tmp_path,
        gpt="several.pt",
        vq=text_files.folder / "vq.pt",
        device="cpu",
        t5_path=text_files.t5,
        t5_model_type="small",
    )
    asked = {"control_images": picture, "cfg_scale": 7.5, "top_k": 50, "seed": 5}
    drawn = pipeline.rectangles(["fog", "a red lantern"], height=8, width=24, **asked)
    grid = pixels(tmp_path / "grid.png")
    assert grid.shape == (8 + 4, 4 * 26 + 2, 3)
    assert np.array_equal(grid[2:10, 2:26], drawn[0]) and np.array_equal(grid[2:10, 28:52], drawn[1])
    for flags, message in (
        ([*one, "--control-image", picture], "height and width are for ControlAR's models of several resolutions"),
        (line(text_files, *words, "--control-image", picture), "height and width are for ControlAR's"),
        (several, "--height and --width go together, and with --control-image"),
        (line(text_files, *words[:-2], "--control-image", picture), "--height and --width go together"),
        ([*several, "--control-image", picture, "--width", 22], "give sides that are multiples of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            run_here(sample_t2i, *flags)


def test_negative_prompt_reaches_the_images_of_both_scripts(text_files, tmp_path):
    words = ["--prompt", "fog", "--negative-prompt", "a map of sushi", "--output", tmp_path / "grid.png"]
    run_here(sample_t2i, *line(text_files, *words))
    expected = by_pipeline(text_files, ["fog"], negative_prompts="a map of sushi")[0]
    assert np.array_equal(pixels(tmp_path / "grid.png")[2:18, 2:18], expected)
    words = ["--negative-prompt", "fog", "--num-fid-samples", 1, "--no-npz"]
    with pytest.warns(UserWarning, match="join several lines into one row"):
        run_here(sample_t2i_ddp, *ddp_line(text_files, tmp_path, *words))
    expected = by_pipeline(text_files, PROMPTS[:1], negative_prompts="fog")[0]
    assert np.array_equal(pixels(tmp_path / NAME / "images" / "000000.png"), expected)


def test_default_prompts(text_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_here(sample_t2i, *line(text_files))
    assert [path.name for path in tmp_path.iterdir()] == ["sample_t2i.png"]
    assert pixels(tmp_path / "sample_t2i.png").shape == (18 + 2, 4 * 18 + 2, 3)


@pytest.mark.slow
def test_flags_reach_the_model(text_files, tmp_path):
    prompt = "a red lantern hangs"
    plain = by_pipeline(text_files, [prompt])
    for words, settings in (
        (["--greedy"], {"sample_logits": False}),
        (["--cfg-scale", 1, "--temperature", 0.5, "--top-p", 0.7, "--top-k", 0],
         {"cfg_scale": 1.0, "temperature": 0.5, "top_p": 0.7, "top_k": 0}),
        (["--no-left-padding"], {"text": {"left_padding": False}}),
        (["--t5-feature-max-len", 4], {"text": {"t5_tokens": 4}}),
    ):  # fmt: skip
        run_here(sample_t2i, *line(text_files, *words, "--prompt", prompt, "--output", tmp_path / "grid.png"))
        expected = by_pipeline(text_files, [prompt], **settings)
        assert np.array_equal(pixels(tmp_path / "grid.png")[2:18, 2:18], expected[0]), words
        assert not np.array_equal(expected, plain), words


def test_precision_of_the_t5(text_files):
    """That of the GPT, or one of its own."""
    for words, dtype in (([], torch.float32), (["--precision", "bf16"], torch.bfloat16)):
        args = sample_t2i.flags().parse_args([*map(str, line(text_files, *words))])
        assert text_settings(args)["t5_dtype"] == dtype
        args.t5_precision = "fp16"
        assert text_settings(args)["t5_dtype"] == torch.float16


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*join several lines")
def test_released_names(text_files, tmp_path, monkeypatch):
    """As the published command lines name files, with small ones in their places; the T5 in its default place."""
    home = tmp_path / "pretrained_models"
    (home / "t5-ckpt").mkdir(parents=True)
    (home / "t5-ckpt" / "flan-t5-xl").symlink_to(text_files.t5 / "small")
    (home / "vq_ds16_t2i.pt").symlink_to(text_files.folder / "vq.pt")
    (home / "t2i_XL_stage1_256.pt").symlink_to(text_files.gpt)
    monkeypatch.chdir(tmp_path)
    words = ["--gpt-ckpt", "./pretrained_models/t2i_XL_stage1_256.pt"]
    words += ["--vq-ckpt", "./pretrained_models/vq_ds16_t2i.pt"]
    small = [word for flag, value in SMALL.items() if flag != "--t5-model-type" for word in (flag, value)]
    run_here(sample_t2i, *small, *words, "--prompt", "fog")
    assert np.array_equal(pixels(tmp_path / "sample_t2i.png")[2:18, 2:18], by_pipeline(text_files, ["fog"])[0])
    run_here(sample_t2i_ddp, *small, *words, "--prompt-csv", text_files.table, "--num-fid-samples", 2)
    assert len(list((tmp_path / "samples_parti" / NAME.replace("t2i", "t2i_XL_stage1_256")).glob("images/*.png"))) == 2


# An image for each prompt of a table


def test_images_captions_and_npz(text_files, drawn):
    assert {path.name for path in drawn.iterdir()} == {NAME, f"{NAME}.npz"}
    folder = drawn / NAME
    assert {path.name for path in folder.iterdir()} == {"images", "captions.txt", "result.jsonl", "settings.json"}
    names = sorted(path.name for path in (folder / "images").iterdir())
    assert names == [f"{i:06d}.png" for i in range(6)]
    images = np.stack([pixels(folder / "images" / name) for name in names])
    assert np.array_equal(images, by_pipeline(text_files, PROMPTS))
    for i in (2, 5):
        assert np.array_equal(images[i], by_pipeline(text_files, [PROMPTS[i]], indices=[i])[0])
    assert len({image.tobytes() for image in images}) == 6, "a prompt that comes twice gives two images"
    captions = (folder / "captions.txt").read_text().split("\n")
    assert captions == ["a red lantern", "two cats sleep", 'a sign that says "no cats", old', *PROMPTS[3:], ""]
    lines = [json.loads(text) for text in (folder / "result.jsonl").read_text().splitlines()]
    paths = [str(folder / "images" / name) for name in names]
    assert lines == [{"text": text, "image_path": path} for text, path in zip(PROMPTS, paths, strict=True)]
    with np.load(drawn / f"{NAME}.npz") as data:
        assert np.array_equal(data["arr_0"], images) and data["arr_1"].tolist() == list(range(6))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*join several lines")
def test_an_interrupted_run_goes_on(text_files, drawn, tmp_path, capsys):
    """Missing and half-written images are drawn again, in other batches, and nothing else; then more, then fewer."""
    expected = contents(drawn)
    for name, content in expected.items():
        if not name.endswith(("000001.png", "000004.png", "txt", "jsonl", "npz")):
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / name).write_bytes(content[:-5] if name.endswith("000002.png") else content)
    images = tmp_path / NAME / "images"
    before = {name: (images / name).stat().st_mtime_ns for name in ("000000.png", "000003.png")}
    run_here(sample_t2i_ddp, *ddp_line(text_files, tmp_path, "--per-proc-batch-size", 3))
    assert "3 of 6 images are there, 3 to draw" in capsys.readouterr().out
    assert contents(tmp_path) == expected
    assert before == {name: (images / name).stat().st_mtime_ns for name in before}

    fewer = tmp_path / "fewer"
    run_here(sample_t2i_ddp, *ddp_line(text_files, fewer, "--num-fid-samples", 2, "--no-npz"))
    assert sorted(path.name for path in (fewer / NAME / "images").iterdir()) == ["000000.png", "000001.png"]
    assert (fewer / NAME / "captions.txt").read_text() == "a red lantern\ntwo cats sleep\n"
    run_here(sample_t2i_ddp, *ddp_line(text_files, fewer, "--num-fid-samples", 30000))
    assert contents(fewer) == expected
    run_here(sample_t2i_ddp, *ddp_line(text_files, fewer, "--num-fid-samples", 4))
    assert contents(fewer / NAME) == contents(drawn / NAME), "every image in the folder keeps its caption"
    assert np.load(fewer / f"{NAME}.npz")["arr_0"].shape[0] == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*join several lines")
def test_sample_t2i_ddp_in_a_folder_of_the_first_edition_renames_it_and_goes_on(text_files, drawn, tmp_path, capsys):
    earlier = tmp_path / NAME.replace("-prompts", "")
    shutil.copytree(drawn / NAME, earlier)
    run_here(sample_t2i_ddp, *ddp_line(text_files, tmp_path, "--top-p", 0.5, "--num-fid-samples", 1))
    assert earlier.exists(), "its name tells other settings"
    for words in (["--t5-precision", "bf16"], []):
        run_here(sample_t2i_ddp, *ddp_line(text_files, tmp_path, "--no-npz", *words, "--num-fid-samples", 1))
        assert earlier.exists() == bool(words), "its record tells other settings"
        shutil.rmtree(tmp_path / NAME) if words else None
    assert contents(tmp_path / NAME) == contents(drawn / NAME)
    assert f"named {NAME} now" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*join several lines")
def test_nothing_is_encoded_where_nothing_is_missing(text_files, drawn, monkeypatch, capsys):
    def refuse(*_args, **_settings):
        raise AssertionError("a text encoder was asked for")

    monkeypatch.setattr(ImagePipeline, "encode", refuse)
    before = contents(drawn)
    run_here(sample_t2i_ddp, *ddp_line(text_files, drawn))
    assert contents(drawn) == before and "6 of 6 images are there, 0 to draw" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*join several lines")
def test_a_folder_of_other_settings_is_refused(text_files, drawn, tmp_path):
    """Those that the folder's name does not tell: among them other prompts and another T5."""
    (tmp_path / "prompts.csv").write_text(TABLE.replace("fog", "smog"))
    make_small_t5(tmp_path / "small", dim=WIDTH, layers=1)
    before = contents(drawn)
    for words, key in (
        (["--prompt-csv", tmp_path / "prompts.csv"], "prompts: "),
        (["--t5-path", tmp_path], "t5: "),
        (["--t5-precision", "bf16"], "t5_precision: none, now bf16"),
        (["--no-left-padding"], "no_left_padding: False, now True"),
        (["--t5-feature-max-len", 8], "t5_feature_max_len: 16, now 8"),
    ):
        with pytest.raises(ValueError, match=rf"seed-0 holds images drawn with other settings \({key}"):
            run_here(sample_t2i_ddp, *ddp_line(text_files, drawn, *words))
    assert contents(drawn) == before
    # The same prompts in another file, and other names for the same T5.
    (tmp_path / "Prompts.v2.tsv").write_text(TABLE.replace("\tz\n", "\tanother note\n"))
    same = ["--prompt-csv", tmp_path / "Prompts.v2.tsv", "--t5-path", text_files.t5 / "small", "--num-classes", 7]
    run_here(sample_t2i_ddp, *ddp_line(text_files, drawn, *same))
    assert contents(drawn) == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*join several lines")
def test_a_run_that_is_killed_goes_on(text_files, drawn, tmp_path):
    """Two processes, killed at the first image; finished by one."""
    words = ddp_line(text_files, tmp_path / "samples", "--per-proc-batch-size", 1)
    folder = tmp_path / "samples" / NAME
    life = {"module": sample_t2i_ddp.__name__, "args": list(map(str, words)), "world": 2}
    life["imports"] = ["transformers.models.t5.modeling_t5"]
    assert "life: killed" in live({**life, "kill_at": str(folder / "images" / "*.png")})
    assert 1 <= len(list((folder / "images").glob("[0-9]*.png"))) < 6 and not (folder / "captions.txt").exists()
    run_here(sample_t2i_ddp, *words)
    left = contents(tmp_path / "samples")
    assert {name: content for name, content in left.items() if not name.endswith(".tmp")} == contents(drawn)


# Prompts that T5 cuts or does not know


@pytest.mark.slow
def test_long_prompts_and_other_scripts(text_files, tmp_path):
    """Ten thousand characters count as far as they are read, and that is told; letters the T5 does not know are none."""
    long = "a red lantern " * 714
    (tmp_path / "prompts.tsv").write_text(f"Prompt\nfog\n{long}\n{long}fog\nネコ\nкот\n")
    words = ddp_line(text_files, tmp_path, "--prompt-csv", tmp_path / "prompts.tsv")
    with pytest.warns(UserWarning, match="2 of 5 prompts fill all 16 text tokens"):
        run_here(sample_t2i_ddp, *words)
    assert len(list((tmp_path / NAME / "images").iterdir())) == 5
    with pytest.warns(UserWarning, match="fill all 16 text tokens"):
        shorter = by_pipeline(text_files, ["a red lantern " * 30], indices=[1])
    assert np.array_equal(pixels(tmp_path / NAME / "images" / "000001.png"), shorter[0])


# Flags

T2I = """
`--t5-path` str = pretrained_models/t5-ckpt; `--t5-model-type` str = flan-t5-xl; `--t5-feature-max-len` int = 120;
`--t5-feature-dim` int = 2048; `--no-left-padding` switch = off; `--gpt-ckpt` str = None;
`--gpt-model` str ∈ [GPT-B, GPT-L, GPT-XL, GPT-XXL, GPT-XXXL, GPT-1B, GPT-3B, GPT-7B] = GPT-XL;
`--gpt-type` str ∈ [c2i, t2i] = t2i; `--cls-token-num` int = 120; `--precision` str ∈ [none, fp16, bf16] = bf16;
`--compile` switch = off; `--vq-model` str ∈ [VQ-8, VQ-16] = VQ-16; `--vq-ckpt` str = None;
`--codebook-size` int = 16384; `--codebook-embed-dim` int = 8; `--image-size` int ∈ [256, 384, 512] = 512;
`--downsample-size` int ∈ [8, 16] = 16; `--num-classes` int = 1000; `--cfg-scale` float = 7.5;
`--top-k` int = 1000; `--temperature` float = 1.0; `--top-p` float = 1.0
"""
DDP = """
`--prompt-csv` str = evaluations/t2i/PartiPrompts.tsv; `--sample-dir` str = samples_parti;
`--per-proc-batch-size` int = 32; `--num-fid-samples` int = 30000; `--global-seed` int = 0
"""


@pytest.mark.parametrize(
    "script, text", [(sample_t2i, f"{T2I}; `--seed` int = 0"), (sample_t2i_ddp, f"{T2I};{DDP}")], ids=["t2i", "ddp"]
)
def test_published_flags(script, text):
    check_published_flags(script, text)


@pytest.mark.parametrize(
    "name, prompts, folder",
    [("coco", "evaluations/t2i/coco_captions.csv", "samples_coco"),
     ("parti", "evaluations/t2i/PartiPrompts.tsv", "samples_parti")],
)  # fmt: skip
def test_wrappers(name, prompts, folder):
    """Each starts the script with its own table and folder; a user's flags come later and win."""
    path = ROOT / f"scripts/autoregressive/sample_t2i_{name}.sh"
    assert os.access(path, os.X_OK)
    launch = re.search(r'^launch (.*) "\$@"$', path.read_text(), re.MULTILINE)[1]
    script, *words = shlex.split(launch)
    assert script == "autoregressive/sample/sample_t2i_ddp.py"
    args = sample_t2i_ddp.flags().parse_args(words)
    assert (args.prompt_csv, args.sample_dir) == (prompts, folder)
    assert sample_t2i_ddp.flags().parse_args([*words, "--prompt-csv", "own.tsv"]).prompt_csv == "own.tsv"


# A user's mistakes


def fails(script, words, capsys, monkeypatch, lines: int = 1) -> str:
    """The one line that the script ends with, or several."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        run_script(script.main, script.flags())
    captured = capsys.readouterr()
    assert ended.value.code == 1
    assert captured.err.startswith("error: ") and captured.err.count("\n") == lines and len(captured.err) < 700
    return captured.err


MISTAKES = {
    "no T5": (["--t5-path", "nowhere"], r"nowhere"),
    "no GPT": (["--gpt-ckpt", "gone.pt"], r"no file gone\.pt"),
    "a class-conditional GPT": (["--gpt-ckpt", "CLASSES"], r"--gpt-type t2i \(file: c2i\)"),
    "classes": (["--gpt-type", "c2i"], r"for classes there is sample_c2i"),
    "condition rows": (["--cls-token-num", 120], r"--cls-token-num 120 \(file: 16\).*Use: .*--cls-token-num 16"),
    "width": (["--t5-feature-dim", 2048], r"takes text features of 32 numbers: pass --t5-feature-dim 32"),
    "text tokens": (["--t5-feature-max-len", 17], r"17 text tokens for a GPT with 16 condition rows"),
    "another size": (["--image-size", 32], r"--image-size 32 \(file: 16\)"),
    "top-p": (["--top-p", -1], r"--top-p must be 0"),
    "device of the T5": (["--t5-device", "nonsense"], r"--device nonsense is not a device"),
}  # fmt: skip


@pytest.mark.parametrize(
    "number, words, message", [(i, *mistake) for i, mistake in enumerate(MISTAKES.values())], ids=MISTAKES
)
def test_mistakes(number, words, message, text_files, small_files, tmp_path, capsys, monkeypatch):
    script = SCRIPTS[number % 2]  # what both refuse is in one place
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.tsv").write_text("Prompt\nfog\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = [small_files.gpt if word == "CLASSES" else word for word in words]
    given = ["--prompt-csv", "prompts.tsv"] if script is sample_t2i_ddp else ["--prompt", "fog"]
    error = fails(script, line(text_files, *given, *words), capsys, monkeypatch)
    assert re.search(message, error), error
    assert set(contents(tmp_path)) == {"prompts.tsv"}, "nothing was written"


def test_a_missing_t5_is_told_with_its_command(text_files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("utils.hub._ROOT", tmp_path)
    words = line(text_files, "--t5-path", "nowhere", "--t5-model-type", "flan-t5-xl", "--prompt", "fog")
    error = fails(sample_t2i, words, capsys, monkeypatch, lines=2)
    assert "hf download google/flan-t5-xl --local-dir nowhere/flan-t5-xl" in error and "pretrained_models" not in error


@pytest.fixture
def recorded(text_files, tmp_path, monkeypatch) -> Path:
    """A run whose GPT records its text encoder, which lies beside it, and another T5; returns the folder of T5 folders."""
    own = make_small_t5(tmp_path / "t5" / "small", dim=WIDTH)
    make_small_t5(tmp_path / "t5" / "another", dim=WIDTH, sentences=SENTENCES[-2:])
    made = torch.load(text_files.gpt, weights_only=False)
    config = {"text_encoder": encoder_identity(T5Embedder("cpu", own))}
    save_checkpoint(tmp_path / "results/000-GPT-XS/checkpoints/0000007.pt", {**made, "config": config})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.hub._ROOT", tmp_path)
    return tmp_path / "t5"


def without_t5(files, *more) -> list:
    words = line(files, "--gpt-ckpt", "results", "--prompt", "fog", *more)
    for flag in ("--t5-path", "--t5-model-type"):
        del words[words.index(flag) : words.index(flag) + 2]
    return words


def test_sample_t2i_without_t5_path_finds_the_encoder_that_the_run_records(text_files, recorded, capsys):
    run_here(sample_t2i, *without_t5(text_files, "--output", "found.png"))
    assert f"--t5-path {recorded / 'small'}: the text encoder" in capsys.readouterr().out
    run_here(sample_t2i, *line(text_files, "--gpt-ckpt", "results", "--prompt", "fog", "--output", "named.png"))
    assert Path("found.png").read_bytes() == Path("named.png").read_bytes()
    pipeline = ImagePipeline.from_pretrained("results", vq=text_files.folder / "vq.pt")
    assert (pipeline.t5_path, pipeline.t5_model_type) == (recorded, "small")


def test_sample_t2i_with_an_encoder_that_the_run_does_not_record_refuses(text_files, recorded, capsys, monkeypatch):
    words = without_t5(text_files, "--t5-path", recorded / "another")
    assert "the GPT was trained with text encoder" in fails(sample_t2i, words, capsys, monkeypatch)
    shutil.rmtree(recorded / "small")
    assert "give --t5-path" in fails(sample_t2i, without_t5(text_files), capsys, monkeypatch)


def test_prompts_of_which_cleaning_leaves_nothing(text_files, tmp_path, capsys, monkeypatch):
    """Before anything is loaded, and told with what is left out."""
    prompt = "https://example.com/a"
    (tmp_path / "prompts.tsv").write_text(f"Prompt\nfog\n{prompt}\n")
    words = ["--gpt-ckpt", "gone.pt"]
    for script, given in (
        (sample_t2i, ["--prompt", "fog", "--prompt", prompt]),
        (sample_t2i_ddp, ["--prompt-csv", tmp_path / "prompts.tsv", "--sample-dir", tmp_path / "samples"]),
    ):
        error = fails(script, line(text_files, *given, *words), capsys, monkeypatch)
        assert f"prompt 1 (from 0), '{prompt}', is blank once it is cleaned" in error and "web addresses" in error
    assert set(contents(tmp_path)) == {"prompts.tsv"}


# Features in the place of the T5


def extracted(files, prompts, folder, *more) -> Path:
    words = ["--precision", "none", "--num-workers", 0, "--device", "cpu", "--t5-model-path", files.t5]
    run_here(extract_t5_feature, *words, "--t5-model-type", "small", "--data-path", prompts, "--t5-path", folder, *more)
    return folder


def refuse_t5(monkeypatch) -> None:
    """Makes looking for a T5 a failure."""

    def refuse(*_args, **_settings):
        raise AssertionError("a T5 was asked for")

    monkeypatch.setattr("language.t5.T5Embedder.__init__", refuse)
    monkeypatch.setattr("language.t5.find_t5", refuse)


@pytest.mark.filterwarnings("ignore:.*join several lines")
@pytest.mark.parametrize("more", [[], ["--published-layout"]], ids=["packed", "published"])
def test_features_in_the_place_of_the_t5(text_files, drawn, tmp_path, monkeypatch, more):
    """The images are those that the T5 gives in the same precision, of a long prompt too where it was cut alike."""
    monkeypatch.setattr("language.extraction.MAX_LENGTH", ROWS)
    features = extracted(text_files, text_files.table, tmp_path / "features", *more)
    refuse_t5(monkeypatch)
    folder = tmp_path / "samples"
    words = ddp_line(text_files, folder, "--t5-feat-path", features, "--t5-path", "nowhere")
    run_here(sample_t2i_ddp, *words, "--num-fid-samples", 4)
    run_here(sample_t2i_ddp, *words)  # goes on with what is missing
    expected = contents(drawn)
    assert contents(folder).keys() == expected.keys()
    for name, content in contents(folder).items():
        assert content == expected[name] or name.endswith("settings.json"), name
    settings = json.loads((folder / NAME / "settings.json").read_text())
    assert settings["t5"] is None and settings["t5_features"]["file"] == str(features / "prompts")
    assert len(settings["t5_features"]["content"]) == 16


@pytest.mark.filterwarnings("ignore:.*join several lines", "ignore:.*have more than 16 rows")
def test_folders_of_the_t5_and_of_features_are_not_mixed(text_files, drawn, tmp_path):
    features = extracted(text_files, text_files.table, tmp_path / "features")
    with pytest.raises(ValueError, match=r"holds images drawn with other settings \(t5: "):
        run_here(sample_t2i_ddp, *ddp_line(text_files, drawn, "--t5-feat-path", features))
    folder = tmp_path / "samples"
    run_here(sample_t2i_ddp, *ddp_line(text_files, folder, "--t5-feat-path", features))
    with pytest.raises(ValueError, match=r"holds images drawn with other settings \(t5: None"):
        run_here(sample_t2i_ddp, *ddp_line(text_files, folder))
    other = extracted(text_files, text_files.table, tmp_path / "other", "--precision", "bf16")
    with pytest.raises(ValueError, match=r"holds images drawn with other settings \(t5_features: "):
        run_here(sample_t2i_ddp, *ddp_line(text_files, folder, "--t5-feat-path", other))


def test_a_grid_from_features(text_files, tmp_path, monkeypatch):
    prompts = tmp_path / "own.txt"
    prompts.write_text("fog\na red lantern\n")
    features = extracted(text_files, prompts, tmp_path / "features")
    expected = by_pipeline(text_files, ["fog", "a red lantern"])
    refuse_t5(monkeypatch)
    words = ["--t5-feat-path", features, "--prompt-file", prompts, "--output", tmp_path / "grid.png"]
    run_here(sample_t2i, *line(text_files, *words))
    grid = pixels(tmp_path / "grid.png")
    for i in range(2):
        assert np.array_equal(grid[2:18, 18 * i + 2 : 18 * i + 18], expected[i])
    with pytest.warns(UserWarning, match=r"1 of 2 features have more than 6 rows.*: \d+ of image 1$"):
        run_here(sample_t2i, *line(text_files, *words, "--t5-feature-max-len", 6))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--prompt", "fog"], "has features of a file's prompts: give that file as --prompt-file, and no --prompt"),
        ([], "has features of a file's prompts: give that file as --prompt-file"),
        (["--prompt-file", "others.txt"], "has no features of others.txt: a folder others/ is looked for"),
        (["--prompt-file", "more/own.txt"], "has features of 2 prompts and more/own.txt has 3"),
        (["--prompt-file", "own.txt", "--t5-feat-path", "gone"], "the folder of text features gone does not exist"),
        (["--prompt-file", "own.txt", "--negative-prompt", "fog"], "--negative-prompt needs a T5"),
        (["--prompt-file", "own.txt", "--t5-feature-dim", 64], "of width 32, but 64 are needed"),
    ],
)
def test_features_that_do_not_fit(words, message, text_files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, lines in {"own": 2, "others": 2, "more/own": 3}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text("a red lantern\n" * lines)
    extracted(text_files, "own.txt", tmp_path / "features")
    capsys.readouterr()
    given = line(text_files, "--t5-feat-path", "features", *words)
    assert message in fails(sample_t2i, given, capsys, monkeypatch)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("wrapper", ["coco", "parti"])
def test_tables_that_are_not_shipped(wrapper, text_files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch = (ROOT / f"scripts/autoregressive/sample_t2i_{wrapper}.sh").read_text().splitlines()[-1]
    error = fails(sample_t2i_ddp, line(text_files, *shlex.split(launch)[2:-1]), capsys, monkeypatch)
    assert "no file of prompts at evaluations/t2i/" in error and "a column named Prompt" in error
    assert "https://github.com/google-research/parti" in error and not list(tmp_path.iterdir())
