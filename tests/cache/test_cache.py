from __future__ import annotations

import logging
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from argus.cache.cache import ApproximateCache, Neighbour
from argus.cache.catalogue import Catalogue
from argus.cache.index import Vector
from argus.cache.latents import LatentStore, StoredLatents
from argus.cache.scope import Scope

SCOPE = Scope("alice", "tiny", "ddim", 64, 64, 30, 3.0, "")


class Clock:
    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        self.now += 1
        return self.now


def open_cache(folder: Path, limit_bytes: int = 10**9) -> ApproximateCache:
    catalogue = Catalogue(f"sqlite:///{folder}/catalogue.db")
    return ApproximateCache(
        catalogue, LatentStore(str(folder / "latents"), catalogue.id), limit_bytes, Clock()
    )


def vector(*values: float) -> Vector:
    return np.array([*values, 0.0, 0.0, 0.0][:4], np.float32)


def latents(*skips: int, seed: int = 0) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(1, 4, 8, 8, generator=generator) for k in skips}


def nearest(cache: ApproximateCache, scope: Scope, query: Vector) -> Neighbour | None:
    return next(iter(cache.find(scope, query)), None)


def test_the_nearest_prompt_is_found_with_its_similarity(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.keep(SCOPE, "a red fish", vector(1, 0), latents(5, 10))
    cache.keep(SCOPE, "a blue boat", vector(0, 1), latents(5))
    found = nearest(cache, SCOPE, vector(2, 1))
    assert found is not None
    assert found.prompt == "a red fish"
    assert found.skips == (5, 10)
    assert found.similarity == pytest.approx(2 / 5**0.5, abs=2e-3)


def test_several_neighbours_come_nearest_first(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    for x in (3, 1, 2):
        cache.keep(SCOPE, f"{x} fish", vector(x, 1), latents(5))
    found = cache.find(SCOPE, vector(1, 0), count=2)
    assert [one.prompt for one in found] == ["3 fish", "2 fish"]
    assert len(cache.find(SCOPE, vector(1, 0), count=9)) == 3


def test_latents_come_back_as_they_went_in_after_a_restart(tmp_path: Path) -> None:
    kept = latents(5, 10)
    open_cache(tmp_path).keep(SCOPE, "a red fish", vector(1), kept)
    cache = open_cache(tmp_path)
    found = nearest(cache, SCOPE, vector(1))
    assert found is not None
    for k, expected in kept.items():
        fetched = cache.fetch(found, k)
        assert fetched is not None
        assert torch.equal(fetched, expected)
    assert cache.fetch(found, 7) is None


@pytest.mark.parametrize(
    "other",
    [
        replace(SCOPE, namespace="bob"),
        replace(SCOPE, model="huge"),
        replace(SCOPE, sampler="euler"),
        replace(SCOPE, width=32),
        replace(SCOPE, height=32),
        replace(SCOPE, steps=20),
        replace(SCOPE, guidance=4.0),
        replace(SCOPE, negative_prompt="blur"),
    ],
)
def test_entries_match_within_their_scope_only(tmp_path: Path, other: Scope) -> None:
    cache = open_cache(tmp_path)
    cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    assert nearest(cache, other, vector(1)) is None


def test_a_prompt_is_stored_once_a_scope(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    assert cache.keep(SCOPE, "a red fish", vector(1), latents(5)) is not None
    assert cache.keep(SCOPE, "a red fish", vector(1), latents(5)) is None
    assert len(cache) == 1


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("how", ["missing", "truncated", "altered"])
def test_broken_latents_are_dropped_and_logged_once(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache(tmp_path)
    cache.keep(SCOPE, "a red fish", vector(1), latents(5, 10))
    found = nearest(cache, SCOPE, vector(1))
    assert found is not None
    for path in (tmp_path / "latents").glob("*-5.safetensors"):
        damage(path, how)
    with caplog.at_level(logging.WARNING):
        assert cache.fetch(found, 5) is None
        assert cache.fetch(found, 5) is None
    assert len(caplog.records) == 1
    again = nearest(cache, SCOPE, vector(1))
    assert again is not None
    assert again.skips == (10,)
    assert cache.fetch(again, 10) is not None


def test_an_entry_without_latents_is_gone(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    found = nearest(cache, SCOPE, vector(1))
    assert found is not None
    for path in (tmp_path / "latents").iterdir():
        path.unlink()
    assert cache.fetch(found, 5) is None
    assert nearest(cache, SCOPE, vector(1)) is None
    assert cache.size_bytes == 0


def test_the_least_used_times_steps_saved_goes_first(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.keep(SCOPE, "a red fish", vector(1, 0), latents(5, 20))
    one = cache.size_bytes // 2
    found = nearest(cache, SCOPE, vector(1, 0))
    assert found is not None
    for _ in range(5):
        cache.fetch(found, 5)  # 6 uses × 5 steps is worth more than 1 × 20
    small = open_cache(tmp_path, limit_bytes=int(3.2 * one))
    small.keep(SCOPE, "a blue boat", vector(0, 1), latents(25, 30))
    red, blue = nearest(small, SCOPE, vector(1, 0)), nearest(small, SCOPE, vector(0, 1))
    assert red is not None and red.skips == (5,)
    assert blue is not None and blue.skips == (25, 30)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.integers(0, 30), st.sets(st.integers(1, 29), min_size=1, max_size=4))))
def test_the_limit_holds_and_index_catalogue_and_objects_agree(
    tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, set[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    cache = open_cache(folder, limit_bytes=6000)
    for i, (prompt, skips) in enumerate(writes):
        cache.keep(SCOPE, f"prompt {prompt}", vector(1, prompt / 30), latents(*skips, seed=i))
        assert cache.size_bytes <= 6000
    entries = cache.entries()
    assert len(cache) == len(entries)
    objects = list((folder / "latents").iterdir())
    assert len(objects) == sum(len(entry.skips) for entry in entries)
    assert sum(path.stat().st_size for path in objects) == cache.size_bytes


def test_entries_are_removed_by_id_prompt_and_namespace(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    bob = replace(SCOPE, namespace="bob")
    first = cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    cache.keep(SCOPE, "a blue boat", vector(0, 1), latents(5))
    cache.keep(bob, "a blue boat", vector(0, 1), latents(5))
    cache.keep(bob, "a green cup", vector(0, 0, 1), latents(5))
    assert cache.remove(entry=first) == 1
    assert nearest(cache, SCOPE, vector(1)) is not None  # the boat, far away
    assert cache.remove(prompt="a blue boat") == 2
    assert nearest(cache, SCOPE, vector(1)) is None
    assert cache.remove(namespace="bob") == 1
    assert cache.remove() == 0
    assert not list((tmp_path / "latents").iterdir())


def test_what_another_process_removed_is_not_found(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    open_cache(tmp_path).remove()
    assert nearest(cache, SCOPE, vector(1)) is None


WRITER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_cache import SCOPE, latents, open_cache, vector
cache = open_cache(Path(sys.argv[1]))
number = len(cache)
while True:
    number += 1
    cache.keep(SCOPE, f"prompt {number}", vector(1, number / 1e4), latents(5, 10, seed=number))
    print(number, flush=True)
"""


def test_killing_in_the_middle_of_writes_tears_nothing(tmp_path: Path) -> None:
    told = 0
    for rounds in (3, 8, 5):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        for _ in range(rounds):
            told = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    cache = open_cache(tmp_path)
    assert len(cache) >= told
    for entry in cache.entries():
        number = int(entry.prompt.split()[1])
        found = nearest(cache, SCOPE, vector(1, number / 1e4))
        assert found is not None
        assert entry.skips == (5, 10)
    for number in range(1, told + 1):
        stored = cache.stored(SCOPE, f"prompt {number}")
        assert stored is not None
        expected = latents(5, 10, seed=number)
        found = nearest(cache, SCOPE, vector(1, number / 1e4))
        assert found is not None
        own = replace(found, entry=stored.id)
        for k in (5, 10):
            fetched = cache.fetch(own, k)
            assert fetched is not None
            assert torch.equal(fetched, expected[k])


def test_a_sweep_removes_what_a_crash_left_and_nothing_else(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    catalogue = Catalogue(f"sqlite:///{tmp_path}/catalogue.db")
    store = LatentStore(str(tmp_path / "latents"), catalogue.id)
    orphan = store.put(5, latents(5)[5])
    folder = tmp_path / "latents"
    unfinished = f"{orphan.name.replace('-5.', '-6.')}.new"
    (folder / unfinished).write_bytes(b"half")
    LatentStore(str(folder), "another").put(5, latents(5)[5])
    (folder / "notes.safetensors").write_bytes(b"somebody's own")
    (folder / "more").mkdir()
    before = {path.name for path in folder.iterdir()}
    ApproximateCache(catalogue, store, 10**9).sweep()
    assert {path.name for path in folder.iterdir()} == before  # all too young
    ApproximateCache(catalogue, store, 10**9, clock=lambda: 4e9).sweep()
    assert {path.name for path in folder.iterdir()} == before - {orphan.name, unfinished}


def test_a_prompt_gets_the_latents_it_lacks(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    first = cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    assert cache.keep(SCOPE, "a red fish", vector(1), latents(5)) is None
    assert cache.keep(SCOPE, "a red fish", vector(1), latents(5, 10)) == first
    (entry,) = cache.entries()
    assert entry.skips == (5, 10)
    assert len(cache) == 1


def test_much_that_another_process_removed_is_forgotten_at_once(tmp_path: Path) -> None:
    cache, other = open_cache(tmp_path), open_cache(tmp_path)
    kept = cache.keep(SCOPE, "a red fish", vector(0, 1), latents(5))
    for i in range(30):
        cache.keep(SCOPE, f"blue boat {i}", vector(1, i / 1e4), latents(5))
    for i in range(30):
        other.remove(prompt=f"blue boat {i}")
    found = nearest(cache, SCOPE, vector(1))
    assert found is not None
    assert found.entry == kept
    assert len(cache) == 1


class FailingStore(LatentStore):
    """A store that is out of reach for reading, and full after one write."""

    writes_left = 1

    def get(self, stored: StoredLatents) -> torch.Tensor:
        raise TimeoutError("the store does not answer")

    def put(self, k: int, latents: torch.Tensor) -> StoredLatents:
        if not self.writes_left:
            raise OSError("no space left")
        self.writes_left -= 1
        return super().put(k, latents)


def test_a_store_out_of_reach_loses_nothing(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    catalogue = Catalogue(f"sqlite:///{tmp_path}/catalogue.db")
    failing = FailingStore(str(tmp_path / "latents"), catalogue.id)
    unlucky = ApproximateCache(catalogue, failing, 10**9)
    found = nearest(unlucky, SCOPE, vector(1))
    assert found is not None
    with pytest.raises(TimeoutError):
        unlucky.fetch(found, 5)
    with pytest.raises(TimeoutError):
        unlucky.probe()
    with pytest.raises(OSError, match="no space"):
        unlucky.keep(SCOPE, "a blue boat", vector(0, 1), latents(5, 10))
    assert len(list((tmp_path / "latents").iterdir())) == 1  # what was written is gone again
    assert cache.fetch(found, 5) is not None


def test_a_probe_reads_what_is_there_and_changes_nothing(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.probe()  # an empty cache is no reason to doubt the store
    cache.keep(SCOPE, "a red fish", vector(1), latents(5))
    before = cache.stats()
    cache.probe()
    (written,) = (tmp_path / "latents").iterdir()
    written.unlink()
    cache.probe()  # a store that says what it does not have answers
    assert cache.stats() == before
