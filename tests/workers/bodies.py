"""Bodies of worker processes that fail in one way each, in the place of `run_worker`.

A model's source says what happens when it is loaded, and then when it is given tasks:

    fits             it is loaded, and every task is answered with a black picture
    short            there is no memory for it
    broken           it cannot be loaded at all
    kills            the process dies while loading it
    garbled          it is loaded, and a task is answered with bytes that are no message
    slow             it is loaded; the first task is answered after a second, the others never
    count:FILE:A,B…  as the n-th of these when it is loaded for the n-th time (then as the last)
"""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

from PIL import Image

from argus.core.errors import ModelError, NotEnoughMemory
from argus.workers.messages import Begun, Done, Held, Keep, Load, Ready, Stop, Task, Unusable
from argus.workers.worker import Finished, Model

PICTURE = Finished(
    Image.new("RGB", (8, 8)), timings_ms={"encode": 1.0, "denoise": 1.0, "decode": 1.0}
)


def run(pipe: Connection, model: Model) -> None:
    wanted: Model | None = model
    while wanted is not None:
        kind = _kind(wanted.source)
        if kind == "kills":
            os._exit(1)
        if kind == "short":
            pipe.send(Unusable(wanted, NotEnoughMemory("no room")))
            return
        if kind == "broken":
            pipe.send(Unusable(wanted, ModelError("no such model")))
            return
        pipe.send(Ready(wanted, (wanted,)))
        wanted = _serve(pipe, kind)


def _kind(source: str) -> str:
    if not source.startswith("count:"):
        return source
    _, file, kinds = source.split(":")
    past = len(Path(file).read_bytes()) if Path(file).exists() else 0
    with Path(file).open("ab") as count:
        count.write(b".")
    each = kinds.split(",")
    return each[min(past, len(each) - 1)]


def _serve(pipe: Connection, kind: str) -> Model | None:
    answered = 0
    while True:
        request = pipe.recv()
        if isinstance(request, Load):
            return request.model
        if isinstance(request, Stop):
            return None
        if isinstance(request, Keep):
            pipe.send(Held(()))
        if not isinstance(request, Task):
            continue
        pipe.send(Begun((request.number,)))
        if kind == "garbled":
            pipe.send_bytes(b"nonsense")
            time.sleep(600)
        if kind == "slow":
            time.sleep(600 if answered else 1.0)
        answered += 1
        pipe.send(Done(request.number, PICTURE, 0.0))


def run_lying(pipe: Connection, model: Model) -> None:
    """Answers every task twice, and others that nobody sent."""
    pipe.send(Ready(model, (model,)))
    while True:
        request = pipe.recv()
        if isinstance(request, Keep):
            pipe.send(Held(()))
        if isinstance(request, Task):
            for number in (request.number, request.number, request.number + 1000, -1):
                pipe.send(Done(number, PICTURE, 0.0))
            pipe.send(Ready(Model("another"), ()))


def run_nonsense(pipe: Connection, model: Model) -> None:
    """Is ready, and answers a task with bytes that are no message."""
    pipe.send(Ready(model, (model,)))
    _serve(pipe, "garbled")
