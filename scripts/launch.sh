# Sourced by the wrappers: `launch SCRIPT "$@"` is torchrun over nnodes x nproc_per_node processes, all read from the
# environment (nnodes, nproc_per_node, node_rank, master_addr, master_port). The default is one node and every GPU of it,
# or one process where there is none; CUDA_VISIBLE_DEVICES is followed. Under srun one task per node is a node of
# torchrun's; of several, each is a process.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${VIRTUAL_ENV:-}" ] && [ -d "$root/.venv/bin" ]; then PATH="$root/.venv/bin:$PATH"; fi
# Signals that torchrun passes on, so that a run is saved: those it knows itself, and schedulers' SIGUSR1.
export TORCHELASTIC_SIGNALS_TO_HANDLE=${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
# Seconds that a run has to save itself after a signal; torch 2.11 does not know the setting and gives 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
# Parallel layouts, patches and captions alternate shapes, which leave gaps in a GPU's memory.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

launch() {
    local script=$1 gpus
    shift
    if [ -z "${nnodes:-}" ] && [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ]; then
        [ "$SLURM_STEP_NUM_TASKS" = "${SLURM_STEP_NUM_NODES:-1}" ] || exec python3 "$root/$script" "$@"
        nnodes=$SLURM_STEP_NUM_NODES node_rank=$SLURM_PROCID
        master_addr=${master_addr:-$(sed -E 's/\[([0-9]+)[^]]*\]?/\1/; s/,.*//' <<<"$SLURM_STEP_NODELIST")}
    fi
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -vc -e '^$' -e '^-1$' || true)
    else
        gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c ^GPU || true)
    fi
    local place=(--node_rank="${node_rank:-0}" --master_addr="${master_addr:-127.0.0.1}" --master_port="${master_port:-12345}")
    # On one machine torchrun takes any free port, so that two runs do not meet.
    if [ "${nnodes:-1}" = 1 ] && [ -z "${master_port:-}${master_addr:-}" ]; then place=(--standalone); fi
    exec python3 "$root/scripts/torchrun.py" --nnodes="${nnodes:-1}" --nproc_per_node="${nproc_per_node:-$((gpus > 0 ? gpus : 1))}" "${place[@]}" \
        "$root/$script" "$@"
}
