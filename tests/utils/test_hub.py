"""Released names: found on this disk, downloaded from a stand-in hub on this machine, or refused with advice."""

import errno
import hashlib
import http.server
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from utils import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = bytes(range(256)) * 4096


class StandInHub(http.server.ThreadingHTTPServer):
    """The hub's answers to a metadata request, a download (with ranges) and a listing of a repository."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.cut_at: int | None = None
        self.cuts_left = 0
        self.downloads: list[str | None] = []

    def handle_error(self, request, client_address):
        """A connection cut on purpose is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandInHub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._file(send=False)

    def do_GET(self):
        listing = re.match(r"/api/models/([^/]+/[^/]+)/(revision|tree)/", self.path)
        if listing:
            self._listing(listing[1], listing[2])
        else:
            self._file(send=True)

    def _json(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _listing(self, repo_id, kind):
        files = {name.removeprefix(repo_id + "/"): data for name, data in self.server.files.items() if repo_id in name}
        if kind == "revision":
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": repo_id, "modelId": repo_id, "sha": COMMIT, "siblings": siblings})
        else:
            self._json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
            )

    def _file(self, send):
        match = re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        data = self.server.files.get(f"{match[1]}/{match[2]}") if match else None
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(wanted[1]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if not send:
            return
        self.server.downloads.append(self.headers.get("Range"))
        if self.server.cuts_left:
            self.server.cuts_left -= 1
            self.wfile.write(data[start : self.server.cut_at])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        else:
            self.wfile.write(data[start:])


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    """An empty pretrained_models/ in the current folder, and no other one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_ROOT", tmp_path / "project")
    folder = tmp_path / "pretrained_models"
    folder.mkdir()
    return folder


@pytest.fixture
def server(weights, monkeypatch):
    """A stand-in hub that huggingface_hub is pointed at, with an empty cache and no waiting between attempts."""
    import huggingface_hub.file_download as file_download
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    serving = StandInHub(
        {
            "FoundationVision/LlamaGen/c2i_B_256.pt": CONTENT,
            "pytttttt/LlamaGen-NPP/c2i_B_256.pt": CONTENT[::-1],
            "someone/weights/mine.safetensors": b"mine",
            "google/flan-t5-xl/config.json": b"{}",
            "google/flan-t5-xl/spiece.model": b"pieces",
            "google/flan-t5-xl/model.safetensors": b"weights",
            "google/flan-t5-xl/tf_model.h5": b"not wanted",
        }
    )
    thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{serving.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(weights.parent / "cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 65536)
    for module in (file_download, _http):
        monkeypatch.setattr(module, "time", _NoWaiting(module.time))
    yield serving
    serving.shutdown()
    serving.server_close()


class _NoWaiting:
    def __init__(self, time):
        self._time = time

    def __getattr__(self, name):
        return getattr(self._time, name)

    def sleep(self, seconds):
        pass


def put(path: Path, content: bytes = b"here") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def left_over(weights: Path) -> list[str]:
    """Files that a download left beside what it was asked for."""
    incoming = weights / ".incoming"
    return sorted(p.name for p in incoming.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_an_existing_path_is_taken_as_it_is(weights, tmp_path):
    file = put(tmp_path / "runs" / "0005000.pt")
    assert hub.resolve(file) == file
    assert hub.resolve("runs/0005000.pt").samefile(file)
    assert hub.resolve(tmp_path / "runs").samefile(file.parent)


@pytest.mark.parametrize("name", ["c2i_L_384.pt", "./pretrained_models/c2i_L_384.pt", "LlamaGen/c2i_L_384.pt"])
def test_released_names_are_found_in_the_project_from_any_folder(weights, tmp_path, name):
    file = put(tmp_path / "project" / "pretrained_models" / "c2i_L_384.pt")
    assert hub.is_released(name)
    assert hub.resolve(name) == file


def test_the_same_file_name_in_two_repositories(weights):
    flat = put(weights / "c2i_B_256.pt")
    assert hub.resolve("c2i_B_256.pt") == flat
    assert hub.resolve("FoundationVision/LlamaGen/c2i_B_256.pt") == flat
    own = put(weights / "LlamaGen-NPP" / "c2i_B_256.pt")
    for name in ("pytttttt/LlamaGen-NPP/c2i_B_256.pt", "LlamaGen-NPP/c2i_B_256.pt"):
        assert hub.resolve(name) == own
    assert hub.resolve("c2i_B_256.pt", repo_id="pytttttt/LlamaGen-NPP") == own
    assert hub.resolve("c2i_B_256.pt") == flat


def test_another_repositorys_file_is_never_taken_for_it(weights, server):
    put(weights / "c2i_B_256.pt")
    got = hub.resolve("pytttttt/LlamaGen-NPP/c2i_B_256.pt")
    assert got == weights / "LlamaGen-NPP" / "c2i_B_256.pt"
    assert got.read_bytes() == CONTENT[::-1]


def test_a_released_name_is_downloaded_once(weights, server):
    for _ in range(2):
        got = hub.resolve("./pretrained_models/c2i_B_256.pt")
        assert got.samefile(weights / "c2i_B_256.pt")
        assert got.read_bytes() == CONTENT
    assert len(server.downloads) == 1
    assert left_over(weights) == []


def test_several_processes_at_once_download_once(weights, server):
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(hub.resolve, ["c2i_B_256.pt"] * 4))
    assert {path.read_bytes() == CONTENT for path in paths} == {True}
    assert len(server.downloads) == 1


def test_a_cut_connection_is_taken_up_where_it_broke(weights, server):
    server.cut_at, server.cuts_left = len(CONTENT) // 2, 1
    assert hub.resolve("c2i_B_256.pt").read_bytes() == CONTENT
    assert server.downloads == [None, f"bytes={len(CONTENT) // 2}-"]


def test_a_download_that_breaks_off_leaves_no_file_of_that_name(weights, server):
    server.cut_at, server.cuts_left = 0, 100
    with pytest.raises(ConnectionError, match=r"c2i_B_256\.pt failed.*Fetch it from http.*/resolve/main/.* put it at"):
        hub.resolve("c2i_B_256.pt")
    assert not (weights / "c2i_B_256.pt").exists()
    server.cuts_left = 0
    assert hub.resolve("c2i_B_256.pt").read_bytes() == CONTENT


def test_a_folder_appears_only_when_it_is_whole(weights, server, monkeypatch):
    import huggingface_hub

    def breaks_off(repo_id, local_dir, **options):
        put(Path(local_dir) / "config.json")
        raise OSError("connection lost")

    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub, "snapshot_download", breaks_off)
        with pytest.raises(ConnectionError, match="connection lost"):
            hub.resolve("google/flan-t5-xl")
    target = weights / "t5-ckpt" / "flan-t5-xl"
    assert not target.exists()
    assert hub.resolve("pretrained_models/t5-ckpt/flan-t5-xl").samefile(target)
    assert sorted(p.name for p in target.iterdir()) == ["config.json", "model.safetensors", "spiece.model"]
    assert left_over(weights) == []


def test_any_repository_by_its_id(weights, server):
    got = hub.resolve("mine.safetensors", repo_id="someone/weights")
    assert got == weights / "weights" / "mine.safetensors"
    assert got.read_bytes() == b"mine"
    with pytest.raises(FileNotFoundError, match=r"the hub has no someone/weights/other\.safetensors"):
        hub.resolve("other.safetensors", repo_id="someone/weights")
    with pytest.raises(ValueError, match="expected 'owner/name'"):
        hub.resolve("mine.safetensors", repo_id="weights")


def test_offline_says_where_to_fetch_it_and_where_to_put_it(weights, server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as caught:
        hub.resolve("PAR-XL-4x.pt")
    message = str(caught.value)
    assert "HF_HUB_OFFLINE" in message
    assert f"127.0.0.1:{server.server_port}/Epiphqny/PAR/resolve/main/PAR-XL-4x.pt" in message
    assert str(weights / "PAR-XL-4x.pt") in message
    assert server.downloads == []


def test_the_hubs_own_cache_serves_offline(weights, server, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    cached = huggingface_hub.hf_hub_download("FoundationVision/LlamaGen", "c2i_B_256.pt")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve("c2i_B_256.pt").samefile(cached)


def test_no_network(weights, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match=r"could not reach the hub for FoundationVision/LlamaGen/c2i_B_256\.pt"):
        hub.resolve("c2i_B_256.pt")
    assert not (weights / "c2i_B_256.pt").exists()


def test_a_full_disk_is_not_blamed_on_the_network(weights, server, monkeypatch):
    import huggingface_hub

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(OSError, match=r"could not write .*c2i_B_256\.pt") as caught:
        hub.resolve("c2i_B_256.pt")
    assert caught.value.errno == errno.ENOSPC
    assert not isinstance(caught.value, ConnectionError)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("c2i_L_385.pt", r"did you mean the released c2i_L_384\.pt"),
        ("/nowhere/c2i_L_384.pt", r"did you mean the released c2i_L_384\.pt$"),
        ("../c2i_L_384.pt", r"did you mean the released c2i_L_384\.pt$"),
        ("xyz", r"pretrained_models/README\.md lists the released ones"),
    ],
)
def test_an_unknown_name_is_refused_without_a_download(weights, server, name, advice):
    assert not hub.is_released(name)
    with pytest.raises(FileNotFoundError, match=advice) as caught:
        hub.resolve(name)
    assert str(caught.value).startswith(f"no file {name}")
    assert server.downloads == []


def test_the_table_and_the_readme_agree():
    readme = (Path(__file__).parents[2] / "pretrained_models" / "README.md").read_text()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in readme.splitlines() if "|" in line]
    listed = {(row[2], row[0]): row[3] for row in rows if len(row) == 4}
    for release in hub.RELEASED.values():
        file = Path(release.filename).name or release.home + "/"
        flags = " ".join(f"{flag} {value}".strip() for flag, value in release.flags.items())
        assert listed[release.repo_id, file] == flags
