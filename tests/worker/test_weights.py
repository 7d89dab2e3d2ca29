import dataclasses
import re
from typing import Any

import pytest
import torch
import torchvision

from app.domain.errors import SystemFault, UserFault
from worker.parts import weights
from worker.parts.backbones import build_backbone
from worker.parts.weights import normalisation, pretrained_state, weight_names

pytestmark = pytest.mark.worker


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    """A hub cache without files, and a host that refuses."""
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    elsewhere = dataclasses.replace(entry.value, url="http://127.0.0.1:9/resnet18-f37072fd.pth")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(entry, "_value_", elsewhere)


@pytest.fixture
def published(monkeypatch):
    """Stand in for the host: states as torchvision publishes them, of random weights."""

    def publish(name, state):
        monkeypatch.setattr(weights, "pretrained_state", lambda *_: state)
        monkeypatch.setattr("worker.parts.stock_networks.pretrained_state", lambda *_: dict(state))

    return publish


@pytest.mark.usefixtures("unreachable")
def test_an_unreachable_host_is_said_clearly():
    with pytest.raises(SystemFault, match=r"could not be fetched from http://127\.0\.0\.1:9/") as caught:
        build_backbone(
            {"architecture": "resnet18", "weights": "IMAGENET1K_V1"}, channels=3, image_size=32, seed=0
        )  # fmt: skip
    assert caught.value.code == "weights_unavailable"
    assert "leave `weights` out" in str(caught.value.hint)


def test_unknown_weights_name_the_known_ones():
    with pytest.raises(UserFault, match="known are IMAGENET1K_V1, IMAGENET1K_V2"):
        pretrained_state("resnet50", "IMAGENET21K")
    assert weight_names("resnet18") == ["IMAGENET1K_V1"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("mobilenet_v2", {}),
        ("squeezenet1_1", {}),
        ("googlenet", {"init_weights": False}),
        ("vit_b_32", {}),
    ],
)
def test_published_weights_are_loaded_without_their_head(published, name, options):
    torch.manual_seed(0)
    stock = torchvision.models.get_model(name, **options).eval()
    published(name, stock.state_dict())
    size = 224 if name.startswith("vit") else 64
    backbone = build_backbone(
        {"architecture": name, "weights": "IMAGENET1K_V1"}, channels=3, image_size=size, seed=0
    ).eval()
    own = backbone.state_dict()
    assert own
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in own.items())


def test_a_grey_image_sees_what_three_equal_channels_saw(published):
    torch.manual_seed(0)
    stock = torchvision.models.resnet18()
    published("resnet18", stock.state_dict())
    wanted = {"architecture": "resnet18", "weights": "IMAGENET1K_V1"}
    colour = build_backbone(wanted, channels=3, image_size=32, seed=0).eval()
    grey = build_backbone(wanted, channels=1, image_size=32, seed=0).eval()
    x = torch.randn(2, 1, 32, 32)
    assert torch.allclose(colour(x.expand(-1, 3, -1, -1)), grey(x), atol=1e-4)


def test_positions_of_a_transformer_follow_the_image_size(published):
    torch.manual_seed(0)
    stock = torchvision.models.vit_b_32()
    published("vit_b_32", stock.state_dict())
    wanted = {"architecture": "vit_b_32", "weights": "IMAGENET1K_V1"}
    small: Any = build_backbone(wanted, channels=3, image_size=64, seed=0)
    assert small.encoder.pos_embedding.shape == (1, 5, 768)
    assert torch.equal(small.encoder.pos_embedding[:, 0], stock.encoder.pos_embedding[:, 0])


def test_old_densenet_names_are_translated(monkeypatch):
    # Those files are older than the counts of batches, too.
    now = {k: v for k, v in torchvision.models.densenet121().state_dict().items() if "num_batches" not in k}
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)\.", r"\1.\2.", key): value for key, value in now.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    entry = torchvision.models.DenseNet121_Weights
    monkeypatch.setattr(entry, "get_state_dict", lambda *_, **__: dict(old))
    assert pretrained_state("densenet121", "IMAGENET1K_V1").keys() == now.keys()


def test_normalisation():
    assert normalisation("resnet18", 3) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert normalisation("googlenet", 3) == ((0.5,) * 3, (0.5,) * 3)
    assert normalisation("resnet18", 1)[0] == pytest.approx((0.449,), abs=1e-3)
