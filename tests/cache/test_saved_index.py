"""A restored index is the one that was saved, brought up to its catalogue."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from argus.cache.cache import ApproximateCache
from argus.cache.catalogue import Catalogue
from argus.cache.index import FEW, SimilarityIndex, Vector
from argus.cache.latents import LatentStore, StoredLatents
from argus.cache.saved_index import restored, save
from argus.cache.scope import Scope

LARGE = Scope("alice", "tiny", "ddim", 64, 64, 30, 3.0, "")
SMALL = replace(LARGE, namespace="bob")
WIDTH = 16
MADE = np.random.default_rng(0).standard_normal((FEW + 30, WIDTH)).astype(np.float32)


class Counted(Catalogue):
    """Notes how many vectors are read from it."""

    read = 0

    def vectors(self) -> Iterator[tuple[int, str, Vector]]:
        return self._noted(super().vectors())

    def vectors_of(self, entries: object) -> Iterator[tuple[int, str, Vector]]:
        return self._noted(super().vectors_of(entries))  # type: ignore[arg-type]

    def _noted(self, rows: Iterator[tuple[int, str, Vector]]) -> Iterator[tuple[int, str, Vector]]:
        for row in rows:
            self.read += 1
            yield row


@pytest.fixture
def catalogue(tmp_path: Path) -> Counted:
    """A scope that needs a graph, and one that does not."""
    made = Counted(f"sqlite:///{tmp_path}/catalogue.db")
    for i, vector in enumerate(MADE):
        add(made, LARGE, i, vector)
    for i, vector in enumerate(MADE[:5]):
        add(made, SMALL, 1000 + i, vector)
    return made


def add(catalogue: Catalogue, scope: Scope, number: int, vector: Vector) -> int:
    stored = StoredLatents(5, f"{number}", "", 1)
    entry = catalogue.add(scope, f"prompt {number}", vector, [stored], 0.0)
    assert entry is not None
    return entry


def agree(index: SimilarityIndex, catalogue: Catalogue) -> None:
    """Check that an index has the catalogue's entries with their vectors."""
    ids = catalogue.ids_by_scope()
    assert {scope: index.entries(scope) for scope in index.scopes()} == ids
    assert len(index) == sum(map(len, ids.values()))
    for entry, scope, vector in catalogue.vectors():
        assert index.holds(scope, entry, vector)
        ((nearest, _),) = index.nearest(scope, vector)
        assert nearest == entry


def test_a_restored_index_finds_the_same_neighbours(tmp_path: Path, catalogue: Counted) -> None:
    index = SimilarityIndex(catalogue.vectors())
    save(index, tmp_path / "index", catalogue.id)
    again = restored(tmp_path / "index", catalogue)
    agree(again, catalogue)
    for query in np.random.default_rng(1).standard_normal((20, WIDTH)).astype(np.float32):
        for scope in (LARGE, SMALL):
            assert again.nearest(scope.key, query, 5) == index.nearest(scope.key, query, 5)


def test_what_came_and_went_since_is_caught_up_with(tmp_path: Path, catalogue: Counted) -> None:
    save(SimilarityIndex(catalogue.vectors()), tmp_path / "index", catalogue.id)
    for entry in (1, 7, FEW + 31):
        catalogue.remove_entry(entry)
    new = replace(LARGE, namespace="carol")
    for i, scope in enumerate((LARGE, SMALL, new)):
        add(catalogue, scope, 2000 + i, MADE[i] + MADE[i + 1])
    catalogue.read = 0
    index = restored(tmp_path / "index", catalogue)
    assert catalogue.read < FEW  # those that are new, and some that are compared
    agree(index, catalogue)


def test_a_scope_that_is_gone_is_not_restored(tmp_path: Path, catalogue: Counted) -> None:
    save(SimilarityIndex(catalogue.vectors()), tmp_path / "index", catalogue.id)
    for entry in catalogue.ids_by_scope()[LARGE.key]:
        catalogue.remove_entry(entry)
    agree(restored(tmp_path / "index", catalogue), catalogue)


