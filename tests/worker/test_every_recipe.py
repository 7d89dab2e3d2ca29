"""What must hold of every recipe. A new one is tested by all of this with no test edited."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from jsonschema import Draft202012Validator
from pydantic import ValidationError
from safetensors.torch import load_file

from app.domain.datasets import DatasetFacts
from app.domain.spec import Spec
from tests.worker import sets
from tests.worker.unordered import unordered
from worker import catalogue, evaluate, loop
from worker.checkpoint import Checkpoints
from worker.parts import backbones, compute
from worker.parts.seed import generator, reseed
from worker.recipe import Progress, Recipe
from worker.report import Finished, Saved
from worker.trainer import alone
from worker.trainer.assembly import Assembly, assemble

pytestmark = pytest.mark.worker
RECIPES = [recipe for recipe in catalogue.recipes().values() if recipe.build is not None]


@pytest.fixture(params=RECIPES, ids=lambda recipe: recipe.name)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return request.param


@pytest.fixture(params=catalogue.recipes().values(), ids=lambda recipe: recipe.name)
def any_recipe(request: pytest.FixtureRequest) -> Recipe:
    return request.param


def make(recipe: Recipe, digits: DatasetFacts, folder: Path, **given: Any) -> Assembly:
    return assemble(sets.order(sets.spec(recipe.name, **given), digits, folder), sets.Heard().reporter)


def begun(made: Assembly) -> Any:
    """Give the objective as it is at its first step."""
    compute.place(made.objective, made.plan, made.device)
    made.objective.train()
    objective = cast(Any, made.objective)
    if hasattr(objective, "before_epoch"):
        rows = evaluate.FeaturesOf(objective.backbone, made.data, made.plan, made.device, lambda done, total: None)
        objective.before_epoch(rows, Progress(0, 10, 0, 1))
    return objective


def losses_of(made: Assembly, step: int = 0, rows: int = 16) -> dict[str, torch.Tensor]:
    batch = made.data.train.batch(torch.arange(rows))
    ready = compute.laid_out(made.data.ready(batch, made.device, generator(0, "inputs", step)), made.plan)
    reseed(step)  # what a recipe draws is the batch's too, as in the loop
    return made.objective(ready, Progress(step, 10, 0, 1))


def test_its_schema_accepts_its_template_and_its_defaults(any_recipe: Recipe) -> None:
    row = json.loads(json.dumps(catalogue.row(any_recipe)))
    Draft202012Validator.check_schema(row["schema"])
    validator = Draft202012Validator(cast(Any, row["schema"]))
    body = catalogue.merge(row["defaults"], {"recipe": any_recipe.name, "dataset": f"ds_{'a' * 26}"})
    for given in (row["template"], body):
        assert list(validator.iter_errors(given)) == []
        spec = Spec.model_validate(given)
        params = any_recipe.Params.model_validate(spec.params)
        assert any_recipe.Params.model_validate(params.model_dump(mode="json")) == params


def test_nonsense_is_refused_by_schema_and_class_alike(any_recipe: Recipe) -> None:
    validator = Draft202012Validator(cast(Any, catalogue.schema(any_recipe)))
    for params in ({"no_such_field": 1}, *({name: object.__name__ * 3} for name in _numbers(any_recipe))):
        assert list(validator.iter_errors({"recipe": any_recipe.name, "params": params})), params
        with pytest.raises(ValidationError):
            any_recipe.Params.model_validate(params)


def test_what_it_does_not_read_of_training_is_warned_of(any_recipe: Recipe, digits: DatasetFacts) -> None:
    body = {
        "recipe": any_recipe.name, "model": {"architecture": "vit_b_16", "weights": "IMAGENET1K_V1"},
        "training": {"seed": 5, "batch_size": 64, "precision": "float32"},
    }  # fmt: skip
    assert alone.doubts(alone.check(body, None), digits) == []
    unread = {"training": {"steps": 3, "schedule": "linear"}, "data": {"validation_fraction": 0.2}}
    if any_recipe.apply is None:
        return
    assert "training" not in catalogue.template(any_recipe)
    doubts = alone.doubts(alone.check({**body, **unread}, None), digits)
    fields = ["training.steps", "training.schedule", "data.validation_fraction"]
    assert [doubt.split()[0] for doubt in doubts] == fields


def _numbers(recipe: Recipe) -> list[str]:
    schema = recipe.Params.model_json_schema()["properties"]
    return [name for name, field in schema.items() if field.get("type") in ("number", "integer")]


def test_every_field_is_described_and_bounded(any_recipe: Recipe) -> None:
    for name, field in any_recipe.Params.model_json_schema()["properties"].items():
        assert field.get("description"), f"{name} has no description"
        kinds = [field, *field.get("anyOf", [])]
        for kind in kinds:
            if kind.get("type") in ("number", "integer"):
                assert {"minimum", "exclusiveMinimum"} & set(kind), f"{name} has no lower bound"
                assert {"maximum", "exclusiveMaximum"} & set(kind), f"{name} has no upper bound"


def test_it_says_whether_its_loss_can_take_turns(recipe: Recipe, digits: DatasetFacts, tmp_path: Path) -> None:
    """A loss that looks at whole epochs, chooses its rows or plays against another cannot, and is never asked to."""
    objective = make(recipe, digits, tmp_path).objective
    hooks = [hook for hook in ("before_epoch", "sample_weights", "opponents") if hasattr(objective, hook)]
    assert recipe.kind != "pretrain" or (recipe.requires.alone is not None) == bool(hooks), hooks


def test_one_step_gives_a_finite_loss_and_every_gradient(recipe: Recipe, digits: DatasetFacts, tmp_path: Path) -> None:
    made = make(recipe, digits, tmp_path)
    begun(made)
    loss = losses_of(made)["loss"]
    assert unordered(loss) == [], "a run on a GPU would not repeat"
    loss.backward()
    assert loss.isfinite()
    for name, parameter in made.objective.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


def test_it_overfits_two_batches(recipe: Recipe, digits: DatasetFacts, tmp_path: Path) -> None:
    """The loss falls; where it is a sum of opposed ones, each falls that has the field to itself."""
    opponents = getattr(begun(make(recipe, digits, tmp_path)), "opponents", {"loss": ("",)})
    for wanted, names in opponents.items():
        made = make(recipe, digits, tmp_path)
        objective = begun(made)
        trained = [parameter for name in names for parameter in objective.get_submodule(name).parameters()]
        optimizer = torch.optim.AdamW(trained, lr=3e-3)
        losses: list[float] = []
        for step in range(60):
            found = losses_of(made, step % 2)
            found["loss"].backward()
            optimizer.step()
            objective.zero_grad()
            # A cross entropy of soft targets falls to their entropy, no further.
            losses.append(found[wanted].item() - float(found.get("target_entropy", 0.0)))
        assert sum(losses[-4:]) < 0.7 * sum(losses[:4]), (wanted, losses)


def test_killed_and_resumed_equals_uninterrupted(recipe: Recipe, digits: DatasetFacts, tmp_path: Path) -> None:
    body = sets.spec(recipe.name, training={"checkpoint_every": 1, "epochs": 2})
    whole = sets.order(body, digits, tmp_path / "whole")
    heard, last = sets.carry_out(whole)
    assert isinstance(last, Finished), last
    steps = heard.of(Saved)[-1].step

    for kill_at in (1, steps // 2, steps - 1):
        cut = sets.order(body, digits, tmp_path / f"cut-{kill_at}")
        checkpoint = sets.killed_at(kill_at, cut)
        resumed = sets.order(body, digits, tmp_path / f"resumed-{kill_at}", checkpoint=checkpoint)
        again, ended = sets.carry_out(resumed)
        assert isinstance(ended, Finished), ended
        assert sets.weights_sha256(resumed) == sets.weights_sha256(whole)
        expected = [row for row in heard.metrics() if row[1] > kill_at]
        assert again.metrics() == expected
        assert ended.metrics == last.metrics
        assert ended.best == last.best


def test_its_export_loads_into_the_bare_backbone(recipe: Recipe, digits: DatasetFacts, tmp_path: Path) -> None:
    order = sets.order(sets.spec(recipe.name), digits, tmp_path)
    _, last = sets.carry_out(order)
    assert isinstance(last, Finished)
    assert last.model is not None
    config = last.model.config
    bare = backbones.build_backbone(
        config.architecture, channels=config.channels, image_size=config.image_size, seed=99
    )
    before = {name: value.clone() for name, value in bare.state_dict().items()}
    state = load_file(Path(order.scratch) / "model" / "model.safetensors")
    backbones.load_backbone(bare, state, source="the export")
    assert any(not torch.equal(value, before[name]) for name, value in bare.state_dict().items())
    for name, value in bare.state_dict().items():
        assert torch.equal(value, state[name])


def test_another_seed_gives_other_weights(recipe: Recipe, digits: DatasetFacts, tmp_path: Path) -> None:
    shas = []
    for seed in (0, 0, 1):
        order = sets.order(
            sets.spec(recipe.name, training={"epochs": 1, "seed": seed}), digits, tmp_path / str(len(shas))
        )
        sets.carry_out(order)
        shas.append(sets.weights_sha256(order))
    assert shas[0] == shas[1] != shas[2]


def test_the_loop_drives_it_without_a_checkpoint(recipe: Recipe, digits: DatasetFacts, tmp_path: Path) -> None:
    made = make(recipe, digits, tmp_path, training={"epochs": 1})
    heard = sets.Heard()
    result = loop.train(
        made.objective, made.data, made.spec.training, made.plan, made.device, heard.reporter,
        Checkpoints(tmp_path, heard.reporter), kind=recipe.kind,
    )  # fmt: skip
    assert result.outcome == "succeeded"
    assert result.step == made.plan.steps
    assert heard.codes()[0] == "train.first_step"
