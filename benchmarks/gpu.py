"""Measures the project on one GPU: every part in a process of its own, each with a time limit, the report written as it goes.

    bash benchmarks/gpu.sh OUT

A part that fails or hangs does not stop the next. OUT/{part}.json has a part's figures, OUT/{part}.log what the part
printed, OUT/report.md all figures. The parts themselves are in benchmarks/gpu_parts.py.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from utils.cli import flag_parser, positive_int, run_script
from utils.files import atomic_write

# Part: (seconds at most, title), in the order in which they run: what decides most comes first.
PARTS = {
    "machine": (35, "The card: bandwidth, products, attention kernels"),
    "sampling_b": (75, "Sampling: GPT-B, 24x24 tokens, 8 guided images, bf16"),
    "mends": (60, "Sampling: what decides a mend"),
    "training": (90, "Training: GPT-B and GPT-L, bf16, 256 pixels"),
    "sampling_xl": (80, "Sampling: GPT-XL, 24x24 tokens, 8 guided images, bf16"),
    "sampling_3b": (80, "Sampling: GPT-3B, 24x24 tokens, 8 guided images, bf16"),
    "runs": (150, "Training scripts: waits for the device, recompilations, two equal runs"),
    "vq": (45, "The tokenizer: VQ-16, 256 and 384 pixels"),
    "batch": (90, "Sampling: GPT-B, 16x16 tokens, images a second by batch size"),
    "fsdp": (90, "FSDP2 in one process: train, kill, resume"),
    "windows": (60, "Windows: GPT-B, one image, passes and their cost by window"),
    "int8_par": (60, "int8 weights, and PAR's four tokens a step"),
    "tests": (240, "pytest -m gpu: recorded steps, training losses of raster order in bf16"),
}


def main(args: argparse.Namespace) -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    began, done = time.monotonic(), {}
    for name in args.parts:
        left = args.seconds - (time.monotonic() - began)
        if left < 5:
            done[name] = {"status": "not run: no time left", "seconds": 0.0, "rows": []}
        else:
            done[name] = run_part(name, min(PARTS[name][0], left), out, args)
        write_report(out, done, time.monotonic() - began, args.small)
        print(f"{name}: {done[name]['status']}, {done[name]['seconds']:.0f} s", flush=True)
    print(out / "report.md")


def run_part(name: str, limit: float, out: Path, args: argparse.Namespace) -> dict:
    """Runs a part in a process group of its own and returns the part's record, with the status and the seconds."""
    file = out / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_parts", name, str(file), "--device", args.device]
    began = time.monotonic()
    with open(out / f"{name}.log", "wb") as log:
        part = subprocess.Popen(
            [*command, "--small"] if args.small else command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = part.wait(timeout=limit)
            status = "done" if code == 0 else f"failed, exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"ended at its limit of {limit:.0f} s"
        end_group(part)
    record = json.loads(file.read_text()) if file.exists() else {"rows": []}
    record |= {"status": status, "seconds": time.monotonic() - began}
    with atomic_write(file) as f:
        f.write(json.dumps(record, indent=1).encode())
    return record


def end_group(part: subprocess.Popen) -> None:
    """Kills what is left of a part. A process that hangs in the driver is not waited for longer than five seconds."""
    try:
        os.killpg(part.pid, signal.SIGKILL)
        part.wait(timeout=5)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


def write_report(out: Path, done: dict[str, dict], seconds: float, small: bool) -> None:
    """Writes report.md from the records of the parts so far."""
    lines = ["# Measured by benchmarks/gpu.sh", "", f"{len(done)} of {len(PARTS)} parts in {seconds:.0f} s.", ""]
    if small:
        lines += ["Tiny models (`--small`), and nothing compiled on a CPU.", ""]
    for name, record in done.items():
        lines += [f"## {PARTS[name][1]}", "", f"`{name}`: {record['status']}, {record['seconds']:.0f} s", ""]
        if record["rows"]:
            lines += ["| what | measured |", "|---|---|"]
            lines += [f"| {row['what']} | {row['measured']} |" for row in record["rows"]]
            lines.append("")
        log = out / f"{name}.log"
        if record["status"] != "done" and log.exists():
            tail = log.read_text(errors="replace").splitlines()[-15:]
            lines += ["```", *(line[:200] for line in tail), "```", ""]
    with atomic_write(out / "report.md") as f:
        f.write("\n".join(lines).encode())


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("out", metavar="OUT", help="folder for the report and the figures")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script itself")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what to measure")
    parser.add_argument("--seconds", type=positive_int, default=525, help="for all parts together")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
