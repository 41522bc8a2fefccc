"""A small text-conditional pipeline whose encoder gives every word a feature of its own."""

import zlib

import numpy as np
import torch

from autoregressive.models.gpt import GPT_models
from autoregressive.models.settings import SamplingConfig
from autoregressive.pipeline import ImagePipeline
from autoregressive.request import Request
from tests.helpers import randomize

WORDS, WIDTH = 9, 12


class WordEncoder:
    """A text encoder; `calls` has the texts of each call."""

    dim = WIDTH

    def __init__(self):
        self.calls = []

    def features(self, text: str) -> torch.Tensor:
        words = text.split()[:WORDS]
        rows = [np.random.default_rng(zlib.crc32(word.encode())).standard_normal(WIDTH) for word in words]
        return torch.from_numpy(np.stack(rows)).float()

    def get_text_embeddings(self, texts):
        self.calls.append(list(texts))
        features, mask = torch.full((len(texts), WORDS, WIDTH), 7.0), torch.zeros(len(texts), WORDS, dtype=torch.long)
        for i, text in enumerate(texts):
            caption = self.features(text)
            features[i, : len(caption)], mask[i, : len(caption)] = caption, 1
        return features, mask


def text_pipeline(tokenizer) -> ImagePipeline:
    shape = {"vocab_size": 64, "block_size": 64, "cls_token_num": WORDS, "caption_dim": WIDTH, "model_type": "t2i"}
    gpt = randomize(GPT_models["GPT-XS"](**shape), seed=4).requires_grad_(False)
    return ImagePipeline(gpt, tokenizer, batch_size=4, text_encoder=WordEncoder())


def image(label=None, features=None, negative=None, seed=0, **sampling) -> Request:
    """A request for an image of a label, or of a caption's features."""
    name, value = ("caption", features) if features is not None else ("label", label)
    conditions = {} if value is None else {name: value}
    return Request(conditions, {} if negative is None else {name: negative}, SamplingConfig(**sampling), seed)
