"""The server's log. It never contains users' prompts."""

from __future__ import annotations

import asyncio
import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from transformers.utils import logging as transformers_logging

from argus.core.errors import traced

log = logging.getLogger(__name__)

Format = Literal["text", "json"]

# The id of the request on whose way a line is logged; empty for what belongs to none.
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")


class WithoutMessages(logging.Formatter):
    """Tracebacks without the messages of the errors, since they may quote a prompt; a request's id
    at the end of its lines."""

    def formatException(
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, ...],
    ) -> str:
        return "" if ei[1] is None else traced(ei[1])

    def formatMessage(self, record: logging.LogRecord) -> str:
        of = REQUEST_ID.get()
        return super().formatMessage(record) + (f" [{of}]" if of else "")


class Json(WithoutMessages):
    """A JSON object a line: time (ISO 8601, UTC), level, logger, message, and request_id and
    exception where there are some."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if REQUEST_ID.get():
            line["request_id"] = REQUEST_ID.get()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(level: str, format: Format = "text") -> None:
    """Log to stderr at `level`; libraries at info at most, some at warning, and lines of access at
    debug."""
    handler = logging.StreamHandler()
    text = WithoutMessages("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(text if format == "text" else Json())
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
    """Log a line of access at debug level, with the path alone of what was asked for."""
    if isinstance(record.args, tuple) and len(record.args) == 5:
        client, method, target, version, status = record.args
        record.args = (client, method, str(target).partition("?")[0], version, status)
    record.levelno, record.levelname = logging.DEBUG, "DEBUG"
    return logging.getLogger(record.name).isEnabledFor(logging.DEBUG)


def log_unhandled(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error that no task awaited, without its message, which asyncio's handler would
    print."""
    error = context.get("exception")
    trace = "" if error is None else f"\n{traced(error)}"
    what = context["message"].partition("(")[0]  # asyncio names a callback with its arguments
    log.error("%s%s", what.strip(), trace)
