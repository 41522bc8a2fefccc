"""Plans in one process: what a strategy does to a model, its precision, its initial weights, and what it must not change.

Several processes: tests/autoregressive/test_training_processes.py.
"""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor

from autoregressive.models.gpt import GPT_models
from tests.training import same
from utils.cli import flag_parser
from utils.distributed import Distributed, start
from utils.precision import use_tf32
from utils.rng import item_seed
from utils.training import parallel
from utils.training.ema import local
from utils.training.flags import add_parallel_flags
from utils.training.parallel import Parallel, SeededNormal, copy_rows, materialize, rows_held

CPU = Distributed(torch.device("cpu"))
SHARDED = ["fsdp", "sdp", "hsdp"]


@pytest.fixture
def alone():
    """A process group of one process."""
    dist = start("cpu", group=True)
    yield dist
    dist.close()


@pytest.fixture(autouse=True)
def float32_products():
    yield
    use_tf32(False)


def gpt(dropout=0.0, **more):
    """Two layers on the meta device."""
    drops = dict.fromkeys(("token_dropout_p", "resid_dropout_p", "ffn_dropout_p", "class_dropout_prob"), dropout)
    with torch.device("meta"):
        return GPT_models["GPT-XS"](n_layer=2, vocab_size=64, block_size=16, num_classes=10, **drops, **more)


def laid_out(dist, strategy="ddp", dropout=0.0, seed=0, **plan):
    """A plan, the model, and what a loss calls. Its output layer is not zero, so that every weight has a gradient."""
    plan, model = Parallel(dist, strategy, **plan), gpt(dropout)
    if plan.sharded:
        wrapped = plan.apply(model, blocks=model.layers)
        materialize(model, dist.device, seed)
    else:
        materialize(model, dist.device, seed)
        wrapped = plan.apply(model, blocks=model.layers)
    with torch.no_grad():
        SeededNormal(9)(model.output.weight, 0.1)
    return plan, model, wrapped


def batch(seed=0, rows=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(64, (rows, 15), generator=generator), torch.randint(10, (rows,), generator=generator)


def loss(wrapped, *inputs):
    """Of a forward pass with draws of its own."""
    torch.manual_seed(5)
    return wrapped(*inputs).log_softmax(-1)[..., 3].square().mean()


def gradients(model):
    return {name: local(p.grad).clone() for name, p in model.named_parameters()}


def whole(model):
    return {name: local(p.detach()).clone() for name, p in model.named_parameters()}


# Applying a plan


@pytest.mark.parametrize("strategy", SHARDED)
def test_sharding_in_float32_changes_no_number(alone, strategy):
    results = []
    for plan in ({}, {"strategy": strategy}):
        _, model, wrapped = laid_out(alone, dropout=0.3, **plan)
        loss(wrapped, *batch()).backward()
        results.append((whole(model), gradients(model)))
        assert all(isinstance(p, DTensor) == bool(plan) for p in model.parameters())
    assert same(*results)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "sdp"])
def test_half_precision_computes_in_it_and_keeps_weights_in_float32(alone, strategy):
    plan, model, wrapped = laid_out(alone, strategy, precision="bf16")
    computed = []
    model.layers[1].attention.wqkv.register_forward_hook(lambda module, inputs, output: computed.append(output.dtype))
    with torch.autocast("cpu", plan.autocast_dtype, enabled=plan.autocast_dtype is not None):
        loss(wrapped, *batch()).backward()
    assert computed == [torch.bfloat16]
    assert plan.autocast_dtype == (torch.bfloat16 if strategy == "ddp" else None)
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    _, exact, unwrapped = laid_out(alone)
    loss(unwrapped, *batch()).backward()
    for name, gradient in gradients(exact).items():
        assert (gradients(model)[name] - gradient).norm() < 0.05 * gradient.norm(), name
    assert not same(gradients(model), gradients(exact))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_names_are_those_of_the_model_whatever_is_done_to_it(alone, strategy):
    expected = list(gpt().state_dict())
    for compile in (False, True):  # on a CPU nothing is compiled
        for checkpointing in (False, True):
            model = laid_out(alone, strategy, compile=compile, activation_checkpointing=checkpointing)[1]
            assert list(model.state_dict()) == expected
            assert [name for name, _ in model.named_parameters()] == [n for n, _ in gpt().named_parameters()]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_recomputing_activations_gives_bit_identical_gradients(alone, strategy):
    results = []
    for recomputed in (False, True):
        _, model, wrapped = laid_out(alone, strategy, dropout=0.4, activation_checkpointing=recomputed)
        calls = []
        model.layers[0].attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        value = loss(wrapped, *batch())
        value.backward()
        assert len(calls) == (2 if recomputed else 1)
        results.append((value.detach(), gradients(model)))
    assert same(*results)


