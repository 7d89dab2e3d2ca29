"""Checkpoints: the whole resumable state of a run in one safetensors file, complete and synced before it has its name.

The tensors are grouped by prefix (`model.`, `optimizer.`, …); everything else is one JSON text under the metadata key
`state`, with sorted keys and neither time nor id in it, so equal states are equal files. More than one metadata key
would not do: safetensors writes them in no fixed order.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from app.domain.errors import ResourceFault, SystemFault
from worker.disk import is_full, sync
from worker.report import Reporter, Saved

FORMAT = 1
KEEP = 2  # newest ones that stay in scratch, beside the best


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds: tensors by name, and the JSON state."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Give the tensors of one group, by their names within it."""
        return {name.removeprefix(f"{prefix}."): t for name, t in self.tensors.items() if name.startswith(f"{prefix}.")}


class Checkpoints:
    """The checkpoints of one attempt, in its scratch folder."""

    def __init__(self, folder: Path, report: Reporter, *, newest: Path | None = None) -> None:
        self._folder, self._report, self._newest = folder, report, newest
        self._kept: list[Path] = []
        self._best: Path | None = None
        self._best_step: int | None = None

    @property
    def newest(self) -> Path | None:
        """Where a run goes on from."""
        return self._newest

    def load(self) -> Contents | None:
        """Read the checkpoint to go on from, if there is one.

        Raises:
            SystemFault: it cannot be read.
        """
        return read(self._newest) if self._newest is not None else None

    def save(
        self, contents: Contents, *, step: int, epoch: int, metrics: Mapping[str, float | None], best_step: int | None
    ) -> None:
        """Write one, tell the supervisor, and remove those that nobody needs any more: not the last two, nor the best.

        The best is the one of `best_step`. Where that step was never saved there is none.

        Raises:
            ResourceFault: the disk is full.
        """
        path = self._folder / f"checkpoint-{step:09d}.safetensors"
        write(path, contents)
        self._newest = self._hold(path)
        self._report.send(Saved(file=path.name, step=step, epoch=epoch, metrics=dict(metrics), best_step=best_step))
        # The supervisor may have moved a file away by now, so a missing one is no surprise.
        self._kept = [*(kept for kept in self._kept if kept != path), path]
        previous, known = self._best, self._best_step
        if best_step is not None and best_step != known:
            self._best, self._best_step = (path if best_step == step else None), best_step
        gone = [*self._kept[:-KEEP], *([previous] if previous else [])]
        self._kept = self._kept[-KEEP:]
        for old in gone:
            if old not in self._kept and old != self._best:
                old.unlink(missing_ok=True)

    def _hold(self, path: Path) -> Path:
        """Keep the newest under a second name: the supervisor takes files away, and this run may need to start over."""
        held, link = self._folder / ".newest.safetensors", self._folder / ".newest.partial"
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
        except OSError:  # this file system has no hard links
            shutil.copyfile(path, link)
        link.replace(held)
        return held


def write(path: Path, contents: Contents) -> None:
    """Write a checkpoint so that `path` either is complete on disk or does not exist.

    Raises:
        ResourceFault: the disk is full.
    """
    state = json.dumps({"format": FORMAT, **contents.state}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        save_file(_separate(contents.tensors), temporary, metadata={"state": state})
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if is_full(error):
            raise ResourceFault(
                f"The disk is full: a checkpoint of {size_bytes(contents.tensors) / 1e6:.0f} MB could not be written.",
                code="disk_full", hint="Free space on the worker, then /retry from the last checkpoint.",
            ) from error  # fmt: skip
        raise SystemFault(f"The checkpoint could not be written: {error}", code="checkpoint_unwritable") from error


def read(path: Path) -> Contents:
    """Read a checkpoint.

    Raises:
        SystemFault: it is missing, damaged, or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            state = json.loads(metadata["state"])
            if state.pop("format") != FORMAT:
                raise ValueError("it was written by another version")
            return Contents({name: file.get_tensor(name) for name in file.keys()}, state)  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise SystemFault(f"The checkpoint {path.name} cannot be read: {error}", code="checkpoint_damaged") from error


def size_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Count the bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give contiguous CPU tensors that share no memory: safetensors refuses two names for one storage."""
    seen: set[int] = set()
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        if plain.untyped_storage().data_ptr() in seen or plain.untyped_storage().nbytes() != plain.nbytes:
            plain = plain.clone(memory_format=torch.contiguous_format)
        seen.add(plain.untyped_storage().data_ptr())
        made[name] = plain
    return made
