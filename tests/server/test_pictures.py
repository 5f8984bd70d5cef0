"""Pictures behind URLs."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from argus.cache.latents import LatentStore
from argus.config import Settings
from argus.server import app
from argus.server.pictures import Encoding, PictureStore, encode_picture
from tests.server.running import running, wait_until


def test_expired_pictures_are_deleted_while_the_latent_store_hangs(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing, released = threading.Event(), threading.Event()

    def hang(*_: object) -> list[tuple[str, float]]:
        listing.set()
        released.wait()
        return []

    monkeypatch.setattr(LatentStore, "written", hang)
    monkeypatch.setattr(app, "SWEEP_EVERY_S", 0.1)
    settings = Settings(family=str(tiny_family), data=tmp_path, workers=1, url_ttl_s=0.5)
    with running(settings) as server:
        wait_until(listing.is_set)
        assert "url" in server.generate(response_format="url").json()["data"][0]
        wait_until(lambda: not list((tmp_path / "pictures").iterdir()))
    released.set()


def test_a_picture_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    store = PictureStore(tmp_path / "pictures", ttl_s=60)
    name = store.put(b"a picture", "png")
    store.probe()
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == [name]
    (tmp_path / "pictures" / name).unlink()
    (tmp_path / "pictures").rmdir()
    (tmp_path / "pictures").write_text("in the way")
    for write in (lambda: store.put(b"a picture", "png"), store.probe):
        with pytest.raises(OSError, match="Not a directory"):
            write()


def test_a_sweep_goes_on_past_what_cannot_be_deleted(tmp_path: Path) -> None:
    store = PictureStore(tmp_path, ttl_s=60, clock=lambda: time.time() + 61)
    names = [store.put(b"a picture", "png") for _ in range(5)]
    for name in names[::2]:
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=r"Is a directory|not permitted"):
        store.sweep()
    assert {path.name for path in tmp_path.iterdir()} == set(names[::2])


def test_how_long_large_pictures_take_to_encode_is_learnt() -> None:
    async def use() -> None:
        encoding = Encoding()
        small, large = (64, 64), (1024, 1024)
        image = Image.effect_noise(large, 80).convert("RGB")
        before = encoding.expected_s("webp", large)
        await encoding.encode(image, "webp", small)
        assert encoding.expected_s("webp", large) == before
        took_s = list[float]()
        for _ in range(4):
            begun = time.perf_counter()
            await encoding.encode(image, "webp", large)
            took_s.append(time.perf_counter() - begun)
        assert before < encoding.expected_s("webp", large) < 2 * max(took_s)
        assert encoding.expected_s("png", large) == before
        assert encoding.expected_s("webp", small) < encoding.expected_s("webp", large) / 200
        encoding.close()

    asyncio.run(use())


def test_a_large_picture_is_as_it_was_painted_however_fast_it_is_compressed() -> None:
    for side in (64, 512):
        image = Image.effect_noise((side, side), 80).convert("RGB")
        read = Image.open(io.BytesIO(encode_picture(image, "png")))
        assert read.convert("RGB").tobytes() == image.tobytes()
