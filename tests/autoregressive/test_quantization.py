"""Sampling from int8 weights: what is quantized, what is drawn, what a folder of images remembers, and without torchao."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from autoregressive.models.gpt import GPT_models
from autoregressive.pipeline import ImagePipeline, load_gpt, load_tokenizer
from autoregressive.quantization import quantize
from autoregressive.sample import sample_c2i, sample_c2i_ddp, sample_t2i, sample_t2i_ddp
from autoregressive.sample.many import run_settings
from benchmarks import quantization
from benchmarks.quantization import weight_bytes
from tests.autoregressive.test_sample_scripts import NAME, ddp_line, line
from tests.helpers import randomize
from tests.training import run_here
from utils.sample_folder import claim_folder

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def torchao():
    return pytest.importorskip("torchao")


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of linear layers, quantized ones taken back, by the layers' names."""
    linear = {name: module.weight.detach() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: w.dequantize() if hasattr(w, "__tensor_flatten__") else w for name, w in linear.items()}


# What is quantized


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize(
    "shape", [{}, {"model_type": "t2i", "cls_token_num": 5, "caption_dim": 24}], ids=["c2i", "t2i"]
)
def test_matrices_of_the_blocks_in_eight_bits(torchao, shape, head):
    model = randomize(GPT_models["GPT-XS"](vocab_size=64, block_size=64, **shape))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    size, weights = weight_bytes(model), matrices(model)
    assert quantize(model, head=head) is model
    saved = 0
    for name, weight in matrices(model).items():
        if name.startswith("layers.") or (head and name == "output"):
            step = weights[name].abs().amax(1, keepdim=True) / 127
            difference = (weight - weights[name]).abs()
            assert difference.any() and (difference <= 0.51 * step).all(), name
            saved += 3 * weight.numel() - 16 * len(weight)  # a scale for each output, and what else a release keeps
            del before[f"{name}.weight"]
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert weight_bytes(model) < size - saved


# What is drawn


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_near(torchao, small_files, dtype):
    model = load_gpt(small_files.gpt, dtype=dtype)
    tokens, labels = torch.randint(64, (4, 63)), torch.arange(4)
    with torch.inference_mode():
        expected = model(tokens, labels)
        actual = quantize(model)(tokens, labels)
    assert actual.dtype == torch.float32
    assert 0 < (actual - expected).square().mean().sqrt() < 0.05 * expected.std()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_does_not_depend_on_the_batch(torchao, small_files, dtype):
    gpt = quantize(load_gpt(small_files.par, dtype=dtype))
    pipelines = [ImagePipeline(gpt, load_tokenizer(small_files.vq), batch_size=size) for size in (1, 2, 3)]
    drawn = [
        np.stack(pipeline([1, 2, 3, 4], progress=False, cfg_scale=2.0, indices=[4, 5, 6, 7])) for pipeline in pipelines
    ]
    assert np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[0], drawn[2])
    assert len({image.tobytes() for image in drawn[0]}) == 4


@pytest.mark.slow
def test_grid(torchao, small_files, tmp_path):
    output = tmp_path / "grid.png"
    words = ["--gpt-ckpt", small_files.par, "--ar-token-num", 4, "--labels", 3, "--output", output]
    drawn = []
    for quantized in ("int8", "none"):
        run_here(sample_c2i, *line(small_files, *words, "--quantize", quantized))
        drawn.append(np.asarray(Image.open(output))[2:34, 2:34])
    pipeline = ImagePipeline(quantize(load_gpt(small_files.par)), load_tokenizer(small_files.vq))
    expected = pipeline([3], cfg_scale=4.0, top_k=2000, progress=False)[0]
    assert np.array_equal(drawn[0], expected) and not np.array_equal(drawn[0], drawn[1])


@pytest.mark.slow
def test_the_benchmark(torchao, small_files, capsys):
    words = ["--gpt-ckpt", small_files.gpt, "--images", 2, "--rounds", 1, "--device", "cpu"]
    run_here(quantization, *words)
    rows = {cells[0]: cells[1:] for cells in table(capsys.readouterr().out)}
    assert list(rows) == ["weights", "float32", "bf16", "int8", "int8, head too"]
    assert rows["float32"][2:4] == ["100.00%", "100.00%"]
    sizes = [float(row[0]) for row in list(rows.values())[1:]]
    assert sizes == sorted(sizes, reverse=True)
    assert abs(float(rows["int8"][1]) - float(rows["float32"][1])) < 0.05


def table(printed: str) -> list[list[str]]:
    """The cells of a printed table, without the line below its head."""
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# What a folder of images remembers


def test_a_folder_of_other_weights_is_refused(torchao, small_files, tmp_path):
    run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path, "--num-fid-samples", 1, "--quantize", "int8"))
    with pytest.raises(ValueError, match=r"other settings \(quantize: int8, now None"):
        run_here(sample_c2i_ddp, *ddp_line(small_files, tmp_path))


def test_a_folder_from_before_the_flag_goes_on(small_files, tmp_path):
    words = ddp_line(small_files, tmp_path, "--num-fid-samples", 1)
    run_here(sample_c2i_ddp, *words)
    record = tmp_path / NAME / "settings.json"
    settings = json.loads(record.read_text())
    assert settings.pop("quantize") is None
    record.write_text(json.dumps(settings))
    run_here(sample_c2i_ddp, *words)
    args = sample_c2i_ddp.flags().parse_args([*map(str, words), "--quantize", "int8"])
    with pytest.raises(ValueError, match=r"quantize: None, now int8"):
        claim_folder(tmp_path / NAME, run_settings(args, small_files.gpt, small_files.vq))


# Without torchao


@pytest.mark.parametrize("script", [sample_c2i, sample_c2i_ddp, sample_t2i, sample_t2i_ddp])
def test_nothing_is_quantized_unless_asked_for(script):
    assert script.flags().parse_args([]).quantize == "none"
    with pytest.raises(SystemExit):
        script.flags().parse_args(["--quantize", "int4"])


def test_torchao_is_asked_for(small_files, tmp_path, monkeypatch):
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)  # what makes an import fail
    words = ["--quantize", "int8", "--output", tmp_path / "grid.png"]
    words += ["--gpt-ckpt", "gone.pt"]  # told before files are read
    with pytest.raises(ValueError, match=r"--quantize int8 needs torchao.*pip install torchao"):
        run_here(sample_c2i, *line(small_files, *words))
    assert not list(tmp_path.iterdir())
