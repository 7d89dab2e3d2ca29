"""What a trained network leaves behind: `model.safetensors`, `config.json`, `README.md` and `metrics.json`.

The same weights give the same bytes: nothing here writes a time, an order of arrival or an id of its own.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from app.domain.models import ModelConfig
from worker.parts.networks import state_dict
from worker.parts.snippets import input_snippet, loading_snippet
from worker.report import MadeFile, MadeModel

_HEADLESS = """The weights have torchvision's names, so a network with a head of your own loads them too:
`load_state_dict(…, strict=False)`."""
_PIPELINES = {"image_classification": "image-classification"}


@dataclass(frozen=True)
class Card:
    """What the model card says besides what follows from the network: `facts` become a table, in order."""

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)


def export(
    scratch: Path,
    backbone: nn.Module,
    head: nn.Module | None,
    *,
    config: ModelConfig,
    card: Card,
    metrics: Mapping[str, float | None],
    details: Mapping[str, Any] | None = None,
    folder: str = "model",
) -> MadeModel:
    """Write the files of a model into `scratch / folder` and name them.

    `metrics` are numbers by API name (`test/accuracy`); `details` go into `metrics.json` beside them (per class, the
    confusion matrix).
    """
    directory = scratch / folder
    directory.mkdir(parents=True, exist_ok=True)
    metrics = {name: value if value is not None and math.isfinite(value) else None for name, value in metrics.items()}
    state = state_dict(backbone, head)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", config.model_dump(mode="json"))
    _write_json(directory / "metrics.json", {"metrics": metrics, **(details or {})})
    (directory / "README.md").write_text(model_card(config, card, metrics), encoding="utf-8")
    parameters = sum(p.numel() for part in (backbone, head) if part is not None for p in part.parameters())
    media_types = {
        "model.safetensors": "application/octet-stream",
        "config.json": "application/json",
        "README.md": "text/markdown",
        "metrics.json": "application/json",
    }
    files = tuple(
        MadeFile(name=name, file=f"{folder}/{name}", media_type=media_type) for name, media_type in media_types.items()
    )
    return MadeModel(config=config, parameters=parameters, metrics=metrics, files=files)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def model_card(config: ModelConfig, card: Card, metrics: Mapping[str, float | None]) -> str:
    """Write the model card: Hub front matter, how to load and to feed the network, what it was made from."""
    front = ["---", "library_name: torchvision", "tags:", "- tuneyard", f"- {config.architecture['architecture']}"]
    pipeline = _PIPELINES.get(config.task) if config.classes else "image-feature-extraction"
    if pipeline:
        front.append(f"pipeline_tag: {pipeline}")
    front.append("---")
    output = f"one logit for each of {len(config.classes)} classes" if config.classes else "features without a head"
    wide = " (of 16 bits)" if config.bits == 16 else ""
    sections = [
        "\n".join(front),
        f"# {_inline(card.title)}",
        f"A `{config.architecture['architecture']}` for images of {config.image_size} x {config.image_size} pixels and "
        f"{config.channels} channel{'s' if config.channels > 1 else ''}; it gives {output}.",
        "## Load it",
        _fence(loading_snippet(config)),
    ]
    if not config.classes:
        sections.append(_HEADLESS)
    sections += [
        "## Feed it",
        f"Pixels in [0, 1]{wide}, resized to {config.image_size} x {config.image_size} ({config.interpolation}), then "
        f"`(x - mean) / std` with mean {_numbers(config.mean)} and standard deviation {_numbers(config.std)}.",
        _fence(input_snippet(config)),
    ]
    if config.classes:
        sections += ["## Classes", "\n".join(f"{n}. {_inline(name)}" for n, name in enumerate(config.classes))]
    if metrics:
        rows = [(name, "-" if value is None else f"{value:.4f}") for name, value in sorted(metrics.items())]
        sections += ["## Metrics", _table(("metric", "value"), rows)]
    if card.facts:
        rows = [(_inline(name), _inline(value)) for name, value in card.facts.items()]
        sections += ["## Made from", _table(("", ""), rows)]
    return "\n\n".join(sections) + "\n"


def _fence(code: str) -> str:
    return f"```python\n{code}\n```"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _inline(text: str) -> str:
    """Make a stranger's text harmless in one line of Markdown."""
    flat = " ".join(str(text).split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in flat)


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)
