"""Places of processes that srun and mpirun started, from the variables that they set."""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from utils.launchers import adopt_launcher, first_host

BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "ENVIRONMENT": "BATCH"}
STEP = {
    **BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[003-004,007]",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "4",
}
MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


def place(env: dict[str, str]) -> tuple | None:
    """(rank, world size, local rank, local world size, address) by torchrun's names; None for a process alone."""
    env = dict(env)
    adopt_launcher(env)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return tuple(env[name] for name in names) if "RANK" in env else None


@pytest.mark.parametrize(
    "env, expected",
    [
        (STEP, ("4", "5", "0", "1", "gpu003")),
        (STEP | {"SLURM_PROCID": "3", "SLURM_NODEID": "1", "SLURM_LOCALID": "1"}, ("3", "5", "1", "2", "gpu003")),
        (STEP | {"MASTER_ADDR": "10.0.0.1"}, ("4", "5", "0", "1", "10.0.0.1")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, ("0", "2", "0", "2", "127.0.0.1")),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "WORLD_SIZE": "2"}, ("1", "2", "1", "2", "127.0.0.1")),
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NNODES": "2", "SLURM_NODELIST": "a1,a2"},
            ("5", "8", "1", "4", "a1"),
        ),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, ("3", "4", "1", "4", "127.0.0.1")),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "a"}, ("3", "4", "1", "2", "a")),
        (STEP | MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, ("3", "4", "1", "2", "gpu003")),
        ({"PMI_RANK": "2", "PMI_SIZE": "3"}, ("2", "3", "2", "3", "127.0.0.1")),
        ({"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "a"},
         ("2", "4", "0", "2", "a")),
        (STEP | {"PMI_RANK": "4", "PMI_SIZE": "5"}, ("4", "5", "0", "1", "gpu003")),
    ],
)  # fmt: skip
def test_adopt_launcher_of_several_processes_gives_torchruns_variables(env, expected):
    assert place(env) == expected


@pytest.mark.parametrize(
    "env",
    [
        {},
        BATCH,
        {name: value for name, value in BATCH.items() if name != "ENVIRONMENT"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"},  # a shell of salloc
        BATCH | {"SLURM_STEP_ID": "4294967290"},  # one that salloc starts on the node
        BATCH | {"SLURM_STEPID": "batch"},
        BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_adopt_launcher_of_one_process_leaves_it_alone(env):
    assert place(env) is None


def test_adopt_launcher_under_torchrun_changes_nothing():
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x"}
    assert place(STEP | MPI | torchrun) == ("1", "2", "1", "2", "x")


def test_adopt_launcher_of_mpi_on_machines_without_an_address_is_refused():
    with pytest.raises(ValueError, match="set it to the host of the first process"):
        place(MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})


def test_ports_are_the_same_within_a_job_and_others_in_another():
    ports = []
    for job, rank in (("7", "0"), ("7", "1"), ("8", "0")):
        adopt_launcher(env := STEP | {"SLURM_JOB_ID": job, "SLURM_PROCID": rank})
        ports.append(env["MASTER_PORT"])
    assert ports[0] == ports[1] != ports[2]


@pytest.mark.parametrize(
    "nodes, first", [("gpu[003-005,007],x", "gpu003"), ("gpu3,gpu4", "gpu3"), ("r[1-2]n[01-03]", "r1n01")]
)
def test_first_host_of_a_list_of_nodes(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, "torchrun --nnodes=1 --nproc_per_node=1 --standalone"),
        ({"CUDA_VISIBLE_DEVICES": "0,3,GPU-8d2"}, "torchrun --nnodes=1 --nproc_per_node=3 --standalone"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "torchrun --nnodes=1 --nproc_per_node=1 --standalone"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "torchrun --nnodes=1 --nproc_per_node=1 --standalone"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "nproc_per_node": "1", "master_port": "7"},
         "torchrun --nnodes=1 --nproc_per_node=1 --node_rank=0 --master_addr=127.0.0.1 --master_port=7"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "gpu[3-4]"},
         "torchrun --nnodes=2 --nproc_per_node=1 --node_rank=1 --master_addr=gpu3"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "1"}, "python3 "),
    ],
)  # fmt: skip
def test_wrapper_under_srun_starts_one_group(env, expected, tmp_path):
    python = tmp_path / "python3"
    python.write_text(
        '#!/bin/bash\nif [[ $1 == */torchrun.py ]]; then echo torchrun "${@:2}"; else echo python3 "$@"; fi\n'
    )
    python.chmod(0o755)
    script = f"source {ROOT}/scripts/launch.sh; PATH={tmp_path}:$PATH; nvidia-smi() {{ false; }}; launch a.py --x"
    clean = {
        name: value for name, value in os.environ.items() if not re.match("SLURM|CUDA|nnodes|nproc|node_|master", name)
    }
    done = subprocess.run(["bash", "-c", script], env=clean | env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(expected) and done.stdout.endswith("a.py --x\n")


@pytest.mark.slow
def test_tasks_of_srun_train_one_run(tmp_path):
    """Two processes with Slurm's variables alone add up their ranks in one group."""
    code = (
        "import torch; from utils.distributed import start; d = start('cpu');"
        "print(d.rank, d.world_size, int(d.sum(torch.tensor(d.rank + 1)))); d.close()"
    )
    slurm = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "PYTHONPATH": str(ROOT),
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | slurm | {"SLURM_PROCID": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [task.communicate(timeout=120)[0].split() for task in tasks] == [["0", "2", "3"], ["1", "2", "3"]]
