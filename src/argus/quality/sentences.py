"""Encoders for prompts that were scored elsewhere: sentence encoders, and words without a download.

`argus train --table` and `argus simulate --table` use them. Each has `embed(prompt)`, as
`PromptEncoder`, and returns vectors of unit length.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from argus.core.errors import ModelError
from argus.files import written_aside
from argus.quality.encoder import Embedding, PromptEncoder

WORDS = "words"  # the name of the encoder that needs no download
SIZE = 256  # of its vectors
FEWEST = 2  # prompts that a word must be in
KEEPS = ("Transformer", "Pooling", "Normalize")
Vectors = NDArray[np.float32]


class Encoder(Protocol):
    """Embeds a prompt."""

    def embed(self, prompt: str) -> Embedding: ...


def load_encoder(source: str, prompts: Sequence[str] = ()) -> Encoder:
    """The encoder that `source` names: `words`, fitted to `prompts`; the folder of one that was
    saved; the folder of a diffusers pipeline, whose text encoder it is; or the folder or hub id of
    a sentence-transformers model. Raises ModelError if it cannot be loaded."""
    folder = Path(source)
    if source == WORDS:
        return WordEncoder.fit(prompts)
    if (folder / WordEncoder.TABLE).is_file():
        return WordEncoder.load(folder)
    if (folder / "text_encoder").is_dir():
        return PromptEncoder.load(folder)
    return SentenceEncoder.load(source)


class SentenceEncoder:
    """A sentence-transformers model (all-MiniLM-L6-v2, all-mpnet-base-v2, bge, e5 …) on the CPU.

    Only transformers is needed: a model is its tokens' last hidden states, their mean or the first
    of them (`1_Pooling/config.json`), and a normalisation. Safe to call from any thread.
    """

    def __init__(self, tokenizer: Any, model: Any, longest: int, first: bool) -> None:
        self._tokenizer, self._model = tokenizer, model.eval()
        self._longest, self._first = longest, first

    @classmethod
    def load(cls, source: str) -> SentenceEncoder:
        """From a folder or the hub, safetensors only and without remote code. Raises ModelError if
        it cannot be loaded, or does more than pool tokens."""
        try:
            modules = _described(source, "modules.json") or []
            kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
            odd = [kind for kind in kinds if kind not in KEEPS]
            pooling = _described(source, "1_Pooling/config.json") or {"pooling_mode_mean_tokens": 1}
            first = bool(pooling.get("pooling_mode_cls_token"))
            mean = bool(pooling.get("pooling_mode_mean_tokens"))
            if odd or first == mean:
                what = f"a module {odd[0]}" if odd else "another way of pooling"
                raise ModelError(f"The encoder {source} has {what}, which is not supported.")
            settings = _described(source, "sentence_bert_config.json") or {}
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModel.from_pretrained(source, use_safetensors=True).float()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"The encoder {source} cannot be loaded: {error}. Give a folder or hub id of a "
                f"sentence-transformers model, the folder of a diffusers pipeline, or {WORDS}."
            ) from error
        limit = min(tokenizer.model_max_length, model.config.max_position_embeddings)
        return cls(tokenizer, model, int(settings.get("max_seq_length") or limit), first)

    @torch.inference_mode()
    def embed(self, prompt: str) -> Embedding:
        ids = self._tokenizer(prompt).input_ids
        kept = [*ids[: self._longest - 1], ids[-1]] if len(ids) > self._longest else ids
        states = self._model(input_ids=torch.tensor([kept])).last_hidden_state[0]
        pooled = states[0] if self._first else states.mean(0)
        vector = F.normalize(pooled, dim=0)
        return Embedding(vector.numpy().astype(np.float32), len(ids) > self._longest)


def _described(source: str, name: str) -> Any:
    """A JSON file of a model, None if it has none."""
    if Path(source).is_dir():
        file = Path(source) / name
        return json.loads(file.read_text()) if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return json.loads(Path(hf_hub_download(source, name)).read_text())
    except EntryNotFoundError:
        return None


class WordEncoder:
    """Latent semantic analysis of words and pairs of words (TF-IDF and a truncated singular value
    decomposition; Deerwester et al. 1990), fitted to the prompts that a predictor is trained on.

    It needs no download and knows nothing of words that those prompts lack: a prompt of such words
    alone has the vector 0.
    """

    TABLE, VECTORS = "words.json", "words.safetensors"

    def __init__(self, terms: Sequence[str], vectors: Vectors) -> None:
        self._terms = {term: i for i, term in enumerate(terms)}
        self._vectors = vectors

    @classmethod
    def fit(cls, prompts: Sequence[str], size: int = SIZE) -> WordEncoder:
        """Raises ModelError for prompts that share no words."""
        from scipy.sparse.linalg import svds

        terms, idf = vocabulary(prompts)
        if len(terms) < 2:
            raise ModelError("These prompts share no words: nothing can be learned from them.")
        table = tf_idf(prompts, terms, idf)
        most = min(size, min(table.shape) - 1)
        start = np.random.default_rng(0).standard_normal(min(table.shape))
        _, _, right = svds(table, most, v0=start)
        return cls(terms, np.ascontiguousarray(idf[:, None] * right.T, np.float32))

    def embed(self, prompt: str) -> Embedding:
        known = Counter(term for term in _terms(prompt) if term in self._terms)
        vector = np.zeros(self._vectors.shape[1], np.float32)
        for term, count in known.items():
            vector += (1 + np.log(count)) * self._vectors[self._terms[term]]
        return Embedding(vector / max(float(np.linalg.norm(vector)), 1e-9), False)

    def save(self, folder: Path) -> None:
        """Write both files into a folder that exists."""
        with (
            written_aside(folder / self.VECTORS) as aside,
            written_aside(folder / self.TABLE) as listed,
        ):
            save_file({"vectors": self._vectors}, aside)
            listed.write_text(json.dumps(list(self._terms)) + "\n")

    @classmethod
    def load(cls, folder: Path) -> WordEncoder:
        """Read what `save` wrote. Raises ModelError if that is missing or broken."""
        try:
            terms = json.loads((folder / cls.TABLE).read_text())
            return cls(terms, load_file(folder / cls.VECTORS)["vectors"])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ModelError(f"{folder} holds no encoder that can be read: {error}") from error


def vocabulary(prompts: Sequence[str]) -> tuple[list[str], NDArray[np.float64]]:
    """Words and pairs of words that are in several prompts, and their inverse document
    frequencies (t,)."""
    seen = Counter(term for prompt in prompts for term in set(_terms(prompt)))
    terms = sorted(term for term, count in seen.items() if count >= FEWEST)
    idf = np.array([1 + np.log((1 + len(prompts)) / (1 + seen[term])) for term in terms])
    return terms, idf


def tf_idf(prompts: Sequence[str], terms: Sequence[str], idf: NDArray[np.float64]) -> Any:
    """The sparse table (p, t) of TF-IDF with sublinear counts, its rows of unit length."""
    from scipy.sparse import csr_matrix

    at = {term: i for i, term in enumerate(terms)}
    rows, columns, values = [], [], []
    for row, prompt in enumerate(prompts):
        known = Counter(term for term in _terms(prompt) if term in at)
        found = np.array([(1 + np.log(n)) * idf[at[term]] for term, n in known.items()])
        rows += [row] * len(known)
        columns += [at[term] for term in known]
        values += (found / max(float(np.linalg.norm(found)), 1e-9)).tolist()
    return csr_matrix((values, (rows, columns)), shape=(len(prompts), len(terms)))


def _terms(prompt: str) -> list[str]:
    words = re.findall(r"\w+", prompt.lower())
    return words + [f"{a} {b}" for a, b in itertools.pairwise(words)]


def embed_all(
    encoder: Encoder, prompts: Sequence[str], tell: Callable[[int], None] = lambda done: None
) -> Vectors:
    """The vectors (p, d) of prompts; `tell` is called with how many are done."""
    rows = []
    for number, prompt in enumerate(prompts, start=1):
        rows.append(encoder.embed(prompt).vector)
        tell(number)
    return np.stack(rows)
