"""Defaults laid over one another under a job's body: the recipe's, then those of `training.preset`. Pure."""

from collections.abc import Mapping
from typing import Any, cast

from app.domain.errors import Detail

Json = dict[str, Any]

# `fast` follows the published CIFAR-10 speed records (github.com/KellerJordan/cifar10-airbench, arXiv 2404.00498):
# Muon, a triangle of the learning rate, label smoothing, every image mirrored in every other epoch. What they need of
# the network lies under `model` and holds where the body names no other. The learning rate stays `auto`, because it
# goes with the batch, which goes with the data; worker/parts/tuning.py knows the preset.
_PRESETS: Mapping[str, Mapping[str, Json]] = {
    "fast": {
        "image_classification": {
            "model": {"architecture": "small_cnn", "width": 0.5, "whitening": True},
            "params": {"augmentation": "light", "mirror": "alternating", "label_smoothing": 0.2},
            "training": {
                "epochs": 5,
                "optimizer": {"name": "muon", "momentum": 0.9, "nesterov": True},
                "schedule": "triangular",
                "warmup_fraction": 0.0,
            },
        }
    }
}


def laid_under(body: Json, recipe: str, defaults: Mapping[str, Any]) -> Json:
    """Lay a recipe's defaults under a body, and the preset it asks for between the two: what the body says wins.

    A preset that this recipe does not have changes nothing; `refused_preset` says so.
    """
    preset = _PRESETS.get(_asked(body), {}).get(recipe, {})
    if isinstance(body.get("model"), Mapping) and body["model"].get("weights") is not None:
        preset = {key: value for key, value in preset.items() if key != "model"}  # trained as they are, not whitened
    return merge(merge(defaults, preset), body)


def refused_preset(body: Json, recipe: str) -> Detail | None:
    """Refuse a preset that is not made for this recipe."""
    name = _asked(body)
    if name not in _PRESETS or recipe in _PRESETS[name]:
        return None
    made_for = " and ".join(sorted(_PRESETS[name]))
    return Detail(
        pointer="/training/preset", message=f"The preset {name} is made for {made_for}: leave it out for {recipe}."
    )


def _asked(body: Json) -> str:
    training = body.get("training")
    return str(cast(Json, training).get("preset")) if isinstance(training, dict) else ""


def merge(defaults: Mapping[str, Any], body: Mapping[str, Any]) -> Json:
    """Lay `defaults` under `body`, object by object; what the body says always wins, null included.

    Two objects that name different things (an architecture, an optimiser) are alternatives and are not mixed: the
    options of the default one mean nothing to the other.
    """
    merged = dict(defaults)
    for key, value in body.items():
        default = merged.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            ours, theirs = cast(Mapping[str, Any], value), cast(Mapping[str, Any], default)
            merged[key] = dict(ours) if _are_alternatives(ours, theirs) else merge(theirs, ours)
        else:
            merged[key] = value
    return merged


def _are_alternatives(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return any(key in one and one[key] != other.get(key, one[key]) for key in ("architecture", "name"))