def test_apply_products_and_convolutions_in_tf32_only_where_asked():
    for precision, expected in (("tf32", "high"), ("none", "highest"), ("bf16", "highest")):
        Parallel(CPU, precision=precision).apply(nn.Linear(2, 2))
        assert torch.get_float32_matmul_precision() == expected
        assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")


def test_several_processes_of_plain_models_sum_gradients(alone):
    """A group of one that takes itself for two processes: DistributedDataParallel is around the model."""
    plan = Parallel(replace(alone, world_size=2))
    model = nn.Linear(3, 2)
    wrapped = plan.apply(model)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel) and wrapped.module is model
    assert not plan.sharded
    assert Parallel(alone).apply(model) is model


@pytest.mark.parametrize("precision, kept", [(None, 24), ("bf16", 8), ("fp16", 11)])
def test_the_precision_in_which_plain_models_sum_gradients(alone, precision, kept):
    """kept: significant bits of the gradients that come out."""
    plan = Parallel(replace(alone, world_size=2), precision="bf16", grad_precision=precision)
    torch.manual_seed(0)
    model = nn.Linear(50, 40)
    wrapped = plan.apply(model)
    wrapped(torch.randn(7, 50)).square().mean().backward()
    mantissa, _ = torch.frexp(model.weight.grad)
    bits = 24
    while bits > 1 and torch.equal(mantissa * 2 ** (bits - 1), (mantissa * 2 ** (bits - 1)).round()):
        bits -= 1
    assert bits == kept


@pytest.mark.parametrize(
    "precision, asked, expected",
    [
        ("bf16", None, (torch.bfloat16, torch.bfloat16)),
        ("bf16", "fp32", (torch.bfloat16, torch.float32)),
        ("fp16", "bf16", (torch.float16, torch.bfloat16)),
    ],
)
def test_the_precision_in_which_shards_sum_gradients(alone, precision, asked, expected):
    _, model, wrapped = laid_out(alone, "fsdp", precision=precision, grad_precision=asked)
    for part in (wrapped, *model.layers):
        policy = part._get_fsdp_state()._mp_policy
        assert (policy.param_dtype, policy.reduce_dtype) == expected
        assert not policy.cast_forward_inputs, "rotary tables stay in float32"


# Groups and devices


def test_a_group_that_does_not_divide_the_processes():
    dist = replace(CPU, world_size=6, local_world_size=4)
    with pytest.raises(ValueError, match=r"hsdp: groups of 4 do not divide 6 processes; pass a --shard-size that does"):
        Parallel(dist, "hsdp")
    with pytest.raises(ValueError, match="groups of 5"):
        Parallel(dist, "hsdp", shard_size=5)
    assert Parallel(dist, "hsdp", shard_size=3).group_size == 3
    assert Parallel(replace(dist, local_world_size=2), "hsdp").group_size == 2
    assert Parallel(dist, "fsdp", shard_size=5).sharded, "only hsdp has groups"


