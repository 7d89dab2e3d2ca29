"""DeepCluster: its loss, its whitening and its clusters against naive ones, what it must not see, and learning."""

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from app.domain.datasets import DatasetFacts
from app.domain.errors import UserFault
from tests.worker import sets
from worker import evaluate
from worker.parts import compute
from worker.parts.whitening import whitening
from worker.pretrain.deepcluster import DeepCluster
from worker.recipe import Progress
from worker.trainer.assembly import Assembly, assemble

pytestmark = pytest.mark.worker


def make(facts: DatasetFacts, folder: Path, **params: Any) -> tuple[Assembly, DeepCluster, evaluate.FeaturesOf]:
    body = sets.spec("deepcluster", params={"augmentation": "none", **params}, training={"precision": "float32"})
    made = assemble(sets.order(body, facts, folder), sets.Heard().reporter)
    compute.place(made.objective, made.plan, made.device)
    objective = cast(DeepCluster, made.objective.train())
    rows = evaluate.FeaturesOf(objective.backbone, made.data, made.plan, made.device, lambda done, total: None)
    return made, objective, rows


def batch_of(made: Assembly, rows: Tensor) -> dict[str, Tensor]:
    return compute.laid_out(made.data.ready(made.data.train.batch(rows), made.device), made.plan)


def naive_embedding(points: Tensor, dimension: int) -> np.ndarray:
    """Section 3.3 of arXiv 1807.05520 by a singular value decomposition: reduce, whiten, normalise."""
    x = points.double().numpy()
    x = x - x.mean(0)
    left, values, _ = np.linalg.svd(x, full_matrices=False)
    kept = min(dimension, int((values**2 > 1e-4 * values[0] ** 2).sum()))
    white = left[:, :kept] * math.sqrt(len(x))
    return white / np.linalg.norm(white, axis=1, keepdims=True)


def test_whitened_points_are_white() -> None:
    points = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.tensor([9.0] * 3 + [1] * 3)
    )
    points = torch.cat([points, points[:, :1], torch.zeros(500, 1)], 1) + 5
    shift, matrix = whitening(points, 20)
    assert matrix.shape == (8, 6), "two of eight directions are empty"
    white = (points - shift) @ matrix
    torch.testing.assert_close(white.T @ white / 500, torch.eye(6), atol=1e-4, rtol=0)
    assert torch.equal(whitening(points, 2)[1], matrix[:, :2]), "the widest directions come first"


@pytest.mark.parametrize("cluster_on", ["features", "pixels"])
def test_clusters_are_the_nearest_centroids_of_the_papers_embedding(
    cluster_on: str, digits: DatasetFacts, tmp_path: Path
) -> None:
    _, objective, rows = make(digits, tmp_path, clusters=9, cluster_on=cluster_on, pca_dimension=12)
    points = rows(objective._pixels) if cluster_on == "pixels" else rows()
    assert points.shape == (160, 64) if cluster_on == "pixels" else points.shape[0] == 160
    objective.before_epoch(rows, Progress(0, 10, 0, 1))
    assignment = objective.get_buffer("assignment").numpy()
    embedded = naive_embedding(points, 12)
    # Up to signs the embedding is the same, and so are means and distances: each point lies nearest to its own mean.
    means = np.stack([embedded[assignment == number].mean(0) for number in range(9)])
    distances = ((embedded[:, None] - means[None]) ** 2).sum(2)
    # k-means stops a little before the last point has settled.
    assert (distances.argmin(1) == assignment).mean() > 0.97
    assert len(np.unique(assignment)) == 9


