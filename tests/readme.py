"""The parts of the README that tests hold against the code: each lies between two comments."""

from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def part(name: str) -> str:
    """Give the text between the comment that begins with `name` and the one that ends it."""
    _, _, begun = README.read_text().partition(f"<!-- {name}: ")
    inside, ended, _ = begun.partition(f"<!-- end of {name} -->")
    assert ended, f"README.md has no part {name}"
    return inside.partition("-->\n")[2]
