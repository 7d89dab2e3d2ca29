"""From a body to a spec, with every value to correct by name."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.errors import Invalid
from app.domain.presets import merge
from app.domain.recipes import Published, nearest, resolve, unknown
from app.domain.spec import Spec
from tests.domain.bodies import ARCHITECTURES, DATASET, MODEL, body, recipe

pytestmark = pytest.mark.unit


def details_of(asked: dict[str, Any], **changes: Any) -> dict[str, str]:
    with pytest.raises(Invalid) as caught:
        resolve(asked, recipe(**changes), ARCHITECTURES)
    assert caught.value.status == 422
    return {detail.pointer: detail.message for detail in caught.value.details}


def test_the_spec_is_the_whole_body_with_every_default() -> None:
    spec = resolve(body(), recipe(), ARCHITECTURES).model_dump(mode="json")
    assert set(spec) == set(Spec.model_fields)
    assert spec["params"] == {"trainable": "all", "head": {"dropout": 0.0}}
    assert spec["training"]["epochs"] == 7
    assert spec["training"]["optimizer"]["name"] == "adamw"
    assert spec["model"] == {
        "architecture": "small_cnn", "width": 0.5, "weights": None, "image_size": None, "stem": "standard",
        "keep_stages": None,
    }  # fmt: skip


def test_resolving_a_spec_again_changes_nothing() -> None:
    once = resolve(body(training={"optimizer": "sgd"}), recipe(), ARCHITECTURES).model_dump(mode="json")
    assert once["training"]["optimizer"]["momentum"] == 0.9
    assert resolve(once, recipe(), ARCHITECTURES).model_dump(mode="json") == once


def test_the_body_wins_over_the_recipe_and_null_is_a_value() -> None:
    defaults = {"training": {"epochs": 7, "gradient_clip": 1, "seed": 3}, "model": {"architecture": "vit_b_16"}}
    spec = resolve(
        body(training={"epochs": 2, "gradient_clip": None}), recipe(defaults=defaults), ARCHITECTURES
    )  # fmt: skip
    assert (spec.training.epochs, spec.training.gradient_clip, spec.training.seed) == (2, None, 3)


def test_another_architecture_does_not_inherit_the_default_ones_options() -> None:
    spec = resolve(body(model={"architecture": "resnet18"}), recipe(), ARCHITECTURES)
    assert "width" not in spec.model_dump()["model"]


def test_the_same_architecture_inherits_the_default_options() -> None:
    spec = resolve(body(model={"image_size": 16}), recipe(), ARCHITECTURES)
    assert spec.model_dump()["model"] | {"image_size": 16, "width": 0.5} == spec.model_dump()["model"]


@pytest.mark.parametrize(
    ("change", "at", "says"),
    [
        ({"trainning": {}}, "/trainning", "did you mean training?"),
        ({"training": {"epoch": 3}}, "/training/epoch", "did you mean epochs"),
        ({"params": {"trainble": "all"}}, "/params/trainble", "did you mean trainable?"),
        ({"params": {"trainable": 3}}, "/params/trainable", "3 is not a string"),
        ({"model": {"architecture": "resnet81"}}, "/model/architecture", "did you mean resnet18"),
        ({"model": {"architecture": "small_cnn", "widht": 2}}, "/model/widht", "did you mean width"),
        ({"model": {"architecture": "small_cnn", "keep_stage": 2}}, "/model/keep_stage", "did you mean keep_stages"),
        ({"model": {"architecture": "small_cnn", "width": 0}}, "/model/width", "less than or equal to"),
        ({"model": {"architecture": "resnet18", "weights": "IMAGENET1K_V9"}}, "/model/weights", "IMAGENET1K_V1"),
        ({"training": {"epochs": 0}}, "/training/epochs", "minimum of 1"),
        ({"training": {"learning_rate": float("nan")}}, "/training/learning_rate", "finite"),
        ({"params": {"head": {"dropout": float("inf")}}}, "/params/head/dropout", "finite"),
        ({"dataset": None}, "/dataset", "needs a dataset"),
        ({"model": None}, "/model", "network to start from"),
        ({"model": "mdl_short"}, "/model", "match"),
        ({"data": {"label_fraction": 0.5, "labels_per_class": 3}}, "/data/labels_per_class", "not both"),
        ({"metadata": {"k": 1}}, "/metadata/k", "1 is not a string"),
    ],
)
def test_a_wrong_value_is_named_with_its_correction(change: dict[str, Any], at: str, says: str) -> None:
    found = details_of(body(**change))
    assert at in found, found
    assert says in found[at]


def test_the_message_names_the_first_field_like_the_other_errors_do() -> None:
    with pytest.raises(Invalid) as caught:
        resolve(body(params={"trainble": "all", "other": 1}), recipe(), ARCHITECTURES)
    assert caught.value.param == "params.other"
    assert caught.value.message.startswith("params.other: ")
    assert "1 more" in caught.value.message


def test_a_model_id_as_weights_is_left_to_the_rows() -> None:
    spec = resolve(body(model={"architecture": "resnet18", "weights": MODEL}), recipe(), ARCHITECTURES)
    assert spec.model_dump()["model"]["weights"] == MODEL


def test_near_names_come_best_first_and_hopeless_ones_list_what_is_known() -> None:
    assert nearest("simcrl", ["byol", "simclr", "vicreg"])[0] == "simclr"
    assert "did you mean simclr?" in unknown("recipe", "simcrl", ["byol", "simclr"], at="/recipe").message
    assert "known: byol, simclr" in unknown("recipe", "xyz", ["byol", "simclr"], at="/recipe").message


JSON_OBJECTS = st.recursive(
    st.dictionaries(st.sampled_from("abc"), st.integers()),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner | st.integers() | st.none()),
    max_leaves=6,
)


@given(JSON_OBJECTS, JSON_OBJECTS)
def test_merging_keeps_all_that_was_said(defaults: dict[str, Any], said: dict[str, Any]) -> None:
    merged = merge(defaults, said)
    assert set(merged) == set(defaults) | set(said)
    assert merge(defaults, merged) == merged
    assert merge({}, said) == said
    assert merge(merged, said) == merged


def test_a_recipe_that_uses_a_model_is_given_one_and_a_dataset() -> None:
    of = recipe(kind="apply", requires={"trained": True}, defaults={})
    found = _refused({"recipe": "embed", "model": {"architecture": "resnet18"}}, of)
    assert set(found) == {"/dataset", "/model"}
    assert "trained model" in found["/model"]
    assert set(_refused({"dataset": DATASET}, of)) == {"/model"}
    for model in (MODEL, {"architecture": "resnet18", "weights": "IMAGENET1K_V1"}):
        assert _refused({"dataset": DATASET, "model": model}, of) == {}


def _refused(body: dict[str, Any], of: Published) -> dict[str, str]:
    try:
        resolve({"recipe": of.name, **body}, of, ARCHITECTURES)
    except Invalid as error:
        return {detail.pointer: detail.message for detail in error.details}
    return {}


def test_a_field_that_a_recipe_wants_left_out_is_named_with_the_reason() -> None:
    requires = {"without": {"training.max_seconds": "all train equally long", "data.label_fraction": "it is a param"}}
    details = details_of(body(training={"max_seconds": 5}, data={"label_fraction": 0.5}), requires=requires)
    assert details == {
        "/training/max_seconds": "Leave this out for image_classification: all train equally long.",
        "/data/label_fraction": "Leave this out for image_classification: it is a param.",
    }
    same = body(training={"max_seconds": None}, data={"label_fraction": 1.0})
    assert resolve(same, recipe(requires=requires), ARCHITECTURES).data.label_fraction == 1


def test_half_precision_on_a_processor_is_refused() -> None:
    asked = body(training={"precision": "float16"}, resources={"device": "cpu"})
    assert "use auto" in details_of(asked)["/training/precision"]
    resolve(body(training={"precision": "float16"}), recipe(), ARCHITECTURES)
