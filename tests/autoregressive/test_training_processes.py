"""Training over processes: the losses of one, by every strategy; killed at any moment and resumed; moved to others."""

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.pipeline import load_gpt
from autoregressive.train import train_c2i_fsdp
from dataset.code_files import write_published
from tests.helpers import ROOT
from tests.training import (
    check_published_flags,
    live,
    load,
    make_codes,
    metrics,
    quiet_loggers,
    repetitive_codes,
    run_folder,
    run_here,
    run_script,
    same,
)
from utils.checkpoint import read_checkpoint
from utils.training.order import BatchOrder

DDP, FSDP = "autoregressive.train.train_c2i", "autoregressive.train.train_c2i_fsdp"
VOCAB, CLASSES, TOKENS, COUNT = 64, 10, 16, 96
MODEL = ["--gpt-model", "GPT-XS", "--vocab-size", VOCAB, "--num-classes", CLASSES, "--image-size", 16]
MODEL += ["--downsample-size", 4, "--mixed-precision", "fp32"]
PLAIN = ["--global-batch-size", 16, "--num-workers", 0, "--log-every", 1, "--lr", 2e-3, "--ema", "--ema-decay", 0.9]
EXACT = ["--dropout-p", 0, "--token-dropout-p", 0]
LARGE = ["--global-batch-size", 32]  # an epoch of three steps
SIX = [*EXACT, *LARGE, "--epochs", 2, "--gradient-accumulation-steps", 2, "--ckpt-every", 100]
# An objective that autograd differentiates.
OWN = ["--import", ROOT / "examples/z_loss.py", "--objective", "z_loss"]
# A smaller rate: Adam makes large steps of the special tokens' first, tiny gradients, whose rounding would then show.
PAR = ["--ar-token-num", 4, "--spe-token-num", 3, "--lr", 5e-4]
NAR = ["--layout", "neighbours", "--lr-schedule", "steps"]
NPP = ["--patch-level", 2, "--epoch-rate", 0.5, "--scheduler"]


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes") / "packed"
    array = repetitive_codes(COUNT, 2, TOKENS, VOCAB)
    return make_codes(folder, array, np.arange(COUNT) % CLASSES, image_size=16, vocab=VOCAB, classes=CLASSES)


def life(codes, results, *more, module=FSDP, world=1, **when):
    """One run of a script, as tests/processes.py reads it."""
    args = ["--code-path", codes, "--results-dir", results, "--no-wandb", *MODEL, *PLAIN, *more]
    return {"module": module, "args": list(map(str, args)), "world": world, **when}


def odd_codes(folder):
    """Held-out codes that no number of processes shares evenly."""
    array = repetitive_codes(11, 1, TOKENS, VOCAB)
    return make_codes(folder, array, np.arange(11) % CLASSES, image_size=16, vocab=VOCAB, classes=CLASSES)


def last(results):
    """The newest checkpoint of a run: a file or a folder."""
    return max((run_folder(results) / "checkpoints").glob("0*"), key=lambda path: int(path.stem))


def weights(results):
    """(model, ema) of a run's newest checkpoint."""
    read = read_checkpoint(last(results))
    return read.model, read.ema


# The losses of one process


@pytest.fixture(scope="module")
def one(codes, tmp_path_factory):
    """Runs of one process, to compare with."""
    folder = tmp_path_factory.mktemp("one")
    held_out = ["--val-code-path", odd_codes(folder / "held_out")]
    runs = {"raster": [*SIX, *OWN, *held_out], "PAR": [*SIX, *PAR], "NAR": [*SIX, *NAR], "NPP": [*SIX, *NPP]}
    live(*(life(codes, folder / name, *flags, module=DDP) for name, flags in runs.items()))
    return folder


