"""The database's own clock, so that leases do not depend on any host's idea of the time."""

from typing import Any

from sqlalchemy import Double
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement


class Now(FunctionElement[float]):
    """Seconds since the epoch, UTC, with fractions, at the moment the statement runs."""

    type = Double()
    inherit_cache = True
    name = "now"


@compiles(Now, "sqlite")
def _sqlite(_element: Now, _compiler: Any, **_: Any) -> str:
    # SQLite 3.40 answers NULL to unixepoch('subsec'): a lease that never ends.
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(Now, "postgresql")
def _postgresql(_element: Now, _compiler: Any, **_: Any) -> str:
    return "extract(epoch from clock_timestamp())"