def halved(data: bytes) -> bytes:
    return data[: len(data) // 2]


def altered(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def of_tomorrow(data: bytes) -> bytes:
    first, rest = data.split(b"\n", 1)
    return json.dumps(json.loads(first) | {"format": 999}).encode() + b"\n" + rest


@pytest.mark.parametrize(
    "damage", [halved, altered, of_tomorrow, lambda _: b"", lambda _: b"\n\n", lambda d: d[:-9]]
)
def test_a_broken_file_is_ignored_and_the_index_rebuilt(
    tmp_path: Path, catalogue: Counted, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "index"
    save(SimilarityIndex(catalogue.vectors()), file, catalogue.id)
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    agree(restored(file, catalogue), catalogue)
    assert "is ignored, and rebuilt" in caplog.text
    save(restored(file, catalogue), file, catalogue.id)
    caplog.clear()
    agree(restored(file, catalogue), catalogue)
    assert not caplog.records


def test_another_catalogues_index_is_ignored(
    tmp_path: Path, catalogue: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    save(SimilarityIndex(catalogue.vectors()), tmp_path / "index", catalogue.id)
    other = Catalogue(f"sqlite:///{tmp_path}/other.db")
    add(other, LARGE, 0, MADE[3])
    agree(restored(tmp_path / "index", other), other)
    assert "another catalogue's" in caplog.text


def test_entries_of_a_catalogue_that_was_set_back_are_not_mistaken_for_later_ones(
    tmp_path: Path, catalogue: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    """Its numbers are used again, so that comparing them is not enough."""
    catalogue.close()
    (tmp_path / "older.db").write_bytes((tmp_path / "catalogue.db").read_bytes())
    older = Catalogue(f"sqlite:///{tmp_path}/older.db")
    add(catalogue, LARGE, 3000, MADE[0])
    save(SimilarityIndex(catalogue.vectors()), tmp_path / "index", catalogue.id)
    add(older, LARGE, 4000, -MADE[0])
    assert older.ids_by_scope() == catalogue.ids_by_scope()
    agree(restored(tmp_path / "index", older), older)
    assert "is not the catalogue's" in caplog.text


def open_cache(folder: Path) -> ApproximateCache:
    catalogue = Catalogue(f"sqlite:///{folder}/catalogue.db")
    store = LatentStore(str(folder / "latents"), catalogue.id)
    return ApproximateCache(catalogue, store, 10**9, index_file=folder / "index")


def test_the_index_is_saved_once_enough_has_changed(tmp_path: Path) -> None:
    cache, file = open_cache(tmp_path), tmp_path / "index"
    cache.save_index()
    assert not file.exists()  # it is not built
    for i in range(20):
        cache.keep(SMALL, f"prompt {i}", MADE[i], {5: torch.zeros(1)})
    cache.load()
    cache.save_index()
    before = file.stat().st_mtime_ns
    cache.save_index()
    assert file.stat().st_mtime_ns == before
    cache.keep(SMALL, "another prompt", MADE[20], {5: torch.zeros(1)})
    cache.save_index(least=0.1)
    assert file.stat().st_mtime_ns == before
    cache.save_index(least=0.01)
    assert file.stat().st_mtime_ns != before


def lag(cache: ApproximateCache, catalogue: str) -> None:
    """Build the cache's index anew, since the changes that it follows are forgotten."""
    cache._followed = -1
    Catalogue(catalogue).forget_changes(1)
    cache.follow()


def test_an_index_that_was_built_anew_is_saved(tmp_path: Path) -> None:
    cache, file = open_cache(tmp_path), tmp_path / "index"
    for i in range(5):
        cache.keep(SMALL, f"prompt {i}", MADE[i], {5: torch.zeros(1)})
    cache.load()
    cache.remove(prompt="prompt 0")
    cache.save_index()
    before = file.stat().st_mtime_ns
    lag(cache, f"sqlite:///{tmp_path}/catalogue.db")
    cache.save_index()
    assert file.stat().st_mtime_ns != before


def test_an_index_that_was_replaced_while_it_was_saved_counts_as_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, file = open_cache(tmp_path), tmp_path / "index"
    for i in range(5):
        cache.keep(SMALL, f"prompt {i}", MADE[i], {5: torch.zeros(1)})
    cache.load()
    dump = SimilarityIndex.dump

    def replaced(index: SimilarityIndex) -> Iterator[tuple[str, str, int, bytes]]:
        yield from dump(index)
        lag(cache, f"sqlite:///{tmp_path}/catalogue.db")

    with monkeypatch.context() as patch:
        patch.setattr(SimilarityIndex, "dump", replaced)
        cache.save_index()
    before = file.stat().st_mtime_ns
    cache.save_index()
    assert file.stat().st_mtime_ns != before


def test_a_save_that_fails_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, file = open_cache(tmp_path), tmp_path / "index"
    cache.load()
    cache.keep(SMALL, "a red fish", MADE[0], {5: torch.zeros(1)})
    cache.save_index()
    whole = file.read_bytes()
    cache.keep(SMALL, "a blue boat", MADE[1], {5: torch.zeros(1)})

    def full(index: SimilarityIndex) -> Iterator[tuple[str, str, int, bytes]]:
        yield "a scope", "array", 1, b"half"
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(SimilarityIndex, "dump", full)
        with pytest.raises(OSError, match="no space"):
            cache.save_index()
    assert file.read_bytes() == whole
    assert [path.name for path in tmp_path.glob("index*")] == ["index"]
    cache.save_index()
    assert file.read_bytes() != whole
