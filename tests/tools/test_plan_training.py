"""tools/plan_training.py: planned memory against what real steps hold, sharding and hours by hand, mistakes."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.train import memory
from autoregressive.train.flops import training_flops_per_image
from autoregressive.train.loss import TokenLoss
from autoregressive.train.memory import Setup, example_batch, passes_memory, training_memory
from tools.plan_training import GIB, describe, flags, main, make_plan, remedies
from utils.distributed import Distributed, start
from utils.training.ema import EMA
from utils.training.optim import adamw
from utils.training.parallel import Parallel

SMALL = ModelArgs(dim=128, n_layer=6, n_head=4, vocab_size=1024, num_classes=10, block_size=256)
CPU = Setup(micro_batch=2, as_gpu=False)
RATES = flags().parse_args([])
RATES.lr, RATES.beta1, RATES.beta2, RATES.weight_decay = 1e-4, 0.9, 0.95, 0.05


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
            batch = {name: tensor.to(dist.device) for name, tensor in example_batch(args, setup.micro_batch).items()}
            with plan.last_only(module, last=number == setup.accumulation - 1):
                with torch.autocast(dist.device.type, dtype, enabled=dtype is not None):
                    loss = module(**batch)
                loss.backward()
        optimizer.step()
        if average:
            average.update()


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


@pytest.mark.parametrize("precision", ["none", "bf16"])
@pytest.mark.parametrize(
    ("checkpointing", "accumulation"),
    [(False, 1), pytest.param(True, 1, marks=pytest.mark.slow), pytest.param(True, 2, marks=pytest.mark.slow)],
)
def test_plan_is_what_training_steps_hold(tmp_path, precision, checkpointing, accumulation):
    setup = replace(
        CPU, precision=precision, checkpointing=checkpointing, accumulation=accumulation, ema=accumulation > 1
    )
    planned = training_memory(SMALL, setup)
    peak = measured_peak(tmp_path, lambda: train(SMALL, setup, Distributed(torch.device("cpu"))))
    print(f"{setup.precision}, {checkpointing=}, {accumulation=}: {peak / 2**20:.1f}, {planned.total / 2**20:.1f} MiB")
    # bfloat16 kernels of a CPU also have float32 buffers of their own
    assert planned.total == pytest.approx(peak, rel=0.01 if precision == "none" else 0.1)


@pytest.mark.parametrize("strategy", ["fsdp", "sdp"])
def test_plan_is_what_a_sharded_step_holds(tmp_path, strategy):
    setup = replace(CPU, strategy=strategy, precision="none", ema=True)
    dist = start("cpu", group=True)
    try:
        peak = measured_peak(tmp_path, lambda: train(SMALL, setup, dist))
    finally:
        dist.close()
    assert training_memory(SMALL, setup).total == pytest.approx(peak, rel=0.1)


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
    assert training_memory(args, setup).total == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {},
        pytest.param({"checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"strategy": "fsdp", "gpus": 4, "shard": 4}, marks=pytest.mark.slow),
        pytest.param({"as_gpu": True, "compiled": True}, marks=pytest.mark.slow),
        {"precision": "none", "gpus": 2},
    ],
)
def test_a_few_blocks_stand_for_all(change):
    setup = replace(CPU, **change)
    few = {m.at: sum(m.parts.values()) for m in passes_memory(SMALL, setup)}
    every = {m.at: sum(m.parts.values()) for m in passes_memory(SMALL, setup, simulated=SMALL.n_layer)}
    assert few.keys() == every.keys()
    assert max(few.values()) == max(every.values())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_keep_what_is_counted():
    args = replace(SMALL, n_layer=1)

    def kept(model: Transformer) -> int:
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        storages = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                storages[storage._cdata] = storage.nbytes()
            return tensor

        x, rope = torch.zeros(2, 256, args.dim, requires_grad=True), torch.zeros(256, 16, 2)
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model.layers[0](x, rope)
        assert out.requires_grad
        return sum(storages.values())

    with memory.FakeTensorMode():
        model = Transformer(args).train()
        with torch.autocast("cpu", torch.bfloat16):
            memory.compile_blocks(model)
        counted = kept(model)
    model = Transformer(args).train()
    model.layers[0].forward = torch.compile(model.layers[0].forward)
    assert kept(model) == counted


def test_checkpointed_blocks_keep_their_inputs():
    planned = {m.at: m.parts for m in passes_memory(SMALL, replace(CPU, checkpointing=True))}
    rows = 2 * 256 * SMALL.dim * 4  # float32
    kept = (SMALL.n_layer + 1) * rows  # and the noise of the first dropout
    assert planned[memory.IN_LOSS][memory.ACTIVATIONS] == pytest.approx(kept, rel=0.01)


def test_shards_by_hand():
    args = ModelArgs(
        dim=64, n_layer=4, n_head=2, vocab_size=100, num_classes=10, block_size=64, ar_token_num=4, multiple_of=32
    )
    hidden = 192  # int(2 * 256 / 3) = 170, rounded up to a multiple of 32
    block = 64 * 192 + 64 * 64 + 3 * 64 * hidden + 2 * 64
    root = 11 * 64 + 100 * 64 + 3 * 64 + 64 + 100 * 64  # classes and "no class", codes, special tokens, norm, head
    # rank 0 of 8: 8 or 24 rows of each block's matrices and 8 of its norms; 2 of 11 classes, 13 of 100 codes, 1 of 3
    block_shard = 24 * 64 + 8 * 64 + (24 + 24) * 64 + 8 * hidden + 2 * 8
    shard = 4 * block_shard + (2 + 13 + 1 + 13) * 64 + 8

    def parts(strategy: str, **change) -> dict[str, int]:
        setup = Setup(strategy=strategy, gpus=8, shard=8, micro_batch=64, ema=True, **change)
        return training_memory(args, setup).parts

    fsdp = parts("fsdp", grad_precision="fp32")
    assert fsdp[memory.WEIGHTS] == fsdp[memory.AVERAGE] == 4 * shard
    assert fsdp[memory.MOMENTS] == 8 * shard
    assert fsdp[memory.GATHERED] == 2 * (2 * block + root)  # bfloat16, two blocks in flight
    in_flight = (2 + 4) * block
    assert fsdp[memory.WHOLE_GRADIENTS] == in_flight + 2 * (64 + 100 * 64)  # and the head's and the last norm's
    assert parts("sdp")[memory.GATHERED] == 2 * (4 * block + root)
    assert parts("fsdp", precision="none")[memory.GATHERED] == 4 * (2 * block + root)
    # parts of a batch wait unsharded, or their shards are added up
    waiting = parts("fsdp", grad_precision="fp32", accumulation=2)
    assert waiting[memory.WHOLE_GRADIENTS] == in_flight + 4 * (4 * block + root)
    synced = parts("fsdp", grad_precision="fp32", accumulation=2, sync_every_micro_batch=True)
    assert synced[memory.GRADIENTS] == 4 * shard
    # DDP keeps everything, and buckets for all gradients
    ddp = training_memory(args, Setup(gpus=8, micro_batch=64)).parts
    assert ddp[memory.WEIGHTS] == ddp[memory.GRADIENTS] == 4 * (4 * block + root)
    assert ddp[memory.MOMENTS] == 8 * (4 * block + root)


def test_the_optimizer_step_can_be_the_fullest():
    args = replace(SMALL, vocab_size=8, block_size=4)
    alone = replace(CPU, strategy="fsdp", micro_batch=1, accumulation=2)  # gradients wait in bfloat16
    planned = training_memory(args, alone)
    assert planned.at == memory.UPDATE and planned.total == 16 * Transformer(args).num_parameters


def arguments(*words: object):
    return flags().parse_args([str(word) for word in words])


def plan_of(*words: object):
    return make_plan(arguments(*words))


SIXTEEN = ("--gpt-model", "GPT-XS", "--gpus", 16, "--image-size", 128, "--no-compile")


def test_times_by_hand():
    plan = plan_of(*SIXTEEN, "--images", 1000, "--epochs", 10, "--mfu", 0.5, "--gpu", "A100", "--patch-level", 2)
    model = Transformer(ModelArgs(dim=128, n_layer=4, n_head=4, block_size=64))
    fine = training_flops_per_image(model.args)
    coarse = training_flops_per_image(model.args, replace(model.layout, patch_side=2))
    per_second = 16 * 0.5 * 312e12
    assert plan.parameters == model.num_parameters and plan.tokens_per_step == 256 * 64
    assert plan.steps_per_epoch == 3
    assert plan.step_flops == 256 * fine and plan.step_seconds == pytest.approx(256 * fine / per_second)
    assert plan.run_seconds == pytest.approx(5 * 768 * (fine + coarse) / per_second)
    assert coarse < fine / 3


@pytest.mark.parametrize(
    "words",
    [
        ("--gpt-type", "t2i"),
        ("--ar-token-num", 4),
        ("--data-parallel", "hsdp", "--gradient-accumulation-steps", 2),
        ("--mixed-precision", "fp16", "--activation-checkpointing"),
        ("--drop-path-rate", 0.1),
    ],
)
def test_every_kind_of_run_has_a_plan(words):
    plan = plan_of(*SIXTEEN, *words)
    assert plan.fits and plan.run_seconds > 0
    if "hsdp" in words:
        assert plan.setup.shard == 8 and plan.setup.micro_batch == 8


def test_text_rows_take_memory_and_time():
    text, label = plan_of(*SIXTEEN, "--gpt-type", "t2i"), plan_of(*SIXTEEN)
    kept = [plan.memory.parts[memory.ACTIVATIONS] for plan in (text, label)]
    assert kept[0] > 2.5 * kept[1]  # 120 + 63 rows in place of 64
    assert text.step_flops > 1.5 * label.step_flops  # the head's are the same


@pytest.mark.slow
def test_says_what_would_fit():
    half = plan_of(*SIXTEEN, "--global-batch-size", 512).memory.total
    args = arguments(*SIXTEEN, "--global-batch-size", 1024, "--gpu-memory-gib", 2 + half / GIB)
    plan = make_plan(args)
    assert not plan.fits
    found = dict(remedies(args, plan))
    assert all(other.fits for other in found.values())
    assert "--gradient-accumulation-steps 2" in found and "--activation-checkpointing" in found


def test_says_where_nothing_fits():
    args = arguments(*SIXTEEN, "--gpu-memory-gib", 1)
    shown = "\n".join(describe(args, make_plan(args)))
    assert "DOES NOT FIT" in shown and "more GPUs" in shown


def test_script_prints_and_writes_the_plan(tmp_path, capsys):
    file = tmp_path / "plan.json"
    main(arguments(*SIXTEEN, "--json", file))
    shown, record = capsys.readouterr().out, json.loads(file.read_text())
    assert record["memory"]["total"] == sum(record["memory"]["parts"].values())
    assert f"{record['parameters']:,}" in shown and "GPU hours" in shown
    for part in record["memory"]["parts"]:
        assert part in shown


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
        (("--patch-level", 5), "patch-level"),
        (("--image-size", 144, "--patch-level", 2), "patches of 2x2"),
        (("--images", 10), "fewer than"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(ValueError, match=message):
        main(arguments(*SIXTEEN, *words))
