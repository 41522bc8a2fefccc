#!/usr/bin/env bash
# From nothing to new images in a few minutes on a CPU: scikit-learn's handwritten digits (real scans, no download), an
# image tokenizer, its codes, a class-conditional GPT, samples, and figures. What it leaves lies in quickstart/.
#
#   bash scripts/quickstart.sh            # again: goes on where it was interrupted
#   bash scripts/quickstart.sh --fresh    # starts over
#
# Every line is a public script that takes real data just as well; GETTING_STARTED.md has the same steps for ImageNet.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
source .venv/bin/activate

out=quickstart
[ "${1:-}" = --fresh ] && rm -rf "$out"
mkdir -p "$out"

# Runs one stage and notes its seconds; a stage that is complete finds nothing to do.
stage() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name: $*"
    "$@"
    printf '%s\t%s\n' "$name" "$((SECONDS - start))" >>"$out/seconds.tsv"
}

tokenizer=(--vq-model VQ-8-XS --codebook-size 256 --vq-ckpt "$out/tokenizer")
gpt=(--gpt-model GPT-XS --num-classes 10 --image-size 32 --downsample-size 8)

stage digits python3 tools/make_digits.py --output "$out/digits"

# Digits must not be mirrored: --no-flip, here and for the codes.
stage tokenizer python3 tokenizer/tokenizer_image/vq_train.py \
    --data-path "$out/digits/train" --vq-model VQ-8-XS --codebook-size 256 --image-size 32 --no-flip \
    --perceptual-weight 0 --disc-weight 0 --lr 2e-3 --lr-schedule cosine --warmup-steps 20 \
    --global-batch-size 32 --max-steps 250 --mixed-precision none --num-workers 0 \
    --log-every 10 --ckpt-every 50 --keep-last 2 --results-dir "$out/tokenizer" --resume

for split in train held_out; do
    stage codes python3 autoregressive/train/extract_codes_c2i.py \
        --data-path "$out/digits/$split" --code-path "$out/codes_$split" "${tokenizer[@]}" \
        --image-size 32 --no-flip --ten-crop --crop-range 1.1 --batch-size 16 --num-workers 0
done

stage gpt python3 autoregressive/train/train_c2i.py \
    --code-path "$out/codes_train" --val-code-path "$out/codes_held_out" --vq-ckpt "$out/tokenizer" \
    "${gpt[@]}" --vocab-size 256 \
    --lr 2e-3 --lr-schedule cosine --warmup-steps 20 --global-batch-size 32 --max-steps 2000 \
    --mixed-precision none --num-workers 0 \
    --log-every 20 --ckpt-every 400 --keep-last 2 --results-dir "$out/gpt" --resume

stage samples python3 autoregressive/sample/sample_c2i_ddp.py \
    "${gpt[@]}" --gpt-ckpt "$out/gpt" "${tokenizer[@]}" --image-size-eval 32 --precision none \
    --cfg-scale 2.0 --temperature 0.8 --num-fid-samples 500 --balanced --sample-dir "$out/samples"

stage curves python3 tools/draw_training.py --runs "$out/tokenizer" "$out/gpt" --output "$out/training.png"

python3 tools/digits_report.py --digits "$out/digits" --codes "$out/codes_held_out" \
    --gpt-ckpt "$out/gpt" --vq-ckpt "$out/tokenizer" --samples "$out/samples" --output "$out"
