"""The command lines of the documents run: verbatim, but for paths and sizes. Links, paths and flags in them exist."""

import importlib
import itertools
import json
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import forkserver
from tests.helpers import GOLDEN, ROOT, free_port, scripts

# Documents whose commands run one after another in one folder, so that later ones find what earlier ones made.
TOGETHER = (
    ("README.md",),
    ("docs/data.md", "docs/training.md", "docs/many_gpus.md", "docs/sampling.md", "docs/evaluation.md", "docs/hub.md"),
    ("docs/imagenet.md",),
)
DOCUMENTS = tuple(itertools.chain(*TOGETHER))
RELEASED_FILE = re.compile(r"(?:\./pretrained_models/)?[\w/.-]*\b(?:vq|c2i|t2i|PAR)[_-][\w-]+\.pt")

# What a command's flags become: small models and data that the test makes. Flags a script does not have are left out.
SMALL = {
    "--gpt-model": "GPT-XS",
    "--vq-model": "VQ-4",
    "--codebook-size": "64",
    "--vocab-size": "64",
    "--num-classes": "2",
    "--image-size": "32",
    "--image-size-eval": "32",
    "--downsample-size": "4",
    "--num-fid-samples": "5",
    "--num-samples": "8",
    "--per-proc-batch-size": "2",
    "--global-batch-size": "4",
    "--epochs": "2",
    "--shard-size": "1",
    "--gpus": "2",
    "--num-workers": "0",
    "--perceptual-weight": "0",
    "--mixed-precision": "none",
    "--batch-size": "4",
    "--device": "cpu",
    "--t5-feature-dim": "32",
    "--eval_res": "16",
    "--group-size": "2",
    "--val-images": "4",
    "--graph": str(GOLDEN / "evaluator/standin_graph.pb"),
}


