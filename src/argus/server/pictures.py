"""Pictures as files, served for a limited time under URLs that cannot be guessed."""

from __future__ import annotations

import asyncio
import io
import re
import secrets
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import ZipFile

from PIL import Image, ImageOps

from argus.core.machine import cores
from argus.files import try_writing, written_aside
from argus.server.health import StorageHealth
from argus.server.threads import Threads

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
PICTURES = "pictures"
THREADS = 8
WRITE_LIMIT_S = 2.0  # after that the picture is sent in the answer
READ_LIMIT_S = 10.0
ROOM = 4  # largest pictures so far that a probe writes; with less room, writing soon fails again
LEAST_ROOM_BYTES = 65536
ENCODERS = max(2, cores() // 2)
PIXEL_S, LEARNING = 1e-7, 0.1  # seconds a pixel before any was measured; weight of a measurement
LARGE = 256 * 256  # pixels, from which pictures are compressed fast: they hardly get larger
_FAST_PNG = {"compress_level": 1, "compress_type": zlib.Z_RLE}
_NAME = re.compile(r"[\w-]{32}\.(png|jpeg|webp)")


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at a size in pixels; of another shape, what fits of its middle."""
    if image.size == size:
        return image
    larger = size[0] >= image.width and size[1] >= image.height
    kernel = Image.Resampling.BICUBIC if larger else Image.Resampling.LANCZOS
    return ImageOps.fit(image, size, kernel)


def encode_picture(
    image: Image.Image, output_format: str, size: tuple[int, int] | None = None
) -> bytes:
    """A picture as a file's content, resized to `size` in pixels; `output_format` is png, jpeg or
    webp."""
    buffer = io.BytesIO()
    of_size = resized(image, size or image.size)
    large = of_size.width * of_size.height > LARGE
    fast = _FAST_PNG if output_format == "png" and large else {}
    of_size.save(buffer, output_format.upper(), **fast)
    return buffer.getvalue()


class Encoding:
    """Encodes pictures in threads of its own, and knows how long that takes. For use from one
    asyncio loop, until `close`."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(ENCODERS, "encode-pictures")
        self._pixel_s = dict.fromkeys(MEDIA_TYPES, PIXEL_S)

    def expected_s(self, output_format: str, size: tuple[int, int]) -> float:
        """Seconds that a picture of such a size and format should take."""
        return size[0] * size[1] * self._pixel_s[output_format]

    async def encode(self, image: Image.Image, output_format: str, size: tuple[int, int]) -> bytes:
        """As `encode_picture`."""

        def timed() -> tuple[bytes, float]:
            begun = time.perf_counter()
            return encode_picture(image, output_format, size), time.perf_counter() - begun

        file, seconds = await asyncio.get_running_loop().run_in_executor(self._threads, timed)
        pixels = size[0] * size[1]
        if pixels > LARGE:  # of smaller ones hardly any time is due to their pixels
            known = self._pixel_s[output_format]
            self._pixel_s[output_format] = known + LEARNING * (seconds / pixels - known)
        return file

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def zipped(files: Sequence[bytes], output_format: str) -> bytes:
    """Pictures' files as one zip file."""
    buffer = io.BytesIO()
    with ZipFile(buffer, "w") as archive:  # pictures are compressed already
        for number, file in enumerate(files):
            archive.writestr(f"image_{number}.{output_format}", file)
    return buffer.getvalue()


class PictureStore:
    """A folder of pictures, each of which can be read for `ttl_s` seconds."""

    def __init__(self, folder: Path, ttl_s: float, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._ttl_s, self._clock = folder, ttl_s, clock
        self._largest = 0
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes, output_format: str) -> str:
        """Save a picture's file and return its name. Raises OSError."""
        name = f"{secrets.token_urlsafe(24)}.{output_format}"
        self._largest = max(self._largest, len(data))
        with written_aside(self._folder / name) as aside:
            aside.write_bytes(data)
        return name

    def probe(self) -> None:
        """Raises OSError unless a few pictures can be saved."""
        try_writing(self._folder / "probe", max(ROOM * self._largest, LEAST_ROOM_BYTES))

    def get(self, name: str) -> bytes | None:
        """A picture's file, or None if it does not exist or has expired."""
        if _NAME.fullmatch(name) is None:
            return None
        path = self._folder / name
        try:
            return None if self._expired(path) else path.read_bytes()
        except FileNotFoundError:
            return None

    def sweep(self) -> None:
        """Delete expired pictures. Raises the first OSError, after all have been tried."""
        failed: OSError | None = None
        for path in self._folder.iterdir():
            try:
                if self._expired(path):
                    path.unlink()
            except FileNotFoundError:
                continue
            except OSError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def _expired(self, path: Path) -> bool:
        return self._clock() - path.stat().st_mtime > self._ttl_s


class Pictures:
    """A picture store for asyncio: no request waits for a disk that is full or hangs."""

    def __init__(self, store: PictureStore, health: StorageHealth) -> None:
        self._store, self._health = store, health
        self._writing = Threads("pictures-write", THREADS)
        self._reading = Threads("pictures-read", THREADS)
        self._sweeping = Threads("pictures-sweep", 1)
        health.add(PICTURES, store.probe)

    async def put(self, data: bytes, output_format: str) -> str | None:
        """Save a picture's file and return its name, or None if it cannot be saved now."""
        if not self._health.works(PICTURES):
            return None
        try:
            return await self._writing.run(
                lambda: self._store.put(data, output_format), WRITE_LIMIT_S
            )
        except Exception as error:
            self._health.failed(PICTURES, error)
            return None

    async def get(self, name: str) -> bytes | None:
        """A picture's file, or None if it does not exist or has expired.

        Raises OSError or TooManyHang if it cannot be read.
        """
        return await self._reading.run(lambda: self._store.get(name), READ_LIMIT_S)

    async def sweep(self) -> None:
        """Delete expired pictures. Raises OSError; waits as long as the store hangs."""
        await self._sweeping.run(self._store.sweep)
