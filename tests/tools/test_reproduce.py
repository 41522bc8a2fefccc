"""scripts/reproduce.sh and sweep_guidance.sh: the rows, plans, stages that are done once, whole runs at small size."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.gpt import GPT_models
from autoregressive.sample import sample_c2i_ddp
from evaluations.published import REFERENCE, ROWS, find_row
from tests import forkserver
from tests.helpers import GOLDEN, ROOT
from tests.training import run_here
from tokenizer.tokenizer_image import reconstruction_vq_ddp
from tokenizer.tokenizer_image.vq_model import VQ_models
from tools import reproduce, stages, sweep_guidance
from tools.draw_figure import count_parameters
from tools.stages import Stage, Stages, find_reference, local_processes
from utils import hub
from utils.hub import RELEASED

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
    monkeypatch.setattr(stages, "WEIGHTS", "no_weights_here")
    monkeypatch.setattr(hub, "WEIGHTS", "no_weights_here")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)


def small(files) -> list:
    return ["--gpt-ckpt", files.gpt, "--vq-ckpt", files.vq, *SMALL, "--per-proc-batch-size", 4]


def row_line(files, *more) -> list:
    return ["c2i_B_256", *small(files), *JUDGE, "--num-samples", 12, *more]


def command(name: str, *words) -> list[str]:
    return ["bash", str(ROOT / "scripts" / f"{name}.sh"), *map(str, words)]


def environment(**more: str) -> dict[str, str]:
    """What a user's shell has after activation."""
    path = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    clean = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "nproc_per_node", "nnodes")
    }
    return {**clean, "PATH": path, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def run(name: str, *words, fails: bool = False, **env: str) -> str:
    done = forkserver.run(command(name, *words), env=environment(**env), capture_output=True, text=True, timeout=280)
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, output
    return output


@pytest.fixture
def run_quickly(monkeypatch, capsys):
    """As `run`, in this process, stages too, but for those of several processes: nothing is imported again."""
    launch = stages.launch

    def launch_here(command: list[str]) -> int:
        if "-m" in command:
            return launch(command)
        script = importlib.import_module(".".join(Path(command[1]).relative_to(ROOT).with_suffix("").parts))
        script.main(script.flags().parse_args(command[2:]))
        return 0

    def run_quickly(name: str, *words) -> str:
        capsys.readouterr()
        run_here({"reproduce": reproduce, "sweep_guidance": sweep_guidance}[name], *words)
        return capsys.readouterr().out

    monkeypatch.setattr(stages, "launch", launch_here)
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
        "vq_ds16_c2i": (2.19, None), "vq_ds16_c2i_384": (0.94, None), "vq_ds16_c2i_512": (0.70, None),
        "vq_ds8_c2i": (0.59, None),
    }  # fmt: skip
    assert {name: (row.fid, row.cfg_scale) for name, row in ROWS.items()} == figures
    assert all(name == row.name and row.samples == 50_000 and row.image_size_eval == 256 for name, row in ROWS.items())


@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_a_row_has_released_files_and_flags_its_script_takes(row):
    flags = row.flags()
    words = [word for flag, value in flags.items() for word in ([flag, value] if value else [flag])]
    if row.gpt is None:
        args = reconstruction_vq_ddp.flags().parse_args([*words, "--data-path", "x"])
        size = VQ_models[args.vq_model]
        assert row.parameters == sum(p.numel() for p in size().parameters())
    else:
        args = sample_c2i_ddp.flags().parse_args(words)
        assert (args.cfg_scale, args.top_k, args.top_p, args.temperature) == (row.cfg_scale, 0, 1.0, 1.0)
        assert args.num_fid_samples == 50_000 and args.gpt_ckpt == row.gpt in RELEASED
        assert row.parameters == count_parameters(vars(args))
        assert args.image_size == 384 or row.name.endswith("_256")
    assert args.vq_ckpt == row.tokenizer in RELEASED and args.image_size_eval == 256


def test_par_rows_draw_groups():
    args = sample_c2i_ddp.flags().parse_args([w for pair in ROWS["PAR-3B-16x"].flags().items() for w in pair if w])
    assert (args.ar_token_num, args.spe_token_num, args.gpt_model) == (16, 15, "GPT-3B")


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
    places = ["README.md", "GETTING_STARTED.md", "tools/reproduce.py", "scripts/reproduce.sh"]
    text = "\n".join((ROOT / place).read_text() for place in places)
    named = re.findall(r"scripts/reproduce\.sh ([\w-]+)", text)
    names = {name for name in named if not name.startswith("--")}
    assert {"c2i_L_384", "vq_ds16_c2i"} <= names <= set(ROWS)


# Plans


