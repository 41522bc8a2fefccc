#!/usr/bin/env bash
source "$(dirname "$0")/../launch.sh"
launch tokenizer/consistencydecoder/reconstruction_cd_ddp.py "$@"
