"""tools/plan_training.py: planned memory against what real steps hold, sharding and hours by hand, mistakes."""

import json
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from autoregressive.models.build import build_model
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.sizes import GPT_SIZES
from autoregressive.train.flops import training_flops_per_image
from autoregressive.train.loss import TokenLoss
from tools import plan_training as memory
from tools.plan_training import GIB, Setup, block_bytes, flags, main, make_plan, parameters_of, training_memory
from utils.distributed import Distributed, start
from utils.training.ema import EMA
from utils.training.optim import adamw
from utils.training.parallel import Parallel

SMALL = ModelArgs(dim=128, n_layer=6, n_head=4, vocab_size=1024, num_classes=10, block_size=256)
CPU = Setup(micro_batch=2)
RATES = flags().parse_args([])
pytestmark = pytest.mark.usefixtures("one_thread")
RATES.lr, RATES.beta1, RATES.beta2, RATES.weight_decay = 1e-4, 0.9, 0.95, 0.05


def train(args: ModelArgs, setup: Setup, dist: Distributed, steps: int = 2) -> None:
    """Optimizer steps, as utils/training/trainer.py takes them."""
    model = Transformer(args).to(dist.device).train()
    plan = Parallel(
        dist,
        setup.strategy,
        setup.precision,
        setup.grad_precision,
        setup.compiled,
        setup.checkpointing,
        sync_every_micro_batch=setup.sync_every_micro_batch,
    )
    module = plan.apply(TokenLoss(model), model.layers)
    optimizer = adamw(model, RATES)
    average = EMA(model) if setup.ema else None
    dtype = plan.autocast_dtype
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        for number in range(setup.accumulation):
            shape = (setup.micro_batch,)
            batch = {
                "codes": torch.zeros(*shape, args.block_size, dtype=torch.long, device=dist.device),
                "cond": torch.zeros(shape, dtype=torch.long, device=dist.device),
                "drop": torch.zeros(shape, dtype=torch.bool, device=dist.device),
            }
            with plan.last_only(module, last=number == setup.accumulation - 1):
                with torch.autocast(dist.device.type, dtype, enabled=dtype is not None):
                    loss = module(**batch)
                loss.backward()
        optimizer.step()
        if average:
            average.update()


def total(parts: dict[str, int]) -> int:
    return sum(parts.values())


def measured_peak(folder, work) -> int:
    """The most bytes of CPU tensors that are alive at once while `work()` runs, by the allocator's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = [e for e in json.loads((folder / "trace.json").read_text())["traceEvents"] if e.get("name") == "[memory]"]
    alive, live, peak = {}, 0, 0
    for event in sorted(events, key=lambda e: e["ts"]):
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        live += size if size > 0 else 0
        live -= alive.pop(address, 0)  # an address that is given out again was freed on a thread nobody watched
        if size > 0:
            alive[address] = size
        peak = max(peak, live)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "checkpointing", "accumulation"), [("bf16", False, 1), ("none", True, 2)])
def test_plan_is_what_training_steps_hold(tmp_path, precision, checkpointing, accumulation):
    """A CPU's kernels keep other tensors than those of a GPU, which the plan is for."""
    setup = replace(
        CPU, precision=precision, checkpointing=checkpointing, accumulation=accumulation, ema=accumulation > 1
    )
    planned = training_memory(SMALL, setup)
    peak = measured_peak(tmp_path, lambda: train(SMALL, setup, Distributed(torch.device("cpu"))))
    print(f"{setup.precision}, {checkpointing=}, {accumulation=}: {peak / 2**20:.1f}, {total(planned) / 2**20:.1f} MiB")
    assert total(planned) == pytest.approx(peak, rel=0.1)


@pytest.mark.slow
def test_plan_is_what_a_sharded_step_holds(tmp_path):
    setup = replace(CPU, strategy="fsdp", precision="none", ema=True)
    dist = start("cpu", group=True)
    try:
        peak = measured_peak(tmp_path, lambda: train(SMALL, setup, dist))
    finally:
        dist.close()
    assert total(training_memory(SMALL, setup)) == pytest.approx(peak, rel=0.1)


