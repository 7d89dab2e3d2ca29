"""From an order to what the loop trains: recipe, backbone, objective, data and plan, each made once."""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from app.domain.datasets import DatasetFacts
from app.domain.errors import ResourceFault, UserFault
from app.domain.models import ModelConfig
from app.domain.spec import Spec
from worker import catalogue
from worker.data import features
from worker.data.images import Images, Streamed, open_images
from worker.data.rows import total_bytes
from worker.data.shelf import Shelf, shelf_of
from worker.data.source import Data, Source, in_order
from worker.parts import backbones, compute, machine, memo, tuning
from worker.parts.recompute import recompute_stages
from worker.parts.seed import derive, reseed
from worker.parts.taken_over import taken_over
from worker.parts.tuning import Plan
from worker.recipe import Info, Params, PretrainParams, Recipe
from worker.report import Order, Reporter
from worker.trainer.devices import choose_device, choose_processes, fits
from worker.trainer.network import Network, check_family, choose_network, start_backbone
from worker.trainer.samples import choose_samples, class_counts


@dataclass(frozen=True)
class Assembly:
    """Everything that one run needs."""

    spec: Spec
    recipe: Recipe
    params: Params
    plan: Plan
    network: Network
    info: Info
    objective: nn.Module
    data: Data
    device: torch.device
    facts: DatasetFacts

    def config(self) -> ModelConfig:
        """Describe the network that the run leaves behind, with its head where it has one."""
        head = getattr(self.objective, "head", None)
        return ModelConfig(
            architecture={**self.network.architecture, "weights": None},
            task=self.info.task,
            classes=self.info.classes if head is not None else (),
            head=_head_options(self.params) if head is not None else None,
            image_size=self.plan.image_size,
            channels=self.plan.channels,
            bits=self.facts.bits,
            mean=self.plan.mean,
            std=self.plan.std,
        )


def assemble(order: Order, reporter: Reporter, *, plan: Plan | None = None) -> Assembly:
    """Make everything that an order needs. With a plan (of an earlier attempt) nothing is chosen again that can stay.

    Raises:
        JobFault: the spec, the data or this machine cannot do it; the message names the field, file or row.
    """
    facts = order.dataset
    if facts is None:
        raise UserFault("dataset: give a dataset to train on.", code="no_dataset")
    spec, recipe, params = read_spec(order.spec)
    device = choose_device(spec, order)
    network = choose_network(spec, order, facts)
    check_family(recipe, network)
    size, channels = network.image_size, network.channels
    hardware = machine.look(device.type, order.threads)
    measured = memo.read(Path(order.cache), device.type, machine.fingerprint(device.type)) if plan is None else None
    family = network.facts["family"]
    threads = plan.threads if plan is not None else tuning.thread_count(family, size, hardware, measured)[0]
    torch.set_num_threads(threads)
    seed, shelf, of_all = spec.training.seed, shelf_of(order), sum(facts.splits.values())

    def images(split: str) -> Images | Streamed:
        opened = open_images(
            facts, split, image_size=size, channels=channels, shelf=shelf, threads=threads, reporter=reporter
        )
        return opened.on(device) if isinstance(opened, Images) and fits(opened, device, of_all) else opened

    train = images("train")
    # A part of the images that is streamed is only estimated from: the plan's figures are those of the run.
    mean, std = (plan.mean, plan.std) if plan is not None else network.normalisation or (train.mean, train.std)
    data = choose_samples(recipe, spec, facts, train, images, mean, std, seed)
    counts = class_counts(data.train.labels, len(facts.classes)) if recipe.requires.labels else ()
    processes = choose_processes(spec, order, device)
    backbone = start_backbone(network, seed, data)
    info = Info(
        task=facts.task, classes=facts.classes, samples=len(data.train), channels=channels, image_size=size,
        feature_dimension=int(cast(Any, backbone.dimension)), architecture=network.facts, class_counts=counts,
        labelled=int((data.train.labels >= 0).sum()), mean=tuple(mean), std=tuple(std), seed=seed,
        recipe=catalogue.recipe,
        pretrained=network.pretrained,
    )  # fmt: skip
    assert recipe.build is not None
    with torch.random.fork_rng(devices=[]):
        reseed(derive(seed, "objective"))
        objective = recipe.build(params, backbone, info)
    if isinstance(params, PretrainParams):
        teacher = getattr(objective, "teacher", None)
        for each in (backbone, *([teacher[0]] if teacher is not None else [])):
            backbones.freeze(each, params.freeze_stages)
        cast(Any, objective).backbone_learning_rate_scale = params.backbone_learning_rate_scale
    prepare = recipe.inputs(params, info) if recipe.inputs is not None else None
    data = replace(data, prepare=prepare)
    is_first = plan is None
    if plan is None:
        plan = tuning.resolve(
            spec.training,
            tuning.Workload(
                kind=recipe.kind, family=family, image_size=size, channels=channels,
                samples=len(data.train), couples_batch=bool(objective.couples_batch),
                step_passes=getattr(objective, "step_passes", tuning.STEP_PASSES),
                min_batch=recipe.requires.min_batch,
                pretrained=network.pretrained,
            ),
            hardware, mean=mean, std=std, processes=processes, memo=measured,
            fingerprint=machine.provenance(device.type),
            cache="stream" if isinstance(train, Streamed)
            else "resident" if fits(train, device, of_all) else "memory_map",
        )  # fmt: skip
    else:
        plan = tuning.spread(taken_over(plan, family, hardware, asked=spec.training), processes)
    made = Assembly(spec, recipe, params, plan, network, info, objective, data, device, facts)
    if is_first:
        made = replace(made, plan=_with_views(made, shelf, reporter))
    if plan.checkpoint_activations:
        recompute_stages(cast(Any, objective).backbone)
    return made


