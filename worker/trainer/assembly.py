"""From an order to what the loop trains: recipe, backbone, objective, data and plan, each made once."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from app.domain.datasets import DatasetFacts
from app.domain.errors import DataFault, ResourceFault, SystemFault, UserFault
from app.domain.models import ModelConfig
from app.domain.spec import Architecture, Spec
from worker import catalogue, evaluate
from worker.data import features
from worker.data.images import Images, Streamed, native_size, open_images
from worker.data.shelf import Shelf
from worker.data.source import Data, Source, in_order, part
from worker.data.split import reduced, split_labels
from worker.parts import architectures, backbones, compute, memo, small_networks, tuning
from worker.parts.recompute import recompute_stages
from worker.parts.seed import derive, reseed
from worker.parts.tuning import Plan
from worker.parts.weights import normalisation
from worker.recipe import Info, Params, PretrainParams, Recipe
from worker.report import Order, Reporter

WHITENED_ROWS = 1024  # training images that a whitening stem looks at
SMALLEST_SIDE = 32  # of torchvision's networks, which halve the image five times; our own small ones take 8


@dataclass(frozen=True)
class Network:
    """What the run starts from: a description that builds the backbone again, and weights to load into it."""

    architecture: dict[str, Any]
    facts: dict[str, Any]
    image_size: int
    channels: int
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None  # None: the training images' own
    weights: dict[str, Tensor] | None
    source: str


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
    """Make everything that an order needs. With a plan (of an earlier attempt) nothing is chosen again.

    Raises:
        JobFault: the spec, the data or this machine cannot do it; the message names the field, file or row.
    """
    facts = order.dataset
    if facts is None:
        raise UserFault("dataset: give a dataset to train on.", code="no_dataset")
    spec, recipe, params = read_spec(order.spec)
    device = choose_device(spec, order)
    network = choose_network(spec, order, facts)
    _check_family(recipe, network)
    size, channels = network.image_size, network.channels
    hardware = tuning.look(device.type, order.threads)
    measured = memo.read(Path(order.cache), device.type, tuning.fingerprint(device.type)) if plan is None else None
    family = network.facts["family"]
    threads = plan.threads if plan is not None else tuning.thread_count(family, size, hardware, measured)[0]
    torch.set_num_threads(threads)
    seed = spec.training.seed

    def images(split: str) -> Images | Streamed:
        opened = open_images(
            facts, split, image_size=size, channels=channels, cache=Path(order.cache), cache_bytes=order.cache_bytes,
            threads=threads, reporter=reporter,
        )  # fmt: skip
        return opened.on(device) if isinstance(opened, Images) and fits(opened, device) else opened

    train = images("train")
    mean, std = network.normalisation or (train.mean, train.std)
    data = _data(recipe, spec, facts, train, images, mean, std, seed)
    counts = _class_counts(data.train.labels, len(facts.classes)) if recipe.requires.labels else ()
    processes = choose_processes(spec, order, device)
    backbone = start_backbone(network, seed, data)
    info = Info(
        task=facts.task, classes=facts.classes, samples=len(data.train), channels=channels, image_size=size,
        feature_dimension=int(cast(Any, backbone.dimension)), architecture=network.facts, class_counts=counts,
        labelled=int((data.train.labels >= 0).sum()), mean=tuple(mean), std=tuple(std), seed=seed,
        recipe=catalogue.recipe,
        pretrained=network.weights is not None or network.architecture.get("weights") is not None,
    )  # fmt: skip
    assert recipe.build is not None
    with torch.random.fork_rng(devices=[]):
        reseed(derive(seed, "objective"))
        objective = recipe.build(params, backbone, info)
    if isinstance(params, PretrainParams):
        backbones.freeze(backbone, params.freeze_stages)
        cast(Any, objective).backbone_learning_rate_scale = params.backbone_learning_rate_scale
    prepare = recipe.inputs(params, info) if recipe.inputs is not None else None
    data = replace(data, prepare=prepare)
    if plan is None:
        plan = tuning.resolve(
            spec.training,
            tuning.Workload(
                kind=recipe.kind, family=family, image_size=size, channels=channels,
                samples=len(data.train), couples_batch=bool(objective.couples_batch),
                min_batch=recipe.requires.min_batch,
                pretrained=network.weights is not None or network.architecture.get("weights") is not None,
            ),
            hardware, mean=mean, std=std, processes=processes, memo=measured,
            cache="stream" if isinstance(train, Streamed) else "resident" if fits(train, device) else "memory_map",
        )  # fmt: skip
        if getattr(objective, "frozen_prefix", None) is not None:
            plan = plan.model_copy(
                update={"prefix_views": features.view_count(augmented=prepare is not None, epochs=plan.epochs)}
            )
    elif plan.world_size != processes:
        plan = tuning.spread(plan, processes)
    if plan.checkpoint_activations:
        recompute_stages(cast(Any, objective).backbone)
    return Assembly(spec, recipe, params, plan, network, info, objective, data, device, facts)


def start(made: Assembly, order: Order, reporter: Reporter) -> Assembly:
    """Do what comes between the plan and step 0: run a frozen prefix over the data once and keep its output."""
    compute.settle(made.plan)
    if made.plan.compile:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(order.cache) / "compiled")  # 2.5 s the next time, not 26
    prefix: nn.Module | None = getattr(made.objective, "frozen_prefix", None)
    if not made.plan.prefix_views or prefix is None:
        return made
    compute.place(made.objective, made.plan, made.device)
    shelf, digest = Shelf(Path(order.cache) / "features", order.cache_bytes), features.digest(prefix)

    def cached(source: Source | None, views: int) -> features.Features | None:
        if source is None:
            return None
        how = (made.plan.mean, made.plan.std, made.params.model_dump() if views > 1 else "")
        key = "/".join([_key(source), digest, repr(how)])
        return features.cache_prefix(
            source, made.data, prefix, views=views, seed=made.spec.training.seed, augmented=views > 1, plan=made.plan,
            device=made.device, key=key, shelf=shelf, reporter=reporter,
        )  # fmt: skip

    train = cached(made.data.train, made.plan.prefix_views)
    validation = cached(made.data.validation, 1)
    if train is None or (validation is None and made.data.validation is not None):
        reporter.event("features.not_cached", "The frozen layers' output does not fit the cache: they run every epoch.")
        return made
    saved = max(0, made.plan.epochs - made.plan.prefix_views)
    reporter.event(
        "features.cached",
        f"The frozen layers ran once over {len(train)} samples ({made.plan.prefix_views} views each); {saved} of "
        f"{made.plan.epochs} passes are saved.", views=made.plan.prefix_views, samples=len(train),
    )  # fmt: skip
    return replace(made, data=replace(made.data, train=train, validation=validation, prepare=None))


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


def choose_device(spec: Spec, order: Order) -> torch.device:
    """Give the device of the order, unless the job wants the CPU.

    Raises:
        ResourceFault: the job wants a GPU and was given none, which a server's queue never does.
        SystemFault: the GPU of the order does not answer.
    """
    wanted = spec.resources.device
    if not order.device.startswith("cuda"):
        if wanted == "cuda":
            raise ResourceFault(
                "resources.device: the job asks for a GPU (cuda), and this machine has none.", code="no_such_device",
                hint='Set resources.device to "auto" or "cpu", or run it where there is a GPU.',
            )  # fmt: skip
        return torch.device("cpu")
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemFault(
            f"The GPU of this worker ({order.device}) does not answer.", code="device_lost",
            hint="Look at its driver (nvidia-smi); another worker may go on.",
        )  # fmt: skip
    return torch.device(order.device)


def choose_processes(spec: Spec, order: Order, device: torch.device) -> int:
    """Give how many processes train together: as many as were ordered, else one per GPU of the job.

    Raises:
        ResourceFault: this worker has fewer GPUs.
    """
    wanted = order.processes or (spec.resources.gpus if device.type == "cuda" else 1)
    if device.type == "cuda" and wanted > torch.cuda.device_count():
        raise ResourceFault(
            f"resources.gpus: {wanted} GPUs are wanted, and this worker gives {torch.cuda.device_count()}.",
            code="too_few_gpus",
        )
    return wanted


def fits(images: Images, device: torch.device) -> bool:
    """Say whether decoded images shall live on the device: on a GPU, up to a quarter of its memory."""
    if device.type != "cuda":
        return False
    return images.pixels.nbytes <= torch.cuda.get_device_properties(device).total_memory // 4


def choose_network(spec: Spec, order: Order, facts: DatasetFacts) -> Network:
    """Find what the run starts from: the order's model, or the architecture in the spec.

    Raises:
        UserFault: there is neither, or the architecture cannot be built so.
    """
    if order.model is not None:
        config = order.model.config
        found = _facts(config.architecture["architecture"])
        return Network(
            config.architecture, found, config.image_size, config.channels, (config.mean, config.std),
            load_file(order.model.weights), f"model {order.model.id}",
        )  # fmt: skip
    if not isinstance(spec.model, Architecture):
        raise UserFault('model: give a network to start from, such as {"architecture": "small_cnn"}.', code="no_model")
    architecture = spec.model.model_dump(mode="json")
    found = _facts(architecture["architecture"])
    size = architecture["image_size"] or _suiting_size(architecture, found, facts)
    architecture["image_size"] = size
    architectures.check(architecture)
    published = architecture["weights"] is not None
    channels = 3 if published else facts.channels
    normal = normalisation(architecture["architecture"], channels) if published else None
    return Network(architecture, found, size, channels, normal, None, architecture["architecture"])


def _check_family(recipe: Recipe, network: Network) -> None:
    """Refuse a network that the recipe cannot train; the API does so too, but not every run comes from there."""
    families, family = recipe.requires.architectures, network.facts["family"]
    if families is None or family in families:
        return
    name = network.architecture["architecture"]
    reason = recipe.requires.reason or f"{recipe.name} works with {' and '.join(families)} networks only"
    raise UserFault(f"model.architecture: {name} is a {family} network: {reason}.", code="architecture")


def _facts(name: str) -> dict[str, Any]:
    for row in architectures.facts():
        if row["name"] == name:
            return row["facts"]
    raise UserFault(f"model.architecture: there is no {name!r}.", code="unknown_architecture")


def _suiting_size(architecture: dict[str, Any], found: dict[str, Any], facts: DatasetFacts) -> int:
    """Choose the image size: the images' own where they are small, but at least what the network was made for."""
    least = max(found["min_image_size"], 8 if architecture["architecture"] in backbones.SMALL else SMALLEST_SIDE)
    size = max(native_size(facts), least)
    if architecture["weights"] is not None:
        size = max(size, 64)
    patch = architecture.get("patch") or found["patch"] or 1
    return -(-size // patch) * patch


def _data(
    recipe: Recipe, spec: Spec, facts: DatasetFacts, train: Images | Streamed, images: Any, mean: tuple[float, ...],
    std: tuple[float, ...], seed: int,
) -> Data:  # fmt: skip
    everything = torch.arange(len(train))
    brings_validation = facts.splits.get("validation", 0) > 0
    probe = None
    if recipe.requires.labels:
        # Under a budget the validation labels come out of it, even where the dataset brings more of them.
        uses_split = brings_validation and facts.labelled.get("validation", 0) > 0 and not reduced(spec.data)
        labels = split_labels(train.labels, spec.data, seed=seed, validate=not uses_split)
        rows, hidden = labels.train, None
        if recipe.requires.unlabelled:
            if not len(labels.unlabelled):
                raise DataFault(
                    f"{recipe.name} needs unlabelled training samples, and every one here has a label.",
                    code="no_unlabelled_samples", hint="Add some, or hide labels with data.labels_per_class.",
                )  # fmt: skip
            hidden = torch.ones(len(train), dtype=torch.bool)
            hidden[labels.train] = False
            rows = torch.cat([labels.train, labels.unlabelled]).sort()[0]
        training = part(train, rows, hidden=hidden)
        validation = _labelled(images("validation")) if uses_split else None
        if not uses_split and len(labels.validation):
            validation = part(train, labels.validation)
    else:
        training = part(train, everything)
        validation = _whole(images("validation")) if brings_validation else None
    if recipe.kind == "pretrain":
        probe = part(train, evaluate.probe_rows(len(train), seed))
    if len(training) < recipe.requires.min_samples:
        raise DataFault(
            f"{recipe.name} needs at least {recipe.requires.min_samples} training samples; {len(training)} are usable.",
            code="too_few_samples",
        )
    test = _labelled(images("test")) if facts.splits.get("test", 0) and facts.labelled.get("test", 0) else None
    return Data(
        training,
        validation,
        test if recipe.requires.labels else None,
        None,
        torch.tensor(mean),
        torch.tensor(std),
        probe,
    )


def _whole(source: Source) -> Source:
    return part(source, torch.arange(len(source)))


def _labelled(source: Source) -> Source:
    return part(source, (source.labels >= 0).nonzero().squeeze(1))


def _class_counts(labels: Tensor, classes: int) -> tuple[int, ...]:
    return tuple(torch.bincount(labels[labels >= 0], minlength=classes).tolist())


def start_backbone(network: Network, seed: int, data: Data) -> nn.Module:
    """Build the backbone that a run starts from, with the weights that it starts with."""
    backbone = backbones.build_backbone(
        network.architecture, channels=network.channels, image_size=network.image_size, seed=derive(seed, "backbone")
    )
    if network.weights is not None:
        backbones.load_backbone(backbone, network.weights, source=network.source)
    elif small_networks.fixed_stem(backbone):
        rows = evaluate.probe_rows(len(data.train), seed)[:WHITENED_ROWS]
        backbones.initialise_from(backbone, data.ready(data.train.batch(rows), torch.device("cpu"))["image"])
    return backbone


def _key(source: Source) -> str:
    """Name the rows of a part of the images, for the feature cache."""
    whole, rows = cast(Any, source).source, cast(Any, source).rows
    return f"{whole.key}/{features.digest_rows(rows)}"


def _head_options(params: Params) -> dict[str, Any] | None:
    head = getattr(params, "head", None)
    return None if head is None else {"hidden": list(head.widths), "activation": head.activation}


def picture_rows(made: Assembly, count: int = 8) -> Tensor:
    """Choose the rows that are shown in a run's pictures."""
    return next(in_order(made.data.train, count))