def test_meshes(alone, monkeypatch):
    asked = []
    monkeypatch.setattr(
        parallel, "init_device_mesh", lambda *args, mesh_dim_names: asked.append((*args, mesh_dim_names))
    )
    dist = replace(alone, world_size=8, local_world_size=4)
    for plan in (Parallel(dist, "fsdp"), Parallel(dist, "hsdp"), Parallel(dist, "hsdp", shard_size=2)):
        plan.mesh()
    copies = ("replicate", "shard")
    assert asked == [("cpu", (8,), ("shard",)), ("cpu", (2, 4), copies), ("cpu", (4, 2), copies)]


def test_flags_become_a_plan():
    parser = flag_parser(None)
    add_parallel_flags(parser, "fsdp")
    parser.add_argument("--mixed-precision", default="bf16")
    assert Parallel.from_args(parser.parse_args([]), CPU, compile=True) == Parallel(CPU, "fsdp", "bf16", compile=True)
    words = (
        "--data-parallel hsdp --shard-size 1 --grad-precision fp32 --sync-every-micro-batch --activation-checkpointing"
    )
    assert Parallel.from_args(parser.parse_args(words.split()), CPU, compile=False) == Parallel(
        CPU,
        "hsdp",
        "bf16",
        grad_precision="fp32",
        activation_checkpointing=True,
        shard_size=1,
        sync_every_micro_batch=True,
    )


# Parts of a batch


class Recorder(nn.Module):
    """A module that counts blocks without an exchange."""

    skipped = 0

    @contextmanager
    def no_sync(self):
        self.skipped += 1
        yield


def test_gradients_are_summed_after_the_last_part_only():
    for every, expected in ((False, 3), (True, 0)):
        plan, wrapped = Parallel(CPU, sync_every_micro_batch=every), Recorder()
        for number in range(4):
            with plan.last_only(wrapped, last=number == 3):
                pass
        assert wrapped.skipped == expected
    with Parallel(CPU).last_only(nn.Linear(1, 1), last=False):  # one process: there is nothing to leave out
        pass


@pytest.mark.parametrize("every", [False, True])
def test_shards_sum_gradients_after_the_last_part_only(alone, every):
    plan, model, wrapped = laid_out(alone, "fsdp", sync_every_micro_batch=every)
    _, plain, unwrapped = laid_out(alone)
    for _ in range(2):  # a second step starts anew
        wrapped.zero_grad(), plain.zero_grad()
        for number in range(3):
            with plan.last_only(wrapped, last=number == 2):
                loss(wrapped, *batch(number)).backward()
            loss(unwrapped, *batch(number)).backward()
            reduced = [p.grad is not None for p in model.parameters()]
            assert all(reduced) if every or number == 2 else not any(reduced)
        for name, gradient in gradients(plain).items():
            torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-5, atol=1e-7)


# All weights in hand


@pytest.mark.parametrize("strategy", SHARDED)
def test_gathered_weights_are_whole_and_are_put_away_again(alone, strategy):
    plan, model, wrapped = laid_out(alone, strategy)
    _, plain, unwrapped = laid_out(alone)
    kept = []
    for _ in range(2):
        wrapped.zero_grad()
        value = loss(wrapped, *batch())
        kept.append(isinstance(model.layers[0].attention.wo.weight, DTensor))  # between the forward and backward pass
        value.backward()
        with torch.no_grad(), plan.gathered(wrapped):
            assert not any(isinstance(p, DTensor) for p in model.parameters())
            assert same(whole(model), whole(plain))
            assert torch.equal(model(*batch()), plain(*batch()))
        assert all(isinstance(p, DTensor) for p in model.parameters())
    assert kept == [strategy != "sdp"] * 2, "as the strategy has it, also after the weights were gathered"
    loss(unwrapped, *batch()).backward()
    assert same(gradients(model), gradients(plain))