def agree(folder, one):
    """Losses to 1e-5, averaged weights to what a step may add to that."""
    losses = metrics(one, "loss")
    assert len(losses) == 6 and metrics(folder, "loss") == pytest.approx(losses, abs=1e-5)
    assert metrics(folder, "val_loss") == pytest.approx(metrics(one, "val_loss"), abs=1e-4)
    assert metrics(folder, "grad_norm") == pytest.approx(metrics(one, "grad_norm"), rel=1e-4)
    for mine, theirs in zip(weights(folder), weights(one), strict=True):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(codes, tmp_path, one):
    """With accumulation, in float32, over six steps and two epochs, by DDP and by every way of sharding."""
    kinds = {
        "ddp": ["--data-parallel", "ddp"],
        "fsdp": ["--data-parallel", "fsdp", "--activation-checkpointing"],
        "sdp": ["--data-parallel", "sdp", "--sync-every-micro-batch"],
    }
    flags = [*SIX, *OWN, "--val-code-path", odd_codes(tmp_path / "held_out")]
    live(*(life(codes, tmp_path / name, *flags, *more, world=2) for name, more in kinds.items()))
    for name in kinds:
        agree(tmp_path / name, one / "raster")


@pytest.mark.slow
def test_four_processes_give_the_losses_of_one(codes, tmp_path, one):
    flags = [*SIX, *OWN, "--val-code-path", odd_codes(tmp_path / "held_out")]
    flags += ["--data-parallel", "hsdp", "--shard-size", 2]
    live(life(codes, tmp_path / "hsdp", *flags, world=4))
    agree(tmp_path / "hsdp", one / "raster")


@pytest.mark.slow
def test_par_nar_and_npp_give_the_losses_of_one_process(codes, tmp_path, one):
    kinds = {("PAR", "fsdp"): PAR, ("NAR", "ddp"): NAR, ("NAR", "fsdp"): NAR, ("NPP", "ddp"): NPP, ("NPP", "fsdp"): NPP}
    runs = {case: tmp_path / "-".join(case) for case in kinds}
    live(*(life(codes, runs[case], *SIX, *flags, "--data-parallel", case[1], world=2) for case, flags in kinds.items()))
    for case, folder in runs.items():
        agree(folder, one / case[0])
    losses, lr = list(metrics(one / "NPP", "loss").values()), metrics(one / "NPP", "lr")
    assert losses[5] < losses[0] and len({lr[step] for step in range(1, 7)}) > 2


KINDS = ("ddp", "fsdp")


@pytest.mark.slow
def test_two_processes_draw_pictures_of_shards(codes, tmp_path, small_files):
    """While weights are in shards every process has to take part in gathering them."""
    flags = [*EXACT, "--vq-ckpt", small_files.vq, "--sample-every", 3, "--max-steps", 6]
    live(life(codes, tmp_path / "run", *flags, world=2))
    folder = run_folder(tmp_path / "run") / "samples"
    assert sorted(os.listdir(folder)) == ["0000003.png", "0000006.png"]
    for name in os.listdir(folder):
        with Image.open(folder / name) as picture:
            assert len(np.unique(np.asarray(picture))) > 10, "a picture and not one colour"
    assert len(metrics(tmp_path / "run", "loss")) == 6 and last(tmp_path / "run").name == "0000006"


# Killed and resumed


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_gives_the_same_bits(codes, tmp_path, kind):
    """Two kills -9 over one run of two processes, with dropout on: after a checkpoint, and while the next is being written."""
    flags = [*LARGE, "--epochs", 2, "--ckpt-every", 1, "--keep-last", 3, "--resume", "--data-parallel", kind]
    killed, lives = tmp_path / "killed", [life(codes, tmp_path / "whole", *flags, world=2)]
    for moment in ("0000002*", ".0000004.*"):
        lives.append(life(codes, killed, *flags, world=2, kill_at=f"{killed}/*/checkpoints/{moment}"))
    printed = live(*lives, life(codes, killed, *flags, world=2))
    assert printed.count("life: killed") == 2 and printed.count("resuming") >= 2
    whole, parts = last(tmp_path / "whole"), last(killed)
    assert whole.name == parts.name and whole.stem == "0000006"
    for one, other in zip(weights(tmp_path / "whole"), weights(killed), strict=True):
        assert same(one, other)
    if kind == "ddp":
        one, other = load(whole), load(parts)
        assert one.pop("args") and other.pop("args") and same(one, other)
    else:
        one, other = (json.loads((path / "training.json").read_text()) for path in (whole, parts))
        assert one.pop("args") and other.pop("args") and one == other
    assert not list((run_folder(killed) / "checkpoints").glob(".*")), "nothing unfinished is left"
    assert metrics(killed, "loss") == metrics(tmp_path / "whole", "loss")


