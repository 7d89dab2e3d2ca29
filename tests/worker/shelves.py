"""Shelves as tests use them: entries made, used and counted."""

import os
import time
from pathlib import Path

from worker.data.shelf import Entry, Shelf


def entry(shelf: Shelf, key: str, size: int) -> Path:
    """Have an entry made or found, and use it no longer."""
    return used(shelf, key, size).folder


def used(shelf: Shelf, key: str, size: int) -> Entry:
    return shelf.get(key, {"x": size}, lambda _: None)


def weight(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*"))


def aged(folder: Path, seconds: float) -> None:
    os.utime(folder, times=(time.time() - seconds, time.time() - seconds))
