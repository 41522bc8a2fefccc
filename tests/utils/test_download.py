"""Downloads from a plain web address, against a server of the test's own."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from utils.download import download

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT; breaks off after `limit` bytes where that is set."""

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        if self.path != "/file":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: server.limit])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.limit, server.requests = None, []
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
    assert [path.name for path in target.parent.iterdir()] == ["reference.npz"]


def test_download_that_breaks_off_keeps_nothing(server, tmp_path):
    server.limit = 300_000
    with pytest.raises(ValueError, match=r"broke off after 300,000 of 1,048,576 bytes.*put it at"):
        download(server.url, tmp_path / "file", "the batch")
    assert list(tmp_path.iterdir()) == []
    server.limit = None
    assert download(server.url, tmp_path / "file", "the batch").read_bytes() == CONTENT


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


def test_a_disk_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="could not write"):
        download(server.url, tmp_path / "file" / "reference.npz", "the batch")