@pytest.mark.slow
def test_sums_over_three_processes_are_the_same_after_resuming(codes, tmp_path):
    """DDP rearranges its buckets after the first step of a process, and with them the order of sums of more than two."""
    flags = ["--epochs", 1, "--global-batch-size", 24, "--ckpt-every", 2, "--lr", 1e-2, "--resume"]
    stops = [life(codes, tmp_path / "stopped", *flags, "--max-steps", n, module=DDP, world=3) for n in (2, 4)]
    live(life(codes, tmp_path / "whole", *flags, module=DDP, world=3), *stops)
    assert same(weights(tmp_path / "whole")[0], weights(tmp_path / "stopped")[0])


@pytest.mark.slow
def test_sigterm_saves_and_exits_0(codes, tmp_path):
    """Only one of two processes gets the signal; both stop after the same step, with all shards saved."""
    flags = ["--epochs", 4000, "--ckpt-every", 3]
    live(life(codes, tmp_path, *flags, world=2, kill_at=f"{tmp_path}/*/checkpoints/0000003*", signal="SIGTERM", only=1))
    saved = read_checkpoint(last(tmp_path))
    text = (run_folder(tmp_path) / "log.txt").read_text()
    assert 3 <= saved.steps < 24000
    assert f"stopped by SIGTERM after step {saved.steps} of 24000; --resume continues from there" in text


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_down(codes, tmp_path):
    """Without torchrun, which would end them too: the one that is left says what happened."""
    flags = ["--epochs", 4000, "--timeout-minutes", 1]
    told = live(life(codes, tmp_path, *flags, world=2, kill_at=f"{tmp_path}/*/metrics.jsonl", only=1))
    assert re.search(r"ConnectionError: process 0 lost the others at step \d+ \(.*\): one of them has ended", told), (
        told
    )
    assert "there is no checkpoint yet" in told


@pytest.mark.slow
def test_sample_that_one_process_cannot_read_ends_all_at_one_step_with_the_state_saved(tmp_path):
    for i, code in enumerate(repetitive_codes(COUNT, 1, TOKENS, VOCAB)):
        write_published(tmp_path / "codes", 16, i, code, i % CLASSES)
    order = BatchOrder(COUNT, 16, 1, rank=1, world_size=2, seed=0).samples(0, 5, rank=1)
    file = tmp_path / "codes" / "imagenet16_codes" / f"{order[3]}.npy"
    file.write_bytes(file.read_bytes()[:-9])
    told = live(life(tmp_path / "codes", tmp_path / "results", "--epochs", 1, world=2, fails=True))
    assert len(set(re.findall(r"AgreedError: (no more data .*)", told))) == 1, told
    assert re.search(rf"by process 1 after step [45]: {file}", told)
    assert "no more data could be read by process 1" in (run_folder(tmp_path / "results") / "log.txt").read_text()
    assert last(tmp_path / "results").stem == "0000005"


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_told_by_all_in_the_same_words(tmp_path):
    """Process 1, part 2 of 2, in the middle between two log lines and a step before a checkpoint."""
    args = ["--results-dir", tmp_path, "--broken-rank", 1, "--broken-step", 6, "--gradient-accumulation-steps", 2]
    args += ["--mixed-precision", "none", "--ckpt-every", 4, "--log-every", 100]
    broken = {"module": "tests.broken_run", "args": list(map(str, args)), "world": 2, "fails": True}
    printed = live(broken)
    order = BatchOrder(64, 16, 2, rank=1, world_size=2, seed=0)
    order.start_at(epoch=1, batch=2)
    samples = list(order)[1]
    told = re.findall(r"AgreedError: (.*)", printed)
    assert len(told) == 2 and len(set(told)) == 1
    assert told[0].startswith("the loss became nan at step 7 on process 1, part 2 of 2 of its batch;")
    assert f"Samples there: {', '.join(map(str, samples))}. The last checkpoint is" in told[0]
    assert [path.name for path in (run_folder(tmp_path) / "checkpoints").iterdir()] == ["0000004.pt"]


