"""From uploads to datasets: one file per format, one strict reader per container, one way to shards.

Nothing heavy is imported before it is called: pyarrow starts a thread, and a zygote may have but one.
"""

from pathlib import Path

from app.domain.datasets import OnError
from worker.report import Limits, MadeDataset, Order, Reporter, Wish


class Interrupted(Exception):
    """Something else than going on is wanted; nothing was published, and a later run begins again."""

    def __init__(self, wanted: Wish) -> None:
        self.wanted: Wish = wanted
        super().__init__(wanted)


def run(order: Order, reporter: Reporter) -> MadeDataset:
    """Ingest what an order names; its spec has `builtin` or an upload, `on_error`, and the `task` that was asked.

    Returns the dataset with paths relative to scratch. Raises `DataFault`, `UserFault`, `ResourceFault`, and
    `Interrupted` when the supervisor wants something else.
    """
    from worker.ingest import dataset

    return dataset.run(order, reporter)


def ingest_folder(
    path: Path | str,
    scratch: Path | str,
    *,
    task: str | None = None,
    on_error: OnError = "skip",
    limits: Limits | None = None,
    threads: int = 0,
    reporter: Reporter | None = None,
) -> MadeDataset:
    """Ingest a folder or an archive on this machine, without a server.

    The shards lie below `scratch`; here their paths are absolute, so that `facts` can be trained on at once. Raises
    as `run` does.
    """
    from worker.ingest import dataset

    return dataset.ingest_folder(
        Path(path), Path(scratch), task, on_error, limits or dataset.LIMITS, threads, reporter or Reporter()
    )


def ingest_builtin(
    name: str, scratch: Path | str, cache: Path | str, *, threads: int = 0, reporter: Reporter | None = None
) -> MadeDataset:
    """Ingest a standard set without a server, fetched files kept below `cache`; see `ingest_folder`."""
    from worker.ingest import dataset

    return dataset.ingest_builtin(name, Path(scratch), Path(cache), threads, reporter or Reporter())
