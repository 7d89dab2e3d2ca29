"""A folder on this machine, read like an archive: `tuneyard run --data FOLDER`."""

import os
import stat
from array import array
from collections.abc import Sequence
from pathlib import Path

from app.domain.errors import DataFault
from worker.ingest.archive import LINK, Bytes, Problem, Refused, place, shown
from worker.report import Limits


class Directory:
    """A folder whose files are listed once; links are named and not followed. See `archive.Archive`."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._root, self._limits = path, limits
        self.names: list[str] = []
        self.sizes: array[int] = array("q")
        self.refused: list[Problem] = []
        self.warnings: list[str] = []
        self._paths: dict[int, str] = {}  # where the disk spells a name in another Unicode form
        self._list(path, "")

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def read(self, numbers: Sequence[int]) -> list[Bytes | Refused]:
        """Read whole files."""
        return [self._read(number, self._limits.max_entry_bytes) for number in numbers]

    def head(self, number: int, count: int) -> bytes:
        """Give a file's first bytes."""
        data = self._read(number, count)
        return b"" if isinstance(data, Refused) else bytes(data)

    def unpack(self, number: int, to: Path) -> None:
        """Link one file to a path of ours."""
        os.symlink((self._root / self._path(number)).absolute(), to)

    def _path(self, number: int) -> str:
        return self._paths.get(number, self.names[number])

    def _read(self, number: int, count: int) -> Bytes | Refused:
        try:
            with open(self._root / self._path(number), "rb", buffering=0) as file:
                return file.read(min(count, os.fstat(file.fileno()).st_size))
        except OSError as error:
            return Refused(f"cannot be read: {error.strerror}")

    def _list(self, folder: Path, prefix: str) -> None:
        """List files; `prefix` is the folder's path below the root, as the disk spells it."""
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise DataFault(f"the folder {shown(prefix) or folder} cannot be read: {error.strerror}") from error
        for entry in found:
            name = place(prefix + entry.name)
            if entry.is_dir(follow_symlinks=False) and not isinstance(name, Refused):
                self._list(Path(entry.path), prefix + entry.name + "/")
                continue
            status = entry.stat(follow_symlinks=False)
            if entry.is_symlink():
                reason = LINK
            elif isinstance(name, Refused):
                reason = name.reason
            elif not stat.S_ISREG(status.st_mode):
                reason = "a device or a pipe"
            elif status.st_size > self._limits.max_entry_bytes:
                reason = f"{status.st_size} bytes; a file may have {self._limits.max_entry_bytes}"
            else:
                if name != prefix + entry.name:
                    self._paths[len(self.names)] = prefix + entry.name
                self.names.append(name)
                self.sizes.append(status.st_size)
                continue
            self.refused.append(Problem(shown(prefix + entry.name), reason))