@pytest.mark.parametrize("head", ["new", "centroids"])
def test_the_loss_is_the_papers(head: str, digits: DatasetFacts, tmp_path: Path) -> None:
    """Equation 1 with the clusters as labels, sample by sample; for the centroids the softmax of their cosines."""
    made, objective, rows = make(digits, tmp_path, clusters=7, head=head, temperature=0.2)
    objective.before_epoch(rows, Progress(0, 10, 0, 1))
    objective.eval()
    batch = batch_of(made, torch.tensor([3, 140, 8, 77]))
    found = objective(batch, Progress(0, 10, 0, 1))
    features = objective.backbone(batch["image"]).detach().double()
    state = {name: value.double() for name, value in objective.state_dict().items()}
    total = 0.0
    for feature, row in zip(features, [3, 140, 8, 77], strict=True):
        if head == "new":
            logits = [
                float(w @ feature + b)
                for w, b in zip(state["classifier.weight"], state["classifier.bias"], strict=True)
            ]
        else:
            z = (feature - state["shift"]) @ state["matrix"]
            logits = [float(z @ c / z.norm() / c.norm()) / 0.2 for c in state["centroids"]]
        wanted = int(state["assignment"][row])
        total -= logits[wanted] - math.log(sum(math.exp(each) for each in logits))
    assert found["loss"].item() == pytest.approx(total / 4, rel=1e-4)
    # An image that was clustered is judged by its own cluster, as far as k-means settled it.
    judged = objective.evaluate(batch_of(made, torch.arange(160)))["loss"]
    own = torch.stack(
        [objective(batch_of(made, torch.tensor([row])), Progress(0, 1, 0, 1))["loss"] for row in range(160)]
    )
    assert torch.isclose(judged, own, atol=1e-4).float().mean() > 0.95


def test_a_new_clustering_begins_a_new_head(digits: DatasetFacts, tmp_path: Path) -> None:
    _, objective, rows = make(digits, tmp_path, clusters=7, reassign_every=2)
    assert objective.classifier is not None
    before = objective.classifier.weight.clone()
    stale = objective.before_epoch(rows, Progress(0, 40, 0, 4))
    assert {id(each) for each in stale} == {id(each) for each in objective.classifier.parameters()}
    assert not torch.equal(objective.classifier.weight, before)
    kept = objective.classifier.weight.clone()
    assert objective.before_epoch(rows, Progress(10, 40, 1, 4)) == []
    assert torch.equal(objective.classifier.weight, kept)
    assert objective.before_epoch(rows, Progress(20, 40, 2, 4))
    assert 0 < objective.get_buffer("told")[0] <= 1, "the clusters before were compared"
    _, auto, rows = make(digits, tmp_path, clusters=7)
    # Ten steps an epoch: five epochs for fifty steps. A hundred: three epochs, so that it costs little beside training.
    due = [[epoch for epoch in range(12) if auto._due(Progress(0, 12 * each, epoch, 12))] for each in (10, 100)]
    assert due == [[0, 5, 10], [0, 3, 6, 9]]
    _, pixels, rows = make(digits, tmp_path, clusters=7, cluster_on="pixels", reassign_every=1)
    assert pixels.before_epoch(rows, Progress(0, 40, 0, 4))
    assert pixels.before_epoch(rows, Progress(10, 40, 1, 4)) == [], "pixels stay what they are"
    _, centroids, rows = make(digits, tmp_path, clusters=7, head="centroids")
    assert centroids.before_epoch(rows, Progress(0, 40, 0, 4)) == []


def test_every_cluster_is_drawn_equally_often(digits: DatasetFacts, tmp_path: Path) -> None:
    made, objective, rows = make(digits, tmp_path, clusters=7)
    objective.before_epoch(rows, Progress(0, 10, 0, 1))
    weights = objective.sample_weights(made.data.train.labels)
    assert weights is not None
    shares = torch.zeros(7, dtype=torch.float64).index_add(0, objective.get_buffer("assignment"), weights)
    torch.testing.assert_close(shares, torch.ones(7, dtype=torch.float64))
    _, plain, _ = make(digits, tmp_path, clusters=7, balanced=False)
    assert plain.sample_weights(made.data.train.labels) is None


