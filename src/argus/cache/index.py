"""Finds the most similar prompt of a scope."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from usearch.index import Index

Vector = NDArray[np.float32]


class SimilarityIndex:
    """One HNSW graph a scope (usearch, cosine, f16), in memory, rebuilt from the catalogue."""

    def __init__(self, known: Iterable[tuple[int, str, Vector]] = ()) -> None:
        """`known` are entries with their scopes and vectors, added with every core at once."""
        self._graphs: dict[str, Index] = {}
        self._lock = threading.Lock()
        by_scope: dict[str, tuple[list[int], list[Vector]]] = {}
        for entry, scope, vector in known:
            entries, vectors = by_scope.setdefault(scope, ([], []))
            entries.append(entry)
            vectors.append(vector)
        for scope, (entries, vectors) in by_scope.items():
            self._graphs[scope] = _new_graph(len(vectors[0]))
            self._graphs[scope].add(np.array(entries), np.stack(vectors))

    def __len__(self) -> int:
        with self._lock:
            return sum(len(graph) for graph in self._graphs.values())

    def add(self, scope: str, entry: int, vector: Vector) -> None:
        with self._lock:
            graph = self._graphs.get(scope)
            if graph is None:
                graph = self._graphs[scope] = _new_graph(len(vector))
            if entry not in graph:
                graph.add(entry, vector)

    def remove(self, scope: str, entry: int) -> None:
        with self._lock:
            graph = self._graphs.get(scope)
            if graph is None or entry not in graph:
                return
            graph.remove(entry)
            if not len(graph):
                del self._graphs[scope]

    def entries(self, scope: str) -> set[int]:
        """The entries of a scope."""
        with self._lock:
            graph = self._graphs.get(scope)
            return set() if graph is None else {int(key) for key in graph.keys}

    def nearest(self, scope: str, vector: Vector, count: int = 1) -> list[tuple[int, float]]:
        """The `count` entries nearest to a vector with their cosines to it, nearest first."""
        with self._lock:
            graph = self._graphs.get(scope)
            if graph is None or not len(graph):
                return []
            found = graph.search(vector, count)
        return [
            (int(key), 1.0 - float(distance))
            for key, distance in zip(found.keys, found.distances, strict=True)
        ]


def _new_graph(width: int) -> Index:
    return Index(ndim=width, metric="cos", dtype="f16")
