#!/usr/bin/env bash
source "$(dirname "$0")/../launch.sh"
launch autoregressive/train/train_c2i_fsdp.py "$@"