def test_labels_are_told_about_and_never_trained_on(tmp_path: Path) -> None:
    known = sets.digits()
    hidden = {split: (pixels, np.full_like(labels, -1)) for split, (pixels, labels) in known.items()}
    metrics: list[set[str]] = []
    orders = []
    for name, splits in (("known", known), ("hidden", hidden)):
        facts = sets.write_set(tmp_path / name / "set", splits)
        orders.append(sets.order(sets.spec("deepcluster", params={"reassign_every": 1}), facts, tmp_path / name))
        heard, _ = sets.finished(orders[-1])
        metrics.append({row[0] for row in heard.metrics()})
        told = {row[0]: row[2] for row in heard.metrics()}
        assert 0 < (told["train/nmi_before"] or 0) <= 1
        assert name == "hidden" or 0 < (told["train/nmi"] or 0) <= 1
    assert metrics[0] - metrics[1] >= {"train/nmi", "train/purity", "train/matched_accuracy"}
    assert sets.weights_sha256(orders[0]) == sets.weights_sha256(orders[1])


def test_waiting_for_a_better_nmi_is_waiting_for_other_clusters(digits: DatasetFacts, tmp_path: Path) -> None:
    stopping = {"metric": "train/nmi", "patience": 2, "min_delta": 1.0}  # the first clusters stay the best ones
    training = {"epochs": 12, "batch_size": 40, "early_stopping": stopping}
    spec = sets.spec("deepcluster", params={"reassign_every": 2}, training=training)
    heard, last = sets.finished(sets.order(spec, digits, tmp_path))
    result = last.result or {}
    assert (result["ended_by"], result["steps"]) == ("early_stopping", 20)
    told = {(step - 1) // 4 for name, step, _ in heard.metrics() if name == "train/nmi"}
    assert told == {0, 2, 4}, "the epochs that begin with other clusters"
    assert (last.best or {})["step"] == 4


def test_clusters_of_pixels_which_never_change_stop_no_run(digits: DatasetFacts, tmp_path: Path) -> None:
    training = {"early_stopping": {"metric": "train/purity"}}
    order = sets.order(sets.spec("deepcluster", params={"cluster_on": "pixels"}, training=training), digits, tmp_path)
    _, last = sets.failed(order)
    assert last.error.code == "unknown_metric"
    assert "which training does not change" in last.error.message


@pytest.mark.parametrize(
    ("params", "code"),
    [({"clusters": 161}, "too_many_clusters"), ({"head": "centroids", "cluster_on": "pixels"}, "head_of_pixels")],
)
def test_what_cannot_be_clustered_is_refused_before_training(
    params: dict[str, Any], code: str, digits: DatasetFacts, tmp_path: Path
) -> None:
    with pytest.raises(UserFault) as refused:
        make(digits, tmp_path, **params)
    assert refused.value.code == code


def test_two_clusters_on_three_samples(tmp_path: Path) -> None:
    facts = sets.write_set(tmp_path / "set", sets.digits(3, 3))
    _, objective, rows = make(facts, tmp_path, clusters=2)
    objective.before_epoch(rows, Progress(0, 10, 0, 1))
    assert objective.get_buffer("assignment").unique().tolist() == [0, 1]


def test_a_contact_sheet_is_left(digits: DatasetFacts, tmp_path: Path) -> None:
    from PIL import Image

    order = sets.order(sets.spec("deepcluster", params={"clusters": 30}), digits, tmp_path)
    _, last = sets.finished(order)
    assert [file.name for file in last.files] == ["clusters.png"]
    with Image.open(Path(order.scratch) / last.files[0].file) as picture:
        assert picture.size == (8 * 66 + 2, 20 * 66 + 2), "eight members of the twenty largest clusters"


@pytest.mark.parametrize("cluster_on", ["features", "pixels"])
def test_pretraining_learns_digits_without_labels(cluster_on: str, tmp_path: Path) -> None:
    """k-NN on the features must beat k-NN on the features of the untrained network by five points."""
    training = {"batch_size": 25, "epochs": 12, "learning_rate": 2e-3}
    params = {"cluster_on": cluster_on, "clusters": 60}
    network = {"architecture": "small_cnn", "width": 0.25}
    spec = sets.spec("deepcluster", model=network, params=params, training=training)
    untrained, trained = sets.before_and_after(spec, tmp_path)
    assert trained > untrained + 0.05, (untrained, trained)
