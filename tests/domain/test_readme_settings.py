"""The configuration table of the README is the Settings class, line for line."""

import pathlib

import pytest

from app.settings import Settings

pytestmark = pytest.mark.unit

README = pathlib.Path(__file__).parents[2] / "README.md"
START = "<!-- settings: generated from app/settings.py; a test compares -->\n"
END = "<!-- end of settings -->"


def table() -> str:
    """Render every setting as a row: variable, default, meaning."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        rows.append(f"| `TUNEYARD_{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def test_the_readme_lists_every_setting_with_its_default() -> None:
    text = README.read_text()
    written = text[text.index(START) + len(START) : text.index(END)]
    assert written == table(), f"put this between the two comments of README.md:\n{table()}"
