"""API keys: random, stored as hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from pathlib import Path

from argus.core.errors import BadRequest

log = logging.getLogger(__name__)

EVERYONE = "everyone"  # the namespace of a server without keys
BURST = "(burst)"  # in the usage and the cache, for the server's own load; no key has this name
SHARED = "shared"  # the namespace of all keys when the operator shares the cache
_LINE = re.compile(r"(?P<name>[\w.@-]{1,64})\s+(?P<hash>[0-9a-f]{64})")


def read_keys(file: Path) -> dict[str, str]:
    """The hash of every key by name. Raises BadRequest for a file of another form."""
    if not file.is_file():
        raise BadRequest(
            f"There is no API key file {file.absolute()}: make one with `argus key NAME`."
        )
    keys: dict[str, str] = {}
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise BadRequest(f"Line {number} of {file} is not a name and a SHA-256 in hex.")
        if match["name"] in (*keys, EVERYONE, SHARED):
            raise BadRequest(f"Line {number} of {file}: the name {match['name']} is taken.")
        keys[match["name"]] = match["hash"]
    return keys


def add_key(file: Path, name: str) -> str:
    """Append a new key to `file` and return it; only its hash is stored.

    Raises BadRequest for a name that is taken or has other characters than letters, digits, ._@-.
    """
    if _LINE.fullmatch(f"{name} {'0' * 64}") is None:
        raise BadRequest(f"The name {name!r} must be 1 to 64 letters, digits or ._@- characters.")
    if name in (EVERYONE, SHARED):
        raise BadRequest(f"The name {name} is reserved: take another.")
    if file.is_file() and name in read_keys(file):
        raise BadRequest(f"{file} already has a key named {name}: delete its line first.")
    key = f"argus-{secrets.token_urlsafe(32)}"
    before = file.read_text() if file.is_file() else ""
    with file.open("a") as lines:
        lines.write("\n" if before and not before.endswith("\n") else "")
        lines.write(f"{name} {_hash(key)}\n")
    file.chmod(0o600)
    return key


def owner_of(key: str, keys: dict[str, str]) -> str | None:
    """The name of a key, or None if it is not among `keys`. Takes the same time either way."""
    found, digest = None, _hash(key)
    for name, known in keys.items():
        if hmac.compare_digest(digest, known):
            found = name
    return found


class KeyRing:
    """The keys of a file, read again when it changes. Raises BadRequest for a wrong file."""

    def __init__(self, file: Path) -> None:
        self._file, self._keys = file, read_keys(file)
        self._changed_at = file.stat().st_mtime_ns

    def owner_of(self, key: str) -> str | None:
        """The name of a key, or None if it is not in the file."""
        try:
            changed_at = self._file.stat().st_mtime_ns
            if changed_at != self._changed_at:
                self._keys, self._changed_at = read_keys(self._file), changed_at
        except (OSError, BadRequest) as error:
            log.warning("The old API keys stay in force: %s", error)
        return owner_of(key, self._keys)


def _hash(key: str) -> str:
    """SHA-256 is enough: the keys are 32 random bytes, too many to try."""
    return hashlib.sha256(key.encode()).hexdigest()
