"""Finds the most similar prompt of a scope."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray
from usearch.index import Index

Vector = NDArray[np.float32]


class SimilarityIndex:
    """One HNSW graph a scope (usearch, cosine, f16), in memory, rebuilt from the catalogue."""

    def __init__(self) -> None:
        self._graphs: dict[str, Index] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(len(graph) for graph in self._graphs.values())

    def add(self, scope: str, entry: int, vector: Vector) -> None:
        with self._lock:
            graph = self._graphs.get(scope)
            if graph is None:
                graph = Index(ndim=len(vector), metric="cos", dtype="f16")
                self._graphs[scope] = graph
            graph.add(entry, vector)

    def remove(self, scope: str, entry: int) -> None:
        with self._lock:
            graph = self._graphs.get(scope)
            if graph is None or entry not in graph:
                return
            graph.remove(entry)
            if not len(graph):
                del self._graphs[scope]

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
