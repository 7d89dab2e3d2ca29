"""From an order to what an `apply` recipe made: a trained model in eval mode, a dataset seen through it, a result."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from app.domain.chosen import too_many, unmet
from app.domain.datasets import SPLITS, DatasetFacts
from app.domain.errors import UserFault
from worker import catalogue
from worker.data import features
from worker.data.encoded import in_bytes
from worker.data.images import Images, Streamed, open_images
from worker.data.rows import Array, cached_rows
from worker.data.shelf import shelf_of
from worker.data.source import Data, ahead, in_order, part
from worker.data.split import reduced, split_labels
from worker.ingest import Interrupted
from worker.parts import backbones, compute, machine, networks, tuning
from worker.parts.memory import in_pieces
from worker.parts.seed import derive
from worker.parts.taken_over import taken_over
from worker.parts.tuning import Plan
from worker.recipe import Batch, Context, Info, Recipe, Result, Samples
from worker.report import Finished, MadeFile, Metrics, Order, Reporter
from worker.ticker import Ticker
from worker.trainer.announce import announce
from worker.trainer.assembly import read_spec
from worker.trainer.devices import choose_device, fits
from worker.trainer.network import Network, choose_network, start_backbone

Work = Callable[[str, int, int], None]


def run(order: Order, reporter: Reporter) -> Finished:
    """Use a model as ordered.

    Raises:
        JobFault: the spec, the data or this machine cannot do it; the message names the field, file or row.
        Interrupted: something else than going on is wanted; a later attempt begins again.
    """
    facts = order.dataset
    if facts is None:
        raise UserFault("dataset: give a dataset to look at.", code="no_dataset")
    spec, recipe, params = read_spec(order.spec)
    assert recipe.apply is not None
    chosen = params.model_dump(mode="json")
    needs, labelled = asdict(recipe.requires), {} if reduced(spec.data) else facts.labelled
    for wrong in (*too_many(needs, chosen, facts.splits, labelled), *unmet(needs, chosen, facts.splits, labelled)):
        raise UserFault(f"{wrong.pointer[1:].replace('/', '.')}: {wrong.message}", code="too_few_samples")
    device = choose_device(spec, order)
    given = Plan.model_validate(order.plan) if order.plan is not None else None
    threads = given.threads if given is not None else order.threads
    torch.set_num_threads(threads)
    network = choose_network(spec, order, facts)
    seed = spec.training.seed
    backbone, head, normal = _load(recipe, network, order, facts, seed, threads, reporter, given)
    work = tuning.Workload(
        kind=recipe.kind, family=network.facts["family"], image_size=network.image_size, channels=network.channels,
        samples=max(sum(facts.splits.values()), 1), pretrained=True,
    )  # fmt: skip
    hardware = machine.look(device.type, threads)
    plan = taken_over(given, work.family, hardware, asked=spec.training) if given is not None else tuning.resolve(
        spec.training.model_copy(update={"epochs": 1, "steps": None}), work, hardware,
        mean=normal[0], std=normal[1], fingerprint=machine.provenance(device.type),
    )  # fmt: skip
    announce(plan, device, reporter, first=given)
    compute.settle(plan)
    for module in (backbone, head):
        if module is not None:
            compute.place(module, plan, device).eval().requires_grad_(requires_grad=False)

    def hide(labels: Tensor) -> Tensor:
        """Leave the training labels that are within the job's budget, and -1 for the others."""
        if not reduced(spec.data):
            return labels
        kept = split_labels(labels, spec.data, seed=seed, validate=False).train
        return torch.full_like(labels, -1).index_copy(0, kept, labels[kept])

    seen = Seen(facts, order, network, backbone, plan, device, reporter, hide)
    info = Info(
        task=facts.task, classes=facts.classes, samples=facts.splits.get("train", 0), channels=network.channels,
        image_size=network.image_size, feature_dimension=int(cast(Any, backbone.dimension)),
        architecture=network.facts, mean=plan.mean, std=plan.std, recipe=catalogue.recipe,
    )  # fmt: skip
    context = Context(
        params=params, info=info, backbone=backbone, head=head, device=device, seed=seed, scratch=Path(order.scratch),
        samples=seen.samples, features=seen.features, images=seen.images, tick=seen.tick, event=reporter.event,
    )  # fmt: skip
    with torch.no_grad():
        made = recipe.apply(context)
    seen.tick(recipe.name, 1, 1)
    return _finished(made, reporter)


