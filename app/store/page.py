"""Lists by cursor: page 1 and page 10,000 cost the same, because ids sort by age and the cursor enters the index."""

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from sqlalchemy import Boolean, Select, literal
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import InstrumentedAttribute, Session
from sqlalchemy.sql.functions import FunctionElement

Row = TypeVar("Row")


@dataclass(frozen=True)
class Page:
    """Which part of a list is wanted: at most `limit` rows beyond the id `after`."""

    limit: int = 20
    after: str | None = None
    order: Literal["asc", "desc"] = "desc"


def read(
    session: Session, query: Select[Row], id_column: InstrumentedAttribute[str], page: Page
) -> tuple[list[Row], bool]:
    """Read one page of `query`; the flag says whether more rows follow."""
    if page.after is not None:
        query = query.where(id_column < page.after if page.order == "desc" else id_column > page.after)
    query = query.order_by(id_column.desc() if page.order == "desc" else id_column.asc()).limit(page.limit + 1)
    rows = list(session.scalars(query))
    return rows[: page.limit], len(rows) > page.limit


def with_metadata(query: Select[Row], column: InstrumentedAttribute[Any], wanted: dict[str, str]) -> Select[Row]:
    """Keep the rows whose metadata holds all of these pairs."""
    for key, value in wanted.items():
        query = query.where(_HoldsPair(column, literal(key), literal(value)))
    return query


class _HoldsPair(FunctionElement[bool]):
    """Whether a JSON column holds a pair at its top level."""

    type = Boolean()
    inherit_cache = True
    name = "holds_pair"


@compiles(_HoldsPair, "sqlite")
def _sqlite(element: Any, compiler: Any, **options: Any) -> str:
    # A JSON path is compared with the text as it was written, in which every letter beyond ASCII is an escape.
    column, key, value = (compiler.process(each, **options) for each in element.clauses)
    return f"EXISTS (SELECT 1 FROM json_each({column}) AS pair WHERE pair.key = {key} AND pair.value = {value})"  # noqa: S608


@compiles(_HoldsPair, "postgresql")
def _postgresql(element: Any, compiler: Any, **options: Any) -> str:
    column, key, value = (compiler.process(each, **options) for each in element.clauses)
    return f"(({column} ->> {key}) = {value})"
