"""How good a run is: the validation and test split through an objective, and a probe of the features it has made."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from app.domain.errors import UserFault
from worker.data.source import Data, Source, ahead, in_order
from worker.parts import compute, distributed, metrics
from worker.parts.memory import in_pieces
from worker.parts.seed import derive, generator, reseed
from worker.parts.tuning import PROBE_ROWS, VIEW_ROWS, Plan, view_rows
from worker.recipe import Batch, Progress

CALMER = "Lower training.learning_rate, or set training.gradient_clip to 1."  # where numbers run away

Tick = Callable[[int, int], None]  # is told how many rows of how many are done


@contextmanager
def evaluating(module: nn.Module, plan: Plan, device: torch.device) -> Iterator[None]:
    """Eval mode without gradients or other processes, under the plan's autocast; back to training mode after."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad(), compute.autocast(plan, device), compute.uncompiled(plan), distributed.alone():
            yield
    finally:
        module.train(was_training)


def outputs(
    module: nn.Module, source: Source, data: Data, plan: Plan, device: torch.device, tick: Tick
) -> dict[str, Tensor]:
    """Run an objective's `evaluate` over a source: its per-sample tensors, and "label", on the CPU.

    An objective without one gives the loss of its forward pass on inputs drawn as in training, the same every time;
    where memory does not hold a batch at once, the mean over pieces of the size that training takes.
    Several processes take turns in the batches, and all get everything.
    """
    evaluate: Callable[..., dict[str, Tensor]] | None = getattr(module, "evaluate", None)
    collected: dict[int, list[dict[str, Tensor]]] = {}
    number = first = distributed.rank()
    step = distributed.world_size()
    batches = list(in_order(source, max(plan.batch_size, 256)))

    def found_in(batch: Batch) -> dict[str, Tensor]:
        if evaluate is None:
            reseed(derive(0, "validation", number), device)
            ready = data.ready(batch, device, generator(0, "validation", number, device=device))
            loss: Tensor = module(compute.laid_out(ready, plan), Progress(0, 1, 0, 1))["loss"]
            found = {"loss": loss.float().expand(len(batch["label"]))}
        else:
            found = evaluate(compute.laid_out(data.ready(batch, device), plan))
        return {name: value.detach().cpu() for name, value in {**found, "label": batch["label"]}.items()}

    run = in_pieces(
        found_in, least=1 if evaluate is not None else plan.batch_size // (plan.accumulate * plan.world_size)
    )
    with evaluating(module, plan, device):
        for turn, (rows, batch) in enumerate(ahead(source, iter(batches[first::step]), device=device)):
            number = first + turn * step
            if evaluate is None and len(rows) < plan.batch_size and number:
                continue  # a loss that couples its batch means something else on a small rest
            collected[number] = run(batch)
            tick((number + 1) * len(rows), len(source))
    everything = {number: found for part in distributed.gather_objects(collected) for number, found in part.items()}
    in_turn = [found for number in sorted(everything) for found in everything[number]]
    return {name: torch.cat([found[name] for found in in_turn]) for name in (in_turn[0] if in_turn else ())}


def measure(found: dict[str, Tensor]) -> dict[str, float]:
    """Turn per-sample tensors into numbers."""
    numbers: dict[str, float] = {}
    if "loss" in found:
        numbers["loss"] = found["loss"].double().mean().item()
    if "logits" in found and bool((found["label"] >= 0).any()):
        numbers |= metrics.classification(found["logits"], found["label"])
    return numbers


def details(found: dict[str, Tensor], classes: tuple[str, ...]) -> dict[str, Any]:
    """Give what is too much for a metric: numbers per class and the confusion matrix."""
    if "logits" not in found or not classes or not bool((found["label"] >= 0).any()):
        return {}
    return metrics.per_class(found["logits"], found["label"], classes)


