"""Children of an orchestrating job: checked like any job, inserted once, and the parent wakes when they have ended."""

from typing import Any

import pytest
from sqlalchemy import Engine, select, update

from app.domain.errors import Failure, UserFault
from app.domain.jobs import Status, Wanted
from app.store import children, endings, tables
from app.store.attempts import Held
from app.store.session import transaction
from tests.factories import make_dataset, make_job, make_model, make_project, publish_catalogue
from tests.store.holding import look, read, take

pytestmark = pytest.mark.store
USER = Failure(fault="user", code="diverged", message="The loss is not finite at step 7.")


@pytest.fixture(autouse=True)
def catalogue(engine: Engine) -> None:
    publish_catalogue(engine)


def insert_round(engine: Engine, held: Held, *keys: str, **more: Any) -> Status:
    with transaction(engine) as session:
        project = session.get_one(tables.Project, held.project_id)
        dataset = make_dataset(session, project)
        body = {"recipe": "image_classification", "dataset": dataset.id, "model": {"architecture": "resnet18"}}
        return endings.insert_children(session, held, [{"child_key": key, **body, **more} for key in keys])


def children_of(engine: Engine, held: Held) -> list[tables.Job]:
    with transaction(engine) as session:
        query = select(tables.Job).where(tables.Job.parent_id == held.job_id).order_by(tables.Job.id)
        return list(session.scalars(query))


def test_the_parent_waits_for_its_round_without_a_slot(engine: Engine, held: Held) -> None:
    assert insert_round(engine, held, "a", "b") is Status.WAITING
    assert look(engine, held).lease_owner is None
    first, second = children_of(engine, held)
    assert [(child.child_key, child.status, child.kind) for child in (first, second)] == [
        ("a", "queued", "finetune"), ("b", "queued", "finetune"),
    ]  # fmt: skip
    for child, status in ((first, Status.SUCCEEDED), (second, Status.FAILED)):
        assert look(engine, held).status == "waiting"
        with transaction(engine) as session:
            taken = take(session, read(session, child))
            if status is Status.FAILED:
                endings.give_up(session, taken, USER)
            else:
                endings.finish(session, taken, status)
    parent = look(engine, held)
    assert (parent.status, parent.status_reason) == ("queued", "children_finished")


def test_a_key_makes_one_child_however_often_it_is_asked_for(engine: Engine, held: Held) -> None:
    insert_round(engine, held, "a")
    (child,) = children_of(engine, held)
    with transaction(engine) as session:
        endings.finish(session, take(session, read(session, child)), Status.SUCCEEDED)
        again = take(session, read(session, held))
    insert_round(engine, again, "a", "b", "b")
    assert [child.child_key for child in children_of(engine, held)] == ["a", "b"]


def test_a_parent_that_is_being_stopped_gets_no_further_children(engine: Engine, held: Held) -> None:
    with transaction(engine) as session:
        read(session, held).wanted = Wanted.STOP
    assert insert_round(engine, held, "a") is Status.QUEUED
    assert (look(engine, held).status_reason, children_of(engine, held)) == ("stopping", [])


def test_a_cancelled_parent_gets_no_children(engine: Engine, held: Held) -> None:
    with transaction(engine) as session:
        read(session, held).wanted = Wanted.CANCEL
    assert insert_round(engine, held, "a") is Status.CANCELLED
    assert children_of(engine, held) == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"child_key": None}, "child_key"),
        ({"recipe": "magic"}, "Child 'b': recipe: .*magic"),
        ({"params": {"trainable": "nothing"}}, "Child 'b': params.trainable"),
        ({"params": {"trainabel": "head"}}, "Child 'b': params.trainabel.*did you mean trainable"),
        ({"training": {"steps": 0}}, "Child 'b': training.steps"),
        ({"dataset": f"ds_{'9' * 26}"}, "Child 'b': There is no dataset"),
        ({"model": f"mdl_{'9' * 26}"}, "Child 'b': There is no model"),
        ({"model": None}, "Child 'b': model: Give a network"),
        ({"model": {"architecture": "resnet81"}}, "Child 'b': model.architecture.*resnet18"),
    ],
)
def test_a_spec_that_the_api_would_refuse_is_the_users_fault_and_makes_no_child(
    engine: Engine, held: Held, wrong: dict[str, Any], says: str
) -> None:
    with transaction(engine) as session:
        dataset = make_dataset(session, session.get_one(tables.Project, held.project_id))
    body = {"recipe": "image_classification", "dataset": dataset.id, "model": {"architecture": "resnet18"}}
    with pytest.raises(UserFault, match=says) as raised, transaction(engine) as session:
        endings.insert_children(session, held, [{"child_key": "a", **body}, {"child_key": "b", **body, **wrong}])
    assert raised.value.failure().phase == "plan"
    assert children_of(engine, held) == []
    assert look(engine, held).status == "starting"


def test_a_child_of_another_projects_dataset_is_refused(engine: Engine, held: Held) -> None:
    with transaction(engine) as session:
        foreign = make_dataset(session, make_project(session))
    with pytest.raises(UserFault, match="There is no dataset"):
        insert_round(engine, held, "a", dataset=foreign.id)


def test_a_child_takes_over_project_and_priority_and_may_start_from_a_model_or_a_job(
    engine: Engine, held: Held
) -> None:
    with transaction(engine) as session:
        project = session.get_one(tables.Project, held.project_id)
        model, first = make_model(session, project), make_job(session, project, kind="pretrain")
        session.execute(update(tables.Job).where(tables.Job.id == held.job_id).values(priority=7, losses=2))
    insert_round(engine, held, "a", model=model.id, priority=-3)
    (child,) = children_of(engine, held)
    assert (child.project_id, child.priority, child.name) == (held.project_id, 7, "test a")
    assert (child.base_model_id, child.status, child.spec["model"]) == (model.id, "queued", model.id)
    assert child.spec["training"]["epochs"] == 10, "the defaults are filled in, as for any job"
    assert look(engine, held).losses == 0, "a round is as good as a checkpoint"
    with transaction(engine) as session:
        endings.finish(session, take(session, read(session, child)), Status.SUCCEEDED)
        again = take(session, read(session, held))
    insert_round(engine, again, "b", model=first.id)
    second = children_of(engine, held)[1]
    assert (second.wait_for_job_id, second.status) == (first.id, "waiting")


def test_those_that_ended_are_told_of_in_the_order_in_which_they_were_made(engine: Engine, held: Held) -> None:
    insert_round(engine, held, "z", "a", "m")
    made = children_of(engine, held)
    with transaction(engine) as session:
        for child in made[:2]:
            endings.finish(session, take(session, read(session, child)), Status.SUCCEEDED, result={"of": child.id})
        told = children.ended(session, session.get_one(tables.Job, held.job_id))
    assert [(one["key"], one["result"]) for one in told] == [("z", {"of": made[0].id}), ("a", {"of": made[1].id})]
    assert {"key", "job", "status", "spec", "result", "metrics", "best", "model", "error"} == set(told[0])


def test_a_job_may_give_only_a_model_that_a_child_of_its_own_made(engine: Engine, held: Held) -> None:
    insert_round(engine, held, "a")
    (child,) = children_of(engine, held)
    with transaction(engine) as session:
        parent, project = read(session, held), session.get_one(tables.Project, held.project_id)
        own, other = make_model(session, project, job_id=child.id), make_model(session, project)
        assert children.model_of_one(session, parent, own.id) == own.id
        assert children.model_of_one(session, parent, other.id) is None
        own.deleted_at = 1.0
        session.flush()
        assert children.model_of_one(session, parent, own.id) is None
