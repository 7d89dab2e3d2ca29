"""Names where ids are wanted: `digits` instead of `ds_…`; the newest version of that name is meant."""

from typing import Any

from app.client import Client, Misplaced


def dataset_id(client: Client, reference: str) -> str:
    """Give the id of a dataset, from its id or its name."""
    return _find(client.datasets, "ds_", "dataset", reference)


def model_id(client: Client, reference: str) -> str:
    """Give the id of a model, from its id or its name."""
    return _find(client.models, "mdl_", "model", reference)


def _find(resource: Any, prefix: str, noun: str, reference: str) -> str:
    if reference.startswith(prefix):
        return reference
    found = resource.list(name=reference, limit=1)["data"]
    if not found:
        raise Misplaced(f"There is no {noun} named {reference!r}; `tuneyard {noun}s list` shows what there is.")
    return found[0]["id"]
