"""k-means against scikit-learn and against brute force; clusterings against scikit-learn's measures of agreement."""

import warnings
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from app.domain.errors import UserFault
from worker.parts import clustering, kmeans
from worker.parts.kmeans import KMeans

pytestmark = pytest.mark.worker


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(count: int = 600, width: int = 16, centres: int = 8, *, away: float = 0.0, apart: float = 1.5) -> Tensor:
    """Points around some centres that overlap a little, all `away` from zero."""
    random = draws(3)
    centre = apart * torch.randn(centres, width, generator=random) + away
    return centre[torch.randint(centres, (count,), generator=random)] + torch.randn(count, width, generator=random)


@pytest.fixture(params=["float32", "bfloat16", "small chunks"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to multiply, and chunks that do not divide the points."""
    monkeypatch.setattr(kmeans, "FAST_FROM", 0 if request.param == "bfloat16" else 2**60)
    monkeypatch.setattr(kmeans, "_multiplies_bfloat16", lambda _: request.param == "bfloat16")
    if request.param == "small chunks":
        monkeypatch.setitem(kmeans.CHUNK, "cpu", 7 * 16)
    return request.param


def scikit(points: Tensor, k: int, start: Tensor | None = None) -> float:
    from sklearn.cluster import KMeans as Reference

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        init = "k-means++" if start is None else start.numpy()
        return float(Reference(k, init=init, n_init=1, random_state=0, max_iter=100).fit(points.numpy()).inertia_)  # type: ignore[arg-type]


def squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    return (points.double()[:, None] - centroids.double()[None]).square().sum(2)


@pytest.mark.parametrize("away", [0.0, 100.0])
def test_from_one_start_it_ends_where_scikit_learn_does(form: str, away: float) -> None:
    points = blobs(away=away)
    start = points[:8].clone()
    found = kmeans.kmeans(points, 8, generator=draws(), start=start)
    assert found.inertia == pytest.approx(scikit(points, 8, start), rel=0.01)


def test_its_own_starts_are_as_good_as_scikit_learns(form: str) -> None:
    points = blobs()
    ours = np.mean([kmeans.kmeans(points, 8, generator=draws(seed)).inertia for seed in range(6)])
    assert ours <= scikit(points, 8) * 1.01


def test_the_plus_plus_start_beats_a_random_one() -> None:
    """Blobs far apart: a start at random misses some of them, which Lloyd's iterations never mend."""
    points = blobs(centres=30, apart=8)

    def inertia(start: Tensor) -> float:
        return float(squared_distances(points, start).amin(1).sum())

    chosen = [inertia(kmeans.seeds(points, 30, generator=draws(seed))) for seed in range(4)]
    chance = [inertia(points[torch.randperm(len(points), generator=draws(seed))[:30]]) for seed in range(4)]
    assert max(chosen) < 0.5 * min(chance)


def test_many_points_are_seeded_from_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "SEED_ROWS_PER_CLUSTER", 8)
    points = blobs(4000)
    start = kmeans.seeds(points, 8, generator=draws())
    assert all(bool((points == row).all(1).any()) for row in start), "centroids to begin with are points"
    assert kmeans.kmeans(points, 8, generator=draws()).inertia == pytest.approx(scikit(points, 8), rel=0.02)


def test_it_gives_signs_of_life_by_centroid_and_by_iteration() -> None:
    told: list[tuple[int, int]] = []
    found = kmeans.kmeans(blobs(), 8, generator=draws(), iterations=30, tick=lambda done, of: told.append((done, of)))
    assert told == [(done, 8) for done in range(1, 8)] + [(done, 30) for done in range(found.iterations)]


def test_every_point_is_with_its_nearest_centroid(form: str) -> None:
    points = blobs(500, away=3.0)
    found = kmeans.kmeans(points, 12, generator=draws(1))
    distances = squared_distances(points, found.centroids)
    assert torch.equal(found.assignment, distances.argmin(1))
    assert found.inertia == pytest.approx(distances.amin(1).sum().item(), rel=1e-5)
    assert found.assignment.dtype == torch.int64
    again, squared = kmeans.nearest(points, found.centroids)
    assert torch.equal(again, found.assignment)
    torch.testing.assert_close(squared.double(), distances.amin(1), atol=1e-3, rtol=1e-4)


def test_centroids_are_the_means_of_their_points() -> None:
    points = blobs()
    found = kmeans.kmeans(points, 5, generator=draws(), tolerance=0.0)
    for number in range(5):
        torch.testing.assert_close(found.centroids[number], points[found.assignment == number].mean(0))


def test_each_iteration_is_lloyds(form: str) -> None:
    """After any number of them the centroids are those of plain loops, whether all points moved or only a few."""
    points = blobs(900, apart=0.5)
    start = points[:8].clone()
    expected = start.double()
    for iterations in range(1, 25):
        nearest = squared_distances(points, expected).argmin(1)
        expected = torch.stack([points[nearest == number].double().mean(0) for number in range(8)])
        found = kmeans.kmeans(points, 8, generator=draws(), start=start, iterations=iterations, tolerance=0.0)
        if form != "bfloat16":  # which may give a point on a border to either side
            torch.testing.assert_close(found.centroids.double(), expected, atol=1e-5, rtol=1e-5)
    settled = kmeans.kmeans(points, 8, generator=draws(), start=start, iterations=24, tolerance=0.0)
    assert settled.inertia == pytest.approx(float(squared_distances(points, expected).amin(1).sum()), rel=0.01)


def test_a_shared_blob_settles_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two centroids within one blob, far from zero: there bfloat16 rounds away what tells them apart."""
    points = blobs(4000, 64, 6, apart=8)

    def found(start: Tensor, fast_from: int) -> KMeans:
        monkeypatch.setattr(kmeans, "FAST_FROM", fast_from)
        monkeypatch.setattr(kmeans, "_multiplies_bfloat16", lambda _: True)
        return kmeans.kmeans(points, 12, generator=draws(), start=start, iterations=200, tolerance=0.0)

    fast = found(points[:12].clone(), 0)
    assert 1 < fast.iterations < 200
    again = found(fast.centroids, 2**60)
    assert again.iterations == 1, "no point moves any more"
    assert torch.equal(again.assignment, fast.assignment)
    assert fast.inertia == pytest.approx(found(points[:12].clone(), 2**60).inertia, rel=0.01)


def test_the_same_draws_give_the_same_clusters(form: str) -> None:
    points = blobs()
    first, second, other = (kmeans.kmeans(points, 9, generator=draws(seed)) for seed in (4, 4, 5))
    assert torch.equal(first.centroids, second.centroids)
    assert torch.equal(first.assignment, second.assignment)
    assert not torch.equal(first.centroids, other.centroids)


def test_a_warm_start_goes_on_without_drawing() -> None:
    points = blobs()
    random = draws()
    done = kmeans.kmeans(points, 8, generator=random, tolerance=0.0)
    before = random.get_state()
    again = kmeans.kmeans(points, 8, generator=random, start=done.centroids, tolerance=0.0)
    assert torch.equal(random.get_state(), before)
    assert (again.iterations, again.inertia) == (1, pytest.approx(done.inertia, rel=1e-6))
    none = kmeans.kmeans(points, 8, generator=random, iterations=0, start=done.centroids)
    assert torch.equal(none.centroids, done.centroids)
    with pytest.raises(ValueError, match="should be"):
        kmeans.kmeans(points, 8, generator=random, start=done.centroids[:7])


def test_empty_clusters_are_refilled_from_the_farthest_points(form: str) -> None:
    points = blobs(200)
    far = torch.full((1, 16), 1e4)
    for iterations in (0, 1, 20):  # with none, the last assignment alone has to do it
        start = torch.cat([points[:3], far, far + 1])
        found = kmeans.kmeans(points, 5, generator=draws(), start=start, iterations=iterations)
        assert torch.bincount(found.assignment, minlength=5).min() > 0
    one = kmeans.kmeans(torch.cat([points, far]), 2, generator=draws(), start=torch.stack([points[0], points[0]]))
    assert (one.assignment == one.assignment[-1]).sum() == 1, "the outlier took the cluster that was empty"


def test_two_clusters_on_three_points() -> None:
    found = kmeans.kmeans(torch.tensor([[0.0], [1.0], [10.0]]), 2, generator=draws())
    assert found.assignment[0] == found.assignment[1] != found.assignment[2]
    assert found.inertia == pytest.approx(0.5)
    alone = kmeans.kmeans(torch.tensor([[0.0], [1.0], [10.0]]), 3, generator=draws())
    assert alone.assignment.unique().tolist() == [0, 1, 2]
    assert alone.inertia == 0
    assert kmeans.kmeans(torch.tensor([[5.0]]), 1, generator=draws()).centroids.tolist() == [[5.0]]


def test_many_copies_of_few_points_have_as_many_clusters() -> None:
    distinct = torch.randn(6, 4, generator=draws())
    found = kmeans.kmeans(distinct.repeat(50, 1), 6, generator=draws())
    assert found.inertia == pytest.approx(0, abs=1e-6)
    assert found.assignment[:6].unique().numel() == 6
    worst = kmeans.kmeans(distinct.repeat(50, 1), 6, generator=draws(), start=distinct[:1].repeat(6, 1))
    assert worst.assignment[:6].unique().numel() == 6


@pytest.mark.parametrize(
    ("points", "k", "code"),
    [
        (torch.rand(3, 2), 4, "too_few_points"),
        (torch.rand(3, 2), 0, "too_few_clusters"),
        (torch.rand(0, 2), 1, "too_few_points"),
        (torch.ones(9, 2), 2, "too_few_distinct_points"),
        (torch.randn(4, 3).repeat(20, 1), 7, "too_few_distinct_points"),
        (torch.tensor([[1.0], [float("nan")]]), 1, "not_finite"),
    ],
)
def test_what_cannot_be_clustered_is_refused(points: Tensor, k: int, code: str) -> None:
    with pytest.raises(UserFault) as refused:
        kmeans.kmeans(points, k, generator=draws())
    assert refused.value.code == code


def test_autocast_does_not_reach_it() -> None:
    points = blobs(300)
    plain = kmeans.kmeans(points, 6, generator=draws())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = kmeans.kmeans(points, 6, generator=draws())
    assert torch.equal(plain.centroids, cast.centroids)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_ends_where_the_cpu_does() -> None:
    points = blobs(5000, 64)
    start = points[:20].clone()
    here = kmeans.kmeans(points, 20, generator=draws(), start=start)
    there: KMeans = kmeans.kmeans(points.cuda(), 20, generator=torch.Generator("cuda"), start=start)
    assert there.assignment.device.type == "cuda"
    assert there.inertia == pytest.approx(here.inertia, rel=0.01)


@pytest.mark.parametrize("classes", [1, 3, 7])
def test_agreement_is_what_scikit_learn_measures(classes: int) -> None:
    from sklearn import metrics as reference

    clusters = torch.randint(5, (300,), generator=draws(classes))
    labels = torch.where(torch.rand(300, generator=draws()) < 0.6, clusters % classes, clusters.flip(0) % classes)
    hidden = torch.rand(300, generator=draws(9)) < 0.2
    found = clustering.agreement(clusters, torch.where(hidden, -1, labels))
    clusters, labels = clusters[~hidden], labels[~hidden]
    assert found["nmi"] == pytest.approx(reference.normalized_mutual_info_score(labels, clusters))
    assert found["adjusted_rand"] == pytest.approx(reference.adjusted_rand_score(labels, clusters))
    commonest = sum(int(torch.bincount(labels[clusters == each]).max()) for each in clusters.unique())
    assert found["purity"] == pytest.approx(commonest / len(labels))
    wide = max(5, classes)
    best = max(int((torch.tensor(names)[clusters] == labels).sum()) for names in permutations(range(wide), 5))
    assert found["matched_accuracy"] == pytest.approx(best / len(labels))


def test_agreement_at_its_ends() -> None:
    labels = torch.arange(40) % 4
    perfect = clustering.agreement((labels + 1) % 4, labels)
    assert perfect == {name: pytest.approx(1.0) for name in perfect}
    alone = clustering.agreement(torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64))
    assert alone == {name: pytest.approx(1.0) for name in alone}
    independent = clustering.agreement(torch.arange(400) // 4 % 2, torch.arange(400) % 4)
    assert independent["nmi"] == pytest.approx(0, abs=1e-12)
    assert independent["adjusted_rand"] == pytest.approx(0, abs=0.02)
