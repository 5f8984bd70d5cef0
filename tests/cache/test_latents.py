"""A latent store does the same in a local folder and in a bucket of an object store."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.registry import _registry as drivers

from argus.cache import latents
from argus.cache.cache import ApproximateCache
from argus.cache.catalogue import Catalogue
from argus.cache.disk_tier import DiskTier
from argus.cache.latents import BrokenLatents, LatentStore, StoredLatents
from argus.cache.scope import Scope
from argus.config import Settings
from argus.core.errors import BadRequest
from argus.server.storage import open_cache
from tests.s3 import S3Endpoint

SCOPE = Scope("alice", "tiny", "ddim", 64, 64, 30, 3.0, "")
LATENTS = torch.arange(64.0).reshape(1, 4, 4, 4)


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "latents")
    return f"s3://{request.getfixturevalue('bucket')}/some/prefix"


def write(url: str, name: str, data: bytes) -> None:
    """Write an object beside a store, as somebody else would."""
    files, root = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{root}/{name}", data)


def test_latents_come_back_as_they_went_in(url: str) -> None:
    stored = LatentStore(url, "one").put(5, LATENTS)
    assert torch.equal(LatentStore(url, "one").get(stored), LATENTS)


def test_two_servers_share_one_store(url: str) -> None:
    one, other = LatentStore(url, "same"), LatentStore(url, "same")
    before = {name for name, _ in other.written()}
    stored = one.put(5, LATENTS)
    assert torch.equal(other.get(stored), LATENTS)
    assert {name for name, _ in other.written()} - before == {stored.name}
    other.delete([stored.name])
    with pytest.raises(BrokenLatents, match="gone"):
        one.get(stored)
    assert list(one.written()) == []


@pytest.mark.parametrize("half", [True, False])
def test_latents_that_are_not_what_was_written_are_broken(url: str, half: bool) -> None:
    store = LatentStore(url, "one")
    stored = store.put(5, LATENTS)
    write(url, stored.name, bytes(stored.size_bytes // 2 if half else stored.size_bytes))
    with pytest.raises(BrokenLatents, match="not what was written"):
        store.get(stored)


def test_what_is_not_there_can_be_deleted(url: str) -> None:
    store = LatentStore(url, "one")
    stored = store.put(5, LATENTS)
    store.delete([stored.name, "one-nothing.safetensors", stored.name])
    assert list(store.written()) == []


def test_a_probe_leaves_nothing(url: str) -> None:
    store = LatentStore(url, "one")
    store.probe()
    assert list(store.written()) == []


def test_a_store_lists_its_own_objects_with_their_times(url: str) -> None:
    store = LatentStore(url, "one")
    stored = [store.put(5, LATENTS) for _ in range(3)]
    unfinished = f"{stored[0].name}.new"
    write(url, unfinished, b"half")
    write(url, "notes.safetensors", b"somebody's own")
    LatentStore(url, "another").put(5, LATENTS)
    found = dict(store.written(known={stored[0].name}))
    assert found.keys() == {stored[1].name, stored[2].name, unfinished}
    assert all(abs(at - time.time()) < 300 for at in found.values())


def opened(url: str, folder: Path, limit_bytes: int = 10**9) -> ApproximateCache:
    catalogue = Catalogue(f"sqlite:///{folder}/catalogue.db")
    return ApproximateCache(catalogue, LatentStore(url, catalogue.id), limit_bytes)


def test_a_cache_keeps_its_limit_and_sweeps_what_a_crash_left(url: str, tmp_path: Path) -> None:
    cache = opened(url, tmp_path, limit_bytes=1500)
    for i in range(6):
        cache.keep(SCOPE, f"{i} fish", np.array([1.0, i], np.float32), {5: LATENTS})
    catalogue = Catalogue(f"sqlite:///{tmp_path}/catalogue.db")
    store = LatentStore(url, catalogue.id)
    orphan = store.put(5, LATENTS)
    assert {name for name, _ in store.written()} == {orphan.name, *catalogue.names()}
    ApproximateCache(catalogue, store, 10**9, clock=lambda: 4e9).sweep()
    assert {name for name, _ in store.written()} == catalogue.names()
    assert sum(entry.size_bytes for entry in cache.entries()) <= 1500


def test_a_prompt_of_another_server_is_fetched(url: str, tmp_path: Path) -> None:
    vector = np.array([1.0, 0.0], np.float32)
    one, other = opened(url, tmp_path), opened(url, tmp_path)
    one.keep(SCOPE, "a red fish", vector, {5: LATENTS})
    (found,) = other.find(SCOPE, vector)
    fetched = other.fetch(found, 5)
    assert fetched is not None
    assert torch.equal(fetched, LATENTS)


def test_a_bucket_that_is_missing_breaks_no_latents(s3: S3Endpoint) -> None:
    """They would leave the catalogue: a name in the settings may be misspelt for a while."""
    store = LatentStore("s3://no-such-bucket/latents", "one")
    with pytest.raises(OSError, match="no bucket"):
        store.get(StoredLatents(5, "one-x.safetensors", "", 1))
    with pytest.raises(OSError, match="bucket"):
        store.put(5, LATENTS)
    with pytest.raises(OSError, match="bucket"):
        store.probe()


def test_an_endpoint_that_refuses_connections_is_an_oserror(
    s3: S3Endpoint, bucket: str, new_clients: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = LatentStore(f"s3://{bucket}", "one").put(5, LATENTS)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    store = LatentStore(f"s3://{bucket}", "one")
    for call in (
        lambda: store.get(stored),
        lambda: store.put(5, LATENTS),
        lambda: store.delete([stored.name]),
        lambda: list(store.written()),
    ):
        with pytest.raises(OSError, match="EndpointConnectionError"):
            call()


def test_an_endpoint_that_never_answers_is_an_oserror(
    s3: S3Endpoint, new_clients: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents, "CALL_LIMIT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = LatentStore("s3://bucket/prefix", "one")
        for call in (
            lambda: store.get(StoredLatents(5, "one-x.safetensors", "", 1)),
            lambda: store.put(5, LATENTS),
            lambda: store.delete(["one-x.safetensors"]),
            store.probe,
        ):
            with pytest.raises(TimeoutError):
                call()


def test_a_missing_driver_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(drivers, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(BadRequest, match=r"pip install 'argus-t2i\[s3\]'"):
        open_cache(Settings(data=tmp_path, cache_latents="s3://bucket/prefix"))
    with pytest.raises(BadRequest, match="nowhere"):
        open_cache(Settings(data=tmp_path, cache_latents="nowhere://bucket/prefix"))


def test_a_server_has_a_disk_tier_in_front_of_a_bucket_only(s3: S3Endpoint, tmp_path: Path) -> None:
    far = Settings(data=tmp_path, cache_latents="s3://bucket/prefix")
    assert open_cache(far, serving=True).tiered
    assert not open_cache(far).tiered
    assert not open_cache(far.model_copy(update={"cache_disk": 0}), serving=True).tiered
    assert not open_cache(Settings(data=tmp_path), serving=True).tiered
    near = Settings(data=tmp_path, cache_latents=f"file://{tmp_path}/elsewhere")
    assert not open_cache(near, serving=True).tiered


def test_what_was_written_or_read_lately_is_near(url: str, tmp_path: Path) -> None:
    tiers = [DiskTier(tmp_path / name, 10**6) for name in ("one", "other")]
    one, other = (LatentStore(url, "same", tier) for tier in tiers)
    stored = one.put(5, LATENTS)
    assert other.near(stored) is None
    other.get(stored)
    for store, tier in ((one, tiers[0]), (other, tiers[1])):
        tier.settle()
        near = store.near(stored)
        assert near is not None
        assert torch.equal(near, LATENTS)
    assert LatentStore(url, "same").near(stored) is None
    one.delete([stored.name])
    assert one.near(stored) is None


def test_every_server_removes_from_its_disk_what_another_process_removed(
    url: str, tmp_path: Path
) -> None:
    tier = DiskTier(tmp_path / "near", 10**6)
    catalogue = Catalogue(f"sqlite:///{tmp_path}/catalogue.db")
    cache = ApproximateCache(catalogue, LatentStore(url, catalogue.id, tier), 10**9)
    for prompt, x in (("a red fish", 1.0), ("a blue boat", -1.0)):
        cache.keep(SCOPE, prompt, np.array([x, 0.0], np.float32), {5: LATENTS})
    tier.settle()
    opened(url, tmp_path).remove(prompt="a red fish")
    assert len(list((tmp_path / "near").iterdir())) == 2
    cache.sweep_near()
    assert {path.name for path in (tmp_path / "near").iterdir()} == catalogue.names()


def test_broken_latents_on_the_disk_are_fetched_from_the_store(url: str, tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "near", 10**6)
    store = LatentStore(url, "one", tier)
    stored = store.put(5, LATENTS)
    tier.settle()
    (file,) = (tmp_path / "near").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert store.near(stored) is None
    assert not file.exists()
    assert torch.equal(store.get(stored), LATENTS)
    tier.settle()
    assert store.near(stored) is not None
    assert store.near(replace(stored, sha256="another")) is None


def test_many_objects_are_deleted_and_others_stay(url: str) -> None:
    store = LatentStore(url, "one")
    stored = [store.put(5, LATENTS) for _ in range(2 * latents.DELETED_AT_ONCE + 3)]
    store.delete([one.name for one in stored[:-1]])
    assert [name for name, _ in store.written()] == [stored[-1].name]


def test_objects_of_a_bucket_are_deleted_several_at_a_time(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LatentStore(f"s3://{bucket}", "one")
    stored = [store.put(5, LATENTS) for _ in range(latents.DELETED_AT_ONCE)]
    files = fsspec.get_filesystem_class("s3")
    delete, begun, all_begun = files._rm_file, [], asyncio.Event()

    async def together(files: object, path: str, **more: object) -> None:
        begun.append(path)
        if len(begun) == len(stored):
            all_begun.set()
        await all_begun.wait()
        await delete(files, path, **more)

    monkeypatch.setattr(files, "_rm_file", together)
    store.delete([one.name for one in stored])
    assert list(store.written()) == []
