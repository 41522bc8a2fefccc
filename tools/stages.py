"""Work in stages that are done once, for reproduce.py and sweep_guidance.py: sampling and evaluating.

with Stages("results_reproduced/c2i_L_384") as stages:
    samples = stages.run(sampling_stage(["--gpt-model", "GPT-L", ...], processes=8))

What a stage ran with and what it left is written to state.json, so that a killed chain goes on where it stopped.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoregressive.sample import sample_c2i_ddp
from evaluations.published import REFERENCE, REFERENCE_URL
from utils.files import write_json
from utils.hub import WEIGHTS
from utils.sample_folder import content_of

ROOT = Path(__file__).resolve().parent.parent
# What a stage that is asked to stop may take: torchrun itself waits 30 s for its processes.
PATIENCE_SECONDS = 40


@dataclass(frozen=True)
class Stage:
    """One script and what decides whether its work is done already.

    settings: JSON values that its outcome depends on. inputs: files and folders that it depends on. output: the file it
    leaves, or a pattern such as folder/*.npz where the script chooses the name.
    """

    name: str
    script: str  # below the project's root
    words: tuple[str, ...]
    processes: int
    settings: dict[str, Any]
    inputs: tuple[Path, ...]
    output: Path

    @property
    def command(self) -> list[str]:
        """The command line, under torchrun where there are several processes."""
        launch = [sys.executable]
        if self.processes > 1:
            port = os.environ.get("master_port") or str(free_port())  # noqa: SIM112, the wrappers' names
            launch += ["-m", "torch.distributed.run", f"--nproc_per_node={self.processes}", f"--master_port={port}"]
        return [*launch, str(ROOT / self.script), *self.words]

    @property
    def result(self) -> Path:
        """The output; of a pattern the newest file, or the pattern itself where there is none."""
        found = self.output.parent.glob(self.output.name) if "*" in self.output.name else ()
        return max(found, key=lambda path: path.stat().st_mtime_ns, default=self.output)

    def describe(self) -> str:
        """The command line as a user would type it in the project's folder."""
        launch = f"torchrun --nproc_per_node={self.processes}" if self.processes > 1 else "python3"
        return f"{launch} {self.script} {shlex.join(self.words)}"


class Stages:
    """The stages of one folder. A second process that enters the same folder is refused while the first is at work.

    Raises ValueError for a folder in use, OSError for one that cannot be written.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.record = self.folder / "state.json"

    def __enter__(self) -> "Stages":
        from filelock import FileLock, Timeout

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.folder / ".lock")
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"another process is at work in {self.folder}; wait for it, or choose another folder"
            ) from error
        except OSError as error:
            raise OSError(error.errno, f"could not write to {self.folder} ({error.strerror or error})") from error
        return self

    def __exit__(self, *error: object) -> None:
        self.lock.release()

    def _state(self) -> dict[str, Any]:
        try:
            return json.loads(self.record.read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ValueError(
                f"{self.record} is not readable ({error}); remove it, and finished stages are checked again"
            ) from error

    def is_done(self, stage: Stage) -> bool:
        """Whether it ran with these settings and inputs, and its output is still the file it left."""
        before = self._state().get(stage.name)
        if before is None or not stage.result.exists():
            return False
        inputs = before["ran"].pop("inputs")
        return (
            before["ran"] == _asked(stage)
            and len(inputs) == len(stage.inputs)
            and all(map(is_content_of, [*inputs, before["left"]], [*stage.inputs, stage.result]))
        )

    def seconds(self) -> dict[str, float]:
        """What each finished stage took, the last time it ran (less what a killed run had done before)."""
        return {name: entry["seconds"] for name, entry in self._state().items()}

    def run(self, stage: Stage) -> Path:
        """Runs what is not done yet. Returns its output. Raises ValueError where the script fails."""
        if self.is_done(stage):
            print(f"== {stage.name}: done before, {stage.result}", flush=True)
            return stage.result
        print(f"== {stage.name}: {stage.describe()}", flush=True)
        begin, ran = (
            time.monotonic(),
            _ran(stage),
        )  # of the inputs as they are now: a change meanwhile makes it run again
        code = launch(stage.command)
        if code:
            raise ValueError(
                f"the stage {stage.name!r} ended with code {code}, see above; the same command again goes on there"
            )
        result = stage.result
        if not result.exists():
            raise FileNotFoundError(f"the stage {stage.name!r} ended well and left no {stage.output}")
        seconds = round(time.monotonic() - begin, 1)
        done = {"ran": ran, "left": content_of(result), "seconds": seconds}
        write_json(self.record, {**self._state(), stage.name: done})
        return result


def is_content_of(recorded: Any, path: Path) -> bool:
    """Compare a record of `_ran` with what is there now; the first edition recorded name, size and time of change."""
    if not isinstance(recorded, dict):
        return path.exists() and recorded == content_of(path)
    status = path.stat() if path.exists() else None
    now = status and {"name": path.name, "bytes": status.st_size, "modified": status.st_mtime_ns}
    return recorded == now


def _ran(stage: Stage) -> dict[str, Any]:
    return {**_asked(stage), "inputs": [content_of(path) if path.exists() else None for path in stage.inputs]}


def _asked(stage: Stage) -> dict[str, Any]:
    asked = {"script": stage.script, "settings": stage.settings}
    return json.loads(json.dumps(asked))  # as it reads back


def launch(command: Sequence[str]) -> int:
    """Runs a command to its end and returns its exit code. Whatever ends this process short of SIGKILL ends that too."""
    process = None
    with _stopped_as_by_ctrl_c():
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            return process.wait()
        except BaseException:
            if process is not None:
                _end(process)
            raise


def _end(process: subprocess.Popen) -> None:
    """Asks, then insists: torchrun has to end its own processes first."""
    process.terminate()
    try:
        process.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def _stopped_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, so that the process at work is ended as well."""
    before = {}
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        try:
            before[number] = signal.signal(number, signal.default_int_handler)
        except ValueError:  # not in the main thread, which alone gets signals
            break
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port() -> int:
    """A port for torchrun, so that two chains on one machine do not meet."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def local_processes(device: str | None) -> int:
    """Processes to start: nproc_per_node of the environment, else one a GPU, else one.

    Raises ValueError for several machines: their processes have to be started on each.
    """
    nodes, given = os.environ.get("nnodes", "1"), os.environ.get("nproc_per_node")  # noqa: SIM112, the wrappers' names
    if nodes != "1":
        raise ValueError(
            f"nnodes={nodes}: this runs on one machine. Draw the samples with the command that --dry-run prints, on each of "
            "them; what is drawn is then found"
        )
    if given is not None:
        if not given.isdigit() or given == "0":
            raise ValueError(f"nproc_per_node={given} in the environment is not a number of processes")
        return int(given)
    if device is not None and not device.startswith("cuda"):
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def sampling_stage(words: Sequence[str], processes: int, name: str = "samples") -> Stage:
    """What sample_c2i_ddp.py draws with these flags. Its output is the .npz.

    Weights are looked up (and downloaded) here, once, and given to the script as paths: a run's folder whose checkpoints
    go on changing stands for the newest one now.
    Raises ValueError for flags that leave no .npz, FileNotFoundError and ConnectionError for weights.
    """
    from utils.runs import find_checkpoint

    args = sampling_flags(words)
    paths = []
    for flag, value in (("--gpt-ckpt", args.gpt_ckpt), ("--vq-ckpt", args.vq_ckpt)):
        if value is None:
            raise ValueError(
                f"{flag} is needed: a file, a run's folder, or a released file's name (pretrained_models/README.md)"
            )
        paths.append(find_checkpoint(value))
    gpt, vq = paths
    words = [*words, "--gpt-ckpt", str(gpt), "--vq-ckpt", str(vq)]  # the last one counts
    return planned_sampling(_last_of_each(words), args, gpt, vq, processes, name)


def planned_sampling(
    words: Sequence[str], args: argparse.Namespace, gpt: Path, vq: Path, processes: int, name: str = "samples"
) -> Stage:
    """The stage, with weights that need not be there yet. args: what the words mean."""
    folder = Path(args.sample_dir) / sample_c2i_ddp.folder_name(args, gpt, vq)
    settings = {key: value for key, value in vars(args).items() if key not in sample_c2i_ddp.IMMATERIAL}
    settings["num_fid_samples"] = args.num_fid_samples
    output = folder.with_name(folder.name + ".npz")
    return Stage(name, "autoregressive/sample/sample_c2i_ddp.py", tuple(words), processes, settings, (gpt, vq), output)


def sampling_flags(words: Sequence[str]) -> argparse.Namespace:
    """What flags of sample_c2i_ddp.py mean. Raises ValueError for --no-npz."""
    args = sample_c2i_ddp.flags().parse_args(list(words))
    if not args.npz:
        raise ValueError("--no-npz leaves nothing to evaluate: leave it out")
    return args


def evaluation_stage(
    reference: Path,
    samples: Path,
    processes: int,
    *,
    graph: Path | None = None,
    task: str = "generation",
    device: str | None = None,
    name: str = "evaluation",
) -> Stage:
    """The evaluator's five figures of samples (an .npz) against a reference. Its output is their .json."""
    words = [str(reference), str(samples), "--task", task]
    words += ["--graph", str(graph)] if graph else []
    words += ["--device", device] if device else []
    inputs = (reference, samples, graph) if graph else (reference, samples)
    output = Path(str(samples).removesuffix(".npz") + ".json")
    return Stage(name, "evaluations/c2i/evaluator.py", tuple(words), processes, {"task": task}, inputs, output)


def reconstruction_stage(name: str, words: Sequence[str], processes: int, *weights: Path) -> Stage:
    """What reconstruction_vq_ddp.py, or for a stage called "reference" val_ddp.py, writes. Its output is the .npz.

    A change inside --data-path is seen where it changes a name or a size (utils/sample_folder.py:content_of).
    """
    from tokenizer.reconstruction import IMMATERIAL
    from tokenizer.tokenizer_image import reconstruction_vq_ddp
    from tokenizer.validation import val_ddp

    script = val_ddp if name == "reference" else reconstruction_vq_ddp
    args = script.flags().parse_args(list(words))
    settings = {key: value for key, value in vars(args).items() if key not in IMMATERIAL}
    inputs, output = (Path(args.data_path), *weights), Path(args.sample_dir) / "*.npz"
    path = script.__name__.replace(".", "/") + ".py"
    return Stage(name, path, tuple(words), processes, settings, inputs, output)


def find_reference(given: str | None) -> Path:
    """The reference batch: the given one, else as utils/hub.py finds weights, else downloaded.

    Raises FileNotFoundError (no such file, or offline), ConnectionError.
    """
    from utils.download import download

    if given is not None:
        return Path(given)
    found = on_disk(REFERENCE)
    if found is not None:
        return found
    folders = _folders()
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    return download(REFERENCE_URL, folder / REFERENCE, "the reference batch")


def on_disk(name: str) -> Path | None:
    """A file of this name in the current folder or in pretrained_models/."""
    return next((folder / name for folder in (Path.cwd(), *_folders()) if (folder / name).is_file()), None)


def _folders() -> list[Path]:
    return [Path.cwd() / WEIGHTS, ROOT / WEIGHTS]


def _last_of_each(words: list[str]) -> list[str]:
    """Flags without the earlier of those given twice, so that a printed command is not longer than it need be."""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            flags.pop(flag, None)
            flags[flag] = [value] if value else []
        else:
            flags[next(reversed(flags))].append(word)
    return [word for flag, values in flags.items() for word in (flag, *values)]
