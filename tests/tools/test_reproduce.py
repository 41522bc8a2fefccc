"""scripts/reproduce.sh and sweep_guidance.sh: the rows, plans, a user's mistakes, whole runs at small size."""

import importlib
import json
import re
import shutil
import urllib.request
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.build import build_model
from autoregressive.sample import sample_c2i_ddp
from evaluations import published
from evaluations.published import REFERENCE, ROWS, find_file, find_row
from tests.helpers import GOLDEN, ROOT
from tests.training import run_here
from tokenizer.load import build_tokenizer
from tokenizer.tokenizer_image import reconstruction_vq_ddp
from tokenizer.tokenizer_image.sizes import VQ_SIZES
from tools import reproduce, steps, sweep_guidance
from tools.draw_figure import gpt_args
from utils import hub
from utils.hub import RELEASED

pytestmark = pytest.mark.slow  # through whole scripts and servers

REFERENCE_BATCH = GOLDEN / "evaluator" / "reference_batch.npz"
GRAPH = GOLDEN / "evaluator" / "standin_graph.pb"
VQ = ["--vq-model", "VQ-4", "--codebook-size", 64, "--image-size", 32, "--image-size-eval", 16, "--device", "cpu"]
SMALL = ["--gpt-model", "GPT-XS", *VQ, "--num-classes", 10, "--downsample-size", 4, "--precision", "none"]
JUDGE = ["--reference", REFERENCE_BATCH, "--graph", GRAPH]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A folder of its own, one process, no network, and no files of whoever runs the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("nproc_per_node", raising=False)
    monkeypatch.delenv("nnodes", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: pytest.fail("used the network"))
    monkeypatch.setattr(published, "WEIGHTS", "no_weights_here")
    monkeypatch.setattr(hub, "WEIGHTS", "no_weights_here")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)


def small(files) -> list:
    return ["--gpt-ckpt", files.gpt, "--vq-ckpt", files.vq, *SMALL, "--per-proc-batch-size", 4]


def row_line(files, *more) -> list:
    return ["c2i_B_256", *small(files), *JUDGE, "--num-samples", 12, *more]


@pytest.fixture
def run_quickly(monkeypatch, capsys):
    """Runs a script in this process, and its steps too: nothing is imported again."""

    def launch_here(command: list[str]) -> int:
        script = importlib.import_module(".".join(Path(command[1]).relative_to(ROOT).with_suffix("").parts))
        script.main(script.flags().parse_args(command[2:]))
        return 0

    def run_quickly(name: str, *words) -> str:
        capsys.readouterr()
        run_here({"reproduce": reproduce, "sweep_guidance": sweep_guidance}[name], *words)
        return capsys.readouterr().out

    monkeypatch.setattr(steps, "launch", launch_here)
    return run_quickly


def result(folder="results_reproduced/c2i_B_256") -> dict:
    return json.loads(Path(folder, "result.json").read_text())


def plan(capsys, *words) -> str:
    run_here(reproduce, *words, "--dry-run")
    return capsys.readouterr().out


# The rows


