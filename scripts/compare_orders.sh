#!/usr/bin/env bash
# Six orders on equal terms: the same drawings and codes, steps, batches and rates, and about as many parameters. A table and
# a figure of what each costs and how well it draws, in quickstart/orders/. Needs bash scripts/quickstart.sh first; about 20
# minutes on two cores; rerun it to resume.
#
#   bash scripts/compare_orders.sh
set -euo pipefail
cd "$(dirname "$0")/.."
home=quickstart out=quickstart/orders
[ -d $home/codes_train ] || { echo "error: $home/codes_train is missing: run bash scripts/quickstart.sh first" >&2 && exit 1; }
source .venv/bin/activate

# 1,216 drawings in batches of 32: 38 steps an epoch.
train() {
    local name=$1
    shift
    echo "== $name: $*"
    python3 autoregressive/train/train_c2i.py --code-path $home/codes_train --val-code-path $home/codes_held_out \
        --epochs 32 --lr 2e-3 --lr-schedule cosine --warmup-steps 20 --global-batch-size 32 --mixed-precision none \
        --num-workers 0 --log-every 100 --ckpt-every 400 --keep-last 1 --results-dir "$out/$name" --resume "$@"
}

train raster --gpt-model GPT-XS
train NPP --gpt-model GPT-XS --patch-level 2
train PAR-4 --gpt-model GPT-XS --ar-token-num 4
train NAR --gpt-model NAR-XS --layout neighbours
train RAR --gpt-model GPT-XS --random-orders 16 24
train LPD --gpt-model LPD-XS
python3 tools/orders_report.py --runs $out/raster $out/NPP $out/PAR-4 $out/NAR $out/RAR $out/LPD \
    --drawings $home/drawings --codes $home/codes_held_out --vq-ckpt $home/tokenizer --output $out
