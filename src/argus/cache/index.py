"""Finds the most similar prompts of a scope."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from usearch.index import Index

Vector = NDArray[np.float32]

FEW = 128  # most entries of a scope that need no graph, which takes 50 kB even for one entry


class SimilarityIndex:
    """The vectors of every scope (cosine, f16), in memory, rebuilt from the catalogue: an array
    for a scope of up to `FEW` entries, an HNSW graph (usearch) once it has had more."""

    def __init__(self, known: Iterable[tuple[int, str, Vector]] = ()) -> None:
        """`known` are the (entry, scope key, vector) to begin with, added with all cores."""
        self._scopes: dict[str, _Array | _Graph] = {}
        self._size = 0
        self._lock = threading.Lock()
        by_scope: dict[str, tuple[list[int], list[Vector]]] = {}
        for entry, scope, vector in known:
            entries, vectors = by_scope.setdefault(scope, ([], []))
            entries.append(entry)
            vectors.append(vector)
        for scope, (entries, vectors) in by_scope.items():
            kind = _Array if len(entries) <= FEW else _Graph
            self._scopes[scope] = kind(entries, np.stack(vectors))
            self._size += len(entries)

    def __len__(self) -> int:
        return self._size

    def add(self, scope: str, entry: int, vector: Vector) -> None:
        with self._lock:
            there = self._scopes.get(scope)
            if there is None:
                self._scopes[scope] = _Array([entry], vector[None])
            elif entry in there:
                return
            else:
                if isinstance(there, _Array) and len(there) >= FEW:
                    there = self._scopes[scope] = _Graph(there.entries, there.vectors)
                there.add(entry, vector)
            self._size += 1

    def remove(self, scope: str, entry: int) -> None:
        with self._lock:
            there = self._scopes.get(scope)
            if there is None or entry not in there:
                return
            there.remove(entry)
            self._size -= 1
            if not len(there):
                del self._scopes[scope]

    def entries(self, scope: str) -> set[int]:
        """The entries of a scope."""
        with self._lock:
            there = self._scopes.get(scope)
            return set() if there is None else set(there.entries)

    def nearest(self, scope: str, vector: Vector, count: int = 1) -> list[tuple[int, float]]:
        """The `count` entries nearest to a vector (d,), with their cosine similarities, nearest
        first."""
        with self._lock:
            there = self._scopes.get(scope)
            return [] if there is None else there.nearest(vector, count)


class _Array:
    """Unit vectors (n, d), searched exhaustively."""

    def __init__(self, entries: list[int], vectors: NDArray[np.float32]) -> None:
        self.entries = list(entries)
        self._rows = _unit(vectors).astype(np.float16)  # rows beyond the entries are spare

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, entry: int) -> bool:
        return entry in self.entries

    @property
    def vectors(self) -> NDArray[np.float32]:
        return self._rows[: len(self)].astype(np.float32)

    def add(self, entry: int, vector: Vector) -> None:
        if len(self) == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._rows[len(self)] = _unit(vector)
        self.entries.append(entry)

    def remove(self, entry: int) -> None:
        at, last = self.entries.index(entry), len(self) - 1
        self._rows[at], self.entries[at] = self._rows[last], self.entries[last]
        self.entries.pop()

    def nearest(self, vector: Vector, count: int) -> list[tuple[int, float]]:
        cosines = self.vectors @ _unit(vector)
        best = np.argsort(-cosines, kind="stable")[:count]
        return [(self.entries[i], float(cosines[i])) for i in best]


class _Graph:
    def __init__(self, entries: list[int], vectors: NDArray[np.float32]) -> None:
        self._index = Index(ndim=vectors.shape[1], metric="cos", dtype="f16")
        self._index.add(np.array(entries), vectors)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, entry: int) -> bool:
        return entry in self._index

    @property
    def entries(self) -> list[int]:
        return [int(key) for key in self._index.keys]

    def add(self, entry: int, vector: Vector) -> None:
        self._index.add(entry, vector)

    def remove(self, entry: int) -> None:
        self._index.remove(entry)

    def nearest(self, vector: Vector, count: int) -> list[tuple[int, float]]:
        found = self._index.search(vector, count)
        return [
            (int(key), 1.0 - float(distance))
            for key, distance in zip(found.keys, found.distances, strict=True)
        ]


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors (..., d) normalised to length 1; zero vectors stay zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    length[length == 0] = 1
    unit: NDArray[np.float32] = vectors / length
    return unit
