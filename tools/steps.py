"""Steps of a published figure, for reproduce.py and sweep_guidance.py: run a script, find its samples, evaluate them.

    run(SAMPLER, ["--gpt-model", "GPT-L", ...], processes=8)
    report = evaluate(reference, newest_file("samples", "*.npz"), processes=8, graph=graph)

Every step is a script that does only what is missing. The evaluator, which does everything again, is not started where its
report is of these very files.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluations.published import GRAPH, REFERENCE
from utils.files import content_of

ROOT = Path(__file__).resolve().parent.parent
SAMPLER, EVALUATOR = "autoregressive/sample/sample_c2i_ddp.py", "evaluations/c2i/evaluator.py"
RECONSTRUCTOR, VALIDATION = "tokenizer/tokenizer_image/reconstruction_vq_ddp.py", "tokenizer/validation/val_ddp.py"


def describe(script: str, words: Sequence[object], processes: int) -> str:
    """Return the command line as a user would type it in the project's folder."""
    launcher = f"torchrun --standalone --nproc_per_node={processes}" if processes > 1 else "python3"
    quoted = (word if "*" in word else shlex.quote(word) for word in map(str, words))  # a shell fills in the name
    return f"{launcher} {script} {' '.join(quoted)}"


def run(script: str, words: Sequence[object], processes: int) -> None:
    """Run a script to its end, under torchrun where there are several processes. Raises ValueError where it fails."""
    print(f"== {describe(script, words, processes)}", flush=True)
    torchrun = [str(ROOT / "scripts/torchrun.py"), "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    code = launch([sys.executable, *torchrun, str(ROOT / script), *map(str, words)])
    if code:
        raise ValueError(f"{script} ended with code {code}, see above; rerun the command to resume")


def launch(command: Sequence[str]) -> int:
    """Run a command and return its exit code; SIGTERM and Ctrl-C end the command too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def local_processes(device: str | None) -> int:
    """Return nproc_per_node of the environment, else one process a GPU, else one."""
    nodes, given = os.environ.get("nnodes", "1"), os.environ.get("nproc_per_node")  # noqa: SIM112, the wrappers' names
    if nodes != "1":
        raise ValueError(f"nnodes={nodes}: this runs on one machine; run the sampling script on each of them")
    if given is not None:
        if not given.isdigit() or given == "0":
            raise ValueError(f"nproc_per_node={given} in the environment is not a number of processes")
        return int(given)
    if device is not None and not device.startswith("cuda"):
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def given_flags(words: Sequence[str]) -> dict[str, str]:
    """Return flag → value of a script's command line. Raises ValueError where the samples could not be found again."""
    found: dict[str, list[str]] = {}
    for word in words:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            found[flag] = [value] if equals else []
        elif not found:
            raise ValueError(f"{word!r} belongs to no flag")
        else:
            found[next(reversed(found))].append(word)
    if "--no-npz" in found:
        raise ValueError("--no-npz leaves nothing to evaluate: leave it out")
    return {flag: " ".join(values) for flag, values in found.items()}


def evaluation_words(reference: Path, samples: Path, graph: Path, task: str, device: str | None) -> list[str]:
    """Return the evaluator's flags."""
    words = [str(reference), str(samples), "--task", task, "--graph", str(graph)]
    return words + (["--device", device] if device else [])


def evaluate(
    reference: Path, samples: Path, processes: int, *, graph: Path, task: str = "generation", device: str | None = None
) -> dict[str, Any]:
    """Evaluate samples, unless the report is there, and return the report; its `path` is the file it is in."""
    from utils.download import sha256_of

    report = samples.with_name(samples.name.removesuffix(".npz") + ".json")
    wanted = [task, content_of(reference), content_of(samples), sha256_of(graph)]
    if report.exists():
        known = json.loads(report.read_text())["protocol"]
        contents = [known[name].get("content") for name in ("reference", "samples")]
        if [known["task"], *contents, known["graph"]["sha256"]] == wanted:
            print(f"== there already: {report}")
            return {**json.loads(report.read_text()), "path": str(report)}
    run(EVALUATOR, evaluation_words(reference, samples, graph, task, device), processes)
    return {**json.loads(report.read_text()), "path": str(report)}


def add_judge_flags(parser: argparse._ActionsContainer) -> None:
    """Add --reference and --graph, of which find_file makes paths."""
    parser.add_argument("--reference", default=None, help=f"the reference batch (default: {REFERENCE}, looked for)")
    parser.add_argument("--graph", default=None, help=f"the evaluator's graph (default: {GRAPH}, looked for)")


def require_evaluator() -> None:
    """Import the evaluator, so that an absent package is reported before hours of drawing."""
    from evaluations import metrics  # noqa: F401
    from evaluations.c2i import frozen_graph  # noqa: F401
