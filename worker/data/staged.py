"""Shards as they were staged for a run: the bytes that ingest wrote, for as long as they are read."""

import hashlib
import os
from typing import NoReturn

from app.domain.datasets import Shard
from app.domain.errors import SystemFault


class Staged:
    """One shard on local disk, which nobody may change while a run reads it."""

    def __init__(self, shard: Shard, dataset: str) -> None:
        assert shard.path is not None
        self.path = shard.path
        self._shard, self._name = shard, f"{shard.split}-{shard.index:05d}.arrow of dataset {dataset}"
        self._seen: tuple[int, int, int] | None = None

    def check(self) -> None:
        """Take the file's hash when it was touched since the last look; costs a system call when it was not.

        Raises:
            SystemFault: it is gone, or holds other bytes; another attempt fetches it anew.
        """
        try:
            status = os.stat(self.path)
            seen = (status.st_ino, status.st_size, status.st_mtime_ns)
            if seen == self._seen:
                return
            if status.st_size != self._shard.bytes:
                self._refuse(f"it has {status.st_size} bytes instead of {self._shard.bytes}")
            with open(self.path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != self._shard.sha256:
                    self._refuse("its bytes are not those that were uploaded")
        except OSError as error:
            self._refuse(f"it cannot be read ({error.strerror})")
        self._seen = seen

    def _refuse(self, why: str) -> NoReturn:
        raise SystemFault(
            f"{self._name} changed on the worker's disk: {why}.", code="dataset_changed",
            hint=f"Look at the disk that holds {self.path}.",
        )  # fmt: skip
