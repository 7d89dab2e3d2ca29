"""The catalogue: it refuses what would hide a recipe, and publishes what the tables hold."""

import json
from dataclasses import replace

import pytest

from tests import readme
from worker import catalogue
from worker.finetune import image_classification

pytestmark = pytest.mark.worker


def test_the_catalogue_refuses_doubles_and_files_without_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    real = catalogue.importlib.import_module
    double = type("Double", (), {"RECIPE": replace(image_classification.RECIPE, kind="pretrain")})
    for stand_in, message in ((double, "both declare"), (object, "declares no RECIPE")):
        catalogue.recipes.cache_clear()
        monkeypatch.setattr(
            catalogue.importlib, "import_module",
            lambda name, stand_in=stand_in: stand_in if name.endswith("simclr") else real(name),
        )  # fmt: skip
        with pytest.raises(ValueError, match=message):
            catalogue.recipes()
    catalogue.recipes.cache_clear()


def test_what_is_published_has_the_columns_of_the_tables() -> None:
    published = json.loads(json.dumps(catalogue.published()))
    names = [row["name"] for row in published["recipes"]]
    assert names == sorted(names)
    assert {"autoencoder", "simclr", "image_classification"} <= set(names)
    for row in published["recipes"]:
        assert set(row) == {
            "name", "kind", "version", "summary", "tasks", "schema", "defaults", "template", "requires"
        }  # fmt: skip
    simclr = next(row for row in published["recipes"] if row["name"] == "simclr")
    training = simclr["schema"]["$defs"]["Training"]["properties"]
    assert training["epochs"]["default"] == simclr["defaults"]["training"]["epochs"], "the recipe's own default"
    assert {row["name"] for row in published["architectures"]} >= {"resnet18", "small_cnn", "mlp", "small_vit"}


def test_the_readme_lists_every_recipe() -> None:
    table = "| kind | recipe | what it does |\n|---|---|---|\n"
    for found in catalogue.recipes().values():
        said = found.summary.removeprefix("Learn features without labels: ")
        table += f"| {found.kind} | `{found.name}` | {said[0].upper()}{said[1:]} |\n"
    assert readme.part("recipes") == table, f"put this between the two comments of README.md:\n{table}"
