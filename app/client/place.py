"""Where the server is and which key opens it: given, from the environment, or from the home of a one-machine stack."""

import os
from pathlib import Path

from app.client.errors import Misplaced


def home_folder(home: str | Path | None = None) -> Path:
    """Give the home in force: the argument, `TUNEYARD_HOME`, or `~/.tuneyard`."""
    return Path(home or os.environ.get("TUNEYARD_HOME") or "~/.tuneyard").expanduser().absolute()


def server_url(base_url: str | None = None, home: str | Path | None = None) -> str:
    """Give the server's address: the argument, `TUNEYARD_URL`, the stack that last ran on the home, or port 8000."""
    if url := base_url or os.environ.get("TUNEYARD_URL"):
        return url.rstrip("/")
    noted = home_folder(home) / "url"
    if noted.is_file() and (url := noted.read_text().strip()):
        return url
    return f"http://127.0.0.1:{os.environ.get('TUNEYARD_PORT') or 8000}"


def server_key(key: str | None = None, home: str | Path | None = None) -> str:
    """Give the key: the argument, `TUNEYARD_KEY`, or the file `key` in the home.

    Raises:
        Misplaced: there is none.
    """
    if found := key or os.environ.get("TUNEYARD_KEY"):
        return found
    path = home_folder(home) / "key"
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        raise Misplaced(
            f"No key: give --key, set TUNEYARD_KEY, or start `tuneyard up`, which writes the first one to {path}."
        ) from None
    except OSError as error:
        raise Misplaced(f"The key file {path} cannot be read: {error.strerror}.") from error