def test_a_plan_touches_nothing(capsys, tmp_path):
    printed = plan(capsys, "c2i_XXL_384", "--gpu", "A100")
    assert not list(tmp_path.iterdir())
    assert "c2i_XXL_384.pt to download, about 5.64 GB (estimated), https://" in printed  # 1,410,972,672 times 4 bytes
    assert f"{REFERENCE}  to download, about 2.03 GB (estimated), https://" in printed
    sampling, judging = (line.strip() for line in printed.splitlines() if line.startswith("  python3"))
    script, *words = sampling.split()[1:]
    args = sample_c2i_ddp.flags().parse_args(words)
    assert script == "autoregressive/sample/sample_c2i_ddp.py" and args.from_fsdp and args.cfg_scale == 1.75
    assert judging.split()[1] == "evaluations/c2i/evaluator.py" and "-cfg-1.75-seed-0.npz" in judging
    images = 50_000 * 256 * 256 * 3  # as they are in the .npz, and two thirds of it as PNG files
    assert f"{images * 1.65 / 1e9:.1f} GB   50,000 as PNG files" in printed and "not comparable" not in printed


def test_a_plan_finds_what_is_there(capsys, small_files):
    printed = plan(capsys, *row_line(small_files))
    assert f"{small_files.gpt} at {small_files.gpt}" in printed.replace("  ", " ") and "to download" not in printed
    assert "not comparable with it: 12 samples instead of 50,000" in printed


def test_the_arithmetic_of_a_plan(capsys, small_files):
    """GPT-XS with guidance: twice, two FLOPs for each weight and row, and attention over the whole square."""
    args = reproduce.flags().parse_args(list(map(str, row_line(small_files))))
    row, given = ROWS["c2i_B_256"], reproduce.given_flags(args)
    gpt, tokenizer = reproduce.flops_per_image(row, args, given)
    model = GPT_models["GPT-XS"](vocab_size=64, num_classes=10, block_size=64)
    weights = sum(p.numel() for layer in model.layers for p in layer.parameters() if p.ndim == 2)
    forward = 2 * (weights * 64 + 64 * 128 * 64) + 4 * 4 * 128 * 64**2
    assert gpt == 2 * forward
    given["cfg_scale"] = 1.0
    assert reproduce.flops_per_image(row, args, given)[0] == forward
    assert tokenizer > 1e7


def test_a_plan_knows_the_machine(capsys):
    one, eight = (plan(capsys, "c2i_L_384", "--gpu", gpu) for gpu in ("A100", "H100"))
    assert "1 x A100" in one and "1 x H100" in eight
    with pytest.raises(ValueError, match="--gpu Z80 is not known; known are"):
        plan(capsys, "c2i_L_384", "--gpu", "Z80")
    assert "2.0 hours" in reproduce.format_hours(7200) and reproduce.format_hours(10) == "1 minutes"
    assert reproduce.format_hours(40 * 86400) == "40 days"


def test_a_tokenizers_plan(capsys, small_files):
    printed = plan(capsys, "vq_ds8_c2i", "--vq-ckpt", small_files.vq)
    val, reconstruction, judging = (line for line in printed.splitlines() if line.startswith("  python3"))
    assert "val_ddp.py --data-path /path/to/imagenet/val" in val and "--image-size 256" in val
    assert "--vq-model VQ-8" in reconstruction and "--task reconstruction" in judging


# A user's mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which row"),
        (["c2i_B_256", "--sample-dir", "x"], "give --output instead"),
        (["c2i_B_256", "--no-npz"], "--no-npz leaves nothing to evaluate"),
        (["c2i_B_256", "--reference", "nowhere.npz"], r"--reference nowhere\.npz does not exist"),
        (["c2i_B_256", "--graph", "nowhere.pb"], r"--graph nowhere\.pb does not exist"),
        (["c2i_B_256", "--data-path", "."], "--data-path is for tokenizers' rows"),
        (["c2i_B_256", "--dry-run", "--device", "cuda:x"], "--device cuda:x is not a device"),
        (["vq_ds16_c2i"], "give --data-path /path/to/imagenet/val"),
        (["vq_ds16_c2i", "--data-path", "nowhere"], "--data-path nowhere is not a folder"),
        (["vq_ds16_c2i", "--data-path", ".", "--cfg-scale", "2"], "--cfg-scale: not for vq_ds16_c2i"),
        (["vq_ds16_c2i", "--data-path", ".", "--num-samples", "5"], "give a folder of fewer"),
        (["c2i_B_256", "--gpt-ckpt", "nowhere.pt", *map(str, JUDGE)], r"no file nowhere\.pt"),
    ],
)
def test_mistakes(words, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_here(reproduce, *words)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".png", ".npz")]


