"""What `tuneyard doctor --measure` found on this host, and what it says about a plan. Choosing is pure; no timing here.

The memo is one JSON file beside the other caches, with one entry per device. An entry counts only while its fingerprint
(processor or GPU, torch, torchvision) is this host's: after an update of torch or on another machine it says nothing.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

NAME = "tuning.json"  # below the cache that the jobs of a host share
CLEARLY = 1.05  # faster than the table's choice by this much, or the table's choice stays
LONG_RUN = 3.0  # compiling must save this many times what it takes

MemoryFormat = Literal["contiguous", "channels_last"]
Precision = Literal["float32", "bfloat16", "float16"]


class Row(BaseModel):
    """One way to train one network of a family, and how fast it was."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str  # convolutional, mlp, vit
    precision: Precision
    memory_format: MemoryFormat
    threads: int
    compile: bool = False
    compile_seconds: float = 0.0
    samples_per_second: float


class Memo(BaseModel):
    """The rows of one device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    date: str
    fingerprint: dict[str, Any]
    rows: tuple[Row, ...]

    def fastest(self, family: str, **wanted: Any) -> Row | None:
        """Give the fastest row of a family with these values."""
        fitting = [
            row for row in self.rows
            if row.family == family and all(getattr(row, name) == value for name, value in wanted.items())
        ]  # fmt: skip
        return max(fitting, key=lambda row: row.samples_per_second, default=None)

    def precision(self, family: str, threads: int, usual: Precision) -> tuple[Precision, str] | None:
        """Choose a precision; None where this family was not measured on so many threads."""
        best = self.fastest(family, threads=threads, compile=False)
        table = self.fastest(family, threads=threads, compile=False, precision=usual)
        if best is None:
            return None
        chosen = best if table is None or _is_clearly_faster(best, table) else table
        others = {row.precision for row in self.rows if row.family == family} - {chosen.precision}
        beside = [self.fastest(family, threads=threads, compile=False, precision=each) for each in sorted(others)]
        return chosen.precision, self._why(chosen, [row for row in beside if row], "precision")

    def memory_format(
        self, family: str, threads: int, precision: Precision, usual: MemoryFormat
    ) -> tuple[MemoryFormat, str] | None:
        """Choose a memory format for a precision; None where only one was measured."""
        same = {"threads": threads, "compile": False, "precision": precision}
        best, table = self.fastest(family, **same), self.fastest(family, memory_format=usual, **same)
        if best is None or table is None:
            return None
        chosen = best if _is_clearly_faster(best, table) else table
        other: MemoryFormat = "contiguous" if chosen.memory_format == "channels_last" else "channels_last"
        beside = self.fastest(family, memory_format=other, **same)
        return (chosen.memory_format, self._why(chosen, [beside], "memory_format")) if beside else None

    def threads(self, family: str, most: int) -> tuple[int, str] | None:
        """Choose a number of threads within what a job may use; None where that number was not measured."""
        table = self.fastest(family, threads=most, compile=False)
        if table is None:
            return None
        fitting = [row for row in self.rows if row.family == family and row.threads <= most and not row.compile]
        best = max(fitting, key=lambda row: row.samples_per_second)
        chosen = best if _is_clearly_faster(best, table) else table
        counts = sorted({row.threads for row in fitting} - {chosen.threads})
        beside = [self.fastest(family, threads=count, compile=False) for count in counts]
        return chosen.threads, self._why(chosen, [row for row in beside if row], "threads")

    def compile(
        self, family: str, threads: int, precision: Precision, memory_format: MemoryFormat, samples: int
    ) -> tuple[bool, str] | None:
        """Say whether compiling pays for a run over so many samples; None where it was not measured."""
        same = {"threads": threads, "precision": precision, "memory_format": memory_format}
        compiled, plain = self.fastest(family, compile=True, **same), self.fastest(family, compile=False, **same)
        if compiled is None or plain is None:
            return None
        saved = samples / plain.samples_per_second - samples / compiled.samples_per_second
        pays = saved > LONG_RUN * compiled.compile_seconds
        return pays, (
            f"measured on this host on {self.date}: {compiled.samples_per_second:,.0f} samples/s compiled, "
            f"{plain.samples_per_second:,.0f} not; {max(saved, 0):,.0f} s saved for {compiled.compile_seconds:,.0f} s "
            "of compiling"
        )

    def _why(self, chosen: Row, beside: Sequence[Row], field: str) -> str:
        others = ", ".join(f"{row.samples_per_second:,.0f} with {getattr(row, field)}" for row in beside)
        against = f", against {others}" if others else ""
        return f"measured on this host on {self.date}: {chosen.samples_per_second:,.0f} samples/s{against}"


def _is_clearly_faster(row: Row, than: Row) -> bool:
    return row.samples_per_second > CLEARLY * than.samples_per_second


def read(cache: Path, device: str, fingerprint: Mapping[str, Any]) -> Memo | None:
    """Give a device's entry; None where there is none, or one of other hardware or another torch."""
    found = _entries(cache).get(device)
    try:
        memo = Memo.model_validate(found) if found is not None else None
    except ValidationError:
        return None
    return memo if memo is not None and memo.fingerprint == dict(fingerprint) else None


def write(cache: Path, device: str, memo: Memo) -> Path:
    """Put a device's entry beside those of others, all at once; give the path."""
    cache.mkdir(parents=True, exist_ok=True)
    path, half = cache / NAME, cache / f".{NAME}.{os.getpid()}"
    half.write_text(json.dumps({**_entries(cache), device: memo.model_dump(mode="json")}, indent=2) + "\n")
    half.replace(path)
    return path


def _entries(cache: Path) -> dict[str, Any]:
    try:
        found = json.loads((cache / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
