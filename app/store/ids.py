"""Typed, sortable ids: a prefix, 48 bits of milliseconds and 80 random bits, in 26 characters of Crockford base 32."""

import secrets
import threading
import time
from typing import Literal

Prefix = Literal["prj", "key", "ses", "ds", "upl", "job", "evt", "ckpt", "mdl", "wrk"]

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_lock = threading.Lock()
_last = 0


def new_id(prefix: Prefix) -> str:
    """Make an id that sorts after every earlier one of this process."""
    global _last
    with _lock:
        value = time.time_ns() // 1_000_000 << 80 | secrets.randbits(80)
        if value <= _last:  # the same millisecond, or a clock set back: stay in order
            value = _last + 1 + secrets.randbits(32)
        _last = value
    return f"{prefix}_" + "".join(_ALPHABET[value >> shift & 31] for shift in range(125, -1, -5))
