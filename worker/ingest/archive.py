"""What every container of files has in common: how it is read, which names it may hold, how it says no.

Nothing is ever extracted by name. A container is an index of regular files and a way to read them by number; a large
member is unpacked under a name of ours.
"""

import re
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from app.domain.errors import DataFault

MAX_NAME_BYTES = 1024
MAX_PART_BYTES = 255
MAX_DEPTH = 32
FLOOR = 2**20  # unpacked bytes below which no ratio is suspicious
LINK = "a link; pack the file itself"
SPAN = 8 * 2**20  # bytes read with one call, and of one chunk in flight

_PLAIN = re.compile(r"(?:[A-Za-z0-9_+(@=,#-][A-Za-z0-9_+()@=,# .-]*/){0,16}[A-Za-z0-9_+(@=,#-][A-Za-z0-9_+()@=,# .-]*")
_DRIVE = re.compile(r"[A-Za-z]:")


class Problem(NamedTuple):
    """A file that cannot be used, by name, with the reason and the correction."""

    name: str
    reason: str


class Refused(NamedTuple):
    """Stands in the place of a file's bytes that cannot be had."""

    reason: str


Bytes = bytes | bytearray | memoryview


class Archive(Protocol):
    """A container of files. `names` and `sizes` (as announced) are in the container's order.

    `refused` holds the entries that were left out, by name.
    """

    names: list[str]
    sizes: "array[int]"
    refused: list[Problem]
    warnings: list[str]

    def read(self, numbers: Sequence[int]) -> "list[Bytes | Refused]":
        """Read whole files; safe to call from several threads. Raises `DataFault` when the container lies."""
        ...

    def head(self, number: int, count: int) -> bytes:
        """Give a file's first bytes; empty when it cannot be read."""
        ...

    def unpack(self, number: int, to: Path) -> None:
        """Write one file to a path of ours, piece by piece. Raises `DataFault`."""
        ...

    def close(self) -> None:
        """Close the file beneath."""
        ...


def hostile(message: str, hint: str | None = None) -> DataFault:
    """Make the fault for an archive that tries to escape, to explode or to deceive; nothing of it is kept."""
    return DataFault(
        message,
        code="hostile_archive",
        hint=hint or "pack the folder again with an ordinary zip or tar",
        phase="unpack",
    )


def damaged(message: str, hint: str = "upload it again") -> DataFault:
    """Make the fault for a container that cannot be read to its end."""
    return DataFault(message, code="damaged_archive", hint=hint, phase="unpack")


def shown(name: str) -> str:
    """Give a name as it may stand in a message: printable, of bounded length."""
    text = name.encode("unicode_escape", "backslashreplace").decode("ascii") if not name.isprintable() else name
    return text if len(text) <= 200 else text[:150] + "…" + text[-40:]


def place(name: str) -> str | Refused:
    """Check a name and give the path, relative and without `./`. Raises `DataFault` when it tries to escape."""
    if len(name) <= MAX_PART_BYTES and _PLAIN.fullmatch(name):
        return name
    if "\0" in name:
        raise hostile(f"the entry {shown(name)!r} has a NUL in its name")
    parts = re.split(r"[/\\]", name)
    if name[:1] in ("/", "\\") or _DRIVE.match(name):
        raise hostile(f"the entry {shown(name)!r} has an absolute path")
    if ".." in parts:
        raise hostile(f"the entry {shown(name)!r} points out of its folder")
    if "\\" in name:
        return Refused("a backslash in its name; pack it with forward slashes")
    while parts and parts[0] == ".":
        parts = parts[1:]
    if not parts or "" in parts or "." in parts:
        return Refused("its path has an empty part")
    try:
        lengths = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:
        return Refused("its name is not valid text")
    if max(lengths) > MAX_PART_BYTES or sum(lengths) + len(parts) > MAX_NAME_BYTES or len(parts) > MAX_DEPTH:
        return Refused(f"its path is longer than {MAX_NAME_BYTES} bytes or {MAX_DEPTH} folders")
    if any(unicodedata.category(character) == "Cc" for character in name):
        return Refused("a control character in its name")
    return unicodedata.normalize("NFC", "/".join(parts))


def refuse_link(name: str, target: str) -> None:
    """Raise when a link points out of its archive; any other link is only left out."""
    if target[:1] in ("/", "\\") or _DRIVE.match(target) or ".." in re.split(r"[/\\]", target):
        raise hostile(f"the entry {shown(name)!r} is a link to {shown(target)!r}, out of its folder")


def special(name: str) -> DataFault:
    """Make the fault for a device, pipe or socket in an archive."""
    return hostile(f"the entry {shown(name)!r} is a device or a pipe")


def doubles(names: Sequence[str]) -> Iterator[int]:
    """Give the numbers of names that came before, in this or another letter case."""
    keys = np.fromiter((hash(name.casefold()) for name in names), np.int64, len(names))
    order = np.argsort(keys, kind="stable")
    repeated = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if not len(repeated):
        return
    suspects = sorted({int(order[at]) for at in repeated} | {int(order[at + 1]) for at in repeated})
    seen: set[str] = set()
    for number in suspects:
        key = names[number].casefold()
        if key in seen:
            yield number
        seen.add(key)
