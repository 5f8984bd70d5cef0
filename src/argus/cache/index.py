"""Finds the most similar prompts of a scope."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from usearch.index import Index

Vector = NDArray[np.float32]
Kind = Literal["array", "graph"]

FEW = 128  # most entries of a scope that need no graph, which takes 50 kB even for one entry
READ_AT_ONCE = 10_000  # vectors of `add_all` in memory beside the index
ALIKE = 2e-3  # most that an f16 number of a unit vector differs from what it was made from
ADDED_AT_ONCE = 64  # some 10 ms; usearch keeps Python's lock in each call: others run between


class SimilarityIndex:
    """The vectors of every scope (cosine, f16), in memory, restored from a file or rebuilt from the
    catalogue: an array for a scope of up to `FEW` entries, an HNSW graph (usearch) once it has had
    more."""

    def __init__(self, known: Iterable[tuple[int, str, Vector]] = ()) -> None:
        """`known` are the (entry, scope key, vector) to begin with."""
        self._scopes: dict[str, _Array | _Graph] = {}
        self._size = 0
        self._lock = threading.Lock()
        self.changes = 0  # entries added and removed so far
        self.add_all(known)

    def __len__(self) -> int:
        return self._size

    def add_all(self, known: Iterable[tuple[int, str, Vector]]) -> None:
        """Add many (entry, scope key, vector)."""
        left = iter(known)
        while some := list(islice(left, READ_AT_ONCE)):
            by_scope: dict[str, tuple[list[int], list[Vector]]] = {}
            for entry, scope, vector in some:
                entries, vectors = by_scope.setdefault(scope, ([], []))
                entries.append(entry)
                vectors.append(vector)
            for scope, (entries, vectors) in by_scope.items():
                for begin in range(0, len(entries), ADDED_AT_ONCE):
                    part = slice(begin, begin + ADDED_AT_ONCE)
                    self._add(scope, entries[part], np.stack(vectors[part]))

    def add(self, scope: str, entry: int, vector: Vector) -> None:
        """Add an entry; one that is there is left as it is."""
        self._add(scope, [entry], vector[None])

    def _add(self, scope: str, entries: list[int], vectors: NDArray[np.float32]) -> None:
        """Add different entries with their vectors (n, d)."""
        with self._lock:
            there = self._scopes.get(scope)
            if there is not None:
                new = [i for i, entry in enumerate(entries) if entry not in there]
                entries, vectors = [entries[i] for i in new], vectors[new]
            if not entries:
                return
            many = len(entries) + (0 if there is None else len(there)) > FEW
            if there is None:
                self._scopes[scope] = (_Graph if many else _Array)(entries, vectors)
            else:
                if many and isinstance(there, _Array):
                    there = self._scopes[scope] = _Graph(there.entries, there.vectors)
                there.add(entries, vectors)
            self._size += len(entries)
            self.changes += len(entries)

    def remove(self, scope: str, entry: int) -> None:
        with self._lock:
            there = self._scopes.get(scope)
            if there is None or entry not in there:
                return
            there.remove(entry)
            self._size -= 1
            self.changes += 1
            if not len(there):
                del self._scopes[scope]

    def scopes(self) -> list[str]:
        """The keys of the scopes that have entries."""
        with self._lock:
            return list(self._scopes)

    def is_empty(self, scope: str) -> bool:
        """Whether a scope has no entries. Does not wait for an entry that is being added."""
        return scope not in self._scopes

    def entries(self, scope: str) -> set[int]:
        """The entries of a scope."""
        with self._lock:
            there = self._scopes.get(scope)
            return set() if there is None else set(there.entries)

    def holds(self, scope: str, entry: int, vector: Vector) -> bool:
        """Whether an entry is there with this vector (d,), of whatever length."""
        known = self.vector(scope, entry)
        if known is None or known.shape != vector.shape:
            return False
        return np.allclose(_unit(known), _unit(vector), atol=ALIKE)

    def nearest(self, scope: str, vector: Vector, count: int = 1) -> list[tuple[int, float]]:
        """The `count` entries nearest to a vector (d,), with their cosine similarities, nearest
        first."""
        with self._lock:
            there = self._scopes.get(scope)
            return [] if there is None else there.nearest(vector, count)

    def vector(self, scope: str, entry: int) -> Vector | None:
        """An entry's vector (d,) as it is kept; None if it is not there."""
        with self._lock:
            there = self._scopes.get(scope)
            return None if there is None or entry not in there else there.vector(entry)

    def dump(self) -> Iterator[tuple[str, Kind, int, bytes]]:
        """Every scope's key, kind, number of entries, and content for `restore`, one after the
        other: the index may change in between."""
        for scope in self.scopes():
            with self._lock:
                there = self._scopes.get(scope)
                if there is None:
                    continue
                kind: Kind = "array" if isinstance(there, _Array) else "graph"
                count, data = len(there), there.dump()
            yield scope, kind, count, data

    def restore(self, scope: str, kind: Kind, count: int, data: memoryview) -> None:
        """Add a scope from what `dump` gave. Raises ValueError or RuntimeError if the content is
        something else."""
        there = (_Array if kind == "array" else _Graph).restored(data, count)
        with self._lock:
            self._scopes[scope] = there
            self._size += len(there)


