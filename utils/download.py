"""Files that lie at a plain web address: fetched once, taken up where a download broke, never half under their name.

path = download("https://example.org/reference.npz", Path("pretrained_models/reference.npz"), "the reference batch")
"""

import errno
import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

CHUNK = 1 << 20
TIMEOUT_SECONDS = 60
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}


def download(url: str, target: str | Path, what: str, *, sha256: str | None = None) -> Path:
    """Fetches `url` to `target` unless a file is there. `what` names it in messages. Prints the file's SHA-256.

    What has arrived stays in `target`.part: the next call goes on from there, if the server still has the same file. Of
    several processes that ask at once one downloads.
    Raises ConnectionError (no connection, or it broke), FileNotFoundError (the server has no such file, or offline mode:
    HF_HUB_OFFLINE), ValueError (the checksum is not `sha256`), OSError (the disk is full or not writable).
    """
    from filelock import FileLock

    target = Path(target)
    if target.exists():
        return target
    by_hand = f"Fetch it from {url} and put it at {target}"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise FileNotFoundError(f"{what} is not at {target} and HF_HUB_OFFLINE is set. {by_hand}")
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{part}.lock"):
            if not target.exists():
                _fetch(url, part, what)
                found = sha256_of(part)
                if sha256 is not None and found != sha256:
                    part.unlink()
                    raise ValueError(f"{what} from {url} has the SHA-256 {found}, expected {sha256}; nothing was kept")
                os.replace(part, target)
                _entity(part).unlink(missing_ok=True)
                print(f"downloaded {what} to {target}, SHA-256 {found}", flush=True)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404, 410):
            raise FileNotFoundError(f"{what} is not at {url} ({error.code} {error.reason})") from error
        raise ConnectionError(f"{what} could not be downloaded ({error.code} {error.reason}). {by_hand}") from error
    except (ConnectionError, TimeoutError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", error)
        raise ConnectionError(f"{what} could not be downloaded ({reason}). {by_hand}") from error
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise OSError(error.errno, f"could not write {target} ({error.strerror})") from error
        raise ConnectionError(f"{what} could not be downloaded ({error}). {by_hand}") from error
    return target


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file's content, hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _entity(part: Path) -> Path:
    """Return the file that keeps the server's version name of the download `part`."""
    return part.with_name(part.name + ".etag")


def _fetch(url: str, part: Path, what: str) -> None:
    from tqdm import tqdm

    request = urllib.request.Request(url, headers={"User-Agent": "python-urllib"})
    have = part.stat().st_size if part.exists() and _entity(part).exists() else 0
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", _entity(part).read_text())
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.unlink()  # what is here is not a beginning of what is there
        return _fetch(url, part, what)
    with response:
        if response.status != 206:
            have = 0
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if version and not version.startswith("W/"):
            _entity(part).write_text(version)
        else:
            _entity(part).unlink(missing_ok=True)
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        with (
            open(part, "ab" if have else "wb") as f,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=what) as bar,
        ):
            while chunk := response.read(CHUNK):
                f.write(chunk)
                bar.update(len(chunk))
            f.flush()
            os.fsync(f.fileno())
    size = part.stat().st_size
    if total is not None and size != total:
        raise ConnectionError(f"it broke off after {size:,} of {total:,} bytes; the same command goes on from there")
