"""Embeds prompts as vectors whose cosine is the similarity of prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from argus.core.errors import ModelError

COMPILED_AFTER = 2  # calls of a trace


@dataclass(frozen=True)
class Embedding:
    """A prompt's vector (d,) of unit length; `truncated` if the prompt is longer than the model
    reads, so that its end is ignored."""

    vector: NDArray[np.float32]
    truncated: bool


class PromptEncoder:
    """The text encoder of a diffusers pipeline, on the CPU. Safe to call from any thread.

    A prompt's vector is the mean of its tokens' last hidden states. (The end token's state, which
    CLIP pools, carries no meaning in an encoder that was trained with its UNet and not with CLIP.
    The start token's is left out: it is the same for every prompt.)
    """

    def __init__(self, tokenizer: CLIPTokenizer, model: CLIPTextModel) -> None:
        self._tokenizer, self._vectors = tokenizer, _traced(model.eval().requires_grad_(False))

    @classmethod
    def load(cls, folder: Path) -> PromptEncoder:
        """Load `text_encoder` and `tokenizer` of the pipeline saved in `folder`.

        Raises ModelError when they are not there.
        """
        try:
            return cls(
                CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
                CLIPTextModel.from_pretrained(
                    folder / "text_encoder", local_files_only=True, use_safetensors=True
                ).float(),
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder} holds no CLIP text encoder: {error}") from error

    def truncates(self, text: str) -> bool:
        """Whether a text is longer than the model reads."""
        return bool(len(self._tokenizer(text).input_ids) > self._tokenizer.model_max_length)

    def embed(self, prompt: str) -> Embedding:
        return self.embed_all([prompt])[0]

    @torch.inference_mode()
    def embed_all(self, prompts: Sequence[str]) -> list[Embedding]:
        """The prompts' embeddings, computed together."""
        if not prompts:
            return []
        limit = self._tokenizer.model_max_length
        read = self._tokenizer(list(prompts)).input_ids
        kept = [[*ids[: limit - 1], ids[-1]] if len(ids) > limit else ids for ids in read]
        longest = max(map(len, kept))
        rows = torch.tensor([ids + [ids[-1]] * (longest - len(ids)) for ids in kept])
        vectors = self._vectors(rows, torch.tensor([len(ids) for ids in kept])).numpy()
        return [
            Embedding(vector, len(ids) > limit) for vector, ids in zip(vectors, read, strict=True)
        ]


@torch.inference_mode()
def _traced(model: CLIPTextModel) -> Callable[[Tensor, Tensor], Tensor]:
    """The vectors (p, d) of prompts from their tokens (p, t) and the numbers of these (p,).

    One call without Python, for any p and t: in Python, each of its many small operations would
    wait for the interpreter, which serves other requests.
    """

    def vectors(tokens: Tensor, lengths: Tensor) -> Tensor:
        states = model(tokens).last_hidden_state  # causal: what follows a prompt changes nothing
        at = torch.arange(tokens.shape[1])
        there = ((at > 0) & (at < lengths[:, None])).float()
        means = (states * there[:, :, None]).sum(1) / there.sum(1, keepdim=True)
        return F.normalize(means, dim=1)

    example = torch.zeros(2, 8, dtype=torch.long), torch.full((2,), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checks whose outcome it keeps: all inputs pass them
        traced = torch.jit.trace(vectors, example)  # type: ignore[no-untyped-call]
    for _ in range(COMPILED_AFTER):
        traced(*example)
    compiled: Callable[[Tensor, Tensor], Tensor] = traced
    return compiled