# Moved to other processes


def read_samples(file):
    """The sets of samples of each step: every process's parts in order, put together."""
    parts: dict[int, list] = {}
    for line in file.read_text().splitlines():
        rank, indices = json.loads(line)
        parts.setdefault(rank, []).append(indices)
    steps = len(parts[0])
    assert all(len(of_rank) == steps for of_rank in parts.values())
    return [[i for rank in sorted(parts) for i in parts[rank][step]] for step in range(steps)]


@pytest.mark.slow
def test_from_two_processes_to_one_to_four(codes, tmp_path):
    """The same samples in the same order, and losses within rounding; from folders to files and back."""
    flags = [*EXACT, *LARGE, "--epochs", 3, "--ckpt-every", 100, "--resume"]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    watched = {"watch": str(tmp_path / "whole.txt")}
    lives = [life(codes, whole, *flags, module=DDP, **watched)]
    for number, (module, world, steps) in enumerate([(FSDP, 2, 2), (DDP, 1, 5), (FSDP, 4, 9)]):
        more = ["--max-steps", steps, *(["--ema"] if world else [])]
        watched = {"watch": str(tmp_path / f"{number}.txt")}
        lives.append(life(codes, moved, *flags, *more, module=module, world=world, **watched))
    live(*lives)
    assert metrics(moved, "loss") == pytest.approx(metrics(whole, "loss"), abs=1e-5)
    expected = read_samples(tmp_path / "whole.txt")
    read = [step for number in range(3) for step in read_samples(tmp_path / f"{number}.txt")]
    assert read == expected and len(read) == 9
    assert sorted(i for step in expected[:3] for i in step) == list(range(COUNT)), "an epoch is every sample once"
    names = sorted(path.name for path in (run_folder(moved) / "checkpoints").iterdir())
    assert names == ["0000002", "0000005.pt", "0000009"]
    for mine, theirs in zip(weights(moved), weights(whole), strict=True):
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


# Files


@pytest.mark.slow
def test_a_sharded_checkpoint_samples_and_starts_other_runs(codes, tmp_path, small_files):
    """bf16, fp16 and the published folder: consolidated.pth with --from-fsdp, --gpt-resume of folder and file."""
    first, cloud = tmp_path / "first", tmp_path / "cloud"
    flags = ["--mixed-precision", "bf16", "--grad-precision", "fp32", "--max-steps", 3, "--cloud-save-path", cloud]
    live(
        life(codes, first, *flags, "--no-local-save", world=2),
        life(codes, tmp_path / "half", "--mixed-precision", "fp16", "--max-steps", 1, world=2),
    )
    (folder,) = cloud.glob("*-GPT-XS/0000003")
    assert (folder / "resume_step.txt").read_text() == "3\n"
    assert {"consolidated.pth", "consolidated_ema.pth", ".metadata", "training.json"} <= set(os.listdir(folder))
    bare = load(folder / "consolidated.pth")
    assert {tensor.dtype for tensor in bare.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "half")[0].values())
    for path, ema in ((folder, False), (folder / "consolidated.pth", False), (folder, True)):
        model = load_gpt(path, gpt_model="GPT-XS", image_size=16, downsample_size=4, use_ema=ema)
        expected = load(folder / "consolidated_ema.pth") if ema else bare
        assert same(dict(model.state_dict()), expected)

    more = ["--max-steps", 4, "--lr", 0]
    live(
        life(codes, tmp_path / "whole", *more, "--gpt-resume", folder, world=2),
        life(codes, tmp_path / "weights", *more, "--gpt-resume", folder / "consolidated.pth"),
        life(codes, tmp_path / "file", "--max-steps", 2, module=DDP),
        life(codes, tmp_path / "sharded", *more, "--gpt-ckpt", tmp_path / "file", world=2),
    )
    steps = {name: list(metrics(tmp_path / name, "loss")) for name in ("whole", "weights", "sharded")}
    assert steps == {"whole": [4], "weights": [1, 2, 3, 4], "sharded": [3, 4]}
    for name in ("whole", "weights"):
        assert same(weights(tmp_path / name)[0], bare)
    assert same(weights(tmp_path / "sharded")[0], weights(tmp_path / "file")[0])


