#!/usr/bin/env bash
source "$(dirname "$0")/../launch.sh"
launch tokenizer/vae/reconstruction_vae_ddp.py "$@"