def test_rows_are_the_published_tables():
    figures = {
        "c2i_B_256": (5.46, 2.0), "c2i_L_256": (3.80, 2.0),
        "c2i_B_384": (6.09, 2.0), "c2i_L_384": (3.07, 2.0), "c2i_XL_384": (2.62, 1.75), "c2i_XXL_384": (2.34, 1.75),
        "c2i_3B_384": (2.18, 1.65),
        "npp_B_256": (4.47, 2.0), "npp_L_256": (2.76, 1.75), "npp_XL_256": (2.65, 1.7), "npp_XXL_256": (2.55, 1.65),
        "PAR-XL-4x": (2.61, 1.5), "PAR-XXL-4x": (2.35, 1.435), "PAR-3B-4x": (2.29, 1.345), "PAR-3B-16x": (2.88, 1.5),
        "NAR-B": (4.65, 2.0), "NAR-M": (3.27, 2.0), "NAR-L": (3.06, 2.0), "NAR-XL": (2.70, 2.0), "NAR-XXL": (2.58, 2.0),
        "CCA-B": (7.04, 1.0), "CCA-L": (3.43, 1.0), "CCA-XL": (3.10, 1.0), "CCA-XXL": (3.12, 1.0), "CCA-3B": (2.69, 1.0),
        "RAR-B": (1.95, 16.0), "RAR-L": (1.70, 15.5), "RAR-XL": (1.50, 6.9), "RAR-XXL": (1.48, 8.0),
        "LPD-L-256-20": (2.40, 4.8), "LPD-XL-256-20": (2.10, 4.9), "LPD-XXL-256-20": (2.00, 5.9), "LPD-L-256-32": (2.29, 5.4),
        "LPD-XL-256-32": (1.92, 5.0), "LPD-L-512-48": (2.54, 7.3), "LPD-XL-512-48": (2.10, 6.0),
        "vq_ds16_c2i": (2.19, None), "vq_ds16_c2i_384": (0.94, None), "vq_ds16_c2i_512": (0.70, None),
        "vq_ds8_c2i": (0.59, None),
        "ibq_1024": (2.24, None), "ibq_8192": (1.87, None), "ibq_16384": (1.37, None), "ibq_262144": (1.00, None),
        "ibq_16384_pretrain": (2.06, None), "ibq_262144_pretrain": (1.53, None), "maskgit_vqgan": (2.28, None),
        "open_magvit2_256": (1.17, None), "open_magvit2_128": (0.34, None), "open_magvit2_16384": (2.55, None),
        "open_magvit2_262144": (1.67, None),
    }  # fmt: skip
    assert {name: (row.fid, row.cfg_scale) for name, row in ROWS.items()} == figures
    assert all(name == row.name and row.samples == 50_000 for name, row in ROWS.items())
    assert {row.image_size_eval for row in ROWS.values() if row.name[-7:] != "-512-48"} == {256}


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_a_row_has_released_files_and_flags_its_script_takes(row):
    flags = row.flags()
    words = [word for flag, value in flags.items() for word in ([flag, value] if value else [flag])]
    if row.gpt is None:
        args = reconstruction_vq_ddp.flags().parse_args([*words, "--data-path", "x"])
        with torch.device("meta"):
            network = {"name": "vqgan", **VQ_SIZES[args.vq_model]}
            quantizer = network.pop("quantizer", {"name": "vq"})
            size = re.search(r"_(\d+)\.ckpt$", row.tokenizer)
            quantizer = {**quantizer, **({"codebook_size": int(size[1])} if size else {})}
            model = build_tokenizer({"network": network, "quantizer": quantizer})
        assert row.parameters == sum(p.numel() for p in model.parameters())
    else:
        args = sample_c2i_ddp.flags().parse_args(words)
        temperature = float(row.drawing.get("--temperature", 1.0))
        assert (args.cfg_scale, args.top_k, args.top_p, args.temperature) == (row.cfg_scale, 0, 1.0, temperature)
        assert args.num_fid_samples == 50_000 and args.gpt_ckpt == row.gpt in RELEASED
        assert row.parameters == parameters_of(vars(args))
        assert args.image_size == 384 or row.name.endswith("_256") or row.system in ("NAR", "RAR", "LPD", "CCA")
    assert args.vq_ckpt == row.tokenizer in RELEASED and args.image_size_eval == row.image_size_eval


def parameters_of(settings) -> int:
    with torch.device("meta"):
        return build_model(gpt_args(settings)).num_parameters


def test_an_unknown_row_is_answered_with_close_ones(capsys):
    with pytest.raises(ValueError, match=r"c2i_l_384x.*did you mean c2i_L_384"):
        find_row("c2i_l_384x")
    with pytest.raises(ValueError, match="known are c2i_B_256, c2i_L_256"):
        find_row("zzz")
    run_here(reproduce, "--list")
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[1:]] == list(ROWS) and listed[1].split()[-1] == "5.46"


