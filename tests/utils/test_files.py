"""A file either appears whole or not at all, and what was there before survives a failure."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils.files import atomic_write


@contextlib.contextmanager
def largest_file(size: int):
    """Makes the kernel refuse to write any file beyond `size` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_file_takes_its_name_when_complete(tmp_path):
    path = tmp_path / "made" / "on the way" / "report.txt"
    with atomic_write(path) as f:
        f.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["report.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("half-way"), OSError(errno.ENOSPC, "disk full")])
def test_a_failure_half_way_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "report.txt"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_write(path) as f:
        f.write(b"new" * 100_000)
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["report.txt"]


def test_a_full_disk_names_the_file(tmp_path):
    path = tmp_path / "report.txt"
    path.write_bytes(b"old")
    refused = pytest.raises(OSError, match=r"could not write .*report\.txt .*before is untouched")
    with largest_file(1000), refused, atomic_write(path) as f:
        f.write(b"n" * 5000)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["report.txt"]


def test_a_folder_that_cannot_be_written_names_the_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(OSError, match=r"could not write .*file/report\.txt"),
        atomic_write(tmp_path / "file/report.txt"),
    ):
        pytest.fail("there is nowhere to write")


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.txt"
    path.write_bytes(b"old")
    code = (
        "import os, sys\nfrom utils.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as f:\n"
        "    f.write(b'new')\n    f.flush()\n    os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
