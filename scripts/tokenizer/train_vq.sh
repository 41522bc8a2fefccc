#!/usr/bin/env bash
source "$(dirname "$0")/../launch.sh"
launch tokenizer/tokenizer_image/vq_train.py "$@"