@pytest.mark.gpu
def test_plan_is_what_a_gpu_holds():
    if not torch.cuda.is_available():
        pytest.skip("the allocator's account is that of CUDA")
    args = ModelArgs(dim=768, n_layer=12, n_head=12)
    setup = Setup(micro_batch=16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train(args, setup, Distributed(torch.device("cuda", torch.cuda.current_device())), steps=3)
    peak = torch.cuda.max_memory_allocated() - before
    assert total(training_memory(args, setup)) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("name", "setup", "counted"),
    [
        ("GPT-B", Setup(micro_batch=32, gpus=8, compiled=True), 4.97),
        ("GPT-B", Setup(micro_batch=32, gpus=8), 6.16),
        ("GPT-L", Setup(micro_batch=32, gpus=8, compiled=True, checkpointing=True), 6.64),
        ("GPT-XXL", Setup("sdp", gpus=32, shard=32, micro_batch=8, compiled=True), 15.67),
        ("GPT-3B", Setup("fsdp", gpus=32, shard=32, micro_batch=8, compiled=True), 15.20),
        ("GPT-3B", Setup("fsdp", gpus=32, shard=32, micro_batch=8, compiled=True, checkpointing=True), 4.24),
        ("GPT-3B", Setup("fsdp", "none", gpus=32, shard=32, micro_batch=8), 34.80),
    ],
)
def test_training_memory_is_what_was_counted_storage_by_storage(name, setup, counted):
    """GiB of a step on fake tensors with a GPU's kernels, every storage followed: docs/log.md."""
    layers, heads, dim, *_ = GPT_SIZES[name]
    args = ModelArgs(dim=dim, n_layer=layers, n_head=heads, block_size=256 if setup.strategy == "ddp" else 576)
    assert total(training_memory(args, setup)) / GIB == pytest.approx(counted, rel=0.06)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "sharded bf16"])
@pytest.mark.parametrize("trunk", ["rar", "lpd"])
def test_memory_of_layernorm_blocks_is_what_they_save(trunk, half):
    """Counted by autograd's hooks, without the matrices of attention and the copies of queries and keys that a CPU makes."""
    args = ModelArgs(dim=96, n_head=4, ffn_width=384, trunk=trunk, vocab_size=64, block_size=256)
    width, saved = (2 if half else 4), []
    for layers in (2, 3):
        model = build_model(replace(args, n_layer=layers)).train().to(torch.bfloat16 if half else torch.float32)
        read = 256 - model.layout.step_tokens
        rows = model.layout.fed(read)
        owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor, owned=owned, kept=kept, rows=rows):
            if tensor.shape[-2:] != (rows, rows) and tensor.untyped_storage().data_ptr() not in owned:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _hidden = model.hidden(torch.zeros(1, read, dtype=torch.long), torch.zeros(1, dtype=torch.long))
        saved.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
    counted = (saved[1] - saved[0]) / rows - 2 * width * args.dim
    setup = Setup("fsdp" if half else "ddp", "bf16" if half else "none")
    assert block_bytes(args, setup) == pytest.approx(counted, rel=0.12)


def test_shards_by_hand():
    args = ModelArgs(dim=64, n_layer=4, n_head=2, vocab_size=100, num_classes=10, block_size=64, multiple_of=32)
    hidden = 192  # int(2 * 256 / 3) = 170, rounded up to a multiple of 32
    block = 64 * 192 + 64 * 64 + 3 * 64 * hidden + 2 * 64
    root = 11 * 64 + 100 * 64 + 64 + 100 * 64  # classes and "no class", codes, norm, head
    assert parameters_of(args) == (4 * block + root, block)
    shard = (4 * block + root) // 8

    def parts(strategy: str, **change) -> dict[str, int]:
        setup = Setup(strategy=strategy, gpus=8, shard=8, micro_batch=64, ema=True, **change)
        return training_memory(args, setup)

    fsdp = parts("fsdp", grad_precision="fp32")
    assert fsdp[memory.WEIGHTS] == fsdp[memory.AVERAGE] == 4 * shard and fsdp[memory.MOMENTS] == 8 * shard
    assert fsdp[memory.GATHERED] == 2 * (2 * block + root)  # bfloat16, two blocks in flight
    assert fsdp[memory.WHOLE_GRADIENTS] == (2 + 4) * block
    assert parts("sdp")[memory.GATHERED] == 2 * (4 * block + root)
    assert parts("fsdp", precision="none")[memory.GATHERED] == 4 * (2 * block + root)
    # Parts of a batch wait unsharded, or their shards are added up.
    waiting = parts("fsdp", grad_precision="fp32", accumulation=2)
    assert waiting[memory.WHOLE_GRADIENTS] == (2 + 4) * block + 4 * (4 * block + root)
    synced = parts("fsdp", grad_precision="fp32", accumulation=2, sync_every_micro_batch=True)
    assert synced[memory.GRADIENTS] == 4 * shard
    # DDP keeps everything, and buckets for all gradients.
    ddp = training_memory(args, Setup(gpus=8, micro_batch=64))
    assert ddp[memory.WEIGHTS] == ddp[memory.GRADIENTS] == 4 * (4 * block + root)