def start(
    made: Assembly, order: Order, reporter: Reporter, *, epochs_done: int = 0, at_beginning: bool = False
) -> Assembly:
    """Do what comes between the plan and step 0: run a frozen prefix over the data once and keep its output.

    Args:
        epochs_done: how many lie behind the checkpoint that the run goes on from.
        at_beginning: there is none, so that without room for that output the run is given another plan and does
            without it. Later that would be another computation than the one that was begun.

    Raises:
        ResourceFault: there is no room for it, neither on disk nor in memory.
    """
    compute.settle(made.plan)
    if made.plan.compile:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(order.cache) / "compiled")  # 2.5 s the next time, not 26
    layers: nn.Module | None = getattr(made.objective, "frozen_prefix", None)
    if not made.plan.prefix_views or layers is None:
        return made
    compute.place(made.objective, made.plan, made.device)
    prefix, shelf = features.identify(layers, made.plan, made.device), shelf_of(order)

    def cached(source: Source, views: int) -> features.Features:
        return features.cache_prefix(
            source, made.data, prefix, **_asked(made, source, views), shelf=shelf, reporter=reporter
        )  # fmt: skip

    try:
        train = cached(made.data.train, made.plan.prefix_views)
        validation = cached(made.data.validation, 1) if made.data.validation is not None else None
    except ResourceFault as fault:
        if not at_beginning or fault.code != "disk_full":
            raise
        needed = sum(_entries(made, prefix, made.plan.prefix_views).values())
        return replace(made, plan=features.without_views(made.plan, needed, fault, reporter))
    features.tell(train, validation, made.plan.epochs - epochs_done, reporter)
    return replace(made, data=replace(made.data, train=train, validation=validation, prepare=None))


def _with_views(made: Assembly, shelf: Shelf, reporter: Reporter) -> Plan:
    """Put into the plan how often frozen layers run over each sample, and why; 0 is in every epoch.

    This is said before step 0 and holds for every later attempt, because it is another computation: fixed views, and
    what is kept is rounded to bfloat16.
    """
    plan, data = made.plan, made.data
    layers: nn.Module | None = getattr(made.objective, "frozen_prefix", None)
    views, why = 0, getattr(made.objective, "no_prefix", None)
    if layers is not None:
        placed = compute.place(copy.deepcopy(layers), plan, made.device)  # as they will be when their output is wanted
        prefix = features.identify(placed, plan, made.device)
        read = [cast(Any, each).source.key for each in (data.train, data.validation, data.test) if each is not None]
        views, why = features.choose_views(
            plan, lambda views: _entries(made, prefix, views), augmented=data.prepare is not None, shelf=shelf,
            beside=set(read), reporter=reporter,
        )  # fmt: skip
    if why is None:
        return plan
    return plan.model_copy(update={"prefix_views": views, "reasons": {**plan.reasons, "prefix_views": why}})


def _entries(made: Assembly, prefix: features.Prefix, views: int) -> Mapping[str, int]:
    """Name the entries of the shelf that hold what the prefix gives for this run's samples, with their bytes."""
    wanted = [(made.data.train, views)]
    if made.data.validation is not None:
        wanted.append((made.data.validation, 1))
    named = (features.entry_of(source, prefix, **_asked(made, source, times)) for source, times in wanted)
    return {name: total_bytes(arrays) for name, arrays in named}


def _asked(made: Assembly, source: Source, views: int) -> dict[str, Any]:
    """Say what is wanted of a prefix for the rows of a source, as `features` takes it."""
    inputs = (made.recipe.name, made.recipe.version, made.params.model_dump(mode="json")) if views > 1 else None
    return {
        "views": views, "seed": made.spec.training.seed, "augmented": views > 1, "plan": made.plan,
        "device": made.device, "key": (_key(source), made.network.architecture, inputs),
    }  # fmt: skip


def read_spec(value: dict[str, Any]) -> tuple[Spec, Recipe, Params]:
    """Check a spec again, with the recipe's real class.

    Raises:
        UserFault: it does not hold; the message names the field.
    """
    try:
        spec = Spec.model_validate(value)
        recipe = catalogue.recipe(spec.recipe)
        return spec, recipe, recipe.Params.model_validate(spec.params)
    except ValidationError as error:
        first = error.errors()[0]
        where = "/".join(str(each) for each in first["loc"])
        raise UserFault(f"{where}: {first['msg']}.", code="invalid_spec") from error


def _key(source: Source) -> tuple[str, str]:
    """Name the rows of a part of the images, for the feature cache."""
    whole, rows = cast(Any, source).source, cast(Any, source).rows
    return whole.key, features.digest_rows(rows)


def _head_options(params: Params) -> dict[str, Any] | None:
    head = getattr(params, "head", None)
    return None if head is None else {"hidden": list(head.widths), "activation": head.activation}


def picture_rows(made: Assembly, count: int = 8) -> Tensor:
    """Choose the rows that are shown in a run's pictures."""
    return next(in_order(made.data.train, count))
