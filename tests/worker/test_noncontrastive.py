"""VICReg and Barlow Twins: each loss against the paper in loops, two processes, collapse, and learning."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.domain.datasets import DatasetFacts
from tests.worker import sets
from tests.worker.forked import in_two_processes
from worker.parts import compute
from worker.parts.seed import generator
from worker.pretrain import barlow_twins, vicreg
from worker.recipe import Progress
from worker.report import Event, Finished
from worker.trainer.assembly import Assembly, assemble

pytestmark = pytest.mark.worker
Rows = list[list[float]]


def embeddings(batch: int = 6, width: int = 4) -> tuple[Tensor, Tensor]:
    one, noise = torch.randn(2, batch, width, generator=torch.Generator().manual_seed(8)).unbind(0)
    return 0.7 * one + 0.2, 0.7 * one + 0.4 * noise


def columns(z: Tensor) -> Rows:
    return z.double().T.tolist()


def naive_vicreg(z0: Tensor, z1: Tensor) -> dict[str, float]:
    """Equations 1 to 5 of arXiv 2105.04906, with the authors' half on each view's variance."""
    batch, width = z0.shape

    def means(z: Rows) -> list[float]:
        return [sum(column) / batch for column in z]

    def covariances(z: Rows) -> Rows:
        mean = means(z)
        return [
            [sum((z[i][n] - mean[i]) * (z[j][n] - mean[j]) for n in range(batch)) / (batch - 1) for j in range(width)]
            for i in range(width)
        ]

    views = [columns(z0), columns(z1)]
    matrices = [covariances(view) for view in views]
    hinges = [sum(max(0.0, 1 - math.sqrt(c[j][j] + 1e-4)) for j in range(width)) / width for c in matrices]
    others = [sum(c[i][j] ** 2 for i in range(width) for j in range(width) if i != j) / width for c in matrices]
    distance = sum((views[0][j][n] - views[1][j][n]) ** 2 for j in range(width) for n in range(batch))
    # The mean over the embedding as well: F.mse_loss in the authors' code, where equation 5 has a sum.
    return {
        "invariance": distance / batch / width, "variance": hinges[0] / 2 + hinges[1] / 2, "covariance": sum(others),
    }  # fmt: skip


def naive_barlow_twins(z0: Tensor, z1: Tensor, redundancy_weight: float) -> float:
    """Equations 1 and 2 of arXiv 2103.03230, with batch norm's epsilon."""
    batch, width = z0.shape

    def normalised(z: Rows) -> Rows:
        found: Rows = []
        for column in z:
            mean = sum(column) / batch
            length = math.sqrt(sum((value - mean) ** 2 for value in column) / batch + 1e-5)
            found.append([(value - mean) / length for value in column])
        return found

    one, other, loss = normalised(columns(z0)), normalised(columns(z1)), 0.0
    for i in range(width):
        for j in range(width):
            correlation = sum(one[i][n] * other[j][n] for n in range(batch)) / batch
            loss += (1 - correlation) ** 2 if i == j else redundancy_weight * correlation**2
    return loss


def make(recipe: str, digits: DatasetFacts, folder: Path, **params: Any) -> Assembly:
    made = assemble(sets.order(sets.spec(recipe, params=params), digits, folder), sets.Heard().reporter)
    compute.place(made.objective, made.plan, made.device)
    made.objective.train()
    return made


def ready(made: Assembly, step: int) -> dict[str, Tensor]:
    batch = made.data.train.batch(torch.arange(32))
    return compute.laid_out(made.data.ready(batch, made.device, generator(0, "inputs", step)), made.plan)


@pytest.mark.parametrize(("batch", "width"), [(2, 3), (6, 4), (5, 8)])
def test_vicregs_terms_are_the_papers(batch: int, width: int) -> None:
    z0, z1 = embeddings(batch, width)
    found = {name: value.item() for name, value in vicreg.terms(z0, z1).items() if name != "spread"}
    assert found == pytest.approx(naive_vicreg(z0, z1), rel=1e-5)
    assert min(found.values()) > 0, "every term was looked at"


@pytest.mark.parametrize(("batch", "width"), [(3, 3), (6, 4), (5, 8)])
def test_barlow_twins_loss_is_the_papers(batch: int, width: int) -> None:
    z0, z1 = embeddings(batch, width)
    invariance, redundancy = barlow_twins.terms(barlow_twins.cross_correlation(z0, z1))
    expected = naive_barlow_twins(z0, z1, 0.0051)
    assert (invariance + 0.0051 * redundancy).item() == pytest.approx(expected, rel=1e-5)


