#!/usr/bin/env bash
source "$(dirname "$0")/../launch.sh"
launch tokenizer/validation/val_ddp.py "$@"
