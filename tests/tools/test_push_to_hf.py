"""tools/push_gpt_to_hf.py and push_vae_to_hf.py: into a folder, and onto a stand-in for the hub over HTTP."""

import base64
import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from autoregressive.hub import TransformerHF
from autoregressive.pipeline import load_gpt
from tests.training import environment, run_here
from tokenizer.load import load_tokenizer
from tokenizer.tokenizer_image.hub import VQModelHF
from tools import push_gpt_to_hf, push_vae_to_hf
from utils.checkpoint import read_checkpoint

GPT = [
    "--gpt-model",
    "GPT-XS",
    "--num-classes",
    "10",
    "--image-size",
    "32",
    "--downsample-size",
    "4",
    "--codebook-size",
    "64",
]
VQ = ["--vq-model", "VQ-4", "--codebook-size", "64"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_the_published_flags():
    args = push_gpt_to_hf.flags().parse_args([])
    published = {
        "gpt_model": "GPT-B", "gpt_ckpt": None, "gpt_type": "c2i", "from_fsdp": False, "cls_token_num": 1, "precision": "bf16",
        "compile": True, "vq_model": None, "vq_ckpt": None, "codebook_size": None, "codebook_embed_dim": None,
        "image_size": 384, "image_size_eval": 256, "downsample_size": 16, "num_classes": None,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in published} == published
    args = push_vae_to_hf.flags().parse_args([])
    published = {"gpt_model": "GPT-XL", "vq_model": None, "codebook_size": None, "codebook_embed_dim": None}
    assert {name: getattr(args, name) for name in published} == published


@pytest.mark.parametrize("source", ["gpt", "par", "bare"])
def test_a_gpt_into_a_folder(small_files, tmp_path, source, capsys):
    path = getattr(small_files, source)
    more = ["--ar-token-num", "4"] if source == "par" else []
    for precision, dtype in (("none", torch.float32), ("bf16", torch.bfloat16)):
        out = tmp_path / precision
        run_here(push_gpt_to_hf, "--gpt-ckpt", path, *GPT, *more, "--precision", precision, "--output", out)
        model = TransformerHF.from_pretrained(out)
        weights = {name: tensor.to(dtype) for name, tensor in read_checkpoint(path).model.items()}
        assert same(model.state_dict(), weights) and model.config.multiple_of == 256
        assert model.training_args["image_size"] == 32 and model.steps == (None if source == "bare" else 7)
        assert same(load_gpt(out, dtype=dtype).state_dict(), weights)
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'none'}: GPT-XS (4 layers, dim 128")


def test_a_tokenizer_into_a_folder(small_files, tmp_path):
    run_here(push_vae_to_hf, "--vq-ckpt", small_files.vq, *VQ, "--output", tmp_path / "out", "--license", "cc0-1.0")
    weights = read_checkpoint(small_files.vq).model
    assert same(VQModelHF.from_pretrained(tmp_path / "out").state_dict(), weights)
    assert same(load_tokenizer(tmp_path / "out").state_dict(), weights)
    assert "license: cc0-1.0" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "script, words, message",
    [
        (push_gpt_to_hf, ["--output", "new"], "--gpt-ckpt is needed"),
        (push_vae_to_hf, ["--output", "new"], "--vq-ckpt is needed"),
        (push_gpt_to_hf, ["--gpt-ckpt", "GPT"], "give --repo-id owner/name to push to, or --output"),
        (push_gpt_to_hf, ["--gpt-ckpt", "GPT", "--gpt-model", "GPT-B", "--output", "new"], "it does not fit the flags: --gpt-model GPT-B"),
        (push_gpt_to_hf, ["--gpt-ckpt", "VQ", *GPT, "--output", "new"], "looks like a VQ image tokenizer"),
        (push_vae_to_hf, ["--vq-ckpt", "GPT", *VQ, "--output", "new"], "is not an image tokenizer.s checkpoint: it looks like a GPT"),
        (push_vae_to_hf, ["--vq-ckpt", "VQ", "--vq-model", "VQ-16", "--output", "new"], "does not fit the flags --vq-model VQ-16"),
        (push_gpt_to_hf, ["--gpt-ckpt", "GPT", *GPT, "--vq-ckpt", "VQ", "--codebook-embed-dim", 4, "--output", "new"], "does not fit the flags --codebook-embed-dim 4"),
    ],
)  # fmt: skip
def test_mistakes(small_files, tmp_path, monkeypatch, script, words, message):
    monkeypatch.chdir(tmp_path)
    files = {"GPT": small_files.gpt, "VQ": small_files.vq}
    with pytest.raises(ValueError, match=message):
        run_here(script, *[files.get(word, word) for word in words])
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_stays_as_it_is(small_files, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        run_here(push_vae_to_hf, "--vq-ckpt", small_files.vq, *VQ, "--output", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


# A hub over HTTP


class StandIn(BaseHTTPRequestHandler):
    """As much of the hub's API as making a repository, committing small files and downloading them takes."""

    def log_message(self, *args):
        pass

    def answer(self, value, status: int = 200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub = self.server
        hub.requests.append((self.path, self.headers.get("Authorization")))
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.answer({"error": "Invalid credentials in Authorization header"}, 401)
        elif self.path == "/api/repos/create":
            hub.made = json.loads(body)
            self.answer({"url": f"{hub.url}/me/model", "id": "me/model"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.url}/me/model/commit/{'0' * 40}"})
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self):
        name = self.path.partition("/resolve/")[2].partition("/")[2]  # after the revision
        if name in self.server.files:
            content = self.server.files[name]
            self.answer(content, X_Repo_Commit="0" * 40, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        elif "/tree/" in self.path:
            files = self.server.files.items()
            self.answer([{"type": "file", "path": path, "size": len(c), "oid": "0" * 40} for path, c in files])
        elif self.path.startswith("/api/models/"):
            self.answer({"id": "me/model", "sha": "0" * 40, "siblings": []})
        else:
            self.answer({"error": self.path}, 404)

    do_HEAD = do_GET


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.url, server.files, server.requests, server.made = f"http://127.0.0.1:{server.server_port}", {}, [], None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def python(words: list, hub, home, token: str = "hf_right") -> subprocess.CompletedProcess:
    """Python in a process of its own: the hub's address is read when its library is imported."""
    of_hub = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=environment(**of_hub), capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_a_push_and_what_comes_back(small_files, tmp_path, hub):
    """Both scripts, each followed by from_pretrained in another process."""
    for script, words, load, path in (
        (push_gpt_to_hf, ["--gpt-ckpt", small_files.gpt, *GPT, "--precision", "none"], "autoregressive.hub import TransformerHF", small_files.gpt),
        (push_vae_to_hf, ["--vq-ckpt", small_files.vq, *VQ], "tokenizer.tokenizer_image.hub import VQModelHF", small_files.vq),
    ):  # fmt: skip
        hub.files.clear()
        done = python([script.__file__, *words, "--repo-id", "me/model", "--private"], hub, tmp_path / "home")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1].startswith(f"{hub.url}/me/model/")
        assert {"README.md", "config.json", "model.safetensors"} <= set(hub.files)
        assert hub.made["name"] == "model" and (hub.made.get("private") or hub.made.get("visibility") == "private")
        name = load.split()[-1]
        code = f"from {load}\nimport torch\ntorch.save({name}.from_pretrained('me/model').state_dict(), 'back.pt')"
        code = f"import os; os.chdir({str(tmp_path)!r})\n{code}"
        done = python(["-c", code], hub, tmp_path / f"home-{name}", token="hf_right")
        assert done.returncode == 0, done.stderr
        assert same(torch.load(tmp_path / "back.pt"), read_checkpoint(path).model)
        assert 'from_pretrained("me/model")' in hub.files["README.md"].decode()


@pytest.mark.slow
def test_a_push_that_the_hub_refuses(small_files, tmp_path, hub):
    words = [push_vae_to_hf.__file__, "--vq-ckpt", small_files.vq, *VQ, "--repo-id", "me/model"]
    done = python(words, hub, tmp_path / "home", token="hf_wrong")
    assert done.returncode == 1 and done.stderr.startswith("error: the hub refused me/model: "), done.stderr
    assert "Traceback" not in done.stderr and not hub.files
    done = python(words, hub, tmp_path / "home", token="")
    assert done.returncode == 1 and "set HF_TOKEN" in done.stderr and len(done.stderr.splitlines()) == 1
    hub.shutdown()
    hub.server_close()
    done = python(words, hub, tmp_path / "home")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: could not "), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_pipeline_pushed_comes_back_and_draws_the_same(small_files, tmp_path, hub):
    """Through the hub's own calls in processes of their own: push_to_hub, then from_pretrained by the repository's name."""
    load = "from autoregressive.pipeline import ImagePipeline\n"
    draw = "pipeline([3], seed=1, progress=False)[0].save({!r})"
    code = f"{load}pipeline = ImagePipeline.from_pretrained({str(small_files.folder)!r}, gpt='gpt.pt', vq='vq.pt', device='cpu')\n"
    code += f"print(pipeline.push_to_hub('me/model', private=True))\n{draw.format(str(tmp_path / 'pushed.png'))}"
    done = python(["-c", code], hub, tmp_path / "home")
    assert done.returncode == 0 and done.stdout.startswith(hub.url), done.stdout + done.stderr
    assert {"README.md", "model_index.json", "gpt/model.safetensors", "tokenizer/config.json"} <= set(hub.files)
    assert 'ImagePipeline.from_pretrained("me/model")' in hub.files["README.md"].decode()
    code = f"{load}pipeline = ImagePipeline.from_pretrained('me/model', device='cpu')\n{draw.format(str(tmp_path / 'back.png'))}"
    done = python(["-c", code], hub, tmp_path / "other")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "back.png").read_bytes() == (tmp_path / "pushed.png").read_bytes()