def test_autocast_does_not_reach_the_statistics() -> None:
    z0, z1 = embeddings(64, 16)
    exact = {**vicreg.terms(z0, z1), "correlation": barlow_twins.cross_correlation(z0, z1)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = {**vicreg.terms(z0, z1), "correlation": barlow_twins.cross_correlation(z0, z1)}
    assert all(torch.equal(found[name], exact[name]) for name in exact)


def test_the_weights_reach_the_loss(digits: DatasetFacts, tmp_path: Path) -> None:
    made = make("vicreg", digits, tmp_path / "v", invariance_weight=2, variance_weight=3, covariance_weight=5)
    found = made.objective(ready(made, 0), Progress(0, 1, 0, 1))
    expected = 2 * found["invariance"] + 3 * found["variance"] + 5 * found["covariance"]
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    made = make("barlow_twins", digits, tmp_path / "b", redundancy_weight=0.5, scale_loss=2)
    found = made.objective(ready(made, 0), Progress(0, 1, 0, 1))
    expected = 2 * (found["invariance"] + 0.5 * found["redundancy"])
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def _statistics(z0: Tensor, z1: Tensor) -> Tensor:
    found = vicreg.terms(z0, z1)
    correlated = sum(barlow_twins.terms(barlow_twins.cross_correlation(z0, z1)))
    return found["invariance"] + found["variance"] + found["covariance"] + correlated


@pytest.mark.filterwarnings("ignore")
def test_two_processes_measure_one_batch(tmp_path: Path) -> None:
    def half(rank: int) -> tuple[float, Rows]:
        mine = [z[3 * rank : 3 * rank + 3].clone().requires_grad_() for z in embeddings()]
        loss = _statistics(*mine)
        loss.backward()
        assert mine[0].grad is not None
        return loss.item(), mine[0].grad.tolist()

    losses, gradients = zip(*in_two_processes(half, tmp_path), strict=True)
    z0, z1 = (z.requires_grad_() for z in embeddings())
    whole = _statistics(z0, z1)
    whole.backward()
    assert losses == pytest.approx([whole.item()] * 2, rel=1e-5)
    # Each process differentiates the sum of both losses with regard to its own rows; DDP then takes the mean.
    torch.testing.assert_close(torch.tensor(gradients).flatten(0, 1) / 2, z0.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 25.0])
def test_without_its_variance_term_vicreg_collapses(weight: float, digits: DatasetFacts, tmp_path: Path) -> None:
    made = make("vicreg", digits, tmp_path, variance_weight=weight)
    optimizer = torch.optim.AdamW(made.objective.parameters(), lr=3e-3)
    spreads: list[float] = []
    for step in range(40):
        found = made.objective(ready(made, step), Progress(step, 40, 0, 1))
        found["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        spreads.append(found["spread"].item())
    if weight:
        assert spreads[-1] > 0.8 * spreads[0], spreads
    else:
        assert spreads[-1] < 0.3 * spreads[0], spreads


@pytest.mark.parametrize(("weight", "batch"), [(0.0, 32), (0.0, 64), (25.0, 64)])
def test_a_collapse_is_told_within_two_epochs_and_stops_where_asked(weight: float, batch: int, tmp_path: Path) -> None:
    """Through the whole loop, with the learning rate that `auto` gives and no label anywhere."""
    facts = sets.write_set(tmp_path / "set", sets.digits(20 * batch, 60))
    spec = sets.spec(
        "vicreg", model={"architecture": "small_cnn", "width": 0.25}, params={"variance_weight": weight},
        training={"epochs": 5, "batch_size": batch, "stop_on_collapse": True},
    )  # fmt: skip
    heard, last = sets.carry_out(sets.order(spec, facts, tmp_path))
    assert isinstance(last, Finished)
    assert last.result is not None
    collapsed = [event for event in heard.of(Event) if event.code == "representation.collapsed"]
    if weight:
        assert (collapsed, last.outcome) == ([], "succeeded")
    else:
        assert [event.level for event in collapsed] == ["warning"]
        assert "spread of 0.0" in collapsed[0].message
        assert (last.outcome, last.result["ended_by"]) == ("stopped", "collapse")
        assert last.result["epochs"] <= 2


@pytest.mark.parametrize("recipe", ["vicreg", "barlow_twins"])
def test_pretraining_learns_digits_without_labels(recipe: str, tmp_path: Path) -> None:
    """k-NN on the features must beat k-NN on the features of the untrained network by ten points."""
    training = {"batch_size": 25, "epochs": 24 if recipe == "barlow_twins" else 12, "learning_rate": 2e-3}
    spec = sets.spec(recipe, model={"architecture": "small_cnn", "width": 0.25}, training=training)
    untrained, trained = sets.before_and_after(spec, tmp_path)
    assert trained > untrained + 0.1, (untrained, trained)
