"""Writing files so that nothing is lost: to a temporary name in the same folder, flushed to the disk, then renamed.

with atomic_write("report.json") as f:
    f.write(b"{}")
"""

import json
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4


@contextmanager
def atomic_write(path: str | Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a binary file that takes the name `path` only once it is complete.

    Missing parent folders are made. Where anything fails, the partial file is removed and what stood at `path` stays.
    Without `durable` the disk is not waited for: for thousands of small files that can be made again, which a power cut
    may leave empty.
    Raises OSError that names the file: the folder is not writable, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as f:
            yield f
            f.flush()
            if durable:
                os.fsync(f.fileno())
        os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        kept = "; the file that was there before is untouched" if path.exists() else ""
        raise OSError(error.errno, f"could not write {path} ({error.strerror or error}){kept}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as f:
        f.write((json.dumps(value, indent=2) + "\n").encode())


def require_regular(path: str | os.PathLike) -> None:
    """Raise ValueError for a pipe, socket, device or folder, which may keep a reader waiting for ever; OSError for no file."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{os.fspath(path)} is not a regular file: give a file, or remove it")


def crc32_of(path: str | Path) -> int:
    """Return the checksum of a file's content."""
    value = 0
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable; file systems that cannot sync a folder are let be."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
