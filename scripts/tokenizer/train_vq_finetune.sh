#!/usr/bin/env bash
source "$(dirname "$0")/../launch.sh"
launch tokenizer/tokenizer_image/vq_train.py --finetune --disc-start 0 --vq-ckpt ./pretrained_models/vq_ds16_c2i.pt --dataset t2i_image "$@"
