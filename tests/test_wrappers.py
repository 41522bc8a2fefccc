"""The wrappers in scripts/: the torchrun line that each starts, with the published built-in arguments."""

import os
import subprocess

import pytest

from tests.helpers import ROOT

C2I = "--vq-ckpt ./pretrained_models/vq_ds16_c2i.pt"
T2I = "--vq-ckpt ./pretrained_models/vq_ds16_t2i.pt"
WRAPPERS = {
    "autoregressive/extract_codes_c2i": "autoregressive/train/extract_codes_c2i.py",
    "autoregressive/train_c2i": "autoregressive/train/train_c2i.py",
    "autoregressive/train_c2i_fsdp": "autoregressive/train/train_c2i_fsdp.py",
    "autoregressive/sample_c2i": f"autoregressive/sample/sample_c2i_ddp.py {C2I}",
    "autoregressive/sample_t2i_coco": "autoregressive/sample/sample_t2i_ddp.py "
    f"--prompt-csv evaluations/t2i/coco_captions.csv --sample-dir samples_coco {T2I}",
    "autoregressive/sample_t2i_parti": "autoregressive/sample/sample_t2i_ddp.py "
    f"--prompt-csv evaluations/t2i/PartiPrompts.tsv --sample-dir samples_parti {T2I}",
    "autoregressive/train_t2i_stage1": f"autoregressive/train/train_t2i.py {T2I} --dataset t2i --image-size 256",
    "autoregressive/train_t2i_stage2": f"autoregressive/train/train_t2i.py {T2I} --dataset t2i --image-size 512",
    "language/extract_flan_t5_feat_laion_coco_stage1": "language/extract_t5_feature.py --caption-key blip",
    "language/extract_flan_t5_feat_stage2": "language/extract_t5_feature.py",
    "language/extract_flan_t5_feat_trunc_stage2": "language/extract_t5_feature.py --trunc-caption",
    "tokenizer/train_vq": "tokenizer/tokenizer_image/vq_train.py",
    "tokenizer/train_vq_finetune": "tokenizer/tokenizer_image/vq_train.py "
    f"--finetune --disc-start 0 {C2I} --dataset t2i_image",
    "tokenizer/train_vq_finetune_continue": "tokenizer/tokenizer_image/vq_train.py --disc-start 0 --dataset t2i_image",
    "tokenizer/train_ibq": "tokenizer/tokenizer_image/vq_train.py --vq-model IBQ-16 --reconstruction-loss l1 --disc-start 0 "
    "--disc-weight 1 --gen-weight 0.1 --gen-loss non-saturating-mean --lecam-weight 0.05 --disc-first --beta1 0.5 --beta2 0.9 "
    "--max-grad-norm 0 --ema --ema-decay 0.999 --no-ema-warmup --no-flip --epochs 330 --lr-drop-epochs 250 300 "
    "--global-batch-size 256",
    "tokenizer/train_open_magvit2": "tokenizer/tokenizer_image/vq_train.py --network open-magvit2 --reconstruction-loss l1 "
    "--disc-start 0 --disc-weight 1 --gen-weight 0.1 --gen-loss non-saturating-mean --lecam-weight 0.05 --beta1 0.5 "
    "--beta2 0.9 --max-grad-norm 0 --ema --ema-decay 0.999 --no-ema-warmup --no-flip --epochs 270 --lr-drop-epochs 200 250 "
    "--global-batch-size 256",
    "tokenizer/val": "tokenizer/validation/val_ddp.py",
    "tokenizer/reconstruction_vq": "tokenizer/tokenizer_image/reconstruction_vq_ddp.py",
    "tokenizer/reconstruction_vqgan": "tokenizer/vqgan/reconstruction_vqgan_ddp.py",
    "tokenizer/reconstruction_vae": "tokenizer/vae/reconstruction_vae_ddp.py",
    "tokenizer/reconstruction_consistency_decoder": "tokenizer/consistencydecoder/reconstruction_cd_ddp.py",
}


@pytest.fixture
def started(tmp_path):
    """Runs a wrapper from another folder with a Python that prints its arguments."""
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)

    def start(name, *flags, **environment):
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        names = {"VIRTUAL_ENV": "x", "PATH": path, **environment}
        wrapper = ROOT / "scripts" / f"{name}.sh"
        done = subprocess.run([wrapper, *flags], cwd=tmp_path, env=names, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    return start


def test_wrappers_in_scripts_are_all_listed():
    found = {p.relative_to(ROOT / "scripts").with_suffix("").as_posix() for p in (ROOT / "scripts").glob("*/*.sh")}
    assert found == set(WRAPPERS)


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapper_starts_the_published_command_then_passes_flags_on(started, name):
    script, *own = WRAPPERS[name].split()
    words = started(name, "--data-path", "a b", nproc_per_node="2")
    assert words[words.index(str(ROOT / script)) :] == [str(ROOT / script), *own, "--data-path", "a b"]


def test_wrapper_reads_nodes_and_address_from_the_environment(started):
    names = {"nnodes": "3", "nproc_per_node": "4", "node_rank": "2", "master_addr": "10.0.0.1", "master_port": "7"}
    words = started("autoregressive/train_c2i", **names)
    assert {f"--{name}={value}" for name, value in names.items()} <= set(words)
    assert {"--nnodes=1", "--standalone"} <= set(started("autoregressive/train_c2i"))