def test_the_optimizer_step_can_be_the_fullest():
    args = replace(SMALL, vocab_size=8, block_size=4)
    planned = training_memory(args, replace(CPU, strategy="fsdp", micro_batch=1))
    assert memory.ACTIVATIONS not in planned and total(planned) == 16 * parameters_of(args)[0]


def arguments(*words: object):
    return flags().parse_args([str(word) for word in words])


def plan_of(*words: object):
    return make_plan(arguments(*words))


SIXTEEN = ("--gpt-model", "GPT-XS", "--gpus", 16, "--image-size", 128, "--no-compile")


def test_times_by_hand():
    plan = plan_of(*SIXTEEN, "--images", 1000, "--epochs", 10, "--mfu", 0.5, "--gpu", "A100")
    model = Transformer(ModelArgs(dim=128, n_layer=4, n_head=4, block_size=64))
    seconds = 256 * training_flops_per_image(model) / (16 * 0.5 * 312e12)
    assert plan["parameters"] == model.num_parameters and plan["tokens_per_step"] == 256 * 64
    assert plan["steps_per_epoch"] == 3 and plan["step_seconds"] == pytest.approx(seconds)
    assert plan["run_seconds"] == pytest.approx(30 * seconds)


@pytest.mark.parametrize(
    "words",
    [
        ("--ar-token-num", 4),
        ("--data-parallel", "hsdp", "--gradient-accumulation-steps", 2),
        ("--mixed-precision", "fp16", "--activation-checkpointing"),
    ],
)
def test_every_kind_of_run_has_a_plan(words):
    plan = plan_of(*SIXTEEN, *words)
    assert plan["fits"] and plan["run_seconds"] > 0
    if "hsdp" in words:
        assert plan["setup"]["shard"] == 8 and plan["setup"]["micro_batch"] == 8


def test_text_rows_take_memory_and_time():
    text, label = plan_of(*SIXTEEN, "--gpt-type", "t2i"), plan_of(*SIXTEEN)
    assert text["memory"][memory.ACTIVATIONS] > 2.5 * label["memory"][memory.ACTIVATIONS]  # 120 + 63 rows, not 64
    assert text["flops_per_image"] > 1.5 * label["flops_per_image"]  # the head's are the same


def test_script_prints_and_writes_the_plan(tmp_path, capsys):
    file = tmp_path / "plan.json"
    main(arguments(*SIXTEEN, "--json", file))
    shown, record = capsys.readouterr().out, json.loads(file.read_text())
    assert record["memory_total"] == sum(record["memory"].values()) and all(part in shown for part in record["memory"])
    assert f"{record['parameters']:,}" in shown and "GPU hours" in shown
    main(arguments(*SIXTEEN, "--gpu-memory-gib", 1))
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--global-batch-size", 100), "100 cannot be split over --gpus 16 .* try 96 or 112"),
        (("--gradient-accumulation-steps", 3), "try 240 or 288"),
        (("--gpu", "Voodoo2"), "Voodoo2 is not known; known are .*H100"),
        (("--gpu", "V100"), "no bf16 units"),
        (("--data-parallel", "hsdp", "--shard-size", 5), "groups of 5 do not divide 16"),
        (("--image-size", 100), "not a multiple"),
        (("--ar-token-num", 9), "9|3x3 regions"),
        (("--images", 10), "fewer than"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(ValueError, match=message):
        main(arguments(*SIXTEEN, *words))


def test_queries_take_the_memory_of_rows():
    lpd = ModelArgs(**GPT_SIZES["LPD-XS"].fields)
    raster = replace(lpd, trunk="llama")
    assert (memory.queries_of(raster), memory.queries_of(lpd)) == (0, 256)
    one, other = (training_memory(args, Setup(micro_batch=8))[memory.ACTIVATIONS] for args in (raster, lpd))
    of_row = [block_bytes(args, Setup()) for args in (raster, lpd)]
    assert other == pytest.approx(2 * one * of_row[1] / of_row[0], rel=0.01)
