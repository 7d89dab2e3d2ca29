"""Patience with lists and with slow objects: every page of a list, every change until an end."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from app.client.connection import Connection
from app.client.objects import Item, Page

_HOLD = 25  # seconds a long poll is held; below the idle limits of common proxies


def each(page: Callable[..., Page[Item]], **filters: Any) -> Iterator[Item]:
    """Follow the cursors from the first page to the last."""
    after: str | None = None
    while True:
        got = page(limit=100, after=after, **filters)
        yield from got["data"]
        after = got["last_id"]
        if not got["has_more"]:
            return


def until(
    connection: Connection,
    path: str,
    done: Callable[[Any], bool],
    *,
    timeout: float | None = None,
    on_change: Callable[[Any], None] | None = None,
) -> Any:
    """Long-poll an object until `done`, or until `timeout` seconds passed, and give its last state."""
    deadline = None if timeout is None else time.monotonic() + timeout
    item = connection.get(path)
    while True:
        if on_change:
            on_change(item)
        hold = _HOLD if deadline is None else min(_HOLD, deadline - time.monotonic())
        if done(item) or hold <= 0:
            return item
        item = connection.get(path, wait=round(hold, 2), timeout=hold + 15)