def steps(document: str) -> list[list[str] | str]:
    """Return what a document's blocks run, in order: command lines as words, Python as its source."""
    found: list[list[str] | str] = []
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", (ROOT / document).read_text(), re.DOTALL):
        if language == "python":
            found.append(block)
        else:
            found += [shlex.split(line) for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return found


def commands(document: str) -> list[list[str]]:
    return [step for step in steps(document) if isinstance(step, list)]


def script_and_flags(words: list[str]) -> tuple[str, list[str]]:
    """The Python script a command runs and its flags; a wrapper's own flags come first, variables are left out."""
    while re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    program, script, *flags = words
    if program == "python3":
        return script, flags
    assert program == "bash", words
    launch = re.search(r"^launch (.*) \"\$@\"$", (ROOT / script).read_text(), re.MULTILINE)
    python, *own = shlex.split(launch[1])
    return python, own + flags


ALL = [(document, words) for document in DOCUMENTS for words in commands(document)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with images, codes, and small models under the names of released ones."""
    from autoregressive.models.build import build_gpt
    from autoregressive.models.gpt import GPT_models
    from tests.evaluations.test_t2i import make_small_clip
    from tests.language.small_t5 import make_small_t5
    from tests.text_training import make_pairs
    from tokenizer.tokenizer_image.vq_model import VQ_models
    from utils.checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    for name in ("images", "faces"):
        for label in ("ant", "bee"):
            for i in range(4):
                (folder / name / label).mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (36, 40, 3), np.uint8)).save(folder / name / label / f"{i}.png")
    torch.manual_seed(0)
    save_checkpoint(folder / "vq.pt", {"model": VQ_models["VQ-4"](codebook_size=64).state_dict()})
    args = {"image_size": 32, "downsample_size": 4}
    for n in (1, 4, 16):
        model = GPT_models["GPT-XS"](vocab_size=64, num_classes=2, block_size=64, ar_token_num=n)
        torch.nn.init.normal_(model.output.weight, std=0.1)
        state = model.state_dict()
        save_checkpoint(folder / f"gpt{n}.pt", {"model": state, "ema": state, "steps": 1, "args": args})
        save_checkpoint(folder / f"fsdp{n}" / "consolidated.pth", state)
    model = GPT_models["GPT-XS"](vocab_size=64, num_classes=2, block_size=64, layout={"name": "neighbours"})
    save_checkpoint(folder / "nar.pt", {"model": model.state_dict()})
    model = build_gpt("RAR-XS", vocab_size=64, num_classes=2, block_size=64)
    save_checkpoint(folder / "rar.pt", model.state_dict())
    model = build_gpt("LPD-XS", vocab_size=64, num_classes=2, block_size=64)
    save_checkpoint(folder / "lpd.pt", {"model": model.state_dict()})
    text = {"model_type": "t2i", "cls_token_num": 120, "caption_dim": 32}
    model = GPT_models["GPT-XS"](vocab_size=64, block_size=64, **text)
    save_checkpoint(folder / "t2i.pt", {"model": model.state_dict(), "steps": 1, "args": args})
    make_small_t5(folder / "flan-t5-xl", dim=32)
    make_small_clip(folder / "clip-vit-base-patch32")
    make_pairs(folder / "pairs", {"a": 3, "b": 3}, size=64)
    (folder / "coco").mkdir()
    (folder / "coco" / "val2014").symlink_to(folder / "pairs" / "images")
    (folder / "prompts.tsv").write_text("Prompt\tCategory\na red lantern\tx\ntwo cats sleep\ty\n")
    return folder


def with_released(files: Path, work: Path) -> None:
    """Puts the small models where scripts and Python look for the released ones."""
    home = work / "pretrained_models"
    (home / "t5-ckpt").mkdir(parents=True)
    (home / "t5-ckpt" / "flan-t5-xl").symlink_to(files / "flan-t5-xl")
    (home / "clip-vit-base-patch32").symlink_to(files / "clip-vit-base-patch32")
    for small, names in {
        "gpt1.pt": ["c2i_L_384.pt"], "t2i.pt": ["t2i_XL_stage2_512.pt"], "vq.pt": ["vq_ds16_c2i.pt", "vq_ds16_t2i.pt", "maskgit-vqgan-imagenet-f16-256.bin"],
        "rar.pt": ["rar_b.bin"],
        "lpd.pt": ["lpd_l_256.pth"],
        "nar.pt": ["NAR-imagenet-256-B/last_version.pt"],
    }.items():  # fmt: skip
        for name in names:
            (home / name).parent.mkdir(exist_ok=True)
            (home / name).symlink_to(files / small)


def own_paths(words: list[str], files: Path, work: Path) -> list[str]:
    """The command's words with paths of the test's own in the place of the document's."""
    group = words[words.index("--ar-token-num") + 1] if "--ar-token-num" in words else "1"
    kind = "fsdp" if "--from-fsdp" in words else "gpt"
    gpt = files / f"{kind}{group}" / "consolidated.pth" if kind == "fsdp" else files / f"gpt{group}.pt"
    result, flag = [], ""
    for word in words:
        if flag in ("--gpt-ckpt", "--cca-reference") and RELEASED_FILE.fullmatch(word):
            word = str(files / "t2i.pt" if Path(word).name.startswith("t2i_") else gpt)
        elif flag == "--vq-ckpt" and RELEASED_FILE.fullmatch(word):
            word = str(files / "vq.pt")
        elif flag in ("--data-path", "--data-face-path"):
            names = {"--data-face-path": "faces", "laion_coco": "pairs", "aesthetic": "pairs"}
            name = "prompts.tsv" if word.endswith(".tsv") else names.get(flag, names.get(word, "images"))
            word = str(files / name)
        elif flag == "--ref_dir" and not word.endswith(".npz"):
            word = str(files / "coco")
        elif flag == "--fake_dir":  # the name tells the size of the images
            word = str(next(path for path in work.glob(f"{Path(word).parent}/*") if path.is_dir()))
        elif flag in ("--code-path", "--val-code-path", "--classes-of", "--from", "--to", "--cloud-save-path"):
            word = str(work / Path(word).name)
        elif flag == "--prompt-csv":
            word = str(files / "prompts.tsv")
        elif flag in ("--image-path", "--image"):
            word = str(ROOT / word)
        elif word == "VIRTUAL_imagenet256_labeled.npz":
            word = str(GOLDEN / "evaluator/reference_batch.npz")
        elif word.endswith(".npz") and "/" in word:  # an earlier command's, whose name tells the size of its images
            folder, name = word.split("/")
            made = work.glob(f"{folder}/{name.removesuffix('.npz').split('-')[0]}*.npz")
            word = str(max(made, key=lambda path: path.stat().st_mtime))
        result.append(word)
        flag = word
    return result


def codes_at(folder: Path, files: Path, published: bool) -> None:
    """Codes as a command would find them."""
    if folder.exists():
        return
    main, parser = load("autoregressive/train/extract_codes_c2i.py")
    flags = ["--data-path", str(files / "images"), "--code-path", str(folder), "--vq-ckpt", str(files / "vq.pt")]
    main(parser.parse_args(flags + small(parser) + ["--published-layout"] * published))


def load(script: str):
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    return module.main, module.flags()


def small(parser, keep: tuple[str, ...] = ()) -> list[str]:
    known = {option for action in parser._actions for option in action.option_strings}
    return [word for flag, value in SMALL.items() if flag in known and flag not in keep for word in (flag, value)]


def test_the_documents_have_commands():
    scripts = {script_and_flags(words)[0] for _, words in ALL}
    assert {Path(script).name for script in scripts} >= {
        "vq_train.py", "vq_demo.py", "extract_codes_c2i.py", "train_c2i.py", "sample_c2i.py", "sample_c2i_ddp.py"
    }  # fmt: skip


@pytest.mark.parametrize(("document", "words"), ALL, ids=[f"{d}-{i}" for i, (d, _) in enumerate(ALL)])
def test_a_documented_command_parses_as_written(document, words):
    script, flags = script_and_flags(words)
    load(script)[1].parse_args(flags)


@pytest.mark.slow
@pytest.mark.parametrize("documents", TOGETHER, ids=lambda documents: documents[0])
def test_documented_commands_run(documents, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_released(files, tmp_path)
    for step in itertools.chain(*map(steps, documents)):
        for picture in tmp_path.glob("*.png"):
            picture.unlink()  # an earlier command's
        before = set(tmp_path.rglob("*"))
        if isinstance(step, str):
            exec(compile(step.replace("[207, 360]", "[0, 1]"), "document", "exec"), {})
        else:
            run_small(step, files, tmp_path)
        assert set(tmp_path.rglob("*")) - before or ".save(" not in step, step


def run_small(words: list[str], files: Path, work: Path) -> None:
    """Runs a command at small size; whatever it writes lies in `work`."""
    script, flags = script_and_flags(words)
    main, parser = load(script)
    flags = own_paths(flags, files, work)
    if "convert_codes" in script:
        codes_at(Path(flags[flags.index("--from") + 1]), files, published=True)
    elif "train_c2i" in script:
        codes_at(Path(flags[flags.index("--code-path") + 1]), files, published=False)
    keep = ("--num-classes",) if script.startswith("tools/") and "push_" not in script else ()
    if {"rar_b.bin", "lpd_l_256.pth"} & {*flags}:
        keep = (*keep, "--gpt-model")
    own = small(parser, keep)
    if "sample/" in script and "--vq-ckpt" not in flags and any(map(RELEASED_FILE.fullmatch, words)):
        own += ["--vq-ckpt", str(files / "vq.pt")]  # by its own name a released GPT's tokenizer is known
    if "train_t2i" in script and "512" in flags:
        own += ["--image-size", "64"]  # the second stage's images are twice as large
    if "vq_train" in script and "results_tokenizer_image" in flags:
        own += ["--epochs", "3"]  # a run that goes on has more to do than the one before
    main(parser.parse_args(flags + own))


# Links, paths and flags

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *(ROOT / room / "README.md" for room in ("benchmarks", "pretrained_models")),
    )
)
PRESENT = [page for page in PAGES if page not in ("docs/log.md", "CHANGELOG.md")]  # the others tell of what was
ROOMS = (
    "autoregressive|tokenizer|dataset|language|evaluations|utils|tools|scripts|benchmarks|tests|examples|assets|docs"
)
MADE = {"evaluations/t2i/PartiPrompts.tsv"}
# Flags of programs that are not this project's, and of its shell scripts.
FOREIGN = {
    "--nproc_per_node", "--ntasks-per-node", "--gpus-per-node", "--kill-on-bad-exit", "--local-dir", "--logdir",
    "--build-arg", "--target", "--ipc", "--nodes", "--fix", "--init", "--rm", "--shm-size", "--fast", "--no-serve", "--serve", "--fresh", "--tiny", "--small", "--time",
}  # fmt: skip


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", (ROOT / page).read_text()):
        name, _, anchor = target.partition("#")
        there = (ROOT / page).parent / name if name else ROOT / page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PRESENT)
