"""The server's log. It never contains users' prompts."""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import Any

from transformers.utils import logging as transformers_logging

from argus.core.errors import traced

log = logging.getLogger(__name__)

POLLS = ("/ready", "/health", "/metrics")


class WithoutMessages(logging.Formatter):
    """Tracebacks without the messages of the errors, since they may quote a prompt."""

    def formatException(
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, ...],
    ) -> str:
        return "" if ei[1] is None else traced(ei[1])


def set_up(level: str) -> None:
    """Log to stderr at `level`; libraries at info at most, some at warning."""
    handler = logging.StreamHandler()
    handler.setFormatter(WithoutMessages("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=max(logging.INFO, _number(level)), handlers=[handler])
    for ours in ("argus", "uvicorn.access"):
        logging.getLogger(ours).setLevel(_number(level))
    for chatty in ("httpx", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").addFilter(_access)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # it warns of every first long prompt


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


def _access(record: logging.LogRecord) -> bool:
    """Log only the path of a request, and polls only at debug level."""
    if isinstance(record.args, tuple) and len(record.args) == 5:
        client, method, target, version, status = record.args
        path = str(target).partition("?")[0]
        record.args = (client, method, path, version, status)
        if path in POLLS:
            record.levelno, record.levelname = logging.DEBUG, "DEBUG"
            return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
    return True


def log_unhandled(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error that no task awaited, without its message, which asyncio's handler would
    print."""
    error = context.get("exception")
    trace = "" if error is None else f"\n{traced(error)}"
    what = context["message"].partition("(")[0]  # asyncio names a callback with its arguments
    log.error("%s%s", what.strip(), trace)
