#!/usr/bin/env bash
source "$(dirname "$0")/../launch.sh"
launch autoregressive/sample/sample_c2i_ddp.py --vq-ckpt ./pretrained_models/vq_ds16_c2i.pt "$@"
