"""A small flan-T5 with random weights and a tokenizer of its own, in the folder format of the released one.

folder = make_small_t5(tmp_path / "flan-t5-xl", dim=32)        # what T5Embedder and find_t5 take
"""

import io
from collections.abc import Sequence
from pathlib import Path

import torch

SENTENCES = (
    "a portrait photo of a kangaroo wearing an orange hoodie and blue sunglasses",
    "a red lantern hangs over a street at night",
    "two cats sleep on a green chair next to a window",
    "a map of the united states made out of sushi. it is on a table next to a glass of red wine.",
    "an oil painting of a sailing ship in a storm",
    "the quick brown fox jumps over the lazy dog",
    "abcdefghijklmnopqrstuvwxyz 0123456789 . , ; : ! ? ' \" - ( ) % & #",
)


def make_small_t5(folder: Path, dim: int = 32, sentences: Sequence[str] = SENTENCES, layers: int = 2) -> Path:
    """Writes a T5 of `dim` features and its tokenizer, learned from `sentences`, to `folder`; returns it.

    The same arguments give the same files. Like the released one it has a decoder, gated GELU and ends every text with </s>.
    """
    import sentencepiece
    from transformers import T5Config, T5ForConditionalGeneration, T5TokenizerFast

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    learned = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(sentences) * 3),
        model_writer=learned,
        vocab_size=200,
        hard_vocab_limit=False,  # fewer pieces where the sentences have no more
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(learned.getvalue())
    tokenizer = T5TokenizerFast.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=dim,
        d_kv=8,
        d_ff=2 * dim,
        num_layers=layers,
        num_decoder_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder
