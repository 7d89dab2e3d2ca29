"""Reading a `Range` header."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from app.http.download import asked_range

pytestmark = pytest.mark.unit


@given(st.integers(1, 1000), st.integers(0, 2000), st.integers(0, 2000))
def test_a_range_lies_within_or_is_refused(size: int, first: int, last: int) -> None:
    header = f"bytes={first}-{last}"
    if last < first:
        assert asked_range(header, size) is None
    elif first >= size:
        with pytest.raises(HTTPException) as refused:
            asked_range(header, size)
        assert refused.value.headers == {"Content-Range": f"bytes */{size}"}
    else:
        assert asked_range(header, size) == (first, min(last + 1, size))


@given(st.integers(1, 1000), st.integers(1, 2000))
def test_a_suffix_is_the_end(size: int, length: int) -> None:
    assert asked_range(f"bytes=-{length}", size) == (max(size - length, 0), size)


@given(st.text(max_size=30))
def test_whatever_is_sent_nothing_breaks(header: str) -> None:
    try:
        found = asked_range(header, 100)
    except HTTPException:
        return
    assert found is None or 0 <= found[0] < found[1] <= 100