def test_one_process_shards_too(codes, tmp_path):
    """python3 without torchrun; the wandb project that is on by default needs no wandb."""
    with quiet_loggers():
        run_here(
            train_c2i_fsdp,
            *("--code-path", codes, "--results-dir", tmp_path / "fsdp", *MODEL, *PLAIN, *EXACT, "--max-steps", 2),
        )
    assert last(tmp_path / "fsdp").is_dir()
    assert not torch.distributed.is_initialized()


FLAGS = """
`--code-path` str = required; `--cloud-save-path` str = required; `--no-local-save` switch = –;
`--gpt-model` str ∈ [GPT-B, GPT-L, GPT-XL, GPT-XXL, GPT-XXXL, GPT-1B, GPT-3B, GPT-7B] = GPT-B; `--gpt-resume` str = None;
`--gpt-type` str ∈ [c2i, t2i] = c2i; `--vocab-size` int = 16384; `--ema` switch = –; `--cls-token-num` int = 1;
`--dropout-p` float = 0.1; `--token-dropout-p` float = 0.1; `--drop-path-rate` float = 0.0; `--results-dir` str = results;
`--dataset` str = imagenet_code; `--image-size` int ∈ [256, 384, 448, 512] = 256; `--downsample-size` int ∈ [8, 16] = 16;
`--num-classes` int = 1000; `--epochs` int = 300; `--lr` float = 0.0001; `--weight-decay` float = 0.05;
`--beta1` float = 0.9; `--beta2` float = 0.95; `--max-grad-norm` float = 1.0; `--global-batch-size` int = 256;
`--global-seed` int = 0; `--num-workers` int = 24; `--log-every` int = 100; `--ckpt-every` int = 5000;
`--gradient-accumulation-steps` int = 1; `--mixed-precision` str ∈ [fp32, tf32, fp16, bf16] = bf16;
`--data-parallel` str ∈ [sdp, fsdp, hsdp] = fsdp; `--grad-precision` str ∈ [fp32, fp16, bf16] = None;
`--wandb-project` str = c2i_fsdp; `--no-wandb` switch = –; `--spe-token-num` int = 3; `--ar-token-num` int = 4;
`--patch-level` int = 1; `--epoch-rate` float = 0.5; `--scheduler` switch = off; `--warmup-epochs` int = 1;
`--decay-ratio` float = 0.2; `--end-lr` float = 1e-5
"""


def test_published_flags():
    check_published_flags(train_c2i_fsdp, FLAGS, ("--cloud-save-path", "--ar-token-num", "--spe-token-num"))


@pytest.mark.slow
def test_the_script_itself_by_torchrun(codes, tmp_path):
    output = run_script(FSDP, *life(codes, tmp_path / "run", "--max-steps", 2)["args"], processes=2)
    assert "Traceback" not in output and "Warning" not in output and last(tmp_path / "run").name == "0000002"


@pytest.mark.parametrize(
    "more, message",
    [
        (["--data-parallel", "hsdp", "--shard-size", 3], r"groups of 3 do not divide 1 processes"),
        ([*PAR, "--patch-level", 2], r"'parallel' and patches of 2x2 .*both"),
        (["--patch-level", 4, "--epochs", 64], r"patches of 8x8 tokens, which do not divide a grid of 4x4"),
        (["--patch-level", 5], r"--patch-level goes from 1"),
        (["--scheduler", "--lr-schedule", "cosine"], r"leave out --lr-schedule"),
    ],
)
def test_what_a_user_gets_wrong(codes, tmp_path, more, message):
    args = life(codes, tmp_path, *more)["args"]
    try:
        with quiet_loggers(), pytest.raises(ValueError, match=message):
            train_c2i_fsdp.main(train_c2i_fsdp.flags().parse_args(args))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