class _Array:
    """Unit vectors (n, d), searched exhaustively."""

    def __init__(self, entries: list[int], vectors: NDArray[np.float32]) -> None:
        self.entries = list(entries)
        self._rows = _unit(vectors).astype(np.float16)  # rows beyond the entries are spare

    @classmethod
    def restored(cls, given: memoryview, count: int) -> _Array:
        data = bytes(given)  # a view of it could not be closed after an error
        entries = np.frombuffer(data, "<i8", count)
        rows = np.frombuffer(data, "<f2", offset=entries.nbytes)
        return cls(entries.tolist(), rows.reshape(count, -1).astype(np.float32))

    def dump(self) -> bytes:
        entries, rows = np.array(self.entries, "<i8"), self._rows[: len(self)].astype("<f2")
        return entries.tobytes() + rows.tobytes()

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, entry: int) -> bool:
        return entry in self.entries

    @property
    def vectors(self) -> NDArray[np.float32]:
        return self._rows[: len(self)].astype(np.float32)

    def vector(self, entry: int) -> Vector:
        vector: Vector = self._rows[self.entries.index(entry)].astype(np.float32)
        return vector

    def add(self, entries: list[int], vectors: NDArray[np.float32]) -> None:
        count = len(self) + len(entries)
        if count > len(self._rows):
            spare = np.empty((max(count, 2 * len(self)) - len(self), vectors.shape[1]), np.float16)
            self._rows = np.concatenate([self._rows[: len(self)], spare])
        self._rows[len(self) : count] = _unit(vectors)
        self.entries += entries

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
        self._index = _new_graph(vectors.shape[1])
        self.add(entries, vectors)

    @classmethod
    def restored(cls, data: memoryview, count: int) -> _Graph:
        graph = cls.__new__(cls)
        graph._index = _new_graph(0)
        graph._index.load(data)
        if len(graph) != count:
            raise ValueError(f"{len(graph)} entries in a graph of {count}")
        return graph

    def dump(self) -> bytes:
        data = self._index.save()
        assert data is not None  # no path is given
        return data

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, entry: int) -> bool:
        return entry in self._index

    @property
    def entries(self) -> list[int]:
        entries: list[int] = np.asarray(self._index.keys).tolist()
        return entries

    def vector(self, entry: int) -> Vector:
        vector: Vector = np.asarray(self._index.get(entry), np.float32)
        return vector

    def add(self, entries: list[int], vectors: NDArray[np.float32]) -> None:
        # One thread: entries that several threads add are there, yet never found (USearch #735).
        self._index.add(np.array(entries), vectors, threads=1)

    def remove(self, entry: int) -> None:
        self._index.remove(entry)

    def nearest(self, vector: Vector, count: int) -> list[tuple[int, float]]:
        found = self._index.search(vector, count)
        return [
            (int(key), 1.0 - float(distance))
            for key, distance in zip(found.keys, found.distances, strict=True)
        ]


def _new_graph(width: int) -> Index:
    return Index(ndim=width, metric="cos", dtype="f16")


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors (..., d) normalised to length 1; zero vectors stay zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    length[length == 0] = 1
    unit: NDArray[np.float32] = vectors / length
    return unit
