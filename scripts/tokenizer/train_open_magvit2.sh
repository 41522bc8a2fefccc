#!/usr/bin/env bash
source "$(dirname "$0")/../launch.sh"
launch tokenizer/tokenizer_image/vq_train.py --network open-magvit2 --reconstruction-loss l1 --disc-start 0 --disc-weight 1 --gen-weight 0.1 --gen-loss non-saturating-mean --lecam-weight 0.05 --beta1 0.5 --beta2 0.9 --max-grad-norm 0 --ema --ema-decay 0.999 --no-ema-warmup --no-flip --epochs 270 --lr-drop-epochs 200 250 --global-batch-size 256 "$@"
