"""Processes that Slurm's srun or MPI's mpirun started, described by torchrun's variables."""

import os
import re
import sys
import zlib
from collections.abc import MutableMapping
from typing import NamedTuple

# Numbers from here on are Slurm's names for what is no step of srun: a batch script, an interactive shell.
_FIRST_SPECIAL_STEP = 2**32 - 16

# Rank, size, rank and size on this machine: of Open MPI, MVAPICH, and MPICH or Intel MPI.
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


class Place(NamedTuple):
    """A process's place among those of its launcher. job: what they, and no others on their machines, have in common."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    job: str


def adopt_launcher(env: MutableMapping[str, str] = os.environ) -> None:
    """Describe this process's place by torchrun's variables, unless they are there or it stands alone.

    Raises ValueError where the processes are on several machines and nothing tells where the first one is.
    """
    place = None if "RANK" in env else _mpi(env) or _slurm(env)
    if place is None or place.world_size == 1:
        return
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    together = place.local_world_size == place.world_size
    if not (together or nodes or env.get("MASTER_ADDR")):
        raise ValueError(
            f"{place.launcher} started {place.world_size} processes, {place.local_world_size} of them here, and MASTER_ADDR is "
            "not set; set it to the host of the first process: mpirun -x MASTER_ADDR=HOST ..."
        )
    env["MASTER_ADDR"] = env.get("MASTER_ADDR") or ("127.0.0.1" if together else first_host(nodes or ""))
    # Below the ports that a system gives away, another one for every job.
    env["MASTER_PORT"] = env.get("MASTER_PORT") or str(15_000 + zlib.crc32(place.job.encode()) % 15_000)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    env.update(zip(names, map(str, place[1:5]), strict=True))
    if place.rank == 0:
        where = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        print(f"{place.world_size} processes of {place.launcher} meet at {where}", file=sys.stderr, flush=True)


def first_host(nodes: str) -> str:
    """Return the first host of a list as Slurm writes it: "gpu[003-005,007],login1" -> "gpu003"."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).partition(",")[0]


def _mpi(env: MutableMapping[str, str]) -> Place | None:
    for rank, size, local_rank, local_size in _MPI:
        if rank not in env or size not in env:
            continue
        if local_rank not in env and "SLURM_LOCALID" in env:  # srun --mpi=pmi2
            return _slurm(env)
        here = int(env.get(local_rank, env[rank])), int(env.get(local_size, env[size]))
        parent = str(os.getppid()) if env[size] == env.get(local_size, env[size]) else ""
        job = env.get("PMIX_NAMESPACE") or env.get("SLURM_JOB_ID") or parent
        return Place("mpirun", int(env[rank]), int(env[size]), *here, job)
    return None


def _slurm(env: MutableMapping[str, str]) -> Place | None:
    """Return None where srun did not start this process: a batch script has a rank, 0, and the job's number of tasks as well."""
    if "SLURM_PROCID" not in env:
        return None
    rank, step = int(env["SLURM_PROCID"]), env.get("SLURM_STEP_ID", env.get("SLURM_STEPID"))
    world = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or env.get("SLURM_NPROCS") or 1)
    if step is None:
        started_by_srun = rank > 0 or not ("SLURM_JOB_ID" in env or env.get("ENVIRONMENT") == "BATCH")
    else:
        started_by_srun = step.isdigit() and int(step) < _FIRST_SPECIAL_STEP
    if not started_by_srun:
        if world > 1:
            what = f"Slurm's job has {world} tasks and this process is none of them"
            print(f"{what}: it runs alone; srun python3 ... starts all", file=sys.stderr)
        return None
    tasks = (_tasks_of_nodes(env.get(name, "")) for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    here = next(filter(None, tasks), [])
    node = int(env.get("SLURM_NODEID", 0))
    per_node = env.get("SLURM_NTASKS_PER_NODE") or world // int(env.get("SLURM_NNODES", 1))
    local_world = here[node] if node < len(here) else int(per_node)
    job = f"{env.get('SLURM_JOB_ID') or os.getppid()}.{step}"
    return Place("srun", rank, world, int(env.get("SLURM_LOCALID", rank)), min(local_world, world), job)


def _tasks_of_nodes(text: str) -> list[int]:
    """ "2(x3),1" -> [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]
