"""Bodies of jobs, and what they name: recipes, architectures and datasets as they are published and stored."""

from typing import Any

from app.domain.recipes import Published

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
