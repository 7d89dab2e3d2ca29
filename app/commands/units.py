"""Numbers as people read them: sizes, durations, ages, metric values."""

from datetime import UTC, datetime

_SIZES = ("B", "kB", "MB", "GB", "TB", "PB")

STATUS_STYLES = {
    "succeeded": "green",
    "ready": "green",
    "ok": "green",
    "stopped": "yellow",
    "warning": "yellow",
    "failed": "red",
    "missing": "red",
    "cancelled": "dim",
    "running": "cyan",
    "starting": "cyan",
    "processing": "cyan",
    "paused": "magenta",
}


def size(count: float | None) -> str:
    """Give bytes in decimal units, as disks are sold: `1.2 MB`."""
    if count is None:
        return "-"
    for unit in _SIZES:
        if abs(count) < 999.5 or unit == _SIZES[-1]:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float | None) -> str:
    """Give seconds as `0:07`, `12:30`, `3:05:00`, or `2 d 3 h`."""
    if seconds is None:
        return "-"
    whole = max(round(seconds), 0)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def age(moment: str | None, now: datetime | None = None) -> str:
    """Give how long ago an ISO 8601 moment was: `just now`, `5 min ago`, `3 h ago`, `2026-11-22`."""
    if not moment:
        return "-"
    then = datetime.fromisoformat(moment)
    seconds = ((now or datetime.now(UTC)) - then).total_seconds()
    if seconds < 5:
        return "just now"
    for limit, unit, word in ((60, 1, "s"), (3600, 60, "min"), (48 * 3600, 3600, "h"), (14 * 86400, 86400, "d")):
        if seconds < limit:
            return f"{int(seconds // unit)} {word} ago"
    return then.date().isoformat()


def number(value: float | int | None) -> str:
    """Give a metric with four significant digits, a count with separators, and what is not finite as a dash."""
    if value is None:
        return "-"
    if isinstance(value, int) or (value == int(value) and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.4g}"


def status(word: str) -> str:
    """Give a status in its colour, as rich markup."""
    style = STATUS_STYLES.get(word)
    return f"[{style}]{word}[/]" if style else word