def _finished(made: Result, reporter: Reporter) -> Finished:
    if made.metrics:
        reporter.send(Metrics(rows=tuple((name, 0, value) for name, value in made.metrics.items())))
    files = tuple(MadeFile(name=name, file=name, media_type=media_type) for name, media_type in made.files.items())
    return Finished(outcome="succeeded", result=made.result, metrics=dict(made.metrics), files=files)


def _load(
    recipe: Recipe, network: Network, order: Order, facts: DatasetFacts, seed: int, threads: int, reporter: Reporter,
    given: Plan | None,
) -> tuple[nn.Module, nn.Module | None, tuple[tuple[float, ...], tuple[float, ...]]]:  # fmt: skip
    """Build the network with its weights; give backbone, head (of a model that has classes), mean and std.

    `given` is the plan of an earlier attempt.
    """
    if network.normalisation is None and recipe.requires.trained:
        raise UserFault(
            "model: this job needs trained weights: a model `mdl_…`, a job `job_…`, or an architecture with `weights`.",
            code="untrained_model",
        )
    if network.normalisation is None:  # a random start, as a training job would make it
        images = open_images(
            facts, "train", image_size=network.image_size, channels=network.channels, shelf=shelf_of(order),
            threads=threads, reporter=reporter,
        )  # fmt: skip
        # A stream only estimates them, and a later attempt may find the images decoded.
        mean, std = (given.mean, given.std) if given is not None else (images.mean, images.std)
        data = Data(part(images, torch.arange(len(images))), None, None, None, torch.tensor(mean), torch.tensor(std))
        return start_backbone(network, seed, data), None, (mean, std)
    if order.model is not None:
        whole = networks.load_network(order.model.config, Path(order.model.weights))
        return whole.backbone, whole.head, network.normalisation
    backbone = backbones.build_backbone(
        network.architecture, channels=network.channels, image_size=network.image_size, seed=derive(seed, "backbone")
    )
    return backbone, None, network.normalisation


