#!/usr/bin/env bash
# Samples and evaluates a model at several guidance scales and draws FID against them (see tools/sweep_guidance.py):
#
#   bash scripts/sweep_guidance.sh --scales "1.5 1.75 2.0" -- --gpt-model GPT-L --gpt-ckpt c2i_L_384.pt --image-size 384 \
#       --vq-ckpt vq_ds16_c2i.pt
#
# Rerun the command to resume it. nproc_per_node in the environment is the number of processes.
scripts=$(cd "$(dirname "$0")" && pwd)
[ -n "${VIRTUAL_ENV:-}" ] || [ -d "$scripts/../.venv" ] || bash "$scripts/setup.sh" eval
source "$scripts/launch.sh"
exec python3 "$root/tools/sweep_guidance.py" "$@"
