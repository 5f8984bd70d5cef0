"""Stores latents as safetensors objects with fsspec: in a local folder, or at a URL (s3://).

What a URL's store needs to know, such as an endpoint and keys, comes from the environment and from
fsspec's and the driver's own configuration files, never from a URL.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import fsspec
import fsspec.asyn
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from argus.cache.disk_tier import DiskTier

SUFFIX = ".safetensors"
ROOM = 8  # largest objects so far that a probe writes; with less room, writing soon fails again
LEAST_ROOM_BYTES = 65536
S3 = {"s3", "s3a"}
# stores that show an object whole or not at all, and where a rename would be a copy
OBJECT_STORES = S3 | {"gs", "gcs", "az", "abfs"}
CALL_LIMIT_S = 30.0  # for one object; botocore sets no limit while it waits to send one
# One request each, since not all S3 stores take lists of them as botocore sends them; fewer than
# botocore has connections (10), so that reads do not wait.
DELETED_AT_ONCE = 8
# of botocore, in seconds: a read from an endpoint that hangs ends within 15
S3_LIMITS = {
    "connect_timeout": 2.0,
    "read_timeout": 5.0,
    "retries": {"mode": "standard", "total_max_attempts": 2},
}


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
    """Objects are whole or absent, and checked by hash when read. In an object store a write is
    whole by itself; elsewhere they are written aside and renamed.

    `owner` is the prefix of this store's objects; other objects at `url` are left alone. `disk`
    holds those that were written or read lately. What drivers raise becomes OSError. Threads may
    share one store.
    """

    def __init__(self, url: str, owner: str, disk: DiskTier | None = None) -> None:
        """Raises OSError, and ValueError or ImportError for a URL that no driver is there for. An
        object store is not asked anything yet."""
        self._files, self._root = _opened(url)
        self._own = re.compile(rf"{re.escape(owner)}-[0-9a-f]{{32}}-\d+{re.escape(SUFFIX)}(\.new)?")
        self._owner, self._disk = owner, disk
        self._largest = 0
        self._objects = _protocol(url) in OBJECT_STORES
        if not self._objects:
            with _os_errors():
                self._files.makedirs(self._root, exist_ok=True)

    @property
    def tiered(self) -> bool:
        """Whether `near` may find anything."""
        return self._disk is not None

    def put(self, k: int, latents: Tensor) -> StoredLatents:
        """Write latents (1, c, h, w). They can be read once this returns; nothing of them is left
        if it raises."""
        data = save({"latents": latents.detach().cpu().contiguous()})
        self._largest = max(self._largest, len(data))
        name = self._new_name(k)
        aside = name if self._objects else f"{name}.new"
        try:
            with _os_errors():
                self._call("pipe_file", aside, data)
                if aside != name:
                    self._files.mv(f"{self._root}/{aside}", f"{self._root}/{name}")
        except BaseException:
            with suppress(Exception):  # deleting may fail for the same reason
                self.delete([name] if self._objects else [aside, name])
            raise
        if self._disk is not None:
            self._disk.put(name, data)
        return StoredLatents(k, name, hashlib.sha256(data).hexdigest(), len(data))

    def get(self, stored: StoredLatents) -> Tensor:
        """Read latents (1, c, h, w) from the store.

        Raises BrokenLatents unless they are what was written, OSError if the store cannot be read.
        """
        try:
            with _os_errors():
                data = self._call("cat_file", stored.name)
        except FileNotFoundError as error:
            if _without_bucket(error):
                raise OSError(f"there is no bucket of {self._root}") from error
            raise BrokenLatents(f"{stored.name} is gone") from error
        latents = _checked(stored, data)
        if self._disk is not None:
            self._disk.put(stored.name, data)
        return latents

    def near(self, stored: StoredLatents) -> Tensor | None:
        """Read latents (1, c, h, w) from the disk tier; None if it does not hold them."""
        data = None if self._disk is None else self._disk.get(stored.name)
        if self._disk is None or data is None:
            return None
        try:
            return _checked(stored, data)
        except BrokenLatents:
            self._disk.delete(stored.name)
            return None

    def probe(self) -> None:
        """Write and delete as much as a few latents. Raises OSError if that fails."""
        name = f"{self._new_name(0)}.new"
        try:
            size = max(ROOM * self._largest, LEAST_ROOM_BYTES)
            with _os_errors():
                self._call("pipe_file", name, bytes(size))
        finally:
            self.delete([name])

    def _call(self, method: str, name: str, *given: bytes) -> Any:
        """Call a method of the file system on an object. Raises TimeoutError after `CALL_LIMIT_S`
        if the file system is asynchronous, as those of object stores are."""
        path = f"{self._root}/{name}"
        if not self._files.async_impl:
            return getattr(self._files, method)(path, *given)
        call = getattr(self._files, f"_{method}")
        return fsspec.asyn.sync(self._files.loop, call, path, *given, timeout=CALL_LIMIT_S)

    def _new_name(self, k: int) -> str:
        return f"{self._owner}-{uuid.uuid4().hex}-{k}{SUFFIX}"

    def delete(self, names: list[str]) -> None:
        """Delete objects, in an object store several at a time; objects that do not exist are
        ignored."""
        if self._disk is not None:
            for name in names:
                self._disk.delete(name)
        for begin in range(0, len(names), DELETED_AT_ONCE):
            self._delete(names[begin : begin + DELETED_AT_ONCE])

    def _delete(self, names: list[str]) -> None:
        paths = [f"{self._root}/{name}" for name in names]
        if not self._files.async_impl:
            for path in paths:
                with suppress(FileNotFoundError), _os_errors():
                    self._files.rm_file(path)
            return

        async def together() -> list[object]:
            calls = (self._files._rm_file(path) for path in paths)
            return list(await asyncio.gather(*calls, return_exceptions=True))

        with _os_errors():
            for error in fsspec.asyn.sync(self._files.loop, together, timeout=CALL_LIMIT_S):
                if isinstance(error, Exception) and not isinstance(error, FileNotFoundError):
                    raise error

    def keep_near(self, names: Collection[str]) -> None:
        """Delete all but these objects from the disk tier."""
        if self._disk is not None:
            self._disk.keep_only(names)

    def written(self, known: Collection[str] = ()) -> Iterator[tuple[str, float]]:
        """Name and time (seconds since 1970) of every object of this store that is not in `known`,
        unfinished ones included."""
        for path, about in self._listed():
            name = path.rsplit("/", 1)[-1]
            if name in known or self._own.fullmatch(name) is None:
                continue
            try:
                with _os_errors():
                    at = about.get("LastModified") or self._files.modified(path)
            except FileNotFoundError:
                continue  # renamed or deleted meanwhile
            yield name, at.timestamp()

    def _listed(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Path of every object, with what the listing of an object store says of it."""
        with _os_errors():
            if not self._objects:
                for path in self._files.ls(self._root, detail=False):
                    yield str(path), {}
                return
            for digit in "0123456789abcdef":  # in parts, since there may be millions
                prefix = f"{self._owner}-{digit}"
                yield from self._files.find(self._root, prefix=prefix, detail=True).items()


