import jsonschema
import pytest
import torch

from app.domain.errors import UserFault
from worker.parts import architectures
from worker.parts.architectures import facts, has_small_stem, measure_one
from worker.parts.backbones import build_backbone, names

pytestmark = pytest.mark.worker

FACTS = {row["name"]: row["facts"] for row in facts()}


def test_every_torchvision_classifier_and_three_of_ours_are_published():
    import torchvision

    assert set(FACTS) == {*torchvision.models.list_models(module=torchvision.models), "small_cnn", "mlp", "small_vit"}
    assert list(FACTS) == names()


@pytest.mark.parametrize("name", names())
def test_every_schema_is_a_schema_and_takes_the_bare_name(name):
    schema = FACTS[name]["schema"]
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    # As the service stores it: with the defaults of every architecture filled in.
    usual = {"architecture": name, "weights": None, "image_size": None, "stem": "standard", "keep_stages": None}
    assert validator.is_valid({"architecture": name})
    assert validator.is_valid(usual)
    assert validator.is_valid(usual | {"image_size": FACTS[name]["min_image_size"]})
    assert not validator.is_valid(usual | {"image_size": FACTS[name]["min_image_size"] - 1})
    assert not validator.is_valid(usual | {"colour": 1})
    assert not validator.is_valid(usual | {"weights": "NONSENSE"})
    assert validator.is_valid(usual | {"stem": "small"}) == has_small_stem(name)
    assert not validator.is_valid(usual | {"keep_stages": FACTS[name]["stages"] + 1})


@pytest.mark.parametrize(
    ("architecture", "fits"),
    [
        ({"architecture": "resnet18", "weights": "IMAGENET1K_V1"}, True),
        ({"architecture": "resnet18", "weights": "ResNet18_Weights.IMAGENET1K_V1"}, True),
        ({"architecture": "resnet18", "weights": "DEFAULT"}, True),
        ({"architecture": "small_cnn", "weights": "DEFAULT"}, False),
        ({"architecture": "resnet18", "weights": "ResNet50_Weights.IMAGENET1K_V1"}, False),
        ({"architecture": "densenet121", "image_size": 8}, False),
        ({"architecture": "densenet121", "image_size": 8, "stem": "small"}, True),
        ({"architecture": "vit_b_16", "image_size": 32}, True),
        ({"architecture": "vit_b_16", "image_size": 40}, False),
        ({"architecture": "small_vit", "image_size": 30}, False),
        ({"architecture": "small_vit", "image_size": 30, "patch": 2}, True),
        ({"architecture": "small_vit", "heads": 16}, True),
        ({"architecture": "small_vit", "heads": 8, "width": 100}, False),
        ({"architecture": "small_vit", "depth": 12, "keep_stages": 12}, True),
        ({"architecture": "small_vit", "keep_stages": 8}, False),
        ({"architecture": "mlp", "hidden": [64], "activation": "gelu"}, True),
        ({"architecture": "mlp", "hidden": []}, False),
        ({"architecture": "small_cnn", "width": 0}, False),
        ({"architecture": "small_cnn", "whitening": True, "width": 0.5}, True),
    ],
)
def test_options(architecture, fits):
    schema = FACTS[architecture["architecture"]]["schema"]
    assert jsonschema.Draft202012Validator(schema).is_valid(architecture) == fits
    if fits and "weights" not in architecture:
        size = architecture.get("image_size") or 32
        backbone = build_backbone(architecture, channels=3, image_size=size, seed=0).eval()
        assert backbone(torch.zeros(1, 3, size, size)).shape == (1, backbone.dimension)


def test_the_trainer_refuses_what_the_schema_refuses():
    architectures.check({"architecture": "small_vit", "image_size": 32, "stem": "standard", "weights": None})
    with pytest.raises(UserFault, match=r"model/image_size: 16 is less than the minimum of 29 \(densenet121\)"):
        architectures.check({"architecture": "densenet121", "image_size": 16})
    with pytest.raises(UserFault, match="'colour' was unexpected"):
        architectures.check({"architecture": "densenet121", "colour": 1})
    with pytest.raises(UserFault, match="there is no 'resnet19'"):
        architectures.check({"architecture": "resnet19"})


def test_families():
    assert {facts["family"] for facts in FACTS.values()} == {"convolutional", "hierarchical", "vit", "mlp"}
    assert FACTS["small_vit"]["family"] == FACTS["vit_b_16"]["family"] == "vit"
    assert FACTS["vit_b_16"]["patch"] == 16
    assert FACTS["resnet18"]["patch"] is None


@pytest.mark.parametrize("name", ["googlenet", "resnet18", "vit_b_32", "small_cnn", "mlp", "small_vit"])
def test_the_stored_measurements_are_those_of_this_torchvision(name):
    assert architectures._measured()[name] == measure_one(name)


@pytest.mark.long
@pytest.mark.parametrize("name", names())
def test_every_stored_measurement(name):
    assert architectures._measured()[name] == measure_one(name)


@pytest.mark.parametrize("name", ["squeezenet1_0", "densenet121", "googlenet"])
def test_the_smallest_size_is_honest(name):
    """One pixel less fails on real numbers too; the size itself works (test_backbones tries every one)."""
    size = FACTS[name]["min_image_size"] - 1
    backbone = build_backbone({"architecture": name}, channels=3, image_size=size, seed=0).eval()
    with pytest.raises(RuntimeError):
        backbone(torch.zeros(2, 3, size, size))
