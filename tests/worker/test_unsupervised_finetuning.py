"""Going on without labels from a model: what is frozen stands still, what is scaled moves less, for every method."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from app.domain.datasets import DatasetFacts
from app.domain.errors import UserFault
from app.domain.spec import Training
from tests.worker import sets
from worker import catalogue
from worker.parts import backbones, optim
from worker.parts.export import Card, export
from worker.recipe import PretrainParams, Recipe
from worker.report import BaseModelInput, Order
from worker.trainer.assembly import Assembly, assemble

pytestmark = pytest.mark.worker
METHODS = [recipe for recipe in catalogue.recipes().values() if recipe.kind == "pretrain"]


def network(recipe: Recipe) -> dict[str, Any]:
    """The smallest network that the method takes."""
    families = recipe.requires.architectures
    if families is None or "convolutional" in families:
        return sets.NETWORK
    return {"architecture": "small_vit", "patch": 2, "width": 24, "depth": 2, "heads": 2}


def backbone_of(made: Assembly) -> nn.Module:
    """The network that is exported."""
    return cast(Any, made.objective).backbone


def base_of(made: Order) -> BaseModelInput:
    """A model as it starts, for `made` to start from."""
    folder = Path(made.scratch) / "base"
    folder.mkdir()
    assembly = assemble(made, sets.Heard().reporter)
    export(folder, backbone_of(assembly), None, config=assembly.config(), card=Card("base", {}), metrics={},
           details={})  # fmt: skip
    weights = next(folder.rglob("model.safetensors"))
    return BaseModelInput(id="mdl_" + "a" * 26, config=assembly.config(), weights=str(weights))


@pytest.mark.parametrize("recipe", METHODS, ids=lambda recipe: recipe.name)
def test_frozen_stages_stand_still_and_the_others_move(recipe: Recipe, digits: DatasetFacts, tmp_path: Path) -> None:
    fresh = {**sets.spec(recipe.name, params={"freeze_stages": 1}), "model": network(recipe)}
    base = base_of(sets.order(fresh, digits, tmp_path / "base"))
    order = sets.order({**fresh, "model": base.id}, digits, tmp_path / "job", model=base)
    sets.finished(order)
    before, after = load_file(base.weights), load_file(Path(order.scratch) / "model" / "model.safetensors")
    made = assemble(order, sets.Heard().reporter)
    first = backbones.stage_modules(backbone_of(made))[0]
    own = {id(value) for value in (*first.parameters(), *first.buffers())}
    names = {
        name for name, value in (*backbone_of(made).named_parameters(), *backbone_of(made).named_buffers())
        if id(value) in own
    }  # fmt: skip
    assert names
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not changed & names, "a frozen stage moved, batch norm included"
    assert changed - names, "nothing trained"


@pytest.mark.parametrize("name", ["byol", "dino"])
def test_a_teacher_is_frozen_where_its_student_is(name: str, digits: DatasetFacts, tmp_path: Path) -> None:
    """At the start it is its student's copy; a norm that stands still in one of them alone would tell them apart."""
    spec = sets.spec(name, params={"freeze_stages": 2})
    made = assemble(sets.order(spec, digits, tmp_path), sets.Heard().reporter)
    objective = cast(Any, made.objective).train()
    images = torch.rand(8, made.plan.channels, made.plan.image_size, made.plan.image_size)
    student = objective.projector(objective.backbone(images))
    assert torch.equal(objective.teacher(images), student)
    frozen = backbones.stage_modules(objective.teacher[0])[:2]
    norms = [module for stage in frozen for module in stage.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(int(norm.num_batches_tracked or 0) == 0 for norm in norms)


def test_every_method_says_how_it_goes_on() -> None:
    assert METHODS
    for recipe in METHODS:
        assert issubclass(recipe.Params, PretrainParams), recipe.name


def test_the_backbones_rate_is_a_part_of_the_others() -> None:
    module = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    named = [{"names": ["backbone.weight"], "lr_scale": 0.5}]
    found = {name: group.learning_rate_scale for group in optim.groups(module, named, backbone_scale=0.1)
             for name in group.names}  # fmt: skip
    assert found == pytest.approx({"backbone.weight": 0.05, "backbone.bias": 0.1, "head.weight": 1.0, "head.bias": 1.0})


def test_the_scale_of_a_job_reaches_its_optimiser(digits: DatasetFacts, tmp_path: Path) -> None:
    moved: dict[float, float] = {}
    for scale in (1.0, 0.01):
        body = sets.spec("simclr", params={"backbone_learning_rate_scale": scale}, training={"steps": 3})
        order = sets.order(body, digits, tmp_path / str(scale))
        before = {k: v.clone() for k, v in backbone_of(assemble(order, sets.Heard().reporter)).state_dict().items()}
        sets.finished(order)
        after = load_file(Path(order.scratch) / "model" / "model.safetensors")
        filters = [name for name, value in before.items() if value.ndim == 4]
        moved[scale] = sum(float((before[name] - after[name]).abs().sum()) for name in filters)
    assert 0 < moved[0.01] < 0.1 * moved[1.0]


def test_freezing_everything_is_refused_by_name(digits: DatasetFacts, tmp_path: Path) -> None:
    body = sets.spec("simclr", params={"freeze_stages": 4})
    with pytest.raises(UserFault, match=r"params\.freeze_stages is 4, but this network has 4 stages: at most 3"):
        assemble(sets.order(body, digits, tmp_path), sets.Heard().reporter)
    assert Training().stop_on_collapse is False
