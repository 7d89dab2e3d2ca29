"""The configuration table of the README is the Settings class, line for line."""

import pytest

from app.settings import Settings
from tests import readme

pytestmark = pytest.mark.unit


def table() -> str:
    """Render every setting as a row: variable, default, meaning."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        rows.append(f"| `TUNEYARD_{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def test_the_readme_lists_every_setting_with_its_default() -> None:
    assert readme.part("settings") == table(), f"put this between the two comments of README.md:\n{table()}"
