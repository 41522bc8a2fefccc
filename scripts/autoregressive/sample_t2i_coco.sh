#!/usr/bin/env bash
source "$(dirname "$0")/../launch.sh"
launch autoregressive/sample/sample_t2i_ddp.py --prompt-csv evaluations/t2i/coco_captions.csv --sample-dir samples_coco --vq-ckpt ./pretrained_models/vq_ds16_t2i.pt "$@"
