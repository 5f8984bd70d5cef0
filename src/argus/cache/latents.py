"""Stores latents as safetensors objects with fsspec: in a local folder, or at a URL (s3://)."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass

import fsspec
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

SUFFIX = ".safetensors"
ROOM = 8  # largest objects so far that a probe writes; with less room, writing soon fails again
LEAST_ROOM_BYTES = 65536


@dataclass(frozen=True)
class StoredLatents:
    """The object of the latents after K steps: its name, and its hash and size as written."""

    k: int
    name: str
    sha256: str
    size_bytes: int


class BrokenLatents(Exception):
    """A latents object is missing, truncated or altered."""


class LatentStore:
    """Objects are whole or absent: written aside, renamed, and checked by hash when read.

    `owner` is the prefix of this store's objects; other objects at `url` are left alone.
    """

    def __init__(self, url: str, owner: str) -> None:
        self._files, self._root = fsspec.core.url_to_fs(url)
        self._own = re.compile(rf"{re.escape(owner)}-[0-9a-f]{{32}}-\d+{re.escape(SUFFIX)}(\.new)?")
        self._owner = owner
        self._largest = 0
        self._files.makedirs(self._root, exist_ok=True)

    def put(self, k: int, latents: Tensor) -> StoredLatents:
        """Write latents (1, c, h, w). They can be read once this returns; nothing of them is left
        if it raises."""
        data = save({"latents": latents.detach().cpu().contiguous()})
        self._largest = max(self._largest, len(data))
        name = self._new_name(k)
        aside = f"{name}.new"
        try:
            self._files.pipe_file(f"{self._root}/{aside}", data)
            self._files.mv(f"{self._root}/{aside}", f"{self._root}/{name}")
        except BaseException:
            with suppress(Exception):  # deleting may fail for the same reason
                self.delete([aside, name])
            raise
        return StoredLatents(k, name, hashlib.sha256(data).hexdigest(), len(data))

    def get(self, stored: StoredLatents) -> Tensor:
        """Read latents (1, c, h, w).

        Raises BrokenLatents unless they are what was written, OSError if the store cannot be read.
        """
        try:
            data = self._files.cat_file(f"{self._root}/{stored.name}")
        except FileNotFoundError as error:
            raise BrokenLatents(f"{stored.name} is gone") from error
        if hashlib.sha256(data).hexdigest() != stored.sha256:
            raise BrokenLatents(
                f"{stored.name} is not what was written: "
                f"{len(data)} bytes, {stored.size_bytes} expected"
            )
        try:
            return load(data)["latents"]
        except (SafetensorError, KeyError) as error:
            raise BrokenLatents(f"{stored.name} holds no latents: {error}") from error

    def probe(self) -> None:
        """Write and delete as much as a few latents. Raises OSError, or the file system's own
        error, if that fails."""
        name = f"{self._new_name(0)}.new"
        try:
            size = max(ROOM * self._largest, LEAST_ROOM_BYTES)
            self._files.pipe_file(f"{self._root}/{name}", bytes(size))
        finally:
            self.delete([name])

    def _new_name(self, k: int) -> str:
        return f"{self._owner}-{uuid.uuid4().hex}-{k}{SUFFIX}"

    def delete(self, names: list[str]) -> None:
        """Delete objects; objects that do not exist are ignored."""
        for name in names:
            try:
                self._files.rm_file(f"{self._root}/{name}")
            except FileNotFoundError:
                continue

    def written(self, known: Collection[str] = ()) -> Iterator[tuple[str, float]]:
        """Name and time (seconds since 1970) of every object of this store that is not in `known`,
        unfinished ones included."""
        for path in self._files.ls(self._root, detail=False):
            name = str(path).rsplit("/", 1)[-1]
            if name in known or self._own.fullmatch(name) is None:
                continue
            try:
                yield name, self._files.modified(path).timestamp()
            except FileNotFoundError:
                continue  # renamed or deleted meanwhile
