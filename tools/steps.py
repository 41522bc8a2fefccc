"""Steps of a published figure, for reproduce.py and sweep_guidance.py: run a script, draw, evaluate.

    samples = draw(["--gpt-model", "GPT-L", ...], processes=8)
    report = evaluate(reference, samples, processes=8, graph=graph)

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

from autoregressive.sample import sample_c2i_ddp
from evaluations.published import GRAPH, REFERENCE
from utils.sample_folder import content_of, recorded_settings

ROOT = Path(__file__).resolve().parent.parent
SAMPLER, EVALUATOR = "autoregressive/sample/sample_c2i_ddp.py", "evaluations/c2i/evaluator.py"
RECONSTRUCTOR, VALIDATION = "tokenizer/tokenizer_image/reconstruction_vq_ddp.py", "tokenizer/validation/val_ddp.py"


def describe(script: str, words: Sequence[object], processes: int) -> str:
    """Return the command line as a user would type it in the project's folder."""
    launch = f"torchrun --standalone --nproc_per_node={processes}" if processes > 1 else "python3"
    quoted = (word if "*" in word else shlex.quote(word) for word in map(str, words))  # a shell fills in the name
    return f"{launch} {script} {' '.join(quoted)}"


def run(script: str, words: Sequence[object], processes: int) -> None:
    """Runs a script to its end, under torchrun where there are several processes. Raises ValueError where it fails."""
    print(f"== {describe(script, words, processes)}", flush=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    code = launch([sys.executable, *torchrun, str(ROOT / script), *map(str, words)])
    if code:
        raise ValueError(f"{script} ended with code {code}, see above; the same command again goes on there")


def launch(command: Sequence[str]) -> int:
    """Runs a command and returns its exit code; SIGTERM and Ctrl-C end the command too."""
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
        raise ValueError(
            f"nnodes={nodes}: this runs on one machine; draw with the command of --dry-run on each of them"
        )
    if given is not None:
        if not given.isdigit() or given == "0":
            raise ValueError(f"nproc_per_node={given} in the environment is not a number of processes")
        return int(given)
    if device is not None and not device.startswith("cuda"):
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def sampling_args(words: Sequence[str]) -> argparse.Namespace:
    """Return what flags of sample_c2i_ddp.py mean. Raises ValueError where they leave nothing to evaluate."""
    args = sample_c2i_ddp.flags().parse_args(list(words))
    if not args.npz:
        raise ValueError("--no-npz leaves nothing to evaluate: leave it out")
    for flag, value in (("--gpt-ckpt", args.gpt_ckpt), ("--vq-ckpt", args.vq_ckpt)):
        if value is None:
            raise ValueError(f"{flag} is missing: give a file, a run's folder, or a released file's name")
    return args


def draw(words: Sequence[str], processes: int) -> Path:
    """Draws what flags of sample_c2i_ddp.py ask for and is missing, and returns the .npz."""
    args = sampling_args(words)
    run(SAMPLER, words, processes)
    samples = newest(Path(args.sample_dir))
    drawn = recorded_settings(samples.with_suffix(""))
    if drawn is None or drawn["cfg_scale"] != args.cfg_scale:
        raise ValueError(f"{samples} is another run's: give a --sample-dir that no other run writes to meanwhile")
    return samples


def newest(folder: Path) -> Path:
    """Return the .npz of a folder that was written last."""
    return max(folder.glob("*.npz"), key=lambda path: path.stat().st_mtime_ns)


def evaluation_words(reference: Path, samples: Path, graph: Path, task: str, device: str | None) -> list[str]:
    """Return the evaluator's flags."""
    return [
        str(reference),
        str(samples),
        "--task",
        task,
        "--graph",
        str(graph),
        *(["--device", device] if device else []),
    ]


def evaluate(
    reference: Path, samples: Path, processes: int, *, graph: Path, task: str = "generation", device: str | None = None
) -> dict[str, Any]:
    """Evaluates samples, unless the report is there, and returns the report; its `path` is the file it is in."""
    from utils.download import sha256_of

    report, read = samples.with_name(samples.name.removesuffix(".npz") + ".json"), None
    wanted = (task, content_of(reference), content_of(samples), sha256_of(graph))
    if report.exists():
        read = json.loads(report.read_text())
        known = read["protocol"]
        made = (
            known["task"],
            *(known[name].get("content") for name in ("reference", "samples")),
            known["graph"]["sha256"],
        )
        read = read if made == wanted else None
    if read:
        print(f"== there already: {report}")
    else:
        run(EVALUATOR, evaluation_words(reference, samples, graph, task, device), processes)
        read = json.loads(report.read_text())
    return {**read, "path": str(report)}


def add_judge_flags(parser: argparse._ActionsContainer) -> None:
    """Adds --reference and --graph, of which find_file makes paths."""
    parser.add_argument("--reference", default=None, help=f"the reference batch (default: {REFERENCE}, looked for)")
    parser.add_argument("--graph", default=None, help=f"the evaluator's graph (default: {GRAPH}, looked for)")


def require_evaluator() -> None:
    """Imports the evaluator, so that an absent package is told before hours of drawing."""
    from evaluations import metrics  # noqa: F401
    from evaluations.c2i import frozen_graph  # noqa: F401
