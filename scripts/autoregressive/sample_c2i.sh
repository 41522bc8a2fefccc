#!/usr/bin/env bash
source "$(dirname "$0")/../launch.sh"
launch autoregressive/sample/sample_c2i_ddp.py "$@"
