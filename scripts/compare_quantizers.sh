#!/usr/bin/env bash
# The quickstart's tokenizer with each quantiser at equal steps, and a GPT over the codes of each: one table of figures.
#
#   bash scripts/compare_quantizers.sh                       # rerun it to resume; results in quickstart/quantizers/
#   bash scripts/compare_quantizers.sh lfq fsq               # these alone
#   steps=1000 out=longer bash scripts/compare_quantizers.sh # of each tokenizer and each GPT, in another folder
#
# The digits and the settings are those of scripts/quickstart.sh --tiny; each tokenizer has about 256 codes.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${out:-quickstart/quantizers} steps=${steps:-500}
bash scripts/setup.sh quickstart
source .venv/bin/activate
mkdir -p "$out"
digits=quickstart/tiny/digits
python3 tools/make_digits.py --output $digits
[ $# -gt 0 ] || set -- vq vq_restart ibq lfq fsq

for quantizer in "$@"; do
    codes=(--codebook-size 256)
    [ "$quantizer" != fsq ] || codes=(--quantizer-options '{"levels": [8, 8, 4]}')
    run=$out/$quantizer
    python3 tokenizer/tokenizer_image/vq_train.py --vq-model VQ-8-P --quantizer "$quantizer" "${codes[@]}" \
        --data-path $digits/train --image-size 32 --no-flip --perceptual-weight 0 --disc-weight 0 --lr 4e-3 \
        --lr-schedule cosine --warmup-steps 20 --global-batch-size 32 --mixed-precision none --num-workers 0 \
        --max-steps "$steps" --ckpt-every "$steps" --log-every 50 --results-dir "$run/tokenizer" --resume
    for split in train held_out; do
        python3 autoregressive/train/extract_codes_c2i.py --data-path $digits/$split --image-size 32 --no-flip \
            --code-path "$run/codes_$split" --vq-ckpt "$run/tokenizer" --batch-size 16 --num-workers 0
    done
    python3 autoregressive/train/train_c2i.py --code-path "$run/codes_train" --val-code-path "$run/codes_held_out" \
        --gpt-model GPT-XS --lr 2e-3 --lr-schedule cosine --warmup-steps 20 --global-batch-size 32 --mixed-precision none \
        --num-workers 0 --max-steps "$steps" --ckpt-every "$steps" --log-every 50 --results-dir "$run/gpt" --resume
done
python3 tools/quantizers_report.py --images $digits/held_out --runs "${@/#/$out/}" --output "$out"
