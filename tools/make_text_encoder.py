"""Makes a small text encoder for trying text conditioning out: a T5 with random weights, and a tokenizer learned from captions.

    python3 tools/make_text_encoder.py --data-path quickstart/tiny/text/digits/train --output quickstart/tiny/text/t5/small

The folder is in the format of google/flan-t5-xl, so that everything that takes the real encoder takes this one. Nothing
teaches it: random layers already give every word in its context features of its own, and that is all that a few dozen words
need. It knows no language; for captions of the world there is the real one.
"""

import argparse
from pathlib import Path

from utils.cli import SEED, flag_parser, positive_int, run_script

RECORD = "made_from.json"  # written last: the folder is whole
# Root mean square of a feature's numbers: a new GPT's projection has weights of 0.02, and features of 1 would pass its GELU
# where that is nearly straight.
SCALE = 8.0
# How many times as much as in a new T5 each word takes from the others. The rotary table of a caption's rows is zero
# (arXiv 2406.06525's models), so that an image token sees the mean of the words, in which one of twelve is faint.
CONTEXT = 10.0
LAYERS, PIECES = 2, 300


def main(args: argparse.Namespace) -> None:
    import hashlib
    import json
    import shutil

    from dataset.jsonl import JsonPairs
    from language.captions import clean_caption
    from utils.files import write_json

    texts: dict[str, None] = {}
    pairs = JsonPairs(args.data_path)
    for index in range(len(pairs)):
        texts.update(dict.fromkeys(filter(None, map(clean_caption, pairs.texts(index)))))
    if args.dim % 8:
        raise ValueError(f"--dim {args.dim} is not a multiple of 8")
    made_from = {"captions": hashlib.sha256("\n".join(texts).encode()).hexdigest(), "dim": args.dim, "seed": args.seed}
    folder = Path(args.output)
    record = folder / RECORD
    if record.exists() and made_from.items() <= json.loads(record.read_text()).items():
        print(f"{folder}: there already, made from these captions")
        return
    shutil.rmtree(folder, ignore_errors=True)
    make_text_encoder(folder, list(texts), args.dim, args.seed)
    write_json(record, made_from)
    print(f"{folder}: {LAYERS} layers of {args.dim} numbers, a vocabulary learned from {len(texts)} captions")


def make_text_encoder(folder: Path, texts: list[str], dim: int, seed: int) -> None:
    """Writes the encoder and its tokenizer; the same arguments give the same weights.

    Raises ValueError for texts too few or short for a vocabulary.
    """
    import re

    import sentencepiece
    import torch
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    folder.mkdir(parents=True)
    # A piece is found only where it occurs in two different words: with each word bare and with a comma, words are pieces.
    words = dict.fromkeys(word for text in texts for word in re.findall(r"\w+", text))
    sentences = texts + [f"{word}{end}" for word in words for end in ("", ",", ".")]
    try:
        with open(folder / "spiece.model", "wb") as f:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=f,
                vocab_size=PIECES,
                hard_vocab_limit=False,  # fewer pieces where the texts have no more
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                split_digits=True,
                num_threads=1,
                minloglevel=2,
            )
    except (RuntimeError, OSError) as error:
        raise ValueError(f"no vocabulary can be learned from {len(texts)} captions ({error})") from error
    tokenizer = T5TokenizerFast.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=dim,
        d_kv=dim // 4,
        d_ff=2 * dim,
        num_layers=LAYERS,
        num_decoder_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = T5EncoderModel(config)
    torch.nn.init.constant_(encoder.encoder.final_layer_norm.weight, SCALE)
    with torch.no_grad():
        for block in encoder.encoder.block:
            block.layer[0].SelfAttention.o.weight *= CONTEXT
    encoder.save_pretrained(folder)


def flags() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    parser.add_argument("--data-path", required=True, help="folder of jsonl files with captions")
    parser.add_argument("--output", required=True, help="folder to write; an older one is replaced")
    parser.add_argument("--dim", type=positive_int, default=256, help="numbers a feature has")
    parser.add_argument("--seed", type=SEED, default=0, help="of the random weights")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
