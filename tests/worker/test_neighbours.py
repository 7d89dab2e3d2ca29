"""Searches in pieces against the naive way, and what the recipes on them find in sets where it was planted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import LocalOutlierFactor

from app.domain.datasets import DatasetFacts
from tests.worker import sets
from tests.worker.models import done, order, table
from worker.apply.outliers import pair_similarity
from worker.parts import neighbours
from worker.parts.neighbours import distances, local_outlier_factor, nearest, pairs_above
from worker.report import BaseModelInput

pytestmark = pytest.mark.worker
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so small that every search here takes several."""
    monkeypatch.setattr(neighbours, "QUERIES", 37)
    monkeypatch.setattr(neighbours, "BANK", 53)
    monkeypatch.setattr(neighbours, "GATHERED", 900)


def values(rows: int = 150, dimension: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, dimension, generator=torch.Generator().manual_seed(seed)) + 0.5


def test_nearest_equals_the_whole_matrix() -> None:
    bank, queries = values(), values(90, seed=1)
    whole = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    similarity, index = whole.topk(60, dim=1)
    found = nearest(queries, bank, 60, CPU)
    assert torch.equal(found.index, index)
    torch.testing.assert_close(found.similarity, similarity)
    origin = bank.mean(0)
    seen = F.normalize(queries - origin, dim=1) @ F.normalize(bank - origin, dim=1).T
    assert torch.equal(nearest(queries, bank, 5, CPU, origin=origin).index, seen.topk(5, dim=1)[1])


def test_a_row_does_not_find_what_is_excluded() -> None:
    bank = values(80)
    excluded = torch.arange(80)
    excluded[3] = -1
    found = nearest(bank, bank, 79, CPU, excluded=excluded)
    own = (found.index == torch.arange(80)[:, None]).any(1)
    assert own.nonzero().flatten().tolist() == [3]
    assert found.similarity.isfinite().all()


def test_pairs_equal_the_whole_matrix_and_the_most_similar_are_kept() -> None:
    bank = values(140, 4)
    whole = F.normalize(bank, dim=1) @ F.normalize(bank, dim=1).T
    expected = {(i, j) for i in range(140) for j in range(i + 1, 140) if whole[i, j] >= 0.9}
    found = pairs_above(bank, 0.9, CPU, limit=10_000)
    assert set(zip(found.first.tolist(), found.second.tolist(), strict=True)) == expected
    assert found.found == len(found.first) == len(expected) > 300
    few = pairs_above(bank, 0.9, CPU, limit=10)
    assert few.found == len(expected)
    torch.testing.assert_close(few.similarity, found.similarity[:10])
    assert few.similarity.diff().max() <= 0


def test_the_local_outlier_factor_equals_another_implementation() -> None:
    bank = torch.cat([values(100, 5), values(40, 5, seed=3) * 0.05 + 2])
    unit = F.normalize(bank, dim=1)
    found = nearest(bank, bank, 12, CPU, excluded=torch.arange(140))
    far = distances(bank, found.index, CPU)
    other = LocalOutlierFactor(n_neighbors=12).fit(unit.numpy())
    np.testing.assert_allclose(local_outlier_factor(far, found.index), -other.negative_outlier_factor_, rtol=1e-3)


def test_neighbours_of_digits_are_mostly_the_same_digit(
    digits: DatasetFacts, pretrained: BaseModelInput, tmp_path: Path
) -> None:
    given = order("neighbours", digits, tmp_path, pretrained, params={"k": 5})
    last = done(given)
    found_table = table(given, "neighbours.parquet")
    assert found_table.column_names == ["sample", "split", "label", "neighbours", "similarity"]
    found = np.stack(found_table["neighbours"].to_numpy())
    assert found.shape == (220, 5)
    assert (found != np.arange(220)[:, None]).all()
    similarity = torch.from_numpy(np.stack(found_table["similarity"].to_numpy()))
    assert similarity.diff(dim=1).max() <= 0
    labels = np.array(found_table["label"].to_pylist())
    agreement = (labels[found] == labels[:, None]).mean()
    assert last.metrics["neighbours/label_agreement"] == pytest.approx(agreement)
    assert agreement > 0.6, "a tenth would be chance"
    embedded = order("embed", digits, tmp_path / "embed", pretrained)
    done(embedded)
    rows = torch.from_numpy(np.stack(table(embedded, "embedding.parquet")["embedding"].to_numpy()))
    whole = (F.normalize(rows, dim=1) @ F.normalize(rows, dim=1).T).fill_diagonal_(-2)
    assert (whole.topk(5, dim=1)[0] - similarity).abs().max() < 1e-5


