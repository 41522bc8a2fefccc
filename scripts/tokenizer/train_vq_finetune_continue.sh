#!/usr/bin/env bash
source "$(dirname "$0")/../launch.sh"
launch tokenizer/tokenizer_image/vq_train.py --disc-start 0 --dataset t2i_image "$@"
