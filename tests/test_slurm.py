"""scripts/slurm/run.sbatch: what it starts, and when the job goes back into the queue. srun and scontrol are stand-ins."""

import os
import signal
import subprocess
import time

import pytest

from tests.helpers import ROOT

PATIENCE = 120  # seconds that a busy machine may take
# Writes down its words, then what it was sent: USR1 or nothing. With EARLY it signals the job as soon as it runs.
SRUN = """#!/usr/bin/env bash
trap 'echo USR1 >>"$NOTES"; exit 0' USR1
echo "$@" >>"$NOTES"
[ -z "$EARLY" ] || kill -USR1 "$PPID"
for i in $(seq "$TENTHS"); do sleep 0.1; done
exit "$CODE"
"""


@pytest.fixture
def submit(tmp_path):
    """Starts the batch script as Slurm would: a copy of it, from another folder."""
    programs = {"srun": SRUN, "scontrol": '#!/usr/bin/env bash\necho "scontrol $@" >>"$NOTES"\n'}
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    batch = tmp_path / "slurm_script"
    batch.write_text((ROOT / "scripts/slurm/run.sbatch").read_text())

    def start(*words, tenths=0, code=0, early=""):
        given = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "NOTES": str(tmp_path / "notes")}
        given |= {
            "TENTHS": str(tenths),
            "CODE": str(code),
            "EARLY": early,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        }
        given["VIRTUAL_ENV"] = "x"
        return subprocess.Popen(["bash", batch, *words], cwd=tmp_path, env=given, stderr=subprocess.PIPE, text=True)

    start.notes = tmp_path / "notes"
    return start


def notes(path):
    return path.read_text().splitlines() if path.exists() else []


def test_training_gets_resume_and_ends_with_its_exit_code(submit):
    assert submit("autoregressive/train/train_c2i.py", "--code-path", "c", code=3).wait(PATIENCE) == 3
    line = "--kill-on-bad-exit=1 python3 autoregressive/train/train_c2i.py --code-path c --resume"
    assert notes(submit.notes) == [line]
    assert submit("autoregressive/train/extract_codes_c2i.py").wait(PATIENCE) == 0
    assert notes(submit.notes)[1:] == ["--kill-on-bad-exit=1 python3 autoregressive/train/extract_codes_c2i.py"]


def test_a_job_at_the_end_of_its_time_is_requeued_once_its_run_has_ended(submit):
    job = submit("autoregressive/train/train_c2i.py", tenths=300)
    deadline = time.monotonic() + PATIENCE
    while not notes(submit.notes) and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(PATIENCE) == 0
    assert notes(submit.notes)[1:] == ["USR1", "scontrol requeue 7"]


def test_a_signal_while_the_run_starts_is_passed_on(submit):
    job = submit("autoregressive/train/train_c2i.py", tenths=300, early="yes")
    assert job.wait(PATIENCE) == 0
    assert notes(submit.notes)[1:] == ["USR1", "scontrol requeue 7"]


def test_a_script_that_is_not_there_is_one_line(submit):
    job = submit("train.py")
    assert job.wait(PATIENCE) == 2 and job.stderr.read().count("\n") == 1
    assert not submit.notes.exists()
