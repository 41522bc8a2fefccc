#!/usr/bin/env bash
# From nothing to new images in a few minutes on a CPU: drawings of people (OpenMoji's, which come with pip), an image
# tokenizer, its codes, a GPT, samples, and figures. The results are in quickstart/.
#
#   bash scripts/quickstart.sh            # drawings by class; rerun it to resume
#   bash scripts/quickstart.sh --tiny     # handwritten digits by class, in half the time: quickstart/tiny/
#   bash scripts/quickstart.sh text       # drawings by name: "woman cook, dark skin tone": quickstart/text/
#   bash scripts/quickstart.sh text --tiny           # digits from captions, in two stages: quickstart/tiny/text/
#   bash scripts/quickstart.sh [...] --fresh         # starts over
#
# Every line is a public script that takes real data as well; docs/training.md has the same steps for ImageNet.
set -euo pipefail
cd "$(dirname "$0")/.."
home=quickstart data=drawings from=classes fresh=
for word in "$@"; do
    case $word in
        text) from=text ;;
        --tiny) data=digits ;;
        --fresh) fresh=yes ;;
        *) echo "error: $word is none of text, --tiny, --fresh" >&2 && exit 1 ;;
    esac
done
[ $data = drawings ] && out=$home || out=$home/tiny
[ $from = classes ] && left=$out || left=$out/text
bash scripts/setup.sh quickstart $([ $from = classes ] || echo text)
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

draw_tokenizer() {
    if [ $data = drawings ]; then
        stage drawings python3 tools/make_drawings.py --output "$out/drawings"
        train_tokenizer --data-path "$out/drawings/train" --codebook-size 1024 --image-size 64 --no-random-crop \
            --max-steps 1000 --ckpt-every 200
    else
        stage digits python3 tools/make_digits.py --output "$out/digits"
        train_tokenizer --data-path "$out/digits/train" --codebook-size 256 --image-size 32 --max-steps 500 --ckpt-every 100
    fi
}

draw_drawings_from_classes() {
    extract drawings --image-size 64
    train_gpt --max-steps 1200 --sample-every 400
    sample --cfg-scale 1.5 --temperature 0.6 --num-fid-samples 760
    python3 tools/drawings_report.py --drawings "$out/drawings" --codes "$out/codes_held_out" \
        --gpt-ckpt "$out/gpt" --vq-ckpt "$out/tokenizer" --samples "$out/samples" --output "$out"
}

draw_digits_from_classes() {
    extract digits --image-size 32 --ten-crop --crop-range 1.1
    train_gpt --max-steps 1600
    sample --cfg-scale 2.0 --temperature 0.8 --num-fid-samples 500
    python3 tools/digits_report.py --digits "$out/digits" --codes "$out/codes_held_out" \
        --gpt-ckpt "$out/gpt" --vq-ckpt "$out/tokenizer" --samples "$out/samples" --output "$out"
}

# What both text recipes share: a small random T5 that knows the captions' words, features, codes, training, samples.
gpt=(--gpt-model GPT-XS --cls-token-num 16 --t5-feature-dim 256 --downsample-size 8)

make_encoder() {
    stage encoder python3 tools/make_text_encoder.py --data-path "$1/train" --output "$left/t5/small" --dim 256
}

extract_features() {
    stage features python3 language/extract_t5_feature.py --data-path "$1" --caption-key "$2" \
        --t5-path "$left/features_$2" --t5-model-path "$left/t5" --t5-model-type small --precision none --num-workers 0
}

extract_text_codes() {
    stage codes python3 autoregressive/train/extract_codes_t2i.py --data-path "$1" --code-path "$left/codes_$2" \
        --vq-ckpt "$out/tokenizer" --image-size "$2" --batch-size 16 --num-workers 0
}

train_text() {
    local name=$1 pairs=$2 size=$3 features=$4
    shift 4
    stage "$name" python3 autoregressive/train/train_t2i.py --dataset t2i_code "${gpt[@]}" --image-size "$size" \
        --data-path "$pairs/train" --code-path "$left/codes_$size" --t5-feat-path "$left/features_$features" \
        --val-data-path "$pairs/held_out" --val-code-path "$left/codes_$size" \
        --val-t5-feat-path "$left/features_$features" --lr 2e-3 --lr-schedule cosine --warmup-steps 20 \
        --global-batch-size 32 --mixed-precision none --num-workers 0 --log-every 20 --ckpt-every 400 --keep-last 2 \
        --results-dir "$left/$name" --resume "$@"
}

sample_text() {
    local name=$1 size=$2 prompts=$3
    shift 3
    stage samples python3 autoregressive/sample/sample_t2i_ddp.py --prompt-csv "$prompts" "${gpt[@]}" \
        --gpt-ckpt "$left/$name" --vq-ckpt "$out/tokenizer" --image-size "$size" --precision none --t5-path "$left/t5" \
        --t5-model-type small --t5-feature-max-len 16 --top-k 0 --sample-dir "$left/samples" "$@"
}

draw_drawings_from_text() {
    make_encoder "$out/drawings"
    extract_features "$out/drawings" llava
    extract_text_codes "$out/drawings" 64
    train_text gpt "$out/drawings" 64 llava --max-steps 1200 --dropout-p 0
    sample_text gpt 64 "$out/drawings/prompts.tsv" --cfg-scale 1.0 --temperature 0.4 --num-fid-samples 152
    stage curves python3 tools/draw_training.py --runs "$left/gpt" --output "$left/training.png"
    python3 tools/drawings_report.py --drawings "$out/drawings" --gpt-ckpt "$left/gpt" --vq-ckpt "$out/tokenizer" \
        --prompts "$out/drawings/prompts.tsv" --samples "$left/samples" --output "$left"
}

# As the published models are made: stage 1 on small images and short captions, stage 2 from its weights on images of
# twice the side and long captions, with a short one now and then.
draw_digits_from_text() {
    local digits=$left/digits captions size
    stage captions python3 tools/make_digit_captions.py --output "$digits" --image-size 32
    make_encoder "$digits"
    for captions in blip llava; do extract_features "$digits" $captions; done
    for size in 16 32; do extract_text_codes "$digits" $size; done
    train_text stage1 "$digits" 16 blip --max-steps 800 --dropout-p 0
    train_text stage2 "$digits" 32 llava --max-steps 1200 --gpt-ckpt "$left/stage1" --short-t5-feat-path "$left/features_blip"
    sample_text stage2 32 "$digits/prompts.tsv" --cfg-scale 2.0 --temperature 0.8 --num-fid-samples 240
    stage curves python3 tools/draw_training.py --runs "$left/stage1" "$left/stage2" --output "$left/training.png"
    python3 tools/digits_report.py --digits "$out/digits" --prompts "$digits/prompts.tsv" \
        --runs "$left/stage1" "$left/stage2" --samples "$left/samples" --output "$left"
}

draw_tokenizer
draw_${data}_from_$from
