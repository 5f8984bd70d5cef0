"""Keeps latents as safetensors objects behind fsspec: a local folder, or a URL such as s3://."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import fsspec
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class StoredLatents:
    """Where the latents after K steps are, and what they were when they were written."""

    k: int
    name: str
    sha256: str
    size_bytes: int


class BrokenLatents(Exception):
    """A latents object is missing, truncated or altered."""


class LatentStore:
    """Objects are whole or absent: written aside, renamed, and checked by hash when read.

    `owner` begins the names of this store's objects; what else lies at `url` is left alone.
    """

    def __init__(self, url: str, owner: str) -> None:
        self._files, self._root = fsspec.core.url_to_fs(url)
        self._own = re.compile(rf"{re.escape(owner)}-[0-9a-f]{{32}}-\d+{re.escape(SUFFIX)}(\.new)?")
        self._owner = owner
        self._files.makedirs(self._root, exist_ok=True)

    def put(self, k: int, latents: Tensor) -> StoredLatents:
        """Write latents (1, c, h, w); they can be read once this returns."""
        data = save({"latents": latents.detach().cpu().contiguous()})
        name = f"{self._owner}-{uuid.uuid4().hex}-{k}{SUFFIX}"
        aside = f"{self._root}/{name}.new"
        self._files.pipe_file(aside, data)
        self._files.mv(aside, f"{self._root}/{name}")
        return StoredLatents(k, name, hashlib.sha256(data).hexdigest(), len(data))

    def get(self, stored: StoredLatents) -> Tensor:
        """Read latents back.

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

    def delete(self, names: list[str]) -> None:
        """Delete objects; those that are already gone are no error."""
        for name in names:
            try:
                self._files.rm_file(f"{self._root}/{name}")
            except FileNotFoundError:
                continue

    def written(self) -> Iterator[tuple[str, float]]:
        """Name and time (seconds since 1970) of every own object, unfinished ones included."""
        for path in self._files.ls(self._root, detail=False):
            name = str(path).rsplit("/", 1)[-1]
            if self._own.fullmatch(name) is None:
                continue
            try:
                yield name, self._files.modified(path).timestamp()
            except FileNotFoundError:
                continue  # finished or deleted meanwhile
