"""Recipe, network and data that cannot work together, and those that hardly will."""

from typing import Any

import pytest

from app.domain.fit import Network, check, warnings
from app.domain.recipes import Published, resolve
from app.domain.spec import Spec
from tests.domain.bodies import ARCHITECTURES, body, facts, recipe

pytestmark = pytest.mark.unit

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
    assert checked({"training": {"batch_size": 12, "accumulate": 6}}, of=of) == {}
    parts = checked({"training": {"batch_size": 12, "accumulate": 12}}, of=of)["/training/accumulate"]
    assert "at least 2 samples per micro-batch; 12 of a batch of 12 have 1" in parts


SPLIT = facts(splits={"train": 80, "validation": 20}, labelled={"train": 80, "validation": 20})
PRETRAINS = recipe(kind="pretrain", requires={})


@pytest.mark.parametrize(
    ("metric", "data", "of", "fraction", "says"),
    [
        ("validation/loss", facts(), recipe(), 0.1, None),
        ("validation/loss", facts(), recipe(), 0.0, "data.validation_fraction is 0"),
        ("validation/loss", SPLIT, recipe(), 0.0, None),
        ("train/loss", facts(), recipe(), 0.0, None),
        ("validation/loss", facts(), PRETRAINS, 0.1, "sets no samples apart"),
        ("validation/loss", SPLIT, PRETRAINS, 0.1, None),
        ("probe/knn_accuracy", facts(), PRETRAINS, 0.1, None),
        ("probe/knn_accuracy", facts(), recipe(), 0.1, "does not probe"),
        ("accuracy", facts(), recipe(), 0.1, "comes first"),
        ("validation/acuracy", facts(), recipe(), 0.1, "Did you mean something like accuracy?"),
        ("train/learning_rate", facts(), recipe(), 0.1, "whether 'train/learning_rate' is to rise or to fall"),
        ("accuracy", facts(), recipe(requires={"unread": ("training.early_stopping",)}), 0.1, None),
    ],
)
def test_early_stopping_needs_something_to_look_at(
    metric: str, data: dict[str, Any], of: Published, fraction: float, says: str | None
) -> None:
    asked = {"training": {"early_stopping": {"metric": metric}}, "data": {"validation_fraction": fraction}}
    found = checked(asked, of=of, data=data)
    assert list(found) == ([] if says is None else ["/training/early_stopping/metric"])
    assert says is None or says in found["/training/early_stopping/metric"]


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
        body(training={"batch_size": 256}, data={"labels_per_class": 80, "validation_fraction": 0})
    )
    batch, labels = warnings(spec, recipe(), facts())
    assert "only 100 training samples" in batch
    assert "160 labels" in labels
    (unused,) = warnings(Spec.model_validate(body(resources={"device": "cpu", "gpus": 2})), recipe(), facts())
    assert "no GPU is used" in unused
    unread = recipe(requires={"unread": ("training.epochs", "training.seed")})
    (epochs,) = warnings(Spec.model_validate(body(training={"epochs": 3})), unread, facts())
    assert epochs.startswith("training.epochs changes nothing")
    assert warnings(Spec.model_validate(body()), recipe(), facts()) == []


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
