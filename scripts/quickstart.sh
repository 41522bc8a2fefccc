#!/usr/bin/env bash
# From nothing to new images in a few minutes on a CPU: drawings of people (OpenMoji's, which come with pip), an image
# tokenizer, its codes, a GPT, samples, and figures. The results are in quickstart/.
#
#   bash scripts/quickstart.sh            # drawings by class; rerun it to resume
#   bash scripts/quickstart.sh --tiny     # handwritten digits by class, in half the time: quickstart/tiny/
#   bash scripts/quickstart.sh text       # digits from words: captions, a text encoder, two stages: quickstart/text/
#   bash scripts/quickstart.sh [...] --fresh         # starts over
#
# Every line is a public script that takes real data as well; docs/training.md has the same steps for ImageNet.
set -euo pipefail
cd "$(dirname "$0")/.."
home=quickstart kind=drawings fresh=
for word in "$@"; do
    case $word in
        text) kind=words ;;
        --tiny) kind=digits ;;
        --fresh) fresh=yes ;;
        *) echo "error: $word is none of text, --tiny, --fresh" >&2 && exit 1 ;;
    esac
done
case $kind in
    drawings) out=$home left=$home ;;
    digits) out=$home/tiny left=$home/tiny ;;
    words) out=$home/tiny left=$home/text ;; # the tokenizer of the digits
esac
bash scripts/setup.sh quickstart $([ $kind != words ] || echo text)
source .venv/bin/activate
mkdir -p "$left"
[ -z "$fresh" ] || find "$left" -mindepth 1 -maxdepth 1 ! -name tiny ! -name text -exec rm -rf {} +

# Runs one stage and notes its seconds; a stage that is complete finds nothing to do.
stage() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name: $*"
    "$@"
    printf '%s\t%s\n' "$name" "$((SECONDS - start))" >>"$left/seconds.tsv"
}

# bf16 where the processor has instructions for it; float32 takes about twice as long.
precision=none
! grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo || precision=bf16

# Drawings and digits must not be mirrored: --no-flip, here and for the codes.
train_tokenizer() {
    stage tokenizer python3 tokenizer/tokenizer_image/vq_train.py --vq-model VQ-8-P --quantizer vq_restart \
        --no-flip --perceptual-weight 0 --disc-weight 0 --lr 4e-3 --lr-schedule cosine --warmup-steps 20 \
        --global-batch-size 32 --mixed-precision $precision --num-workers 0 \
        --log-every 25 --keep-last 2 --results-dir "$out/tokenizer" --resume "$@"
}

extract() {
    local split
    for split in train held_out; do
        stage codes python3 autoregressive/train/extract_codes_c2i.py --data-path "$out/$1/$split" \
            --code-path "$out/codes_$split" --vq-ckpt "$out/tokenizer" --no-flip --batch-size 16 --num-workers 0 "${@:2}"
    done
}

train_gpt() {
    stage gpt python3 autoregressive/train/train_c2i.py --code-path "$out/codes_train" \
        --val-code-path "$out/codes_held_out" --vq-ckpt "$out/tokenizer" --gpt-model GPT-XS \
        --lr 2e-3 --lr-schedule cosine --warmup-steps 20 --global-batch-size 32 --mixed-precision none --num-workers 0 \
        --log-every 25 --ckpt-every 400 --keep-last 2 --results-dir "$out/gpt" --resume "$@"
}

sample() {
    stage samples python3 autoregressive/sample/sample_c2i_ddp.py --gpt-ckpt "$out/gpt" --precision none \
        --balanced --sample-dir "$out/samples" "$@"
    stage curves python3 tools/draw_training.py --runs "$out/tokenizer" "$out/gpt" --output "$out/training.png"
}

