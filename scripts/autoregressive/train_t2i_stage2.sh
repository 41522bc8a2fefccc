#!/usr/bin/env bash
source "$(dirname "$0")/../launch.sh"
launch autoregressive/train/train_t2i.py --vq-ckpt ./pretrained_models/vq_ds16_t2i.pt --dataset t2i --image-size 512 "$@"