def test_a_missing_reference_without_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=f"HF_HUB_OFFLINE is set. Fetch it from https://.*{REFERENCE} and put"):
        find_reference(None)
    Path("no_weights_here").mkdir()
    Path("no_weights_here", REFERENCE).touch()
    assert find_reference(None).resolve() == Path("no_weights_here", REFERENCE).resolve()


def test_processes_come_from_the_environment(monkeypatch):
    assert local_processes("cpu") == 1
    monkeypatch.setenv("nproc_per_node", "3")
    assert local_processes("cpu") == 3
    monkeypatch.setenv("nproc_per_node", "many")
    with pytest.raises(ValueError, match="nproc_per_node=many"):
        local_processes("cpu")
    monkeypatch.setenv("nnodes", "2")
    with pytest.raises(ValueError, match="nnodes=2: this runs on one machine"):
        local_processes(None)


@pytest.mark.parametrize(
    ("scales", "words", "message"),
    [
        ("1.5 x", [], "x is not a guidance scale"),
        ("1.5 nan", [], "nan is not a guidance scale"),
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
    assert sweep_guidance.read_scales("1.5, 2 1.50") == [1.5, 2.0]


# Stages


def script_stage(tmp_path, source: str, **changes) -> Stage:
    """A stage that runs a script of the test's own."""
    script = tmp_path / "script.py"
    script.write_text(source)
    (tmp_path / "in.txt").touch()
    inputs, output = (tmp_path / "in.txt",), tmp_path / "out.txt"
    fields = {"name": "work", "script": str(script), "words": ("1",), "processes": 1, "settings": {"a": 1.5}}
    return Stage(**{**fields, "inputs": inputs, "output": output, **changes})


APPEND = "import sys; open('out.txt', 'a').write(sys.argv[1])"


def test_a_stage_is_done_once(tmp_path):
    stage = script_stage(tmp_path, APPEND)
    with Stages(tmp_path / "record") as chain:
        assert not chain.is_done(stage)
        assert chain.run(stage).read_text() == "1" and chain.is_done(stage)
        chain.run(stage)
    with Stages(tmp_path / "record") as again:
        assert again.run(stage).read_text() == "1" and again.seconds()["work"] >= 0


@pytest.mark.parametrize("change", ["settings", "input", "output", "removed"])
def test_a_stage_runs_again_where_something_changed(tmp_path, change):
    stage = script_stage(tmp_path, APPEND)
    with Stages(tmp_path / "record") as chain:
        chain.run(stage)
        if change == "settings":
            stage = script_stage(tmp_path, APPEND, settings={"a": 2})
        elif change == "input":
            stage.inputs[0].write_text("new")
        elif change == "output":
            stage.output.write_text("other")
        else:
            stage.output.unlink()
        assert not chain.is_done(stage)
        chain.run(stage)
        assert stage.output.read_text() == {"output": "other1", "removed": "1"}.get(change, "11")
        assert chain.is_done(stage)


def test_stage_moved_and_copied_files_are_known_by_their_content(tmp_path):
    stage = script_stage(tmp_path, APPEND)
    with Stages(tmp_path / "record") as chain:
        chain.run(stage)
        for path in (*stage.inputs, stage.output):
            os.utime(path, ns=(7, 7))
        assert chain.is_done(stage)


def test_stage_record_of_the_first_edition_is_known_by_name_size_and_time(tmp_path):
    stage = script_stage(tmp_path, APPEND)
    with Stages(tmp_path / "record") as chain:
        chain.run(stage)
        state = json.loads(chain.record.read_text())

        def old(path):
            status = path.stat()
            return {"name": path.name, "bytes": status.st_size, "modified": status.st_mtime_ns}

        state["work"]["left"] = old(stage.output)
        state["work"]["ran"]["inputs"] = [old(path) for path in stage.inputs]
        chain.record.write_text(json.dumps(state))
        assert chain.is_done(stage)
        os.utime(stage.output, ns=(7, 7))
        assert not chain.is_done(stage)


def test_an_output_may_be_a_pattern(tmp_path):
    stage = script_stage(tmp_path, APPEND, output=tmp_path / "*.txt", inputs=())
    with Stages(tmp_path / "record") as chain:
        assert chain.run(stage).name == "out.txt" and chain.is_done(stage)


def test_a_stage_that_fails_is_not_done(tmp_path):
    with Stages(tmp_path / "record") as chain:
        with pytest.raises(ValueError, match="'work' ended with code 3"):
            chain.run(script_stage(tmp_path, "raise SystemExit(3)"))
        with pytest.raises(FileNotFoundError, match=r"ended well and left no .*out\.txt"):
            chain.run(script_stage(tmp_path, ""))
        assert not chain.record.exists()


def test_a_folder_has_one_chain_at_a_time(tmp_path, small_files):
    refused = pytest.raises(ValueError, match="another process is at work in results_reproduced/c2i_B_256")
    with Stages("results_reproduced/c2i_B_256"), refused:
        run_here(reproduce, *row_line(small_files))
    with Stages("results_reproduced/c2i_B_256"):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="could not write to file/x"), Stages("file/x"):
        pass


def test_a_damaged_record_says_what_to_do(tmp_path):
    with Stages(tmp_path / "record") as chain:
        chain.record.write_text("{")
        with pytest.raises(ValueError, match=r"state\.json is not readable.*remove it"):
            chain.run(script_stage(tmp_path, APPEND))


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "ended, or never came so far"
        time.sleep(0.005)


def test_who_is_stopped_stops_its_script(tmp_path):
    """SIGTERM to the chain alone: the script it runs ends too."""
    child = tmp_path / "child.py"
    child.write_text(
        "import os, time; open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'pid.txt'); time.sleep(60)"
    )
    source = f"import sys; from tools.stages import launch; launch([sys.executable, {str(child)!r}])"
    process = subprocess.Popen([sys.executable, "-c", source], env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_for(Path("pid.txt").exists, process)
    pid = int(Path("pid.txt").read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# Whole runs


@pytest.mark.slow
def test_from_nothing_to_a_row(small_files, run_quickly, monkeypatch):
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
    assert "8 samples instead of 50,000" in reasons and "--gpt-model GPT-XS instead of GPT-B" in reasons
    assert "a reference of 160 images instead of 10,000" in reasons and first["warnings"] == evaluated["warnings"]
    assert (
        f"| FID | {evaluated['fid']:.2f} | 5.46 | {evaluated['fid'] - 5.46:+.2f} |"
        in Path("results_reproduced/c2i_B_256/result.md").read_text()
    )

    # Again: nothing is to do.
    assert run_quickly("reproduce", *line).count("done before") == 2
    # Another reference: judged again, not drawn again.
    with np.load("reference.npz") as arrays:
        np.savez("reference.npz", arr_0=255 - arrays["arr_0"])
    printed = run_quickly("reproduce", *line)
    assert "== samples: done before" in printed and "== evaluation: python3" in printed
    # More samples: the rest is drawn.
    monkeypatch.setenv("nproc_per_node", "2")
    printed = run_quickly("reproduce", *line, "--num-samples", 12)
    assert "torchrun --nproc_per_node=2" in printed
    assert result()["samples"] == 12 and result()["figures"]["fid"] != first["figures"]["fid"]


@pytest.mark.slow
@pytest.mark.timeout(900)  # fifteen processes, a minute on a machine of its own
def test_killed_at_any_point_it_goes_on(small_files):
    line = row_line(small_files)
    run("reproduce", *line, "--output", "straight")
    for place, pattern in (("drawing", "*/samples/*/000003.png"), ("between", "*/samples/*.npz")):
        killed = [*line, "--output", place]
        process = subprocess.Popen(
            command("reproduce", *killed), env=environment(), start_new_session=True, stdout=subprocess.DEVNULL
        )
        wait_for(lambda place=place, pattern=pattern: list(Path(place).glob(pattern)), process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not Path(place, "c2i_B_256", "result.json").exists()
        before = {path: path.stat().st_mtime_ns for path in Path(place).rglob("*.png")}
        run("reproduce", *killed)
        assert before and all(path.stat().st_mtime_ns == written for path, written in before.items())
        assert result(f"{place}/c2i_B_256")["figures"] == result("straight/c2i_B_256")["figures"]


@pytest.mark.slow
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
    assert run_quickly("reproduce", *line).count("done before") == 3
    # Another row takes the same reference.
    printed = run_quickly("reproduce", "vq_ds16_c2i", *line[1:])
    assert "== reference: done before" in printed and "== reconstructions: python3" in printed


@pytest.mark.slow
def test_a_sweep(small_files, run_quickly):
    words = [*JUDGE, "--", *small(small_files), "--num-fid-samples", 6]
    run_quickly("sweep_guidance", "--scales", "2.5", *words)
    # One more scale: only that one is drawn.
    printed = run_quickly("sweep_guidance", "--scales", "2.5 1", *words)
    assert printed.count("done before") == 2 and "== samples at 1: python3" in printed
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


@pytest.mark.slow
def test_what_fails_says_where(small_files):
    torch.save({"model": {"not": torch.zeros(1)}}, "wrong.pt")
    printed = run("reproduce", *row_line(small_files), "--gpt-ckpt", "wrong.pt", fails=True)
    assert "error: the stage 'samples' ended with code 1, see above" in printed and "wrong.pt" in printed
    assert "Traceback" not in printed