def test_neighbours_of_some_samples_are_listed(
    digits: DatasetFacts, pretrained: BaseModelInput, tmp_path: Path
) -> None:
    last = done(
        order("neighbours", digits, tmp_path, pretrained, params={"k": 3, "samples": [170, 4], "splits": ["train"]})
    )
    assert last.result is not None
    assert [each["sample"] for each in last.result["neighbours"]] == [170, 4]
    for each in last.result["neighbours"]:
        assert len(each["nearest"]) == 3
        assert {near["split"] for near in each["nearest"]} == {"train"}
        assert each["sample"] not in {near["sample"] for near in each["nearest"]}
    assert {file.media_type for file in last.files} == {"application/vnd.apache.parquet", "image/png"}


ODD = (17, 60, 85)  # fours among zeros and ones


def planted(folder: Path) -> DatasetFacts:
    """Give zeros and ones without labels: three are fours, sample 40 is there again as 90, and 5 in the test split."""
    images, labels = sets.digits(1000, 1)["train"]
    known = images[labels < 2]
    train, test = known[:120].copy(), known[120:150].copy()
    train[list(ODD)] = images[labels == 4][: len(ODD)]
    train[90], test[7] = train[40], train[5]
    return sets.write_set(folder, {"train": (train, np.full(120, -1)), "test": (test, np.full(30, -1))})


@pytest.mark.parametrize("score", ["distance", "density"])
def test_planted_outliers_and_duplicates_are_found(score: str, pretrained: BaseModelInput, tmp_path: Path) -> None:
    given = order("outliers", planted(tmp_path / "set"), tmp_path, pretrained, params={"k": 10, "score": score})
    last = done(given)
    report = last.result
    assert report is not None
    assert json.loads((Path(given.scratch) / "report.json").read_text()) == report
    scores = table(given, "outliers.parquet")
    assert scores.column_names == ["sample", "split", "label", "score"]
    values = np.array(scores["score"].to_pylist())
    inside = np.delete(values, ODD)
    assert (values[list(ODD)][:, None] > inside).mean() > 0.95, "the area under the curve; 0.5 would be chance"
    assert report["outliers"][0]["score"] == pytest.approx(values.max(), abs=1e-4)
    pairs = table(given, "duplicates.parquet")
    exact = pairs.filter(pairs["exact"]).to_pylist()
    assert {(row["first_sample"], row["second_sample"]) for row in exact} == {(40, 90), (5, 127)}
    assert all(row["similarity"] > 0.999 for row in exact)
    (leak,) = [row for row in exact if row["second_split"] != row["first_split"]]
    assert (leak["first_split"], leak["second_split"]) == ("train", "test")
    duplicates = report["duplicates"]
    assert (duplicates["exact"], duplicates["complete"]) == (2, True)
    assert duplicates["across_splits"] == duplicates["leakage"]["train/test"] >= 1
    assert duplicates["nearest"][0]["exact"]
    assert 0.98 <= duplicates["from_similarity"] <= 0.9999
    assert min(pairs["similarity"].to_pylist()) >= duplicates["from_similarity"] - 1e-5


@pytest.mark.parametrize(("spread", "least"), [(0.02, 0.9997), (0.1, 0.9936), (1.0, 0.98)])
def test_what_is_a_pair_follows_how_near_each_other_all_lie(spread: float, least: float) -> None:
    """One copy among 300; a cosine of 0.98 alone would name 44,847, 3 and 1 pairs."""
    draws = torch.Generator().manual_seed(0)
    direction = torch.zeros(16).index_fill(0, torch.tensor(0), 1.0)
    points = direction + spread * torch.randn(300, 16, generator=draws)
    points[7] = points[200] + spread * 0.02 * torch.randn(16, generator=draws)
    near = nearest(points, points, 5, CPU, excluded=torch.arange(300))
    alike = pair_similarity(distances(points, near.index, CPU).sort(1)[0])
    assert alike == pytest.approx(least, abs=1e-4)
    pairs = pairs_above(points, alike, CPU, limit=1000)
    assert (pairs.first.tolist(), pairs.second.tolist()) == ([7], [200])


@pytest.mark.parametrize("recipe", ["neighbours", "outliers"])
def test_more_neighbours_than_samples_and_a_single_image_are_refused(
    recipe: str, digits: DatasetFacts, pretrained: BaseModelInput, tmp_path: Path
) -> None:
    one = sets.write_set(tmp_path / "one", {"train": (sets.digits(1, 1)["train"][0], np.array([-1]))})
    for facts, params, says in (
        (digits, {"k": 220}, "There are 220 samples to look at; 220 must be less than that."),
        (one, {"k": 1}, "There are 1 samples to look at; 1 must be less than that."),
    ):
        _, last = sets.failed(order(recipe, facts, tmp_path, pretrained, params=params))
        assert (last.error.fault, last.error.code) == ("user", "too_few_samples")
        assert says in last.error.message


def test_a_sample_that_is_not_there(digits: DatasetFacts, pretrained: BaseModelInput, tmp_path: Path) -> None:
    _, last = sets.failed(order("neighbours", digits, tmp_path, pretrained, params={"samples": [3, 220]}))
    assert "no sample 220; the dataset numbers them 0 to 219" in last.error.message
