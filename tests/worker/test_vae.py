"""The variational autoencoder: its bound against the paper's formulas, its draws, its pictures, and learning."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.domain.datasets import DatasetFacts
from tests.worker import sets
from worker.parts.architectures import facts
from worker.parts.backbones import build_backbone
from worker.parts.seed import reseed
from worker.pretrain import vae
from worker.recipe import Info, Progress

pytestmark = pytest.mark.worker
START = Progress(0, 100, 0, 1)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def made(
    architecture: dict[str, Any] = sets.NETWORK, *, channels: int = 3, size: int = 8, normalised: bool = True,
    **params: Any,
) -> vae.Vae:  # fmt: skip
    backbone: Any = build_backbone(architecture, channels=channels, image_size=size, seed=0)
    about = next(row["facts"] for row in facts() if row["name"] == architecture["architecture"])
    mean, std = (MEAN, STD) if normalised else ((0.0,), (1.0,))
    info = Info(
        task="unlabelled_images", classes=(), samples=8, channels=channels, image_size=size,
        feature_dimension=backbone.dimension, architecture=about, mean=mean,
        std=std,
    )  # fmt: skip
    return vae.Vae(vae.VaeParams.model_validate(params), backbone, info)


def drawn_pixels(count: int, *, size: int = 8) -> tuple[Tensor, Tensor]:
    """Give pixels in [0, 1], black and white among them, and what the loop would make of them."""
    pixels = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(3)).mul(1.4).sub(0.2).clamp(0, 1)
    return pixels, (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def naive_reconstruction(likelihood: str, logits: Tensor, pixels: Tensor, deviation: float) -> float:
    """Appendix C of arXiv 1312.6114, -log p(x|z) of one image, pixel by pixel."""
    total = 0.0
    for logit, x in zip(logits.flatten().double().tolist(), pixels.flatten().double().tolist(), strict=True):
        y = 1 / (1 + math.exp(-logit))
        if likelihood == "bernoulli":
            total += x * math.log(y) + (1 - x) * math.log(1 - y)
        else:
            density = math.exp(-((x - y) ** 2) / (2 * deviation**2)) / math.sqrt(2 * math.pi * deviation**2)
            total += math.log(density)
    return -total


def naive_divergence(mean: Tensor, log_variance: Tensor) -> float:
    """Appendix B: -KL is 1/2 the sum over j of (1 + log sigma_j^2 - mu_j^2 - sigma_j^2)."""
    total = 0.0
    for mu, log_var in zip(mean.double().tolist(), log_variance.double().tolist(), strict=True):
        total += 1 + log_var - mu**2 - math.exp(log_var)
    return -total / 2


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_the_bound_is_the_papers(likelihood: str, beta: float) -> None:
    module = made(likelihood=likelihood, deviation=0.3, beta=beta, latent_dimension=5).eval()
    pixels, images = drawn_pixels(6)
    reseed(11)
    with torch.no_grad():
        found = module({"image": images}, START)
        mean, log_variance = module.encode(images)
        reseed(11)
        logits = module.decoder(mean + log_variance.exp().sqrt() * torch.randn(6, 5))
    each = [naive_reconstruction(likelihood, *pair, 0.3) for pair in zip(logits, pixels, strict=True)]
    kl = [naive_divergence(*pair) for pair in zip(mean, log_variance, strict=True)]
    assert found["reconstruction"].item() == pytest.approx(sum(each) / 6, rel=1e-5)
    assert found["kl"].item() == pytest.approx(sum(kl) / 6, rel=1e-4)
    assert found["elbo"].item() == pytest.approx(-(sum(each) + sum(kl)) / 6, rel=1e-5)
    assert found["loss"].item() == pytest.approx((sum(each) + beta * sum(kl)) / 6, rel=1e-5)


def test_the_divergence_is_the_integral() -> None:
    """The closed form against the definition, the integral of q log(q / p), on a fine grid."""
    for mu, log_variance in ((0.0, 0.0), (1.5, -1.0), (-0.7, 0.8)):
        z = torch.linspace(-20, 20, 200_001, dtype=torch.float64)
        log_q = -0.5 * ((z - mu) ** 2 / math.exp(log_variance) + log_variance + math.log(2 * math.pi))
        log_p = -0.5 * (z**2 + math.log(2 * math.pi))
        integral = torch.trapezoid(log_q.exp() * (log_q - log_p), z).item()
        found = vae.divergence(torch.tensor([[mu]]), torch.tensor([[log_variance]]))
        assert found.tolist() == pytest.approx([integral], abs=1e-6)


def test_an_mlp_is_the_example_of_pytorch() -> None:
    """784-400-20-400-784, https://github.com/pytorch/examples/blob/main/vae/main.py: same size, same loss."""
    module = made({"architecture": "mlp", "hidden": [400]}, channels=1, size=28, normalised=False)
    assert sum(each.numel() for each in module.parameters()) == 652_824
    fc1, fc3, fc4 = (
        [layer for layer in part.modules() if isinstance(layer, nn.Linear)][at]
        for part, at in ((module.backbone, 0), (module.decoder, 0), (module.decoder, 1))
    )
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    reseed(5)
    loss = module({"image": x}, START)["loss"]
    reseed(5)
    h1 = F.relu(fc1(x.view(-1, 784)))
    mu, logvar = module.mean(h1), module.log_variance(h1)
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    recon_x = torch.sigmoid(fc4(F.relu(fc3(z))))
    bce = F.binary_cross_entropy(recon_x, x.view(-1, 784), reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    assert loss.item() == pytest.approx((bce + kld).item() / 4, rel=1e-5)


@pytest.mark.parametrize(
    ("warmup", "step", "share"), [(0.0, 0, 1.0), (0.2, 0, 0.0), (0.2, 5, 0.25), (0.2, 20, 1.0), (0.2, 90, 1.0)]
)
def test_beta_grows_linearly(warmup: float, step: int, share: float) -> None:
    module = made(beta=3.0, beta_warmup_fraction=warmup)
    found = module({"image": drawn_pixels(4)[1]}, Progress(step, 100, 0, 1))
    expected = found["reconstruction"] + 3.0 * share * found["kl"]
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert found["elbo"].item() == pytest.approx(-(found["reconstruction"] + found["kl"]).item(), rel=1e-6)


def test_draws_follow_the_seed() -> None:
    module = made().eval()
    batch = {"image": drawn_pixels(6)[1]}
    losses: list[float] = []
    for seed in (1, 1, 2):
        reseed(seed)
        losses.append(module(batch, START)["loss"].item())
    assert losses[0] == losses[1] != losses[2]


def test_draws_have_the_mean_and_the_deviation_that_were_encoded() -> None:
    module = made(latent_dimension=2)
    seen: list[Tensor] = []
    module.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        for head, bias in ((module.mean, (1.0, -2.0)), (module.log_variance, (math.log(0.25), math.log(4.0)))):
            head.weight.zero_()
            head.bias.copy_(torch.tensor(bias))
        reseed(0)
        module({"image": torch.zeros(4000, 3, 8, 8)}, START)
    assert seen[0].mean(0).tolist() == pytest.approx([1.0, -2.0], abs=0.1)
    assert seen[0].std(0).tolist() == pytest.approx([0.5, 2.0], rel=0.05)


def test_evaluation_gives_each_images_bound_and_the_same_twice() -> None:
    module = made(beta=7.0).eval()
    batch = {"image": drawn_pixels(6)[1]}
    reseed(1)
    once = module.evaluate(batch)["loss"]
    reseed(2)
    assert torch.equal(module.evaluate(batch)["loss"], once)
    assert once.shape == (6,)
    draws = [-module(batch, START)["elbo"].item() for _ in range(20)]
    assert once.mean().item() == pytest.approx(sum(draws) / 20, rel=0.02), "beta has no part in the bound"


@pytest.mark.parametrize("architecture", [sets.NETWORK, {"architecture": "mlp", "hidden": [32, 16]}])
def test_samples_have_the_shape_of_images(architecture: dict[str, Any]) -> None:
    shown = made(architecture, size=12).eval().pictures({"image": drawn_pixels(9, size=12)[1]})
    assert shown["samples"].shape == (64, 3, 12, 12)
    assert shown["reconstructions"].shape == (16, 3, 12, 12)
    painted = shown["samples"] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert painted.min() >= 0
    assert painted.max() <= 1


def test_a_run_leaves_pictures_and_its_bound(digits: DatasetFacts, tmp_path: Path) -> None:
    from PIL import Image

    order = sets.order(sets.spec("vae"), digits, tmp_path)
    heard, last = sets.finished(order)
    sizes: dict[str, tuple[int, int]] = {}
    for file in last.files:
        with Image.open(Path(order.scratch) / file.file) as picture:
            sizes[file.name] = picture.size
    assert sizes == {"reconstructions.png": (8 * 66 + 2, 2 * 66 + 2), "samples.png": (8 * 66 + 2, 8 * 66 + 2)}
    numbers = {name: value or 0.0 for name, _, value in heard.metrics()}
    assert numbers["train/elbo"] == pytest.approx(-numbers["train/reconstruction"] - numbers["train/kl"], rel=1e-4)
    assert 0 < numbers["train/reconstruction"] < 64, "8 x 8 pixels cost less than a nat each"


def test_the_pixels_of_a_run_are_those_of_the_files(digits: DatasetFacts, tmp_path: Path) -> None:
    from worker.trainer.assembly import assemble

    run = assemble(sets.order(sets.spec("vae"), digits, tmp_path), sets.Heard().reporter)
    batch = run.data.train.batch(torch.arange(4))
    ready = run.data.ready(batch, run.device)["image"]
    module = run.objective
    pixels = ready * module.get_buffer("_scale") + module.get_buffer("_shift")
    torch.testing.assert_close(pixels, batch["image"].float() / 255, atol=1e-5, rtol=0)


def test_pretraining_learns_digits_without_labels(tmp_path: Path) -> None:
    """k-NN on the features must beat k-NN on the features of the untrained network by ten points."""
    spec = sets.spec(
        "vae", model={"architecture": "small_cnn", "width": 0.25}, params={"augmentation": "light"},
        training={"batch_size": 100, "epochs": 25, "learning_rate": 2e-3},
    )  # fmt: skip
    untrained, trained = sets.before_and_after(spec, tmp_path)
    assert trained > untrained + 0.1, (untrained, trained)