def test_named_paths_exist(page):
    named = set(re.findall(rf"(?<![\w/.-])(?:{ROOMS})/[\w./-]*\w", (ROOT / page).read_text()))
    assert not [path for path in named - MADE if not (ROOT / path).exists()]


def test_named_flags_exist():
    pytest.importorskip("fastapi")
    known = set(FOREIGN)
    for script in scripts():
        for action in importlib.import_module(script).flags()._actions:
            known |= {*action.option_strings}
    for page in PRESENT:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", (ROOT / page).read_text()))
        assert sorted(named - known) == [], page


def test_space_installs_what_the_demo_needs():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    lines += [line for name in ("text", "serve", "demo") for line in extras[name]]
    needed = {line for line in lines if not line.startswith(("gradio", "autoregressive-image-generation"))}
    page = (ROOT / "docs" / "hub.md").read_text()
    assert {line.strip() for line in page.split("`requirements.txt` (", 1)[1].splitlines()[1:] if line} == needed
    version = re.search("sdk_version: (.*)", page)[1]
    assert f"gradio=={version}\n" in (ROOT / "constraints" / "main.txt").read_text()


# docs/serving.md

SERVING = (ROOT / "docs" / "serving.md").read_text()
SERVES = re.compile(
    r"^(?: {4,})(?:ExecStart=)?(?:\S*python3? -m autoregressive\.serve\.server|bash scripts/serve\.sh|python3? app\.py) (.*)",
    re.MULTILINE,
)


