"""Writing files so that nothing is lost, to a temporary name in the same folder that is changed when all is there; their content."""

import hashlib
import json
import os
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

# Files of a folder that are read to know it, and the size up to which a JSON file may be a record of checksums.
_MOST_READ, _SMALL = 256, 2**20


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
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def content_of(path: Path) -> str:
    """Return sixteen digits of what a file holds, or the files of a folder, whatever their place, name and time.

    Of a zip (what torch.save and numpy.savez write) its table of contents is read, which has the checksum of every tensor;
    of shards the checksums beside them. Of a folder of more than 256 other files so many are read, and of all the names and
    sizes compared.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        files = sorted(found for found in path.rglob("*") if found.is_file() and not found.name.startswith("."))
        vouched = _vouched_files(files)
        read = [file for file in files if file not in vouched]
        read = set(read[:: -(-len(read) // _MOST_READ) or 1])
        for file in files:
            content = content_of(file) if file in read else ""
            digest.update(repr((file.relative_to(path).as_posix(), file.stat().st_size, content)).encode())
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # names begin with the name that the file had when it was written
            entries = [(entry.filename.split("/", 1)[-1], entry.CRC, entry.file_size) for entry in archive.infolist()]
        digest.update(repr([entry for entry in entries if not entry[0].endswith("serialization_id")]).encode())
    else:
        with path.open("rb") as f:
            digest = hashlib.file_digest(f, "sha256")
    return digest.hexdigest()[:16]


def _vouched_files(files: Iterable[Path]) -> set[Path]:
    """Return the files whose checksums a small JSON file beside them has: shards of weights, codes and features."""
    vouched: set[Path] = set()
    for file in files:
        if file.suffix == ".json" and file.stat().st_size < _SMALL:
            with suppress(ValueError):
                values = json.loads(file.read_bytes())
                names = values if file.name.endswith(".crc32.json") else values.get("files", {})
                vouched.update(file.with_name(name) for name in names)
    return vouched
