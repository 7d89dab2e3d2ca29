"""SimCLR and the autoencoder: the loss against the paper's formula, the gather of several processes, and learning."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from app.domain.datasets import DatasetFacts
from tests.worker import sets
from tests.worker.forked import in_two_processes
from worker.parts import distributed
from worker.pretrain import autoencoder, simclr

pytestmark = pytest.mark.worker


def naive_nt_xent(z0: Tensor, z1: Tensor, temperature: float) -> float:
    """Equation 1 of arXiv 2002.05709, in loops: l(i, j) over the 2N positive pairs, their mean."""
    z = [row.double() for pair in zip(z0, z1, strict=True) for row in pair]  # 2k-1 and 2k are a pair

    def similarity(u: Tensor, v: Tensor) -> float:
        return float(u @ v / (u.norm() * v.norm()))

    def loss(i: int, j: int) -> float:
        denominator = sum(math.exp(similarity(z[i], z[k]) / temperature) for k in range(len(z)) if k != i)
        return -math.log(math.exp(similarity(z[i], z[j]) / temperature) / denominator)

    return sum(loss(2 * k, 2 * k + 1) + loss(2 * k + 1, 2 * k) for k in range(len(z) // 2)) / len(z)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("batch", [2, 5])
def test_nt_xent_is_the_papers(temperature: float, batch: int) -> None:
    z0, z1 = torch.randn(2, batch, 7, generator=torch.Generator().manual_seed(batch)).unbind(0)
    loss, matched = simclr.nt_xent(z0, z1, temperature=temperature)
    assert loss.item() == pytest.approx(naive_nt_xent(z0, z1, temperature), rel=1e-5)
    assert 0 <= matched <= 1
    perfect, all_matched = simclr.nt_xent(torch.eye(batch), torch.eye(batch), temperature=temperature)
    assert all_matched == 1
    assert perfect < loss


def test_autocast_does_not_reach_the_similarities() -> None:
    z0, z1 = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(1)).unbind(0)
    exact = simclr.nt_xent(z0, z1, temperature=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = simclr.nt_xent(z0, z1, temperature=0.1)
    assert torch.equal(found[0], exact[0])


def test_projections_are_normed_over_the_batch_before_they_are_compared() -> None:
    torch.manual_seed(0)
    module = simclr.Simclr(simclr.SimclrParams(), nn.Flatten(), cast(Any, SimpleNamespace(feature_dimension=12)))
    z = module.projection(5 * torch.randn(64, 12) + 2)
    torch.testing.assert_close(z.mean(0), torch.zeros(128), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(128), atol=1e-3, rtol=0)


def _projections() -> tuple[Tensor, Tensor]:
    one, other = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(8)).unbind(0)
    return one, other


@pytest.mark.filterwarnings("ignore")
def test_two_processes_see_each_others_samples(tmp_path: Path) -> None:
    def half(rank: int) -> tuple[float, list[list[float]]]:
        mine = [z[3 * rank : 3 * rank + 3].clone().requires_grad_() for z in _projections()]
        loss, _ = simclr.nt_xent(*mine, temperature=0.5)
        loss.backward()
        assert mine[0].grad is not None
        return loss.item(), mine[0].grad.tolist()

    losses, gradients = zip(*in_two_processes(half, tmp_path), strict=True)
    z0, z1 = (z.requires_grad_() for z in _projections())
    whole, _ = simclr.nt_xent(z0, z1, temperature=0.5)
    whole.backward()
    assert sum(losses) / 2 == pytest.approx(whole.item(), rel=1e-5)
    assert z0.grad is not None
    # Each process differentiates the sum of both losses with regard to its own rows; DDP then takes the mean.
    torch.testing.assert_close(torch.tensor(gradients).flatten(0, 1) / 2, z0.grad, atol=1e-5, rtol=1e-4)


def test_alone_a_gather_is_the_identity() -> None:
    value = torch.rand(3, 2)
    assert distributed.all_gather(value) is value
    assert (distributed.rank(), distributed.world_size()) == (0, 1)


@pytest.mark.parametrize("size", [8, 12, 28, 32, 50])
def test_a_decoder_paints_any_size(size: int) -> None:
    for decoder in (autoencoder.Decoder, autoencoder.FlatDecoder):
        assert decoder(16, channels=3, size=size)(torch.rand(2, 16)).shape == (2, 3, size, size)


def made(noise: float, corruption: str = "mask") -> autoencoder.Autoencoder:
    from worker.parts.architectures import facts
    from worker.parts.backbones import build_backbone
    from worker.recipe import Info

    backbone = build_backbone(sets.NETWORK, channels=3, image_size=8, seed=0)
    info = Info(
        task="unlabelled_images", classes=(), samples=8, channels=3, image_size=8, feature_dimension=32,
        architecture=next(row["facts"] for row in facts() if row["name"] == "small_cnn"),
    )  # fmt: skip
    params = autoencoder.AutoencoderParams.model_validate({"noise": noise, "corruption": corruption})
    return autoencoder.Autoencoder(params, backbone, info)


def test_masking_hides_whole_pixels_in_the_right_share() -> None:
    images = torch.rand(64, 3, 8, 8) + 0.1
    damaged = made(0.3)._damage(images)
    hidden = damaged == 0
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(damaged[~hidden], images[~hidden])
    noisy = made(0.5, "gaussian")._damage(images) - images
    assert noisy.std().item() == pytest.approx(0.5, abs=0.02)
    assert made(0.0)._damage(images) is images


def test_the_target_is_the_undamaged_image() -> None:
    module = made(0.5).eval()
    images = torch.rand(6, 3, 8, 8)
    module._reconstruct = lambda _: images  # type: ignore[method-assign]
    from worker.recipe import Progress

    assert module({"image": images}, Progress(0, 1, 0, 1))["loss"] == 0
    assert module.evaluate({"image": images})["loss"].tolist() == [0.0] * 6


def test_reconstructions_are_left_as_a_picture(digits: DatasetFacts, tmp_path: Path) -> None:
    from PIL import Image

    order = sets.order(sets.spec("autoencoder"), digits, tmp_path)
    _, last = sets.finished(order)
    assert [file.name for file in last.files] == ["reconstructions.png"]
    with Image.open(Path(order.scratch) / last.files[0].file) as picture:
        assert picture.size == (8 * 66 + 2, 3 * 66 + 2), "eight columns of 64 pixels, three rows"


@pytest.mark.parametrize("recipe", ["simclr", "autoencoder"])
def test_pretraining_learns_digits_without_labels(recipe: str, tmp_path: Path) -> None:
    """k-NN on the features must beat k-NN on the features of the untrained network by ten points."""
    training = {"batch_size": 25, "epochs": 12, "learning_rate": 2e-3}
    spec = sets.spec(recipe, model={"architecture": "small_cnn", "width": 0.25}, training=training)
    untrained, trained = sets.before_and_after(spec, tmp_path)
    assert trained > untrained + 0.1, (untrained, trained)