def test_documented_rows_exist():
    """Wherever a document or a docstring names a row to reproduce."""
    places = ["docs/evaluation.md", "scripts/reproduce.sh"]
    text = "\n".join((ROOT / place).read_text() for place in places)
    named = re.findall(r"scripts/reproduce\.sh ([\w-]+)", text)
    names = {name for name in named if not name.startswith("--")}
    assert {"c2i_L_384", "vq_ds16_c2i"} <= names <= set(ROWS)


# Plans


def test_a_plan_touches_nothing(capsys, tmp_path):
    printed = plan(capsys, "c2i_XXL_384", "--gpu", "A100")
    assert not list(tmp_path.iterdir())
    assert re.search(r"c2i_XXL_384\.pt +about 5\.64 GB, https://", printed)  # 1,410,972,672 times 4 bytes
    assert re.search(rf"{REFERENCE} +about 2\.03 GB, https://", printed) and "1 x A100" in printed
    sampling, judging = (line.strip() for line in printed.splitlines() if line.startswith("  python3"))
    script, *words = sampling.split()[1:]
    args = sample_c2i_ddp.flags().parse_args(words)
    assert script == "autoregressive/sample/sample_c2i_ddp.py" and args.from_fsdp and args.cfg_scale == 1.75
    assert judging.split()[1] == "evaluations/c2i/evaluator.py" and "c2i_XXL_384/samples/" in judging
    images = 50_000 * 256 * 256 * 3  # as they are in the .npz, and two thirds of it as PNG files
    assert f"{images * 1.65 / 1e9:.1f} of them for 50,000 images" in printed and "not comparable" not in printed
    with pytest.raises(ValueError, match="Z80"):
        plan(capsys, "c2i_L_384", "--gpu", "Z80")


def test_a_plan_says_what_is_not_comparable(capsys, small_files):
    assert "not comparable" not in plan(capsys, "c2i_L_384", "--cfg-scale", "2", "--global-seed", 5)
    printed = plan(capsys, *row_line(small_files))
    assert "about 0." not in printed and "--num-fid-samples 12 instead of 50000" in printed


def test_a_tokenizers_plan(capsys, small_files):
    printed = plan(capsys, "vq_ds8_c2i", "--vq-ckpt", small_files.vq)
    reconstruction, val, judging = (line for line in printed.splitlines() if line.startswith("  python3"))
    assert "val_ddp.py --data-path /path/to/imagenet/val" in val and "--image-size 256" in val
    assert "--vq-model VQ-8" in reconstruction and "--task reconstruction" in judging


# A user's mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which row"),
        (["c2i_B_256", "--sample-dir", "x"], "give --output instead"),
        (["c2i_B_256", "--no-npz"], "--no-npz leaves nothing to evaluate"),
        (["c2i_B_256", "--reference", "nowhere.npz"], r"nowhere\.npz does not exist"),
        (["c2i_B_256", "--graph", "nowhere.pb"], r"nowhere\.pb does not exist"),
        (["c2i_B_256", "--data-path", "."], "--data-path is for tokenizers' rows"),
        (["vq_ds16_c2i"], "give --data-path /path/to/imagenet/val"),
        (["vq_ds16_c2i", "--data-path", "nowhere"], "give --data-path /path/to/imagenet/val"),
        (["vq_ds16_c2i", "--data-path", ".", "--num-samples", "5"], "give a folder of fewer"),
    ],
)
def test_mistakes(words, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_here(reproduce, *words)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".png", ".npz")]


def test_a_missing_reference_without_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=f"HF_HUB_OFFLINE is set. Fetch it from https://.*{REFERENCE} and put"):
        find_file(REFERENCE)
    Path("no_weights_here").mkdir()
    Path("no_weights_here", REFERENCE).touch()
    assert find_file(REFERENCE).resolve() == Path("no_weights_here", REFERENCE).resolve()


