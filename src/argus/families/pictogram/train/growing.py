"""Begins networks from those of an earlier shape: what still fits is kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

_FRESH = ("encoder.conv_out.", "quant_conv.")  # of a VAE: means and variances side by side
_EMBEDDING = "embeddings.token_embedding.weight"


@torch.no_grad()
def grow(network: nn.Module, kept: dict[str, Tensor]) -> None:
    """Copy weights of `kept` into the network, as far as shapes allow.

    Where a weight has more inputs than the kept one, they begin at 0; where it has more outputs,
    those begin as they are in `network`.
    """
    for name, weight in network.state_dict().items():
        old = kept.get(name)
        if old is None or old.dim() != weight.dim() or name.startswith(_FRESH):
            continue
        common = tuple(slice(min(a, b)) for a, b in zip(old.shape, weight.shape, strict=True))
        if weight.dim() > 1 and old.shape[1] < weight.shape[1]:
            weight[: old.shape[0], old.shape[1] :] = 0.0
        weight[common] = old[common]


@torch.no_grad()
def grow_text_encoder(
    network: CLIPTextModel, tokenizer: CLIPTokenizer, kept: CLIPTextModel, old: CLIPTokenizer
) -> None:
    """The kept text encoder under a new vocabulary: a piece begins as the mean of what it was."""
    states = kept.state_dict()
    name = next(name for name in states if name.endswith(_EMBEDDING))
    before = states.pop(name)
    grow(network, states)
    after = network.state_dict()[name]
    known = old.get_vocab()
    for piece, i in tokenizer.get_vocab().items():
        if piece in known:
            after[i] = before[known[piece]]
            continue
        text = piece.removesuffix("</w>")
        ids = old(text, add_special_tokens=False).input_ids if text.isascii() else []
        if ids:
            after[i] = before[ids].mean(0)
