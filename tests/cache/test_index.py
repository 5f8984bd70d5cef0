"""Small scopes are searched one by one, large ones through a graph: nobody should see which."""

from __future__ import annotations

import gc
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from argus.cache.index import FEW, SimilarityIndex, Vector

WIDTH = 32


def vectors(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def cosines(known: NDArray[np.float32], query: Vector) -> NDArray[np.float32]:
    lengths = np.linalg.norm(known, axis=1) * np.linalg.norm(query)
    found: NDArray[np.float32] = known @ query / lengths
    return found


def built(known: NDArray[np.float32], *, by_adding: bool) -> SimilarityIndex:
    if not by_adding:
        return SimilarityIndex((i, "all", vector) for i, vector in enumerate(known))
    index = SimilarityIndex()
    for i, vector in enumerate(known):
        index.add("all", i, vector)
    return index


@pytest.mark.parametrize("by_adding", [True, False])
@pytest.mark.parametrize("count", [1, 7, FEW - 1, FEW, FEW + 1, 2 * FEW])
def test_the_nearest_are_found_in_order_whatever_the_size(count: int, by_adding: bool) -> None:
    known = vectors(count)
    index = built(known, by_adding=by_adding)
    assert len(index) == count
    right, wanted = 0, min(5, count)
    for query in vectors(20, seed=1):
        expected = cosines(known, query)
        found = index.nearest("all", query, 5)
        assert len(found) == wanted
        similarities = [similarity for _, similarity in found]
        assert similarities == sorted(similarities, reverse=True)
        for entry, similarity in found:
            assert similarity == pytest.approx(expected[entry], abs=2e-3)
        right += sum(similarity >= np.sort(expected)[-wanted] - 2e-3 for similarity in similarities)
    assert right >= 0.95 * 20 * wanted  # a graph misses one now and then


def test_a_vector_of_zeros_is_like_nothing() -> None:
    known = vectors(2)
    known[0] = 0
    for count in (2, FEW + 1):  # by either way
        opposite = 0.1 * vectors(count)[2:] - known[1]  # alike, but not the same: a graph may lose
        opposite /= np.linalg.norm(opposite, axis=1, keepdims=True)  # its way among equals
        index = built(np.concatenate([known, opposite]), by_adding=True)
        (first, _), (second, similarity) = index.nearest("all", known[1], 2)
        assert (first, second) == (1, 0)
        assert similarity == pytest.approx(0, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from("ab"), st.integers(0, 40)),
        max_size=80,
    ),
    st.sampled_from([0, FEW - 20, FEW + 1]),
)
def test_entries_come_and_go(moves: list[tuple[bool, str, int]], already: int) -> None:
    known = vectors(41 + already)
    index = SimilarityIndex((41 + i, "a", known[41 + i]) for i in range(already))
    there: dict[str, set[int]] = {"a": set(range(41, 41 + already)), "b": set()}
    for adds, scope, entry in moves:
        if adds:
            index.add(scope, entry, known[entry])
            there[scope].add(entry)
        else:
            index.remove(scope, entry)
            there[scope].discard(entry)
    assert len(index) == len(there["a"]) + len(there["b"])
    for scope, entries in there.items():
        assert index.entries(scope) == entries
        for entry in entries & set(range(41)):
            ((found, similarity),) = index.nearest(scope, known[entry])
            assert found == entry
            assert similarity == pytest.approx(1, abs=2e-3)


def resident_bytes() -> int:
    """Of this process; the graphs' memory is not Python's."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_a_scope_of_one_entry_takes_little_more_memory_than_its_vector() -> None:
    """Each request may have a scope of its own: by its guidance or negative prompt."""
    count, width = 300, 768
    made = np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)
    before = resident_bytes()
    index = SimilarityIndex()
    for i, vector in enumerate(made):
        index.add(f"{i:032d}", i, vector)
    assert len(index) == count
    assert resident_bytes() - before < count * 10_000
