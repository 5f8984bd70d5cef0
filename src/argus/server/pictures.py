"""Pictures as files, and for a while under URLs nobody can guess."""

from __future__ import annotations

import io
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_NAME = re.compile(r"[\w-]{32}\.(png|jpeg|webp)")


def encode_picture(image: Image.Image, output_format: str) -> bytes:
    """The file of a picture; `output_format` is png, jpeg or webp."""
    buffer = io.BytesIO()
    image.save(buffer, output_format.upper())
    return buffer.getvalue()


class PictureStore:
    """A folder of pictures, each of which can be had for `ttl_s` seconds."""

    def __init__(self, folder: Path, ttl_s: float, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._ttl_s, self._clock = folder, ttl_s, clock
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes, output_format: str) -> str:
        """Save a picture's file and give its name."""
        name = f"{secrets.token_urlsafe(24)}.{output_format}"
        aside = self._folder / f"{name}.new"
        aside.write_bytes(data)
        aside.rename(self._folder / name)
        return name

    def get(self, name: str) -> bytes | None:
        """A picture's file, or None if there is none or its time is over."""
        if _NAME.fullmatch(name) is None:
            return None
        path = self._folder / name
        try:
            return None if self._expired(path) else path.read_bytes()
        except FileNotFoundError:
            return None

    def sweep(self) -> None:
        """Delete what has expired."""
        for path in self._folder.iterdir():
            try:
                if self._expired(path):
                    path.unlink()
            except FileNotFoundError:
                continue

    def _expired(self, path: Path) -> bool:
        return self._clock() - path.stat().st_mtime > self._ttl_s
