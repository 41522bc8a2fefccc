#!/usr/bin/env bash
source "$(dirname "$0")/../launch.sh"
launch tokenizer/vqgan/reconstruction_vqgan_ddp.py "$@"
