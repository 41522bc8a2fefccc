#!/usr/bin/env bash
source "$(dirname "$0")/../launch.sh"
launch autoregressive/train/extract_codes_c2i.py "$@"
