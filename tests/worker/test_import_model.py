import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from app.domain.errors import DataFault, UserFault
from worker.ingest import model
from worker.parts.backbones import build_backbone
from worker.parts.networks import load_network
from worker.report import Limits, Order, Reporter

pytestmark = pytest.mark.worker
LIMITS = Limits(max_entries=1, max_entry_bytes=1, max_unpacked_bytes=1, max_ratio=2, max_pixels=1)
RESNET = {"architecture": "resnet18", "image_size": 32}


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=3).state_dict()


@pytest.fixture
def bring(tmp_path):
    """Import bytes or a state dict under a description."""

    def run(content, **spec):
        path = tmp_path / "upload"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file({key: value.contiguous() for key, value in content.items()}, path)
        (tmp_path / "scratch").mkdir(exist_ok=True)
        order = Order(
            job="job_1", attempt=1, kind="internal", recipe="import_model", spec={"model": RESNET, **spec},
            upload=str(path), upload_name="mine.safetensors", scratch=str(tmp_path / "scratch"),
            cache=str(tmp_path), cache_bytes=0, threads=1, limits=LIMITS,
        )  # fmt: skip
        return model.run(order, Reporter(listener=lambda message: None)), tmp_path / "scratch" / "model"

    return run


def test_a_torchvision_network_comes_in_and_answers_the_same(bring, state):
    made, folder = bring(state, classes=["cat", "dog", "bird"])
    assert made.config.classes == ("cat", "dog", "bird")
    assert made.config.mean == (0.485, 0.456, 0.406)
    assert made.parameters == sum(p.numel() for p in torchvision.models.resnet18(num_classes=3).parameters())
    assert {file.name for file in made.files} == {"model.safetensors", "config.json", "README.md", "metrics.json"}
    stock = torchvision.models.resnet18(num_classes=3).eval()
    stock.load_state_dict(load_file(folder / "model.safetensors"))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(stock(x), load_network(made.config, folder / "model.safetensors")(x))
    assert torch.equal(stock.fc.weight, state["fc.weight"])


def test_classes_are_numbered_where_they_are_not_named(bring, state):
    assert bring(state)[0].config.classes == ("0", "1", "2")


def test_a_backbone_has_no_classes(bring, state):
    made, _ = bring({key: value for key, value in state.items() if not key.startswith("fc.")})
    assert made.config.classes == ()
    assert made.config.head is None


def test_a_hidden_head(bring, state):
    body = {key: value for key, value in state.items() if not key.startswith("fc.")}
    head = {
        "fc.0.weight": torch.randn(16, 512), "fc.0.bias": torch.zeros(16),
        "fc.2.weight": torch.randn(2, 16), "fc.2.bias": torch.zeros(2),
    }  # fmt: skip
    made, _ = bring({**body, **head}, classes=["a", "b"], head={"hidden": [16], "activation": "gelu"})
    assert made.config.head == {"hidden": [16], "activation": "gelu"}
    with pytest.raises(UserFault, match="fc"):
        bring({**body, **head}, classes=["a", "b"])


def test_half_precision_becomes_float32(bring, state):
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    _, folder = bring(half)
    assert load_file(folder / "model.safetensors")["fc.weight"].dtype == torch.float32


def test_auxiliary_heads_are_left_out(bring):
    torch.manual_seed(0)
    stock = torchvision.models.googlenet(num_classes=2, init_weights=False)
    made, _ = bring(stock.state_dict(), model={"architecture": "googlenet", "image_size": 32})
    assert made.config.classes == ("0", "1")


def test_a_squeezenet_head_is_read_as_linear(bring):
    torch.manual_seed(0)
    stock = torchvision.models.squeezenet1_1(num_classes=4)
    made, folder = bring(stock.state_dict(), model={"architecture": "squeezenet1_1", "image_size": 32})
    assert len(made.config.classes) == 4
    assert load_file(folder / "model.safetensors")["classifier.1.weight"].shape == (4, 512)


def test_small_networks_come_in_too(bring):
    backbone = build_backbone({"architecture": "small_cnn"}, channels=1, image_size=8, seed=0)
    wanted = {"architecture": "small_cnn", "image_size": 8}
    made, _ = bring(backbone.state_dict(), model=wanted, channels=1)
    assert made.config.image_size == 8
    assert made.config.mean == (0.5,)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickle_under_another_name_is_not_opened(bring, tmp_path):
    bomb = Bomb(tmp_path / "exploded")
    torch.save({"fc.weight": bomb}, tmp_path / "zip.pt")
    assert zipfile.is_zipfile(tmp_path / "zip.pt")
    for content in (pickle.dumps(bomb), (tmp_path / "zip.pt").read_bytes()):
        with pytest.raises(DataFault, match="never opened here") as caught:
            bring(content)
        assert "save_file" in str(caught.value.hint)
    assert not bomb.folder.exists()


def header(value):
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(raw)) + raw


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes and is no safetensors"),
        (b"\x01\x02", "2 bytes"),
        (struct.pack("<Q", 2**62) + b"{}", "announces a header of 4611686018427387904 bytes"),
        (struct.pack("<Q", 1000) + b"{}", "cut off"),
        (header(b"not json"), "not JSON"),
        (header(b"[" * 200_000), "not JSON"),
        (header([1, 2]), "not an object"),
        (header({}), "holds no tensors"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}), "not a valid safetensors"),
        (header({"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 8]}}) + b"\0" * 8, "not a valid"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                 "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + b"\0" * 4, "not a valid"),
        (header({"a": {"dtype": "EVIL", "shape": [1], "data_offsets": [0, 4]}}) + b"\0" * 4, "not a valid"),
    ],
)  # fmt: skip
def test_damaged_files(bring, content, message):
    with pytest.raises(DataFault, match=message):
        bring(content)


def test_too_many_tensors(bring, monkeypatch, state):
    monkeypatch.setattr(model, "MAX_TENSORS", 10)
    with pytest.raises(DataFault, match=r"lists 12\d tensors; at most 10"):
        bring(state)


def test_values_that_are_not_finite_are_named(bring, state):
    bad = {key: value.clone() for key, value in state.items()}
    bad["layer1.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    bad["fc.bias"][1] = float("inf")
    with pytest.raises(
        DataFault, match=r"not finite in (fc.bias, layer1.0.conv1.weight|layer1.0.conv1.weight, fc.bias)"
    ):
        bring(bad)


def test_differences_are_named(bring, state):
    with pytest.raises(UserFault, match=r"conv1.weight is \[64, 3, 7, 7\] and should be \[64, 1, 7, 7\]"):
        bring(state, channels=1)
    with pytest.raises(UserFault, match=r"does not fit resnet34.*layer1.2.conv1.weight is missing"):
        bring(state, model={"architecture": "resnet34", "image_size": 32})
    with pytest.raises(UserFault, match="rogue is not known"):
        bring({**state, "rogue": torch.zeros(1)})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"classes": ["a", "b"]}, "gives 3 outputs, and `classes` names 2"),
        ({"model": {"architecture": "resnet19", "image_size": 32}}, "no architecture 'resnet19'"),
        ({"mean": [0.5]}, "mean and std need 3 numbers"),
        ({"colour": True}, "colour"),
        ({"channels": 2}, "channels"),
    ],
)
def test_impossible_descriptions(bring, state, spec, message):
    with pytest.raises(UserFault, match=message):
        bring(state, **spec)


def test_classes_without_a_head(bring, state):
    body = {key: value for key, value in state.items() if not key.startswith("fc.")}
    with pytest.raises(UserFault, match="has no head"):
        bring(body, classes=["a", "b"])
