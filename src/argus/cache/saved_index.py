"""Saves the similarity index to a file, and restores it at the next start."""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import mmap
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from argus.cache.catalogue import Catalogue
from argus.cache.index import SimilarityIndex
from argus.files import written_aside

log = logging.getLogger(__name__)

FORMAT = 2  # another one when the layout changes, or how graphs are built
LAST = len('{"sha256": ""}\n') + 64  # bytes of the last line
READ_BYTES = 1 << 20
CHECKED = 64  # newest entries whose vectors must be the catalogue's


def save(index: SimilarityIndex, file: Path, catalogue: str) -> None:
    """Save an index of the catalogue with this id; the file is whole or as it was.

    A line of JSON tells of the format, one before each scope's content of that, and the last one of
    the SHA-256 of everything before it. A scope's graph is copied with the interpreter locked, for
    about 2.5 s with a million entries; it is written while searches go on. Raises OSError.
    """
    digest = hashlib.sha256()
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(file) as aside, aside.open("wb") as out:

        def write(data: bytes) -> None:
            digest.update(data)
            out.write(data)

        write(_line({"format": FORMAT, "catalogue": catalogue}))
        for scope, kind, count, data in index.dump():
            write(_line({"scope": scope, "kind": kind, "entries": count, "bytes": len(data)}))
            write(data)
        out.write(_line({"sha256": digest.hexdigest()}))


def restored(file: Path, catalogue: Catalogue) -> SimilarityIndex:
    """The index of a catalogue: from the file, with what the catalogue has more and without what it
    has no longer; rebuilt if there is no file, or if it is broken or another catalogue's."""
    try:
        index = _read(file, catalogue.id)
        _catch_up(index, catalogue)
    except FileNotFoundError:
        return SimilarityIndex(catalogue.vectors())
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        log.warning("The index saved in %s is ignored, and rebuilt: %s", file, error)
        return SimilarityIndex(catalogue.vectors())
    return index


def _catch_up(index: SimilarityIndex, catalogue: Catalogue) -> None:
    """Add what the catalogue has more, and remove what it has no longer.

    Raises ValueError if the newest entries that both have differ, as they do when the catalogue was
    set back to an older copy of itself and has used numbers again since.
    """
    saved, there = len(index), catalogue.ids_by_scope()
    missing: set[int] = set()
    newest: list[int] = []
    for scope in {*index.scopes(), *there}:
        known, right = index.entries(scope), there.get(scope, set())
        for entry in known - right:
            index.remove(scope, entry)
        missing |= right - known
        newest = heapq.nlargest(CHECKED, chain(newest, known & right))
    for entry, scope, vector in catalogue.vectors_of(newest):
        if not index.holds(scope, entry, vector):
            raise ValueError(f"its entry {entry} is not the catalogue's")
    log.info(
        "Restored the index of %d entries; %d are gone, %d are new",
        saved, saved - len(index), len(missing),
    )  # fmt: skip
    index.add_all(catalogue.vectors_of(missing))


def _read(file: Path, catalogue: str) -> SimilarityIndex:
    """Raises OSError, and ValueError, LookupError, TypeError or RuntimeError for a file that is not
    a whole index of this catalogue."""
    index = SimilarityIndex()
    with file.open("rb") as opened:
        if json.loads(opened.readline(READ_BYTES)) != {"format": FORMAT, "catalogue": catalogue}:
            raise ValueError("it has another format or is another catalogue's")
        begin, end = opened.tell(), file.stat().st_size - LAST
        _check(opened, end)
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            data.seek(begin)
            while data.tell() < end:
                part = json.loads(data.readline())
                begin = data.tell()
                with memoryview(data) as view, view[begin : begin + part["bytes"]] as content:
                    index.restore(part["scope"], part["kind"], part["entries"], content)
                data.seek(begin + part["bytes"])
    return index


def _check(opened: BinaryIO, end: int) -> None:
    """Raises ValueError unless the hash that follows is that of the first `end` bytes, and OSError
    if they cannot be read, which in a mapped file would end the process."""
    digest = hashlib.sha256()
    opened.seek(0)
    while some := opened.read(max(0, min(end - opened.tell(), READ_BYTES))):
        digest.update(some)
    if opened.read() != _line({"sha256": digest.hexdigest()}):
        raise ValueError("it is not what was written")


def _line(values: dict[str, object]) -> bytes:
    return json.dumps(values).encode() + b"\n"
