#!/usr/bin/env bash
# The quickstart's tokenizer with each quantiser at equal steps, and a GPT over the codes of each: one table of figures.
#
#   bash scripts/compare_quantizers.sh                       # rerun it to resume; results in quickstart/quantizers/
#   bash scripts/compare_quantizers.sh lfq fsq               # these alone
#   steps=1000 out=longer bash scripts/compare_quantizers.sh # of each tokenizer and each GPT, in another folder
#
# The drawings and the settings are those of scripts/quickstart.sh; each tokenizer has about 1,000 codes.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${out:-quickstart/quantizers} steps=${steps:-300}
bash scripts/setup.sh quickstart
source .venv/bin/activate
mkdir -p "$out"
python3 tools/make_drawings.py --output quickstart/drawings
[ $# -gt 0 ] || set -- vq vq_restart ibq lfq fsq

for quantizer in "$@"; do
    codes=(--codebook-size 1024)
    [ "$quantizer" != fsq ] || codes=(--quantizer-options '{"levels": [8, 5, 5, 5]}')
    run=$out/$quantizer
    python3 tokenizer/tokenizer_image/vq_train.py --vq-model VQ-8-P --quantizer "$quantizer" "${codes[@]}" \
        --data-path quickstart/drawings/train --image-size 64 --no-flip --no-random-crop --perceptual-weight 0 --disc-weight 0 \
        --lr 4e-3 --lr-schedule cosine --warmup-steps 20 --global-batch-size 32 --mixed-precision none --num-workers 0 \
        --max-steps "$steps" --ckpt-every "$steps" --log-every 50 --results-dir "$run/tokenizer" --resume
    for split in train held_out; do
        python3 autoregressive/train/extract_codes_c2i.py --data-path quickstart/drawings/$split --image-size 64 --no-flip \
            --code-path "$run/codes_$split" --vq-ckpt "$run/tokenizer" --batch-size 16 --num-workers 0
    done
    python3 autoregressive/train/train_c2i.py --code-path "$run/codes_train" --val-code-path "$run/codes_held_out" \
        --gpt-model GPT-XS --lr 2e-3 --lr-schedule cosine --warmup-steps 20 --global-batch-size 32 --mixed-precision none \
        --num-workers 0 --max-steps "$steps" --ckpt-every "$steps" --log-every 50 --results-dir "$run/gpt" --resume
done
python3 tools/quantizers_report.py --images quickstart/drawings/held_out --runs "${@/#/$out/}" --output "$out"