@dataclass
class Seen:
    """A dataset through a model: each split opened and each split's features computed once, when first asked for."""

    facts: DatasetFacts
    order: Order
    network: Network
    backbone: nn.Module
    plan: Plan
    device: torch.device
    reporter: Reporter
    hide: Callable[[Tensor], Tensor]  # training labels [n] -> those that this job may see
    _sources: dict[str, Images | Streamed] = field(default_factory=dict)
    _features: dict[str, Tensor] = field(default_factory=dict)
    _tickers: dict[str, Ticker] = field(default_factory=dict)

    def tick(self, phase: str, done: int, total: int) -> None:
        """Give a sign of life, and end the job where something else than going on is wanted."""
        if self.reporter.wanted != "run":
            raise Interrupted(self.reporter.wanted)
        if phase not in self._tickers:
            self._tickers[phase] = Ticker(self.reporter, phase)
        self._tickers[phase](done, total)

    def samples(self, splits: Sequence[str] | None = None) -> Samples:
        """Give the rows of these splits, or of all; see `Context`."""
        there = [split for split in SPLITS if self.facts.splits.get(split, 0)]
        for split in splits or ():
            if split not in there:
                raise UserFault(
                    f"params.splits: the dataset has no {split} split; it has {', '.join(there)}.", code="no_such_split"
                )
        names = [split for split in there if splits is None or split in splits]
        sources = [self._source(name) for name in names]
        numbers = [torch.arange(len(source)) + source.first for source in sources]
        labels = [
            self.hide(source.labels) if name == "train" else source.labels
            for name, source in zip(names, sources, strict=True)
        ]
        split = [torch.full((len(source),), SPLITS.index(name)) for name, source in zip(names, sources, strict=True)]
        return Samples(torch.cat(numbers), torch.cat(labels), torch.cat(split))

    def features(self, samples: Samples) -> Tensor:
        """Give float32 [n, d]; see `Context`."""
        found: list[Tensor] = []
        for number in samples.split.unique_consecutive().tolist():
            name = SPLITS[number]
            if name not in self._features:
                self._features[name] = self._computed(name)
            rows = samples.numbers[samples.split == number] - self._source(name).first
            values = self._features[name]
            found.append(values if len(rows) == len(values) else values[rows.to(values.device)])
        return found[0] if len(found) == 1 else torch.cat(found)

    def images(self, numbers: Tensor) -> Tensor:
        """Give uint8 [n, channels, size, size] of samples by number; of 16 bits the upper half."""
        made = torch.empty(
            len(numbers), self.network.channels, self.network.image_size, self.network.image_size, dtype=torch.uint8
        )
        for split in SPLITS:
            if not self.facts.splits.get(split, 0):
                continue
            source = self._source(split)
            inside = ((numbers >= source.first) & (numbers < source.first + len(source))).nonzero().squeeze(1)
            if len(inside):
                made[inside] = in_bytes(source.batch(numbers[inside] - source.first)["image"]).cpu()
        return made

    def _source(self, split: str) -> Images | Streamed:
        if split not in self._sources:
            opened = open_images(
                self.facts, split, image_size=self.network.image_size, channels=self.network.channels,
                shelf=shelf_of(self.order), threads=self.plan.threads, reporter=self.reporter,
            )  # fmt: skip
            if isinstance(opened, Images) and fits(opened, self.device, sum(self.facts.splits.values())):
                opened = opened.on(self.device)
            self._sources[split] = opened
        return self._sources[split]

    def _computed(self, split: str) -> Tensor:
        """Compute a split's features, or find them, mapped from the host's shelf where it has room."""
        source, plan, phase = self._source(split), self.plan, f"features of {split}"
        rows, dimension = len(source), int(cast(Any, self.backbone.dimension))
        data = Data(source, None, None, None, torch.tensor(plan.mean), torch.tensor(plan.std))

        def embedded(piece: Batch) -> Tensor:
            ready = compute.laid_out(data.ready(piece, self.device), plan)
            return self.backbone(ready["image"]).float().flatten(1).cpu()

        def fill(arrays: dict[str, Tensor]) -> None:
            values, run = arrays["values"], in_pieces(embedded)
            with compute.autocast(plan, self.device):
                for numbers, batch in ahead(source, in_order(source, plan.batch_size)):
                    self.tick(phase, int(numbers[0]), rows)
                    values[numbers[0] : numbers[-1] + 1] = torch.cat(run({"image": batch["image"]}))
            if not values.isfinite().all():
                raise UserFault("model: it gives features that are not finite.", code="features_not_finite")

        key = features.key_of(
            features.digest(self.backbone), plan, self.device, "float32", plan.batch_size, source.key,
            self.network.architecture,
        )  # fmt: skip
        found, _ = cached_rows(
            shelf_of(self.order), key, {"values": Array(torch.float32, (rows, dimension))}, fill,
            lambda done: self.tick(phase, done, rows),
        )  # fmt: skip
        # All splits or none: what is found in one is compared with another.
        needed = sum(self.facts.splits.values()) * dimension * 4
        near = self.device.type == "cuda" and (
            needed <= torch.cuda.get_device_properties(self.device).total_memory // 8
        )
        return found["values"].to(self.device) if near else found["values"]
