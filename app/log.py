"""Structured logs: one JSON object per line on standard error, with the request id; a secret never gets out."""

import logging
import re
import sys
from typing import Any

import structlog
from structlog.typing import EventDict, Processor

from app.settings import Settings

# A key shows its prefix only; a password in a URL shows nothing. Applied to the finished line, so that it also covers
# exception texts and the logs of libraries.
_SECRETS = (
    (re.compile(r"\b(ty_[A-Za-z0-9_-]{8})[A-Za-z0-9_-]+"), r"\1…"),
    (re.compile(r"\b(tys_)[A-Za-z0-9_-]+"), r"\1…"),
    (re.compile(r"(://[^/\s:@\"]*:)[^@\s/\"]+@"), r"\1…@"),
)


class _StandardError(logging.Handler):
    """Writes to whatever standard error is at that moment; one that was captured earlier may be long closed."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:  # a broken pipe must not break a request
            self.handleError(record)


def redact(text: str) -> str:
    """Take keys and passwords out of a line."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _render_redacted(renderer: Processor) -> Processor:
    def render(logger: Any, name: str, event: EventDict) -> str:
        return redact(str(renderer(logger, name, event)))

    return render


def configure(settings: Settings) -> None:
    """Send everything that is logged in this process, by us or by libraries, through one pipeline."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if settings.log_format == "json":
        ending: list[Processor] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        ending = [structlog.dev.ConsoleRenderer(colors=False)]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = _StandardError()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta, *ending[:-1], _render_redacted(ending[-1]),
            ],
        )
    )  # fmt: skip
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _StandardError)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(settings.log_level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = name != "uvicorn.access"  # every request is logged once, by us
    logging.getLogger("httpx").setLevel(logging.WARNING)