def test_processes_come_from_the_environment(monkeypatch):
    assert steps.local_processes("cpu") == 1
    monkeypatch.setenv("nproc_per_node", "3")
    assert steps.local_processes("cpu") == 3
    monkeypatch.setenv("nproc_per_node", "many")
    with pytest.raises(ValueError, match="nproc_per_node=many"):
        steps.local_processes("cpu")
    monkeypatch.setenv("nnodes", "2")
    with pytest.raises(ValueError, match="nnodes=2: this runs on one machine"):
        steps.local_processes(None)


@pytest.mark.parametrize(
    ("scales", "words", "message"),
    [
        ("1.5 x", [], "x is not a guidance scale"),
        ("0", [], "0 is not a guidance scale"),
        (" ", [], "--scales is empty"),
        ("2", ["--cfg-scale=3"], "--cfg-scale comes from --scales"),
        ("2", ["--vq-ckpt", "x"], "--gpt-ckpt is missing"),
        ("2", ["--gpt-ckpt", "x", "--vq-ckpt", "x", "--no-npz"], "--no-npz leaves nothing"),
        ("2", ["--gpt-ckpt", "nowhere.pt", "--vq-ckpt", "nowhere.pt"], r"no file nowhere\.pt"),
    ],
)
def test_mistakes_in_a_sweep(scales, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_here(sweep_guidance, "--scales", scales, *JUDGE, "--", *words)
    assert sweep_guidance.read_numbers("--scales", "1.5, 2 1.50") == [1.5, 2.0]


# Whole runs


def test_from_nothing_to_a_row(small_files, run_quickly):
    shutil.copy(REFERENCE_BATCH, "reference.npz")
    line = [*row_line(small_files), "--reference", "reference.npz", "--num-samples", 8]
    printed = run_quickly("reproduce", *line)
    first = result()
    images = sorted(Path("results_reproduced").rglob("*.png"))
    assert len(images) == 8 and "| FID |" in printed and "NOT COMPARABLE" in printed
    (npz,) = Path("results_reproduced").rglob("*.npz")
    with np.load(npz) as arrays:
        assert arrays["arr_0"].shape == (8, 16, 16, 3)
        assert np.array_equal(arrays["arr_0"][3], np.asarray(Image.open(images[3])))
    evaluated = json.loads(Path(first["evaluation"]).read_text())
    assert first["figures"] == {name: evaluated[name] for name in reproduce.FIGURES}
    assert first["difference"]["fid"] == evaluated["fid"] - 5.46 and not first["comparable"]
    reasons = " ".join(first["not_comparable_because"])
    assert "--num-fid-samples 8 instead of 50000" in reasons and "--gpt-model GPT-XS instead of GPT-B" in reasons
    assert "a reference of 160 images instead of 10,000" in reasons and first["warnings"] == evaluated["warnings"]
    assert (
        f"| FID | {evaluated['fid']:.2f} | 5.46 | {evaluated['fid'] - 5.46:+.2f} |"
        in Path("results_reproduced/c2i_B_256/result.md").read_text()
    )

    # Again: nothing is to do.
    again = run_quickly("reproduce", *line)
    assert "has these 8 images already" in again and "== there already: results_reproduced" in again
    # Another reference: judged again, not drawn again.
    with np.load("reference.npz") as arrays:
        np.savez("reference.npz", arr_0=255 - arrays["arr_0"])
    printed = run_quickly("reproduce", *line)
    assert "has these 8 images already" in printed and "== python3 evaluations" in printed
    # More samples: the rest is drawn.
    run_quickly("reproduce", *line, "--num-samples", 12)
    assert result()["samples"] == 12 and result()["figures"]["fid"] != first["figures"]["fid"]


def test_a_tokenizers_row(small_files, run_quickly):
    rng = np.random.default_rng(0)
    for label in ("ant", "bee"):
        Path("val", label).mkdir(parents=True)
        for number in range(4):
            Image.fromarray(rng.integers(0, 255, (36, 40, 3), np.uint8)).save(f"val/{label}/{number}.png")
    line = ["vq_ds16_c2i_384", "--vq-ckpt", small_files.vq, *VQ, "--graph", GRAPH, "--data-path", "val"]
    line += ["--num-workers", 0, "--per-proc-batch-size", 4]
    printed = run_quickly("reproduce", *line)
    report = result("results_reproduced/vq_ds16_c2i_384")
    assert report["published"]["fid"] == 0.94 and report["samples"] == 8 and "| rFID |" in printed
    assert report["protocol"]["task"] == "reconstruction" and report["protocol"]["reference"]["count"] == 8
    assert "--image-size 32 instead of 384" in report["not_comparable_because"]
    assert f"there already: {report['evaluation']}" in run_quickly("reproduce", *line)


def test_a_sweep(small_files, run_quickly):
    words = [*JUDGE, "--", *small(small_files), "--num-fid-samples", 6]
    run_quickly("sweep_guidance", "--scales", "2.5", *words)
    # One more scale: only that one is drawn.
    printed = run_quickly("sweep_guidance", "--scales", "2.5 1", *words)
    assert printed.count("== there already") == 1 and printed.count("6 images already") == 1
    (folder,) = Path("samples").glob("*-cfg-sweep-*")
    rows = json.loads((folder / "sweep.json").read_text())
    assert [row["cfg_scale"] for row in rows] == [1.0, 2.5]
    for row in rows:
        report = json.loads(Path(row["report"]).read_text())
        assert report["fid"] == row["fid"] and f"-cfg-{row['cfg_scale']}-" in row["report"]
        assert report["protocol"]["samples"]["settings"]["cfg_scale"] == row["cfg_scale"]
    best = min(rows, key=lambda row: row["fid"])
    table = (folder / "sweep.md").read_text()
    assert f"| **{best['cfg_scale']:g}** | {best['fid']:.4g} |" in table and "NOT COMPARABLE" in table
    assert Image.open(folder / "sweep.png").size[0] > 600


def test_sweep_over_scales_and_powers(small_files, run_quickly):
    words = [*JUDGE, "--", *small(small_files), "--num-fid-samples", 6]
    run_quickly("sweep_guidance", "--scales", "3 2", "--powers", "2.75 1", *words)
    (folder,) = Path("samples").glob("*-cfg-sweep-*")
    rows = json.loads((folder / "sweep.json").read_text())
    settings = [(row["cfg_power"], row["cfg_scale"]) for row in rows]
    assert settings == [(1.0, 2.0), (1.0, 3.0), (2.75, 2.0), (2.75, 3.0)]
    for power, row in zip((1.0, 1.0, 2.75, 2.75), rows, strict=True):
        drawn = json.loads(Path(row["report"]).read_text())["protocol"]["samples"]["settings"]
        assert (drawn["cfg_schedule"], drawn["cfg_power"]) == ("power-cosine", power)
    assert "| guidance scale | power |" in (folder / "sweep.md").read_text()
    with pytest.raises(ValueError, match="--cfg-power comes from --powers: leave it out behind --"):
        run_quickly("sweep_guidance", "--scales", "2", "--powers", "1", *words, "--cfg-power", 2)


def test_reproduce_names_the_script_that_fails(small_files, monkeypatch):
    monkeypatch.setattr(steps, "launch", lambda command: 3)
    with pytest.raises(ValueError, match=r"sample_c2i_ddp\.py ended with code 3"):
        run_here(reproduce, *row_line(small_files))


@pytest.mark.parametrize(
    ("name", "share"), [("c2i_B_256", "3%"), ("PAR-XL-4x", "12%"), ("NAR-B", "25%"), ("LPD-L-512-48", "64%")]
)
def test_estimated_time_goes_by_the_passes_of_the_rows_layout(name, share):
    assert f"at {share} of the peak" in reproduce.describe_time(find_row(name), "A100", 50_000, 1)
