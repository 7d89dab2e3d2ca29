"""Clusters of digits, which to label next, and maps: against chance, the naive way and the same seed again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import normalized_mutual_info_score

from app.domain.datasets import DatasetFacts
from tests.worker import models, sets
from tests.worker.models import done, order, table
from worker.parts.selection import farthest_first, typical
from worker.report import BaseModelInput, Failed

pytestmark = pytest.mark.worker


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> DatasetFacts:
    """600 training digits."""
    return sets.write_set(tmp_path_factory.mktemp("more"), sets.digits(600, 20))


def test_clusters_agree_with_digits(more: DatasetFacts, pretrained: BaseModelInput, tmp_path: Path) -> None:
    given = order("cluster", more, tmp_path, pretrained, params={"clusters": 10})
    last = done(given)
    found = table(given, "clusters.parquet")
    assert found.column_names == ["sample", "split", "label", "cluster", "distance"]
    clusters, labels = np.array(found["cluster"].to_pylist()), np.array(found["label"].to_pylist())
    assert last.result is not None
    assert last.result["sizes"] == np.bincount(clusters).tolist() == sorted(last.result["sizes"], reverse=True)
    assert last.metrics["cluster/nmi"] == pytest.approx(normalized_mutual_info_score(labels, clusters), abs=1e-6)
    assert (last.metrics["cluster/nmi"] or 0) > 0.45, "chance is near 0.05"
    assert (last.metrics["cluster/purity"] or 0) >= (last.metrics["cluster/matched_accuracy"] or 1) > 0.4
    for cluster, said in enumerate(last.result["classes"]):
        inside = labels[clusters == cluster]
        names, counts = np.unique(inside, return_counts=True)
        assert said["share"] == pytest.approx(counts.max() / len(inside), abs=1e-4)
        assert said["label"] in names[counts == counts.max()]
    assert last.metrics["cluster/inertia"] == pytest.approx(
        (np.array(found["distance"].to_pylist()) ** 2).sum(), rel=1e-3
    )
    done(order("cluster", more, tmp_path / "again", pretrained, params={"clusters": 10}))
    again = order("cluster", more, tmp_path / "again", pretrained)
    assert table(again, "clusters.parquet").equals(found), "the same seed gives the same clusters"
    other = order("cluster", more, tmp_path / "other", pretrained, training={"seed": 5})
    done(other)
    assert not table(other, "clusters.parquet").equals(found)


def test_the_number_of_clusters_is_chosen_by_silhouette(pretrained: BaseModelInput, tmp_path: Path) -> None:
    images, labels = sets.digits(1000, 1)["train"]
    two = images[labels < 2][:100]
    facts = sets.write_set(tmp_path / "set", {"train": (two, np.full(100, -1))})
    given = order("cluster", facts, tmp_path, pretrained, params={"clusters": [8, 2, 30], "starts": 2})
    last = done(given)
    assert last.result is not None
    assert [each["clusters"] for each in last.result["tried"]] == [2, 8, 30]
    best = max(last.result["tried"], key=lambda each: each["silhouette"])
    assert last.result["clusters"] == best["clusters"] == 2
    assert "cluster/purity" not in last.metrics, "without labels there is nothing to agree with"
    assert table(given, "clusters.parquet")["label"].null_count == 100


@pytest.mark.parametrize(
    ("recipe", "params", "says"),
    [
        ("cluster", {"clusters": 160}, "params.clusters: There are 160 samples"),
        ("cluster", {"clusters": [2, 200]}, "params.clusters.1: There are 160 samples"),
        ("select", {"count": 160}, "params.count: There are 160 samples"),
        ("select", {"count": 3}, "params.count: 0 of the samples have no label, not 3"),
    ],
)
def test_more_than_there_are(
    recipe: str, params: dict[str, Any], says: str, digits: DatasetFacts, pretrained: BaseModelInput, tmp_path: Path
) -> None:
    _, last = sets.carry_out(order(recipe, digits, tmp_path, pretrained, params=params))
    assert isinstance(last, Failed)
    assert last.error.fault == "user"
    assert says in last.error.message
    assert not list((tmp_path / "cache" / "shelf").glob("features*"))


def points(rows: int = 120) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 5, generator=torch.Generator().manual_seed(1)), dim=1)


def test_farthest_first_equals_the_naive_way_and_covers_better_than_chance() -> None:
    found, covered = points(), torch.zeros(120, dtype=torch.bool)
    covered[[3, 50]] = True
    chosen = farthest_first(found, covered, 15)
    whole = torch.cdist(found.double(), found.double())
    inside = [3, 50]
    for row, score in zip(chosen.rows.tolist(), chosen.scores.tolist(), strict=True):
        closest = whole[:, inside].min(1)[0]
        assert row == int(closest.argmax())
        assert score == pytest.approx(float(closest.max()), abs=1e-3)
        inside.append(row)
    radius = whole[:, inside].min(1)[0].max()
    draws = torch.Generator().manual_seed(0)
    by_chance = [
        whole[:, [3, 50, *torch.randperm(120, generator=draws)[:15].tolist()]].min(1)[0].max() for _ in range(20)
    ]
    assert radius < min(by_chance)
    alone = farthest_first(found, torch.zeros(120, dtype=torch.bool), 4)
    assert alone.scores[0].isnan()
    assert len(set(alone.rows.tolist())) == 4


def test_typical_rows_are_each_clusters_densest_and_labelled_clusters_come_last() -> None:
    draws = torch.Generator().manual_seed(2)
    centres = F.normalize(torch.randn(4, 8, generator=draws), dim=1)
    sizes = (40, 30, 20, 10)
    groups = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
    found = F.normalize(centres[groups] + 0.1 * torch.randn(100, 8, generator=draws), dim=1)
    covered = torch.zeros(100, dtype=torch.bool)
    covered[5] = True  # in the largest group, which so needs no label
    chosen = typical(found, covered, 3, neighbours=20, draws=torch.Generator().manual_seed(0))
    assert groups[chosen.rows].tolist() == [1, 2, 3]
    for row, score in zip(chosen.rows.tolist(), chosen.scores.tolist(), strict=True):
        inside = found[groups == groups[row]].double()
        k = min(20, len(inside) // 2)
        near = torch.cdist(inside, inside).topk(k + 1, largest=False)[0][:, 1:].mean(1)
        assert score == pytest.approx(float(1 / near.min()), rel=0.01)
    everything = typical(found, covered, 99, neighbours=20, draws=torch.Generator().manual_seed(0))
    assert sorted(everything.rows.tolist()) == [row for row in range(100) if row != 5]


def test_typical_samples_say_more_than_random_ones(
    more: DatasetFacts, pretrained: BaseModelInput, tmp_path: Path
) -> None:
    embedded = order("embed", more, tmp_path / "embed", pretrained, params={"normalise": True, "splits": ["train"]})
    done(embedded)
    values = torch.from_numpy(np.stack(table(embedded, "embedding.parquet")["embedding"].to_numpy()))
    labels = torch.from_numpy(sets.digits(600, 20)["train"][1])

    def accuracy(rows: torch.Tensor) -> float:
        return (labels[rows][(values @ values[rows].T).argmax(1)] == labels).float().mean().item()

    unlabelled = {"train": (sets.digits(600, 20)["train"][0], np.full(600, -1))}
    facts = sets.write_set(tmp_path / "set", unlabelled)
    given = order("select", facts, tmp_path, pretrained, params={"count": 10})
    last = done(given)
    found = table(given, "selected.parquet")
    assert found.column_names == ["rank", "sample", "split", "score", "cluster"]
    assert found["rank"].to_pylist() == list(range(1, 11))
    rows = torch.tensor(found["sample"].to_pylist())
    assert last.result is not None
    assert [each["sample"] for each in last.result["selected"]] == rows.tolist()
    draws = torch.Generator().manual_seed(0)
    random = torch.tensor([accuracy(torch.randperm(600, generator=draws)[:10]) for _ in range(30)])
    assert accuracy(rows) > random.mean() + random.std()


def test_labels_that_the_budget_hides_can_be_chosen(
    digits: DatasetFacts, pretrained: BaseModelInput, tmp_path: Path
) -> None:
    body = {"params": {"count": 12, "method": "coreset"}, "data": {"labels_per_class": 2}}
    given = order("select", digits, tmp_path, pretrained, **body)
    last = done(given)
    assert last.result is not None
    assert (last.result["labelled"], last.result["unlabelled"]) == (20, 140)
    found = table(given, "selected.parquet")
    assert "cluster" not in found.column_names
    scores = found["score"].to_pylist()
    assert scores == sorted(scores, reverse=True), "the farthest comes first, and covers some of the rest"
    done(order("select", digits, tmp_path / "again", pretrained, **body))
    assert table(order("select", digits, tmp_path / "again", pretrained), "selected.parquet").equals(found)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_map_keeps_alike_samples_together(
    method: str, digits: DatasetFacts, pretrained: BaseModelInput, tmp_path: Path
) -> None:
    given = order("map", digits, tmp_path, pretrained, params={"method": method, "samples": 120})
    last = done(given)
    found = table(given, "map.parquet")
    assert found.column_names == ["sample", "split", "label", "x", "y", "group"]
    flat = torch.tensor([found["x"].to_pylist(), found["y"].to_pylist()]).T
    labels = np.array(found["label"].to_pylist())
    near = torch.cdist(flat, flat).fill_diagonal_(torch.inf).argmin(1)
    assert (labels[near] == labels).mean() > {"pca": 0.25, "tsne": 0.5}[method], "a tenth would be chance"
    assert last.result is not None
    assert sum(each["samples"] for each in last.result["legend"]) == len(found) == 120
    assert len({each["colour"] for each in last.result["legend"]}) == 10


def test_a_map_without_labels_shows_clusters_and_takes_a_single_image(
    pretrained: BaseModelInput, tmp_path: Path
) -> None:
    images = sets.digits(30, 1)["train"][0]
    for rows, groups in ((30, 5), (1, 1)):
        facts = sets.write_set(tmp_path / f"set{rows}", {"train": (images[:rows], np.full(rows, -1))})
        params = {"method": "pca", "clusters": 5}
        last = done(order("map", facts, tmp_path / str(rows), pretrained, params=params))
        assert last.result is not None
        assert len(last.result["legend"]) == groups
    _, refused = sets.carry_out(order("map", facts, tmp_path / "1", pretrained))
    assert isinstance(refused, Failed)
    assert "tsne needs at least 8 samples" in refused.error.message


@pytest.mark.parametrize("recipe", ["embed", "cluster", "neighbours", "outliers", "select", "map"])
def test_every_one_looks_at_colour_through_a_grey_model_and_the_other_way(recipe: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    params: dict[str, Any] = {"cluster": {"clusters": 3}, "select": {"count": 4}, "map": {"method": "pca"}}
    small = {"neighbours": {"k": 3}, "outliers": {"k": 3}}
    for name, shape, channels in (("grey", (24, 9, 7), 3), ("colour", (24, 9, 7, 3), 1)):
        pixels = random.integers(0, 255, shape, np.uint8)
        facts = sets.write_set(tmp_path / name, {"train": (pixels, np.full(24, -1))})
        facts = facts.model_copy(update={"task": "unlabelled_images", "classes": ()})
        base = models.random(tmp_path / f"{name}-model", channels=channels)
        done(order(recipe, facts, tmp_path / name, base, params={**params, **small}.get(recipe, {})))
