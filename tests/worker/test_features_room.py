"""Room for what a frozen prefix gives: planned, shared with other jobs, and gone when a run begins."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.domain.datasets import DatasetFacts
from tests.worker import sets
from worker.data import rows
from worker.data.shelf import Entry, Shelf
from worker.report import Event, Order, Planned, Reporter
from worker.trainer.assembly import assemble

pytestmark = pytest.mark.worker


def test_without_room_the_plan_says_so_before_it_is_committed_and_another_host_with_room_goes_by_it(
    digits: DatasetFacts, tmp_path: Path
) -> None:
    cramped = sets.frozen(tmp_path / "cramped", digits, cache_bytes=100)
    heard, _ = sets.finished(cramped)
    (planned,) = heard.of(Planned)
    (event,) = [event for event in heard.of(Event) if event.code == "features.not_cached"]
    assert heard.messages.index(event) < heard.messages.index(planned)
    assert planned.plan["prefix_views"] == 0
    assert "TUNEYARD_CACHE_BYTES allows 100 B" in planned.plan["reasons"]["prefix_views"]
    assert planned.plan["reasons"]["prefix_views"] in event.message
    assert event.data["bytes"] > 100
    assert " kB, and" in event.message
    roomy = sets.frozen(tmp_path / "roomy", digits, plan=planned.plan, attempt=2)
    heard, _ = sets.finished(roomy)
    assert "features.cached" not in heard.codes()
    assert sets.weights_sha256(roomy) == sets.weights_sha256(cramped)


def entries(order: Order) -> dict[str, int]:
    """Weigh what is on the shelf of an order."""
    kept = (Path(order.cache) / "shelf").glob("[!.]*")
    return {folder.name: sum(file.stat().st_size for file in folder.iterdir()) for folder in kept}


def in_use(order: Order, name: str, size: int = 0) -> Entry:
    """Use an entry of an order's shelf as another job would, one of this size where there is none."""
    folder = Path(order.cache) / "shelf"
    sizes = {file.name: file.stat().st_size for file in (folder / name).glob("*")} or {"x": size}
    return Shelf(folder, order.cache_bytes).get(name, sizes, lambda _: None)


def test_where_running_jobs_use_the_room_nothing_is_planned_to_be_cached(digits: DatasetFacts, tmp_path: Path) -> None:
    roomy = sets.frozen(tmp_path / "roomy", digits)
    sets.finished(roomy)
    needed = sum(entries(roomy).values())
    cramped = sets.frozen(tmp_path / "cramped", digits, cache_bytes=needed + 99)
    other = in_use(cramped, "other", 100)
    heard, _ = sets.finished(cramped)
    (planned,) = heard.of(Planned)
    assert planned.plan["prefix_views"] == 0
    assert "100 B of it in use by running jobs" in planned.plan["reasons"]["prefix_views"]
    del other
    heard, _ = sets.finished(cramped)
    assert heard.of(Planned)[0].plan["prefix_views"] == 4, "what nobody uses makes room"


def test_features_that_another_job_reads_need_no_room_of_their_own(digits: DatasetFacts, tmp_path: Path) -> None:
    first = sets.frozen(tmp_path, digits)
    sets.finished(first)
    kept = entries(first)
    readers = [in_use(first, name) for name in kept]
    heard, _ = sets.finished(sets.frozen(tmp_path, digits, cache_bytes=sum(kept.values())))
    (event,) = [event for event in heard.of(Event) if event.code == "features.cached"]
    assert event.data["found"]
    assert len(readers) == 4, "images of two splits, features of training and validation"