def is_local(url: str) -> bool:
    """Whether a URL, or a path, is a folder of this machine."""
    return _protocol(url) in ("file", "local")


def _protocol(url: str) -> str:
    return str(fsspec.utils.get_protocol(url))


def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    if _protocol(url) not in S3:
        files, root = fsspec.core.url_to_fs(url)
        return files, root
    given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    files, root = fsspec.core.url_to_fs(
        url,
        use_listings_cache=False,
        max_concurrency=1,  # more would ask for an object's size before each read
        config_kwargs=S3_LIMITS | given,
    )
    files.retries = 1  # s3fs would repeat what botocore has repeated
    return files, root


@contextmanager
def _os_errors() -> Iterator[None]:
    """Raise what a driver raises as OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _without_bucket(error: FileNotFoundError) -> bool:
    """Whether an object is not found because its whole bucket is not."""
    response = getattr(error.__cause__, "response", None) or {}
    return bool(response.get("Error", {}).get("Code") == "NoSuchBucket")


def _checked(stored: StoredLatents, data: bytes) -> Tensor:
    """The latents (1, c, h, w) in an object's data. Raises BrokenLatents unless it is what was
    written."""
    if hashlib.sha256(data).hexdigest() != stored.sha256:
        raise BrokenLatents(
            f"{stored.name} is not what was written: "
            f"{len(data)} bytes, {stored.size_bytes} expected"
        )
    try:
        return load(data)["latents"]
    except (SafetensorError, KeyError) as error:
        raise BrokenLatents(f"{stored.name} holds no latents: {error}") from error
