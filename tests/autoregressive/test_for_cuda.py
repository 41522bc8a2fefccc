"""Requests to a GPU, seen on a CPU: widths of caches, attention kernels, streams, copies in compiled graphs."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from autoregressive import pipeline as pipelines
from autoregressive.models import compiled, on_cpu
from autoregressive.models.decode_step import DecodeState
from autoregressive.models.generate import cache_for, generate, release_cache
from autoregressive.models.gpt import ModelArgs, Rows, Transformer
from autoregressive.models.kv_cache import StaticCache
from autoregressive.models.machine import attention_bias, machine
from autoregressive.models.on_cuda import StepGraphs, addresses, cache_width
from autoregressive.models.sizes import GPT_SIZES
from autoregressive.pipeline import decode_codes
from tests.helpers import randomize
from tokenizer.tokenizer_image.vq_model import VQ_models
from utils.errors import is_out_of_memory
from utils.rng import image_noise

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)
LABELS = torch.tensor([3, 0, 4, 1])


def tiny(**more) -> Transformer:
    args = {
        "dim": 48,
        "n_layer": 2,
        "n_head": 4,
        "multiple_of": 32,
        "vocab_size": 24,
        "num_classes": 5,
        "block_size": 16,
    }
    return randomize(Transformer(ModelArgs(**{**args, **more})), seed=4, gain=1.3)


@pytest.mark.parametrize("name", GPT_SIZES)
def test_cache_width_on_cuda_suits_fused_attention(name):
    _, heads, dim, *_ = GPT_SIZES[name]
    width = cache_width(dim // heads)
    assert width % 8 == 0 and width - dim // heads in range(8)
    assert on_cpu.cache_width(dim // heads) == dim // heads


@pytest.mark.parametrize("more", [{}, {"ar_token_num": 4}, {"n_kv_head": 2}], ids=["raster", "PAR", "few key heads"])
def test_generate_with_wider_cache_draws_same_tokens(more, monkeypatch):
    model, noise = tiny(**more), image_noise(7, range(4), 16)
    expected = generate(model, LABELS, noise=noise, cfg_scale=2.0)
    release_cache(model)
    monkeypatch.setattr(on_cpu, "cache_width", cache_width)
    assert torch.equal(generate(model, LABELS, noise=noise, cfg_scale=2.0), expected)
    assert cache_for(model, 8, CPU, torch.float32).keys[0].shape[-1] == 16, "12 channels a head"


def test_update_of_fewer_samples_than_the_cache_holds_leaves_the_others():
    cache = StaticCache(1, 5, 2, 7, 4, CPU, torch.float32)
    k, v = torch.randn(2, 3, 2, 2, 4)
    keys, values = cache.update(0, torch.tensor([1, 4]), k, v, 6)
    assert keys.shape == values.shape == (3, 2, 6, 4)
    assert torch.equal(keys[:, :, [1, 4]], k) and torch.equal(values[:, :, [1, 4]], v)
    assert not cache.keys[0][3:].any() and not keys[:, :, [0, 2, 3, 5]].any()


@pytest.mark.slow
@pytest.mark.parametrize("samples", [4, 8], ids=["as large", "larger"])
def test_compiled_step_copies_no_cache(samples, monkeypatch):
    """In the graph that the compiler lowers, keys and values are written in place and nothing is copied."""
    import torch._inductor.compile_fx as compiler

    passes, targets = compiler.post_grad_passes, []

    def watched(graph_module, *args, **more):
        passes(graph_module, *args, **more)
        targets.extend(node.target for node in graph_module.graph.nodes)

    monkeypatch.setattr(compiler, "post_grad_passes", watched)
    torch._dynamo.reset()
    model, cache = tiny(), StaticCache(2, samples, 4, 17, 12, CPU, torch.float32)
    with torch.inference_mode(), torch._inductor.config.patch(force_disable_caches=True):
        model.rope(CPU)
        rows = Rows(cache, torch.tensor([3]), 8)
        compiled.compiled_decode_rows()(model, torch.arange(4)[:, None], rows, None)
    assert targets.count(torch.ops.aten.index_put_.default) == 4, "keys and values of two layers"
    assert torch.ops.aten.copy_.default not in targets


def test_attention_kernels_of_plain_steps_on_cuda_leave_cudnn_out(monkeypatch):
    with machine(CUDA).attention_kernels(compile=False):
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    for device, compile in ((CUDA, True), (CPU, False)):
        with machine(device).attention_kernels(compile):
            assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=["math", "flash"])
def test_attention_bias_on_an_accelerator_equals_the_mask(backend):
    mask = torch.rand(3, 1, 1, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[..., 0] = True
    assert attention_bias(mask, torch.float32) is mask
    on_device = attention_bias(mask.to("meta"), torch.bfloat16)
    assert on_device.dtype == torch.bfloat16 and on_device.shape == mask.shape
    assert on_device.stride()[:-1] == (16, 16, 16), "rows at multiples of 8 numbers"
    bias = torch.where(mask, 0.0, float("-inf"))
    q, k, v = torch.randn(3, 3, 2, 9, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.nn.attention.sdpa_kernel(backend):
        assert torch.allclose(attend(q, k, v, attn_mask=bias), attend(q, k, v, attn_mask=mask), atol=1e-6)


def test_record_uses_a_stream_of_the_models_device(monkeypatch):
    """PyTorch's own stream for recordings belongs to the device that recorded first: another device's graph stays empty."""
    asked = {}

    class Graph:
        def pool(self):
            return 0, 1

        def replay(self):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **more: asked.update(more) or contextlib.nullcontext())
    groups = [(SimpleNamespace(operations=()), slice(None))]
    graphs = StepGraphs(tiny(), SimpleNamespace(groups=groups, ordered=False, tokens=SimpleNamespace(device=CUDA)))
    for _ in range(2):
        graphs.run("a kind", lambda: None)
    assert asked["stream"] == "a stream of cuda:1"


def test_recordings_are_not_served_to_another_thread():
    model = tiny()
    cache = cache_for(model, 4, CPU, torch.float32)
    graphs, answers = StepGraphs(model, DecodeState(model, model.layout, cache, 4)), []
    thread = threading.Thread(target=lambda: answers.append(graphs.serve(model, model.layout, cache, 4)))
    thread.start()
    thread.join()
    assert graphs.serve(model, model.layout, cache, 4) and answers == [False]


def test_addresses_of_weights_without_memory_are_their_objects():
    class Moved(torch.nn.Parameter):
        def data_ptr(self):
            return 0

    model = tiny()
    model.output.weight = Moved(model.output.weight.detach())
    before = addresses(model)
    model.output.weight = Moved(model.output.weight.detach())
    assert addresses(model) != before


def test_decode_codes_never_decodes_more_than_fit_a_device(monkeypatch):
    """Decoding that runs out of memory at the batch size would look for a smaller number in every batch."""
    tokenizer = VQ_models["VQ-4"](codebook_size=64).eval()

    def decode(tokenizer, codes, width, size, at_once, in_strips):
        return at_once

    monkeypatch.setattr(pipelines, "_decode_so_many", decode)
    tokenizer.to("meta")
    assert decode_codes(tokenizer, torch.zeros(512, 64, dtype=torch.long), batch_size=512) == 32
    assert decode_codes(tokenizer, torch.zeros(8, 64, dtype=torch.long), batch_size=8) == 8


@pytest.mark.parametrize(
    "message", ["CUDA error: out of memory", "MPS backend out of memory", "[enforce] can't allocate memory: you tried"]
)
def test_is_out_of_memory_of_plain_runtime_errors(message):
    assert is_out_of_memory(RuntimeError(message)) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_can_compile_on_cuda_needs_a_c_compiler(monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert not compiled.can_compile(CUDA)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "clang" else None)
    assert compiled.can_compile(CUDA)


def test_image_tokenizer_attention_hands_fused_kernels_contiguous_rows(monkeypatch):
    from tokenizer.tokenizer_image import blocks

    seen = []
    monkeypatch.setattr(
        blocks.F, "scaled_dot_product_attention", lambda q, k, v: seen.extend([q.stride(-1), k.stride(-1)]) or q
    )
    x = torch.empty(2, 16, 3, 3, device="meta")
    assert blocks.attention(x, x, x).shape == x.shape and seen == [1, 1]


def test_gpt_3b_geometry_trains_and_draws_alike():
    """A head of 100 channels: the whole pass and the decode loop agree."""
    model = tiny(dim=200, n_head=2)
    noise = image_noise(3, range(4), 16)
    tokens = generate(model, LABELS, noise=noise, sample_logits=False)
    with torch.no_grad():
        assert torch.equal(model(tokens[:, :-1], LABELS).argmax(-1), tokens)


@pytest.mark.parametrize("autocast", [False, True])
def test_mask_of_training_becomes_one_bias_for_all_layers(autocast, monkeypatch):
    """On the meta device, as on CUDA: PAR's mask in the precision of attention."""
    model, seen = tiny(ar_token_num=4).to("meta"), []
    for layer in model.layers:
        monkeypatch.setattr(
            layer, "forward", lambda x, rope, mask, causal, rows: seen.append((mask.dtype, id(mask), causal)) or x
        )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: autocast)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    with torch.no_grad():
        model.hidden(
            torch.zeros(2, 12, dtype=torch.long, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
        )
    expected = torch.bfloat16 if autocast else torch.float32
    assert [dtype for dtype, _, _ in seen] == [expected] * 2 and len({number for _, number, _ in seen}) == 1
