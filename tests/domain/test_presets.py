"""A preset lies between the recipe's defaults and the body; whoever asks for it with another recipe is told."""

from typing import Any

import pytest

from app.domain.errors import Invalid
from app.domain.fit import warnings
from app.domain.presets import laid_under
from app.domain.recipes import resolve
from app.domain.spec import Spec
from tests.domain.bodies import ARCHITECTURES, body, facts, recipe

pytestmark = pytest.mark.unit

DEFAULTS = {"training": {"epochs": 30, "seed": 7, "gradient_clip": 1.0}, "model": {"architecture": "small_cnn"}}


def fast(**given: Any) -> dict[str, Any]:
    training = {"preset": "fast", **given.pop("training", {})}
    return laid_under(body(training=training, **given), "image_classification", DEFAULTS)


def test_it_lies_over_the_recipes_defaults_and_under_the_body() -> None:
    made = fast(training={"epochs": 9, "gradient_clip": None}, params={"label_smoothing": 0.0})
    assert made["training"]["epochs"] == 9
    assert made["training"]["gradient_clip"] is None
    assert made["training"]["seed"] == 7
    assert made["training"]["schedule"] == "triangular"
    assert made["training"]["optimizer"]["name"] == "muon"
    assert made["params"] == {"augmentation": "light", "mirror": "alternating", "label_smoothing": 0.0}
    assert made["model"] == {"architecture": "small_cnn", "width": 0.5, "whitening": True}
    assert fast()["training"]["epochs"] == 5


def test_without_it_nothing_changes() -> None:
    for training in ({}, {"preset": None}, {"preset": "no such"}, 3):
        made = laid_under(body(training=training), "image_classification", {"params": {"a": 1}})
        assert made == body(training=training, params={"a": 1})


def test_laying_it_under_twice_changes_nothing() -> None:
    once = fast(training={"epochs": 9})
    assert laid_under(once, "image_classification", DEFAULTS) == once


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        ({"architecture": "resnet18"}, {"architecture": "resnet18"}),
        ({"width": 1.0}, {"architecture": "small_cnn", "width": 1.0, "whitening": True}),
        ({"whitening": False}, {"architecture": "small_cnn", "width": 0.5, "whitening": False}),
        ({"weights": "mdl_a"}, {"architecture": "small_cnn", "weights": "mdl_a"}),
        ("mdl_a", "mdl_a"),
    ],
)
def test_what_it_says_of_the_network_holds_for_that_network_only(model: Any, kept: Any) -> None:
    assert fast(model=model)["model"] == kept


def test_another_optimiser_is_not_given_the_options_of_its_own() -> None:
    assert fast(training={"optimizer": {"name": "sgd"}})["training"]["optimizer"] == {"name": "sgd"}
    assert fast(training={"optimizer": "sgd"})["training"]["optimizer"] == "sgd"


def test_the_spec_shows_what_it_came_to_and_a_retry_of_it_is_the_same() -> None:
    published = recipe(schema={"type": "object", "properties": {}})
    architectures = {**ARCHITECTURES, "small_cnn": {**ARCHITECTURES["small_cnn"], "schema": None}}
    architectures["small_cnn"]["schema"] = {"properties": {"width": {"type": "number"}, "whitening": {}}}
    spec = resolve(body(training={"preset": "fast"}), published, architectures)
    assert (spec.training.preset, spec.training.epochs, spec.training.schedule) == ("fast", 5, "triangular")
    assert spec.params["mirror"] == "alternating"
    again = resolve(spec.model_dump(mode="json"), published, architectures)
    assert again == spec


def test_a_recipe_that_it_was_not_made_for_refuses_it() -> None:
    with pytest.raises(Invalid) as caught:
        resolve(body(recipe="simclr", training={"preset": "fast"}), recipe(name="simclr"), ARCHITECTURES)
    (detail,) = caught.value.details
    assert detail.pointer == "/training/preset"
    assert detail.message == "The preset fast is made for image_classification: leave it out for simclr."


def test_a_name_that_is_none_is_refused_by_the_schema() -> None:
    with pytest.raises(Invalid) as caught:
        resolve(body(training={"preset": "fsat"}), recipe(), ARCHITECTURES)
    assert caught.value.details[0].pointer == "/training/preset"
    assert "fast" in caught.value.details[0].message


def test_too_few_samples_for_its_epochs_are_warned_of() -> None:
    spec = Spec.model_validate(body(training={"preset": "fast", "epochs": 4}))
    few, many = (facts(splits={"train": count}) for count in (160, 50_000))
    (warning,) = warnings(spec, recipe(), few)
    assert "try training.epochs 250" in warning
    assert warnings(spec, recipe(), many) == []
    assert warnings(Spec.model_validate(body()), recipe(), few) == []
