"""From a body to a spec, and every impossible combination by name."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.errors import Invalid
from app.domain.presets import merge
from app.domain.recipes import Network, Published, check, nearest, resolve, unknown, warnings
from app.domain.spec import Spec

pytestmark = pytest.mark.unit

DATASET = "ds_00000000000000000000000000"
MODEL = "mdl_00000000000000000000000000"

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "resnet18": {
        "family": "convolutional", "stages": 5, "patch": None, "min_image_size": 32,
        "schema": {"type": "object", "additionalProperties": False, "properties": {
            "architecture": {"const": "resnet18"}, "weights": {"enum": [None, "IMAGENET1K_V1"]},
            "image_size": {"type": ["integer", "null"]}, "stem": {"enum": ["standard", "small"]},
            "keep_stages": {"type": ["integer", "null"]},
        }},
    },
    "small_cnn": {
        "family": "convolutional", "stages": ["a", "b", "c"], "patch": None, "min_image_size": 8,
        "schema": {"type": "object", "additionalProperties": False, "properties": {
            "width": {"type": "number", "exclusiveMinimum": 0, "default": 1.0},
        }},
    },
    "vit_b_16": {"family": "vit", "stages": 12, "patch": 16, "min_image_size": 16},
}  # fmt: skip


def recipe(**changes: Any) -> Published:
    params = {
        "type": "object", "additionalProperties": False,
        "properties": {
            "trainable": {"type": "string", "default": "all"},
            "head": {"type": "object", "properties": {"dropout": {"type": "number", "default": 0.0}}, "default": {}},
        },
    }  # fmt: skip
    columns: dict[str, Any] = {
        "name": "image_classification", "kind": "finetune", "version": "1", "tasks": ["image_classification"],
        "schema": {"type": "object", "properties": {"params": params}},
        "defaults": {"model": {"architecture": "small_cnn", "width": 0.5}, "training": {"epochs": 7}},
        "requires": {"labels": True, "min_classes": 2},
    }  # fmt: skip
    return Published(**columns | changes)


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "task": "image_classification", "classes": ["cat", "dog"], "splits": {"train": 100, "test": 10},
        "labelled": {"train": 100, "test": 10}, "features": {}, "channels": 3,
    } | changes  # fmt: skip


def body(**changes: Any) -> dict[str, Any]:
    return {"recipe": "image_classification", "dataset": DATASET} | changes


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


RESNET = Network({"architecture": "resnet18", "image_size": 64}, ARCHITECTURES["resnet18"])
VIT = {"architecture": "vit_b_16", "image_size": 224}


def checked(
    asked: dict[str, Any] | None = None,
    *,
    of: Published | None = None,
    network: Network | None = RESNET,
    data: dict[str, Any] | None = None,
) -> dict[str, str]:
    spec = Spec.model_validate(body(**asked or {}))
    return {one.pointer: one.message for one in check(spec, of or recipe(), network, data or facts())}


def test_what_is_possible_has_no_details() -> None:
    assert checked() == {}
    assert checked({"params": {"trainable": "last:5"}}) == {}
    assert check(Spec.model_validate(body()), recipe(), None, None) == []


@pytest.mark.parametrize(
    ("data", "of", "says"),
    [
        (facts(task="unlabelled_images", classes=[], labelled={"train": 0}), recipe(), "no training sample"),
        (facts(labelled={"train": 0, "test": 10}), recipe(), "no training sample"),
        (facts(classes=["cat"]), recipe(), "at least 2 classes; this dataset has 1: cat"),
        (facts(task="tabular"), recipe(), "works on image_classification; the task of this dataset is tabular"),
        (facts(), recipe(requires={"unlabelled": True}), "needs unlabelled training samples"),
        (
            facts(labelled={"train": 100}),
            recipe(requires={"test_labels": True}),
            "no test sample of this dataset has a",
        ),
        (facts(), recipe(requires={"min_samples": 101}), "at least 101 training samples; there are 100"),
        (facts(), recipe(requires={"min_batch": 128}), "batches of at least 128; there are 100"),
        (facts(splits={"test": 5}, labelled={"test": 5}), recipe(requires={}), "at least 1 training samples"),
    ],
)
def test_data_that_cannot_serve(data: dict[str, Any], of: Published, says: str) -> None:
    found = checked(of=of, data=data)
    assert says in found["/dataset"]


def test_a_label_budget_leaves_unlabelled_rows() -> None:
    of = recipe(requires={"unlabelled": True, "labels": True})
    assert checked({"data": {"label_fraction": 0.1}}, of=of) == {}
    assert checked({"data": {"labels_per_class": 10}}, of=of) == {}


def test_a_batch_may_be_too_small_or_not_divide() -> None:
    of = recipe(requires={"min_batch": 2})
    assert "at least 2 samples" in checked({"training": {"batch_size": 1}}, of=of)["/training/batch_size"]
    assert "micro-batches" in checked({"training": {"batch_size": 10, "accumulate": 3}})["/training/accumulate"]
    assert checked({"training": {"batch_size": 12, "accumulate": 3}}) == {}


@pytest.mark.parametrize(
    ("options", "at", "says"),
    [
        ({"architecture": "resnet18", "image_size": 16}, "/model/image_size", "at least 32 pixels, not 16"),
        ({"architecture": "resnet18", "keep_stages": 6}, "/model/keep_stages", "has 5 stages"),
        ({"architecture": "small_cnn", "keep_stages": 4}, "/model/keep_stages", "has 3 stages"),
        ({"architecture": "vit_b_16", "image_size": 33}, "/model/image_size", "use 32 or 48"),
        ({"architecture": "vit_b_16", "image_size": 40, "patch": 7}, "/model/image_size", "use 35 or 42"),
    ],
)
def test_a_network_that_cannot_be(options: dict[str, Any], at: str, says: str) -> None:
    network = Network(options, ARCHITECTURES[options["architecture"]])
    assert says in checked(network=network)[at]
    by_reference = Network(options, ARCHITECTURES[options["architecture"]], by_reference=True)
    assert says in checked(network=by_reference)["/model"]


def test_a_small_stem_takes_smaller_images() -> None:
    options = {"architecture": "resnet18", "image_size": 16, "stem": "small"}
    assert checked(network=Network(options, ARCHITECTURES["resnet18"])) == {}


def test_a_family_that_the_recipe_does_not_take() -> None:
    of = recipe(requires={"architectures": ["vit"], "reason": "patches are masked"})
    found = checked(of=of)
    assert found == {"/model/architecture": "resnet18 is a convolutional network: patches are masked."}
    assert checked(of=of, network=Network(VIT, ARCHITECTURES["vit_b_16"])) == {}


@pytest.mark.parametrize("trainable", ["last:6", "last:0", "last:99"])
def test_more_trainable_stages_than_there_are(trainable: str) -> None:
    assert "last:1 to last:5" in checked({"params": {"trainable": trainable}})["/params/trainable"]


def test_stages_that_were_cut_off_cannot_be_trained() -> None:
    network = Network({"architecture": "resnet18", "keep_stages": 2}, ARCHITECTURES["resnet18"])
    assert "last:1 to last:2" in checked({"params": {"trainable": "last:3"}}, network=network)["/params/trainable"]


def test_warnings_name_what_will_hardly_work_as_meant() -> None:
    spec = Spec.model_validate(
        body(
            training={"batch_size": 256, "early_stopping": {"patience": 2}},
            data={"labels_per_class": 80, "validation_fraction": 0},
        )
    )
    batch, labels, stopping = warnings(spec, facts())
    assert "only 100 training samples" in batch
    assert "160 labels" in labels
    assert "nothing to look at" in stopping
    (unused,) = warnings(Spec.model_validate(body(resources={"device": "cpu", "gpus": 2})), facts())
    assert "no GPU is used" in unused
    assert warnings(Spec.model_validate(body()), facts()) == []


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


@pytest.mark.parametrize(
    ("params", "found"),
    [
        ({"splits": None, "k": 109}, {}),
        ({"splits": None, "k": 110}, {"/params/k": "There are 110 samples to look at; 110 must be less than that."}),
        ({"splits": ["test"], "k": 10}, {"/params/k": "There are 10 samples to look at; 10 must be less than that."}),
        ({"k": 100}, {"/params/k": "There are 100 samples to look at; 100 must be less than that."}),
        ({"splits": ["train", "train"], "k": [5, 100]},
         {"/params/k/1": "There are 100 samples to look at; 100 must be less than that."}),
        ({"splits": ["validation"], "k": None},
         {"/params/splits": "The dataset has no validation split; it has train, test."}),
    ],
)  # fmt: skip
def test_a_number_that_the_samples_limit(params: dict[str, Any], found: dict[str, str]) -> None:
    of = recipe(kind="apply", requires={"fewer_than_samples": ["k"]})
    assert checked({"params": params}, of=of) == found


@pytest.mark.parametrize(
    ("requires", "params", "dataset", "at", "says"),
    [
        (
            {"up_to_unlabelled": ["k"]},
            {"k": 41},
            {"labelled": {"train": 60}},
            "/params/k",
            "40 of the samples have no label",
        ),
        ({"up_to_unlabelled": ["k"]}, {"k": 40}, {"labelled": {"train": 60}}, None, ""),
        (
            {"sample_numbers": ["ids"]},
            {"ids": [0, 110]},
            {},
            "/params/ids/1",
            "no sample 110; the dataset numbers them 0 to 109",
        ),
        ({"sample_numbers": ["ids"]}, {"ids": [0, 109]}, {}, None, ""),
        (
            {"where": {"m": {"tsne": {"min_samples": 101}}}},
            {"m": "tsne"},
            {},
            "/params/m",
            "tsne needs at least 101 samples",
        ),
        ({"where": {"m": {"tsne": {"min_samples": 101}}}}, {"m": "pca"}, {}, None, ""),
        ({"where": {"m": {"tsne": {"min_samples": 101}}}}, {"m": "tsne", "splits": None}, {}, None, ""),
        ({"where": {"m": {"knn": {"labels": True}}}}, {"m": "knn"}, {}, None, ""),
        (
            {"where": {"m": {"knn": {"labels": True}}}},
            {"m": "knn"},
            {"labelled": {"train": 0}},
            "/params/m",
            "knn needs labels",
        ),
    ],
)
def test_what_a_value_needs_of_the_data_is_checked(
    requires: dict[str, Any], params: dict[str, Any], dataset: dict[str, Any], at: str | None, says: str
) -> None:
    schema = {"properties": {"params": {"type": "object"}}}
    wanted = recipe(schema=schema, requires=requires, kind="apply")
    spec = resolve(body(params=params), wanted, ARCHITECTURES)
    details = {each.pointer: each.message for each in check(spec, wanted, None, facts(**dataset))}
    assert list(details) == ([at] if at else []), details
    assert at is None or says in details[at]


def test_labels_that_a_budget_hides_are_left_to_the_run() -> None:
    wanted = recipe(schema={"properties": {"params": {"type": "object"}}}, requires={"up_to_unlabelled": ["k"]})
    spec = resolve(body(params={"k": 90}, data={"labels_per_class": 1}), wanted, ARCHITECTURES)
    assert check(spec, wanted, None, facts()) == []


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
    assert "use bfloat16" in details_of(asked)["/training/precision"]
    resolve(body(training={"precision": "float16"}), recipe(), ARCHITECTURES)
