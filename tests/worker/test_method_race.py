"""The race of methods as pure functions, with children of every fate; then one real race on digits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.datasets import DatasetFacts
from app.domain.errors import UserFault
from app.domain.spec import Spec
from tests.worker import sets
from worker import catalogue
from worker.apply import method_race
from worker.apply.method_race import MethodRaceParams
from worker.recipe import Child, Facts, Requires
from worker.report import Finished
from worker.trainer import alone, process

pytestmark = pytest.mark.worker
DIGITS = DatasetFacts(
    id="ds_1", sha256="", task="image_classification", classes=tuple("0123456789"), splits={"train": 500, "test": 50},
    features={}, labelled={"train": 0}, image_sizes={}, channels=1, shards=(),
)  # fmt: skip
START = {"architecture": "small_cnn", "width": 0.125}
Fate = dict[str, Any]  # metrics by short name; "status" where it did not end well
GOOD: Fate = {"effective_rank": 10.0, "feature_spread": 0.5}


def facts(family: str = "convolutional", **spec: Any) -> Facts:
    parsed = Spec.model_validate({"recipe": "method_race", "model": START, **spec})
    return Facts(parsed, DIGITS, None, None, family, catalogue.recipes())


def params(*names: str, **given_: Any) -> MethodRaceParams:
    methods = [{"recipe": "simclr", "name": name} for name in names]
    return MethodRaceParams.model_validate({"methods": methods or None, **given_})


def child(body: dict[str, Any], fate: Fate) -> Child:
    status = fate.get("status", "succeeded")
    return Child(
        key=body["child_key"], job=f"job_{body['child_key']}", status=status, spec=body, result={"seconds": 1.5},
        metrics={f"probe/{name}": value for name, value in fate.items() if name != "status"}, best=None,
        model=f"mdl_{body['child_key']}" if status != "failed" else None,
        error={"message": "It diverged."} if status == "failed" else None,
    )  # fmt: skip


def race(
    chosen: MethodRaceParams, fate_of: Callable[[str], Fate], given_: Facts | None = None
) -> tuple[list[list[dict[str, Any]]], list[Child]]:
    """Run a race to its end as the trainer would; give the new bodies of each round, and every child."""
    known, rounds = given_ or facts(), list[list[dict[str, Any]]]()
    ended: list[Child] = []
    while True:
        have = {one.key for one in ended}
        new = [body for body in method_race.plan(chosen, known, ended) if body["child_key"] not in have]
        if not new:
            return rounds, ended
        rounds.append(new)
        ended += [child(body, fate_of(body["child_key"])) for body in new]


def by_knn(**accuracies: float) -> Callable[[str], Fate]:
    return lambda key: {**GOOD, "knn_accuracy": accuracies[key.split("-", 1)[1]]}


def test_the_field_shrinks_and_goes_on_from_its_models_with_what_is_missing_of_a_growing_budget() -> None:
    chosen = params(*"abcdefghi", steps=100)
    rounds, ended = race(chosen, by_knn(**{name: 0.1 * place for place, name in enumerate("abcdefghi")}),
                         facts(training={"epochs": 7, "seed": 3, "batch_size": 64}))  # fmt: skip
    assert [[body["child_key"] for body in one] for one in rounds] == [
        [f"round1-{name}" for name in "abcdefghi"], ["round2-i", "round2-h", "round2-g"], ["winner-i"],
    ]  # fmt: skip
    assert {body["model"]["architecture"] for body in rounds[0]} == {"small_cnn"}
    assert [body["model"] for body in rounds[1]] == ["mdl_round1-i", "mdl_round1-h", "mdl_round1-g"]
    assert rounds[2][0]["model"] == "mdl_round2-i"
    assert [one[0]["training"].get("steps") for one in rounds] == [100, 200, None], "300 in all after the second"
    assert [one[0]["training"]["seed"] for one in rounds] == [3, 4, 3]
    assert {body["training"]["batch_size"] for one in rounds for body in one} == {64}
    assert rounds[2][0]["training"]["epochs"] == 7
    result = method_race.gather(chosen, facts(), ended).result
    assert (result["winner"]["method"], result["winner"]["model"]) == ("i", "mdl_winner-i")
    assert result["winner"]["trained_fully"]
    assert [(one["round"], one["steps"], len(one["methods"])) for one in result["rounds"]] == [(1, 100, 9), (2, 300, 3)]
    first = result["rounds"][0]["methods"]
    assert [row["method"] for row in first] == list("ihgfedcba")
    assert [row["goes_on"] for row in first] == [True] * 3 + [False] * 6
    assert first[3]["reason"] == "knn_accuracy 0.500, place 4 of 9"
    assert first[0]["seconds"] == 1.5
    assert result["sentence"] == "i won over 8 others in 2 rounds."


def test_a_method_brings_its_own_params_and_training() -> None:
    chosen = MethodRaceParams.model_validate({
        "methods": [
            {"recipe": "simclr", "params": {"temperature": 0.2}, "training": {"batch_size": 32, "steps": 9}},
            {"recipe": "vae"},
        ], "steps": 50,
    })  # fmt: skip
    first, second = method_race.plan(chosen, facts(training={"batch_size": 64, "early_stopping": {}}), ())
    assert first["params"] == {"temperature": 0.2}
    assert (first["training"]["batch_size"], first["training"]["steps"]) == (32, 50), "the budget is everybody's"
    assert (second["recipe"], second["training"]["batch_size"]) == ("vae", 64)
    assert first["training"]["early_stopping"] is None


def test_collapsed_failed_and_unmeasured_methods_are_out_with_their_reasons() -> None:
    fates: dict[str, Fate] = {
        "a": {**GOOD, "knn_accuracy": 0.3}, "b": {"effective_rank": 1.05, "feature_spread": 0.5, "knn_accuracy": 0.9},
        "c": {"status": "failed"}, "d": {"knn_accuracy": 0.99}, "e": {**GOOD, "status": "stopped", "knn_accuracy": 0.2},
    }  # fmt: skip
    chosen = params(*"abcde", eta=2)
    rounds, ended = race(chosen, lambda key: fates[key.split("-", 1)[1]])
    assert [[body["child_key"] for body in one] for one in rounds[1:]] == [["round2-a", "round2-e"], ["winner-a"]]
    result = method_race.gather(chosen, facts(), ended).result
    reasons = {row["method"]: row["reason"] for row in result["rounds"][0]["methods"]}
    assert reasons["b"] == "collapsed: effective rank 1.05, feature spread 0.500"
    assert reasons["c"] == "It diverged."
    assert reasons["d"] == "its features were not measured"
    assert result["failed"] == {"round1-c": "It diverged."}


def test_without_labels_the_effective_rank_decides() -> None:
    fates = {"a": {**GOOD, "effective_rank": 4.0}, "b": {**GOOD, "effective_rank": 9.0}}
    rounds, ended = race(params("a", "b"), lambda key: fates[key.split("-", 1)[1]])
    assert [body["child_key"] for body in rounds[-1]] == ["winner-b"]
    assert method_race.gather(params("a", "b"), facts(), ended).result["rounds"][0]["score"] == "effective_rank"
    with pytest.raises(UserFault, match="no knn_accuracy without labels"):
        race(params("a", "b", score="knn_accuracy"), lambda key: fates[key.split("-", 1)[1]])


def test_a_tie_is_decided_by_the_spread_of_the_features() -> None:
    fates = {name: {**GOOD, "feature_spread": spread, "knn_accuracy": 0.5} for name, spread in (("a", 0.2), ("b", 0.3))}
    rounds, _ = race(params("a", "b"), lambda key: fates[key.split("-", 1)[1]])
    assert rounds[-1][0]["child_key"] == "winner-b"


def test_when_nobody_comes_through_the_race_fails_and_says_why() -> None:
    chosen = params("a", "b")
    _, ended = race(chosen, lambda key: {"status": "failed"} if key.endswith("a") else {**GOOD, "effective_rank": 1.0})
    with pytest.raises(UserFault, match=r"round 1: a: It diverged\.; b: collapsed"):
        method_race.gather(chosen, facts(), ended)


def test_a_winner_whose_last_training_failed_gives_the_model_it_had() -> None:
    chosen = params("a", "b")
    fates = by_knn(a=0.1, b=0.2)
    _, ended = race(chosen, lambda key: {"status": "failed"} if key.startswith("winner") else fates(key))
    winner = method_race.gather(chosen, facts(), ended).result
    assert (winner["winner"]["model"], winner["winner"]["trained_fully"]) == ("mdl_round1-b", False)
    assert "its last training failed: It diverged." in winner["sentence"]


def test_a_race_that_is_stopped_gives_the_best_so_far() -> None:
    chosen, fates = params(*"abcd", eta=2), by_knn(a=0.1, b=0.4, c=0.3, d=0.2)
    known = replace(facts(), stopping=True)
    first = [child(body, fates(body["child_key"])) for body in method_race.plan(chosen, known, ())]
    gathered = method_race.gather(chosen, known, first)
    assert (gathered.model, gathered.result["winner"]["trained_fully"]) == ("mdl_round1-b", False)
    assert gathered.result["sentence"] == "b led over 3 others in 1 round when the race was stopped."
    second = method_race.plan(chosen, known, first)[4:]
    cut = [child(second[0], {"status": "failed"}), child(second[1], fates(second[1]["child_key"]))]
    assert method_race.gather(chosen, known, [*first, *cut]).model == "mdl_round2-c"
    none = [child(body, {"status": "failed"}) for body in second]
    assert method_race.gather(chosen, known, [*first, *none]).model == "mdl_round1-b"
    lost = [child(body, {"status": "failed"}) for body in method_race.plan(chosen, known, ())]
    with pytest.raises(UserFault, match="No method came through round 1: a: It diverged"):
        method_race.gather(chosen, known, lost)


@given(
    st.dictionaries(
        st.sampled_from("abcdefghijkl"), st.one_of(
            st.just({"status": "failed"}), st.just({**GOOD, "effective_rank": 1.0, "knn_accuracy": 1.0}),
            st.builds(lambda value: {**GOOD, "knn_accuracy": value}, st.floats(0, 1)),
        ), min_size=2, max_size=12,
    ), st.integers(2, 4),
)  # fmt: skip
def test_a_race_ends_with_the_best_of_those_who_stood(fates: dict[str, Fate], eta: int) -> None:
    """Scores do not change between rounds here, so halving must find the best; every prefix plans the same."""
    chosen = params(*sorted(fates), eta=eta, steps=10)
    rounds, ended = race(chosen, lambda key: fates[key.split("-", 1)[1]])
    assert [len(one) for one in rounds] == sorted((len(one) for one in rounds), reverse=True)
    standing = {name: fate["knn_accuracy"] for name, fate in fates.items() if fate.get("effective_rank") == 10.0}
    if not standing:
        with pytest.raises(UserFault):
            method_race.gather(chosen, facts(), ended)
        return
    result = method_race.gather(chosen, facts(), ended).result
    assert standing[result["winner"]["method"]] == max(standing.values())
    whole = method_race.plan(chosen, facts(), ended)
    seen = 0
    for one in rounds:
        assert method_race.plan(chosen, facts(), ended[:seen]) == whole[: seen + len(one)]
        seen += len(one)
    assert seen == len(whole)


def test_by_default_every_method_that_takes_the_network_and_the_data_takes_part() -> None:
    recipes = {body["recipe"] for body in method_race.plan(params(), facts(), ())}
    assert recipes >= {"simclr", "vicreg", "barlow_twins", "autoencoder", "vae"}
    assert all(catalogue.recipe(name).kind == "pretrain" for name in recipes)
    known = dict(catalogue.recipes())
    known["vae"] = replace(known["vae"], requires=Requires(architectures=("vit",)))
    known["simclr"] = replace(known["simclr"], requires=Requires(min_batch=501))
    fewer = method_race.plan(params(), replace(facts(), recipes=known), ())
    assert recipes - {body["recipe"] for body in fewer} == {"vae", "simclr"}


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ([{"recipe": "simclr"}, {"recipe": "simclr"}], "two methods are called 'simclr'"),
        ([{"recipe": "simclr"}, {"recipe": "image_classification"}], "image_classification is a finetune recipe"),
    ],
)
def test_a_race_that_makes_no_sense_is_refused(methods: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(UserFault, match=says):
        method_race.plan(MethodRaceParams.model_validate({"methods": methods}), facts(), ())


def test_a_race_may_go_on_from_a_model() -> None:
    given_ = Facts(Spec.model_validate({"recipe": "method_race"}), DIGITS, "mdl_given", None, "convolutional",
                   catalogue.recipes())  # fmt: skip
    assert {body["model"] for body in method_race.plan(params("a", "b"), given_, ())} == {"mdl_given"}
    without = Facts(Spec.model_validate({"recipe": "method_race"}), DIGITS, None, None, None, catalogue.recipes())
    with pytest.raises(UserFault, match="model: give a network"):
        method_race.plan(params("a", "b"), without, ())


def test_it_runs_on_real_digits(digits: DatasetFacts, tmp_path: Path) -> None:
    methods = [{"recipe": "simclr"}, {"recipe": "vicreg"}, {"recipe": "autoencoder"}]
    body = {
        "recipe": "method_race", "model": sets.NETWORK, "resources": {"device": "cpu"},
        "params": {"methods": methods, "steps": 2, "eta": 2}, "training": {"steps": 5, "batch_size": 32},
    }  # fmt: skip
    order, heard = sets.order(body, digits, tmp_path), sets.Heard()
    alone.carry_out(order, heard.reporter, process.carry_out)
    last = heard.messages[-1]
    assert isinstance(last, Finished), last
    assert last.result is not None
    (only,) = last.result["rounds"]
    assert (only["steps"], only["score"], len(only["methods"])) == (2, "knn_accuracy", 3)
    assert last.result["winner"]["trained_fully"], last.result
    assert last.metrics["winner/knn_accuracy"] == last.result["winner"]["knn_accuracy"]
    kept = Path(order.scratch) / alone.CHILDREN
    assert (kept / f"winner-{last.result['winner']['method']}" / "model.safetensors").is_file()
