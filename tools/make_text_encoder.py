"""Makes a small text encoder for trying text conditioning out: a T5 with random weights, and a tokenizer learned from captions.

    python3 tools/make_text_encoder.py --data-path quickstart/text/digits/train --output quickstart/text/t5/small

The folder is in the format of google/flan-t5-xl, so that everything that takes the real encoder takes this one. Nothing
teaches it: random layers already give every word in its context features of its own, and that is all that a few dozen words
need. It knows no language; for captions of the world there is the real one.

The rotary table of a caption's rows is zero (arXiv 2406.06525's models), so that an image token sees the mean of them, in
which one word of twelve is faint. With --context each feature tells of the whole caption, as a trained encoder's do.
"""

import argparse
from pathlib import Path

from utils.cli import SEED, flag_parser, nonnegative_float, positive_float, positive_int, run_script

RECORD = "made_from.json"


def main(args: argparse.Namespace) -> None:
    import hashlib
    import json

    from dataset.jsonl import JsonPairs
    from language.captions import clean_caption
    from utils.files import write_json

    texts: dict[str, None] = {}
    pairs = JsonPairs(args.data_path)
    for index in range(len(pairs)):
        texts.update(dict.fromkeys(filter(None, map(clean_caption, pairs.texts(index)))))
    if not texts:
        raise ValueError(f"the captions of {args.data_path} are empty")
    made_from = {
        "captions": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        **{name: getattr(args, name) for name in ("dim", "layers", "scale", "context", "pieces", "seed")},
    }
    record = Path(args.output) / RECORD
    if record.exists() and json.loads(record.read_text()) == made_from:
        print(f"{args.output}: there already, made from these captions")
        return
    make_text_encoder(
        Path(args.output),
        list(texts),
        dim=args.dim,
        layers=args.layers,
        scale=args.scale,
        context=args.context,
        pieces=args.pieces,
        seed=args.seed,
    )
    write_json(record, made_from)
    print(f"{args.output}: {args.layers} layers of {args.dim} numbers, a vocabulary learned from {len(texts)} captions")


def make_text_encoder(
    folder: Path,
    texts: list[str],
    *,
    dim: int = 256,
    layers: int = 2,
    scale: float = 8.0,
    context: float = 10.0,
    pieces: int = 300,
    seed: int = 0,
) -> None:
    """Writes the encoder and its tokenizer to `folder`; the same arguments give the same weights.

    dim: numbers a feature has, a multiple of 8. scale: root mean square of these. A new GPT's projection has weights of
    0.02, and features of 1 would pass its GELU where that is nearly straight; of larger ones it learns sooner. context: how
    many times as much as in a new T5 each word takes from the others. pieces: of the vocabulary, at most.
    Raises ValueError for a width that does not divide into heads, or texts too few or short for a vocabulary.
    """
    import io
    import os
    import re
    import shutil
    import tempfile

    import sentencepiece
    import torch
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    if dim % 8:
        raise ValueError(f"--dim {dim} is not a multiple of 8")
    learned = io.BytesIO()
    # A piece is found only where it occurs in two different words: with each word bare and with a comma, words are pieces.
    words = dict.fromkeys(word for text in texts for word in re.findall(r"\w+", text))
    sentences = texts + [f"{word}{end}" for word in words for end in ("", ",", ".")]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=learned,
            vocab_size=pieces,
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp")
    try:
        with open(os.path.join(staging, "spiece.model"), "wb") as f:
            f.write(learned.getvalue())
        tokenizer = T5TokenizerFast.from_pretrained(staging)
        tokenizer.save_pretrained(staging)
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=dim,
            d_kv=dim // 4,
            d_ff=2 * dim,
            num_layers=layers,
            num_decoder_layers=1,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = T5EncoderModel(config)
        torch.nn.init.constant_(encoder.encoder.final_layer_norm.weight, scale)
        with torch.no_grad():
            for block in encoder.encoder.block:
                block.layer[0].SelfAttention.o.weight *= context
        encoder.save_pretrained(staging)
        os.chmod(staging, 0o755)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(staging, folder)  # whole, or not there
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def flags() -> argparse.ArgumentParser:
    """The script's flags."""
    parser = flag_parser(__doc__)
    parser.add_argument("--data-path", required=True, help="folder of jsonl files with captions")
    parser.add_argument("--output", required=True, help="folder to write; an older one is replaced")
    parser.add_argument("--dim", type=positive_int, default=256, help="numbers a feature has")
    parser.add_argument("--layers", type=positive_int, default=2, help="of the encoder")
    parser.add_argument("--scale", type=positive_float, default=8.0, help="root mean square of a feature's numbers")
    parser.add_argument(
        "--context", type=nonnegative_float, default=10.0, help="how much a word's feature takes from the others'"
    )
    parser.add_argument("--pieces", type=positive_int, default=300, help="pieces of the vocabulary, at most")
    parser.add_argument("--seed", type=SEED, default=0, help="of the random weights")
    return parser


if __name__ == "__main__":
    run_script(main, flags())
