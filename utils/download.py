"""Files that lie at a plain web address, fetched once; none stands half under its name."""

import hashlib
import os
import shutil
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from utils.files import atomic_write

TIMEOUT_SECONDS = 60


def download(url: str, target: str | Path, what: str) -> Path:
    """Fetch `url` to `target` unless a file is there. `what` names it in messages. Prints the file's SHA-256.

    Raises ConnectionError (no connection), FileNotFoundError (the server has no such file, or offline mode:
    HF_HUB_OFFLINE), ValueError (it broke off), OSError (the disk is full or not writable).
    """
    from tqdm import tqdm

    target = Path(target)
    if target.exists():
        return target
    by_hand = f"Fetch it from {url} and put it at {target}"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise FileNotFoundError(f"{what} is not at {target} and HF_HUB_OFFLINE is set. {by_hand}")
    request = urllib.request.Request(url, headers={"User-Agent": "python-urllib"})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404, 410):
            raise FileNotFoundError(f"{what} is not at {url} ({error.code} {error.reason})") from error
        raise ConnectionError(f"{what} could not be downloaded ({error.code} {error.reason}). {by_hand}") from error
    except OSError as error:
        why = getattr(error, "reason", error)
        raise ConnectionError(f"{what} could not be downloaded ({why}). {by_hand}") from error
    total = int(response.headers.get("Content-Length") or 0)
    with response, atomic_write(target) as f, tqdm.wrapattr(response, "read", total=total or None, desc=what) as source:
        try:
            shutil.copyfileobj(source, f)
        except (HTTPException, TimeoutError, ConnectionError) as error:
            raise ValueError(f"{what} could not be downloaded ({error}). {by_hand}") from error
        if total and f.tell() != total:
            raise ValueError(f"{what} broke off after {f.tell():,} of {total:,} bytes. {by_hand}")
        f.flush()
        found = sha256_of(f.name)
    print(f"downloaded {what} to {target}, SHA-256 {found}", flush=True)
    return target


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