def table(header: str) -> dict[str, str]:
    """The rows of the serving page's table with this first line: the first cell's words in backticks, and the last cell."""
    lines = SERVING.split(f"{header}\n", 1)[1].splitlines()[1:]
    rows = [line.strip("| ").split(" | ") for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]
    return {name: cells[-1] for cells in rows for name in re.findall(r"`([^`]*)`", cells[0]) or cells[:1]}


@pytest.mark.parametrize("document", ["README.md", "docs/serving.md"])
def test_documented_commands_that_serve_parse(document):
    pytest.importorskip("fastapi")
    found = list(SERVES.finditer((ROOT / document).read_text().replace("\\\n", " ")))
    assert found
    for match in found:
        script = "app" if "app.py" in match[0] else "autoregressive.serve.server"
        words = [word for word in shlex.split(match[1], comments=True) if word != "…"]
        importlib.import_module(script).flags().parse_args(words)


def test_serving_page_has_every_flag_of_the_server_and_every_field_of_a_request():
    pytest.importorskip("fastapi")
    from autoregressive.serve.body import ImageBody
    from autoregressive.serve.server import flags

    (group,) = [group for group in flags()._action_groups if group.title == "server"]
    known = {option for action in flags()._actions for option in action.option_strings}
    told = set(table("| flag | default | |"))
    assert {action.option_strings[0] for action in group._group_actions} <= told <= known
    told = set(table("| field | default | |")) | {"cfg_scale"}
    assert told == set(ImageBody.model_fields)


def test_serving_page_alerts_on_metrics_that_are_there():
    pytest.importorskip("prometheus_client")
    from autoregressive.serve.metrics import Metrics

    there = set(re.findall(r"^# TYPE (\w+)", Metrics("small").text().decode(), re.MULTILINE))
    section = SERVING.split("## What to alert on", 1)[1].split("\n## ", 1)[0]
    for name in re.findall(r"\b(?:image|images|engine)_\w+", section):
        assert name.removesuffix("_bucket") in there, name


def test_serving_page_has_the_servers_table_of_refusals():
    pytest.importorskip("fastapi")
    from autoregressive.serve.errors import REFUSED

    assert table("| what | why, and what to do |") == REFUSED


def test_container_starts_the_server_with_flags_that_it_has():
    pytest.importorskip("fastapi")
    from autoregressive.serve.server import flags

    recipe = (ROOT / "Dockerfile").read_text()
    python, *words = json.loads(re.search(r"^ENTRYPOINT (.*)", recipe, re.MULTILINE)[1])
    assert python == ".venv-serve/bin/python" and words[:2] == ["-m", "autoregressive.serve.server"]
    assert flags().parse_args(words[2:]).host == "0.0.0.0"
    for line in re.findall(r"^COPY (.*) \S+$", recipe, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split()), line
    compile(json.loads(re.search(r"HEALTHCHECK .*CMD (.*)", recipe)[1])[2], "HEALTHCHECK", "exec")


@pytest.mark.parametrize("wrapper", sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "scripts").rglob("*.sh")))
def test_shell_scripts_are_well_formed(wrapper):
    subprocess.run(["bash", "-n", str(ROOT / wrapper)], check=True)


@pytest.mark.slow
def test_a_wrapper_starts_processes_from_any_folder(files, tmp_path):
    """Through bash, torchrun and two processes, as users start it, but for the start of Python."""
    parser = load("autoregressive/sample/sample_c2i_ddp.py")[1]
    flags = ["--gpt-ckpt", str(files / "gpt1.pt"), "--vq-ckpt", str(files / "vq.pt"), *small(parser)]
    script = str(ROOT / "scripts/autoregressive/sample_c2i.sh")
    environment = {**os.environ, "nproc_per_node": "2", "master_port": str(free_port()), "OMP_NUM_THREADS": "1"}
    environment |= {
        "PATH": f"{forkserver.shim()}{os.pathsep}{environment['PATH']}",
        "PYTHON_EXEC": str(forkserver.shim() / "python3"),
        "VIRTUAL_ENV": "x",  # in which no other Python is looked for
    }
    subprocess.run(["bash", script, *flags], cwd=tmp_path, env=environment, check=True, timeout=120)
    assert len(list(tmp_path.glob("samples/*/*.png"))) == 5
    assert len(list(tmp_path.glob("samples/*.npz"))) == 1