def features(backbone: nn.Module, source: Source, data: Data, plan: Plan, device: torch.device, tick: Tick) -> Tensor:
    """Give the backbone's features of every row, without augmentation: float32 [rows, d] on the device."""
    made: list[Tensor] = []
    batches = list(in_order(source, 256))
    shared = len(batches) >= distributed.world_size()
    first, step = (distributed.rank(), distributed.world_size()) if shared else (0, 1)
    run = in_pieces(lambda piece: _embedded(backbone, data.ready(piece, device), plan))
    with evaluating(backbone, plan, device):
        for _, batch in ahead(source, iter(batches[first::step]), device=device):
            made.append(torch.cat(run({"image": batch["image"]})))
            tick(len(made) * 256 * step, len(source))
    return distributed.interleave(made, 256, len(source)) if shared else torch.cat(made)


def _embedded(backbone: nn.Module, ready: Batch, plan: Plan) -> Tensor:
    return backbone(compute.laid_out(ready, plan)["image"]).float().flatten(1)


@dataclass(frozen=True)
class FeaturesOf:
    """The features of all training rows, in order (see recipe.FeaturesOf)."""

    backbone: nn.Module
    data: Data
    plan: Plan
    device: torch.device
    tick: Tick

    @property
    def labels(self) -> Tensor:
        """int64 [rows], -1 where there is none."""
        return self.data.train.labels

    def __call__(self, module: nn.Module | None = None) -> Tensor:
        """Run the backbone, or another module, over the rows: float32 [rows, d] on the device."""
        return features(module or self.backbone, self.data.train, self.data, self.plan, self.device, self.tick)


def probe(module: nn.Module, data: Data, plan: Plan, device: torch.device, tick: Tick) -> dict[str, float]:
    """Look at the features of some training rows: how many directions they use, how evenly they spread, whether two
    views of an image agree (where the run draws views), and what k-NN and a linear layer read from them.

    Four fifths of the labelled rows teach the two classifiers, the others are asked; the test split is not touched.
    What the objective itself measures on the features (`probed`) comes with it.

    Raises:
        UserFault: a feature is not finite.
    """
    assert data.probe is not None
    objective = cast(Any, module)
    found = features(objective.backbone, data.probe, data, plan, device, tick)
    if not bool(found.isfinite().all()):
        raise UserFault(
            "The features of some training samples are not finite.", code="features_not_finite", phase="evaluate",
            hint=CALMER,
        )  # fmt: skip
    numbers = {
        "effective_rank": metrics.effective_rank(found),
        "feature_spread": metrics.feature_spread(found),
        "uniformity": metrics.uniformity(found[: 2 * VIEW_ROWS]),
    }
    if hasattr(module, "probed"):
        with evaluating(module, plan, device):
            numbers |= objective.probed(found)
    views = _two_views(objective.backbone, data, plan, device)
    if views is not None:
        numbers["alignment"] = metrics.alignment(*views)
    labels = data.probe.labels.to(device)
    known = labels >= 0
    found, labels = found[known], labels[known]
    held = torch.arange(len(labels), device=device) % 5 == 4
    if len(torch.unique(labels[~held])) > 1 and bool(held.any()):
        asked = (found[~held], labels[~held], found[held], labels[held])
        numbers["knn_accuracy"] = metrics.knn_accuracy(*asked)
        numbers["linear_accuracy"] = metrics.linear_probe_accuracy(*asked)
    return numbers


def _two_views(backbone: nn.Module, data: Data, plan: Plan, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Give the features of two random views of some probe rows, the same draws every time; None without views."""
    assert data.probe is not None
    rows = torch.arange(view_rows(len(data.probe)))
    ready = data.ready(data.probe.batch(rows), device, generator(0, "views", device=device))
    if len(ready["image"]) < 2 * len(rows):
        return None
    with evaluating(backbone, plan, device):
        run = in_pieces(lambda piece: _embedded(backbone, piece, plan))
        first, second = torch.cat(run({"image": ready["image"][: 2 * len(rows)]})).chunk(2)
    return first, second


def probe_rows(count: int, seed: int) -> Tensor:
    """Choose the training rows that are probed: a fixed random part, in a fixed random order."""
    return torch.randperm(count, generator=generator(seed, "probe"))[:PROBE_ROWS]
