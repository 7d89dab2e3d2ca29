"""The GAN: losses, penalty and Frechet distance against naive ones, who learns from which term, and learning."""

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from app.domain.datasets import DatasetFacts
from tests.worker import sets
from tests.worker.forked import in_two_processes
from tests.worker.unordered import unordered
from worker import evaluate, loop
from worker.checkpoint import Checkpoints
from worker.parts import compute, distributed, metrics, optim
from worker.parts.seed import reseed
from worker.pretrain import gan
from worker.recipe import Progress
from worker.trainer.assembly import Assembly, assemble

pytestmark = pytest.mark.worker
START, LATER = Progress(0, 100, 0, 1), Progress(1, 100, 0, 1)


def make(
    facts: DatasetFacts, folder: Path, *, model: dict[str, Any] = sets.NETWORK, precision: str = "auto", **params: Any
) -> tuple[Assembly, gan.Gan]:
    body = sets.spec("gan", params=params, model=model, training={"precision": precision})
    made = assemble(sets.order(body, facts, folder), sets.Heard().reporter)
    compute.place(made.objective, made.plan, made.device)
    return made, cast(gan.Gan, made.objective.train())


def batch_of(made: Assembly, count: int = 16) -> dict[str, Tensor]:
    return compute.laid_out(made.data.ready(made.data.train.batch(torch.arange(count)), made.device), made.plan)


def test_the_losses_are_the_papers() -> None:
    """Equation 1 and section 3 of arXiv 1406.2661, sample by sample."""
    real, fake = torch.tensor([2.0, -1.0, 0.3]), torch.tensor([-3.0, 0.5, 0.0])

    def d(logit: float) -> float:
        return 1 / (1 + math.exp(-logit))

    value = sum(math.log(d(x)) for x in real.tolist()) / 3 + sum(math.log(1 - d(x)) for x in fake.tolist()) / 3
    assert gan.discriminator_loss(real, fake).item() == pytest.approx(-value, rel=1e-5)
    fooled = sum(math.log(d(x)) for x in fake.tolist()) / 3
    assert gan.generator_loss(fake).item() == pytest.approx(-fooled, rel=1e-5)


