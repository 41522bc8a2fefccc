#!/usr/bin/env bash
source "$(dirname "$0")/../launch.sh"
launch tokenizer/tokenizer_image/vq_train.py --vq-model IBQ-16 --reconstruction-loss l1 --disc-start 0 --disc-weight 1 --gen-weight 0.1 --gen-loss non-saturating-mean --lecam-weight 0.05 --disc-first --beta1 0.5 --beta2 0.9 --max-grad-norm 0 --ema --ema-decay 0.999 --no-ema-warmup --no-flip --epochs 330 --lr-drop-epochs 250 300 --global-batch-size 256 "$@"
