"""Limits of clients, against a server on a port: none holds places, connections, memory, or the end of the server."""

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from asyncio import selector_events
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

import httpx
from fastapi import FastAPI

from autoregressive.serve import decoder, draining, server
from autoregressive.serve.api import IMAGES, create_app
from autoregressive.serve.body import Limits
from autoregressive.serve.decoder import Decoder
from autoregressive.serve.errors import REFUSED
from autoregressive.serve.service import Service
from benchmarks.serving import started_server
from tests.helpers import ROOT
from tests.serve.servers import ScriptedEngine, listening
from tokenizer.load import load_tokenizer

pytestmark = pytest.mark.slow  # through whole scripts and servers

PATIENCE = 120  # seconds, of which a fraction is needed


@pytest.fixture(scope="module")
def tokenizer(small_files):
    return load_tokenizer(small_files.vq)


@contextmanager
def serving(tokenizer, engine=None, app=None, sock=None, **limits):
    """A server of a ScriptedEngine: (address, service)."""
    with listening(
        lambda: Service(engine or ScriptedEngine(), Decoder(tokenizer, 8), limits=Limits(**limits)), sock, **(app or {})
    ) as made:
        yield made


def connect(address: str) -> socket.socket:
    host, _, port = address.removeprefix("http://").rpartition(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((host, int(port)))
    sock.settimeout(PATIENCE)
    return sock


def ask(address: str, **body) -> socket.socket:
    """A client that sends a whole request."""
    sock, content = connect(address), json.dumps(body).encode()
    head = (
        f"POST {IMAGES} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    sock.sendall(head.encode() + content)
    return sock


def is_closed(sock: socket.socket) -> bool:
    """Reads to the end. Whether the server closed the connection."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)  # through a small window megabytes may take minutes
    try:
        while sock.recv(2**16):
            pass
        return True
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def until(condition) -> None:
    """Waits for it."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.02)


@pytest.fixture
def large_files(monkeypatch):
    """Files of more than the system keeps for a connection."""
    monkeypatch.setattr(decoder, "file_bytes", lambda *args: bytes(8 * 2**20))


@pytest.fixture
def cut(monkeypatch):
    """The clients whose connections were cut, in order."""
    cut, abort = [], selector_events._SelectorTransport.abort

    def note(transport):
        cut.append(transport.get_extra_info("peername"))
        abort(transport)

    monkeypatch.setattr(selector_events._SelectorTransport, "abort", note)
    return cut


@pytest.fixture
def looks(monkeypatch):
    """The bytes that wait for clients, after each time that the server has looked at its connections."""
    looks, close_idle = [], draining.DrainingServer._close_idle

    def note(server):
        close_idle(server)
        looks.append(sum(each.transport.get_write_buffer_size() for each in server.server_state.connections))

    monkeypatch.setattr(draining.DrainingServer, "_close_idle", note)
    return looks


def until_looked_at(looks: list[int]) -> None:
    """Waits for a whole look that begins after this."""
    seen = len(looks)
    until(lambda: len(looks) > seen + 1)


@pytest.mark.parametrize("asked", [{"stream": True, "partial_rows": 1}, {"n": 2}, {"response_format": "png"}])
def test_answers_nobody_reads_hold_no_place_and_are_cut(tokenizer, monkeypatch, large_files, cut, asked):
    monkeypatch.setattr(draining, "SECONDS_TO_READ", PATIENCE)
    with serving(tokenizer, max_queue=3, max_n=3) as (address, service):
        unread = [ask(address, class_label=3, **asked) for _ in range(3 // asked.get("n", 1))]
        until(lambda: service.metrics.images._value.get() == 3 - 3 % asked.get("n", 1) and service.idle)
        monkeypatch.setattr(decoder, "file_bytes", lambda *args: b"small")
        assert httpx.post(address + IMAGES, json={"class_label": 3, "n": 3}, timeout=PATIENCE).status_code == 200
        monkeypatch.setattr(draining, "SECONDS_TO_READ", 0.1)  # once all is drawn: who is cut before gets nothing drawn
        until(lambda: len(cut) == len(unread))  # nothing is read meanwhile
        assert all(map(is_closed, unread))
        text = httpx.get(address + "/metrics", timeout=PATIENCE).text
        assert 'image_queue_length{model="small"} 0.0' in text


@pytest.mark.parametrize("stream", [False, True])
def test_draining_ends_though_answers_are_not_read(tokenizer, monkeypatch, large_files, stream):
    monkeypatch.setattr(draining, "SECONDS_TO_READ", PATIENCE)
    with serving(tokenizer) as (address, service):
        unread = [ask(address, class_label=3, stream=stream) for _ in range(3)]
        until(lambda: service.metrics.images._value.get() == 3)
        monkeypatch.setattr(draining, "SECONDS_TO_READ", 0.1)
        service.draining = True
        until(lambda: service.engine.dead)  # with which the server ends
        for sock in unread:
            sock.close()


def test_unread_answers_beyond_the_memory_for_them_are_cut_oldest_first(
    tokenizer, monkeypatch, large_files, cut, looks
):
    monkeypatch.setattr(draining, "MOST_UNREAD", 24 * 2**20)
    with serving(tokenizer) as (address, service):
        unread = []
        for count in range(1, 9):  # eleven megabytes each, of which the system keeps some
            unread.append(ask(address, class_label=3))
            until(lambda count=count: service.metrics.requests("200")._value.get() == count)
            until_looked_at(looks)
        until(lambda: looks[-1] <= 24 * 2**20)
        assert 4 <= len(cut) <= 7 and cut == [sock.getsockname() for sock in unread[: len(cut)]]
        for sock in unread[len(cut) :]:
            receive(sock, 10 * 2**20)
            sock.close()


def receive(sock: socket.socket, count: int) -> None:
    """Reads so many bytes."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
    while count > 0:
        chunk = sock.recv(min(count, 2**18))
        assert chunk, f"the connection was closed {count} bytes before the end"
        count -= len(chunk)


def test_slow_reader_gets_its_whole_answer(tokenizer, monkeypatch, looks):
    """Nine tenths of the time that a client has go by on the server's clock whenever it has taken something."""
    now, size = 0.0, 32 * 2**20
    monkeypatch.setattr(decoder, "file_bytes", lambda *args: bytes(size))
    monkeypatch.setattr(draining, "time", SimpleNamespace(monotonic=lambda: now))
    with serving(tokenizer) as (address, _):
        sock, left = ask(address, class_label=3, response_format="png"), None
        for _ in range(16):
            receive(sock, size // 16)
            until_looked_at(looks)
            if looks[-1] not in (left, 0):
                left, now = looks[-1], now + 0.9 * draining.SECONDS_TO_READ
        assert now > 2 * draining.SECONDS_TO_READ


BEGUN = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Le"


@pytest.mark.parametrize(
    "sent",
    [b"", b"G", BEGUN, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" + BEGUN,
     b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nabc"],
    ids=["nothing", "a letter", "half a head", "a request", "half of a second head", "half a body that nobody reads"],
)  # fmt: skip
def test_connections_that_ask_for_nothing_are_closed(tokenizer, monkeypatch, sent):
    engine = ScriptedEngine()
    with serving(tokenizer, engine) as (address, _):
        engine.gate = asyncio.Event()
        waits = ask(address, class_label=1)  # for longer than that
        idle = connect(address)
        idle.sendall(sent)
        until(lambda: engine.open == 1)
        assert httpx.get(address + "/health", timeout=PATIENCE).status_code == 200  # what was sent before has been read
        monkeypatch.setattr(draining, "SECONDS_TO_ASK", 0.3)
        trickling = threading.Thread(target=trickle, args=(idle,)) if sent.startswith(BEGUN) else None
        if trickling:
            trickling.start()
        assert is_closed(idle)
        if trickling:
            trickling.join()
        waits.settimeout(0.5)
        with pytest.raises(TimeoutError):
            waits.recv(1)
        waits.close()


def trickle(sock: socket.socket) -> None:
    """Sends a letter now and then."""
    try:
        for _ in range(200):
            sock.sendall(b"x")
            time.sleep(0.05)
    except OSError:
        pass


def test_body_that_does_not_come_is_answered_in_time(tokenizer, monkeypatch):
    monkeypatch.setattr("autoregressive.serve.api.SECONDS_TO_SEND_A_BODY", 0.2)
    with serving(tokenizer) as (address, _):
        sock = connect(address)
        sock.sendall(BEGUN + b"ngth: 900\r\nContent-Type: application/json\r\n\r\n{")
        thread = threading.Thread(target=trickle, args=(sock,))
        thread.start()
        assert sock.recv(2**16).startswith(b"HTTP/1.1 408 ")
        sock.close()
        thread.join()


@pytest.mark.parametrize(
    "name, size, count", [("one", 2**20, 1), ("small", 100, 10_000), ("within one read", 40_000, 1)]
)
def test_headers_beyond_the_limit_are_refused(tokenizer, name, size, count):
    with serving(tokenizer, app={"api_keys": ["s3cret"]}) as (address, _):
        sock = connect(address)
        try:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n" + (b"X-A: " + b"x" * size + b"\r\n") * count + b"\r\n")
            answer = sock.recv(2**16)
        except ConnectionError:
            answer = b"HTTP/1.1 400 "  # closed while more came
        assert answer[:13] in (b"HTTP/1.1 400 ", b"HTTP/1.1 431 ")
        assert httpx.get(address + "/health", headers={"X-A": "x" * 1000}, timeout=PATIENCE).status_code == 200


def test_server_is_one_whatever_is_installed_beside_it(tokenizer):
    config = draining.DrainingServer(None).config
    assert (config.http, config.ws, config.loop) == ("h11", "none", "asyncio")


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_large_pictures_hold_up_no_picture_of_the_models_size(tokenizer, monkeypatch, kind):
    released, file_bytes = threading.Event(), decoder.file_bytes

    def slowly(image, size, *more):
        if size == 128:
            assert released.wait(PATIENCE)
        return file_bytes(image, size, *more)

    monkeypatch.setattr(decoder, "file_bytes", slowly)
    with serving(tokenizer) as (address, service):
        large = [ask(address, class_label=1, n=8, size="128x128", output_format=kind) for _ in range(4)]
        until(lambda: service.queued_images == 32)
        for _ in range(3):
            assert httpx.post(address + IMAGES, json={"class_label": 2, "n": 2}, timeout=PATIENCE).status_code == 200
        assert service.queued_images == 32
        released.set()
        assert all(sock.recv(12) == b"HTTP/1.1 200" for sock in large)


def test_decoder_whole_images_come_before_partial_ones(tokenizer, monkeypatch):
    decoding, lengths = Decoder(tokenizer, 8), []
    compute = decoding._compute
    monkeypatch.setattr(decoding, "_compute", lambda tokens: lengths.append(len(tokens[0])) or compute(tokens))

    async def main():
        await asyncio.gather(*(decoding.decode([1] * length) for length in (8, 16, 24, 64)))
        await asyncio.gather(*(decoding.decode([1] * length) for length in (16, 64, 64)))

    asyncio.run(main())
    assert lengths == [64, 24, 16, 8, 64, 16]


def test_small_matters_of_http(tokenizer):
    app = {"cors_origins": ["https://a.example"]}
    with serving(tokenizer, app=app) as (address, _), httpx.Client(timeout=PATIENCE) as client:
        for path in ("/health", "/metrics", "/v1/models"):
            head = client.head(address + path)
            assert head.status_code == 200 and not head.content, path
        for given, told in (("my-id", "my-id"), ("a b", None), ("x" * 200, None), ("", None)):
            number = client.get(address + "/health", headers={"X-Request-Id": given}).headers["x-request-id"]
            assert number == told if told else len(number) == 32
        preflight = client.options(
            address + IMAGES, headers={"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        )
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        other = client.get(address + "/health", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers
        for path in (path for path in REFUSED if path.startswith("/")):
            answer = client.post(address + path) if path.startswith("/v1") else client.get(address + path)
            assert answer.status_code == 404 and REFUSED[path] in answer.json()["error"]["message"]
        assert client.get(address + "/openapi.json").json()["paths"][IMAGES]


def test_root_path_serves_with_and_without_it_and_never_without_the_key(tokenizer):
    for root in ("/images", "/v", "/v1"):
        with (
            serving(tokenizer, app={"api_keys": ["s3cret"], "root_path": root}) as (address, _),
            httpx.Client(timeout=PATIENCE) as client,
        ):
            right = {"Authorization": "Bearer s3cret"}
            assert client.get(f"{address}{root}/v1/models", headers=right).status_code == 200
            assert root == "/v1" or client.get(f"{address}/v1/models", headers=right).status_code == 200
            for path in (
                "/v1/models",
                f"{root}/v1/models",
                f"{root}{root}/v1/models",
                f"{root}//v1/models",
                f"/{root}/v1/models",
            ):
                assert client.get(f"{address}{path}").status_code in (401, 404), path
            assert client.get(f"{address}/openapi.json").json()["servers"] == [{"url": root}]


def test_application_inside_another_is_served(tokenizer):
    async def work():
        service = Service(ScriptedEngine(), Decoder(tokenizer, 8))
        outer = FastAPI()
        outer.mount("/class", create_app(service, api_keys=["s3cret"]))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(outer), base_url="http://a") as client:
            right = {"Authorization": "Bearer s3cret"}
            assert (await client.get("/class/v1/models")).status_code == 401
            assert (await client.get("/class/v1/models", headers=right)).status_code == 200
            assert (await client.post(f"/class{IMAGES}", json={"prompt": "1"}, headers=right)).status_code == 200
        assert b'status="200"} 1.0' in service.metrics.text()
        await service.close()

    asyncio.run(work())


def test_unix_socket_is_served_and_one_that_is_in_use_is_refused(tokenizer, tmp_path):
    address = ("", 0, str(tmp_path / "s"))
    with serving(tokenizer, sock=server.bound_socket(*address)) as (path, _):
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://a", timeout=PATIENCE) as client:
            assert client.get("/health").status_code == 200
        with pytest.raises(ValueError, match="in use"):
            server.bound_socket(*address)
    server.bound_socket(*address).close()  # a file that is left is no server


def test_first_retry_after_is_of_the_speed_that_was_seen(tokenizer):
    engine = ScriptedEngine()
    with serving(tokenizer, engine, max_queue=8) as (address, service):
        engine.gate, engine.rows_before = asyncio.Event(), 4
        waits = ask(address, class_label=1, n=8)
        until(lambda: service.metrics.tokens._value.get() == 8 * 32)
        refused = httpx.post(address + IMAGES, json={"class_label": 3}, timeout=PATIENCE)
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 5
        waits.close()


# The command

OWN_ADDRESS = ["--gpt-ckpt", "absent.pt", "--vq-ckpt", "absent.pt", "--engine", "native"]


@pytest.mark.parametrize(
    "words, environment, message",
    [
        (["--api-key", ""], {}, "--api-key is empty"),
        (["--api-key", "a", "--api-key", " "], {}, "--api-key is empty"),
        ([], {"SERVE_API_KEY": ""}, "SERVE_API_KEY is empty"),
        (["--host", "no.such.host.invalid"], {}, "--host no.such.host.invalid --port 8000: "),
        (["--uds", "/no/such/folder/s"], {}, "No such file"),
        (["--port", "TAKEN"], {}, "--port [0-9]+: Address already in use"),
        (["--gpt-ckpt", "a", "--max-queue", "3"], {}, "--max-n 8 is more than --max-queue 3"),
    ],
)
def test_server_with_a_wrong_flag_says_so_before_the_model_is_loaded(monkeypatch, words, environment, message):
    monkeypatch.setattr(server, "Signals", lambda act: None)
    monkeypatch.setattr("autoregressive.serve.metrics.log_as_json", lambda: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as other:
        words = [word.replace("TAKEN", str(other.getsockname()[1])) for word in words]
        with pytest.raises((ValueError, OSError), match=message):
            server.main(server.flags().parse_args([*OWN_ADDRESS, *words]))


@pytest.mark.parametrize("flag", ["--gpt-ckpt", "--vq-ckpt"])
def test_server_without_a_file_says_which_flag_is_needed(monkeypatch, small_files, flag):
    monkeypatch.setattr(server, "Signals", lambda act: None)
    words = ["--vq-ckpt", small_files.vq] if flag == "--gpt-ckpt" else ["--gpt-ckpt", small_files.gpt]
    with pytest.raises(ValueError, match=f"{flag} is needed"):
        server.main(server.flags().parse_args(["--port", "0", *map(str, words)]))


@pytest.mark.parametrize("path", ["images", "/images/", "/a?b"])
def test_root_path_that_is_none_is_refused(path, capsys):
    with pytest.raises(SystemExit):
        server.flags().parse_args(["--root-path", path])
    assert f"must be written as /images, without a slash at its end, got {path}" in capsys.readouterr().err


@pytest.mark.parametrize("host, public", [("0.0.0.0", True), ("127.0.0.1", False), ("localhost", False)])
def test_socket_that_other_machines_reach_is_public(host, public):
    with server.bound_socket(host, 0) as bound:
        assert server.is_public(bound) == public


def test_api_keys_several_of_the_environment_or_the_flags(monkeypatch):
    monkeypatch.setenv("SERVE_API_KEY", " one two\n")
    assert server.api_keys([]) == ["one", "two"] and server.api_keys([" three ", "four"]) == ["three", "four"]


@pytest.mark.parametrize(
    "file, name",
    [("results/003-GPT-B/checkpoints/0002000.pt", "003-GPT-B"), ("cloud/2026-GPT-B/0002000", "2026-GPT-B"),
     ("c2i_L_384.pt", "c2i_L_384"), ("run/0002.pt", "0002")],
)  # fmt: skip
def test_model_name_is_the_files_or_the_runs(tmp_path, file, name):
    words = ["--gpt-ckpt", str(tmp_path / file)]
    assert server.model_name(server.flags().parse_args(words)) == name
    named = [*words, "--served-model-name", "a", "--model-name", "b"]
    assert server.model_name(server.flags().parse_args(named)) == "a"


def test_server_without_descriptors_says_so_once(caplog):
    handle = draining.DrainingServer(None).log_exception
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            handle(None, {"message": "socket.accept() out of system resource", "exception": OSError(24, "too many")})
    assert [record.name for record in caplog.records].count(draining.log.name) == 1


SIGNALLED = """
import sys, time
from autoregressive.serve.server import Signals
signals = Signals(lambda: sys.exit(0) if "load" in sys.argv else print("acts", flush=True))
print("ready", flush=True)
while "drain" in sys.argv or not signals.received:
    time.sleep(0.05)
"""


@pytest.mark.parametrize(
    "state, sent, code",
    [("load", [signal.SIGTERM], 0), ("load", [signal.SIGINT], 0), ("drain", [signal.SIGTERM] * 2, -15),
     ("drain", [signal.SIGTERM, signal.SIGINT], -2), ("drain", [signal.SIGTERM] * 3, -15)],
)  # fmt: skip
def test_signals_first_acts_second_ends_at_once(state, sent, code):
    process = subprocess.Popen([sys.executable, "-c", SIGNALLED, state], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    for number in sent:
        process.send_signal(number)
        process.stdout.readline()  # the system passes on but one of two signals that come before the process runs
    assert process.wait(PATIENCE) == code
    process.stdout.close()


STUCK = """
import time
from types import SimpleNamespace
from autoregressive.serve.draining import DrainingServer
DrainingServer(None, SimpleNamespace(draining=False)).drain(-59.8)  # to which a minute is added
time.sleep(600)
"""


def test_draining_that_does_not_end_is_ended():
    assert subprocess.run([sys.executable, "-c", STUCK], cwd=ROOT, timeout=PATIENCE).returncode == 1


# A server whose model is large.
LOADING = """
import time
from autoregressive.pipeline import ImagePipeline
from autoregressive.serve.server import flags, main, run_script
ImagePipeline.from_pretrained = lambda *_, **__: print("loading", flush=True) or time.sleep(600)
run_script(main, flags())
"""


def test_server_process_ends_with_the_documented_codes(small_files):
    """While loading, and busy with images that do not end; idle: test_server_with_few_descriptors."""
    words = ["--gpt-ckpt", small_files.gpt, "--vq-ckpt", small_files.vq, "--engine", "native", "--image-size", 32]
    line = [sys.executable, "-c", LOADING, *map(str, words), "--host", "0.0.0.0", "--port", "0"]
    loading = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert "anybody who reaches" in loading.stdout.readline()
    while loading.stdout.readline() != "loading\n":
        assert loading.poll() is None
    loading.send_signal(signal.SIGTERM)
    assert loading.wait(PATIENCE) == 0 and "running on" not in loading.stdout.read()
    loading.stdout.close()

    with started_server([*words, "--batch-size", 1, "--max-n", 5000, "--max-queue", 5000]) as busy:
        unread = ask(busy.url, class_label=3, n=5000, stream=True, partial_images=0)
        until(lambda: httpx.get(busy.url + "/health", timeout=PATIENCE).json()["queued_images"])
        busy.terminate()
        until(lambda: httpx.get(busy.url + "/health", timeout=PATIENCE).json()["status"] == "shutting down")
        busy.process.send_signal(signal.SIGTERM)
        assert busy.process.wait(PATIENCE) == -15
        unread.close()


def test_server_with_few_descriptors_stays_reachable_and_says_so_once(small_files):
    words = ["--gpt-ckpt", small_files.gpt, "--vq-ckpt", small_files.vq, "--engine", "native", "--image-size", 32]
    limited = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (120, 120)); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    line = [sys.executable, "-c", limited, "-m", "autoregressive.serve.server", *map(str, words), "--port", "0"]
    log = []
    process = subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    threading.Thread(target=lambda: log.extend(process.stdout), daemon=True).start()
    try:
        until_long = time.monotonic() + 4 * PATIENCE
        while not (told := [json.loads(text) for text in log if '"event": "running on' in text]):
            assert time.monotonic() < until_long and process.poll() is None
            time.sleep(0.1)
        (told,) = told
        assert (told["engine"], told["image_size"], told["precision"]) == ("native", 32, "none")
        url = told["event"].split()[2]
        held = [connect(url) for _ in range(300)]
        assert httpx.get(url + "/health", timeout=PATIENCE).status_code == 200
        assert len(log) < 20
        for sock in held:
            sock.close()
    finally:
        process.terminate()
    assert process.wait(PATIENCE) == 0