def test_r1_is_the_squared_slope() -> None:
    """Equation 9 of arXiv 1801.04406 without its weight, by finite differences in every pixel."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(36, 1)).double()
    images = torch.rand(3, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    total = 0.0
    with torch.no_grad():
        for image in images:
            for pixel in range(9):
                step = torch.zeros(9, dtype=torch.float64)
                step[pixel] = 1e-5
                ends = [network((image + sign * step.view(1, 3, 3))[None]).item() for sign in (1, -1)]
                total += ((ends[0] - ends[1]) / 2e-5) ** 2
    network.float()
    penalty = gan.r1_penalty(lambda given: network(given).squeeze(1), images)
    assert penalty.item() == pytest.approx(total / 3, rel=1e-3)
    penalty.backward()
    weight = cast(nn.Linear, network[3]).weight
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0, "the penalty trains"


def test_the_penalty_of_two_processes_trains_as_that_of_one(tmp_path: Path) -> None:
    """Also with what it has to say through batch norm, whose statistics both share."""
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def gradients(part: Tensor) -> list[float]:
        reseed(2)
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(144, 1, bias=False)
        )
        distributed.synchronise_norms(network, "cpu")
        gan.r1_penalty(lambda given: network(given).squeeze(1), part).backward()
        return [slope for weight in network.parameters() for slope in cast(Tensor, weight.grad).flatten().tolist()]

    halves = in_two_processes(lambda rank: gradients(images[8 * rank : 8 * rank + 8]), tmp_path)
    found, expected = torch.tensor(halves).mean(0), torch.tensor(gradients(images))
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("network", [sets.NETWORK, {"architecture": "small_vit", "depth": 1, "width": 24}])
def test_the_penalty_comes_every_so_often_and_weighs_the_more(
    network: dict[str, Any], digits: DatasetFacts, tmp_path: Path
) -> None:
    made, module = make(
        digits, tmp_path, model=network, precision="bfloat16", r1_weight=3.0, r1_every=4, augmentation=[]
    )  # fmt: skip
    batch = batch_of(made)
    for step in range(9):
        with compute.autocast(made.plan, made.device):
            found = module(batch, Progress(step, 9, 0, 1))
        rest = (found["loss"] - found["discriminator"] - found["generator"]).item()
        if step % 4:
            assert rest == pytest.approx(0, abs=1e-6)
        else:
            assert rest == pytest.approx(3.0 / 2 * 4 * found["penalty"].item(), rel=1e-3)
            module.zero_grad()
            found["loss"].backward()
            assert all(value.grad is not None and value.grad.isfinite().all() for value in module.backbone.parameters())


def test_each_network_learns_from_its_own_term(digits: DatasetFacts, tmp_path: Path) -> None:
    """The gradients of the one sum are those of two passes, in each of which the other network stands still."""
    made, module = make(digits, tmp_path, r1_weight=0.0)
    batch = batch_of(made)

    def gradients(wanted: str) -> dict[str, Tensor]:
        reseed(5)
        module.zero_grad()
        module(batch, LATER)[wanted].backward()
        return {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}

    both, judged, painted = gradients("loss"), gradients("discriminator"), gradients("generator")
    assert set(painted) == {name for name in both if name.startswith("generator.")}
    assert set(judged) == {name for name in both if name.startswith(("backbone.", "classifier."))}
    for name, value in both.items():
        torch.testing.assert_close(value, {**judged, **painted}[name], msg=name)


def test_running_statistics_are_those_of_real_images(digits: DatasetFacts, tmp_path: Path) -> None:
    made, module = make(digits, tmp_path, augmentation=[])
    _, plain = make(digits, tmp_path, augmentation=[])
    batch = batch_of(made)
    module(batch, START)
    plain.backbone(batch["image"])
    found = dict(module.backbone.named_buffers())
    assert found
    for name, value in plain.backbone.named_buffers():
        torch.testing.assert_close(found[name], value, msg=name)


def test_what_the_discriminator_sees_is_augmented_and_differentiable(digits: DatasetFacts, tmp_path: Path) -> None:
    for channels in (1, 3):
        _, module = make(digits, tmp_path)
        info = assemble_info(channels)
        view = gan.diff_augment(gan.GanParams(), info)
        assert view is not None
        assert bool(view.jitter) == (channels == 3), "grey images get no colour"
        module.generator = gan.Generator(100, info)
        module._view = view
        images = torch.randn(4, channels, 8, 8, requires_grad=True)
        seen = module._augmented(images)
        assert seen.shape == images.shape
        assert not torch.equal(seen, images)
        assert unordered(seen.sum()) == [], "a run on a GPU would not repeat"
        seen.square().sum().backward()
        assert images.grad is not None
        assert images.grad.abs().sum((1, 2, 3)).min() > 0
    assert gan.diff_augment(gan.GanParams(augmentation=("colour",)), assemble_info(1)) is None


def assemble_info(channels: int) -> Any:
    from worker.recipe import Info

    return Info(
        task="unlabelled_images", classes=(), samples=8, channels=channels, image_size=8, feature_dimension=4,
        architecture={}, mean=(0.5,) * channels, std=(0.2,) * channels,
    )  # fmt: skip


def test_the_generator_has_its_own_rate_and_an_average(digits: DatasetFacts, tmp_path: Path) -> None:
    made, module = make(digits, tmp_path, generator_learning_rate_scale=0.25)
    found = optim.groups(module, module.parameter_groups(made.spec.training))
    rates = {name: group.learning_rate_scale for group in found for name in group.names}
    assert {rate for name, rate in rates.items() if name.startswith("generator.")} == {0.25}
    assert {rate for name, rate in rates.items() if not name.startswith("generator.")} == {1.0}
    assert not any(name.startswith("average.") for name in rates)
    before = module.average.decoder.first.weight.clone()
    with torch.no_grad():
        module.generator.decoder.first.weight.add_(1.0)
    module.after_step(Progress(100_000, 200_000, 0, 1))
    torch.testing.assert_close(module.average.decoder.first.weight, before + 0.001)


def test_the_frechet_distance_is_that_of_its_definition() -> None:
    from scipy.linalg import sqrtm

    random = np.random.default_rng(0)
    one, other = random.normal(size=(300, 5)) @ random.normal(size=(5, 5)), random.normal(size=(200, 5)) + 0.5
    first, second = np.cov(one.T), np.cov(other.T)
    root = np.real(sqrtm(first @ second))
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    found = metrics.frechet_distance(torch.from_numpy(one), torch.from_numpy(other))
    assert found == pytest.approx(float(expected), rel=1e-6)
    assert metrics.frechet_distance(torch.from_numpy(one), torch.from_numpy(one)) == pytest.approx(0, abs=1e-6)


def test_a_run_leaves_samples_and_its_distance(digits: DatasetFacts, tmp_path: Path) -> None:
    from PIL import Image

    order = sets.order(sets.spec("gan"), digits, tmp_path)
    heard, last = sets.finished(order)
    assert [file.name for file in last.files] == ["samples.png"]
    with Image.open(Path(order.scratch) / last.files[0].file) as picture:
        assert picture.size == (8 * 66 + 2, 8 * 66 + 2)
    names = {name for name, _, _ in heard.metrics()}
    assert names >= {"probe/frechet_distance", "train/real_accuracy", "train/fake_accuracy", "train/penalty"}


def pretrained(facts: DatasetFacts, folder: Path, params: dict[str, Any], **training: Any) -> tuple[float, float]:
    """Train; give the k-NN accuracy of the features, and the Frechet distance of samples, in plain pixels."""
    network = {"architecture": "small_cnn", "width": 0.25}
    body = sets.spec("gan", model=network, params=params, training={"batch_size": 25, **training})
    heard = sets.Heard()
    made = assemble(sets.order(body, facts, folder), heard.reporter)
    training_of, module = made.spec.training, cast(gan.Gan, made.objective)
    loop.train(
        module, made.data, training_of, made.plan, made.device, heard.reporter, Checkpoints(folder, heard.reporter)
    )
    knn = {name: value for name, _, value in heard.metrics()}["probe/knn_accuracy"] or 0.0
    with evaluate.evaluating(module, made.plan, made.device):
        samples = module.average(module._noise(600, made.device)).flatten(1)
    rows = evaluate.FeaturesOf(nn.Flatten(), made.data, made.plan, made.device, lambda done, total: None)
    return knn, metrics.frechet_distance(rows(), samples)


def test_it_learns_digits_without_labels(tmp_path: Path) -> None:
    """k-NN beats the untrained network's by ten points, and the samples come nearer to the images."""
    facts = sets.write_set(tmp_path / "set", sets.digits(600, 60))
    knn_before, before = pretrained(facts, tmp_path / "untrained", {}, epochs=1, learning_rate=1e-12)
    knn_after, after = pretrained(facts, tmp_path / "trained", {}, epochs=12)
    assert knn_after > knn_before + 0.1, (knn_before, knn_after)
    assert after < 0.7 * before, (before, after)
