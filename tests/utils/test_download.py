"""Downloads from a plain web address, against a server of the test's own."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from utils import download as module
from utils.download import download, sha256_of

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT with ranges; breaks off after `limit` bytes where that is set."""

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        if self.path != "/file":
            return self.send_error(404)
        content, start = server.content, 0
        if "Range" in self.headers and self.headers["If-Range"] == server.version:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        if start >= len(content) and start:
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if server.version:
            self.send_header("ETag", server.version)
        self.end_headers()
        self.wfile.write(content[start : start + (server.limit or len(content))])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.version, server.limit, server.requests = CONTENT, '"1"', None, []
    server.url = f"http://127.0.0.1:{server.server_port}/file"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_file_arrives_whole_and_its_checksum_is_shown(server, tmp_path, capsys):
    target = tmp_path / "folder" / "reference.npz"
    assert download(server.url, target, "the batch") == target
    assert target.read_bytes() == CONTENT
    assert hashlib.sha256(CONTENT).hexdigest() in capsys.readouterr().out
    download(server.url, target, "the batch")
    assert len(server.requests) == 1
    assert [path.name for path in target.parent.iterdir() if not path.name.endswith(".lock")] == ["reference.npz"]


def test_a_broken_download_goes_on(server, tmp_path):
    server.limit = 300_000
    target = tmp_path / "file"
    with pytest.raises(ConnectionError, match=r"broke off after 300,000 of 1,048,576 bytes.*put it at"):
        download(server.url, target, "the batch")
    assert not target.exists()
    server.limit = None
    download(server.url, target, "the batch")
    assert server.requests[1]["Range"] == "bytes=300000-"
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("version", ['"2"', None])
def test_a_file_that_changed_meanwhile_is_fetched_anew(server, tmp_path, version):
    server.limit = 1000
    with pytest.raises(ConnectionError):
        download(server.url, tmp_path / "file", "the batch")
    server.limit, server.version, server.content = None, version, CONTENT[::-1]
    assert download(server.url, tmp_path / "file", "the batch").read_bytes() == CONTENT[::-1]


def test_a_part_longer_than_the_file_is_fetched_anew(server, tmp_path):
    server.limit = 1000
    with pytest.raises(ConnectionError):
        download(server.url, tmp_path / "file", "the batch")
    server.limit, server.content = None, CONTENT[:1000]
    assert download(server.url, tmp_path / "file", "the batch").read_bytes() == CONTENT[:1000]


def test_a_wrong_checksum_keeps_nothing(server, tmp_path):
    with pytest.raises(ValueError, match="expected abc"):
        download(server.url, tmp_path / "file", "the batch", sha256="abc")
    assert not (tmp_path / "file").exists()
    download(server.url, tmp_path / "file", "the batch", sha256=hashlib.sha256(CONTENT).hexdigest())
    assert sha256_of(tmp_path / "file") == hashlib.sha256(CONTENT).hexdigest()


def test_what_is_not_there(server, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"the batch is not at .*/other \(404"):
        download(server.url.replace("/file", "/other"), tmp_path / "file", "the batch")
    address = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match=rf"Fetch it from {address} and put it at {tmp_path}/file"):
        download(address, tmp_path / "file", "the batch")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE"):
        download(address, tmp_path / "file", "the batch")


def test_a_disk_that_cannot_be_written(server, tmp_path, monkeypatch):
    def full(url, part, what):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_fetch", full)
    with pytest.raises(OSError, match=r"could not write .*No space left"):
        download(server.url, tmp_path / "file", "the batch")