def filled_up(order: Order) -> Callable[[Any], None]:
    """Give what lets another job use nearly all that is left of the shelf, as soon as a plan is committed."""
    others: list[Entry] = []

    def listen(message: Any) -> None:
        if isinstance(message, Planned) and not others:
            left = order.cache_bytes - sum(entries(order).values())
            others.append(in_use(order, "other", left - 100))

    return listen


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_run_whose_room_is_gone_when_it_begins_goes_on_without_a_cache_and_says_so(
    attempt: int, digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = sets.frozen(tmp_path / "never", digits, cache_bytes=100)
    sets.finished(never)
    order = sets.frozen(tmp_path / "late", digits, cache_bytes=10**6)
    if attempt == 2:  # the first one ended before its first checkpoint
        order = order.model_copy(update={"plan": assemble(order, Reporter()).plan.model_dump(mode="json")})
        order = order.model_copy(update={"attempt": 2})
    monkeypatch.setattr(rows, "MEMORY_PART", 10**30)
    heard, _ = sets.finished(order, filled_up(order))
    before, after = heard.of(Planned)
    assert (before.plan["prefix_views"], after.plan["prefix_views"]) == (4, 0)
    assert {**before.plan, "prefix_views": 0, "reasons": after.plan["reasons"]} == after.plan
    (event,) = [event for event in heard.of(Event) if event.code == "features.not_cached"]
    assert heard.messages.index(before) < heard.messages.index(event) < heard.messages.index(after)
    assert heard.messages.index(after) < next(place for place, message in enumerate(heard.messages)
                                              if getattr(message, "code", "") == "train.first_step")  # fmt: skip
    why = after.plan["reasons"]["prefix_views"]
    assert why in event.message
    assert "of it in use by running jobs" in why
    assert event.data["bytes"] > 100
    assert (before.exact, after.exact) == (True, attempt == 1), "the second attempt was promised cached views"
    assert sets.weights_sha256(order) == sets.weights_sha256(never)


def test_what_is_measured_goes_on_without_a_cache_too(
    digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = sets.frozen(tmp_path, digits, cache_bytes=10**6, recipe="measure", kind="internal")
    monkeypatch.setattr(rows, "MEMORY_PART", 10**30)
    heard, last = sets.finished(order, filled_up(order))
    assert [planned.plan["prefix_views"] for planned in heard.of(Planned)] == [4, 0]
    assert last.result is not None
    assert last.result["plan"]["prefix_views"] == 0


def test_a_later_attempt_without_room_computes_what_the_plan_says(
    digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sets.frozen(tmp_path / "whole", digits)
    heard, _ = sets.finished(whole)
    planned = heard.of(Planned)[0]
    assert planned.plan["prefix_views"] == 4
    path = sets.killed_at(20, sets.frozen(tmp_path / "cut", digits))
    given: dict[str, Any] = {"plan": planned.plan, "attempt": 2, "checkpoint": path}
    cramped = sets.frozen(tmp_path / "cramped", digits, cache_bytes=100, **given)
    heard, _ = sets.finished(cramped)
    assert heard.of(Planned)[0].exact
    assert sets.weights_sha256(cramped) == sets.weights_sha256(whole), "its views are held in memory"
    (told,) = [event for event in heard.of(Event) if event.code == "features.cached"]
    left = 9 - 20 // planned.plan["steps_per_epoch"]
    assert 4 < left < 9
    assert f"{left - 4} of the {left} passes that are still to come are saved" in told.message
    monkeypatch.setattr(rows, "MEMORY_PART", 10**30)
    _, last = sets.failed(sets.frozen(tmp_path / "small", digits, cache_bytes=100, **given))
    assert (last.error.fault, last.error.code) == ("resource", "disk_full")
    assert "TUNEYARD_CACHE_BYTES allows 100 B" in last.error.message


def test_images_and_features_share_one_budget(digits: DatasetFacts, tmp_path: Path) -> None:
    order = sets.frozen(tmp_path, digits)
    sets.finished(order)
    kept = entries(order)
    assert {name.partition("-")[0] for name in kept} == {"images", "features"}
    budget = sum(kept.values()) - 1
    heard, _ = sets.finished(sets.frozen(tmp_path / "less", digits, cache_bytes=budget))
    assert "features.not_cached" in heard.codes()
    assert "data.streaming" not in heard.codes()
