#!/usr/bin/env bash
source "$(dirname "$0")/../launch.sh"
launch autoregressive/sample/sample_t2i_ddp.py --prompt-csv evaluations/t2i/PartiPrompts.tsv --sample-dir samples_parti --vq-ckpt ./pretrained_models/vq_ds16_t2i.pt "$@"