draw_drawings() {
    stage drawings python3 tools/make_drawings.py --output "$out/drawings"
    train_tokenizer --data-path "$out/drawings/train" --codebook-size 1024 --image-size 64 --no-random-crop \
        --max-steps 1000 --ckpt-every 200
    extract drawings --image-size 64
    train_gpt --max-steps 1200 --sample-every 400
    sample --cfg-scale 1.5 --temperature 0.6 --num-fid-samples 760
    python3 tools/drawings_report.py --drawings "$out/drawings" --codes "$out/codes_held_out" \
        --gpt-ckpt "$out/gpt" --vq-ckpt "$out/tokenizer" --samples "$out/samples" --output "$out"
}

draw_digits() {
    stage digits python3 tools/make_digits.py --output "$out/digits"
    train_tokenizer --data-path "$out/digits/train" --codebook-size 256 --image-size 32 --max-steps 500 --ckpt-every 100
    [ $kind = digits ] || return 0
    extract digits --image-size 32 --ten-crop --crop-range 1.1
    train_gpt --max-steps 1600
    sample --cfg-scale 2.0 --temperature 0.8 --num-fid-samples 500
    python3 tools/digits_report.py --digits "$out/digits" --codes "$out/codes_held_out" \
        --gpt-ckpt "$out/gpt" --vq-ckpt "$out/tokenizer" --samples "$out/samples" --output "$out"
}

# As the published models are made: stage 1 on small images and short captions, stage 2 from its weights on images of
# twice the side and long captions, with a short one now and then.
draw_words() {
    draw_digits
    local digits=$left/digits
    local gpt=(--gpt-model GPT-XS --cls-token-num 16 --t5-feature-dim 256 --downsample-size 8)
    local size

    stage captions python3 tools/make_digit_captions.py --output "$digits" --image-size 32
    stage encoder python3 tools/make_text_encoder.py --data-path "$digits/train" --output "$left/t5/small" --dim 256

    extract_features() {
        stage features python3 language/extract_t5_feature.py --data-path "$digits" \
            --caption-key "$1" --t5-path "$left/features_$1" --t5-model-path "$left/t5" --t5-model-type small \
            --precision none --num-workers 0
    }
    extract_features blip
    extract_features llava

    for size in 16 32; do
        stage codes python3 autoregressive/train/extract_codes_t2i.py --data-path "$digits" \
            --code-path "$left/codes_$size" --vq-ckpt "$out/tokenizer" --image-size "$size" --batch-size 16 --num-workers 0
    done

    train() {
        local name=$1 image_size=$2 features=$3
        shift 3
        stage "$name" python3 autoregressive/train/train_t2i.py --dataset t2i_code "${gpt[@]}" \
            --image-size "$image_size" --data-path "$digits/train" --code-path "$left/codes_$image_size" \
            --t5-feat-path "$left/features_$features" --val-data-path "$digits/held_out" \
            --val-code-path "$left/codes_$image_size" --val-t5-feat-path "$left/features_$features" \
            --lr 2e-3 --lr-schedule cosine --warmup-steps 20 --global-batch-size 32 --mixed-precision none \
            --num-workers 0 --log-every 20 --ckpt-every 400 --keep-last 2 --results-dir "$left/$name" --resume "$@"
    }
    train stage1 16 blip --max-steps 800 --dropout-p 0
    train stage2 32 llava --max-steps 1200 --gpt-ckpt "$left/stage1" --short-t5-feat-path "$left/features_blip"

    stage samples python3 autoregressive/sample/sample_t2i_ddp.py --prompt-csv "$digits/prompts.tsv" \
        "${gpt[@]}" --gpt-ckpt "$left/stage2" --vq-ckpt "$out/tokenizer" --image-size 32 --precision none \
        --t5-path "$left/t5" --t5-model-type small --t5-feature-max-len 16 \
        --cfg-scale 2.0 --temperature 0.8 --top-k 0 --num-fid-samples 240 --sample-dir "$left/samples"

    stage curves python3 tools/draw_training.py --runs "$left/stage1" "$left/stage2" --output "$left/training.png"

    python3 tools/digits_report.py --digits "$out/digits" --prompts "$digits/prompts.tsv" \
        --runs "$left/stage1" "$left/stage2" --samples "$left/samples" --output "$left"
}

draw_$kind
