#!/usr/bin/env bash
source "$(dirname "$0")/../launch.sh"
launch autoregressive/train/train_t2i.py --vq-ckpt vq_ds16_t2i.pt --gpt-model GPT-XL --image-size 256 "$@"