def test_weights_are_put_away_where_the_block_raises(alone):
    plan, model, wrapped = laid_out(alone, "fsdp")
    with pytest.raises(KeyError), plan.gathered(wrapped):
        raise KeyError
    assert all(isinstance(p, DTensor) for p in model.parameters())


# Initial weights


@pytest.mark.parametrize("strategy", SHARDED)
def test_initial_weights_are_those_of_a_plain_model(alone, strategy):
    plain, sharded = gpt(), gpt()
    materialize(plain, torch.device("cpu"), seed=3)
    Parallel(alone, strategy).apply(sharded, blocks=sharded.layers)
    materialize(sharded, torch.device("cpu"), seed=3)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    assert same(whole(sharded), whole(plain))
    other = gpt()
    materialize(other, torch.device("cpu"), seed=4)
    assert not torch.equal(other.tok_embeddings.weight, plain.tok_embeddings.weight)


def test_seeded_normal_draws_blocks_of_rows_of_262144_numbers():
    """Other blocks would be other initial weights for the same seed."""
    drawn = torch.empty(5000, 64)
    SeededNormal(9)(drawn, 0.5)
    generator = torch.Generator().manual_seed(item_seed(9, 1, 1))
    assert torch.equal(drawn[4096:], torch.empty(4096, 64).normal_(std=0.5, generator=generator)[: 5000 - 4096])


def test_initial_weights_are_the_model_s_own_choice():
    model = gpt()
    materialize(model, torch.device("cpu"), seed=0)
    assert not model.output.weight.any() and bool((model.norm.weight == 1).all())
    drawn = torch.cat([m.weight.detach().flatten() for m in model.layers.modules() if isinstance(m, nn.Linear)])
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.01) and abs(float(drawn.mean())) < 2e-4
    assert not any(p.is_meta for p in model.parameters()) and all(p.requires_grad for p in model.parameters())


def draw(seed, *shapes, std=0.5):
    normal = SeededNormal(seed)
    tensors = [torch.full(shape, float("nan")) for shape in shapes]
    for tensor in tensors:
        normal(tensor, std)
    return tensors


def test_seeded_draws_have_their_deviation_and_are_independent():
    shape = (700, 1000)  # several blocks of rows
    first, second = draw(0, shape, shape)
    other = draw(1, shape)[0]
    assert torch.equal(first, draw(0, shape)[0])
    rows = first.flatten(), second.flatten(), other.flatten(), first.roll(262, 0).flatten()  # the next block's
    for x in rows:
        assert abs(float(x.mean())) < 0.003 and float(x.std()) == pytest.approx(0.5, rel=0.01)
    assert (torch.corrcoef(torch.stack(rows)) - torch.eye(4)).abs().max() < 0.006


@pytest.mark.parametrize("shape", [(9, 2**17), (10, 6, 5)], ids=str)
def test_a_process_draws_the_rows_it_holds(shape, monkeypatch):
    whole = draw(7, shape)[0]
    for held in (
        slice(0, 2),
        slice(1, 3),
        slice(shape[0] - 1, shape[0]),
        slice(shape[0], shape[0]),
        slice(0, shape[0]),
    ):
        monkeypatch.setattr(parallel, "rows_held", lambda tensor, held=held: held)
        part = draw(7, (held.stop - held.start, *shape[1:]))[0]
        assert torch.equal(part, whole[held])


# Rows


def test_rows_of_plain_and_sharded_tensors(alone):
    assert rows_held(torch.zeros(5, 2)) == slice(0, 5) and rows_held(torch.tensor(1.0)) == slice(0, 1)
    model = laid_out(alone, "fsdp")[1]
    weight = model.tok_embeddings.weight
    assert rows_held(weight) == slice(0, 64)
    copy_rows(weight, torch.arange(64.0)[:, None].expand(64, 128))
    assert torch.equal(local(weight.detach())[:, 5], torch.arange(64.0))
    scalar = torch.tensor(0.0)
    copy_rows(scalar, torch.tensor(3.0))
    assert scalar == 3
