#!/usr/bin/env bash
# From nothing to a row of the published tables, with the published figure beside (see tools/reproduce.py):
#
#   bash scripts/reproduce.sh --list
#   bash scripts/reproduce.sh c2i_L_384 --dry-run
#   bash scripts/reproduce.sh c2i_L_384               # rerun it to resume
#
# nproc_per_node in the environment is the number of processes, by default one a GPU.
scripts=$(cd "$(dirname "$0")" && pwd)
[ -n "${VIRTUAL_ENV:-}" ] || [ -d "$scripts/../.venv" ] || bash "$scripts/setup.sh" eval
source "$scripts/launch.sh"
exec python3 "$root/tools/reproduce.py" "$@"
