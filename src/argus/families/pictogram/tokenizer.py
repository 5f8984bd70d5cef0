"""Learns the family's byte-pair vocabulary from its own captions."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPTokenizer

from argus.families.pictogram.captions import caption
from argus.families.pictogram.networks import MAX_TOKENS
from argus.families.pictogram.world import sample_scene

VOCABULARY = 1024
START, END = "<|startoftext|>", "<|endoftext|>"


def learn_tokenizer(captions: int = 20_000, seed: int = 0) -> CLIPTokenizer:
    """A CLIP tokenizer whose frequent words are single tokens and which can spell any text."""
    rng = random.Random(seed)
    corpus = (caption(sample_scene(rng), rng) for _ in range(captions))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [START, END, *letters, *(f"{letter}</w>" for letter in letters)]
    merges = _merges(pieces, corpus)
    merged = dict.fromkeys("".join(pair) for pair in merges)
    vocabulary = dict.fromkeys([*pieces, *merged])  # rare letters too, which learning drops
    tokenizer = CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=list(merges)
    )
    tokenizer.model_max_length = MAX_TOKENS
    return tokenizer


def _merges(pieces: list[str], corpus: Iterator[str]) -> list[tuple[str, str]]:
    speller = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    learnt = speller.train_new_from_iterator(corpus, VOCABULARY)
    merges = json.loads(learnt.backend_tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Token ids (n, 40), padded as `StableDiffusionPipeline` pads them."""
    tokens = tokenizer(
        prompts,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    ids: Tensor = tokens.input_ids
    return ids
